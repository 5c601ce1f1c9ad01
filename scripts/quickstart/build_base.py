"""Trains the embedded base model, a tiny Stable Diffusion for solar cells, and writes it in diffusers layout.

    python scripts/quickstart/build_base.py                    # goes on where it stopped
    python scripts/quickstart/build_base.py --until autoencoder

Only images of ELPV's *train* split are used and no label is read: captions come from what can be measured in the pixels
(``base_captions.py``). Stages: autoencoder -> decoder -> denoiser (U-Net and text encoder) -> export.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

STAGES = ("autoencoder", "decoder", "denoiser", "export")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work_dir", type=Path, default=ROOT / "outputs" / "base_build", help="states and logs")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "base", help="the finished model")
    parser.add_argument("--autoencoder_steps", type=int, default=6000, help="steps of 16 images (default: 6000)")
    parser.add_argument("--decoder_steps", type=int, default=2500, help="steps of 16 images (default: 2500)")
    parser.add_argument("--denoiser_steps", type=int, default=14000, help="steps of 32 images (default: 14000)")
    parser.add_argument("--until", choices=STAGES, default="export", help="last stage to run (default: export)")
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


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    import torch
    from base_autoencoder import SIZE, ZOOM, Perceptual, sharpen_decoder, train_autoencoder

    from semantic_aug.classify.backbones import efficientnet_lite0

    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    amp = functools.partial(torch.autocast, device.type, torch.bfloat16)
    args.work_dir.mkdir(parents=True, exist_ok=True)

    images, zoomed = load_images("train", SIZE).to(device), load_images("train", ZOOM).to(device)
    perceptual = Perceptual(efficientnet_lite0()).to(device)
    model = train_autoencoder(images, zoomed, perceptual, args.autoencoder_steps, args.work_dir, amp)
    if args.until == "autoencoder":
        return 0
    model = sharpen_decoder(model, images, zoomed, perceptual, args.decoder_steps, args.work_dir, amp)
    return 0


if __name__ == "__main__":
    sys.exit(main())
