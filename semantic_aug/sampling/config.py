"""A resolved request for a synthetic subset: flags checked, model, data set, strengths, folder and batch size derived."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from semantic_aug import cli, files, registry, runs
from semantic_aug.augmentations import strategies
from semantic_aug.augmentations.model import ModelFiles, Prompts, check_model
from semantic_aug.augmentations.strategies import Strategy, weights_for
from semantic_aug.datasets import LoadedDataset, Setting, load_dataset
from semantic_aug.datasets.catalog import find_spec
from semantic_aug.datasets.settings import check_unlabelled
from semantic_aug.datasets.unlabelled import CLASS as UNLABELLED
from semantic_aug.datasets.unlabelled import with_unlabelled
from semantic_aug.devices import CPU, actors_of, processes_of, stand_in
from semantic_aug.diffusion.base import DEFAULT_MODEL, Geometry, find_base, read_geometry, read_scheduler_config
from semantic_aug.diffusion.distilled import effective_strength
from semantic_aug.diffusion.loop import check_solver
from semantic_aug.diffusion.schedulers import SolverSettings, check_strength
from semantic_aug.errors import UserError, WouldDownload, all_local, no_downloads
from semantic_aug.meta_csv import strength_text
from semantic_aug.prompts import CAPTIONS, contexts_of, without_classes
from semantic_aug.sampling.folder import recorded_identity
from semantic_aug.sampling.guide import LoadClassifier, make_guide
from semantic_aug.sampling.masks import check_mask, check_regions, with_regions
from semantic_aug.sampling.plan import UNIFORM_STRENGTHS, Guide
from semantic_aug.sampling.resources import automatic_batch_size, disk_bytes, fitting
from semantic_aug.sampling.settings import ImageSettings, ModelSettings, OutputSettings, Placement, check_flags
from semantic_aug.sampling.solver import read_few_steps, read_solver

COMPILE_IMAGES = 3000
"""Images per process from which compiling (a minute or two on a GPU) is worth it."""


@dataclass(frozen=True)
class RequestedModel:
    """The model that a request names.

    Attributes:
        key: checkpoint key that the subset is named after, or None for the base model.
        resolution: side of the images in pixels.
    """

    files: ModelFiles
    key: str | None
    solver: SolverSettings
    geometry: Geometry
    resolution: int


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """A resolved request for a synthetic subset, with everything that the user left unset derived.

    Attributes:
        dataset: value of ``--dataset``.
        setting: which part of the training split is used.
        key: checkpoint key that the subset is named after, or None for the base model.
        guide: predictions of a classifier by which sources, targets and masks are chosen.
        few_steps: strengths are whole numbers of the solver's steps.
        contexts: value of ``--contexts``.
    """

    dataset: str
    setting: Setting
    run: cli.StageSettings
    images: ImageSettings
    key: str | None
    model: ModelFiles
    prompts: Prompts
    solver: SolverSettings
    placement: Placement
    output: OutputSettings
    guide: Guide = field(default_factory=Guide, compare=False)
    few_steps: bool = False
    contexts: str | None = None

    @property
    def strategy(self) -> Strategy:
        """Row of the strategy table."""
        return self.images.strategy

    @property
    def strengths(self) -> tuple[float, ...]:
        """Strengths that the plan spreads over the tasks."""
        return choose_strengths(self.images, self.solver.num_inference_steps, self.few_steps)[0]

    @property
    def strength_label(self) -> str:
        """The strengths as the subset's name spells them."""
        return choose_strengths(self.images, self.solver.num_inference_steps, self.few_steps)[1]

    def compiled(self, images: int) -> bool:
        """Whether networks are compiled, by the size of the whole subset: a restart on as many GPUs decides the same."""
        devices = self.placement.devices
        if self.placement.compile != "auto":
            return self.placement.compile == "on"
        return devices[0] != "cpu" and images >= COMPILE_IMAGES * len(devices)


