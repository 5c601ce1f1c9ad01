"""A synthetic subset's folder, which only ever grows.

    data/{source}/{target}-{number:06d}-{s}.png    images; each appears whole (temporary name, then rename)
    records*.bin                                   number, size and CRC-32 of every finished file, appended by the launcher
    meta.csv                                       written from the plan and the records when a run ends
    config.yaml                                    what the subset is made from; claimed by the first run
    .lock*                                         held while a run writes; the kernel frees it when the run dies

A restart does what is in the plan and not in a record whose file is there with the recorded size. A file without a
record (the run was killed between the two) is taken over if its content proves right.
"""

from __future__ import annotations

import errno
import fcntl
import io
import os
import socket
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from semantic_aug import meta_csv
from semantic_aug.errors import UserError
from semantic_aug.run_dir import git_revision, versions, write_text
from semantic_aug.sampling.plan import Plan

DATA = "data"
CONFIG_FILE = "config.yaml"
RECORD = np.dtype([("number", "<i8"), ("size", "<u4"), ("crc", "<u4")])
PNG_LEVEL = 4
TEMPORARY_SUFFIX = ".part"


class TaskPaths:
    """File names of a plan's tasks.

    Args:
        plan: of the subset.
        class_names: source spelling, for ``meta.csv``.
        folders: slug of each class.
        keys: name of each training image.
        seed: the run's ``--seed``.
    """

    def __init__(self, plan: Plan, class_names: Sequence[str], folders: Sequence[str], keys: Sequence[str], seed: int):
        self.plan, self.class_names, self.folders, self.keys, self.seed = plan, class_names, folders, keys, seed

    def relative(self, number: int) -> str:
        """A task's path relative to ``data/``."""
        plan = self.plan
        return meta_csv.relative_path(
            self.folders[plan.source_class[number]], self.folders[plan.target[number]], number, plan.strength(number)
        )

    def source_key(self, number: int) -> str:
        """The name of a task's source image; empty when it starts from noise."""
        row = self.plan.source[number]
        return self.keys[row] if row >= 0 else ""

    def text(self, number: int) -> dict[str, str]:
        """What is written into the PNG's text chunks."""
        plan = self.plan
        return {
            "source": self.class_names[plan.source_class[number]],
            "target": self.class_names[plan.target[number]],
            "source_image": self.source_key(number),
            "strength": meta_csv.strength_text(plan.strength(number)),
            "seed": str(self.seed),
            "number": str(number),
            "plan": plan.digest,
        }

    def meta_row(self, number: int) -> tuple:
        """A row of ``meta.csv``."""
        plan = self.plan
        return (
            self.class_names[plan.source_class[number]],
            self.class_names[plan.target[number]],
            number,
            meta_csv.strength_text(plan.strength(number)),
            self.relative(number),
            self.source_key(number),
            self.seed,
        )


def encode_png(pixels: np.ndarray, text: dict[str, str]) -> bytes:
    """A uint8 ``(H, W, 3)`` image as PNG with text chunks; the same input gives the same bytes."""
    info = PngInfo()
    for key, value in text.items():
        info.add_itxt(key, value)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", compress_level=PNG_LEVEL, pnginfo=info)
    return out.getvalue()


