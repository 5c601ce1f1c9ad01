"""Sampling of the training batches of stage 3 from real and synthetic images, and its settings.

Three modes for synthetic images: ``item`` replaces each item with probability p (as in Diff-Mix), ``ratio`` replaces a fixed
share p of every batch, ``concat`` uses every real and synthetic image once per epoch. A curriculum over the strengths (DisCL,
Liang et al. 2025, arXiv:2410.13674, which starts with strong translations, easy and far from the real images) changes the
sampling probabilities of synthetic images over the epochs; p may change linearly over the epochs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from semantic_aug import cli
from semantic_aug.errors import UserError
from semantic_aug.seeding import numpy_rng

SYNTHETIC_MODES = ("item", "ratio", "concat")
SOFT_LABELS = ("strength", "teacher", "mixed")
ROUNDING = 1e-6
"""Tolerance of numbers of images that are sums of shares."""
NEED_SYNTHETIC = ("synthetic_balanced", "target_class_num", "syndata_max", "curriculum", "soft_labels")
"""Settings that are refused without synthetic images."""


@dataclass(frozen=True)
class SyntheticSettings:
    """The synthetic images, their labels, and their sampling into the batches."""

    TITLE = "synthetic data"
    syndata_key: tuple[str | None, ...] | None = cli.setting(
        None,
        nargs="+",
        type=cli.optional_word,
        metavar="KEY",
        help="subsets of the data set's section in synthetic_datasets.yaml (KEY#VARIANT for a filtered one); None: the "
        "real-only baseline",
        record=False,
    )
    syndata_dir: tuple[str, ...] | None = cli.setting(
        None,
        nargs="+",
        type=cli.path_or(),
        metavar="DIR",
        help="folders of subsets (DIR#VARIANT for a filtered one), besides or instead of keys",
        record=False,
    )
    gamma: float = cli.setting(
        0.5,
        type=cli.number(0, open_low=True),
        metavar="G",
        help="exponent of the soft labels (1 - s^G) source + s^G target; above 0",
    )
    soft_labels: str = cli.setting(
        "strength",
        choices=SOFT_LABELS,
        absent="strength",
        help="strength: by --gamma; teacher: predictions of classifiers trained on real images without the image's recorded "
        "sources (trained first with the settings of this run, and reused); mixed: a mean of both",
    )
    teacher_weight: float = cli.setting(
        0.5,
        type=cli.number(0, 1),
        metavar="W",
        absent=0.5,
        help="weight of the teacher's labels in --soft_labels mixed",
    )
    teacher_temperature: float = cli.setting(
        1.0,
        type=cli.number(0, open_low=True),
        metavar="T",
        absent=1.0,
        help="temperature of the teacher's labels q^(1/T), normalised, from its probabilities q; above 1 flatter",
    )
    teacher_classes: str = cli.setting(
        "all",
        choices=("all", "pair"),
        absent="all",
        help="classes in a teacher's label: all, or pair (source and target)",
    )
    teacher_folds: int = cli.setting(
        5,
        type=cli.whole(2),
        absent=5,
        help="folds of the training images; each teacher is trained without one fold, or without two if images have two "
        "sources",
    )
    synthetic_prob: float | str = cli.setting(
        0.1,
        type=cli.schedule(0, 1),
        metavar="P|P:P",
        help="probability that a training item is synthetic (ratio: share of every batch; not used by concat), in [0, 1]; "
        "FIRST:LAST changes it linearly from the first to the last epoch",
        record=False,
    )
    synthetic_mode: str = cli.setting(
        "item",
        choices=SYNTHETIC_MODES,
        help="item: each item with probability p; ratio: a fixed share p of every batch; concat: every real and synthetic "
        "image once per epoch",
        record=False,
    )
    synthetic_balanced: bool = cli.setting(
        False,
        help="draw a target class first, all with equal probability, then one of its synthetic images",
        record=False,
    )
    synthetic_draw: str = cli.setting(
        "images",
        choices=("images", "inverse_frequency"),
        absent="images",
        help="images: all synthetic images with equal probability; inverse_frequency: first a target class, in proportion to "
        "1 / (n + 1) for n real training images, then one of its synthetic images",
    )
    curriculum: str = cli.setting(
        "none",
        choices=("none", "strength"),
        absent="none",
        help="strength: the probability of each synthetic image changes linearly over the epochs, by the rank of its "
        "strength; over the whole run all are drawn equally often",
    )
    curriculum_order: str = cli.setting(
        "strong_first",
        choices=("strong_first", "weak_first"),
        absent="strong_first",
        help="--curriculum strength begins with strong translations (as DisCL does) or with weak ones",
    )
    target_class_num: int = cli.setting(
        0, type=cli.whole(0), help="use only N target classes of each source class, drawn with --subset_seed; 0: all"
    )
    syndata_max: int | None = cli.setting(
        None,
        type=cli.whole(1),
        help="use only N synthetic images, even over target classes, drawn with --subset_seed (default: all)",
    )
    allow_other_sources: bool = cli.setting(
        False,
        help="accept subsets whose source images are not among the training images of this setting, or whose generator was "
        "trained on its validation or test images",
        result=False,
        record=False,
    )

    def __post_init__(self):
        if self.synthetic_balanced and self.inverse_frequency:
            raise UserError(
                "--synthetic_balanced and --synthetic_draw inverse_frequency exclude each other: give one of them, or "
                "--synthetic_draw images"
            )

    @property
    def inverse_frequency(self) -> bool:
        """Whether rare target classes are drawn more often."""
        return self.synthetic_draw == "inverse_frequency"

    @property
    def probabilities(self) -> tuple[float, float]:
        """The probability of a synthetic item in the first and in the last epoch."""
        first, _, last = str(self.synthetic_prob).partition(":")
        return float(first), float(last or first)

    @property
    def active(self) -> bool:
        """Whether synthetic images are drawn at all."""
        return self.synthetic_mode == "concat" or max(self.probabilities) > 0

    @property
    def changing(self) -> bool:
        """Whether the sampling changes over the epochs."""
        return self.curriculum != "none" or len(set(self.probabilities)) > 1

    def draws_record(self, used: bool, carried: bool) -> dict:
        """The record of the sampling in ``args.yaml``.

        Args:
            used: whether there are synthetic images.
            carried: see :attr:`EpochDraws.carried`; absent in records of versions that dropped the remainder.
        """
        record = {
            "mode": self.synthetic_mode if used else SYNTHETIC_MODES[0],
            "probability": self.synthetic_prob if used else 0.0,
            "balanced": self.synthetic_balanced,
        }
        return record | ({"remainder": "carried from epoch to epoch"} if carried else {})


def balanced_rows(
    labels: np.ndarray, count: int, rng: np.random.Generator, weights: np.ndarray | None = None
) -> np.ndarray:
    """Draws ``count`` rows with replacement: a class among those that occur, then one of its rows.

    Classes are drawn uniformly, so that an image has the weight 1 / n of its class (CMO, Park et al. 2022, as its authors
    implement it), or by ``weights`` ``(K,)``.
    """
    classes, index, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    order = np.argsort(index, kind="stable")
    starts = np.cumsum(sizes) - sizes
    if weights is None:
        chosen = rng.integers(len(classes), size=count)
    else:
        chosen = rng.choice(len(classes), size=count, p=weights[classes] / weights[classes].sum())
    return order[starts[chosen] + (rng.random(count) * sizes[chosen]).astype(np.int64)]


def curriculum_weights(strengths: np.ndarray, progress: float, order: str) -> np.ndarray:
    """Relative sampling probabilities of synthetic images under a curriculum, ``(M,)`` in (0, 1) with mean 1/2.

    Let r in (0, 1) be the rank of an image's strength; equal strengths share their mean rank. The weight changes linearly
    from r to 1 - r (``strong_first``) or from 1 - r to r (``weak_first``). Over a whole run all images have equal weight.

    Args:
        strengths: ``(M,)``.
        progress: progress of the training, 0 in the first and 1 in the last epoch.
        order: ``strong_first`` or ``weak_first``.
    """
    _, index, sizes = np.unique(strengths, return_inverse=True, return_counts=True)
    rank = ((np.cumsum(sizes) - sizes / 2) / len(strengths))[index]
    strong = 1 - progress if order == "strong_first" else progress
    return strong * rank + (1 - strong) * (1 - rank)


class EpochDraws:
    """The items of every batch of a training.

    Args:
        real: number of real images.
        targets: ``(M,)`` target class of each synthetic image; None or empty without synthetic images.
        settings: sampling of the synthetic images.
        batch_size: items per batch; an epoch's last, smaller batch is dropped unless it is the only one.
        seed: seed of all draws.
        counts: ``(K,)`` number of real training images of each class, for draws by inverse frequency.
        strengths: ``(M,)`` strengths of the synthetic images, for a curriculum.
        epochs: epochs of the whole training, over which a curriculum and a changing probability extend.

    Raises:
        UserError: the sampling changes over the epochs, and ``epochs`` is not given.
    """

    def __init__(
        self,
        real: int,
        targets: np.ndarray | None,
        settings: SyntheticSettings,
        batch_size: int,
        seed: int,
        *,
        counts: np.ndarray | None = None,
        strengths: np.ndarray | None = None,
        epochs: int | None = None,
    ):
        if settings.changing and epochs is None:
            raise UserError("synthetic_prob FIRST:LAST and a curriculum extend over the training: give epochs=N")
        self.real, self.settings, self.seed, self.epochs = real, settings, seed, epochs
        self.by_class = settings.synthetic_balanced or settings.inverse_frequency
        # classes evenly, or in proportion to 1 / (n + 1)
        self.class_weights = 1 / (counts + 1) if settings.inverse_frequency else None
        self.targets = targets if targets is not None and len(targets) and settings.active else None
        self.pool = real + (len(targets) if self.targets is not None and settings.synthetic_mode == "concat" else 0)
        self.batch_size = min(batch_size, self.pool)
        self.steps_per_epoch = max(1, self.pool // self.batch_size)
        self.strengths = strengths if self.targets is not None and settings.curriculum != "none" else None
        self._chances: tuple[int, np.ndarray] | None = None

    def _progress(self, epoch: int) -> float:
        """Progress of the training: 0 in the first and 1 in the last epoch."""
        return epoch / (self.epochs - 1) if self.epochs is not None and self.epochs > 1 else 0.0

    def order(self, epoch: int) -> np.ndarray:
        """The items of an epoch in order: indices below ``real`` are real images, the others synthetic images."""
        rng = numpy_rng(self.seed, "classify", "epoch", epoch)
        items = rng.permutation(self.pool)
        if self.pool > self.real and (self.by_class or self.strengths is not None):
            synthetic = items >= self.real
            items[synthetic] = self.real + self._synthetic_rows(epoch, int(synthetic.sum()), rng)
        return items

    def batch(self, epoch: int, step: int, order: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The items of one step, from the epoch's :meth:`order`; epoch and step count from 0."""
        items = order[step * self.batch_size : (step + 1) * self.batch_size]
        if self.targets is None or self.settings.synthetic_mode == "concat":
            return items
        swap = self._swapped(epoch, step, len(items), rng)
        if swap.any():
            items = items.copy()
            items[swap] = self.real + self._synthetic_rows(epoch, int(swap.sum()), rng)
        return items

    def _synthetic_rows(self, epoch: int, count: int, rng: np.random.Generator) -> np.ndarray:
        if self.strengths is not None:
            rows = np.searchsorted(self._cumulative_chances(epoch), rng.random(count), side="right")
            return np.minimum(rows, len(self.targets) - 1)
        if self.by_class:
            return balanced_rows(self.targets, count, rng, self.class_weights)
        return rng.integers(len(self.targets), size=count)

    def _cumulative_chances(self, epoch: int) -> np.ndarray:
        """Cumulative probabilities of the synthetic images under the curriculum, ``(M,)``."""
        if self._chances is None or self._chances[0] != epoch:
            chances = curriculum_weights(self.strengths, self._progress(epoch), self.settings.curriculum_order)
            if self.by_class:  # classes as without a curriculum, then images within a class by their strengths
                chances /= np.bincount(self.targets, chances)[self.targets]
                chances *= 1 if self.class_weights is None else self.class_weights[self.targets]
            self._chances = epoch, np.cumsum(chances / chances.sum())
        return self._chances[1]

    def _swapped(self, epoch: int, step: int, size: int, rng: np.random.Generator) -> np.ndarray:
        """Whether each item of a batch is synthetic, bool ``(size,)``."""
        if self.settings.synthetic_mode == "item":  # each item independently, as in Diff-Mix
            return rng.random(size) < self._probability(epoch)
        # ratio: a fraction of an image is carried to the next batch, so that the share over the training is p
        whole: Sequence[int] = [int(self._synthetic_share(epoch, step + after) + ROUNDING) for after in (0, 1)]
        swap = np.zeros(size, bool)
        swap[rng.permutation(size)[: whole[1] - whole[0]]] = True
        return swap

    def _probability(self, epoch: int) -> float:
        first, last = self.settings.probabilities
        return first + (last - first) * self._progress(epoch)

    def _synthetic_share(self, epoch: int, step: int) -> float:
        """The expected number of synthetic items before a step: p summed over all earlier items."""
        # p is linear in the epoch: its mean over the earlier epochs is the mean of the first and the last of them
        earlier = epoch * (self._probability(0) + self._probability(epoch - 1)) / 2 if epoch else 0.0
        return (earlier * self.steps_per_epoch + step * self._probability(epoch)) * self.batch_size

    @property
    def carried(self) -> bool:
        """Whether any epoch begins with a fraction of a synthetic image carried from earlier epochs."""
        if self.targets is None or self.settings.synthetic_mode != "ratio":
            return False
        shares = [self._synthetic_share(epoch, 0) for epoch in range(1, self.epochs or 1)]
        return any(abs(share - round(share)) > ROUNDING for share in shares)
