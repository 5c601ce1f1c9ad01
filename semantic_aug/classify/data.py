"""Training and evaluation batches: images resized once into uint8, augmented batch by batch on the device.

An item of training is a real image or, with probability p, a synthetic one drawn at random, with its soft label. All
random choices of a step come from a generator keyed by (seed, step).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from semantic_aug.classify.losses import one_hot
from semantic_aug.datasets import ImageTable
from semantic_aug.datasets.cache import open_pixels
from semantic_aug.datasets.synthetic import SyntheticImages
from semantic_aug.seeding import numpy_rng

log = logging.getLogger(__name__)

CROP_SHARE = 0.875
"""Images are resized to resolution / CROP_SHARE, then cropped: at random in training, in the centre otherwise."""

RAM_SHARE = 0.4
"""Share of the free memory that decoded images may take; beyond it they are decoded each time."""


def resized_side(resolution: int) -> int:
    """Side in pixels to which images are resized before the crop."""
    return round(resolution / CROP_SHARE)


def free_memory() -> int:
    """Bytes of memory that can be had without swapping."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class ImageStore:
    """Images of one source as uint8 squares, decoded once where there is room.

    Args:
        read: from an index to a PIL RGB image.
        count: number of images.
        side: pixels; the whole picture is resized to a square, bicubic.
        budget: bytes the decoded images may take in memory.
        workers: decoding threads.
        cache: where decoded images are kept, one of ``semantic_aug.datasets.cache.MODES``.
        identity: what the images are (a table's ``signature()``); without it they are never kept on disk.
    """

    def __init__(
        self,
        read: Callable[[int], Image.Image],
        count: int,
        side: int,
        budget: int,
        workers: int | None = None,
        cache: str = "auto",
        identity: str | None = None,
    ):
        self.read, self.count, self.side = read, count, side
        self.pool = ThreadPoolExecutor(workers or min(16, os.cpu_count() or 1))
        made_from = f"{identity} squash bicubic" if identity is not None else None
        self.pixels = open_pixels(self.decode, count, side, made_from, cache, budget, workers)

    def decode(self, index: int) -> np.ndarray:
        """One image, uint8 ``(side, side, 3)``."""
        return np.asarray(self.read(index).resize((self.side, self.side), Image.Resampling.BICUBIC))

    def batch(self, indices: np.ndarray) -> np.ndarray:
        """uint8 ``(B, side, side, 3)``."""
        if self.pixels is not None:
            return self.pixels[indices]
        return np.stack(list(self.pool.map(self.decode, indices.tolist())))


def crop(pixels: np.ndarray, tops: np.ndarray, lefts: np.ndarray, size: int) -> np.ndarray:
    """Each image's own window: uint8 ``(B, S, S, 3)`` to ``(B, size, size, 3)``."""
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (size, size), axis=(1, 2))
    return np.ascontiguousarray(windows[np.arange(len(pixels)), tops, lefts].transpose(0, 2, 3, 1))


def centre(pixels: np.ndarray, size: int) -> np.ndarray:
    """The middle of each image: uint8 ``(B, S, S, 3)`` to ``(B, size, size, 3)``."""
    margin = (pixels.shape[1] - size) // 2
    return np.ascontiguousarray(pixels[:, margin : margin + size, margin : margin + size])


