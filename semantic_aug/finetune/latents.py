"""Training images as the VAE's posterior parameters, encoded once or, for ``--random_crops``, at every step.

Encoded once: for each crop and its mirror image, in a memory-mapped file beside the run, named by what it was made from. The
U-Net sees latents sampled from these, afresh each step, so nothing is lost against encoding in the loop.

At every step: each image is decoded once and kept whole as uint8, its shorter side scaled to the resolution; a step cuts its
squares from the memory-mapped bytes and encodes them as one batch.

Every process encodes or decodes its share of the images; all map all of them.
"""

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from semantic_aug.datasets import ImageTable
from semantic_aug.datasets.table import in_threads
from semantic_aug.diffusion.loop import encode_moments, to_pixels
from semantic_aug.errors import UserError
from semantic_aug.files import is_full, sha256_text, size_text
from semantic_aug.finetune.config import FinetuneConfig
from semantic_aug.registry import shown_path
from semantic_aug.seeding import numpy_rng
from semantic_aug.tensors import create_array, open_array

log = logging.getLogger(__name__)

ENCODE_BATCH = 8
DECODE_BLOCK = 64
"""Images given to the threads at once."""


@dataclass(frozen=True)
class Share:
    """The images that the process ``rank`` of ``world`` encodes or decodes; ``wait`` returns when all processes have come
    this far."""

    rank: int = 0
    world: int = 1
    wait: Callable[[], None] = lambda: None

    def rows(self, count: int) -> range:
        """Every ``world``-th of ``count`` images."""
        return range(self.rank, count, self.world)


def crop_box(width: int, height: int, view: int, key: str, seed: int) -> tuple[int, int, int, int]:
    """A square of the shorter side: the centre for view 0, elsewhere at a place drawn for (seed, image, view)."""
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    if view:
        x, y = numpy_rng(seed, "crop", key, view).random(2)
        left, top = x * (width - side), y * (height - side)
    left, top = round(left), round(top)
    return left, top, left + side, top + side


def view_of(image: Image.Image, view: int, resolution: int, key: str, seed: int) -> Image.Image:
    """One square crop of an image, resized to ``resolution``."""
    box = crop_box(*image.size, view, key, seed)
    return image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box)


