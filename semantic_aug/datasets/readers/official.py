"""Readers of the files that come with official downloads: text lists, CSVs and MATLAB files.

A data set's root is named by the environment variable ``{DATASET}_ROOT`` (``FLOWER_ROOT``): the folder its archives were
unpacked into. Nothing is written there, and no image is opened to learn its label.

torchvision downloads some of these data sets (:mod:`semantic_aug.datasets.download`) but does not list them here: it accepts
only its own folder names (no older Stanford Cars, no boxes), wants Flowers' lists by their MD5 and Food's as JSON, renames
classes of Pet (``american_bulldog`` becomes ``American Bulldog``), and a damaged list ends in a traceback.
"""

import contextlib
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from semantic_aug.datasets.images import EXTENSIONS
from semantic_aug.datasets.readers.hub import HubSplit, read_hub
from semantic_aug.datasets.spec import DatasetSpec, Splits
from semantic_aug.datasets.table import ImageTable, below, table_of_files
from semantic_aug.errors import UserError, unknown
from semantic_aug.files import home_expanded


def chosen_root(spec: DatasetSpec) -> Path | None:
    """The folder of the official download, or None where no variable names it. Raises UserError: it is not a folder, or a
    local copy in the hub's format is named as well."""
    variable, *others = spec.variables
    text = os.environ.get(variable)
    if not text:
        return None
    other = next((name for name in others if os.environ.get(name)), None)
    if other:
        raise UserError(f"both {variable} and {other} are set: unset one, so that it is clear which copy is meant")
    root = home_expanded(text).absolute()
    if not root.is_dir():
        raise UserError(f"{variable}={text} is not a folder: expected the unpacked official download of '{spec.name}'")
    return root


def required_root(spec: DatasetSpec) -> Path:
    """The folder of the official download of a data set that the hub does not have. Raises UserError: see :func:`chosen_root`;
    or the variable is not set."""
    root = chosen_root(spec)
    if root is None:
        hint = f"get {spec.name} downloads it" if spec.torchvision or spec.archive else f"info {spec.name} says how"
        raise UserError(
            f"data set '{spec.name}' is read from its official download: get it at {spec.homepage}, unpack it and set "
            f"{spec.variables[0]} to the folder (python -m semantic_aug.datasets {hint})"
        )
    return root


def read(spec: DatasetSpec, *copies: str | None) -> Splits:
    """The official download where its variable is set, else copies in the hub's format, else the hub.

    Args:
        spec: whose ``read_official`` reads the download.
        copies: local copies of the hub's training and test split, or None; environment variables take precedence.
    """
    root = chosen_root(spec) if spec.hub else required_root(spec)
    if root is not None:
        return spec.read_official(root)
    variable, *others = spec.variables
    remedy = (
        f"set {variable} to the unpacked official download ({spec.homepage}), or {' and '.join(others)} to local copies of "
        f"{' and '.join(spec.hub)}"
    )
    train, test = (os.environ.get(name) or copy for name, copy in zip(others, copies, strict=True))
    splits = {
        "train": HubSplit(spec.hub[0], "train", train, remedy),
        "test": HubSplit(spec.hub[-1], "test" if test else spec.hub_test_split, test, remedy),
    }
    return read_hub(splits)


def part(root: Path, *names: str) -> Path:
    """The first of several places below the root at which a file or folder is found. Raises UserError: it is at none of
    them."""
    for name in names:
        if (root / name).exists():
            return root / name
    raise UserError(
        f"{root} lacks {' or '.join(names)}: unpack every archive of the official download into one folder and name "
        "that folder"
    )


