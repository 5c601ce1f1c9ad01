"""What the benchmarks share: the machine in words, repeated timing, a table, a JSON."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from semantic_aug import files, registry, runs
from semantic_aug.datasets import ImageTable

OUTPUT = registry.REPO_ROOT / "outputs" / "bench"
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "4090": 165.0, "3090": 71.0}
"""Dense half-precision peaks by a word of the GPU's name."""


def machine() -> dict:
    """CPU model and cores, GPU where there is one, memory, versions."""
    import torch

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "cpu": cpu, "cores": len(os.sched_getaffinity(0)), "memory_gib": round(memory, 1), "gpu": gpu,
        "versions": runs.versions(), "git_revision": runs.git_revision(registry.REPO_ROOT),
    }  # fmt: skip


def describe(info: dict) -> str:
    """The machine in one line."""
    return f"{info['gpu'] or '{cores} cores of {cpu}'.format(**info)}, torch {info['versions']['torch']}"


def first_images(table: ImageTable, count: int) -> ImageTable:
    """At most ``count`` images (0: all), drawn with a fixed seed."""
    return table.take(np.random.default_rng(0).permutation(len(table))[:count]) if 0 < count < len(table) else table


def share_of_peak(tflops: float | None, gpu: str | None) -> str:
    """TFLOP/s as a share of the GPU's half-precision peak; "-" where one of them is unknown."""
    peak = next((value for name, value in PEAK_TFLOPS.items() if gpu and name in gpu), None)
    return f"{100 * tflops / peak:.0f} %" if tflops and peak else "-"


def timed(call: Callable[[], object], repeat: int = 3, warmup: int = 1) -> float:
    """Median wall-clock seconds of a call; the caller synchronises its device."""
    for _ in range(warmup):
        call()
    seconds = []
    for _ in range(repeat):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def calls_of(step: Callable[[], object]) -> int:
    """How often a step calls upon the device in eager mode; calls that only look at a tensor in another way are not counted."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, call, types, arguments=(), keywords=None):
            results = call._schema.returns
            self.count += not any(r.alias_info is not None and not r.alias_info.is_write for r in results)
            return call(*arguments, **(keywords or {}))

    with Counter() as counter:
        step()
    return counter.count


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def publish(name: str, header: Sequence[str], rows: Sequence[Sequence[object]], details: dict) -> Path:
    """Prints the table and the machine, and writes everything to ``outputs/bench/{name}.json``."""
    info = machine()
    print(f"\n{table(header, rows)}\n\n{describe(info)}")
    path = OUTPUT / f"{name}.json"
    files.write_json(path, {"machine": info, "header": list(header), "rows": [list(row) for row in rows], **details})
    print(f"written: {registry.shown_path(path)}")
    return path
