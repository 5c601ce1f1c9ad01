"""What a comparison's folder holds: which runs were asked for, which are there, and the report over them.

requests/*.yaml                 what was asked for, one file per distinct command
{setting}/recipe.yaml           the budget every run of the setting has
{setting}/seed{seed}/           ti_db, ti, aug_samples, classify, config (a registry), logs, steps.json
report.md results.csv report.png commands.sh
"""

from __future__ import annotations

import csv
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from semantic_aug import files, registry, runs
from semantic_aug.errors import UserError
from semantic_aug.evaluation.experiments.commands import METHODS
from semantic_aug.evaluation.experiments.runner import read_records

REQUESTS, RECIPE_FILE = "requests", "recipe.yaml"
REPORT, RESULTS, CHART, COMMANDS = "report.md", "results.csv", "report.png", "commands.sh"
SCORES = ("top1", "macro", "worst_group")
BASELINES = ("real-only", "cutmix")


@dataclass(frozen=True)
class Row:
    """One finished classifier.

    Attributes:
        setting: its name.
        method: row of the comparison.
        seed: of draw and training.
        scores: on test, or on validation where the data set has no test split.
        val: the same on validation; empty without such a split.
        steps: optimisation steps.
        seconds: stage -> seconds; those of stages 1 and 2 are shared with the pair's other methods.
    """

    setting: str
    method: str
    seed: int
    scores: Mapping[str, float]
    val: Mapping[str, float]
    steps: int
    seconds: Mapping[int, float]


@dataclass
class Comparison:
    """Everything found in a comparison's folder.

    Attributes:
        folder: of the comparison.
        settings: in the order they were asked for.
        rows: finished runs, in the order of settings, methods and seeds.
        missing: (setting, method, seed) asked for and not there.
        commands: of ``compare``, as given.
        recipes: setting -> its budget.
        records: (setting, seed) -> recorded steps.
    """

    folder: Path
    settings: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    missing: list[tuple[str, str, int]] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    recipes: dict[str, dict] = field(default_factory=dict)
    records: dict[tuple[str, int], dict] = field(default_factory=dict)

    def by_method(self, setting: str, score: str) -> dict[str, dict[int, float]]:
        """Method -> seed -> a score, of one setting, in the table's order."""
        out: dict[str, dict[int, float]] = {}
        for row in self.rows:
            if row.setting == setting and score in row.scores:
                out.setdefault(row.method, {})[row.seed] = row.scores[score]
        return out


def pair_folder(folder: Path, setting: str, seed: int) -> Path:
    """Where a pair's files lie."""
    return folder / setting / f"seed{seed}"


def request_command(words: Sequence[str]) -> str:
    """A ``compare`` command as a user would type it."""
    return f"python -m semantic_aug.evaluation compare {shlex.join(words)}"


def save_request(
    folder: Path, words: Sequence[str], settings: Sequence[str], seeds: Sequence[int], methods: Sequence[str]
):
    """Records what was asked for, so that the report knows what is missing; shards of one request write the same file."""
    request = {
        "command": request_command(words),
        "settings": list(settings),
        "seeds": list(seeds),
        "methods": list(methods),
    }
    text = runs.arguments_text(request)
    requests = sorted((folder / REQUESTS).glob("*.yaml"))
    if not any(file.read_text(encoding="utf-8") == text for file in requests):
        name = f"{len(requests) + 1:03d}-{files.sha256_text(text)[:8]}.yaml"
        files.write_text(folder / REQUESTS / name, text)


