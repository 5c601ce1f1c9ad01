"""Devices and memory of this machine: what ``--gpu`` and ``--gpu_ids`` name, and how much memory can still be had.

Free memory is what is available, as ``psutil`` has it (page cache can be given up), within the limits of the control
groups (containers, batch systems) this process is in, shared by the processes a launcher started on this machine.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from semantic_aug.errors import UserError

CPU = "cpu"
MEMBERSHIP, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")

_V2 = (("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file"))
_V1 = (("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))


def available_memory() -> int:
    """Bytes of main memory that this process may take without swapping or being killed for it."""
    import psutil

    room = min([psutil.virtual_memory().available, *cgroup_rooms()])
    return max(0, room) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def cgroup_rooms(membership: Path = MEMBERSHIP, mounts: Path = CGROUPS) -> Iterator[int]:
    """The bytes that each limited control group around this process still allows; page cache counts as free. Version 2 is
    mounted at ``mounts``, version 1 in its folder ``memory``."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            names, mount = _V2, mounts if (mounts / "cgroup.controllers").exists() else mounts / "unified"
        elif "memory" in controllers.split(","):
            names, mount = _V1, mounts / "memory"
        else:
            continue
        folder = mount / path.lstrip("/")
        # a container may see its own group as the root of the mount, under another path than the one listed
        for group in [folder, *folder.parents] if folder.is_dir() else [mount]:
            yield from _room(group, *names)
            if group == mount:
                break


def _room(group: Path, limits: Sequence[str], usage: str, reclaimable: Sequence[str]) -> Iterator[int]:
    try:
        bounds = [(group / name).read_text().strip() for name in limits if (group / name).exists()]
        bounds = [int(bound) for bound in bounds if bound != "max"]
        if bounds:
            cache = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            used = int((group / usage).read_text()) - sum(int(cache.get(name, 0)) for name in reclaimable)
            yield min(bounds) - max(0, used)
    except (OSError, ValueError):  # the root group has no limits; a file may be hidden from a container
        return


def gpu_count() -> int:
    """GPUs that PyTorch can use."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def launched() -> int:
    """The number of processes that a launcher started, on all machines; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def device_of(gpu: str | None) -> str:
    """The device that ``--gpu`` names: ``cpu`` or ``cuda:N``. Raises UserError: not a number or ``cpu``, a GPU that is not
    there, or one GPU for several processes."""
    if gpu == CPU:
        return CPU
    if launched() > 1 and gpu is not None:
        raise UserError(
            f"--gpu {gpu}: a launcher started {launched()} processes, which have a GPU each; leave --gpu out, or give "
            "--gpu cpu"
        )
    count = gpu_count()
    if gpu is None:
        return "cuda:0" if count else CPU
    if not gpu.isdecimal():
        raise UserError(f"--gpu {gpu}: expected a GPU number or the word cpu")
    if int(gpu) >= count:
        raise UserError(f"--gpu {gpu}: {_present(count)}; give --gpu cpu" + (" or another number" if count else ""))
    return f"cuda:{int(gpu)}"


def check_ids(gpu_ids: Sequence[str], each: str = "") -> None:
    """Refuses entries of ``--gpu_ids`` that are neither a number nor ``cpu``. Raises UserError: names the entry."""
    for word in gpu_ids:
        if word != CPU and not word.isdecimal():
            raise UserError(f"--gpu_ids {word}: expected GPU numbers or the word cpu{each}")


def processes_of(gpu_ids: Sequence[str] | None, cpu_threads: int) -> list[str]:
    """The devices of the processes that ``--gpu_ids`` asks for: ``0 0 1`` or ``cpu cpu``; None for one process per GPU, or per
    ``cpu_threads`` CPU cores. Raises UserError: neither a number nor ``cpu``, both kinds at once, or an absent GPU."""
    if gpu_ids and set(gpu_ids) == {CPU}:
        return list(gpu_ids)
    count = gpu_count()
    if not gpu_ids:
        if count:
            return [f"cuda:{i}" for i in range(count)]
        return [CPU] * max(1, len(os.sched_getaffinity(0)) // cpu_threads)
    check_ids(gpu_ids, ", one per process, e.g. 0 0 1 or cpu cpu")
    for word in gpu_ids:
        if word != CPU and int(word) >= count:
            raise UserError(f"--gpu_ids {word}: {_present(count)}; give other numbers, or cpu")
    if CPU in gpu_ids:
        raise UserError("--gpu_ids mixes GPUs and cpu: images would differ in their last bits; give one kind")
    return [f"cuda:{int(word)}" for word in gpu_ids]


def actors_of(gpu_ids: Sequence[str] | None) -> list[str]:
    """The actors of a Ray cluster that ``--gpu_ids`` asks for; the numbers only say which of them share a GPU: ``cpu cpu`` for
    two on CPUs, ``0 0 1 1`` for four with half a GPU each, None for a single CPU actor. Raises UserError: entries of both
    kinds, or other ones."""
    entries = list(gpu_ids or [CPU])
    if set(entries) == {CPU}:
        return entries
    if not all(word.isdecimal() for word in entries):
        raise UserError(f"--gpu_ids {' '.join(entries)}: expected GPU numbers, or the word cpu, one per actor")
    return [f"cuda:{word}" for word in entries]


def stand_in(device: str) -> str:
    """The device of this machine that stands for an actor's, whose number says only which actors share a GPU; the CPU where
    there is no GPU."""
    count = gpu_count()
    return f"cuda:{int(device.partition(':')[2]) % count}" if device != CPU and count else CPU


def _present(count: int) -> str:
    return "this machine has " + (f"GPUs 0 to {count - 1}" if count else "no GPU")
