"""Does it help? One command runs many methods on equal budgets and seeds, through all three stages, and writes a report."""

from __future__ import annotations

import argparse
import logging
import math
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from semantic_aug import cli, files, registry, runs
from semantic_aug.datasets import LoadedDataset, Setting
from semantic_aug.datasets.fingerprint import content_digest, hash_images
from semantic_aug.datasets.settings import check_unlabelled
from semantic_aug.datasets.unlabelled import read_unlabelled, without_labelled
from semantic_aug.errors import UserError, no_downloads, unknown
from semantic_aug.evaluation.experiments import checks, headroom, pseudo_label, report, results, runner
from semantic_aug.evaluation.experiments.commands import (
    DEFAULT_METHODS,
    LABEL_STEP,
    METHODS,
    PSEUDO_LABEL,
    REAL_ONLY_RUN,
    UNLABELLED,
    Method,
    StageCommands,
    Step,
    setting_name,
)
from semantic_aug.evaluation.experiments.learning_curve import FACTOR, FOLDS
from semantic_aug.evaluation.experiments.pseudo_label import UnlabelledSettings
from semantic_aug.evaluation.experiments.runner import Pair, duration
from semantic_aug.evaluation.experiments.settings import (
    ExtraArguments,
    Parser,
    Placement,
    add_shared,
    join_stage_args,
    recipe_of,
)

log = logging.getLogger(__name__)

POLL_SECONDS = 5.0
VALIDATION_OF_HEADROOM = 50
"""Most validation images per class for the headroom, which then takes about a minute."""
POOL_OF_ALL = 200
"""Most labelled images per class for the headroom where the comparison trains on all."""


@dataclass(frozen=True, kw_only=True)
class ComparisonSettings:
    """What is compared."""

    TITLE = "what to compare"
    methods: tuple[str, ...] = cli.setting(
        DEFAULT_METHODS,
        nargs="+",
        metavar="METHOD",
        help=f"some of {', '.join(METHODS)} (default: {' '.join(DEFAULT_METHODS)})",
    )
    seeds: tuple[int, ...] = cli.setting(
        (2020, 2021, 2022),
        type=int,
        nargs="+",
        help="each draws its own training images and has its own stages 1 and 2 (default: 2020 2021 2022)",
    )
    examples_per_class: tuple[int, ...] = cli.setting(
        (-1,), type=int, nargs="+", help="few-shot settings: training images per class, -1 for all (default: -1)"
    )
    multiplier: tuple[float, ...] = cli.setting(
        (5.0,),
        type=cli.number(0, 1e6, open_low=True),
        nargs="+",
        metavar="M",
        help="synthetic images per training image; one value, or one for each of --examples_per_class (default: 5)",
    )

    def __post_init__(self):
        for name in self.methods:
            if name not in METHODS:
                raise unknown("method of --methods", name, METHODS, "choose among these")
        for shots in self.examples_per_class:
            if shots < 1 and shots != -1:
                raise UserError(f"--examples_per_class {shots}: expected a number of images, or -1 for all")
            if self.examples_per_class.count(shots) > 1:
                raise UserError(f"--examples_per_class {shots} twice: a setting has one budget")


@dataclass(frozen=True, kw_only=True)
class SharingSettings:
    """How processes share the work, and what they leave."""

    TITLE = "sharing and reporting"
    num_shards: int = cli.setting(
        1, type=cli.whole(1), help="deal the pairs of setting and seed to N runs", result=False
    )
    shard_index: int = cli.setting(
        0, type=cli.whole(0), metavar="I", help="which of them this is, from 0", result=False
    )
    keep: str = cli.setting(
        "all",
        choices=("all", "results"),
        help="results: the synthetic images of a finished pair are removed; they can be made again, the same",
        result=False,
    )
    report_only: bool = cli.setting(False, help="run nothing: write the report over existing results", result=False)
    skip_headroom: bool = cli.setting(
        False, help="do not measure first, on real images alone, whether there is anything to win", result=False
    )

    def __post_init__(self):
        if self.shard_index >= self.num_shards:
            raise UserError(f"--shard_index {self.shard_index}: expected a number below --num_shards {self.num_shards}")


def build_parser() -> cli.Parser:
    """All flags of ``compare``."""
    parser = Parser(prog="python -m semantic_aug.evaluation compare", description=__doc__)
    cli.add_settings(parser, ComparisonSettings)
    cli.add_settings(parser, UnlabelledSettings)
    add_shared(parser, several=True)
    cli.add_settings(parser, SharingSettings)
    return parser


