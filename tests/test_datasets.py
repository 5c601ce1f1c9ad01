"""Sources, subsets, settings and their errors, on real folders and in the hub's own formats."""

import io
import logging
import shutil

import datasets as hub
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import tiny
from semantic_aug import registry
from semantic_aug.datasets import ImageTable, Setting, find_spec, load_dataset, subsets
from semantic_aug.datasets.__main__ import main as datasets_main
from semantic_aug.datasets.images import fit, open_image, reads_alike
from semantic_aug.datasets.readers.folder import read_folder
from semantic_aug.datasets.readers.listing import read_listing
from semantic_aug.datasets.sets import elpv, elpv_shortcut
from semantic_aug.datasets.settings import dataset_name
from semantic_aug.errors import UserError, run_main

CLASSES = ("blue jay", "red fox", "toad")


def table_of(labels, names=None) -> ImageTable:
    """A table without images."""
    names = names or [f"class {i}" for i in range(max(labels) + 1)]
    return ImageTable.of(names, labels, [f"{i:06d}" for i in range(len(labels))], lambda row: Image.new("RGB", (2, 2)))


# --------------------------------------------------------------------------------------------------------- folders


def test_a_folder_with_splits(image_folder):
    dataset = load_dataset(f"folder:{image_folder}")
    assert (
        dataset.name.startswith("animals-")
        and dataset.class_names == CLASSES
        and dataset.folders == ("blue-jay", "red-fox", "toad")
    )
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (18, 6, 9)
    assert dataset.train.image(0).mode == "RGB" and dataset.train.counts().tolist() == [6, 6, 6]
    assert "3 classes, images: train 18, val 6, test 9" in dataset.describe()


def test_a_plain_folder_gets_a_held_out_validation_split(tmp_path, image_folder):
    shutil.copytree(image_folder / "train", tmp_path / "plain")
    dataset = load_dataset(f"folder:{tmp_path / 'plain'}", Setting(val_fraction=0.3))
    assert (len(dataset.train), len(dataset.val), dataset.test) == (12, 6, None)
    assert not set(dataset.train.keys) & set(dataset.val.keys)
    again = load_dataset(f"folder:{tmp_path / 'plain'}", Setting(val_fraction=0.3, examples_per_class=1))
    assert again.val.keys == dataset.val.keys  # few-shot draws come from what is left
    assert set(again.train.keys) <= set(dataset.train.keys)


def test_the_same_folder_through_the_yaml(tmp_path, image_folder):
    (tmp_path / "datasets.yaml").write_text(
        f"pets:\n  folder: {image_folder}\n  super_class: animal\n  class_names: {{red fox: Vulpes vulpes}}\n"
    )
    dataset = load_dataset("pets", config_dir=tmp_path)
    assert dataset.name == "pets" and dataset.spec.super_class == "animal"
    assert dataset.class_names == ("blue jay", "Vulpes vulpes", "toad") and dataset.source_names == CLASSES


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("pets: {folder: a, csv: b}", "names folder and csv: expected exactly one"),
        ("pets: {super_class: x}", "names no source"),
        ("pets: {foldr: a}", "unknown field in entry 'pets'.*'foldr': did you mean 'folder'"),
        ("pets: just text", "expected a mapping"),
        ("pets: {folder: a, class_name_rules: [upper]}", "unknown class_name_rules.*'upper'"),
    ],
)
def test_damaged_entries_are_one_clear_line(tmp_path, entry, message):
    (tmp_path / "datasets.yaml").write_text(entry)
    with pytest.raises(UserError, match=message):
        load_dataset("pets", config_dir=tmp_path)


def test_unknown_names_and_schemes():
    with pytest.raises(UserError, match="unknown data set 'cubs': did you mean 'cub'"):
        load_dataset("cubs")
    with pytest.raises(UserError, match="unknown data set scheme 'foldr': did you mean 'folder'"):
        load_dataset("foldr:/x")
    with pytest.raises(UserError, match="is not a folder"):
        load_dataset("folder:/does/not/exist")


