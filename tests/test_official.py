"""Every registered data set, read from its official download in small: all splits, all settings, and damaged copies."""

import functools
import hashlib
import http.server
import json
import re
import shutil
import tarfile
import threading
import zipfile
from dataclasses import replace

import numpy as np
import pytest

import official_layouts
from official_layouts import WRITERS
from semantic_aug.datasets import Setting, catalog, load_dataset, sets
from semantic_aug.datasets.__main__ import main
from semantic_aug.datasets.sets import food, signs
from semantic_aug.errors import UserError, run_main


@pytest.fixture(scope="session")
def downloads(tmp_path_factory):
    """Every official download in small, by name, with what it should give."""
    root = tmp_path_factory.mktemp("downloads")
    return {name: (root / name, write(root / name)) for name, write in WRITERS.items() if not (root / name).mkdir()}


@pytest.fixture
def use(downloads, monkeypatch):
    """Names a download by its environment variable and returns what it should give."""

    def named(name):
        folder, expected = downloads[name]
        monkeypatch.setenv(f"{name.upper()}_ROOT", str(folder))
        return expected

    for name in WRITERS:
        monkeypatch.delenv(f"{name.upper()}_ROOT", raising=False)
    return named


def test_every_registered_data_set_has_a_fixture_here_or_a_package():
    assert set(sets.NAMES) == set(WRITERS) | {"elpv", "elpv_shortcut"}


@pytest.mark.parametrize("name", WRITERS)
def test_all_splits(name, use):
    names, sizes = use(name)
    splits = catalog.find_spec(name).read()
    assert {split: len(table) for split, table in splits.items()} == sizes
    for table in splits.values():
        assert list(table.class_names) == list(names)
        assert all(table.image(i).mode == "RGB" for i in range(0, len(table), 5))
    assert (splits["train"].counts() > 0).sum() == 3 == (splits["test"].counts() > 0).sum()
    keys = [set(table.keys) for table in splits.values()]
    assert len(set.union(*keys)) == sum(sizes.values())


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize(
    "setting",
    [
        Setting(examples_per_class=1),
        Setting(examples_per_class=2, subset_seed=3),
        Setting(task="imbalanced", imbalance_factor=0.3),
        Setting(task="imbalanced", imbalance_factor=1.0),
        Setting(task="imbalanced", imbalance_factor=0.3, imbalance_profile="original"),
        Setting(corrupt_prob=0.5),
        Setting(task="imbalanced", imbalance_factor=0.5, examples_per_class=1, corrupt_prob=1.0),
    ],
    ids=str,
)
def test_all_settings(name, use, setting):
    use(name)
    dataset, whole = load_dataset(name, setting), load_dataset(name, Setting(subset_seed=setting.subset_seed))
    assert set(dataset.train.keys) <= set(whole.train.keys) and dataset.val.keys == whole.val.keys
    assert dataset.test.keys == whole.test.keys and dataset.test.labels.tolist() == whole.test.labels.tolist()
    if setting.examples_per_class > 0 and not setting.corrupt_prob:
        assert dataset.train.counts().max() == setting.examples_per_class
    assert len(dataset.train) > 0 and len(set(dataset.folders)) == len(dataset.class_names)


def test_prompt_names(use):
    for name, expected in {
        "cub": "Black footed Albatross",
        "dog": "Chihuahua",
        "pet": "Abyssinian",
        "food": "apple pie",
        "pascal": "airplane",
        "car": "AM General Hummer SUV 2000",
        "waterbird": "Black footed Albatross",
        "flower": "pink primrose",
        "signs": "digit 0",
        "seedlings": "Black-grass",
    }.items():
        use(name)
        assert load_dataset(name).class_names[0] == expected


def test_labels_are_those_of_the_lists(use, downloads):
    use("flower")
    splits = catalog.find_spec("flower").read()
    assert splits["train"].keys[2] == "image_00005.jpg" and splits["train"].labels[2] == 76
    assert splits["train"].class_names[76] == "passion flower" and len(set(splits["train"].class_names)) == 102
    use("cub")
    train = catalog.find_spec("cub").read()["train"]
    assert train.extras["box"][0].tolist() == [4, 3, 24, 13]
    assert all(train.class_names[y] == key.split("/")[0] for y, key in zip(train.labels, train.keys, strict=True))
    use("pascal")
    train = catalog.find_spec("pascal").read()["train"]
    assert train.extras["box"][0].tolist() == [2, 2, 38, 30]
    assert [train.class_names[y] for y in train.labels[[0, 4, 8]]] == ["aeroplane", "diningtable", "tvmonitor"]
    use("car")
    train = catalog.find_spec("car").read()["train"]
    assert train.labels.tolist() == [0, 1, 2] * 4 and train.extras["box"].shape == (12, 4)


