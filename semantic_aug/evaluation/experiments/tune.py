"""Chooses strength, gamma, probability, multiplier, labels and strategy on validation images, from one sampled pool."""

from __future__ import annotations

import argparse
import logging
import math
import shlex
import sys
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from semantic_aug import cli, files, registry, runs
from semantic_aug.classify import config as classify
from semantic_aug.datasets.catalog import find_spec
from semantic_aug.datasets.synthetic import CONFIG_FILE, subset_record
from semantic_aug.errors import UserError, no_downloads
from semantic_aug.evaluation.experiments import checks, halving, report, runner
from semantic_aug.evaluation.experiments.commands import StageCommands, Step
from semantic_aug.evaluation.experiments.grid import PLAN_FILE, Candidate, GridSettings
from semantic_aug.evaluation.experiments.results import read_predictions
from semantic_aug.evaluation.experiments.runner import Pair, duration
from semantic_aug.evaluation.experiments.settings import (
    ExtraArguments,
    Parser,
    Placement,
    add_shared,
    budget_defaults,
    recipe_of,
)
from semantic_aug.evaluation.experiments.statistics import Difference, crossed_difference

log = logging.getLogger(__name__)

DEFAULT_TRIALS = 40


@dataclass(frozen=True, kw_only=True)
class BudgetSettings:
    """How much a search may run."""

    TITLE = "budget"
    trials: int | None = cli.setting(
        None, type=cli.whole(1), help=f"most classifier runs (default: {DEFAULT_TRIALS}, or what --budget_hours allows)"
    )
    budget_hours: float | None = cli.setting(
        None,
        type=cli.number(0, open_low=True),
        metavar="H",
        help="hours for everything, stages 1 and 2 included; fixed once the first classifier has been timed",
    )
    seeds: tuple[int, ...] = cli.setting(
        (2020, 2021, 2022),
        type=int,
        nargs="+",
        help="seeds of the classifier runs, 2 or more; finalists run on all (default: 2020 2021 2022)",
    )
    register_key: str | None = cli.setting(
        None,
        type=registry.new_key,
        metavar="KEY",
        help="write the chosen subset into synthetic_datasets.yaml under this key",
        result=False,
    )

    def __post_init__(self):
        if len(set(self.seeds)) < 2:
            raise UserError(f"--seeds {self.seeds[0]}: expected two or more; one run says too little to choose by")
        if self.trials is not None and self.trials < self.smallest:
            raise UserError(
                f"--trials {self.trials}: the smallest search has {self.smallest} runs; give more, or fewer --seeds"
            )

    @property
    def smallest(self) -> int:
        """Classifier runs of the smallest search: two candidates on every seed."""
        return halving.FINALISTS * len(set(self.seeds))


def build_parser() -> cli.Parser:
    """All flags of ``tune``."""
    parser = Parser(prog="python -m semantic_aug.evaluation tune", description=__doc__)
    for cls in (GridSettings, BudgetSettings):
        cli.add_settings(parser, cls)
    add_shared(parser, several=False)
    return parser