@pytest.mark.parametrize("word", ["folder:~nobody-here/x", "csv:~nobody-here/x.csv", "hf:~nobody-here/x"])
def test_the_home_of_an_unknown_user_is_one_clear_line(tmp_path, monkeypatch, capsys, word):
    message = "~nobody-here/x(.csv)?: no home folder is known for ~nobody-here: give the whole path"
    for read in (load_dataset, dataset_name):
        with pytest.raises(UserError, match=message):
            read(word)
    (tmp_path / "datasets.yaml").write_text("mine: {folder: ~nobody-here/x}\n")
    with pytest.raises(UserError, match=message):
        load_dataset("mine", config_dir=tmp_path)
    assert run_main(datasets_main, ["--config_dir", "~nobody-here", "list"]) == 2
    assert capsys.readouterr().err.startswith("error: ~nobody-here: no home folder")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=f"({tmp_path}|~)/x"):
        load_dataset(word.replace("~nobody-here", "~"))


def test_bad_folders_are_one_clear_line(tmp_path):
    (tmp_path / "one" / "a").mkdir(parents=True)
    tiny.picture(0, 0).save(tmp_path / "one" / "a" / "x.png")
    with pytest.raises(UserError, match="holds one class folder \\('a'\\): expected at least two"):
        load_dataset(f"folder:{tmp_path / 'one'}")
    (tmp_path / "one" / "b").mkdir()
    (tmp_path / "one" / "b" / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="class folder .*b holds no image: expected files ending in .jpg"):
        load_dataset(f"folder:{tmp_path / 'one'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no class folders"):
        load_dataset(f"folder:{tmp_path / 'empty'}")


def test_a_test_class_without_training_images_is_refused(tmp_path, image_folder):
    shutil.copytree(image_folder, tmp_path / "odd")
    shutil.copytree(tmp_path / "odd" / "test" / "toad", tmp_path / "odd" / "test" / "newt")
    with pytest.raises(UserError, match="split test has the class 'newt', which split train lacks"):
        load_dataset(f"folder:{tmp_path / 'odd'}")


def test_awkward_class_names_survive(tmp_path):
    names = ["a b", "a-b", "Größe", "日本", 'it\'s "x"', "100%"]
    for name in names:
        (tmp_path / "odd" / name).mkdir(parents=True)
        tiny.picture(0, 0).save(tmp_path / "odd" / name / "x.png")
        tiny.picture(0, 1).save(tmp_path / "odd" / name / "y.png")
    dataset = load_dataset(f"folder:{tmp_path / 'odd'}")
    assert set(dataset.source_names) == set(names) and len({f.casefold() for f in dataset.folders}) == len(names)


def test_names_that_collide_after_the_clean_up_keep_their_spelling(tmp_path, caplog):
    for name in ("red_fox", "red fox", "toad"):
        (tmp_path / "odd" / name).mkdir(parents=True)
        tiny.picture(0, 0).save(tmp_path / "odd" / name / "x.png")
    dataset = load_dataset(f"folder:{tmp_path / 'odd'}")
    assert dataset.class_names == ("red fox", "red_fox", "toad") and "coincide" in caplog.text


def test_more_shots_than_a_class_has_uses_all_and_says_so(image_folder, caplog):
    dataset = load_dataset(f"folder:{image_folder}", Setting(examples_per_class=50))
    assert len(dataset.train) == 18 and "fewer than 50 training images" in caplog.text


# ------------------------------------------------------------------------------------------------------------ CSVs


def names_of(*argv) -> list[str]:
    return [find_spec(str(word)).name for word in argv]


def test_default_names_are_readable_and_one_to_one(tmp_path):
    folders = [
        tmp_path / name for name in ("a/data", "b/data", "cells.v1", "cells.v2", "猫", "狗", "a/data-x", "a/data x")
    ]
    lists = [tmp_path / name for name in ("a/train.csv", "b/train.csv", "a/train.parquet")]
    copies = [tmp_path / name for name in ("a/copy", "b/copy")]
    for folder in (*folders, *copies):
        folder.mkdir(parents=True)
    names = names_of(*(f"folder:{f}" for f in folders), *(f"csv:{f}" for f in lists), *(f"hf:{f}" for f in copies))
    assert len({name.casefold() for name in names}) == len(names)
    readable = [name.rpartition("-")[0] for name in names]
    assert readable[:6] == ["data", "data", "cells.v1", "cells.v2", "data", "data"]
    assert readable[8:] == ["a-train", "b-train", "a-train", "copy", "copy"]
    (tmp_path / "link").symlink_to(folders[0])  # one data set has one name, however it is reached
    assert names_of(f"folder:{tmp_path / 'link'}", f"folder:{folders[0]}/../data/") == [names[0]] * 2


