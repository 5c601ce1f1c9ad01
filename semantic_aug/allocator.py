"""Settings of a computing process: freed memory is kept for the next step, and threads do not spin for long."""

import ctypes
import os
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


SPINS = 10_000
"""Turns that a thread of OpenMP waits for its next work before it sleeps, some tens of microseconds; libgomp takes 300,000."""
SPIN_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def let_waiting_threads_sleep() -> None:
    """Keeps OpenMP's threads from burning the cores they share; to be called before torch is imported.

    PyTorch computes on the CPU with a team of threads that meet after each kernel. By default those that are there first
    spin for about a millisecond. Where other programs want the same cores, they so take the time slices that the last one
    needs, and a step takes many times longer (``scripts/bench.py busy``). Nothing changes where the user has set one of
    :data:`SPIN_VARIABLES`.
    """
    if not any(os.environ.get(name) for name in SPIN_VARIABLES):
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)


def prepare_process() -> None:
    """Both settings, for a process that is to train on the CPU; to be called before torch is imported."""
    let_waiting_threads_sleep()
    keep_freed_memory()
