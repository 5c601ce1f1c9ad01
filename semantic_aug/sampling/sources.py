"""The source images of a plan: compared with what was planned, encoded once, and masked where that is asked for.

A data set is listed by the launcher and again by each process (a replacement may start days later, on another machine). A
task's row means an image only while both listings agree; and the image means what the plan says only while its bytes do.

Sources are encoded in fixed blocks of neighbouring rows, so that an image's moments depend on nothing but the plan.
What is encoded stays in memory up to a bound and is written to ``.moments`` in the subset's folder, where the other
processes, and a restarted run, find it under a name made of the images' content and of what encodes them; the folder is
removed when the subset is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections import OrderedDict
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
    """The data set is not the one the plan was made for."""


@dataclass(frozen=True)
class PlannedSources:
    """The N training images of a plan, as compact as they can be sent to a process.

    Attributes:
        rows: uint64 ``(N,)``, a hash of each row's key, class name and further columns that count.
        content: uint8 ``(N, 16)``, the hash of each image's encoded bytes; zeros where it could not be read.
    """

    rows: np.ndarray
    content: np.ndarray

    @classmethod
    def of(cls, images: ImageTable, hashes: ContentHashes, columns: Sequence[str] = ()) -> PlannedSources:
        """The rows of a training split; ``columns`` are further ones that decide what a translation looks like (boxes)."""
        return cls(_row_hashes(images, columns), hashes.values)

    def check(self, images: ImageTable, columns: Sequence[str] = ()) -> None:
        """Compares another listing of the same data set. Raises DataChanged: another number of images, or other names or
        labels; names one of them."""
        rows = _row_hashes(images, columns)
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
    """The images that a plan's rows count: the training images, then the unlabelled ones."""
    return dataset.train if dataset.unlabelled is None else dataset.train.with_class(dataset.unlabelled)


def planned_sources(dataset: LoadedDataset, hashes: ContentHashes, columns: Sequence[str]) -> PlannedSources:
    """The sources of a plan; arguments as of :meth:`PlannedSources.of`, ``hashes`` of the training images."""
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
    begun, names = hashlib.sha256(encoder.encode()), []
    for block in blocks:
        digest = begun.copy()
        digest.update(block)
        names.append(f"{digest.hexdigest()[:32]}.safetensors")
    return names


def _row_hashes(images: ImageTable, columns: Sequence[str]) -> np.ndarray:
    further = [images.extras[name] for name in columns if name in images.extras]
    digests = bytearray()
    for i, (key, label) in enumerate(zip(images.keys, images.labels.tolist(), strict=True)):
        cells = (key, images.class_names[label], *(cell_text(column[i]) for column in further))
        digests += hashlib.blake2b("\0".join(cells).encode(), digest_size=8).digest()
    return np.frombuffer(bytes(digests), np.uint64)


class SourceImages:
    """The training images of one process, read as the plan has them.

    Args:
        images: this process's own listing of the training split.
        planned: what the plan was made for.
        columns: further columns that count.

    Raises:
        DataChanged: the listing is another.
    """

    def __init__(self, images: ImageTable, planned: PlannedSources, columns: Sequence[str] = ()):
        planned.check(images, columns)
        self.images, self.planned, self.extras = images, planned, images.extras

    def __len__(self) -> int:
        return len(self.images)

    def size(self, row: int) -> tuple[int, int]:
        """(width, height) of the image of a row; see :meth:`semantic_aug.datasets.ImageTable.size`."""
        return self.images.size(row)

    def image(self, row: int) -> Image.Image:
        """The decoded image of a row, PIL RGB, from the very bytes that are compared with the plan's hash.

        Raises:
            DataChanged: its content is not the plan's.
            UserError: it is missing, cannot be decoded, or could not be read when the plan was made.
        """
        if self.images.encoded is None:
            image = self.images.image(row)
            self._compare(row, pixel_bytes(image), self.images.keys[row])
            return image
        stored = self.images.encoded(int(self.images.rows[row]))
        if isinstance(stored, bytes):
            name, content = self.images.keys[row], stored
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
        raise UserError(f"image {path} is not there: restore it or remove it from the data set") from None
    except OSError as error:
        raise UserError(f"image {path} cannot be read ({error.strerror or error}): restore it or remove it") from None


# ------------------------------------------------------------ encoding


class SourceMoments:
    """Posterior parameters of source images by row.

    Args:
        images: training split, as the plan has it.
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
        block = _read_block(path) if path is not None else None
        if block is None:
            block, whole = self._encode(number)
            if path is not None and whole:  # a block with a broken image is encoded again, to have its error at hand
                _write_block(path, block)
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
        return self.engine.invert(self.engine.encode(pictures), self.images.images.labels[rows].tolist())


def _read_block(path: Path) -> Tensor | None:
    try:
        return load_file(path)["moments"]
    except (OSError, SafetensorError, KeyError):
        return None  # not there yet, or torn by a crash of the machine


def _write_block(path: Path, block: Tensor) -> None:
    """A cache: what cannot be written (a full disk) is encoded again."""
    with contextlib.suppress(OSError, SafetensorError), atomic_path(path, flush=False) as temporary:
        save_file({"moments": block}, temporary)


# ------------------------------------------------------------ masks


@dataclass
class SourceMasks:
    """Masks of source images by row, each computed once.

    Attributes:
        images: training split, with boxes or masks; as the plan has it.
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
        """The masks of rows, bool ``(B, 1, h, w)``; all True for an image that cannot be read. Raises DataChanged: a mask's
        file is not the one that was listed."""
        return torch.stack([self._mask(row) for row in rows])

    def _mask(self, row: int) -> Tensor:
        if self.objects is not None:
            cells = np.unpackbits(self.objects[row], count=math.prod(self.latent)).astype(bool)
            # without an object everything may change
            changes = cells if self.part == "object" and cells.any() else ~cells
            return torch.from_numpy(changes).reshape(1, *self.latent)
        if row not in self.known:
            try:
                size = self.images.size(row)
            except UserError:  # said where the source is encoded
                return torch.ones(1, *self.latent, dtype=torch.bool)
            extras = self.images.extras
            if MASK in extras and extras[MASK][row]:
                path = extras[MASK_PATH][row]
                content = _read(Path(path))
                if hash_bytes(content).hex() != extras[MASK][row]:
                    raise DataChanged(f"mask {path} was exchanged while images were made from it: {REMEDY}")
                mask = read_mask(path, size, self.images.images.keys[row], content)
                self.known[row] = pixel_mask(mask, self.latent, self.part)
            else:
                self.known[row] = box_mask(extras[BOX][row].tolist(), size, self.latent, self.part)
        return self.known[row]
