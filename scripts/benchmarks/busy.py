"""Stage 3 on idle and on shared cores, with threads that wait as PyTorch's do by itself and as ours do.

    python scripts/bench.py busy            # EfficientNet-Lite0 at 128 px, three other programs, 3 rounds

Each figure is a training loop in a process of its own; ways take turns. The other programs are as many
endless loops as ``--others`` says, so that the load is theirs and that of the run's threads.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys

from benchmarks import common
from semantic_aug import console
from semantic_aug.allocator import SPIN_VARIABLES, SPINS
from semantic_aug.cli import PlainParser, whole
from semantic_aug.registry import REPO_ROOT

LIBGOMP_SPINS = 300_000
"""What libgomp takes where nothing is set."""
WAYS = {"PyTorch's own": LIBGOMP_SPINS, "ours": SPINS}

STEPS = """
import sys, time
from semantic_aug import allocator
allocator.let_waiting_threads_sleep()
allocator.keep_freed_memory()
import timm, torch
torch.manual_seed(0)
name, side, batch, steps = sys.argv[1], *map(int, sys.argv[2:])
model = timm.create_model(name, num_classes=10).to(memory_format=torch.channels_last)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
images, labels = torch.randn(batch, 3, side, side), torch.randint(0, 10, (batch,))
images = images.to(memory_format=torch.channels_last)
def step():
    torch.nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()
    optimizer.zero_grad()
step()
began, used = time.perf_counter(), time.process_time()
for _ in range(steps):
    step()
print((time.perf_counter() - began) / steps, (time.process_time() - used) / steps)
"""


def time_steps(args: argparse.Namespace, spins: int) -> tuple[float, float]:
    """Wall-clock and processor seconds of a training step in a process of its own."""
    env = {name: value for name, value in os.environ.items() if name not in SPIN_VARIABLES}
    argv = [args.model, args.res_mode, args.batch_size, args.steps]
    done = subprocess.run(
        [sys.executable, "-c", STEPS, *map(str, argv)],
        cwd=REPO_ROOT,
        env={**env, "GOMP_SPINCOUNT": str(spins)},
        capture_output=True,
        text=True,
        check=True,
    )
    wall, processor = map(float, done.stdout.split())
    return wall, processor


def measure(args: argparse.Namespace, others: int) -> dict[str, list[tuple[float, float]]]:
    """The times of every way beside so many other programs, round by round."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(others)]
    try:
        rounds = [{way: time_steps(args, spins) for way, spins in WAYS.items()} for _ in range(args.rounds)]
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
    return {way: [times[way] for times in rounds] for way in WAYS}


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = PlainParser(prog="bench.py busy", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tf_efficientnet_lite0", help="timm's name (default: tf_efficientnet_lite0)")
    parser.add_argument("--res_mode", type=whole(16), default=128, help="side of the images in pixels (default: 128)")
    parser.add_argument("--batch_size", type=whole(1), default=32, help="images per step (default: 32)")
    parser.add_argument("--steps", type=whole(1), default=10, help="steps of each run (default: 10)")
    parser.add_argument("--rounds", type=whole(1), default=3, help="runs of each way (default: 3)")
    parser.add_argument("--others", type=whole(0), default=3, help="other programs that compute (default: 3)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Times both ways without and with other programs; prints and writes the table."""
    args = build_parser().parse_args(argv)
    console.set_up_logging()
    result = {others: measure(args, others) for others in (0, args.others)}
    median = {
        (others, way): statistics.median(wall for wall, _ in times)
        for others, ways in result.items()
        for way, times in ways.items()
    }
    idle = median[0, "PyTorch's own"]
    rows = [
        [
            way,
            others,
            f"{1000 * median[others, way]:.0f}",
            f"{1000 * statistics.median(used for _, used in result[others][way]):.0f}",
            f"{median[others, way] / idle:.2f}",
        ]
        for others in result
        for way in WAYS
    ]
    header = [
        f"{args.model}, {args.res_mode} px, batch {args.batch_size}",
        "other programs",
        "ms per step",
        "processor ms per step",
        "ratio to PyTorch's own, idle",
    ]
    common.publish("busy", header, rows, {"arguments": vars(args), "seconds": {str(k): v for k, v in result.items()}})
    return 0