def test_shot_thresholds_are_those_of_the_published_long_tails():
    published = {"cub": (20, 5), "flower": (30, 10)}
    assert all(catalog.find_spec(name).shot_thresholds == published.get(name, (100, 20)) for name in sets.NAMES)


def test_waterbirds_groups_stay_with_their_images(use):
    use("waterbird")
    dataset = load_dataset("waterbird", Setting(examples_per_class=3))
    assert dataset.spec.group_names[3] == "water bird on water"
    for table in (dataset.train, dataset.val, dataset.test):
        water_bird = [key.startswith("001.") for key in table.keys]
        on_water = [int(key[-5]) % 2 for key in table.keys]
        expected = [2 * bird + place for bird, place in zip(water_bird, on_water, strict=True)]
        assert table.extras["group"].tolist() == expected


def test_caltech_draw_is_fixed_and_leaves_the_background_out(use):
    use("caltech")
    one, two = (catalog.find_spec("caltech").read() for _ in range(2))
    assert one["train"].keys == two["train"].keys and one["train"].counts().tolist() == [30, 30, 30]
    assert not any("BACKGROUND" in key for table in one.values() for key in table.keys)


def test_splits_by_the_numbers_of_the_files(use):
    use("signs")
    numbers = {split: [int(key[-8:-4]) for key in t.keys] for split, t in catalog.find_spec("signs").read().items()}
    assert max(numbers["train"]) < 5136 <= min(numbers["val"]) and max(numbers["val"]) < 5469 <= min(numbers["test"])
    use("seedlings")
    splits = catalog.find_spec("seedlings").read()
    assert [key for key in splits["val"].keys if key.startswith("Maize")] == ["Maize/10.png", "Maize/11.png"]


def test_a_split_of_which_no_photograph_is_there_counts_as_absent(tmp_path, monkeypatch):
    WRITERS["signs"](tmp_path)
    for file in tmp_path.rglob("IMG_5[14]*.JPG"):
        if 5136 <= int(file.stem[4:]) < 5469:
            file.unlink()
    monkeypatch.setenv("SIGNS_ROOT", str(tmp_path))
    dataset = load_dataset("signs")
    assert [len(dataset.train), len(dataset.val), len(dataset.test)] == [
        9,
        3,
        9,
    ]  # one of four of each class is held out


@pytest.mark.parametrize("name", ["seedlings", "signs"])
def test_a_folder_of_splits_is_read_as_it_is(name, tmp_path, monkeypatch):
    import tiny

    for split, count in (("train", 4), ("val", 2), ("test", 3)):
        for label in range(3):
            for i in range(count):
                file = tmp_path / split / f"class_{label}" / f"{split}{i}.jpg"
                file.parent.mkdir(parents=True, exist_ok=True)
                tiny.picture(label, i).save(file)
    monkeypatch.setenv(f"{name.upper()}_ROOT", str(tmp_path))
    splits = catalog.find_spec(name).read()
    assert {split: len(table) for split, table in splits.items()} == {"train": 12, "val": 6, "test": 9}
    assert splits["val"].class_names == ("class_0", "class_1", "class_2")


def test_a_validation_folder_without_a_test_folder_is_not_passed_over(downloads, tmp_path, monkeypatch):
    for split in ("train", "valid"):
        shutil.copytree(downloads["seedlings"][0], tmp_path / split)
    (tmp_path / "valid" / "Maize" / "10.png").unlink()
    monkeypatch.setenv("SEEDLINGS_ROOT", str(tmp_path))
    splits = catalog.find_spec("seedlings").read()
    assert set(splits) == {"train", "val"} and len(splits["val"]) == len(splits["train"]) - 1


