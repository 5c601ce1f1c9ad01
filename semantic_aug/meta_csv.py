"""``meta.csv``: what each synthetic image was made from and for.

Columns ``First Directory`` (source class name), ``Second Directory`` (target class name), ``Number``, ``Strength`` and
``Path`` (relative to ``data/``), then further ones. Labels are read from here and never from file names; subsets made
elsewhere with only the five columns are read as they are. Folder names are slugs, safe on any file system and unique
per class.
"""

import hashlib
import itertools
import json
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from semantic_aug.errors import UserError
from semantic_aug.files import csv_writer

FILE_NAME = "meta.csv"
COLUMNS = ("First Directory", "Second Directory", "Number", "Strength", "Path")
FURTHER_COLUMNS = ("Source Image", "Seed")
SOURCE_COLUMNS = ("Source Image", "Partner Image")
"""Columns that name training images from which an image was made; a partner is of the target class."""
UNLABELLED_COLUMNS = ("Unlabelled Image", "Source Label")
"""Columns of images made from unlabelled ones: the source's name in its pool, and the weights of its possible classes, as JSON
``{"class name": weight, ...}``, or :data:`EVEN` for equal weights of all classes. Empty for all other images."""
EVEN = "even"
_SLUG_LENGTH = 60
_RESERVED = {"con", "prn", "aux", "nul", *(f"com{i}" for i in range(10)), *(f"lpt{i}" for i in range(10))}


@dataclass(frozen=True)
class MetaTable:
    """The rows of one ``meta.csv`` as columns of length ``N``.

    Attributes:
        class_names: every class name that occurs, sorted.
        source: int32, index of the source class in ``class_names``; the target's where the source may be of any class.
        target: int32, likewise.
        number: int64.
        strength: float64 in (0, 1].
        path: relative to ``data/``.
        further: remaining columns by name.
    """

    class_names: tuple[str, ...]
    source: np.ndarray
    target: np.ndarray
    number: np.ndarray
    strength: np.ndarray
    path: np.ndarray
    further: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.path)


def slug(name: str, empty: str = "class") -> str:
    """A name as a folder name: ASCII letters, digits, dots, hyphens, or ``empty`` where none is left.

    Different names may have one slug; :func:`slugs` and :func:`hashed_slug` tell them apart.
    """
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    text = re.sub(r"[^A-Za-z0-9.]+", "-", ascii_name).strip("-.")[:_SLUG_LENGTH].strip("-.")
    return text or empty


def hashed_slug(text: str, identity: str, digits: int = 6, empty: str = "class") -> str:
    """The slug of ``text`` and hexadecimal digits of the hash of ``identity``: readable, and another for another identity."""
    return f"{slug(text, empty)}-{hashlib.sha256(os.fsencode(identity)).hexdigest()[:digits]}"


def slugs(names: Sequence[str]) -> list[str]:
    """Folder names of classes, one to one whatever the names and whatever their order.

    Names whose slugs coincide (letter case aside, as some file systems see it), or that lose everything in the
    clean-up, get six hexadecimal digits of their own hash appended.

    Raises:
        UserError: two classes have the very same name.
    """
    if len(set(names)) != len(names):
        twice = next(name for name in names if list(names).count(name) > 1)
        raise UserError(f"class name '{twice}' occurs twice: class names must differ")
    plain = [slug(name) for name in names]
    folded = [text.casefold() for text in plain]
    taken = {text for text in folded if folded.count(text) > 1} | _RESERVED | {"class"}
    out = [
        hashed_slug(name, name) if text.casefold() in taken else text for name, text in zip(names, plain, strict=True)
    ]
    if len({text.casefold() for text in out}) != len(out):  # a plain slug that looks like another's hashed one
        out = [hashed_slug(name, name, 16) for name in names]
    return out


def strength_text(strength: float) -> str:
    """The strength as file names and subset names spell it: shortest decimal, ``0.7`` and ``1.0``."""
    return repr(float(strength))


def relative_path(source_slug: str, target_slug: str, number: int, strength: float, extension: str = "png") -> str:
    """``{source}/{target}-{number:06d}-{s}.png``, relative to ``data/``."""
    return f"{source_slug}/{target_slug}-{number:06d}-{strength_text(strength)}.{extension}"


