"""Which items make up the batches of stage 3: real images, and synthetic ones under the settings declared here.

Three ways of using synthetic images: ``item`` replaces each item with probability p (the paper's), ``ratio`` replaces a fixed
share p of every batch, ``concat`` runs through real and synthetic images alike, once an epoch. A curriculum over the
strengths (DisCL, Liang et al. 2025, arXiv:2410.13674: strong translations, easy and far from the real images, come first)
changes from epoch to epoch which synthetic images are drawn, and p may run along a line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from semantic_aug import cli
from semantic_aug.errors import UserError
from semantic_aug.seeding import numpy_rng

SYNTHETIC_DRAWS = ("images", "inverse_frequency")
SYNTHETIC_MODES = ("item", "ratio", "concat")
SOFT_LABELS = ("strength", "teacher", "mixed")
TEACHER_CLASSES = ("all", "pair")
CURRICULA = ("none", "strength")
CURRICULUM_ORDERS = ("strong_first", "weak_first")
ROUNDING = 1e-6
"""Of a number of images that is added up from shares."""
NEED_SYNTHETIC = ("synthetic_balanced", "target_class_num", "syndata_max", "curriculum", "soft_labels")
"""Settings that are refused where there are no synthetic images."""


@dataclass(frozen=True)
class SyntheticSettings:
    """Which synthetic images there are, what their labels are, and how they enter the batches."""

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
        help="strength: by --gamma; teacher: from classifiers of the real training images that have not seen the image's "
        "recorded sources, which are trained first, as this run is, and kept; mixed: a mean of both",
    )
    teacher_weight: float = cli.setting(
        0.5,
        type=cli.number(0, 1),
        metavar="W",
        absent=0.5,
        help="the teacher's share of the labels of --soft_labels mixed",
    )
    teacher_temperature: float = cli.setting(
        1.0,
        type=cli.number(0, open_low=True),
        metavar="T",
        absent=1.0,
        help="temperature of the teacher's probabilities q, whose labels are q^(1/T), normalised; above 1 flatter",
    )
    teacher_classes: str = cli.setting(
        "all",
        choices=TEACHER_CLASSES,
        absent="all",
        help="classes with a share of a teacher's label: all, or source and target (pair)",
    )
    teacher_folds: int = cli.setting(
        5,
        type=cli.whole(2),
        absent=5,
        help="folds into which the training images are dealt; each teacher leaves out one, or two where images have two "
        "sources",
    )
    synthetic_prob: float | str = cli.setting(
        0.1,
        type=cli.schedule(0, 1),
        metavar="P|P:P",
        help="chance that a training item is synthetic (ratio: share of every batch; not used by concat), in [0, 1]; "
        "FIRST:LAST changes it linearly from the first to the last epoch",
        record=False,
    )
    synthetic_mode: str = cli.setting(
        "item",
        choices=SYNTHETIC_MODES,
        help="item: each item with chance p; ratio: a fixed share p of every batch; concat: real and synthetic images "
        "alike, once an epoch",
        record=False,
    )
    synthetic_balanced: bool = cli.setting(
        False, help="draw a target class first, all equally often, then one of its synthetic images", record=False
    )
    synthetic_draw: str = cli.setting(
        "images",
        choices=SYNTHETIC_DRAWS,
        absent="images",
        help="images: all synthetic images alike; inverse_frequency: a target class first, with chances in proportion to "
        "1 / (n + 1) for n real training images, then one of its synthetic images",
    )
    curriculum: str = cli.setting(
        "none",
        choices=CURRICULA,
        absent="none",
        help="strength: the chance of each synthetic image changes over the epochs with the rank of its strength, "
        "linearly; over the whole run all are drawn equally often",
    )
    curriculum_order: str = cli.setting(
        "strong_first",
        choices=CURRICULUM_ORDERS,
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
        help="accept subsets whose source images are not among the training images of this setting",
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
        """The chance of a synthetic item in the first and in the last epoch."""
        first, _, last = str(self.synthetic_prob).partition(":")
        return float(first), float(last or first)

    @property
    def active(self) -> bool:
        """Whether any synthetic image is ever drawn."""
        return self.synthetic_mode == "concat" or max(self.probabilities) > 0

    @property
    def changing(self) -> bool:
        """Whether the draws depend on how far the training is."""
        return self.curriculum != "none" or len(set(self.probabilities)) > 1

    def draws_record(self, used: bool, carried: bool) -> dict:
        """How synthetic images enter the batches, as ``args.yaml`` keeps it.

        Args:
            used: whether there are any.
            carried: see :attr:`EpochDraws.carried`; runs of versions that dropped the remainder do not name it.
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
    """``count`` rows, each of a class drawn among those that occur, evenly or by ``(K,)`` weights; with replacement."""
    classes, index, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    order = np.argsort(index, kind="stable")
    starts = np.cumsum(sizes) - sizes
    if weights is None:
        chosen = rng.integers(len(classes), size=count)
    else:
        chosen = rng.choice(len(classes), size=count, p=weights[classes] / weights[classes].sum())
    return order[starts[chosen] + (rng.random(count) * sizes[chosen]).astype(np.int64)]


