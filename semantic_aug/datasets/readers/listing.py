"""A list of paths and labels, as CSV or parquet: one's own data without moving a file.

Columns ``path`` and ``label``; ``split``, ``caption``, ``group`` (subpopulations by which accuracy is reported, such as
"landbird on water"), ``box`` and ``mask`` where there are such; others are not read. Labels, splits and groups are read as
codes, paths block by block, and only a path that needs it is looked at alone, so that a million rows open in seconds.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from semantic_aug.datasets.readers import captions
from semantic_aug.datasets.readers.delimited import TextTable, as_utf8, read_header
from semantic_aug.datasets.readers.notes import note
from semantic_aug.datasets.spec import SPLITS, Splits, split_of, unify
from semantic_aug.datasets.table import ImageTable, below, table_of_files
from semantic_aug.errors import UserError
from semantic_aug.files import home_expanded

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = ("path", "label", "split", "caption", "group", *captions.REGIONS)
PARQUET = (".parquet", ".pq")
TEXTS = ("path", "caption", *captions.REGIONS)
"""Columns whose cells differ from row to row."""
JOINTS = {"caption": "\n", "box": ", "}
"""Columns whose cells may be lists in a parquet file, and what stands between the entries."""

_ROOT_REMEDY = "an entry of config/datasets.yaml with csv and root says below which folder images lie"

_START, _ANY, _END = r"[!-\-0-\[\]-}]", r"[ -.0-\[\]-~]", r"[!-.0-\[\]-~]"
_PLAIN = f"^({_START}{_ANY}*/)*{_START}({_ANY}*{_END})?$"
"""A relative path that is what it seems: printable ASCII without backslash, no spaces around it, no component that is empty or
starts with a dot, a tilde or a space."""

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
    rows, location = (_read_parquet if file.suffix.lower() in PARQUET else _read_csv)(file)
    codes, values = _codes(rows, "label")
    paths, splits = rows["path"], _positions_of_splits(rows, location)
    empty = np.flatnonzero(np.isin(codes, [code for code, value in enumerate(values) if not value]))
    if len(empty):
        raise UserError(f"{location(empty[0])}: the label is empty")
    texts = {name: rows[name] for name in TEXTS[1:] if name in rows.column_names}
    groups, group_names = _groups(rows) if "group" in rows.column_names else (None, ())
    del rows
    tables, doubled = {}, []
    for split, positions in splits.items():
        keys = _keys(paths, positions, base, location)
        kept = _without_repeated(keys, codes[positions], values, lambda i, at=positions: location(at[i]), doubled)
        if len(kept) < len(positions):
            positions, keys = positions[kept], [keys[i] for i in kept.tolist()]
        further = {name: column.take(positions).to_pylist() for name, column in texts.items()}
        extras = {} if groups is None else {"group": groups[positions]}
        if "caption" in further:
            extras["caption"] = captions.as_column(further["caption"])
        extras |= captions.as_regions(further.get("box"), further.get("mask"), base)
        tables[split] = replace(_table(keys, codes[positions], values, base, extras), group_names=group_names)
    note("rows that repeat an image of their split left out", doubled)
    if "train" not in tables:
        raise UserError(f"{file} has no row of split train")
    _refuse_shared(tables, file)
    return unify(tables, fixed="train")


def _check_columns(columns: Sequence[str], file: Path) -> list[str]:
    """The columns that are read, as the file spells them."""
    folded = [name.strip().casefold() for name in columns]
    spelled = dict(zip(folded, columns, strict=True))
    if twice := next((name for name in COLUMNS if folded.count(name) > 1), None):
        raise UserError(f"{file} has two columns named '{twice}': rename one")
    for name in COLUMNS[:2]:
        if name not in spelled:
            raise UserError(
                f"{file} lacks the column '{name}': expected path, label and optionally split; "
                f"it has {', '.join(columns) or 'none'}"
            )
    return [spelled[name] for name in COLUMNS if name in spelled]


def _read_csv(file: Path) -> tuple[pa.Table, Location]:
    import pyarrow as pa

    table = read_header(file, COLUMNS)
    _check_columns(table.columns, file)
    wanted = {name: table.column(name) for name in COLUMNS if table.column(name) is not None}
    names = [f"column {i}" for i in range(len(table.columns))]
    for name, position in wanted.items():
        names[position] = name
    kinds = {name: pa.string() if name in TEXTS else pa.dictionary(pa.int32(), pa.string()) for name in wanted}
    try:
        rows = _parsed(table, names, kinds)
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        for _ in table.records():  # names the line at fault
            pass
        reason = str(error).split("\n")[0][:160]
        raise UserError(f"{file} cannot be read as CSV ({reason}): correct the list") from None
    return _without_empty(rows), _LinesOf(table)


def _parsed(table: TextTable, names: list[str], kinds: dict[str, pa.DataType]) -> pa.Table:
    """A table's wanted columns; a record longer than the block it is read in is read in a larger one."""
    import pyarrow as pa
    from pyarrow import csv

    parse = csv.ParseOptions(delimiter=table.separator, newlines_in_values=_holds_quotes(table.path))
    convert = csv.ConvertOptions(include_columns=list(kinds), column_types=kinds, strings_can_be_null=False)
    block = 1 << 20
    while True:
        try:
            return csv.read_csv(
                table.path if table.encoding.startswith("utf-8") else as_utf8(table),
                read_options=csv.ReadOptions(column_names=names, skip_rows=table.skipped, block_size=block),
                parse_options=parse,
                convert_options=convert,
                memory_pool=pa.system_memory_pool(),  # gives back at once what it frees; the images are going to need it
            )
        except pa.ArrowInvalid as error:
            if "straddling" not in str(error) or block > 4 * table.path.stat().st_size:
                raise
            block = min(16 * block, (1 << 31) - 1)


