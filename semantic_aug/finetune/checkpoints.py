"""The output folder of stage 1: the identity of its run, and its checkpoints, written whole or not at all.

{output_dir}/checkpoint-{step}/pytorch_lora_weights.safetensors    what diffusers loads
{output_dir}/checkpoint-{step}/learned_embeds.safetensors
{output_dir}/checkpoint-{step}/training_state.pt                   optimiser, schedule, scaler, step
"""

import logging
import os
import re
import shutil
from pathlib import Path

import torch

from semantic_aug import cli, files, runs
from semantic_aug.datasets import LoadedDataset, Setting
from semantic_aug.datasets.fingerprint import files_digest, names_identity
from semantic_aug.datasets.origin import RunOrigin
from semantic_aug.diffusion import lora as lora_io
from semantic_aug.diffusion import tokens as token_io
from semantic_aug.diffusion.base import Geometry, weight_files
from semantic_aug.errors import UserError
from semantic_aug.files import home_expanded
from semantic_aug.finetune.config import GROUPS, FinetuneConfig
from semantic_aug.finetune.model import TrainedModel
from semantic_aug.tensors import load_pickle, save_pickle

log = logging.getLogger(__name__)

STATE_FILE, SUMMARY_FILE = "training_state.pt", "summary.json"
_NAME = re.compile(r"checkpoint-(\d+)$")


def save_weights(model: TrainedModel, folder: Path) -> None:
    """Writes the LoRA and the tokens, whichever are trained, as files that plain diffusers loads."""
    folder.mkdir(parents=True, exist_ok=True)
    if model.lora_parameters:
        text_encoders = {name: network for name, network in model.base.networks.items() if name != "unet"}
        lora_io.save_lora(model.unet, folder / lora_io.FILE_NAME, model.alpha, text_encoders)
    tokens = model.current_tokens()
    if tokens is not None:
        token_io.save_tokens(tokens, folder / token_io.FILE_NAME)


def load_weights(model: TrainedModel, folder: Path) -> None:
    """Puts a checkpoint's LoRA and tokens back into a model of the same shape. Raises UserError: they do not fit."""
    if model.lora_parameters:
        lora_io.load_trained(model.base.networks, folder / lora_io.FILE_NAME)
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
    """Writes ``checkpoint-{step}`` under a temporary name, moves it into place, and removes the oldest ones above ``limit``.

    Checkpoints of later steps, where a run was resumed from an earlier one, stay until the run reaches those steps.
    """
    final, temporary = output_dir / f"checkpoint-{step}", output_dir / f".checkpoint-{step}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    save_weights(model, temporary)
    save_pickle(temporary / STATE_FILE, {**state, "step": step})
    for path in temporary.iterdir():
        with open(path, "rb+") as content:
            os.fsync(content.fileno())
    former = _set_aside(final) if final.exists() else None  # the same step again, after a resume from an earlier one
    os.replace(temporary, final)
    if former is not None:
        shutil.rmtree(former)
    if limit is not None:
        known = listed(output_dir)
        for old in known[: max(0, known.index(final) + 1 - limit)]:
            shutil.rmtree(_set_aside(old))
    return final


def _set_aside(folder: Path) -> Path:
    """Renames a checkpoint before it is deleted, so that a half-deleted one is never taken for whole; returns the new path."""
    doomed = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    return doomed