def resolve(
    args: argparse.Namespace, load_classifier: LoadClassifier | None = None
) -> tuple[SampleConfig, LoadedDataset]:
    """Checks the arguments and derives what was left unset; returns the request and the loaded data set.

    Args:
        load_classifier: reads ``--classifier``, which is another stage's.

    Raises:
        UserError: names the argument.
    """
    settings = (ModelSettings, ImageSettings, Placement, OutputSettings, cli.StageSettings)
    chosen, images, placement, output, run = (cli.read_settings(cls, args) for cls in settings)
    check_request(args)
    if output.register_key:
        registry.check_writable(registry.SUBSETS, output.register_key, run.config_dir)
    few = chosen.few_steps is not None
    sentences, placement, model = chosen.texts(), resolve_placement(placement, output.merge), None
    with contextlib.suppress(WouldDownload), no_downloads(True):  # before the images are listed; downloaded after that
        model = find_model(args, chosen)
    dataset, model = all_local(
        lambda: load_sources(args, images, run.config_dir), lambda: model or find_model(args, chosen)
    )
    if images.object_mask:
        check_mask(images.object_mask, dataset.train, dataset.name, images.classifier)
        dataset = replace(dataset, train=with_regions(dataset.train, images.object_mask))
        check_regions(dataset.train)
    if placement.gpu_ids is None and placement.engine == "mp":
        placement = replace(placement, devices=tuple(fitting(placement.devices, model.files)))
    if chosen.contexts == CAPTIONS:
        sentences["contexts"] = contexts_of_captions(dataset)
    prompts = Prompts(dataset.source_names, dataset.class_names, dataset.spec.super_class, **sentences)
    check_model(model.files, prompts)
    images = replace(images, resolution=model.resolution)
    root = output.output_root or Path(runs.aug_samples_dir(dataset.setting.suffix))
    config = SampleConfig(
        dataset=args.dataset,
        setting=dataset.setting,
        run=run,
        images=images,
        key=model.key,
        model=model.files,
        prompts=prompts,
        solver=model.solver,
        few_steps=few,
        contexts=chosen.contexts,
        placement=placement,
        output=replace(output, output_root=registry.resolve_path(root)),
    )
    grid = model.geometry.latent_shape(model.resolution)[1:]
    folder = subset_folder(config, dataset)
    if output.register_key:
        entry = registry.shown_path(folder)
        registry.check_key(registry.SUBSETS, dataset.name, output.register_key, entry, run.config_dir)
    check_disk(config, dataset)
    config = with_batch_size(config, dataset)
    device = stand_in(placement.devices[0])  # the head of a Ray cluster need not have the GPUs of its actors
    predict = output.calibrate or not run.dry_run
    guide = make_guide(images, dataset, device, load_classifier, folder, grid, predict=predict)
    return replace(config, guide=guide), dataset


def check_request(args: argparse.Namespace) -> None:
    """Refuses flags that contradict each other or name nothing, whatever data set and model are. Raises UserError."""
    chosen, images, _ = (cli.read_settings(cls, args) for cls in (ModelSettings, ImageSettings, OutputSettings))
    check_flags(args)
    check_unlabelled(images.unlabelled)
    few, solver = chosen.few_steps is not None, read_solver(args)
    choose_strengths(images, chosen.few_steps if few else solver.num_inference_steps, few)
    chosen.texts()


def find_model(args: argparse.Namespace, chosen: ModelSettings) -> RequestedModel:
    """The model that a request names, known before the images are listed. Raises UserError: there is no such model, it does not
    fit the strategy, or its solver or resolution does not fit it."""
    extra_lora, config_dir = chosen.extra_lora(), args.config_dir
    strategy, spec = strategies.find(args.sample_strategy), find_spec(args.dataset, config_dir)
    section = spec.section(registry.CHECKPOINTS, chosen.finetune_model_key or "", config_dir)
    files, key = choose_weights(strategy, section, chosen.finetune_model_key, chosen.model_path, config_dir)
    noise_schedule = read_scheduler_config(files.folder, files.name)
    few = chosen.few_steps is not None
    solver = read_few_steps(args, files.name, noise_schedule) if few else read_solver(args)
    check_solver(noise_schedule, solver, masked=args.object_mask is not None)
    geometry = read_geometry(files.folder)
    resolution = args.resolution or geometry.native_resolution
    geometry.check(resolution)
    return RequestedModel(replace(files, extra_lora=extra_lora), key, solver, geometry, resolution)


def load_sources(args: argparse.Namespace, images: ImageSettings, config_dir: Path) -> LoadedDataset:
    """The data set under its setting, with the unlabelled images among the sources. Raises UserError: they cannot be read, or
    a class has the name of their folder."""
    dataset = load_dataset(args.dataset, cli.read_settings(Setting, args), config_dir)
    if images.unlabelled is None:
        return dataset
    dataset = with_unlabelled(dataset, images.unlabelled, config_dir)
    if clash := [name for name in dataset.folders if name.casefold() == UNLABELLED]:
        raise UserError(f"--unlabelled: {dataset.name} has a class '{clash[0]}' of its own: rename its folder or label")
    return dataset


def resolve_placement(placement: Placement, merge: bool = False) -> Placement:
    """The placement with devices and precision resolved; ``merge`` computes nothing, and needs none of them. Raises UserError:
    devices that this machine does not have, or an engine that is not installed."""
    if merge:
        return replace(placement, devices=(CPU,))
    if placement.engine == "ray":
        if importlib.util.find_spec("ray") is None:
            raise UserError("--engine ray needs the package ray: pip install 'ray>=2.40'")
        devices = actors_of(placement.gpu_ids)
    else:
        devices = processes_of(placement.gpu_ids, placement.cpu_threads)
    automatic = "fp32" if devices[0] == "cpu" else "fp16"
    return replace(placement, devices=tuple(devices), dtype=automatic if placement.dtype == "auto" else placement.dtype)


