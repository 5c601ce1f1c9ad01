"""Captions beside the images: a column of a list or of the hub's rows, or a ``metadata.csv`` in a folder.

The column is called ``caption``, ``text`` or ``description``. Several captions of one image stand one a line.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from semantic_aug.datasets.readers.delimited import read_header
from semantic_aug.datasets.readers.notes import note
from semantic_aug.datasets.table import below
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
    table = read_header(path, ("file_name", *COLUMNS))
    name_at, caption_at = table.column("file_name"), table.column(*COLUMNS)
    if name_at is None or caption_at is None:  # a list about something else
        note("metadata.csv without the columns file_name and caption left out", [str(path)])
        return None
    position = {unicodedata.normalize("NFC", name): i for i, name in enumerate(files)}
    captions: list[str | None] = [None] * len(files)
    for line, cells in table.records():
        where, name = f"{path} line {line}", cells[name_at].strip()
        if unicodedata.normalize("NFC", name) not in position:
            name = name.replace("\\", "/")
        index = position.get(unicodedata.normalize("NFC", below(folder, name, where)))
        if index is None:
            raise UserError(f"{where}: '{name}' is no image of {folder}: correct or remove the row")
        if captions[index] is not None:
            raise UserError(f"{where}: '{name}' is listed twice: put its captions into one cell")
        captions[index] = cells[caption_at]
    return as_column(captions)