def remove_leftovers(output_dir: Path) -> None:
    """Deletes checkpoints that a kill left half written or half removed."""
    for path in output_dir.glob(".checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)


def listed(output_dir: Path) -> list[Path]:
    """Whole checkpoints by step."""
    folders = [(int(match[1]), path) for path in output_dir.glob("checkpoint-*") if (match := _NAME.search(path.name))]
    return [path for _, path in sorted(folders) if (path / STATE_FILE).is_file()]


def find(output_dir: Path, wanted: str) -> Path | None:
    """The checkpoint of ``--resume_from_checkpoint``: the latest one (None where there is none yet), or a given folder. Raises
    UserError: a given folder that is not a checkpoint."""
    if wanted == "latest":
        whole = listed(output_dir)
        return whole[-1] if whole else None
    path = home_expanded(wanted)
    for candidate in (path, output_dir / wanted):
        if (candidate / STATE_FILE).is_file():
            return candidate
    known = ", ".join(p.name for p in listed(output_dir)) or "none"
    raise UserError(
        f"--resume_from_checkpoint {wanted}: no checkpoint there (expected a folder with {STATE_FILE}); "
        f"in {output_dir}: {known}"
    )


def load_state(folder: Path) -> dict:
    """The training state of a checkpoint. Raises UserError: damaged."""
    return load_pickle(folder / STATE_FILE, f"remove {folder} and resume from the one before")


def finished(output_dir: Path) -> dict | None:
    """The summary of a finished run in this folder, or None."""
    return files.read_json(output_dir / SUMMARY_FILE)


def origin_of(config: FinetuneConfig, dataset: LoadedDataset) -> RunOrigin:
    """The identity of a run: training images, names and prompts, the base model."""

    def further() -> dict:
        base = files_digest(weight_files(config.base_folder), config.base_folder)
        return {"templates": names_identity(config.images.templates), "base_model": base}

    return RunOrigin(dataset, ("train",), ("caption",) if config.images.uses_captions else (), further=further)


def take_folder(config: FinetuneConfig, origin: RunOrigin, processes: int, dry_run: bool = False) -> None:
    """Claims the output folder (a dry run only checks whether it could). Raises UserError: the folder or the checkpoint belongs
    to another run, is unfinished and not to be resumed, or was trained for more steps than are asked for."""
    arguments, ignored = config.record(processes), config.may_change()
    steps, fewer = config.train.max_train_steps, f"--max_train_steps {config.train.max_train_steps} asks for fewer"
    absent = cli.absent_values(Setting, *GROUPS.values())
    if config.output.resume_from_checkpoint:
        folder = find(config.output_dir, config.output.resume_from_checkpoint)
        if folder is not None and folder.resolve().parent != config.output_dir.resolve():
            flag = "--resume_from_checkpoint"
            runs.refuse_other_run(folder.resolve().parent, arguments, flag, ignored, origin=origin, absent=absent)
        if folder is not None and (match := _NAME.search(folder.name)) and int(match[1]) > steps:
            raise UserError(f"{folder} has been trained for {match[1]} steps, {fewer}: give an earlier checkpoint")
    options = {"origin": origin, "absent": absent, "dry_run": dry_run}
    known = runs.claim(config.output_dir, arguments, "--output_dir", ignored, **options)
    done = finished(config.output_dir) if known else None
    if done and done["steps"] > steps:
        raise UserError(
            f"{config.output_dir} holds the result of {done['steps']} steps, {fewer}: choose another --output_dir"
        )
    if done and done["steps"] == steps:
        log.info("%s is finished already (%d steps)", config.output_dir, done["steps"])
    elif known and listed(config.output_dir) and not config.output.resume_from_checkpoint:
        raise UserError(
            f"{config.output_dir} holds {listed(config.output_dir)[-1].name} of an unfinished run: add "
            "--resume_from_checkpoint latest to resume, or choose another --output_dir"
        )


def check_disk(config: FinetuneConfig, images: int, geometry: Geometry, trained: int) -> None:
    """Refuses a run whose encoded images and checkpoints, with the optimiser's states of ``trained`` values, do not fit on the
    disk; a resumed run has written most of them. Raises UserError: less is free."""
    if listed(config.output_dir):
        return
    channels, height, width = geometry.latent_shape(config.images.resolution)
    views = config.images.crops * (1 if config.images.no_flip else 2)
    encoded = config.images.random_crops or any(config.output_dir.glob("latents-*.npy"))
    latents = 0 if encoded else 4 * images * views * 2 * channels * height * width
    checkpoints = config.output.checkpoints_total_limit + 1 if config.output.checkpointing_steps else 0
    files.check_space(config.output_dir, latents + 4 * trained * (3 * checkpoints + 1), "--output_dir")