def minority_rows(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """``count`` rows with chances in inverse proportion to the size of their class (CMO, Park et al. 2022).

    As its authors implement it, an image's weight is 1 / n of its class: every class is drawn equally often.
    """
    return balanced_rows(labels, count, rng)


def curriculum_weights(strengths: np.ndarray, progress: float, order: str) -> np.ndarray:
    """Relative chances of synthetic images ``(M,)``, between 0 and 1 and with the mean 1/2.

    With r in (0, 1) the rank of an image's strength, equal strengths sharing their mean rank, the chance goes linearly
    from r to 1 - r (``strong_first``) or from 1 - r to r. Half-way all images are alike, and over a run none is preferred.

    Args:
        strengths: ``(M,)``.
        progress: of the training, 0 in the first and 1 in the last epoch.
        order: one of :data:`CURRICULUM_ORDERS`.
    """
    _, index, sizes = np.unique(strengths, return_inverse=True, return_counts=True)
    rank = ((np.cumsum(sizes) - sizes / 2) / len(strengths))[index]
    strong = 1 - progress if order == "strong_first" else progress
    return strong * rank + (1 - strong) * (1 - rank)


class EpochDraws:
    """The items of every batch.

    Args:
        real: number of real images.
        targets: ``(M,)`` target class of each synthetic image; None or empty without any.
        settings: how they enter.
        batch_size: items per batch; an epoch's last, smaller part is dropped unless it is all there is.
        seed: of every choice.
        counts: ``(K,)`` real training images of each class, where target classes are drawn by them.
        strengths: ``(M,)`` of the synthetic images, for a curriculum.
        epochs: of the whole training, over which a curriculum and a changing probability extend.

    Raises:
        UserError: the draws change over the epochs, whose number is not given.
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
        """How far the training is: 0 in the first and 1 in the last epoch."""
        return epoch / (self.epochs - 1) if self.epochs is not None and self.epochs > 1 else 0.0

    def order(self, epoch: int) -> np.ndarray:
        """The epoch's items in order: an index below ``real`` is a real image, above it a synthetic one."""
        rng = numpy_rng(self.seed, "classify", "epoch", epoch)
        items = rng.permutation(self.pool)
        if self.pool > self.real and (self.by_class or self.strengths is not None):
            synthetic = items >= self.real
            items[synthetic] = self.real + self._synthetic_rows(epoch, int(synthetic.sum()), rng)
        return items

    def batch(self, epoch: int, step: int, order: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The items of one step of an epoch, both counted from 0, of the epoch's ``order``; indices as there."""
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
        """Chances of the synthetic images under the curriculum, added up ``(M,)``."""
        if self._chances is None or self._chances[0] != epoch:
            chances = curriculum_weights(self.strengths, self._progress(epoch), self.settings.curriculum_order)
            if self.by_class:  # classes as without a curriculum, the images of each by their strengths
                chances /= np.bincount(self.targets, chances)[self.targets]
                chances *= 1 if self.class_weights is None else self.class_weights[self.targets]
            self._chances = epoch, np.cumsum(chances / chances.sum())
        return self._chances[1]

    def _swapped(self, epoch: int, step: int, size: int, rng: np.random.Generator) -> np.ndarray:
        """Which items of a batch are synthetic, bool ``(size,)``."""
        if self.settings.synthetic_mode == "item":  # the paper's way: each item by itself
            return rng.random(size) < self._probability(epoch)
        # ratio: the fraction that a batch cannot hold is carried to the next, so that the training's share is p
        whole: Sequence[int] = [int(self._synthetic_share(epoch, step + after) + ROUNDING) for after in (0, 1)]
        swap = np.zeros(size, bool)
        swap[rng.permutation(size)[: whole[1] - whole[0]]] = True
        return swap

    def _probability(self, epoch: int) -> float:
        first, last = self.settings.probabilities
        return first + (last - first) * self._progress(epoch)

    def _synthetic_share(self, epoch: int, step: int) -> float:
        """The synthetic share of all items before a step, in items: p added up over the training so far."""
        # p goes along a line: over the earlier epochs its mean is that of the first and the last of them
        earlier = epoch * (self._probability(0) + self._probability(epoch - 1)) / 2 if epoch else 0.0
        return (earlier * self.steps_per_epoch + step * self._probability(epoch)) * self.batch_size

    @property
    def carried(self) -> bool:
        """Whether an epoch begins with a fraction of a synthetic image that the earlier ones could not hold."""
        if self.targets is None or self.settings.synthetic_mode != "ratio":
            return False
        shares = [self._synthetic_share(epoch, 0) for epoch in range(1, self.epochs or 1)]
        return any(abs(share - round(share)) > ROUNDING for share in shares)
