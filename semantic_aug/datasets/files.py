"""Tables over files, and paths that must stay below a folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from semantic_aug.datasets.images import open_image
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
    path = os.path.normpath(os.path.join(base, text))
    if not text:
        raise UserError(f"{where}: the path is empty")
    if not path.startswith(base + os.sep):
        raise UserError(f"{where}: path '{text}' leads outside {base}" + (f": {remedy}" if remedy else ""))
    return path[len(base) + 1 :].replace(os.sep, "/")
