"""What a synthetic subset is made from: whatever decides a byte of its images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from semantic_aug import cli, runs
from semantic_aug.datasets import ImageTable, LoadedDataset, Setting
from semantic_aug.datasets.fingerprint import ContentHashes, data_identity
from semantic_aug.diffusion.license import license_of
from semantic_aug.diffusion.schedulers import SolverSettings
from semantic_aug.files import sha256_text
from semantic_aug.sampling.config import SampleConfig
from semantic_aug.sampling.guide import pool_identity
from semantic_aug.sampling.job import Origin, Weights
from semantic_aug.sampling.masks import columns_of
from semantic_aug.sampling.plan import EVEN_SHARE, Guide, Plan
from semantic_aug.sampling.settings import ImageSettings
from semantic_aug.sampling.sources import planned_sources

DATA = "data"
"""Where a record has the identity of the images."""
RECORDED_AS = {"sample_strategy": "strategy", "syn_dataset_multiplier": "multiplier"}
"""Settings that have another name in the record."""


@dataclass(frozen=True)
class Identity:
    """What a subset is made from.

    Attributes:
        compared: everything that decides a byte of its images.
        arguments: what ``compared`` follows from, and what may change.
        table: the training images.
        images: their content hashes.
        origin: training images and weights, for the processes.
        license: of the base model.
        unlabelled: names of the unlabelled images among the sources.
    """

    compared: dict[str, Any]
    arguments: dict[str, Any]
    table: ImageTable
    images: ContentHashes
    origin: Origin
    license: str
    unlabelled: Sequence[str] = ()


def identity_of(config: SampleConfig, dataset: LoadedDataset, plan: Plan, images: ContentHashes) -> Identity:
    """The identity of the subset that a request describes; ``images`` are the hashes of the training images."""
    columns, pool = columns_of(config.images.object_mask), dataset.unlabelled
    weights, prompts, settings = Weights.of(config.model), config.prompts, cli.result_settings(ImageSettings)
    device = "cpu" if config.placement.devices[0] == "cpu" else "cuda"
    compared = {
        "dataset": dataset.name,
        "class_names": list(dataset.source_names),
        DATA: data_identity(dataset, {"train": images}, columns),
        **{RECORDED_AS.get(name, name): getattr(config.images, name) for name in settings},
        "strategy": config.strategy.name,  # not an alias
        "checkpoint_key": config.key,
        "strengths": list(config.strengths),
        "seed": config.run.seed,
        "batch_size": config.placement.batch_size,
        "dtype": config.placement.dtype,
        "device": device,
        "template": prompts.template,
        "templates": prompts.templates or None,
        **({"contexts_sha256": sha256_text("\n".join(prompts.contexts))} if prompts.contexts else {}),
        **{name: getattr(config.solver, name) for name in cli.result_settings(SolverSettings)},
        "images": len(plan),
        "plan_sha256": plan.digest,
        "base_sha256": weights.base,
        "lora_sha256": weights.lora,
        "tokens_sha256": weights.tokens,
        "extra_lora_sha256": weights.extra_lora,
        **_guide_identity(config.guide),
        "unlabelled": None if pool is None else pool_identity(pool),
    }
    sources = None if config.strategy.start == "noise" else planned_sources(dataset, images, columns)
    compiled = config.compiled(len(plan))  # compiled networks are laid out channels last, the encoder too
    network = "compiled" if compiled else "plain"
    encoder = f"{weights.vae} {config.images.resolution} {config.placement.dtype} {device} {network}"
    if config.strategy.start == "inversion":
        encoder += f" inverted {weights} {sha256_text(str(prompts))} {config.solver.num_inference_steps}"
    return Identity(
        runs.plain(compared), runs.plain(_arguments(config)), dataset.train, images,
        origin=Origin(sources, weights, encoder),
        license=license_of(config.model.name, config.model.folder),
        unlabelled=() if pool is None else pool.keys,
    )  # fmt: skip


def _arguments(config: SampleConfig) -> dict[str, Any]:
    """What the identity follows from, and what may change."""
    arguments = {
        "dataset": config.dataset,
        "recipe": config.run.recipe,
        "base_model": config.model.name,
        "examples_per_class": config.setting.examples_per_class,
        "task": config.setting.task,
        "imbalance_factor": config.setting.imbalance_factor if config.setting.task == "imbalanced" else None,
        "subset_seed": config.setting.subset_seed,
        "val_fraction": config.setting.val_fraction,
        "corrupt_prob": config.setting.corrupt_prob or None,
        "corrupt_classes": config.setting.corrupt_classes if config.setting.corrupt_prob else None,
    }
    images = config.images
    files = {"classifier": images.classifier, "unlabelled": images.unlabelled, "contexts": config.contexts}
    arguments |= {name: str(file) for name, file in files.items() if file is not None}
    for name in ("split", "imbalance_profile"):
        if getattr(config.setting, name) != getattr(Setting, name):
            arguments[name] = getattr(config.setting, name)
    return arguments


def _guide_identity(guide: Guide) -> dict[str, Any]:
    """What a subset's record says of a classifier's part in its plan; nothing where it has none."""
    if not guide.digest:
        return {}
    record = {"classifier_sha256": guide.origin["classifier"], "guide_sha256": guide.digest}
    return record | ({"hard_even_share": EVEN_SHARE} if guide.losses is not None else {})