class LatentCache:
    """Posterior parameters of all views, ``(N, views, flips, 2C, h, w)`` float32, memory-mapped.

    Args:
        vae: the autoencoder; its precision is that of the encoding.
        vae_digest: identifies its weights.
        resolution: side of the images in pixels.
        views: crops per image.
        flip: whether mirror images are wanted.
        share: of this process.
    """

    def __init__(
        self,
        table: ImageTable,
        folder: Path,
        vae: torch.nn.Module,
        vae_digest: str,
        resolution: int,
        *,
        views: int,
        flip: bool,
        seed: int,
        share: Share = Share(),
    ):
        self.table, self.vae, self.resolution, self.seed = table, vae, resolution, seed
        self.views, self.flips = views, 2 if flip else 1
        made_from = f"{table.signature()} {vae_digest} {resolution} {views} {self.flips} {seed} {vae.dtype}"
        self.path = folder / f"latents-{sha256_text(made_from)[:16]}.npy"
        if open_array(self.path, np.float32) is None:  # absent, or cut off by a failing disk
            share.wait()  # nobody may finish before everybody has looked
            self._build(share)
        share.wait()
        self.moments = np.load(self.path, mmap_mode="r")

    def _build(self, share: Share) -> None:
        partial = self.path.with_suffix(".part")
        try:
            if share.rank == 0:
                self._reserve(partial)
            share.wait()
            self._fill(np.lib.format.open_memmap(partial, "r+"), share)
            share.wait()
            if share.rank == 0:
                os.replace(partial, self.path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def _reserve(self, partial: Path) -> None:
        """Says how much space the latents take, and takes it. Raises UserError: there is not enough."""
        probe = encode_moments(self.vae, self._pixels([0])[:1])
        shape = (len(self.table), self.views, self.flips, *probe.shape[1:])
        size, folder = 4 * int(np.prod(shape)), partial.parent
        folder.mkdir(parents=True, exist_ok=True)
        _remove_all(folder, "latents-*")  # of a run that was killed, or of images that were elsewhere
        log.info("latents of %d images take %s in %s", len(self.table), size_text(size), folder)
        too_large = (
            f"--output_dir {shown_path(folder)}: the latents of {len(self.table)} images ({self.views} crop(s), "
            f"{'with' if self.flips == 2 else 'without'} mirror images) take {size_text(size)}"
        )
        remedy = "free some, or give a folder on another disk or fewer --crops"
        free = shutil.disk_usage(folder).free
        if size > free:
            raise UserError(f"{too_large}, {size_text(free)} are free; {remedy}")
        try:
            create_array(partial, np.float32, shape).flush()
        except OSError as error:
            if is_full(error):
                raise UserError(f"{too_large}, which cannot be had ({error.strerror}); {remedy}") from error
            raise

    def _fill(self, out: np.ndarray, share: Share) -> None:
        rows = share.rows(len(self.table))
        shown = {"desc": "encoding images", "unit": "batch", "leave": False, "dynamic_ncols": True}
        for start in tqdm(range(0, len(rows), ENCODE_BATCH), disable=share.rank > 0, **shown):
            chosen = list(rows[start : start + ENCODE_BATCH])
            pixels = self._pixels(chosen)
            variants = [pixels, pixels.flip(-1)] if self.flips == 2 else [pixels]
            for flip, variant in enumerate(variants):
                moments = torch.cat([encode_moments(self.vae, part) for part in variant.split(ENCODE_BATCH)])
                rows_and_views = (len(chosen), self.views, *moments.shape[1:])
                out[chosen, :, flip] = moments.float().cpu().numpy().reshape(rows_and_views)
        out.flush()

    def _pixels(self, rows: list[int]) -> Tensor:
        """``(len(rows) * views, 3, H, W)`` in [-1, 1]."""
        images = []
        for row in rows:
            image = self.table.image(row)
            images += [view_of(image, v, self.resolution, self.table.keys[row], self.seed) for v in range(self.views)]
        return to_pixels(images, self.vae.device, self.vae.dtype)

    def gather(self, index: Tensor, view: Tensor, flip: Tensor) -> Tensor:
        """The posterior parameters ``(B, 2C, h, w)`` of the chosen images, crops and mirrorings."""
        chosen = flip.long() if self.flips == 2 else torch.zeros_like(index)
        return torch.from_numpy(self.moments[index.numpy(), view.numpy(), chosen.numpy()].copy())

    def remove(self) -> None:
        """Deletes the file; a finished run has no use for it."""
        self.path.unlink(missing_ok=True)


def _remove_all(folder: Path, pattern: str, kept: str | None = None) -> None:
    """Deletes the files of a pattern in a run's folder, but those whose names begin with ``kept``."""
    for path in folder.glob(pattern):
        if kept is None or not path.name.startswith(kept):
            path.unlink(missing_ok=True)


def scaled(image: Image.Image, resolution: int) -> Image.Image:
    """The whole image with its shorter side at ``resolution`` pixels."""
    factor = resolution / min(image.size)
    width, height = (max(resolution, round(side * factor)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


class PixelCache:
    """Decoded images from which square crops of ``resolution`` pixels are cut and encoded on the VAE's device and in its
    precision; used as :class:`LatentCache` is."""

    def __init__(self, table: ImageTable, folder: Path, vae: torch.nn.Module, resolution: int, share: Share = Share()):
        self.table, self.vae, self.resolution, self.world = table, vae, resolution, share.world
        self.name = f"pixels-{sha256_text(f'{table.signature()} {resolution}')[:16]}"
        self.paths = [folder / f"{self.name}-{r}-of-{share.world}.bin" for r in range(share.world)]
        if share.rank == 0:
            _remove_all(folder, "pixels-*", self.name)  # of images that were elsewhere
        if not self.paths[share.rank].exists():
            self._build(self.paths[share.rank], share.rows(len(table)), share.rank > 0)
        share.wait()
        self._shares = [_open(path) for path in self.paths]

    def _build(self, path: Path, rows: range, quiet: bool) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        try:
            sizes = self._write(partial, rows, quiet)
            np.save(path.with_suffix(".sizes.npy"), sizes)
            os.replace(partial, path)
        except BaseException as error:
            partial.unlink(missing_ok=True)
            if isinstance(error, OSError) and is_full(error):
                width, height = scaled(self.table.image(0), self.resolution).size  # as all were, for an estimate
                size = size_text(len(self.table) * width * height * 3)
                raise UserError(
                    f"--output_dir {shown_path(path.parent)}: the decoded images (about {size}) do "
                    f"not fit ({error.strerror}); free some, or give a folder on another disk or no --random_crops"
                ) from error
            raise

    def _write(self, partial: Path, rows: range, quiet: bool) -> np.ndarray:
        sizes = np.zeros((len(rows), 2), np.int64)
        decode = lambda row: np.asarray(scaled(self.table.image(row), self.resolution))  # noqa: E731
        shown = {"desc": "decoding images", "unit": "image", "leave": False, "dynamic_ncols": True}
        decoded = tqdm(in_threads(decode, rows, block=DECODE_BLOCK), total=len(rows), disable=quiet, **shown)
        with open(partial, "wb") as out:
            for number, pixels in enumerate(decoded):
                sizes[number] = pixels.shape[:2]
                out.write(pixels.tobytes())
        return sizes

    def gather(self, index: Tensor, position: Tensor, flip: Tensor) -> Tensor:
        """The posterior parameters ``(B, 2C, h, w)`` of crops of the chosen images, on the VAE's device.

        Args:
            index: ``(B,)`` rows.
            position: ``(B, 2)`` in [0, 1): from the left-most to the right-most crop, from the top one to the lowest.
            flip: bool ``(B,)``, crops to mirror.
        """
        crops = [self._crop(row, x, y) for row, (x, y) in zip(index.tolist(), position.tolist(), strict=True)]
        pixels = torch.from_numpy(np.stack(crops)).to(self.vae.device, non_blocking=True)
        pixels = (pixels.permute(0, 3, 1, 2).float() / 255 * 2 - 1).to(self.vae.dtype)
        mirrored = flip.to(pixels.device, non_blocking=True).view(-1, 1, 1, 1)
        return encode_moments(self.vae, torch.where(mirrored, pixels.flip(-1), pixels))

    def _crop(self, row: int, x: float, y: float) -> np.ndarray:
        pixels, sizes, starts = self._shares[row % self.world]
        number = row // self.world
        height, width = sizes[number]
        whole = pixels[starts[number] : starts[number] + height * width * 3].reshape(height, width, 3)
        left, top = int(x * (width - self.resolution + 1)), int(y * (height - self.resolution + 1))
        return whole[top : top + self.resolution, left : left + self.resolution]

    def remove(self) -> None:
        """Deletes the files, those of another number of processes too; a finished run has no use for them."""
        _remove_all(self.paths[0].parent, f"{self.name}-*")


def _open(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All bytes of a share, each image's height and width, and where its bytes begin."""
    sizes = np.load(path.with_suffix(".sizes.npy"))
    ends = np.cumsum(sizes.prod(1) * 3)
    pixels = np.memmap(path, np.uint8, "r") if len(sizes) else np.empty(0, np.uint8)
    return pixels, sizes, np.concatenate([[0], ends])


def image_sizes(table: ImageTable, config: FinetuneConfig) -> Tensor:
    """Image sizes as Stable Diffusion XL is conditioned on them (Podell et al. 2023, arXiv:2307.01952, section 2.2).

    Returns:
        ``(N, views, 2, 6)``, the third index being mirrored or not: original size, crop's corner and target size, each
        (height, width) in pixels, the corner in those of the image resized to the training resolution.
    """
    rows = []
    for row, key in enumerate(table.keys):
        width, height = table.size(row)
        scale = config.images.resolution / min(width, height)
        for view in range(config.images.crops):
            left, top, right, _ = crop_box(width, height, view, key, config.seed)
            for start in (left, width - right):
                corner = [round(top * scale), round(start * scale)]
                rows.append([height, width, *corner, config.images.resolution, config.images.resolution])
    return torch.tensor(rows, dtype=torch.float32).view(len(table), config.images.crops, 2, 6)
