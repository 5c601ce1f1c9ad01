"""The families of base models as data: text encoders, added conditions, precision of the VAE.

Stable Diffusion 1.x and 2.x (Rombach et al. 2022) have one text encoder and differ only in what their configurations
say: its width, and whether the U-Net predicts the noise or v. Stable Diffusion XL (Podell et al. 2023, arXiv:2307.01952)
attends to the penultimate hidden states of two, one beside the other, and is conditioned on the second one's pooled prompt and
the image's sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semantic_aug.errors import UserError
from semantic_aug.files import read_json_object

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL
    from torch import Tensor
    from transformers import CLIPTextModel, CLIPTokenizer

    from semantic_aug.diffusion.text import Conditions


LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
"""Attention projections of the U-Nets, which get a LoRA unless others are named."""


@dataclass(frozen=True)
class Family:
    """A family of base models.

    Attributes:
        pipelines: class names in ``model_index.json``; diffusers' pipelines from noise and from an image, which load what
            stage 1 writes.
        encoders: transformers' classes of the text encoders by folder, which is also the prefix of their LoRA's keys, in the
            order in which their hidden states are laid side by side.
        sizes: whether prompts are read from the penultimate layer, and pooled prompt and image sizes are conditioned on too.
    """

    name: str
    pipelines: tuple[str, str]
    encoders: Mapping[str, str]
    sizes: bool = False

    @property
    def weight_folders(self) -> tuple[str, ...]:
        """Folders that hold weights."""
        return ("unet", "vae", *self.encoders)

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """Folders of the tokenizers."""
        return tuple(encoder.replace("text_encoder", "tokenizer") for encoder in self.encoders)

    def trained_layers(self, position: int, text_encoder: CLIPTextModel) -> int:
        """The number of a text encoder's first layers that the image depends on: XL does not read the last one of the first
        text encoder."""
        unread = 1 if self.sizes and position < len(self.encoders) - 1 else 0
        return text_encoder.config.num_hidden_layers - unread

    def vae_dtype(self, vae: AutoencoderKL, dtype: torch.dtype | None) -> torch.dtype | None:
        """The VAE's precision where the networks are cast to ``dtype``; XL's overflows in float16."""
        import torch

        return torch.float32 if self.sizes and dtype == torch.float16 and vae.config.force_upcast else dtype

    def encode_ids(
        self, text_encoders: Sequence[CLIPTextModel], ids: Sequence[Tensor], time_ids: Tensor | None = None
    ) -> Conditions:
        """Encodes token ids as the U-Net's conditioning; gradients flow to what is trainable.

        Args:
            ids: ``(B, L)`` for each of them.
            time_ids: ``(B, 6)``, of families with sizes.
        """
        import torch

        from semantic_aug.diffusion.text import Conditions

        outputs = [
            encoder(each.to(encoder.device), output_hidden_states=self.sizes)
            for encoder, each in zip(text_encoders, ids, strict=True)
        ]
        if not self.sizes:
            return Conditions(outputs[0].last_hidden_state)
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        pooled = outputs[-1].text_embeds
        return Conditions(hidden, {"text_embeds": pooled, "time_ids": time_ids.to(hidden)})

    def encode_prompts(
        self,
        tokenizers: Sequence[CLIPTokenizer],
        text_encoders: Sequence[CLIPTextModel],
        prompts: Sequence[str],
        resolution: int,
    ) -> Conditions:
        """Prompts, each for an uncropped square image of ``resolution`` pixels, without gradients."""
        import torch

        from semantic_aug.diffusion.text import tokenize

        sizes = torch.tensor([[resolution, resolution, 0, 0, resolution, resolution]]).expand(len(prompts), -1)
        with torch.no_grad():
            ids = [tokenize(tokenizer, prompts) for tokenizer in tokenizers]
            return self.encode_ids(text_encoders, ids, sizes)

    def zeroed(self, conditions: Conditions) -> Conditions:
        """The conditions with zeros for the prompts; image sizes stay."""
        from semantic_aug.diffusion.text import Conditions

        added = {**conditions.added, "text_embeds": conditions.added["text_embeds"] * 0}
        return Conditions(conditions.hidden * 0, added)

    def check(self, unet: Mapping[str, Any], vae: Mapping[str, Any], name: str) -> None:
        """Refuses variants of a family with other inputs or latents. Raises UserError: a U-Net with further inputs
        (inpainting, depth, unCLIP, upscaling, a refiner), or latents that are shifted."""
        for part, config, expected in (("U-Net", unet, "UNet2DConditionModel"), ("VAE", vae, "AutoencoderKL")):
            if config.get("_class_name", expected) != expected:
                raise UserError(
                    f"base model '{name}': its {part} is a {config['_class_name']}: expected a plain {self.name}, whose "
                    f"{part} is a {expected}; choose another base model"
                )
        kind, channels = unet.get("addition_embed_type"), unet.get("in_channels", 4)
        latent_channels = vae.get("latent_channels", 4)
        if channels != latent_channels or kind != ("text_time" if self.sizes else None):
            raise UserError(
                f"base model '{name}': its U-Net takes {channels} channels and added conditions of the kind {kind} (as "
                f"inpainting, depth and refiner models do): expected a plain {self.name}, which takes {latent_channels} "
                f"and {'text_time' if self.sizes else None}"
            )
        for field in ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "time_cond_proj_dim"):
            if unet.get(field) is not None:
                raise UserError(
                    f"base model '{name}': its U-Net has {field} {unet[field]} (an unCLIP, upscaling or distilled model?): "
                    f"expected a plain {self.name}, which has none"
                )
        for field in ("latents_mean", "shift_factor"):
            if vae.get(field) is not None:
                raise UserError(f"base model '{name}': its VAE gives {field}, which a plain {self.name} has not")


FAMILIES = (
    Family(
        "Stable Diffusion 1.x/2.x",
        ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"),
        {"text_encoder": "CLIPTextModel"},
    ),
    Family(
        "Stable Diffusion XL",
        ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"),
        {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"},
        sizes=True,
    ),
)


def read_config(file: Path, name: str) -> dict[str, Any]:
    """A JSON object that a base model's folder holds. Raises UserError: absent, or no JSON object."""
    try:
        return read_json_object(file)
    except (OSError, ValueError) as error:
        expected = "expected a Stable Diffusion in diffusers layout"
        raise UserError(f"base model '{name}': {file} cannot be read ({error}): {expected}") from None


def read_configs(folder: Path, name: str) -> tuple[dict[str, Any], ...]:
    """The configurations of a base model's U-Net and VAE."""
    return tuple(read_config(folder / part / "config.json", name) for part in ("unet", "vae"))


def family_of(folder: Path, name: str) -> Family:
    """The family of a base model, by the pipeline its ``model_index.json`` names. Raises UserError: a pipeline of another
    kind, or one that lacks a text encoder (XL's refiner)."""
    index = read_config(folder / "model_index.json", name)
    pipeline = index.get("_class_name")
    family = next((family for family in FAMILIES if pipeline in family.pipelines), None)
    if family is None:
        known = " and ".join(f"{family.name} ({', '.join(family.pipelines)})" for family in FAMILIES)
        raise UserError(
            f"base model '{name}' is a {pipeline}, which is not supported: expected {known}; choose another base model"
        )
    for encoder in family.encoders:
        if not (index.get(encoder) or [None])[0]:
            raise UserError(
                f"base model '{name}' has no {encoder} (a refiner?): expected a whole {family.name}; "
                "choose another base model"
            )
    return family
