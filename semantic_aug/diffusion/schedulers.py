"""Noise schedules and solvers: any diffusers scheduler, by a short name or its class name."""

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from semantic_aug import cli
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
    "tcd": "TCDScheduler",
}
DEFAULT = "dpmsolver++"
PREDICTION_TYPES = ("epsilon", "v_prediction")
OTHER_PROCESSES = ("ScoreSde", "KarrasVe", "UnCLIP", "CMStochastic", "VQDiffusion", "DDPMWuerstchen", "Amused", "IPNDM")
"""Starts of the names of diffusers' schedulers whose noise is not that of a DDPM."""
OWN_SPACING = ("LCMScheduler", "TCDScheduler")
"""diffusers' schedulers that accept a timestep spacing and ignore it."""
FINAL_SIGMAS = ("zero", "sigma_min")


@dataclass(frozen=True)
class SolverSettings:
    """The settings of the solver, which turns noise into an image."""

    TITLE = "solver"
    num_inference_steps: int = cli.setting(
        25,
        type=cli.whole(1),
        help="steps of the whole schedule; strength s runs the last int(s * N) (default: 25; with --lcm_lora 8)",
    )
    guidance_scale: float = cli.setting(
        7.5,
        type=cli.number(0, 100),
        metavar="W",
        help="scale of classifier-free guidance; 1 or less: none (default: 7.5; with --lcm_lora, diff-ii and inversion-mix 1; "
        "with --few_steps the distilled model's)",
    )
    scheduler: str = cli.setting(
        DEFAULT,
        metavar="NAME",
        help="dpmsolver++, unipc, ddim, euler, ... or a diffusers scheduler's class name (default: dpmsolver++; with "
        "--lcm_lora lcm, with --few_steps the distilled model's; diff-ii and inversion-mix: ddim)",
    )
    final_sigmas_type: str = cli.setting(
        "zero",
        choices=FINAL_SIGMAS,
        help="noise level at which the solver ends; sigma_min: as the original implementation",
    )
    eta: float | None = cli.setting(
        None,
        type=cli.number(0, 1),
        metavar="X",
        help="share of fresh noise in each step of ddim and tcd (default: the solver's, 0 and 0.3)",
        absent=None,
    )
    timestep_spacing: str | None = cli.setting(
        None,
        choices=("leading", "trailing", "linspace"),
        help="how the steps are spread over the noise schedule (default: the base model's)",
        absent=None,
    )


def scheduler_class(name: str):
    """The diffusers class of a short name or class name. Raises UserError: neither, or one whose package is not installed."""
    import diffusers

    scheduler = getattr(diffusers, SCHEDULERS.get(name, name), None)
    try:
        steps = inspect.isclass(scheduler) and hasattr(scheduler, "add_noise") and hasattr(scheduler, "set_timesteps")
    except ImportError as error:  # diffusers stands in for classes that need further packages
        raise UserError(f"--scheduler {name}: {error}") from None
    if not steps:
        raise unknown("--scheduler", name, SCHEDULERS, "expected one of these or a diffusers scheduler's class name")
    return scheduler


def ignored_options(name: str) -> set[str]:
    """The further settings of the solver that a scheduler ignores. Raises UserError: an unknown scheduler."""
    kind = scheduler_class(name)
    known = {*inspect.signature(kind.__init__).parameters, *inspect.signature(kind.step).parameters}
    if kind.__name__ in OWN_SPACING:
        known.discard("timestep_spacing")
    return {"eta", "timestep_spacing", "final_sigmas_type"} - known


