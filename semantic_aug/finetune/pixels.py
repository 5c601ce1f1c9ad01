"""Training images decoded once and cropped anew at every step, for ``--random_crops``: the VAE then runs in the loop.

Each image is kept whole as uint8, its shorter side scaled to the resolution; a step cuts its squares from the
memory-mapped bytes and encodes them as one batch. Every process decodes its share of the images into a file beside the
run; all map all files.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from semantic_aug.datasets import ImageTable
from semantic_aug.diffusion.loop import encode_moments
from semantic_aug.errors import UserError
from semantic_aug.files import is_full, sha256_text, size_text
from semantic_aug.registry import shown_path

DECODE_BLOCK = 64
"""Images given to the threads at once."""


def scaled(image: Image.Image, resolution: int) -> Image.Image:
    """The whole image with its shorter side at ``resolution`` pixels."""
    factor = resolution / min(image.size)
    width, height = (max(resolution, round(side * factor)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


class PixelCache:
    """Decoded images from which crops are cut and encoded; stands in for the latent cache.

    Args:
        table: training images.
        folder: where the files go.
        vae: the autoencoder; its device and precision are those of the encoding.
        resolution: side of the crops in pixels.
        rank: of this process.
        world: number of processes; each decodes its share.
        wait: called so that all processes have come this far.
    """

    def __init__(
        self,
        table: ImageTable,
        folder: Path,
        vae: torch.nn.Module,
        resolution: int,
        rank: int = 0,
        world: int = 1,
        wait: Callable[[], None] = lambda: None,
    ):
        self.table, self.vae, self.resolution, self.world = table, vae, resolution, world
        self.name = f"pixels-{sha256_text(f'{table.signature()} {resolution}')[:16]}"
        self.paths = [folder / f"{self.name}-{r}-of-{world}.bin" for r in range(world)]
        if not self.paths[rank].exists():
            self._build(self.paths[rank], range(rank, len(table), world), rank > 0)
        wait()
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
                raise UserError(
                    f"--output_dir {shown_path(path.parent)}: the decoded images (about {size_text(self._estimate())}) do "
                    f"not fit ({error.strerror}); free some, or give a folder on another disk or no --random_crops"
                ) from error
            raise

    def _estimate(self) -> int:
        """Bytes of all decoded images, were all shaped like the first."""
        width, height = scaled(self.table.image(0), self.resolution).size
        return len(self.table) * width * height * 3

    def _write(self, partial: Path, rows: range, quiet: bool) -> np.ndarray:
        sizes = np.zeros((len(rows), 2), np.int64)
        decode = lambda row: np.asarray(scaled(self.table.image(row), self.resolution))  # noqa: E731
        bar = tqdm(
            total=len(rows), desc="decoding images", unit="image", disable=quiet, leave=False, dynamic_ncols=True
        )
        with open(partial, "wb") as out, ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool, bar:
            for start in range(0, len(rows), DECODE_BLOCK):
                for number, pixels in enumerate(pool.map(decode, rows[start : start + DECODE_BLOCK]), start):
                    sizes[number] = pixels.shape[:2]
                    out.write(pixels.tobytes())
                    bar.update()
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
        place = row // self.world
        height, width = sizes[place]
        whole = pixels[starts[place] : starts[place] + height * width * 3].reshape(height, width, 3)
        left, top = int(x * (width - self.resolution + 1)), int(y * (height - self.resolution + 1))
        return whole[top : top + self.resolution, left : left + self.resolution]

    def remove(self) -> None:
        """Deletes the files, those of another number of processes too; a finished run has no use for them."""
        for path in self.paths[0].parent.glob(f"{self.name}-*"):
            path.unlink(missing_ok=True)


def _open(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All bytes of a share, each image's height and width, and where its bytes begin."""
    sizes = np.load(path.with_suffix(".sizes.npy"))
    ends = np.cumsum(sizes.prod(1) * 3)
    pixels = np.memmap(path, np.uint8, "r") if len(sizes) else np.empty(0, np.uint8)
    return pixels, sizes, np.concatenate([[0], ends])