class _LinesOf:
    """Names the line a row of a CSV stands on; the file is read for it only when an error asks."""

    def __init__(self, table: TextTable):
        self.table = table

    def __call__(self, row: int) -> str:
        columns = [self.table.column(name) for name in COLUMNS[:2]]
        with contextlib.suppress(UserError):
            filled = (line for line, cells in self.table.records() if any(cells[column].strip() for column in columns))
            return f"{self.table.path} line {next(itertools.islice(filled, int(row), None))}"
        return f"{self.table.path} row {row + 1}"


def _holds_quotes(file: Path) -> bool:
    with open(file, "rb") as content:
        return any(b'"' in block for block in iter(lambda: content.read(1 << 20), b""))


def _read_parquet(file: Path) -> tuple[pa.Table, Location]:
    import pyarrow as pa
    from pyarrow import compute, parquet

    try:
        spelled = _check_columns(parquet.read_schema(file).names, file)
        rows = parquet.read_table(file, columns=spelled)
        columns = {name.strip().casefold(): rows[name] for name in spelled}
        columns = {name: compute.fill_null(_as_texts(column, name, file), "") for name, column in columns.items()}
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError, OSError) as error:
        reason = str(error).split("\n")[0][:160]
        raise UserError(f"{file} cannot be read as parquet ({reason}): write it again") from None
    table = pa.table({name: c if name in TEXTS else c.dictionary_encode() for name, c in columns.items()})
    return table, lambda row: f"{file} row {row + 1}"


def _as_texts(column: pa.ChunkedArray, name: str, file: Path) -> pa.ChunkedArray:
    """A parquet column as strings: of a list of captions one a line, of a box its numbers with commas between them. Raises
    UserError: lists in another column."""
    import pyarrow as pa
    from pyarrow import compute

    if pa.types.is_floating(column.type):  # as pandas writes an empty cell
        column = compute.if_else(compute.is_nan(column), pa.scalar(None, column.type), column)
    kinds = pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list
    if not any(is_kind(column.type) for is_kind in kinds):
        return column.cast(pa.string())
    if name not in JOINTS:
        raise UserError(f"{file}: the column '{name}' holds lists: expected one text in each row")
    cells = ([] if cell is None else [str(entry) for entry in cell if entry is not None] for cell in column.to_pylist())
    return pa.chunked_array([list(map(JOINTS[name].join, cells))], pa.string())


def _without_empty(rows: pa.Table) -> pa.Table:
    """The rows that have a path or a label; spreadsheets write rows of separators at the end."""
    from pyarrow import compute

    codes, values = _codes(rows, "label")
    blank = np.isin(codes, [code for code, value in enumerate(values) if not value])
    if not blank.any():
        return rows
    filled = ~blank | compute.not_equal(compute.utf8_trim_whitespace(rows["path"]), "").to_numpy(zero_copy_only=False)
    return rows if filled.all() else rows.filter(filled)


