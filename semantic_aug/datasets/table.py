"""A split of a data set as a table: labels and names in memory, images decoded only when asked for."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from semantic_aug.datasets.images import image_size

Reader = Callable[[int], Image.Image]
"""From a row's position in the *source* to its image, PIL RGB."""

Encoded = Callable[[int], str | Path | bytes]
"""From a row's position in the *source* to its file, or to the encoded bytes, as the source holds them."""


@dataclass(frozen=True)
class ImageTable:
    """Labelled images of one split.

    Attributes:
        class_names: names as the source spells them, in label order.
        labels: ``(N,)`` int64, each an index into ``class_names``.
        keys: ``N`` unique names that stay the same whatever order the source lists its files in; rows are sorted by them.
        rows: ``(N,)`` int64, each row's position in the source, as ``read`` wants it.
        read: decodes one source row.
        stamp: what changes when a source row's content does (size and times of its file); tells caches when they are stale.
        extras: further columns by name, ``N`` values each, for data sets that have them: ``group`` (int64, with the
            group's meaning given by the data set), ``caption`` (str), ``box`` (left, top, right, bottom in pixels).
        encoded: a source row's image as it is stored, for what looks at files and not at pixels; None where not known.
    """

    class_names: tuple[str, ...]
    labels: np.ndarray
    keys: Sequence[str]
    rows: np.ndarray
    read: Reader
    stamp: Callable[[int], str] = lambda row: ""
    extras: Mapping[str, np.ndarray] = field(default_factory=dict)
    encoded: Encoded | None = None

    def __post_init__(self):
        if not len(self.labels) == len(self.keys) == len(self.rows):
            raise ValueError(f"{len(self.labels)} labels, {len(self.keys)} keys, {len(self.rows)} rows: must be equal")

    @classmethod
    def of(
        cls,
        class_names: Sequence[str],
        labels: Sequence[int],
        keys: Sequence[str],
        read: Reader,
        stamp: Callable[[int], str] = lambda row: "",
        extras: Mapping[str, Sequence] | None = None,
        encoded: Encoded | None = None,
    ) -> ImageTable:
        """A table over a source's rows in the source's order, brought into the order of the keys."""
        names = np.empty(len(keys), dtype=object)  # object arrays share the strings, a million cost 8 MB
        names[:] = keys
        # five times faster than sorting the array: Python compares plain strings without a call each
        order = np.fromiter(sorted(range(len(keys)), key=keys.__getitem__), np.int64, len(keys))
        labels = np.asarray(labels, dtype=np.int64).reshape(-1)
        columns = {name: np.asarray(values)[order] for name, values in (extras or {}).items()}
        return cls(tuple(class_names), labels[order], names[order].tolist(), order, read, stamp, columns, encoded)

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """The decoded image of row ``index``, PIL RGB.

        Raises:
            UserError: the image is missing or cannot be decoded.
        """
        return self.read(int(self.rows[index]))

    def size(self, index: int) -> tuple[int, int]:
        """(width, height) in pixels of the image of row ``index``, from its header where the source holds it encoded.

        Raises:
            UserError: the image is missing or cannot be read.
        """
        if self.encoded is None:
            return self.image(index).size
        source = self.encoded(int(self.rows[index]))
        return image_size(source, self.keys[index] if isinstance(source, bytes) else None)

    def take(self, indices: Sequence[int] | np.ndarray) -> ImageTable:
        """The rows at ``indices``, in ascending order."""
        indices = np.sort(np.asarray(indices, dtype=np.int64))
        return replace(
            self,
            labels=self.labels[indices],
            keys=list(map(self.keys.__getitem__, indices.tolist())),
            rows=self.rows[indices],
            extras={name: values[indices] for name, values in self.extras.items()},
        )

    def counts(self) -> np.ndarray:
        """``(K,)`` number of images of each class."""
        return np.bincount(self.labels, minlength=len(self.class_names))

    def relabelled(self, class_names: Sequence[str]) -> ImageTable:
        """The same rows with labels counted in another order of the same class names.

        Raises:
            KeyError: a class of this table is not among ``class_names``.
        """
        position = {name: i for i, name in enumerate(class_names)}
        mapping = np.asarray([position[name] for name in self.class_names], dtype=np.int64)
        labels = mapping[self.labels] if len(self.labels) else self.labels
        return replace(self, class_names=tuple(class_names), labels=labels)

    def without_class(self, label: int) -> ImageTable:
        """The table with an empty class struck from its list.

        Raises:
            ValueError: the class has images.
        """
        if (self.labels == label).any():
            raise ValueError(f"class '{self.class_names[label]}' has images")
        names = self.class_names[:label] + self.class_names[label + 1 :]
        return replace(self, class_names=names, labels=self.labels - (self.labels > label))

    def signature(self) -> str:
        """SHA-256 of names and stamps of all rows: equal signatures mean the same images."""
        digest = hashlib.sha256()
        for key, row in zip(self.keys, self.rows.tolist(), strict=True):
            digest.update(f"{key}\0{self.stamp(row)}\0".encode())
        return digest.hexdigest()


def file_stamp(path: str | os.PathLike) -> str:
    """Size and times of a file; empty where it is not there.

    The time of the last change of its entry is among them: it moves even where a tool sets the modification time back.
    """
    try:
        status = os.stat(path)
    except OSError:
        return ""
    return f"{status.st_size}-{status.st_mtime_ns}-{status.st_ctime_ns}"
