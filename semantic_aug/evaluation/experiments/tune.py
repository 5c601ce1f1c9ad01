"""Which strength, gamma, probability and multiplier? Chosen on validation images, within a budget, from one sampled pool."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from semantic_aug import cli, console, files, registry, runs
from semantic_aug.augmentations import strategies
from semantic_aug.errors import Interrupted, UserError
from semantic_aug.evaluation.experiments import commands as recipes
from semantic_aug.evaluation.experiments import halving, predictions
from semantic_aug.evaluation.experiments import results as comparison
from semantic_aug.evaluation.experiments import settings as flags
from semantic_aug.evaluation.experiments.commands import Devices, Recipe
from semantic_aug.evaluation.experiments.halving import Candidate
from semantic_aug.evaluation.experiments.runner import (
    Pair,
    claim_data,
    duration,
    pair_lock,
    prepare_config,
    shown,
    terminated_as_interrupted,
)
from semantic_aug.evaluation.experiments.statistics import Difference, crossed_difference

log = logging.getLogger(__name__)

DEFAULT = {"strength": 0.7, "gamma": 0.5, "probability": 0.3}
"""The authors' recommendation for few shots; always a candidate, at the largest multiplier."""

PLAN_FILE = "plan.json"


def build_parser() -> cli.Parser:
    """All flags of ``tune``."""
    parser = cli.Parser(prog="python -m semantic_aug.evaluation tune", description=__doc__)
    grid = parser.add_argument_group("what to choose among")
    share = cli.number(0, 1, open_low=True)
    for name, kind, values, letter, always in (
        ("strengths", share, [0.5, 0.7, 0.9], "S", DEFAULT["strength"]),
        ("gammas", cli.number(0, open_low=True), [0.3, 0.5, 0.8], "G", DEFAULT["gamma"]),
        ("probs", share, [0.1, 0.3, 0.5], "P", DEFAULT["probability"]),
    ):
        text = f"{always:g} is always among them (default: {' '.join(map(str, values))})"
        grid.add_argument(f"--{name}", nargs="+", type=kind, default=values, metavar=letter, help=text)
    grid.add_argument(
        "--multipliers",
        nargs="+",
        type=cli.number(0, 1e6, open_low=True),
        default=[2.0, 5.0],
        metavar="M",
        help="synthetic images per training image; the pool has the largest, smaller ones are parts of it (default: 2 5)",
    )
    grid.add_argument(
        "--strategy",
        default="diff-mix",
        choices=[row.name for row in strategies.STRATEGIES.values() if row.start == "image" and not row.strengths],
        metavar="STRATEGY",
        help="of the synthetic images",
    )
    budget = parser.add_argument_group("budget")
    budget.add_argument(
        "--trials",
        type=cli.whole(1),
        default=None,
        metavar="N",
        help="most classifier runs (default: 40, or what --budget_hours allows)",
    )
    budget.add_argument(
        "--budget_hours",
        type=cli.number(0, open_low=True),
        default=None,
        metavar="H",
        help="hours for everything, stages 1 and 2 included; fixed once the first classifier has been timed",
    )
    budget.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=[2020, 2021, 2022],
        metavar="N",
        help="of the classifier runs, 2 or more; finalists run on all (default: 2020 2021 2022)",
    )
    flags.add_settings(parser, several=False)
    parser.add_argument(
        "--subset_seed", type=int, default=0, metavar="N", help="seed of the few-shot or long-tail draw"
    )
    flags.add_budget(parser, several=False)
    flags.add_where(parser, "outputs/tune/{dataset}")
    parser.add_argument(
        "--register_key",
        default=None,
        metavar="KEY",
        help="write the chosen subset into synthetic_datasets.yaml under this key",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="print the candidates and the commands of the pool, and stop"
    )
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuses what cannot work.

    Raises:
        UserError: one line.
    """
    flags.check_passed_on(args)
    if len(set(args.seeds)) < 2:
        raise UserError(f"--seeds {args.seeds[0]}: expected two or more; one run says too little to choose by")
    needed = smallest(args)
    if args.trials is not None and args.trials < needed:
        raise UserError(f"--trials {args.trials}: the smallest search has {needed} runs; give more, or fewer --seeds")


def smallest(args: argparse.Namespace) -> int:
    """Classifier runs of the smallest search: two candidates on every seed."""
    return halving.FINALISTS * len(set(args.seeds))


@dataclass
class Tuning:
    """One search: its folder, its pool and its trials.

    Attributes:
        folder: of the search.
        recipe: budget of every run.
        strategy: of the synthetic images.
        subset_seed: of the few-shot or long-tail draw.
        most: the pool's multiplier.
        score: of validation, by which is chosen.
        devices: where the stages run.
    """

    folder: Path
    recipe: Recipe
    strategy: str
    subset_seed: int
    most: float
    score: str
    devices: Devices

    def __post_init__(self) -> None:
        self.shared = recipes.shared_flags(self.recipe, self.subset_seed, self.folder)
        self.pair = Pair(self.folder, {})

    def add_pool(self, strengths: list[float]) -> None:
        """Plans stage 1 and one subset per strength."""
        environment = self.devices.environment(os.environ.get("CUDA_VISIBLE_DEVICES"))
        for strength in strengths:
            sample = recipes.sample_step(
                self.recipe, self.subset_seed, self.shared, self.strategy, self.folder, self.devices, f"s{strength:g}",
                aug_strength=strength, syn_dataset_multiplier=self.most,
            )  # fmt: skip
            for kind in sample.needs:
                step = recipes.finetune_step(self.recipe, self.subset_seed, self.shared, kind, self.folder, environment)
                self.pair.steps.setdefault(kind, step)
            self.pair.steps[sample.name] = sample

    def subset_folder(self, strength: float) -> Path:
        """Where the subset of a strength lies, once it is made."""
        return next((self.folder / "aug_samples" / f"s{strength:g}").glob("*/*/meta.csv")).parent

    def images(self, one: Candidate) -> int | None:
        """How many images of its subset a candidate uses, None for all: the multiplier's share."""
        if one.multiplier == self.most:
            return None
        made = runs.load_arguments(self.subset_folder(one.strength), "config.yaml")["images"]
        return max(1, round(made * one.multiplier / self.most))

    def classify_flags(self, one: Candidate) -> dict:
        """What a candidate gives to stage 3."""
        return {"gamma": one.gamma, "synthetic_prob": one.probability, "syndata_max": self.images(one)}

    def add_trial(self, one: Candidate, seed: int) -> str:
        """Plans one classifier run; returns its step's name."""
        step = recipes.classify_step(
            self.recipe, seed, self.shared, f"{one.name}-seed{seed}", self.folder, self.devices, f"s{one.strength:g}",
            **self.classify_flags(one),
        )  # fmt: skip
        self.pair.steps[step.name] = step
        return step.name

    def ensure(self, name: str, held: int | None) -> None:
        """Runs a step, and before it what it needs, unless done."""
        if self.pair.done(name):
            return
        for need in self.pair.steps[name].needs:
            self.ensure(need, held)
        self.pair.run(name, held)

    def run_folder(self, one: Candidate, seed: int) -> Path:
        """Where a candidate's run under a seed lies."""
        return self.folder / "classify" / f"{one.name}-seed{seed}"

    def results(self, one: Candidate, seed: int) -> dict:
        """What a finished run found."""
        return json.loads((self.run_folder(one, seed) / "results.json").read_text(encoding="utf-8"))

    def differences(
        self, tried: Mapping[Candidate, Collection[int]], default: Candidate
    ) -> dict[Candidate, Difference]:
        """How much better each candidate is than the default on validation, for other seeds and other images too.

        Args:
            tried: candidate -> the seeds it ran on.
            default: one of them, tried on every seed.

        Raises:
            UserError: a run left no predictions.
        """
        shares, known = {}, None
        for one, seeds in tried.items():
            shares[one] = {}
            for seed in seeds:
                run = predictions.read(self.run_folder(one, seed))
                known = known or run
                if run.files != known.files:
                    raise UserError(
                        f"{self.folder}: its runs saw different validation images; give another --output_dir"
                    )
                shares[one][seed] = run.shares(self.score)
        strata = known.strata(self.score)
        return {one: crossed_difference(by_seed, shares[default], strata) for one, by_seed in shares.items()}

    def trial(self, one: Candidate, seed: int, held: int | None) -> float:
        """Runs a candidate under a seed, unless done; returns its validation score.

        Raises:
            UserError: the data set has no validation images, or not this score.
        """
        self.ensure(self.add_trial(one, seed), held)
        val = self.results(one, seed)["val"] or {}
        if self.score not in val:
            raise UserError(
                f"{self.recipe.shared['dataset']} has no validation {self.score}: give --val_fraction or another --select_by"
            )
        return val[self.score]

    def spent(self) -> float:
        """Seconds of everything run so far, that is recorded."""
        return sum(entry["seconds"] for entry in self.pair.records.values())


