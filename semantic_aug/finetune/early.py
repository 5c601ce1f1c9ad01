"""What is checked of a fine-tuning request before its hours: disk space always, all a start finds out in ``--dry_run``."""

from __future__ import annotations

import torch

from semantic_aug import files
from semantic_aug.datasets import LoadedDataset
from semantic_aug.diffusion.skeleton import load_skeleton
from semantic_aug.finetune.config import FinetuneConfig
from semantic_aug.finetune.model import TrainedModel
from semantic_aug.finetune.optim import make_optimizer, make_schedule


def check(config: FinetuneConfig, dataset: LoadedDataset) -> None:
    """Makes the trained model without weights, its optimiser and its schedule, and looks at the disk.

    Raises:
        UserError: a LoRA target, a prompt, an initialiser, a schedule or the free space that does not do.
    """
    base = load_skeleton(config.base_name, config.base_folder)
    model = TrainedModel(base, config, dataset)
    rates = (config.learning_rate, config.ti_learning_rate)
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates]
    make_schedule(make_optimizer(groups, config, torch.device("cpu")), config)
    trained = sum(parameter.numel() for group in model.parameter_groups(config) for parameter in group["params"])
    files.check_space(
        config.output_dir, disk_needed(config, len(dataset.train), base.geometry, trained), "--output_dir"
    )


def disk_needed(config: FinetuneConfig, images: int, geometry, trained: int) -> int:
    """Bytes that a run writes at most at once: encoded images, and checkpoints with their optimiser's state."""
    channels, height, width = geometry.latent_shape(config.resolution)
    views = config.crops * (2 if config.random_flip else 1)
    latents = 0 if config.random_crops else 4 * images * views * 2 * channels * height * width
    kept = (config.checkpoints_total_limit or 1) + 1 if config.checkpointing_steps else 0
    return latents + 4 * trained * (3 * kept + 1)
