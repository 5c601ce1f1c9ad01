"""A planned subset: request, plan, file names, job and identity, each computed once; and its description for a dry run."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from semantic_aug.datasets import LoadedDataset
from semantic_aug.datasets.fingerprint import ContentHashes, hash_images
from semantic_aug.datasets.unlabelled import CLASS as UNLABELLED
from semantic_aug.diffusion.base import read_scheduler_config
from semantic_aug.diffusion.schedulers import evaluations, make_scheduler
from semantic_aug.errors import UserError
from semantic_aug.meta_csv import EVEN, without_slashes
from semantic_aug.sampling.config import SampleConfig
from semantic_aug.sampling.files import TaskPaths
from semantic_aug.sampling.identity import identity_of
from semantic_aug.sampling.job import Job, Task
from semantic_aug.sampling.plan import Guide, Plan, PlanSettings, make_plan, repeated_tasks
from semantic_aug.sampling.resources import disk_bytes
from semantic_aug.sampling.sources import BLOCK, source_table

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class PlannedSubset:
    """A subset before its folder is opened.

    Attributes:
        dataset: loaded under the request's setting.
        images: content hashes of the training images.
        identity: see :func:`semantic_aug.sampling.identity.identity_of`.
    """

    config: SampleConfig
    dataset: LoadedDataset
    plan: Plan
    paths: TaskPaths
    job: Job
    images: ContentHashes
    identity: dict[str, Any]

    @property
    def folder(self) -> Path:
        """``{output_root}/{dataset}/{subset}``."""
        return self.job.folder

    def tasks(self, batch: int, missing: np.ndarray) -> list[Task]:
        """The tasks of a batch; those that are not ``missing``, bool ``(T,)``, have no path and are computed, not written."""
        plan, paths = self.plan, self.paths
        return [
            Task(
                number=n,
                source=int(plan.source[n]),
                target=int(plan.target[n]),
                strength=plan.strength(n),
                path=paths.relative(n) if missing[n] else None,
                text=paths.text(n) if missing[n] else {},
                template=paths.template(n),
                context=paths.context(n),
                partner=-1 if plan.partner is None else int(plan.partner[n]),
            )
            for n in plan.numbers(batch)
        ]


def plan_subset(config: SampleConfig, dataset: LoadedDataset) -> PlannedSubset:
    """Plans the subset of a request. Training images and weights that have changed since they were last hashed are read."""
    plan, images = plan_of(config, dataset), hash_images(dataset.train)
    job = Job.of(config, dataset, images, len(plan))
    identity = identity_of(config, dataset, plan, images, job)
    return PlannedSubset(
        config, dataset, plan, task_paths(config, dataset, plan), job, images=images, identity=identity
    )


def plan_of(config: SampleConfig, dataset: LoadedDataset) -> Plan:
    """The plan of a request. Raises UserError: a class without training images, or see :func:`make_plan`."""
    if len(empty := np.flatnonzero(dataset.train.counts() == 0)):
        raise UserError(
            f"class '{dataset.source_names[empty[0]]}' of {dataset.name} has no training image, so that none of it can be "
            "made: add some, leave the class out of the data set, or lower --corrupt_prob"
        )
    settings = PlanSettings(
        strategy=config.strategy,
        strengths=config.strengths,
        multiplier=config.images.syn_dataset_multiplier,
        batch_size=config.placement.batch_size,
        seed=config.run.seed,
        task=config.setting.task,
        pairing=config.images.pairing,
        contexts=len(config.prompts.contexts),
        sources=config.images.sources,
        guide=config.guide,
        pool=() if dataset.unlabelled is None else dataset.unlabelled.keys,
    )
    return make_plan(dataset.train.labels, dataset.train.keys, len(dataset.class_names), settings)


def task_paths(config: SampleConfig, dataset: LoadedDataset, plan: Plan) -> TaskPaths:
    """The file names of a plan's tasks."""
    names, keys, folders = dataset.source_names, dataset.train.keys, dataset.folders
    prompts, source_label = config.prompts, None
    if dataset.unlabelled is not None:
        table = source_table(dataset)
        names, keys, folders = table.class_names, table.keys, (*folders, UNLABELLED)
        source_label = source_label_of(config.guide, dataset)
    templates = prompts.every_template if prompts.contexts else prompts.templates
    options = {"templates": templates, "contexts": prompts.contexts, "source_label": source_label}
    return TaskPaths(plan, names, folders, keys, config.run.seed, config.images.image_format, **options)


