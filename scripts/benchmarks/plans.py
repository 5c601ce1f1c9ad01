"""Plans at scale: planning, finding what is missing, and ``meta.csv``, in time and memory.

python scripts/bench.py plans                            # 0.1, 1 and 10 million tasks; the last needs some 12 GB of disk
python scripts/bench.py plans --sizes 100000 1000000

Finding what is missing looks at real folders with a file per task (hard links to a few small files, so that ten million
need no more than their directory entries). Each size runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import common
from semantic_aug import cli, meta_csv
from semantic_aug.augmentations.strategies import find
from semantic_aug.sampling import folder as store
from semantic_aug.sampling.files import TaskPaths
from semantic_aug.sampling.folder import RECORD, Records
from semantic_aug.sampling.plan import UNIFORM_STRENGTHS, PlanSettings, make_plan

CLASSES, MULTIPLIER, BATCH = 200, 5, 32
LINKS_PER_FILE = 30_000
"""Hard links made to one file; file systems allow some 65,000."""

GONE_EVERY = 1000
"""One file in so many is deleted, so that there is something to find."""


def plan_of_size(tasks: int) -> TaskPaths:
    """A Diff-Mix plan of so many tasks over 200 classes and the names of its files."""
    images = tasks // MULTIPLIER
    labels, keys = np.arange(images) % CLASSES, [f"class_{i % CLASSES}/{i:08d}.jpg" for i in range(images)]
    options = {"strengths": UNIFORM_STRENGTHS, "multiplier": MULTIPLIER, "batch_size": BATCH, "seed": 0}
    plan = make_plan(labels, keys, CLASSES, PlanSettings(strategy=find("diff-mix"), **options))
    names = [f"class {i}" for i in range(CLASSES)]
    return TaskPaths(plan, names, meta_csv.slugs(names), keys, 0)


def write_files(folder: Path, paths: TaskPaths) -> None:
    """A file and a record for every task but one in a thousand; the records know all of them."""
    content, total = b"x" * 64, len(paths.plan)
    for name in paths.folders:
        (folder / store.DATA / name).mkdir(parents=True)
    link = None
    for number in range(total):
        if number % LINKS_PER_FILE == 0:
            link = folder / f".link-{number}"
            link.write_bytes(content)
        if number % GONE_EVERY:
            os.link(link, folder / store.DATA / paths.relative(number))
    rows = np.zeros(total, RECORD)
    rows["number"], rows["size"] = np.arange(total), len(content)
    Records(folder).path.write_bytes(rows.tobytes())


def peak_memory() -> float:
    """Peak resident memory of this process in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(tasks: int, folder: Path, make_files: bool, pipe) -> None:
    """Body of a measuring process: what is not measured (writing the files) is done by another."""
    if make_files:
        write_files(folder, plan_of_size(tasks))
        pipe.send({})
        return
    at_start, began = peak_memory(), time.perf_counter()
    paths = plan_of_size(tasks)
    planned = time.perf_counter() - began
    began = time.perf_counter()
    done = store.finished_tasks(folder, paths, Records(folder), np.ones(tasks, bool))
    result = time.perf_counter() - began
    assert int((~done).sum()) == -(-tasks // GONE_EVERY), "what is missing was not found"
    began = time.perf_counter()
    rows = store.write_meta(folder, paths, done)
    written = time.perf_counter() - began
    assert rows == int(done.sum())
    pipe.send(
        {"tasks": tasks, "plan_s": planned, "missing_s": result, "meta_s": written, "peak_mb": peak_memory(),
         "imports_mb": at_start}
    )  # fmt: skip


def in_a_process(*arguments) -> dict:
    """Runs :func:`measure` in a fresh process and returns what it sends."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=measure, args=(*arguments, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        process.join()


def main(argv: list[str] | None = None) -> int:
    """Measures every size; prints and writes the table."""
    parser = cli.PlainParser(prog="bench.py plans", description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=cli.whole(1), nargs="+", default=[100_000, 1_000_000, 10_000_000], help="tasks")
    parser.add_argument("--place", type=Path, default=None, help="folder for the files (default: the temporary one)")
    args = parser.parse_args(argv)
    result = []
    for tasks in args.sizes:
        folder = Path(tempfile.mkdtemp(prefix="plans-", dir=args.place))
        try:
            in_a_process(tasks, folder, True)
            result.append(in_a_process(tasks, folder, False))
        finally:
            shutil.rmtree(folder)
        print(result[-1], flush=True)
    rows = [
        [
            f"{row['tasks']:,}",
            *(f"{row[name]:.1f}" for name in ("plan_s", "missing_s", "meta_s")),
            f"{row['peak_mb']:.0f}",
        ]
        for row in result
    ]
    header = ["tasks", "plan, s", "find what is missing, s", "meta.csv, s", "peak memory, MB"]
    common.publish("plans", header, rows, {"sizes": result})
    return 0
