"""Learning curves of real images: a linear classifier on frozen features, and what more images would win.

The error falls roughly as a power of the number of images (Cortes et al. 1993; Hestness et al. 2017): a straight line in
log-log, which is used only beyond the images there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from semantic_aug.seeding import numpy_rng

SIZES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
"""Images per class at which a curve is measured, besides the present number, twice and four times it, and all."""
FOLDS = 5
"""Folds of the cross-validation where there are too few validation images."""
WEIGHT_DECAY = 1e-3
SCALE = 10.0
"""Norm of a standardised feature vector; with it a ten times larger weight decay moves no curve by more than its spread."""
ITERATIONS = 100

FACTOR = 4
"""Multiple of the real images that synthetic ones (five per photograph by default) are worth at most."""
WORTH_POINTS = 0.06
"""Twice the 3 points that ten seeds of a comparison can tell from chance: synthetic images win a part of what real ones do."""
WORTH_SHARE = 0.3
"""Where four times the images leave over 70 % of the errors, labels or classes cap the accuracy, not the number of images.
ELPV's eight classes, where no method helped, lie at 0.21; signs and seedlings at 0.39 and more."""
SURE = 0.8
"""Share of the resamples that must agree; between 0.2 and 0.8 the verdict is open."""
MIN_SIZES, MIN_EVALUATED = 3, 30
"""Fewest sizes on a curve for a line through it, and fewest evaluated images (30: a standard error of 9 points)."""
EVEN = 0.5
"""Least share of the present images per class that every class has where a gain is extrapolated: beyond the smallest class
only the others grow along the curve, so that its slope says little of more images of every class."""
RESAMPLES = 400
WORTH, NOT_WORTH, UNKNOWN = "worth it", "probably not", "too little data to say"