@dataclass(frozen=True)
class Job:
    """A pair of setting and seed: its commands, and the steps of its methods."""

    commands: StageCommands
    pair: Pair
    methods: tuple[str, ...]

    @property
    def setting(self) -> str:
        """Name of the setting."""
        return self.commands.recipe.name


def jobs_of(args: argparse.Namespace, folder: Path) -> list[Job]:
    """All pairs, seed by seed, so that a comparison stopped half-way has every setting. Raises UserError: the arguments do not
    fit together."""
    settings, extra = cli.read_settings(ComparisonSettings, args), cli.read_settings(ExtraArguments, args)
    users = [name for name in settings.methods if METHODS[name].unlabelled]
    if users and args.unlabelled is None:
        raise UserError(f"--methods {users[0]} uses unlabelled images: give --unlabelled PATH")
    if args.unlabelled is not None and not users:
        raise UserError(
            f"--unlabelled {args.unlabelled}: no method uses it; add pseudo-label or diff-mix+unlabelled to --methods"
        )
    for name in settings.methods:
        if flags := extra.flags(2) & METHODS[name].sample.keys():  # which would win over the method's own
            raise UserError(f"--stage2_args: --{min(flags)} is what the method {name} sets; leave out one of the two")
    recipes = [recipe_of(args, index) for index in range(len(settings.examples_per_class))]
    gpu_ids, methods, jobs = cli.read_settings(Placement, args).gpu_ids, list(dict.fromkeys(settings.methods)), []
    for seed in dict.fromkeys(settings.seeds):
        for recipe in recipes:
            commands = StageCommands(recipe, seed, results.pair_folder(folder, recipe.name, seed), gpu_ids)
            jobs.append(Job(commands, Pair(commands.folder, commands.method_steps(methods)), tuple(methods)))
    return jobs


def print_runs(jobs: Sequence[Job]) -> None:
    """Prints every run, and how many there are."""
    total, left = {1: 0, 2: 0, 3: 0}, 0
    for job in jobs:
        missing = job.pair.missing()
        left += len(missing)
        print(f"# {job.setting}, seed {job.commands.subset_seed}")
        for name, step in job.pair.steps.items():
            total[step.stage] += 1
            print(f"{step}{'' if name in missing else '  # not needed: done'}")
    parts = ", ".join(f"{count} of stage {stage}" for stage, count in total.items() if count)
    print(f"{sum(total.values())} runs ({parts}) in {len(jobs)} pairs of setting and seed; {left} to do")


def remaining(jobs: Sequence[Job]) -> str:
    """The number of runs left, and their time as far as the same steps under other seeds were timed."""
    known: dict[tuple[str, str], list[float]] = {}
    for job in jobs:
        for name, entry in job.pair.records.items():
            if entry["done"]:
                known.setdefault((job.setting, name), []).append(entry["seconds"])
    left = [(job.setting, name) for job in jobs for name in job.pair.missing()]
    times = [sum(known[key]) / len(known[key]) for key in left if key in known]
    if not times:
        return f"{len(left)} runs to do"
    more = f" and {len(left) - len(times)} runs not yet timed" if len(times) < len(left) else ""
    return f"{len(left)} runs to do: about {duration(sum(times))}{more}"


def run_jobs(jobs: Sequence[Job], folder: Path, config_dir: Path, keep: str) -> None:
    """Runs what is missing, pair by pair; pairs that another process holds are tried again after the others.

    Raises:
        UserError: a step failed.
        KeyboardInterrupt: interrupted.
    """
    waiting, announced = list(jobs), False
    while waiting:
        busy = []
        for job in waiting:
            with runner.pair_lock(job.pair.folder) as held:
                if held is None:
                    busy.append(job)
                    continue
                missing = job.pair.missing()
                if missing:
                    log.info("%s, seed %d (%s)", job.setting, job.commands.subset_seed, remaining(jobs))
                    runner.prepare_config(job.pair.folder, config_dir)
                for name in missing:
                    job.pair.run(name, held)
                if keep == "results":  # a later step that needs the synthetic images makes the same again
                    shutil.rmtree(job.pair.folder / "aug_samples", ignore_errors=True)
            if missing:
                report.write_comparison(folder)
        if busy and len(busy) == len(waiting):
            if not announced:
                log.info("waiting for another process at work on %d pair(s)", len(busy))
            announced = True
            time.sleep(POLL_SECONDS)
        waiting = busy


