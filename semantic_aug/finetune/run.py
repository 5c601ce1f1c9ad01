"""A run of stage 1: resolves and checks the request before hours are spent on it, trains, and prints the result."""

from __future__ import annotations

import contextlib
import importlib
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from semantic_aug import files, registry, runs
from semantic_aug.datasets import LoadedDataset, load_dataset
from semantic_aug.datasets.settings import check_unlabelled
from semantic_aug.datasets.unlabelled import with_unlabelled
from semantic_aug.devices import launched
from semantic_aug.diffusion import lora, tokens
from semantic_aug.diffusion.base import (
    find_base,
    load_skeleton,
    networks_without_weights,
    read_geometry,
    read_scheduler_config,
)
from semantic_aug.diffusion.families import LORA_TARGETS, family_of
from semantic_aug.diffusion.license import license_of, warn_of_license
from semantic_aug.errors import UserError, WouldDownload, all_local, memory_advice, no_downloads
from semantic_aug.finetune.batches import check_training_prompts
from semantic_aug.finetune.checkpoints import check_disk, finished, origin_of, take_folder
from semantic_aug.finetune.config import UNLABELLED_SHARE, FinetuneConfig
from semantic_aug.finetune.model import TrainedModel, make_optimizer, make_schedule
from semantic_aug.prompts import caption_without_class
from semantic_aug.run_lock import lock_folder

if TYPE_CHECKING:
    from accelerate import Accelerator

BEFORE_RESULTS = (runs.ARGS_FILE, "latents-*", "pixels-*", "logs/*")
"""Files of a run that are removed where it fails before its first result; see :func:`semantic_aug.files.no_trace`."""
LESS_MEMORY = (
    "lower --train_batch_size and raise --gradient_accumulation_steps as much, by which a step stays the same, give "
    "--gradient_checkpointing or --mixed_precision bf16, or lower --resolution or, where a picture grid was due, "
    "--num_validation_images"
)


def run(config: FinetuneConfig) -> None:
    """Resolves a request, prints it, trains, and prints the registry entry; a dry run only checks. Raises UserError: see
    :func:`resolve` and :func:`train`."""
    main_process, processes = int(os.environ.get("RANK", 0)) == 0, launched()
    with no_downloads(config.run.dry_run):
        config, dataset = resolve(config)
    if main_process:
        print(dataset.describe())
        if dataset.unlabelled is not None:
            print(describe_unlabelled(config, dataset, processes))
        print(runs.arguments_text(config.record(processes)), end="")
        base = config.model.pretrained_model_name_or_path
        warn_of_license(base, license_of(base, config.base_folder))
    if config.run.dry_run:
        check(config, dataset)
        take_folder(config, origin_of(config, dataset), processes, dry_run=True)
        return
    train(config, dataset, make_accelerator(config))
    if main_process:
        _report(config, dataset)


def resolve(config: FinetuneConfig) -> tuple[FinetuneConfig, LoadedDataset]:
    """Checks a request against its data set and its base model, and derives the settings that no flag gave. Raises UserError:
    the request cannot be run."""
    config = replace(config, train=config.train.split(launched()))
    model, images, name = config.model, config.images, config.model.pretrained_model_name_or_path
    check_flags(config)
    with contextlib.suppress(WouldDownload), no_downloads(True):  # before the images are listed
        resolution_of(config, folder := find_base(name))
        check_prediction(config, folder)
        if model.trains_lora and model.lora_targets != LORA_TARGETS:
            lora.add_lora(networks_without_weights(folder)["unet"], 1, targets=model.lora_targets)
    dataset, folder = all_local(
        lambda: load_dataset(config.dataset, config.setting, config.run.config_dir), lambda: find_base(name)
    )
    if images.unlabelled is not None:
        dataset = with_unlabelled(dataset, images.unlabelled, config.run.config_dir)
        images = replace(images, unlabelled_share=images.unlabelled_share or UNLABELLED_SHARE)
    check_prediction(config, folder)
    resolution, vectors = resolution_of(config, folder), model.num_vectors if model.trains_tokens else None
    check_training_prompts(dataset, folder, name, vectors, images)
    scale = config.effective_batch(launched()) if config.train.scale_lr else 1
    output_dir = config.output_dir or runs.finetune_dir(model.finetune_strategy, dataset.name, dataset.setting.suffix)
    config = replace(
        config,
        setting=dataset.setting,
        base_folder=folder,
        model=replace(model, mixed_precision=model.precision),
        train=replace(
            config.train,
            learning_rate=config.train.learning_rate * scale,
            ti_learning_rate=config.train.ti_learning_rate * scale,
            scale_lr=False,  # done
        ),
        images=replace(images, resolution=resolution),
        output=replace(config.output, output_dir=registry.resolve_path(output_dir)),
    )
    if key := config.output.register_key:
        registry.check_key(registry.CHECKPOINTS, dataset.name, key, checkpoint_entry(config), config.run.config_dir)
    return config, dataset


