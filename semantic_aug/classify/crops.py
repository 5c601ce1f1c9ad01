"""Random resized crops, mirroring and colour jitter as in torchvision, drawn for a whole batch from a given generator."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageEnhance

AREA, ASPECT, ATTEMPTS = (0.08, 1.0), (3 / 4, 4 / 3), 10
"""Ranges of a window's area share and aspect ratio (Szegedy et al. 2015), and number of attempts."""
JITTER = 0.4
"""Brightness, contrast and saturation are multiplied by factors in [1 - JITTER, 1 + JITTER], in random order."""
ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def window(
    width: int, height: int, areas: Sequence[float], aspects: Sequence[float], corner: Sequence[float]
) -> tuple[int, int, int, int]:
    """The first window that fits into an image, as torchvision's ``RandomResizedCrop`` chooses it.

    Args:
        width: width of the image in pixels.
        height: height of the image in pixels.
        areas: share of the image's area for each attempt.
        aspects: width over height for each attempt.
        corner: horizontal and vertical position of the window, in [0, 1).

    Returns:
        Left, top, right and bottom; if no attempt fits, the largest centred window of an accepted aspect ratio.
    """
    for area, aspect in zip(areas, aspects, strict=True):
        w, h = round(math.sqrt(width * height * area * aspect)), round(math.sqrt(width * height * area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(corner[0] * (width - w + 1)), int(corner[1] * (height - h + 1))
            return left, top, left + w, top + h
    aspect = min(max(width / height, ASPECT[0]), ASPECT[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


class ResizedCrops:
    """Random parameters of a batch: window, mirroring and colour jitter of each image."""

    def __init__(self, count: int, rng: np.random.Generator):
        self.areas = rng.uniform(*AREA, (count, ATTEMPTS))
        self.aspects = np.exp(rng.uniform(*np.log(ASPECT), (count, ATTEMPTS)))
        self.corners = rng.random((count, 2))
        self.flips = rng.random(count) < 0.5
        self.factors = rng.uniform(1 - JITTER, 1 + JITTER, (count, len(ENHANCERS)))
        self.orders = rng.permuted(np.tile(np.arange(len(ENHANCERS)), (count, 1)), axis=1)

    def apply(self, image: Image.Image, index: int, size: int) -> np.ndarray:
        """The window of image ``index``, resized bilinearly, mirrored and jittered: uint8 ``(size, size, 3)``."""
        box = window(*image.size, self.areas[index], self.aspects[index], self.corners[index])
        image = image.crop(box).resize((size, size), Image.Resampling.BILINEAR)
        if self.flips[index]:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for kind in self.orders[index]:
            image = ENHANCERS[kind](image).enhance(self.factors[index, kind])
        return np.asarray(image)