def check_stages(jobs: Sequence[Job], folder: Path, config_dir: Path, dry_run: bool = False) -> list[str]:
    """Checks the steps that are still to run: the flags of all, and by dry runs the stages of which no pair of a setting has
    finished a step. Stage 3 is run in every setting, since their lengths and batches differ, the others in the first one alone.
    Returns what a run would download, a line each. Raises UserError: a stage refuses."""
    by_setting, checked, missing = {}, set(), []
    for job in jobs:
        by_setting.setdefault(job.setting, []).append(job)
    steps_of = {
        name: {step: job.pair.steps[step] for job in of_setting for step in job.pair.missing()}.values()
        for name, of_setting in by_setting.items()
    }
    for steps in steps_of.values():
        checks.check_flags(steps, config_dir)
    for name, (first, *others) in by_setting.items():
        stages = checks.unchecked_stages([job.pair for job in (first, *others)]) - checked
        checked |= {1, 2} if stages & {1, 2} else set()
        # the asked ones, and those whose classifiers label for them
        methods = [method for method in METHODS.values() if method.step_names[3] in first.pair.steps]
        samples = partial(_checked_samples, methods=methods)
        options = {"folder": folder, "config_dir": config_dir, "dry_run": dry_run}
        missing += checks.dry_run_stages(first.commands, stages, steps_of[name], samples, **options)
    return list(dict.fromkeys(missing))


def _checked_samples(commands: StageCommands, methods: Sequence[Method]) -> list[Step]:
    """Runs of stage 2 with the flags of single methods, without the checkpoint and the classifier that are still to be
    trained."""
    pool = commands.recipe.pseudo.get("unlabelled")
    steps = checks.sample_checks(commands, [method.strategy for method in methods if method.strategy])
    for method in {method.subset: method for method in methods}.values():
        if UNLABELLED in method.sample.values():
            options = {"sources": method.sample["sources"], "unlabelled": pool}
            steps.append(commands.sample("real-mix", method.name, **options))
        elif method.sample and REAL_ONLY_RUN not in method.sample.values():
            steps.append(commands.sample("real-mix", method.name, **method.sample))
    return steps


def pool_per_class(shots: int) -> int:
    """Labelled images per class for the headroom: cross-validation leaves four times the shots to train on."""
    return math.ceil(FACTOR * shots * FOLDS / (FOLDS - 1)) if shots > 0 else POOL_OF_ALL


def print_headroom(args: argparse.Namespace, folder: Path) -> None:
    """Prints for every few-shot setting whether more images would help. It downloads nothing, and a failure stops nothing."""
    if args.task == "imbalanced":  # the curve is over images per class
        return
    if args.corrupt_prob:
        print("headroom is not measured with --corrupt_prob: its curve would be that of the right labels", flush=True)
        return
    for shots in dict.fromkeys(args.examples_per_class):
        name, pool = setting_name(shots, args.task, args.imbalance_factor), pool_per_class(shots)
        print(f"measuring headroom of {name}, on at most {pool} images per class", flush=True)
        settings = headroom.HeadroomSettings(
            examples_per_class=shots,
            pool_per_class=pool,
            val_examples_per_class=VALIDATION_OF_HEADROOM,
            split=args.split or Setting.split,
            gpu=args.gpu_ids[0] if args.gpu_ids else None,
            output_dir=folder / "headroom" / name,
        )
        try:
            with no_downloads(True):
                sentence, _ = headroom.run(settings, args.dataset, args.config_dir)
        except Exception as error:  # of any kind: the comparison does not need it
            sentence = f"headroom was not measured: {' '.join(str(error).split()) or type(error).__name__}"
        print(sentence, flush=True)


def refuse_without_validation(job: Job, dataset: LoadedDataset) -> None:
    """Refuses methods that follow confusions on validation images where the data set has none."""
    for name in job.methods:
        if METHODS[name].sample.get("pairing") == "confusion" and dataset.val is None:
            raise UserError(f"--methods {name}: {dataset.name} has no validation images; give --val_fraction")


