"""Reading data: cached pixels against decode-and-resize each time, and a list of a million rows.

    python scripts/bench.py data            # 400 JPEGs of 512 px to 224 px, batches of 64; a CSV of 1,000,000 rows

Both ways of reading use the same batches, the same number of threads and the same resampling, and run in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import common
from semantic_aug import console, registry
from semantic_aug.classify.data import ImageStore
from semantic_aug.cli import PlainParser, whole
from semantic_aug.datasets import cache
from semantic_aug.datasets.readers.folder import read_folder
from semantic_aug.seeding import numpy_rng

CLASSES = 4
OPEN_LIST = """
import json, sys, time
began = time.perf_counter()
from semantic_aug.datasets import load_dataset
imported = time.perf_counter()
found = load_dataset("csv:" + sys.argv[1])
done = time.perf_counter()
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
peak = int(status["VmHWM"].split()[0]) * 1024 / 1e6
rows = sum(len(part) for part in (found.train, found.val, found.test) if part is not None)
print(json.dumps({"import_s": imported - began, "open_s": done - imported, "peak_mb": peak, "rows": rows,
                  "cpu_s": time.process_time()}))
"""
"""Run in a process of its own. ``VmHWM`` is this program's peak; ``ru_maxrss`` would remember its parent's."""


def write_photographs(folder: Path, count: int, side: int) -> None:
    """JPEGs of quality 90 with the spectrum of photographs: amplitude falling as 1/frequency."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = 1
    for index in range(count):
        rng = numpy_rng(0, "photograph", index)
        planes = []
        for _ in range(3):
            phase = np.exp(2j * np.pi * rng.random(frequency.shape))
            plane = np.fft.irfft2(phase / frequency, s=(side, side))
            planes.append(128 + 48 * plane / plane.std())
        path = folder / f"class {index % CLASSES}" / f"{index:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.stack(planes, -1).clip(0, 255).astype(np.uint8)).save(path, quality=90)


def write_list(path: Path, rows: int) -> None:
    """A CSV of paths and labels, a tenth of each class for testing; its folders are links to one folder of a thousand files."""
    folder = path.with_name("images")
    folder.mkdir()
    for i in range(min(rows, 1000)):
        (folder / f"image_{i:03d}.jpg").touch()  # they must exist to open the list, and are not read
    for block in range(-(-rows // 1000)):
        path.with_name(f"block_{block:06d}").symlink_to(folder.name)
    with open(path, "w", encoding="utf-8") as out:
        out.write("path,label,split\n")
        for i in range(rows):
            label, split = f"class {i // 10 % 1000:04d}", "test" if i % 10 == 9 else "train"
            out.write(f"block_{i // 1000:06d}/image_{i % 1000:03d}.jpg,{label},{split}\n")


def one_epoch(store: ImageStore, batch: int, seed: int) -> float:
    """Images per second over all images in random order."""
    order = numpy_rng(seed, "order").permutation(store.count)
    began = time.perf_counter()
    for start in range(0, store.count, batch):
        store.batch(order[start : start + batch])
    return store.count / (time.perf_counter() - began)


def read_images(args: argparse.Namespace, scratch: Path) -> tuple[list[list[str]], dict]:
    """Rows of the table and the figures of the comparison."""
    write_photographs(scratch / "photographs", args.images, args.source)
    os.environ[cache.FOLDER_VARIABLE] = str(scratch / "cache")
    table = read_folder(scratch / "photographs")["train"]

    def store(mode: str) -> tuple[ImageStore, float]:
        began = time.perf_counter()
        created = ImageStore(
            table.image, len(table), args.side, 0, workers=args.workers, cache=mode, identity=table.signature()
        )
        return created, time.perf_counter() - began

    each_time, _ = store("off")
    cached, first = store("disk")
    again, second = store("disk")
    assert np.array_equal(each_time.batch(np.arange(4)), again.batch(np.arange(4))), "the two ways must agree"
    rates: dict[str, list[float]] = {"each_time": [], "cached": []}
    for repeat in range(args.repeat):
        rates["each_time"].append(one_epoch(each_time, args.batch, repeat))
        rates["cached"].append(one_epoch(cached, args.batch, repeat))
    slow, fast = (float(np.median(rates[name])) for name in ("each_time", "cached"))
    figures = {
        "rates": rates, "ratio": fast / slow, "build_s": first, "reopen_s": second, "threads": args.workers,
        "images": len(table), "source_px": args.source, "side_px": args.side, "batch": args.batch,
    }  # fmt: skip
    rows = [
        [f"decode and resize each time, {args.source} px JPEG to {args.side} px", f"{slow:,.0f} images/s", "1"],
        ["memory-mapped cache, its pages in memory", f"{fast:,.0f} images/s", f"{fast / slow:.1f}"],
        [f"building the cache, {len(table)} images", f"{first:.2f} s ({len(table) / first:,.0f} images/s)", ""],
        ["opening it again", f"{1000 * second:.1f} ms", ""],
    ]
    return rows, figures


def open_list(rows: int, scratch: Path) -> tuple[list[list[str]], dict]:
    """Opens a long CSV three times, each in a fresh process; the median time and the largest peak."""
    write_list(scratch / "list.csv", rows)
    result = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", OPEN_LIST, str(scratch / "list.csv")],
            cwd=registry.REPO_ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        result.append(json.loads(done.stdout))
    assert all(one["rows"] == rows for one in result)
    seconds, busy = (float(np.median([one[name] for one in result])) for name in ("open_s", "cpu_s"))
    peak = max(one["peak_mb"] for one in result)
    return [
        [f"opening a CSV of {rows:,} rows", f"{seconds:.2f} s", ""],
        ["CPU time of that process, importing included", f"{busy:.2f} s", ""],
        ["peak memory of that process, Python and all", f"{peak:.0f} MB", ""],
    ], {"runs": result, "open_s": seconds, "cpu_s": busy, "peak_mb": peak, "load_average": os.getloadavg()}


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = PlainParser(prog="bench.py data", description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=whole(8), default=400, help="JPEGs read (default: 400)")
    parser.add_argument("--source", type=whole(16), default=512, help="their side in pixels (default: 512)")
    parser.add_argument("--side", type=whole(8), default=224, help="side they are brought to (default: 224)")
    parser.add_argument("--batch", type=whole(1), default=64, help="images per batch (default: 64)")
    parser.add_argument("--repeat", type=whole(1), default=5, help="epochs of each way, in turns (default: 5)")
    parser.add_argument("--rows", type=whole(1000), default=1_000_000, help="rows of the CSV (default: 1,000,000)")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=whole(1), default=cores, help="decoding threads (default: one per core)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measures, prints the table, writes the JSON."""
    args = build_parser().parse_args(argv)
    console.quiet_libraries()
    with tempfile.TemporaryDirectory() as name:
        rows, images = read_images(args, Path(name))
        more, listing = open_list(args.rows, Path(name))
    common.publish("data", ["reading", "figure", "times"], rows + more, {"images": images, "list": listing})
    return 0
