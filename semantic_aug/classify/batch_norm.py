"""Parts of a batch that BatchNorm can train on: a single image of which a layer sees one value per channel it cannot."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from semantic_aug.classify.config import ClassifyConfig
from semantic_aug.classify.data import share_of
from semantic_aug.classify.processes import Processes
from semantic_aug.errors import UserError


def check_parts(
    model: nn.Module, frozen: Sequence[nn.Module], config: ClassifyConfig, processes: Processes, split: tuple[int, int]
) -> None:
    """:func:`check_batch_norm` for the smallest part of a run's batches; synchronised over GPUs it sees all of them.

    Args:
        model: put in training mode.
        frozen: its modules that stay in evaluation mode.
        config: of the run.
        processes: of the run.
        split: images of a batch, and the number of parts it is taken in.
    """
    if processes.count > 1 and processes.device.type == "cuda":
        return
    size, parts = split
    smallest = min(len(share_of(size, part, parts)) for part in range(parts))
    model.train()
    for module in frozen:
        module.eval()
    advice = (
        f"batches of {size} (--batch_size {config.batch_size}, at most the number of training images) in {parts} part(s), "
        f"{config.model} at --res_mode {config.resolution}: give a larger --batch_size or --res_mode, fewer "
        "--gradient_accumulation_steps, or a model without BatchNorm"
    )
    check_batch_norm(model, config.resolution, smallest, advice)


def check_batch_norm(model: nn.Module, resolution: int, smallest: int, advice: str) -> None:
    """Refuses training steps in which a BatchNorm layer would see one value per channel: it cannot normalise that.

    The model is run on the meta device, which computes shapes alone.

    Args:
        model: in training mode, layers that do not train in evaluation mode.
        resolution: side of its images in pixels.
        smallest: images of the smallest part of a batch.
        advice: what to change.

    Raises:
        UserError: it would.
    """
    if smallest > 1 or not any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in model.modules()):
        return
    probe = copy.deepcopy(model).to("meta")
    try:
        with torch.no_grad():
            probe(torch.empty(smallest, 3, resolution, resolution, device="meta"))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            f"a part of a training batch is a single image, of which a BatchNorm layer sees one value: {advice}"
        ) from None