@dataclass(frozen=True)
class Pool:
    """Labelled images as features.

    Attributes:
        features: float32 ``(N, D)``.
        labels: int64 ``(N,)``.
        held_out: bool ``(N,)``, the validation images; none: cross-validation.
    """

    features: np.ndarray
    labels: np.ndarray
    held_out: np.ndarray
    class_names: tuple[str, ...]
    keys: tuple[str, ...]

    @property
    def evaluated(self) -> np.ndarray:
        """Rows that are evaluated: the validation images, or all."""
        return np.flatnonzero(self.held_out) if self.held_out.any() else np.arange(len(self.labels))

    def folds(self, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(training rows in the order of their draw, evaluated rows) of each fold; every class in its own order."""
        order = [
            numpy_rng(seed, "headroom", name).permutation(np.flatnonzero(self.labels == label))
            for label, name in enumerate(self.class_names)
        ]
        drawn, rank = np.concatenate(order), np.zeros(len(self.labels), np.int64)
        if self.held_out.any():
            yield drawn[~self.held_out[drawn]], self.evaluated
            return
        rank[drawn] = np.concatenate([np.arange(len(rows)) for rows in order])
        for fold in range(FOLDS):
            evaluated = rank % FOLDS == fold
            yield drawn[~evaluated[drawn]], np.flatnonzero(evaluated)

    def available(self) -> np.ndarray:
        """``(K,)`` training images of each class that every fold has."""
        counts = np.bincount(self.labels[~self.held_out], minlength=len(self.class_names))
        return counts if self.held_out.any() else counts - -(-counts // FOLDS)


@dataclass(frozen=True)
class Curve:
    """Predictions of linear classifiers trained on growing numbers of images.

    Attributes:
        sizes: S numbers of images per class at most, ascending; the last is all.
        images: ``(S,)`` images per class that there are of them, on average.
        predicted: int64 ``(S, R, N)``, class of each evaluated image under each of R draws.
        labels: int64 ``(N,)`` true classes.
        available: ``(K,)`` training images of each class.
    """

    sizes: tuple[int, ...]
    images: np.ndarray
    predicted: np.ndarray
    labels: np.ndarray
    keys: tuple[str, ...]
    class_names: tuple[str, ...]
    available: np.ndarray

    @property
    def smallest(self) -> int:
        """Number of training images of the smallest class that is evaluated."""
        return int(self.available[np.unique(self.labels)].min())

    @property
    def macro(self) -> np.ndarray:
        """``(S, R)`` mean over classes of the share recognised."""
        counts = np.bincount(self.labels)
        weights = 1 / (counts[self.labels] * np.count_nonzero(counts))
        return (self.predicted == self.labels) @ weights

    def confused(self, size: int) -> list[tuple[float, int, int]]:
        """Rate at which images of either class are predicted as the other, over all draws, and the pair; worst first."""
        k = len(self.class_names)
        matrix = np.bincount((k * self.labels + self.predicted[size]).ravel(), minlength=k * k).reshape(k, k)
        rates = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
        pairs = [((rates[a, b] + rates[b, a]) / 2, a, b) for a in range(k) for b in range(a)]
        return sorted(pairs, reverse=True)

    def always_wrong(self, size: int) -> np.ndarray:
        """bool ``(N,)``, images of classes with training images that every draw gets wrong."""
        return (self.predicted[size] != self.labels).all(0) & (self.available[self.labels] > 0)


def sizes_of(available: np.ndarray, present: int) -> tuple[int, ...]:
    """Images per class at which a curve is measured, for ``available`` ``(K,)`` training images of each class and ``present``
    images per class (-1: all)."""
    most = int(available.max())
    wanted = {*SIZES, *(factor * present for factor in (1, 2, FACTOR) if present > 0)}
    return (*sorted(size for size in wanted if size < most), most)


def measure_curve(pool: Pool, present: int, seeds: Sequence[int]) -> Curve:
    """Trains on the images of every draw and size; a larger draw contains the smaller ones."""
    available = pool.available()
    sizes, rows = sizes_of(available, present), pool.evaluated
    position = np.zeros(len(pool.labels), np.int64)
    position[rows] = np.arange(len(rows))
    predicted = np.zeros((len(sizes), len(seeds), len(rows)), np.int64)
    for number, seed in enumerate(seeds):
        for drawn, evaluated in pool.folds(seed):
            labels = pool.labels[drawn]  # ordered by class
            rank = np.arange(len(labels)) - np.searchsorted(labels, labels)
            for index, size in enumerate(sizes):
                if number and pool.held_out.any() and size >= available.max():
                    predicted[index, number] = predicted[index, 0]  # all images are the same under every seed
                    continue
                chosen = drawn[rank < size]
                classes = linear_predictions(pool.features, pool.labels, chosen, evaluated)
                predicted[index, number, position[evaluated]] = classes
    images = np.array([np.minimum(available, size).mean() for size in sizes])
    keys = tuple(pool.keys[row] for row in rows.tolist())
    return Curve(sizes, images, predicted, pool.labels[rows], keys, class_names=pool.class_names, available=available)


def linear_predictions(features: np.ndarray, labels: np.ndarray, train: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Classes ``(M,)`` that a multinomial logistic regression on features ``(N, D)``, trained on the rows ``train`` and their
    labels, gives M others."""
    import torch

    mean, deviation = features[train].mean(0), features[train].std(0)
    scale = SCALE / np.sqrt(features.shape[1]) / (deviation + 1e-3 * features[train].std() + 1e-6)

    def inputs(chosen: np.ndarray) -> torch.Tensor:
        x = ((features[chosen] - mean) * scale).astype(np.float32)
        return torch.from_numpy(np.concatenate([x, np.ones((len(x), 1), np.float32)], 1))

    x, y = inputs(train), torch.from_numpy(labels[train])
    weight = torch.zeros(x.shape[1], int(labels.max()) + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=ITERATIONS, history_size=10, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(x @ weight, y) + WEIGHT_DECAY / 2 * (weight[:-1] ** 2).sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.inference_mode():
        return (inputs(rows) @ weight).argmax(1).numpy()


# ------------------------------------------------------------------------------------------------------ more images


@dataclass(frozen=True)
class Gain:
    """The gain of a multiple of the present images.

    Attributes:
        factor: the multiple.
        measured: whether there are that many images; else the power law is used.
        points: gain of macro accuracy in [0, 1].
        low: lower end of its 95 % interval, for other draws and other evaluated images.
        high: upper end.
        share: part of the present errors that the gain removes.
        promising: share of the resamples in which the gain is worth it.
        even: whether every class has enough (:data:`EVEN`) of the present images.
    """

    factor: int
    measured: bool
    points: float
    low: float
    high: float
    share: float
    promising: float
    even: bool = True

    @property
    def reliable(self) -> bool:
        """Whether the gain is measured, or extrapolated from classes that all grow along the curve."""
        return self.measured or self.even


def present_index(curve: Curve, present: int) -> int:
    """Position of the largest size up to the present images per class (-1: all)."""
    return len(curve.sizes) - 1 if present < 1 else max(0, int(np.searchsorted(curve.sizes, present, "right")) - 1)


def gain_of(curve: Curve, present: int, factor: int) -> Gain:
    """The gain of ``factor`` times the present images, with an interval by the bootstrap over draws and images."""
    now, target = present_index(curve, present), factor * curve.images[present_index(curve, present)]
    enough = np.flatnonzero(curve.images >= 0.9 * target)

    def later(errors: np.ndarray) -> float:
        if len(enough):  # between two sizes, on the line in the logarithm of the images
            images = min(target, curve.images[enough[0]])
            return float(np.interp(np.log(images), np.log(curve.images), errors))
        # power law through the sizes from an eighth of the present one on
        chosen = curve.images >= curve.images[now] / 8
        if chosen.sum() < 2:
            return float(errors[-1])
        floor = 0.5 / len(curve.labels)
        slope = np.polyfit(np.log(curve.images[chosen]), np.log(np.maximum(errors[chosen], floor)), 1)[0]
        return float(errors[-1] * (target / curve.images[-1]) ** min(0.0, slope))

    def win(errors: np.ndarray) -> tuple[float, float]:
        points = float(errors[now]) - later(errors)
        return points, points / max(float(errors[now]), 1e-9)

    points, share = win(1 - curve.macro.mean(1))
    right = (curve.predicted == curve.labels).astype(np.float64)
    wins = np.array([win(1 - accuracy) for accuracy in _resampled(right, curve.labels)])
    promising = ((wins[:, 0] >= WORTH_POINTS) & (wins[:, 1] >= WORTH_SHARE)).mean()
    low, high = np.percentile(wins[:, 0], [2.5, 97.5])
    interval, measured = {"low": float(low), "high": float(high)}, bool(len(enough))
    even = curve.smallest >= EVEN * float(curve.images[now])
    return Gain(factor, measured, points, **interval, share=share, promising=float(promising), even=even)


def _resampled(right: np.ndarray, labels: np.ndarray) -> Iterator[np.ndarray]:
    """Macro accuracies ``(S,)`` under resampled draws and images, these within each class; ``right`` ``(S, R, N)`` is 1 where
    a prediction is right."""
    rng, draws = numpy_rng(0, "headroom", "bootstrap"), right.shape[1]
    classes = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    for _ in range(RESAMPLES):
        weights = np.zeros(len(labels))
        for rows in classes:
            weights[rows] = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows))) / len(rows) / len(classes)
        yield (right @ weights) @ (rng.multinomial(draws, np.full(draws, 1 / draws)) / draws)


def verdict(curve: Curve, gain: Gain) -> str:
    """``worth it``, ``probably not`` or ``too little data to say``, by the constants of this module."""
    too_few = len(curve.labels) < MIN_EVALUATED or (len(curve.sizes) < MIN_SIZES and not gain.measured)
    if too_few or not gain.reliable or 1 - SURE < gain.promising < SURE:
        return UNKNOWN
    return WORTH if gain.promising >= SURE else NOT_WORTH