def test_hub_ids_keep_plain_names_where_no_other_id_has_the_same():
    assert names_of("hf:ethz/food101", "hf:org/my-data", "hf:cifar10") == ["ethz-food101", "org-my-data", "cifar10"]
    ids = ["org/my-data", "org/my_data", "org-my/data", "org/my--data", "org-my-data", "a/" + "x" * 90, "a/" + "x" * 91]
    names = names_of(*(f"hf:{name}" for name in ids))
    assert len(set(names)) == len(ids) and names_of("hf:cub") != ["cub"]


def test_a_registry_section_of_the_former_plain_name_is_found(image_folder, tmp_path, caplog):
    dataset = load_dataset(f"folder:{image_folder}")
    caplog.set_level(logging.INFO, "semantic_aug")
    file = tmp_path / registry.SUBSETS
    file.write_text("animals: {old: outputs/old, both: outputs/old2}\n")
    assert dataset.subsets("old", tmp_path) == ["outputs/old"]
    assert dataset.subsets("old#filtered", tmp_path) == ["outputs/old#filtered"]
    assert "old of synthetic_datasets.yaml is taken from section 'animals'" in caplog.text
    registry.register(registry.SUBSETS, dataset.name, "both", "outputs/new", tmp_path)
    assert dataset.subsets("both", tmp_path) == ["outputs/new"] and dataset.subsets("old", tmp_path) == ["outputs/old"]
    with pytest.raises(UserError, match=f"unknown subset key of data set '{dataset.name}' 'bth': did you mean 'both'"):
        dataset.subsets("bth", tmp_path)
    file.write_text(f"pets: {{old: outputs/old}}\n{dataset.name}: {{}}\n")
    with pytest.raises(UserError, match="unknown subset key"):
        dataset.subsets("old", tmp_path)


def write_csv(folder, lines, header="path,label,split"):
    for i in range(4):
        tiny.picture(i % 2, i).save(folder / f"{i}.png")
    (folder / "list.csv").write_text("\n".join([header, *lines]) + "\n")
    return f"csv:{folder / 'list.csv'}"


def test_a_csv(tmp_path):
    word = write_csv(tmp_path, ["0.png,owl,train", "1.png,toad,train", "2.png,owl,validation", "3.png,toad,test"])
    dataset = load_dataset(word)
    assert dataset.class_names == ("owl", "toad") and (len(dataset.train), len(dataset.val), len(dataset.test)) == (
        2,
        1,
        1,
    )
    assert dataset.train.image(1).size == (40, 36)


@pytest.mark.parametrize(
    ("lines", "header", "message"),
    [
        (["../x.png,owl,train"], "path,label,split", "line 2: path '../x.png' leads outside"),
        (["/etc/x.png,owl,train", "0.png,toad,train"], "path,label,split", "1 of 2 images are not there .*/etc/x.png"),
        (["0.png,,train"], "path,label,split", "line 2: the label is empty"),
        (["0.png,owl,dev set"], "path,label,split", "split 'dev set': expected train, val or test"),
        (["0.png,owl"], "file,label", "lacks the column 'path'"),
        (["0.png,owl", "1.png,owl"], "path,label", "has 1 class \\(owl\\): expected at least two"),
        (["0.png,owl,test"], "path,label,split", "has no row of split train"),
    ],
)
def test_bad_csvs_are_one_clear_line(tmp_path, lines, header, message):
    with pytest.raises(UserError, match=message):
        load_dataset(write_csv(tmp_path, lines, header))


def test_missing_images_are_counted_and_named_before_a_run(tmp_path):
    word = write_csv(tmp_path, ["0.png,owl,train", "gone.png,toad,train", "1.png,toad,train", "lost.png,toad,val"])
    with pytest.raises(UserError, match="data set .*: 2 of 4 images are not there .the first: .*gone.png, split train"):
        load_dataset(word)
    with pytest.raises(UserError, match="gone.png is not there"):
        read_listing(tmp_path / "list.csv")["train"].image(2)