def _codes(rows: pa.Table, name: str) -> tuple[np.ndarray, list[str]]:
    """A column of codes: int32 ``(N,)``, and the value each stands for."""
    import pyarrow as pa

    if not len(rows):
        return np.empty(0, np.int32), []
    column = rows[name].unify_dictionaries().chunks
    values = max((chunk.dictionary for chunk in column), key=len).to_pylist()
    if any(chunk.null_count for chunk in column):  # an empty cell
        values.append("")
        column = [pa.DictionaryArray.from_arrays(c.indices.fill_null(len(values) - 1), values) for c in column]
    codes = np.concatenate([chunk.indices.to_numpy(zero_copy_only=False) for chunk in column]).astype(np.int32)
    clean = [unicodedata.normalize("NFC", value.strip()) for value in values]
    if clean == values:
        return codes, values
    position = {value: i for i, value in enumerate(dict.fromkeys(clean))}
    return np.array([position[value] for value in clean], np.int32)[codes], list(position)


def _positions_of_splits(rows: pa.Table, location: Location) -> dict[str, np.ndarray]:
    """Row numbers of each split, ascending; all are train where there is no column ``split``."""
    if "split" not in rows.column_names:
        return {"train": np.arange(len(rows))}
    codes, values = _codes(rows, "split")
    members_of: dict[str, list[int]] = {}
    for code, value in enumerate(values):
        split = split_of(value or "train")
        if split is None and (codes == code).any():
            raise UserError(f"{location(np.argmax(codes == code))}: split '{value}': expected train, val or test")
        members_of.setdefault(split or "train", []).append(code)
    positions = {split: np.flatnonzero(np.isin(codes, members)) for split, members in members_of.items()}
    return {split: rows for split, rows in positions.items() if len(rows)}


def _groups(rows: pa.Table) -> tuple[np.ndarray, tuple[str, ...]]:
    """The group of each row, int64 ``(N,)``, and the groups' names in alphabetical order; empty cells are a group, too."""
    codes, values = _codes(rows, "group")
    names = tuple(sorted(set(values)))
    rank = {name: position for position, name in enumerate(names)}
    return np.array([rank[value] for value in values], np.int64)[codes], names


def _keys(paths: pa.ChunkedArray, positions: np.ndarray, base: Path, location: Location) -> list[str]:
    """The paths at some rows, relative to the root where they lie below it."""
    from pyarrow import compute

    keys: list[str] = []
    start = 0
    for chunk in paths.chunks:
        inside = positions[np.searchsorted(positions, start) : np.searchsorted(positions, start + len(chunk))]
        chosen = chunk.take(inside - start)
        plain = compute.match_substring_regex(chosen, _PLAIN).to_numpy(zero_copy_only=False)
        first = len(keys)
        keys += chosen.to_pylist()
        for i in np.flatnonzero(~plain):
            keys[first + i] = _key(keys[first + i], base, lambda at=inside[i]: location(at))
        start += len(chunk)
    return keys


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
    keys: list[str], codes: np.ndarray, values: list[str], base: Path, extras: dict[str, np.ndarray]
) -> ImageTable:
    """A split's table; its classes are those that occur in it, in alphabetical order."""
    used = sorted(np.flatnonzero(np.bincount(codes, minlength=len(values))).tolist(), key=values.__getitem__)
    rank = np.zeros(len(values), np.int64)
    rank[used] = np.arange(len(used))
    names = [values[code] for code in used]
    return table_of_files(names, rank[codes], keys, lambda row: os.path.join(base, keys[row]), extras)


def _without_repeated(
    keys: list[str], codes: np.ndarray, values: list[str], location: Location, doubled: list[str]
) -> np.ndarray:
    """Positions without those that name an image again; what is left out is added to ``doubled``. Raises UserError: an image
    has two labels."""
    if len(set(keys)) == len(keys):
        return np.arange(len(keys))
    first: dict[str, int] = {}
    kept = []
    for i, key in enumerate(keys):
        known = first.setdefault(key, i)
        if known == i:
            kept.append(i)
        elif codes[known] != codes[i]:
            raise UserError(
                f"{location(i)}: '{key}' is listed under two labels, '{values[codes[known]]}' and '{values[codes[i]]}': "
                "remove one row"
            )
        else:
            doubled.append(key)
    return np.array(kept, np.int64)


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
