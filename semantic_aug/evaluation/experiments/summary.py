"""One Markdown table of any number of classification runs, the seeds of one request together in a row."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from semantic_aug import runs
from semantic_aug.classify.config import BY_CONTENT, MAY_CHANGE
from semantic_aug.classify.metrics import SCORE_NAMES, percent, scores_of, statistics_of
from semantic_aug.classify.trainer import RESULTS_FILE, results_of
from semantic_aug.console import markdown_table
from semantic_aug.errors import UserError
from semantic_aug.runs import MADE_FROM, SPLIT_TITLES, judged_split

SHOWN = tuple(name for name in SCORE_NAMES if name not in ("loss", "top5"))
_SEED = re.compile(r"[-_]?seed\d+$")


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        folder: it lies in.
        arguments: from its ``args.yaml``.
        results: from its ``results.json``.
    """

    folder: Path
    arguments: Mapping
    results: Mapping


def find_runs(folders: Iterable[Path]) -> list[Run]:
    """The finished runs at or below some folders, each once, in the order of their paths. Raises UserError: a folder does not
    exist or holds no finished run."""
    finished: dict[Path, Run] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder: expected the output folder of train_cls.py, or one above it")
        before = len(finished)
        for file in sorted(folder.rglob(RESULTS_FILE)):
            results, arguments = results_of(file.parent), runs.load_arguments(file.parent)
            if results and arguments and "seed" in arguments and "train_images" in results:  # not an evaluation's
                finished.setdefault(file.parent.resolve(), Run(file.parent, arguments, results))
        if len(finished) == before and not any(folder.resolve() in (f, *f.parents) for f in finished):
            raise UserError(f"{folder} holds no finished run of train_cls.py (no {RESULTS_FILE} beside an args.yaml)")
    return list(finished.values())


def grouped(runs: Sequence[Run]) -> list[list[Run]]:
    """Groups of runs that are judged on the same split and differ only in the seed and in settings without effect on results,
    in order."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        # the names of files tell runs apart whose record does not say what the files held
        ignored = {"seed", *MAY_CHANGE} - ({*BY_CONTENT} if MADE_FROM not in run.arguments else set())
        rest = {key: value for key, value in run.arguments.items() if key not in ignored}
        key = json.dumps([rest, judged_split(run.results)], sort_keys=True, default=str)
        groups.setdefault(key, []).append(run)
    return list(groups.values())


def name_of(group: Sequence[Run]) -> str:
    """Name of a row: the folder of its runs, without the seed."""
    folder = group[0].folder
    name = _SEED.sub("", folder.name)
    return name or folder.parent.name


def markdown(runs: Sequence[Run], scores: Sequence[str] = SHOWN) -> str:
    """The table: a row per request, mean and standard deviation over its seeds, in percent, on test or, as the column ``split``
    says, on validation where there is no test split.

    A run started twice under one seed counts once. Scores that no run has get no column.
    """
    rows = []
    for group in grouped(runs):
        by_seed = {run.arguments["seed"]: scores_of(run.results) for run in group}
        rows.append((group, statistics_of(by_seed, judged_split(group[0].results))))
    columns = [name for name in scores if any(name in summary["mean"] for _, summary in rows)]
    lines = []
    for group, summary in rows:
        results = group[0].results
        cells = [name_of(group), *(results[key] for key in ("dataset", "setting", "train_images", "model"))]
        cells.append(SPLIT_TITLES.get(summary["split"], "none"))
        spread = [
            percent(name, summary["mean"][name], summary["std"][name]) if name in summary["mean"] else ""
            for name in columns
        ]
        lines.append([*cells, len(summary["seeds"]), *spread])
    return markdown_table(["run", "data set", "setting", "images", "model", "split", "seeds", *columns], lines, texts=6)