# ------------------------------------------------------------------------------------------------- the hub's formats


def hub_rows(count_per_class=3, names=("Laysan Albatross", "Sooty Albatross"), strings=False) -> hub.Dataset:
    images = [tiny.picture(label, i) for label in range(len(names)) for i in range(count_per_class)]
    labels = [label for label in range(len(names)) for _ in range(count_per_class)]
    kind = hub.Value("string") if strings else hub.ClassLabel(names=list(names))
    features = hub.Features({"image": hub.Image(), "label": kind, "caption": hub.Value("string")})
    values = [names[label] for label in labels] if strings else labels
    return hub.Dataset.from_dict({"image": images, "label": values, "caption": ["x"] * len(labels)}, features=features)


@pytest.fixture
def no_cub_folders(monkeypatch):
    for split in ("TRAIN", "TEST"):
        monkeypatch.delenv(f"CUB_HUG_LOCAL_IMAGE_{split}_DIR", raising=False)


@pytest.mark.parametrize("layout", ["parquet", "save_to_disk"])
def test_cub_from_local_copies_named_by_environment_variables(tmp_path, monkeypatch, layout):
    for split, count in (("train", 4), ("test", 2)):
        folder = tmp_path / split
        if layout == "parquet":
            (folder / "data").mkdir(parents=True)
            hub_rows(count).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
        else:
            hub_rows(count).save_to_disk(folder)
        monkeypatch.setenv(f"CUB_HUG_LOCAL_IMAGE_{split.upper()}_DIR", str(folder))
    dataset = load_dataset("cub", Setting(examples_per_class=2, val_fraction=0.25))
    assert dataset.class_names == ("Laysan Albatross", "Sooty Albatross") and dataset.spec.super_class == "bird"
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (4, 2, 4)
    assert np.array_equal(np.asarray(dataset.test.image(0)), np.asarray(tiny.picture(0, 0)))


def test_the_constant_in_the_module_serves_too(tmp_path, monkeypatch, no_cub_folders):
    from semantic_aug.datasets.sets import cub

    for split in ("train", "test"):
        hub_rows().save_to_disk(tmp_path / split)
        monkeypatch.setattr(cub, f"HUG_LOCAL_IMAGE_{split.upper()}_DIR", str(tmp_path / split))
    assert len(load_dataset("cub").test) == 6


def test_without_a_hub_the_error_says_what_to_do(no_cub_folders):
    with pytest.raises(UserError, match="CUB_train could not be loaded from the hub .*set CUB_ROOT"):
        load_dataset("cub")


def test_aircraft_reads_its_own_variables(tmp_path, monkeypatch):
    for split in ("train", "test"):
        hub_rows(3, ("737-200", "F-16A/B")).save_to_disk(tmp_path / split)
        monkeypatch.setenv(f"AIRCRAFT_HUG_LOCAL_IMAGE_{split.upper()}_DIR", str(tmp_path / split))
    dataset = load_dataset("aircraft")
    assert dataset.class_names == ("737-200", "F-16A or B") and dataset.folders == ("737-200", "F-16A-B")


def test_a_local_folder_of_several_splits_by_scheme(tmp_path):
    hub.DatasetDict({"train": hub_rows(4), "validation": hub_rows(1), "test": hub_rows(2)}).save_to_disk(
        tmp_path / "mine"
    )
    dataset = load_dataset(f"hf:{tmp_path / 'mine'}")
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (8, 2, 4)
    with pytest.raises(
        UserError, match="was written by save_to_disk from the configuration 'default': leave out 'fine'"
    ):
        load_dataset(f"hf:{tmp_path / 'mine'}:fine")


def test_labels_may_be_strings(tmp_path):
    hub_rows(strings=True).save_to_disk(tmp_path / "mine")
    assert load_dataset(f"hf:{tmp_path / 'mine'}").class_names == ("Laysan Albatross", "Sooty Albatross")


