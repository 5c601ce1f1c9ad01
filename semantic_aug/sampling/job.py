"""What goes between the launcher and its processes, as plain data."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path

from semantic_aug.sampling.config import SampleConfig
from semantic_aug.sampling.identity import Origin

Row = tuple[int, int, int]
"""A finished image: number of its task, size of its file in bytes, CRC-32."""

FATAL_ERRNOS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM,
}  # fmt: skip
"""Errors of the file system that no other process would be spared."""


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
