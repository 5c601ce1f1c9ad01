"""Classifiers: any timm model by its name or torchvision's, with weights from the hub, a package or a file."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from semantic_aug.classify import backbones, checkpoints
from semantic_aug.datasets.fingerprint import files_digest
from semantic_aug.errors import UserError, WouldDownload, downloads_allowed, unknown
from semantic_aug.registry import resolve_path

log = logging.getLogger(__name__)

TORCHVISION_NAMES = {
    "vit_b_16": "vit_base_patch16_224",
    "vit_b_32": "vit_base_patch32_224",
    "vit_l_16": "vit_large_patch16_224",
    "swin_t": "swin_tiny_patch4_window7_224",
    "swin_s": "swin_small_patch4_window7_224",
    "swin_b": "swin_base_patch4_window7_224",
    "mobilenet_v2": "mobilenetv2_100",
    "mobilenet_v3_large": "mobilenetv3_large_100",
    "mobilenet_v3_small": "mobilenetv3_small_100",
    "efficientnet_v2_s": "tf_efficientnetv2_s",
    "regnet_y_400mf": "regnety_004",
    "regnet_y_8gf": "regnety_080",
}
"""torchvision's names where timm's differ."""

PACKAGED = {"tf_efficientnet_lite0": backbones.efficientnet_lite0}
"""Models whose ImageNet weights come in a Python package, and what makes them."""

PACKAGED_FILES = {"tf_efficientnet_lite0": backbones.efficientnet_lite0_file}
"""Where the package keeps them."""


WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "model_best.pth.tar")
"""What is looked for, in this order, where ``--weights`` is a folder; the last is what timm's ``train.py`` writes."""


@dataclass(frozen=True)
class Normalisation:
    """Channel means and standard deviations of the images a model was pre-trained on, for pixels in [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def timm_name(name: str) -> str:
    """timm's name of a model.

    Raises:
        UserError: no such model; lists the nearest names.
    """
    import timm

    name = TORCHVISION_NAMES.get(name, name)
    if timm.is_model(name):
        return name
    raise unknown("--model", name, [*timm.list_models(), *TORCHVISION_NAMES], "any timm model will do", limit=5)


def make_model(name: str, num_classes: int, resolution: int, weights: str = "auto") -> tuple[nn.Module, Normalisation]:
    """A classifier with a fresh head.

    Args:
        name: timm's or torchvision's name.
        num_classes: K.
        resolution: side of the images in pixels; models of a fixed size are made for it.
        weights: ``auto`` (a package where there is one, else the hub), ``none``, or a file or folder.

    Raises:
        UserError: an unknown model, weights that cannot be had, or those of another architecture.
    """
    import timm

    name = timm_name(name)
    # transformers with position embeddings or windows are built for one image size
    options = {"img_size": resolution} if timm.get_pretrained_cfg_value(name, "fixed_input_size") else {}
    packaged = _packaged(name) if weights == "auto" else None
    if packaged is not None:
        model = packaged
        model.reset_classifier(num_classes)
    elif weights == "auto":
        model = _from_hub(name, num_classes, options)
    else:
        model = timm.create_model(name, num_classes=num_classes, **options)
        if weights != "none":
            load_weights(model, resolve_path(weights), name)
    config = model.pretrained_cfg
    return model, Normalisation(tuple(config["mean"]), tuple(config["std"]))


def _packaged(name: str) -> nn.Module | None:
    """The model with weights from an installed package, or None."""
    make = PACKAGED.get(name)
    try:
        return make() if make else None
    except UserError:  # the package is not installed: the hub has the weights too
        return None


def _from_hub(name: str, num_classes: int, options: dict) -> nn.Module:
    import timm

    if not downloads_allowed() and not _is_cached(timm.get_pretrained_cfg(name)):
        raise WouldDownload(f"the pre-trained weights of {name} from the hub")
    log.info("pre-trained weights of %s: from the hub", name)  # which may be tried for a minute before it fails
    try:
        return timm.create_model(name, pretrained=True, num_classes=num_classes, **options)
    except Exception as error:  # hub, network and cache raise many kinds
        reason = str(error).split("\n")[0][:160]
        raise UserError(
            f"pre-trained weights of {name} cannot be loaded ({type(error).__name__}: {reason}): connect to the hub, "
            "give a file with --weights, or --weights none to start from scratch"
        ) from error


def _is_cached(config: Any) -> bool:
    """Whether timm's pre-trained weights are on this machine."""
    import torch
    from huggingface_hub import try_to_load_from_cache

    if config is None or not (config.hf_hub_id or config.url):
        return True  # there are none, which creating the model says
    names = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    names = (config.hf_hub_filename, *names) if config.hf_hub_filename else names
    if config.hf_hub_id:
        return any(isinstance(try_to_load_from_cache(config.hf_hub_id, name), str) for name in names)
    return (Path(torch.hub.get_dir()) / "checkpoints" / config.url.rpartition("/")[2]).is_file()


