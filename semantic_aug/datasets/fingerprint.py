"""The identity of a data set, independent of its name and place: hashes of its images, and one record made of them.

Every stage keeps :func:`data_identity` beside its results and compares it before it resumes a run or calls one
finished. Names are relative to the data set, so that moving it to another disk changes nothing. Reading every image at
each start would take hours for a large set; so hashes are kept in the cache folder (``hashes-*.npy``) under the file's
path, size and times, and only what is new or was touched is read. A time that lies less than
:data:`SETTLED_SECONDS` back is not trusted (the next change might carry the same one): such a file is read again.
"""

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from semantic_aug import runs
from semantic_aug.datasets import cache
from semantic_aug.datasets.catalog import LoadedDataset
from semantic_aug.datasets.spec import SPLITS
from semantic_aug.datasets.table import BOX_TEXT, LOOK_UP_THREADS, MASK_PATH, ImageTable, file_stamp, in_threads
from semantic_aug.errors import UserError
from semantic_aug.files import atomic_path
from semantic_aug.tensors import open_array

log = logging.getLogger(__name__)

HASH_BYTES = 16
UNREADABLE = bytes(HASH_BYTES)
"""Stands for an image that is missing or cannot be read; what reads it later reports it by name."""
SETTLED_SECONDS = 2.0
MOST_KEPT = 4_000_000
"""Hashes kept for one folder (32 bytes each)."""
CHUNK = 256
"""Images that a thread takes at once."""

Source = Callable[[int], "str | Path | bytes"]
"""From an index to an image's file, or to its encoded bytes."""


def hash_bytes(content: bytes) -> bytes:
    """The hash of an image's encoded bytes."""
    return hashlib.blake2b(content, digest_size=HASH_BYTES).digest()


def _hash_of(source: str | Path | bytes) -> bytes:
    if isinstance(source, bytes):
        return hash_bytes(source)
    if not Path(source).is_file():  # opening a pipe would wait for its writer without end
        raise FileNotFoundError(source)
    with open(source, "rb") as content:
        return hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=HASH_BYTES)).digest()


class ContentHashes:
    """Hashes of some images or other files, and whether one of them has changed since.

    Args:
        names: what each is called in messages.
        source: the file or the encoded bytes of each.
        stamp: changes when the content of one does (path, size and times of its file); empty where that is not known.
        folder: of the images; the cache keeps the hashes under its name.
        what: is hashed, for the progress bar.

    Attributes:
        values: uint8 ``(N, HASH_BYTES)``.
    """

    def __init__(
        self, names: Sequence[str], source: Source, stamp: Callable[[int], str], folder: str, what: str = "images"
    ):
        self.names, self._source, self._stamp, self.what = names, source, stamp, what
        self._stamps = self._take_stamps()
        store = _Store(folder)
        known, stamps = store.read(), [stamp.tobytes() for stamp in self._stamps]
        values = b"".join(known.get(stamp, UNREADABLE) for stamp in stamps)
        self.values = np.frombuffer(bytearray(values), np.uint8).reshape(-1, HASH_BYTES)
        settled = self._read([i for i, stamp in enumerate(stamps) if stamp not in known])
        if settled:
            store.add(np.concatenate([self._stamps[settled], self.values[settled]], axis=1))

    def _take_stamps(self) -> np.ndarray:
        """Hashes of the stamps ``(N, HASH_BYTES)``, in chunks on threads, since look-ups on a network file system wait."""

        def hashed(start: int) -> bytes:
            stamps = map(self._stamp_or_none, range(start, min(len(self.names), start + CHUNK)))
            return b"".join(hash_bytes(os.fsencode(stamp)) if stamp else UNREADABLE for stamp in stamps)

        joined = b"".join(in_threads(hashed, range(0, len(self.names), CHUNK), LOOK_UP_THREADS))
        return np.frombuffer(joined, np.uint8).reshape(-1, HASH_BYTES)

    def _stamp_or_none(self, index: int) -> str:
        try:
            return self._stamp(index)
        except (OSError, UserError):  # no image in this row
            return ""

    def _read(self, missing: Sequence[int]) -> list[int]:
        """Reads and hashes some of them; returns those whose hashes may be kept."""
        options = {"unit": "file", "leave": False, "disable": None, "delay": 2.0, "dynamic_ncols": True}
        hashes = in_threads(self._hash, missing, LOOK_UP_THREADS)
        bar, settled = tqdm(hashes, total=len(missing), desc=f"hashing {self.what}", **options), []
        for index, (value, keep) in zip(missing, bar, strict=True):
            self.values[index] = np.frombuffer(value, np.uint8)
            settled += [index] if keep else []
        return settled

    def _hash(self, index: int) -> tuple[bytes, bool]:
        """The hash of one, and whether it may be kept under its stamp."""
        try:
            value = _hash_of(self._source(index))
        except (OSError, UserError):
            return UNREADABLE, False
        stamp = self._stamp_or_none(index)
        same = bool(stamp) and hash_bytes(os.fsencode(stamp)) == self._stamps[index].tobytes()
        return value, same and _age(stamp) > SETTLED_SECONDS

    def hex(self) -> list[str]:
        """Each hash in hexadecimal digits."""
        return hex_digits(self.values)

    def changed(self) -> list[str]:
        """Names of those whose content is another now than when they were hashed; only touched ones are read."""
        now = self._take_stamps()
        touched = np.flatnonzero((now != self._stamps).any(axis=1) | ~now.any(axis=1)).tolist()
        present = [value for value, _ in in_threads(self._hash, touched, LOOK_UP_THREADS)]
        return [self.names[i] for i, value in zip(touched, present, strict=True) if value != self.values[i].tobytes()]


