"""Noise schedules and solvers: any diffusers scheduler, by a short name or its class name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from semantic_aug.errors import UserError, unknown

SCHEDULERS = {
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "dpmsolver++_single": "DPMSolverSinglestepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
    "lcm": "LCMScheduler",
}
DEFAULT = "dpmsolver++"
FINAL_SIGMAS = ("zero", "sigma_min")


@dataclass(frozen=True)
class SolverSettings:
    """How noise becomes an image.

    Attributes:
        num_inference_steps: steps of the whole schedule; strength s runs its last ``int(s * steps)``.
        guidance_scale: classifier-free guidance w (Ho & Salimans 2022); 1 or less runs the conditional branch alone.
        scheduler: short name or diffusers class name.
        final_sigmas_type: ``zero`` or ``sigma_min``.
        guidance_stop: share of the schedule after which guidance is off, in (0, 1]; below 1 is lossy.
        reuse_interval: run the whole U-Net every so many steps and its outermost level in between; above 1 is lossy.
    """

    num_inference_steps: int = 25
    guidance_scale: float = 7.5
    scheduler: str = DEFAULT
    final_sigmas_type: str = "zero"
    guidance_stop: float = 1.0
    reuse_interval: int = 1


SPEEDS: dict[str, dict[str, float]] = {
    "exact": {},
    "fast": {"guidance_stop": 2 / 3, "reuse_interval": 2},
    "turbo": {"guidance_stop": 2 / 3, "reuse_interval": 3},
}
"""What ``--speed`` changes in the settings: nothing, or a limited guidance interval and feature reuse.

Guidance matters least in the last steps (Kynkaanniemi et al. 2024, arXiv:2404.07724).
"""


def scheduler_class(name: str):
    """The diffusers class of a short name or class name.

    Raises:
        UserError: neither.
    """
    import diffusers

    found = getattr(diffusers, SCHEDULERS.get(name, name), None)
    if not (inspect.isclass(found) and hasattr(found, "add_noise") and hasattr(found, "set_timesteps")):
        raise unknown("--scheduler", name, SCHEDULERS, "expected one of these or a diffusers scheduler's class name")
    return found


def make_scheduler(config: Mapping[str, Any], name: str = DEFAULT, final_sigmas_type: str = "zero"):
    """A scheduler of the base model's noise schedule.

    Args:
        config: the base model's ``scheduler_config``.
        name: short name or class name.
        final_sigmas_type: where solvers that know the option end: ``zero`` (diffusers' default since 0.26) or
            ``sigma_min`` (what the original implementation ran with).
    """
    kind = scheduler_class(name)
    # latents are not confined to [-1, 1], and Stable Diffusion's last step is at t = 1: diffusers' pipelines see to both
    options = {"final_sigmas_type": final_sigmas_type, "clip_sample": False, "steps_offset": 1}
    known = inspect.signature(kind.__init__).parameters
    return kind.from_config(dict(config), **{k: v for k, v in options.items() if k in known})


def first_step(num_inference_steps: int, strength: float) -> int:
    """The step at which img2img at ``strength`` starts, counted from pure noise (SDEdit; diffusers' rule).

    The remaining ``num_inference_steps - first_step`` steps are run.

    Raises:
        UserError: no step remains.
    """
    remaining = min(int(num_inference_steps * strength), num_inference_steps)
    if remaining < 1:
        raise UserError(
            f"strength {strength} of {num_inference_steps} steps leaves no step: raise --aug_strength to at "
            f"least {1 / num_inference_steps:.3g} or --num_inference_steps to at least {int(1 / strength) + 1}"
        )
    return num_inference_steps - remaining
