"""A list of paths and labels, as CSV or parquet: one's own data without moving a file.

Columns ``path`` and ``label``; ``split``, ``caption``, ``group`` (subpopulations by which accuracy is reported, such as
"landbird on water"), ``box`` and ``mask`` where there are such; others are not read. Only a path that needs it is looked up
on the disk, so that a million rows open in seconds.
"""

from __future__ import annotations

import itertools
import os
import re
import unicodedata
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from semantic_aug.datasets.readers import captions
from semantic_aug.datasets.readers.delimited import read_header
from semantic_aug.datasets.readers.notes import note
from semantic_aug.datasets.spec import SPLITS, Splits, split_of, unify
from semantic_aug.datasets.table import ImageTable, below, table_of_files
from semantic_aug.errors import UserError
from semantic_aug.files import home_expanded

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = ("path", "label", "split", "caption", "group", *captions.REGIONS)
PARQUET = (".parquet", ".pq")
TEXTS = ("caption", *captions.REGIONS)
JOINTS = {"caption": "\n", "box": ", "}
"""Columns whose cells may be lists in a parquet file, and what stands between the entries."""

_ROOT_REMEDY = "an entry of config/datasets.yaml with csv and root says below which folder images lie"

_START, _ANY, _END = r"[!-\-0-\[\]-}]", r"[ -.0-\[\]-~]", r"[!-.0-\[\]-~]"
_PLAIN = re.compile(f"({_START}{_ANY}*/)*{_START}({_ANY}*{_END})?")
"""A relative path that is what it seems: printable ASCII without backslash, no spaces around it, no component that is empty or
starts with a dot, a tilde or a space."""

Columns = dict[str, list[str]]
"""The cells of each column that is read."""
Location = Callable[[int], str]
"""From a row's number to the file and line it stands on, for errors."""


def read_listing(file: str | os.PathLike, root: str | os.PathLike | None = None) -> Splits:
    """The splits of a CSV or parquet file.

    Spaces around cells, lines without cells, and the letter case of the header do not matter; labels are compared and given
    in composed Unicode (NFC). An image listed twice in a split under one label is kept once.

    Args:
        root: folder that relative paths start from and that they may not leave (None: the list's own folder).

    Raises:
        UserError: not there, not a table, a missing column, an empty label, an unknown split, a relative path outside
            ``root``, an image under two labels or in train and another split, or a class that train lacks.
    """
    file = home_expanded(file)
    if not file.is_file():
        raise UserError(f"{file} is not there: expected a CSV or parquet file with the columns path and label")
    base = Path(os.path.abspath(home_expanded(root) if root else file.parent))
    if not base.is_dir():
        raise UserError(
            f"root {base} of the list {file} is not a folder: correct root, the folder that paths start from"
        )
    columns, location = (_read_parquet if file.suffix.lower() in PARQUET else _read_csv)(file)
    labels, class_names = _codes(columns.pop("label"))
    if "" in class_names:
        raise UserError(f"{location(int(np.argmax(labels == class_names.index(''))))}: the label is empty")
    keys = columns["path"]
    for row, text in enumerate(keys):
        if not _PLAIN.fullmatch(text):
            keys[row] = _key(text, base, lambda row=row: location(row))
    groups, group_names = _codes(columns.pop("group")) if "group" in columns else (None, ())
    splits = _splits_of_rows(columns, location)
    kept = _without_repeated(keys, splits, labels, class_names, location)
    tables = {}
    for number, split in enumerate(SPLITS):
        rows = kept[splits[kept] == number]
        if len(rows):
            texts = {name: [columns[name][row] for row in rows.tolist()] for name in TEXTS if name in columns}
            extras = captions.as_extras(texts, base) | ({} if groups is None else {"group": groups[rows]})
            table = _table([keys[row] for row in rows.tolist()], labels[rows], class_names, base, extras)
            tables[split] = replace(table, group_names=group_names)
    if "train" not in tables:
        raise UserError(f"{file} has no row of split train")
    _refuse_shared(tables, file)
    return unify(tables, fixed="train")


def _positions_of_columns(columns: Sequence[str], file: Path) -> dict[str, int]:
    """The positions of the columns that are read, by our names. Raises UserError: a missing column, or two of one name."""
    folded = [name.strip().casefold() for name in columns]
    if twice := next((name for name in COLUMNS if folded.count(name) > 1), None):
        raise UserError(f"{file} has two columns named '{twice}': rename one")
    if missing := next((name for name in COLUMNS[:2] if name not in folded), None):
        raise UserError(
            f"{file} lacks the column '{missing}': expected path, label and optionally split; "
            f"it has {', '.join(columns) or 'none'}"
        )
    return {name: folded.index(name) for name in COLUMNS if name in folded}


def _read_csv(file: Path) -> tuple[Columns, Location]:
    """The rows that have a path or a label; spreadsheets write rows of separators at the end."""
    table = read_header(file, COLUMNS)
    positions = _positions_of_columns(table.columns, file)
    path, label = positions["path"], positions["label"]
    cells_of = [([], position) for position in positions.values()]
    lines = array("q")
    for line, cells in table.records():
        if cells[path].strip() or cells[label].strip():
            lines.append(line)
            for column, position in cells_of:
                column.append(cells[position])
    return {name: column for name, (column, _) in zip(positions, cells_of)}, lambda row: f"{file} line {lines[row]}"


def _read_parquet(file: Path) -> tuple[Columns, Location]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        names = parquet.read_schema(file).names
        positions = _positions_of_columns(names, file)
        rows = parquet.read_table(file, columns=[names[position] for position in positions.values()])
        columns = {name: _texts(rows[names[position]], name, file) for name, position in positions.items()}
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError, OSError) as error:
        reason = str(error).split("\n")[0][:160]
        raise UserError(f"{file} cannot be read as parquet ({reason}): write it again") from None
    return columns, lambda row: f"{file} row {row + 1}"