def images_in(folder: Path) -> list[Path]:
    """The image files directly in a folder, in the order of their names."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in EXTENSIONS and not p.name.startswith("."))


def read_lines(file: Path, columns: int) -> list[list[str]]:
    """A text list: the words of each line that is neither empty nor a comment, the last column taking the rest. Raises
    UserError: not there, not text, empty, or a line with too few words."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise UserError(f"{file} is not there: unpack the official download again") from None
    except UnicodeDecodeError:
        raise UserError(f"{file} is not a text file: unpack the official download again") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        words = line.split(maxsplit=columns - 1)
        if len(words) < columns:
            raise UserError(f"{file} line {number}: '{line.strip()}' has {len(words)} words, expected {columns}")
        rows.append([word.strip() for word in words])
    if not rows:
        raise UserError(f"{file} is empty: unpack the official download again")
    return rows


def number(text: str, where: str) -> float:
    """A number of a list. Raises UserError: it is none, or not finite."""
    with contextlib.suppress(ValueError):
        if math.isfinite(value := float(text)):
            return value
    raise UserError(f"{where}: '{text}' is no number: unpack the official download again")


def read_mat(file: Path) -> dict[str, Any]:
    """A MATLAB file's variables, arrays of one element reduced to it. Raises UserError: not there, damaged, or SciPy is not
    installed."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError(f"{file} is a MATLAB file: reading it needs SciPy, pip install scipy") from None
    if not file.is_file():
        raise UserError(f"{file} is not there: unpack the official download again")
    try:
        return loadmat(str(file), squeeze_me=True)
    except Exception as error:  # SciPy raises whatever the damaged bytes lead to
        raise UserError(
            f"{file} cannot be read as a MATLAB file ({type(error).__name__}: {str(error)[:100]}): download it again"
        ) from None


def variable(content: Mapping[str, Any], name: str, file: Path) -> np.ndarray:
    """One variable of a MATLAB file as a flat array. Raises UserError: the file has no such variable."""
    if name not in content:
        present = ", ".join(key for key in content if not key.startswith("__"))
        raise UserError(f"{file} has no variable '{name}' (it has {present}): it is another file; download it again")
    return np.atleast_1d(content[name]).reshape(-1)


def labels_by_name(names: Sequence[str], class_names: Sequence[str], kind: str) -> list[int]:
    """The label of each class name, counted from 0. Raises UserError: a name that is none; ``kind`` says what it is of."""
    position = {name: label for label, name in enumerate(class_names)}
    if unexpected := [name for name in names if name not in position]:
        raise unknown(kind, unexpected[0], class_names, "unpack the official download again")
    return [position[name] for name in names]


def labelled_splits(
    class_names: Sequence[str], splits: Mapping[str, Sequence[tuple[int, str]]], images: Path
) -> dict[str, ImageTable]:
    """A table for each split from (label, path relative to ``images``) of its files; see :func:`labelled_files`."""
    return {
        split: labelled_files(class_names, [label for label, _ in rows], [name for _, name in rows], images, images)
        for split, rows in splits.items()
    }


def labelled_files(
    class_names: Sequence[str],
    labels: Sequence[int],
    names: Sequence[str],
    images: Path,
    where: Path,
    extras: Mapping[str, Sequence] | None = None,
) -> ImageTable:
    """A table from an official list.

    Args:
        class_names: in label order.
        labels: counted from 0.
        names: paths of the images, relative to ``images``.

    Raises:
        UserError: a label without a class name, a path that leads outside ``images``, or one that is listed twice.
    """
    labels = np.asarray(labels, dtype=np.int64).reshape(-1)
    bad = np.flatnonzero((labels < 0) | (labels >= len(class_names)))
    if len(bad):
        raise UserError(
            f"{where}: '{names[bad[0]]}' has the label {labels[bad[0]] + 1}, which has no class name (there are "
            f"{len(class_names)}): unpack the official download again"
        )
    keys = [below(images, str(name), str(where)) for name in names]
    if len(set(keys)) != len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f"{where} lists '{twice}' twice: unpack the official download again")
    root = str(images)
    return table_of_files(class_names, labels, keys, lambda row: os.path.join(root, keys[row]), extras)
