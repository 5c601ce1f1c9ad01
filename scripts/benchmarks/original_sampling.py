"""A faithful port of how the original implementation samples, for comparison.

One image per pipeline call; the LoRA stays an adapter; text encoder and VAE encoder run for every image; the source is
decoded three times per task (twice for its metadata); autocast around a half-precision model on a GPU; the PNG is saved
and a line printed inside the loop. Class tokens are added to the tokenizer one by one, each with its own resize.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionImg2ImgPipeline
from PIL import Image

from semantic_aug.diffusion.tokens import load_tokens


class OriginalSampler:
    """The original's pipeline object and its way of using it.

    Args:
        base: folder of the base model.
        lora: LoRA file.
        tokens: class-token file.
        device: "cpu" or "cuda:N".
        super_class: of the data set.
    """

    def __init__(self, base: Path, lora: Path, tokens: Path, device: str, super_class: str):
        self.device = torch.device(device)
        dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        self.pipe = StableDiffusionImg2ImgPipeline.from_pretrained(base, torch_dtype=dtype, safety_checker=None).to(
            device
        )
        learned = load_tokens(tokens)
        for name, vector in zip(learned.names, learned.vectors, strict=True):
            self.pipe.tokenizer.add_tokens(name)
            self.pipe.text_encoder.resize_token_embeddings(len(self.pipe.tokenizer))
            table = self.pipe.text_encoder.get_input_embeddings().weight.data
            table[self.pipe.tokenizer.convert_tokens_to_ids(name)] = vector.to(table)
        self.pipe.load_lora_weights(str(lora.parent), weight_name=lora.name)
        self.pipe.scheduler = DPMSolverMultistepScheduler.from_config(self.pipe.scheduler.config)
        self.pipe.set_progress_bar_config(disable=True)
        self.names, self.super_class = learned.names, super_class

    def make(self, source: bytes, target: int, strength: float, resolution: int, path: Path) -> None:
        """One task, from the encoded source image to the saved PNG."""
        for _ in range(2):  # the metadata of source and target are read by decoding their images
            Image.open(io.BytesIO(source)).convert("RGB").load()
        image = (
            Image.open(io.BytesIO(source)).convert("RGB").resize((resolution, resolution), Image.Resampling.BILINEAR)
        )
        autocast = torch.autocast("cuda") if self.device.type == "cuda" else contextlib.nullcontext()
        with autocast:
            created = self.pipe(
                image=[image],
                prompt=[f"a photo of a {self.names[target]} {self.super_class}".strip()],
                strength=strength,
                guidance_scale=7.5,
                num_inference_steps=25,
            ).images[0]
        created.resize(image.size, Image.Resampling.BILINEAR).save(path)
        print(f"save {path}")


def serve(
    arguments: tuple,
    sources: Sequence[bytes],
    targets: Sequence[int],
    strength: float,
    resolution: int,
    folder: Path,
    barrier,
    threads: int,
) -> None:
    """Body of one of the port's processes: loads, makes one image to warm up, waits for the others, makes its share."""
    torch.set_num_threads(threads)
    sampler = OriginalSampler(*arguments)
    with contextlib.redirect_stdout(io.StringIO()):
        sampler.make(sources[0], targets[0], strength, resolution, folder / "warm-up.png")
        barrier.wait()
        for number, (source, target) in enumerate(zip(sources, targets, strict=True)):
            sampler.make(source, target, strength, resolution, folder / f"{number:06d}.png")
    barrier.wait()
