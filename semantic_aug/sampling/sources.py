"""The source images of a plan: compared with the plan, encoded once, and masked under ``--object_mask``.

A data set is listed by the launcher and again by each process (a replacement may start days later, on another machine). So
each process compares its listing, and the bytes of each image that it reads, with the plan's hashes.

Sources are encoded in fixed blocks of neighbouring rows, so that an image's moments depend on nothing but the plan. Encoded
blocks are kept in memory up to a bound, and in ``.moments`` of the subset's folder, where other processes and a restarted run
find them by a hash of the images and the encoder; the folder is removed when the subset is complete.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from semantic_aug.augmentations.engine import Engine
from semantic_aug.datasets import ImageTable, LoadedDataset
from semantic_aug.datasets.fingerprint import UNREADABLE, ContentHashes, cell_text, hash_bytes, hash_images, pixel_bytes
from semantic_aug.datasets.images import fit, open_image
from semantic_aug.errors import UserError
from semantic_aug.files import atomic_path
from semantic_aug.sampling.folder import MOMENTS
from semantic_aug.sampling.masks import BOX, MASK, MASK_PATH, box_mask, pixel_mask, read_mask

BLOCK = 8
"""Rows encoded together."""

MEMORY_BYTES = 1 << 29
"""What one process keeps in memory: at 512 px about 4,000 sources in half precision."""

REMEDY = (
    "everything made so far is kept and listed; restore the data set and run the same command, or give another "
    "--output_root"
)


class DataChanged(UserError):
    """The data set is no longer the one of the plan."""


@dataclass(frozen=True)
class PlannedSources:
    """The N training images of a plan, as compact as they can be sent to a process.

    Attributes:
        rows: uint64 ``(N,)``, a hash of each row's key, class name and further columns that count.
        content: uint8 ``(N, 16)``, the hash of each image's encoded bytes; zeros where it could not be read.
        columns: the further columns that count, those that decide what a translation looks like (boxes).
    """

    rows: np.ndarray
    content: np.ndarray
    columns: Sequence[str] = ()

    @classmethod
    def of(cls, images: ImageTable, hashes: ContentHashes, columns: Sequence[str] = ()) -> PlannedSources:
        """The sources of a listing of all of them and their content hashes."""
        return cls(_row_hashes(images, columns), hashes.values, columns)

    def check(self, images: ImageTable) -> None:
        """Compares another listing of the same data set. Raises DataChanged: another number of images, or other names or
        labels; names one of them."""
        rows = _row_hashes(images, self.columns)
        if np.array_equal(rows, self.rows):
            return
        new = np.flatnonzero(~np.isin(rows, self.rows))
        gone = int((~np.isin(self.rows, rows)).sum())
        named = f"; '{images.keys[new[0]]}' is new or has another label or mask" if len(new) else ""
        raise DataChanged(
            f"the data set changed while images were made from it: {len(images)} training images now, {len(self.rows)} in "
            f"the plan ({len(new)} new, {gone} gone{named}): {REMEDY}"
        )


def source_table(dataset: LoadedDataset) -> ImageTable:
    """The source images of a plan: the training images, then the unlabelled ones."""
    return dataset.train if dataset.unlabelled is None else dataset.train.with_class(dataset.unlabelled)


def planned_sources(dataset: LoadedDataset, hashes: ContentHashes, columns: Sequence[str]) -> PlannedSources:
    """The sources of a plan; ``hashes`` are those of the training images, ``columns`` as in :class:`PlannedSources`."""
    if dataset.unlabelled is None:
        return PlannedSources.of(dataset.train, hashes, columns)
    table = source_table(dataset)
    if table.encoded is None:  # images are compared by their pixels then, see SourceImages
        return PlannedSources.of(table, hash_images(table))
    values = np.concatenate([hashes.values, hash_images(dataset.unlabelled).values])
    return PlannedSources(_row_hashes(table, ()), values)


def with_pool(train: ImageTable, pool: ImageTable, planned: PlannedSources) -> ImageTable:
    """The sources of a plan from a new listing of the unlabelled images, of which the plan may have left out some."""
    images = train.with_class(pool)
    known = np.isin(_row_hashes(images, ()), planned.rows)
    known[: len(train)] = True
    return images.take(np.flatnonzero(known))


def block_files(planned: PlannedSources, encoder: str) -> list[str]:
    """The file of each block of :data:`BLOCK` rows, named after its images' names, classes and content and the encoder."""
    rows, content = planned.rows, planned.content
    blocks = (rows[i : i + BLOCK].tobytes() + content[i : i + BLOCK].tobytes() for i in range(0, len(rows), BLOCK))
    return [f"{hashlib.sha256(encoder.encode() + block).hexdigest()[:32]}.safetensors" for block in blocks]


