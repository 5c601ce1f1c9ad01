"""How the C library's allocator treats big tensors: freed memory is kept for the next step."""

from __future__ import annotations

import ctypes
import sys

# glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Asks glibc to keep freed memory in the process instead of handing it back after each tensor.

    By default every tensor above some 32 MB is mapped afresh, and each step of a training on the CPU spends a tenth to a
    quarter of its time in page faults. The process then holds the most it ever needed until it ends, so this is for
    processes that compute, not for those that plan. Where the C library is another one, nothing changes.

    Returns:
        Whether the allocator took the settings.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
