"""A classifier trained by stage 3 as the judge of other images: what does it take them for?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import nn

from semantic_aug import runs
from semantic_aug.classify.data import ImageStore, Normaliser, centre, resized_side
from semantic_aug.classify.models import make_model
from semantic_aug.classify.trainer import MODEL_FILE
from semantic_aug.divergence import check_outputs
from semantic_aug.errors import UserError
from semantic_aug.tensors import read_metadata


@dataclass
class Judge:
    """A trained classifier, ready to look at images.

    Attributes:
        class_names: of the data set it was trained on, source spelling.
        model: in evaluation mode.
        normalise: uint8 batches to the model's input.
        resolution: side of its images in pixels.
    """

    class_names: tuple[str, ...]
    model: nn.Module
    normalise: Normaliser
    resolution: int

    @torch.inference_mode()
    def probabilities(self, read: Callable[[int], Image.Image], count: int, batch_size: int = 64) -> np.ndarray:
        """Class probabilities ``(count, K)`` of images read by index (PIL RGB)."""
        store, rows = ImageStore(read, count, resized_side(self.resolution), budget=0), []
        for start in range(0, count, batch_size):
            pixels = store.batch(np.arange(start, min(count, start + batch_size)))
            logits = self.model(self.normalise(torch.from_numpy(centre(pixels, self.resolution))))
            rows.append(logits.float().softmax(-1).cpu().numpy())
            check_outputs(float(rows[-1].sum()))
        return np.concatenate(rows)


def load_judge(folder: str | Path, device: str = "cpu") -> Judge:
    """The classifier of a finished ``train_cls.py`` run.

    Args:
        folder: its output folder.
        device: where it runs.

    Raises:
        UserError: not the folder of a finished run.
    """
    folder = Path(folder)
    arguments, path = runs.load_arguments(folder), folder / MODEL_FILE
    if arguments is None or not path.is_file():
        raise UserError(
            f"{folder} holds no finished classifier: expected the output folder of train_cls.py with {MODEL_FILE}"
        )
    try:
        with safe_open(path, "pt") as content:
            class_names = tuple(read_metadata(content.metadata(), "classes")["classes"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): run train_cls.py again") from None
    resolution = int(arguments["resolution"])
    model, normalisation = make_model(arguments["model"], len(class_names), resolution, str(path))
    place = torch.device(device)
    return Judge(
        class_names, model.to(place).eval(), Normaliser(normalisation.mean, normalisation.std, place), resolution
    )
