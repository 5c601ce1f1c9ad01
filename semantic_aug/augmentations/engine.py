"""The engine behind every strategy: a fine-tuned model held ready, making one batch of images at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from semantic_aug.augmentations.request import ClassNames, ModelFiles
from semantic_aug.diffusion import lora as lora_io
from semantic_aug.diffusion import tokens as token_io
from semantic_aug.diffusion.base import BaseModel, load_base
from semantic_aug.diffusion.loop import (
    decode_latents,
    encode_moments,
    generate,
    to_pixels,
    translate,
)
from semantic_aug.diffusion.schedulers import SolverSettings, make_scheduler
from semantic_aug.diffusion.text import class_prompt, encode_prompts
from semantic_aug.prompts import SAMPLING_TEMPLATE

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Engine:
    """A base model with LoRA merged and class tokens installed, and every class's prompt encoded once.

    Args:
        files: which weights.
        classes: of the data set.
        settings: of the solver.
        resolution: side of the images in pixels.
        device: where to run.
        dtype: precision of the networks; merging happens in float32 before the cast.
        template: prompt with ``{}`` for the class.

    Raises:
        UserError: weights that do not fit, a class without its token, a resolution the model cannot make.
    """

    def __init__(
        self,
        files: ModelFiles,
        classes: ClassNames,
        settings: SolverSettings,
        resolution: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        template: str = SAMPLING_TEMPLATE,
    ):
        model, tokens = load_model(files)
        model.geometry.check(resolution)
        if tokens is not None:
            tokens.check_classes(classes.source_names, str(files.tokens))
            token_io.install(tokens, model.tokenizer, model.text_encoder)
        self.prompts = [
            class_prompt(source, prompt, classes.super_class, tokens, template)
            for source, prompt in zip(classes.source_names, classes.prompt_names, strict=True)
        ]
        model.to(device, dtype)
        embeds = [
            encode_prompts(model.tokenizer, model.text_encoder, self.prompts[i : i + 64])
            for i in range(0, len(self.prompts), 64)
        ]
        self.prompt_embeds = torch.cat(embeds)
        self.null_embeds = encode_prompts(model.tokenizer, model.text_encoder, [""])
        self.unet, self.vae = model.unet, model.vae
        self.scheduler = make_scheduler(model.scheduler_config, settings.scheduler, settings.final_sigmas_type)
        self.settings, self.resolution = settings, resolution
        self.device, self.dtype = torch.device(device), dtype
        self.latent_shape = model.geometry.latent_shape(resolution)

    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """Sources, PIL RGB of ``resolution`` pixels, to posterior parameters ``(B, 2C, h, w)`` on the CPU.

        One image at a time, so that a source's moments do not depend on what else is in the batch.
        """
        return torch.cat(
            [encode_moments(self.vae, to_pixels([image], self.device, self.dtype)).cpu() for image in images]
        )

    def translate(
        self, moments: Tensor, targets: Sequence[int], strengths: Sequence[float], generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Img2img of encoded sources, each towards its target class; uint8 ``(B, H, W, 3)`` on the CPU."""
        latents = translate(
            self.unet,
            self.scheduler,
            moments.to(self.device, self.dtype),
            self.vae.config.scaling_factor,
            self.prompt_embeds[list(targets)],
            self.null_embeds,
            strengths,
            generators,
            self.settings,
        )
        return decode_latents(self.vae, latents).cpu()

    def generate(self, targets: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
        """Images of the target classes from noise; uint8 ``(B, H, W, 3)`` on the CPU."""
        latents = generate(
            self.unet,
            self.scheduler,
            self.latent_shape,
            self.prompt_embeds[list(targets)],
            self.null_embeds,
            generators,
            self.settings,
        )
        return decode_latents(self.vae, latents).cpu()


def load_model(files: ModelFiles) -> tuple[BaseModel, token_io.ClassTokens | None]:
    """The base model with the LoRA merged (float32, on the CPU), and the class tokens, not yet installed."""
    model = load_base(files.name, files.folder)
    if files.lora is not None:
        lora_io.merge_lora(model.unet, lora_io.read_lora(files.lora), str(files.lora))
    return model, token_io.load_tokens(files.tokens) if files.tokens is not None else None
