"""Mixup (Zhang et al. 2018), CutMix (Yun et al. 2019) and CMO (Park et al. 2022) over soft labels.

timm's ``Mixup`` takes class indices; these functions take ``(B, K)`` targets, for real and synthetic images alike, and a
random generator. As in timm, a batch is mixed with itself in reverse order with one ratio. CMO (context-rich minority
oversampling) is CutMix with boxes from a second batch, in which rare classes are oversampled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from semantic_aug import cli

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class MixSettings:
    """Mixing of batches; of several kinds, each batch uses one, chosen uniformly."""

    TITLE = "loss and mixing"
    use_cutmix: bool = cli.setting(False, help="CutMix over real and synthetic images", record=False)
    use_mixup: bool = cli.setting(False, help="mixup; with several kinds of mixing, each batch uses one", record=False)
    use_cmo: bool = cli.setting(
        False,
        help="CMO: boxes of other images, in which rare classes are oversampled, are pasted, by --cutmix_alpha",
        record=False,
    )
    cutmix_alpha: float = cli.setting(
        1.0,
        type=cli.number(0, open_low=True),
        metavar="A",
        help="parameter of CutMix's Beta(A, A) distribution",
        record=False,
    )
    mixup_alpha: float = cli.setting(
        0.4,
        type=cli.number(0, open_low=True),
        metavar="A",
        help="parameter of mixup's Beta(A, A) distribution",
        record=False,
    )
    mix_prob: float = cli.setting(
        1.0,
        type=cli.number(0, 1),
        metavar="P",
        help="share of batches that are mixed (of images, by --cutmix_per item)",
        record=False,
    )
    cutmix_per: str = cli.setting(
        "batch",
        choices=("batch", "item"),
        absent="batch",
        help="batch: one box for the whole batch; item: one box per image, with probability --mix_prob",
    )
    unmixed_epochs: tuple[int, int] = cli.setting(
        (0, 0),
        nargs=2,
        type=cli.whole(0),
        absent=(0, 0),
        help="epochs without mixing at the start and at the end of the run; CMO's authors: 4 3 (default: 0 0)",
    )

    def mixes(self, epoch: int, epochs: int) -> bool:
        """Whether the batches of an epoch, counted from 0, are mixed."""
        first, last = self.unmixed_epochs
        return bool(self.alphas) and first <= epoch < epochs - last

    @property
    def alphas(self) -> dict[str, float]:
        """The kinds in use, each with the parameter of its Beta distribution."""
        kinds = {
            "mixup": (self.use_mixup, self.mixup_alpha),
            "cutmix": (self.use_cutmix, self.cutmix_alpha),
            "cmo": (self.use_cmo, self.cutmix_alpha),
        }
        return {kind: alpha for kind, (used, alpha) in kinds.items() if used}


def mixup(images: Tensor, targets: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """Mixup: r x + (1 - r) x' for images ``(B, 3, H, W)`` and targets ``(B, K)``; x' is the batch in reverse order."""
    return images * ratio + images.flip(0) * (1 - ratio), targets * ratio + targets.flip(0) * (1 - ratio)


def cut_box(height: int, width: int, ratio: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """A box (top, bottom, left, right) with a random centre and the area (1 - ratio), clipped to the image."""
    side = (1 - ratio) ** 0.5
    cut_h, cut_w = int(height * side), int(width * side)
    y, x = int(rng.integers(height)), int(rng.integers(width))
    top, bottom = max(0, y - cut_h // 2), min(height, y + cut_h // 2)
    left, right = max(0, x - cut_w // 2), min(width, x + cut_w // 2)
    return top, bottom, left, right


def paste(
    images: Tensor, targets: Tensor, others: Tensor, other_targets: Tensor, box: tuple[int, int, int, int]
) -> tuple[Tensor, Tensor]:
    """Pastes a box (top, bottom, left, right) of each other image ``(B, 3, H, W)``; targets ``(B, K)`` are mixed by the
    pasted area."""
    top, bottom, left, right = box
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = others[..., top:bottom, left:right]
    # the box may be clipped: labels are mixed by the area after clipping
    ratio = 1 - (bottom - top) * (right - left) / (images.shape[-1] * images.shape[-2])
    return mixed, targets * ratio + other_targets * (1 - ratio)


def item_boxes(count: int, height: int, width: int, settings: MixSettings, rng: np.random.Generator) -> np.ndarray:
    """Draws one box per image as :func:`cut_box` does, int64 ``(count, 4)``: top, bottom, left, right; empty for an image that
    is not mixed."""
    mixed = rng.random(count) < settings.mix_prob
    side = (1 - rng.beta(settings.cutmix_alpha, settings.cutmix_alpha, size=count)) ** 0.5 * mixed
    edges = []
    for length, centre in ((height, rng.integers(height, size=count)), (width, rng.integers(width, size=count))):
        half = (length * side).astype(np.int64) // 2
        edges += [np.maximum(0, centre - half), np.minimum(length, centre + half)]
    return np.stack(edges, axis=1)


def cutmix_items(images: Tensor, targets: Tensor, boxes: np.ndarray) -> tuple[Tensor, Tensor]:
    """Pastes one box per image from the batch in reverse order; boxes ``(B, 4)`` as of :func:`item_boxes`."""
    import torch

    rows, columns = (torch.arange(size, device=images.device) for size in images.shape[-2:])
    top, bottom, left, right = torch.from_numpy(boxes).to(images.device).T[..., None]
    down, across = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    inside = down[:, None, :, None] & across[:, None, None, :]
    share = inside.float().mean((1, 2, 3))[:, None]
    return torch.where(inside, images.flip(0), images), targets * (1 - share) + targets.flip(0) * share


def mix(
    images: Tensor,
    targets: Tensor,
    settings: MixSettings,
    rng: np.random.Generator,
    foregrounds: tuple[Tensor, Tensor] | None = None,
    *,
    share: tuple[np.ndarray, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Applies mixup, CutMix or CMO to a batch.

    Args:
        images: ``(B, 3, H, W)``.
        targets: ``(B, K)``, rows summing to one before and after.
        settings: kinds of mixing, their parameters and probability.
        rng: generator of all random choices.
        foregrounds: images and targets of the same shapes for CMO, in which rare classes are oversampled.
        share: positions ``(B,)`` of these images in the batch that they are a part of, and its size; None: a whole batch.
    """
    kinds = list(settings.alphas)
    if not kinds:
        return images, targets
    mixed = rng.random() < settings.mix_prob
    kind = kinds[int(rng.integers(len(kinds)))] if len(kinds) > 1 else kinds[0]
    if kind == "cutmix" and settings.cutmix_per == "item":
        positions, size = share or (np.arange(len(images)), len(images))
        return cutmix_items(images, targets, item_boxes(size, *images.shape[-2:], settings, rng)[positions])
    if not mixed:
        return images, targets
    alpha = settings.alphas[kind]
    ratio = float(rng.beta(alpha, alpha))
    if kind == "mixup":
        return mixup(images, targets, ratio)
    box = cut_box(*images.shape[-2:], ratio, rng)
    if kind == "cutmix":
        return paste(images, targets, images.flip(0), targets.flip(0), box)
    # CMO: boxes of rare classes are pasted into the batch, which gives the context
    if foregrounds is None:
        raise ValueError("CMO needs foregrounds")
    return paste(images, targets, *foregrounds, box)
