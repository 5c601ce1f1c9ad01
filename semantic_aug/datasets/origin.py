"""The origin of a run of stages 1 and 3: images, labels, names and weights, recorded beside its arguments."""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from semantic_aug import runs
from semantic_aug.datasets import fingerprint
from semantic_aug.datasets.catalog import LoadedDataset
from semantic_aug.datasets.fingerprint import ContentHashes
from semantic_aug.datasets.spec import SPLITS
from semantic_aug.datasets.synthetic import SyntheticImages
from semantic_aug.errors import UserError
from semantic_aug.prompts import ClassIndex

log = logging.getLogger(__name__)


@dataclass(eq=False)
class RunOrigin:
    """The origin of a run: computed once when it begins, compared with a kept record, checked at its end.

    Attributes:
        splits: that the run reads.
        columns: further columns of the data set that count, see :func:`semantic_aug.datasets.fingerprint.split_identity`.
        synthetic: images of synthetic subsets, or None.
        further: computes further entries of the record, such as weights.
        without: entries of :func:`semantic_aug.datasets.fingerprint.data_identity` that do not concern the stage.
    """

    dataset: LoadedDataset
    splits: Sequence[str] = SPLITS
    columns: Sequence[str] | None = None
    synthetic: SyntheticImages | None = None
    further: Callable[[], Mapping[str, Any]] = dict
    without: Sequence[str] = ()

    def __post_init__(self):
        self._hashes: list[ContentHashes] = []
        self._record: dict[str, Any] | None = None

    def describe(self) -> dict[str, Any]:
        """The record: the data set's under ``data``, ``unlabelled`` and ``synthetic`` images, and what was added."""
        if self._record is None:
            hashes = fingerprint.hash_splits(self.dataset, self.splits)
            data = dict.fromkeys(self.splits) | fingerprint.data_identity(self.dataset, hashes, self.columns)
            self._record = {"data": {name: value for name, value in data.items() if name not in self.without}}
            self._hashes = list(hashes.values())
            if (pool := self.dataset.unlabelled) is not None:
                hashes = fingerprint.hash_images(pool)
                self._record["unlabelled"] = fingerprint.split_identity(pool, hashes.hex())
                self._hashes.append(hashes)
            if self.synthetic is not None:
                hashes = fingerprint.hash_files(self.synthetic.paths, "synthetic images")
                self._record["synthetic"] = synthetic_identity(self.synthetic, hashes, self.dataset.source_names)
                self._hashes.append(hashes)
            self._record |= self.further()
        return self._record

    @staticmethod
    def compare(kept: Mapping[str, Any], present: Mapping[str, Any]) -> str:
        """The difference in words, see :func:`fingerprint.data_difference`; what only the kept record names counts too."""
        return fingerprint.data_difference(kept, {**dict.fromkeys(kept), **present})

    def refuse_changed(self, kept: str) -> None:
        """Refuses to conclude a run whose images changed while it went on; ``kept`` says what remains and what to do. Raises
        UserError: one has another content than when the run began, or is gone."""
        changed = [name for hashes in self._hashes for name in hashes.changed()]
        if changed:
            raise UserError(
                f"{len(changed)} images changed during the run ('{changed[0]}' the first), so that its result "
                f"is of neither the old nor the new ones: {kept}"
            )


def class_order(names: Sequence[str], dataset: LoadedDataset, where: str) -> list[int]:
    """The classifier's output for each of the data set's ``K`` classes; spellings may differ.

    Args:
        names: the classifier's classes, in the order of its outputs.

    Raises:
        UserError: the classifier has other classes, or two classes with one name.
    """
    positions = ClassIndex(names).match(dataset.source_names, dataset.class_names, where=where)
    unmatched = [name for row, name in enumerate(names) if row not in positions]
    unmatched += [name for name, row in zip(dataset.source_names, positions, strict=True) if row is None]
    if unmatched:
        raise UserError(
            f"{where} has {len(names)} classes, which differ from the {len(positions)} of {dataset.name} "
            f"('{unmatched[0]}' is in only one of the two): give the --dataset it was trained on"
        )
    return positions


def check_classifier(run: Path, dataset: LoadedDataset) -> dict[str, str]:
    """Refuses a run of stage 3 that was trained or validated on other images than these, as far as its record tells; returns
    the content of both splits."""
    now = fingerprint.data_identity(dataset, fingerprint.hash_splits(dataset, ("train", "val")), ("group",))
    splits = {split: now.get(split) for split in ("train", "val")}
    kept = ((runs.load_arguments(run) or {}).get(runs.MADE_FROM) or {}).get("data")
    if not kept:
        log.warning("%s does not say which images it was trained on: are they those of this setting?", run)
    elif difference := fingerprint.data_difference(kept, splits):
        raise UserError(
            f"--classifier {run} was trained on other images than those of {dataset.name}{dataset.setting.suffix} "
            f"({difference}): give the stages the same flags of the data (--examples_per_class, --subset_seed, ...)"
        )
    return {split: str((value or {}).get("digest", "")) for split, value in splits.items()}


def synthetic_identity(images: SyntheticImages, hashes: ContentHashes, class_names: Sequence[str]) -> dict[str, Any]:
    """The identity of synthetic images: their number, and digests of labels (source, target, strength, and a teacher's) and
    content, in order."""
    labels, content = hashlib.sha256(), hashlib.sha256(hashes.values.tobytes())
    columns = (images.source.tolist(), images.target.tolist(), images.strength.tolist())
    for source, target, strength in zip(*columns, strict=True):
        labels.update(f"{class_names[source]}\0{class_names[target]}\0{strength!r}\0".encode())
    if images.soft is not None:
        labels.update(images.soft.tobytes())
    if images.source_labels is not None:
        labels.update(np.round(images.source_labels, 9).tobytes())
    return {"images": len(images), "labels": labels.hexdigest()[:32], "content": content.hexdigest()[:32]}