def choose_weights(
    strategy: Strategy, dataset: str, key: str | None, model_path: str | None, config_dir: Path
) -> tuple[ModelFiles, str | None]:
    """The weights that a strategy takes of a checkpoint or a base model, and the key that the subset is named after. Raises
    UserError: a strategy that needs a checkpoint without a key, or a checkpoint that lacks what it needs."""
    if key is None:
        if strategy.weights != "base":
            raise UserError(
                f"strategy {strategy.name} needs a fine-tuned checkpoint: give --finetune_model_key "
                f"(a key of section '{dataset}' in {registry.CHECKPOINTS}), or use a real-* strategy"
            )
        name = model_path or DEFAULT_MODEL
        return ModelFiles(name, find_base(name)), None
    entry = registry.checkpoint(dataset, key, config_dir)
    given = entry.lora_path is not None, entry.embed_path is not None
    use_lora, use_tokens = weights_for(strategy, *given, f"checkpoint {dataset}/{key}")
    name = model_path or entry.model_path
    lora, tokens = entry.lora_path if use_lora else None, entry.embed_path if use_tokens else None
    return ModelFiles(name, find_base(name), lora, tokens), key if lora or tokens else None


def contexts_of_captions(dataset: LoadedDataset) -> tuple[str, ...]:
    """The contexts in the captions of the training images, without those that name a class, so that every class can meet every
    context equally often (BOB, Yang et al. 2026, marginalises them out likewise). Raises UserError: there are none."""
    train, names = dataset.train, list(zip(dataset.class_names, dataset.source_names, strict=True))
    captions = train.extras.get("caption", np.full(len(train), "")).tolist()
    each = contexts_of(captions, train.labels.tolist(), names, dataset.spec.super_class)
    contexts = without_classes(itertools.chain.from_iterable(each), names)
    if not contexts:
        raise UserError(
            f"--contexts {CAPTIONS}: the captions of data set {dataset.name} say nothing besides its classes, or there are "
            "none: give it a column 'caption' (docs/datasets.md), or a text file with one context a line"
        )
    return contexts


def choose_strengths(
    images: ImageSettings, num_inference_steps: int, few_steps: bool = False
) -> tuple[tuple[float, ...], str]:
    """The strengths of a subset, 1 from noise, and how its name spells them.

    Args:
        num_inference_steps: to check that every strength leaves a step.
        few_steps: strengths become multiples of a step.

    Raises:
        UserError: a strength that is too small for the number of steps.
    """
    strategy, strength, how = images.strategy, images.aug_strength, images.strength_strategy
    if strategy.start == "noise":
        return (1.0,), strength_text(1.0)
    cause, remedy = "--aug_strength", "an --aug_strength"
    if strategy.strengths:
        strengths, label = strategy.strengths, "Uniform"
        cause, remedy = f"--sample_strategy {strategy.name}: strength", ""
    elif how == "uniform":
        strengths, label = UNIFORM_STRENGTHS, "Uniform"
        cause, remedy = f"--strength_strategy {how}: strength", "--strength_strategy fixed with an --aug_strength"
    else:
        strengths, label = (float(strength),), strength_text(strength)
    if strategy.start == "inversion":  # positions between two images
        return tuple(strengths), label
    flag = "--few_steps" if few_steps else "--num_inference_steps"
    check_strength(num_inference_steps, min(strengths), cause, steps_flag=flag, remedy=remedy)
    if few_steps:
        strengths = [effective_strength(num_inference_steps, each) for each in strengths]
        label = label if len(strengths) > 1 else strength_text(strengths[0])
    return tuple(strengths), label


def subset_folder(config: SampleConfig, dataset: LoadedDataset) -> Path:
    """``{output_root}/{dataset}/{subset}``."""
    name = runs.subset_name(
        config.strategy.name, config.images.syn_dataset_multiplier, config.key, config.strength_label
    )
    return config.output.output_root / dataset.name / name


def check_disk(config: SampleConfig, dataset: LoadedDataset) -> None:
    """Refuses a subset that the disk cannot hold. Raises UserError: less is free than a quarter of the estimate, the size of
    photographs with little detail."""
    folder = subset_folder(config, dataset)
    files_of_format = folder.rglob(f"*.{config.images.image_format}") if folder.exists() else ()
    existing = sum(path.stat().st_size for path in files_of_format)
    count = config.images.syn_dataset_multiplier * len(dataset.train) / config.output.num_shards
    needed = disk_bytes(count, config.images)
    files.check_space(folder, int(needed) // 4 - existing, "--output_root")


def with_batch_size(config: SampleConfig, dataset: LoadedDataset) -> SampleConfig:
    """The request with ``batch_size`` 0 (auto) resolved: the one that an existing folder was begun with, else from memory.

    For a request resolved so before, it is the one with which another shard has begun the folder meanwhile. ``--merge``, which
    computes nothing, takes the kind of device and a precision that is not given from the folder too.
    """
    placement, begun = config.placement, recorded_identity(subset_folder(config, dataset)) or {}
    if config.output.merge:
        dtype = begun.get("dtype", "fp32") if placement.dtype == "auto" else placement.dtype
        placement = replace(placement, devices=(begun.get("device", CPU),), dtype=dtype)
    if placement.batch_size and not placement.automatic_batch:
        return replace(config, placement=placement)
    size = begun.get("batch_size") or placement.batch_size
    size = size or automatic_batch_size(placement.devices, config.images.resolution)
    return replace(config, placement=replace(placement, batch_size=int(size), automatic_batch=True))
