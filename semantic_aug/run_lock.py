"""The lock that keeps two runs from writing one folder."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from pathlib import Path

from semantic_aug.errors import UserError

log = logging.getLogger(__name__)

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
"""What a file system says that has no locks (some network ones)."""


def holder_of(handle) -> str:
    """Who holds a lock, as written in its file; who took it this moment has yet to write so."""
    for _ in range(20):
        time.sleep(0.1)
        handle.seek(0)
        if holder := handle.read().strip():
            return holder
    return "another process"


class RunLock:
    """Keeps a second run out of a folder; freed by the kernel when its holder ends, however it ends.

    A whole run holds ``.lock`` alone. Shards share it, and each holds a lock of its own.

    Args:
        folder: made if absent.
        flag: the flag that names another folder, for the error.
        num_shards: of the run.
        shard_index: of this one.

    Raises:
        UserError: on entering, when another run holds it.
    """

    def __init__(self, folder: Path, flag: str, num_shards: int = 1, shard_index: int = 0):
        self.folder, self.flag = folder, flag
        self.shard = None if num_shards == 1 else f".lock-{shard_index}of{num_shards}"
        self.held: list = []

    def __enter__(self) -> RunLock:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._take(self.folder / ".lock", fcntl.LOCK_EX if self.shard is None else fcntl.LOCK_SH)
            if self.shard is not None:
                self._take(self.folder / self.shard, fcntl.LOCK_EX)
        except UserError:
            self.__exit__()
            raise
        return self

    def _take(self, path: Path, kind: int) -> None:
        handle = open(path, "a+")  # noqa: SIM115 - held open for as long as the lock is
        self.held.append(handle)
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCKS:
                log.warning("%s: no locks on this file system; let no other run write there", self.folder)
                return
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise UserError(
                f"{self.folder} is being written by another run ({holder_of(handle)}): wait for it, stop it, or choose "
                f"another {self.flag}"
            ) from None
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {socket.gethostname()}")
        handle.flush()

    def __exit__(self, *_) -> None:
        for handle in self.held:
            handle.close()
        self.held = []
