"""The append-only list of finished files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

RECORD = np.dtype([("number", "<i8"), ("size", "<u4"), ("crc", "<u4")])
"""A task's number, its file's size in bytes (0: the file was found missing or damaged) and CRC-32."""


class Records:
    """The append-only list of finished files of one shard (or of the only run)."""

    def __init__(self, folder: Path, num_shards: int = 1, shard_index: int = 0):
        name = "records.bin" if num_shards == 1 else f"records-{shard_index}of{num_shards}.bin"
        self.path = folder / name

    def append(self, rows: Sequence[tuple[int, int, int]]) -> None:
        """Adds (number, size, crc) rows in one write."""
        if not rows:
            return
        with open(self.path, "ab") as out:
            torn = out.tell() % RECORD.itemsize
            if torn:  # a kill in the middle of a write left part of a row
                out.truncate(out.tell() - torn)
            out.write(np.array(rows, RECORD).tobytes())

    def update(self, mine: np.ndarray, size: np.ndarray, crc: np.ndarray) -> None:
        """Brings this list up to date with what is on disk, and makes it the last word on its tasks.

        Args:
            mine: bool ``(T,)``, this run's tasks.
            size: ``(T,)`` bytes of each file that is right, 0 of the others.
            crc: ``(T,)``.
        """
        changed = np.zeros(len(mine), bool)
        for known_size, known_crc in (_last_rows([self.path], len(mine)), self.latest(self.path.parent, len(mine))):
            changed |= mine & ((known_size != size) | ((known_crc != crc) & (size > 0)))
        self.append([(int(n), int(size[n]), int(crc[n])) for n in np.flatnonzero(changed)])
        if self.path.exists():
            os.utime(self.path)

    @staticmethod
    def read_all(folder: Path) -> np.ndarray:
        """Every complete row of every list: the lists in the order in which they were last written."""
        return _rows(sorted(folder.glob("records*.bin"), key=_last_written))

    @staticmethod
    def latest(folder: Path, total: int) -> tuple[np.ndarray, np.ndarray]:
        """The last word on each task: size ``(total,)`` uint32 (0: not finished) and CRC-32 ``(total,)`` uint32.

        Shards of one run have tasks of their own. A list of another ``--num_shards`` may name the same ones: then the list
        that was written last is right, since each run brings its own up to date before it begins.
        """
        return _last_rows(sorted(folder.glob("records*.bin"), key=_last_written), total)


def _last_written(path: Path) -> tuple[int, str]:
    return path.stat().st_mtime_ns, path.name


def _rows(paths: Sequence[Path]) -> np.ndarray:
    parts = [np.empty(0, RECORD)]
    for path in paths:
        content = path.read_bytes() if path.exists() else b""
        parts.append(np.frombuffer(content[: len(content) - len(content) % RECORD.itemsize], RECORD))
    return np.concatenate(parts)


def _last_rows(paths: Sequence[Path], total: int) -> tuple[np.ndarray, np.ndarray]:
    size, crc = np.zeros(total, np.uint32), np.zeros(total, np.uint32)
    rows = _rows(paths)
    rows = rows[(rows["number"] >= 0) & (rows["number"] < total)]
    size[rows["number"]], crc[rows["number"]] = rows["size"], rows["crc"]  # of equal numbers the last one stays
    return size, crc
