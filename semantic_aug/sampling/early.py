"""What is checked of a sampling request before its hours: disk space always, all a start finds out in ``--dry_run``."""

from __future__ import annotations

from semantic_aug import files
from semantic_aug.datasets import LoadedDataset
from semantic_aug.diffusion import tokens as token_io
from semantic_aug.diffusion.schedulers import make_scheduler
from semantic_aug.diffusion.skeleton import load_skeleton
from semantic_aug.sampling.config import BYTES_PER_PIXEL, SampleConfig, subset_folder


def check(config: SampleConfig, dataset: LoadedDataset) -> None:
    """Makes the solver, and installs the class tokens in the base model without its weights, and looks at the disk.

    Whether LoRA, classes and prompts fit is asked of every run (:mod:`semantic_aug.augmentations.checks`).

    Raises:
        UserError: tokens of another base model, a solver that the base model refuses, a full disk.
    """
    weights = config.files
    base = load_skeleton(weights.name, weights.folder)
    make_scheduler(base.scheduler_config, config.solver.scheduler, config.solver.final_sigmas_type)
    if weights.tokens is not None:
        token_io.install_all(token_io.load_tokens(weights.tokens), base.tokenizers, base.text_encoders)
    check_disk(config, dataset)


def check_disk(config: SampleConfig, dataset: LoadedDataset) -> None:
    """Refuses a subset that the disk cannot hold.

    Raises:
        UserError: less is free than a quarter of the estimate, which is what photographs of little detail take.
    """
    folder = subset_folder(config, dataset)
    made = sum(path.stat().st_size for path in folder.rglob(f"*.{config.image_format}")) if folder.exists() else 0
    images = config.multiplier * len(dataset.train) / config.num_shards
    needed = images * config.resolution**2 * BYTES_PER_PIXEL[config.image_format]
    files.check_space(folder, int(needed) // 4 - made, "--output_root")
