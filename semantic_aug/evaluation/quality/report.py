"""The report of `measure`: the totals as a table, the chart of faithfulness against diversity, and links."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from semantic_aug import cli, files, registry, runs
from semantic_aug.datasets.settings import Setting
from semantic_aug.datasets.synthetic import locate
from semantic_aug.evaluation import document
from semantic_aug.evaluation.quality.inputs import REAL, Subset
from semantic_aug.meta_csv import SOURCE_COLUMNS

ALL = "all"
"""Stands for every strength or every class in the totals."""
CSV_FILE, JSON_FILE, REPORT_FILE = "measures.csv", "measures.json", "measures.md"
INTERVALS = "intervals"
"""Entry of a row: column -> 95 % confidence interval of its mean, or of its distance."""
NO_INTERVAL = {
    "frechet": "no interval: resampled images repeat, which biases this distance upwards",
    "std": "spread of the kernel distance over random subsets",
}
"""First or last word of a column without intervals -> the detail that is shown instead."""
PICTURE_FILE = "faithfulness_diversity.png"
AXES = {
    "source_distance": "diversity: feature distance to the source image",
    "class_distance": "diversity: feature distance within class",
    "target_probability": "faithfulness: target-class probability",
    "clip_score": "faithfulness: CLIP score",
}


def totals(rows: Sequence[Mapping]) -> list[Mapping]:
    """The rows over all classes: one per subset and strength."""
    return [row for row in rows if row["target_class"] == ALL]


def table(rows: Sequence[Mapping], columns: Sequence[str]) -> document.Table:
    """The totals as a table; the details are intervals over the images, or the reason why there is none."""
    rows = totals(rows)
    columns = [name for name in columns if name != "target_class" and any(name in row for row in rows)]
    cells = []
    for row in rows:
        texts = {name: value_text(row.get(name, ""), 3) for name in columns}
        intervals = {name: f"95 % interval: {low:.3g} to {high:.3g}" for name, (low, high) in row[INTERVALS].items()}
        for name in texts:
            parts = name.removeprefix("reference_").split("_")
            reason = NO_INTERVAL.get(parts[0]) or NO_INTERVAL.get(parts[-1])
            if reason and texts[name]:
                intervals[name] = reason
        cells.append([document.Cell(text, intervals.get(name, "")) for name, text in texts.items()])
    return document.Table(columns, cells)


def value_text(value, digits: int) -> str:
    """A value of a row as the tables give it."""
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def axes_of(rows: Sequence[Mapping]) -> tuple[str | None, str | None]:
    """Columns of diversity and faithfulness that all totals have; None where they have none."""
    rows = [row for row in totals(rows) if row["subset"] != REAL]
    common = [name for name in AXES if all(name in row for row in rows)]
    diversity = next((name for name in common if name.endswith("distance")), None)
    faithful = next((name for name in common if not name.endswith("distance")), None)
    return diversity, faithful


def picture_notes(rows: Sequence[Mapping]) -> list[str]:
    """Why there is no picture, a line each; none where there is one."""
    diversity, faithful = axes_of(rows)
    reasons = [] if faithful else ["it needs --classifier or --clip"]
    if not diversity:
        reasons.append(
            "every subset and strength needs a distance of the same kind: source_distance, from the column "
            f"'{SOURCE_COLUMNS[0]}' of meta.csv, or class_distance, from two images of a class"
        )
    return [f"{PICTURE_FILE} is left out: {reason}" for reason in reasons]


def draw(path: Path, rows: Sequence[Mapping], axes: tuple[str, str]) -> None:
    """A point per subset and strength; the points of one subset are joined in the order of their strengths."""
    from matplotlib.figure import Figure

    points = [row for row in totals(rows) if row["subset"] != REAL]
    figure = Figure(figsize=(7, 5), layout="constrained")
    plot = figure.subplots()
    for name in dict.fromkeys(row["subset"] for row in points):
        of_subset = [row for row in points if row["subset"] == name]
        single = [row for row in of_subset if row["strength"] != ALL] or of_subset
        x, y = [row[axes[0]] for row in single], [row[axes[1]] for row in single]
        plot.plot(x, y, "o-", label=name, linewidth=1)
        for row, *position in zip(single, x, y, strict=True):
            plot.annotate(f"s={row['strength']}", position, xytext=(4, 4), textcoords="offset points")
    plot.set(xlabel=AXES[axes[0]], ylabel=AXES[axes[1]])
    plot.margins(0.15)
    plot.grid(alpha=0.3)
    for text in plot.legend(fontsize=8).get_texts():
        text.set_parse_math(False)  # a name such as "$5 (10%) to $10" holds no formula
    with files.atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def write(
    folder: Path, rows: Sequence[Mapping], columns: Sequence[str], facts: Mapping, links: Sequence[document.Block] = ()
) -> list[Path]:
    """Writes CSV, JSON, report and picture, as far as the rows allow; columns that no row has are left out.

    Args:
        facts: what the JSON holds besides the rows; the report has its notes.
        links: end of the report.

    Returns:
        The files written.
    """
    columns = [name for name in columns if any(name in row for row in rows)]
    with files.csv_writer(folder / CSV_FILE) as writer:
        writer.writerow(columns)
        writer.writerows([value_text(row.get(name, ""), 6) for name in columns] for row in rows)
    files.write_json(folder / JSON_FILE, {**runs.plain(facts), "rows": [dict(row) for row in rows]})
    written, axes = [CSV_FILE, JSON_FILE, REPORT_FILE, document.PAGE_FILE], axes_of(rows)
    blocks: list[document.Block] = [table(rows, columns)]
    if all(axes):
        draw(folder / PICTURE_FILE, rows, axes)
        written.append(PICTURE_FILE)
        blocks.append(f"![faithfulness against diversity, a point per subset and strength]({PICTURE_FILE})")
    blocks += ["## Notes", document.items(facts["notes"])] if facts["notes"] else []
    document.write(document.Report("Measures of synthetic images", [*blocks, *links]), folder / REPORT_FILE)
    return [folder / name for name in written]


def subset_section(subsets: Sequence[Subset], folder: Path, args: argparse.Namespace) -> list[document.Block]:
    """Links to the subsets' folders and galleries, and the command that makes a gallery which is missing."""
    parts = [(locate(name)[0], name, len(subset.parts)) for subset in subsets for name in subset.folders]
    links = document.subset_links(dict.fromkeys(root for root, *_ in parts), folder)
    blocks: list[document.Block] = ["## Subsets", document.items(links)]
    new = next(((name, count) for root, name, count in parts if not document.gallery_of(root).is_file()), None)
    if new is None:
        return blocks
    fields = {name: field for cls in (Setting, cli.RunSettings) for name, field in cli.settings_of(cls).items()}
    given = {name: getattr(args, name) for name, f in fields.items() if getattr(args, name, f.default) != f.default}
    flags = {"dataset": args.dataset, **given, "allow_other_sources": args.allow_other_sources or None}
    if new[1] == 1:  # several folders were measured as one subset
        flags["measures"] = registry.shown_path(folder)
    return [*blocks, *document.gallery_hint(flags, registry.resolve_path(new[0]))]
