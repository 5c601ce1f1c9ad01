"""The source images of a plan: every process checks its own listing, and each image's bytes, against what was planned.

A data set is listed by the launcher and again by each process (a replacement may start days later, on another machine). A
task's row means an image only while both listings agree; and the image means what the plan says only while its bytes do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from semantic_aug.datasets import ImageTable
from semantic_aug.datasets.fingerprint import UNREADABLE, ContentHashes, hash_bytes, pixel_bytes
from semantic_aug.datasets.images import open_image
from semantic_aug.errors import UserError

BLOCK = 8
"""Rows encoded together."""

BOX = "box"
"""The column of a data set from which masks are made."""

REMEDY = (
    "everything made so far is kept and listed; restore the data set and run the same command, or give another "
    "--output_root"
)


def columns_of(object_mask: str | None) -> tuple[str, ...]:
    """The columns of a data set, besides names, labels and content, that decide what a translation looks like."""
    return () if object_mask is None else (BOX,)


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
        """The rows of a training split.

        Args:
            images: the split.
            hashes: of its images.
            columns: further columns that decide what a translation looks like (boxes).
        """
        return cls(_row_hashes(images, columns), hashes.values)

    def check(self, images: ImageTable, columns: Sequence[str] = ()) -> None:
        """Compares another listing of the same data set.

        Raises:
            DataChanged: another number of images, or other names or labels; names one of them.
        """
        rows = _row_hashes(images, columns)
        if np.array_equal(rows, self.rows):
            return
        new = np.flatnonzero(~np.isin(rows, self.rows))
        gone = int((~np.isin(self.rows, rows)).sum())
        named = f"; '{images.keys[new[0]]}' is new or has another label" if len(new) else ""
        raise DataChanged(
            f"the data set changed while images were made from it: {len(images)} training images now, {len(self.rows)} in "
            f"the plan ({len(new)} new, {gone} gone{named}): {REMEDY}"
        )


def block_files(planned: PlannedSources, encoder: str) -> list[str]:
    """The file of each block of :data:`BLOCK` rows: named after the images' content and what encodes them.

    Args:
        planned: the images.
        encoder: says how images are encoded.
    """
    blocks = (planned.content[i : i + BLOCK].tobytes() for i in range(0, len(planned.content), BLOCK))
    return [f"{hashlib.sha256(encoder.encode() + block).hexdigest()[:32]}.safetensors" for block in blocks]


def _row_hashes(images: ImageTable, columns: Sequence[str]) -> np.ndarray:
    further = [images.extras[name] for name in columns if name in images.extras]
    digests = bytearray()
    for i, (key, label) in enumerate(zip(images.keys, images.labels.tolist(), strict=True)):
        cells = (key, images.class_names[label], *(str(column[i].tolist()) for column in further))
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
