"""A GPU in ten minutes: the three stages beside the original's way, and stage 2's kernels.

    python scripts/bench.py gpu                     # every part that fits the time
    python scripts/bench.py gpu --parts stage-1     # more of them, added to the figures that exist
    python scripts/bench.py gpu --rehearse          # the same parts in small on the CPU, before a GPU is paid for

Stages 1 and 2 run a network of Stable Diffusion 1.5's size with random weights (no hub is needed). Each part's figures are
kept in ``outputs/bench/gpu.json`` as soon as it ends; the last line printed is the card's row of the table in docs/speed.md.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import common
from semantic_aug import cli, console, files
from semantic_aug.errors import UserError, unknown

BENCH = Path(__file__).resolve().parents[1] / "bench.py"


@dataclass(frozen=True)
class Part:
    """One benchmark of the whole.

    Attributes:
        benchmark: module of this folder.
        arguments: its arguments on a GPU.
        rehearsal: its arguments in small on the CPU.
        seconds: that it takes on a fast card; it is not begun with less time left.
    """

    benchmark: str
    arguments: str
    rehearsal: str
    seconds: int


_FINETUNE = "--resolution 224 --pairs 1 --rounds 3 --steps 40 --warmup 6"
_FINETUNE_SMALL = "--pairs 1 --rounds 1 --steps 1 --warmup 1 --batch_size 2 --images 2"
_CLASSIFY = "--compile --cache auto device --workers 16 --port_epochs 1 --synthetic 100 --batch_size 32"
_CLASSIFY_SMALL = (
    "--epochs 1 --images 8 --synthetic 4 --batch_size 4 --workers 1 --res_mode 32 --model tf_efficientnet_lite0 "
    "--cache auto device"
)
PARTS = {
    "stage-2": Part(
        "sampling",
        "--images 8 --processes 1 --ours_factor 64 --batch_size 64",
        "--images 2 --processes 1 --ours_factor 4 --batch_size 2 --compile off",
        120,
    ),
    "stage-3-resnet50": Part(
        "classify", f"--model resnet50 --res_mode 448 --epochs 10 {_CLASSIFY}", _CLASSIFY_SMALL, 90
    ),
    "kernels": Part("kernels", "--batch_size 64", "--batch_size 1 --steps 2", 60),
    "stage-1-graph": Part("finetune", f"{_FINETUNE} --cuda_graph --compile off", _FINETUNE_SMALL, 80),
    "stage-1": Part("finetune", _FINETUNE, _FINETUNE_SMALL, 150),
    "stage-3-vit": Part("classify", f"--model vit_b_16 --res_mode 384 --epochs 3 {_CLASSIFY}", _CLASSIFY_SMALL, 60),
    "stage-1-compiled-graph": Part("finetune", f"{_FINETUNE} --cuda_graph --compile on", _FINETUNE_SMALL, 90),
}
"""The parts in order of worth, for the time may end before all of them are done."""
WITHOUT_BASE, WITHOUT_DATASET = ("classify",), ("kernels",)


def arguments_of(part: Part, args: argparse.Namespace, base: str) -> list[str]:
    """The arguments of a part's benchmark."""
    argv = shlex.split(part.rehearsal if args.rehearse else part.arguments)
    argv += ["--device", "cpu" if args.rehearse else "cuda"]
    argv += [] if part.benchmark in WITHOUT_BASE else ["--base", base]
    return argv + ([] if part.benchmark in WITHOUT_DATASET else ["--dataset", args.dataset])


def run_part(part: Part, arguments: list[str], folder: Path, limit: float) -> str | None:
    """Runs a part for at most ``limit`` seconds; returns why it has no figures, or None."""
    (folder / f"{part.benchmark}.json").unlink(missing_ok=True)
    argv = [sys.executable, str(BENCH), "--output", str(folder), part.benchmark, *arguments]
    process = subprocess.Popen(argv, start_new_session=True)
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        return f"ended after {limit:.0f} s, with the time of --minutes"
    finally:
        if process.poll() is None:  # the processes it started are in its session
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return f"exit status {status}: see its messages above" if status else None


