"""Noticing a training that diverges: losses and weights that are not finite, without waiting for the device at every step."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from semantic_aug.errors import UserError

CHECK_STEPS = 50
"""Steps after which the losses are looked at, at the latest; looking waits for the device once."""


class LossLog:
    """The losses of the last steps, kept on the device until they are read.

    Args:
        capacity: most losses between two reads.
        combine: adds up or averages the losses ``(n,)`` of all processes; the same result on each of them.
    """

    def __init__(
        self, device: torch.device, capacity: int, combine: Callable[[Tensor], Tensor] = lambda losses: losses
    ):
        self.losses = torch.zeros(capacity, device=device)
        self.combine, self.count = combine, 0

    def add(self, loss: Tensor) -> None:
        """Keeps the loss of one step, a scalar on the device."""
        self.losses[self.count].copy_(loss)
        self.count += 1

    def read(self) -> np.ndarray:
        """The losses since the last read, float64 ``(n,)``; waits for the device."""
        values = self.combine(self.losses[: self.count].clone()).double().cpu().numpy()
        self.count = 0
        return values


def check_losses(losses: np.ndarray, last_step: int, advice: str) -> None:
    """Stops a training whose losses ``(n,)`` of consecutive steps, counted from 1, are not finite. Raises UserError: names the
    first such step, and gives ``advice``: what to lower, and what is kept on disk."""
    bad = np.flatnonzero(~np.isfinite(losses))
    if len(bad):
        step = last_step - len(losses) + 1 + int(bad[0])
        raise UserError(f"training diverged: the loss of step {step} is {losses[bad[0]]}; {advice}")


def non_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor that holds a value that is not finite, or None; waits for the device once."""
    # PyTorch finds no extremes of 8-bit tensors
    named = [
        (name, tensor.float() if tensor.itemsize == 1 else tensor)
        for name, tensor in tensors
        if tensor.is_floating_point() and tensor.numel()
    ]
    if not named:
        return None
    # a tensor's extremes are finite only where all of it is, and take a tenth of the time of looking at every value
    finite = torch.stack([torch.stack(tensor.aminmax()).isfinite().all() for _, tensor in named]).cpu()
    return None if finite.all() else named[int(finite.int().argmin())][0]


def check_outputs(value: float, amp: str = "no") -> None:
    """Refuses outputs of a classifier under mixed precision ``no``, ``fp16`` or ``bf16``. Raises UserError: ``value``, their
    loss or their sum, is not finite."""
    if not np.isfinite(value):
        remedy = "use --amp bf16 or no" if amp == "fp16" else "its weights diverged, train with a lower --lr"
        raise UserError(f"the classifier's outputs are not finite: {remedy}")
