"""What an engine is made of, as plain data: cheap to import and to send to another process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ModelFiles:
    """What an engine is made of.

    Attributes:
        name: base model as the user named it.
        folder: where the base model is on this machine.
        lora: LoRA file to merge, or None.
        tokens: class-token file to install, or None.
        extra_lora: a further LoRA to merge (an LCM-LoRA), or None.
    """

    name: str
    folder: Path
    lora: Path | None = None
    tokens: Path | None = None
    extra_lora: Path | None = None


@dataclass(frozen=True)
class ClassNames:
    """The classes of a data set as prompts need them.

    Attributes:
        source_names: as the data set spells them.
        prompt_names: cleaned up.
        super_class: may be empty.
    """

    source_names: tuple[str, ...]
    prompt_names: tuple[str, ...]
    super_class: str = ""
