"""The specification of a data set, and the conditions on its splits.

A module per data set declares one :class:`DatasetSpec`. Its ``read`` is a plain function, usually one of
:mod:`semantic_aug.datasets.readers` with its arguments bound, that returns the splits it has.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from semantic_aug import registry
from semantic_aug.datasets.table import ImageTable
from semantic_aug.errors import UserError

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
"""Folder and split names taken for each split, in any letter case."""
Splits = dict[str, ImageTable]
SHOT_THRESHOLDS = (100, 20)
"""Training images above which a class is a many-shot one, and below which a few-shot one (Liu et al. 2019)."""


@dataclass(frozen=True)
class DatasetSpec:
    """One image-classification data set.

    Attributes:
        name: the value of ``--dataset``; it also names the registry section and the output folders.
        read: returns the splits the source has, a subset of :data:`SPLITS` that contains ``train``.
        read_official: the same from the folder of an unpacked official download.
        read_half: the same under ``--split half``, for data sets that the Diff-Mix authors split so themselves.
        super_class: the kind of all classes ("bird"); appended to the class in prompts. May be empty.
        class_name_rules: clean-up of the source's class names for prompts (:data:`semantic_aug.prompts.RULES`).
        class_name_overrides: source class name -> name used in prompts, applied instead of the rules.
        license: of the images.
        citation: the paper to cite.
        homepage: the page to download it from.
        hub: hub ids of the training and of the test split, or one id of both, read where no local copy is named.
        hub_test_split: the hub's name of the test split.
        group_names: meaning of the values of the tables' ``group`` column, where they have one.
        torchvision: class of ``torchvision.datasets`` that downloads the official files, and the folder it makes of them.
        archive: address of the archive that holds the official files, and the folder that unpacking it makes.
        shot_thresholds: those with which results on the data set are published, see :data:`SHOT_THRESHOLDS`.
        about: what it is and how to get it, the module's own docstring.
        former_name: the name that earlier versions made from the path, whose registry sections are still read.
    """

    name: str
    read: Callable[[], Splits]
    super_class: str = ""
    class_name_rules: tuple[str, ...] = ("underscores",)
    class_name_overrides: Mapping[str, str] = field(default_factory=dict)
    license: str = "not stated"
    citation: str = ""
    homepage: str = ""
    hub: tuple[str, ...] = ()
    hub_test_split: str = "test"
    group_names: tuple[str, ...] = ()
    torchvision: tuple[str, str] | None = None
    archive: tuple[str, str] | None = None
    shot_thresholds: tuple[int, int] = SHOT_THRESHOLDS
    read_official: Callable[[Path], Splits] | None = None
    read_half: Callable[[], Splits] | None = None
    about: str = ""
    former_name: str = ""

    @property
    def variables(self) -> tuple[str, ...]:
        """The environment variables that name copies: ``{NAME}_ROOT`` the unpacked official download and, of a data set of
        the hub, ``{NAME}_HUG_LOCAL_IMAGE_{TRAIN,TEST}_DIR`` copies in the hub's format."""
        names = ("ROOT", *(f"HUG_LOCAL_IMAGE_{split}_DIR" for split in ("TRAIN", "TEST") if self.hub))
        return tuple(f"{self.name.upper()}_{name}" for name in names if self.read_official)

    def section(self, file: str, key: str, config_dir: Path = registry.CONFIG_DIR) -> str:
        """The section of a registry file to look ``key`` up in: the one of this name, or of the name that earlier versions
        made from the path where only that has the key. What an entry was made from is checked by whoever reads it."""
        former, key = self.former_name, key.partition("#")[0]
        keys = partial(registry.keys, file=file, config_dir=config_dir)
        if former in ("", self.name) or key in keys(self.name) or key not in keys(former):
            return self.name
        log.info("%s of %s is taken from section '%s', the name given to this path before", key, file, former)
        return former


def split_of(name: str) -> str | None:
    """The split that a folder's or hub split's name stands for, or None."""
    return next((ours for ours, names in SPLIT_NAMES.items() if name.casefold() in names), None)


def unify(tables: Splits, fixed: str | None = None) -> Splits:
    """Brings all splits to one class list, in the order of the training split's. Classes that only other splits have are
    appended or, where one split is ``fixed``, refused. Raises UserError: a split has a class that the fixed one lacks."""
    names: dict[str, None] = {}
    for split in sorted(tables, key=SPLITS.index):
        for name in tables[split].class_names:
            if name not in names and fixed and split != fixed:
                raise UserError(
                    f"split {split} has the class '{name}', which split {fixed} lacks: "
                    "every class needs training images"
                )
            names.setdefault(name)
    return {split: table.relabelled(tuple(names)) for split, table in tables.items()}


def check_classes(tables: Splits, name: str) -> None:
    """Refuses a data set that cannot be trained on. Raises UserError: fewer than two classes, or no training image at all."""
    train = tables["train"]
    if len(train.class_names) < 2:
        shown = train.class_names
        raise UserError(f"data set {name} has {len(shown)} class ({', '.join(shown)}): expected at least two")
    if len(train) == 0:
        raise UserError(f"data set {name} has no training image")
