"""A synthetic subset's folder, which only ever grows.

    data/{source}/{target}-{number:06d}-{s}.png    images; each appears whole (temporary name, then rename)
    records*.bin                                   number, size and CRC-32 of every finished file, appended by the launcher
    meta.csv                                       written from the plan and the records when a run ends
    config.yaml                                    what the subset is made from; claimed by the first run
    status.json                                    how far a run is, for other tools
    .lock*                                         held while a run writes; the kernel frees it when the run dies
    .moments                                       encoded sources, until the subset is complete
    .sources.npz                                   names and content hashes of the training images, to tell which changed

A restart does what is in the plan and not in a record whose file is there with the recorded size. A file without a
record (the run was killed between the two) is taken over if its content proves right.
"""

import io
import itertools
import logging
import multiprocessing
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from semantic_aug import meta_csv
from semantic_aug.datasets.synthetic import CONFIG_FILE, DATA
from semantic_aug.files import locked
from semantic_aug.runs import load_arguments
from semantic_aug.sampling.files import TEMPORARY_SUFFIX, TaskPaths, is_whole, text_of
from semantic_aug.sampling.plan import rows_by_class

log = logging.getLogger(__name__)

MOMENTS = ".moments"
MANY_TASKS = 500_000
"""From so many tasks on, several processes look for what is missing."""

REMEDY = "nothing was touched; choose another --output_root, or remove the folder"

RECORD = np.dtype([("number", "<i8"), ("size", "<u4"), ("crc", "<u4")])
"""A task's number, its file's size in bytes (0: the file was found missing or damaged) and CRC-32."""


# ------------------------------------------------------------------------------------------------- records


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
        """Brings this list up to date with what is on disk, and makes it the last word on this run's tasks, ``mine``, bool
        ``(T,)``; ``size`` ``(T,)`` is 0 of each file that is not right."""
        changed = np.zeros(len(mine), bool)
        for known_size, known_crc in (_last_rows([self.path], len(mine)), self.latest(self.path.parent, len(mine))):
            changed |= mine & ((known_size != size) | ((known_crc != crc) & (size > 0)))
        self.append([(int(n), int(size[n]), int(crc[n])) for n in np.flatnonzero(changed)])
        if self.path.exists():
            os.utime(self.path)

    @staticmethod
    def latest(folder: Path, total: int) -> tuple[np.ndarray, np.ndarray]:
        """The last word on each task: size ``(total,)`` uint32 (0: not finished) and CRC-32 ``(total,)`` uint32.

        Shards of one run have tasks of their own. A list of another ``--num_shards`` may name the same ones: then the list
        that was written last is right, since each run brings its own up to date before it begins.
        """
        last_written = lambda path: (path.stat().st_mtime_ns, path.name)  # noqa: E731
        return _last_rows(sorted(folder.glob("records*.bin"), key=last_written), total)


def _last_rows(paths: Sequence[Path], total: int) -> tuple[np.ndarray, np.ndarray]:
    size, crc = np.zeros(total, np.uint32), np.zeros(total, np.uint32)
    for path in paths:
        content = path.read_bytes() if path.exists() else b""
        rows = np.frombuffer(content[: len(content) - len(content) % RECORD.itemsize], RECORD)
        rows = rows[(rows["number"] >= 0) & (rows["number"] < total)]
        size[rows["number"]], crc[rows["number"]] = rows["size"], rows["crc"]  # of equal numbers the last one stays
    return size, crc


# ------------------------------------------------------------------------------------- finished tasks


def finished_tasks(
    folder: Path, paths: TaskPaths, records: Records, mine: np.ndarray, content: bool = False
) -> np.ndarray:
    """Which tasks are done: the records checked against the files, and files without a record checked by content.

    Of this run's tasks, what proves damaged is removed, what proves right without a record is recorded, and what is
    recorded but gone is struck out.

    Args:
        records: of this run; gets what changed.
        mine: bool ``(T,)``, this run's tasks; files of others are only looked at.
        content: compare checksums too (reads every file), not only sizes.

    Returns:
        bool ``(T,)``.
    """
    size, crc = Records.latest(folder, len(paths.plan))
    done = np.zeros(len(paths.plan), bool)
    for scan in _scans(_Scanner(folder / DATA, paths, size, crc if content else None)):
        right = scan.right
        for name in scan.unknown:
            if name.endswith(TEMPORARY_SUFFIX) and mine.all():
                os.unlink(scan.folder / name)
        for name, position in scan.wrong:
            number = int(scan.numbers[position])
            if not mine[number]:
                continue
            # with a record of another size or checksum it is not what was written, even where it still decodes
            row = None if size[number] else _verified(scan.folder / name, number, paths)
            if row:
                right[position] = True
                _, size[number], crc[number] = row
            else:
                os.unlink(scan.folder / name)
        done[scan.numbers] = right
    records.update(mine, np.where(done, size, 0), crc)
    return done


