"""Losses over soft labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CRITERIA = ("ce", "ls")


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the batch of -sum_k y_k log p_k; logits and targets ``(B, K)``, targets summing to one."""
    return -(targets * F.log_softmax(logits.float(), dim=-1)).sum(-1).mean()


def smooth(targets: Tensor, smoothing: float) -> Tensor:
    """Label smoothing (Szegedy et al. 2016): (1 - e) y + e / K; targets ``(B, K)`` keep summing to one."""
    return targets * (1 - smoothing) + smoothing / targets.shape[-1] if smoothing else targets


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """Class indices ``(B,)`` to float32 ``(B, K)``."""
    return F.one_hot(labels.long(), num_classes).to(torch.float32)
