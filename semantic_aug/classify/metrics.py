"""Scores of a classifier: accuracies, loss and calibration, counted on the device; their files; statistics over seeds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import torch
from torch import Tensor, nn

from semantic_aug import files
from semantic_aug.classify.data import EvalBatches, Normaliser
from semantic_aug.classify.processes import Processes
from semantic_aug.console import markdown_table
from semantic_aug.datasets import ImageTable, LoadedDataset
from semantic_aug.datasets.spec import SHOT_THRESHOLDS
from semantic_aug.datasets.subsets import class_groups
from semantic_aug.divergence import check_outputs
from semantic_aug.runs import SPLIT_TITLES, judged_split

SEEDS_CSV, SEEDS_JSON = "seeds.csv", "seeds.json"
AMP_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
BINS = 15
"""Confidence bins of the expected calibration error (Guo et al. 2017)."""

SCORE_NAMES = (*("top1", "top5", "macro", "loss", "ece"), *("many", "medium", "few", "worst_group", "average_group"))
"""Scores in :meth:`Scores.summary`; the first five are always present."""


class Meter:
    """Accumulates the counts of an evaluation on the device.

    Args:
        size: number of images of the split, to record the prediction of each; 0: predictions are not recorded.
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
        """Adds a batch: logits ``(B, K)``, labels ``(B,)``, and the images' rows in the split ``(B,)`` for predictions."""
        logits = logits.float()
        best = logits.topk(min(5, self.k), dim=-1).indices
        correct = best[:, 0] == labels
        self.confusion += torch.bincount(labels * self.k + best[:, 0], minlength=self.k * self.k)
        self.top5 += (best == labels[:, None]).any(-1).sum()
        self.loss += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").double()
        # calibration: images, sum of confidences and correct predictions of each bin
        confidence = logits.softmax(-1).amax(-1).double()
        bins = (torch.ceil(confidence * BINS) - 1).long().clamp(0, BINS - 1)
        self.bins.index_add_(0, bins, torch.stack([torch.ones_like(confidence), confidence, correct.double()], -1))
        if rows is not None:
            self.correct[rows] = correct.long()
            self.predicted[rows] = best[:, 0]

    def combine(self, add_up: Callable[[Tensor], Tensor]) -> None:
        """Sums the counts of several processes with disjoint images; ``add_up`` sums a tensor over the processes."""
        for name in ("confusion", "top5", "loss", "bins", "correct", "predicted"):
            setattr(self, name, add_up(getattr(self, name)))

    def result(self) -> Scores:
        """The scores of all batches so far; waits for the device."""
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
        top5: share of images with the true class among the five (or K) most probable.
        loss: mean cross-entropy in nats.
        bins: ``(15, 3)``, per confidence bin: images, sum of confidences, correct predictions.
        correct: bool ``(N,)``, whether each prediction is correct, in the split's order; empty if not recorded.
        predicted: int64 ``(N,)``, predicted class of each image; empty if not recorded.
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
        """Accuracy of each class ``(K,)``; NaN for a class without images."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.diag(self.confusion) / self.confusion.sum(1)

    @property
    def macro(self) -> float:
        """Mean accuracy over the classes with images."""
        return float(np.nanmean(self.per_class)) if self.confusion.sum() else float("nan")

    @property
    def ece(self) -> float:
        """Expected calibration error over 15 bins: mean distance of confidence and accuracy."""
        return float(np.abs(self.bins[:, 1] - self.bins[:, 2]).sum() / max(1, self.bins[:, 0].sum()))

    def by_frequency(self, counts: Sequence[int], thresholds: tuple[int, int] = SHOT_THRESHOLDS) -> dict[str, float]:
        """Mean accuracy of the classes with many, medium and few training images; without empty groups.

        Args:
            counts: ``(K,)`` training images of each class.
            thresholds: many-shot classes have more images than the first, few-shot classes fewer than the second.
        """
        groups = {name: self.per_class[classes] for name, classes in class_groups(counts, *thresholds).items()}
        return {name: float(np.nanmean(group)) for name, group in groups.items() if not np.isnan(group).all()}

    def by_group(self, groups: np.ndarray | None) -> dict[str, float]:
        """Worst and average accuracy over groups (Sagawa et al. 2020); ``groups`` ``(N,)`` of the split's images, empty
        result without groups."""
        shares = list(self.each_group(groups).values())
        return {"worst_group": min(shares), "average_group": float(np.mean(shares))} if shares else {}

    def each_group(self, groups: np.ndarray | None) -> dict[int, float]:
        """Accuracy of each group with images; arguments as of :meth:`by_group`."""
        if groups is None or not len(self.correct):
            return {}
        return {int(group): float(self.correct[groups == group].mean()) for group in np.unique(groups)}

    def summary(
        self,
        counts: Sequence[int] | None = None,
        groups: np.ndarray | None = None,
        thresholds: tuple[int, int] = SHOT_THRESHOLDS,
    ) -> dict[str, float]:
        """Top-1, top-5, macro accuracy, loss and calibration error; with counts and groups also the scores by these."""
        scores = {"top1": self.top1, "top5": self.top5, "macro": self.macro, "loss": self.loss, "ece": self.ece}
        frequency = self.by_frequency(counts, thresholds) if counts is not None else {}
        return scores | frequency | self.by_group(groups)


def groups_of(table: ImageTable) -> np.ndarray | None:
    """The group of each image of a split, ``(N,)``, or None without groups."""
    groups = table.extras.get("group")
    return None if groups is None else np.asarray(groups)


def test_groups(scores: Scores, dataset: LoadedDataset) -> dict[str, dict[str, float]]:
    """The entry ``test_groups`` of results: test accuracy by name of the group; empty without groups."""
    shares = scores.each_group(groups_of(dataset.test))
    names = dict(enumerate(dataset.spec.group_names))
    return {"test_groups": {names.get(group, str(group)): share for group, share in shares.items()}} if shares else {}


def autocast(device: torch.device, amp: str):
    """The context of a forward pass in mixed precision ``amp``; an empty context for ``no``."""
    return contextlib.nullcontext() if amp == "no" else torch.autocast(device.type, AMP_DTYPES[amp])


@torch.inference_mode()
def evaluate(
    model: nn.Module, batches: EvalBatches, normalise: Normaliser, classes: int, processes: Processes, amp: str
) -> Scores:
    """Evaluates a model on a split and leaves it in evaluation mode; each process evaluates a share of the images, and counts
    are summed. Raises UserError: the model's outputs are not finite."""
    model.eval()
    meter = Meter(classes, processes.device, batches.store.count)
    for rows, pixels, labels in batches.part(processes.rank, processes.count):
        with autocast(processes.device, amp):
            logits = model(normalise(pixels))
        meter.add(logits, labels.to(processes.device), rows.to(processes.device))
    meter.combine(processes.add_up)
    scores = meter.result()
    check_outputs(scores.loss, amp)
    return scores