def load_weights(model: nn.Module, path: Path, name: str) -> None:
    """Puts pre-trained weights into a model, its head excepted where the number of classes differs.

    Args:
        model: freshly made.
        path: ``.safetensors`` or a pickle (see :mod:`semantic_aug.classify.checkpoints`), or a folder with one.
        name: for errors.

    Raises:
        UserError: not there, unreadable, of another architecture, or with values that are not finite.
    """
    path = weight_file(path)
    own = model.state_dict()
    state = checkpoints.read_state(path, own)
    classifier = model.pretrained_cfg.get("classifier")
    head = tuple(f"{part}." for part in ([classifier] if isinstance(classifier, str) else classifier or ()))
    if reason := checkpoints.misfit(state, own, head):
        raise UserError(f"--weights {path} do not fit {name} ({reason}")
    fitting = {key: value for key, value in state.items() if key in own and own[key].shape == value.shape}
    if dropped := [key for key in own if key not in fitting]:
        log.info("--weights %s: the head is new (the file's '%s' is not one of these classes)", path, dropped[0])
    model.load_state_dict(fitting, strict=False)


def weights_identity(name: str, weights: str) -> str:
    """What pre-trained weights are, wherever they lie: the hub's name of them, the package's file by content, or a file's.

    Args:
        name: timm's or torchvision's name of the model.
        weights: see :func:`make_model`.
    """
    import timm

    if weights == "none":
        return "none"
    name = timm_name(name)
    if weights != "auto":
        return files_digest([weight_file(resolve_path(weights))])
    with contextlib.suppress(UserError):  # the package is not installed: the hub has the weights too
        return files_digest([PACKAGED_FILES[name]()]) if name in PACKAGED_FILES else _hub_name(timm, name)
    return _hub_name(timm, name)


def _hub_name(timm, name: str) -> str:
    config = timm.get_pretrained_cfg(name)
    return str((config and (config.hf_hub_id or config.url)) or name)


def weight_file(path: Path) -> Path:
    """The file of ``--weights PATH``: itself, or the known file inside a folder.

    Raises:
        UserError: none there.
    """
    if path.is_dir():
        path = next(
            (path / f for f in WEIGHT_FILES if (path / f).is_file()),
            path,
        )
    if not path.is_file():
        raise UserError(f"--weights {path}: expected a .safetensors or .pth file, or a folder with model.safetensors")
    return path


def timm_lines(name: str, num_classes: int, resolution: int, path: Path) -> str:
    """Two lines of Python that load a trained classifier with timm alone.

    Args:
        name: timm's or torchvision's name.
        num_classes: K.
        resolution: side of the images it was trained on, in pixels.
        path: of ``model.safetensors``.
    """
    import timm

    name = timm_name(name)
    size = f", img_size={resolution}" if timm.get_pretrained_cfg_value(name, "fixed_input_size") else ""
    options = f"num_classes={num_classes}{size}, checkpoint_path={str(path)!r}"
    return f"import timm\nmodel = timm.create_model({name!r}, {options}).eval()"
