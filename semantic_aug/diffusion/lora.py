"""LoRA on attention projections (Hu et al. 2022, arXiv:2106.09685): adding, saving, reading, merging.

It changes the U-Net and, where asked for, the text encoders. "Networks" are these by the prefix their keys have in a
file: ``unet``, ``text_encoder``, ``text_encoder_2``.

Files are written the way diffusers loads them (``pytorch_lora_weights.safetensors``). Read are those, and the legacy
``.bin`` state dicts of attention processors. A LoRA is merged as W + (alpha / r) * B A in float32, before any cast, and
a key that matches nothing is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPTextModel

from semantic_aug.errors import UserError
from semantic_aug.registry import LORA_FILES, find_lora
from semantic_aug.run_dir import load_pickle, save_tensors

FILE_NAME = LORA_FILES[0]
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
ADAPTER = "default"
ALPHA_KEY = "lora_alpha"
NETWORKS = {"unet": "the U-Net", "text_encoder": "the text encoder", "text_encoder_2": "the second text encoder"}
_CLIP = "text_model."
"""Text encoders' modules are below ``text_model`` in some classes and versions of transformers and not in others; files
have it, names here do not."""


@dataclass
class LoraPair:
    """One projection's update W + scale * up @ down.

    Attributes:
        down: ``(r, in)`` or, of a convolution, ``(r, in, h, w)``; "A" in the paper.
        up: ``(out, r)`` or ``(out, r, 1, 1)``; "B" in the paper.
        scale: alpha / r.
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0


