"""Accuracy in its several forms, from a confusion matrix kept on the device, and its files."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from semantic_aug import files
from semantic_aug.datasets import ImageTable
from semantic_aug.datasets.subsets import class_groups

BINS = 15
"""Of the expected calibration error (Guo et al. 2017)."""

SCORE_NAMES = (
    *("top1", "top5", "macro", "loss", "ece"),
    *("many", "medium", "few", "worst_group", "average_group"),
)
"""What :meth:`Scores.summary` may hold; the first five are always there."""


class Meter:
    """Counts on the device, read out once.

    Args:
        num_classes: K.
        device: where the logits are.
        size: images of the split, where it is to be known what was said of each.
    """

    def __init__(self, num_classes: int, device: torch.device, size: int = 0):
        self.k = num_classes
        self.confusion = torch.zeros(num_classes * num_classes, dtype=torch.long, device=device)
        self.top5 = torch.zeros((), dtype=torch.long, device=device)
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.bins = torch.zeros(BINS, 3, dtype=torch.float64, device=device)
        self.correct = torch.zeros(size, dtype=torch.long, device=device)
        self.predicted = torch.zeros(size, dtype=torch.long, device=device)

    def add(self, logits: Tensor, labels: Tensor, rows: Tensor | None = None) -> None:
        """Adds a batch: logits ``(B, K)``, labels ``(B,)``, and where wanted the images' rows in the split ``(B,)``."""
        logits = logits.float()
        best = logits.topk(min(5, self.k), dim=-1).indices
        right = best[:, 0] == labels
        self.confusion += torch.bincount(labels * self.k + best[:, 0], minlength=self.k * self.k)
        self.top5 += (best == labels[:, None]).any(-1).sum()
        self.loss += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").double()
        sure = logits.softmax(-1).amax(-1).double()
        place = (torch.ceil(sure * BINS) - 1).long().clamp(0, BINS - 1)
        self.bins.index_add_(0, place, torch.stack([torch.ones_like(sure), sure, right.double()], -1))
        if rows is not None:
            self.correct[rows] = right.long()
            self.predicted[rows] = best[:, 0]

    def combine(self, add_up: Callable[[Tensor], Tensor]) -> None:
        """Adds up what several processes counted over disjoint images; ``add_up`` sums a tensor over them."""
        for name in ("confusion", "top5", "loss", "bins", "correct", "predicted"):
            setattr(self, name, add_up(getattr(self, name)))

    def result(self) -> Scores:
        """Everything counted so far; the only point that waits for the device."""
        matrix = self.confusion.view(self.k, self.k).cpu().numpy()
        total = max(1, int(matrix.sum()))
        correct = self.correct.cpu().numpy().astype(bool)
        loss, bins, predicted = float(self.loss) / total, self.bins.cpu().numpy(), self.predicted.cpu().numpy()
        return Scores(matrix, float(self.top5) / total, loss, bins, correct, predicted)


@dataclass(frozen=True)
class Scores:
    """The outcome of an evaluation; accuracies are shares in [0, 1].

    Attributes:
        confusion: int64 ``(K, K)``, rows true classes, columns predicted ones.
        top5: share with the true class among the five (or K) best.
        loss: mean cross-entropy in nats.
        bins: ``(15, 3)``, by confidence: images, sum of confidences, number right.
        correct: bool, which images were right, in the split's order; empty where that was not asked for.
        predicted: int64, the class each image was given; empty likewise.
    """

    confusion: np.ndarray
    top5: float
    loss: float
    bins: np.ndarray
    correct: np.ndarray
    predicted: np.ndarray

    @property
    def top1(self) -> float:
        return float(np.trace(self.confusion) / max(1, self.confusion.sum()))

    @property
    def per_class(self) -> np.ndarray:
        """``(K,)`` share of each class recognised; NaN where it has no image."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.diag(self.confusion) / self.confusion.sum(1)

    @property
    def macro(self) -> float:
        """Mean over the classes that have images."""
        return float(np.nanmean(self.per_class)) if self.confusion.sum() else float("nan")

    @property
    def ece(self) -> float:
        """Expected calibration error over 15 bins: the images' mean distance of confidence and accuracy."""
        return float(np.abs(self.bins[:, 1] - self.bins[:, 2]).sum() / max(1, self.bins[:, 0].sum()))

    def by_frequency(self, counts: Sequence[int]) -> dict[str, float]:
        """Mean accuracy of the classes with many (> 100), medium and few (< 20) training images; those there are.

        Args:
            counts: ``(K,)`` training images of each class.
        """
        accuracies = {name: self.per_class[classes] for name, classes in class_groups(counts).items()}
        return {name: float(np.nanmean(of)) for name, of in accuracies.items() if not np.isnan(of).all()}

    def by_group(self, groups: np.ndarray | None) -> dict[str, float]:
        """Worst and average accuracy of the groups (Sagawa et al. 2020); nothing where there are none.

        Args:
            groups: ``(N,)`` the group of each image of the split.
        """
        if groups is None or not len(self.correct):
            return {}
        shares = [float(self.correct[groups == group].mean()) for group in np.unique(groups)]
        return {"worst_group": min(shares), "average_group": float(np.mean(shares))}

    def summary(self, counts: Sequence[int] | None = None, groups: np.ndarray | None = None) -> dict[str, float]:
        """Top-1, top-5, macro accuracy, loss and calibration error, then what counts and groups allow."""
        found = {"top1": self.top1, "top5": self.top5, "macro": self.macro, "loss": self.loss, "ece": self.ece}
        return found | (self.by_frequency(counts) if counts is not None else {}) | self.by_group(groups)


