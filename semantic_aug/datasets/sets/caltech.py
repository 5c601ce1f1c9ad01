"""Caltech-101: 8,677 photographs of 101 kinds of things, 31 to 800 of each.

There is no official split. The usual protocol is followed: 30 images of each class for training, drawn with a fixed seed,
and the rest for testing; ``BACKGROUND_Google``, which is no class, is left out. With ``--split half`` a random half of each
class is for training, as the authors of Diff-Mix split it; which half theirs is, depends on how a disk lists its files.
Unpack ``101_ObjectCategories.tar.gz`` of ``caltech-101.zip`` and set ``CALTECH_ROOT`` to the folder ``101_ObjectCategories``
or the one above it.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from semantic_aug.datasets.readers import official
from semantic_aug.datasets.readers.folder import read_folder
from semantic_aug.datasets.spec import DatasetSpec, Splits
from semantic_aug.datasets.subsets import halves, per_class
from semantic_aug.datasets.table import ImageTable
from semantic_aug.errors import UserError

FOLDER = "101_ObjectCategories"
BACKGROUND = "BACKGROUND_Google"
TRAIN_PER_CLASS = 30
SPLIT_SEED = 0


def read_half() -> Splits:
    """The Diff-Mix authors' split."""
    return halves(read_classes(official.required_root(SPEC)), round_up=True)


def read_classes(root: Path) -> ImageTable:
    """The class folders, without the background."""
    root = next((path for path in (root / FOLDER, root / "caltech-101" / FOLDER) if path.is_dir()), root)
    table = read_folder(root)["train"]
    if BACKGROUND in table.class_names:
        background = table.class_names.index(BACKGROUND)
        kept = tuple(name for name in table.class_names if name != BACKGROUND)
        if len(kept) < 2:
            raise UserError(f"{root} holds {len(kept)} class besides {BACKGROUND}: expected {FOLDER} with 101")
        table = table.take(np.flatnonzero(table.labels != background))
        table = replace(table, class_names=kept, labels=table.labels - (table.labels > background))
    return table


def read_official(root: Path) -> Splits:
    """The classes, split by a draw that does not depend on the listing order."""
    table = read_classes(root)
    wanted = np.minimum(TRAIN_PER_CLASS, np.maximum(1, table.counts() - 1))  # something is left for testing
    train = per_class(table, wanted, "caltech-101", SPLIT_SEED)
    test = table.take(np.flatnonzero(~np.isin(table.rows, train.rows)))
    return {"train": train, "test": test}


SPEC = DatasetSpec(
    name="caltech",
    read=lambda: official.read(SPEC),
    read_official=read_official,
    read_half=read_half,
    license="CC BY 4.0",
    citation="Fei-Fei et al., Learning Generative Visual Models from Few Training Examples, CVPR Workshop 2004",
    homepage="https://data.caltech.edu/records/mzrjq-6wc02",
    about=__doc__,
)
