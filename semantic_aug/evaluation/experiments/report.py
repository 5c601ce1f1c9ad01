"""Reports of experiments: tables as Markdown and CSV, charts, and the commands to repeat every run."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from semantic_aug import files, registry, runs
from semantic_aug.evaluation.experiments.halving import Candidate, best_first
from semantic_aug.evaluation.experiments.results import Comparison, collect
from semantic_aug.evaluation.experiments.runner import duration
from semantic_aug.evaluation.experiments.statistics import Difference, difference_text, paired_difference

REPORT, RESULTS, CHART, COMMANDS = "report.md", "results.csv", "report.png", "commands.sh"
BASELINES = ("real-only", "cutmix")
SHOWN_MISSING = 20
TITLES = {"top1": "top-1", "macro": "macro (mean over classes)", "worst_group": "worst group"}
BAR, DOT, REAL = "#5b8db8", "#1f2d3a", "#b0b7bd"


def spread(values: Sequence[float]) -> str:
    """Accuracies as mean ± standard deviation, in percent."""
    if not values:
        return ""
    mean = f"{100 * statistics.fmean(values):.2f}"
    return mean + (f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else "")


def draw_bars(panels: Mapping[str, Mapping[str, Mapping[str, Mapping[int, float]]]], path: str | PathLike) -> None:
    """Draws bars with spread and a dot for every seed: one row of panels per setting and one column per score.

    Args:
        panels: setting -> score -> method -> seed -> value in [0, 1]. Bars are means, whiskers standard deviations.
        path: of the PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    scores = list(dict.fromkeys(score for panel in panels.values() for score in panel))
    most = max(len(methods) for panel in panels.values() for methods in panel.values())
    size = (5.2 * len(scores), (0.9 + 0.34 * most) * len(panels))
    figure, axes = plt.subplots(len(panels), len(scores), figsize=size, squeeze=False)
    for row, (setting, panel) in zip(axes, panels.items(), strict=True):
        for axis, score in zip(row, scores, strict=True):
            methods = panel.get(score, {})
            names, values = list(methods), [[100 * v for v in seeds.values()] for seeds in methods.values()]
            whiskers = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
            colours = [REAL if name in ("real-only", "mixup", "cutmix") else BAR for name in names]
            axis.barh(names, [statistics.fmean(v) for v in values], xerr=whiskers, color=colours, ecolor=DOT, capsize=3)
            for position, dots in enumerate(values):
                axis.plot(dots, [position] * len(dots), ".", color=DOT, markersize=5)
                text = f"{statistics.fmean(dots):.1f}"
                axis.annotate(text, (1.01, position), xycoords=("axes fraction", "data"), va="center", fontsize=8)
            axis.invert_yaxis()
            axis.set_title(f"{setting}: {TITLES.get(score, score)}", fontsize=10)
            axis.set_xlabel("%")
            axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    with files.atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)


# ------------------------------------------------------------------------------------------------------ comparisons


def write_comparison(folder: Path) -> Comparison:
    """Writes the report over all results, whatever is missing; processes that share the folder take turns."""
    with files.locked(folder / ".report.lock"):
        comparison = collect(folder)
        _write_csv(comparison, folder / RESULTS)
        lines = ["# Every run of this comparison, each to be repeated by hand from the repository's root.", ""]
        for (setting, seed), records in comparison.records.items():
            lines += [f"# {setting}, seed {seed}", *(entry["command"] for entry in records.values()), ""]
        files.write_text(folder / COMMANDS, "\n".join(lines))
        if comparison.rows:
            panels = {
                setting: {score: comparison.by_method(setting, score) for score in comparison.score_names}
                for setting in comparison.settings
            }
            draw_bars({name: panel for name, panel in panels.items() if any(panel.values())}, folder / CHART)
        files.write_text(folder / REPORT, comparison_markdown(comparison))
    return comparison


def _write_csv(comparison: Comparison, path: Path) -> None:
    scores, stages = comparison.score_names, (1, 2, 3)
    with files.atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, lineterminator="\n")
        times = [f"seconds_stage{n}" for n in stages]
        writer.writerow(["setting", "method", "seed", *scores, *(f"val_{s}" for s in scores), "steps", *times])
        for row in comparison.rows:
            cells = [part.get(s) for part in (row.scores, row.val) for s in scores]
            numbers = ["" if value is None else f"{value:.8g}" for value in cells]
            times = [f"{row.seconds[n]:.1f}" if n in row.seconds else "" for n in stages]
            writer.writerow([row.setting, row.method, row.seed, *numbers, row.steps, *times])