class TrainBatches:
    """The batches of every epoch, real and synthetic.

    Args:
        real: training images.
        synthetic: synthetic images, or None.
        gamma: of the soft labels.
        probability: chance p that an item is synthetic.
        resolution: side of the crops in pixels.
        batch_size: items per batch; the last, smaller part of an epoch is dropped unless it is all there is.
        seed: of every choice.
        budget: bytes for decoded images.
    """

    def __init__(
        self,
        real: ImageTable,
        synthetic: SyntheticImages | None,
        gamma: float,
        probability: float,
        resolution: int,
        batch_size: int,
        seed: int,
        budget: int | None = None,
    ):
        side, budget = resized_side(resolution), budget if budget is not None else int(free_memory() * RAM_SHARE)
        k = len(real.class_names)
        self.real = ImageStore(real.image, len(real), side, budget)
        self.real_targets = one_hot(torch.from_numpy(real.labels), k)
        self.synthetic, self.synthetic_targets, self.probability = None, None, 0.0
        if synthetic is not None and probability > 0:
            left = budget - (self.real.pixels.nbytes if self.real.pixels is not None else 0)
            self.synthetic = ImageStore(synthetic.image, len(synthetic), side, left)
            self.synthetic_targets = torch.from_numpy(synthetic.labels(gamma, k))
            self.probability = probability
        self.resolution, self.batch_size, self.seed = resolution, min(batch_size, len(real)), seed
        self.steps_per_epoch = max(1, len(real) // self.batch_size)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch: uint8 ``(B, size, size, 3)`` and targets ``(B, K)``, one prepared ahead."""
        order = numpy_rng(self.seed, "classify", "epoch", epoch).permutation(self.real.count)
        with ThreadPoolExecutor(1) as ahead:
            pending = ahead.submit(self._batch, epoch, 0, order)
            for step in range(self.steps_per_epoch):
                ready = pending.result()
                if step + 1 < self.steps_per_epoch:
                    pending = ahead.submit(self._batch, epoch, step + 1, order)
                yield ready

    def _batch(self, epoch: int, step: int, order: np.ndarray) -> tuple[Tensor, Tensor]:
        rng = numpy_rng(self.seed, "classify", "batch", epoch, step)
        rows = order[step * self.batch_size : (step + 1) * self.batch_size]
        pixels, targets = self.real.batch(rows), self.real_targets[rows]
        if self.synthetic is not None:
            swap = rng.random(len(rows)) < self.probability
            if swap.any():
                drawn = rng.integers(self.synthetic.count, size=int(swap.sum()))
                pixels = pixels.copy()
                pixels[swap], targets[torch.from_numpy(swap)] = (
                    self.synthetic.batch(drawn),
                    self.synthetic_targets[drawn],
                )
        room = pixels.shape[1] - self.resolution + 1
        tops, lefts = rng.integers(room, size=(2, len(rows)))
        pixels = crop(pixels, tops, lefts, self.resolution)
        flip = rng.random(len(rows)) < 0.5
        pixels[flip] = pixels[flip, :, ::-1]
        return torch.from_numpy(pixels), targets


class EvalBatches:
    """A split's images in order, centre-cropped.

    Args:
        table: the split.
        resolution: side in pixels.
        batch_size: images per batch.
        budget: bytes for decoded images.
    """

    def __init__(self, table: ImageTable, resolution: int, batch_size: int, budget: int | None = None):
        self.store = ImageStore(
            table.image,
            len(table),
            resized_side(resolution),
            budget if budget is not None else int(free_memory() * RAM_SHARE),
        )
        self.labels, self.resolution, self.batch_size = torch.from_numpy(table.labels), resolution, batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of uint8 ``(B, size, size, 3)`` and labels ``(B,)``."""
        for start in range(0, self.store.count, self.batch_size):
            rows = np.arange(start, min(self.store.count, start + self.batch_size))
            yield torch.from_numpy(centre(self.store.batch(rows), self.resolution)), self.labels[rows]


class Normaliser:
    """uint8 ``(B, H, W, 3)`` to normalised ``(B, 3, H, W)`` on the device, channels last.

    Args:
        mean: per channel, for pixels in [0, 1].
        std: likewise.
        device: where the batches go.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device):
        self.scale = (1 / (255 * torch.tensor(std))).view(1, 3, 1, 1).to(device)
        self.shift = (torch.tensor(mean) / torch.tensor(std)).view(1, 3, 1, 1).to(device)
        self.device = device

    def __call__(self, pixels: Tensor) -> Tensor:
        if self.device.type == "cuda":
            pixels = pixels.pin_memory()
        moved = pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        return moved.to(torch.float32) * self.scale - self.shift
