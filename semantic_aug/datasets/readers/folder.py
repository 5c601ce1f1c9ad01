"""A folder of class folders, or a folder with a folder of class folders for each split.

Files are listed in sorted order, no image is decoded, and nothing is ever written into the folder.
"""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from semantic_aug.datasets import captions
from semantic_aug.datasets.files import table_of_files
from semantic_aug.datasets.images import EXTENSIONS
from semantic_aug.datasets.notes import note
from semantic_aug.datasets.readers.walk import Walk, text_of
from semantic_aug.datasets.spec import Splits
from semantic_aug.datasets.splits import split_of, unify
from semantic_aug.datasets.table import ImageTable
from semantic_aug.errors import UserError

ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar", ".bz2", ".xz", ".zst")
EXPECTED = f"files ending in {', '.join(EXTENSIONS[:5])}, ..."


def read_folder(folder: str | os.PathLike) -> Splits:
    """A folder of class folders, or a folder with ``train`` (and ``val``, ``test``) folders of class folders.

    Every image file below a class folder belongs to that class, however deep it lies; which files are images, and what is
    passed over, is said in :mod:`semantic_aug.datasets.readers.walk`. Class names are compared and given in composed
    Unicode (NFC). A ``metadata.csv`` beside the class folders gives captions
    (:func:`semantic_aug.datasets.captions.read_metadata`).

    Raises:
        UserError: not a folder, no class folders, fewer than two classes, a class folder without an image, two folders for
            one split, or a folder that may not be listed.
    """
    root = Path(os.path.abspath(Path(folder).expanduser()))
    if not root.is_dir():
        hint = "; unpack the archive first" if root.suffix.lower() in ARCHIVES and root.exists() else ""
        raise UserError(f"{root} is not a folder: expected a folder with one folder of images per class{hint}")
    walk = Walk(root)
    children, files = walk.entries(root)
    # a class may be called "train" or "test" too; a folder of that name is a split if it holds folders
    by_split = defaultdict(list)
    for child in children:
        if split_of(child.name):
            by_split[split_of(child.name)].append(child)
    splits = _split_folders(walk, by_split)
    if "train" in splits:
        _note_outside_splits(walk, children, files, [where.name for where in splits.values()])
        tables = {split: _folder_table(walk, Path(where.path), split) for split, where in splits.items()}
        walk.note_left_out(captions.METADATA, *(f"{where.name}/{captions.METADATA}" for where in splits.values()))
        note(
            "splits without an image left out",
            [where.name for split, where in splits.items() if not len(tables[split])],
        )
        return unify({split: table for split, table in tables.items() if len(table)}, fixed="train")
    if splits:
        found = ", ".join(where.name for where in splits.values())
        raise UserError(
            f"{root} has the split folder {found} but none named train with class folders: add it, or name another folder"
        )
    if len(by_split) > 1 and len(children) == sum(map(len, by_split.values())):
        names = " and ".join(child.name for child in children)
        raise UserError(f"{root} holds {names} without class folders: expected one folder per class in each of them")
    table = _folder_table(walk, root, "train")
    walk.note_left_out(captions.METADATA)
    return {"train": table}


def _split_folders(walk: Walk, by_split: dict[str, list[os.DirEntry]]) -> dict[str, os.DirEntry]:
    """The one folder of each split that holds folders.

    Raises:
        UserError: two of them stand for one split.
    """
    splits = {}
    for split, folders in by_split.items():
        with_classes = [where for where in folders if walk.folder_names(where)]
        if len(with_classes) > 1:
            names = " and ".join(where.name for where in with_classes)
            raise UserError(f"{walk.root} holds {names}, which all stand for the split {split}: remove all but one")
        if with_classes:
            splits[split] = with_classes[0]
    return splits


def _note_outside_splits(
    walk: Walk, children: list[os.DirEntry], files: list[os.DirEntry], splits: Sequence[str]
) -> None:
    for child in children:
        if child.name not in splits:
            unlabelled = "unlabelled split left out, it holds no class folders"
            number = len(Walk(walk.root).images(child.path))
            kind = unlabelled if split_of(child.name) else "folder beside the splits left out"
            note(kind, [f"{text_of(child.name)} with {number} images"])
    note("images beside the split folders left out", [walk.name_of(file) for file in files if walk.is_image(file)])


def _folder_table(walk: Walk, folder: Path, split: str) -> ImageTable:
    folders, files = walk.entries(folder)
    note("images beside the class folders left out", [walk.name_of(file) for file in files if walk.is_image(file)])
    classes: dict[str, list[str]] = {}
    for where in folders:
        name = _class_name(where)
        found = _class_images(walk, where, split, name)
        if not found and split == "train":
            raise UserError(
                f"class folder {where.path} holds no image: expected {EXPECTED}, or remove the folder{walk.left_out_hint()}"
            )
        if found:
            classes.setdefault(name, []).extend(found)
    if len(classes) < 2 and split == "train":
        held = f"one class folder ('{next(iter(classes))}')" if classes else "no class folders"
        raise UserError(f"{folder} holds {held}: expected at least two, each with that class's images ({EXPECTED})")
    names = sorted(classes)
    paths = [path for name in names for path in classes[name]]
    labels = [label for label, name in enumerate(names) for _ in classes[name]]
    keys = list(map(walk.name_of, paths))
    start = 0 if folder == walk.root else len(walk.name_of(folder)) + 1
    column = captions.read_metadata(folder, [key[start:] for key in keys])
    extras = None if column is None else {"caption": column}
    return table_of_files(names, labels, keys, paths.__getitem__, extras)


def _class_name(folder: os.DirEntry) -> str:
    if text_of(folder.name) != folder.name:
        raise UserError(f"the name of class folder {text_of(folder)} is not UTF-8: rename it")
    return unicodedata.normalize("NFC", folder.name)


def _class_images(walk: Walk, folder: os.DirEntry, split: str, name: str) -> list[str]:
    inside = [word for word in walk.folder_names(folder) if split_of(word)]
    if len(set(map(split_of, inside))) > 1:
        raise UserError(
            f"class folder {folder.path} holds the split folders {', '.join(inside)}: expected the splits above the "
            f"classes ({inside[0]}/{folder.name})"
        )
    note("folders named like a split are read as part of their class", [f"{walk.name_of(folder)}/{w}" for w in inside])
    return walk.images(folder, split, name)
