"""Optimiser and learning-rate schedules of stage 3."""

import math

import torch
from torch import nn

from semantic_aug.classify.config import TrainSettings

DROPS = ((0.9, 1e-4), (0.8, 1e-2))
"""Shares of the epochs after which the step schedule multiplies the peak by a factor, in descending order."""


def make_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """SGD with momentum 0.9, or AdamW; weight decay of the weights, or of all parameters."""
    from timm.optim import param_groups_weight_decay

    if settings.weight_decay_on == "all":
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [{"params": trainable, "weight_decay": settings.weight_decay}]
    else:
        groups = param_groups_weight_decay(model, settings.weight_decay)
    fused = next(model.parameters()).device.type == "cuda" or None
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            groups, lr=settings.lr, momentum=0.9, nesterov=settings.momentum == "nesterov", fused=fused
        )
    return torch.optim.AdamW(groups, lr=settings.lr, fused=fused)


def learning_rate_at(step: int, total: int, warmup: int, peak: float) -> float:
    """Linear warm-up over ``warmup`` steps, then half a cosine down to zero at ``total``; steps count from 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def scaled_cosine_at(step: int, total: int, warmup: int, peak: float) -> float:
    """Half a cosine over all ``total`` steps, times a linear warm-up over ``warmup`` steps; steps count from 0."""
    return peak * 0.5 * (1 + math.cos(math.pi * step / total)) * min(1.0, (step + 1) / warmup)


def stepped_rate_at(epoch: int, epochs: int, warmup: float, peak: float) -> float:
    """Linear warm-up by epoch, then the peak, divided by 100 after 80 % and by 10,000 after 90 % of the epochs.

    This is the schedule of LDAM-DRW's code (Cao et al. 2019), used by CMO and the long-tailed experiments of Diff-Mix (160
    and 180 of 200 epochs). Epochs count from 0.
    """
    if epoch < warmup:
        return peak * min(1.0, (epoch + 1) / warmup)
    return peak * next((factor for share, factor in DROPS if epoch >= share * epochs), 1.0)


def learning_rate(settings: TrainSettings, step: int, items: int, batch_size: int) -> float:
    """The learning rate of a step.

    Args:
        settings: resolved; ``warmup_epochs`` is at most a tenth of ``nepoch``.
        step: step of the run, counted from 0.
        items: items of an epoch.
        batch_size: items of a step; an epoch's last, smaller batch is dropped.
    """
    steps_per_epoch = max(1, items // batch_size)
    if settings.lr_schedule == "step":
        return stepped_rate_at(step // steps_per_epoch, settings.nepoch, settings.warmup_epochs, settings.lr)
    if settings.lr_schedule == "scaled_cosine":
        # the schedule of the Diff-Mix authors counts dropped batches, too
        total = max(1, settings.nepoch * items // batch_size)
        warmup = max(1, int(total * settings.warmup_epochs / settings.nepoch + 1e-9))
        return scaled_cosine_at(step, total, warmup, settings.lr)
    warmup = round(settings.warmup_epochs * steps_per_epoch)
    return learning_rate_at(step, settings.nepoch * steps_per_epoch, warmup, settings.lr)
