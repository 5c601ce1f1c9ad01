"""Stage 1 against a faithful port of the original's loop, in one run: same batches, same random numbers, alternating rounds.

python scripts/bench.py finetune                                   # embedded base at 128 px, CPU
python scripts/bench.py finetune --base sd15-random --device cuda  # an SD-1.5-sized network at 224 px, no hub needed

Each side lives in a process of its own, so that its peak memory is its own; while one trains, the other waits. How fast a
process is depends on where its memory happens to lie (by a tenth and more on a CPU), so there are several pairs of them.

Where nothing is compiled or recorded, the calls of one more step are counted: a GPU is often as fast as its kernels can be
launched.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks import common
from benchmarks.sampling import SD15, build_sd15
from semantic_aug import allocator, cli, console
from semantic_aug.datasets import load_dataset
from semantic_aug.diffusion.base import EMBEDDED_MODEL, find_base, read_geometry
from semantic_aug.finetune.config import STRATEGIES, FinetuneConfig, parse
from semantic_aug.finetune.run import resolve

PORT, OURS = "the original's way", "ours"


def settings_of(args: argparse.Namespace, base: Path, folder: Path) -> FinetuneConfig:
    """The request both sides train, as stage 1 resolves it."""
    flags = {
        "dataset": args.dataset,
        "pretrained_model_name_or_path": base,
        "finetune_strategy": args.finetune_strategy,
        "output_dir": folder,
        "max_train_steps": args.rounds * args.steps + args.warmup + 1,  # the last one to count its calls
        "resolution": args.resolution,
        "train_batch_size": args.batch_size,
        "mixed_precision": args.mixed_precision,
        "compile": args.compile,
        "report_to": "none",
        "seed": 0,
    }
    argv = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    argv += ["--cuda_graph"] if args.cuda_graph else []
    return resolve(parse(argv))[0]


class Port:
    """The original's loop, reading its loss after every step."""

    def __init__(self, config: FinetuneConfig, dataset, accelerator, draws: list):
        from benchmarks.original_finetune import OriginalTrainer

        self.trainer, self.draws = OriginalTrainer(config, dataset, accelerator), iter(draws)

    def steps(self, count: int) -> list[float]:
        return [self.trainer.step(next(self.draws)) for _ in range(count)]


class Ours:
    """Stage 1's loop as it is; losses are read once per round, as a run reads them once per row of its metrics."""

    def __init__(self, config: FinetuneConfig, dataset, accelerator, draws: list):
        from semantic_aug.finetune.trainer import Trainer

        self.trainer = Trainer(config, dataset, accelerator)
        self.trainer.prepare()

    def steps(self, count: int) -> list[float]:
        losses = [self.trainer.optimizer_step()[0] for _ in range(count)]
        return torch.stack(losses).tolist()


def serve(side: str, config: FinetuneConfig, images: int, warmup: int, device: str, threads: int, pipe) -> None:
    """Body of one side's process: gets ready, then trains as many steps as it is told, until told 0."""
    from accelerate import Accelerator

    from semantic_aug.finetune.batches import BatchSource
    from semantic_aug.prompts import TEMPLATES

    console.quiet_libraries()
    if side == OURS:
        allocator.keep_freed_memory()  # as train_lora.py does
    torch.set_num_threads(threads)
    gpu = device == "cuda"
    dataset = load_dataset(config.dataset, config.setting)
    dataset = replace(dataset, train=common.first_images(dataset.train, images))
    config.output_dir.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(mixed_precision=config.model.mixed_precision, cpu=not gpu)
    source = BatchSource(
        dataset.train.labels,
        config.train.train_batch_size,
        read_geometry(config.base_folder).latent_shape(config.images.resolution),
        views=1,
        flip=not config.images.no_flip,
        templates=len(TEMPLATES),
        num_train_timesteps=1000,
        noise_offset=0.0,
        class_balanced=False,
        seed=config.seed,
    )
    draws = [source.draw(step) for step in range(config.train.max_train_steps)] if side == PORT else []
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    running = {PORT: Port, OURS: Ours}[side](config, dataset, accelerator, draws)
    ready = time.perf_counter() - began
    losses = running.steps(warmup)  # compiling happens here
    report = {"seconds_to_ready": round(ready, 2), "seconds_of_warm_up": round(time.perf_counter() - began - ready, 2)}
    if gpu:
        torch.cuda.empty_cache()
        report["static_memory_mb"] = round(torch.cuda.memory_allocated() / 2**20)
        torch.cuda.reset_peak_memory_stats()
    pipe.send((report, losses))
    while count := pipe.recv():
        began, own = time.perf_counter(), time.process_time()
        losses = running.steps(count)
        pipe.send((time.perf_counter() - began, time.process_time() - own, losses))
    peak = (
        torch.cuda.max_memory_allocated() / 2**20 if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    )
    counted = side == PORT or not (config.compiled(device) or config.model.cuda_graph)
    calls = common.calls_of(lambda: running.steps(1)) if counted else None
    pipe.send({"peak_memory_mb": round(peak), "calls_per_step": calls})


