"""The files of ``measure``: CSV, JSON, a Markdown table, and faithfulness against diversity as a picture."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from semantic_aug import files, runs
from semantic_aug.evaluation.quality.measures import ALL, COLUMNS, REAL

CSV_FILE, JSON_FILE, TABLE_FILE = "measures.csv", "measures.json", "measures.md"
PICTURE_FILE = "faithfulness_diversity.png"
LABELS = {
    "target_probability": "faithfulness: target-class probability",
    "clip_score": "faithfulness: CLIP score",
    "source_distance": "diversity: feature distance to the source image",
    "class_distance": "diversity: feature distance within class",
}


def write_csv(path: Path, rows: Sequence[Mapping]) -> None:
    """Every row; columns that no row has are left out."""
    columns = [name for name in COLUMNS if any(name in row for row in rows)]
    with files.atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(columns)
        for row in rows:
            writer.writerow([_text(row.get(name, ""), 6) for name in columns])


def totals(rows: Sequence[Mapping]) -> list[Mapping]:
    """The rows over all classes: one per subset and strength."""
    return [row for row in rows if row["target_class"] == ALL]


def markdown(rows: Sequence[Mapping]) -> str:
    """The totals as a Markdown table."""
    rows = totals(rows)
    columns = [name for name in COLUMNS if name != "target_class" and any(name in row for row in rows)]
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    lines += ["| " + " | ".join(_text(row.get(name, ""), 3) for name in columns) + " |" for row in rows]
    return "\n".join(lines)


def _text(value, digits: int) -> str:
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def axes_of(rows: Sequence[Mapping]) -> tuple[str, str] | None:
    """Columns of diversity and faithfulness that all totals have, or None where faithfulness was not measured."""
    rows = [row for row in totals(rows) if row["subset"] != REAL]

    def first(*names: str) -> str | None:
        return next((name for name in names if all(name in row for row in rows)), None)

    diversity, faithful = first("source_distance", "class_distance"), first("target_probability", "clip_score")
    return (diversity, faithful) if diversity and faithful else None


def draw(path: Path, rows: Sequence[Mapping], axes: tuple[str, str]) -> None:
    """A point per subset and strength; the points of one subset are joined in the order of their strengths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points = [row for row in totals(rows) if row["subset"] != REAL]
    figure, plot = plt.subplots(figsize=(7, 5), layout="constrained")
    for name in dict.fromkeys(row["subset"] for row in points):
        mine = [row for row in points if row["subset"] == name]
        single = [row for row in mine if row["strength"] != ALL] or mine
        x, y = [row[axes[0]] for row in single], [row[axes[1]] for row in single]
        plot.plot(x, y, "o-", label=name, linewidth=1)
        for row in single:
            plot.annotate(
                f"s={row['strength']}", (row[axes[0]], row[axes[1]]), xytext=(4, 4), textcoords="offset points"
            )
    plot.set(xlabel=LABELS[axes[0]], ylabel=LABELS[axes[1]])
    plot.margins(0.15)
    plot.grid(alpha=0.3)
    plot.legend(fontsize=8)
    with files.atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)


def write(folder: Path, rows: Sequence[Mapping], facts: Mapping) -> list[Path]:
    """Writes everything that the rows allow.

    Args:
        folder: made if absent.
        rows: see :data:`semantic_aug.evaluation.quality.measures.COLUMNS`.
        facts: what the JSON holds besides the rows.

    Returns:
        The files written.
    """
    write_csv(folder / CSV_FILE, rows)
    files.write_json(folder / JSON_FILE, {**runs.plain(facts), "rows": [dict(row) for row in rows]})
    files.write_text(folder / TABLE_FILE, markdown(rows) + "\n")
    written = [folder / CSV_FILE, folder / JSON_FILE, folder / TABLE_FILE]
    axes = axes_of(rows)
    if axes:
        draw(folder / PICTURE_FILE, rows, axes)
        written.append(folder / PICTURE_FILE)
    return written
