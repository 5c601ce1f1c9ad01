"""Does it help? One command runs many methods on equal budgets and seeds, through all three stages, and writes a report."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from semantic_aug import cli, console, registry
from semantic_aug.errors import Interrupted, UserError, unknown
from semantic_aug.evaluation.experiments import commands as recipes
from semantic_aug.evaluation.experiments import results as comparison
from semantic_aug.evaluation.experiments import settings as flags
from semantic_aug.evaluation.experiments.commands import DEFAULT_METHODS, METHODS, Devices, Recipe
from semantic_aug.evaluation.experiments.runner import (
    Pair,
    check_commands,
    claim_data,
    duration,
    pair_lock,
    prepare_config,
    shown,
    terminated_as_interrupted,
)

log = logging.getLogger(__name__)

POLL_SECONDS = 5.0


def build_parser() -> cli.Parser:
    """All flags of ``compare``."""
    parser = cli.Parser(prog="python -m semantic_aug.evaluation compare", description=__doc__)
    what = parser.add_argument_group("what to compare")
    what.add_argument(
        "--methods",
        nargs="+",
        default=list(DEFAULT_METHODS),
        metavar="METHOD",
        help=f"of {', '.join(METHODS)} (default: {' '.join(DEFAULT_METHODS)})",
    )
    what.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=[2020, 2021, 2022],
        metavar="N",
        help="each draws its own training images and has its own stages 1 and 2 (default: 2020 2021 2022)",
    )
    flags.add_settings(parser, several=True)
    flags.add_budget(parser, several=True)
    flags.add_where(parser, "outputs/compare/{dataset}")
    run = parser.add_argument_group("sharing and reporting")
    run.add_argument(
        "--num_shards", type=cli.whole(1), default=1, metavar="N", help="deal the pairs of setting and seed to N runs"
    )
    run.add_argument("--shard_index", type=cli.whole(0), default=0, metavar="I", help="which of them this is, from 0")
    run.add_argument(
        "--keep",
        choices=("all", "results"),
        default="all",
        help="results: the synthetic images of a finished pair are removed; they can be made again, the same",
    )
    run.add_argument("--report_only", action="store_true", help="run nothing: write the report over what is there")
    run.add_argument("--dry_run", action="store_true", help="print the runs and their number, and stop")
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuses what cannot work.

    Raises:
        UserError: one line.
    """
    for name in args.methods:
        if name not in METHODS:
            raise unknown("method of --methods", name, METHODS, "choose among these")
    if args.shard_index >= args.num_shards:
        raise UserError(f"--shard_index {args.shard_index}: expected a number below --num_shards {args.num_shards}")
    for name in args.examples_per_class:
        if name < 1 and name != -1:
            raise UserError(f"--examples_per_class {name}: expected a number of images, or -1 for all")
    flags.check_passed_on(args)


def recipe_of(args: argparse.Namespace, place: int) -> Recipe:
    """The budget of one of the settings.

    Args:
        args: of the parser.
        place: of the setting in ``--examples_per_class``.

    Raises:
        UserError: a flag with neither one value nor one for each setting.
    """

    def own(name: str, default: Any = None) -> Any:
        values = getattr(args, name)
        if values is None:
            return default
        if len(values) not in (1, len(args.examples_per_class)):
            raise UserError(
                f"--{name} {' '.join(f'{v:g}' for v in values)}: expected one value, or one for each of the "
                f"{len(args.examples_per_class)} of --examples_per_class"
            )
        return values[place if len(values) > 1 else 0]

    shots = args.examples_per_class[place]
    few = shots > 0 or args.task == "imbalanced"
    classify = {"nepoch": own("nepoch"), "eval_every": own("eval_every")}
    sample = {"aug_strength": own("aug_strength", 0.7), "syn_dataset_multiplier": own("multiplier", 5.0)}
    synthetic = {"gamma": own("gamma", 0.5), "synthetic_prob": own("synthetic_prob", 0.3 if few else 0.1)}
    return flags.make_recipe(args, shots, own("max_train_steps"), sample, classify, synthetic)


@dataclass(frozen=True)
class Job:
    """A pair of setting and seed, and the steps of its methods."""

    recipe: Recipe
    seed: int
    pair: Pair


def jobs_of(args: argparse.Namespace, folder: Path) -> list[Job]:
    """All pairs, seed by seed, so that a comparison stopped half-way has every setting."""
    devices = flags.devices_of(args)
    all_recipes = [recipe_of(args, place) for place in range(len(args.examples_per_class))]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    jobs = []
    for seed in dict.fromkeys(args.seeds):
        for recipe in all_recipes:
            place = comparison.pair_folder(folder, recipe.name, seed)
            methods = list(dict.fromkeys(args.methods))
            jobs.append(
                Job(recipe, seed, Pair(place, recipes.steps_of(recipe, seed, methods, place, devices, visible)))
            )
    return jobs


