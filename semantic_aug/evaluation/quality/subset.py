"""Synthetic subsets as evaluation looks at them: named, with the real image each was made from where that is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from semantic_aug import meta_csv, registry
from semantic_aug.datasets import LoadedDataset
from semantic_aug.datasets.synthetic import SyntheticImages, locate, read_subsets
from semantic_aug.errors import UserError

SOURCE_COLUMN = "Source Image"


@dataclass(frozen=True)
class Subset:
    """One or several folders under one name, ``M`` images in all.

    Attributes:
        name: key or folder, as the tables show it.
        folders: as given, a ``#variant`` included.
        images: paths, classes and strengths.
        sources: int64 ``(M,)``, each image's source as a row of the data set's training images; -1: not known.
    """

    name: str
    folders: tuple[str, ...]
    images: SyntheticImages
    sources: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    @property
    def strengths(self) -> np.ndarray:
        """``(M,)`` strengths to group by: two decimals, or one where that leaves more than 20 different ones."""
        rounded = np.round(self.images.strength, 2)
        return rounded if len(np.unique(rounded)) <= 20 else np.round(self.images.strength, 1)


def open_subset(name: str, folders: Sequence[str], dataset: LoadedDataset, allow_other_sources: bool = False) -> Subset:
    """Reads the folders of one name.

    Raises:
        UserError: see :func:`semantic_aug.datasets.synthetic.read_subset`.
    """
    images = read_subsets(folders, dataset, allow_other_sources)
    rows, sources = {key: row for row, key in enumerate(dataset.train.keys)}, []
    for folder in folders:
        table = meta_csv.read(locate(folder)[1])
        keys = table.further.get(SOURCE_COLUMN, [None] * len(table))
        sources += [rows.get(str(key), -1) for key in keys]
    return Subset(name, tuple(map(str, folders)), images, np.asarray(sources, np.int64))


def open_subsets(
    keys: Sequence[str],
    folders: Sequence[str],
    dataset: LoadedDataset,
    config_dir: Path = registry.CONFIG_DIR,
    allow_other_sources: bool = False,
) -> list[Subset]:
    """The subsets of some registry keys, then those of some folders, each under a name of its own.

    Raises:
        UserError: none at all, one given twice, an unknown key, or a subset that cannot be read.
    """
    named = {key: dataset.subsets(key, config_dir) for key in keys}
    short = [Path(folder).name for folder in folders]
    for folder, name in zip(folders, short, strict=True):
        name = name if short.count(name) == 1 and name not in named else str(folder)
        if name in named:
            raise UserError(f"subset {folder} is given twice: expected each of --syndata_key, --syndata_dir once")
        named[name] = [folder]
    if not named:
        raise UserError("no synthetic subset is given: expected --syndata_key or --syndata_dir")
    return [open_subset(name, places, dataset, allow_other_sources) for name, places in named.items()]
