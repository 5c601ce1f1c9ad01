"""Training images as the VAE's posterior parameters, encoded once or, for ``--random_crops``, at every step.

Encoded once: each crop and its mirror image, into a memory-mapped file in the output folder, whose name is a hash of the
inputs. Every step samples new latents from the posterior, as encoding in the loop would.

At every step: each image is decoded once and stored whole as uint8, its shorter side scaled to the resolution; a step cuts
its squares from the memory-mapped bytes and encodes them as one batch.

Every process encodes or decodes its share of the images; all map all of them.
"""

import logging
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
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
PROGRESS = {"leave": False, "dynamic_ncols": True}


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


def shared_array(
    path: Path,
    dtype: type,
    shape: tuple[int, ...],
    fill: Callable[[np.ndarray], None],
    accelerator: Accelerator,
    *,
    content: str,
    remedy: str,
) -> np.ndarray:
    """An array that the processes of a run write into one file and then map; the file appears whole or not at all.

    Args:
        fill: writes this process's share of the images into the array.
        content: what the array holds, for the log and the error.
        remedy: how it would be smaller, for the error.

    Raises:
        UserError: the disk does not hold it.
    """
    if open_array(path, dtype, shape) is None:  # absent, or cut off by a failing disk
        accelerator.wait_for_everyone()  # no process may finish before all have looked
        partial = path.with_suffix(".part")
        try:
            if accelerator.is_main_process:
                _reserve(partial, dtype, shape, content, remedy)
            accelerator.wait_for_everyone()
            array = np.lib.format.open_memmap(partial, "r+")
            fill(array)
            array.flush()
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    accelerator.wait_for_everyone()
    return np.load(path, mmap_mode="r")


def _reserve(partial: Path, dtype: type, shape: tuple[int, ...], content: str, remedy: str) -> None:
    """Creates the file of an array with its space on the disk."""
    folder, size = partial.parent, size_text(np.dtype(dtype).itemsize * math.prod(shape))
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob(f"{partial.stem.partition('-')[0]}-*"):  # of a killed run, or of images that were elsewhere
        if not path.name.startswith(f"{partial.stem}."):
            path.unlink(missing_ok=True)
    log.info("%s take %s in %s", content, size, folder)
    try:
        create_array(partial, dtype, shape).flush()
    except OSError as error:
        if is_full(error):
            raise UserError(
                f"--output_dir {shown_path(folder)}: {content} take {size}, which the disk does not hold ({error.strerror}); "
                f"free some, or give a folder on another disk or {remedy}"
            ) from error
        raise


class LatentCache:
    """Posterior parameters of all views, ``(N, views, flips, 2C, h, w)`` float32, memory-mapped.

    Args:
        vae: the autoencoder; its precision is that of the encoding.
        vae_digest: identifies its weights.
        resolution: side of the images in pixels.
        views: crops per image.
        flip: whether mirror images are wanted.
        accelerator: of the processes that share the work.
    """

    def __init__(
        self,
        table: ImageTable,
        folder: Path,
        vae: AutoencoderKL,
        vae_digest: str,
        resolution: int,
        *,
        views: int,
        flip: bool,
        seed: int,
        accelerator: Accelerator,
    ):
        self.table, self.vae, self.resolution, self.seed = table, vae, resolution, seed
        self.views, self.flips = views, 2 if flip else 1
        made_from = f"{table.signature()} {vae_digest} {resolution} {views} {self.flips} {seed} {vae.dtype}"
        self.path = folder / f"latents-{sha256_text(made_from)[:16]}.npy"
        self.rows = range(accelerator.process_index, len(table), accelerator.num_processes)
        side = resolution // 2 ** (len(vae.config.block_out_channels) - 1)
        shape = (len(table), views, self.flips, 2 * vae.config.latent_channels, side, side)
        mirrored = "with" if flip else "without"
        content = f"the latents of {len(table)} images ({views} crop(s), {mirrored} mirror images)"
        self.moments = shared_array(
            self.path, np.float32, shape, self._fill, accelerator, content=content, remedy="fewer --crops"
        )

    def _fill(self, moments: np.ndarray) -> None:
        blocks = [list(self.rows[start : start + ENCODE_BATCH]) for start in range(0, len(self.rows), ENCODE_BATCH)]
        for rows in tqdm(blocks, "encoding images", unit="batch", disable=self.rows.start > 0, **PROGRESS):
            pixels = self._pixels(rows)
            for flip, variant in enumerate([pixels, pixels.flip(-1)][: self.flips]):
                encoded = torch.cat([encode_moments(self.vae, part) for part in variant.split(ENCODE_BATCH)])
                moments[rows, :, flip] = encoded.float().cpu().numpy().reshape(len(rows), *moments[0, :, 0].shape)

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