def check_flags(config: FinetuneConfig) -> None:
    """Refuses, before any image is read, templates, a precision, an optimiser, a schedule or a tracker that are not available,
    or a registry that cannot be written to. Raises UserError: names the flag."""
    _ = config.images.templates, config.model.precision  # computed here, since a file may be missing
    check_unlabelled(config.images.unlabelled)
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))]}]
    make_schedule(make_optimizer(groups, config.train, torch.device("cpu")), config.train)
    check_tracker(config.output.report_to)
    check_cuda_graph(config)
    if key := config.output.register_key:
        registry.check_writable(registry.CHECKPOINTS, key, config.run.config_dir)


def check_cuda_graph(config: FinetuneConfig) -> None:
    """Refuses ``--cuda_graph`` where a step is more than one pass on one GPU. Raises UserError: names the obstacles."""
    if not config.model.cuda_graph:
        return
    from accelerate.utils import parse_flag_from_env  # takes a second to import

    obstacles = {
        "no GPU that PyTorch can use": not torch.cuda.is_available(),
        "accelerate set to the CPU": parse_flag_from_env("ACCELERATE_USE_CPU"),
        "a distributed launch": launched() > 1 or "LOCAL_RANK" in os.environ,
        "micro-batches (--gradient_accumulation_steps)": config.train.gradient_accumulation_steps > 1,
        "--gradient_checkpointing": config.model.gradient_checkpointing,
    }
    present = [name for name, is_present in obstacles.items() if is_present]
    if present:
        raise UserError(f"--cuda_graph with {' and '.join(present)}: one pass on one GPU is recorded; leave it out")


def resolution_of(config: FinetuneConfig, folder: Path) -> int:
    """The side of the training images. Raises UserError: the base model does not take it, or not the crops."""
    geometry = read_geometry(folder)
    resolution = config.images.resolution or geometry.native_resolution
    geometry.check(resolution)
    if config.images.random_crops and family_of(folder, config.model.pretrained_model_name_or_path).sizes:
        raise UserError(
            "--random_crops with a Stable Diffusion XL model, which is conditioned on where each image was cropped: give "
            "--crops K"
        )
    return resolution


def check_prediction(config: FinetuneConfig, folder: Path) -> None:
    """Refuses a ``--prediction_type`` that is not the base model's, by which stage 2 and the picture grids denoise. Raises
    UserError: it is another."""
    given, file = config.train.prediction_type, "scheduler/scheduler_config.json"
    expected = read_scheduler_config(folder, config.model.pretrained_model_name_or_path).get(
        "prediction_type", "epsilon"
    )
    if given not in (None, expected):
        raise UserError(
            f"--prediction_type {given}: {file} of the base model says {expected}, by which stage 2 would denoise: leave "
            f"the flag out, or correct {file} in a copy of the base model"
        )


def describe_unlabelled(config: FinetuneConfig, dataset: LoadedDataset, processes: int) -> str:
    """One line: how many unlabelled images there are, their share, and what they are captioned."""
    batch, share = config.effective_batch(processes), config.images.unlabelled_share
    caption = caption_without_class(config.images.templates[0], dataset.spec.super_class)
    return (
        f"unlabelled: {len(dataset.unlabelled)} images, on average {batch * share:.3g} of the {batch} images of a step "
        f"({share:.3g}), under captions like '{caption}'"
    )


