"""CLIP as a judge of images: similarity to a text, and the probability that an object is in the image.

CLIP: Radford et al. 2021. CLIP score: Hessel et al. 2021, scaled by 100 as is usual today.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from semantic_aug.errors import UserError
from semantic_aug.prompts import fill
from semantic_aug.registry import resolve_path

WITH, WITHOUT = "a photo with a {}", "a photo without a {}"


@dataclass
class Clip:
    """A CLIP model, in evaluation mode."""

    model: nn.Module
    processor: object
    device: torch.device

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors ``(T, E)`` of texts; what is longer than the model reads is cut off."""
        tokens = self.processor.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        pooled = self.model.text_model(**tokens.to(self.device)).pooler_output
        return _unit(self.model.text_projection(pooled))

    @torch.inference_mode()
    def images(self, read: Callable[[int], Image.Image], count: int, batch_size: int = 64) -> np.ndarray:
        """Unit vectors ``(N, E)`` of images read by index (PIL RGB)."""
        rows = []
        with tqdm(total=count, desc="CLIP", unit="image", mininterval=1.0, leave=False) as bar:
            for start in range(0, count, batch_size):
                images = [read(index) for index in range(start, min(count, start + batch_size))]
                pixels = self.processor.image_processor(images, return_tensors="pt")["pixel_values"].to(self.device)
                rows.append(_unit(self.model.visual_projection(self.model.vision_model(pixels).pooler_output)))
                bar.update(len(images))
        return np.concatenate(rows)

    @property
    def scale(self) -> float:
        """The factor on cosines before a softmax, which the model has learned."""
        return float(self.model.logit_scale.detach().exp())


def _unit(vectors: torch.Tensor) -> np.ndarray:
    return nn.functional.normalize(vectors.float(), dim=-1).cpu().numpy()


def load_clip(name: str, device: str = "cpu") -> Clip:
    """A CLIP model from a folder or the hub.

    Args:
        name: a folder in transformers' layout, or a hub id.

    Raises:
        UserError: it cannot be had, or is no CLIP model.
    """
    from transformers import CLIPModel, CLIPProcessor
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    folder = resolve_path(name)
    source = str(folder) if folder.is_dir() else name
    try:
        model, processor = CLIPModel.from_pretrained(source), CLIPProcessor.from_pretrained(source)
    except Exception as error:  # hub, network, cache and damaged files raise many kinds
        reason = str(error).split("\n")[0][:160]
        raise UserError(
            f"--clip {name} cannot be loaded ({type(error).__name__}: {reason}): expected a folder with a CLIP model and "
            "its processor in transformers' layout, or the id of one on the hub"
        ) from error
    return Clip(model.to(device).eval(), processor, torch.device(device))


def clip_score(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """max(100 cos, 0) ``(N,)`` of image vectors and text vectors, both ``(N, E)`` with unit rows (Hessel et al. 2021)."""
    return np.maximum(100 * np.einsum("ne,ne->n", images, texts), 0)


def presence(clip: Clip, images: np.ndarray, noun: str) -> np.ndarray:
    """Probability ``(N,)`` in [0, 1] that an object, such as the data set's super-class, is in images of unit vectors
    ``(N, E)``: a softmax over the model's logits for "a photo with a {noun}" and "a photo without a {noun}"."""
    logits = clip.scale * images @ clip.texts([fill(WITH, noun), fill(WITHOUT, noun)]).T
    return 1 / (1 + np.exp(np.clip(logits[:, 1] - logits[:, 0], -500, 500)))
