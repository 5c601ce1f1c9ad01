"""Loading a pre-trained Stable Diffusion (1.x, 2.x, XL) in diffusers layout, from a folder or from the hub."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semantic_aug.diffusion.families import Family, family_of, read_config, read_configs
from semantic_aug.diffusion.schedulers import check_noise_schedule
from semantic_aug.diffusion.weights import check_weights, find_weights
from semantic_aug.errors import UserError, WouldDownload, downloads_allowed
from semantic_aug.registry import resolve_path, shown_path

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    from semantic_aug.diffusion.text import Conditions

log = logging.getLogger(__name__)

DEFAULT_MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"
EMBEDDED_MODEL = "scripts/quickstart/base"
STABLE_DIFFUSION_2 = tuple(f"stable-diffusion-2{version}" for version in ("", "-base", "-1", "-1-base"))
SUCCESSORS = {
    "runwayml/stable-diffusion-v1-5": DEFAULT_MODEL,
    **{f"stabilityai/{name}": f"sd2-community/{name}" for name in STABLE_DIFFUSION_2},
}
"""Hub ids that were removed, and where the same weights are now."""

HUB_CONFIGS = ["model_index.json", "*/config.json", "scheduler/scheduler_config.json"]
"""Files that tell whether a model of the hub is supported; read before its weights are downloaded."""
HUB_FILES = [
    *(*HUB_CONFIGS, "tokenizer/*", "tokenizer_2/*", "README.md"),
    *("*/*.safetensors", "*/*.safetensors.index.json"),
]

HUB_VARIANTS = ["*.fp16.*"]
HUB_IGNORED = [
    *(*HUB_VARIANTS, "*.non_ema.*", "*.ema.*", "safety_checker/*", "feature_extractor/*", "*.msgpack", "*.onnx"),
    "vae_1_0/*",  # SDXL's repository has an older VAE beside the one it uses
]


@dataclass(frozen=True)
class Geometry:
    """Sizes of a base model's images and latents.

    Attributes:
        downsampling: pixels per latent cell along one side (8 for Stable Diffusion).
        native_resolution: side in pixels the model was trained at.
        latent_channels: C of the latents.
    """

    downsampling: int
    native_resolution: int
    latent_channels: int

    @classmethod
    def of(cls, unet: Mapping[str, Any], vae: Mapping[str, Any]) -> Geometry:
        """From the configurations of U-Net and VAE."""
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        return cls(factor, int(unet["sample_size"]) * factor, int(vae["latent_channels"]))

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a square image."""
        return self.latent_channels, resolution // self.downsampling, resolution // self.downsampling

    def check(self, resolution: int) -> None:
        """Refuses a resolution that is not a whole number of latent cells. Raises UserError: not a multiple of
        :attr:`downsampling`."""
        if resolution < self.downsampling or resolution % self.downsampling:
            raise UserError(
                f"--resolution {resolution}: expected a multiple of {self.downsampling} pixels for this base model "
                f"(its own resolution is {self.native_resolution})"
            )


def read_geometry(folder: Path) -> Geometry:
    """The geometry of a base model's folder, without loading a weight. Raises UserError: a pipeline of an unknown family, or
    configurations that are not those of a Stable Diffusion."""
    check_configs(folder, shown_path(folder))
    unet, vae = read_configs(folder, shown_path(folder))
    try:
        return Geometry.of(unet, vae)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"base model folder {folder} is not a Stable Diffusion in diffusers layout ({type(error).__name__}: {error})"
        ) from None


def check_configs(folder: Path, name: str) -> Family:
    """The family of a base model whose configurations are all supported: pipeline, networks, noise schedule. Raises UserError:
    names what is not supported, and what is."""
    family = family_of(folder, name)
    for encoder in family.encoders:
        read_config(folder / encoder / "config.json", name)  # transformers takes defaults for an absent one
    family.check(*read_configs(folder, name), name)
    check_noise_schedule(read_scheduler_config(folder, name), name)
    return family


def check_base(folder: Path, name: str) -> Family:
    """:func:`check_configs`, and whether the weights of all networks are present and whole as far as headers tell. Raises
    UserError: names what is not supported, or what is missing."""
    family = check_configs(folder, name)
    check_weights(folder, family.weight_folders, name)
    return family


def read_scheduler_config(folder: Path, name: str) -> dict[str, Any]:
    """A base model's noise schedule, ``scheduler_config.json``."""
    return read_config(folder / "scheduler" / "scheduler_config.json", name)


