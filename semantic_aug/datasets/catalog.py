"""From the word given to ``--dataset`` to the splits of a data set under a setting.

The word is a registered name, a name of ``config/datasets.yaml``, or ``folder:PATH``, ``csv:PATH``, ``hf:ID``.
"""

from __future__ import annotations

import functools
import importlib
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from semantic_aug import registry
from semantic_aug.datasets import sets
from semantic_aug.datasets.readers.folder import read_folder
from semantic_aug.datasets.readers.hub import parse_id, read_hub_id
from semantic_aug.datasets.readers.listing import read_listing
from semantic_aug.datasets.settings import Setting
from semantic_aug.datasets.spec import DatasetSpec, Splits, check_classes
from semantic_aug.datasets.subsets import apply_setting, few_shot, hold_out
from semantic_aug.datasets.table import ImageTable, refuse_missing
from semantic_aug.errors import UserError, unknown
from semantic_aug.files import home_expanded
from semantic_aug.meta_csv import hashed_slug, slug, slugs
from semantic_aug.prompts import RULES, ClassIndex, clean_class_name

log = logging.getLogger(__name__)

_SCHEMES = ("folder", "csv", "hf")
_TEXTS = "folder csv root hub local config image_column label_column super_class license citation homepage".split()
_ENTRY_FIELDS = {**dict.fromkeys(_TEXTS, str), "class_name_rules": list, "class_names": dict}
"""Types of the fields, see :func:`semantic_aug.registry.fields`."""


@dataclass(frozen=True)
class LoadedDataset:
    """A data set under one setting.

    Attributes:
        source_names: class names as the source spells them; the ones ``meta.csv`` records.
        class_names: the same cleaned up, as they stand in prompts; all different.
        folders: folder name of each class, safe and unique.
        train: training images of the setting.
        val: validation images, from the source or held out of train; None with ``val_fraction`` 0.
        test: test images, or None where the source has none.
        unlabelled: further images without labels, where a command was given some; see
            :mod:`semantic_aug.datasets.unlabelled`.
    """

    spec: DatasetSpec
    setting: Setting
    source_names: tuple[str, ...]
    class_names: tuple[str, ...]
    folders: tuple[str, ...]
    train: ImageTable
    val: ImageTable | None
    test: ImageTable | None
    unlabelled: ImageTable | None = None

    @property
    def name(self) -> str:
        """The data set's name in the registry and in output folders."""
        return self.spec.name

    def subsets(self, key: str, config_dir: Path = registry.CONFIG_DIR) -> list[str]:
        """The folders of the synthetic subset(s) that ``synthetic_datasets.yaml`` has under ``key``."""
        return registry.subsets(self.spec.section(registry.SUBSETS, key, config_dir), key, config_dir)

    def tested_on(self, word: str, config_dir: Path = registry.CONFIG_DIR) -> LoadedDataset:
        """The data set with the test images and groups of another one, whose classes are found here by name. Raises UserError:
        the other has no test split, or a class with test images that is not among these."""
        spec, splits = read_splits(word, config_dir)
        if "test" not in splits:
            raise UserError(f"--test_dataset {word}: it has no test split; expected a data set with one")
        table, where = splits["test"], f"--test_dataset {word}"
        refuse_missing({"test": table}, spec.name)
        classes = ClassIndex(self.source_names, self.class_names)
        positions = classes.match(table.class_names, prompt_names(table.class_names, spec), where=where)
        for name, position, images in zip(table.class_names, positions, table.counts(), strict=True):
            if position is None and images:
                raise unknown(f"class of {where}", name, self.source_names, f"it is none of {self.name}'s")
        labels = np.array([-1 if position is None else position for position in positions])[table.labels]
        test = replace(table, class_names=self.source_names, labels=labels)
        return replace(self, spec=replace(self.spec, group_names=spec.group_names), test=test)

    def describe(self) -> str:
        """One line: classes and images of each split, and how to bound a validation set larger than a few-shot train."""
        parts = [
            f"{split} {len(t)}" for split, t in (("train", self.train), ("val", self.val), ("test", self.test)) if t
        ]
        few = self.setting.examples_per_class > 0 and self.val is not None and len(self.val) > len(self.train)
        bound = " (more validation than training images: --val_examples_per_class N bounds them)" if few else ""
        return f"{self.name}{self.setting.suffix}: {len(self.class_names)} classes, images: {', '.join(parts)}{bound}"


