"""Images decoded and resized once: a memory-mapped uint8 array, shared by every process and by later runs.

A file's name is the hash of what it was made from: names, sizes and times of all images, the side, the resampling. A
changed image means another name, so what is found is never stale. One process builds, under a lock; the others wait and map
the same pages. The file appears whole or not at all. Least recently used files go when the bound is reached; a
process that still maps one keeps it until it ends.

Everything lies below ``outputs/cache`` of the repository, or ``DIFFMIX_CACHE``; ``DIFFMIX_CACHE_GB`` is the bound.
Features that the evaluation keeps there (``features-*.npy``), hashes of images (``hashes-*.npy``) and the teachers of soft
labels (``teachers/*``, folders with a lock) count as well, and go by the same rule; a folder whose lock is held stays.
"""

import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from semantic_aug import registry
from semantic_aug.datasets.table import in_threads
from semantic_aug.errors import UserError
from semantic_aug.files import LOCK_FILE, locked, sha256_text, size_text
from semantic_aug.tensors import create_array, open_array

log = logging.getLogger(__name__)

MODES = ("auto", "ram", "disk", "off")
"""Values of ``--cache``.

``ram``: decoded at the start into this process's memory. ``disk``: into the cache's folder. ``off``: each time anew.
``auto``: ``ram`` for what takes seconds to decode, ``disk`` for more, and what does not fit there goes to ``ram`` or ``off``.
"""
FOLDER_VARIABLE, BOUND_VARIABLE = "DIFFMIX_CACHE", "DIFFMIX_CACHE_GB"
DEFAULT_BOUND_GB = 64.0
FREE_SHARE = 0.8
"""Share of the disk's free space the cache may take."""
SMALL_BYTES = 256 << 20
PATTERNS = ("pixels-*.npy", "features-*.npy", "hashes-*.npy", "teachers/*")
"""Contents of the folder; all count towards the bound and are removed by the same rule."""
REMOVED = ".removed"
"""Ends the name of a folder that is being removed."""
VERSION = 3
"""Counts changes of the format or of the decoding; part of every name."""

Decode = Callable[[int], np.ndarray]
"""From an index to one image, uint8 ``(side, side, 3)``."""


def cache_folder() -> Path:
    """``DIFFMIX_CACHE``, or ``outputs/cache`` of the repository."""
    return registry.resolve_path(os.environ.get(FOLDER_VARIABLE) or "outputs/cache")


def cache_bound() -> int:
    """Bytes the cache may take in all: ``DIFFMIX_CACHE_GB``. Raises UserError: not a number."""
    text = os.environ.get(BOUND_VARIABLE) or str(DEFAULT_BOUND_GB)
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise UserError(f"{BOUND_VARIABLE}={text}: expected the cache's bound in GB, a number of at least 0")
    return int(value * 1e9)


def open_pixels(
    decode: Decode,
    count: int,
    side: int,
    identity: str | None,
    mode: str = "auto",
    memory: int = 0,
    workers: int | None = None,
) -> np.ndarray | None:
    """Decoded images by index, from wherever the mode and the room allow.

    Args:
        decode: makes one image; called from several threads.
        side: pixels S.
        identity: says what the images are and how they are made (a table's ``signature()``, the resampling); None keeps
            them off the disk.
        mode: one of :data:`MODES`.
        memory: bytes that may be held in this process's memory.
        workers: decoding threads.

    Returns:
        uint8 ``(N, S, S, 3)``, or None where images are to be decoded each time. From disk it is read-only.

    Raises:
        UserError: an unknown mode, an image that cannot be decoded, or no room for a mode that was asked for by name.
    """
    if mode not in MODES:
        raise UserError(f"--cache {mode}: expected one of {', '.join(MODES)}")
    need = count * side * side * 3
    if mode == "off" or count == 0:
        return None
    small = need <= min(SMALL_BYTES, memory)
    if identity is not None and (mode == "disk" or (mode == "auto" and not small)):
        try:
            return _from_disk(decode, (count, side, side, 3), identity, workers)
        except NoRoom as error:
            if mode == "disk":
                raise UserError(
                    f"--cache disk: {error}; free some, set {FOLDER_VARIABLE} to another disk, raise {BOUND_VARIABLE}, "
                    "or give --cache off"
                ) from None
            log.info("images are not cached on disk: %s", error)
    if mode == "ram" or (mode == "auto" and need <= memory):
        if mode == "ram" and need > memory:
            raise UserError(
                f"--cache ram: {count} images of {side} px take {size_text(need)}, {size_text(memory)} are free; "
                "give --cache disk"
            )
        pixels = np.empty((count, side, side, 3), np.uint8)
        _fill(pixels, decode, workers)
        return pixels
    return None


