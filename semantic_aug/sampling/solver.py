"""The solver of stage 2: the user's settings, else the defaults of a distilled model or of inverted images."""

import argparse
from collections.abc import Mapping
from typing import Any

from semantic_aug import cli
from semantic_aug.augmentations import strategies
from semantic_aug.diffusion.distilled import KINDS, kind_of, solver_defaults
from semantic_aug.diffusion.schedulers import SCHEDULERS, SolverSettings, ignored_options, scheduler_class
from semantic_aug.errors import UserError
from semantic_aug.sampling.settings import LCM_SOLVER, ModelSettings

UNINVERTED = ("few_steps", "distilled_lora", "lcm_lora", "eta", "timestep_spacing", "final_sigmas_type")
"""Flags of other ways of denoising than DDIM, which reverses an inversion."""

INVERSION_SOLVER = {"num_inference_steps": 25, "guidance_scale": 1.0, "scheduler": "ddim"}
"""Settings of strategies that start from inversions: with guidance, denoising would not reverse the inversion."""


def read_solver(args: argparse.Namespace, defaults: Mapping[str, Any] | None = None) -> SolverSettings:
    """The settings of the solver: the user's, else the defaults.

    Args:
        defaults: of a distilled model; None: the flags' own, or LCM's with ``--lcm_lora``.

    Raises:
        UserError: an unknown scheduler, another one than DDIM where images are inverted, or a setting that the scheduler
            ignores.
    """
    inverted = strategies.find(args.sample_strategy).start == "inversion"
    if inverted:
        defaults = INVERSION_SOLVER
    elif defaults is None:
        defaults = LCM_SOLVER if args.lcm_lora else {name: getattr(SolverSettings, name) for name in LCM_SOLVER}
    chosen = {name: value if getattr(args, name) is None else getattr(args, name) for name, value in defaults.items()}
    if chosen["scheduler"] not in SCHEDULERS:
        scheduler_class(chosen["scheduler"])
    if inverted:
        neutral = (None, SolverSettings.final_sigmas_type)
        given = {name: value for name in UNINVERTED if (value := getattr(args, name)) not in neutral}
        if SCHEDULERS.get(chosen["scheduler"], chosen["scheduler"]) != SCHEDULERS["ddim"]:
            given["scheduler"] = chosen["scheduler"]
        if given:
            name, value = next(iter(given.items()))
            raise UserError(
                f"--{name} {value} with --sample_strategy {args.sample_strategy}, which inverts images and denoises them by "
                "plain DDIM: leave it out"
            )
    if args.few_steps is None or args.scheduler or "eta" in chosen:  # the scheduler is known
        _drop_ignored(args, chosen)
    return cli.read_settings(SolverSettings, args, **chosen)


def _drop_ignored(args: argparse.Namespace, chosen: dict[str, Any]) -> None:
    """Drops defaults of a distilled model that the user's scheduler ignores; refuses such a flag of the user's."""
    name = chosen["scheduler"]
    optional = ("eta", "timestep_spacing", "final_sigmas_type")
    given = {
        option: value for option in optional if (value := getattr(args, option)) != getattr(SolverSettings, option)
    }
    if not given and not any(chosen.get(option) for option in optional):
        return
    ignored = ignored_options(name)
    if unused := next((option for option in given if option in ignored), None):
        raise UserError(f"--{unused} {given[unused]} with --scheduler {name}, which ignores it: leave it out")
    chosen.update(dict.fromkeys(ignored & chosen.keys()))


def read_few_steps(args: argparse.Namespace, base: str, scheduler_config: Mapping[str, Any]) -> SolverSettings:
    """The settings of the solver under ``--few_steps``: the user's, else the defaults of the distilled model. Raises UserError:
    a model that is not known to be distilled, or settings that it does not support."""
    lora = cli.read_settings(ModelSettings, args).extra_lora()
    kind = args.distilled or ("lcm" if args.lcm_lora else kind_of(lora, base, scheduler_config))
    if kind is None:
        reason = f"base model '{base}' is no Turbo model; give --distilled_lora FILE, or --distilled KIND"
        if lora:
            reason = f"the name of {lora} says neither LCM, TCD nor Hyper-SD; give --distilled KIND"
        raise UserError(f"--few_steps {args.few_steps}: {reason} ({', '.join(KINDS)})")
    return read_solver(args, solver_defaults(kind, args.few_steps, args.guidance_scale, lora, scheduler_config))
