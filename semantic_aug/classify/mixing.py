"""Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) over soft labels, with timm's conventions.

timm's own ``Mixup`` takes class indices; ours takes ``(B, K)`` targets, so that real and synthetic images mix alike, and
draws from a generator of its own. Each batch is mixed with itself in reverse order with one ratio, as timm does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class MixSettings:
    """Which mixing is applied.

    Attributes:
        mixup_alpha: of the Beta distribution; 0: no mixup.
        cutmix_alpha: likewise for CutMix. With both, each batch takes one of them at even odds.
        probability: share of batches that are mixed at all.
    """

    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    probability: float = 1.0

    @property
    def active(self) -> bool:
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0


def mixup(images: Tensor, targets: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """x = r x + (1 - r) x', y likewise; images ``(B, 3, H, W)``, targets ``(B, K)``, x' the batch reversed."""
    return images * ratio + images.flip(0) * (1 - ratio), targets * ratio + targets.flip(0) * (1 - ratio)


def cut_box(height: int, width: int, ratio: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """A box (top, bottom, left, right) around a random centre, of the area (1 - ratio), clipped to the image."""
    side = (1 - ratio) ** 0.5
    cut_h, cut_w = int(height * side), int(width * side)
    y, x = int(rng.integers(height)), int(rng.integers(width))
    top, bottom = max(0, y - cut_h // 2), min(height, y + cut_h // 2)
    left, right = max(0, x - cut_w // 2), min(width, x + cut_w // 2)
    return top, bottom, left, right


def cutmix(images: Tensor, targets: Tensor, box: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
    """Pastes a box of the reversed batch; the labels mix by the area really pasted."""
    top, bottom, left, right = box
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = images.flip(0)[..., top:bottom, left:right]
    ratio = 1 - (bottom - top) * (right - left) / (images.shape[-1] * images.shape[-2])
    return mixed, targets * ratio + targets.flip(0) * (1 - ratio)


def mix(images: Tensor, targets: Tensor, settings: MixSettings, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Applies mixup or CutMix to a batch.

    Args:
        images: ``(B, 3, H, W)``.
        targets: ``(B, K)``, rows summing to one; they still do afterwards.
        settings: which.
        rng: decides whether, which, and how much.
    """
    if not settings.active or rng.random() >= settings.probability:
        return images, targets
    use_cutmix = settings.cutmix_alpha > 0 and (settings.mixup_alpha == 0 or rng.random() < 0.5)
    alpha = settings.cutmix_alpha if use_cutmix else settings.mixup_alpha
    ratio = float(rng.beta(alpha, alpha))
    if not use_cutmix:
        return mixup(images, targets, ratio)
    return cutmix(images, targets, cut_box(*images.shape[-2:], ratio, rng))
