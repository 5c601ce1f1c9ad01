"""Results in an experiment's folder: finished classifiers, their predictions, and what a comparison still misses.

requests/*.yaml                 what was asked for, one file per distinct command
{setting}/recipe.yaml           the budget of every run of the setting
{setting}/seed{seed}/           ti_db, ti, aug_samples, classify, config (a registry), logs, steps.json
"""

import contextlib
import csv
import itertools
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np

from semantic_aug import files, registry, runs
from semantic_aug.errors import UserError
from semantic_aug.evaluation.experiments.commands import METHODS, Recipe
from semantic_aug.evaluation.experiments.runner import read_records
from semantic_aug.evaluation.experiments.settings import budget_defaults

REQUESTS, RECIPE_FILE = "requests", "recipe.yaml"
SCORES = ("top1", "macro", "worst_class", "worst_group")


@dataclass(frozen=True)
class Row:
    """One finished classifier.

    Attributes:
        method: row of the comparison.
        seed: of draw and training.
        scores: on ``split``.
        split: ``test``, or ``val`` where the data set has no test split; None where it has neither.
        val: the same on validation; empty without such a split.
        steps: optimisation steps.
        seconds: stage -> seconds; those of stages 1 and 2 are shared with the pair's other methods.
    """

    setting: str
    method: str
    seed: int
    scores: Mapping[str, float]
    split: str | None
    val: Mapping[str, float]
    steps: int
    seconds: Mapping[int, float]


@dataclass
class Comparison:
    """The content of a comparison's folder.

    Attributes:
        settings: in the order they were asked for.
        rows: finished runs, in the order of settings, methods and seeds.
        missing: (setting, method, seed) asked for and without a result.
        commands: of ``compare``, as given.
        recipes: setting -> its budget.
        records: (setting, seed) -> recorded steps.
    """

    settings: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    missing: list[tuple[str, str, int]] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    recipes: dict[str, dict] = field(default_factory=dict)
    records: dict[tuple[str, int], dict] = field(default_factory=dict)

    @property
    def score_names(self) -> list[str]:
        """The scores that some run has."""
        return [name for name in SCORES if any(name in row.scores for row in self.rows)]

    @property
    def parts(self) -> list[tuple[str, str | None]]:
        """The settings with a result, each with the split that its scores are on; twice where the data set got a test split
        between two of its seeds."""
        return [
            (setting, split)
            for setting in self.settings
            for split in (*runs.SPLIT_TITLES, None)
            if any((row.setting, row.split) == (setting, split) for row in self.rows)
        ]

    def by_method(self, setting: str, split: str | None, score: str) -> dict[str, dict[int, float]]:
        """Method -> seed -> a score on a split, of one setting, in the table's order."""
        out: dict[str, dict[int, float]] = {}
        for row in self.rows:
            if (row.setting, row.split) == (setting, split) and score in row.scores:
                out.setdefault(row.method, {})[row.seed] = row.scores[score]
        return out


def pair_folder(folder: Path, setting: str, seed: int) -> Path:
    """The folder of a pair."""
    return folder / setting / f"seed{seed}"


def claim_setting(
    folder: Path, recipe: Recipe, in_effect: Mapping[str, str] = MappingProxyType({}), dry_run: bool = False
) -> None:
    """Records a setting's budget, or compares it with the record; a dry run writes nothing. Raises UserError: the folder's runs
    of this setting have another budget.

    Args:
        in_effect: flags set by the stages' recipes, by stage; records of earlier versions lack them.
    """
    folder, absent = registry.resolve_path(folder) / recipe.name, {**budget_defaults(), **in_effect}
    record = {**recipe.record(), **in_effect}
    runs.claim(folder, record, "--output_dir", file=RECIPE_FILE, absent=absent, dry_run=dry_run)


def save_request(
    folder: Path, arguments: Sequence[str], settings: Iterable[str], seeds: Iterable[int], methods: Iterable[str]
) -> None:
    """Records what was asked for, so that the report knows what is missing; shards of one request write the same file."""
    command = f"python -m semantic_aug.evaluation compare {shlex.join(arguments)}"
    distinct = {"settings": settings, "seeds": seeds, "methods": methods}
    request = {"command": command, **{name: list(dict.fromkeys(values)) for name, values in distinct.items()}}
    text, existing = runs.arguments_text(request), sorted((folder / REQUESTS).glob("*.yaml"))
    if not any(file.read_text(encoding="utf-8") == text for file in existing):
        name = f"{len(existing) + 1:03d}-{files.sha256_text(text)[:8]}.yaml"
        files.write_text(folder / REQUESTS / name, text)


def requests_in(folder: Path) -> list[Path]:
    """The files of a comparison's requests. Raises UserError: the folder holds no comparison."""
    requests = sorted((folder / REQUESTS).glob("*.yaml"))
    if not requests:
        raise UserError(f"{folder} holds no comparison (no {REQUESTS}/*.yaml): expected the --output_dir of compare")
    return requests


