"""Long lists, long tails, noisy labels, class groups, names and articles: the rules of the settings, for any data."""

import math
import shutil
import string
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from helpers import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

import tiny
from semantic_aug import cli, meta_csv, prompts
from semantic_aug.datasets import ImageTable, Setting, catalog, load_dataset, sets, subsets
from semantic_aug.datasets.readers import hub as sources
from semantic_aug.datasets.readers.folder import read_folder
from semantic_aug.datasets.readers.listing import read_listing
from semantic_aug.datasets.readers.notes import collected
from semantic_aug.errors import UserError

COUNTS = st.lists(st.integers(1, 400), min_size=2, max_size=30)
FACTORS = st.floats(0.001, 1)
LABELS = st.lists(st.integers(0, 5), min_size=1, max_size=100)


def table_of(labels) -> ImageTable:
    names = [f"class {i}" for i in range(6)]
    keys = [f"{i:06d}" for i in range(len(labels))]
    return ImageTable.of(names, labels, keys, lambda row: Image.new("RGB", (2, 2)))


# ------------------------------------------------------------------------------------------------------------- the tail


@given(COUNTS, FACTORS)
def test_the_exponential_profile(counts, factor):
    result = subsets.long_tail_counts(counts, factor)
    order = np.argsort(-np.asarray(counts), kind="stable")
    assert (np.diff(result[order]) <= 0).all() and result.max() == max(counts)
    for rank, k in enumerate(order):
        wanted = max(counts) * factor ** (rank / (len(counts) - 1))
        assert abs(result[k] - min(counts[k], max(1, wanted))) <= 1


@given(COUNTS, FACTORS)
def test_the_original_profile_is_the_authors_formula(counts, factor):
    result = subsets.long_tail_counts(counts, factor, "original")
    order = np.argsort(-np.asarray(counts), kind="stable")
    mean = sum(counts) / len(counts)
    for rank, k in enumerate(order):
        wanted = mean * factor ** (rank / max(1, len(counts) - 2))
        either = {math.floor(wanted * (1 - 1e-12)), math.floor(wanted * (1 + 1e-12))}  # whole but for rounding
        assert result[k] in {min(counts[k], max(1, number)) for number in either}


def test_the_original_counts_of_cub():
    """5,994 images of 200 species, 29 or 30 each, imbalance 0.01."""
    counts = [30] * 194 + [29] * 6
    assert sum(counts) == 5994
    result = subsets.long_tail_counts(counts, 0.01, "original")
    assert result[:4].tolist() == [29, 29, 28, 27] and result[-1] == 1 and (np.diff(result) <= 0).all()


def test_equal_classes_keep_everything_at_imbalance_one():
    assert subsets.long_tail_counts([7, 7, 7], 1.0).tolist() == [7, 7, 7]
    assert subsets.long_tail_counts([7, 7, 7], 1.0, "original").tolist() == [7, 7, 7]


@pytest.mark.parametrize("profile", ["exponential", "original"])
def test_classes_without_images_do_not_count_in_the_tail(profile):
    counts = [50, 40, 50, 30]
    wanted = subsets.long_tail_counts(counts, 0.1, profile)
    assert subsets.long_tail_counts([*counts, *[0] * 30], 0.1, profile).tolist() == [*wanted, *[0] * 30]


def test_the_profile_marks_the_folder():
    assert Setting(task="imbalanced").suffix == "_imb0.01"
    assert Setting(task="imbalanced", imbalance_profile="original").suffix == "_imb0.01orig"
    assert Setting(imbalance_profile="original").suffix == ""
    assert Setting(corrupt_prob=0.2, examples_per_class=5).suffix == "_5shot_noise0.2"
    assert Setting(corrupt_prob=0.2, corrupt_classes="all").suffix == "_noise0.2all"
    assert Setting(corrupt_classes="all").suffix == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"imbalance_profile": "step"}, "--imbalance_profile step: expected one of exponential, original"),
        ({"corrupt_prob": 1.5}, "--corrupt_prob 1.5: expected a number in \\[0, 1\\]"),
        ({"imbalance_factor": 1.01}, "expected a number in \\(0, 1\\]"),
    ],
)
def test_new_settings_are_checked(arguments, message):
    with pytest.raises(UserError, match=message):
        Setting(**arguments)