def comparison_markdown(comparison: Comparison) -> str:
    """The report as Markdown: scores, paired differences, times, budgets and commands."""
    dataset = next((recipe["shared.dataset"] for recipe in comparison.recipes.values() if recipe), "?")
    finished, missing = len(comparison.rows), comparison.missing
    lines = [f"# Comparison on {dataset}", "", f"{finished} of {finished + len(missing)} classifiers are finished."]
    if missing:
        named = [f"{setting} {method} seed {seed}" for setting, method, seed in missing[:SHOWN_MISSING]]
        more = len(missing) - len(named)
        lines += ["", f"Missing: {', '.join(named)}{f', and {more} more' if more > 0 else ''}."]
    lines += [
        "",
        "Percent, mean ± standard deviation over seeds. Each seed draws its own training images and has its own stages 1 and "
        "2; within a setting all methods have the same optimisation steps and, where they use any, as many synthetic images. "
        "Validation chooses the epoch, test is evaluated once.",
        "",
    ]
    if comparison.rows:
        lines += [f"![scores by method]({CHART})", ""]
    for setting in comparison.settings:
        lines += _setting_section(comparison, setting)
    lines += [*_time_section(comparison), *_recipe_section(comparison), *_command_section(comparison)]
    return "\n".join(lines) + "\n"


def _setting_section(comparison: Comparison, setting: str) -> list[str]:
    rows = [row for row in comparison.rows if row.setting == setting]
    if not rows:
        return [f"## {setting}", "", "No result yet.", ""]
    scores = [name for name in comparison.score_names if any(name in row.scores for row in rows)]
    methods = list(dict.fromkeys(row.method for row in rows))
    lines = [f"## {setting}", "", f"| method | seeds | {' | '.join(scores)} | validation top1 | steps |"]
    lines.append("|---|---:|" + "---:|" * (len(scores) + 2))
    for method in methods:
        seeds = [row for row in rows if row.method == method]
        cells = [spread([row.scores[s] for row in seeds if s in row.scores]) for s in scores]
        val = spread([row.val["top1"] for row in seeds if "top1" in row.val])
        steps = sorted({row.steps for row in seeds})
        lines.append(f"| {method} | {len(seeds)} | {' | '.join(cells)} | {val} | {', '.join(map(str, steps))} |")
    columns = [(score, baseline) for score in scores for baseline in BASELINES if baseline in methods]
    if columns and len(methods) > 1:
        lines += ["", *_difference_table(comparison, setting, methods, columns)]
    return [*lines, ""]


def _difference_table(
    comparison: Comparison, setting: str, methods: Sequence[str], columns: Sequence[tuple[str, str]]
) -> list[str]:
    lines = [
        "Paired differences over common seeds in points, with 95 % confidence intervals (Student's t) for other seeds on these "
        "test images; bold: zero is outside.",
        "",
        f"| method | {' | '.join(f'{score} - {baseline}' for score, baseline in columns)} |",
        "|---|" + "---:|" * len(columns),
    ]
    tables = {score: comparison.by_method(setting, score) for score, _ in columns}
    for method in methods:
        cells = []
        for score, baseline in columns:
            scores = tables[score].get(method, {}) if method != baseline else {}
            cells.append(difference_text(paired_difference(scores, tables[score].get(baseline, {}))))
        if any(cells):
            lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def _time_section(comparison: Comparison) -> list[str]:
    lines = ["## Time", "", "| setting | stage | runs | hours in all | per run |", "|---|---|---:|---:|---:|"]
    total = 0.0
    for setting in comparison.settings:
        entries = [e for (name, _), records in comparison.records.items() if name == setting for e in records.values()]
        for stage, title in ((1, "1 fine-tune"), (2, "2 translate"), (3, "3 classify")):
            seconds = [entry["seconds"] for entry in entries if entry["stage"] == stage]
            if seconds:
                total += sum(seconds)
                mean = duration(statistics.fmean(seconds))
                lines.append(f"| {setting} | {title} | {len(seconds)} | {sum(seconds) / 3600:.2f} | {mean} |")
    return [*lines, "", f"{total / 3600:.2f} hours in all; runs side by side count each.", ""]


def _recipe_section(comparison: Comparison) -> list[str]:
    lines = ["## Budgets", ""]
    for setting, recipe in comparison.recipes.items():
        given = {name: value for name, value in recipe.items() if value not in (None, [])}
        lines += [f"{setting}:", "", "```yaml", runs.arguments_text(given).rstrip(), "```", ""]
    return lines


