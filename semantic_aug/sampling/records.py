"""The append-only list of finished files."""

from __future__ import annotations

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

    @staticmethod
    def read_all(folder: Path) -> np.ndarray:
        """Every complete row of every shard's list."""
        parts = []
        for path in sorted(folder.glob("records*.bin")):
            content = path.read_bytes()
            parts.append(np.frombuffer(content[: len(content) - len(content) % RECORD.itemsize], RECORD))
        return np.concatenate(parts) if parts else np.empty(0, RECORD)

    @staticmethod
    def latest(folder: Path, total: int) -> tuple[np.ndarray, np.ndarray]:
        """The last word on each task: size ``(total,)`` uint32 (0: not finished) and CRC-32 ``(total,)`` uint32."""
        size, crc = np.zeros(total, np.uint32), np.zeros(total, np.uint32)
        rows = Records.read_all(folder)
        rows = rows[(rows["number"] >= 0) & (rows["number"] < total)]
        size[rows["number"]], crc[rows["number"]] = rows["size"], rows["crc"]  # of equal numbers the last one stays
        return size, crc
