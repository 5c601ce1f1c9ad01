"""What a classifier run said of each image of a split, and how much each image counts in a score."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from semantic_aug.errors import UserError


@dataclass(frozen=True)
class Predictions:
    """One run on one split of N images.

    Attributes:
        files: N names, the same for every run on the split.
        right: bool ``(N,)``.
        classes: int64 ``(N,)`` true classes, numbered from 0.
        groups: int64 ``(N,)``, numbered likewise, or None where the data set has no groups.
    """

    files: tuple[str, ...]
    right: np.ndarray
    classes: np.ndarray
    groups: np.ndarray | None

    def strata(self, score: str) -> np.ndarray:
        """``(N,)`` the sort of each image, of which a score takes the mean by itself: ``macro`` its class,
        ``worst_group`` its group, ``top1`` none."""
        return {"macro": self.classes, "worst_group": self.groups}.get(score, np.zeros(len(self.right), np.int64))

    def shares(self, score: str) -> np.ndarray:
        """``(N,)`` what each image adds to a score; the sum is the score.

        Args:
            score: ``top1``, ``macro`` or ``worst_group``.
        """
        strata = self.strata(score)
        counts = np.bincount(strata)
        shares = self.right / counts[strata]
        if score == "macro":
            return shares / np.count_nonzero(counts)
        if score == "worst_group":
            return shares * (strata == np.bincount(strata, shares).argmin())
        return shares


def read(folder: Path, split: str = "val") -> Predictions:
    """The predictions that a finished run of ``train_cls.py`` left in its folder.

    Raises:
        UserError: they are not there.
    """
    path = folder / f"{split}_predictions.csv"
    try:
        with open(path, newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
    except FileNotFoundError:
        raise UserError(
            f"{folder} has no {path.name} (an earlier version made it): remove that folder and run the same command again"
        ) from None
    files = tuple(row["file"] for row in rows)
    right = np.asarray([row["class"] == row["predicted"] for row in rows], bool)
    groups = _numbered([row["group"] for row in rows]) if rows and "group" in rows[0] else None
    return Predictions(files, right, _numbered([row["class"] for row in rows]), groups)


def _numbered(names: list[str]) -> np.ndarray:
    return np.unique(names, return_inverse=True)[1].astype(np.int64)