@dataclass
class Tuning:
    """One search: its commands, its candidates (the default first), its pool and its trials.

    Attributes:
        commands: of the setting under its draw.
        grid: of the candidates.
        score: of validation, by which is chosen.
    """

    commands: StageCommands
    grid: GridSettings
    score: str

    def __post_init__(self) -> None:
        self.folder, self.recipe = self.commands.folder, self.commands.recipe
        self.strategy, self.multiplier = self.grid.strategy[0], max(self.grid.multipliers)
        self.candidates = self.grid.candidates(self.commands.subset_seed)
        self.default, self.pair = self.candidates[0], Pair(self.folder, self.pool_steps())

    def pool_steps(self) -> dict[str, Step]:
        """Stage 1 and one subset per strategy and strength, by name."""
        subsets, steps = {candidate.subset: candidate for candidate in self.candidates}.values(), {}
        for candidate in sorted(subsets, key=lambda c: (c.strategy != "", c.strategy, c.strength or 0)):
            flags = {"aug_strength": candidate.strength, "syn_dataset_multiplier": self.multiplier}
            sample = self.commands.sample(candidate.strategy or self.strategy, candidate.subset, **flags)
            steps |= {step.name: step for step in self.commands.after_finetuning(sample)}
        return steps

    def subset_folder(self, candidate: Candidate) -> Path:
        """The folder of the finished subset of a candidate."""
        return next((self.folder / "aug_samples" / candidate.subset).glob("*/*/meta.csv")).parent

    def images(self, candidate: Candidate) -> int | None:
        """Number of images of its subset that a candidate uses, the multiplier's share; None for all. Raises UserError: the
        record of the subset is damaged."""
        if candidate.multiplier == self.multiplier:
            return None
        folder = self.subset_folder(candidate)
        if (count := subset_record(folder).get("images")) is None:
            raise UserError(f"{folder / CONFIG_FILE} is damaged: remove that folder and run the same command again")
        return max(1, round(count * candidate.multiplier / self.multiplier))

    def classify_flags(self, candidate: Candidate, images: int | None) -> dict:
        """Flags of stage 3 in which candidates differ; ``images``: see :meth:`images`."""
        flags = {"gamma": candidate.gamma, "synthetic_prob": candidate.probability, "syndata_max": images}
        return flags | ({"soft_labels": candidate.labels} if candidate.labels != "strength" else {})

    def ensure(self, name: str, held: int | None) -> None:
        """Runs a step, and before it what it needs, unless done."""
        if not self.pair.done(name):
            for need in self.pair.steps[name].needs:
                self.ensure(need, held)
            self.pair.run(name, held)

    def run_folder(self, candidate: Candidate, seed: int) -> Path:
        """The folder of a candidate's run under a seed."""
        return self.folder / "classify" / f"{candidate.name}-seed{seed}"

    def results(self, candidate: Candidate, seed: int) -> dict:
        """The results of a finished run."""
        return files.read_json(self.run_folder(candidate, seed) / "results.json")

    def trial_step(self, candidate: Candidate, seed: int, images: int | None) -> Step:
        """The run of a candidate under a seed; ``images``: see :meth:`images`."""
        flags = self.classify_flags(candidate, images)
        return self.commands.classify(f"{candidate.name}-seed{seed}", seed, candidate.subset, **flags)

    def teachers(self) -> int:
        """Number of classifiers that are trained for labels by teachers."""
        if len({candidate.labels for candidate in self.candidates}) == 1:  # those by strength
            return 0
        arguments = self.trial_step(self.default, 0, None).arguments[1:]
        return classify.read_config(classify.build_parser("").parse_args(arguments)).synthetic.teacher_folds

    def trial(self, candidate: Candidate, seed: int, held: int | None) -> float:
        """Runs a candidate under a seed, unless done; returns its validation score. Raises UserError: the data set has no
        validation images, or not this score."""
        step = self.trial_step(candidate, seed, self.images(candidate))
        self.pair.steps[step.name] = step
        self.ensure(step.name, held)
        val = self.results(candidate, seed)["val"] or {}
        if self.score not in val:
            raise UserError(
                f"{self.recipe.shared['dataset']} has no validation {self.score}: give --val_fraction or another --select_by"
            )
        return val[self.score]

    def spent(self) -> float:
        """Seconds of all recorded steps."""
        return sum(entry["seconds"] for entry in self.pair.records.values())

    def differences(self, tried: Mapping[Candidate, Collection[int]]) -> dict[Candidate, Difference]:
        """Difference of each candidate to the default on validation, with intervals for other seeds and other images.

        Args:
            tried: candidate -> the seeds it ran on; all for the default.

        Raises:
            UserError: a run left no predictions.
        """
        parts, first = {}, None
        for candidate, seeds in tried.items():
            parts[candidate] = {}
            for seed in seeds:
                predictions = read_predictions(self.run_folder(candidate, seed))
                first = first or predictions
                if predictions.files != first.files:
                    raise UserError(
                        f"{self.folder}: its runs saw different validation images; give another --output_dir"
                    )
                parts[candidate][seed] = predictions.shares(self.score)
        strata = first.strata(self.score)
        default = parts[self.default]
        return {candidate: crossed_difference(by_seed, default, strata) for candidate, by_seed in parts.items()}

    def test_scores(self, candidates: Collection[Candidate], seeds: Mapping) -> dict[Candidate, list[dict]]:
        """The test scores of some candidates' runs; empty where a run has none."""
        scores = {c: [self.results(c, seed)["test"] for seed in seeds[c]] for c in candidates}
        return scores if all(test for tests in scores.values() for test in tests) else {}

    def use_command(self, chosen: Candidate, key: str, config_dir: Path) -> str:
        """The ``train_cls.py`` command that uses the chosen settings."""
        flags = {
            "config_dir": None if config_dir == registry.CONFIG_DIR else config_dir,
            **self.recipe.classify,
            "syndata_key": key,
            **self.classify_flags(chosen, self.images(chosen)),
            "gpu": self.commands.gpu,
        }
        return f"python {shlex.join(self.commands.command(3, flags))}"


