"""Captions beside the images: a column of a list or of the hub's rows, or a ``metadata.csv`` in a folder.

The column is called ``caption``, ``text`` or ``description``. Several captions of one image stand one a line.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from semantic_aug.datasets.files import below
from semantic_aug.errors import UserError

COLUMNS = ("caption", "text", "description")
METADATA = "metadata.csv"


def column_in(names: Iterable[str]) -> str | None:
    """The column that holds captions, or None."""
    names = list(names)
    return next((name for name in COLUMNS if name in names), None)


def as_column(captions: Iterable[str | Sequence[str] | None]) -> np.ndarray:
    """Captions as an ``extras`` column, ``(N,)`` str; several of one image are joined by line breaks, none is empty."""
    texts = ["" if c is None else "\n".join(map(str, c)) if isinstance(c, (list, tuple)) else str(c) for c in captions]
    column = np.empty(len(texts), dtype=object)  # strings of their own lengths
    column[:] = texts
    return column


def read_metadata(folder: Path, files: Sequence[str]) -> np.ndarray | None:
    """The captions of a folder's ``metadata.csv`` (``file_name`` and a caption, as the hub's image folders have it).

    Args:
        folder: of the split.
        files: its images, relative to it, with forward slashes.

    Returns:
        One caption per file, empty where the list has none; None without such a list.

    Raises:
        UserError: a row that names no image of the folder, or one with a caption already.
    """
    path = folder / METADATA
    if not path.is_file():
        return None
    with open(path, encoding="utf-8-sig", newline="") as lines:
        rows = csv.DictReader(lines)
        column = column_in(rows.fieldnames or ())
        if column is None or "file_name" not in (rows.fieldnames or ()):
            return None  # a list about something else
        position = {name: i for i, name in enumerate(files)}
        captions: list[str | None] = [None] * len(files)
        for row in rows:
            where = f"{path} line {rows.line_num}"
            index = position.get(below(folder, row["file_name"] or "", where))
            if index is None:
                raise UserError(f"{where}: '{row['file_name']}' is no image of {folder}: mend or remove the row")
            if captions[index] is not None:
                raise UserError(f"{where}: '{row['file_name']}' is listed twice: put its captions into one cell")
            captions[index] = row[column] or ""
    return as_column(captions)
