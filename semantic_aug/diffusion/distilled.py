"""Distilled models, which make an image in a few steps: the solver settings of each kind, and recognising a file's kind.

LCM (Luo et al. 2023, arXiv:2311.05556), TCD (Zheng et al. 2024, arXiv:2402.19159), Hyper-SD (Ren et al. 2024,
arXiv:2404.13686), SD-Turbo and SDXL-Turbo (adversarial distillation, Sauer et al. 2023, arXiv:2311.17042).
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from semantic_aug.diffusion.schedulers import check_strength
from semantic_aug.errors import UserError
from semantic_aug.registry import LORA_FILES


@dataclass(frozen=True)
class Distilled:
    """One kind of distilled model.

    Attributes:
        scheduler: short name of its solver.
        most_steps: steps it was distilled for.
        guidance: scale without a flag.
        most_guidance: highest scale that it supports; None: not known.
        eta: share of fresh noise in each step, where its authors give one.
        timestep_spacing: how its steps are spread, where that is not the base model's.
    """

    scheduler: str
    most_steps: int
    guidance: float = 1.0
    most_guidance: float | None = None
    eta: float | None = None
    timestep_spacing: str | None = None


KINDS = {
    "lcm": Distilled("lcm", 50),
    "tcd": Distilled("tcd", 50, eta=0.3),
    "hyper": Distilled("ddim", 8, most_guidance=1.0, timestep_spacing="trailing"),
    "hyper-unified": Distilled("tcd", 8, most_guidance=1.0, eta=1.0),
    "hyper-cfg": Distilled("ddim", 12, guidance=5.0, most_guidance=8.0, timestep_spacing="trailing"),
    "turbo": Distilled("euler", 4, most_guidance=1.0, timestep_spacing="trailing"),
}
"""``hyper``: the LoRAs of 2, 4 or 8 steps; ``hyper-unified``: the one of 1 step, which takes more too; ``hyper-cfg``: those
that keep guidance (5 to 8)."""

_STEPS = re.compile(r"(\d+)[-_ ]?steps?", re.IGNORECASE)


def kind_of(lora: Path | None, base_name: str, scheduler_config: Mapping[str, Any]) -> str | None:
    """The kind of a distilled model, or None where it is not recognised.

    Args:
        lora: file of the distilled LoRA, recognised by its name and its metadata; None: the base model is distilled.
        base_name: the base model, as the user named it.
        scheduler_config: of the base model; a Turbo model's is Euler with trailing steps.
    """
    if lora is None:
        kind = str(scheduler_config.get("_class_name", ""))
        trailing = kind.startswith("Euler") and scheduler_config.get("timestep_spacing") == "trailing"
        return "turbo" if trailing or "turbo" in Path(base_name).name.casefold() else None
    name = " ".join([_name_of(lora), *_titles(lora)]).casefold()
    if re.search(r"hyper[-_ ]?sd", name):
        steps = _STEPS.search(_name_of(lora))
        return "hyper-cfg" if "cfg" in name else "hyper-unified" if steps and steps[1] == "1" else "hyper"
    return next((kind for kind in ("lcm", "tcd") if kind in name), None)


def _name_of(lora: Path) -> str:
    """The name of a LoRA: its file's, or its folder's where the file has diffusers' standard name."""
    return lora.parent.name if lora.name in LORA_FILES else lora.name


def _titles(lora: Path) -> list[str]:
    """The names and titles in the metadata of a LoRA's file."""
    with contextlib.suppress(SafetensorError, OSError), safe_open(lora, "np") as file:
        return [text for key, text in (file.metadata() or {}).items() if key.endswith(("name", "title"))]
    return []  # of another format, or damaged, which read_lora reports


def solver_defaults(
    kind: str, steps: int, guidance: float | None, lora: Path | None, scheduler_config: Mapping[str, Any]
) -> dict[str, Any]:
    """The solver's settings under a distilled model, by their names in :class:`SolverSettings`.

    Args:
        kind: one of :data:`KINDS`.
        steps: of ``--few_steps``.
        guidance: of ``--guidance_scale``; None: not given.
        lora: the distilled LoRA, whose name may say for how many steps it was made.

    Raises:
        UserError: more steps or a higher guidance scale than the model supports.
    """
    row = KINDS[kind]
    named = _STEPS.search(_name_of(lora)) if lora is not None and kind != "hyper-unified" else None
    most = min(int(named[1]), row.most_steps) if named else row.most_steps  # a name may count steps of training
    if steps > most:
        raise UserError(f"--few_steps {steps}: a model of kind {kind} was distilled for at most {most}; lower it")
    if guidance is not None and row.most_guidance is not None and guidance > row.most_guidance:
        raise UserError(
            f"--guidance_scale {guidance:g}: a model of kind {kind} takes at most {row.most_guidance:g}; leave it out"
        )
    ancestral = kind == "turbo" and "Ancestral" in str(scheduler_config.get("_class_name"))
    return {
        "num_inference_steps": steps,
        "guidance_scale": row.guidance,
        "scheduler": "euler_a" if ancestral else row.scheduler,
        "eta": row.eta,
        "timestep_spacing": row.timestep_spacing,
    }


def effective_strength(steps: int, strength: float) -> float:
    """The share of the steps that img2img runs at a strength, ``int(steps * strength) / steps``, by diffusers' rule. Raises
    UserError: no step remains."""
    check_strength(steps, strength, steps_flag="--few_steps")
    remaining = min(int(steps * strength), steps)
    share = remaining / steps
    while int(steps * share) < remaining:  # 49 * (1 / 49) is below 1
        share = math.nextafter(share, 2)
    return share
