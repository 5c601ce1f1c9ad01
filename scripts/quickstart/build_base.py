"""Trains the embedded base model, a tiny Stable Diffusion for solar cells, and writes it in diffusers layout.

    python scripts/quickstart/build_base.py                    # goes on where it stopped
    python scripts/quickstart/build_base.py --until autoencoder

Only images of ELPV's *train* split are used and no label is read: captions come from what can be measured in the pixels
(``base_captions.py``). Stages: autoencoder -> denoiser (U-Net and text encoder) -> export.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

STAGES = ("autoencoder", "denoiser", "export")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work_dir", type=Path, default=ROOT / "outputs" / "base_build", help="states and logs")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "base", help="the finished model")
    for stage, steps, batch in (("autoencoder", 900, 8), ("denoiser", 2500, 32)):
        parser.add_argument(f"--{stage}_steps", type=int, default=steps, help=f"optimiser steps (default: {steps})")
        parser.add_argument(f"--{stage}_batch", type=int, default=batch, help=f"images per step (default: {batch})")
    parser.add_argument("--until", choices=STAGES, default="export", help="last stage to run (default: export)")
    parser.add_argument("--compile", action="store_true", help="compile the U-Net: two minutes more, a third faster")
    parser.add_argument("--device", default=None, help="cuda or cpu (default: cuda where there is one)")
    return parser.parse_args(argv)


def load_images(split: str, size: int):
    """ELPV's images of a split as uint8 ``(N, size, size)``; labels are not looked at."""
    import numpy as np
    import torch

    from semantic_aug.datasets.elpv import read
    from semantic_aug.datasets.images import fit

    table = read()[split]
    return torch.from_numpy(np.stack([np.asarray(fit(table.image(i), size).convert("L")) for i in range(len(table))]))


def has_fast_bfloat16(device_type: str) -> bool:
    """Whether bfloat16 saves time: always on a GPU; a CPU without instructions for it emulates them, twenty times slower."""
    import torch

    return device_type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def export(vae, tokenizer, model, folder: Path) -> None:
    """Writes the pipeline in diffusers layout, weights in half precision."""
    import torch
    from base_denoiser import make_scheduler
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(
        vae=vae.to("cpu", torch.float16),
        text_encoder=model.text_encoder.to("cpu", torch.float16),
        tokenizer=tokenizer,
        unet=model.unet.to("cpu", torch.float16),
        scheduler=DPMSolverMultistepScheduler.from_config(make_scheduler().config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)


def write_recipe(args: argparse.Namespace, parameters: int) -> None:
    """Writes ``recipe.json`` for the model card: steps of each stage, and the seconds its log counts."""
    import csv
    import json

    import torch

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name(0) if device == "cuda" else f"{torch.get_num_threads()} CPU core(s)"
    recipe = {"machine": name, "parameters": round(parameters / 1e6, 2)}
    for stage in STAGES[:2]:
        with open(args.work_dir / f"{stage}.csv", newline="") as lines:
            rows = [(int(row["step"]), float(row["seconds"])) for row in csv.DictReader(lines)]
        # a resumed stage counts its seconds from zero again: add up what lies between the rows
        spent = sum(max(0.0, b[1] - a[1]) for a, b in zip([(0, 0.0), *rows], rows, strict=False))
        recipe |= {f"{stage}_steps": rows[-1][0], f"{stage}_batch": getattr(args, f"{stage}_batch")}
        recipe |= {f"{stage}_seconds": round(spent)}
    (args.output_dir / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Runs the stages that are not done yet."""
    args = parse(argv)
    import torch
    from base_autoencoder import SIZE, ZOOM, Perceptual, train_autoencoder
    from base_captions import Describer
    from base_denoiser import count_parameters, train_denoiser

    from semantic_aug.classify.backbones import efficientnet_lite0

    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    amp = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=has_fast_bfloat16(device.type))
    args.work_dir.mkdir(parents=True, exist_ok=True)

    images, zoomed = load_images("train", SIZE).to(device), load_images("train", ZOOM).to(device)
    backbone = efficientnet_lite0().to(device)
    steps, batch = args.autoencoder_steps, args.autoencoder_batch
    vae = train_autoencoder(images, zoomed, Perceptual(backbone), steps, batch, args.work_dir, amp)
    if args.until == "autoencoder":
        return 0
    describer = Describer.of(images, backbone)
    kept_out, steps, batch = load_images("val", SIZE).to(device), args.denoiser_steps, args.denoiser_batch
    tokenizer, model = train_denoiser(vae, images, kept_out, describer, steps, batch, args.work_dir, amp, args.compile)
    if args.until == "denoiser":
        return 0
    export(vae, tokenizer, model, args.output_dir)
    write_recipe(args, count_parameters(vae, model))
    size = sum(p.stat().st_size for p in args.output_dir.rglob("*") if p.is_file()) / 1e6
    print(f"{args.output_dir}: {count_parameters(vae, model) / 1e6:.1f} million parameters, {size:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
