"""Reads checkpoint files of classifiers into a state dict with timm's names.

Accepted formats: plain state dicts; checkpoints of timm's ``train.py``, also with an EMA; models wrapped by DataParallel or
``torch.compile``; modules that contain the classifier (Lightning's ``model.``, a backbone, MoCo's ``encoder_q``).
"""

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from semantic_aug import tensors
from semantic_aug.divergence import non_finite
from semantic_aug.errors import UserError

log = logging.getLogger(__name__)

STATE_KEYS = ("state_dict", "model", "model_state_dict", "module", "net")
EMA_KEYS = ("state_dict_ema", "model_ema", "ema", "ema_state_dict")
WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes of all names in models wrapped by DataParallel or ``torch.compile``."""

_MOMENTUM = ("encoder_k", "momentum", "teacher", "target_")
"""Parts of the names of momentum encoders; the trained network beside them is preferred."""

_KINDS = (
    ("lora_", "a LoRA"),
    ("learned_embeds", "class tokens of stage 1"),
    ("down_blocks.", "a diffusion model"),
    ("encoder.layers.encoder_layer_0", "a vision transformer of torchvision, whose names differ from timm's"),
    ("vision_model.", "a CLIP of transformers"),
    ("blocks.0.attn.qkv", "a vision transformer"),
    ("stages.0.blocks", "a network of stages (ConvNeXt, RegNet, ...)"),
    ("layers.0.blocks.0.attn.relative_position", "a Swin transformer"),
    ("layer4.0.conv3", "a ResNet of bottleneck blocks (50 layers or more)"),
    ("layer4.0.conv1", "a ResNet of basic blocks (18 or 34 layers)"),
    ("features.0.", "a network of torchvision, whose names differ from timm's"),
    ("blocks.0.0.", "an EfficientNet or MobileNet"),
)
"""Substrings of tensor names, and the kind of file that they indicate."""


def read_state(path: Path, wanted: Mapping[str, Tensor], flag: str = "--weights") -> dict[str, Tensor]:
    """Reads the tensors of a checkpoint and renames them to a model's names.

    Args:
        path: ``.safetensors``, or a pickle, which is read without running code.
        wanted: the model's state dict, which determines the prefix of the names in the file.
        flag: flag that gave the path, for errors.

    Raises:
        UserError: a damaged file, no checkpoint of a model, an ambiguous one, or values that are not finite.
    """
    state = _without_wrappers(_tensors(_content(path), path, flag))
    prefix = _prefix(state, wanted, f"{flag} {path}")
    if prefix:
        log.info("%s %s: the tensors below '%s' are used", flag, path, prefix)
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if bad := non_finite(state.items()):
        raise UserError(
            f"{flag} {path} holds values that are not finite ('{bad}' the first tensor): its training diverged"
        )
    return state


def metadata_of(path: Path) -> dict[str, Any]:
    """The metadata of a weight file of ``train_cls.py``: ``classes``, ``model`` and others; empty for other files."""
    if path.suffix != ".safetensors":
        return {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return tensors.read_metadata(file.metadata(), "classes")
    except (SafetensorError, TypeError, ValueError):  # a damaged file is reported when its tensors are read
        return {}


def _content(path: Path) -> Any:
    expected = "expected the state dict of a model"
    if path.suffix != ".safetensors":
        with torch.serialization.safe_globals([argparse.Namespace]):  # holds the arguments of timm's train.py
            return tensors.load_pickle(path, expected)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} cannot be read ({str(error)[:120]}): {expected}") from None


def _tensors(content: Any, path: Path, flag: str) -> dict[str, Tensor]:
    """The state dict of a checkpoint; trained weights are preferred to their moving average, which is logged."""
    if not isinstance(content, Mapping):
        raise UserError(f"{flag} {path} holds a {type(content).__name__}: expected the state dict of a model")
    states = [key for key in (*STATE_KEYS, *EMA_KEYS) if isinstance(content.get(key), Mapping) and content[key]]
    if states:
        averaged = [key for key in states if key in EMA_KEYS and key != states[0]]
        beside = f"; its moving average '{averaged[0]}' is passed over" if averaged else ""
        log.info("%s %s: '%s' is used%s", flag, path, states[0], beside)
        content = content[states[0]]
    state = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not state:
        raise UserError(f"{flag} {path} holds no tensor: expected the state dict of a model")
    return state


def _without_wrappers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Removes the wrappers' prefixes from a state dict."""
    while wrapper := next((w for w in WRAPPERS if all(key.startswith(w) for key in state)), None):
        state = {key.removeprefix(wrapper): value for key, value in state.items()}
    return state


def _prefix(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: str) -> str:
    """The prefix under which most of a model's tensors are found; '' if the names are the model's."""
    probes = list(wanted)[:3]
    prefixes = {""} | {key.removesuffix(p) for p in probes for key in state if key.endswith(f".{p}")}

    def fitting(prefix: str) -> int:
        return sum(prefix + k in state and state[prefix + k].shape == value.shape for k, value in wanted.items())

    counts = {prefix: fitting(prefix) for prefix in prefixes}
    most = max(counts.values())
    best = sorted(prefix for prefix, count in counts.items() if count == most)
    trained = [prefix for prefix in best if not any(word in prefix for word in _MOMENTUM)] or best
    if most == 0 or "" in best:
        return ""
    if len(trained) > 1:
        raise UserError(
            f"{source} holds several such networks (below {', '.join(map(repr, trained))}): save one of them alone"
        )
    return trained[0]


def misfit(state: Mapping[str, Tensor], target: Mapping[str, Tensor], allowed: tuple[str, ...] = ()) -> str | None:
    """The reason why a state dict does not fit a model, or None if it fits.

    Args:
        state: tensors of the file, under the model's names.
        target: the model's state dict.
        allowed: prefixes of names that may be missing or have another shape.

    Counts of batches, which files of PyTorch before 0.4.1 and of other frameworks lack, may be missing: no layer uses them.
    """
    wanted = [key for key in target if not (allowed and key.startswith(allowed))]
    wanted = [key for key in wanted if key in state or not key.endswith(".num_batches_tracked")]
    missing = [key for key in wanted if key not in state]
    other = [key for key in wanted if key in state and state[key].shape != target[key].shape]
    if not missing and not other:
        return None
    parts = []
    if missing:
        parts.append(f"{len(missing)} of the model's {len(wanted)} tensors are missing, '{missing[0]}' the first")
    if other:
        shapes = f"{tuple(state[other[0]].shape)} instead of {tuple(target[other[0]].shape)}"
        parts.append(f"{len(other)} are of another shape, '{other[0]}' the first, {shapes}")
    unexpected = next((key for key in state if key not in target), None)
    if unexpected is not None:
        parts.append(f"'{unexpected}' is not the model's")
    kind = next((kind for mark, kind in _KINDS if any(mark in key for key in state)), "another architecture")
    return f"{'; '.join(parts)}); the file seems to hold {kind}"