def trials_within(tuning: Tuning, budget: BudgetSettings, seconds: float) -> int:
    """The number of classifier runs, fixed at the first start, so that a restart resumes the same search.

    Args:
        tuning: its pool and its first trial are done.
        seconds: of one classifier run.

    Raises:
        UserError: the time does not even allow the smallest search.
    """
    asked = {"trials": budget.trials, "budget_hours": budget.budget_hours}
    plan = files.read_json(tuning.folder / PLAN_FILE)
    if plan and plan["asked"] == asked and plan["trials"] >= budget.smallest:  # of fewer seeds, it may be too small
        return plan["trials"]
    default, teachers = max(DEFAULT_TRIALS, budget.smallest), tuning.teachers()
    trials = budget.trials or (default if budget.budget_hours is None else sys.maxsize)
    if budget.budget_hours is not None:
        spent, needed = tuning.spent() + teachers * seconds, budget.smallest
        done = sum(entry["done"] for entry in tuning.pair.records.values() if entry["stage"] == 3)
        trials = min(trials, done + max(0, int((budget.budget_hours * 3600 - spent) / seconds + 1e-6)))
        if trials < needed:
            spent_text = f"{duration(spent)} are spent{' or needed by teachers' if teachers else ''}"
            enough = math.ceil((spent + (needed - done) * seconds) / 36) / 100  # hours, rounded up
            raise UserError(
                f"--budget_hours {budget.budget_hours:g}: {spent_text}, and the smallest search has {needed} "
                f"runs of {duration(seconds)}: give at least {enough:g}; what is done is kept"
            )
    grid = runs.plain(asdict(tuning.grid))
    files.write_json(tuning.folder / PLAN_FILE, {"asked": asked, "trials": trials, "grid": grid})
    return trials


def tuning_of(args: argparse.Namespace, folder: Path) -> Tuning:
    """The search of parsed arguments. Raises UserError: the folder holds a search among other values, or stage 2 would draw its
    own strengths."""
    if "strength_strategy" in cli.read_settings(ExtraArguments, args).flags(2):
        raise UserError("--stage2_args: --strength_strategy would replace each of --strengths; leave it out")
    grid = cli.read_settings(GridSettings, args).resumed(folder)
    commands = StageCommands(recipe_of(args), args.subset_seed, folder, cli.read_settings(Placement, args).gpu_ids)
    return Tuning(commands, grid, args.select_by or "top1")


def prepare(tuning: Tuning, config_dir: Path, dry_run: bool = False) -> list[str]:
    """Checks the stages, and records the search, its images and its base model; a dry run writes nothing. Returns what a run
    would download, a line each. Raises UserError: a stage refuses, an image is damaged, the folder holds another search, or
    there are no validation images."""
    record = {
        **tuning.recipe.record(),
        "strategy": tuning.strategy,
        "subset_seed": tuning.commands.subset_seed,
        "multiplier": tuning.multiplier,
    }
    claim = partial(runs.claim, tuning.folder, record, "--output_dir", absent=budget_defaults())
    claim(dry_run=True)
    missing = check_stages(tuning, config_dir, dry_run)
    for dry in (True,) if dry_run else (True, False):  # a refusal leaves no record that would refuse its correction
        claim(dry_run=dry)
        with checks.noting_downloads(missing):
            dataset = runner.claim_data(tuning.commands, config_dir, dry)
            if dataset.val is None:
                raise UserError(f"{dataset.name} has no validation images to choose by: give --val_fraction")
            runner.claim_base(tuning.commands, dataset, dry)
    if not dry_run:
        runner.prepare_config(tuning.folder, config_dir)
    return missing


def check_stages(tuning: Tuning, config_dir: Path, dry_run: bool) -> list[str]:
    """Checks the flags of the pool and of a trial with each kind of labels, and by dry runs the stages of which no step has
    finished. Returns what a run would download, a line each. Raises UserError: a stage refuses."""
    pool = [tuning.pair.steps[name] for name in tuning.pair.steps if not tuning.pair.done(name)]
    trials = [tuning.trial_step(candidate, 0, None) for candidate in {c.labels: c for c in tuning.candidates}.values()]
    checks.check_flags([*pool, *trials], config_dir)
    stages = {1, 2, 3} - {entry["stage"] for entry in tuning.pair.records.values() if entry["done"]}
    samples = partial(checks.sample_checks, names=tuning.grid.strategy)
    options = {"folder": tuning.folder, "config_dir": config_dir, "dry_run": dry_run}
    return checks.dry_run_stages(tuning.commands, stages, [*pool, *trials], samples, **options)


