"""The lock that keeps two runs from writing one folder."""

from __future__ import annotations

import contextlib
from pathlib import Path

from semantic_aug.errors import UserError
from semantic_aug.files import LOCK_FILE, LockHeld, locked


class RunLock(contextlib.ExitStack):
    """Keeps a second run out of a folder.

    A whole run holds ``.lock`` alone. Shards share it, and each holds a lock of its own.

    Raises:
        UserError: on entering, when another run holds it.
    """

    def __init__(self, folder: Path, flag: str, num_shards: int = 1, shard_index: int = 0):
        super().__init__()
        self.folder, self.flag = folder, flag
        self.shard = None if num_shards == 1 else f"{LOCK_FILE}-{shard_index}of{num_shards}"

    def __enter__(self) -> RunLock:
        try:
            self.enter_context(locked(self.folder / LOCK_FILE, shared=self.shard is not None, wait=False))
            if self.shard is not None:
                self.enter_context(locked(self.folder / self.shard, wait=False))
        except LockHeld as held:
            self.close()
            raise UserError(
                f"{self.folder} is being written by another run ({held.holder()}): wait for it, stop it, or choose another "
                f"{self.flag}"
            ) from None
        return self