def _command_section(comparison: Comparison) -> list[str]:
    lines = ["## Commands", "", "```bash", *comparison.commands, "```", ""]
    first = next(((key, records) for key, records in comparison.records.items() if records), None)
    if first is None:
        return lines
    (setting, seed), records = first
    lines += [f"The runs of {setting}, seed {seed}; those of all others are in `{COMMANDS}`:", "", "```bash"]
    return [*lines, *(entry["command"] for entry in records.values()), "```"]


# --------------------------------------------------------------------------------------------------------- searches

Scores = Mapping[Candidate, Mapping[int, float]]


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The outcome of a search for settings.

    Attributes:
        dataset: name of the data set.
        setting: of the few-shot or long-tail setting.
        score: of validation, by which was chosen.
        chosen: ``best`` where its lead is clear, else ``default``.
        best: on validation.
        default: the candidate all others are compared to.
        scores: candidate -> seed -> validation score.
        differences: candidate -> how much better than the default it is.
        test: candidate -> test scores of its runs, of the default and the chosen one; empty without a test split.
        cost: time and number of runs, as text.
    """

    dataset: str
    setting: str
    score: str
    chosen: Candidate
    best: Candidate
    default: Candidate
    scores: Scores
    differences: Mapping[Candidate, Difference]
    test: Mapping[Candidate, Sequence[Mapping[str, float]]]
    cost: str


def write_search(result: SearchResult, folder: Path, command: str, entry: Mapping[str, Mapping]) -> None:
    """Writes ``report.md`` and ``report.png`` into the search's folder.

    Args:
        result: of the search.
        folder: of the search.
        command: of stage 3 with the chosen settings.
        entry: for ``synthetic_datasets.yaml``.
    """
    bars = {candidate.name: result.scores[candidate] for candidate in _ranked(result.scores)}
    draw_bars({result.setting: {f"validation {result.score}": bars}}, folder / CHART)
    lines = [*_candidate_section(result), *_test_section(result)]
    lines += ["", "## To use it", "", f"In `{registry.SUBSETS}` (`--register_key` writes it):", ""]
    lines += ["```yaml", registry.to_yaml(entry).rstrip(), "```", "", "```bash", command, "```", ""]
    lines.append(f"The search took {result.cost}.")
    files.write_text(folder / REPORT, "\n".join(lines) + "\n")


def _ranked(scores: Scores) -> list[Candidate]:
    """Candidates by the number of seeds they were tried on, then by mean."""
    return sorted(best_first(list(scores), scores), key=lambda candidate: -len(scores[candidate]))


def _candidate_section(result: SearchResult) -> list[str]:
    chosen, default, scores = result.chosen, result.default, result.scores
    how = f"by the mean validation {result.score} over {len(scores[default])} seeds"
    if chosen != result.best:
        how = f"which is the default: {result.best.name} is ahead {how}, but not clearly so"
    lines = [
        f"# Settings for {result.dataset}, {result.setting}",
        "",
        f"Chosen: strength {chosen.strength:g}, gamma {chosen.gamma:g}, probability {chosen.probability:g}, multiplier "
        f"{chosen.multiplier:g}, {how}.",
        "",
        f"![validation scores]({CHART})",
        "",
        "Every candidate was tried on the first seed, the better third also on the next, and so on; the default "
        f"({default.name}) was never dropped. Percent; differences to it over common seeds in points, with 95 % confidence "
        "intervals for other seeds and other images. Only a candidate whose interval lies above zero replaces the default: all "
        "seeds share the validation images, so a lead on them by chance persists under every seed. The best of many is also "
        "overestimated: expect less on new images.",
        "",
        f"| strength | gamma | p | multiplier | seeds | validation {result.score} | - default |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for candidate in _ranked(scores):
        difference = "" if candidate == default else difference_text(result.differences[candidate])
        numbers = (candidate.strength, candidate.gamma, candidate.probability, candidate.multiplier)
        cells = [*(f"{number:g}" for number in numbers), str(len(scores[candidate]))]
        cells.append(spread(list(scores[candidate].values())) + (" (chosen)" if candidate == chosen else ""))
        lines.append(f"| {' | '.join([*cells, difference])} |")
    return lines


def _test_section(result: SearchResult) -> list[str]:
    """Test scores of the chosen and the default settings, which had no part in the choice."""
    if not result.test:
        return []
    lines = ["", "## Test", "", "Evaluated after the choice.", "", "| settings | top1 | macro |", "|---|---:|---:|"]
    for candidate, scores in result.test.items():
        cells = [spread([run[name] for run in scores]) for name in ("top1", "macro")]
        default = " (default)" if candidate == result.default else ""
        lines.append(f"| {candidate.name}{default} | {' | '.join(cells)} |")
    return lines
