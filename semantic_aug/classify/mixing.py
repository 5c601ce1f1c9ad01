"""Mixup (Zhang et al. 2018), CutMix (Yun et al. 2019) and CMO (Park et al. 2022) over soft labels.

timm's own ``Mixup`` takes class indices; ours takes ``(B, K)`` targets, so that real and synthetic images mix alike, and
draws from a generator of its own. Each batch is mixed with itself in reverse order with one ratio, as timm does. CMO
(context-rich minority oversampling) is CutMix whose pasted boxes come from another batch, drawn in favour of rare classes.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from semantic_aug.classify.config import MixSettings


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


def paste(
    images: Tensor, targets: Tensor, others: Tensor, other_targets: Tensor, box: tuple[int, int, int, int]
) -> tuple[Tensor, Tensor]:
    """Pastes a box of each other image; the labels mix by the area really pasted.

    Args:
        images: ``(B, 3, H, W)``.
        targets: ``(B, K)``.
        others: ``(B, 3, H, W)``.
        other_targets: ``(B, K)``.
        box: top, bottom, left, right.
    """
    top, bottom, left, right = box
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = others[..., top:bottom, left:right]
    # the box may be clipped: the share of the labels is that of the area pasted
    ratio = 1 - (bottom - top) * (right - left) / (images.shape[-1] * images.shape[-2])
    return mixed, targets * ratio + other_targets * (1 - ratio)


def cutmix(images: Tensor, targets: Tensor, box: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
    """Pastes a box of the reversed batch."""
    return paste(images, targets, images.flip(0), targets.flip(0), box)


def mix(
    images: Tensor,
    targets: Tensor,
    settings: MixSettings,
    rng: np.random.Generator,
    foregrounds: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Applies mixup, CutMix or CMO to a batch.

    Args:
        images: ``(B, 3, H, W)``.
        targets: ``(B, K)``, rows summing to one; they still do afterwards.
        settings: which kinds, how strongly, and how often.
        rng: decides whether, which, and how much.
        foregrounds: for CMO, images and targets of the same shapes, drawn in favour of rare classes.
    """
    kinds = list(settings.alphas)
    if not kinds or rng.random() >= settings.mix_prob:
        return images, targets
    kind = kinds[int(rng.integers(len(kinds)))] if len(kinds) > 1 else kinds[0]
    alpha = settings.alphas[kind]
    ratio = float(rng.beta(alpha, alpha))
    if kind == "mixup":
        return mixup(images, targets, ratio)
    box = cut_box(*images.shape[-2:], ratio, rng)
    if kind == "cutmix":
        return cutmix(images, targets, box)
    # CMO: the batch is the context, boxes of rare classes are pasted into it
    if foregrounds is None:
        raise ValueError("CMO needs foregrounds")
    return paste(images, targets, *foregrounds, box)