def test_the_flag_reaches_the_setting():
    from semantic_aug.datasets.settings import add_shared

    parser = cli.Parser(prog="x")
    add_shared(parser)
    argv = ["--dataset", "elpv", "--task", "imbalanced", "--imbalance_profile", "original"]
    setting = cli.read_settings(Setting, parser.parse_args(argv))
    assert setting.suffix == "_imb0.01orig" and setting.corrupt_prob == 0


@given(COUNTS, st.integers(0, 120), st.integers(0, 120))
def test_class_groups_hold_every_class_once(counts, a, b):
    few, many = sorted((a, b))
    groups = subsets.class_groups(counts, many, few)
    assert sorted(np.concatenate(list(groups.values())).tolist()) == list(range(len(counts)))
    assert all(counts[k] > many for k in groups["many"]) and all(counts[k] < few for k in groups["few"])


def test_class_groups_at_the_usual_bounds():
    groups = subsets.class_groups([101, 100, 20, 19])
    assert {name: k.tolist() for name, k in groups.items()} == {"many": [0], "medium": [1, 2], "few": [3]}
    with pytest.raises(UserError, match="few-shot below 30 and many-shot above 10 overlap"):
        subsets.class_groups([1], many=10, few=30)


# -------------------------------------------------------------------------------------------------------- noisy labels


