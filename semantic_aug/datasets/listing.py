"""A list of paths and labels, as CSV or parquet: one's own data without moving a file.

Columns ``path`` and ``label``, and ``split`` where there are splits; others are passed over. The columns stay in Arrow's
compact form, and only a row that needs it is looked at alone, so that a million rows open in seconds.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from semantic_aug.datasets.files import below, table_of_files
from semantic_aug.datasets.sources import split_of, unify
from semantic_aug.datasets.spec import Splits
from semantic_aug.datasets.table import ImageTable
from semantic_aug.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = ("path", "label", "split")

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
    _refuse_empty(rows["label"], "label", file)
    tables = {}
    for split, positions in _positions_of_splits(rows, file).items():
        part = rows if positions is None else rows.take(positions)
        tables[split] = _table(part, positions, base, file, split)
    if "train" not in tables:
        raise UserError(f"{file} has no row of split train")
    del rows
    _give_memory_back()
    return unify(tables, fixed="train")


def _give_memory_back() -> None:
    """Arrow keeps what it freed for itself; the images are going to need it."""
    import pyarrow as pa

    pa.default_memory_pool().release_unused()


def _line(row: int, positions: np.ndarray | None) -> int:
    """The line of the CSV a row stands on, the header being line 1."""
    return int(row if positions is None else positions[row]) + 2


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
    try:
        return csv.read_csv(
            file,
            parse_options=csv.ParseOptions(newlines_in_values=False),
            read_options=csv.ReadOptions(column_names=found, skip_rows=1),
            convert_options=csv.ConvertOptions(
                include_columns=wanted, column_types={name: pa.string() for name in wanted}, strings_can_be_null=False
            ),
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
    return pa.table(columns)


def _refuse_empty(column: pa.ChunkedArray, name: str, file: Path) -> None:
    from pyarrow import compute

    empty = compute.index(compute.equal(compute.utf8_trim_whitespace(column), ""), True).as_py()
    if empty >= 0:
        raise UserError(f"{file} line {_line(empty, None)}: the {name} is empty")


def _positions_of_splits(rows: pa.Table, file: Path) -> dict[str, np.ndarray | None]:
    """Row numbers of each split; None for all rows where there is no column ``split``."""
    from pyarrow import compute

    if "split" not in rows.column_names:
        return {"train": None}
    encoded = compute.dictionary_encode(rows["split"]).combine_chunks()
    codes = encoded.indices.to_numpy(zero_copy_only=False)
    found: dict[str, list[int]] = {}
    for code, word in enumerate(encoded.dictionary.to_pylist()):
        split = split_of(word or "train")
        if split is None:
            line = _line(int(np.flatnonzero(codes == code)[0]), None)
            raise UserError(f"{file} line {line}: split '{word}': expected train, val or test")
        found.setdefault(split, []).append(code)
    return {split: np.flatnonzero(np.isin(codes, members)) for split, members in found.items()}


def _table(rows: pa.Table, positions: np.ndarray | None, base: Path, file: Path, split: str) -> ImageTable:
    from pyarrow import compute

    encoded = compute.dictionary_encode(rows["label"]).combine_chunks()
    words = np.asarray(encoded.dictionary.to_pylist(), dtype=str)
    order = np.argsort(words, kind="stable")
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    labels = rank[encoded.indices.to_numpy(zero_copy_only=False)]

    odd = compute.invert(compute.match_substring_regex(rows["path"], _PLAIN))
    keys = [key for chunk in rows["path"].chunks for key in chunk.to_pylist()]
    for row in np.flatnonzero(odd.to_numpy(zero_copy_only=False)):
        keys[row] = below(base, keys[row], f"{file} line {_line(row, positions)}")
    table = table_of_files([str(w) for w in words[order]], labels, keys, lambda row: os.path.join(base, keys[row]))
    for i in range(1, len(table)):  # rows are sorted by key, so equal ones are neighbours
        if table.keys[i] == table.keys[i - 1]:
            line = _line(max(int(r) for r in table.rows[i - 1 : i + 1]), positions)
            raise UserError(f"{file} line {line}: '{table.keys[i]}' is listed twice in split {split}: remove one row")
    return table