def test_reading_labels_decodes_no_image(tmp_path):
    rows = hub_rows()
    broken = hub.Dataset.from_dict(
        {"image": [{"bytes": b"not an image", "path": None}] * len(rows), "label": rows["label"]},
        features=hub.Features({"image": hub.Image(), "label": rows.features["label"]}),
    )
    broken.save_to_disk(tmp_path / "mine")
    dataset = load_dataset(f"hf:{tmp_path / 'mine'}")
    assert dataset.train.counts().sum() + dataset.val.counts().sum() == len(rows)
    with pytest.raises(UserError, match="mine train\\[0\\] cannot be decoded"):
        dataset.train.read(0)


def test_hub_data_without_images_or_labels(tmp_path):
    hub_rows().remove_columns("image").save_to_disk(tmp_path / "a")
    hub_rows().remove_columns("label").save_to_disk(tmp_path / "b")
    with pytest.raises(UserError, match="has no image column"):
        load_dataset(f"hf:{tmp_path / 'a'}")
    with pytest.raises(UserError, match="has no label column"):
        load_dataset(f"hf:{tmp_path / 'b'}")


# ---------------------------------------------------------------------------------------------------------- images


def encoded(image: Image.Image, kind="PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize(
    ("image", "kind", "pixel"),
    [
        (Image.new("L", (3, 2), 100), "PNG", (100, 100, 100)),
        (Image.new("RGBA", (3, 2), (200, 0, 0, 0)), "PNG", (255, 255, 255)),
        (Image.new("LA", (3, 2), (50, 255)), "PNG", (50, 50, 50)),
        (Image.new("CMYK", (3, 2), (0, 0, 0, 255)), "JPEG", (0, 0, 0)),
        (Image.fromarray(np.full((2, 3), 40000, np.uint16)), "PNG", (156, 156, 156)),
        (Image.new("P", (3, 2)), "PNG", (0, 0, 0)),
        (Image.new("1", (3, 2), 1), "PNG", (255, 255, 255)),
    ],
)
def test_every_mode_becomes_rgb(image, kind, pixel):
    opened = open_image(encoded(image, kind))
    assert opened.mode == "RGB" and opened.size == (3, 2) and opened.getpixel((1, 1)) == pixel


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_a_transparent_colour_is_laid_over_white(mode):
    """As optimisers of PNG files write pictures that were cut out."""
    image = Image.new(mode, (3, 2))
    colour = (0, 0, 0) if mode == "RGB" else 0
    assert open_image(encoded(image)).getpixel((1, 1)) == (0, 0, 0) and reads_alike(encoded(image))
    content = encoded(image, transparency=colour)
    assert open_image(content).getpixel((1, 1)) == (255, 255, 255) and not reads_alike(content)
    image.putpixel((0, 0), 1 if mode in "1P" else 90 if mode == "L" else (90, 90, 90))
    kept = open_image(encoded(image, transparency=colour)).getpixel((0, 0))
    assert kept == open_image(encoded(image)).getpixel((0, 0))


def test_exif_rotation_is_applied():
    image, exif = Image.new("RGB", (4, 2)), Image.Exif()
    exif[0x0112] = 6
    assert open_image(encoded(image, "JPEG", exif=exif)).size == (2, 4)


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    assert open_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])).getpixel((0, 0)) == (
        255,
        0,
        0,
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"hello", "cannot be decoded"),
        (encoded(tiny.picture(0, 0))[:200], "cannot be decoded"),
    ],
)
def test_unreadable_images_are_one_clear_line(tmp_path, content, message):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(UserError, match=f"x.png {message}"):
        open_image(tmp_path / "x.png")


def test_a_decompression_bomb_is_refused(monkeypatch):
    bomb = encoded(Image.new("1", (20000, 20000)))
    assert len(bomb) < 100_000
    with pytest.raises(UserError, match="decompression bomb"):
        open_image(bomb, "bomb.png")


def test_fit():
    image = Image.new("RGB", (40, 20))
    image.paste((255, 255, 255), (0, 0, 10, 20))
    assert fit(image, 20, "squash").getpixel((1, 10)) == (255, 255, 255)
    assert fit(image, 20, "crop").getpixel((1, 10)) == (0, 0, 0)
    with pytest.raises(ValueError, match="expected 'squash' or 'crop'"):
        fit(image, 20, "pad")


# --------------------------------------------------------------------------------------------------------- subsets