def check_tracker(name: str) -> None:
    """Refuses a tracker whose package is not installed, or cannot be imported. Raises UserError: names the package."""
    try:
        if name != "none":
            importlib.import_module(name)
    except Exception as error:  # a package of another version can raise anything
        raise UserError(
            f"--report_to {name} needs the package {name} ({type(error).__name__}: {error}): pip install it, or give "
            "--report_to none"
        ) from None


def check(config: FinetuneConfig, dataset: LoadedDataset) -> None:
    """Checks what :func:`train` would check at its start, without the base model's weights. Raises UserError: a LoRA target, a
    prompt or an initialiser that does not fit, or too little disk space."""
    base = load_skeleton(config.model.pretrained_model_name_or_path, config.base_folder)
    model = TrainedModel(base, config, dataset)
    trained = sum(parameter.numel() for group in model.parameter_groups(config.train) for parameter in group["params"])
    check_disk(config, len(dataset.train) + len(dataset.unlabelled or ()), base.geometry, trained)


def make_accelerator(config: FinetuneConfig) -> Accelerator:
    """The accelerator of a run; launched by ``accelerate launch`` or plainly."""
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    return Accelerator(
        mixed_precision=config.model.mixed_precision,
        log_with=None if config.output.report_to == "none" else config.output.report_to,
        project_config=ProjectConfiguration(str(config.output_dir), str(config.output_dir / "logs")),
    )


def train(config: FinetuneConfig, dataset: LoadedDataset, accelerator: Accelerator) -> dict:
    """Trains a resolved request in its output folder, or finds it done; returns the summary.

    Raises:
        UserError: the folder holds a run with other arguments or an unfinished one that is not asked to be resumed, or
            is in use.
        Interrupted: a signal stopped it; a checkpoint was written.
    """
    from semantic_aug.finetune.trainer import Trainer  # its libraries take seconds to import

    main, processes = accelerator.is_main_process, accelerator.num_processes
    with contextlib.ExitStack() as held:
        if main:
            held.enter_context(files.no_trace(config.output_dir, BEFORE_RESULTS))
            held.enter_context(lock_folder(config.output_dir, "--output_dir"))
        origin = origin_of(config, dataset)
        if main:
            take_folder(config, origin, processes)
        accelerator.wait_for_everyone()
        summary = finished(config.output_dir)
        if summary and summary["steps"] >= config.train.max_train_steps:
            return summary
        if config.output.report_to != "none":
            record = runs.plain(config.record(processes))
            flat = {name: value for name, value in record.items() if isinstance(value, (str, int, float, bool))}
            accelerator.init_trackers("finetune", flat)
        with memory_advice(LESS_MEMORY):
            return Trainer(config, dataset, accelerator, origin if main else None).train()


def checkpoint_entry(config: FinetuneConfig) -> dict[str, str | None]:
    """The registry entry of a finished run."""
    model, folder = config.model, config.output_dir
    return {
        "model_path": model.pretrained_model_name_or_path,
        "lora_path": registry.shown_path(folder / lora.FILE_NAME) if model.trains_lora else None,
        "embed_path": registry.shown_path(folder / tokens.FILE_NAME) if model.trains_tokens else None,
    }


def _report(config: FinetuneConfig, dataset: LoadedDataset) -> None:
    """Prints the registry entry of the result, and writes it where asked."""
    entry, suffix, config_dir = checkpoint_entry(config), config.setting.suffix.lstrip("_"), config.run.config_dir
    key = config.output.register_key or f"{suffix}{'_' if suffix else ''}{config.model.finetune_strategy}_latest"
    print(f"to use it, add to {registry.shown_path(config_dir / registry.CHECKPOINTS)}:")
    print(registry.to_yaml({dataset.name: {key: entry}}), end="")
    if config.output.register_key and registry.register(registry.CHECKPOINTS, dataset.name, key, entry, config_dir):
        print(f"registered as {dataset.name}/{key}")