def source_label_of(guide: Guide, dataset: LoadedDataset) -> Callable[[int], str]:
    """A function from a source's row to the column ``Source Label`` of ``meta.csv``: the class probabilities of an unlabelled
    source as JSON, empty for a labelled one."""
    first, names = len(dataset.train), without_slashes(dataset.source_names)

    def label(row: int) -> str:
        if row < first:
            return ""
        if guide.pool_classes is None:
            return EVEN
        columns = (guide.pool_classes[row - first].tolist(), guide.pool_weights[row - first].tolist())
        weights = {names[k]: weight / 10_000 for k, weight in zip(*columns, strict=True) if weight}
        return json.dumps(weights, ensure_ascii=False)

    return label


def describe(subset: PlannedSubset) -> str:
    """The plan as text, for ``--dry_run``: counts per class, strengths, files, batches, disk."""
    config, dataset, plan, images = subset.config, subset.dataset, subset.plan, subset.config.images
    contexts, names = len(config.prompts.contexts), source_table(dataset).class_names
    sources, targets = (np.bincount(classes, minlength=len(names)) for classes in (plan.source_class, plan.target))
    lines = [
        f"{len(plan)} images ({images.syn_dataset_multiplier:g} x {len(dataset.train)} training images) in "
        f"{plan.num_batches} batches of {plan.batch_size}, to {subset.folder}",
        f"strategy {config.strategy.name}: weights {config.strategy.weights}, from {config.strategy.start}, "
        f"pairing {config.strategy.pairing}" + (f" ({images.pairing})" if config.strategy.pairing == "mixed" else ""),
        "strengths: "
        + ", ".join(f"{s:g} x {int(np.count_nonzero(plan.strength_code == i))}" for i, s in enumerate(plan.strengths)),
        *([f"contexts: {contexts}, each {len(plan) / contexts:.3g} times"] if contexts else []),
        describe_cost(config, plan, len(dataset.train)),
        f"disk needed: about {disk_bytes(len(plan), images) / 1e6:,.0f} MB",
        f"{'class':40s} {'as source':>10s} {'as target':>10s}",
    ]
    lines += [f"{name[:40]:40s} {s:10d} {t:10d}" for name, s, t in zip(names, sources, targets, strict=True)]
    return "\n".join(lines)


def describe_cost(config: SampleConfig, plan: Plan, count: int) -> str:
    """The evaluations of the U-Net that a plan of ``count`` training images takes, one image each; guidance takes two a
    step. Sources are inverted in whole blocks."""
    solver, model = config.solver, config.model
    steps, each = solver.num_inference_steps, 2 if solver.guidance_scale > 1 else 1
    images = np.bincount(plan.strength_code, minlength=len(plan.strengths)).tolist()
    if config.strategy.start == "inversion":
        run = len(plan) * steps
    else:
        options = solver.scheduler, solver.final_sigmas_type, solver.timestep_spacing
        scheduler = make_scheduler(read_scheduler_config(model.folder, model.name), *options)
        run = sum(n * evaluations(scheduler, steps, s) for n, s in zip(images, plan.strengths, strict=True))
    text = f"U-Net evaluations: {each * run:,} to denoise"
    if plan.partner is not None:
        blocks = np.union1d(plan.source, plan.partner) // BLOCK
        inverted = int(np.isin(np.arange(count) // BLOCK, blocks).sum())
        text += f", {inverted * steps:,} to invert {inverted} training images once"
    return text


def warn_of_repeats(subset: PlannedSubset) -> None:
    """Warns of tasks with identical images: a strategy that starts from two inverted images draws no noise."""
    config, plan, paths, prompts = subset.config, subset.plan, subset.paths, []
    if plan.partner is None:
        return
    if len(paths.templates) > 1:
        prompts.append(np.array([paths.template(n) for n in range(len(plan))]))
    if plan.context is not None and round(config.images.context_steps * config.solver.num_inference_steps):
        prompts.append(plan.context)
    if repeated := repeated_tasks(plan, prompts):
        log.warning(
            "%d of %d images repeat another one, with the same two photographs, position and prompt: lower "
            "--syn_dataset_multiplier, or give --contexts or --prompt_templates", repeated, len(plan),
        )  # fmt: skip
    train, names = subset.dataset.train, subset.dataset.source_names
    single = np.flatnonzero(np.bincount(train.labels) == 1)
    if config.strategy.pairing == "same" and len(single):
        shown = ", ".join(f"'{names[label]}'" for label in single[:5]) + ", ..." * (len(single) > 5)
        log.warning(
            "%d classes have one training image each (%s), between which and itself %s makes nothing new: raise "
            "--examples_per_class", len(single), shown, config.strategy.name,
        )  # fmt: skip