def _read_request(file: Path) -> dict:
    request = runs.load_arguments(file.parent, file.name)
    if not request.keys() >= {"command", "settings", "seeds", "methods"}:
        raise UserError(f"{file} is damaged: remove it, and run the command that wrote it again")
    return request


def collect(folder: Path) -> Comparison:
    """Reads a comparison's folder. Raises UserError: it holds none."""
    requests = [_read_request(file) for file in requests_in(folder)]
    settings = list(dict.fromkeys(setting for request in requests for setting in request["settings"]))
    recipes = {setting: runs.load_arguments(folder / setting, RECIPE_FILE) or {} for setting in settings}
    comparison = Comparison(settings, commands=[request["command"] for request in requests], recipes=recipes)
    planned = dict.fromkeys(
        (setting, method, int(seed))
        for request in requests
        for setting, seed, method in itertools.product(request["settings"], request["seeds"], request["methods"])
    )
    rank = {name: position for position, name in enumerate(METHODS)}  # a method of an earlier version comes last
    for setting, method, seed in sorted(planned, key=lambda p: (settings.index(p[0]), rank.get(p[1], len(rank)), p[2])):
        pair = pair_folder(folder, setting, seed)
        records = comparison.records.setdefault((setting, seed), read_records(pair))
        results = files.read_json(pair / "classify" / method / "results.json")
        if results is None:
            comparison.missing.append((setting, method, seed))
            continue
        split, val = runs.judged_split(results), _scores(pair / "classify" / method, results, "val")
        scores = _scores(pair / "classify" / method, results, split)
        names = METHODS[method].step_names if method in METHODS else {3: f"classify {method}"}
        seconds = {3: 0.0} | {stage: records[name]["seconds"] for stage, name in names.items() if name in records}
        taken = {"steps": results["steps"], "seconds": seconds}
        comparison.rows.append(Row(setting, method, seed, scores=scores, split=split, val=val, **taken))
    return comparison


def _scores(run: Path, results: Mapping, split: str | None) -> dict[str, float]:
    """The scores :data:`SCORES` of a finished run on a split; empty without it."""
    scores = {name: value for name, value in (results.get(split) or {}).items() if name in SCORES}
    with contextlib.suppress(UserError):  # a run of an earlier version has no predictions
        scores |= {"worst_class": read_predictions(run, split).worst_class} if scores else {}
    return scores


@dataclass(frozen=True)
class Predictions:
    """One run on one split of N images.

    Attributes:
        files: N names, the same for every run on the split.
        right: bool ``(N,)``.
        classes: int64 ``(N,)`` true classes, numbered from 0.
        groups: int64 ``(N,)``, numbered likewise, or None where the data set has no groups.
    """

    files: tuple[str, ...]
    right: np.ndarray
    classes: np.ndarray
    groups: np.ndarray | None

    @property
    def worst_class(self) -> float:
        """The lowest accuracy of a class."""
        return float((np.bincount(self.classes, self.right) / np.bincount(self.classes)).min())

    def strata(self, score: str) -> np.ndarray:
        """``(N,)`` the part of the images that a score averages over by itself: for ``macro`` the class, for
        ``worst_group`` the group, for ``top1`` all."""
        return {"macro": self.classes, "worst_group": self.groups}.get(score, np.zeros(len(self.right), np.int64))

    def shares(self, score: str) -> np.ndarray:
        """``(N,)`` share of each image in a score; the sum is the score.

        Args:
            score: ``top1``, ``macro`` or ``worst_group``.
        """
        strata = self.strata(score)
        counts = np.bincount(strata)
        parts = self.right / counts[strata]
        if score == "macro":
            return parts / np.count_nonzero(counts)
        if score == "worst_group":
            return parts * (strata == np.bincount(strata, parts).argmin())
        return parts


def read_predictions(folder: Path, split: str = "val") -> Predictions:
    """The predictions of a finished run of ``train_cls.py``. Raises UserError: the run's folder holds none, or damaged ones."""
    path = folder / f"{split}_predictions.csv"
    try:
        with open(path, newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
    except FileNotFoundError:
        raise UserError(
            f"{folder} has no {path.name} (an earlier version made it): remove that folder and run the same command again"
        ) from None
    except UnicodeDecodeError:
        rows = []
    damaged = UserError(f"{path} is damaged: remove that folder and run the same command again")
    if not rows or not {"file", "class", "predicted"} <= rows[0].keys() or any(None in row.values() for row in rows):
        raise damaged
    names = tuple(row["file"] for row in rows)
    right = np.asarray([row["class"] == row["predicted"] for row in rows], bool)
    recorded = ((files.read_json(folder / "results.json") or {}).get(split) or {}).get("top1", right.mean())
    if abs(right.mean() - recorded) * len(rows) > 0.5:  # rows are missing, or the last one is cut off
        raise damaged
    groups = _numbered([row["group"] for row in rows]) if "group" in rows[0] else None
    return Predictions(names, right, _numbered([row["class"] for row in rows]), groups)


def _numbered(names: list[str]) -> np.ndarray:
    return np.unique(names, return_inverse=True)[1].astype(np.int64)
