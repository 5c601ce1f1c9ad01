"""Captions of unlabelled images, from measurements of their pixels and from the clusters they fall into.

Every image gets a word for each measurement (its rank among all images decides which) and the names of its clusters:
a coarse and a fine one of ImageNet features, and one of its layout. A caption is one of the project's templates around a
random selection of these words: "a close-up photo of a dark grainy cedar solar cell". Labels are not used; what a class
means is left for the class tokens of stage 1, which start among these words.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from base_model import solar_cells
from base_model.autoencoder import to_tensor
from base_model.recipe import Recipe
from semantic_aug.prompts import TEMPLATES, fill

EMPTY_SHARE = 0.1
WORD_SHARE = 0.5
"""Chance that a word of the image stands in a caption."""
IMAGES_PER_CLUSTER = 8
"""Fewest images per cluster on average; small pools use fewer names."""
FITTED = 20_000
"""Most images that clusters are fitted on; the others go to the nearest centre."""

WORDS = {
    "brightness": ("black", "dim", "grey", "light", "white"),
    "contrast": ("flat", "soft", "plain", "strong", "harsh"),
    "detail": ("smooth", "fine", "grainy", "rough", "coarse"),
    "saturation": ("colourless", "pale", "tinted", "colourful", "vivid"),
    "warmth": ("cold", "cool", "neutral", "warm", "hot"),
    "horizontal": ("left", "central", "right"),
    "vertical": ("high", "middle", "low"),
    "spread": ("narrow", "broad", "wide"),
}
"""Words of the general measurements from the lowest to the highest values; colour only where images have it."""

COARSE = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "theta", "kappa")
FINE = tuple(
    "alder ash aspen bamboo beech birch cedar cherry elder elm fir hazel holly ivy juniper larch laurel lime linden maple "
    "oak olive palm pear pine plum poplar rowan spruce walnut willow yew".split()
)
LAYOUT = tuple(
    "agate amber basalt beryl chalk coral flint garnet granite ivory jade jasper marble mica onyx opal pearl pumice quartz "
    "ruby sapphire shale slate topaz".split()
)


def measure(images: Tensor) -> dict[str, Tensor]:
    """General measurements of uint8 ``(N, 1 | 3, H, W)`` images, each float ``(N,)``."""
    x = images.float()
    luma = x.mean(1)
    soft = F.avg_pool2d(luma[:, None], 3, stride=1, padding=1, count_include_pad=False)[:, 0]
    edges = soft.diff(dim=2).abs()[:, 1:] + soft.diff(dim=1).abs()[:, :, 1:]
    weight = edges / (edges.flatten(1).sum(1)[:, None, None] + 1e-6)  # where the edges are, the subject is
    along = torch.linspace(-1, 1, edges.shape[1], device=x.device)
    across = torch.linspace(-1, 1, edges.shape[2], device=x.device)
    row, column = (weight.sum(2) * along).sum(1), (weight.sum(1) * across).sum(1)
    apart = (along[None, :, None] - row[:, None, None]) ** 2 + (across[None, None] - column[:, None, None]) ** 2
    values = {
        "brightness": luma.flatten(1).mean(1),
        "contrast": luma.flatten(1).std(1),
        "detail": (luma - soft).abs().flatten(1).mean(1),
        "horizontal": column,
        "vertical": row,
        "spread": (weight * apart).flatten(1).sum(1),
    }
    if images.shape[1] == 3:
        values["saturation"] = (x.amax(1) - x.amin(1)).flatten(1).mean(1)
        values["warmth"] = (x[:, 0] - x[:, 2]).flatten(1).mean(1)
    return values


MEASUREMENTS = {"general": (measure, WORDS), "solar-cell": (solar_cells.measure, solar_cells.WORDS)}
"""Measurements by the recipe's ``captions``: the function, and the words of each."""


def layout(images: Tensor) -> np.ndarray:
    """Layout ``(N, 144)`` of uint8 ``(N, C, H, W)`` images: 12x12 brightness, contrast and mean taken out."""
    small = F.interpolate(images.float().mean(1, keepdim=True), (12, 12), mode="area").flatten(1)
    return ((small - small.mean(1, keepdim=True)) / (small.std(1, keepdim=True) + 1)).cpu().numpy()