def groups_of(table: object) -> np.ndarray | None:
    """The group of each image of a split, ``(N,)``, or None where the data set has no groups."""
    groups = getattr(table, "groups", None)
    if groups is None:
        groups = getattr(table, "extras", {}).get("group")
    return None if groups is None else np.asarray(groups)


def write_predictions(
    table: ImageTable, predicted: Sequence[int], class_names: Sequence[str], folder: Path, prefix: str
) -> None:
    """Writes ``{prefix}_predictions.csv``: ``file``, ``class``, ``predicted``, and ``group`` where there are groups.

    Args:
        table: the split, N images.
        predicted: ``(N,)`` class of each, in the table's order.
        class_names: as the data set shows them.
        folder: of the run.
        prefix: the split's name.
    """
    groups = groups_of(table)
    path = folder / f"{prefix}_predictions.csv"
    with files.atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["file", "class", "predicted", *([] if groups is None else ["group"])])
        for row, (key, label, said) in enumerate(zip(table.keys, table.labels, predicted, strict=True)):
            group = [] if groups is None else [int(groups[row])]
            writer.writerow([key, class_names[label], class_names[int(said)], *group])


def write_scores(scores: Scores, class_names: Sequence[str], folder: Path, prefix: str) -> None:
    """Writes ``{prefix}_per_class.csv``, ``{prefix}_confusion.csv`` and ``{prefix}_confusion.png``."""
    with open(folder / f"{prefix}_per_class.csv", "w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["class", "images", "accuracy"])
        for name, row, share in zip(class_names, scores.confusion, scores.per_class, strict=True):
            writer.writerow([name, int(row.sum()), "" if np.isnan(share) else f"{share:.4f}"])
    with open(folder / f"{prefix}_confusion.csv", "w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["true \\ predicted", *class_names])
        for name, row in zip(class_names, scores.confusion, strict=True):
            writer.writerow([name, *row.tolist()])
    draw_confusion(scores, class_names, folder / f"{prefix}_confusion.png")


def draw_confusion(scores: Scores, class_names: Sequence[str], path: Path) -> None:
    """The confusion matrix as a picture: shares of each true class, numbers where they fit."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    k = len(class_names)
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = np.nan_to_num(scores.confusion / scores.confusion.sum(1, keepdims=True))
    side = min(24, 3 + 0.45 * k)
    figure, axes = plt.subplots(figsize=(side, side), layout="constrained")
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(
        xlabel="predicted", ylabel="true", title=f"top-1 {100 * scores.top1:.2f} %, macro {100 * scores.macro:.2f} %"
    )
    if k <= 60:
        axes.set_xticks(range(k), class_names, rotation=90)
        axes.set_yticks(range(k), class_names)
    if k <= 20:
        for i in range(k):
            for j in range(k):
                color = "white" if shares[i, j] > 0.6 else "black"
                axes.text(j, i, int(scores.confusion[i, j]), ha="center", va="center", color=color, fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def report(results: dict, say: Callable[[str], None]) -> None:
    """Prints the scores of each split that was evaluated."""
    for split in ("val", "test"):
        if results[split]:
            numbers = {name: value for name, value in results[split].items() if name not in ("epoch", "loss")}
            scores = ", ".join(f"{name} {100 * value:.2f} %" for name, value in numbers.items())
            say(
                f"{split}: {scores}"
                + (f" (best epoch {results['epoch']})" if split == "val" and "epoch" in results else "")
            )
