"""What goes from the launcher to its processes, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from semantic_aug.augmentations.request import ClassNames, ModelFiles
from semantic_aug.datasets import Setting
from semantic_aug.diffusion.schedulers import SolverSettings
from semantic_aug.sampling.identity import Weights
from semantic_aug.sampling.sources import PlannedSources


@dataclass(frozen=True)
class Job:
    """Everything a sampling process needs to know, the same for all of them.

    Attributes:
        folder: of the subset.
        dataset: what ``--dataset`` was given.
        setting: which part of it is used.
        config_dir: of the registry files.
        files: base model, LoRA, tokens.
        classes: names for prompts.
        solver: steps, guidance, scheduler.
        resolution: side of the images in pixels.
        dtype: key of :data:`semantic_aug.augmentations.engine.DTYPES`.
        template: prompt with ``{}``.
        from_noise: whether denoising starts from noise instead of a source image.
        seed: the run's seed.
        cpu_threads: arithmetic threads of a process on the CPU.
        image_format: key of :data:`semantic_aug.sampling.files.FORMATS`.
        compiled_batch: batch size the networks are compiled for, or None.
        templates: prompts to draw from instead of ``template``; empty: none.
        object_mask: the part of a source that may change (see :mod:`semantic_aug.sampling.masks`); None: all of it.
        sources: the training images as the plan has them; None from noise.
        encoder: says what encodes them and how, for the names of what is kept of it.
        weights: hashes of ``files``, which a process compares when it has loaded them; None: it does not.
    """

    folder: Path
    dataset: str
    setting: Setting
    config_dir: Path
    files: ModelFiles
    classes: ClassNames
    solver: SolverSettings
    resolution: int
    dtype: str
    template: str
    from_noise: bool
    seed: int
    cpu_threads: int = 1
    image_format: str = "png"
    compiled_batch: int | None = None
    templates: tuple[str, ...] = ()
    object_mask: str | None = None
    sources: PlannedSources | None = None
    encoder: str = ""
    weights: Weights | None = None


@dataclass(frozen=True)
class Task:
    """One image to make.

    Attributes:
        number: in the plan.
        source: row of the plan's training images (the job's ``sources`` say which image that is), -1 from noise.
        target: class.
        strength: in (0, 1].
        path: relative to ``data/``; None when the file is there already and only the batch's shape needs the task.
        text: written into the image.
        template: place of its prompt in the job's ``templates``.
    """

    number: int
    source: int
    target: int
    strength: float
    path: str | None
    text: dict[str, str]
    template: int = 0


def serve(pipe: Connection, job: Job, device: str) -> None:
    """Body of a sampling process; the launcher itself has no need of what the worker imports."""
    from semantic_aug.sampling.worker import main

    main(pipe, job, device)
