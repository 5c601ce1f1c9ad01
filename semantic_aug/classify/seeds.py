"""One request under several seeds: a run in a folder of its own each, then mean and spread."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from semantic_aug import files
from semantic_aug.classify import trainer
from semantic_aug.classify.config import ClassifyConfig
from semantic_aug.classify.metrics import SCORE_NAMES
from semantic_aug.datasets import LoadedDataset
from semantic_aug.datasets.synthetic import SyntheticImages

CSV_FILE = "seeds.csv"
JSON_FILE = "seeds.json"


def scores_of(results: Mapping) -> dict[str, float]:
    """The scores a run is judged by: those on test, or on validation where there is no test split."""
    return {name: value for name, value in (results["test"] or results["val"] or {}).items() if name in SCORE_NAMES}


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1); the latter is NaN for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def statistics_of(rows: Mapping[int, Mapping[str, float]]) -> dict:
    """Mean and standard deviation of every score that all seeds have.

    Args:
        rows: seed -> scores.

    Returns:
        ``seeds`` (as strings, JSON's keys), ``mean`` and ``std``; ``std`` is None for a single seed.
    """
    names = [name for name in SCORE_NAMES if all(name in row for row in rows.values())]
    spread = {name: mean_and_std([row[name] for row in rows.values()]) for name in names}
    return {
        "seeds": {str(seed): {name: row[name] for name in names} for seed, row in rows.items()},
        "mean": {name: mean for name, (mean, _) in spread.items()},
        "std": {name: None if math.isnan(std) else std for name, (_, std) in spread.items()},
    }


def write(found: Mapping, folder: Path) -> None:
    """Writes ``seeds.json``, and ``seeds.csv`` with one row per seed, then ``mean`` and ``std``."""
    files.write_json(folder / JSON_FILE, found)
    names = list(found["mean"])
    with (
        files.atomic_path(folder / CSV_FILE) as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as out,
    ):
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["seed", *names])
        for title, row in (*found["seeds"].items(), ("mean", found["mean"]), ("std", found["std"])):
            writer.writerow([title, *("" if row[name] is None else f"{row[name]:.8g}" for name in names)])


def percent(name: str, mean: float, std: float | None = None) -> str:
    """A score as tables show it: accuracies and calibration error in percent, the loss in nats."""
    factor = 1 if name == "loss" else 100
    return f"{factor * mean:.2f}" + (f" ± {factor * std:.2f}" if std is not None else "")


def table(found: Mapping) -> str:
    """The seeds as a Markdown table; accuracies and calibration error in percent."""
    names = list(found["mean"])
    lines = ["| seed | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for seed, row in found["seeds"].items():
        lines.append(f"| {seed} | " + " | ".join(percent(name, row[name]) for name in names) + " |")
    spread = [percent(name, found["mean"][name], found["std"][name]) for name in names]
    return "\n".join([*lines, "| mean ± std | " + " | ".join(spread) + " |"])


def folder_of(root: Path, seed: int) -> Path:
    """Where one seed's run lies."""
    return root / f"seed{seed}"


def run(
    config: ClassifyConfig, seeds: Sequence[int], dataset: LoadedDataset, synthetic: SyntheticImages | None
) -> dict:
    """Runs every seed below ``config.output_dir`` (finished ones are left, interrupted ones go on); writes the statistics.

    Returns:
        What :func:`statistics_of` gives.
    """
    rows, origin = {}, trainer.origin_of(config, dataset, synthetic)  # one for all: they are averaged
    for seed in seeds:
        one = replace(config, seed=seed, output_dir=folder_of(config.output_dir, seed))
        rows[seed] = scores_of(trainer.run(one, dataset, synthetic, origin))
    found = statistics_of(rows)
    if trainer.Processes(config.device).main:
        write(found, config.output_dir)
    return found