# --------------------------------------------------------------------------------------------------------------- files


def write_predictions(
    table: ImageTable, predicted: Sequence[int], class_names: Sequence[str], folder: Path, prefix: str
) -> None:
    """Writes ``{prefix}_predictions.csv``: ``file``, ``class``, ``predicted``, and ``group`` if the split has groups.

    Args:
        table: the split, N images.
        predicted: ``(N,)`` predicted class of each image.
    """
    groups = groups_of(table)
    path = folder / f"{prefix}_predictions.csv"
    with files.csv_writer(path) as writer:
        writer.writerow(["file", "class", "predicted", *([] if groups is None else ["group"])])
        for row, (key, label, prediction) in enumerate(zip(table.keys, table.labels, predicted, strict=True)):
            group = [] if groups is None else [int(groups[row])]
            writer.writerow([key, class_names[label], class_names[int(prediction)], *group])


def write_scores(scores: Scores, class_names: Sequence[str], folder: Path, prefix: str) -> None:
    """Writes ``{prefix}_per_class.csv``, ``{prefix}_confusion.csv`` and ``{prefix}_confusion.png``."""
    with files.csv_writer(folder / f"{prefix}_per_class.csv") as writer:
        writer.writerow(["class", "images", "accuracy"])
        for name, row, share in zip(class_names, scores.confusion, scores.per_class, strict=True):
            writer.writerow([name, int(row.sum()), "" if np.isnan(share) else f"{share:.4f}"])
    with files.csv_writer(folder / f"{prefix}_confusion.csv") as writer:
        writer.writerow(["true \\ predicted", *class_names])
        for name, row in zip(class_names, scores.confusion, strict=True):
            writer.writerow([name, *row.tolist()])
    draw_confusion(scores, class_names, folder / f"{prefix}_confusion.png")


