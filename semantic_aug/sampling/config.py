"""A resolved request for a synthetic subset, and what follows from it: weights, strengths, plan, folder, identity."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from semantic_aug import registry, runs
from semantic_aug.augmentations.request import ModelFiles
from semantic_aug.augmentations.strategies import Strategy, weights_for
from semantic_aug.datasets import LoadedDataset, Setting
from semantic_aug.devices import available_memory
from semantic_aug.diffusion.base import DEFAULT_MODEL, find_base, weight_files
from semantic_aug.diffusion.schedulers import SolverSettings, first_step
from semantic_aug.errors import UserError
from semantic_aug.files import size_text
from semantic_aug.meta_csv import strength_text
from semantic_aug.sampling.files import TaskPaths
from semantic_aug.sampling.plan import UNIFORM_STRENGTHS, Plan, make_plan, table_of_counts
from semantic_aug.sampling.store import recorded_identity

log = logging.getLogger(__name__)

BYTES_PER_PIXEL = {"png": 1.8, "webp": 1.3, "jpg": 0.5}
"""Rough sizes of encoded photographs, for estimates."""

CPU_BATCH = 16
MODEL_BYTES, BYTES_PER_IMAGE_512 = 3 * 2**30, 2**30
"""Estimates for Stable Diffusion 1.5 in half precision: weights, and activations of one image at 512 px with guidance. An
estimate that proves too high costs nothing but a message: out of memory halves what is computed at once."""

PROCESS_BYTES = 1 << 29
"""Memory of a CPU process besides the networks (float32, whatever the files hold) and what computing with them takes."""

COMPILE_IMAGES = 3000
"""Images per process from which compiling (a minute or two on a GPU) is worth it."""


@dataclass(frozen=True)
class SampleConfig:
    """A resolved request for a synthetic subset.

    Attributes:
        dataset: what ``--dataset`` was given.
        setting: which part of the training split is used.
        strategy: row of the strategy table.
        key: checkpoint key the subset is named after, or None for the base model.
        files: base model, LoRA, tokens.
        strengths: strengths the plan spreads over the tasks.
        strength_label: how the subset's name says them.
        multiplier: synthetic images per training image.
        solver: steps, guidance, scheduler.
        resolution: side in pixels.
        batch_size: most tasks per batch; part of the plan. 0 until :func:`with_batch_size` has chosen one.
        dtype: ``fp32``, ``fp16`` or ``bf16``.
        template: prompt with ``{}``.
        seed: of the plan and of every noise.
        output_root: folder that holds ``{dataset}/{subset}``.
        devices: one process each.
        cpu_threads: arithmetic threads per CPU process.
        num_shards: how many parts the batches are dealt into.
        shard_index: which part this run makes.
        config_dir: of the registry files.
        worker_timeout: seconds of silence before a process is replaced, or None.
        image_format: key of :data:`semantic_aug.sampling.files.FORMATS`.
        compile: ``auto``, ``on`` or ``off``.
        engine: ``mp`` (processes of this machine) or ``ray`` (actors).
        ray_address: of a running Ray cluster, or None for one on this machine.
        templates: prompts of which each task draws one, instead of ``template``; empty: none.
        object_mask: the part of a source that may change: ``object``, ``background``, or None for all of it.
        automatic_batch: ``batch_size`` was chosen by :func:`with_batch_size`.
    """

    dataset: str
    setting: Setting
    strategy: Strategy
    key: str | None
    files: ModelFiles
    strengths: tuple[float, ...]
    strength_label: str
    multiplier: float
    solver: SolverSettings
    resolution: int
    batch_size: int
    dtype: str
    template: str
    seed: int
    output_root: Path
    devices: tuple[str, ...]
    cpu_threads: int = 1
    num_shards: int = 1
    shard_index: int = 0
    config_dir: Path = registry.CONFIG_DIR
    worker_timeout: float | None = None
    image_format: str = "png"
    compile: str = "auto"
    engine: str = "mp"
    ray_address: str | None = None
    templates: tuple[str, ...] = ()
    object_mask: str | None = None
    automatic_batch: bool = False

    def compiled(self, images: int) -> bool:
        """Whether networks are compiled; by the size of the whole subset, so that a restart on as many GPUs decides alike."""
        if self.compile != "auto":
            return self.compile == "on"
        return self.devices[0] != "cpu" and images >= COMPILE_IMAGES * len(self.devices)


def choose_weights(
    strategy: Strategy, dataset: str, key: str | None, model_path: str | None, config_dir: Path
) -> tuple[ModelFiles, str | None]:
    """The weights a strategy takes from a checkpoint key or a base model, and the key the subset is named after.

    Raises:
        UserError: a strategy that needs a checkpoint without a key, or a record that lacks what it needs.
    """
    if key is None:
        if strategy.weights != "base":
            raise UserError(
                f"strategy {strategy.name} needs a fine-tuned checkpoint: give --finetune_model_key "
                f"(a key of section '{dataset}' in {registry.CHECKPOINTS}), or use a real-* strategy"
            )
        name = model_path or DEFAULT_MODEL
        return ModelFiles(name, find_base(name)), None
    entry = registry.checkpoint(dataset, key, config_dir)
    use = weights_for(
        strategy, entry.lora_path is not None, entry.embed_path is not None, f"checkpoint {dataset}/{key}"
    )
    name = model_path or entry.model_path
    files = ModelFiles(
        name, find_base(name), entry.lora_path if use.use_lora else None, entry.embed_path if use.use_tokens else None
    )
    return files, key if use.use_lora or use.use_tokens else None


def choose_strengths(
    strategy: Strategy, strength: float, how: str, num_inference_steps: int
) -> tuple[tuple[float, ...], str]:
    """The strengths of a subset and how its name says them.

    Args:
        strategy: from-noise strategies have strength 1.
        strength: of ``--aug_strength``.
        how: ``fixed`` or ``uniform``.
        num_inference_steps: to check that every strength leaves a step.

    Raises:
        UserError: a strength outside (0, 1], or too small for the number of steps.
    """
    if not 0 < strength <= 1:
        raise UserError(f"--aug_strength {strength:g}: expected a number in (0, 1]")
    if strategy.start == "noise":
        return (1.0,), strength_text(1.0)
    if strategy.strengths:
        strengths, label = strategy.strengths, "Uniform"
    elif how == "uniform":
        strengths, label = UNIFORM_STRENGTHS, "Uniform"
    else:
        strengths, label = (float(strength),), strength_text(strength)
    for one in strengths:
        first_step(num_inference_steps, one)
    return tuple(strengths), label


def plan_of(config: SampleConfig, dataset: LoadedDataset) -> Plan:
    """The plan of a request."""
    return make_plan(
        dataset.train.labels,
        dataset.train.keys,
        len(dataset.class_names),
        config.strategy,
        config.strengths,
        config.multiplier,
        config.batch_size,
        config.seed,
        config.setting.task,
    )


def subset_folder(config: SampleConfig, dataset: LoadedDataset) -> Path:
    """``{output_root}/{dataset}/{subset}``."""
    name = runs.subset_name(config.strategy.name, config.multiplier, config.key, config.strength_label)
    return config.output_root / dataset.name / name


def task_paths(config: SampleConfig, dataset: LoadedDataset, plan: Plan) -> TaskPaths:
    """The file names of a plan's tasks."""
    names, keys = dataset.source_names, dataset.train.keys
    return TaskPaths(plan, names, dataset.folders, keys, config.seed, config.image_format, config.templates)