class NoRoom(Exception):
    """The disk or the bound has too little room."""


def _fill(pixels: np.ndarray, decode: Decode, workers: int | None) -> None:
    def keep(index: int) -> None:
        pixels[index] = decode(index)

    options = {"desc": "decoding", "unit": "image", "leave": False, "disable": None, "dynamic_ncols": True}
    for _ in tqdm(in_threads(keep, range(len(pixels)), workers), total=len(pixels), **options):
        pass


def _from_disk(decode: Decode, shape: tuple[int, ...], identity: str, workers: int | None) -> np.ndarray | None:
    folder = cache_folder()
    path = folder / f"pixels-{sha256_text(f'{VERSION} {identity} {shape}')[:32]}.npy"
    pixels = _map(path, shape)
    if pixels is not None:
        return pixels
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(path.with_suffix(".lock"), waiting_for="another process that is decoding the same images"):
            pixels = _map(path, shape)  # another process may have built it meanwhile
            return pixels if pixels is not None else _build(path, decode, shape, workers)
    except OSError as error:
        raise NoRoom(f"{folder} cannot be written to ({error.strerror or error})") from None


def _map(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The file's array where it exists and is whole; its time is set, for the order in which files go."""
    pixels = open_array(path, np.uint8, shape)
    if pixels is None:
        return None
    with contextlib.suppress(OSError):  # a folder shared read-only, or a file that is removed just now
        os.utime(path)
    return np.asarray(pixels)


def _build(path: Path, decode: Decode, shape: tuple[int, ...], workers: int | None) -> np.ndarray | None:
    part = path.with_suffix(".part")  # this process holds the lock, so an existing file was left by a killed one
    part.unlink(missing_ok=True)
    size = int(np.prod(shape))
    make_room(path.parent, size)
    try:
        pixels = create_array(part, np.uint8, shape)
        _fill(pixels, decode, workers)
        pixels.flush()
        del pixels
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return _map(path, shape)


def make_room(folder: Path, size: int) -> None:
    """Removes the least recently used entries until ``size`` bytes fit. Raises NoRoom: they do not fit even then."""
    entries = sorted(
        entry for pattern in PATTERNS for path in folder.glob(pattern) if (entry := _entry(path)) is not None
    )
    held, bound = sum(entry[1] for entry in entries), cache_bound()
    free = int(shutil.disk_usage(folder).free * FREE_SHARE)
    if size > bound or size > free + held:
        raise NoRoom(f"{size_text(size)} of decoded images, {size_text(min(bound, free + held))} allowed in {folder}")
    for _, length, path in entries:
        if held + size <= bound and size <= free:
            return
        if _removed(path):
            log.info("removed %s from the cache: the least recently used", path.name)
            held, free = held - length, free + length
    if held + size > bound or size > free:
        raise NoRoom(f"{size_text(held)} of {folder} are in use")


def _entry(path: Path) -> tuple[int, int, Path] | None:
    """The time of the last use of a file or a folder, its bytes and its path; None where another process is removing it."""
    with contextlib.suppress(OSError):
        if not path.is_dir():
            status = path.stat()
            return status.st_mtime_ns, status.st_size, path
        used = path / LOCK_FILE  # written by whoever uses the folder
        time = (used if used.exists() else path).stat().st_mtime_ns
        return time, sum(file.stat().st_size for file in path.rglob("*") if file.is_file()), path
    return None


def _removed(path: Path) -> bool:
    """Whether a file or a folder could be removed; not a folder that a process uses."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return True
    doomed = path.with_name(f"{path.name.removesuffix(REMOVED)}{REMOVED}")
    with contextlib.suppress(OSError), open(path / LOCK_FILE, "a+") as lock:
        # raises OSError where another process holds it, and on a file system without locks
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(lock.fileno()), os.stat(path / LOCK_FILE)):
            return False  # another process has just made the folder again
        path.rename(doomed)  # a process that waits for the lock makes the folder again
        shutil.rmtree(doomed)
        return True
    return False