def draw_confusion(scores: Scores, class_names: Sequence[str], path: Path) -> None:
    """Draws the confusion matrix: shares of each true class, with names up to 60 and numbers up to 20 classes."""
    from matplotlib.figure import Figure

    k = len(class_names)
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = np.nan_to_num(scores.confusion / scores.confusion.sum(1, keepdims=True))
    side = min(24, 3 + 0.45 * k)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(
        xlabel="predicted", ylabel="true", title=f"top-1 {100 * scores.top1:.2f} %, macro {100 * scores.macro:.2f} %"
    )
    if k <= 60:
        # names are shown as they are: "$5 (10%) to $10" holds no formula
        axes.set_xticks(range(k), class_names, rotation=90, parse_math=False)
        axes.set_yticks(range(k), class_names, parse_math=False)
    if k <= 20:
        for i in range(k):
            for j in range(k):
                color = "white" if shares[i, j] > 0.6 else "black"
                axes.text(j, i, int(scores.confusion[i, j]), ha="center", va="center", color=color, fontsize=8)
    figure.savefig(path, dpi=100)


def report(results: dict, say: Callable[[str], None]) -> None:
    """Prints the scores of each evaluated split by ``say``."""
    for split in ("val", "test"):
        if results[split]:
            numbers = {name: value for name, value in results[split].items() if name not in ("epoch", "loss")}
            scores = ", ".join(f"{name} {100 * value:.2f} %" for name, value in numbers.items())
            epoch = f" (best epoch {results['epoch']})" if split == "val" and "epoch" in results else ""
            say(f"{split}: {scores}{epoch}")
    if groups := results.get("test_groups"):
        say("test: " + ", ".join(f"{name} {100 * share:.2f} %" for name, share in groups.items()))


# ------------------------------------------------------------------------------------------------------- several seeds


def scores_of(results: Mapping) -> dict[str, float]:
    """The scores on :func:`semantic_aug.runs.judged_split`; empty without one."""
    scores = results.get(judged_split(results)) or {}
    return {name: value for name, value in scores.items() if name in SCORE_NAMES}


def statistics_of(rows: Mapping[int, Mapping[str, float]], split: str | None) -> dict:
    """Mean and sample standard deviation (n - 1) of every score that all seeds have.

    Args:
        rows: seed -> scores.
        split: split of the scores; see :func:`semantic_aug.runs.judged_split`.

    Returns:
        ``split``, ``seeds`` (as strings, JSON's keys), ``mean`` and ``std``; ``std`` is None for a single seed.
    """
    names = [name for name in SCORE_NAMES if all(name in row for row in rows.values())]
    values = {name: [row[name] for row in rows.values()] for name in names}
    return {
        "split": split,
        "seeds": {str(seed): {name: row[name] for name in names} for seed, row in rows.items()},
        "mean": {name: fmean(values[name]) for name in names},
        "std": {name: stdev(values[name]) if len(rows) > 1 else None for name in names},
    }


def write_statistics(statistics: Mapping, folder: Path) -> None:
    """Writes ``seeds.json``, and ``seeds.csv`` with one row per seed, then ``mean`` and ``std``; columns of validation scores
    begin with ``val_``."""
    files.write_json(folder / SEEDS_JSON, statistics)
    names, prefix = list(statistics["mean"]), "val_" if statistics["split"] == "val" else ""
    with files.csv_writer(folder / SEEDS_CSV) as writer:
        writer.writerow(["seed", *(prefix + name for name in names)])
        for title, row in (*statistics["seeds"].items(), ("mean", statistics["mean"]), ("std", statistics["std"])):
            writer.writerow([title, *("" if row[name] is None else f"{row[name]:.8g}" for name in names)])


def percent(name: str, mean: float, std: float | None = None) -> str:
    """The text of a score in tables: accuracies and calibration error in percent, the loss in nats."""
    factor = 1 if name == "loss" else 100
    return f"{factor * mean:.2f}" + (f" ± {factor * std:.2f}" if std is not None else "")


def statistics_table(statistics: Mapping) -> str:
    """The seeds as a Markdown table; accuracies and calibration error in percent."""
    names = list(statistics["mean"])
    rows = [[seed, *(percent(name, row[name]) for name in names)] for seed, row in statistics["seeds"].items()]
    spread = [percent(name, statistics["mean"][name], statistics["std"][name]) for name in names]
    title = SPLIT_TITLES.get(statistics["split"], "")
    return markdown_table(["seed", *(f"{title} {name}" for name in names)], [*rows, ["mean ± std", *spread]])