def _age(stamp: str) -> float:
    """Seconds since a file's entry changed, by the last part of its :func:`file_stamp`; without end for other stamps."""
    try:
        return time.time() - int(stamp.rpartition("-")[2]) / 1e9
    except ValueError:
        return float("inf")


class _Store:
    """The kept hashes of one folder: rows of stamp and hash in a file of the cache; losing it costs reading again."""

    def __init__(self, folder: str):
        self.path = cache.cache_folder() / f"hashes-{hash_bytes(os.fsencode(folder)).hex()}.npy"

    def read(self) -> dict[bytes, bytes]:
        data, width = self._rows().tobytes(), 2 * HASH_BYTES
        return {data[i : i + HASH_BYTES]: data[i + HASH_BYTES : i + width] for i in range(0, len(data), width)}

    def _rows(self) -> np.ndarray:
        rows = open_array(self.path, np.uint8)
        if rows is None or rows.ndim != 2 or rows.shape[1] != 2 * HASH_BYTES:
            return np.empty((0, 2 * HASH_BYTES), np.uint8)
        with contextlib.suppress(OSError):
            os.utime(self.path)  # the least recently used files go first
        return rows

    def add(self, rows: np.ndarray) -> None:
        """Appends rows to what is there by now; of two processes that do so at once one may lose its own, no more."""
        rows = np.concatenate([self._rows(), rows])[-max(MOST_KEPT, 2 * len(rows)) :]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            cache.make_room(self.path.parent, rows.nbytes)
            with atomic_path(self.path) as temporary, open(temporary, "wb") as out:
                np.save(out, rows)
        except (OSError, cache.NoRoom) as error:
            log.info("hashes of images are not kept and will be computed again: %s", error)


def hex_digits(values: np.ndarray) -> list[str]:
    """Hashes uint8 ``(N, HASH_BYTES)``, each in hexadecimal digits."""
    return [value.tobytes().hex() for value in values]


def hash_files(paths: Sequence[str | os.PathLike], what: str = "files") -> ContentHashes:
    """Content hashes of files (synthetic images, weights), kept in the cache like those of a table's images."""
    names = [os.path.abspath(path) for path in paths]

    def stamp(i: int) -> str:
        held = file_stamp(names[i])
        return held and f"{names[i]} {held}"

    return ContentHashes(names, names.__getitem__, stamp, _common(names), what)


