"""Checkpoints of stage 1: written whole or not at all, found again, and thinned out.

{output_dir}/checkpoint-{step}/pytorch_lora_weights.safetensors    what diffusers loads
{output_dir}/checkpoint-{step}/learned_embeds.safetensors
{output_dir}/checkpoint-{step}/training_state.pt                   optimiser, schedule, scaler, step
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import torch

from semantic_aug.diffusion import lora as lora_io
from semantic_aug.diffusion import tokens as token_io
from semantic_aug.errors import UserError
from semantic_aug.finetune.model import TrainedModel
from semantic_aug.tensors import load_pickle

STATE_FILE = "training_state.pt"
_NAME = re.compile(r"checkpoint-(\d+)$")


def save_weights(model: TrainedModel, folder: Path) -> None:
    """Writes the LoRA and the tokens, whichever are trained, as files that plain diffusers loads."""
    folder.mkdir(parents=True, exist_ok=True)
    if model.lora_parameters:
        text_encoders = {name: network for name, network in model.networks.items() if name != "unet"}
        lora_io.save_lora(model.unet, folder / lora_io.FILE_NAME, model.alpha, text_encoders)
    tokens = model.current_tokens()
    if tokens is not None:
        token_io.save_tokens(tokens, folder / token_io.FILE_NAME)


def load_weights(model: TrainedModel, folder: Path) -> None:
    """Puts a checkpoint's LoRA and tokens back into a model of the same shape.

    Raises:
        UserError: they do not fit.
    """
    if model.lora_parameters:
        lora_io.load_trained(model.networks, folder / lora_io.FILE_NAME)
    if model.vectors:
        tokens = token_io.load_tokens(folder / token_io.FILE_NAME)
        shapes = [vectors.shape for vectors in model.vectors]
        if [table.shape for table in tokens.tables] != shapes or tokens.class_names != model.tokens.class_names:
            raise UserError(
                f"{folder} has tokens of other classes or another --num_vectors: choose another --output_dir"
            )
        with torch.no_grad():
            for vectors, table in zip(model.vectors, tokens.tables, strict=True):
                vectors.copy_(table)


def save_checkpoint(output_dir: Path, step: int, model: TrainedModel, state: dict, limit: int | None) -> Path:
    """Writes ``checkpoint-{step}`` under a temporary name, moves it into place, and removes the oldest above ``limit``."""
    final, temporary = output_dir / f"checkpoint-{step}", output_dir / f".checkpoint-{step}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    save_weights(model, temporary)
    torch.save({**state, "step": step}, temporary / STATE_FILE)
    for path in temporary.iterdir():
        with open(path, "rb+") as content:
            os.fsync(content.fileno())
    if final.exists():  # the same step again, after a resume from an earlier one
        _remove(final)
    os.replace(temporary, final)
    if limit is not None:
        for old in listed(output_dir)[: -max(1, limit)]:
            _remove(old)
    return final


def _remove(folder: Path) -> None:
    """Deletes a checkpoint; it loses its name first, so that one deleted by half is never taken for whole."""
    doomed = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def remove_leftovers(output_dir: Path) -> None:
    """Deletes what kills left of checkpoints that were being written or removed."""
    for path in output_dir.glob(".checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)


def listed(output_dir: Path) -> list[Path]:
    """Whole checkpoints by step."""
    found = [(int(match[1]), path) for path in output_dir.glob("checkpoint-*") if (match := _NAME.search(path.name))]
    return [path for _, path in sorted(found) if (path / STATE_FILE).is_file()]


def find(output_dir: Path, wanted: str) -> Path | None:
    """The checkpoint of ``--resume_from_checkpoint``: the latest one (None where there is none yet), or a given folder.

    Raises:
        UserError: a given folder that is not a checkpoint.
    """
    if wanted == "latest":
        whole = listed(output_dir)
        return whole[-1] if whole else None
    path = Path(wanted).expanduser()
    for candidate in (path, output_dir / wanted):
        if (candidate / STATE_FILE).is_file():
            return candidate
    known = ", ".join(p.name for p in listed(output_dir)) or "none"
    raise UserError(
        f"--resume_from_checkpoint {wanted}: no checkpoint there (expected a folder with {STATE_FILE}); "
        f"in {output_dir}: {known}"
    )


def load_state(folder: Path) -> dict:
    """The training state of a checkpoint.

    Raises:
        UserError: damaged.
    """
    return load_pickle(folder / STATE_FILE, f"remove {folder} and resume from the one before")