@torch.no_grad()
def features(x: Tensor, backbone: torch.nn.Module) -> np.ndarray:
    """ImageNet features ``(N, D)`` of ``(N, 3, H, W)`` images in [-1, 1]: pooled maps of two depths."""
    x = backbone.bn1(backbone.conv_stem(x))
    pooled = []
    for depth, block in enumerate(backbone.blocks):
        x = block(x)
        if depth in (2, 4):
            pooled += [x.mean((2, 3)), x.amax((2, 3))]
    return torch.cat(pooled, 1).cpu().numpy()


def clusters(values: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """k-means ids ``(N,)`` of standardised values, on the leading 32 principal components."""
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA

    values = (values - values.mean(0)) / (values.std(0) + 1e-6)
    count = min(count, max(2, len(values) // IMAGES_PER_CLUSTER))
    fitted = values[np.linspace(0, len(values) - 1, min(len(values), FITTED)).round().astype(int)]
    pca = PCA(min(32, *fitted.shape), random_state=seed).fit(fitted)
    means = KMeans(count, n_init=4, random_state=seed).fit(pca.transform(fitted))
    return means.predict(pca.transform(values))


def mirrorings(mirror: str) -> tuple[tuple[int, ...], ...]:
    """Dimensions that are flipped in each mirrored view of a ``(B, C, H, W)`` batch, the unmirrored view first."""
    return {"none": ((),), "horizontal": ((), (-1,)), "both": ((), (-1,), (-2,), (-2, -1))}[mirror]


@dataclass(frozen=True)
class Describer:
    """The words of every image.

    Attributes:
        words: of each image, a word for each measurement and cluster.
        subject: noun of every caption.
    """

    words: list[tuple[str, ...]]
    subject: str

    @classmethod
    def of(cls, images: np.ndarray, recipe: Recipe, backbone: torch.nn.Module | None) -> Describer:
        """Describes uint8 ``(N, H, W, C)`` images by comparing them with one another.

        With general captions each mirrored view is an image of its own, row ``image * views + view``: left becomes right.

        Args:
            images: all training images.
            recipe: its captions, subject and mirroring.
            backbone: network of the features; None: clusters are of the layout alone.
        """
        function, words = MEASUREMENTS[recipe.captions]
        measured, result, layouts = [], [], []
        for batch in _views(images, recipe):
            measured.append({name: value.cpu().numpy() for name, value in function(batch).items()})
            if recipe.captions == "general":
                layouts.append(layout(batch))
            if backbone is not None:
                device = next(backbone.parameters()).device
                result.append(features(to_tensor(batch.permute(0, 2, 3, 1).numpy(), device), backbone))
        columns = []
        for name in (name for name in words if name in measured[0]):
            rank = np.concatenate([values[name] for values in measured]).argsort().argsort()
            columns.append([words[name][r * len(words[name]) // len(rank)] for r in rank])
        for values, groups in ((result, (COARSE, FINE)), (layouts, (LAYOUT,))):
            for names in groups if values else ():
                columns.append([names[i] for i in clusters(np.concatenate(values), len(names))])
        return cls(list(zip(*columns, strict=True)), recipe.subject)

    def caption(self, index: int, rng: np.random.Generator) -> str:
        """A caption of one image; empty for a tenth of the draws."""
        if rng.random() < EMPTY_SHARE:
            return ""
        words = [word for word in self.words[index] if rng.random() < WORD_SHARE]
        rng.shuffle(words)
        return fill(TEMPLATES[rng.integers(len(TEMPLATES))], " ".join([*words, self.subject]))


def described_views(recipe: Recipe) -> int:
    """Views of an image that have words of their own."""
    return len(mirrorings(recipe.mirror)) if recipe.captions == "general" else 1


def _views(images: np.ndarray, recipe: Recipe) -> Iterator[Tensor]:
    """Batches of uint8 ``(B, C, H, W)``, each image followed by its mirrored views where those have words of their own."""
    flips = mirrorings(recipe.mirror)[: described_views(recipe)]
    for start in range(0, len(images), 64):
        batch = torch.from_numpy(np.array(images[start : start + 64])).permute(0, 3, 1, 2)
        yield torch.stack([batch.flip(dims) if dims else batch for dims in flips], 1).flatten(0, 1)


def vocabulary_words(recipe: Recipe) -> list[str]:
    """Every word that a caption can have, and the recipe's further words."""
    measured = [word for words in MEASUREMENTS[recipe.captions][1].values() for word in words]
    names = [*COARSE, *FINE, *(LAYOUT if recipe.captions == "general" else ())]
    texts = [*TEMPLATES, recipe.subject, *names, *recipe.vocabulary, *measured, "an"]
    return sorted({word for text in texts for word in text.replace("{}", " ").replace("-", " ").split()})