def hash_images(table: ImageTable) -> ContentHashes:
    """Content hashes of a table's images, each of its encoded bytes (of its pixels, where the source tells no more)."""
    rows = table.rows.tolist()
    if table.encoded is None:
        return ContentHashes(table.keys, lambda i: pixel_bytes(table.image(i)), lambda i: "", "")
    inside = bool(rows) and _encoded_file(table, rows[0]) is None
    # images inside the data set's own files have those files' stamp; asking each row for its file would read all images
    files = [None if inside else _encoded_file(table, row) for row in rows]

    def stamp(i: int) -> str:
        held = table.stamp(rows[i])
        return held and f"{files[i] or rows[i]} {held}"

    folder = table.stamp(rows[0]) if inside else _common([file for file in files if file])
    return ContentHashes(table.keys, lambda i: table.encoded(rows[i]), stamp, folder)


def _encoded_file(table: ImageTable, row: int) -> str | None:
    """The file that holds a source row, or None where the row holds its bytes."""
    try:
        source = table.encoded(row)
    except (OSError, UserError):
        return None
    return None if isinstance(source, bytes) else os.path.abspath(source)


def pixel_bytes(image: Image.Image) -> bytes:
    """The bytes that are hashed of an image whose source gives only pixels."""
    return f"{image.mode} {image.size} ".encode() + image.tobytes()


def _common(paths: Sequence[str]) -> str:
    return os.path.commonpath([min(paths), max(paths)]) if paths else ""


# ------------------------------------------------------------------------------------------------------- the record


def split_identity(
    table: ImageTable, hashes: Iterable[str], columns: Sequence[str] | None = None
) -> dict[str, int | str]:
    """The identity of a split: ``images``, their number, and SHA-256 digests over all rows in order.

    Args:
        columns: further columns that count (captions, boxes, groups); None: all there are but a user's own boxes and masks.

    Returns:
        ``images``; ``names``, ``labels`` and ``content``, which tell a difference apart; ``digest`` of all together.
    """
    digests = {name: hashlib.sha256() for name in ("names", "labels", "content", "digest")}
    counted = set(table.extras) - {BOX_TEXT, MASK_PATH} if columns is None else columns
    further = [table.extras[name] for name in sorted(table.extras) if name in counted]
    for i, (key, label, content) in enumerate(zip(table.keys, table.labels.tolist(), hashes, strict=True)):
        cells = {"names": key, "labels": table.class_names[label], "content": content}
        for name, text in cells.items():
            digests[name].update(text.encode() + b"\0")
        more = "\0".join(cell_text(column[i]) for column in further)
        digests["digest"].update("\0".join([*cells.values(), more, ""]).encode())
    return {"images": len(table)} | {name: digest.hexdigest()[:32] for name, digest in digests.items()}


def content_digest(hashes: Iterable[str]) -> str:
    """The ``content`` of :func:`split_identity` for images with these hashes."""
    return hashlib.sha256(b"".join(value.encode() + b"\0" for value in hashes)).hexdigest()[:32]


def cell_text(value: Any) -> str:
    """A value of a further column as digests have it."""
    return str(value.tolist()) if isinstance(value, (np.ndarray, np.generic)) else str(value)


def hash_splits(dataset: LoadedDataset, splits: Sequence[str] = SPLITS) -> dict[str, ContentHashes]:
    """Content hashes of the splits a data set has among ``splits``."""
    tables = {split: getattr(dataset, split) for split in splits}
    return {split: hash_images(table) for split, table in tables.items() if table is not None}


