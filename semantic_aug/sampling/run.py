"""Making one synthetic subset from beginning to end: plan, folder, processes, ``meta.csv``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from semantic_aug import registry, run_dir
from semantic_aug.augmentations.request import ClassNames, ModelFiles
from semantic_aug.augmentations.strategies import Strategy, weights_for
from semantic_aug.datasets import LoadedDataset, Setting
from semantic_aug.diffusion.base import DEFAULT_MODEL, find_base, weight_files
from semantic_aug.diffusion.schedulers import SolverSettings, first_step, scheduler_class
from semantic_aug.errors import Interrupted, UserError
from semantic_aug.meta_csv import strength_text
from semantic_aug.sampling import store
from semantic_aug.sampling.job import Job
from semantic_aug.sampling.launcher import Launcher, Outcome, image_tasks, make_folders
from semantic_aug.sampling.plan import UNIFORM_STRENGTHS, Plan, batches_of_shard, make_plan, table_of_counts

log = logging.getLogger(__name__)

DEFAULT_BATCH_SIZE = 16


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
        batch_size: tasks per batch; part of the plan.
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
    name = run_dir.subset_name(config.strategy.name, config.multiplier, config.key, config.strength_label)
    return config.output_root / dataset.name / name


def identity_of(config: SampleConfig, dataset: LoadedDataset, plan: Plan) -> dict:
    """Everything that decides what the files of the subset contain; ``config.yaml`` keeps it."""
    lora, tokens = config.files.lora, config.files.tokens
    base = "\n".join(f"{p.parent.name}/{p.name} {run_dir.sha256_file(p)}" for p in weight_files(config.files.folder))
    return {
        "dataset": dataset.name,
        "strategy": config.strategy.name,
        "checkpoint_key": config.key,
        "examples_per_class": config.setting.examples_per_class,
        "task": config.setting.task,
        "imbalance_factor": config.setting.imbalance_factor if config.setting.task == "imbalanced" else None,
        "subset_seed": config.setting.subset_seed,
        "val_fraction": config.setting.val_fraction,
        "strengths": list(config.strengths),
        "multiplier": config.multiplier,
        "seed": config.seed,
        "resolution": config.resolution,
        "batch_size": config.batch_size,
        "dtype": config.dtype,
        "device": "cpu" if config.devices[0] == "cpu" else "cuda",
        "template": config.template,
        "num_inference_steps": config.solver.num_inference_steps,
        "guidance_scale": config.solver.guidance_scale,
        "scheduler": config.solver.scheduler,
        "final_sigmas_type": config.solver.final_sigmas_type,
        "images": len(plan),
        "plan_sha256": plan.digest,
        "base_model": config.files.name,
        "base_sha256": run_dir.sha256_text(base),
        "lora_sha256": run_dir.sha256_file(lora) if lora else None,
        "tokens_sha256": run_dir.sha256_file(tokens) if tokens else None,
    }


def describe_plan(config: SampleConfig, dataset: LoadedDataset, plan: Plan, folder: Path) -> str:
    """The plan in words and numbers, for ``--dry_run``: counts per class, strengths, files, batches, disk."""
    lines = [
        f"{len(plan)} images ({config.multiplier:g} x {len(dataset.train)} training images) in {plan.num_batches} batches of "
        f"{plan.batch_size}, to {folder}",
        f"strategy {config.strategy.name}: weights {config.strategy.weights}, from {config.strategy.start}, "
        f"pairing {config.strategy.pairing}",
        "strengths: "
        + ", ".join(f"{s:g} x {int(np.count_nonzero(plan.strength_code == i))}" for i, s in enumerate(plan.strengths)),
        f"disk needed: about {len(plan) * config.resolution**2 * 2 / 1e6:,.0f} MB (a PNG takes about 2 bytes a pixel)",
        f"{'class':40s} {'as source':>10s} {'as target':>10s}",
    ]
    lines += [f"{name[:40]:40s} {s:10d} {t:10d}" for name, s, t in table_of_counts(plan, dataset.source_names)]
    return "\n".join(lines)


def run(config: SampleConfig, dataset: LoadedDataset) -> Path:
    """Makes (what is missing of) the subset and writes ``meta.csv``.

    Args:
        config: the request.
        dataset: loaded under ``config.setting``.

    Returns:
        The subset's folder.

    Raises:
        UserError: a folder of another subset or in use, weights that do not fit, sources that cannot be read.
        Interrupted: stopped by a signal; everything made so far is in place and listed.
    """
    scheduler_class(config.solver.scheduler)
    plan = plan_of(config, dataset)
    folder = subset_folder(config, dataset)
    identity = identity_of(config, dataset, plan)
    paths = store.TaskPaths(plan, dataset.source_names, dataset.folders, dataset.train.keys, config.seed)
    with store.RunLock(folder, config.num_shards, config.shard_index):
        resumed = store.claim_subset(folder, identity, registry.REPO_ROOT)
        make_folders(folder, dataset.folders)
        batches = batches_of_shard(plan, config.num_shards, config.shard_index, config.seed)
        mine = np.zeros(len(plan), bool)
        for batch in batches:
            numbers = plan.numbers(int(batch))
            mine[numbers.start : numbers.stop] = True
        done, adopted = store.finished(folder, paths, only=None if config.num_shards == 1 else mine)
        records = store.Records(folder, config.num_shards, config.shard_index)
        records.append(adopted)
        missing = mine & ~done
        if resumed:
            log.info(
                "%s: %d of %d images are there, %d to make",
                folder,
                int((mine & done).sum()),
                int(mine.sum()),
                int(missing.sum()),
            )
        outcome = _launch(config, dataset, paths, batches, mine, missing, done, records, folder)
        store.write_meta(folder, paths, done)
    return _conclude(config, folder, outcome, mine, done)


def _launch(
    config: SampleConfig,
    dataset: LoadedDataset,
    paths: store.TaskPaths,
    batches: np.ndarray,
    mine: np.ndarray,
    missing: np.ndarray,
    done: np.ndarray,
    records: store.Records,
    folder: Path,
) -> Outcome:
    plan = paths.plan

    def on_rows(rows: Sequence[tuple[int, int, int]]) -> None:
        for number, size, _ in rows:
            if (folder / store.DATA / paths.relative(number)).stat().st_size != size:
                raise UserError(
                    f"{paths.relative(number)} changed while it was written: another process works in {folder}"
                )
        records.append(rows)
        done[[row[0] for row in rows]] = True

    todo = [b for b in batches if missing[plan.numbers(int(b)).start : plan.numbers(int(b)).stop].any()]
    job = Job(
        folder=folder,
        dataset=config.dataset,
        setting=config.setting,
        config_dir=config.config_dir,
        files=config.files,
        classes=ClassNames(dataset.source_names, dataset.class_names, dataset.spec.super_class),
        solver=config.solver,
        resolution=config.resolution,
        dtype=config.dtype,
        template=config.template,
        from_noise=config.strategy.start == "noise",
        seed=config.seed,
        cpu_threads=config.cpu_threads,
    )
    launcher = Launcher(
        job,
        config.devices,
        lambda batch: image_tasks(plan.numbers(batch), paths, missing),
        on_rows,
        total=int(mine.sum()),
        already=int((mine & done).sum()),
        timeout=config.worker_timeout,
    )
    try:
        return launcher.run(todo)
    except UserError:
        store.write_meta(folder, paths, done)  # what was made before the error stays usable
        raise


def _conclude(config: SampleConfig, folder: Path, outcome: Outcome, mine: np.ndarray, done: np.ndarray) -> Path:
    made, there, wanted = outcome.made, int((mine & done).sum()), int(mine.sum())
    rate = f", {made / outcome.seconds:.2f} images/s" if made and outcome.seconds else ""
    log.info("%s: %d of %d images (%d made now in %.0f s%s)", folder, there, wanted, made, outcome.seconds, rate)
    if outcome.interrupted:
        raise Interrupted(f"interrupted: {there} of {wanted} images are in {folder}; the same command makes the rest")
    if outcome.unreadable:
        number, why = next(iter(outcome.unreadable.items()))
        raise UserError(
            f"{len(outcome.unreadable)} images could not be made, number {number} the first: {why}; the others are "
            f"in {folder}"
        )
    if outcome.set_aside:
        batch, why = next(iter(outcome.set_aside.items()))
        raise UserError(
            f"{len(outcome.set_aside)} batches failed three times, batch {batch} the first ({why}); the others are in "
            f"{folder}; the same command tries them again"
        )
    return folder
