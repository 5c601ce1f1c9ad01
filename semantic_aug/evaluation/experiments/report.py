"""Reports of experiments: tables as Markdown, page and CSV, charts, and the commands to repeat every run."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from semantic_aug import files, registry, runs
from semantic_aug.augmentations import strategies
from semantic_aug.evaluation import document
from semantic_aug.evaluation.document import Block, Cell, Report, Table, code, link
from semantic_aug.evaluation.experiments.commands import METHODS, StageCommands
from semantic_aug.evaluation.experiments.grid import Candidate
from semantic_aug.evaluation.experiments.halving import best_first
from semantic_aug.evaluation.experiments.results import Comparison, collect, pair_folder, requests_in
from semantic_aug.evaluation.experiments.runner import duration
from semantic_aug.evaluation.experiments.statistics import Difference, difference_text, mean_interval, paired_difference

REPORT, RESULTS, CHART, COMMANDS = "report.md", "results.csv", "report.png", "commands.sh"
BASELINES = ("real-only", "cutmix", "pseudo-label")
"""Methods that all others are compared with, where they were run."""
SHOWN_MISSING = 20
TITLES = {
    "top1": "top-1", "macro": "macro (mean over classes)", "worst_class": "worst class", "worst_group": "worst group"
}  # fmt: skip
BAR, DOT, REAL = "#5b8db8", "#1f2d3a", "#b0b7bd"


def spread_cell(values: Mapping[int, float]) -> Cell:
    """Mean ± standard deviation of accuracies by seed in percent; the detail gives each seed's and the mean's interval."""
    if not values:
        return Cell("")
    scores, lines = list(values.values()), [f"seed {seed}: {100 * value:.2f}" for seed, value in values.items()]
    text = f"{100 * statistics.fmean(scores):.2f}"
    if len(scores) > 1:
        interval = mean_interval(scores)
        lines.append(f"95 % interval of the mean: {100 * interval.low:.2f} to {100 * interval.high:.2f}")
        text += f" ± {100 * statistics.stdev(scores):.2f}"
    return Cell(text, "\n".join(lines))


def difference_cell(difference: Difference | None, first: Mapping[int, float], second: Mapping[int, float]) -> Cell:
    """A difference with its interval, and the number of common seeds where the first has more; the detail gives each one's."""
    lines = [f"seed {seed}: {100 * (first[seed] - second[seed]):+.2f}" for seed in first if seed in second]
    if difference is None:
        return Cell("")
    count = f" ({difference.count} seeds)" if 1 < difference.count < len(first) and not difference.flat else ""
    return Cell(difference_text(difference) + count, "\n".join(lines))


def draw_bars(panels: Mapping[str, Mapping[str, Mapping[str, Mapping[int, float]]]], path: str | PathLike) -> None:
    """Draws bars with spread and a dot for every seed: one row of panels per setting and one column per score.

    Args:
        panels: setting -> score -> method -> seed -> value in [0, 1]. Bars are means, whiskers standard deviations.
    """
    from matplotlib.figure import Figure

    scores = list(dict.fromkeys(score for panel in panels.values() for score in panel))
    most = max(len(methods) for panel in panels.values() for methods in panel.values())
    figure = Figure(figsize=(5.2 * len(scores), (0.9 + 0.34 * most) * len(panels)))
    axes = figure.subplots(len(panels), len(scores), squeeze=False)
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


# ------------------------------------------------------------------------------------------------------ comparisons


def write_comparison(folder: Path) -> Comparison:
    """Writes the report over all results, whatever is missing; processes that share the folder take turns."""
    requests_in(folder)  # before a lock file is in a folder that is none of ours
    with files.locked(folder / ".report.lock"):
        comparison = collect(folder)
        _write_csv(comparison, folder / RESULTS)
        lines = ["# Every run of this comparison, each to be repeated by hand from the repository's root.", ""]
        for (setting, seed), records in comparison.records.items():
            lines += [f"# {setting}, seed {seed}", *(entry["command"] for entry in records.values()), ""]
        files.write_text(folder / COMMANDS, "\n".join(lines))
        if comparison.score_names:
            panels = {
                f"{setting}, {split_title(split)}": {
                    score: comparison.by_method(setting, split, score) for score in comparison.score_names
                }
                for setting, split in comparison.parts
            }
            draw_bars({name: panel for name, panel in panels.items() if any(panel.values())}, folder / CHART)
        document.write(comparison_report(comparison, folder), folder / REPORT)
    return comparison


def split_title(split: str | None) -> str:
    """Name of the split of the scores, in tables and texts."""
    return runs.SPLIT_TITLES.get(split, "neither test nor validation")