@dataclass
class _Scan:
    """What a folder of the subset holds: ``right`` bool, one per task of ``numbers``; names of other files; and names
    and positions in ``numbers`` of tasks' files that are not what the records say."""

    folder: Path
    numbers: np.ndarray
    right: np.ndarray
    unknown: list[str]
    wrong: list[tuple[str, int]]


@dataclass
class _Scanner:
    """Compares folders with the records and changes nothing; ``crc`` is None where sizes are enough."""

    data: Path
    paths: TaskPaths
    size: np.ndarray
    crc: np.ndarray | None

    def __call__(self, source: str, numbers: np.ndarray) -> _Scan:
        position_of = dict(zip(self.paths.file_names(numbers), range(len(numbers)), strict=True))
        expected, right = self.size[numbers].tolist(), bytearray(len(numbers))
        scan = _Scan(self.data / source, numbers, np.frombuffer(right, bool), [], [])
        for name, file_size in _files(scan.folder):
            position = position_of.get(name)
            if position is None:
                scan.unknown.append(name)
            elif file_size == expected[position] > 0 and (
                self.crc is None or zlib.crc32((scan.folder / name).read_bytes()) == self.crc[numbers[position]]
            ):
                right[position] = True
            else:
                scan.wrong.append((name, position))
        return scan


def _scans(scanner: _Scanner) -> Iterator[_Scan]:
    """The scan of every source class's folder; a big subset's by several processes."""
    names = scanner.paths.folders
    folders = zip(names, rows_by_class(scanner.paths.plan.source_class, len(names)), strict=True)
    if len(scanner.size) < MANY_TASKS or "fork" not in multiprocessing.get_all_start_methods():
        yield from itertools.starmap(scanner, folders)
        return
    # forked, they share the plan's memory; nothing of a plan's process has threads yet
    context = multiprocessing.get_context("fork")
    with context.Pool(os.cpu_count(), _keep_scanner, (scanner,)) as pool:
        yield from pool.imap_unordered(_scan_in_process, folders)


def _keep_scanner(scanner: _Scanner) -> None:
    global _scanner
    _scanner = scanner


def _scan_in_process(folder_with_tasks: tuple[str, np.ndarray]) -> _Scan:
    return _scanner(*folder_with_tasks)


def _files(folder: Path) -> Iterator[tuple[str, int]]:
    """Name and size in bytes of every file of a folder; none where there is no folder."""
    try:
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return
    try:
        for name in os.listdir(opened):
            try:
                size = os.stat(name, dir_fd=opened).st_size  # by the open folder: no path to walk
            except FileNotFoundError:  # renamed or removed meanwhile, by another shard
                continue
            yield name, size
    finally:
        os.close(opened)


def _verified(path: Path, number: int, paths: TaskPaths) -> tuple[int, int, int] | None:
    """The record row of a file that decodes and says it is this very task of this very plan."""
    try:
        content = path.read_bytes()
        if not is_whole(content):
            return None
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            written = text_of(image)
            if {k: written.get(k) for k in paths.text(number)} != paths.text(number):
                return None
    except (OSError, SyntaxError, ValueError, AttributeError):
        return None
    return number, len(content), zlib.crc32(content)


def write_meta(folder: Path, paths: TaskPaths, done: np.ndarray) -> int:
    """Writes ``meta.csv`` with a row for every finished task, by number; returns the number of rows. Tasks that other shards
    have recorded meanwhile are added to ``done``, bool ``(T,)``."""
    with locked(folder / ".lock-meta"):  # of two shards that end together, the later one lists the rows of both
        done |= Records.latest(folder, len(done))[0] > 0
        return meta_csv.write(folder / meta_csv.FILE_NAME, paths.meta_rows(np.flatnonzero(done)), paths.further_columns)


def recorded_identity(folder: Path) -> dict | None:
    """What a subset's folder says it is made from, or None where there is none yet."""
    return load_arguments(folder, CONFIG_FILE)


def has_images(folder: Path) -> bool:
    """Whether a subset's folder holds any image, recorded or not."""
    recorded = any(path.stat().st_size for path in folder.glob("records*.bin"))
    return recorded or any(path.is_file() for path in (folder / DATA).glob("*/*"))


def remove_stale_moments(folder: Path, names: Sequence[str]) -> None:
    """Removes encoded sources other than the blocks ``names``, which alone this subset can use, and what dead processes left
    half written; no run is at work in the folder."""
    for name in set(os.listdir(folder / MOMENTS) if (folder / MOMENTS).is_dir() else ()) - set(names):
        (folder / MOMENTS / name).unlink(missing_ok=True)
