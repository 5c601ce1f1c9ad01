"""What goes between the launcher and its processes, as plain data."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path

from semantic_aug import registry
from semantic_aug.augmentations.model import ModelFiles
from semantic_aug.datasets.fingerprint import hash_files
from semantic_aug.diffusion.base import weight_files
from semantic_aug.errors import UserError
from semantic_aug.files import sha256_file, sha256_text
from semantic_aug.sampling.config import SampleConfig
from semantic_aug.sampling.sources import PlannedSources

Row = tuple[int, int, int]
"""A finished image: number of its task, size of its file in bytes, CRC-32."""

FATAL_ERRNOS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM,
}  # fmt: skip
"""Errors of the file system that no other process would be spared."""


def _hash_of(path: Path) -> str:
    """SHA-256 of a LoRA's or class tokens' file; of PEFT's settings beside it, or of the files of all classes, too."""
    files = registry.token_files(path) if path.is_dir() else registry.lora_files(path)
    hashes = [sha256_file(file) for file in files]
    return hashes[0] if len(files) == 1 else sha256_text("\n".join(hashes))


@dataclass(frozen=True)
class Weights:
    """Hashes of a model's files; None where there is no such file.

    Attributes:
        base: of everything that decides what the base model makes.
        vae: of its autoencoder alone.
        lora: of the LoRA.
        tokens: of the class tokens.
        extra_lora: of the further LoRA.
    """

    base: str
    vae: str
    lora: str | None
    tokens: str | None
    extra_lora: str | None

    @classmethod
    def of(cls, files: ModelFiles) -> Weights:
        """Of the files as they are now. A base model that has not been touched since is not read again."""
        base = weight_files(files.folder)
        hashes = hash_files(base, "weights").hex()
        lines = [f"{path.parent.name}/{path.name} {value}" for path, value in zip(base, hashes, strict=True)]
        vae = [line for line in lines if line.startswith("vae/")]
        further = (_hash_of(path) if path else None for path in (files.lora, files.tokens, files.extra_lora))
        return cls(sha256_text("\n".join(lines)), sha256_text("\n".join(vae)), *further)

    def check(self, files: ModelFiles) -> None:
        """Refuses files that have changed, for a process that has loaded them. Raises UserError: names the first that has
        another content."""
        now = Weights.of(files)
        named = {"base": files.folder, "lora": files.lora, "tokens": files.tokens, "extra_lora": files.extra_lora}
        for name, path in named.items():
            if getattr(now, name) != getattr(self, name):
                raise UserError(
                    f"the weights in {path} changed while images were made with them: everything made so far is kept and "
                    "listed; restore them and run the same command, or give another --output_root"
                )


@dataclass(frozen=True)
class Origin:
    """Training images and weights as the plan has them; every process compares them with what it reads.

    Attributes:
        sources: the training images; None where denoising starts from noise.
        weights: hashes of the model's files.
        encoder: says what encodes sources and how, for the names of the files that keep encoded sources.
    """

    sources: PlannedSources | None
    weights: Weights | None = None
    encoder: str = ""


@dataclass(frozen=True)
class Job:
    """Everything a sampling process needs to know, the same for all of them.

    Attributes:
        config: the request.
        folder: of the subset.
        origin: training images and weights as the plan has them, which a process compares with what it reads.
        compiled: whether networks are compiled.
    """

    config: SampleConfig
    folder: Path
    origin: Origin
    compiled: bool = False


@dataclass(frozen=True)
class Task:
    """One image to make.

    Attributes:
        number: in the plan.
        source: row of the plan's training images, -1 from noise.
        target: class.
        strength: in (0, 1].
        path: relative to ``data/``; None when the file exists and only the batch's shape needs the task.
        text: written into the image.
        template: position of its prompt in the templates.
        context: position of what follows its prompt in the contexts; None: nothing.
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