class Side:
    """The processes that train one way, one after the other, seen from outside."""

    def __init__(self, name: str):
        self.name = name
        self.report: dict[str, float] = {}
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.cpu_seconds: list[float] = []

    def open(self, config: FinetuneConfig, args: argparse.Namespace) -> None:
        """Starts a process and waits until it is ready."""
        self.pipe, theirs = multiprocessing.Pipe()
        arguments = (self.name, config, args.images, args.warmup, args.device, torch.get_num_threads(), theirs)
        self.process = multiprocessing.get_context("spawn").Process(target=serve, args=arguments)
        self.process.start()
        theirs.close()  # a process that dies is then noticed by its pipe
        report, self.losses = self.pipe.recv()
        self.report = report | self.report  # the first one's: later ones find what it compiled

    def round(self, steps: int) -> None:
        """Trains ``steps`` more steps."""
        self.pipe.send(steps)
        seconds, own, losses = self.pipe.recv()
        self.rates.append(steps / seconds)
        self.cpu_seconds.append(own / steps)
        self.losses += losses

    def close(self) -> None:
        """Ends the process and takes its last figures."""
        self.pipe.send(0)
        self.report |= self.pipe.recv()
        self.process.join()

    @property
    def rate(self) -> float:
        """Median steps per second of all rounds."""
        return statistics.median(self.rates)


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    gpu = torch.cuda.is_available()
    parser = cli.PlainParser(prog="bench.py finetune", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--base", default=EMBEDDED_MODEL, help="folder of a base model, or sd15-random (default: the embedded one)"
    )
    parser.add_argument("--dataset", default="elpv", help="whose images are learned (default: elpv)")
    parser.add_argument("--images", type=cli.whole(0), default=64, help="training images; 0: all (default: 64)")
    parser.add_argument("--finetune_strategy", choices=STRATEGIES, default="ti_db")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    parser.add_argument(
        "--resolution", type=cli.whole(1), default=None, help="default: the base model's own, 224 for sd15-random"
    )
    parser.add_argument("--batch_size", type=cli.whole(1), default=8, help="images per step (default: 8)")
    parser.add_argument("--pairs", type=cli.whole(1), default=3, help="of processes, one after the other (default: 3)")
    parser.add_argument(
        "--rounds", type=cli.whole(1), default=5, help="of each side of a pair, alternating (default: 5)"
    )
    parser.add_argument("--steps", type=cli.whole(1), default=None, help="in a round (default: 6; GPU: 50)")
    parser.add_argument("--warmup", type=cli.whole(0), default=3, help="steps before the first round (default: 3)")
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), default=None, help="default: GPU fp16")
    parser.add_argument("--compile", choices=("auto", "on", "off"), default=None, help="of ours (default: GPU on)")
    parser.add_argument("--cuda_graph", action="store_true", help="of ours: record a step and replay it")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Times both sides in alternating rounds; prints and writes the table."""
    args = build_parser().parse_args(argv)
    console.set_up_logging()
    console.quiet_libraries()
    gpu = args.device == "cuda"
    args.steps = args.steps or (50 if gpu else 6)
    args.mixed_precision = args.mixed_precision or ("fp16" if gpu else "no")
    args.compile = args.compile or ("on" if gpu else "off")
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        folder = Path(temporary)
        if args.base == SD15:
            base, args.resolution = build_sd15(folder / "base", 512), args.resolution or 224
        else:
            base = find_base(args.base)
            args.resolution = args.resolution or read_geometry(base).native_resolution
        config = settings_of(args, base, folder / "ours")
        sides = {name: Side(name) for name in (PORT, OURS)}
        for _ in range(args.pairs):
            for side in sides.values():
                side.open(config, args)
            for _ in range(args.rounds):
                for side in sides.values():
                    side.round(args.steps)
            for side in sides.values():
                side.close()
    port, ours = sides[PORT], sides[OURS]
    apart = float(np.abs(np.subtract(port.losses, ours.losses)).max())
    memory = "static_memory_mb" if gpu else "peak_memory_mb"
    rows = [
        [
            name,
            f"{side.rate:.3g}",
            f"{side.rate / port.rate:.2f}",
            side.report[memory],
            f"{side.report[memory] / port.report[memory]:.2f}",
            side.report["peak_memory_mb"],
            side.report["calls_per_step"] or "-",
            side.report["seconds_to_ready"],
            side.report["seconds_of_warm_up"],
        ]
        for name, side in sides.items()
    ]
    header = [
        f"{args.base}, {args.finetune_strategy}, {args.resolution} px, batch {args.batch_size}",
        "steps/s",
        "ratio",
        "static MB" if gpu else "peak MB",
        "ratio",
        "peak MB",
        "calls/step",
        "s to ready",
        "s warm-up",
    ]
    if not gpu:  # the two memory columns would say the same
        header, rows = header[:5] + header[6:], [row[:5] + row[6:] for row in rows]
    details = {
        "arguments": vars(args),
        "sides": {
            name: {**side.report, "rates": side.rates, "cpu_seconds_per_step": side.cpu_seconds, "losses": side.losses}
            for name, side in sides.items()
        },
        "ratio": ours.rate / port.rate,
        "ratio_of_cpu_seconds": statistics.median(port.cpu_seconds) / statistics.median(ours.cpu_seconds),
        "ratio_of_rounds": [b / a for a, b in zip(port.rates, ours.rates, strict=True)],
        "largest_difference_of_losses": apart,
    }
    print(f"largest difference of the two ways' losses: {apart:.2g}")
    common.publish("finetune", header, rows, details)
    return 0