def describe_plan(config: SampleConfig, dataset: LoadedDataset) -> str:
    """The plan in words and numbers, for ``--dry_run``: counts per class, strengths, files, batches, disk."""
    plan, folder = plan_of(config, dataset), subset_folder(config, dataset)
    lines = [
        f"{len(plan)} images ({config.multiplier:g} x {len(dataset.train)} training images) in {plan.num_batches} batches of "
        f"{plan.batch_size}, to {folder}",
        f"strategy {config.strategy.name}: weights {config.strategy.weights}, from {config.strategy.start}, "
        f"pairing {config.strategy.pairing}",
        "strengths: "
        + ", ".join(f"{s:g} x {int(np.count_nonzero(plan.strength_code == i))}" for i, s in enumerate(plan.strengths)),
        f"disk needed: about {len(plan) * config.resolution**2 * BYTES_PER_PIXEL[config.image_format] / 1e6:,.0f} MB",
        f"{'class':40s} {'as source':>10s} {'as target':>10s}",
    ]
    lines += [f"{name[:40]:40s} {s:10d} {t:10d}" for name, s, t in table_of_counts(plan, dataset.source_names)]
    return "\n".join(lines)


def default_key(config: SampleConfig) -> str:
    """The registry key offered for a subset, e.g. ``5shot_diffmix_0.7``."""
    parts = [config.setting.suffix.lstrip("_"), config.strategy.name.replace("-", ""), config.strength_label]
    return "_".join(part for part in parts if part)


def with_batch_size(config: SampleConfig, dataset: LoadedDataset) -> SampleConfig:
    """The request with ``batch_size`` 0 (auto) resolved: what an existing folder was begun with, else from memory.

    Asked again of a request that was resolved so, it takes what another shard has begun the folder with meanwhile.
    """
    if config.batch_size and not config.automatic_batch:
        return config
    begun = (recorded_identity(subset_folder(config, dataset)) or {}).get("batch_size")
    size = begun or config.batch_size or automatic_batch_size(config.devices, config.resolution)
    return replace(config, batch_size=int(size), automatic_batch=True)


def fitting(devices: Sequence[str], files: ModelFiles) -> Sequence[str]:
    """As many of the CPU processes as memory holds, at least one; each loads the networks. GPUs are left as they are."""
    if devices[0] != "cpu":
        return devices
    need = PROCESS_BYTES + 2 * sum(path.stat().st_size for path in weight_files(files.folder))
    count = max(1, min(len(devices), available_memory() // need))
    if count < len(devices):
        log.info(
            "%d process(es) instead of %d: each takes about %s of memory (--gpu_ids cpu cpu ... gives another number)",
            count, len(devices), size_text(need),
        )  # fmt: skip
    return devices[:count]


def automatic_batch_size(devices: Sequence[str], resolution: int) -> int:
    """A batch that fits: 16 on the CPU; on a GPU a power of two up to 64 from its free memory, shared by its processes."""
    if devices[0] == "cpu":
        return CPU_BATCH
    import torch

    free = min(torch.cuda.mem_get_info(device)[0] / devices.count(device) for device in set(devices))
    fitting = (free - MODEL_BYTES) * 0.8 / (BYTES_PER_IMAGE_512 * (resolution / 512) ** 2)
    return max(1, min(64, 2 ** int(math.log2(max(1.0, fitting)))))
