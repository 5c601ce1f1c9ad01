"""Captions, boxes and masks beside the images of a list, of the hub's rows or in a folder's metadata.

The column of captions is called ``caption``, of the hub and of metadata ``text`` or ``description`` too; several captions of
one image stand one a line.
"""

import json
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from semantic_aug.datasets.readers.delimited import read_header
from semantic_aug.datasets.readers.notes import note
from semantic_aug.datasets.table import BOX_TEXT, MASK_PATH, below
from semantic_aug.errors import UserError

COLUMNS = ("caption", "text", "description")
REGIONS = ("box", "mask")
METADATA = ("metadata.csv", "metadata.jsonl")
"""Lists that may stand beside a folder's class folders, as the ``datasets`` library has them."""


def as_column(captions: Iterable[str | Sequence[str] | None]) -> np.ndarray:
    """Captions as an ``extras`` column, ``(N,)`` str; several of one image are joined by line breaks, none is empty."""
    texts = ["" if c is None else "\n".join(map(str, c)) if isinstance(c, (list, tuple)) else str(c) for c in captions]
    column = np.empty(len(texts), dtype=object)  # strings of their own lengths
    column[:] = texts
    return column


def as_extras(texts: Mapping[str, Iterable[str | None]], base: Path) -> dict[str, np.ndarray]:
    """The ``extras`` columns of captions, boxes and masks (paths relative to ``base``); boxes and masks are
    checked where they are used."""
    extras = {"caption": as_column(texts["caption"])} if "caption" in texts else {}
    if "box" in texts:
        extras[BOX_TEXT] = as_column(text and text.strip() for text in texts["box"])
    if "mask" in texts:
        paths = ((text or "").strip().replace("\\", "/") for text in texts["mask"])
        extras[MASK_PATH] = as_column(path and os.path.join(base, path) for path in paths)
    return extras


def read_metadata(folder: Path, files: Sequence[str]) -> dict[str, np.ndarray]:
    """The columns of a folder's ``metadata.csv`` or ``metadata.jsonl``: ``file_name``, as the hub's image folders have it, and
    a caption, a ``box`` (x, y, width, height) or the path of a ``mask``; JSON lines may have ``objects.bbox`` instead of a box.

    Args:
        files: its images, relative to it, with forward slashes.

    Returns:
        ``extras`` columns, empty for files that the list does not have; none without such a list.

    Raises:
        UserError: both lists, a line that is no record, a row that names no image of the folder, or one that has a row already.
    """
    lists = [folder / name for name in METADATA if (folder / name).is_file()]
    if len(lists) > 1:
        raise UserError(f"{folder} holds {METADATA[0]} and {METADATA[1]}: remove one")
    if not lists:
        return {}
    path = lists[0]
    columns, records = _table_records(path) if path.suffix == ".csv" else _json_records(path)
    if columns is None:  # a list about something else
        note(f"{path.name} without the columns file_name and caption, box or mask left out", [str(path)])
        return {}
    position = {unicodedata.normalize("NFC", name): i for i, name in enumerate(files)}
    rows: list[dict[str, str] | None] = [None] * len(files)
    for line, row in records:
        where, name = f"{path} line {line}", row["file_name"].strip()
        if unicodedata.normalize("NFC", name) not in position:
            name = name.replace("\\", "/")
        index = position.get(unicodedata.normalize("NFC", below(folder, name, where)))
        if index is None:
            raise UserError(f"{where}: '{name}' is no image of {folder}: correct or remove the row")
        if rows[index] is not None:
            raise UserError(f"{where}: '{name}' is listed twice: put its captions into one cell")
        rows[index] = row
    return as_extras({name: [row and row.get(name) for row in rows] for name in columns}, folder)


Records = Iterator[tuple[int, dict[str, str]]]
"""The line each record ends on, and its texts by column."""


def _table_records(path: Path) -> tuple[Sequence[str] | None, Records]:
    table = read_header(path, ("file_name", *COLUMNS, *REGIONS))
    position = {"caption": table.column(*COLUMNS), **{name: table.column(name) for name in ("file_name", *REGIONS)}}
    position = {name: column for name, column in position.items() if column is not None}
    columns = [name for name in position if name != "file_name"] if "file_name" in position else []
    records = ((line, {name: cells[at] for name, at in position.items()}) for line, cells in table.records())
    return columns or None, records


def _json_records(path: Path) -> tuple[Sequence[str] | None, Records]:
    """As :func:`_table_records`, of a file with a JSON object a line."""
    rows = []
    for line, text in enumerate(path.read_bytes().splitlines(), 1):
        if not text.strip():
            continue
        try:
            record = json.loads(text)
            json.dumps(record, ensure_ascii=False).encode()  # half a character, which JSON can escape, is no text
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise UserError(f'{path} line {line}: expected a JSON object such as {{"file_name": "toad/1.png"}}')
        rows.append((line, {name: str(value) for name, value in _values(record).items() if value is not None}))
    nameless = [line for line, row in rows if "file_name" not in row]
    if nameless and len(nameless) < len(rows):
        raise UserError(f"{path} line {nameless[0]}: no file_name: add it or remove the line")
    columns = [name for name in ("caption", *REGIONS) if any(name in row for _, row in rows)]
    return columns if columns and not nameless else None, iter(rows)


def _values(record: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a JSON record; of several captions one a line, of several boxes of ``objects`` the largest."""
    caption = next((record[name] for name in COLUMNS if name in record), None)
    objects = record.get("objects")
    boxes = objects.get("bbox") if isinstance(objects, dict) else None
    largest = max(boxes, key=lambda box: box[2] * box[3], default=None) if _are_boxes(boxes) else boxes
    return {
        "file_name": record.get("file_name"),
        "caption": "\n".join(str(c) for c in caption if c is not None) if isinstance(caption, list) else caption,
        "box": record.get("box", largest),
        "mask": record.get("mask"),
    }


def _are_boxes(boxes: Any) -> bool:
    """Whether a value is a list of boxes of four numbers; any other is refused as a box where it is used."""
    numbers = (int, float)
    return isinstance(boxes, list) and all(
        isinstance(box, list) and len(box) == 4 and all(isinstance(value, numbers) for value in box) for box in boxes
    )