LABELS = st.lists(st.integers(0, 5), min_size=1, max_size=120)


@given(LABELS, st.integers(1, 9), st.integers(1, 9), st.integers(0, 3))
@settings(max_examples=100)
def test_few_shot_sets_are_nested_sized_and_sorted(labels, a, b, seed):
    table = table_of(labels)
    small, large = (subsets.few_shot(table, n, seed) for n in sorted((a, b)))
    assert set(small.keys) <= set(large.keys) and list(large.keys) == sorted(large.keys)
    assert large.counts().tolist() == np.minimum(table.counts(), max(a, b)).tolist()


@given(LABELS, st.randoms())
@settings(max_examples=50)
def test_draws_do_not_depend_on_the_listing_order(labels, random):
    names = [f"class {i}" for i in range(6)]
    order = list(range(len(labels)))
    random.shuffle(order)
    read = lambda row: None  # noqa: E731
    one = ImageTable.of(names, labels, [f"k{i:04d}" for i in range(len(labels))], read)
    two = ImageTable.of(names, [labels[i] for i in order], [f"k{i:04d}" for i in order], read)
    assert subsets.few_shot(one, 2, 5).keys == subsets.few_shot(two, 2, 5).keys
    tailed = Setting(task="imbalanced", imbalance_factor=0.1)
    assert subsets.apply_setting(one, tailed).keys == subsets.apply_setting(two, tailed).keys


@given(st.lists(st.integers(0, 3), min_size=1, max_size=80), st.integers(1, 40), st.integers(0, 3))
@settings(max_examples=100)
def test_few_shot_draws_keep_the_shares_of_groups(groups, count, seed):
    names = [f"k{i:04d}" for i in range(len(groups))]
    table = ImageTable.of(["one"], [0] * len(groups), names, lambda row: None, extras={"group": groups})
    drawn = np.bincount(subsets.few_shot(table, count, seed).extras["group"], minlength=4)
    share = np.bincount(groups, minlength=4) * min(1, count / len(groups))
    assert (np.abs(drawn - share) <= 1 + 1e-9).all(), (drawn, share)


def test_seeds_draw_different_sets():
    table = table_of([0] * 50 + [1] * 50)
    assert subsets.few_shot(table, 5, 0).keys != subsets.few_shot(table, 5, 1).keys


@given(st.lists(st.integers(1, 500), min_size=2, max_size=30), st.floats(0.001, 1))
@settings(max_examples=100)
def test_long_tail_counts_follow_the_profile(counts, factor):
    result = subsets.long_tail_counts(counts, factor)
    order = np.argsort(-np.asarray(counts), kind="stable")
    wanted = max(counts) * factor ** (np.arange(len(counts)) / (len(counts) - 1))
    assert (np.diff(result[order]) <= 0).all() and (result >= 1).all() and (result <= counts).all()
    assert (result[order] <= np.maximum(1, wanted + 1)).all()
    full = np.asarray(counts)[order] >= wanted + 1
    assert (np.abs(result[order] - np.maximum(1, wanted))[full] <= 1).all()


@given(LABELS, st.floats(0, 0.9), st.integers(0, 3))
@settings(max_examples=100)
def test_held_out_validation_is_disjoint_and_leaves_every_class(labels, fraction, seed):
    table = table_of(labels)
    rest, val = subsets.hold_out(table, fraction, seed)
    keys = list(rest.keys) + (list(val.keys) if val else [])
    assert sorted(keys) == sorted(table.keys)
    assert ((rest.counts() > 0) == (table.counts() > 0)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"examples_per_class": 0}, "--examples_per_class 0: expected -1"),
        ({"imbalance_factor": 0}, "expected a number in \\(0, 1\\]"),
        ({"task": "tail"}, "--task tail: expected one of vanilla, imbalanced"),
        ({"val_examples_per_class": 0}, "--val_examples_per_class 0: expected -1"),
        ({"val_fraction": 1}, "expected a number in \\[0, 1\\)"),
    ],
)
def test_settings_are_checked(arguments, message):
    with pytest.raises(UserError, match=message):
        Setting(**arguments)


