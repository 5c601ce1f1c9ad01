"""Image sizes as Stable Diffusion XL is told them (Podell et al. 2023, arXiv:2307.01952, section 2.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from semantic_aug.datasets import ImageTable
from semantic_aug.finetune.config import FinetuneConfig
from semantic_aug.finetune.latents import crop_box


def image_sizes(table: ImageTable, config: FinetuneConfig) -> Tensor:
    """Original size, crop's corner and target size of every view, ``(N, views, 2, 6)``; the third index is mirrored or not.

    Each is (height, width) in pixels, the corner in those of the image resized to the training resolution.
    """
    rows = []
    for row, key in enumerate(table.keys):
        width, height = table.size(row)
        scale = config.resolution / min(width, height)
        for view in range(config.crops):
            left, top, right, _ = crop_box(width, height, view, key, config.seed)
            for start in (left, width - right):
                corner = [round(top * scale), round(start * scale)]
                rows.append([height, width, *corner, config.resolution, config.resolution])
    return torch.tensor(rows, dtype=torch.float32).view(len(table), config.crops, 2, 6)
