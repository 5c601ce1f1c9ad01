"""Data-parallel training with one process, or several started by accelerate, each with a share of every batch."""

import contextlib
import os

import torch
from torch import Tensor, nn

from semantic_aug.devices import launched
from semantic_aug.errors import UserError


def is_main() -> bool:
    """Whether this is the main process of a launcher, or runs without one."""
    return int(os.environ.get("RANK", "0")) == 0


def leave() -> None:
    """Leaves the process group, if any: its threads may abort an interpreter that exits before they end."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Processes:
    """This process and the others that train the same model.

    Args:
        device: ``cpu`` or ``cuda:N``; with several processes accelerate assigns a GPU to each.

    Attributes:
        rank: number of this process.
        count: number of processes.
        device: device of this process.
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
        """Refuses a batch with an empty share."""
        if (batch_size + 1) // 2 < parts:
            raise UserError(
                f"--batch_size {batch_size} (or the number of training images) is too small for {parts} parts (processes "
                f"times --gradient_accumulation_steps): expected at least {2 * parts}"
            )

    def prepare(self, model: nn.Module) -> nn.Module:
        """The module to call in training, which averages gradients over the processes."""
        return model if self.accelerator is None else self.accelerator.prepare_model(model)

    def no_sync(self, model: nn.Module):
        """A context in which gradients are accumulated but not averaged over the processes."""
        return contextlib.nullcontext() if self.accelerator is None else self.accelerator.no_sync(model)

    def add_up(self, value: Tensor) -> Tensor:
        """The sum over all processes."""
        return value if self.accelerator is None else self.accelerator.reduce(value, "sum")

    def agree_on(self, model: nn.Module) -> None:
        """Copies the main process's buffers to all processes, whose running statistics differ slightly."""
        if self.accelerator is not None:
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, 0)

    def wait(self) -> None:
        """Waits until all processes arrive here (a barrier)."""
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()