@dataclass
class BaseModel:
    """The parts of a Stable Diffusion, in evaluation mode and without gradients.

    Attributes:
        name: hub id or folder as the user gave it; recorded in checkpoints.
        folder: where its files are on this machine.
        tokenizers: one per text encoder; class tokens are added to each.
        vae: autoencoder, images ``(B, 3, H, W)`` in [-1, 1] to latents ``(B, C, H/f, W/f)``.
        scheduler_config: of the base model; every scheduler is made from it.
        zero_null: whether guidance starts from zeros instead of the empty prompt's encoding (XL).
    """

    name: str
    folder: Path
    family: Family
    tokenizers: tuple[CLIPTokenizer, ...]
    text_encoders: tuple[CLIPTextModel, ...]
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    scheduler_config: dict[str, Any]
    zero_null: bool = False

    @property
    def tokenizer(self) -> CLIPTokenizer:
        """The first tokenizer, the only one of Stable Diffusion 1.x/2.x."""
        return self.tokenizers[0]

    @property
    def text_encoder(self) -> CLIPTextModel:
        """The first text encoder, the only one of Stable Diffusion 1.x/2.x."""
        return self.text_encoders[0]

    @property
    def networks(self) -> dict[str, torch.nn.Module]:
        """The networks that a LoRA may change, by the prefix of its keys in a file."""
        return {"unet": self.unet, **dict(zip(self.family.encoders, self.text_encoders, strict=True))}

    @property
    def geometry(self) -> Geometry:
        """Sizes of images and latents."""
        return Geometry.of(self.unet.config, self.vae.config)

    def encode(self, prompts: Sequence[str], resolution: int) -> Conditions:
        """Encodes prompts, each for a square image of ``resolution`` pixels, as the U-Net's conditioning; no gradients."""
        return self.family.encode_prompts(self.tokenizers, self.text_encoders, prompts, resolution)

    def encode_null(self, resolution: int) -> Conditions:
        """The unconditional conditioning of guidance, one row, as in the family's diffusers pipeline."""
        null = self.encode([""], resolution)
        return self.family.zeroed(null) if self.zero_null else null

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> BaseModel:
        """Moves (and casts) the networks in place; a VAE that overflows in float16 stays in float32."""
        for part in (*self.text_encoders, self.unet, self.vae):
            part.to(device)
            wanted = self.family.vae_dtype(self.vae, dtype) if part is self.vae else dtype
            if wanted not in (None, part.dtype):
                part.to(wanted)
        return self


def _how_to_get(name: str) -> str:
    if resolve_path(name).exists():
        return f"complete the folder, or use the embedded small model '{EMBEDDED_MODEL}'"
    return (
        f"download it with 'hf download {name}', give a folder in diffusers layout, "
        f"or use the embedded small model '{EMBEDDED_MODEL}'"
    )


def find_base(name: str) -> Path:
    """The folder of a base model: a local folder, or else a download of the hub, cached or new.

    A removed hub id is replaced by its successor, with a warning; a local copy of either is taken.

    Raises:
        UserError: neither a folder in diffusers layout nor available on the hub, or not supported (:func:`check_base`).
    """
    folder = _find_folder(name)
    check_base(folder, name)
    return folder


def _find_folder(name: str) -> Path:
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
    if not downloads_allowed():
        raise WouldDownload(f"the base model {name} from the hub")
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
    return folder if _is_whole(folder, name) else None


def _is_whole(folder: Path, name: str) -> bool:
    if not (folder / "model_index.json").is_file():
        return False
    try:
        return all(find_weights(folder / part) for part in check_configs(folder, name).weight_folders)
    except UserError:  # a configuration, an index or a shard is missing, or the model is not supported
        return False


def _hub_download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        check_configs(Path(snapshot_download(name, allow_patterns=HUB_CONFIGS, ignore_patterns=HUB_IGNORED)), name)
        folder = Path(snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=HUB_IGNORED))
        if not _is_whole(folder, name):  # the repository may hold half precision only
            others = [pattern for pattern in HUB_IGNORED if pattern not in HUB_VARIANTS]
            folder = Path(snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=others))
    except UserError:
        raise
    except Exception as error:  # the library has many kinds for "no such id", "no network", "no permission"
        reason = str(error).split("\n")[0][:160]
        raise UserError(
            f"base model '{name}' is neither a folder nor to be had from the hub "
            f"({type(error).__name__}: {reason}): {_how_to_get(name)}"
        ) from error
    if not _is_whole(folder, name):
        raise UserError(
            f"base model '{name}' on the hub has no safetensors weights in diffusers layout: {_how_to_get(name)}"
        )
    return folder