def _write_csv(comparison: Comparison, path: Path) -> None:
    """Writes test scores by their names, validation scores after ``val_``, and the ``split`` that a run is judged on."""
    scores, stages = comparison.score_names, (1, 2, 3)
    tested = scores if any(row.split == "test" for row in comparison.rows) else []
    with files.csv_writer(path) as writer:
        times = [f"seconds_stage{n}" for n in stages]
        writer.writerow(["setting", "method", "seed", *tested, *(f"val_{s}" for s in scores), "steps", *times, "split"])
        for row in comparison.rows:
            test = row.scores if row.split == "test" else {}
            cells = [*(test.get(s) for s in tested), *(row.val.get(s) for s in scores)]
            numbers = ["" if value is None else f"{value:.8g}" for value in cells]
            times = [f"{row.seconds[n]:.1f}" if n in row.seconds else "" for n in stages]
            writer.writerow([row.setting, row.method, row.seed, *numbers, row.steps, *times, row.split or ""])


def comparison_report(comparison: Comparison, folder: Path) -> Report:
    """The report: scores, paired differences, times, budgets, commands and the folders of all runs."""
    dataset = next((recipe["shared.dataset"] for recipe in comparison.recipes.values() if recipe), "?")
    finished, missing = len(comparison.rows), comparison.missing
    blocks: list[Block] = [f"{finished} of {finished + len(missing)} classifiers are finished."]
    if missing:
        named = [f"{setting} {method} seed {seed}" for setting, method, seed in missing[:SHOWN_MISSING]]
        more = len(missing) - len(named)
        blocks.append(f"Missing: {', '.join(named)}{f', and {more} more' if more > 0 else ''}.")
    blocks.append(
        "Percent, mean ± standard deviation over seeds. Each seed draws its own training images and has its own stages 1 and "
        f"2; within a setting all methods have {_steps(comparison)} and, where they use any, as many synthetic images. "
        + _judgement(comparison)
    )
    users = [
        name for name in METHODS if METHODS[name].unlabelled and any(row.method == name for row in comparison.rows)
    ]
    if users:
        blocks.append(
            f"Unlabelled images are used by {', '.join(users)}; of the others at most the base model saw them."
            + (
                " Pseudo-labels are as many as reach their threshold."
                if any(METHODS[name].labeller for name in users)
                else ""
            )
        )
    if comparison.score_names:
        blocks.append(f"![scores by method]({CHART})")
    for setting in comparison.settings:
        parts = [split for name, split in comparison.parts if name == setting]
        blocks += [f"## {setting}", *([] if parts else ["No result yet."])]
        for split in parts:
            blocks += _score_tables(comparison, setting, split)
    pairs = {
        (name, str(seed)): (pair_folder(folder, name, seed), shared_flags(comparison.recipes.get(name, {}), seed))
        for name, seed in comparison.records
    }
    blocks += [*_time_section(comparison), *_repeat_sections(comparison)]
    return Report(f"Comparison on {dataset}", [*blocks, *run_section(["setting", "seed"], pairs, folder)])


def _steps(comparison: Comparison) -> str:
    """The steps of the methods of a pair in words; they differ where runs stop early, or epochs hold synthetic images too."""
    steps = {(row.setting, row.seed, row.steps) for row in comparison.rows}
    equal = len(steps) == len({(row.setting, row.seed) for row in comparison.rows})
    return "the same optimisation steps" if equal else "different optimisation steps (see the tables)"


def _judgement(comparison: Comparison) -> str:
    """Sentences that name the split of the scores."""
    splits = {split for _, split in comparison.parts}
    sentences = []
    if "test" in splits or not splits:
        sentences.append("Validation chooses the epoch, test is evaluated once.")
    if "val" in splits:
        which = "The others have" if "test" in splits else "There is"
        sentences.append(
            f"{which} no test split: scores are on the validation images, which chose the epoch as well, so expect less on "
            "new images."
        )
    if None in splits:
        sentences.append("Runs without test and validation images have no scores.")
    return " ".join(sentences)


