"""The unlabelled images of a base model: found, checked, split into training images and images kept out, brought to size.

Pixels lie in files of the working folder that are mapped into memory, so that a pool may be larger than memory.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from semantic_aug.datasets import ImageTable, load_dataset
from semantic_aug.datasets.fingerprint import hash_images
from semantic_aug.datasets.images import EXTENSIONS, fit
from semantic_aug.datasets.readers.folder import Walk
from semantic_aug.datasets.settings import DATASET
from semantic_aug.datasets.table import table_of_files
from semantic_aug.errors import UserError
from semantic_aug.files import atomic_path, home_expanded, sha256_text
from semantic_aug.tensors import create_array, open_array

log = logging.getLogger(__name__)

MINIMUM = 24
"""Fewest images worth training on."""
MOST_KEPT_OUT = 500
ENLARGEMENT = 1.25
"""The autoencoder also sees crops of images enlarged by this factor."""


@dataclass(frozen=True)
class Pool:
    """Unlabelled images, some of them kept out of training.

    Attributes:
        train: images trained on; their labels are never read.
        kept_out: images only looked at.
        identity: digest of the content of both.
    """

    train: ImageTable
    kept_out: ImageTable
    identity: str


def image_files(path: Path, flag: str) -> list[Path]:
    """The image files of a folder with all folders below it, as data sets are read (linked folders are entered, litter is
    passed over), or of a text file with one path a line.

    Args:
        path: folder, or list whose relative paths start at the list's folder.
        flag: the flag that names it, for errors.

    Raises:
        UserError: absent, or without an image.
    """
    if path.is_dir():
        walk = Walk(path)
        files = list(map(Path, walk.images(path)))
        walk.note_left_out()
        wanted = f"expected images ({', '.join(EXTENSIONS)}) in it or in folders below it"
    elif path.is_file():
        wanted = "expected the path of one image a line, absolute or relative to the list's folder"
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        except UnicodeDecodeError:
            raise UserError(f"{flag} {path} is not a text file: {wanted}") from None
        files = [path.parent / line for line in lines if line and not line.startswith("#")]
        missing = next((file for file in files if not file.is_file()), None)
        if missing is not None:
            raise UserError(f"{flag} {path}: {missing} does not exist; {wanted}")
    else:
        raise UserError(f"{flag} {path} does not exist: expected a folder of images or a text file that lists them")
    if not files:
        raise UserError(f"{flag} {path} holds no image: {wanted}")
    return sorted(set(files))


def open_table(word: str, flag: str) -> ImageTable:
    """The images of a folder or list as a table without labels, in the order of their paths."""
    path = home_expanded(word)
    files = image_files(path, flag)
    root = path if path.is_dir() else path.parent
    keys = [file.relative_to(root).as_posix() if file.is_relative_to(root) else file.as_posix() for file in files]
    return table_of_files(["image"], [0] * len(files), keys, files.__getitem__)


def open_pool(word: str, excluded: Sequence[str], share: float) -> Pool:
    """The images to train on and those kept out.

    Args:
        word: what ``--images`` was given: a folder, a list, or ``dataset:NAME`` for the training images of a data set,
            whose validation images are kept out.
        excluded: folders or lists (a test split) of which no image may be in the pool.
        share: of the images kept out of a folder or list.

    Raises:
        UserError: no images, too few different ones, or one of ``excluded`` among them.
    """
    if word.startswith(DATASET):
        dataset = load_dataset(word.removeprefix(DATASET))
        if dataset.val is None:
            raise UserError(f"--images {word}: the data set has no validation images to keep out; name a folder")
        tables = [dataset.train, dataset.val]
        hashes = [hash_images(table).hex() for table in tables]
    else:
        whole = open_table(word, "--images")
        contents = hash_images(whole).hex()
        first = {content: row for row, content in reversed(list(enumerate(contents)))}
        if len(first) < len(whole):
            log.info(
                "%s: %d of %d files are copies of others: each is taken once", word, len(whole) - len(first), len(whole)
            )
        # by the order of the hashes: the same images on every machine, whatever the files are called
        order = [first[content] for content in sorted(first)]
        count = min(MOST_KEPT_OUT, max(4, round(share * len(order))))
        positions = [sorted(order[count:]), sorted(order[:count])]
        tables = [whole.take(rows) for rows in positions]
        hashes = [[contents[row] for row in rows] for rows in positions]
    count = sum(map(len, tables))
    if count < MINIMUM:
        raise UserError(f"--images {word} holds {count} different images: expected at least {MINIMUM}; add more")
    refuse_excluded([*zip(hashes[0], tables[0].keys), *zip(hashes[1], tables[1].keys)], excluded)
    return Pool(*tables, sha256_text("\n".join(["train", *hashes[0], "kept out", *hashes[1]])))


def refuse_excluded(images: Sequence[tuple[str, str]], excluded: Sequence[str]) -> None:
    """Checks that no image of ``excluded`` is among ``images`` (content hash, name).

    Raises:
        UserError: some are; the first is named.
    """
    for word in excluded:
        table = open_table(word, "--exclude")
        theirs = dict(zip(hash_images(table).hex(), table.keys, strict=True))
        shared = [(name, theirs[content]) for content, name in images if content in theirs]
        if shared:
            raise UserError(
                f"--images holds {len(shared)} of the images of --exclude {word} ({shared[0][0]} is its {shared[0][1]}): "
                "remove them, because results on images that the base model was trained on mean nothing"
            )


def is_greyscale(table: ImageTable, sample: int = 64) -> bool:
    """Whether red, green and blue are equal in images taken evenly from the table."""
    rows = np.unique(np.linspace(0, len(table) - 1, sample).round().astype(int))
    return all(np.ptp(np.asarray(table.image(int(row))).astype(np.int16), axis=2).max() <= 8 for row in rows)


def pixel_file(table: ImageTable, size: int, channels: int, path: Path, factor: float = 1) -> np.ndarray:
    """Pixels of a table in a file made once and mapped into memory.

    Args:
        table: N images.
        size: side of the images in pixels; those smaller than that are reported.
        channels: 1 for greyscale, else 3.
        path: of the file.
        factor: enlargement.

    Returns:
        uint8 ``(N, factor * size, factor * size, channels)``.
    """
    side = round(factor * size)
    shape = (len(table), side, side, channels)
    if open_array(path, np.uint8, shape) is None:
        small, smallest = 0, size
        with atomic_path(path) as temporary:
            pixels = create_array(temporary, np.uint8, shape)
            for row in range(len(table)):
                image = table.image(row)
                small, smallest = small + (min(image.size) < size), min(smallest, *image.size)
                resized = fit(image, side)
                pixels[row] = np.asarray(resized if channels == 3 else resized.convert("L")).reshape(shape[1:])
            pixels.flush()
        if small and factor == 1:
            log.warning(
                "--size %d: %d of the %d %s images are smaller, the smallest %d px: they are enlarged, which adds no detail",
                size,
                small,
                len(table),
                path.stem,
                smallest,
            )
    return open_array(path, np.uint8, shape)