def _row_hashes(images: ImageTable, columns: Sequence[str]) -> np.ndarray:
    further = [images.extras[name] for name in columns if name in images.extras]
    digests = bytearray()
    for i, (key, label) in enumerate(zip(images.keys, images.labels.tolist(), strict=True)):
        cells = (key, images.class_names[label], *(cell_text(column[i]) for column in further))
        digests += hashlib.blake2b("\0".join(cells).encode(), digest_size=8).digest()
    return np.frombuffer(bytes(digests), np.uint64)


class SourceImages:
    """The source images of a process, each compared with the plan when it is read.

    Args:
        images: this process's listing of the sources.
        planned: the sources of the plan.

    Raises:
        DataChanged: the listing differs from the plan's.
    """

    def __init__(self, images: ImageTable, planned: PlannedSources):
        planned.check(images)
        self.table, self.planned = images, planned

    def image(self, row: int) -> Image.Image:
        """The decoded image of a row, PIL RGB, from the bytes that are compared with the plan's hash.

        Raises:
            DataChanged: its content differs from the plan's.
            UserError: it is missing, cannot be decoded, or could not be read when the plan was made.
        """
        table = self.table
        if table.encoded is None:
            image = table.image(row)
            self._compare(row, pixel_bytes(image), table.keys[row])
            return image
        stored = table.encoded(int(table.rows[row]))
        if isinstance(stored, bytes):
            name, content = table.keys[row], stored
        else:
            name, content = str(stored), _read(Path(stored))
        self._compare(row, content, name)
        return open_image(content, name)

    def _compare(self, row: int, content: bytes, name: str) -> None:
        planned = self.planned.content[row].tobytes()
        if hash_bytes(content) == planned:
            return
        if planned == UNREADABLE:
            raise UserError(f"image {name} could not be read when this run began: run the same command again")
        raise DataChanged(f"image {name} was exchanged while images were made from it: {REMEDY}")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"image {path} does not exist: restore it or remove it from the data set") from None
    except OSError as error:
        raise UserError(f"image {path} cannot be read ({error.strerror or error}): restore it or remove it") from None


# ------------------------------------------------------------ encoding