def print_runs(jobs: Sequence[Job]) -> None:
    """Prints every run, and how many there are."""
    total = {1: 0, 2: 0, 3: 0}
    left = 0
    for job in jobs:
        missing = job.pair.missing()
        left += len(missing)
        print(f"# {job.recipe.name}, seed {job.seed}")
        for name, step in job.pair.steps.items():
            total[step.stage] += 1
            print(shown(step) + ("" if name in missing else "  # not needed: done"))
    parts = ", ".join(f"{count} of stage {stage}" for stage, count in total.items() if count)
    print(f"{sum(total.values())} runs ({parts}) in {len(jobs)} pairs of setting and seed; {left} to do")


def remaining(jobs: Sequence[Job]) -> str:
    """How much is left, in words: runs, and their time as far as the same steps under other seeds tell it."""
    known: dict[tuple[str, str], list[float]] = {}
    for job in jobs:
        for name, entry in job.pair.records.items():
            if entry["done"]:
                known.setdefault((job.recipe.name, name), []).append(entry["seconds"])
    todo = [(job.recipe.name, name) for job in jobs for name in job.pair.missing()]
    times = [sum(known[key]) / len(known[key]) for key in todo if key in known]
    if not times:
        return f"{len(todo)} runs to do"
    more = f" and {len(todo) - len(times)} runs not yet timed" if len(times) < len(todo) else ""
    return f"{len(todo)} runs to do: about {duration(sum(times))}{more}"


def run_jobs(jobs: Sequence[Job], folder: Path, config_dir: Path, keep: str) -> None:
    """Runs what is missing, pair by pair; one that another process has is come back to.

    Raises:
        UserError: a step failed.
        KeyboardInterrupt: interrupted.
    """
    waiting, told = list(jobs), False
    while waiting:
        busy = []
        for job in waiting:
            with pair_lock(job.pair.folder) as held:
                if held is None:
                    busy.append(job)
                    continue
                missing = job.pair.missing()
                if missing:
                    log.info("%s, seed %d (%s)", job.recipe.name, job.seed, remaining(jobs))
                    prepare_config(job.pair.folder, config_dir)
                for name in missing:
                    job.pair.run(name, held)
                if keep == "results":
                    job.pair.remove_images()
            if missing:
                comparison.write(folder)
        if busy and len(busy) == len(waiting):
            if not told:
                log.info("waiting for another process at work on %d pair(s)", len(busy))
            told = True
            time.sleep(POLL_SECONDS)
        waiting = busy


def check_stages(jobs: Sequence[Job], folder: Path, config_dir: Path, devices: Devices) -> None:
    """Lets every stage check its flags before the first of them runs, once, for a setting that is new.

    Raises:
        UserError: a stage refuses.
    """
    new = [job for job in jobs if not (folder / job.recipe.name / comparison.RECIPE_FILE).is_file()]
    for job in new[:1]:
        recipe, seed, stages = job.recipe, job.seed, {step.stage for step in job.pair.steps.values()}
        place = folder / ".check" / recipe.name
        prepare_config(place, config_dir)
        shared = recipes.shared_flags(recipe, seed, place)
        steps = [recipes.classify_step(recipe, seed, shared, "real-only", place, devices)]
        if 2 in stages:
            steps.append(recipes.sample_step(recipe, seed, shared, "real-guidance", place, devices))
        if 1 in stages:
            steps.append(recipes.finetune_step(recipe, seed, shared, "ti_db", place, {}))
        check_commands(steps, place)


def main(argv: list[str] | None = None) -> int:
    """Parses, checks, runs what is missing, reports."""
    words = flags.joined_words(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(words)
    check(args)
    console.set_up_logging()
    folder = registry.resolve_path(args.output_dir or flags.default_folder(args, "compare"))
    jobs = jobs_of(args, folder)
    if args.dry_run:
        print_runs(jobs)
        return 0
    if not args.report_only:
        mine = jobs[args.shard_index :: args.num_shards]
        try:
            with terminated_as_interrupted():
                check_stages(mine, folder, args.config_dir, flags.devices_of(args))
                for recipe in {job.recipe.name: job.recipe for job in jobs}.values():
                    comparison.claim_setting(folder, recipe.name, recipe.record())
                for job in mine:
                    stages = {step.stage for step in job.pair.steps.values()}
                    claim_data(job.pair.folder, job.recipe, job.seed, args.config_dir, stages)
                comparison.save_request(folder, _request_words(words), *_asked(jobs, args))
                run_jobs(mine, folder, args.config_dir, args.keep)
        except KeyboardInterrupt:
            raise Interrupted("interrupted: what is done is kept; the same command goes on from there") from None
    found = comparison.write(folder)
    print(
        f"{len(found.rows)} of {len(found.rows) + len(found.missing)} classifiers: {registry.shown_path(folder / 'report.md')}"
    )
    return 0


def _asked(jobs: Sequence[Job], args: argparse.Namespace) -> tuple[list[str], list[int], list[str]]:
    settings = list(dict.fromkeys(job.recipe.name for job in jobs))
    return settings, list(dict.fromkeys(args.seeds)), list(dict.fromkeys(args.methods))


def _request_words(words: Sequence[str]) -> list[str]:
    """The words of a request without what says which share of it a process does."""
    out, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word in ("--num_shards", "--shard_index"):
            skip = True
        elif not word.startswith(("--num_shards=", "--shard_index=")) and word != "--report_only":
            out.append(word)
    return out
