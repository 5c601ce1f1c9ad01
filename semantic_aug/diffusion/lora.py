"""LoRA on attention projections (Hu et al. 2022, arXiv:2106.09685): adding, saving, reading, merging.

It changes the U-Net and, where asked for, the text encoders. The argument ``networks`` holds them by the prefix of their keys
in a file: ``unet``, ``text_encoder``, ``text_encoder_2``.

Files are written in diffusers' format (``pytorch_lora_weights.safetensors``); :mod:`semantic_aug.diffusion.lora_files` reads
it and other formats. A LoRA is merged as W + scale * B A in float32, before any cast, and a key without a module is an error.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from transformers import CLIPTextModel

from semantic_aug.diffusion.base import networks_without_weights
from semantic_aug.diffusion.families import LORA_TARGETS
from semantic_aug.diffusion.lora_files import (
    ALPHA_KEY,
    CLIP_PREFIX,
    KOHYA_PREFIXES,
    METADATA_KEY,
    NETWORKS,
    LoraPair,
    flat_names,
    network_of,
    read_lora,
)
from semantic_aug.errors import UserError
from semantic_aug.registry import LORA_FILES
from semantic_aug.tensors import save_tensors

FILE_NAME = LORA_FILES[0]
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
ADAPTER = "default"


def add_lora(
    unet: UNet2DConditionModel, rank: int, alpha: float | None = None, targets: tuple[str, ...] = LORA_TARGETS
) -> list[nn.Parameter]:
    """Adds a trainable LoRA to the U-Net in place, in float32, B at zero so that the U-Net's output is unchanged.

    Args:
        alpha: scales the update by alpha / r; None for r, that is, a scale of one.

    Returns:
        The trainable parameters.

    Raises:
        UserError: a target that no projection of the U-Net has.
    """
    for target in targets:
        if not any(name.endswith("." + target) for name, _ in unet.named_modules()):
            raise UserError(
                f"--lora_targets {target}: the U-Net has no module of that name; usual ones: {', '.join(LORA_TARGETS)}"
            )
    try:
        return _add_adapter(unet, rank, alpha, targets)
    except (ValueError, NotImplementedError) as error:  # a module that no LoRA can be added to
        raise UserError(
            f"--lora_targets {' '.join(targets)}: {str(error)[:160]}; usual ones: {', '.join(LORA_TARGETS)}"
        ) from None


def _add_adapter(network: nn.Module, rank: int, alpha: float | None, modules: Sequence[str]) -> list[nn.Parameter]:
    settings = LoraConfig(r=rank, lora_alpha=alpha or rank, init_lora_weights="gaussian", target_modules=list(modules))
    network.add_adapter(settings, ADAPTER)
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    return parameters


def add_text_lora(
    text_encoder: CLIPTextModel, rank: int, alpha: float | None = None, layers: int | None = None
) -> list[nn.Parameter]:
    """Adds a trainable LoRA to a text encoder's attention projections in place, in its first ``layers`` layers (None: all); see
    :func:`add_lora`. It freezes everything else in the text encoder: add it before trainable class tokens."""
    chosen = [
        name
        for name, _ in text_encoder.named_modules()
        if name.endswith(TEXT_TARGETS) and (layers is None or int(re.search(r"layers\.(\d+)\.", name)[1]) < layers)
    ]
    return _add_adapter(text_encoder, rank, alpha, chosen)


def trained_state(network: nn.Module, prefix: str = "unet") -> dict[str, Tensor]:
    """A network's LoRA under diffusers' names, with the prefix."""
    state = get_peft_model_state_dict(network, adapter_name=ADAPTER, save_embedding_layers=False)
    state = convert_state_dict_to_diffusers(state)
    if prefix != "unet":
        state = {CLIP_PREFIX + name.removeprefix(CLIP_PREFIX): value for name, value in state.items()}
    return {f"{prefix}.{name}": value.detach().float().cpu().contiguous() for name, value in state.items()}


def save_lora(
    unet: UNet2DConditionModel,
    path: Path,
    alpha: float | None = None,
    text_encoders: Mapping[str, nn.Module] | None = None,
) -> None:
    """Writes the networks' LoRA to ``path``, readable by diffusers' ``load_lora_weights``; an ``alpha`` is recorded, so that
    diffusers too scales by alpha / r. ``text_encoders``, by prefix, may be without a LoRA."""
    state, adapter = {}, {}
    for prefix, network in {"unet": unet, **(text_encoders or {})}.items():
        if ADAPTER not in getattr(network, "peft_config", {}):
            continue
        state |= trained_state(network, prefix)
        config = network.peft_config[ADAPTER]
        adapter |= {
            f"{prefix}.r": config.r,
            f"{prefix}.{ALPHA_KEY}": config.lora_alpha,
            f"{prefix}.target_modules": sorted(name.removeprefix(CLIP_PREFIX) for name in config.target_modules),
        }
    save_tensors(path, state, adapter if alpha is not None else None, METADATA_KEY)


def load_trained(networks: Mapping[str, nn.Module], path: Path) -> None:
    """Puts a saved LoRA back into networks that have one of the same shape, to resume its training. Raises UserError: another
    rank or other targets."""
    saved = read_lora(path)
    modules = {name: module for name, module in _modules(networks).items() if ADAPTER in getattr(module, "lora_A", {})}
    if set(modules) != set(saved):
        odd = sorted(set(modules) ^ set(saved))[0]
        raise UserError(f"{path} does not fit this run: projection {odd} has a LoRA in only one of them")
    for name, pair in saved.items():
        for part, value in (("lora_A", pair.down), ("lora_B", pair.up)):
            weight = getattr(modules[name], part)[ADAPTER].weight
            if weight.shape != value.shape:
                raise UserError(
                    f"{path} does not fit this run: {name} has the shape {tuple(value.shape)}, "
                    f"expected {tuple(weight.shape)}; was --rank changed?"
                )
            with torch.no_grad():
                weight.copy_(value)


def _modules(networks: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Modules by the names of :func:`read_lora`: the U-Net's own names, and those of others with their network's prefix."""
    return {
        name if prefix == "unet" else f"{prefix}.{name.removeprefix(CLIP_PREFIX)}": module
        for prefix, network in networks.items()
        for name, module in network.named_modules()
    }