class SourceMoments:
    """Posterior parameters of source images by row.

    Args:
        images: sources of the plan.
        encoder: describes how images are encoded; part of the blocks' names.
        folder: of the subset, in whose ``.moments`` blocks are shared.
        memory: bytes of the blocks kept in memory.
    """

    def __init__(self, images: SourceImages, engine: Engine, encoder: str, folder: Path, memory: int = MEMORY_BYTES):
        self.images, self.engine = images, engine
        self.files = block_files(images.planned, encoder)
        self.folder = folder / MOMENTS
        self.block = functools.lru_cache(max(1, memory // self._empty(BLOCK).nbytes))(self._block)
        self.broken: dict[int, str] = {}
        self.encoded = 0

    def batch(self, rows: Sequence[int]) -> tuple[Tensor, dict[int, str]]:
        """The parameters ``(B, 2C, h, w)`` of rows, zeros for images that cannot be read, and the error of each of these."""
        stacked = torch.stack([self.block(row // BLOCK)[row % BLOCK] for row in rows])
        return stacked, {row: self.broken[row] for row in rows if row in self.broken}

    def _block(self, number: int) -> Tensor:
        path = self.folder / self.files[number]
        block = _read_block(path)
        if block is None:
            block, whole = self._encode(number)
            if whole:  # a block with a broken image is encoded again, to have its error at hand
                _write_block(path, block)
        return block

    def _encode(self, number: int) -> tuple[Tensor, bool]:
        rows = range(number * BLOCK, min(len(self.images.table), (number + 1) * BLOCK))
        pictures, good = [], []
        for row in rows:
            try:
                pictures.append(fit(self.images.image(row), self.engine.resolution))
                good.append(row)
            except DataChanged:  # other images may have been exchanged too
                raise
            except UserError as error:
                self.broken[row] = str(error)
        block = self._empty(len(rows))
        if pictures:
            block[[row - rows.start for row in good]] = self._computed(pictures, good)
            self.encoded += len(pictures)
        return block, len(good) == len(rows)

    def _empty(self, count: int) -> Tensor:
        channels, height, width = self.engine.latent_shape
        return torch.zeros(count, 2 * channels, height, width, dtype=self.engine.vae.dtype)

    def _computed(self, pictures: Sequence[Image.Image], rows: Sequence[int]) -> Tensor:
        return self.engine.encode(pictures)


class SourceInversions(SourceMoments):
    """Inverted latents of source images by row, ``(B, C, h, w)`` in float32, each under the prompt of its own class.

    Each is computed once, in the first template's prompt where there are several, and kept as moments are.
    """

    def _empty(self, count: int) -> Tensor:
        return torch.zeros(count, *self.engine.latent_shape)

    def _computed(self, pictures: Sequence[Image.Image], rows: Sequence[int]) -> Tensor:
        return self.engine.invert(self.engine.encode(pictures), self.images.table.labels[rows].tolist())


def _read_block(path: Path) -> Tensor | None:
    try:
        return load_file(path)["moments"]
    except (OSError, SafetensorError, KeyError):
        return None  # absent, or cut off by a crash of the machine


def _write_block(path: Path, block: Tensor) -> None:
    """Keeps a block; one that cannot be written (a full disk) is encoded again later."""
    with contextlib.suppress(OSError, SafetensorError), atomic_path(path, flush=False) as temporary:
        save_file({"moments": block}, temporary)


# ------------------------------------------------------------ masks


@dataclass
class SourceMasks:
    """Masks of source images by row, each computed once.

    Attributes:
        images: sources of the plan, with boxes or masks.
        latent: (h, w) of the latents.
        part: one of ``--object_mask``'s values.
        objects: the cells of each image's object as packed bits, where there are neither boxes nor masks; see
            :class:`semantic_aug.sampling.plan.Guide`.
    """

    images: SourceImages
    latent: tuple[int, int]
    part: str
    objects: np.ndarray | None = None
    known: dict[int, Tensor] = field(default_factory=dict)

    def batch(self, rows: Sequence[int]) -> Tensor:
        """The masks of rows, bool ``(B, 1, h, w)``; all True for an image that cannot be read. Raises DataChanged: a mask file
        has changed."""
        return torch.stack([self._mask(row) for row in rows])

    def _mask(self, row: int) -> Tensor:
        if self.objects is not None:
            cells = np.unpackbits(self.objects[row], count=math.prod(self.latent)).astype(bool)
            # without an object everything may change
            changes = cells if self.part == "object" and cells.any() else ~cells
            return torch.from_numpy(changes).reshape(1, *self.latent)
        if row not in self.known:
            table, extras = self.images.table, self.images.table.extras
            try:
                size = table.size(row)
            except UserError:  # reported where the source is encoded
                return torch.ones(1, *self.latent, dtype=torch.bool)
            if MASK in extras and extras[MASK][row]:
                path = extras[MASK_PATH][row]
                content = _read(Path(path))
                if hash_bytes(content).hex() != extras[MASK][row]:
                    raise DataChanged(f"mask {path} was exchanged while images were made from it: {REMEDY}")
                mask = read_mask(path, size, table.keys[row], content)
                self.known[row] = pixel_mask(mask, self.latent, self.part)
            else:
                self.known[row] = box_mask(extras[BOX][row].tolist(), size, self.latent, self.part)
        return self.known[row]
