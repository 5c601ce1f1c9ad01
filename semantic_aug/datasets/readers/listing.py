"""A list of paths and labels, as CSV or parquet: one's own data without moving a file.

Columns ``path`` and ``label``, ``split`` where there are splits, and ``caption`` where there are captions; others are
passed over. Labels and splits are read as
codes, paths block by block, and only a path that needs it is looked at alone, so that a million rows open in seconds.
"""

from __future__ import annotations

import itertools
import operator
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from semantic_aug.datasets import captions
from semantic_aug.datasets.files import below, table_of_files
from semantic_aug.datasets.spec import Splits
from semantic_aug.datasets.splits import split_of, unify
from semantic_aug.datasets.table import ImageTable
from semantic_aug.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = ("path", "label", "split", "caption")
TEXTS = ("path", "caption")
"""Columns whose cells differ from row to row."""

_ROOT_REMEDY = "an entry of config/datasets.yaml with csv and root says below which folder images lie"

_PLAIN = r"^[^/\\.~][^/\\]*(/[^/\\.][^/\\]*)*$"
"""A relative path that is what it seems: no component starts with a dot, none is empty, nothing is a backslash."""


def read_listing(file: str | os.PathLike, root: str | os.PathLike | None = None) -> Splits:
    """The splits of a CSV or parquet file.

    Args:
        file: the list.
        root: folder that relative paths start from and that no path may leave (None: the list's own folder).

    Raises:
        UserError: not there, not a table, a missing column, an empty label, an unknown split, a path outside ``root``
            or listed twice in a split, or a class that train lacks.
    """
    file = Path(file).expanduser()
    if not file.is_file():
        raise UserError(f"{file} is not there: expected a CSV or parquet file with the columns path and label")
    base = Path(os.path.abspath(Path(root).expanduser() if root else file.parent))
    rows = _read_parquet(file) if file.suffix.lower() in (".parquet", ".pq") else _read_csv(file)
    codes, words = _codes(rows, "label")
    for code, word in enumerate(words):
        if not word.strip() and (codes == code).any():
            raise UserError(f"{file} line {_line(np.argmax(codes == code))}: the label is empty")
    paths, splits = rows["path"], _positions_of_splits(rows, file)
    texts = rows["caption"] if "caption" in rows.column_names else None
    del rows
    tables = {}
    for split, positions in splits.items():
        keys = _keys(paths, positions, base, file)
        extras = None if texts is None else {"caption": captions.as_column(texts.take(positions).to_pylist())}
        tables[split] = _table(keys, codes[positions], words, base, extras)
        _refuse_repeated(tables[split], positions, file, split)
    if "train" not in tables:
        raise UserError(f"{file} has no row of split train")
    return unify(tables, fixed="train")


def _line(row: int | np.integer) -> int:
    """The line of the CSV a row stands on, the header being line 1."""
    return int(row) + 2


def _check_columns(found: Sequence[str], file: Path) -> list[str]:
    for name in COLUMNS[:2]:
        if name not in found:
            raise UserError(
                f"{file} lacks the column '{name}': expected path, label and optionally split; "
                f"it has {', '.join(found) or 'none'}"
            )
    return [name for name in COLUMNS if name in found]


def _read_csv(file: Path) -> pa.Table:
    import csv as plain_csv

    import pyarrow as pa
    from pyarrow import csv

    with open(file, encoding="utf-8-sig", errors="replace", newline="") as lines:
        found = [name.strip() for name in next(plain_csv.reader(lines), [])]
    wanted = _check_columns(found, file)
    kinds = {name: pa.string() if name in TEXTS else pa.dictionary(pa.int32(), pa.string()) for name in wanted}
    try:
        return csv.read_csv(
            file,
            read_options=csv.ReadOptions(column_names=found, skip_rows=1),
            convert_options=csv.ConvertOptions(include_columns=wanted, column_types=kinds, strings_can_be_null=False),
            memory_pool=pa.system_memory_pool(),  # gives back at once what it frees; the images are going to need it
        )
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        reason = str(error).split("\n")[0][:160]
        raise UserError(f"{file} cannot be read as CSV ({reason}): expected UTF-8 text, commas between cells") from None


def _read_parquet(file: Path) -> pa.Table:
    import pyarrow as pa
    from pyarrow import compute, parquet

    try:
        wanted = _check_columns(parquet.read_schema(file).names, file)
        rows = parquet.read_table(file, columns=wanted)
        columns = {name: compute.fill_null(rows[name].cast(pa.string()), "") for name in wanted}
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        reason = str(error).split("\n")[0][:160]
        raise UserError(f"{file} cannot be read as parquet ({reason}): write it again") from None
    return pa.table({name: c if name in TEXTS else c.dictionary_encode() for name, c in columns.items()})


def _codes(rows: pa.Table, name: str) -> tuple[np.ndarray, list[str]]:
    """A column of codes: int32 ``(N,)``, and the word each stands for."""
    import pyarrow as pa

    if not len(rows):
        return np.empty(0, np.int32), []
    column = rows[name].unify_dictionaries().chunks
    words = max((chunk.dictionary for chunk in column), key=len).to_pylist()
    if any(chunk.null_count for chunk in column):  # an empty cell
        words.append("")
        column = [pa.DictionaryArray.from_arrays(c.indices.fill_null(len(words) - 1), words) for c in column]
    return np.concatenate([chunk.indices.to_numpy(zero_copy_only=False) for chunk in column]).astype(np.int32), words


def _positions_of_splits(rows: pa.Table, file: Path) -> dict[str, np.ndarray]:
    """Row numbers of each split, ascending; all are train where there is no column ``split``."""
    if "split" not in rows.column_names:
        return {"train": np.arange(len(rows))}
    codes, words = _codes(rows, "split")
    found: dict[str, list[int]] = {}
    for code, word in enumerate(words):
        split = split_of(word or "train")
        if split is None:
            raise UserError(
                f"{file} line {_line(np.argmax(codes == code))}: split '{word}': expected train, val or test"
            )
        found.setdefault(split, []).append(code)
    return {split: np.flatnonzero(np.isin(codes, members)) for split, members in found.items()}


def _keys(paths: pa.ChunkedArray, positions: np.ndarray, base: Path, file: Path) -> list[str]:
    """The paths at some rows, relative to the root."""
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
            keys[first + i] = below(base, keys[first + i], f"{file} line {_line(inside[i])}", _ROOT_REMEDY)
        start += len(chunk)
    return keys


def _table(
    keys: list[str], codes: np.ndarray, words: list[str], base: Path, extras: dict[str, np.ndarray] | None
) -> ImageTable:
    """A split's table; its classes are those that occur in it, in alphabetical order."""
    used = sorted(np.flatnonzero(np.bincount(codes, minlength=len(words))).tolist(), key=words.__getitem__)
    rank = np.zeros(len(words), np.int64)
    rank[used] = np.arange(len(used))
    names = [words[code] for code in used]
    return table_of_files(names, rank[codes], keys, lambda row: os.path.join(base, keys[row]), extras)


def _refuse_repeated(table: ImageTable, positions: np.ndarray, file: Path, split: str) -> None:
    keys = table.keys  # sorted, so equal ones are neighbours
    if any(map(operator.eq, keys, itertools.islice(keys, 1, None))):
        i = next(i for i in range(1, len(keys)) if keys[i] == keys[i - 1])
        line = _line(max(positions[table.rows[i - 1]], positions[table.rows[i]]))
        raise UserError(f"{file} line {line}: '{keys[i]}' is listed twice in split {split}: remove one row")
