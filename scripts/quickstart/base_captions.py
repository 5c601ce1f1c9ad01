"""Captions for unlabelled photographs of solar cells, from what can be measured in their pixels.

Every image gets a word for each of eight measurements (its rank among the training images decides which), and the names
of the two clusters its ImageNet features fall into, a coarse and a fine one. A caption is one of the project's templates
around a random selection of these words: "a close-up photo of a dark grainy cedar solar cell". Class labels are not used;
what a class means is left for the class tokens of stage 1 to find among these words.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from semantic_aug.prompts import TEMPLATES, fill

SUBJECT = "solar cell"
EMPTY_SHARE = 0.1
WORD_SHARE = 0.5
"""Chance that a measurement's word stands in a caption."""

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
"""Words of each measurement from its lowest to its highest values, each for an equal share of the training images."""

COARSE = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "theta", "kappa")
FINE = (
    "alder",
    "ash",
    "aspen",
    "bamboo",
    "beech",
    "birch",
    "cedar",
    "cherry",
    "elder",
    "elm",
    "fir",
    "hazel",
    "holly",
    "ivy",
    "juniper",
    "larch",
    "laurel",
    "lime",
    "linden",
    "maple",
    "oak",
    "olive",
    "palm",
    "pear",
    "pine",
    "plum",
    "poplar",
    "rowan",
    "spruce",
    "walnut",
    "willow",
    "yew",
)


def blur(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of ``(N, H, W)`` with reflected borders."""
    radius = int(3 * sigma)
    x = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-(x**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).to(images.device)
    padded = F.pad(images[:, None], (radius,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))[:, 0]


def measure(images: Tensor) -> dict[str, np.ndarray]:
    """The eight measurements of uint8 ``(N, H, W)`` images, each float ``(N,)``."""
    x = images.float()
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
    values = {
        "brightness": x.flatten(1).mean(1),
        "contrast": inner.flatten(1).std(1),
        "grain": fine.abs().flatten(1).quantile(0.7, dim=1),
        "dark_area": (medium < -14).float().flatten(1).mean(1) + 1e-3 * (-medium.flatten(1).min(1).values),
        "diagonals": diagonal / inner.shape[1] ** 2,
        "unevenness": broad.flatten(1).std(1),
        "streaks": (gx**2).flatten(1).sum(1) / energy,
        "corners": inner.flatten(1).mean(1) - corners.mean(0),
    }
    return {name: value.cpu().numpy() for name, value in values.items()}


@torch.no_grad()
def features(images: Tensor, backbone: torch.nn.Module) -> np.ndarray:
    """ImageNet features ``(N, D)`` of uint8 ``(N, H, W)`` images: pooled maps of two depths, standardised."""
    rows = []
    for chunk in images.split(64):
        x = (chunk.float() / 127.5 - 1)[:, None].expand(-1, 3, -1, -1)
        x = backbone.bn1(backbone.conv_stem(x))
        pooled = []
        for depth, block in enumerate(backbone.blocks):
            x = block(x)
            if depth in (2, 4):
                pooled += [x.mean((2, 3)), x.amax((2, 3))]
        rows.append(torch.cat(pooled, 1))
    found = torch.cat(rows)
    return ((found - found.mean(0)) / (found.std(0) + 1e-6)).cpu().numpy()


def clusters(values: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """k-means ids ``(N,)`` on the leading 32 principal components."""
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA

    reduced = PCA(32, random_state=seed).fit_transform(values)
    return KMeans(count, n_init=4, random_state=seed).fit_predict(reduced)


@dataclass(frozen=True)
class Describer:
    """The words of every training image.

    Attributes:
        words: per image, one word for each measurement and the two cluster names.
    """

    words: list[tuple[str, ...]]

    @classmethod
    def of(cls, images: Tensor, backbone: torch.nn.Module) -> Describer:
        """Measures uint8 ``(N, H, W)`` images; thresholds are quantiles of these images."""
        columns = []
        for name, values in measure(images).items():
            choices = WORDS[name]
            rank = values.argsort().argsort()
            columns.append([choices[r * len(choices) // len(values)] for r in rank])
        found = features(images, backbone)
        columns += [[names[i] for i in clusters(found, len(names))] for names in (COARSE, FINE)]
        return cls(list(zip(*columns, strict=True)))

    def caption(self, index: int, rng: np.random.Generator) -> str:
        """A caption of one image; empty for a tenth of the draws."""
        if rng.random() < EMPTY_SHARE:
            return ""
        words = [word for word in self.words[index] if rng.random() < WORD_SHARE]
        rng.shuffle(words)
        return fill(TEMPLATES[rng.integers(len(TEMPLATES))], " ".join([*words, SUBJECT]))


def vocabulary_words() -> list[str]:
    """Every word a caption can have, and the words of ELPV's class names (which no caption uses)."""
    from semantic_aug.datasets.elpv import CLASS_NAMES

    texts = [
        *TEMPLATES,
        SUBJECT,
        *COARSE,
        *FINE,
        *CLASS_NAMES,
        *(word for words in WORDS.values() for word in words),
        "an",
    ]
    return sorted({word for text in texts for word in text.replace("{}", " ").replace("-", " ").split()})
