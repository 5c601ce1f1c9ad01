"""Image features of any timm model, one vector per image: the output without the head, or the means of all levels."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from semantic_aug.classify.data import ImageStore, Normaliser
from semantic_aug.classify.models import check_resolution, make_model, weights_identity
from semantic_aug.datasets import ImageTable
from semantic_aug.datasets.cache import cache_folder
from semantic_aug.datasets.fingerprint import content_digest, hash_files, hash_images
from semantic_aug.datasets.synthetic import SyntheticImages
from semantic_aug.divergence import check_outputs
from semantic_aug.files import atomic_path, sha256_text

log = logging.getLogger(__name__)

DEFAULT_MODEL = "tf_efficientnet_lite0"
"""Model whose ImageNet weights come in a Python package, without a model hub."""
VERSION = 3
"""Version of the computation of features; part of every cache file's name."""


class LevelMeans(nn.Module):
    """Concatenates the spatial means of a timm model's intermediate feature maps.

    For images unlike ImageNet's, a linear classifier of these features is close to a fine-tuned model; a linear classifier of
    the last level alone is not.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """``(B, 3, H, W)`` to ``(B, sum of the levels' channels)``."""
        maps = self.model.forward_intermediates(images, intermediates_only=True)
        return torch.cat([level.mean((2, 3)) for level in maps], 1)


@dataclass
class Extractor:
    """A model without its head, in evaluation mode.

    Attributes:
        network: name of the model.
        identity: name, weights and resolution of the model.
        model: maps normalised images to ``(B, D)``.
        normalise: uint8 batches to the model's input.
        resolution: side in pixels to which whole images are resized.
        keep: whether features are cached on disk.
    """

    network: str
    identity: str
    model: nn.Module
    normalise: Normaliser
    resolution: int
    keep: bool = True

    @torch.inference_mode()
    def features(
        self, read: Callable[[int], Image.Image], count: int, identity: str | None = None, batch_size: int = 64
    ) -> np.ndarray:
        """Features of images read by index.

        Args:
            read: function from an index to a PIL RGB image.
            count: number of images N, 1 or more.
            identity: digest of the images' content; None: features are not cached.
            batch_size: images per batch.

        Returns:
            float32 ``(N, D)``.
        """
        path = cache_folder() / f"features-{sha256_text(f'{VERSION} {self.identity} {identity}')[:32]}.npy"
        if self.keep and identity is not None and (kept := _load(path, count)) is not None:
            return kept
        store, rows = ImageStore(read, count, self.resolution, cache="off"), []
        with tqdm(total=count, desc="features", unit="image", mininterval=1.0, leave=False) as bar:
            for start in range(0, count, batch_size):
                pixels = torch.from_numpy(store.batch(np.arange(start, min(count, start + batch_size))))
                rows.append(self.model(self.normalise(pixels)).flatten(1).float().cpu().numpy())
                check_outputs(float(rows[-1].sum()))
                bar.update(len(pixels))
        features = np.concatenate(rows)
        if self.keep and identity is not None:
            _save(path, features)
        return features

    def of_images(self, images: ImageTable | SyntheticImages, batch_size: int = 64) -> np.ndarray:
        """The :meth:`features` of real or synthetic images, cached by their content."""
        table = isinstance(images, ImageTable)
        hashes = hash_images(images) if table else hash_files(images.paths, "synthetic images")
        return self.features(images.image, len(images), content_digest(hashes.hex()), batch_size)


def load_extractor(
    name: str = DEFAULT_MODEL,
    weights: str = "auto",
    resolution: int = 224,
    device: str = "cpu",
    keep: bool = True,
    levels: bool = False,
) -> Extractor:
    """Loads a feature extractor.

    Args:
        weights: ``auto`` (an installed package, else the hub), ``none``, or a file or folder.
        resolution: side of the images in pixels.
        keep: see :class:`Extractor`.
        levels: use the means of all levels (:class:`LevelMeans`) instead of the output, if the model supports it.

    Raises:
        UserError: an unknown model, an unsupported resolution, or weights that cannot be loaded.
    """
    check_resolution(name, resolution)
    with torch.random.fork_rng(devices=[]):  # random weights (``none``) are the same in every process
        torch.manual_seed(0)
        model, normalisation = make_model(name, 0, resolution, weights)
    normalise = Normaliser(*normalisation, torch.device(device))
    identity = f"{name} {weights_identity(name, weights)} {resolution}"
    if levels and hasattr(model, "forward_intermediates"):
        model, identity = LevelMeans(model), f"{identity} levels"
    return Extractor(name, identity, model.to(device).eval(), normalise, resolution, keep)


def _load(path: Path, count: int) -> np.ndarray | None:
    try:
        features = np.load(path)
        os.utime(path)  # the least recently used files are removed first
    except (OSError, ValueError, EOFError):  # absent or truncated
        return None
    return features if features.ndim == 2 and len(features) == count else None


def _save(path: Path, features: np.ndarray) -> None:
    try:
        with atomic_path(path) as temporary, open(temporary, "wb") as out:
            np.save(out, features)
    except OSError as error:
        log.info("features are not kept: %s cannot be written to (%s)", path.parent, error.strerror or error)