def test_the_kaggle_copy_of_seedlings_has_no_labels_in_its_test_folder(downloads, tmp_path, monkeypatch):
    shutil.copytree(downloads["seedlings"][0], tmp_path / "train")
    (tmp_path / "test").mkdir()
    shutil.copy(tmp_path / "train" / "Maize" / "1.png", tmp_path / "test" / "unlabelled.png")
    monkeypatch.setenv("SEEDLINGS_ROOT", str(tmp_path))
    splits = catalog.find_spec("seedlings").read()
    assert {split: len(table) for split, table in splits.items()} == downloads["seedlings"][1][1]


def test_the_older_layout_of_cars(tmp_path, monkeypatch):
    names, sizes = official_layouts.write_car_single(tmp_path)
    monkeypatch.setenv("CAR_ROOT", str(tmp_path))
    splits = catalog.find_spec("car").read()
    assert {k: len(v) for k, v in splits.items()} == sizes and list(splits["train"].class_names) == names


def test_learning_labels_opens_no_image(use, monkeypatch):
    import PIL.Image

    for name in WRITERS:
        use(name)

    def no(*_, **__):
        raise AssertionError("an image was opened")

    monkeypatch.setattr(PIL.Image, "open", no)
    for name in (*WRITERS, "elpv", "elpv_shortcut"):
        assert load_dataset(name, Setting(examples_per_class=1)).train.counts().sum() > 0


def test_images_of_other_kinds_than_their_names_say(use, downloads):
    """Some of the pets are PNGs, GIFs or greyscale under the name .jpg."""
    use("pet")
    table = catalog.find_spec("pet").read()["train"]
    path = downloads["pet"][0] / "images" / table.keys[0]
    before = path.read_bytes()
    try:
        official_layouts.encoded_like(path, table.image(0).convert("P"), "GIF")
        assert table.image(0).mode == "RGB"
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("name", ["caltech", "dog", "pascal", "seedlings", "signs", "waterbird"])
def test_without_the_variable_the_error_says_where_to_get_it(name, use):
    with pytest.raises(UserError, match=f"get it at http.*set {name.upper()}_ROOT to the folder"):
        load_dataset(name)


def test_two_copies_at_once_are_refused(use, monkeypatch):
    use("cub")
    monkeypatch.setenv("CUB_HUG_LOCAL_IMAGE_TRAIN_DIR", "x")
    with pytest.raises(UserError, match="both CUB_ROOT and CUB_HUG_LOCAL_IMAGE_TRAIN_DIR are set: unset one"):
        load_dataset("cub")


def _cut(path):
    path.write_bytes(path.read_bytes()[:100])


def _swap(old, new):
    return lambda path: path.write_text(path.read_text().replace(old, new, 1))