@given(LABELS, st.floats(0, 1), st.floats(0, 1), st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_noise_changes_labels_to_others_and_grows_with_its_share(labels, a, b, seed):
    table = table_of(labels)
    weak, strong = (subsets.corrupt_labels(table, p, seed) for p in sorted((a, b)))
    assert weak.keys == strong.keys == table.keys and table.labels.tolist() == labels
    changed = weak.labels != table.labels
    assert (weak.labels[changed] == strong.labels[changed]).all() and ((strong.labels >= 0) & (strong.labels < 6)).all()
    assert subsets.corrupt_labels(table, 0.0, seed) is table
    assert (subsets.corrupt_labels(table, 1.0, seed).labels != table.labels).all()


def test_the_share_of_wrong_labels_is_the_one_asked_for():
    table = table_of([0] * 4000)
    noisy = subsets.corrupt_labels(table, 0.3, 1).labels
    shares = np.bincount(noisy, minlength=6) / 4000
    assert abs(shares[0] - 0.7) < 0.03 and np.abs(shares[1:] - 0.06).max() < 0.02


def test_labels_drawn_from_all_classes_may_be_the_true_ones():
    table = table_of([0] * 6000)
    noisy = subsets.corrupt_labels(table, 0.6, 1, "all").labels
    shares = np.bincount(noisy, minlength=6) / 6000
    assert abs(shares[0] - 0.5) < 0.03 and np.abs(shares[1:] - 0.1).max() < 0.02  # 0.4 + 0.6 / 6, and 0.6 / 6 each
    wrong = noisy != 0
    assert (subsets.corrupt_labels(table, 0.6, 1).labels[wrong] != 0).all()  # the same images are replaced


def test_the_three_stages_see_and_record_the_same_noisy_labels(image_folder):
    import sample_mp
    from semantic_aug.classify import config as classify
    from semantic_aug.finetune import config as finetune

    argv = ["--dataset", f"folder:{image_folder}", "--corrupt_prob", "0.5", "--corrupt_classes", "all"]
    argv += ["--subset_seed", "3"]
    parsers = (finetune.build_parser(), sample_mp.build_parser(), classify.build_parser(""))
    settings = [cli.read_settings(Setting, parser.parse_args(argv)) for parser in parsers]
    assert settings == [Setting(corrupt_prob=0.5, corrupt_classes="all", subset_seed=3)] * 3
    clean, noisy = (load_dataset(f"folder:{image_folder}", s).train for s in (Setting(), settings[0]))
    assert 0 < (clean.labels != noisy.labels).sum() < len(clean)
    records = (finetune.parse(argv).record(), classify.read_config(parsers[2].parse_args(argv)).record())
    assert all(record["setting"]["corrupt_prob"] == 0.5 for record in records)


def test_only_train_is_noisy(image_folder):
    clean, noisy = (load_dataset(f"folder:{image_folder}", Setting(corrupt_prob=p)) for p in (0.0, 1.0))
    assert noisy.train.keys == clean.train.keys and (noisy.train.labels != clean.train.labels).all()
    for split in ("val", "test"):
        assert getattr(noisy, split).labels.tolist() == getattr(clean, split).labels.tolist()


# ----------------------------------------------------------------------------------------------- splits and class names


@given(LABELS, st.floats(0, 0.9), st.integers(1, 4), FACTORS, st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_splits_stay_disjoint_in_every_setting(labels, fraction, shots, factor, seed):
    table = table_of(labels)
    rest, val = subsets.hold_out(table, fraction, seed)
    held = set(val.keys) if val else set()
    for setting in (
        Setting(examples_per_class=shots, subset_seed=seed),
        Setting(task="imbalanced", imbalance_factor=factor, subset_seed=seed),
        Setting(task="imbalanced", imbalance_factor=factor, imbalance_profile="original", examples_per_class=shots),
    ):
        used = subsets.apply_setting(rest, setting).keys
        assert set(used) <= set(rest.keys) and not set(used) & held and len(set(used)) == len(used)


NAMES = st.lists(
    st.one_of(
        st.text(min_size=1, max_size=12),
        st.text(alphabet=string.ascii_letters + " -_./", min_size=1, max_size=6),
    ).filter(lambda name: name.strip() == name and "\r" not in name and "\x00" not in name and name.isprintable()),
    min_size=2,
    max_size=12,
    unique=True,
)


@given(NAMES)
@settings(max_examples=100, deadline=None)
def test_class_names_to_folders_and_back_through_meta_csv(tmp_path_factory, names):
    folders = meta_csv.slugs(names)
    assert len({folder.casefold() for folder in folders}) == len(names)
    assert all(folder and "/" not in folder and folder not in (".", "..") for folder in folders)
    assert dict(zip(reversed(names), meta_csv.slugs(names[::-1]), strict=True)) == dict(
        zip(names, folders, strict=True)
    )
    rows = [
        (names[i], names[(i + 1) % len(names)], i, 0.7, meta_csv.relative_path(folder, folders[0], i, 0.7), "", 0)
        for i, folder in enumerate(folders)
    ]
    path = tmp_path_factory.getbasetemp() / "names.csv"
    meta_csv.write(path, rows)
    table = meta_csv.read(path)
    back = {text.split("/")[0]: table.class_names[k] for text, k in zip(table.path, table.source, strict=True)}
    assert back == dict(zip(folders, names, strict=True))


@pytest.mark.parametrize(
    ("phrase", "text"),
    [
        ("European Goldfinch bird", "a photo of a European Goldfinch bird"),
        ("Ovenbird bird", "a photo of an Ovenbird bird"),
        ("MD-11 aircraft", "a photo of an MD-11 aircraft"),
        ("DHC-1 aircraft", "a photo of a DHC-1 aircraft"),
        ("A300B4 aircraft", "a photo of an A300B4 aircraft"),
        ("FIAT 500 Abarth 2012 car", "a photo of a FIAT 500 Abarth 2012 car"),
        ("hourglass", "a photo of an hourglass"),
        ("unicorn", "a photo of a unicorn"),
        ("<class_3> bird", "a photo of a <class_3> bird"),
    ],
)
def test_articles_follow_the_sound(phrase, text):
    assert prompts.fill("a photo of a {}", phrase) == text


def test_an_override_of_no_class_is_refused(tmp_path, image_folder):
    (tmp_path / "datasets.yaml").write_text(f"pets:\n  folder: {image_folder}\n  class_names: {{red fx: Fox}}\n")
    with pytest.raises(
        UserError, match="unknown class in class_names of data set pets 'red fx': did you mean 'red fox'"
    ):
        load_dataset("pets", config_dir=tmp_path)


# --------------------------------------------------------------------------------------------------------------- lists


def write_list(folder, rows, name="list.csv"):
    for i in range(4):
        tiny.picture(i % 2, i).save(folder / f"{i}.png")
    columns = {c: [row[k] for row in rows] for k, c in enumerate(("path", "label", "split"))}
    if name.endswith(".parquet"):
        parquet.write_table(pa.table(columns), folder / name)
    else:
        lines = [",".join(map(str, row)) for row in rows]
        (folder / name).write_text("\n".join(["path,label,split", *lines]) + "\n", encoding="utf-8-sig")
    return folder / name


ROWS = [("0.png", "owl", "train"), ("1.png", "toad", "train"), ("2.png", "owl", "val"), ("3.png", "toad", "test")]


@pytest.mark.parametrize("name", ["list.csv", "list.parquet"])
def test_lists_in_both_formats(tmp_path, name):
    dataset = load_dataset(f"csv:{write_list(tmp_path, ROWS, name)}")
    assert dataset.class_names == ("owl", "toad") and (len(dataset.train), len(dataset.val), len(dataset.test)) == (
        2,
        1,
        1,
    )
    assert dataset.train.keys == ["0.png", "1.png"] and dataset.test.image(0).size == (40, 36)


def test_a_parquet_of_numbers_as_labels_and_further_columns(tmp_path):
    write_list(tmp_path, ROWS)
    table = pa.table({"x": [1.5] * 4, "label": [3, 10, 3, 10], "path": [f"{i}.png" for i in range(4)]})
    parquet.write_table(table, tmp_path / "n.parquet")
    train = read_listing(tmp_path / "n.parquet")["train"]
    assert train.class_names == ("10", "3") and train.labels.tolist() == [1, 0, 1, 0]


def test_awkward_but_honest_paths(tmp_path):
    (tmp_path / "a b" / ".c").mkdir(parents=True)
    rows = [
        ("./0.png", "owl", ""),
        ("a b/../1.png", "toad", ""),
        ("a b//.c/x,y.png".replace(",", ";"), "owl", ""),
        (str(tmp_path / "2.png"), "toad", ""),
    ]
    shutil.copy(write_list(tmp_path, rows).parent / "3.png", tmp_path / "a b" / ".c" / "x;y.png")
    train = read_listing(tmp_path / "list.csv")["train"]
    assert train.keys == ["0.png", "1.png", "2.png", "a b/.c/x;y.png"] and train.labels.tolist() == [0, 1, 1, 0]
    assert all(train.image(i).mode == "RGB" for i in range(4))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*ROWS, ("a/../../x.png", "owl", "train")], "line 6: path 'a/../../x.png' leads outside"),
        ([*ROWS, ("", "owl", "train")], "line 6: the path is empty"),
        ([*ROWS, ("0.png", " ", "train")], "line 6: the label is empty"),
        (
            [*ROWS, ("./0.png", "toad", "train")],
            "line 6: '0.png' is listed under two labels, 'owl' and 'toad': remove one row",
        ),
        ([*ROWS, ("9.png", "newt", "test")], "split test has the class 'newt', which split train lacks"),
        ([*ROWS, ("9.png", "owl", "holdout")], "line 6: split 'holdout': expected train, val or test"),
    ],
)
@pytest.mark.parametrize("name", ["list.csv", "list.parquet"])
def test_bad_lists_are_one_clear_line(tmp_path, rows, message, name):
    if name.endswith(".parquet"):
        message = message.replace("line 6", "row 5")
    with pytest.raises(UserError, match=message):
        read_listing(write_list(tmp_path, rows, name))


