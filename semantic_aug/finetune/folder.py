"""The output folder of a fine-tuning run: what it was made from, whether it may be gone on with, whether it is finished."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from semantic_aug import runs
from semantic_aug.datasets import LoadedDataset
from semantic_aug.datasets.fingerprint import files_digest, names_identity
from semantic_aug.datasets.origin import RunOrigin
from semantic_aug.diffusion.base import weight_files
from semantic_aug.errors import UserError
from semantic_aug.finetune import checkpoints
from semantic_aug.finetune.config import FinetuneConfig, may_change
from semantic_aug.prompts import TEMPLATES

log = logging.getLogger(__name__)

SUMMARY_FILE = "summary.json"


def finished(output_dir: Path) -> dict | None:
    """The summary of a finished run in this folder, or None."""
    try:
        return json.loads((output_dir / SUMMARY_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def origin_of(config: FinetuneConfig, dataset: LoadedDataset) -> RunOrigin:
    """What a request's weights are made from: training images, names and prompts, the base model."""

    def further() -> dict:
        base = files_digest(weight_files(config.base_folder), config.base_folder)
        return {"templates": names_identity(TEMPLATES), "base_model": base}

    return RunOrigin(dataset, ("train",), () if config.class_prompts_ratio == 1 else ("caption",), further=further)


def take_folder(config: FinetuneConfig, origin: RunOrigin, processes: int, dry_run: bool = False) -> None:
    """Claims the output folder (in a dry run only asks whether it could), and refuses a checkpoint of another run."""
    arguments, ignored = config.record(processes), may_change(config)
    if config.resume_from_checkpoint:
        folder = checkpoints.find(config.output_dir, config.resume_from_checkpoint)
        if folder is not None and folder.resolve().parent != config.output_dir.resolve():
            flag = "--resume_from_checkpoint"
            runs.refuse_other_run(folder.resolve().parent, arguments, flag, ignored, origin=origin)
    take = runs.belongs if dry_run else runs.claim
    known = take(config.output_dir, arguments, "--output_dir", ignored, origin=origin)
    done = finished(config.output_dir) if known else None
    if done and done["steps"] >= config.max_train_steps:
        log.info("%s is finished already (%d steps)", config.output_dir, done["steps"])
    elif known and checkpoints.listed(config.output_dir) and not config.resume_from_checkpoint:
        raise UserError(
            f"{config.output_dir} holds {checkpoints.listed(config.output_dir)[-1].name} of an unfinished run: add "
            "--resume_from_checkpoint latest to go on, or choose another --output_dir"
        )