@pytest.mark.parametrize(
    ("name", "file", "damage", "message"),
    [
        ("cub", "classes.txt", lambda p: p.unlink(), "classes.txt is not there: unpack the official download again"),
        ("cub", "images.txt", _swap("1 001.Bl", "1 ../001.Bl"), "leads outside .*images"),
        ("cub", "image_class_labels.txt", _swap("1 1\n", "1 9\n"), "has the label 9, which has no class name"),
        ("cub", "image_class_labels.txt", _swap("1 1\n", ""), "image_class_labels.txt has no line for image 1"),
        (
            "cub",
            "image_class_labels.txt",
            _swap("1 1\n", "1 one\n"),
            "image_class_labels.txt, image 1: 'one' is no number",
        ),
        (
            "cub",
            "train_test_split.txt",
            _swap("1 ", "1 x"),
            "train_test_split.txt: image 1 has 'x.', expected 1 .train. or 0",
        ),
        ("cub", "images.txt", _swap("1 001.Bl", "1\n2 001.Bl"), "images.txt line 1: '1' has 1 words, expected 2"),
        ("cub", "images.txt", lambda p: p.unlink(), "lacks images.txt or CUB_200_2011/images.txt"),
        ("aircraft", "data/images_variant_val.txt", _swap("MD-11", "MD-12"), "unknown variant.*'MD-12'.*'MD-11'"),
        ("flower", "setid.mat", _cut, "setid.mat cannot be read as a MATLAB file"),
        ("flower", "imagelabels.mat", lambda p: p.unlink(), "lacks imagelabels.mat"),
        ("dog", "train_list.mat", lambda p: p.write_bytes(b""), "train_list.mat cannot be read as a MATLAB file"),
        ("car", "cars_test_annos_withlabels.mat", lambda p: p.unlink(), "lacks cars_test_annos_withlabels.mat or"),
        ("pet", "annotations/test.txt", _swap("_100 1 1 1", "_100 99 1 1"), "has the class '99', expected 1 to 37"),
        ("food", "meta/test.txt", _swap("waffles", "wafles"), "unknown class in .*'wafles': did you mean 'waffles'"),
        ("food", "meta/train.txt", lambda p: p.write_text(""), "train.txt is empty"),
        ("pascal", "Annotations/2007_000001.xml", _swap("</object>", ""), "2007_000001.xml is not a VOC annotation"),
        ("pascal", "Annotations/2007_000001.xml", lambda p: p.write_text("<a/>"), "names no object"),
        ("pascal", "Annotations/2007_000001.xml", _swap("aeroplane", "zeppelin"), "unknown class in .*'zeppelin'"),
        ("waterbird", "metadata.csv", _swap(",1,0,0,", ",1,7,0,"), "metadata.csv line 2: split '7': expected 0, 1, 2"),
        ("signs", "Dataset/7", lambda p: p.rmdir(), "Dataset lacks 7"),
        (
            "signs",
            "Dataset/1/IMG_1119.JPG",
            lambda p: p.rename(p.with_name("me.JPG")),
            "me.JPG has no number in its name",
        ),
        ("seedlings", "Maize", lambda p: [file.unlink() for file in p.iterdir()], "Maize holds no image"),
        ("waterbird", "metadata.csv", _swap("place,", "where,"), "lacks the column 'place'"),
        (
            "waterbird",
            "metadata.csv",
            lambda p: p.write_bytes(b"y\xff"),
            "metadata.csv is no list .*: unpack the official",
        ),
    ],
)
def test_damaged_downloads_are_one_clear_line(name, file, damage, message, tmp_path, monkeypatch):
    (tmp_path / name).mkdir()
    WRITERS[name](tmp_path / name)
    damage(tmp_path / name / file)
    monkeypatch.setenv(f"{name.upper()}_ROOT", str(tmp_path / name))
    with pytest.raises(UserError, match=message) as caught:
        load_dataset(name)
    assert "\n" not in str(caught.value)


def test_an_official_root_that_is_no_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("FOOD_ROOT", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="FOOD_ROOT=.*nowhere is not a folder: expected the unpacked official download"):
        load_dataset("food")


@pytest.mark.parametrize("name", [n for n in sets.NAMES if n != "elpv" and catalog.find_spec(n).hub])
@pytest.mark.parametrize("layout", ["parquet", "save_to_disk"])
def test_local_copies_in_the_hubs_format(name, layout, use, tmp_path, monkeypatch):
    import datasets as hub

    import tiny

    features = hub.Features({"image": hub.Image(), "label": hub.ClassLabel(names=["b_b", "a_a"])})
    for split, count in (("train", 6), ("test", 4)):
        rows = {"image": [tiny.picture(i % 2, i) for i in range(count)], "label": [i % 2 for i in range(count)]}
        data = hub.Dataset.from_dict(rows, features=features)
        if layout == "parquet":
            (tmp_path / split).mkdir()
            data.to_parquet(tmp_path / split / f"{split}-00000-of-00001.parquet")
        else:
            data.save_to_disk(tmp_path / split)
        monkeypatch.setenv(f"{name.upper()}_HUG_LOCAL_IMAGE_{split.upper()}_DIR", str(tmp_path / split))
    dataset = load_dataset(name, Setting(val_fraction=0.3))
    assert dataset.source_names == ("b_b", "a_a") and (len(dataset.train), len(dataset.val), len(dataset.test)) == (
        4,
        2,
        4,
    )
    assert np.array_equal(np.asarray(dataset.test.image(1)), np.asarray(tiny.picture(1, 1)))


def test_nothing_is_written_into_the_download(use, downloads):
    for name in WRITERS:
        use(name)
        folder = downloads[name][0]
        before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
        dataset = load_dataset(name)
        np.asarray(dataset.train.image(0))
        assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