def search(tuning: Tuning, budget: BudgetSettings, held: int) -> report.SearchResult:
    """Makes the pool, runs the trials and chooses.

    Raises:
        UserError: a step failed, or the budget is too small.
        KeyboardInterrupt: interrupted.
    """
    seeds, candidates, default = list(dict.fromkeys(budget.seeds)), tuning.candidates, tuning.default
    for name in list(tuning.pair.steps):
        tuning.ensure(name, held)
    tuning.trial(default, seeds[0], held)
    seconds = tuning.pair.records[tuning.trial_step(default, seeds[0], None).name]["seconds"]
    first = halving.affordable(trials_within(tuning, budget, seconds), len(candidates), len(seeds))
    planned = sum(halving.rungs(first, len(seeds)))
    log.info("%d of %d candidates, %d classifier runs of about %s", first, len(candidates), planned, duration(seconds))
    best, scores = halving.search(candidates[:first], seeds, lambda *trial: tuning.trial(*trial, held))
    differences = tuning.differences(scores)
    ahead = (each for each in report.ranked(scores) if differences[each].clear and differences[each].mean > 0)
    chosen = next(ahead, default)
    return report.SearchResult(
        score=tuning.score,
        strategy=tuning.strategy,
        chosen=chosen,
        best=best,
        default=default,
        scores=scores,
        differences=differences,
        test=tuning.test_scores((default, chosen), scores),
        cost=f"{duration(tuning.spent())}, {len(tuning.pair.records)} runs",
    )


def run(tuning: Tuning, budget: BudgetSettings, config_dir: Path) -> None:
    """Searches, writes the report and prints how to use what was chosen. Raises UserError: see :func:`search`; or another
    process has the folder."""
    with runner.pair_lock(tuning.folder) as held:
        if held is None:
            raise UserError(
                f"{tuning.folder} is being worked on by another process: wait for it, or give another --output_dir"
            )
        prepare(tuning, config_dir)
        result = search(tuning, budget, held)
        chosen, best = result.chosen, result.best
        subset = tuning.subset_folder(chosen)
        section, path = subset.parent.name, registry.shown_path(subset)
        key = budget.register_key or f"{tuning.recipe.name}_tuned"
        command = tuning.use_command(chosen, key, config_dir)
        report.write_search(result, tuning.commands, command, {section: {key: path}})
    why = "" if chosen == best else f" ({report.why_not_best(result)})"
    print(f"chosen: {chosen.name}{why}; report: {registry.shown_path(tuning.folder / report.REPORT)}")
    if budget.register_key and registry.register(registry.SUBSETS, section, key, path, config_dir):
        print(f"registered as {section}/{key}")
    print(f"to use it:\n{command}")


def check_key(tuning: Tuning, key: str, config_dir: Path) -> None:
    """Refuses a key that cannot be registered, or has an entry that is no subset of this search, before the search."""
    registry.check_writable(registry.SUBSETS, key, config_dir)
    section = find_spec(tuning.recipe.shared["dataset"], config_dir).name
    known = key in registry.keys(section, registry.SUBSETS, config_dir)
    entries = registry.subsets(section, key, config_dir) if known else []
    if not all(registry.resolve_path(entry).is_relative_to(tuning.folder) for entry in entries):
        registry.check_key(registry.SUBSETS, section, key, tuning.folder, config_dir)


def main(argv: list[str] | None = None) -> int:
    """Parses, checks, runs what is missing, reports."""
    args = build_parser().parse_args(argv)
    budget, placement = cli.read_settings(BudgetSettings, args), cli.read_settings(Placement, args)
    folder = placement.folder("tune", args) / recipe_of(args).name
    tuning = tuning_of(args, folder)
    if budget.register_key:
        check_key(tuning, budget.register_key, args.config_dir)
    if args.dry_run:
        print(*tuning.pair.steps.values(), *(candidate.name for candidate in tuning.candidates), sep="\n")
        print(f"{len(tuning.candidates)} candidates, {len(tuning.pair.steps)} runs for the pool")
        with runner.interruptible(), no_downloads(True):
            missing = prepare(tuning, args.config_dir, dry_run=True)
        print(*missing, sep="\n", end="\n" if missing else "")
        return 0
    with runner.interruptible():
        run(tuning, budget, args.config_dir)
    return 0
