"""Training and evaluation batches: images are resized once to uint8, then cropped and mirrored batch by batch.

A training item is a real or a synthetic image with its soft label (:mod:`semantic_aug.classify.draws`). A batch is a pure
function of (seed, epoch, step). It is drawn as a whole; each process, or each part of an accumulated gradient, takes a share.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from semantic_aug.classify.config import ON_DEVICE
from semantic_aug.classify.crops import ResizedCrops
from semantic_aug.classify.draws import EpochDraws, SyntheticSettings, balanced_rows
from semantic_aug.classify.losses import one_hot
from semantic_aug.datasets import ImageTable
from semantic_aug.datasets.cache import open_pixels
from semantic_aug.datasets.synthetic import SyntheticImages
from semantic_aug.datasets.table import refuse_damaged
from semantic_aug.devices import available_memory
from semantic_aug.errors import UserError
from semantic_aug.files import size_text
from semantic_aug.seeding import numpy_rng

log = logging.getLogger(__name__)

CROP_SHARE = 0.875
"""Images are resized to resolution / CROP_SHARE, then cropped: at random in training, in the centre in evaluation."""

RAM_SHARE = 0.4
"""Share of the available memory for decoded images; beyond it images are decoded when needed."""

COPIED_IMAGES = 256
"""Number of images copied to the device at once."""


def resized_side(resolution: int) -> int:
    """Side in pixels to which images are resized before the crop."""
    return round(resolution / CROP_SHARE)


class ImageStore:
    """Images of one source as uint8 squares, decoded once if memory or disk suffice.

    Args:
        read: function from an index to a PIL RGB image.
        count: number of images.
        side: side of the squares in pixels; the whole image is resized to a square, bicubic.
        budget: bytes of memory for decoded images, unless ``cache`` is ``off``.
        workers: decoding threads.
        cache: location of decoded images, one of ``semantic_aug.datasets.cache.MODES`` or
            ``semantic_aug.classify.config.ON_DEVICE``.
        identity: identity of the images (a table's ``signature()``); None: they are never cached on disk.
        keep_aspect: resize the shorter side and crop the centre, instead of resizing the whole image to a square.
    """

    def __init__(
        self,
        read: Callable[[int], Image.Image],
        count: int,
        side: int,
        budget: int = 0,
        *,
        workers: int | None = None,
        cache: str = "auto",
        identity: str | None = None,
        keep_aspect: bool = False,
    ):
        self.read, self.count, self.side, self.keep_aspect = read, count, side, keep_aspect
        self.pool = ThreadPoolExecutor(workers or min(16, os.cpu_count() or 1))
        content = f"{identity} {'crop' if keep_aspect else 'squash'} bicubic" if identity is not None else None
        cache = "auto" if cache == ON_DEVICE else cache
        self.pixels = open_pixels(self.decode, count, side, content, cache, memory=budget, workers=workers)
        self.opened = self.pixels is not None  # whether each image has been opened

    def open_all(self, part: int = 0, parts: int = 1) -> None:
        """Opens every ``parts``-th image, unless all have been decoded. Raises UserError: one that is damaged."""
        if self.opened:
            return
        refuse_damaged(self.read, range(part, self.count, parts))

    def decode(self, index: int) -> np.ndarray:
        """One image, uint8 ``(side, side, 3)``."""
        image, size = self.read(index), (self.side, self.side)
        if self.keep_aspect:
            return np.asarray(ImageOps.fit(image, size, Image.Resampling.BICUBIC))
        return np.asarray(image.resize(size, Image.Resampling.BICUBIC))

    def batch(self, indices: np.ndarray) -> np.ndarray:
        """The images of some indices, uint8 ``(B, side, side, 3)``."""
        if self.pixels is not None:
            return self.pixels[indices]
        return np.stack(list(self.pool.map(self.decode, indices.tolist())))


def crop(images: Sequence[np.ndarray], tops: np.ndarray, lefts: np.ndarray, size: int, flips: np.ndarray) -> np.ndarray:
    """Crops a window of each image and mirrors some of them.

    Args:
        images: B images, uint8 ``(S, S, 3)``, contiguous.
        tops: upper edges ``(B,)``, in [0, S - size].
        lefts: left edges ``(B,)``, in [0, S - size].
        size: side of the windows in pixels.
        flips: bool ``(B,)``, whether to mirror each window.

    Returns:
        uint8 ``(B, size, size, 3)``.
    """
    out = np.empty((len(images), size, size, 3), np.uint8)
    as_pixels = out.view("V3")  # mirroring copies a pixel as one item of three bytes: four times as fast
    for i, (image, top, left) in enumerate(zip(images, tops.tolist(), lefts.tolist(), strict=True)):
        window = image[top : top + size, left : left + size]
        if flips[i]:
            as_pixels[i] = window.view("V3")[:, ::-1]
        else:
            out[i] = window
    return out


def centre(pixels: np.ndarray, size: int) -> np.ndarray:
    """The centre crop of each image: uint8 ``(B, S, S, 3)`` to ``(B, size, size, 3)``."""
    margin = (pixels.shape[1] - size) // 2
    return np.ascontiguousarray(pixels[:, margin : margin + size, margin : margin + size])


class DevicePixels:
    """All images of some stores on a device, in the order of the stores; batches are cropped there.

    Raises:
        UserError: the images take more than :data:`RAM_SHARE` of the free memory.
    """

    def __init__(self, stores: Sequence[ImageStore], device: torch.device | str):
        device = torch.device(device)
        count, side = sum(store.count for store in stores), stores[0].side
        need, free = count * side * side * 3, available_memory()
        if device.type == "cuda":
            # memory that PyTorch reserved in earlier runs of this process is free, too
            unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            free = torch.cuda.mem_get_info(device)[0] + unused
        if need > RAM_SHARE * free:
            raise UserError(
                f"--cache {ON_DEVICE}: {count} images of {side} px take {size_text(need)}, more than {RAM_SHARE:.0%} of the "
                f"{size_text(free)} that are free on {device}; give --cache auto"
            )
        self.pixels = torch.empty((count, side, side, 3), dtype=torch.uint8, device=device)
        first = 0
        for store in stores:
            for rows in np.split(np.arange(store.count), range(COPIED_IMAGES, store.count, COPIED_IMAGES)):
                self.pixels[first : first + len(rows)] = torch.from_numpy(store.batch(rows))
                first += len(rows)
            store.pixels, store.opened = None, True  # no second copy in memory

    def windows(self, items: np.ndarray, tops: np.ndarray, lefts: np.ndarray, size: int, flips: np.ndarray) -> Tensor:
        """Crops the images ``items`` ``(B,)`` as :func:`crop` does: uint8 ``(B, size, size, 3)`` on the device."""
        across = np.arange(size)
        rows = tops[:, None] + across
        columns = lefts[:, None] + np.where(flips[:, None], across[::-1], across)
        indices = items[:, None, None], rows[:, :, None], columns[:, None, :]
        return self.pixels[tuple(torch.from_numpy(index).to(self.pixels.device) for index in indices)]


def share_of(batch: int, part: int, parts: int) -> np.ndarray:
    """The positions in a batch that belong to one of several parts, ascending.

    Positions i and B - 1 - i belong to the same part, so that mixing a part with itself in reverse order equals mixing the
    whole batch.
    """
    positions = np.arange(batch)
    return positions[np.minimum(positions, batch - 1 - positions) % parts == part]


# ----------------------------------------------------------------------------------------------------------- batches


class TrainBatches:
    """The training batches of every epoch, of real and synthetic images.

    Args:
        settings: exponent of the soft labels, and sampling of the synthetic images.
        resolution: side of the crops in pixels.
        batch_size: items per batch; an epoch's last, smaller batch is dropped unless it is the only one.
        seed: seed of all draws.
        budget: bytes of memory for decoded images.
        cache: see :class:`ImageStore`.
        device: device that holds the images with ``cache="device"``.
        augmentation: ``crop`` or ``resized_crop``; for the latter images are decoded at every use.
        epochs: epochs of the whole training, see :class:`semantic_aug.classify.draws.EpochDraws`.
    """

    def __init__(
        self,
        real: ImageTable,
        synthetic: SyntheticImages | None,
        settings: SyntheticSettings,
        resolution: int,
        batch_size: int,
        seed: int,
        *,
        budget: int | None = None,
        cache: str = "auto",
        device: torch.device | str = "cpu",
        augmentation: str = "crop",
        epochs: int | None = None,
    ):
        side, budget = resized_side(resolution), budget if budget is not None else int(available_memory() * RAM_SHARE)
        self.whole = augmentation == "resized_crop"
        if self.whole:
            cache = "off"
        k = len(real.class_names)
        self.real = ImageStore(real.image, len(real), side, budget, cache=cache, identity=real.signature())
        self.labels = real.labels
        self.targets = one_hot(torch.from_numpy(real.labels), k)
        self.synthetic = None
        if synthetic is not None and settings.active:
            pixels = self.real.pixels
            # a memory-mapped file does not count against the budget
            held = pixels.nbytes if pixels is not None and pixels.flags.writeable else 0
            self.synthetic = ImageStore(
                synthetic.image, len(synthetic), side, budget - held, cache=cache, identity=synthetic.signature()
            )
            # soft labels y = (1 - s^gamma) onehot(source) + s^gamma onehot(target)
            self.targets = torch.cat([self.targets, torch.from_numpy(synthetic.labels(settings.gamma, k))])
        self.stores = [store for store in (self.real, self.synthetic) if store is not None]
        self.on_device = DevicePixels(self.stores, device) if cache == ON_DEVICE else None
        targets, strengths = (synthetic.target, synthetic.strength) if self.synthetic else (None, None)
        options = {"counts": real.counts(), "strengths": strengths, "epochs": epochs}
        self.draws = EpochDraws(len(real), targets, settings, batch_size, seed, **options)
        self.resolution, self.seed = resolution, seed
        self.batch_size, self.steps_per_epoch = self.draws.batch_size, self.draws.steps_per_epoch

    def epoch(
        self, epoch: int, part: int = 0, parts: int = 1, foregrounds: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the batches of an epoch: uint8 ``(B, size, size, 3)`` and targets ``(B, K)``; one is prepared in advance.

        Args:
            epoch: counted from 0.
            part: number of the share of every batch, see :func:`share_of`.
            parts: number of shares.
            foregrounds: yield real images with rare classes oversampled (for CMO) instead of the batches.
        """
        make = self._foregrounds if foregrounds else self._batch
        order, positions = self.draws.order(epoch), share_of(self.batch_size, part, parts)
        with ThreadPoolExecutor(1) as ahead:
            pending = ahead.submit(make, epoch, 0, order, positions)
            for step in range(self.steps_per_epoch):
                ready = pending.result()
                if step + 1 < self.steps_per_epoch:
                    pending = ahead.submit(make, epoch, step + 1, order, positions)
                yield ready

    def _batch(self, epoch: int, step: int, order: np.ndarray, positions: np.ndarray) -> tuple[Tensor, Tensor]:
        rng = numpy_rng(self.seed, "classify", "batch", epoch, step)
        return self._load(self.draws.batch(epoch, step, order, rng), positions, rng)

    def _foregrounds(self, epoch: int, step: int, order: np.ndarray, positions: np.ndarray) -> tuple[Tensor, Tensor]:
        rng = numpy_rng(self.seed, "classify", "foregrounds", epoch, step)
        return self._load(balanced_rows(self.labels, self.batch_size, rng), positions, rng)

    def _load(self, items: np.ndarray, positions: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Augmented pixels and targets of the items at some positions."""
        pixels = (self._resized_crops if self.whole else self._crops)(items, positions, rng)
        return torch.as_tensor(pixels), self.targets[torch.from_numpy(items[positions])]

    def _resized_crops(self, items: np.ndarray, positions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        crops = ResizedCrops(len(items), rng)

        def augmented(position: int) -> np.ndarray:
            store, row = self._source(int(items[position]))
            return crops.apply(store.read(row), position, self.resolution)

        return np.stack(list(self.real.pool.map(augmented, positions.tolist())))

    def _crops(self, items: np.ndarray, positions: np.ndarray, rng: np.random.Generator) -> np.ndarray | Tensor:
        room = self.real.side - self.resolution + 1
        tops, lefts = rng.integers(room, size=(2, len(items)))[:, positions]
        flips, items = (rng.random(len(items)) < 0.5)[positions], items[positions]
        if self.on_device is not None:
            return self.on_device.windows(items, tops, lefts, self.resolution, flips)
        decoded = all(store.pixels is not None for store in self.stores)
        images = list((map if decoded else self.real.pool.map)(self._square, items.tolist()))
        return crop(images, tops, lefts, self.resolution, flips)

    def _source(self, item: int) -> tuple[ImageStore, int]:
        """The store of an item, and its row there."""
        return (self.real, item) if item < self.real.count else (self.synthetic, item - self.real.count)

    def _square(self, item: int) -> np.ndarray:
        """The resized image of an item, uint8 ``(S, S, 3)``; a decoded image is not copied."""
        store, row = self._source(item)
        return store.decode(row) if store.pixels is None else store.pixels[row]


class EvalBatches:
    """Centre crops of a split's images, in order.

    Args:
        resolution: side of the crops in pixels.
        batch_size: images per batch.
        cache: see :class:`ImageStore`.
        device: device that holds the images with ``cache="device"``.
        keep_aspect: see :class:`ImageStore`.
    """

    def __init__(
        self,
        table: ImageTable,
        resolution: int,
        batch_size: int,
        *,
        cache: str = "auto",
        device: torch.device | str = "cpu",
        keep_aspect: bool = False,
    ):
        side, budget = resized_side(resolution), int(available_memory() * RAM_SHARE)
        options = {"cache": cache, "identity": table.signature(), "keep_aspect": keep_aspect}
        self.store = ImageStore(table.image, len(table), side, budget, **options)
        self.on_device = DevicePixels([self.store], device) if cache == ON_DEVICE else None
        self.labels, self.resolution, self.batch_size = torch.from_numpy(table.labels), resolution, batch_size

    def part(self, part: int = 0, parts: int = 1) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields every ``parts``-th batch, beginning with batch ``part``: rows ``(B,)``, pixels uint8 ``(B, size, size, 3)``,
        labels ``(B,)``."""
        for start in range(part * self.batch_size, self.store.count, parts * self.batch_size):
            rows = np.arange(start, min(self.store.count, start + self.batch_size))
            yield torch.from_numpy(rows), self._centre(rows), self.labels[rows]

    def _centre(self, rows: np.ndarray) -> Tensor:
        if self.on_device is None:
            return torch.from_numpy(centre(self.store.batch(rows), self.resolution))
        margins = np.full(len(rows), (self.store.side - self.resolution) // 2)
        return self.on_device.windows(rows, margins, margins, self.resolution, np.zeros(len(rows), bool))


class Normaliser:
    """Converts uint8 ``(B, H, W, 3)`` to normalised float32 ``(B, 3, H, W)`` on the device, channels last in memory.

    Args:
        mean: mean of each channel, for pixels in [0, 1].
        std: standard deviation of each channel, likewise.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device):
        self.scale = (1 / (255 * torch.tensor(std))).view(1, 3, 1, 1).to(device)
        self.shift = (torch.tensor(mean) / torch.tensor(std)).view(1, 3, 1, 1).to(device)
        self.device = device

    def __call__(self, pixels: Tensor) -> Tensor:
        if self.device.type == "cuda" and pixels.device.type == "cpu":
            pixels = pixels.pin_memory()
        moved = pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        return moved.to(torch.float32) * self.scale - self.shift