def without_slashes(names: Sequence[str]) -> list[str]:
    """Class names as ``meta.csv`` spells them: "F-16A/B" is "F-16A B", as in the original, unless two would coincide."""
    spaced = [name.replace("/", " ") for name in names]
    return spaced if len(set(spaced)) == len(set(names)) else list(names)


def write(path: Path, rows: Iterable[Sequence], further: Sequence[str] = FURTHER_COLUMNS) -> int:
    """Writes a ``meta.csv`` whole or not at all and returns the number of rows. Rows, values in the order of :data:`COLUMNS`
    and then of the ``further`` columns, are streamed, so that any number fits in memory."""
    with csv_writer(path) as writer:
        writer.writerow([*COLUMNS, *further])
        written = itertools.count()
        writer.writerows(row for row, _ in zip(rows, written, strict=False))
        return next(written)


def read(path: Path) -> MetaTable:
    """Reads a ``meta.csv`` of ours or of another tool. Raises UserError: the file is missing, not a CSV, lacks one of the five
    columns, or has a strength outside (0, 1]."""
    import pandas as pd

    if not path.is_file():
        raise UserError(
            f"{path} is not there: expected a synthetic subset's meta.csv with the columns {', '.join(COLUMNS)}"
        )
    text = dict.fromkeys(("First Directory", "Second Directory", "Path", *SOURCE_COLUMNS, *UNLABELLED_COLUMNS), str)
    try:
        frame = pd.read_csv(path, dtype=text, keep_default_na=False, encoding="utf-8")
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as CSV ({error})") from None
    missing = [column for column in COLUMNS if column not in frame.columns]
    if missing:
        raise UserError(f"{path} lacks the column '{missing[0]}': expected {', '.join(COLUMNS)}")
    try:
        strength = frame["Strength"].to_numpy(dtype=np.float64)
        number = frame["Number"].to_numpy(dtype=np.int64)
    except (ValueError, TypeError):
        raise UserError(f"{path}: Number and Strength must be numbers in every row") from None
    bad = ~((strength > 0) & (strength <= 1))
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise UserError(f"{path} row {row + 2}: strength {strength[row]} is outside (0, 1]")
    source, target = frame["First Directory"].to_numpy(str), frame["Second Directory"].to_numpy(str)
    if UNLABELLED_COLUMNS[1] in frame.columns:
        source = np.where(frame[UNLABELLED_COLUMNS[1]] == EVEN, target, source)
    names, codes = np.unique(np.concatenate([source, target]), return_inverse=True)
    codes = codes.astype(np.int32)
    return MetaTable(
        class_names=tuple(str(name) for name in names),
        source=codes[: len(frame)],
        target=codes[len(frame) :],
        number=number,
        strength=strength,
        path=frame["Path"].to_numpy(object),
        further={c: frame[c].to_numpy(object) for c in frame.columns if c not in COLUMNS},
    )


def source_labels(table: MetaTable, file: Path) -> tuple[np.ndarray, list[dict[str, float]]]:
    """The weights of the possible classes of unlabelled sources.

    Args:
        file: of the table, for errors.

    Returns:
        int64 ``(N,)``, position of each row's label in the list, -1 of a labelled source; and the labels, class names with
        weights above 0, empty where all classes have the same weight.

    Raises:
        UserError: a cell is neither a label nor empty.
    """
    cells, position = table.further.get(UNLABELLED_COLUMNS[1], np.full(len(table), "", object)), {"": -1}
    labels: list[dict[str, float]] = []
    for row, cell in enumerate(cells):
        if cell in position:
            continue
        try:
            label = {} if cell == EVEN else {str(name): float(weight) for name, weight in json.loads(cell).items()}
            if cell != EVEN and not (label and all(0 < weight < math.inf for weight in label.values())):
                raise ValueError
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise UserError(
                f"{file} row {row + 2}: {UNLABELLED_COLUMNS[1]} '{cell}': expected {{\"class name\": weight, ...}} or {EVEN}"
            ) from None
        position[cell] = len(labels)
        labels.append(label)
    return np.array([position[cell] for cell in cells], np.int64), labels
