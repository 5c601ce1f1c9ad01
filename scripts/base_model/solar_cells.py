"""Measurements of electroluminescence photographs of solar cells, for the captions of the embedded base model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WORDS = {
    "brightness": ("black", "dim", "grey", "light", "white"),
    "contrast": ("flat", "soft", "plain", "strong", "harsh"),
    "grain": ("smooth", "fine", "grainy", "rough", "coarse"),
    "dark_area": ("clean", "specked", "spotted", "patched", "broken"),
    "diagonals": ("calm", "scratched", "lined", "cracked", "shattered"),
    "unevenness": ("even", "shaded", "cloudy", "uneven", "blotched"),
    "streaks": ("bare", "brushed", "streaked", "striped"),
    "corners": ("square", "cut", "round"),
}
"""Words of each measurement from its lowest to its highest values, each for an equal share of the images."""


def blur(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of ``(N, H, W)`` with reflected borders."""
    radius = int(3 * sigma)
    x = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-(x**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).to(images.device)
    padded = F.pad(images[:, None], (radius,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))[:, 0]


def measure(images: Tensor) -> dict[str, Tensor]:
    """The eight measurements of uint8 ``(N, 1, H, W)`` images, each float ``(N,)``."""
    x = images[:, 0].float()
    inner = x[:, 6:-6, 6:-6]
    # bus bars are horizontal and as wide as the cell: subtracting each row's median leaves what is particular to a place
    rest = inner - inner.median(dim=2, keepdim=True).values
    fine = rest - blur(rest, 1.5)
    medium, broad = blur(rest, 2.0), blur(rest, 10.0)
    gx, gy = medium.diff(dim=2)[:, 1:], medium.diff(dim=1)[:, :, 1:]
    energy = (gx**2 + gy**2).flatten(1).sum(1) + 1e-6
    diagonal = ((gx * gy).abs() * (medium[:, 1:, 1:] < 0)).flatten(1).sum(1)
    corners = torch.stack(
        [x[:, a, b].flatten(1).mean(1) for a in (slice(0, 7), slice(-7, None)) for b in (slice(0, 7), slice(-7, None))]
    )
    return {
        "brightness": x.flatten(1).mean(1),
        "contrast": inner.flatten(1).std(1),
        "grain": fine.abs().flatten(1).quantile(0.7, dim=1),
        "dark_area": (medium < -14).float().flatten(1).mean(1) + 1e-3 * (-medium.flatten(1).min(1).values),
        "diagonals": diagonal / inner.shape[1] ** 2,
        "unevenness": broad.flatten(1).std(1),
        "streaks": (gx**2).flatten(1).sum(1) / energy,
        "corners": inner.flatten(1).mean(1) - corners.mean(0),
    }
