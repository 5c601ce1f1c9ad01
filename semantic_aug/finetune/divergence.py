"""What stops a fine-tuning run that diverges, and what it advises."""

from __future__ import annotations

import torch

from semantic_aug.divergence import LossLog, check_losses, non_finite
from semantic_aug.errors import UserError
from semantic_aug.finetune import checkpoints
from semantic_aug.finetune.config import FinetuneConfig
from semantic_aug.finetune.model import TrainedModel

MIN_LOSS_SCALE = 2.0**-14
"""Scale of the loss in fp16 below which its gradients will not become finite any more."""


def sum_of_losses(log: LossLog, step: int, scaler: torch.amp.GradScaler | None, config: FinetuneConfig) -> float:
    """The sum of the losses since the last look at them.

    Args:
        log: of the run.
        step: optimiser steps done.
        scaler: of the loss in fp16, or None.
        config: of the run.

    Raises:
        UserError: a loss is not finite, or the fp16 gradients are not at any scale of it.
    """
    losses = log.read()
    check_losses(losses, step, advice(config))
    if scaler is not None and scaler.get_scale() < MIN_LOSS_SCALE:
        raise UserError(
            f"training diverged: at step {step} no scale of the loss gives finite fp16 gradients; {advice(config)}"
        )
    return float(losses.sum())


def check_weights(model: TrainedModel, step: int, config: FinetuneConfig) -> None:
    """Refuses trained weights that are not finite, before they are written.

    Raises:
        UserError: names the first of them.
    """
    trained = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    if model.flat_lora is not None:
        trained.append(("LoRA", model.flat_lora.values))
    if name := non_finite(trained):
        raise UserError(f"training diverged: after step {step} '{name}' is not finite; {advice(config)}")


def advice(config: FinetuneConfig) -> str:
    """What to lower, and which checkpoint is kept."""
    saved = checkpoints.listed(config.output_dir)
    rates = [f"--learning_rate {config.learning_rate:g}"] if config.trains_lora else []
    rates += [f"--ti_learning_rate {config.ti_learning_rate:g}"] if config.trains_tokens else []
    return (
        f"lower {' and '.join(rates)}"
        + (", set --max_grad_norm 1" if not config.max_grad_norm else "")
        + (", use --mixed_precision bf16" if config.mixed_precision == "fp16" else "")
        + " and choose another --output_dir; "
        + (f"{saved[-1]} is the last good checkpoint" if saved else "there is no checkpoint yet")
    )
