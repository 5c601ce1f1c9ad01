"""What inversion followed by denoising keeps of photographs: PSNR by steps and guidance, beside the autoencoder's own loss.

    python scripts/bench.py inversion

Test photographs under the prompts of their own classes, without fine-tuning. A picture beside the table shows photographs,
their reconstructions, and images between two of them along the arc and round the circle.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks import common
from semantic_aug.augmentations.engine import Engine
from semantic_aug.augmentations.model import ModelFiles, Prompts
from semantic_aug.augmentations.strategies import find
from semantic_aug.cli import PlainParser, number, whole
from semantic_aug.datasets import load_dataset
from semantic_aug.datasets.images import fit
from semantic_aug.diffusion.base import find_base, read_geometry
from semantic_aug.diffusion.loop import decode_latents
from semantic_aug.diffusion.schedulers import SolverSettings
from semantic_aug.errors import UserError

BASE = "scripts/quickstart/base"
BETWEEN = (0.0, 0.25, 0.5, 0.75, 1.0)


def psnr(images: Tensor, wanted: Tensor) -> float:
    """Mean peak signal-to-noise ratio, in dB, of uint8 images ``(B, H, W, 3)``."""
    error = (images.double() - wanted.double()).square().flatten(1).mean(1)
    return float((10 * torch.log10(255**2 / error)).mean())


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = PlainParser(prog="bench.py inversion", description=__doc__.splitlines()[0])
    parser.add_argument("--base", default=BASE, help=f"base model, a hub id or a folder (default: {BASE})")
    parser.add_argument("--dataset", default="elpv", help="whose test images are inverted (default: elpv)")
    parser.add_argument("--images", type=whole(2), default=16, help="how many (default: 16)")
    parser.add_argument("--steps", type=whole(1), nargs="+", default=[10, 50, 25], help="steps (default: 10 50 25)")
    guidance = "scales of guidance; all but the first with the last of the steps only (default: 1 2 3 5 7.5)"
    parser.add_argument("--guidance", type=number(0), nargs="+", default=[1, 2, 3, 5, 7.5], help=guidance)
    return parser


def picture(engine: Engine, photographs: Tensor, inverted: Tensor, labels: list[int]) -> Image.Image:
    """Rows of two photographs, their reconstructions, and what lies between: a row along the arc, a row round the circle."""
    rows = []
    for a in range(0, min(len(labels) - 1, 8), 2):
        for positions, whole_circle in ((BETWEEN, False), (find("diff-ii").strengths, True)):
            pair, count = [a, a + 1], len(positions)
            latents = tuple(inverted[[i] * count] for i in pair)
            classes = tuple([labels[a if whole_circle else i]] * count for i in pair)
            images = engine.interpolate(latents, classes, positions, whole=whole_circle)
            rows.append(torch.cat([*photographs[pair], *images], dim=1))
    width = max(row.shape[1] for row in rows)
    padded = [torch.nn.functional.pad(row, (0, 0, 0, width - row.shape[1])) for row in rows]
    return Image.fromarray(torch.cat(padded).numpy())


def main(argv: list[str] | None = None) -> int:
    """Measures every pair of steps and guidance; prints and writes the table and the picture."""
    args = build_parser().parse_args(argv)
    data = load_dataset(args.dataset)
    if data.test is None:
        raise UserError(f"--dataset {args.dataset} has no test images, which are inverted here")
    names = Prompts(data.source_names, data.class_names, data.spec.super_class)
    model = ModelFiles(args.base, find_base(args.base))
    engine = Engine(model, names, SolverSettings(1, 1.0, "ddim"), read_geometry(model.folder).native_resolution)
    chosen = np.random.default_rng(0).permutation(len(data.test))[: args.images]
    pictures = [fit(data.test.image(int(i)), engine.resolution) for i in chosen]
    photographs, labels = torch.from_numpy(np.stack(pictures)), data.test.labels[chosen].tolist()
    moments = engine.encode(pictures)
    means = moments.chunk(2, dim=1)[0] * engine.vae.config.scaling_factor
    decoded = decode_latents(engine.vae, means)
    figures = {"autoencoder": psnr(decoded, photographs)}
    rows = [["autoencoder alone", "", f"{figures['autoencoder']:.1f}", ""]]
    for steps in args.steps:
        inverter = engine.inverter
        engine.inverter = replace(inverter, settings=SolverSettings(steps, 1.0, "ddim"))
        inverted = engine.invert(moments, labels)
        for guidance in args.guidance if steps == args.steps[-1] else args.guidance[:1]:
            engine.inverter = replace(inverter, settings=SolverSettings(steps, guidance, "ddim"))
            images = engine.interpolate((inverted, inverted), (labels, labels), [0.0] * len(labels), whole=False)
            figures[f"{steps} steps, guidance {guidance:g}"] = both = psnr(images, photographs), psnr(images, decoded)
            rows.append([steps, f"{guidance:g}", *(f"{value:.1f}" for value in both)])
        engine.inverter = inverter
    header = ["steps", "guidance", "PSNR to the photographs, dB", "PSNR to the autoencoder's reconstructions, dB"]
    path = common.publish("inversion", header, rows, {"arguments": vars(args), "psnr": figures})
    engine.inverter = replace(engine.inverter, settings=SolverSettings(args.steps[-1], args.guidance[0], "ddim"))
    picture(engine, photographs, inverted, labels).save(path.with_suffix(".png"))
    return 0