def test_files_that_are_not_what_they_are_called(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "b.csv").write_text("path,label\nx.png,owl\ny.png\n")
    (tmp_path / "c.csv").write_bytes(b"")
    (tmp_path / "d.csv").write_bytes(b"path,label\nx.png,\xff\xfe\n")
    (tmp_path / "e.zip").write_bytes(b"PK")
    for name, message in (
        ("a.parquet", "cannot be read as parquet"),
        ("b.csv", "b.csv line 3: expected 2 columns, got 1"),
        ("c.csv", "lacks the column 'path': .*it has none"),
        ("d.csv", "d.csv line 2: byte 0xff is not UTF-8 text: save the list as UTF-8"),
        ("f.csv", "is not there: expected a CSV or parquet file"),
    ):
        with pytest.raises(UserError, match=message):
            read_listing(tmp_path / name)
    with pytest.raises(UserError, match="e.zip is not a folder: .*unpack the archive first"):
        read_folder(tmp_path / "e.zip")


MILLION = """
import csv, os, sys, time
from semantic_aug.datasets import load_dataset
began = time.process_time()
found = load_dataset("csv:" + sys.argv[1])
seconds = time.process_time() - began
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
began = time.process_time()
folder = os.path.dirname(sys.argv[1])
with open(sys.argv[1], newline="") as lines:
    files = [os.stat(os.path.join(folder, path)) for path, label in csv.reader(lines) if label != "label"]
plain = time.process_time() - began
print(len(found.train) + len(found.val), seconds / plain, int(status["VmHWM"].split()[0]) * 1024 / 1e6)
"""


