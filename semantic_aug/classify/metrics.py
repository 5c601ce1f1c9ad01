"""Accuracy in its several forms, from a confusion matrix kept on the device, and its files."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class Meter:
    """Counts on the device, read out once.

    Args:
        num_classes: K.
        device: where the logits are.
    """

    def __init__(self, num_classes: int, device: torch.device):
        self.k = num_classes
        self.confusion = torch.zeros(num_classes * num_classes, dtype=torch.long, device=device)
        self.top5 = torch.zeros((), dtype=torch.long, device=device)
        self.loss = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Adds a batch: logits ``(B, K)``, labels ``(B,)``."""
        logits = logits.float()
        best = logits.topk(min(5, self.k), dim=-1).indices
        self.confusion += torch.bincount(labels * self.k + best[:, 0], minlength=self.k * self.k)
        self.top5 += (best == labels[:, None]).any(-1).sum()
        self.loss += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").double()

    def result(self) -> Scores:
        """Everything counted so far; the only point that waits for the device."""
        matrix = self.confusion.view(self.k, self.k).cpu().numpy()
        total = max(1, int(matrix.sum()))
        return Scores(matrix, float(self.top5) / total, float(self.loss) / total)


@dataclass(frozen=True)
class Scores:
    """The outcome of an evaluation; accuracies are shares in [0, 1].

    Attributes:
        confusion: int64 ``(K, K)``, rows true classes, columns predicted ones.
        top5: share with the true class among the five (or K) best.
        loss: mean cross-entropy in nats.
    """

    confusion: np.ndarray
    top5: float
    loss: float

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

    def summary(self) -> dict[str, float]:
        """Top-1, top-5, macro accuracy and loss."""
        return {"top1": self.top1, "top5": self.top5, "macro": self.macro, "loss": self.loss}


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
