"""The report of a search for settings: candidates, finalists, the choice, and how to use it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from semantic_aug import files, registry
from semantic_aug.evaluation.experiments.halving import Candidate, best_first
from semantic_aug.evaluation.experiments.report import spread
from semantic_aug.evaluation.experiments.runner import duration
from semantic_aug.evaluation.experiments.statistics import Difference, difference_text

if TYPE_CHECKING:
    from semantic_aug.evaluation.experiments.tune import Tuning

REPORT, CHART = "report.md", "report.png"
Scores = Mapping[Candidate, Mapping[int, float]]


@dataclass(frozen=True)
class Choice:
    """What a search found and chose.

    Attributes:
        chosen: by it: ``best`` where its lead is clear, else ``default``.
        best: on validation.
        default: the candidate all others are compared to.
        scores: candidate -> seed -> validation score.
        differences: candidate -> how much better than the default it is.
    """

    chosen: Candidate
    best: Candidate
    default: Candidate
    scores: Scores
    differences: Mapping[Candidate, Difference]


def write(tuning: Tuning, choice: Choice, command: str, entry: Mapping[str, Mapping]) -> None:
    """Writes ``report.md`` and ``report.png`` into the search's folder.

    Args:
        tuning: the finished search.
        choice: its outcome.
        command: of stage 3 with the chosen settings.
        entry: for ``synthetic_datasets.yaml``.
    """
    from semantic_aug.evaluation.experiments.charts import bars

    bars_of = {one.name: choice.scores[one] for one in ranked(choice.scores)}
    panels = {tuning.recipe.name: {f"validation {tuning.score}": bars_of}}
    with files.atomic_path(tuning.folder / CHART) as temporary:
        bars(panels, temporary)
    files.write_text(tuning.folder / REPORT, "\n".join(lines_of(tuning, choice, command, entry)) + "\n")


def ranked(scores: Scores) -> list[Candidate]:
    """Candidates by the number of seeds they were tried on, then by mean."""
    return sorted(best_first(list(scores), scores), key=lambda one: -len(scores[one]))


def lines_of(tuning: Tuning, choice: Choice, command: str, entry: Mapping) -> list[str]:
    """The report's lines; see :func:`write`."""
    chosen, default, scores = choice.chosen, choice.default, choice.scores
    how = f"by the mean validation {tuning.score} over {len(scores[default])} seeds"
    if chosen != choice.best:
        how = f"which is the default: {choice.best.name} is ahead {how}, but not clearly so"
    lines = [
        f"# Settings for {tuning.recipe.shared['dataset']}, {tuning.recipe.name}",
        "",
        f"Chosen: strength {chosen.strength:g}, gamma {chosen.gamma:g}, probability {chosen.probability:g}, multiplier "
        f"{chosen.multiplier:g}, {how}.",
        "",
        f"![validation scores]({CHART})",
        "",
        "Every candidate was tried on the first seed, the better third also on the next, and so on; the default "
        f"({default.name}) was never dropped. Percent; differences to it over common seeds in points, with 95 % confidence "
        "intervals for other seeds and other images. Only a candidate whose interval lies above zero takes the default's "
        "place: all seeds share the validation images, and what is ahead on them by luck stays ahead whatever the seed. The "
        "best of many is flattered besides: expect less on new images.",
        "",
        f"| strength | gamma | p | multiplier | seeds | validation {tuning.score} | - default |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for one in ranked(scores):
        difference = "" if one == default else difference_text(choice.differences[one])
        mark = " (chosen)" if one == chosen else ""
        lines.append(
            f"| {one.strength:g} | {one.gamma:g} | {one.probability:g} | {one.multiplier:g} | {len(scores[one])} | "
            f"{spread(list(scores[one].values()))}{mark} | {difference} |"
        )
    return [*lines, *_test_lines(tuning, choice), *_use_lines(tuning, command, entry)]


def _test_lines(tuning: Tuning, choice: Choice) -> list[str]:
    """Test scores of the chosen and the default settings, which had no part in the choice."""
    shown = (choice.default, choice.chosen)
    found = {one: {seed: tuning.results(one, seed)["test"] for seed in choice.scores[one]} for one in shown}
    if not all(test for by_seed in found.values() for test in by_seed.values()):
        return []
    lines = ["", "## Test", "", "Looked at after the choice.", "", "| settings | top1 | macro |", "|---|---:|---:|"]
    for one, by_seed in found.items():
        cells = [spread([test[name] for test in by_seed.values()]) for name in ("top1", "macro")]
        lines.append(f"| {one.name}{' (default)' if one == choice.default else ''} | {' | '.join(cells)} |")
    return lines


def _use_lines(tuning: Tuning, command: str, entry: Mapping) -> list[str]:
    text = registry.to_yaml(entry).rstrip()
    return [
        "",
        "## To use it",
        "",
        f"In `{registry.SUBSETS}` (`--register_key` writes it):",
        "",
        "```yaml",
        text,
        "```",
        "",
        "```bash",
        command,
        "```",
        "",
        f"The search took {duration(tuning.spent())}, {len(tuning.pair.records)} runs.",
    ]
