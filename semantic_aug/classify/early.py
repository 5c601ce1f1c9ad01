"""What is checked of a classification request before its hours: disk space always, all a start finds out in ``--dry_run``."""

from __future__ import annotations

import torch

from semantic_aug import files
from semantic_aug.classify.config import ClassifyConfig
from semantic_aug.classify.layers import freeze
from semantic_aug.classify.losses import make_criterion
from semantic_aug.classify.models import make_model
from semantic_aug.classify.optim import make_optimizer
from semantic_aug.classify.processes import Processes, launched
from semantic_aug.datasets import LoadedDataset
from semantic_aug.errors import WouldDownload, no_downloads


def check(config: ClassifyConfig, dataset: LoadedDataset) -> None:
    """Makes the model, its optimiser and its loss, and looks at the shares of a batch and at the disk.

    Raises:
        UserError: one of them does not do.
        WouldDownload: the weights are not on this machine; everything else is checked.
    """
    absent = None
    try:
        with no_downloads(True):
            model, _ = make_model(config.model, len(dataset.class_names), config.resolution, config.weights)
    except WouldDownload as error:
        absent = error
        model, _ = make_model(config.model, len(dataset.class_names), config.resolution, "none")
    freeze(model, config.trainable_layers)
    real = len(dataset.train)
    Processes(config.device).check(min(config.batch_size, real), launched() * config.gradient_accumulation_steps)
    make_criterion(config.loss, dataset.train.counts(), torch.device("cpu"))
    make_optimizer(model, config.optimizer, config.lr, config.weight_decay)
    check_disk(config, model)
    if absent is not None:
        raise absent


def check_disk(config: ClassifyConfig, model: torch.nn.Module) -> None:
    """Refuses a run whose state and results the disk cannot hold.

    Raises:
        UserError: less is free than they take.
    """
    size = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    copies = 6 if config.ema_decay else 5  # weights, their best, the optimiser's two, and the finished file
    files.check_space(config.output_dir, copies * size, "--output_dir")
