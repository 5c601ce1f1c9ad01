"""The file formats of LoRAs: diffusers', PEFT's, kohya's and that of diffusers' former attention processors.

Each is read as module path -> update with its scale; other formats are refused by name. Module paths are the U-Net's own; those
of a text encoder start with ``text_encoder.`` or ``text_encoder_2.``. kohya's names (``lora_unet_mid_block_...``), which have
underscores for points, are kept until :func:`flat_names` translates them by a network's modules.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from semantic_aug.divergence import non_finite
from semantic_aug.errors import UserError
from semantic_aug.files import read_json_object
from semantic_aug.registry import ADAPTER_CONFIG, find_lora
from semantic_aug.tensors import load_pickle

ALPHA_KEY = "lora_alpha"
METADATA_KEY = "lora_adapter_metadata"
NETWORKS = {"unet": "the U-Net", "text_encoder": "the text encoder", "text_encoder_2": "the second text encoder"}
CLIP_PREFIX = "text_model."
"""Prefix of a text encoder's modules in some classes and versions of transformers; files have it, names here do not."""

_KOHYA = {"lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}
KOHYA_PREFIXES = tuple(_KOHYA)

UNSUPPORTED = {
    "LoHa": (".hada_",),
    "LoKr": (".lokr_",),
    "DoRA": (".dora_scale", ".lora_magnitude_vector"),
    "LoCon with a Tucker core": (".lora_mid.",),
    "OFT": (".oft_", ".oft_blocks", ".oft_diag"),
    "IA3": (".on_input", ".ia3_"),
    "full weight differences": (".diff.", ".diff_b."),
    "LoRA with a bias": (".lora_B.bias", ".lora_up.bias"),
    "LoRA of an embedding": (".lora_embedding_",),
}
"""Formats that are refused by name, and parts of their keys."""

_OTHER_NETWORKS = tuple(
    "transformer. lora_transformer_ diffusion_model. model.diffusion_model. lora_unet_double_blocks".split()
)
_REFUSED_FIELDS = (
    *("use_dora", "lora_bias", "modules_to_save", "layer_replication", "trainable_token_indices", "target_parameters"),
    *("use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config"),
)
"""PEFT's settings that make an adapter more than W + scale * B A."""
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq")
"""PEFT's initialisations that change the base weights too."""


@dataclass
class LoraPair:
    """One projection's update W + scale * up @ down.

    Attributes:
        down: ``(r, in)`` or, of a convolution, ``(r, in, h, w)``; "A" in the paper.
        up: ``(out, r)`` or ``(out, r, 1, 1)``; "B" in the paper.
        scale: alpha / r, or alpha / sqrt(r) where rank-stabilised (Kalajdzievski 2023, arXiv:2312.03732).
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0


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
    r"[._](?P<part>lora_A|lora_B|lora_down|lora_up|down|up|A|B)(?:\.default)?\.weight$"
)
_TEXT_MODULE = re.compile(r"^(text_encoder(?:_2)?\.)(?:text_model\.)?(.+)$")
_OLD_TEXT_PROJECTIONS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out.0": "out_proj"}
_PEFT_TEXT_MODULE = re.compile(r"^(?:text_model\.)?(encoder\.layers\..+)$")


def _module_name(name: str) -> str:
    """A module's path in the U-Net, or in a text encoder with that one's prefix."""
    match = _TEXT_MODULE.match(name)
    if not match:
        return name.removeprefix("unet.")
    parent, _, last = match[2].partition(".self_attn.")
    return f"{match[1]}{parent}.self_attn.{_OLD_TEXT_PROJECTIONS.get(last, last)}" if last else "".join(match.groups())


def normal_name(key: str) -> tuple[str, str] | None:
    """A LoRA file's key to (module path, "down" | "up"), or None where it is no LoRA weight.

    The keys may be peft's ``X.to_q.lora_A.weight``, diffusers' ``X.to_q.lora.down.weight``, the attention processors'
    ``X.processor.to_q_lora.down.weight`` and ``X.to_q_lora.down.weight``, with or without ``unet.``, and kohya's
    ``lora_unet_X_to_q.lora_down.weight``, whose module path stays ``lora_unet_X_to_q``.
    """
    match = _LEAF.match(key)
    if not match:
        return None
    module, projection = match["module"], match["processor"] or match["inner"]
    if projection:
        module = f"{module}.{'to_out.0' if projection == 'to_out' else projection}"
    if key.startswith("base_model.model.") and (text := _PEFT_TEXT_MODULE.match(module)):
        module = f"text_encoder.{text[1]}"
    return _module_name(module), "down" if match["part"] in ("lora_A", "lora_down", "down", "A") else "up"


def network_of(module: str) -> str:
    """The network a module path of :func:`read_lora` belongs to."""
    for prefix, network in _KOHYA.items():
        if module.startswith(prefix):
            return network
    first = module.partition(".")[0]
    return first if first in NETWORKS else "unet"


def read_lora(path: Path) -> dict[str, LoraPair]:
    """A LoRA file as module path -> update. Raises UserError: not readable, without a LoRA, of another format, with half of a
    pair missing, with values that are not finite, or with settings that leave its scale unknown."""
    path = find_lora(path)
    tensors, metadata = _tensors(path)
    _refuse_other_formats(path, tensors)
    if name := non_finite(tensors.items()):
        raise UserError(
            f"LoRA {path} holds values that are not finite ('{name}' the first tensor): its training diverged"
        )
    halves: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    for key, value in tensors.items():
        alpha = key.endswith(".alpha")
        names = normal_name(f"{key.removesuffix('.alpha')}.lora_down.weight" if alpha else key)
        if names is None:
            raise UserError(f"LoRA {path}: key '{key}' is not a LoRA weight of a U-Net or text encoder")
        module, part = names
        fits = value.numel() == 1 if alpha else value.ndim > 1 and value.numel() > 0
        if not fits:
            raise UserError(
                f"LoRA {path}: '{key}' has the shape {tuple(value.shape)}, which is not that of a LoRA weight"
            )
        if alpha:
            alphas[module] = float(value)
            continue
        halves.setdefault(module, {})[part] = value.float()
    if not halves:
        raise UserError(f"LoRA {path} holds no LoRA weight")
    if unused := next((module for module in alphas if module not in halves), None):
        raise UserError(
            f"LoRA {path} scales '{unused}' by an alpha and holds no weights of it: its names are not understood"
        )
    settings = _settings(path, any(key.startswith("base_model.model.") for key in tensors), metadata)
    pairs = {}
    for module, parts in halves.items():
        if set(parts) != {"down", "up"}:
            raise UserError(f"LoRA {path}: {module} has only its {'/'.join(parts)} half")
        rank = parts["down"].shape[0]
        if parts["up"].shape[1] != rank or math.prod(parts["up"].shape[2:]) != 1:
            shapes = f"{tuple(parts['down'].shape)} and {tuple(parts['up'].shape)}"
            raise UserError(
                f"LoRA {path}: the halves of {module} have the shapes {shapes}, which do not belong together"
            )
        if module in alphas:
            scale = alphas[module] / rank
        else:
            scale = _scale(settings.get(network_of(module)), module, rank, path)
        pairs[module] = LoraPair(parts["down"], parts["up"], scale)
    return pairs


def _refuse_other_formats(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises UserError: the file has a format that cannot be merged, which the message names."""
    supported = "supported are LoRAs of diffusers, PEFT and kohya's scripts (W + scale * B A)"
    for name, marks in UNSUPPORTED.items():
        key = next((key for key in tensors if any(mark in f"{key}." for mark in marks)), None)
        if key is not None:
            raise UserError(f"LoRA {path} has the format {name} ('{key}'), which is not supported: {supported}")
    key = next((key for key in tensors if key.startswith(_OTHER_NETWORKS)), None)
    if key is not None:
        raise UserError(f"LoRA {path} is one of a diffusion transformer or a single-file U-Net ('{key}'): {supported}")


def _settings(path: Path, from_peft: bool, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """PEFT's settings of each network: from the file's metadata (diffusers), or from ``adapter_config.json`` (PEFT)."""
    if METADATA_KEY in metadata:
        by_network: dict[str, dict[str, Any]] = {}
        try:
            for key, value in json.loads(metadata[METADATA_KEY]).items():
                network, _, field = key.partition(".")
                by_network.setdefault(network, {})[field] = value
        except (ValueError, AttributeError) as error:
            raise UserError(f"LoRA {path}: its metadata {METADATA_KEY} cannot be read ({error})") from None
    elif from_peft:
        file = path.with_name(ADAPTER_CONFIG)
        try:
            settings = read_json_object(file)
        except (OSError, ValueError) as error:
            raise UserError(
                f"LoRA {path} was saved by PEFT; its scale is in {file}, which cannot be read ({error})"
            ) from None
        by_network = dict.fromkeys(NETWORKS, settings)
    else:
        return {}
    for settings in by_network.values():
        _refuse_settings(path, settings)
    return by_network


def _refuse_settings(path: Path, settings: Mapping[str, Any]) -> None:
    kind = str(settings.get("peft_type", "LORA")).rpartition(".")[2]
    if kind.upper() != "LORA":
        raise UserError(f"LoRA {path} is an adapter of the kind {kind}, which is not supported: expected LORA")
    refused = next((field for field in _REFUSED_FIELDS if settings.get(field)), None)
    if refused is None and settings.get("bias", "none") != "none":
        refused = "bias"
    if refused is None and str(settings.get("init_lora_weights")).lower().startswith(_CHANGED_BASE):
        refused = "init_lora_weights"
    if refused is not None:
        raise UserError(
            f"LoRA {path} was trained with {refused} = {str(settings[refused])[:60]}, which is not supported: it is more "
            "than W + scale * B A of the base model's weights"
        )


def _scale(settings: Mapping[str, Any] | None, module: str, rank: int, path: Path) -> float:
    """alpha / r, or alpha / sqrt(r) where rank-stabilised, of one module; 1 where nothing is recorded."""
    if not settings or settings.get(ALPHA_KEY) is None:
        return 1.0
    try:
        alpha = float(_of_module(settings.get("alpha_pattern"), module, settings[ALPHA_KEY]))
        recorded = int(_of_module(settings.get("rank_pattern"), module, settings.get("r", rank)))
    except (AttributeError, TypeError, ValueError, re.error) as error:
        raise UserError(f"LoRA {path}: its settings for {module} cannot be read ({error})") from None
    if recorded != rank:
        raise UserError(
            f"LoRA {path}: {module} has rank {rank}, its settings say {recorded}: the two do not belong together"
        )
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _of_module(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """A setting of one module by PEFT's rule: the first pattern that its path ends with, else the default."""
    path = module.partition(".")[2] if network_of(module) != "unet" else module
    for pattern, value in (patterns or {}).items():
        if any(re.match(rf"(.*\.)?({pattern})$", name) for name in (path, CLIP_PREFIX + path)):
            return value
    return default


# ------------------------------------------------------------------------------------------------------ kohya's names


def flat_names(networks: Mapping[str, nn.Module]) -> dict[str, str]:
    """kohya's names of the networks' modules -> module paths as :func:`read_lora` gives them.

    U-Nets of Stable Diffusion XL go by the names of the original implementation (``input_blocks_4_1``), others by diffusers'.
    """
    names = {}
    for prefix, network in networks.items():
        stems = [stem for stem, target in _KOHYA.items() if target == prefix]
        for name, _ in network.named_modules():
            if prefix == "unet":
                names.update({f"lora_unet_{flat}": name for flat in _flat_unet_names(name, network)})
            else:
                short = name.removeprefix(CLIP_PREFIX)
                names |= {f"{stem}text_model_{short.replace('.', '_')}": f"{prefix}.{short}" for stem in stems}
                names |= {f"{stem}{short.replace('.', '_')}": f"{prefix}.{short}" for stem in stems}
    return names


_BLOCK = re.compile(r"^(down_blocks|up_blocks)\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)(.*)$")
_RESNET = {
    "norm1": "in_layers_0",
    "conv1": "in_layers_2",
    "time_emb_proj": "emb_layers_1",
    "norm2": "out_layers_0",
    "conv2": "out_layers_3",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "time_embedding.linear_1": "time_embed_0",
    "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0",
    "add_embedding.linear_2": "label_emb_0_2",
}
_MIDDLE = {"mid_block.resnets.0": 0, "mid_block.attentions.0": 1, "mid_block.resnets.1": 2}


def _flat_unet_names(name: str, unet: nn.Module) -> Iterator[str]:
    """A U-Net module's name with underscores: diffusers', and the original implementation's (``input_blocks_4_1_...``)."""
    yield name.replace(".", "_")
    if name in _OUTSIDE:
        yield _OUTSIDE[name]
        return
    for stem, position in _MIDDLE.items():
        if name.startswith(f"{stem}."):
            yield f"middle_block_{position}_{_inner_name(name.removeprefix(f'{stem}.'), '.resnets.' in stem)}"
    match = _BLOCK.match(name)
    if not match or not match[5]:
        return
    side, block, kind, layer = match[1], int(match[2]), match[3], int(match[4])
    inner, per_block = match[5].removeprefix("."), unet.config.layers_per_block + 1
    if kind == "downsamplers":
        yield f"input_blocks_{(block + 1) * per_block}_0_{'op' if inner == 'conv' else inner}"
    elif kind == "upsamplers":  # the last part of the block's last layer
        last = 1 + bool(getattr(unet.up_blocks[block], "has_cross_attention", False))
        yield f"output_blocks_{(block + 1) * per_block - 1}_{last}_{inner}"
    else:
        first, stem = (1, "input_blocks") if side == "down_blocks" else (0, "output_blocks")
        part = int(kind == "attentions")
        yield f"{stem}_{first + block * per_block + layer}_{part}_{_inner_name(inner, kind == 'resnets')}"


def _inner_name(inner: str, resnet: bool) -> str:
    return _RESNET.get(inner, inner) if resnet else inner.replace(".", "_")
