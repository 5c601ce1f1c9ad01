"""Which part of a source image a translation may change: the object's box, or everything but it.

DA-Fusion (Trabucco et al. 2023, section 4) confines its edits to a mask of the object; here the mask comes from the boxes
that some data sets have, at the resolution of the latents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from semantic_aug.datasets import ImageTable
from semantic_aug.errors import UserError
from semantic_aug.sampling.sources import BOX, DataChanged, SourceImages

PARTS = ("object", "background")
"""What ``--object_mask`` takes: the part that is changed."""


def check(part: str, images: ImageTable, dataset: str, start: str) -> None:
    """Refuses a mask where there is nothing to mask.

    Raises:
        UserError: images without boxes, or a strategy that has no source image.
    """
    if start == "noise":
        raise UserError(f"--object_mask {part}: the strategy starts from noise and has no source image; leave it out")
    if BOX not in images.extras:
        raise UserError(
            f"--object_mask {part}: {dataset} has no boxes of its objects; the official downloads of cub, car and pascal "
            "have them; leave it out for other data"
        )


def box_mask(box: Sequence[float], size: tuple[int, int], latent: tuple[int, int], part: str = "object") -> Tensor:
    """The cells of the latents that may change.

    The image is squashed to a square before it is encoded, and the box with it. Every cell the box touches is the
    object's; a box outside the image counts as its nearest cell.

    Args:
        box: left, top, right, bottom in pixels of the image.
        size: (width, height) of the image.
        latent: (h, w) of the latents.
        part: one of :data:`PARTS`.

    Returns:
        bool ``(1, h, w)``.
    """
    spans = []
    for low, high, side, cells in ((box[1], box[3], size[1], latent[0]), (box[0], box[2], size[0], latent[1])):
        first = min(max(math.floor(low / side * cells), 0), cells - 1)
        spans.append(slice(first, min(max(math.ceil(high / side * cells), first + 1), cells)))
    mask = torch.zeros(1, *latent, dtype=torch.bool)
    mask[:, spans[0], spans[1]] = True
    return mask if part == "object" else ~mask


class SourceMasks:
    """Masks of source images by row, each computed once.

    Args:
        images: training split, with boxes; as the plan has it.
        latent: (h, w) of the latents.
        part: one of :data:`PARTS`.
    """

    def __init__(self, images: SourceImages, latent: tuple[int, int], part: str):
        self.images, self.latent, self.part = images, latent, part
        self.known: dict[int, Tensor] = {}

    def batch(self, rows: Sequence[int]) -> Tensor:
        """The masks of rows, bool ``(B, 1, h, w)``; all True for an image that cannot be read."""
        return torch.stack([self._mask(row) for row in rows])

    def _mask(self, row: int) -> Tensor:
        if row not in self.known:
            try:
                size = self.images.size(row)
            except DataChanged:
                raise
            except UserError:  # said where the source is encoded
                return torch.ones(1, *self.latent, dtype=torch.bool)
            self.known[row] = box_mask(self.images.extras[BOX][row].tolist(), size, self.latent, self.part)
        return self.known[row]
