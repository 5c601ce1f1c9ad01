"""Mistakes a user can correct, and how an entry script reports them.

A :class:`UserError` is one line: the value received, what was expected, and the flag or file to change. Entry scripts
wrap their ``main`` in :func:`run_main`, which prints that line on standard error and exits with status 2. The traceback
appears only with ``DIFFMIX_DEBUG=1``.
"""

import contextlib
import contextvars
import ctypes
import difflib
import errno
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE}


class UserError(Exception):
    """A wrong key, path, flag, file, image, class name or version, said in one line."""

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).split()))


class WouldDownload(Exception):
    """A dry run has come to what a run would download; the text says what."""


_downloads = contextvars.ContextVar("downloads", default=True)


def downloads_allowed() -> bool:
    """Whether missing models and data may be downloaded; False in a dry run."""
    return _downloads.get()


@contextlib.contextmanager
def no_downloads(dry_run: bool) -> Iterator[None]:
    """A context in which nothing is downloaded, where ``dry_run`` is set."""
    token = _downloads.set(not dry_run)
    try:
        yield
    finally:
        _downloads.reset(token)


def all_local(*steps: Callable[[], Any]) -> list[Any]:
    """The results of all steps. Raises WouldDownload: some of them would download; names what, after all were tried."""
    results, missing = [], []
    for step in steps:
        try:
            results.append(step())
        except WouldDownload as error:
            missing.append(str(error))
    if missing:
        raise WouldDownload(" and ".join(missing))
    return results


class Interrupted(Exception):
    """Work was stopped by a signal after everything finished so far was made safe; the text says how to resume."""


_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|ALLOC_FAILED")


@contextlib.contextmanager
def memory_advice(advice: str) -> Iterator[None]:
    """A context in which running out of memory, a GPU's or the machine's, is a user's mistake. Raises UserError: it ran out;
    gives ``advice``, what to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        reason = str(error) or type(error).__name__
        if not isinstance(error, MemoryError) and not _NO_MEMORY.search(reason):
            raise
        raise UserError(f"out of memory ({reason[:120]}): {advice}") from error


@contextlib.contextmanager
def signals_to(handler: Callable[..., Any], *kinds: int) -> Iterator[None]:
    """A context in which a handler takes some signals (none named: those of an interruption)."""
    former = {kind: signal.signal(kind, handler) for kind in kinds or (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for kind, before in former.items():
            signal.signal(kind, before)


def end_with_parent(kind: int) -> None:
    """Asks the kernel (Linux) to send this process a signal when its parent ends, however that happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, kind)  # 1: PR_SET_PDEATHSIG


def nearest_first(value: str, known: Iterable[str]) -> list[str]:
    """``known`` in order of likeness to ``value``, the nearest first."""
    known = list(dict.fromkeys(str(k) for k in known))
    folded = value.casefold()
    return sorted(known, key=lambda k: (-difflib.SequenceMatcher(None, folded, k.casefold()).ratio(), k))


def unknown(kind: str, value: str, known: Iterable[str], where: str, limit: int = 12) -> UserError:
    """The error for a key that is not there: lists the known ones, the nearest first, and says what to edit."""
    ranked = nearest_first(value, known)
    if not ranked:
        return UserError(f"unknown {kind} '{value}': none is known yet; {where}")
    shown = ", ".join(ranked[:limit]) + (f", ... ({len(ranked)} in all)" if len(ranked) > limit else "")
    return UserError(f"unknown {kind} '{value}': did you mean '{ranked[0]}'? known: {shown}; {where}")


def os_error_line(error: OSError) -> str:
    """An operating-system error as one line that names the file; after one of the disk the same command can resume."""
    reason = " ".join(str(error.strerror or error).split())[:300] or type(error).__name__
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    where = f" ({', '.join(names)})" if names else ""
    if error.errno in DISK_ERRORS:
        return f"{reason}{where}; nothing finished so far is lost, the same command resumes from there"
    return f"{reason}{where}"


def tolerate_encodings() -> None:
    """Lets the terminal's encoding show what it can, and the rest as escapes; text is never a reason to fail."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def run_main(main: Callable[[list[str] | None], int | None], argv: list[str] | None = None) -> int:
    """Runs an entry script's ``main`` and turns its outcome into an exit status. Returns 0 on success, 2 after a
    :class:`UserError` or an operating-system error, 130 after an interruption."""
    tolerate_encodings()
    try:
        return int(main(argv) or 0)
    except WouldDownload as what:
        sys.stdout.write(f"a run would download {what}; what depends on that was not checked\n")
        return 0
    except BrokenPipeError:  # the reader of our output (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except (UserError, OSError, UnicodeEncodeError, Interrupted, KeyboardInterrupt) as error:
        line, status = _outcome(error)
        if os.environ.get("DIFFMIX_DEBUG", "") not in ("", "0"):
            traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.write(line + "\n")
    return status


def _outcome(error: BaseException) -> tuple[str, int]:
    if isinstance(error, UserError):
        return f"error: {error}", EXIT_USER_ERROR
    if isinstance(error, OSError):
        return f"error: {os_error_line(error)}", EXIT_USER_ERROR
    if isinstance(error, UnicodeEncodeError):  # libraries take paths of UTF-8 alone
        text = error.object[max(0, error.start - 200) : error.end + 100]
        shown = " ".join(text.encode(errors="surrogateescape").decode(errors="backslashreplace").split())
        return f"error: '{shown}' is not UTF-8 text: rename the file or folder", EXIT_USER_ERROR
    if isinstance(error, Interrupted):
        return str(error), EXIT_INTERRUPTED
    return "interrupted; the same command resumes from what is on disk", EXIT_INTERRUPTED