def trials_within(tuning: Tuning, args: argparse.Namespace, seconds: float) -> int:
    """The number of classifier runs, fixed at the first start (so that a restart goes on with the same search).

    Args:
        tuning: its pool and its first trial are done.
        args: of the parser.
        seconds: of one classifier run.

    Raises:
        UserError: the time does not even allow the smallest search.
    """
    asked = {"trials": args.trials, "budget_hours": args.budget_hours}
    known = comparison.read_json(tuning.folder / PLAN_FILE)
    if known and known["asked"] == asked:
        return known["trials"]
    trials = args.trials or (40 if args.budget_hours is None else sys.maxsize)
    if args.budget_hours is not None:
        spent, needed = tuning.spent(), smallest(args)
        done = sum(entry["done"] for entry in tuning.pair.records.values() if entry["stage"] == 3)
        trials = min(trials, done + max(0, int((args.budget_hours * 3600 - spent) / seconds)))
        if trials < needed:
            enough = math.ceil((spent + (needed - done) * seconds) / 36) / 100  # hours, rounded up
            raise UserError(
                f"--budget_hours {args.budget_hours:g}: {duration(spent)} are spent, and the smallest search has {needed} "
                f"runs of {duration(seconds)}: give at least {enough:g}; what is done is kept"
            )
    files.write_json(tuning.folder / PLAN_FILE, {"asked": asked, "trials": trials})
    return trials


