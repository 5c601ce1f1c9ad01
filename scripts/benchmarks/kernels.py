"""Where stage 2's time goes: one batch, from encoded sources to pixels, by kind of kernel.

    python scripts/bench.py kernels                                   # embedded base, CPU
    python scripts/bench.py kernels --base sd15-random --device cuda  # an SD-1.5-sized network at 512 px, no hub needed

Each kind has its share of the batch's time and the rate of its arithmetic, counted on the networks as they are before
compilation; what is left of the wall-clock time is a GPU waiting for the processor.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from benchmarks import common
from benchmarks.sampling import SD15, build_sd15
from semantic_aug import cli, console
from semantic_aug.augmentations.engine import DTYPES, Engine
from semantic_aug.augmentations.model import ModelFiles, Prompts
from semantic_aug.diffusion.base import EMBEDDED_MODEL, find_base, read_geometry
from semantic_aug.diffusion.schedulers import SolverSettings
from semantic_aug.seeding import task_rng

KINDS = {
    "attention": r"flash|fmha|attention|sdpa|_softmax",
    "normalisation and pointwise, fused": r"triton",
    "convolutions": r"conv|fprop|implicit|xmma|nhwc",
    "matrix products": r"gemm|cutlass|nvjet|cublas|wgmma|aten::(addmm|mm|bmm|baddbmm|linear|matmul)",
    "normalisation": r"norm",
    "copies": r"memcpy|memset|copy_|aten::cat",
}
"""Kind of kernel -> what the names of its kernels have; the first that fits."""
REST, IDLE = "other kernels", "waiting for the processor"


def kind_of(name: str) -> str:
    """The kind of a kernel."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name.lower())), REST)


def make_batch(engine: Engine, size: int, strength: float):
    """A call that translates and decodes one batch of random sources."""
    generator = torch.Generator().manual_seed(0)
    channels, *sides = engine.latent_shape
    moments = torch.randn(size, 2 * channels, *sides, generator=generator)
    targets, strengths = [number % 2 for number in range(size)], [strength] * size
    return lambda: engine.translate(moments, targets, strengths, [task_rng(0, number) for number in range(size)])


def profile(call, gpu: bool) -> tuple[Counter, float]:
    """Milliseconds of device time of a call by kind, and its wall-clock milliseconds."""
    from torch.profiler import ProfilerActivity

    began = time.perf_counter()
    call()  # ends by copying its images to the processor
    wall = 1000 * (time.perf_counter() - began)
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiler:
        call()
    times = Counter()
    for event in profiler.key_averages():
        times[kind_of(event.key)] += (event.self_device_time_total if gpu else event.self_cpu_time_total) / 1000
    return times, wall


def count_tflop(call) -> Counter:
    """TFLOP of a call by kind."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    attention = lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)  # noqa: E731
    unknown = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    with FlopCounterMode(display=False, custom_mapping=unknown) as counter:
        call()
    counts = Counter()
    for operator, flop in counter.get_flop_counts()["Global"].items():
        counts[kind_of(str(operator).replace("aten.", "aten::"))] += flop / 1e12
    return counts


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    gpu = torch.cuda.is_available()
    parser = cli.PlainParser(prog="bench.py kernels", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--base", default=EMBEDDED_MODEL, help="folder of a base model, or sd15-random (default: the embedded one)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default=None, help="default: fp32, on a GPU fp16")
    parser.add_argument("--batch_size", type=cli.whole(1), default=64 if gpu else 4, help="default: 4; GPU: 64")
    parser.add_argument("--steps", type=cli.whole(1), default=25, help="of the whole schedule (default: 25)")
    parser.add_argument("--strength", type=cli.number(0, 1, open_low=True), default=0.7)
    parser.add_argument("--compile", choices=("on", "off"), default=None, help="default: off, on a GPU on")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Profiles a batch; prints and writes the table."""
    args = build_parser().parse_args(argv)
    console.set_up_logging()
    console.quiet_libraries()
    gpu, size = args.device == "cuda", args.batch_size
    args.dtype, args.compile = args.dtype or ("fp16" if gpu else "fp32"), args.compile or ("on" if gpu else "off")
    solver = SolverSettings(num_inference_steps=args.steps)
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        base = build_sd15(Path(temporary) / SD15, 512) if args.base == SD15 else find_base(args.base)
        resolution, prompts = read_geometry(base).native_resolution, Prompts(("one", "two"), ("one", "two"))

        def engine(compiled_batch: int | None) -> Engine:
            files, dtype = ModelFiles(str(base), base), DTYPES[args.dtype]
            return Engine(files, prompts, solver, resolution, args.device, dtype=dtype, compiled_batch=compiled_batch)

        plain = engine(None)
        tflop = count_tflop(make_batch(plain, 1, args.strength))  # of one image
        running = engine(size) if args.compile == "on" else plain
    batch = make_batch(running, size, args.strength)
    batch()  # compiles
    times, wall = profile(batch, gpu)
    if gpu:
        times[IDLE] = max(0.0, wall - times.total())
    name = torch.cuda.get_device_name(0) if gpu else None
    rows = []
    for kind, ms in times.most_common():
        rate = tflop[kind] * size / ms * 1000 if ms and tflop[kind] else None
        share = f"{100 * ms / times.total():.0f} %"
        rows.append([kind, f"{ms / size:.2f}", share, f"{rate:.3g}" if rate else "-", common.share_of_peak(rate, name)])
    rate = tflop.total() * size / wall * 1000
    rows.append(["all", f"{wall / size:.2f}", "", f"{rate:.3g}", common.share_of_peak(rate, name)])
    header = [
        f"{args.base}, {resolution} px, s = {args.strength}, batch {size}, {args.dtype}",
        *("ms per image", "of the time", "TFLOP/s", "of peak"),
    ]
    details = {"arguments": vars(args), "milliseconds": dict(times), "tflop_per_image": dict(tflop), "wall_ms": wall}
    common.publish("kernels", header, rows, details)
    return 0