def data_identity(
    dataset: LoadedDataset,
    splits: Sequence[str] | Mapping[str, ContentHashes] = SPLITS,
    columns: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The record of a data set as plain values: neither paths nor the word given to ``--dataset`` are part of it.

    Args:
        splits: names of those that count, or their hashes where they have been computed.

    Returns:
        Each split's :func:`split_identity` (None where the data set lacks it) under its name, and ``classes``,
        ``prompt_names`` and ``super_class``.
    """
    hashes = splits if isinstance(splits, Mapping) else hash_splits(dataset, splits)
    record: dict[str, Any] = {
        split: split_identity(getattr(dataset, split), hashes[split].hex(), columns) if split in hashes else None
        for split in splits
    }
    record["classes"] = names_identity(dataset.source_names)
    record["prompt_names"] = names_identity(dataset.class_names)
    record["super_class"] = dataset.spec.super_class
    return record


def names_identity(names: Sequence[str]) -> dict[str, int | str]:
    """Number and digest of names in order."""
    return {"count": len(names), "digest": hashlib.sha256("\0".join(names).encode()).hexdigest()[:32]}


def files_digest(paths: Sequence[Path], root: Path | None = None) -> str:
    """One digest of the weights of a model: of the files' content and, where there are several, of their names below
    ``root``. Raises UserError: one cannot be read."""
    hashes = hash_files(paths, "weights").hex()
    missing = next((path for path, value in zip(paths, hashes, strict=True) if not int(value, 16)), None)
    if missing is not None:
        raise UserError(f"{missing} cannot be read: restore it")
    names = [path.relative_to(root).as_posix() if root else "" for path in paths]
    lines = sorted(f"{name} {value}\n" for name, value in zip(names, hashes, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:32]


def data_difference(recorded: Mapping[str, Any] | None, present: Mapping[str, Any]) -> str:
    """The differences between the data that a run began with and the present data, in words; empty where there are none.

    Only what ``present`` names is compared, so that a stage may leave out what does not concern it.
    """
    if not recorded:
        return "its record does not say which images it was made from"
    differences = []
    for name, now in present.items():
        then, kind = recorded.get(name), now if isinstance(now, Mapping) else recorded.get(name)
        if then == now:
            continue
        if not isinstance(kind, Mapping):
            differences.append(f"{name}: {runs.value_text(now)} now, {runs.value_text(then)} when the run began")
        elif "count" in kind:
            more = then and then["count"] != now["count"]
            counts = f": {now['count']} now, {then['count']} when the run began" if more else ""
            differences.append(f"{name.replace('classes', 'class names').replace('_', ' ')} differ{counts}")
        elif "images" in kind:
            differences.append(_split_difference(name, then or {}, now or {}))
        else:
            differences.append(data_difference(then, now))
    return "; ".join(differences)


def _split_difference(name: str, then: Mapping, now: Mapping) -> str:
    before, after = then.get("images", 0), now.get("images", 0)
    if before != after:
        return f"{name}: {after} images now, {before} when the run began"
    kinds = [kind for kind in ("names", "labels", "content") if kind in now]
    other = [kind for kind in kinds if then.get(kind) != now[kind]]
    same = [kind for kind in kinds if kind not in other]
    if not other:
        return f"{name}: the same {after} images, other captions, boxes, masks or groups"
    return f"{name}: {after} images as before, " + (
        f"the same {' and '.join(same)}, other {' and '.join(other)}" if same else "but all others"
    )


# --------------------------------------------------------------------------------------- images that two sets share


def by_content(table: ImageTable) -> dict[bytes, str]:
    """The name of each image that can be read, under its content hash."""
    values = [value.tobytes() for value in hash_images(table).values]
    return {value: key for value, key in zip(values, table.keys, strict=True) if value != UNREADABLE}


def shared_images(images: ImageTable, others: ImageTable, known: ImageTable | None = None) -> list[tuple[str, str]]:
    """The images that are among others too: the name of each here and there.

    Args:
        known: images that may be shared, such as the others' own test split, which may repeat photographs of their training
            split; None: none.
    """
    names, shared = by_content(others), []
    for key, value in zip(images.keys, hash_images(images).values, strict=True):
        if value.tobytes() in names:
            shared.append((key, value.tobytes()))
    left_out = by_content(known) if shared and known is not None else {}
    return [(key, names[value]) for key, value in shared if value not in left_out]


def refuse_known_images(dataset: LoadedDataset, test: ImageTable, where: str) -> None:
    """Refuses test images of another data set that this one trains on, or chooses the epoch by. Raises UserError: names one of
    them.

    Photographs that the data set's own test split shares with its other splits are accepted.
    """
    for kind, table in (("training", dataset.train), ("validation", dataset.val)):
        if table is not None and (shared := shared_images(test, table, dataset.test)):
            raise UserError(
                f"{where} holds {len(shared)} {kind} images of {dataset.name}{dataset.setting.suffix} among its test images "
                f"('{shared[0][0]}' is '{shared[0][1]}'): remove them from it, or give a data set of other images"
            )
