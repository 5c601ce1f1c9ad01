"""Files of the original implementation and of other tools: class names, tokens, LoRAs and subsets, there and back."""

import re
from pathlib import Path

import numpy as np
import pandas
import pytest
from PIL import Image

from official_layouts import write_aircraft
from semantic_aug import meta_csv
from semantic_aug.augmentations import strategies
from semantic_aug.datasets import find_spec, load_dataset
from semantic_aug.datasets.synthetic import read_subset
from semantic_aug.errors import UserError
from semantic_aug.evaluation.quality import export, export_formats
from semantic_aug.prompts import ClassIndex, clean_class_name
from semantic_aug.sampling.files import TaskPaths
from semantic_aug.sampling.plan import make_plan

# ------------------------------------------------------------------------------------------------------- class names

SPELLED = [  # data set, source spelling, the authors' spelling
    ("cub", "001.Black_footed_Albatross", "Black footed Albatross"),
    ("cub", "067.Anna_Hummingbird", "Anna_Hummingbird"),
    ("dog", "n02085620-Chihuahua", "Chihuahua"),
    ("dog", "n02089078-black-and-tan_coonhound", "black-and-tan coonhound"),
    ("pascal", "aeroplane", "airplane"),
    ("pascal", "diningtable", "dining table"),
    ("aircraft", "F-16A/B", "F-16A B"),
    ("car", "Ram C/V Cargo Van Minivan 2012", "Ram C V Cargo Van Minivan 2012"),
]


def index_of(dataset: str, names) -> ClassIndex:
    """The classes of a data set in its own spelling and in that of its prompts."""
    spec = find_spec(dataset)
    return ClassIndex(
        names, [clean_class_name(name, spec.class_name_rules, spec.class_name_overrides) for name in names]
    )


@pytest.mark.parametrize(("dataset", "source", "theirs"), SPELLED)
def test_a_class_is_found_by_the_authors_spelling(dataset, source, theirs):
    names = [name for other, name, _ in SPELLED if other == dataset]
    assert index_of(dataset, names).find(theirs, where="file") == names.index(source)


def test_classes_are_matched_both_ways_between_copies():
    official = ("003.Sooty_Albatross", "001.Black_footed_Albatross")
    assert ClassIndex(official).match(("Black footed Albatross", "Sooty-Albatross"), where="f") == [1, 0]
    assert index_of("cub", official).match(("Black Footed Albatross",), where="f") == [1]
    assert ClassIndex(("Black footed Albatross",)).match(official, where="f") == [None, 0]


def test_the_closest_spelling_counts_and_numbers_that_are_names_stay():
    assert ClassIndex(("red_fox", "Red Fox")).find("Red Fox", where="f") == 1
    assert ClassIndex(("tv", "television")).find("tv", "television", where="f") == 0  # the source's name comes first
    planes = ("737-200", "727-200", "767-300")
    assert ClassIndex(planes).match(("727-200", "767 300", "757-200"), where="f") == [1, 2, None]


def test_a_class_that_may_be_either_of_two_is_refused_by_both_names():
    with pytest.raises(UserError, match="^t.bin: class 'Red fox' may be 'red fox' or 'red_fox', which differ only"):
        ClassIndex(("red fox", "red_fox")).find("Red fox", where="t.bin")
    with pytest.raises(UserError, match="^t.bin: the classes '1.toad' and '2.toad' are both spelled like 'toad'"):
        ClassIndex(("toad",)).match(("1.toad", "2.toad"), where="t.bin")


# ------------------------------------------------------------------------------------------------------------ subsets

PLANES = ("707-320", "F-16A/B", "MD-11")
NAME = re.compile(r"(.+)-(\d+)-(.+)\.png")


def write_planes(folder: Path, variant: str = "meta.csv") -> Path:
    """Twelve images between three aircraft in the original's layout and spelling."""
    folders = [name.replace("/", "_") for name in PLANES]
    lines = ["First Directory,Second Directory,Number,Strength,Path"]
    for number in range(12):
        source, target, strength = number % 3, number // 3 % 3, (0.3, 0.7, 1.0)[number % 3]
        path = f"{folders[source]}/{folders[target]}-{number:06d}-{strength}.png"
        (folder / "data" / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (10 * number, 20 * source, 20 * target)).save(folder / "data" / path)
        names = (folders[label].replace("_", " ") for label in (source, target))
        lines.append(f"{','.join(names)},{number},{strength},{path}")
    (folder / variant).write_text("\n".join(lines) + "\n")
    return folder


