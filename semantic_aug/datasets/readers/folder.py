"""A folder of class folders, or a folder with a folder of class folders for each split.

Files are listed in sorted order, no image is decoded, and nothing is ever written into the folder.
"""

from __future__ import annotations

import os
from pathlib import Path

from semantic_aug.datasets import captions
from semantic_aug.datasets.files import table_of_files
from semantic_aug.datasets.images import EXTENSIONS
from semantic_aug.datasets.spec import Splits
from semantic_aug.datasets.splits import split_of, unify
from semantic_aug.datasets.table import ImageTable
from semantic_aug.errors import UserError

ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar")


def read_folder(folder: str | os.PathLike) -> Splits:
    """A folder of class folders, or a folder with ``train`` (and ``val``, ``test``) folders of class folders.

    Every image file below a class folder belongs to that class, however deep it lies; hidden files are passed over.
    A ``metadata.csv`` beside the class folders gives captions (:func:`semantic_aug.datasets.captions.read_metadata`).

    Raises:
        UserError: not a folder, no class folders, fewer than two classes, or a class folder without an image.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        hint = "; unpack the archive first" if root.suffix.lower() in ARCHIVES and root.exists() else ""
        raise UserError(f"{root} is not a folder: expected a folder with one folder of images per class{hint}")
    children = _folders(root)
    # a class may be called "train" or "test" too; a folder of that name is a split if it holds folders
    splits = {split_of(child.name): child for child in children if split_of(child.name) and _folders(child)}
    if "train" in splits:
        return unify({split: _folder_table(where, root) for split, where in splits.items()}, fixed="train")
    if splits:
        found = ", ".join(where.name for where in splits.values())
        raise UserError(f"{root} has the split folder {found} but none named train: add it, or name another folder")
    return {"train": _folder_table(root, root)}


def _folders(folder: Path) -> list[Path]:
    return sorted((p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")), key=lambda p: p.name)


def _folder_table(folder: Path, root: Path) -> ImageTable:
    classes = _folders(folder)
    if len(classes) < 2:
        held = f"one class folder ('{classes[0].name}')" if classes else "no class folders"
        raise UserError(
            f"{folder} holds {held}: expected at least two, each with that class's images ({', '.join(EXTENSIONS)})"
        )
    paths: list[Path] = []
    labels: list[int] = []
    for label, where in enumerate(classes):
        found = sorted(_images_below(where))
        if not found:
            raise UserError(
                f"class folder {where} holds no image: expected files ending in {', '.join(EXTENSIONS)}, "
                "or remove the folder"
            )
        paths += found
        labels += [label] * len(found)
    keys = [path.relative_to(root).as_posix() for path in paths]
    column = captions.read_metadata(folder, [path.relative_to(folder).as_posix() for path in paths])
    extras = None if column is None else {"caption": column}
    return table_of_files([c.name for c in classes], labels, keys, paths.__getitem__, extras)


def _images_below(folder: Path) -> list[Path]:
    found = []
    for where, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(where, name) for name in files if name.lower().endswith(EXTENSIONS) and not name.startswith(".")]
    return found
