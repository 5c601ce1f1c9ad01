"""Files as every stage writes them: whole or not at all, and locked against other processes.

Locks are the kernel's (``flock``): it frees them when their holder ends, however it ends. Shards of one run share a lock, and
a child process may inherit one; lock packages offer neither. File systems without locks (some network ones) are tolerated
with a warning.
"""

import contextlib
import csv
import errno
import fcntl
import filecmp
import fnmatch
import hashlib
import itertools
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from semantic_aug.errors import UserError

log = logging.getLogger(__name__)

LOCK_FILE = ".lock"
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
"""Error numbers of a file system that has no locks."""


def home_expanded(path: str | os.PathLike) -> Path:
    """A path with ``~`` and ``~USER`` at its start replaced by the home folder. Raises UserError: there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        home = Path(path).parts[0]
        raise UserError(
            f"{path}: no home folder is known for {home}: give the whole path, or ./{home} for a folder"
        ) from None


@contextmanager
def atomic_path(path: Path, flush: bool = True) -> Iterator[Path]:
    """A temporary name in the same folder, moved to ``path`` when the block ends well and removed when it does not.

    The content is flushed to disk before the move, so ``path`` never holds half a file, whatever is killed. ``flush=False``
    is for what can be made again, or is a link.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)  # left by a killed process of the same number
    try:
        yield temporary
        if flush:
            with open(temporary, "rb+") as written:
                os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def csv_writer(path: Path, keep_earlier: bool = False) -> Iterator[Any]:
    """A writer of the rows of a CSV file, which appears whole or not at all. With ``keep_earlier``, a file with another content
    is not replaced but renamed: to the first free of ``STEM-1``, ``STEM-2``, ..."""
    with atomic_path(path) as temporary:
        with open(temporary, "w", newline="", encoding="utf-8") as out:
            yield csv_rows(out)
        if keep_earlier and path.exists() and not filecmp.cmp(path, temporary, shallow=False):
            names = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(1))
            kept = next(name for name in names if not name.exists())
            path.rename(kept)
            log.info("the earlier %s is kept as %s", path.name, kept.name)


def csv_rows(out: IO[str]) -> Any:
    """A writer of CSV rows into an open text file."""
    return csv.writer(_LineFeeds(out), lineterminator="\r\n")


class _LineFeeds:
    """Ends each row of a CSV by a line feed alone, where the writer's rows end by both line breaks: it quotes a cell that holds
    a character of its line ending and, before Python 3.13, no other, and readers take either for the end of a row."""

    def __init__(self, out: IO[str]):
        self.out = out

    def write(self, row: str) -> None:
        self.out.write(row.removesuffix("\r\n") + "\n")


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """A JSON file's content, or None where there is no whole one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises OSError: it cannot be read; ValueError: it is no JSON, or another value."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}")
    return content


def check_space(folder: Path, needed: int, flag: str) -> None:
    """Refuses work that needs more bytes than the disk of a folder, which need not exist, has free. Raises UserError: says how
    many, and the flag to change."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"{folder} would need {size_text(needed)} of disk, {size_text(free)} are free: give another {flag}"
        )


class LockHeld(Exception):
    """Another process holds the lock of a file."""

    def __init__(self, path: Path):
        super().__init__(f"{path} is locked by another process")
        self.path = path

    def holder(self) -> str:
        """The process as it wrote itself into the file; one that took the lock this moment has yet to write so."""
        for _ in range(20):
            time.sleep(0.1)
            if text := self.path.read_text(encoding="utf-8", errors="replace").strip():
                return text
        return "another process"


@contextmanager
def locked(path: Path, shared: bool = False, wait: bool = True, waiting_for: str = "") -> Iterator[IO[str]]:
    """Holds the lock of a file.

    Args:
        path: of the lock file; it and its folder are made if absent, and it stays.
        shared: several processes may hold it at once, as long as none holds it alone.
        wait: until it is free; without, a lock held by another process is an error.
        waiting_for: logged once where waiting is necessary.

    Yields:
        The open lock file. A child process that inherits its descriptor holds the lock until it has ended too.

    Raises:
        LockHeld: another process holds it, and ``wait`` is False.
    """
    with contextlib.ExitStack() as held:
        while True:
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # another process removed the folder meanwhile
                handle = held.enter_context(open(path, "a+"))
                _take(handle, path, shared, wait, waiting_for)
                if os.path.samestat(os.fstat(handle.fileno()), os.stat(path)):
                    break
            held.close()  # of a removed file
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {socket.gethostname()}")
        handle.flush()
        yield handle


def _take(handle: IO[str], path: Path, shared: bool, wait: bool, waiting_for: str) -> None:
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            if not wait:
                raise LockHeld(path) from None
            if waiting_for:
                log.info("waiting for %s", waiting_for)
            fcntl.flock(handle, kind)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        log.warning("%s: no locks on this file system; let no other run write there", path.parent)


@contextmanager
def no_trace(folder: Path, disposable: Sequence[str]) -> Iterator[None]:
    """Leaves a folder as it was where the work in it fails before it has a result.

    A folder that was absent or empty loses what the work made, as long as all of it is disposable; of any other folder
    only new lock files go.

    Args:
        disposable: patterns of what the work writes before its first result, relative to the folder; a CSV that holds a
            header alone is disposable, too.
    """
    new_parents = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    before = set(os.listdir(folder)) if folder.exists() else set()
    try:
        yield
    except Exception:
        with contextlib.suppress(OSError, LockHeld):
            _restore(folder, before, disposable)
            for parent in new_parents:
                parent.rmdir()  # an error where anything else is in it
        raise


def _restore(folder: Path, before: set[str], disposable: Sequence[str]) -> None:
    fresh = all(name.startswith(".") for name in before)
    with locked(folder / LOCK_FILE, wait=False):  # another run that holds it works in the folder: everything stays
        new = [folder / name for name in os.listdir(folder) if name not in before]
        if fresh and all(_is_disposable(path, folder, disposable) for path in new):
            for path in new:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        elif not fresh:
            for path in new:
                if path.name.startswith(LOCK_FILE):
                    path.unlink()


def _is_disposable(path: Path, folder: Path, patterns: Sequence[str]) -> bool:
    name = path.relative_to(folder).as_posix()
    if path.name.startswith(LOCK_FILE) or any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
        return True
    if path.is_dir() and not path.is_symlink():
        return all(_is_disposable(inner, folder, patterns) for inner in path.iterdir())
    if path.suffix == ".csv":
        with open(path, encoding="utf-8") as lines:
            return sum(1 for _ in itertools.islice(lines, 2)) < 2
    return False


def size_text(size: int) -> str:
    """A number of bytes in GB, to three digits."""
    return f"{size / 1e9:.3g} GB"


def is_full(error: OSError) -> bool:
    """Whether a disk, a quota or a limit on file sizes is exhausted."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    with open(path, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def sha256_text(text: str) -> str:
    """SHA-256 of a text, hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()
