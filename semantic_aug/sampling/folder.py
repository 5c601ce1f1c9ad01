"""A synthetic subset's folder, which only ever grows.

    data/{source}/{target}-{number:06d}-{s}.png    images; each appears whole (temporary name, then rename)
    records*.bin                                   number, size and CRC-32 of every finished file, appended by the launcher
    meta.csv                                       written from the plan and the records when a run ends
    config.yaml                                    the subset's identity; written by the first run
    status.json                                    progress of the run, for other tools
    .lock*                                         held while a run writes; the kernel frees it when the run ends
    .moments                                       encoded sources, until the subset is complete
    .sources.npz                                   names and content hashes of the training images, to find changed ones

A restart makes the tasks of the plan without a record, or whose file does not exist with the recorded size. A file without a
record (the run was killed between the two) is kept if its content is right.
"""

import contextlib
import io
import itertools
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from semantic_aug import meta_csv
from semantic_aug.datasets.synthetic import CONFIG_FILE, DATA
from semantic_aug.datasets.table import LOOK_UP_THREADS, in_threads
from semantic_aug.files import locked
from semantic_aug.runs import load_arguments
from semantic_aug.sampling.files import TEMPORARY_SUFFIXES, TaskPaths, is_whole, text_of
from semantic_aug.sampling.plan import rows_by_class

MOMENTS = ".moments"
REMEDY = "nothing was touched; choose another --output_root, or remove the folder"

RECORD = np.dtype([("number", "<i8"), ("size", "<u4"), ("crc", "<u4")])
"""A task's number, its file's size in bytes (0: the file was missing or damaged) and CRC-32."""


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
        """Appends what has changed on disk, so that this list has the latest records of this run's tasks, ``mine``, bool
        ``(T,)``; ``size`` ``(T,)`` is 0 for each file that is not right."""
        changed = np.zeros(len(mine), bool)
        for known_size, known_crc in (_last_rows([self.path], len(mine)), self.latest(self.path.parent, len(mine))):
            changed |= mine & ((known_size != size) | ((known_crc != crc) & (size > 0)))
        self.append([(int(n), int(size[n]), int(crc[n])) for n in np.flatnonzero(changed)])
        if self.path.exists():
            os.utime(self.path)

    @staticmethod
    def latest(folder: Path, total: int) -> tuple[np.ndarray, np.ndarray]:
        """The latest record of each task: size ``(total,)`` uint32 (0: not finished) and CRC-32 ``(total,)`` uint32.

        Shards of one run have different tasks. A list of another ``--num_shards`` may have the same ones: then the list that
        was written last is right, since each run updates its own list before it begins.
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
    """Finds the finished tasks: compares records with files, and checks the content of files without a record.

    Of this run's tasks, damaged files are removed, right files without a record are recorded, and records of missing files
    are cancelled.

    Args:
        records: of this run; is updated.
        mine: bool ``(T,)``, this run's tasks; nothing is changed for others.
        content: compare checksums too (reads every file), not only sizes.

    Returns:
        bool ``(T,)``.
    """
    size, crc = Records.latest(folder, len(paths.plan))
    done = np.zeros(len(paths.plan), bool)
    tasks_of = rows_by_class(paths.plan.source_class, len(paths.folders))

    def scan(source: int) -> list[tuple[Path, int | None]]:
        """Marks the right files of a source class's folder; returns the others, each with the number of its task if any."""
        number_of = dict(zip(paths.file_names(tasks_of[source]), tasks_of[source].tolist(), strict=True))
        right, others = [], []
        for entry, file_size in _files(folder / DATA / paths.folders[source]):
            number = number_of.get(entry.name)
            if (
                number is not None
                and file_size == size[number] > 0
                and not (content and zlib.crc32(Path(entry.path).read_bytes()) != crc[number])
            ):
                right.append(number)
            else:
                others.append((Path(entry.path), number))
        done[right] = True
        return others

    for path, number in itertools.chain.from_iterable(in_threads(scan, range(len(tasks_of)), LOOK_UP_THREADS)):
        if number is None:
            if path.name.endswith(TEMPORARY_SUFFIXES) and mine.all():
                path.unlink()
        elif mine[number]:
            # with a record of another size or checksum it is not what was written, even where it still decodes
            row = None if size[number] else _verified(path, number, paths)
            if row:
                done[number] = True
                size[number], crc[number] = row
            else:
                path.unlink()
    records.update(mine, np.where(done, size, 0), crc)
    return done


def _files(folder: Path) -> Iterator[tuple[os.DirEntry, int]]:
    """Every file of a folder with its size in bytes; none where there is no folder."""
    try:
        entries = os.scandir(folder)
    except FileNotFoundError:
        return
    with entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # renamed or removed meanwhile, by another shard
                yield entry, entry.stat().st_size


def _verified(path: Path, number: int, paths: TaskPaths) -> tuple[int, int] | None:
    """Size and CRC-32 of a file that decodes and whose metadata names this task of this plan; None for another file."""
    try:
        content = path.read_bytes()
        if not is_whole(content):
            return None
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            text, written = paths.text(number), text_of(image)
        return (len(content), zlib.crc32(content)) if {k: written.get(k) for k in text} == text else None
    except Exception:  # of whatever kind a damaged file provokes
        return None


def write_meta(folder: Path, paths: TaskPaths, done: np.ndarray) -> int:
    """Writes ``meta.csv`` with a row for every finished task, by number; returns the number of rows. Tasks that other shards
    have recorded meanwhile are added to ``done``, bool ``(T,)``."""
    with locked(folder / ".lock-meta"):  # of two shards that end together, the later one lists the rows of both
        done |= Records.latest(folder, len(done))[0] > 0
        return meta_csv.write(folder / meta_csv.FILE_NAME, paths.meta_rows(np.flatnonzero(done)), paths.further_columns)


def recorded_identity(folder: Path) -> dict | None:
    """The record of a subset's folder, or None where there is none yet."""
    return load_arguments(folder, CONFIG_FILE)


def has_images(folder: Path) -> bool:
    """Whether a subset's folder holds any image, recorded or not."""
    recorded = any(path.stat().st_size for path in folder.glob("records*.bin"))
    return recorded or any(path.is_file() for path in (folder / DATA).glob("*/*"))
