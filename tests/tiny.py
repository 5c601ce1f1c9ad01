"""A tiny seeded Stable Diffusion in diffusers layout, and small rendered images, for tests that run the real thing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

WIDTH = 32
RESOLUTION = 32


def byte_vocabulary() -> dict[str, int]:
    """CLIP's alphabet of printable bytes, alone and at the end of a word, and the two special tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(rest))]
    words = letters + [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    return {word: i for i, word in enumerate(words)}


def _autoencoder(**changes):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=RESOLUTION,
        **changes,
    )


def _unet(cross_attention_dim: int, **changes):
    from diffusers import UNet2DConditionModel

    options = dict(
        sample_size=RESOLUTION // 8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=2,
    )
    return UNet2DConditionModel(**{**options, **changes})


def _text_config(hidden: int, **changes):
    from transformers import CLIPTextConfig

    end = byte_vocabulary()["<|endoftext|>"]
    options = dict(
        vocab_size=end + 1,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=48,
        bos_token_id=end - 1,
        eos_token_id=end,
        pad_token_id=end,
    )
    return CLIPTextConfig(**{**options, **changes})


def _tokenizer(**changes):
    from transformers import CLIPTokenizer

    return CLIPTokenizer(vocab=byte_vocabulary(), merges=[], model_max_length=48, **changes)


NOISE_SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)


def write_base(folder: Path, seed: int = 0, prediction_type: str = "epsilon", hidden: int = WIDTH) -> Path:
    """Writes a random base model of some hundred thousand parameters: 32 px images, 4x4x4 latents."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextModel

    torch.manual_seed(seed)
    pipeline = StableDiffusionPipeline(
        vae=_autoencoder(),
        unet=_unet(hidden),
        text_encoder=CLIPTextModel(_text_config(hidden)),
        scheduler=PNDMScheduler(
            **NOISE_SCHEDULE, skip_prk_steps=True, set_alpha_to_one=False, prediction_type=prediction_type
        ),
        tokenizer=_tokenizer(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def write_sd2(folder: Path, seed: int = 1, hidden: int = 40) -> Path:
    """A tiny Stable Diffusion 2.1: wider text encoder with GELU, padding with "!", linear projections, v-prediction."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextModel

    torch.manual_seed(seed)
    pipeline = StableDiffusionPipeline(
        vae=_autoencoder(),
        unet=_unet(hidden, use_linear_projection=True, attention_head_dim=(2, 4)),
        text_encoder=CLIPTextModel(_text_config(hidden, hidden_act="gelu", num_hidden_layers=3)),
        scheduler=DDIMScheduler(
            **NOISE_SCHEDULE, clip_sample=False, set_alpha_to_one=False, prediction_type="v_prediction"
        ),
        tokenizer=_tokenizer(pad_token="!"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


XL_WIDTHS = (24, 40)
"""Of the tiny Stable Diffusion XL's text encoders."""


def write_sdxl(folder: Path, seed: int = 2, zeros_for_empty_prompt: bool = True) -> Path:
    """A tiny Stable Diffusion XL: two text encoders of different widths, pooled prompt and sizes as added conditions."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    first, second = XL_WIDTHS
    projection, sizes = 16, 8
    pipeline = StableDiffusionXLPipeline(
        vae=_autoencoder(scaling_factor=0.13025),
        unet=_unet(
            first + second,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=sizes,
            projection_class_embeddings_input_dim=6 * sizes + projection,
        ),
        text_encoder=CLIPTextModel(_text_config(first)),
        text_encoder_2=CLIPTextModelWithProjection(
            # the end token as published, which is not the tokenizer's
            _text_config(second, hidden_act="gelu", num_hidden_layers=3, projection_dim=projection, eos_token_id=2)
        ),
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(pad_token="!"),
        scheduler=EulerDiscreteScheduler(**NOISE_SCHEDULE, timestep_spacing="leading"),
        force_zeros_for_empty_prompt=zeros_for_empty_prompt,
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def pipeline(model, kind, scheduler: str = "dpmsolver++", final_sigmas_type: str = "zero"):
    """A diffusers pipeline of the class ``kind`` over the parts of a loaded base model."""
    from semantic_aug.diffusion.schedulers import make_scheduler

    parts = dict(
        vae=model.vae, unet=model.unet, scheduler=make_scheduler(model.scheduler_config, scheduler, final_sigmas_type)
    )
    parts |= zip(model.family.encoders, model.text_encoders, strict=True)
    parts |= zip(model.family.tokenizers, model.tokenizers, strict=True)
    if model.family.sizes:
        parts |= {"force_zeros_for_empty_prompt": model.zero_null, "add_watermarker": False}
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = kind(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(label: int, index: int, size: tuple[int, int] = (40, 36)) -> Image.Image:
    """A small photograph-like picture: a colour and stripes that say its class, and noise that says its index."""
    rng = np.random.default_rng([label, index])
    y, x = np.mgrid[: size[1], : size[0]]
    waves = np.sin((label + 1) * x / 5 + index) * 40
    base = np.stack([waves + 60 * ((label + c) % 4) for c in range(3)], -1)
    return Image.fromarray((base + rng.normal(0, 8, (size[1], size[0], 3)) + 40).clip(0, 255).astype(np.uint8))


def write_image_folder(
    folder: Path,
    classes=("red fox", "blue jay", "toad"),
    train: int = 6,
    val: int = 2,
    test: int = 3,
    extension: str = "png",
) -> Path:
    """Writes a folder with train/val/test folders of class folders; a split of 0 images is left out."""
    for split, count in (("train", train), ("val", val), ("test", test)):
        for label, name in enumerate(classes):
            for index in range(count):
                path = folder / split / name / f"{split}{index:03d}.{extension}"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture(label, index + 100 * len(split)).save(path)
    return folder


def write_tokens(path: Path, class_names, seed: int = 0, width: int = WIDTH) -> Path:
    """Random class tokens in our format."""
    from semantic_aug.diffusion.tokens import ClassTokens, save_tokens

    vectors = torch.randn(len(class_names), width, generator=torch.Generator().manual_seed(seed))
    save_tokens(ClassTokens(tuple(class_names), vectors, base_model="tiny", dataset="tiny"), path)
    return path


def write_lora(path: Path, base: Path, seed: int = 0, rank: int = 3, scale: float = 0.2) -> Path:
    """A random LoRA (both halves non-zero) of a base model's U-Net, in diffusers' format."""
    from diffusers import UNet2DConditionModel

    from semantic_aug.diffusion.lora import add_lora, save_lora

    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    generator = torch.Generator().manual_seed(seed)
    for parameter in add_lora(unet.requires_grad_(False), rank):
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    save_lora(unet, path)
    return path


def read_json(path: Path):
    """A JSON file's content."""
    return json.loads(path.read_text())
