"""A base model without its weights: what can be checked against it in seconds, before they are loaded."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from diffusers import AutoencoderKL, UNet2DConditionModel

from semantic_aug.diffusion.base import BaseModel, check_base, find_weights, read_scheduler_config
from semantic_aug.errors import UserError


def load_skeleton(name: str, folder: Path) -> BaseModel:
    """The networks of a base model on the meta device, made from their configurations, and its tokenizers. The text encoders'
    token tables exist, with ones for vectors.

    The headers of its safetensors files are read, which a file that is cut off does not survive.

    Raises:
        UserError: a configuration, a vocabulary or a weight file is damaged or absent.
    """
    family = check_base(folder, name)
    try:
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
            vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae"))
            text_encoders = tuple(
                _text_encoder(folder / encoder.component, encoder.kind) for encoder in family.encoders
            )
        tokenizers = tuple(
            transformers.CLIPTokenizer.from_pretrained(folder / encoder.tokenizer) for encoder in family.encoders
        )
        for part in family.weight_folders:
            _read_headers(folder / part)
    except UserError:
        raise
    except Exception as error:  # the libraries raise many kinds for a damaged file
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"base model '{name}' cannot be loaded ({reason}): complete the folder") from None
    for network in (unet, vae, *text_encoders):
        network.requires_grad_(False).eval()
    for encoder in text_encoders:  # class tokens begin as copies of rows
        torch.nn.init.ones_(encoder.get_input_embeddings().to_empty(device="cpu").weight)
    return BaseModel(
        name,
        folder,
        family,
        tokenizers,
        text_encoders,
        vae,
        unet=unet,
        scheduler_config=read_scheduler_config(folder, name),
        zero_null=family.sizes,
    )


def _text_encoder(folder: Path, kind: str) -> torch.nn.Module:
    network = getattr(transformers, kind)
    return network(network.config_class.from_pretrained(folder))


def _read_headers(folder: Path) -> None:
    from safetensors import safe_open

    find_weights(folder)
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            file.keys()
