"""Images without labels, or whose labels are not looked at."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from semantic_aug.datasets.catalog import LoadedDataset, load_dataset
from semantic_aug.datasets.fingerprint import UNREADABLE, hash_images
from semantic_aug.datasets.readers.delimited import read_header
from semantic_aug.datasets.readers.folder import EXPECTED, Walk
from semantic_aug.datasets.readers.hub import read_hub_images
from semantic_aug.datasets.settings import DATASET, HUB
from semantic_aug.datasets.table import ImageTable, missing_files, table_of_files
from semantic_aug.errors import UserError

CLASS = "unlabelled"
"""Class name of images that have none."""


def read_unlabelled(path: Path | str) -> ImageTable:
    """The images as a table of one class; keys are paths relative to the folder, or as the list gives them.

    Args:
        path: a folder; a CSV file with the column ``path``, relative to the file's folder or absolute; ``hf:ID``, a data set
            of the hub or a local copy of one; or ``dataset:NAME``, all training images of a data set.

    Raises:
        UserError: not there, without an image, or a listed file is missing.
    """
    if str(path).startswith(HUB):
        images = read_hub_images(str(path).removeprefix(HUB), CLASS)
        if not len(images):
            raise UserError(f"--unlabelled {path}: no image there; expected a data set with images")
        return images
    if str(path).startswith(DATASET):
        images = load_dataset(str(path).removeprefix(DATASET)).train
        return replace(images, class_names=(CLASS,), labels=np.zeros_like(images.labels), extras={}, group_names=())
    if path.is_dir():
        walk = Walk(Path(os.path.abspath(path)))
        files = {walk.name_of(file): file for file in walk.images(walk.root)}
        walk.note_left_out()
    elif path.is_file():
        table = read_header(path, ("path",))
        column = table.column("path")
        if column is None:
            raise UserError(f"--unlabelled {path}: expected a list with the column path, or a folder of images")
        names = (cells[column].strip() for _, cells in table.records())
        names = dict.fromkeys(os.path.normpath(name) for name in names if name)
        first = {os.path.abspath(path.parent / name): name for name in reversed(names)}  # an image counts once
        files = {name: file for file, name in reversed(first.items())}
    else:
        raise UserError(f"--unlabelled {path}: not there; expected a folder of images, or a list with the column path")
    if not files:
        raise UserError(f"--unlabelled {path}: no image there; expected {EXPECTED}")
    paths = list(files.values())
    images = table_of_files((CLASS,), [0] * len(paths), list(files), paths.__getitem__)
    if missing := missing_files(images):
        raise UserError(
            f"--unlabelled {path}: {len(missing)} listed images are not there ('{images.keys[missing[0]]}')"
        )
    return images


def with_unlabelled(dataset: LoadedDataset, path: Path | str) -> LoadedDataset:
    """The data set with the images of :func:`read_unlabelled` that are not among its labelled training images. Raises
    UserError: see there and :func:`without_labelled`."""
    return replace(dataset, unlabelled=without_labelled(read_unlabelled(path), dataset, path))


def without_labelled(images: ImageTable, dataset: LoadedDataset, path: Path | str) -> ImageTable:
    """The images that are not training images of the data set, by content. Raises UserError: some are validation or test
    images, which would leak into what is trained on them; or none is left."""
    hashes = [value.tobytes() for value in hash_images(images).values]
    for split in ("test", "val"):
        table = getattr(dataset, split)
        labelled = _by_content(table) if table is not None else {}
        shared = [(key, labelled[value]) for key, value in zip(images.keys, hashes, strict=True) if value in labelled]
        if shared:
            raise UserError(
                f"--unlabelled {path} holds {len(shared)} {split} images of {dataset.name} ('{shared[0][0]}' is "
                f"'{shared[0][1]}'), on which classifiers are evaluated: remove them from it"
            )
    train = _by_content(dataset.train)
    rest = images.take([row for row, value in enumerate(hashes) if value not in train])
    if not len(rest):
        raise UserError(f"--unlabelled {path}: all {len(images)} images are labelled training images; give others")
    return rest


def _by_content(table: ImageTable) -> dict[bytes, str]:
    values = [value.tobytes() for value in hash_images(table).values]
    return {value: key for value, key in zip(values, table.keys, strict=True) if value != UNREADABLE}
