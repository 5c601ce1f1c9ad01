"""Picture grids while training: one row per class, from the same noise every time."""

import torch
from PIL import Image

from semantic_aug.diffusion.base import BaseModel
from semantic_aug.diffusion.loop import Sampler, decode_latents, generate
from semantic_aug.diffusion.schedulers import SolverSettings, make_scheduler
from semantic_aug.finetune.model import TrainedModel
from semantic_aug.pictures import Cell, grid
from semantic_aug.prompts import SAMPLING_TEMPLATE
from semantic_aug.seeding import torch_rng

MAX_CLASSES = 12
SETTINGS = SolverSettings(num_inference_steps=25, guidance_scale=7.5)


@torch.no_grad()
def validation_grid(
    model: TrainedModel, base: BaseModel, class_names: tuple[str, ...], resolution: int, per_class: int, seed: int
) -> Image.Image:
    """Images of up to twelve evenly chosen classes with the present weights, each network in its own precision. The noise of
    the ``per_class`` pictures in a row depends on seed and column only."""
    step = max(1, -(-len(class_names) // MAX_CLASSES))
    scheduler = make_scheduler(base.scheduler_config)
    shape = base.geometry.latent_shape(resolution)
    rows = []
    position = model.templates.index(SAMPLING_TEMPLATE) if SAMPLING_TEMPLATE in model.templates else 0
    model.refresh()
    with model.uncompiled():
        null = base.encode_null(resolution)
        for label in range(0, len(class_names), step):
            labels = torch.full((per_class,), label)
            template = torch.full_like(labels, position)
            sizes = null.added["time_ids"].expand(per_class, -1).cpu() if null.added else None
            embeds = model.conditioning(model.conditions(labels, template, time_ids=sizes)).to(null.dtype)
            noise = [torch_rng(seed, "validation", column) for column in range(per_class)]
            latents = generate(Sampler(model.unet, scheduler, null, SETTINGS), shape, embeds, noise)
            images = decode_latents(base.vae, latents.to(base.vae.dtype)).cpu().numpy()
            rows.append([Cell(Image.fromarray(image)) for image in images])
    return grid(rows, row_titles=[class_names[i] for i in range(0, len(class_names), step)])