# ------------------------------------------------------------------------------------------------------------ download


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A folder, and the address at which a server of this machine has it."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield folder, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture
def food_archive(tmp_path, monkeypatch, use, served):
    """Food-101 in small, served as the official one is packed."""
    import torchvision.datasets

    (tmp_path / "food-101").mkdir()
    official_layouts.write_food(tmp_path / "food-101")
    for split in ("train", "test"):
        names = (tmp_path / "food-101" / "meta" / f"{split}.txt").read_text().split()
        listed = {name: [item for item in names if item.startswith(name)] for name in ("apple_pie", "waffles")}
        (tmp_path / "food-101" / "meta" / f"{split}.json").write_text(json.dumps(listed))
    folder, address = served
    archive = folder / "food-101.tar.gz"
    with tarfile.open(archive, "w:gz") as out:
        out.add(tmp_path / "food-101", "food-101")
    monkeypatch.setattr(food, "SPEC", replace(food.SPEC, homepage=address))
    monkeypatch.setattr(torchvision.datasets.Food101, "_URL", f"{address}food-101.tar.gz")
    monkeypatch.setattr(torchvision.datasets.Food101, "_MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    return archive


@pytest.fixture
def signs_archive(downloads, monkeypatch, use, served):
    """Sign Language Digits in small, served as its repository's archive."""
    folder, address = served
    name = signs.SPEC.archive[1]
    monkeypatch.setattr(signs, "SPEC", replace(signs.SPEC, archive=(f"{address}master.zip", name)))
    with zipfile.ZipFile(folder / "master.zip", "w") as out:
        for path in sorted(downloads["signs"][0].rglob("*")):
            out.write(path, f"{name}/{path.relative_to(downloads['signs'][0])}")
    return folder / "master.zip"


def test_get_downloads_what_torchvision_can_and_says_what_to_set(tmp_path, monkeypatch, capsys, food_archive):
    root = tmp_path / "new" / "data"
    assert main(["get", "food", "--root", str(root)]) == 0
    out = capsys.readouterr().out
    assert "food: 3 classes, images: train 12, test 6" in out and f"to read it: export FOOD_ROOT={root}/food-101" in out
    assert [path.name for path in root.iterdir()] == ["food-101"]
    food_archive.unlink()
    assert main(["get", "food", "--root", str(root)]) == 0  # nothing is downloaded twice
    monkeypatch.setenv("FOOD_ROOT", f"{root}/food-101")
    assert len(load_dataset("food").test) == 6


def test_get_unpacks_an_archive_and_reads_it(tmp_path, monkeypatch, capsys, signs_archive):
    root = tmp_path / "data"
    assert main(["get", "signs", "--root", str(root)]) == 0
    out = capsys.readouterr().out
    assert "signs: 10 classes, images: train 12, val 6, test 9" in out
    assert f"to read it: export SIGNS_ROOT={root}/{signs.SPEC.archive[1]}" in out
    assert [path.name for path in root.iterdir()] == [signs.SPEC.archive[1]]
    monkeypatch.setenv("SIGNS_ROOT", str(root / signs.SPEC.archive[1]))
    assert len(load_dataset("signs").test) == 9


@pytest.mark.parametrize("name", ["food", "signs"])
def test_a_download_that_ends_early_leaves_no_trace(name, tmp_path, capsys, request):
    archive = request.getfixturevalue(f"{name}_archive")
    archive.write_bytes(archive.read_bytes()[:-9])
    assert run_main(main, ["get", name, "--root", str(tmp_path / "new" / "data")]) == 2
    assert f"error: the download of data set '{name}' failed (" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("food", "food-101/ does not answer; .* set FOOD_ROOT"),
        ("signs", "Sign-Language-Digits-Dataset/archive/.*zip does not answer; .* set SIGNS_ROOT"),
        ("cub", "CUB_train could not be loaded .* set CUB_ROOT to the unpacked official download .https://www.vision"),
        (
            "dog",
            "get it at http://vision.stanford.edu/aditya86/ImageNetDogs/, unpack it and set DOG_ROOT to the folder",
        ),
    ],
)
def test_get_without_network_is_one_line_at_once(name, message, tmp_path, monkeypatch, capsys, use):
    for variable in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # refuses connections
    root = ["--root", str(tmp_path / "new")] if name in ("food", "signs") else []
    assert run_main(main, ["get", name, *root]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and re.search(message, err), err
    assert not list(tmp_path.iterdir())


def test_get_of_a_data_set_that_can_be_read_already_and_of_a_root_without_use(use, capsys):
    use("food")
    assert main(["get", "food"]) == 0 and "food: 3 classes" in capsys.readouterr().out
    with pytest.raises(UserError, match="--root: nothing is unpacked for data set 'cub'"):
        main(["get", "cub", "--root", "x"])