def tuning_of(args: argparse.Namespace, folder: Path) -> tuple[Tuning, list[Candidate]]:
    """The search of parsed arguments, and its candidates, the default first."""
    most = max(args.multipliers)
    default = Candidate(**DEFAULT, multiplier=most)
    classify = {"nepoch": args.nepoch, "eval_every": args.eval_every}
    recipe = flags.make_recipe(args, args.examples_per_class, args.max_train_steps, {}, classify, {})
    devices = flags.devices_of(args)
    tuning = Tuning(folder, recipe, args.strategy, args.subset_seed, most, args.select_by or "top1", devices)
    values = [[*args.strengths], [*args.gammas], [*args.probs], [*args.multipliers]]
    for some, name in zip(values, ("strength", "gamma", "probability"), strict=False):
        some.append(DEFAULT[name])
    found = halving.candidates(*(list(dict.fromkeys(some)) for some in values), default, args.subset_seed)
    tuning.add_pool(sorted({one.strength for one in found}))
    return tuning, found


def run(tuning: Tuning, found: list[Candidate], args: argparse.Namespace) -> None:
    """Makes the pool, searches, and writes the report.

    Raises:
        UserError: a step failed, or the budget is too small.
        KeyboardInterrupt: interrupted.
    """
    seeds = list(dict.fromkeys(args.seeds))
    with pair_lock(tuning.folder) as held:
        if held is None:
            raise UserError(
                f"{tuning.folder} is being worked on by another process: wait for it, or give another --output_dir"
            )
        record = {
            **tuning.recipe.record(),
            "strategy": tuning.strategy,
            "subset_seed": tuning.subset_seed,
            "multiplier": tuning.most,
        }
        runs.claim(tuning.folder, record, "--output_dir")
        claim_data(tuning.folder, tuning.recipe, tuning.subset_seed, args.config_dir, (1, 2, 3))
        prepare_config(tuning.folder, args.config_dir)
        for name in list(tuning.pair.steps):
            tuning.ensure(name, held)
        tuning.trial(found[0], seeds[0], held)
        seconds = tuning.pair.records[f"classify {found[0].name}-seed{seeds[0]}"]["seconds"]
        trials = trials_within(tuning, args, seconds)
        first = halving.affordable(trials, len(found), len(seeds))
        planned = sum(halving.rungs(first, len(seeds)))
        log.info("%d of %d candidates, %d classifier runs of about %s", first, len(found), planned, duration(seconds))
        best, scores = halving.search(found[:first], seeds, lambda one, seed: tuning.trial(one, seed, held))
        differences = tuning.differences(scores, found[0])
        chosen = best if differences[best].low > 0 else found[0]
        from semantic_aug.evaluation.experiments.tune_report import Choice, write

        subset = tuning.subset_folder(chosen.strength)
        place = registry.shown_path(subset)
        key = args.register_key or f"{tuning.recipe.name}_tuned"
        words = classify_words(tuning, chosen, key, args)
        choice = Choice(chosen, best, found[0], scores, differences)
        write(tuning, choice, words, {subset.parent.name: {key: place}})
    why = "" if chosen == best else f" (the default; {best.name} is ahead of it, but within what chance does)"
    print(f"chosen: {chosen.name}{why}; report: {registry.shown_path(tuning.folder / 'report.md')}")
    if args.register_key and registry.register(registry.SUBSETS, subset.parent.name, key, place, args.config_dir):
        print(f"registered as {subset.parent.name}/{key}")
    print(f"to use it:\n{words}")


