"""Stage 2 against a faithful port of the original's way, in one run, saving included.

python scripts/bench.py sampling                                   # embedded base, CPU
python scripts/bench.py sampling --base sd15-random --device cuda  # an SD-1.5-sized network, no hub needed
"""

from __future__ import annotations

import io
import json
import multiprocessing
import resource
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks import common, original_sampling
from semantic_aug import cli, console
from semantic_aug.augmentations.model import ModelFiles, Prompts
from semantic_aug.datasets import Setting, load_dataset
from semantic_aug.diffusion.base import EMBEDDED_MODEL, find_base, read_geometry
from semantic_aug.diffusion.schedulers import SolverSettings
from semantic_aug.errors import UserError

SD15 = "sd15-random"
"""Name of the base model that :func:`build_sd15` makes, and of a folder that holds one."""
TOO_FEW = "too few batches to time: give more --images, or a smaller --batch_size"
TFLOP_512 = 29.8
"""TFLOP of one 512 px image of Stable Diffusion 1.5 at strength 0.7, 25 steps, guidance; text and sources cached."""


def build_sd15(folder: Path, resolution: int) -> Path:
    """An SD-1.5-sized base model with random weights and CLIP's real vocabulary, in half precision."""
    import gzip
    import importlib.util

    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    result = importlib.util.find_spec("open_clip")
    if result is None:
        raise UserError("--base sd15-random takes CLIP's vocabulary from the package open_clip_torch: pip install it")
    with gzip.open(Path(next(iter(result.submodule_search_locations))) / "bpe_simple_vocab_16e6.txt.gz") as packed:
        lines = packed.read().decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    words = [
        *letters,
        *(letter + "</w>" for letter in letters),
        *("".join(pair) for pair in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        unet = UNet2DConditionModel(
            sample_size=64,
            cross_attention_dim=768,
            attention_head_dim=8,
            block_out_channels=(320, 640, 1280, 1280),
            layers_per_block=2,
        )
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
            sample_size=512,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(words),
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
                bos_token_id=len(words) - 2,
                eos_token_id=len(words) - 1,
                pad_token_id=len(words) - 1,
            )
        )
    StableDiffusionPipeline(
        vae=vae.half().cpu(),
        unet=unet.half().cpu(),
        text_encoder=text.half().cpu(),
        tokenizer=CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=merges, model_max_length=77),
        scheduler=PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def write_checkpoint(folder: Path, base: Path, class_names: tuple[str, ...]) -> tuple[Path, Path]:
    """A random LoRA of rank 10 and random class tokens that fit a base model."""
    from diffusers import UNet2DConditionModel

    from semantic_aug.diffusion import lora, tokens

    unet = UNet2DConditionModel.from_pretrained(base / "unet").requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in lora.add_lora(unet, 10):
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.02
    width = json.loads((base / "text_encoder" / "config.json").read_text())["hidden_size"]
    folder.mkdir(parents=True)
    lora.save_lora(unet, folder / lora.FILE_NAME)
    vectors = torch.randn(len(class_names), width, generator=generator) * 0.02
    tokens.save_tokens(tokens.ClassTokens(class_names, vectors), folder / tokens.FILE_NAME)
    return folder / lora.FILE_NAME, folder / tokens.FILE_NAME