def scaled_size(size: tuple[int, int], resolution: int) -> tuple[int, int]:
    """(width, height) of a whole image with its shorter side at ``resolution`` pixels."""
    factor = resolution / min(size)
    width, height = (max(resolution, round(side * factor)) for side in size)
    return width, height


class PixelCache:
    """Decoded images from which square crops of ``resolution`` pixels are cut and encoded on the VAE's device and in its
    precision; used as :class:`LatentCache` is. The images' bytes follow each other in one file, their sizes are in another."""

    def __init__(
        self, table: ImageTable, folder: Path, vae: AutoencoderKL, resolution: int, *, accelerator: Accelerator
    ):
        self.table, self.vae, self.resolution = table, vae, resolution
        self.path = folder / f"pixels-{sha256_text(f'{table.signature()} {resolution}')[:16]}.npy"
        self.sizes_path = self.path.with_suffix(".sizes.npy")
        self.rows = range(accelerator.process_index, len(table), accelerator.num_processes)
        if accelerator.is_main_process and open_array(self.sizes_path, np.int64, (len(table), 2)) is None:
            folder.mkdir(parents=True, exist_ok=True)
            sizes = in_threads(table.size, range(len(table)))
            np.save(self.sizes_path, np.array([scaled_size(size, resolution) for size in sizes], np.int64))
        accelerator.wait_for_everyone()
        self.sizes = np.load(self.sizes_path)
        self.ends = np.cumsum(self.sizes.prod(1) * 3)
        words, shape = {"content": "the decoded images", "remedy": "no --random_crops"}, (int(self.ends[-1]),)
        try:
            self.pixels = shared_array(self.path, np.uint8, shape, self._fill, accelerator, **words)
        except UserError:
            self.remove()
            raise

    def _fill(self, pixels: np.ndarray) -> None:
        def decode(row: int) -> np.ndarray:
            return np.asarray(self.table.image(row).resize(self.sizes[row].tolist(), Image.Resampling.LANCZOS))

        decoded = in_threads(decode, self.rows, block=DECODE_BLOCK)
        shown = {"total": len(self.rows), "unit": "image", "disable": self.rows.start > 0, **PROGRESS}
        for row, image in zip(self.rows, tqdm(decoded, "decoding images", **shown), strict=True):
            self._image(row, pixels)[:] = image

    def _image(self, row: int, pixels: np.ndarray) -> np.ndarray:
        """The bytes of an image among those of all, ``(H, W, 3)``."""
        width, height = self.sizes[row]
        return pixels[self.ends[row] - 3 * width * height : self.ends[row]].reshape(height, width, 3)

    def _crop(self, row: int, x: float, y: float) -> np.ndarray:
        (width, height), side = self.sizes[row], self.resolution
        left, top = int(x * (width - side + 1)), int(y * (height - side + 1))
        return self._image(row, self.pixels)[top : top + side, left : left + side]

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

    def remove(self) -> None:
        """Deletes the files; a finished run has no use for them."""
        self.path.unlink(missing_ok=True)
        self.sizes_path.unlink(missing_ok=True)


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