def classify_words(tuning: Tuning, chosen: Candidate, key: str, args: argparse.Namespace) -> str:
    """The ``train_cls.py`` command that uses the chosen settings."""
    shared = {**tuning.shared, "config_dir": None if args.config_dir == registry.CONFIG_DIR else args.config_dir}
    own = {
        "syndata_key": key,
        **tuning.classify_flags(chosen),
        "gpu": tuning.devices.ids[0] if tuning.devices.ids else None,
    }
    words = recipes.command(3, shared, tuning.recipe.classify, own, extra=tuning.recipe.extra.get(3, ()))
    return shown(recipes.Step("use", 3, words, (), "", {}))


def main(argv: list[str] | None = None) -> int:
    """Parses, checks, runs what is missing, reports."""
    args = build_parser().parse_args(flags.joined_words(sys.argv[1:] if argv is None else argv))
    check(args)
    if args.register_key:
        registry.check_writable(registry.SUBSETS, args.register_key, args.config_dir)
    console.set_up_logging()
    name = recipes.setting_name(args.examples_per_class, args.task, args.imbalance_factor)
    folder = registry.resolve_path(args.output_dir or flags.default_folder(args, "tune")) / name
    tuning, found = tuning_of(args, folder)
    if args.dry_run:
        print("\n".join([*(shown(step) for step in tuning.pair.steps.values()), *(one.name for one in found)]))
        print(f"{len(found)} candidates, {len(tuning.pair.steps)} runs for the pool")
        return 0
    try:
        with terminated_as_interrupted():
            run(tuning, found, args)
    except KeyboardInterrupt:
        raise Interrupted("interrupted: what is done is kept; the same command goes on from there") from None
    return 0
