"""The lock that keeps two runs from writing one folder."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from semantic_aug.errors import UserError
from semantic_aug.files import LOCK_FILE, LockHeld, locked


@contextlib.contextmanager
def lock_folder(folder: Path, flag: str, num_shards: int = 1, shard_index: int = 0) -> Iterator[None]:
    """Keeps a second run out of a folder: a whole run holds ``.lock`` alone, shards share it and each holds a lock of its own.
    Raises UserError: another run holds it."""
    sharded = num_shards > 1
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(folder / LOCK_FILE, shared=sharded, wait=False))
            if sharded:
                held.enter_context(locked(folder / f"{LOCK_FILE}-{shard_index}of{num_shards}", wait=False))
        except LockHeld as other:
            raise UserError(
                f"{folder} is being written by another run ({other.holder()}): wait for it, stop it, or choose another {flag}"
            ) from None
        yield


RunLock = lock_folder
"""Its name in scripts outside the package."""