def _texts(column: pa.ChunkedArray, name: str, file: Path) -> list[str]:
    """A parquet column as texts: of a list of captions one a line, of a box its numbers with commas between them. Raises
    UserError: lists in another column."""
    import pyarrow as pa
    from pyarrow import compute

    kinds = pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list
    if any(is_kind(column.type) for is_kind in kinds):
        if name not in JOINTS:
            raise UserError(f"{file}: the column '{name}' holds lists: expected one text in each row")
        cells = ([str(entry) for entry in cell or () if entry is not None] for cell in column.to_pylist())
        return list(map(JOINTS[name].join, cells))
    if pa.types.is_floating(column.type):  # as pandas writes an empty cell
        column = compute.if_else(compute.is_nan(column), pa.scalar(None, column.type), column)
    return compute.fill_null(column.cast(pa.string()), "").to_pylist()


def _codes(cells: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """The distinct texts of a column in alphabetical order, without spaces around them and in composed Unicode, and the
    position of each row's among them, int64 ``(N,)``."""
    clean = {cell: unicodedata.normalize("NFC", cell.strip()) for cell in set(cells)}
    values = tuple(sorted(set(clean.values())))
    position = {value: i for i, value in enumerate(values)}
    code_of = {cell: position[value] for cell, value in clean.items()}
    return np.fromiter(map(code_of.__getitem__, cells), np.int64, len(cells)), values


def _splits_of_rows(columns: Columns, location: Location) -> np.ndarray:
    """The split of each row, int64 ``(N,)`` positions in :data:`SPLITS`; all are train where there is no column ``split``."""
    codes, values = _codes(columns.pop("split", [""] * len(columns["path"])))
    splits = [split_of(value or "train") for value in values]
    if None in splits:
        unexpected = splits.index(None)
        row = int(np.argmax(codes == unexpected))
        raise UserError(f"{location(row)}: split '{values[unexpected]}': expected train, val or test")
    return np.array([SPLITS.index(split) for split in splits], np.int64)[codes]


def _key(text: str, base: Path, where: Callable[[], str]) -> str:
    """One path that needs a look: absolute, of Windows, with spaces around it, or not in ASCII. Raises UserError: empty, of
    another computer, or a relative path that leads outside the root."""
    if not text.strip():
        raise UserError(f"{where()}: the path is empty")
    for candidate in _spellings(text):
        if "\0" not in candidate and Path(base, candidate).is_file():
            text = candidate
            break
    else:
        text = text.strip()
        if re.match(r"[A-Za-z]:[\\/]|\\\\", text):
            raise UserError(
                f"{where()}: '{text}' is a path of a Windows drive: give paths relative to the list or to root"
            )
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text):
            raise UserError(f"{where()}: '{text}' is an address: download the images and give their paths")
        if "\0" in text:
            raise UserError(f"{where()}: '{text!r}' is no path: correct it")
        text = text.replace("\\", "/")
    text = str(home_expanded(text)) if text.startswith("~/") and not Path(base, text).exists() else text
    if text.startswith(os.sep):  # the user's own list may name any place
        path, start = os.path.normpath(text), str(base).rstrip(os.sep) + os.sep
        return path[len(start) :] if path.startswith(start) else path
    try:
        return below(base, text, "", _ROOT_REMEDY)
    except UserError as error:
        raise UserError(f"{where()}{error}") from None


def _spellings(text: str) -> Iterator[str]:
    """The ways in which a path may be meant, as it stands first."""
    for spaces in dict.fromkeys((text, text.strip())):
        for slashes in dict.fromkeys((spaces, spaces.replace("\\", "/"))):
            yield from dict.fromkeys((slashes, *(unicodedata.normalize(form, slashes) for form in ("NFC", "NFD"))))


def _table(
    keys: list[str], labels: np.ndarray, class_names: Sequence[str], base: Path, extras: dict[str, np.ndarray]
) -> ImageTable:
    """A split's table; its classes are those that occur in it, in alphabetical order."""
    used, labels = np.unique(labels, return_inverse=True)
    names = [class_names[label] for label in used]
    return table_of_files(names, labels, keys, lambda row: os.path.join(base, keys[row]), extras)


def _without_repeated(
    keys: Sequence[str], splits: np.ndarray, labels: np.ndarray, class_names: Sequence[str], location: Location
) -> np.ndarray:
    """The rows without those that name an image of their split again, which are noted. Raises UserError: an image has two
    labels."""
    if len(set(keys)) == len(keys):
        return np.arange(len(keys))
    first: dict[tuple[int, str], int] = {}
    repeated = []
    for row, image in enumerate(zip(splits.tolist(), keys, strict=True)):
        known = first.setdefault(image, row)
        if labels[known] != labels[row]:
            raise UserError(
                f"{location(row)}: '{keys[row]}' is listed under two labels, '{class_names[labels[known]]}' and "
                f"'{class_names[labels[row]]}': remove one row"
            )
        if known != row:
            repeated.append(keys[row])
    note("rows that repeat an image of their split left out", repeated)
    return np.fromiter(first.values(), np.int64)


def _refuse_shared(tables: Splits, file: Path) -> None:
    """Refuses images that are listed for train and another split; those of val and test are noted."""
    names = [split for split in SPLITS if split in tables]
    for split, other in itertools.combinations(names, 2):
        fewer = set(tables[other].keys)
        shared = sorted(key for key in tables[split].keys if key in fewer)
        if shared and split == "train":
            raise UserError(
                f"{file} lists {len(shared)} images for {split} and {other} ('{shared[0]}' the first): remove one row of each"
            )
        note(f"images listed for {split} and {other}", shared)
