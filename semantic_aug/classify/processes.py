"""Data-parallel training: one process, or several started by accelerate, each with a share of every batch."""

import contextlib
import os

import torch
from torch import Tensor, nn

from semantic_aug.devices import launched
from semantic_aug.errors import UserError


def is_main() -> bool:
    """Whether this process is the one that prints, of those a launcher started; without a launcher it is."""
    return int(os.environ.get("RANK", "0")) == 0


def leave() -> None:
    """Leaves the group of processes, if there is one: its threads may abort an interpreter that ends before they do."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Processes:
    """This process among those that train one model together.

    Args:
        device: ``cpu`` or ``cuda:N``; with several processes accelerate gives each its own GPU.

    Attributes:
        rank: number of this process.
        count: of all of them.
        device: of this one.
    """

    def __init__(self, device: str):
        self.accelerator = None
        self.rank, self.count, self.device = 0, 1, torch.device(device)
        if launched() > 1:
            from accelerate import Accelerator

            self.accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no")
            self.rank, self.count = self.accelerator.process_index, self.accelerator.num_processes
            self.device = self.accelerator.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def check(self, batch_size: int, parts: int) -> None:
        """Refuses a batch that leaves a share empty."""
        if (batch_size + 1) // 2 < parts:
            raise UserError(
                f"--batch_size {batch_size} (or the number of training images) is too small for {parts} parts (processes "
                f"times --gradient_accumulation_steps): expected at least {2 * parts}"
            )

    def prepare(self, model: nn.Module) -> nn.Module:
        """The module to call in training; with several processes its gradients are averaged over them."""
        return model if self.accelerator is None else self.accelerator.prepare_model(model)

    def no_sync(self, model: nn.Module):
        """A context in which gradients are only accumulated."""
        return contextlib.nullcontext() if self.accelerator is None else self.accelerator.no_sync(model)

    def add_up(self, value: Tensor) -> Tensor:
        """The sum over all processes."""
        return value if self.accelerator is None else self.accelerator.reduce(value, "sum")

    def agree_on(self, model: nn.Module) -> None:
        """Gives every process the main one's buffers (running statistics differ a little between them)."""
        if self.accelerator is not None:
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, 0)

    def wait(self) -> None:
        """Waits until all processes arrive here (a barrier)."""
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()
