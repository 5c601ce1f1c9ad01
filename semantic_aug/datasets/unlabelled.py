"""Images without labels, or whose labels are not looked at."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from semantic_aug import registry
from semantic_aug.datasets.catalog import LoadedDataset, read_splits
from semantic_aug.datasets.fingerprint import by_content, hash_images
from semantic_aug.datasets.readers.delimited import read_header
from semantic_aug.datasets.readers.folder import EXPECTED, Walk
from semantic_aug.datasets.readers.hub import read_hub_images
from semantic_aug.datasets.readers.listing import PARQUET
from semantic_aug.datasets.settings import DATASET, HUB, POOLS, check_unlabelled
from semantic_aug.datasets.table import ImageTable, missing_files, refuse_missing, table_of_files
from semantic_aug.errors import UserError
from semantic_aug.runs import SPLIT_TITLES

CLASS = "unlabelled"
"""Class name of images that have none."""


def read_unlabelled(path: Path | str, config_dir: Path = registry.CONFIG_DIR) -> ImageTable:
    """The images as a table of one class; keys are paths relative to the folder, or as the list gives them.

    Args:
        path: a folder; a CSV file with the column ``path``, relative to the file's folder or absolute; ``hf:ID``, a data set
            of the hub or a local copy of one; or ``dataset:NAME``, the whole training split of a data set.
        config_dir: folder of ``datasets.yaml``.

    Raises:
        UserError: not there, without an image, or a listed file is missing.
    """
    if str(path).startswith(HUB):
        images = read_hub_images(str(path).removeprefix(HUB), CLASS)
        if not len(images):
            raise UserError(f"--unlabelled {path}: no image there; expected a data set with images")
        return images
    if str(path).startswith(DATASET):
        spec, splits = read_splits(str(path).removeprefix(DATASET), config_dir)
        images = splits["train"]
        refuse_missing({"train": images}, spec.name)
        return replace(images, class_names=(CLASS,), labels=np.zeros_like(images.labels), extras={}, group_names=())
    check_unlabelled(path)
    if path.is_dir():
        walk = Walk(Path(os.path.abspath(path)))
        files = {walk.name_of(file): file for file in walk.images(walk.root)}
        walk.note_left_out()
    else:
        if path.suffix.lower() in PARQUET:
            raise UserError(f"--unlabelled {path}: a parquet file; expected {POOLS}, as CSV")
        table = read_header(path, ("path",))
        column = table.column("path")
        if column is None:
            raise UserError(f"--unlabelled {path}: expected a list with the column path, or a folder of images")
        names = (cells[column].strip() for _, cells in table.records())
        names = dict.fromkeys(os.path.normpath(name) for name in names if name)
        first = {os.path.abspath(path.parent / name): name for name in reversed(names)}  # an image counts once
        files = {name: file for file, name in reversed(first.items())}
    if not files:
        raise UserError(f"--unlabelled {path}: no image there; expected {EXPECTED}")
    paths = list(files.values())
    images = table_of_files((CLASS,), [0] * len(paths), list(files), paths.__getitem__)
    if missing := missing_files(images):
        raise UserError(
            f"--unlabelled {path}: {len(missing)} listed images are not there ('{images.keys[missing[0]]}')"
        )
    return images


def with_unlabelled(dataset: LoadedDataset, path: Path | str, config_dir: Path = registry.CONFIG_DIR) -> LoadedDataset:
    """The data set with the images of :func:`read_unlabelled` that are not among its labelled training images. Raises
    UserError: see there and :func:`without_labelled`."""
    return replace(dataset, unlabelled=without_labelled(read_unlabelled(path, config_dir), dataset, path))


def without_labelled(images: ImageTable, dataset: LoadedDataset, path: Path | str) -> ImageTable:
    """The images that are not training images of the data set, by content.

    Of a data set's own training split, ``dataset:NAME``, what this setting validates or tests on is left out as well.

    Raises:
        UserError: some of a folder, a list or a hub's data set are validation or test images, which would leak into what is
            trained on them; or none is left.
    """
    hashes = [value.tobytes() for value in hash_images(images).values]
    left_out = set(by_content(dataset.train))
    for split, name in SPLIT_TITLES.items():
        table = getattr(dataset, split)
        labelled = by_content(table) if table is not None else {}
        if str(path).startswith(DATASET):
            left_out.update(labelled)
            continue
        shared = [(key, labelled[value]) for key, value in zip(images.keys, hashes, strict=True) if value in labelled]
        if shared:
            raise UserError(
                f"--unlabelled {path} holds {len(shared)} {name} images of {dataset.name} ('{shared[0][0]}' is "
                f"'{shared[0][1]}'), on which classifiers are evaluated: remove them from it"
            )
    rest = images.take([row for row, value in enumerate(hashes) if value not in left_out])
    if not len(rest):
        raise UserError(f"--unlabelled {path}: all {len(images)} images are labelled training images; give others")
    return rest