def _score_tables(comparison: Comparison, setting: str, split: str | None) -> list[Block]:
    """Scores by method, and their differences to the baselines, on one split of a setting."""
    title, rows = split_title(split), [row for row in comparison.rows if (row.setting, row.split) == (setting, split)]
    tables = {score: comparison.by_method(setting, split, score) for score in comparison.score_names}
    scores, methods = [score for score in tables if tables[score]], list(dict.fromkeys(row.method for row in rows))
    lines = []
    for method in methods:
        of_method = [row for row in rows if row.method == method]
        cells = [spread_cell(tables[score].get(method, {})) for score in scores]
        if split == "test":
            cells.append(spread_cell({row.seed: row.val["top1"] for row in of_method if "top1" in row.val}))
        lines.append(
            [method, str(len(of_method)), *cells, ", ".join(map(str, sorted({row.steps for row in of_method})))]
        )
    columns = [*(f"{title} {name}" for name in scores), *(["validation top1"] if split == "test" else [])]
    blocks: list[Block] = [Table(["method", "seeds", *columns, "steps"], lines)]
    pairs = [(score, baseline) for score in scores for baseline in BASELINES if baseline in methods]
    if not pairs or len(methods) < 2:
        return blocks
    differences = []
    for method in methods:
        cells = []
        for score, baseline in pairs:
            first, second = tables[score].get(method, {}) if method != baseline else {}, tables[score].get(baseline, {})
            cells.append(difference_cell(paired_difference(first, second), first, second))
        if any(cell.text for cell in cells):
            differences.append([method, *cells])
    text = (
        "Paired differences over common seeds in points, with 95 % confidence intervals (Student's t) for other seeds on these "
        f"{title} images; bold: zero is outside."
    )
    columns = [f"{title} {score} - {baseline}" for score, baseline in pairs]
    return [*blocks, text, Table(["method", *columns], differences)]


def _time_section(comparison: Comparison) -> list[Block]:
    rows, total = [], 0.0
    for setting in comparison.settings:
        entries = [e for (name, _), records in comparison.records.items() if name == setting for e in records.values()]
        for stage, title in ((1, "1 fine-tune"), (2, "2 translate"), (3, "3 classify")):
            seconds = [entry["seconds"] for entry in entries if entry["stage"] == stage]
            if seconds:
                total += sum(seconds)
                mean = duration(statistics.fmean(seconds))
                rows.append([setting, title, str(len(seconds)), f"{sum(seconds) / 3600:.2f}", mean])
    table = Table(["setting", "stage", "runs", "hours in all", "per run"], rows, texts=2)
    return ["## Time", table, f"{total / 3600:.2f} hours in all; runs side by side count each."]


def _repeat_sections(comparison: Comparison) -> list[Block]:
    """The budget of each setting, the commands of ``compare``, and those of the first pair's runs."""
    blocks: list[Block] = ["## Budgets"]
    for setting, recipe in comparison.recipes.items():
        given = {name: value for name, value in recipe.items() if value not in (None, [])}
        blocks += [f"{setting}:", code(runs.arguments_text(given), "yaml")]
    blocks += ["## Commands", code("\n".join(comparison.commands))]
    for (setting, seed), records in comparison.records.items():
        if records:
            text = f"The runs of {setting}, seed {seed}; those of all others are in `{COMMANDS}`:"
            return [*blocks, text, code("\n".join(entry["command"] for entry in records.values()))]
    return blocks


def shared_flags(recipe: Mapping[str, Any], subset_seed: int) -> dict[str, Any]:
    """The flags that choose the training images of a pair, from the record of its budget."""
    flags = {name.removeprefix("shared."): value for name, value in recipe.items() if name.startswith("shared.")}
    return flags | {"subset_seed": subset_seed}


def run_section(
    columns: Sequence[str], pairs: Mapping[tuple[str, ...], tuple[Path, Mapping[str, Any]]], folder: Path
) -> list[Block]:
    """Links to the folders of all runs, and to the galleries of their subsets.

    Args:
        columns: headings of what names a pair.
        pairs: names of a pair -> its folder, and the flags that choose its training images.
    """
    rows, hint = [], []
    for names, (pair, flags) in pairs.items():
        finetuned = [file.parent for file in sorted(pair.glob("*/summary.json"))]
        images = [file.parent for file in sorted(pair.glob("aug_samples/*/*/*/meta.csv"))]
        classified = [file.parent for file in sorted(pair.glob("classify/*/results.json"))]
        links = [[link(path.name, path, folder) for path in paths] for paths in (finetuned, classified)]
        rows.append([*names, *map(", ".join, (links[0], document.subset_links(images, folder), links[1]))])
        without = [path for path in images if not document.gallery_of(path).is_file()]
        if without and not hint:
            hint = document.gallery_hint(flags | {"config_dir": registry.shown_path(pair / "config")}, without[0])
    if not any(any(row[len(columns) :]) for row in rows):
        return []
    table = Table([*columns, "1 fine-tune", "2 translate", "3 classify"], rows, texts=len(columns) + 3)
    return ["## Runs", table, *hint]


# --------------------------------------------------------------------------------------------------------- searches

