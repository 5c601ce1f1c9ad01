"""Every training image encoded once: the VAE's posterior parameters, for each crop and its mirror image.

The U-Net sees latents sampled from these, afresh each step, so nothing is lost against encoding in the loop. The cache
is a memory-mapped file beside the run, named by what it was made from; every process encodes its share.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from semantic_aug.datasets import ImageTable
from semantic_aug.diffusion.loop import encode_moments, to_pixels
from semantic_aug.errors import UserError
from semantic_aug.files import is_full, sha256_text, size_text
from semantic_aug.registry import shown_path
from semantic_aug.seeding import numpy_rng
from semantic_aug.tensors import create_array, open_array

log = logging.getLogger(__name__)

ENCODE_BATCH = 8


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
        table: training images.
        folder: where the file goes.
        vae: the autoencoder; its precision is that of the encoding.
        vae_digest: identifies its weights.
        resolution: side of the images in pixels.
        views: crops per image.
        flip: whether mirror images are wanted.
        seed: of the crops.
        rank: of this process.
        world: number of processes; each encodes its share.
        wait: called so that all processes have come this far.
    """

    def __init__(
        self,
        table: ImageTable,
        folder: Path,
        vae: torch.nn.Module,
        vae_digest: str,
        resolution: int,
        views: int,
        flip: bool,
        seed: int,
        rank: int = 0,
        world: int = 1,
        wait: Callable[[], None] = lambda: None,
    ):
        self.table, self.vae, self.resolution, self.seed = table, vae, resolution, seed
        self.views, self.flips = views, 2 if flip else 1
        made_from = f"{table.signature()} {vae_digest} {resolution} {views} {self.flips} {seed} {vae.dtype}"
        self.path = folder / f"latents-{sha256_text(made_from)[:16]}.npy"
        if open_array(self.path, np.float32) is None:  # absent, or cut off by a failing disk
            wait()  # nobody may finish before everybody has looked
            self._build(rank, world, wait)
        wait()
        self.moments = np.load(self.path, mmap_mode="r")

    def _build(self, rank: int, world: int, wait: Callable[[], None]) -> None:
        partial = self.path.with_suffix(".part")
        try:
            if rank == 0:
                self._reserve(partial)
            wait()
            self._fill(np.lib.format.open_memmap(partial, "r+"), rank, world)
            wait()
            if rank == 0:
                os.replace(partial, self.path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def _reserve(self, partial: Path) -> None:
        """Says how much space the latents take, and takes it.

        Raises:
            UserError: there is not enough.
        """
        probe = encode_moments(self.vae, self._pixels([0])[:1])
        shape = (len(self.table), self.views, self.flips, *probe.shape[1:])
        size, folder = 4 * int(np.prod(shape)), partial.parent
        folder.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)  # of a run that was killed
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

    def _fill(self, out: np.ndarray, rank: int, world: int) -> None:
        rows = range(rank, len(self.table), world)
        for start in tqdm(
            range(0, len(rows), ENCODE_BATCH),
            desc="encoding images",
            unit="batch",
            disable=rank > 0,
            leave=False,
            dynamic_ncols=True,
        ):
            chosen = list(rows[start : start + ENCODE_BATCH])
            pixels = self._pixels(chosen)
            variants = [pixels, pixels.flip(-1)] if self.flips == 2 else [pixels]
            for flip, variant in enumerate(variants):
                moments = torch.cat([encode_moments(self.vae, part) for part in variant.split(ENCODE_BATCH)])
                out[chosen, :, flip] = (
                    moments.float().cpu().numpy().reshape(len(chosen), self.views, *moments.shape[1:])
                )
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
