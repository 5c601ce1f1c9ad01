"""Optimiser and learning-rate schedule of stage 1."""

from __future__ import annotations

import torch
from diffusers.optimization import get_scheduler

from semantic_aug.errors import UserError
from semantic_aug.finetune.config import FinetuneConfig


def make_optimizer(groups: list[dict], config: FinetuneConfig, device: torch.device) -> torch.optim.Optimizer:
    """AdamW in one kernel where the device has it, or bitsandbytes' 8-bit one.

    Args:
        groups: parameters and learning rates.
        config: of the run.
        device: of the parameters.

    Raises:
        UserError: ``--use_8bit_adam`` without bitsandbytes.
    """
    if config.use_8bit_adam:
        try:
            import bitsandbytes
        except ImportError:
            raise UserError("--use_8bit_adam needs the package bitsandbytes: pip install bitsandbytes") from None
        return bitsandbytes.optim.AdamW8bit(groups, weight_decay=config.adam_weight_decay)
    fused = device.type in ("cuda", "cpu") or None
    return torch.optim.AdamW(groups, weight_decay=config.adam_weight_decay, fused=fused)


def make_schedule(optimizer: torch.optim.Optimizer, config: FinetuneConfig) -> torch.optim.lr_scheduler.LambdaLR:
    """diffusers' schedule of that name, stepped once per optimiser step.

    Raises:
        UserError: ``piecewise_constant`` without rules, or rules that cannot be read.
    """
    rules = config.lr_step_rules
    if (config.lr_scheduler == "piecewise_constant") != (rules is not None):
        raise UserError(
            f"--lr_scheduler {config.lr_scheduler} with --lr_step_rules {rules or '(not given)'}: piecewise_constant, and "
            "only it, takes rules like 1:1000,0.1:2000,0.01 (times 1 before step 1000, times 0.1 before 2000, then 0.01)"
        )
    try:
        return get_scheduler(
            config.lr_scheduler,
            optimizer,
            step_rules=rules,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
            num_cycles=config.lr_num_cycles,
            power=config.lr_power,
        )
    except (ValueError, IndexError, TypeError) as error:
        raise UserError(
            f"--lr_scheduler {config.lr_scheduler}, --lr_step_rules {rules}: {error}; rules look like 1:1000,0.1:2000,0.01"
        ) from None