@pytest.mark.slow
def test_a_million_rows_open_in_a_few_times_what_their_files_take_and_500_megabytes(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(1000):  # seen through a thousand linked folders: a million paths
        (tmp_path / "images" / f"image_{i * 7919 % 10**7:08d}.jpg").touch()
        (tmp_path / f"class_{i:04d}").symlink_to("images")
    with open(tmp_path / "list.csv", "w") as out:
        out.write("path,label\n")
        out.writelines(
            f"class_{i % 1000:04d}/image_{i // 1000 * 7919 % 10**7:08d}.jpg,class {i % 1000}\n" for i in range(10**6)
        )
    argv = [sys.executable, "-c", MILLION, str(tmp_path / "list.csv")]
    rows, ratio, megabytes = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert int(rows) == 10**6 and float(ratio) <= 6 and float(megabytes) <= 500  # 3 were measured


def test_split_folders_without_train_are_not_taken_for_classes(tmp_path, image_folder):
    for split in ("val", "test"):
        shutil.copytree(image_folder / split, tmp_path / "odd" / split)
    with pytest.raises(UserError, match="has the split folder (val|test), (val|test) but none named train"):
        load_dataset(f"folder:{tmp_path / 'odd'}")


def test_a_class_may_be_called_train(tmp_path, image_folder):
    for name in ("car", "test", "train"):
        shutil.copytree(image_folder / "train" / "toad", tmp_path / "vehicles" / name)
    assert load_dataset(f"folder:{tmp_path / 'vehicles'}").class_names == ("car", "test", "train")


def test_classes_without_training_images_are_told(tmp_path, caplog):
    import datasets as hub

    features = hub.Features({"image": hub.Image(), "label": hub.ClassLabel(names=["owl", "toad", "newt"])})
    rows = {"image": [tiny.picture(i % 2, i) for i in range(6)], "label": [0, 1] * 3}
    hub.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "mine")
    load_dataset(f"hf:{tmp_path / 'mine'}", Setting(val_fraction=0))
    assert "1 of 3 classes have no training image ('newt' the first)" in caplog.text


def test_a_label_without_a_name(tmp_path):
    import datasets as hub

    rows = hub.Dataset.from_dict({"image": [tiny.picture(0, 0)] * 2, "label": [0, 7]})
    rows = rows.cast_column("image", hub.Image())
    features = hub.Features({"image": hub.Image(), "label": hub.ClassLabel(names=["owl", "toad"])})
    table = rows.data.table.replace_schema_metadata(features.arrow_schema.metadata)
    parquet.write_table(table, tmp_path / "train-00000-of-00001.parquet")
    with pytest.raises(UserError, match="row 1: label 7 has no class name"):
        load_dataset(f"hf:{tmp_path}")


def test_hub_images_kept_as_files_have_a_stamp_of_their_own(tmp_path):
    import datasets as hub

    for i in range(4):
        tiny.picture(i % 2, i).save(tmp_path / f"{i}.png")
    features = hub.Features({"image": hub.Image(), "label": hub.ClassLabel(names=["owl", "toad"])})
    paths = [str(tmp_path / f"{i}.png") for i in range(4)]
    rows = hub.Dataset.from_dict({"image": paths, "label": [0, 1] * 2}, features=features)
    table = sources._hub_table(rows, sources.HubSplit("mine"), "train", None, None)
    before = table.signature()
    tiny.picture(5, 9).save(tmp_path / "2.png")
    assert table.signature() != before and table.image(2).size == (40, 36)


def test_the_registered_names_are_sorted_and_each_says_what_it_is():
    assert list(sets.NAMES) == sorted(sets.NAMES)
    for name in sets.NAMES:
        spec = catalog.find_spec(name)
        assert spec.name == name and spec.license != "not stated" and spec.citation and spec.homepage.startswith("http")
        assert len(spec.about.splitlines()) > 2 and (spec.variables or name.startswith("elpv"))


def test_a_class_that_loses_all_its_images_to_wrong_labels_is_named():
    table = table_of([0, 0, 1, 1])
    setting = Setting(examples_per_class=1, corrupt_prob=1.0)  # of two images, both get another label
    with collected() as notes:
        train = subsets.apply_setting(table, setting)
    lost = [table.class_names[k] for k in (0, 1) if not train.counts()[k]]
    assert lost and [note.cases for note in notes] == [tuple(lost)] and "--corrupt_prob" in notes[0].line()
