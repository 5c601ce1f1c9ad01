"""ELPV: 2,624 electroluminescence photographs of solar cells, the embedded default data set.

Greyscale, 300x300 pixels, 8 classes: two cell types (mono- and polycrystalline) times four levels of an expert's
belief that the cell is defective (0, 1/3, 2/3, 1). Get it with ``pip install elpv-dataset``; nothing is downloaded.
The split is fixed, 60 % train, 15 % val, 25 % test of each class, a seeded draw kept in ``elpv_split.csv`` beside this file.
"""

import csv
import importlib.util
from pathlib import Path

from semantic_aug.datasets.spec import DatasetSpec, Splits
from semantic_aug.datasets.table import table_of_files
from semantic_aug.errors import UserError

SPLIT_FILE = Path(__file__).with_name("elpv_split.csv")
TYPES = ("mono", "poly")
LEVELS = {0: "functional", 33: "possibly defective", 67: "likely defective", 100: "defective"}
CLASS_NAMES = tuple(f"{kind} {level}" for kind in TYPES for level in LEVELS.values())


def package_folder() -> Path:
    """The folder of the installed ``elpv_dataset`` package (not imported: its code is not needed). Raises UserError: the
    package is not installed."""
    package = importlib.util.find_spec("elpv_dataset")
    if package is None or not package.submodule_search_locations:
        raise UserError(
            "data set 'elpv' needs the package elpv-dataset: pip install -r scripts/quickstart/requirements.txt"
        )
    return Path(next(iter(package.submodule_search_locations)))


def read_labels(folder: Path) -> list[tuple[str, str, int]]:
    """The package's label file: a list of (image name, "mono" | "poly", defect probability in per cent)."""
    with open(folder / "data" / "labels.csv", encoding="ascii") as lines:
        rows = [line.split() for line in lines if line.strip()]
    return [(Path(path).stem, kind, round(100 * float(level))) for path, level, kind in rows]


def read() -> Splits:
    """The three splits, from the installed package and the split file."""
    folder = package_folder()
    with open(SPLIT_FILE, newline="") as lines:
        split_of = {row["image"]: row["split"] for row in csv.DictReader(lines)}
    label_of = {name: CLASS_NAMES.index(f"{kind} {LEVELS[level]}") for name, kind, level in read_labels(folder)}
    splits = {}
    for split in ("train", "val", "test"):
        names = [name for name in label_of if split_of[name] == split]
        paths = [folder / "data" / "images" / f"{name}.png" for name in names]
        splits[split] = table_of_files(CLASS_NAMES, [label_of[name] for name in names], names, paths.__getitem__)
    return splits


SPEC = DatasetSpec(
    name="elpv",
    read=read,
    super_class="solar cell",
    class_name_rules=(),
    license="CC BY-NC-SA 4.0",
    citation=(
        "Buerhop-Lutz et al., A benchmark for visual identification of defective solar cells in electroluminescence "
        "imagery, EU PVSEC 2018; Deitsch et al., Automatic classification of defective photovoltaic module cells in "
        "electroluminescence images, Solar Energy 185, 2019"
    ),
    homepage="https://github.com/zae-bayern/elpv-dataset",
    about=__doc__,
)
