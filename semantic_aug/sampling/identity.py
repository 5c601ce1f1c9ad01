"""The identity of a synthetic subset: everything that decides a byte of its images."""

from __future__ import annotations

from typing import Any

from semantic_aug import cli, runs
from semantic_aug.datasets import LoadedDataset, Setting
from semantic_aug.datasets.fingerprint import ContentHashes, data_identity
from semantic_aug.diffusion.schedulers import SolverSettings
from semantic_aug.files import sha256_text
from semantic_aug.sampling.config import SampleConfig
from semantic_aug.sampling.guide import pool_identity
from semantic_aug.sampling.job import Job
from semantic_aug.sampling.masks import columns_of
from semantic_aug.sampling.plan import EVEN_SHARE, Plan
from semantic_aug.sampling.settings import ImageSettings

DATA = "data"
"""Name of the data set's identity in a record."""
RECORDED_AS = {"sample_strategy": "strategy", "syn_dataset_multiplier": "multiplier"}
"""Settings that have another name in the record."""


def identity_of(
    config: SampleConfig, dataset: LoadedDataset, plan: Plan, images: ContentHashes, job: Job
) -> dict[str, Any]:
    """The identity of the subset that a request describes, by the names of its record; ``images`` are the hashes of the
    training images."""
    pool, weights, prompts, guide = dataset.unlabelled, job.weights, config.prompts, {}
    if config.guide.digest:
        guide = {"classifier_sha256": config.guide.origin["classifier"], "guide_sha256": config.guide.digest}
    if config.guide.losses is not None:
        guide["hard_even_share"] = EVEN_SHARE
    compared = {
        "dataset": dataset.name,
        "class_names": list(dataset.source_names),
        DATA: data_identity(dataset, {"train": images}, columns_of(config.images.object_mask)),
        **{RECORDED_AS.get(name, name): getattr(config.images, name) for name in cli.result_settings(ImageSettings)},
        "strategy": config.strategy.name,  # not an alias
        "checkpoint_key": config.key,
        "strengths": list(config.strengths),
        "seed": config.run.seed,
        "batch_size": config.placement.batch_size,
        "dtype": config.placement.dtype,
        "device": config.placement.device_type,
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
        **guide,
        "unlabelled": None if pool is None else pool_identity(pool),
    }
    return runs.plain(compared)


def arguments_of(config: SampleConfig) -> dict[str, Any]:
    """The request from which the identity follows, and the locations of data and models, which may change."""
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
    return runs.plain(arguments)
