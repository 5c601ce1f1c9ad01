"""What stands beside the images of a list, of the hub's rows or in a folder's ``metadata.csv``: captions, boxes, masks.

The column of captions is called ``caption``, ``text`` or ``description``; several captions of one image stand one a line.
"""

import os
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from semantic_aug.datasets.readers.delimited import read_header
from semantic_aug.datasets.readers.notes import note
from semantic_aug.datasets.table import BOX_TEXT, MASK_PATH, below
from semantic_aug.errors import UserError

COLUMNS = ("caption", "text", "description")
REGIONS = ("box", "mask")
METADATA = "metadata.csv"


def as_column(captions: Iterable[str | Sequence[str] | None]) -> np.ndarray:
    """Captions as an ``extras`` column, ``(N,)`` str; several of one image are joined by line breaks, none is empty."""
    texts = ["" if c is None else "\n".join(map(str, c)) if isinstance(c, (list, tuple)) else str(c) for c in captions]
    column = np.empty(len(texts), dtype=object)  # strings of their own lengths
    column[:] = texts
    return column


def as_regions(
    boxes: Iterable[str | None] | None, masks: Iterable[str | None] | None, base: Path
) -> dict[str, np.ndarray]:
    """Boxes and paths of masks as ``extras`` columns, as far as there are such; they are checked where they are used.

    Args:
        boxes: texts, one per image; None without a column.
        masks: paths, relative to ``base``; None without a column.
    """
    columns = {} if boxes is None else {BOX_TEXT: as_column(text and text.strip() for text in boxes)}
    if masks is not None:
        texts = ((text or "").strip().replace("\\", "/") for text in masks)
        columns[MASK_PATH] = as_column(text and os.path.join(base, text) for text in texts)
    return columns


def read_metadata(folder: Path, files: Sequence[str]) -> dict[str, np.ndarray]:
    """The columns of a folder's ``metadata.csv``: ``file_name``, as the hub's image folders have it, and a caption, a ``box``
    (x, y, width, height) or the path of a ``mask``.

    Returns:
        ``extras`` columns, empty for files that the list does not have; none without such a list.

    Raises:
        UserError: a row that names no image of the folder, or one that has a row already.
    """
    path = folder / METADATA
    if not path.is_file():
        return {}
    table = read_header(path, ("file_name", *COLUMNS, *REGIONS))
    name_at = table.column("file_name")
    places = {"caption": table.column(*COLUMNS), **{name: table.column(name) for name in REGIONS}}
    places = {name: place for name, place in places.items() if place is not None}
    if name_at is None or not places:  # a list about something else
        note("metadata.csv without the columns file_name and caption, box or mask left out", [str(path)])
        return {}
    position = {unicodedata.normalize("NFC", name): i for i, name in enumerate(files)}
    rows: list[list[str] | None] = [None] * len(files)
    for line, cells in table.records():
        where, name = f"{path} line {line}", cells[name_at].strip()
        if unicodedata.normalize("NFC", name) not in position:
            name = name.replace("\\", "/")
        index = position.get(unicodedata.normalize("NFC", below(folder, name, where)))
        if index is None:
            raise UserError(f"{where}: '{name}' is no image of {folder}: correct or remove the row")
        if rows[index] is not None:
            raise UserError(f"{where}: '{name}' is listed twice: put its captions into one cell")
        rows[index] = cells
    columns = {name: [row and row[place] for row in rows] for name, place in places.items()}
    captions = {"caption": as_column(columns["caption"])} if "caption" in columns else {}
    return captions | as_regions(columns.get("box"), columns.get("mask"), folder)