def test_validation_beside_few_shots_is_said_and_bounded(image_folder):
    one = load_dataset(f"folder:{image_folder}", Setting(examples_per_class=1))
    assert "train 3, val 6, test 9 (more validation than training images: --val_examples_per_class" in one.describe()
    bounded = load_dataset(f"folder:{image_folder}", Setting(examples_per_class=1, val_examples_per_class=1))
    assert bounded.describe().endswith("train 3, val 3, test 9") and bounded.val.counts().tolist() == [1, 1, 1]
    assert bounded.train.keys == one.train.keys and set(bounded.val.keys) < set(one.val.keys)
    other = [Setting(examples_per_class=1, val_examples_per_class=1, subset_seed=seed) for seed in range(1, 5)]
    assert any(load_dataset(f"folder:{image_folder}", s).val.keys != bounded.val.keys for s in other)
    held = Setting(val_fraction=0.5, val_examples_per_class=1)  # what is left out of validation does not go into train
    cut, whole = (load_dataset(f"folder:{image_folder}/train", s) for s in (held, Setting(val_fraction=0.5)))
    assert cut.train.keys == whole.train.keys and (len(cut.val), len(whole.val)) == (3, 9)


def test_the_long_tail_setting_through_the_catalog(image_folder):
    dataset = load_dataset(f"folder:{image_folder}", Setting(task="imbalanced", imbalance_factor=0.2))
    assert sorted(dataset.train.counts().tolist()) == [1, 3, 6] and dataset.setting.suffix == "_imb0.2"


# ------------------------------------------------------------------------------------------------------------ ELPV


def stratified_split(labels: list[tuple[str, str, int]], seed: int = 0) -> dict[str, str]:
    """Image name -> split, 60/15/25 % of every class; a pure function of the label file and the seed."""
    split = {}
    strata = sorted({f"{kind}_{level}" for _, kind, level in labels})
    for index, stratum in enumerate(strata):
        names = np.array([name for name, kind, level in labels if f"{kind}_{level}" == stratum])
        names = np.random.default_rng([seed, index]).permutation(names)
        train, val = round(0.6 * len(names)), round(0.15 * len(names))
        for position, name in enumerate(names):
            split[str(name)] = "train" if position < train else "val" if position < train + val else "test"
    return split


def test_elpv_split_is_the_recorded_stratified_draw():
    labels = elpv.read_labels(elpv.package_folder())
    splits = elpv.read()
    assert {k: len(v) for k, v in splits.items()} == {"train": 1575, "val": 394, "test": 655}
    drawn = stratified_split(labels)
    assert all(drawn[key] == split for split, table in splits.items() for key in table.keys)
    shares = splits["train"].counts() / sum(t.counts() for t in splits.values())
    assert np.abs(shares - 0.6).max() < 0.01 and splits["test"].class_names == elpv.CLASS_NAMES


def test_the_shortcut_of_elpv_is_nineteen_to_one_and_keeps_the_splits():
    splits, whole = elpv_shortcut.read(), elpv.read()
    assert np.bincount(splits["train"].extras["group"]).tolist() == [353, 19, 13, 241]
    assert np.bincount(subsets.few_shot(splits["train"], 40, 3).extras["group"]).tolist() == [38, 2, 2, 38]
    for split, table in splits.items():
        name_of = {key: whole[split].class_names[label] for key, label in zip(whole[split].keys, whole[split].labels)}
        assert [elpv_shortcut.GROUPS[group] for group in table.extras["group"]] == [name_of[key] for key in table.keys]
        classes = [table.class_names[label] for label in table.labels]
        assert all(name_of[key].endswith(f" {name}") for key, name in zip(table.keys, classes))


def test_elpv_images_and_labels_belong_together():
    table = elpv.read()["train"]
    row = table.keys.index("cell0001")
    assert table.class_names[table.labels[row]] == "mono defective" and table.image(row).size == (300, 300)


def test_signatures_tell_changed_files(tmp_path, image_folder):
    shutil.copytree(image_folder, tmp_path / "copy")
    first = read_folder(tmp_path / "copy")["train"]
    before = first.signature()
    assert read_folder(tmp_path / "copy")["train"].signature() == before
    tiny.picture(5, 5).save(tmp_path / "copy" / "train" / "toad" / "train000.png")
    assert read_folder(tmp_path / "copy")["train"].signature() != before