def card_row(card: str, figures: Mapping[str, Any]) -> str:
    """The card's row of the table in docs/speed.md."""
    machine, parts = figures["machine"], figures["parts"]

    def show(name: str, text) -> str:
        return text(parts[name]) if name in parts else "-"

    def steps(result: Mapping[str, Any]) -> str:
        rates = sorted(result["sides"]["ours"]["rates"])
        return f"{rates[len(rates) // 2]:.3g} ({result['ratio']:.2f})"

    def whole(result: Mapping[str, Any]) -> str:
        return f"{result['ours']['images_per_second']:.0f} ({result['ratio_to_best']:.2f})"

    def sampled(result: Mapping[str, Any]) -> str:
        rate = result["ours"]["images_per_second"]
        return f"{rate:.3g} ({result['ratio_to_best']:.2f})" if rate else "too few batches"

    cells = [
        card,
        show("stage-2", sampled),
        show("stage-1", steps),
        show("stage-1-graph", steps),
        show("stage-1-compiled-graph", steps),
        show("stage-3-resnet50", whole),
        show("stage-3-vit", whole),
        f"{datetime.date.today()}, {(machine['git_revision'] or '')[:7]}, torch {machine['versions']['torch']}",
    ]
    return "| " + " | ".join(cells) + " |"


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = cli.PlainParser(prog="bench.py gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), help=f"default: {' '.join(PARTS)}")
    parser.add_argument("--minutes", type=cli.number(0, open_low=True), default=10, help="for all parts (default: 10)")
    parser.add_argument("--dataset", default="elpv", help="whose images are read, e.g. folder:PATH (default: elpv)")
    parser.add_argument(
        "--base", default=None, help="base model (default: one of SD 1.5's size; --rehearse: the embedded one)"
    )
    parser.add_argument("--rehearse", action="store_true", help="the same parts in small on the CPU")
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuses what cannot work, before any long work."""
    import torch

    from semantic_aug.datasets import Setting, load_dataset

    for name in args.parts:
        if name not in PARTS:
            raise unknown("part", name, PARTS, "--parts takes several of them")
    if not args.rehearse and not torch.cuda.is_available():
        raise UserError(
            "this machine has no GPU that PyTorch can use; --rehearse runs the same parts in small on the CPU"
        )
    load_dataset(args.dataset, Setting())


def main(argv: list[str] | None = None) -> int:
    """Runs the parts one after the other; prints and keeps their figures. Returns 1 where a part failed."""
    args = build_parser().parse_args(argv)
    console.set_up_logging()
    check(args)
    end = time.monotonic() + 60 * args.minutes
    folder = common.OUTPUT / ("gpu-rehearsal" if args.rehearse else "gpu")
    path = folder.with_suffix(".json")
    folder.mkdir(parents=True, exist_ok=True)
    figures = figures_so_far(path)
    base, failed = args.base or base_for(args.rehearse, folder), False
    for name in args.parts:
        part, began, left = PARTS[name], time.monotonic(), end - time.monotonic()
        arguments = arguments_of(part, args, base)
        print(f"\n{name}: bench.py {part.benchmark} {shlex.join(arguments)}", flush=True)
        if left < (0 if args.rehearse else part.seconds):
            missing = "not begun: --minutes leaves too little time"
        else:
            missing = run_part(part, arguments, folder / name, left)
            failed |= missing is not None
        if missing:
            print(f"{name}: {missing}")
        else:
            result = files.read_json(folder / name / f"{part.benchmark}.json")
            figures["parts"][name] = {**result, "seconds": round(time.monotonic() - began, 1)}
        files.write_json(path, figures)
    print(f"\n{card_row('rehearsal' if args.rehearse else figures['machine']['gpu'], figures)}")
    return int(failed)


def figures_so_far(path: Path) -> dict[str, Any]:
    """The figures that exist of this machine and version."""
    figures, machine = (files.read_json(path) if path.exists() else None) or {}, common.machine()
    same = figures.get("machine") == machine
    return {"machine": machine, "parts": figures["parts"] if same else {}}


def base_for(rehearse: bool, folder: Path) -> str:
    """The base model of stages 1 and 2: the embedded one, or a folder with one of SD 1.5's size, made once."""
    from semantic_aug.diffusion.base import EMBEDDED_MODEL

    if rehearse:
        return EMBEDDED_MODEL
    from benchmarks.sampling import SD15, build_sd15

    if not (folder / SD15 / "model_index.json").exists():
        import torch

        build_sd15(folder / SD15, 512)
        torch.cuda.empty_cache()  # the parts want all of the card
    return str(folder / SD15)