def load_base(name: str, folder: Path | None = None) -> BaseModel:
    """Loads a base model in float32 on the CPU. Raises UserError: not there, not in diffusers layout, or of an unknown
    family."""
    import transformers
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers.utils import logging as transformers_logging

    from semantic_aug.divergence import non_finite

    folder = folder or _find_folder(name)
    transformers_logging.disable_progress_bar()
    family = check_base(folder, name)
    kinds = {"vae": AutoencoderKL, "unet": UNet2DConditionModel}
    kinds |= {encoder: getattr(transformers, kind) for encoder, kind in family.encoders.items()}
    networks = {part: _load_network(kind, folder / part, name) for part, kind in kinds.items()}
    for part, network in networks.items():
        if tensor := non_finite(network.named_parameters()):
            raise UserError(
                f"base model '{name}': {part} holds values that are not finite ('{tensor}' the first tensor): download "
                f"{shown_path(folder / part)} again, or use another base model"
            )
    return _assembled(name, folder, family, networks)


def _assembled(name: str, folder: Path, family: Family, networks: dict[str, torch.nn.Module]) -> BaseModel:
    """The networks with the tokenizers. Raises UserError: a tokenizer is absent or damaged."""
    from semantic_aug.diffusion.text import load_tokenizer

    for network in networks.values():
        network.requires_grad_(False).eval()
    index = read_config(folder / "model_index.json", name)
    return BaseModel(
        *(name, folder, family),
        tokenizers=tuple(load_tokenizer(folder / part) for part in family.tokenizers),
        text_encoders=tuple(networks[encoder] for encoder in family.encoders),
        vae=networks["vae"],
        unet=networks["unet"],
        scheduler_config=read_scheduler_config(folder, name),
        zero_null=family.sizes and bool(index.get("force_zeros_for_empty_prompt", True)),
    )


def _load_network(kind: type, folder: Path, name: str) -> torch.nn.Module:
    """One network in float32, from the files that :func:`find_weights` chooses."""
    import torch

    weights = find_weights(folder)
    precision = {"torch_dtype" if kind.__module__.startswith("diffusers.") else "dtype": torch.float32}
    try:
        network, loaded = kind.from_pretrained(
            folder,
            variant=weights.variant,
            use_safetensors=not weights.pickled,
            output_loading_info=True,
            local_files_only=True,
            **precision,
        )
    except Exception as error:  # the libraries raise many kinds for a damaged file or another architecture
        reason = str(error).split("\n")[0][:200]
        raise UserError(
            f"base model '{name}': {shown_path(folder)} cannot be loaded ({type(error).__name__}: {reason}): "
            f"{_how_to_get(name)}"
        ) from error
    if missing := sorted(loaded["missing_keys"]):
        raise UserError(
            f"base model '{name}': the weights in {shown_path(folder)} lack {len(missing)} tensors ('{missing[0]}' the "
            "first) that its config.json asks for: the two do not belong together"
        )
    return network


def networks_without_weights(folder: Path) -> dict[str, torch.nn.Module]:
    """The networks of a base model on the meta device, without values, by the prefix of their LoRA's keys."""
    import torch
    import transformers
    from diffusers import UNet2DConditionModel

    family = family_of(folder, shown_path(folder))
    with torch.device("meta"):
        networks = {"unet": UNet2DConditionModel.from_config(read_configs(folder, shown_path(folder))[0])}
        for encoder, kind in family.encoders.items():
            config = transformers.CLIPTextConfig.from_pretrained(folder / encoder)
            networks[encoder] = getattr(transformers, kind)(config)
    return networks


def load_skeleton(name: str, folder: Path) -> BaseModel:
    """A base model without its weights, for checks in seconds: networks on the meta device, and tokenizers. Only the text
    encoders' token tables have values, all ones. Raises UserError: a configuration, a vocabulary or (as far as its header
    tells) a weight file is damaged or absent."""
    import torch
    from diffusers import AutoencoderKL

    family = check_base(folder, name)
    try:
        networks = networks_without_weights(folder)
        with torch.device("meta"):
            networks["vae"] = AutoencoderKL.from_config(read_configs(folder, name)[1])
    except Exception as error:  # the libraries raise many kinds for a damaged file
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"base model '{name}' cannot be loaded ({reason}): complete the folder") from None
    for encoder in family.encoders:  # class tokens begin as copies of rows
        torch.nn.init.ones_(networks[encoder].get_input_embeddings().to_empty(device="cpu").weight)
    return _assembled(name, folder, family, networks)


def weight_files(folder: Path) -> list[Path]:
    """The files that a base model's results depend on: weights, configurations and vocabulary, sorted."""
    family = family_of(folder, shown_path(folder))
    parts = (*family.weight_folders, *family.tokenizers, "scheduler")
    texts = {
        path
        for part in parts
        for path in (folder / part).iterdir()
        if path.suffix in (".json", ".txt") and ".index." not in path.name
    }
    present = filter(None, (find_weights(folder / part) for part in family.weight_folders))
    weights = {path for part in present for path in part.files}
    index = {folder / "model_index.json"} if family.sizes else set()  # it decides the unconditional conditioning
    return sorted(texts | weights | index)