def claim(
    jobs: Sequence[Job], selected: Sequence[Job], folder: Path, config_dir: Path, dry_run: bool = False
) -> list[str]:
    """Checks the stages, and records the budgets of all settings and the images, unlabelled images and base models of the
    selected jobs; a dry run writes nothing. Returns what a run would download, a line each. Raises UserError: a stage refuses,
    an image is damaged, or the folder holds runs with another budget or of other data."""
    missing, checked = check_stages(selected, folder, config_dir, dry_run), set()
    for dry in (True,) if dry_run else (True, False):  # a refusal leaves no record that would refuse its correction
        for job in {job.setting: job for job in jobs}.values():
            results.claim_setting(folder, job.commands.recipe, checks.recipes_in_effect(job.commands, config_dir), dry)
        for job in selected:
            with checks.noting_downloads(missing):
                dataset = runner.claim_data(job.commands, config_dir, dry, checked)
                refuse_without_validation(job, dataset)
                if any(METHODS[method].unlabelled for method in job.methods):
                    claim_pool(job, folder, dataset, config_dir, dry)
                if any(step.stage < 3 for step in job.pair.steps.values()):
                    runner.claim_base(job.commands, dataset, dry)
    return missing


def claim_pool(job: Job, folder: Path, dataset: LoadedDataset, config_dir: Path, dry_run: bool = False) -> None:
    """Checks the unlabelled images of a pair, and records them and the threshold of their labels for its setting; a dry run
    writes nothing. Raises UserError: some are validation or test images, or the setting has results of other images or another
    threshold."""
    settings, root = UnlabelledSettings(**job.commands.recipe.pseudo), folder / job.setting
    # the labelled ones, which differ from seed to seed, among them
    images = read_unlabelled(settings.unlabelled, config_dir)
    without_labelled(images, dataset, settings.unlabelled)
    for name, step in job.pair.steps.items():
        if name.startswith(LABEL_STEP):
            pseudo_label.build_parser().parse_args(step.arguments[3:])  # before the step's turn comes
    record = {
        "dataset": dataset.name,
        "pseudo_threshold": settings.pseudo_threshold,
        "unlabelled": content_digest(hash_images(images).hex()),
    }

    users = {method.step_names[3]: method for method in METHODS.values() if method.unlabelled}
    steps = job.commands.method_steps([method.name for method in users.values()])
    existing = {  # results of the unlabelled images, of any seed: pseudo-labels, translations, classifiers
        step.name
        for step in steps.values()
        if (step.name in users or "--unlabelled" in step.arguments) and any(root.glob(f"seed*/{step.result}"))
    }
    with_labels = [method for method in users.values() if method.labeller]
    labelled = existing & {name for method in with_labels for name in (method.label_step, method.step_names[3])}
    if existing:
        ignored = () if labelled else ("pseudo_threshold",)
        runs.claim(root / PSEUDO_LABEL, record, "--output_dir", ignored, dry_run=dry_run)
    if not labelled and not dry_run:  # another threshold may be chosen, and where nothing is made of it, another pool
        files.write_text(root / PSEUDO_LABEL / runs.ARGS_FILE, runs.arguments_text(record))


def main(argv: list[str] | None = None) -> int:
    """Parses, checks, runs what is missing, reports."""
    args = build_parser().parse_args(argv)
    sharing = cli.read_settings(SharingSettings, args)
    settings = cli.read_settings(ComparisonSettings, args)
    folder = cli.read_settings(Placement, args).folder("compare", args)
    jobs = jobs_of(args, folder)
    selected = jobs[sharing.shard_index :: sharing.num_shards]
    if args.dry_run:
        print_runs(jobs)
        check_unlabelled(args.unlabelled)
        with runner.interruptible(), no_downloads(True):
            missing = claim(jobs, selected, folder, args.config_dir, dry_run=True)
        print(*missing, sep="\n", end="\n" if missing else "")
        return 0
    if not sharing.report_only:
        check_unlabelled(args.unlabelled)
        with runner.interruptible():
            claim(jobs, selected, folder, args.config_dir)
            request = _request_arguments(sys.argv[1:] if argv is None else argv)
            names = [job.setting for job in jobs]
            results.save_request(folder, request, names, settings.seeds, settings.methods)
            if sharing.shard_index == 0 and not sharing.skip_headroom:
                print_headroom(args, folder)
            run_jobs(selected, folder, args.config_dir, sharing.keep)
    comparison = report.write_comparison(folder)
    finished, path = len(comparison.rows), registry.shown_path(folder / report.REPORT)
    print(f"{finished} of {finished + len(comparison.missing)} classifiers: {path}")
    return 0


def _request_arguments(arguments: Sequence[str]) -> list[str]:
    """The arguments of a request without those that say which share of it a process does."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--num_shards")
    parser.add_argument("--shard_index")
    parser.add_argument("--report_only", action="store_true")
    return parser.parse_known_args(join_stage_args(arguments))[1]