def check_noise_schedule(config: Mapping[str, Any], name: str) -> None:
    """Refuses a base model whose noise is not that of a discrete variance-preserving diffusion (DDPM).

    Raises:
        UserError: flow matching, EDM (Karras et al. 2022), another prediction type, a schedule without betas, or betas
            rescaled to a zero terminal signal-to-noise ratio under a U-Net that predicts the noise.
    """
    supported = "expected a DDPM noise schedule with epsilon or v-prediction, as Stable Diffusion 1.x, 2.x and XL have"
    kind, prediction = str(config.get("_class_name", "")), config.get("prediction_type", "epsilon")
    for family, is_of_family in (
        ("flow matching", "Flow" in kind or config.get("use_flow_sigmas") or "flow" in str(prediction)),
        ("EDM", kind.startswith("EDM") or config.get("sigma_data") is not None),
        ("another noise process", kind.startswith(OTHER_PROCESSES)),
    ):
        if is_of_family:
            raise UserError(
                f"base model '{name}' uses {family} (scheduler {kind or 'not named'}), which is not supported: {supported}"
            )
    if prediction not in PREDICTION_TYPES:
        raise UserError(
            f"base model '{name}' has the prediction type '{prediction}', which is not supported: {supported}"
        )
    if not {"beta_start", "beta_schedule", "trained_betas"} & {
        key for key, value in config.items() if value is not None
    }:
        raise UserError(f"base model '{name}': its scheduler {kind or 'not named'} gives no betas: {supported}")
    if config.get("rescale_betas_zero_snr") and prediction == "epsilon":
        raise UserError(
            f"base model '{name}': rescale_betas_zero_snr with epsilon prediction, which says nothing of an image that is "
            f"all noise: {supported}, with v-prediction where betas are rescaled"
        )


def make_scheduler(
    config: Mapping[str, Any], name: str = DEFAULT, final_sigmas_type: str = "zero", timestep_spacing: str | None = None
):
    """A scheduler of the base model's noise schedule.

    Args:
        final_sigmas_type: where solvers that know the option end: ``zero`` (diffusers' default since 0.26) or
            ``sigma_min`` (what the original implementation ran with).
        timestep_spacing: how the steps are spread, for solvers that know the option; None: as the base model's.

    Raises:
        UserError: an unknown name, or a solver that does not know an option of the base model's noise schedule.
    """
    kind = scheduler_class(name)
    # latents are not confined to [-1, 1], and Stable Diffusion's last step is at t = 1, as in diffusers' pipelines;
    # PNDM's Runge-Kutta steps begin at pure noise at any strength: Stable Diffusion's configurations skip them
    options = {"final_sigmas_type": final_sigmas_type, "clip_sample": False, "steps_offset": 1, "skip_prk_steps": True}
    if timestep_spacing is not None:
        options["timestep_spacing"] = timestep_spacing
    known = inspect.signature(kind.__init__).parameters
    if config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in known:
        raise UserError(
            f"--scheduler {name}: it cannot follow the base model's noise schedule (rescale_betas_zero_snr): choose "
            "dpmsolver++, unipc, ddim, euler or euler_a"
        )
    return kind.from_config(dict(config), **{k: v for k, v in options.items() if k in known})


def first_step(num_inference_steps: int, strength: float) -> int:
    """The step at which img2img at ``strength`` starts, counted from pure noise (SDEdit; diffusers' rule); it and the following
    ones are run. Raises UserError: no step remains."""
    check_strength(num_inference_steps, strength)
    return num_inference_steps - min(int(num_inference_steps * strength), num_inference_steps)


def evaluations(scheduler: Any, num_inference_steps: int, strength: float) -> int:
    """The evaluations of the network for one image, guidance aside; solvers with half steps take several a step."""
    scheduler.set_timesteps(num_inference_steps)
    return len(scheduler.timesteps) - first_step(num_inference_steps, strength) * scheduler.order


def check_strength(
    steps: int,
    strength: float,
    cause: str = "--aug_strength",
    steps_flag: str = "--num_inference_steps",
    remedy: str = "an --aug_strength",
) -> None:
    """Refuses a strength at which no step remains.

    Args:
        cause: the setting that gave the strength, and ``steps_flag`` the one that gave the steps.
        remedy: the setting for a higher strength; empty where there is none.

    Raises:
        UserError: names them and the least values.
    """
    if int(steps * strength) < 1:
        lowest = f", or {remedy} of at least {math.ceil(1000 / steps) / 1000:g}" if remedy else ""
        raise UserError(
            f"{cause} {strength:g} of {steps_flag} {steps} leaves no step: expected at least {math.ceil(1 / strength)} "
            f"steps{lowest}"
        )
