"""Which images make up the batches of an epoch, real and synthetic: pure functions of (seed, epoch, step).

Three ways of using synthetic images: ``item`` replaces each item with probability p (the paper's), ``ratio`` replaces a
fixed share p of every batch, ``concat`` runs through real and synthetic images alike, once an epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from semantic_aug.seeding import numpy_rng

SYNTHETIC_MODES = ("item", "ratio", "concat")


@dataclass(frozen=True)
class DrawSettings:
    """How synthetic images enter the batches.

    Attributes:
        mode: one of :data:`SYNTHETIC_MODES`.
        probability: chance (``item``) or share (``ratio``) of synthetic items, in [0, 1]; not used by ``concat``.
        balanced: draw a target class first, all equally often, then one of its images.
    """

    mode: str = "item"
    probability: float = 0.0
    balanced: bool = False

    @property
    def active(self) -> bool:
        """Whether any synthetic image is ever drawn."""
        return self.mode == "concat" or self.probability > 0


def balanced_rows(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """``count`` rows, each of a class drawn evenly among those that occur; with replacement."""
    classes, index, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    order = np.argsort(index, kind="stable")
    starts = np.cumsum(sizes) - sizes
    chosen = rng.integers(len(classes), size=count)
    return order[starts[chosen] + (rng.random(count) * sizes[chosen]).astype(np.int64)]


def minority_rows(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """``count`` rows with chances in inverse proportion to the size of their class (CMO, Park et al. 2022).

    As its authors implement it, an image's weight is 1 / n of its class: every class is drawn equally often.
    """
    return balanced_rows(labels, count, rng)


class EpochDraws:
    """The items of every batch.

    Args:
        real: number of real images.
        targets: ``(M,)`` target class of each synthetic image; None or empty without any.
        settings: how they enter.
        batch_size: items per batch; an epoch's last, smaller part is dropped unless it is all there is.
        seed: of every choice.
    """

    def __init__(self, real: int, targets: np.ndarray | None, settings: DrawSettings, batch_size: int, seed: int):
        self.real, self.settings, self.seed = real, settings, seed
        self.targets = targets if targets is not None and len(targets) and settings.active else None
        self.pool = real + (len(targets) if self.targets is not None and settings.mode == "concat" else 0)
        self.batch_size = min(batch_size, self.pool)
        self.steps_per_epoch = max(1, self.pool // self.batch_size)

    def order(self, epoch: int) -> np.ndarray:
        """The epoch's items in order: an index below ``real`` is a real image, above it a synthetic one."""
        rng = numpy_rng(self.seed, "classify", "epoch", epoch)
        items = rng.permutation(self.pool)
        if self.pool > self.real and self.settings.balanced:
            synthetic = items >= self.real
            items[synthetic] = self.real + balanced_rows(self.targets, int(synthetic.sum()), rng)
        return items

    def batch(self, step: int, order: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The items of one step, indices as in :meth:`order`.

        Args:
            step: within the epoch.
            order: of the epoch.
            rng: of the step.
        """
        items = order[step * self.batch_size : (step + 1) * self.batch_size]
        if self.targets is None or self.settings.mode == "concat":
            return items
        swap = self._swapped(step, len(items), rng)
        if swap.any():
            items, count = items.copy(), int(swap.sum())
            drawn = (
                balanced_rows(self.targets, count, rng)
                if self.settings.balanced
                else rng.integers(len(self.targets), size=count)
            )
            items[swap] = self.real + drawn
        return items

    def _swapped(self, step: int, size: int, rng: np.random.Generator) -> np.ndarray:
        """Which items of a batch are synthetic, bool ``(size,)``."""
        p = self.settings.probability
        if self.settings.mode == "item":
            return rng.random(size) < p
        # the fraction that a batch cannot hold is carried to the next, so that the epoch's share is p
        whole: Sequence[int] = [int((step + after) * p * size + 1e-9) for after in (0, 1)]
        swap = np.zeros(size, bool)
        swap[rng.permutation(size)[: whole[1] - whole[0]]] = True
        return swap
