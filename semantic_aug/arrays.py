"""Arrays in files that are mapped into memory, with their space on the disk reserved before they are.

A sparse file would be mapped on a full disk too, and writing to it would then end the process with a bus error.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np

_BLOCK = 1 << 20


def create_array(path: Path, dtype: type, shape: tuple[int, ...]) -> np.memmap:
    """A new ``.npy`` file of zeros, mapped for writing.

    Raises:
        OSError: the disk, a quota or a limit on file sizes does not hold it; nothing is left behind.
    """
    try:
        array = np.lib.format.open_memmap(path, "w+", dtype, shape)
        with open(path, "rb+") as file:
            _reserve(file.fileno(), array.offset, os.fstat(file.fileno()).st_size)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None
    return array


def open_array(path: Path, dtype: type, shape: tuple[int, ...] | None = None) -> np.memmap | None:
    """A ``.npy`` file mapped for reading, or None where it is absent, cut off, or not what is expected.

    Args:
        path: of the file.
        dtype: expected type.
        shape: expected shape; None: any.
    """
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return array if array.dtype == dtype and shape in (None, array.shape) else None


def size_text(size: int) -> str:
    """A number of bytes in GB, to three digits."""
    return f"{size / 1e9:.3g} GB"


def is_full(error: OSError) -> bool:
    """Whether it says that a disk, a quota or a limit on file sizes is exhausted."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _reserve(file: int, start: int, end: int) -> None:
    try:
        os.posix_fallocate(file, 0, end)
    except (AttributeError, OSError) as error:
        # macOS has no such call, some file systems refuse it: zeros take the space just as well
        if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        for place in range(start, end, _BLOCK):
            os.pwrite(file, bytes(min(_BLOCK, end - place)), place)
        os.fsync(file)