def time_original(
    files: ModelFiles,
    device: str,
    super_class: str,
    sources: list[bytes],
    targets: list[int],
    args,
    processes: int,
    threads: int,
    folder: Path,
) -> float:
    """Images per second of the port with some processes, each making its share of the images."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(processes + 1)
    arguments = (files.folder, files.lora, files.tokens, device, super_class)
    running = []
    for index in range(processes):
        subset = folder / str(index)
        subset.mkdir(parents=True)
        share = (
            sources[index::processes],
            targets[index::processes],
            args.strength,
            args.resolution,
            subset,
            barrier,
            threads,
        )
        running.append(context.Process(target=original_sampling.serve, args=(arguments, *share)))
        running[-1].start()
    barrier.wait()
    began = time.perf_counter()
    barrier.wait()
    seconds = time.perf_counter() - began
    for process in running:
        process.join()
    return len(sources) / seconds


def time_ours(files: ModelFiles, dataset, word: str, args, devices: tuple[str, ...], folder: Path) -> dict:
    """Images per second of stage 2 as it is, from the first finished batch of every process on, and the time to load.

    The rate is None where a process made fewer than three batches: the time between its first and its last but one is none.
    """
    from semantic_aug.sampling import config as sampling
    from semantic_aug.sampling import run as running
    from semantic_aug.sampling.settings import ImageSettings, OutputSettings, Placement
    from semantic_aug.sampling.subset import plan_subset

    dtype = "fp32" if devices[0] == "cpu" else "fp16"
    multiplier = max(args.images * args.ours_factor, 1) / len(dataset.train)
    config = sampling.with_batch_size(
        sampling.SampleConfig(
            dataset=word,
            setting=dataset.setting,
            run=cli.StageSettings(),
            images=ImageSettings(
                aug_strength=args.strength, syn_dataset_multiplier=multiplier, resolution=args.resolution
            ),
            key="bench",
            model=files,
            prompts=Prompts(dataset.source_names, dataset.class_names, dataset.spec.super_class),
            solver=SolverSettings(),
            placement=Placement(batch_size=args.batch_size, dtype=dtype, compile=args.compile, devices=devices),
            output=OutputSettings(output_root=folder),
        ),
        dataset,
    )
    subset, folder = plan_subset(config, dataset), folder / f"ours-{len(devices)}"
    plan = subset.plan
    tasks_of = partial(subset.tasks, missing=np.ones(len(plan), bool))
    launcher = running.make_launcher(replace(subset.job, folder=folder), tasks_of, lambda rows: None, len(plan), 0)
    began, own = time.monotonic(), time.process_time()
    launcher.run(range(plan.num_batches))
    first, own = max(marks[0][0] for marks in launcher.marks.values()) - began, (time.process_time() - own) / len(plan)
    rate = launcher.steady_rate() or None
    return {
        "images_per_second": rate,
        "processes": len(devices),
        "launcher_cpu_seconds_per_image": own,
        "launcher_share_of_an_image": own * rate / len(devices) if rate else None,
        "seconds_to_first_batches": round(first, 1),
        "batch_size": config.placement.batch_size,
    }


def main(argv: list[str] | None = None) -> int:
    """Times the port alone, the port at its best, and ours; prints and writes the table."""
    parser = cli.PlainParser(prog="bench.py sampling", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--base", default=EMBEDDED_MODEL, help="folder of a base model, or sd15-random (default: the embedded one)"
    )
    parser.add_argument("--dataset", default="elpv", help="whose images are translated (default: elpv)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--images", type=cli.whole(1), default=24, help="images the port makes (default: 24)")
    parser.add_argument(
        "--ours_factor", type=cli.whole(1), default=8, help="ours makes this many times as many (default: 8)"
    )
    parser.add_argument("--strength", type=cli.number(0, 1, open_low=True), default=0.7)
    parser.add_argument("--resolution", type=cli.whole(1), default=None, help="default: the base model's own")
    parser.add_argument("--batch_size", type=cli.whole(0), default=0, help="of ours; 0: automatic (default: 0)")
    parser.add_argument(
        "--processes",
        type=cli.whole(1),
        default=None,
        help="of the port at its best and of ours on the CPU (default: 2; GPU: 3, 1)",
    )
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto")
    args = parser.parse_args(argv)
    console.set_up_logging()
    console.quiet_libraries()
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        folder = Path(temporary)
        base = build_sd15(folder / "base", 512) if args.base == SD15 else find_base(args.base)
        args.resolution = args.resolution or read_geometry(base).native_resolution
        dataset = load_dataset(args.dataset, Setting())
        lora, tokens = write_checkpoint(folder / "checkpoint", base, dataset.source_names)
        files = ModelFiles(str(base), base, lora, tokens)
        rng = np.random.default_rng(0)
        sources = []
        for row in rng.integers(len(dataset.train), size=args.images):
            out = io.BytesIO()
            dataset.train.image(int(row)).save(out, "PNG")
            sources.append(out.getvalue())
        targets = rng.integers(len(dataset.class_names), size=args.images).tolist()
        gpu = args.device == "cuda"
        device, many = ("cuda:0", args.processes or 3) if gpu else ("cpu", args.processes or 2)
        threads = torch.get_num_threads()
        shared = (files, device, dataset.spec.super_class, sources, targets, args)
        alone = time_original(*shared, 1, threads, folder / "port")
        best = alone  # of one process, and of many where that is faster
        if many > 1:
            best = max(alone, time_original(*shared, many, max(1, threads // many), folder / "port-many"))
        devices = ("cuda:0",) if gpu else ("cpu",) * many
        ours = time_ours(files, dataset, args.dataset, args, devices, folder)
        single = time_ours(files, dataset, args.dataset, args, devices[:1], folder) if len(devices) > 1 else None
    name = torch.cuda.get_device_name(0) if gpu else None
    counted = (Path(args.base).name, args.resolution, args.strength) == (SD15, 512, 0.7)
    work = TFLOP_512 if counted else None
    peak = lambda rate: common.share_of_peak(work and rate * work, name)  # noqa: E731
    rows = [
        ["the original's way, one process", f"{alone:.3g}", "1", peak(alone)],
        [f"the original's way at its best ({many} processes)", f"{best:.3g}", f"{best / alone:.2f}", peak(best)],
    ]
    for timing in filter(None, (ours, single)):
        rate, title = (
            timing["images_per_second"],
            f"ours, batch {timing['batch_size']}, {timing['processes']} process(es)",
        )
        figures = [f"{rate:.3g}", f"{rate / alone:.2f}"] if rate else [TOO_FEW, "-"]
        rows.append([title, *figures, peak(rate) if rate and timing is ours else "-"])
    rate = ours["images_per_second"]
    details = {
        "arguments": vars(args),
        "ours": ours,
        "ours_one_process": single,
        "original": {"one": alone, "best": best},
        "ratio_to_best": rate / best if rate else None,
        "peak_memory_of_children_mb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024),
    }
    header = [
        f"{args.base}, {args.resolution} px, s = {args.strength}",
        "images/s",
        "ratio",
        "of peak",
    ]
    common.publish("sampling", header, rows, details)
    return 0