def write_image(path: Path, content: bytes) -> tuple[int, int]:
    """Writes a file whole or not at all; returns its size and CRC-32."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        with open(temporary, "wb") as out:
            out.write(content)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return len(content), zlib.crc32(content)


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


class RunLock:
    """Keeps a second run out of a folder; freed by the kernel when its holder ends, however it ends."""

    def __init__(self, folder: Path, num_shards: int = 1, shard_index: int = 0):
        self.path = folder / (".lock" if num_shards == 1 else f".lock-{shard_index}of{num_shards}")
        self.handle = None

    def __enter__(self) -> RunLock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.handle = open(self.path, "a+")  # noqa: SIM115 - held open for as long as the lock is
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            self.handle.seek(0)
            holder = self.handle.read().strip() or "another process"
            self.handle.close()
            raise UserError(
                f"{self.path.parent} is being written by another run ({holder}): wait for it, stop it, or choose "
                "another --output_root"
            ) from None
        self.handle.truncate(0)
        self.handle.write(f"process {os.getpid()} on {socket.gethostname()}")
        self.handle.flush()
        return self

    def __exit__(self, *_) -> None:
        self.handle.truncate(0)
        self.handle.close()


def finished(
    folder: Path, paths: TaskPaths, only: np.ndarray | None = None
) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
    """Which tasks are done: the records checked against the files, and files without a record checked by content.

    Args:
        folder: of the subset.
        paths: names of the plan's tasks.
        only: bool ``(T,)``, tasks whose stray files may be removed or taken over (those of this shard); None for all.

    Returns:
        bool ``(T,)``, and the rows of files taken over, to be recorded.
    """
    total = len(paths.plan)
    size, found = np.zeros(total, np.uint32), np.zeros(total, bool)
    records = Records.read_all(folder)
    records = records[(records["number"] >= 0) & (records["number"] < total)]
    size[records["number"]] = records["size"]
    adopted = []
    for source in set(paths.folders):
        where = folder / DATA / source
        for entry in _entries(where):
            number = _number_of(entry.name)
            mine = number is not None and number < total and paths.relative(number) == f"{source}/{entry.name}"
            if mine and size[number] and entry.stat().st_size == size[number]:
                found[number] = True
            elif mine and (only is None or only[number]):
                row = _verified(Path(entry.path), number, paths)
                if row:
                    found[number] = True
                    adopted.append(row)
                else:
                    os.unlink(entry.path)
            elif not mine and entry.name.endswith(TEMPORARY_SUFFIX) and only is None:
                os.unlink(entry.path)
    return found, adopted


def _entries(folder: Path) -> Iterator[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except FileNotFoundError:
        return


def _number_of(name: str) -> int | None:
    parts = name.rsplit("-", 2)
    return int(parts[1]) if len(parts) == 3 and parts[1].isdecimal() and not name.startswith(".") else None


def _verified(path: Path, number: int, paths: TaskPaths) -> tuple[int, int, int] | None:
    """The record row of a file that decodes and says it is this very task of this very plan."""
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            if {k: image.text.get(k) for k in paths.text(number)} != paths.text(number):
                return None
    except (OSError, SyntaxError, ValueError, AttributeError):
        return None
    return number, len(content), zlib.crc32(content)


def write_meta(folder: Path, paths: TaskPaths, done: np.ndarray) -> int:
    """Writes ``meta.csv`` with a row for every finished task, by number; returns the number of rows."""
    numbers: Iterable[int] = (int(n) for n in np.flatnonzero(done))
    return meta_csv.write(folder / meta_csv.FILE_NAME, (paths.meta_row(n) for n in numbers))


def manifest(identity: dict, repo: Path) -> dict:
    """What ``config.yaml`` holds: the identity of the subset, and what it was made with."""
    return {**identity, "made_with": {"versions": versions(), "git_revision": git_revision(repo)}}


def claim_subset(folder: Path, identity: dict, repo: Path) -> bool:
    """Takes the folder for this subset, or finds that it already is this subset.

    Args:
        folder: of the subset.
        identity: everything that decides what the files contain.
        repo: root of the checkout, for the git revision.

    Returns:
        True when the subset was begun before.

    Raises:
        UserError: the folder holds a subset made otherwise (lists what differs), or other files.
    """
    from semantic_aug.run_dir import arguments_text, differences, load_arguments, plain

    old = load_arguments(folder, CONFIG_FILE)
    if old is None:
        others = [p.name for p in folder.iterdir() if not p.name.startswith(".")] if folder.exists() else []
        if others:
            raise UserError(
                f"{folder} is not empty ('{sorted(others)[0]}') and holds no {CONFIG_FILE}: nothing was touched; "
                "choose another --output_root"
            )
        write_text(folder / CONFIG_FILE, arguments_text(manifest(identity, repo)))
        return False
    made_with = old.pop("made_with", {})
    changed = differences(_flat(old), _flat(plain(identity)))
    if changed:
        raise UserError(
            f"{folder} holds a subset made otherwise ({'; '.join(changed[:6])}{'; ...' if len(changed) > 6 else ''}): "
            "nothing was touched; choose another --output_root, or remove the folder"
        )
    mixed = differences(made_with.get("versions", {}), versions())
    if mixed:
        from logging import getLogger

        getLogger(__name__).warning(
            "%s was begun with other versions (%s): new files may differ in their last bits", folder, "; ".join(mixed)
        )
    return True


def _flat(nested: dict, prefix: str = "") -> dict:
    out = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            out.update(_flat(value, f"{prefix}{key}."))
        else:
            out[f"{prefix}{key}"] = value
    return out
