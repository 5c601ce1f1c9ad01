"""Tables over files, and paths that must stay below a folder."""

from __future__ import annotations

import itertools
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from semantic_aug.datasets.images import open_image
from semantic_aug.datasets.spec import Splits
from semantic_aug.datasets.table import ImageTable, file_stamp
from semantic_aug.errors import UserError


def table_of_files(
    class_names: Sequence[str],
    labels: Sequence[int],
    keys: Sequence[str],
    path_of: Callable[[int], str | Path],
    extras: Mapping[str, Sequence] | None = None,
) -> ImageTable:
    """A table whose rows are image files; nothing is opened before an image is asked for.

    Args:
        class_names: in label order.
        labels: one per file.
        keys: unique name of each file, the same whatever order they are listed in.
        path_of: from a position in ``labels`` to the file.
        extras: further columns.
    """
    return ImageTable.of(
        class_names,
        labels,
        keys,
        lambda row: open_image(path_of(row)),
        lambda row: file_stamp(path_of(row)),
        extras,
        path_of,
    )


def below(root: Path, text: str, where: str, remedy: str = "") -> str:
    """A relative path of a list, normalised, with forward slashes.

    Links are not resolved: what lies below the root is the user's to arrange, and a million look-ups would take minutes.

    Args:
        root: the folder it is relative to; an absolute path is taken if it lies below it.
        text: the path as the list gives it.
        where: file and line, for the error.
        remedy: what to do about a path that leads outside, for the error.

    Raises:
        UserError: the path is empty or leads outside ``root``.
    """
    base = os.path.abspath(root)
    start = base.rstrip(os.sep) + os.sep
    path = os.path.normpath(os.path.join(base, text))
    if not text:
        raise UserError(f"{where}: the path is empty")
    if not path.startswith(start):
        raise UserError(f"{where}: path '{text}' leads outside {base}" + (f": {remedy}" if remedy else ""))
    return path[len(start) :].replace(os.sep, "/")


BLOCK = 1 << 16
"""Files looked up at once, in the order of their names."""
FEW = 32
"""Files of one folder up to which each is asked for by itself; of more, the folder is listed."""


def missing_files(table: ImageTable) -> list[int]:
    """Rows of a table of files whose image is no regular file (missing, a broken link, a pipe); none is opened.

    Tables that hold encoded images have none.
    """
    if table.encoded is None or not len(table):
        return []
    if isinstance(table.encoded(int(table.rows[0])), bytes):
        return []
    missing, rows = [], table.rows.tolist()
    with ThreadPoolExecutor(min(16, 4 * (os.cpu_count() or 1))) as pool:  # on a network drive each is a question
        for start in range(0, len(rows), BLOCK):
            folders: dict[str, list[tuple[int, str]]] = defaultdict(list)
            for index in range(start, min(len(rows), start + BLOCK)):
                folder, name = os.path.split(table.encoded(rows[index]))
                folders[folder].append((index, name))
            missing += itertools.chain.from_iterable(pool.map(_missing_in, folders, folders.values()))
    return sorted(missing)


def _missing_in(folder: str, files: list[tuple[int, str]]) -> list[int]:
    if len(files) > FEW:
        try:
            with os.scandir(folder) as entries:
                regular = {entry.name for entry in entries if _is_regular(entry)}
        except OSError:
            regular = set()
        files = [(index, name) for index, name in files if name not in regular]
    return [index for index, name in files if not Path(folder, name).is_file()]


def _is_regular(entry: os.DirEntry) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def refuse_missing(splits: Splits, name: str) -> None:
    """Refuses a data set some of whose images are not there, before anything is made of it.

    Raises:
        UserError: how many, and the first by name.
    """
    missing = [(split, row) for split, table in splits.items() for row in missing_files(table)]
    if not missing:
        return
    total, (split, row) = sum(map(len, splits.values())), missing[0]
    path = splits[split].encoded(int(splits[split].rows[row]))
    hint = "; Windows paths are looked up with forward slashes" if "\\" in str(path) else ""
    raise UserError(
        f"data set {name}: {len(missing)} of {total} images are not there (the first: {path}, split {split}): restore them "
        f"or remove them from the data set{hint}; check names all of them"
    )
