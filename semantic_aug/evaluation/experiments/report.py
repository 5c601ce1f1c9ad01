"""The report of a comparison as Markdown: scores, paired differences, times, budgets and commands."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from semantic_aug import runs
from semantic_aug.evaluation.experiments.results import BASELINES, CHART, COMMANDS, SCORES, Comparison
from semantic_aug.evaluation.experiments.runner import duration
from semantic_aug.evaluation.experiments.statistics import difference_text, paired_difference

SHOWN_MISSING = 20


def markdown(found: Comparison) -> str:
    """The report as Markdown."""
    dataset = next((recipe["shared.dataset"] for recipe in found.recipes.values() if recipe), "?")
    planned = len(found.rows) + len(found.missing)
    lines = [f"# Comparison on {dataset}", "", f"{len(found.rows)} of {planned} classifiers are there."]
    if found.missing:
        named = [f"{setting} {method} seed {seed}" for setting, method, seed in found.missing[:SHOWN_MISSING]]
        more = len(found.missing) - len(named)
        lines += ["", f"Missing: {', '.join(named)}{f', and {more} more' if more > 0 else ''}."]
    lines += [
        "",
        "Percent, mean ± standard deviation over seeds. Each seed draws its own training images and has its own stages 1 and "
        "2; within a setting all methods have the same optimisation steps and, where they use any, as many synthetic images. "
        "Validation chooses the epoch, test is evaluated once.",
        "",
    ]
    if found.rows:
        lines += [f"![scores by method]({CHART})", ""]
    for setting in found.settings:
        lines += _setting_section(found, setting)
    return "\n".join([*lines, *_time_section(found), *_recipe_section(found), *_command_section(found)]) + "\n"


def _setting_section(found: Comparison, setting: str) -> list[str]:
    rows = [row for row in found.rows if row.setting == setting]
    if not rows:
        return [f"## {setting}", "", "Nothing is there yet.", ""]
    scores = [s for s in SCORES if any(s in row.scores for row in rows)]
    methods = list(dict.fromkeys(row.method for row in rows))
    lines = [f"## {setting}", "", f"| method | seeds | {' | '.join(scores)} | validation top1 | steps |"]
    lines.append("|---|---:|" + "---:|" * (len(scores) + 2))
    for method in methods:
        own = [row for row in rows if row.method == method]
        cells = [spread([row.scores[s] for row in own if s in row.scores]) for s in scores]
        val = spread([row.val["top1"] for row in own if "top1" in row.val])
        steps = sorted({row.steps for row in own})
        lines.append(f"| {method} | {len(own)} | {' | '.join(cells)} | {val} | {', '.join(map(str, steps))} |")
    present = [name for name in BASELINES if name in methods]
    if present and len(methods) > 1:
        lines += ["", *_differences(found, setting, scores, methods, present)]
    return [*lines, ""]


def _differences(found: Comparison, setting: str, scores, methods, baselines) -> list[str]:
    columns = [(score, baseline) for score in scores for baseline in baselines]
    lines = [
        "Paired differences over common seeds in points, with 95 % confidence intervals (Student's t) for other seeds on these "
        "test images; bold: zero is outside.",
        "",
        f"| method | {' | '.join(f'{score} - {baseline}' for score, baseline in columns)} |",
        "|---|" + "---:|" * len(columns),
    ]
    tables = {score: found.by_method(setting, score) for score in scores}
    for method in methods:
        cells = [
            difference_text(paired_difference(tables[score].get(method, {}), tables[score].get(baseline, {})))
            if method != baseline
            else ""
            for score, baseline in columns
        ]
        if any(cells):
            lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def spread(values: Sequence[float]) -> str:
    """Accuracies as mean ± standard deviation, in percent."""
    if not values:
        return ""
    mean = f"{100 * statistics.fmean(values):.2f}"
    return mean + (f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else "")


def _time_section(found: Comparison) -> list[str]:
    lines = ["## Time", "", "| setting | stage | runs | hours in all | per run |", "|---|---|---:|---:|---:|"]
    total = 0.0
    for setting in found.settings:
        for stage, title in ((1, "1 fine-tune"), (2, "2 translate"), (3, "3 classify")):
            own = [
                entry["seconds"]
                for (name, _), records in found.records.items()
                for entry in records.values()
                if name == setting and entry["stage"] == stage
            ]
            if own:
                total += sum(own)
                mean = duration(sum(own) / len(own))
                lines.append(f"| {setting} | {title} | {len(own)} | {sum(own) / 3600:.2f} | {mean} |")
    return [*lines, "", f"{total / 3600:.2f} hours in all; runs side by side count each.", ""]


def _recipe_section(found: Comparison) -> list[str]:
    lines = ["## Budgets", ""]
    for setting, recipe in found.recipes.items():
        given = {name: value for name, value in recipe.items() if value not in (None, [])}
        lines += [f"{setting}:", "", "```yaml", runs.arguments_text(given).rstrip(), "```", ""]
    return lines


def _command_section(found: Comparison) -> list[str]:
    lines = ["## Commands", "", "```bash", *found.commands, "```", ""]
    first = next(((key, records) for key, records in found.records.items() if records), None)
    if first is None:
        return lines
    (setting, seed), records = first
    lines += [f"The runs of {setting}, seed {seed}; those of all others are in `{COMMANDS}`:", "", "```bash"]
    return [*lines, *(entry["command"] for entry in records.values()), "```"]