def known_names(config_dir: Path = registry.CONFIG_DIR) -> list[str]:
    """Every name ``--dataset`` takes, without the ``scheme:PATH`` forms."""
    return sorted({*sets.NAMES, *registry.read_yaml(config_dir / registry.DATASETS)})


def find_spec(word: str, config_dir: Path = registry.CONFIG_DIR) -> DatasetSpec:
    """The spec of a ``--dataset`` word. Raises UserError: an unknown name or scheme, or a damaged entry of
    ``datasets.yaml``."""
    scheme, colon, rest = word.partition(":")
    if colon:
        if scheme not in _SCHEMES or not rest:
            raise unknown("data set scheme", scheme, _SCHEMES, "expected folder:PATH, csv:PATH or hf:ID")
        field = "hub" if scheme == "hf" else scheme
        entry = {field: rest if scheme == "hf" else str(home_expanded(rest).absolute())}
        former = slug(rest.replace("/", "-") if scheme == "hf" else home_expanded(rest).absolute().stem)
        return replace(spec_of_entry(default_name(scheme, rest), entry), former_name=former)
    entries = registry.read_yaml(config_dir / registry.DATASETS)
    if word in entries:
        return spec_of_entry(word, entries[word])
    if word in sets.NAMES:
        return importlib.import_module(f"semantic_aug.datasets.sets.{word}").SPEC
    where = (
        f"add it to {registry.shown_path(config_dir / registry.DATASETS)}, or give --dataset folder:PATH, "
        "csv:PATH or hf:ID"
    )
    raise unknown("data set", word, known_names(config_dir), where)


def default_name(scheme: str, rest: str) -> str:
    """The name of a data set given as ``scheme:rest``: readable, and another one for another path or hub id.

    A path's name is its last part (of a list the folder's name, too) and six digits of the hash of the whole path, links
    resolved; so a data set that is moved gets another default name, and a name in ``datasets.yaml`` is the stable way. A hub
    id's name has such digits only where another id could have the same name without them.
    """
    rest, config = parse_id(rest) if scheme == "hf" else (rest, None)
    path = home_expanded(rest)
    if scheme == "hf" and not path.exists():
        rest = f"{rest}:{config}" if config else rest
        plain = slug(rest.replace("/", "-"))
        unique = plain.replace("-", "/", 1) == rest and plain not in sets.NAMES
        return plain if unique else hashed_slug(rest.replace("/", "-"), rest)
    path = path.resolve()
    readable = f"{path.parent.name}-{path.stem}" if scheme == "csv" else path.name
    if config:
        return hashed_slug(f"{readable}-{config}", f"{path}:{config}", empty="data")
    return hashed_slug(readable, str(path), empty="data")


def spec_of_entry(name: str, entry: Any) -> DatasetSpec:
    """The spec an entry of ``datasets.yaml`` describes. Raises UserError: not a mapping, an unknown field, or not exactly one
    of ``folder``, ``csv``, ``hub``."""
    where = f"entry '{name}' of {registry.DATASETS}"
    entry = registry.fields(entry, _ENTRY_FIELDS, where, "a mapping with one of folder, csv or hub")
    given = [field for field in ("folder", "csv", "hub") if entry.get(field)]
    if len(given) != 1:
        raise UserError(f"{where} names {' and '.join(given) or 'no source'}: expected exactly one of folder, csv, hub")
    if given == ["folder"]:
        read = functools.partial(read_folder, registry.resolve_path(entry["folder"]))
    elif given == ["csv"]:
        root = registry.resolve_path(entry["root"]) if entry.get("root") else None
        read = functools.partial(read_listing, registry.resolve_path(entry["csv"]), root)
    else:
        local = registry.resolve_path(entry["local"]) if entry.get("local") else None
        columns = entry.get("image_column"), entry.get("label_column")
        read = functools.partial(read_hub_id, entry["hub"], local, *columns, entry.get("config"))
    rules = tuple(entry.get("class_name_rules", ("underscores",)))
    for rule in rules:
        if rule not in RULES:
            raise unknown(f"class_name_rules in {where}", rule, RULES, "correct the entry")
    texts = {field: entry.get(field, "") for field in ("super_class", "citation", "homepage")}
    return DatasetSpec(
        name=name,
        read=read,
        class_name_rules=rules,
        class_name_overrides=entry.get("class_names", {}),
        license=entry.get("license", "not stated"),
        hub=(entry["hub"],) if "hub" in entry else (),
        **texts,
    )