Scores = Mapping[Candidate, Mapping[int, float]]


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The outcome of a search for settings.

    Attributes:
        score: of validation, by which was chosen.
        chosen: the best of those whose lead over ``default`` is clear, else ``default``.
        best: by the mean on validation, clear or not.
        default: the candidate all others are compared to.
        scores: candidate -> seed -> validation score.
        differences: candidate -> how much better than the default it is.
        test: candidate -> test scores of its runs, of the default and the chosen one; empty without a test split.
        cost: time and number of runs, as text.
        strategy: first of the search.
    """

    score: str
    strategy: str
    chosen: Candidate
    best: Candidate
    default: Candidate
    scores: Scores
    differences: Mapping[Candidate, Difference]
    test: Mapping[Candidate, Sequence[Mapping[str, float]]]
    cost: str


def write_search(result: SearchResult, commands: StageCommands, command: str, entry: Mapping[str, Mapping]) -> None:
    """Writes ``report.md``, ``report.html`` and ``report.png`` into the search's folder.

    Args:
        commands: of the search.
        command: that trains with the chosen settings.
        entry: of the registry of subsets, which it reads.
    """
    setting, folder = commands.recipe.name, commands.folder
    bars = {candidate.name: result.scores[candidate] for candidate in ranked(result.scores)}
    draw_bars({setting: {f"validation {result.score}": bars}}, folder / CHART)
    flags = shared_flags(commands.recipe.record(), commands.subset_seed)
    blocks = [
        *_candidate_section(result),
        *_test_section(result),
        "## To use it",
        f"In `{registry.SUBSETS}` (`--register_key` writes it):",
        code(registry.to_yaml(entry), "yaml"),
        code(command),
        f"The search took {result.cost}.",
        *run_section(["setting"], {(setting,): (folder, flags)}, folder),
    ]
    document.write(Report(f"Settings for {commands.recipe.shared['dataset']}, {setting}", blocks), folder / REPORT)


def ranked(scores: Scores) -> list[Candidate]:
    """Candidates by the number of seeds they were tried on, then by mean."""
    return sorted(best_first(list(scores), scores), key=lambda candidate: -len(scores[candidate]))


def why_not_best(result: SearchResult) -> str:
    """Why another candidate than the one with the best mean was chosen."""
    which = "the default" if result.chosen == result.default else "clearly ahead of the default"
    return f"{which}; {result.best.name} has a better mean, but its lead is within what chance does"


def _kinds(candidate: Candidate, result: SearchResult) -> dict[str, str]:
    """Strategy and labels of a candidate."""
    return {"strategy": candidate.strategy or result.strategy, "labels": candidate.labels}


def _candidate_section(result: SearchResult) -> list[Block]:
    chosen, default, scores = result.chosen, result.default, result.scores
    kinds_of = [_kinds(candidate, result) for candidate in scores]
    varying = [kind for kind in kinds_of[0] if len({kinds[kind] for kinds in kinds_of}) > 1]
    how = f"by the mean validation {result.score} over {len(scores[default])} seeds"
    if chosen != result.best:
        how = why_not_best(result)
    rows = []
    for candidate in ranked(scores):
        from_noise = strategies.find(candidate.strategy or result.strategy).start == "noise"
        strength = "1" if from_noise else "its own" if candidate.strength is None else f"{candidate.strength:g}"
        numbers = (candidate.gamma, candidate.probability, candidate.multiplier)
        kinds = [text for kind, text in _kinds(candidate, result).items() if kind in varying]
        score = spread_cell(scores[candidate])
        score = replace(score, text=score.text + (" (chosen)" if candidate == chosen else ""))
        difference = Cell("")
        if candidate != default:
            difference = difference_cell(result.differences[candidate], scores[candidate], scores[default])
        cells = [*kinds, strength, *(f"{number:g}" for number in numbers), str(len(scores[candidate]))]
        rows.append([*cells, score, difference])
    columns = [*varying, "strength", "gamma", "p", "multiplier", "seeds", f"validation {result.score}", "- default"]
    return [
        (
            f"Chosen: {chosen.name} ({', '.join(f'{kind} {text}' for kind, text in _kinds(chosen, result).items())}), {how}."
        ),
        f"![validation scores]({CHART})",
        (
            "Every candidate was tried on the first seed, the better third also on the next, and so on; the default "
            f"({default.name}) was never dropped. Percent; differences to it over common seeds in points, with 95 % "
            "confidence intervals for other seeds and other images. Of the candidates whose interval lies above zero, the best "
            "replaces the default: all seeds share the validation images, so a lead on them by chance persists under every "
            "seed. The best of many is also overestimated: expect less on new images."
        ),
        Table(columns, rows, texts=len(varying)),
    ]


def _test_section(result: SearchResult) -> list[Block]:
    """Test scores of the chosen and the default settings; they had no part in the choice."""
    if not result.test:
        return []
    rows = []
    for candidate, by_run in result.test.items():
        cells = [
            spread_cell(dict(zip(result.scores[candidate], (run[name] for run in by_run), strict=True)))
            for name in ("top1", "macro")
        ]
        rows.append([candidate.name + (" (default)" if candidate == result.default else ""), *cells])
    return ["## Test", "Evaluated after the choice.", Table(["settings", "top1", "macro"], rows)]
