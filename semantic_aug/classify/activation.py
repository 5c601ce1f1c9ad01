"""Class activation maps: the regions of an image that support a class (Grad-CAM, Selvaraju et al. 2017, arXiv:1610.02391)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from semantic_aug.classify.data import Normaliser
from semantic_aug.datasets.images import fit
from semantic_aug.errors import UserError

BATCH = 16


def activation_maps(
    model: nn.Module, normalise: Normaliser, resolution: int, read: Callable[[int], Image.Image], classes: Sequence[int]
) -> Iterator[np.ndarray]:
    """Grad-CAM of whole images, resized to a square, batch by batch: float32 ``(B, resolution, resolution)`` in [0, 1],
    relative to each map's maximum; all 0 if no region supports the class.

    Args:
        model: timm model in evaluation mode.
        read: function from an index to a PIL RGB image.
        classes: class (index of the output) of each image.

    Raises:
        UserError: pytorch-grad-cam is not installed, or a model without spatial features.
    """
    try:
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    except ImportError:
        raise UserError(
            "--object_mask without boxes or masks takes class activation maps of the package grad-cam: pip install grad-cam"
        ) from None
    layer, as_grid = target_layer(model)
    with GradCAM(model=model.requires_grad_(False), target_layers=[layer], reshape_transform=as_grid) as cam:
        for start in range(0, len(classes), BATCH):
            rows = range(start, min(len(classes), start + BATCH))
            pixels = np.stack([np.asarray(fit(read(row), resolution)) for row in rows])
            inputs = normalise(torch.from_numpy(pixels)).requires_grad_()  # so that the layer gets gradients
            targets = [ClassifierOutputTarget(classes[row]) for row in rows]
            # the returned maps are not used: they are scaled by each map's minimum, too
            cam(inputs, targets=targets)
            hooked = cam.activations_and_grads
            features, gradients = (grid.detach().cpu().numpy() for grid in (hooked.activations[0], hooked.gradients[0]))
            yield shares(cam.get_cam_image(inputs, layer, targets, features, gradients), resolution)


def shares(maps: np.ndarray, side: int) -> np.ndarray:
    """Resizes maps ``(B, h, w)`` to float32 ``(B, side, side)`` in [0, 1]: positive values divided by each map's maximum."""
    positive = torch.from_numpy(np.asarray(maps, np.float32)).relu()[:, None]
    whole = nn.functional.interpolate(positive, (side, side), mode="bilinear")[:, 0]
    most = whole.amax((1, 2), keepdim=True)
    return torch.where(most > 0, whole / most, 0).numpy()


def target_layer(model: nn.Module) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """The layer of a model for Grad-CAM, and a function from its output to ``(B, C, h, w)``.

    For a network of stages it is the last stage that timm lists. For a vision transformer it is the norm before the last
    attention; after that attention only the class token reaches the output.

    Raises:
        UserError: another kind of model.
    """
    stages = getattr(model, "feature_info", None)
    if hasattr(model, "num_prefix_tokens") and hasattr(getattr(model, "patch_embed", None), "grid_size"):
        prefix, (height, width) = model.num_prefix_tokens, model.patch_embed.grid_size
        return model.blocks[-1].norm1, lambda x: x[:, prefix:].unflatten(1, (height, width)).permute(0, 3, 1, 2)
    name = type(model).__name__
    if not stages or "module" not in stages[-1]:
        raise UserError(f"--classifier: {name} has no stages of which timm knows, and so no class activation map")
    channels = stages[-1]["num_chs"]

    def as_grid(x: Tensor) -> Tensor:
        if x.ndim == 4 and channels in (x.shape[1], x.shape[3]):
            return x if x.shape[1] == channels else x.permute(0, 3, 1, 2)  # channels last, as Swin has them
        raise UserError(f"--classifier: the features of {name} are no grid {tuple(x.shape)}: no class activation map")

    return model.get_submodule(stages[-1]["module"]), as_grid
