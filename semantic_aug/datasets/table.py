"""A split of a data set as a table: labels and names in memory, images decoded only when asked for; tables over files."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from semantic_aug.datasets.images import image_size, open_image
from semantic_aug.errors import UserError

BOX_TEXT, MASK_PATH = "box_text", "mask_path"
"""Columns of a user's own lists and folders: a box as text, a mask's file; empty where an image has none. They are read where
they are used."""

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
        stamp: changes when a source row's content does (size and times of its file); tells caches when they are stale.
        extras: further columns by name, ``N`` values each, for data sets that have them: ``group`` (int64, with the
            group's meaning given by the data set), ``caption`` (str), ``box`` (left, top, right, bottom in pixels),
            :data:`BOX_TEXT` and :data:`MASK_PATH` (str).
        encoded: a source row's image as it is stored, where files count and not pixels; None where not known.
        group_names: meaning of the values of ``group``, where the source itself names them.
    """

    class_names: tuple[str, ...]
    labels: np.ndarray
    keys: Sequence[str]
    rows: np.ndarray
    read: Reader
    stamp: Callable[[int], str] = lambda row: ""
    extras: Mapping[str, np.ndarray] = field(default_factory=dict)
    encoded: Encoded | None = None
    group_names: tuple[str, ...] = ()

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
        # five times faster than sorting an array: Python compares plain strings without a call each
        positions = sorted(range(len(keys)), key=keys.__getitem__)
        order, labels = np.array(positions, np.int64), np.asarray(labels, dtype=np.int64).reshape(-1)
        columns = {name: np.asarray(values)[order] for name, values in (extras or {}).items()}
        ordered = list(map(keys.__getitem__, positions))
        return cls(tuple(class_names), labels[order], ordered, order, read, stamp, extras=columns, encoded=encoded)

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """The decoded image of row ``index``, PIL RGB. Raises UserError: the image is missing or cannot be decoded."""
        return self.read(int(self.rows[index]))

    def size(self, index: int) -> tuple[int, int]:
        """(width, height) in pixels of the image of row ``index``, from its header where the source holds it encoded. Raises
        UserError: the image is missing or cannot be read."""
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
        """The same rows with labels counted in another order of the same class names. Raises KeyError: a class of this table
        is not among ``class_names``."""
        position = {name: i for i, name in enumerate(class_names)}
        mapping = np.asarray([position[name] for name in self.class_names], dtype=np.int64)
        labels = mapping[self.labels] if len(self.labels) else self.labels
        return replace(self, class_names=tuple(class_names), labels=labels)

    def with_class(self, other: ImageTable) -> ImageTable:
        """These images and then those of another table, whose classes count as one further class; without extras."""

        def of_source(name: str) -> Callable:  # rows of the other table count down from -1
            return lambda row: getattr(self, name)(row) if row >= 0 else getattr(other, name)(-1 - row)

        return ImageTable(
            (*self.class_names, other.class_names[0]),
            np.concatenate([self.labels, np.full(len(other), len(self.class_names))]),
            [*self.keys, *(f"{other.class_names[0]}/{key}" for key in other.keys)],
            np.concatenate([self.rows, -1 - other.rows]),
            of_source("read"),
            of_source("stamp"),
            encoded=of_source("encoded") if self.encoded and other.encoded else None,
        )

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


# ---------------------------------------------------------------------------------------------------------- files


def table_of_files(
    class_names: Sequence[str],
    labels: Sequence[int],
    keys: Sequence[str],
    path_of: Callable[[int], str | Path],
    extras: Mapping[str, Sequence] | None = None,
) -> ImageTable:
    """A table whose rows are image files, ``path_of`` their positions; nothing is opened before an image is asked for. A file's
    key is unique and the same whatever order they are listed in."""
    read, stamp = lambda row: open_image(path_of(row)), lambda row: file_stamp(path_of(row))
    return ImageTable.of(class_names, labels, keys, read, stamp, extras, encoded=path_of)