def merge_lora(unet: UNet2DConditionModel, lora: dict[str, LoraPair], where: str) -> int:
    """:func:`merge_into` for a U-Net alone; scripts outside the package call it."""
    return merge_into({"unet": unet}, lora, where)


@torch.no_grad()
def merge_into(networks: Mapping[str, nn.Module], lora: dict[str, LoraPair], where: str) -> int:
    """Adds a LoRA to the weights themselves, in float32 on the CPU, and returns the number of projections changed. Raises
    UserError: a key that matches no module, or a shape that does not fit: nothing is merged then."""
    matched = match_lora(networks, lora, where)
    for weight, pair in matched:
        if weight.dtype != torch.float32:
            raise ValueError(f"merging into {weight.dtype} weights would round twice: merge before the cast")
        delta = (pair.up.flatten(1).float() @ pair.down.flatten(1).float()) * pair.scale
        weight.add_(delta.reshape(weight.shape).to(weight.device))
    return len(matched)


def match_lora(
    networks: Mapping[str, nn.Module], lora: Mapping[str, LoraPair], where: str
) -> list[tuple[nn.Parameter, LoraPair]]:
    """The weight that each update of a LoRA changes, for networks on any device, meta included. Raises UserError: an update
    that matches no module, or has another shape than its module."""
    modules = _modules(networks)
    flat = flat_names(networks) if any(name.startswith(KOHYA_PREFIXES) for name in lora) else {}
    matched = []
    for name, pair in lora.items():
        prefix = network_of(name)
        weight = getattr(modules.get(flat.get(name, name)), "weight", None)
        if weight is None:
            other = ": it was trained on a network of another structure"
            reason = other if prefix in networks else ", which the base model does not have"
            raise UserError(f"LoRA {where}: '{name}' matches no module of {NETWORKS[prefix]}{reason}")
        shape = (pair.up.shape[0], *pair.down.shape[1:])
        if shape[0] != weight.shape[0] or math.prod(shape[1:]) != math.prod(weight.shape[1:]):
            raise UserError(
                f"LoRA {where}: {name} has the shape {shape}, {NETWORKS[prefix]}'s is {tuple(weight.shape)}: "
                "it was trained on another base model"
            )
        matched.append((weight, pair))
    return matched


def check_lora(path: Path, base_folder: Path) -> None:
    """Refuses a LoRA that cannot be merged into a base model; the base model's weights are not read. Raises UserError: see
    :func:`read_lora` and :func:`match_lora`."""
    match_lora(networks_without_weights(base_folder), read_lora(path), str(path))