def read_splits(
    word: str, config_dir: Path = registry.CONFIG_DIR, split: str = "official"
) -> tuple[DatasetSpec, Splits]:
    """A data set's spec and its splits as the source has them, before any setting. Raises UserError: it has no such
    ``--split``; see :func:`find_spec` and :mod:`semantic_aug.datasets.readers`."""
    spec = find_spec(word, config_dir)
    if split == "half" and spec.read_half is None:
        raise UserError(
            f"--split half: the Diff-Mix authors take the official split of {spec.name}; give --split official"
        )
    splits = spec.read_half() if split == "half" else spec.read()
    check_classes(splits, spec.name)
    splits = {name: table for name, table in splits.items() if len(table)}
    if names := splits["train"].group_names:  # of a list
        spec = replace(spec, group_names=names)
    return spec, splits


def load_dataset(word: str, setting: Setting | None = None, config_dir: Path = registry.CONFIG_DIR) -> LoadedDataset:
    """A data set under a setting. Raises UserError: see :func:`find_spec` and :mod:`semantic_aug.datasets.readers`."""
    setting = setting or Setting()
    spec, splits = read_splits(word, config_dir, setting.split)
    refuse_missing(splits, spec.name)
    train, val = splits["train"], splits.get("val")
    if val is None:
        train, val = hold_out(train, setting.val_fraction, setting.subset_seed)
    if val is not None:
        val = few_shot(val, setting.val_examples_per_class, setting.subset_seed, "few-shot validation")
    counts = train.counts()
    _warn_of(spec, train, counts == 0, "have no training image", "nothing will be learned of them")
    few, wanted = (counts > 0) & (counts < setting.examples_per_class), setting.examples_per_class
    _warn_of(spec, train, few, f"have fewer than {wanted} training images", "all of theirs are used")
    return LoadedDataset(
        spec=spec,
        setting=setting,
        source_names=train.class_names,
        class_names=prompt_names(train.class_names, spec),
        folders=tuple(slugs(train.class_names)),
        train=apply_setting(train, setting),
        val=val,
        test=splits.get("test"),
    )


def _warn_of(spec: DatasetSpec, train: ImageTable, concerned: np.ndarray, what: str, consequence: str) -> None:
    """Warns of classes; ``concerned`` is bool ``(K,)``."""
    if concerned.any():
        first = train.class_names[int(np.argmax(concerned))]
        values = spec.name, concerned.sum(), len(concerned), what, first, consequence
        log.warning("%s: %d of %d classes %s ('%s' the first): %s", *values)


def prompt_names(names: tuple[str, ...], spec: DatasetSpec) -> tuple[str, ...]:
    """Class names cleaned up for prompts; two that coincide after the clean-up keep their source spelling. Raises UserError: a
    name is to be replaced that no class has."""
    for name in spec.class_name_overrides:
        if name not in names:
            raise unknown(
                f"class in class_names of data set {spec.name}",
                name,
                names,
                f"correct the entry in {registry.DATASETS}",
            )
    cleaned = [clean_class_name(name, spec.class_name_rules, spec.class_name_overrides) for name in names]
    twice = {name for name in cleaned if cleaned.count(name) > 1}
    if twice:
        log.warning(
            "%s: class names that coincide after the clean-up keep the source's spelling: %s",
            spec.name,
            ", ".join(sorted(twice)[:5]),
        )
    return tuple(raw if name in twice else name for raw, name in zip(names, cleaned, strict=True))