def read_as_the_original(folder: Path, label_of: dict[str, int]) -> list[tuple]:
    """(source, target, strength, pixels) as its dataset classes read a subset: through the five columns."""
    table = pandas.read_csv(folder / "meta.csv")
    assert list(table.columns) == ["First Directory", "Second Directory", "Number", "Strength", "Path"]
    labels = [(label_of[a], label_of[b]) for a, b in zip(table.iloc[:, 0], table.iloc[:, 1], strict=True)]
    images = [np.asarray(Image.open(folder / "data" / path).convert("RGB")) for path in table["Path"]]
    return [(*pair, float(s), image) for pair, s, image in zip(labels, table["Strength"], images, strict=True)]


def listed_as_the_original(folder: Path) -> set[tuple]:
    """The rows that its scripts/compose_syn_data.py makes of folder and file names alone."""
    rows = set()
    for path in (folder / "data").rglob("*.png"):
        target, number, strength = NAME.fullmatch(path.name).groups()
        source = path.parent.name.replace("_", " ")
        place = path.relative_to(folder / "data").as_posix()
        rows.add((source, target.replace("_", " "), int(number), float(strength), place))
    return rows


@pytest.fixture
def planes(tmp_path, monkeypatch):
    write_aircraft(tmp_path / "official")
    monkeypatch.setenv("AIRCRAFT_ROOT", str(tmp_path / "official"))
    return load_dataset("aircraft")


def test_a_subset_goes_there_and_back(planes, tmp_path):
    words = ["--dataset", "aircraft", "--syndata_dir", str(write_planes(tmp_path / "theirs")), "--format", "original"]
    assert export.main([*words, "--output_dir", str(tmp_path / "ours")]) == 0
    first, again = (read_subset(tmp_path / name, planes) for name in ("theirs", "ours"))
    assert np.array_equal(first.labels(0.5, 3), again.labels(0.5, 3)) and len(again) == 12
    table = pandas.read_csv(tmp_path / "ours" / "meta.csv")
    assert set(table["First Directory"]) == {"707-320", "F-16A B", "MD-11"}
    assert listed_as_the_original(tmp_path / "ours") == set(table.itertuples(index=False, name=None))
    label_of = {name.replace("/", " "): label for label, name in enumerate(PLANES)}  # as its aircraft class has it
    rows = read_as_the_original(tmp_path / "ours", label_of)
    assert [row[:3] for row in rows] == [*zip(first.source, first.target, first.strength, strict=True)]
    assert all(np.array_equal(row[3], np.asarray(first.image(i))) for i, row in enumerate(rows))


def test_the_originals_names_of_the_classes():
    for dataset, source, theirs in SPELLED:
        assert find_spec(dataset).original_name(source) == theirs.replace("Anna_Humm", "Anna Humm")
    assert find_spec("flower").original_name("cyclamen") == "cyclamen "  # its list has the space
    assert find_spec("caltech").original_name("Faces_easy") == "faces easy"


def test_real_images_and_classes_of_one_folder_do_not_fit_that_layout(planes, tmp_path):
    words = ["--dataset", "aircraft", "--syndata_dir", str(write_planes(tmp_path / "theirs")), "--format", "original"]
    with pytest.raises(UserError, match="--with_real with --format original"):
        export.main([*words, "--with_real", "--output_dir", str(tmp_path / "ours")])
    with pytest.raises(UserError, match="class 'a_b' shares the folder"):
        export_formats.original_folders(["a b", "a_b"])
    assert not (tmp_path / "ours").exists()


def test_stage_2_spells_a_slash_as_the_original_does():
    plan = make_plan(np.arange(6) % 3, [str(i) for i in range(6)], 3, strategies.find("diff-mix"), (0.7,), 1, 2, 0)
    paths = TaskPaths(plan, PLANES, meta_csv.slugs(PLANES), [str(i) for i in range(6)], 0)
    assert {row[0] for row in paths.meta_rows(np.arange(6))} == {"707-320", "F-16A B", "MD-11"}
    assert meta_csv.without_slashes(["a/b", "a b"]) == ["a/b", "a b"]


def test_the_originals_filtered_list_is_a_variant(planes, tmp_path):
    folder = write_planes(tmp_path / "theirs", "meta_10-100per.csv")
    assert len(read_subset(f"{folder}#10-100per", planes)) == 12
    with pytest.raises(UserError, match="10-100per"):
        read_subset(f"{folder}#90-100per", planes)
