"""Encoded source images: each is encoded once per run, whichever process does it.

Sources are encoded in fixed blocks of neighbouring rows, so that an image's moments depend on nothing but the plan.
What is encoded stays in memory up to a bound and is written to ``.moments`` in the subset's folder, where the other
processes, and a restarted run, find it under a name made of the images' content and of what encodes them; the folder is
removed when the subset is complete.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from semantic_aug.augmentations.engine import Engine
from semantic_aug.datasets.images import fit
from semantic_aug.errors import UserError
from semantic_aug.sampling.sources import BLOCK, DataChanged, SourceImages, block_files
from semantic_aug.sampling.store import MOMENTS

MEMORY_BYTES = 1 << 29
"""What one process keeps in memory: at 512 px about 4,000 sources in half precision."""


class SourceMoments:
    """Posterior parameters of source images by row.

    Args:
        images: training split, as the plan has it.
        engine: encodes.
        encoder: says how images are encoded; part of the blocks' names.
        folder: of the subset; blocks are shared through ``.moments`` in it. None keeps to memory.
        memory: bytes of the blocks kept in memory.
    """

    def __init__(
        self, images: SourceImages, engine: Engine, encoder: str, folder: Path | None, memory: int = MEMORY_BYTES
    ):
        self.images, self.engine, self.memory = images, engine, memory
        self.files = block_files(images.planned, encoder)
        self.folder = folder / MOMENTS if folder is not None else None
        self.blocks: OrderedDict[int, Tensor] = OrderedDict()
        self.broken: dict[int, str] = {}
        self.encoded = 0

    def batch(self, rows: Sequence[int]) -> tuple[Tensor, dict[int, str]]:
        """The parameters ``(B, 2C, h, w)`` of rows, zeros for an image that cannot be read, and why it cannot."""
        stacked = torch.stack([self._block(row // BLOCK)[row % BLOCK] for row in rows])
        return stacked, {row: self.broken[row] for row in rows if row in self.broken}

    def _block(self, number: int) -> Tensor:
        if number in self.blocks:
            self.blocks.move_to_end(number)
            return self.blocks[number]
        path = self.folder / self.files[number] if self.folder is not None else None
        block = _read(path) if path is not None else None
        if block is None:
            block, whole = self._encode(number)
            if path is not None and whole:  # a block with a broken image is encoded again, to have its error at hand
                _write(path, block)
        self.blocks[number] = block
        while len(self.blocks) > 1 and sum(b.nbytes for b in self.blocks.values()) > self.memory:
            self.blocks.popitem(last=False)
        return block

    def _encode(self, number: int) -> tuple[Tensor, bool]:
        rows = range(number * BLOCK, min(len(self.images), (number + 1) * BLOCK))
        pictures, good = [], []
        for row in rows:
            try:
                pictures.append(fit(self.images.image(row), self.engine.resolution))
                good.append(row)
            except DataChanged:  # of an exchanged image nothing may be made, nor of what else has changed
                raise
            except UserError as error:
                self.broken[row] = str(error)
        channels, height, width = self.engine.latent_shape
        block = torch.zeros(len(rows), 2 * channels, height, width, dtype=self.engine.vae.dtype)
        if pictures:
            block[[row - rows.start for row in good]] = self.engine.encode(pictures)
            self.encoded += len(pictures)
        return block, len(good) == len(rows)


def _read(path: Path) -> Tensor | None:
    try:
        return load_file(path)["moments"]
    except (OSError, SafetensorError, KeyError):
        return None  # not there yet, or torn by a crash of the machine


def _write(path: Path, block: Tensor) -> None:
    """A cache: what cannot be written (a full disk) is encoded again."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(exist_ok=True)
        save_file({"moments": block}, temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError):
        temporary.unlink(missing_ok=True)