def below(root: Path, text: str, where: str, remedy: str = "") -> str:
    """A relative path of a list, normalised, with forward slashes.

    Links are not resolved: what lies below the root is the user's to arrange, and a million look-ups would take minutes.

    Args:
        root: the folder it is relative to; an absolute path is taken if it lies below it.
        where: file and line, for the error.
        remedy: what to do about a path that leads outside, for the error.

    Raises:
        UserError: the path is empty or leads outside ``root``.
    """
    base = os.path.abspath(root)
    start = base.rstrip(os.sep) + os.sep
    path = os.path.normpath(os.path.join(base, text))
    if not text:
        raise UserError(f"{where}: the path is empty")
    if not path.startswith(start):
        raise UserError(f"{where}: path '{text}' leads outside {base}" + (f": {remedy}" if remedy else ""))
    return path[len(start) :].replace(os.sep, "/")


LOOK_UP_THREADS = min(16, 4 * (os.cpu_count() or 1))
"""Threads that look files up: more than cores, since on a network drive each look-up waits for an answer."""
LOOK_UP_BLOCK = 1 << 16
"""Files that are grouped by folder at once."""
FEW_FILES = 32
"""Up to this number of files of one folder, each is looked up; of more, the folder is listed."""


def missing_files(table: ImageTable) -> list[int]:
    """Rows of a table whose image is a file that is not there, see :func:`missing_paths`; encoded images are there."""
    rows = table.rows.tolist()
    if table.encoded is None or not rows or isinstance(table.encoded(rows[0]), bytes):
        return []
    return missing_paths(lambda index: table.encoded(rows[index]), len(rows))


def missing_paths(path_of: Callable[[int], str | Path | bytes], count: int) -> list[int]:
    """Positions of the paths that lead to no regular file (missing, a broken link, a pipe); none is opened, and encoded images
    among them (bytes) are passed over."""
    missing = []
    for start in range(0, count, LOOK_UP_BLOCK):
        folders: dict[str, list[tuple[int, str]]] = defaultdict(list)
        for index in range(start, min(count, start + LOOK_UP_BLOCK)):
            path = path_of(index)
            if not isinstance(path, bytes):
                folder, name = os.path.split(path)
                folders[folder].append((index, name))
        parts = in_threads(lambda item: _missing_in(*item), list(folders.items()), LOOK_UP_THREADS)
        missing += itertools.chain.from_iterable(parts)
    return sorted(missing)


def _missing_in(folder: str, files: list[tuple[int, str]]) -> list[int]:
    if len(files) > FEW_FILES:
        try:
            with os.scandir(folder) as entries:
                regular = {entry.name for entry in entries if is_regular(entry)}
        except OSError:
            regular = set()
        files = [(index, name) for index, name in files if name not in regular]
    return [index for index, name in files if not Path(folder, name).is_file()]


def is_regular(entry: os.DirEntry) -> bool:
    """Whether a folder's entry is a file, or a link to one."""
    try:
        return entry.is_file()
    except OSError:
        return False


def in_threads(work: Callable, tasks: Sequence, workers: int | None = None, block: int = 4096) -> Iterator:
    """The results of ``map``, in order, computed by threads (None: one per core, 16 at most), a ``block`` of tasks at once: the
    results of a million do not wait in memory."""
    with ThreadPoolExecutor(workers or min(16, os.cpu_count() or 1)) as pool:
        for start in range(0, len(tasks), block):
            yield from pool.map(work, tasks[start : start + block])  # which cancels the rest on an error


def refuse_missing(splits: Mapping[str, ImageTable], name: str) -> None:
    """Refuses a data set some of whose images are not there, before anything is made of it. Raises UserError: how many, and
    the first by name."""
    missing = [(split, row) for split, table in splits.items() for row in missing_files(table)]
    if not missing:
        return
    total, (split, row) = sum(map(len, splits.values())), missing[0]
    path = splits[split].encoded(int(splits[split].rows[row]))
    hint = "; Windows paths are looked up with forward slashes" if "\\" in str(path) else ""
    raise UserError(
        f"data set {name}: {len(missing)} of {total} images are not there (the first: {path}, split {split}): restore them "
        f"or remove them from the data set{hint}; check names all of them"
    )


def refuse_damaged(read: Reader, rows: Sequence[int]) -> None:
    """Decodes images, since the header of a file tells nothing of pixels that are cut off. Raises UserError: one is damaged."""
    options = {"desc": "checking images", "unit": "image", "leave": False, "delay": 2.0, "dynamic_ncols": True}
    for _ in tqdm(in_threads(lambda row: read(row).size, rows), total=len(rows), **options):
        pass