def collect(folder: Path) -> Comparison:
    """Reads a comparison's folder.

    Raises:
        UserError: it holds none.
    """
    requests = sorted((folder / REQUESTS).glob("*.yaml"))
    if not requests:
        raise UserError(f"{folder} holds no comparison (no {REQUESTS}/*.yaml): expected the --output_dir of compare")
    found, planned = Comparison(folder), {}
    for file in requests:
        request = yaml.safe_load(file.read_text(encoding="utf-8"))
        found.commands.append(request["command"])
        for setting in request["settings"]:
            if setting not in found.settings:
                found.settings.append(setting)
            for seed in request["seeds"]:
                for method in request["methods"]:
                    planned[setting, method, int(seed)] = None
    place = {name: i for i, name in enumerate(METHODS)}
    order = sorted(planned, key=lambda p: (found.settings.index(p[0]), place.get(p[1], len(place)), p[2]))
    for setting in found.settings:
        found.recipes[setting] = runs.load_arguments(folder / setting, RECIPE_FILE) or {}
    for setting, method, seed in order:
        pair = pair_folder(folder, setting, seed)
        records = found.records.setdefault((setting, seed), read_records(pair))
        results = read_json(pair / "classify" / method / "results.json")
        if results is None:
            found.missing.append((setting, method, seed))
            continue
        found.rows.append(
            Row(
                setting,
                method,
                seed,
                _judged(results),
                results["val"] or {},
                results["steps"],
                _seconds(records, method),
            )
        )
    return found


def read_json(path: Path) -> dict | None:
    """A JSON file's content, or None where there is no whole one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _judged(results: Mapping) -> dict[str, float]:
    """The scores a run is judged by: those on test, or on validation where the data set has no test split."""
    return {name: value for name, value in (results["test"] or results["val"] or {}).items() if name in SCORES}


def _seconds(records: Mapping[str, Mapping], method: str) -> dict[int, float]:
    """Stage -> seconds of what a method's classifier needed."""
    command = records.get(f"classify {method}", {})
    seconds = {3: command.get("seconds", 0.0)}
    for name, entry in records.items():
        strategy = METHODS[method].strategy if method in METHODS else None
        if strategy and name == f"sample {strategy}":
            seconds[2] = entry["seconds"]
            for kind in ("ti_db", "ti"):
                if f"--finetune_model_key {kind} " in f"{entry['command']} ":
                    seconds[1] = records.get(kind, {}).get("seconds", 0.0)
    return seconds


def write(folder: Path) -> Comparison:
    """Writes the report over what is there, whatever is missing; processes that share the folder take turns."""
    with files.locked(folder / ".report.lock"):
        found = collect(folder)
        _write_csv(found, folder / RESULTS)
        _write_commands(found, folder / COMMANDS)
        from semantic_aug.evaluation.experiments.report import markdown

        if found.rows:
            from semantic_aug.evaluation.experiments.charts import bars

            scores = [s for s in SCORES if any(s in row.scores for row in found.rows)]
            panels = {setting: {s: found.by_method(setting, s) for s in scores} for setting in found.settings}
            with files.atomic_path(folder / CHART) as temporary:
                bars({name: panel for name, panel in panels.items() if any(panel.values())}, temporary)
        files.write_text(folder / REPORT, markdown(found))
    return found


def _write_csv(found: Comparison, path: Path) -> None:
    scores = [s for s in SCORES if any(s in row.scores for row in found.rows)]
    with files.atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, lineterminator="\n")
        stages = [f"seconds_stage{n}" for n in (1, 2, 3)]
        writer.writerow(["setting", "method", "seed", *scores, *(f"val_{s}" for s in scores), "steps", *stages])
        for row in found.rows:
            cells = [part.get(s) for part in (row.scores, row.val) for s in scores]
            numbers = ["" if value is None else f"{value:.8g}" for value in cells]
            times = [f"{row.seconds[n]:.1f}" if n in row.seconds else "" for n in (1, 2, 3)]
            writer.writerow([row.setting, row.method, row.seed, *numbers, row.steps, *times])


def _write_commands(found: Comparison, path: Path) -> None:
    lines = ["# Every run of this comparison, each to be repeated by hand from the repository's root.", ""]
    for (setting, seed), records in found.records.items():
        lines += [f"# {setting}, seed {seed}", *(entry["command"] for entry in records.values()), ""]
    files.write_text(path, "\n".join(lines))


def claim_setting(folder: Path, name: str, record: Mapping) -> None:
    """Fixes a setting's budget, or finds that it has this one.

    Raises:
        UserError: the folder's runs of this setting have another budget.
    """
    runs.claim(registry.resolve_path(folder) / name, record, "--output_dir", file=RECIPE_FILE)