def add_lora(
    unet: UNet2DConditionModel, rank: int, alpha: float | None = None, targets: tuple[str, ...] = TARGETS
) -> list[nn.Parameter]:
    """Adds a trainable LoRA to the U-Net in place, in float32, B at zero so that the U-Net's output is unchanged.

    Args:
        unet: frozen.
        rank: r.
        alpha: scales the update by alpha / r; None for r, that is, a scale of one.
        targets: names of the projections.

    Returns:
        The trainable parameters.

    Raises:
        UserError: a target that no projection of the U-Net has.
    """
    for target in targets:
        if not any(name.endswith("." + target) for name, _ in unet.named_modules()):
            raise UserError(
                f"--lora_targets {target}: the U-Net has no module of that name; usual ones: {', '.join(TARGETS)}"
            )
    unet.add_adapter(
        LoraConfig(r=rank, lora_alpha=alpha or rank, init_lora_weights="gaussian", target_modules=list(targets)),
        ADAPTER,
    )
    parameters = [p for p in unet.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    return parameters


def add_text_lora(
    text_encoder: CLIPTextModel, rank: int, alpha: float | None = None, layers: int | None = None
) -> list[nn.Parameter]:
    """Adds a trainable LoRA to a text encoder's attention projections in place; see :func:`add_lora`.

    Everything else in the text encoder is frozen by it: add it before trainable class tokens.

    Args:
        text_encoder: frozen.
        rank: r.
        alpha: None for r.
        layers: how many layers get one, from the first; None for all. One that no prediction depends on has no gradient.

    Returns:
        The trainable parameters.
    """
    chosen = [
        name
        for name, _ in text_encoder.named_modules()
        if name.endswith(TEXT_TARGETS) and (layers is None or int(re.search(r"layers\.(\d+)\.", name)[1]) < layers)
    ]
    text_encoder.add_adapter(
        LoraConfig(r=rank, lora_alpha=alpha or rank, init_lora_weights="gaussian", target_modules=chosen), ADAPTER
    )
    parameters = [p for p in text_encoder.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    return parameters


def has_lora(network: nn.Module) -> bool:
    """Whether a LoRA was added to a network."""
    return ADAPTER in getattr(network, "peft_config", {})


def trained_state(network: nn.Module, prefix: str = "unet") -> dict[str, Tensor]:
    """A network's LoRA under diffusers' names, with the prefix."""
    state = get_peft_model_state_dict(network, adapter_name=ADAPTER, save_embedding_layers=False)
    state = convert_state_dict_to_diffusers(state)
    if prefix != "unet":
        state = {_CLIP + name.removeprefix(_CLIP): value for name, value in state.items()}
    return {f"{prefix}.{name}": value.detach().float().cpu().contiguous() for name, value in state.items()}


def save_lora(
    unet: UNet2DConditionModel,
    path: Path,
    alpha: float | None = None,
    text_encoders: Mapping[str, nn.Module] | None = None,
) -> None:
    """Writes the networks' LoRA as ``path``, readable by diffusers' ``load_lora_weights``.

    Args:
        unet: with a LoRA added.
        path: of the file.
        alpha: recorded where it is not the rank (diffusers then applies alpha / r too).
        text_encoders: prefix -> text encoder; those without a LoRA are passed over.
    """
    state, adapter = {}, {}
    for prefix, network in {"unet": unet, **(text_encoders or {})}.items():
        if not has_lora(network):
            continue
        state |= trained_state(network, prefix)
        config = network.peft_config[ADAPTER]
        adapter |= {
            f"{prefix}.r": config.r,
            f"{prefix}.{ALPHA_KEY}": config.lora_alpha,
            f"{prefix}.target_modules": sorted(name.removeprefix(_CLIP) for name in config.target_modules),
        }
    metadata = {"format": "pt"}
    if alpha is not None:
        metadata["lora_adapter_metadata"] = json.dumps(adapter)
    save_tensors(path, state, metadata)


def load_trained(networks: Mapping[str, nn.Module], path: Path) -> None:
    """Puts a saved LoRA back into networks that have one of the same shape, for going on with its training.

    Raises:
        UserError: another rank or other targets.
    """
    saved = read_lora(path)
    modules = {
        _full_name(prefix, name): module
        for prefix, network in networks.items()
        for name, module in network.named_modules()
        if ADAPTER in getattr(module, "lora_A", {})
    }
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


def _full_name(prefix: str, module: str) -> str:
    """How :func:`read_lora` calls a network's module: the U-Net's as it does itself, others with their prefix."""
    return module if prefix == "unet" else f"{prefix}.{module.removeprefix(_CLIP)}"


def _tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    expected = "expected a LoRA as safetensors, or a legacy .bin state dict of tensors"
    if path.suffix != ".safetensors":
        state = load_pickle(path, expected)
        if not isinstance(state, dict):
            raise UserError(f"{path} holds a {type(state).__name__}: {expected}")
        return {name: value for name, value in state.items() if isinstance(value, Tensor)}, {}
    try:
        with safe_open(path, "pt") as content:
            return {name: content.get_tensor(name) for name in content.keys()}, content.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} cannot be read ({str(error)[:120]}): {expected}") from None


_LEAF = re.compile(
    r"^(?:unet\.|base_model\.model\.)*(?P<module>.+?)"
    r"(?:\.processor\.(?P<processor>to_q|to_k|to_v|to_out)_lora|\.(?P<inner>to_q|to_k|to_v|to_out)_lora|"
    r"\.lora(?:_linear_layer)?)?"
    r"[._](?P<part>lora_A|lora_B|down|up|A|B)(?:\.default)?\.weight$"
)


_TEXT_MODULE = re.compile(r"^(text_encoder(?:_2)?\.)(?:text_model\.)?(.+)$")
_OLD_TEXT_PROJECTIONS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out.0": "out_proj"}


def _module_name(name: str) -> str:
    """A module's path as it is in the U-Net or, with the prefix of a text encoder, in that one."""
    match = _TEXT_MODULE.match(name)
    if not match:
        return name.removeprefix("unet.")
    parent, _, last = match[2].partition(".self_attn.")
    return f"{match[1]}{parent}.self_attn.{_OLD_TEXT_PROJECTIONS.get(last, last)}" if last else "".join(match.groups())


def normal_name(key: str) -> tuple[str, str] | None:
    """A LoRA file's key to (module path, "down" | "up"), or None for what is no LoRA weight.

    Paths are the U-Net's own; a text encoder's start with ``text_encoder.`` or ``text_encoder_2.``.

    Understood are peft's ``X.to_q.lora_A.weight``, diffusers' ``X.to_q.lora.down.weight`` and the attention
    processors' ``X.processor.to_q_lora.down.weight`` and ``X.to_q_lora.down.weight``, with or without ``unet.``.
    """
    match = _LEAF.match(key)
    if not match:
        return None
    module, projection = match["module"], match["processor"] or match["inner"]
    if projection:
        module = f"{module}.{'to_out.0' if projection == 'to_out' else projection}"
    return _module_name(module), "down" if match["part"] in ("lora_A", "down", "A") else "up"


def read_lora(path: Path) -> dict[str, LoraPair]:
    """A LoRA file as module path -> update.

    Args:
        path: file or folder; see the module's text for the formats and :func:`normal_name` for the module paths.

    Raises:
        UserError: not readable, no LoRA in it, a key that is no LoRA weight, or half of a pair missing.
    """
    path = find_lora(path)
    tensors, metadata = _tensors(path)
    halves: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    for key, value in tensors.items():
        if key.endswith(".alpha"):
            alphas[_module_name(key.removesuffix(".alpha"))] = float(value)
            continue
        found = normal_name(key)
        if found is None:
            raise UserError(f"LoRA {path}: key '{key}' is not a LoRA weight of a U-Net or text encoder")
        module, part = found
        halves.setdefault(module, {})[part] = value.float()
    if not halves:
        raise UserError(f"LoRA {path} holds no LoRA weight")
    recorded = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    pairs = {}
    for module, parts in halves.items():
        if set(parts) != {"down", "up"}:
            raise UserError(f"LoRA {path}: {module} has only its {'/'.join(parts)} half")
        rank = parts["down"].shape[0]
        alpha = alphas.get(module, recorded.get(f"{network_of(module)}.{ALPHA_KEY}", rank))
        pairs[module] = LoraPair(parts["down"], parts["up"], float(alpha) / rank)
    return pairs


def network_of(module: str) -> str:
    """The network a module path of :func:`read_lora` belongs to."""
    first = module.partition(".")[0]
    return first if first in NETWORKS else "unet"


def merge_lora(unet: UNet2DConditionModel, lora: dict[str, LoraPair], where: str) -> int:
    """:func:`merge_into` for a U-Net alone."""
    return merge_into({"unet": unet}, lora, where)


@torch.no_grad()
def merge_into(networks: Mapping[str, nn.Module], lora: dict[str, LoraPair], where: str) -> int:
    """Adds a LoRA to the weights themselves, in float32 on the CPU; the networks have no adapter afterwards.

    Args:
        networks: in float32.
        lora: from :func:`read_lora`.
        where: the LoRA's file, for errors.

    Returns:
        The number of projections changed.

    Raises:
        UserError: a key that matches no module, or a shape that does not fit: nothing is merged then.
    """
    modules = {
        _full_name(prefix, name): module
        for prefix, network in networks.items()
        for name, module in network.named_modules()
    }
    updates = []
    for name, pair in lora.items():
        network = NETWORKS[network_of(name)]
        weight = getattr(modules.get(name), "weight", None)
        if weight is None:
            there = network_of(name) in networks
            raise UserError(
                f"LoRA {where}: '{name}' matches no module of {network}"
                + (": it was trained on another base model" if there else ", which the base model does not have")
            )
        delta = (pair.up.flatten(1).float() @ pair.down.flatten(1).float()) * pair.scale
        if delta.numel() != weight.numel() or delta.shape[0] != weight.shape[0]:
            raise UserError(
                f"LoRA {where}: {name} has the shape {tuple(delta.shape)}, {network}'s is {tuple(weight.shape)}: "
                "it was trained on another base model"
            )
        updates.append((weight, delta.reshape(weight.shape)))
    for weight, delta in updates:
        if weight.dtype != torch.float32:
            raise ValueError(f"merging into {weight.dtype} weights would round twice: merge before the cast")
        weight.add_(delta.to(weight.device))
    return len(updates)
