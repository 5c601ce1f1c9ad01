"""What the launcher sends to its processes, as plain data: the job, once, and the tasks of each batch."""

from __future__ import annotations

import errno
from dataclasses import dataclass, replace
from pathlib import Path

from semantic_aug import registry
from semantic_aug.augmentations.model import ModelFiles
from semantic_aug.datasets import LoadedDataset
from semantic_aug.datasets.fingerprint import ContentHashes, hash_files
from semantic_aug.diffusion.base import weight_files
from semantic_aug.errors import UserError
from semantic_aug.files import sha256_file, sha256_text
from semantic_aug.sampling.config import SampleConfig, subset_folder
from semantic_aug.sampling.masks import columns_of
from semantic_aug.sampling.plan import Guide
from semantic_aug.sampling.sources import PlannedSources, planned_sources

Row = tuple[int, int, int]
"""A finished image: number of its task, size of its file in bytes, CRC-32."""

FATAL_ERRNOS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM,
}  # fmt: skip
"""Errors of the file system that every other process would meet too."""


def _hash_of(path: Path) -> str:
    """SHA-256 of the files of a LoRA (with PEFT's settings beside it) or of class tokens (a file each, or one of all)."""
    files = registry.token_files(path) if path.is_dir() else registry.lora_files(path)
    hashes = [sha256_file(file) for file in files]
    return hashes[0] if len(files) == 1 else sha256_text("\n".join(hashes))


@dataclass(frozen=True)
class Weights:
    """SHA-256 hashes of a model's files; None where there is no such file.

    Attributes:
        base: all files of the base model that decide its images.
        vae: its autoencoder alone.
        extra_lora: the further LoRA, such as an LCM-LoRA.
    """

    base: str
    vae: str
    lora: str | None
    tokens: str | None
    extra_lora: str | None

    @classmethod
    def of(cls, files: ModelFiles) -> Weights:
        """Hashes the files; those of a base model that have not been touched since they were hashed are not read again."""
        base = weight_files(files.folder)
        hashes = hash_files(base, "weights").hex()
        lines = [f"{path.parent.name}/{path.name} {value}" for path, value in zip(base, hashes, strict=True)]
        vae = [line for line in lines if line.startswith("vae/")]
        further = (_hash_of(path) if path else None for path in (files.lora, files.tokens, files.extra_lora))
        return cls(sha256_text("\n".join(lines)), sha256_text("\n".join(vae)), *further)

    def check(self, files: ModelFiles) -> None:
        """Compares the files again once a process has loaded them. Raises UserError: names the first with another content."""
        now = Weights.of(files)
        named = {"base": files.folder, "lora": files.lora, "tokens": files.tokens, "extra_lora": files.extra_lora}
        for name, path in named.items():
            if getattr(now, name) != getattr(self, name):
                raise UserError(
                    f"the weights in {path} changed while images were made with them: everything made so far is kept and "
                    "listed; restore them and run the same command, or give another --output_root"
                )


@dataclass(frozen=True)
class Job:
    """Everything a sampling process needs to know, the same for all of them.

    Attributes:
        folder: of the subset.
        sources: the plan's source images, which a process compares with what it reads; None where denoising starts from noise.
        weights: hashes of the model's files, which a process compares with what it loads.
        encoder: says what encodes sources and how, for the names of the files that keep encoded sources.
        compiled: whether networks are compiled.
    """

    config: SampleConfig
    folder: Path
    sources: PlannedSources | None
    weights: Weights | None = None
    encoder: str = ""
    compiled: bool = False

    @classmethod
    def of(cls, config: SampleConfig, dataset: LoadedDataset, images: ContentHashes, count: int) -> Job:
        """The job of a subset of ``count`` tasks; ``images`` are the hashes of the training images."""
        weights, solver, placement = Weights.of(config.model), config.solver, config.placement
        sources, compiled = None, config.compiled(count)
        if config.strategy.start != "noise":
            sources = planned_sources(dataset, images, columns_of(config.images.object_mask))
        network = "compiled" if compiled else "plain"  # compiled networks are laid out channels last, the encoder too
        encoder = f"{weights.vae} {config.images.resolution} {placement.dtype} {placement.device_type} {network}"
        if config.strategy.start == "inversion":
            encoder += f" inverted {weights} {sha256_text(str(config.prompts))} {solver.num_inference_steps}"
        # the plan has been drawn; masks are still needed
        config = replace(config, guide=Guide(objects=config.guide.objects))
        return cls(config, subset_folder(config, dataset), sources, weights, encoder, compiled)


@dataclass(frozen=True)
class Task:
    """One image to make.

    Attributes:
        number: in the plan.
        source: row of the plan's training images, -1 from noise.
        target: class.
        strength: in (0, 1].
        path: relative to ``data/``; None when the file exists and only the batch's shape needs the task.
        text: metadata written into the image file.
        template: index of its prompt template.
        context: index of the context that follows its prompt; None: no context.
        partner: row of the second image, -1 without one.
    """

    number: int
    source: int
    target: int
    strength: float
    path: str | None
    text: dict[str, str]
    template: int = 0
    context: int | None = None
    partner: int = -1
