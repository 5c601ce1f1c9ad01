"""Splits of one data set: which names stand for which split, one class list for all, and what cannot be trained on."""

from __future__ import annotations

from collections.abc import Sequence

from semantic_aug.datasets.spec import SPLITS, Splits
from semantic_aug.errors import UserError

SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
"""Folder and split names taken for each split, in any letter case."""


def split_of(name: str) -> str | None:
    """Which of our splits a folder or hub split name stands for, or None."""
    return next((ours for ours, names in SPLIT_NAMES.items() if name.casefold() in names), None)


def unify(tables: Splits, fixed: str | None = None) -> Splits:
    """Brings all splits to one class list, in the order of the training split's.

    Args:
        tables: splits; ``train`` among them.
        fixed: the split whose classes are all there are (a class that only another split has is an error); without
            it, classes only other splits have are appended.

    Raises:
        UserError: a split has a class the fixed one lacks.
    """
    names: dict[str, None] = {}
    for split in sorted(tables, key=SPLITS.index):
        for name in tables[split].class_names:
            if name not in names and fixed and split != fixed:
                raise UserError(
                    f"split {split} has the class '{name}', which split {fixed} lacks: "
                    "every class needs training images"
                )
            names.setdefault(name)
    return {split: table.relabelled(tuple(names)) for split, table in tables.items()}


def check_classes(tables: Splits, name: str) -> None:
    """Refuses a data set that cannot be trained on.

    Raises:
        UserError: fewer than two classes, or no training image at all.
    """
    train = tables["train"]
    if len(train.class_names) < 2:
        shown: Sequence[str] = train.class_names
        raise UserError(f"data set {name} has {len(shown)} class ({', '.join(shown)}): expected at least two")
    if len(train) == 0:
        raise UserError(f"data set {name} has no training image")
