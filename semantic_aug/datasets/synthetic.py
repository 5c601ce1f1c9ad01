"""Synthetic subsets as training data: ``meta.csv`` read against a data set's classes, and the soft labels.

A subset is a folder with ``meta.csv`` and ``data/``, made by stage 2 or by another tool (five columns). ``FOLDER#NAME``
reads ``meta-NAME.csv`` instead, the same images after a filter.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from semantic_aug import meta_csv, registry, runs
from semantic_aug.datasets.catalog import LoadedDataset
from semantic_aug.datasets.fingerprint import by_content, hash_images
from semantic_aug.datasets.images import open_image
from semantic_aug.datasets.settings import ABSENT, Setting
from semantic_aug.datasets.table import file_stamp, missing_paths
from semantic_aug.errors import UserError, nearest_first, unknown
from semantic_aug.files import atomic_path
from semantic_aug.prompts import ClassIndex
from semantic_aug.seeding import numpy_rng
from semantic_aug.tensors import load_arrays

DATA, CONFIG_FILE = "data", "config.yaml"
SOURCES_FILE = ".sources.npz"
"""Names and content hashes of the training images that a subset of ours was made from, those of its sources among them."""
UNLABELLED_FILE = ".unlabelled.npz"
"""Names and content hashes of the unlabelled images."""
POOL_PREFIX = "unlabelled:"
"""Stands before the name of an unlabelled source."""
NOISE_FLAGS = "--corrupt_prob, --corrupt_classes and --subset_seed"


def soft_labels(
    source: np.ndarray, target: np.ndarray, strength: np.ndarray, gamma: float, num_classes: int
) -> np.ndarray:
    """y = (1 - s^gamma) onehot(source) + s^gamma onehot(target) (Diff-Mix, Wang et al. 2024, eq. 4).

    Args:
        source: int ``(N,)`` source classes, or what is known of them, ``(N, K)`` with rows summing to one.
        target: int ``(N,)`` target classes.
        strength: ``(N,)`` in (0, 1].
        gamma: above 0; small values trust the target more.
        num_classes: K.

    Returns:
        float32 ``(N, K)``, rows summing to one.
    """
    weight, source = np.asarray(strength, np.float64) ** gamma, np.asarray(source)
    labels = np.zeros((len(weight), num_classes))
    rows = np.arange(len(weight))
    if source.ndim == 2:
        labels += (1 - weight)[:, None] * source
    else:
        np.add.at(labels, (rows, source), 1 - weight)
    np.add.at(labels, (rows, target), weight)
    return labels.astype(np.float32)


@dataclass(frozen=True)
class SyntheticImages:
    """Images of one or several subsets, ``M`` in all.

    Attributes:
        source: int64 ``(M,)``, class index of the data set; of an unlabelled source the most probable class, or the target
            where it may be any.
        target: int64 ``(M,)``.
        strength: float64 ``(M,)`` in (0, 1].
        sources: object ``(M, S)``, key of each source image (after :data:`POOL_PREFIX` of an unlabelled one), empty where none
            is recorded; None where nobody asked.
        soft: float32 ``(M, K)``, labels that stand instead of those by strength; None: these.
        source_labels: float32 ``(M, K)``, what is known of the sources' classes, rows summing to one; None where all are known.
    """

    paths: list[Path]
    source: np.ndarray
    target: np.ndarray
    strength: np.ndarray
    sources: np.ndarray | None = None
    soft: np.ndarray | None = None
    source_labels: np.ndarray | None = None

    @classmethod
    def joined(cls, parts: Sequence[SyntheticImages]) -> SyntheticImages:
        """The images of several subsets as one."""
        known = [part.source_labels for part in parts if part.source_labels is not None]
        names = ("source", "target", "strength", "sources")
        columns = {n: np.concatenate([getattr(p, n) for p in parts]) for n in names if getattr(parts[0], n) is not None}
        if known:
            one_hot = np.eye(known[0].shape[1], dtype=np.float32)
            rows = [one_hot[part.source] if part.source_labels is None else part.source_labels for part in parts]
            columns["source_labels"] = np.concatenate(rows)
        return cls([path for part in parts for path in part.paths], **columns)

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int) -> Image.Image:
        """The decoded image, PIL RGB."""
        return open_image(self.paths[index])

    @property
    def of_any_class(self) -> np.ndarray:
        """bool ``(M,)``, images whose source may be of any class; their ``source`` is the target."""
        if self.source_labels is None:
            return np.zeros(len(self), bool)
        return self.source_labels.max(1) == self.source_labels.min(1)

    def source_text(self, row: int, class_names: Sequence[str]) -> str:
        """The class of an image's source; of an unlabelled one ``unlabelled``, with its most probable class where one is."""
        known = None if self.source_labels is None else self.source_labels[row]
        if known is None or known.max() == 1:
            return class_names[self.source[row]]
        probable = f" ({class_names[known.argmax()]} {known.max():.2f})" if known.max() > known.min() else ""
        return f"unlabelled{probable}"

    def signature(self) -> str:
        """SHA-256 of paths and stamps of all files: equal signatures mean the same images."""
        digest = hashlib.sha256()
        for path in self.paths:
            digest.update(f"{path}\0{file_stamp(path)}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def labels(self, gamma: float, num_classes: int) -> np.ndarray:
        """Soft labels float32 ``(M, K)``, rows summing to one."""
        if self.soft is not None:
            return self.soft
        source = self.source if self.source_labels is None else self.source_labels
        return soft_labels(source, self.target, self.strength, gamma, num_classes)

    def take(self, rows: np.ndarray) -> SyntheticImages:
        """The images at some rows."""
        paths = [self.paths[i] for i in np.asarray(rows).tolist()]
        columns = (self.source, self.target, self.strength, self.sources, self.soft, self.source_labels)
        return SyntheticImages(paths, *(None if column is None else column[rows] for column in columns))

    def with_targets(self, number: int, class_names: Sequence[str], seed: int = 0) -> SyntheticImages:
        """The images of only some target classes of each source class; sources that may be of any class count as one more.

        Each source class draws among the target classes it was translated to with a generator of its own, keyed by its
        name; a larger number contains a smaller one's classes.

        Args:
            number: target classes kept of each source class, 1 or more; all where there are not that many.
            class_names: of the data set, in label order.
        """
        keep, names = np.zeros(len(self), bool), [*class_names, meta_csv.EVEN]
        sources = np.where(self.of_any_class, len(class_names), self.source)
        for source in np.unique(sources):
            rows = sources == source
            candidates = sorted(np.unique(self.target[rows]).tolist(), key=lambda label: class_names[label])
            drawn = numpy_rng(seed, "target classes", names[source]).permutation(len(candidates))[:number]
            keep |= rows & np.isin(self.target, np.asarray(candidates)[drawn])
        return self.take(np.flatnonzero(keep))

    def at_most(self, number: int, seed: int = 0) -> SyntheticImages:
        """``number`` of the images, or all where there are fewer, as even over the target classes as they allow; a larger
        number contains a smaller one's."""
        rng = numpy_rng(seed, "share of a subset")
        shuffled = rng.permutation(len(self))
        by_target = shuffled[np.argsort(self.target[shuffled], kind="stable")]
        counts = np.bincount(self.target)
        turn = np.empty(len(self), np.int64)  # position of each image among those of its class
        turn[by_target] = np.arange(len(self)) - np.repeat(np.cumsum(counts) - counts, counts)
        order = np.lexsort((rng.permutation(len(self)), turn))
        return self.take(np.sort(order[:number]))


def read_subset(
    folder: str | os.PathLike, dataset: LoadedDataset, allow_other_sources: bool = False
) -> SyntheticImages:
    """Reads one subset.

    Args:
        folder: of the subset; ``#NAME`` at its end chooses ``meta-NAME.csv``.
        allow_other_sources: accept images whose sources are not training images of the data set's setting.

    Raises:
        UserError: no such folder, an empty subset, a class that is not the data set's, an image that is missing or lies
            outside the folder, or sources from outside the training images (a leak into validation or test), under another
            label (true ones where the setting has noisy labels) or with another content than when the subset was made
            (another data set of the same names).
    """
    root, file = locate(folder)
    if not file.is_file() and (root / CONFIG_FILE).is_file():
        raise UserError(f"synthetic subset {root} is unfinished (no {file.name}): run its sample_mp.py command again")
    table = meta_csv.read(file)
    if len(table) == 0:
        raise UserError(f"synthetic subset {file} is empty: run its sample_mp.py command again")
    position = _positions(table.class_names, dataset, file)
    paths = _paths(root / DATA, table.path, file)
    if not allow_other_sources:
        recorded_sources = _sources(table)
        _check_sources(recorded_sources, dataset, file)
        _check_labels(recorded_sources, position, dataset, file)
        _check_noise(root, table, dataset, file)
        _check_content(root, recorded_sources, dataset, file)
        _check_generator(root, dataset, file)
        _check_unlabelled(root, table, dataset, file)
    sources = np.full((len(table), len(meta_csv.SOURCE_COLUMNS)), "", object)
    for column, name in enumerate(meta_csv.SOURCE_COLUMNS):
        if name in table.further:
            sources[:, column] = [str(key) for key in table.further[name]]
    for row, key in enumerate(table.further.get(meta_csv.UNLABELLED_COLUMNS[0], ())):
        if key:
            sources[row, 0] = f"{POOL_PREFIX}{key}"
    classes, known = (position[table.source], position[table.target]), _source_labels(table, dataset, file)
    return SyntheticImages(paths, *classes, table.strength, sources, source_labels=known)


def locate(folder: str | os.PathLike) -> tuple[Path, Path]:
    """The folder of a subset and the file that lists its images, which need not exist; ``#NAME`` at the end chooses
    ``meta-NAME.csv``. Raises UserError: no such folder, or no such variant; lists the variants."""
    path, variant = registry.part_variant(str(folder))
    root = registry.resolve_path(path)
    if not root.is_dir():
        raise UserError(
            f"synthetic subset {path} is not a folder (looked at {root}): make it with sample_mp.py, or correct the "
            f"entry in {registry.SUBSETS}"
        )
    return root, _table_file(root, variant)


def subset_record(root: Path) -> dict[str, Any]:
    """The record of a subset of stage 2, its ``config.yaml``; empty for a subset made elsewhere."""
    record: dict[str, Any] = {}
    with contextlib.suppress(UserError):  # another tool's file, which need not be YAML
        record = runs.load_arguments(root, CONFIG_FILE) or {}
    return record if isinstance(record.get("arguments"), Mapping) else {}


def is_pseudo_labelled(root: Path) -> bool:
    """Whether a subset holds unlabelled photographs as they are, under the labels of a classifier: it lists their contents, and
    stage 2, which lists those that it translates, writes a record besides."""
    return (root / UNLABELLED_FILE).is_file() and not (root / CONFIG_FILE).is_file()


def read_subsets(
    folders: Sequence[str | os.PathLike], dataset: LoadedDataset, allow_other_sources: bool = False
) -> SyntheticImages:
    """Reads several subsets as one; see :func:`read_subset`."""
    return SyntheticImages.joined([read_subset(folder, dataset, allow_other_sources) for folder in folders])


def _table_file(root: Path, variant: str) -> Path:
    """The table of a variant: ``meta-{variant}.csv``, or ``meta.csv``.

    A dot or, as the original's filter writes it, an underscore may stand instead of the hyphen (``meta_10-100per.csv``).
    """
    if not variant:
        return root / meta_csv.FILE_NAME
    for separator in ("-", "_", "."):
        if (file := root / f"meta{separator}{variant}.csv").is_file():
            return file
    variants = sorted(file.stem[len("meta") + 1 :] for file in root.glob("meta[-_.]*.csv"))
    where = f"expected a file meta-{variant}.csv there, as the filter makes it"
    raise unknown(f"variant of synthetic subset {root}", variant, variants, where)


def _positions(names: Sequence[str], dataset: LoadedDataset, file: Path) -> np.ndarray:
    """Index of each class name in the data set, by any of its spellings."""
    classes = ClassIndex(dataset.source_names, dataset.class_names)
    positions = [classes.find(name, where=str(file)) for name in names]
    for name, position in zip(names, positions, strict=True):
        if position is None:
            raise UserError(
                f"{file} has the class '{name}', which data set {dataset.name} does not have (nearest: "
                f"'{nearest_first(name, dataset.source_names)[0]}'): it belongs to another data set"
            )
    return np.asarray(positions, dtype=np.int64)


def _source_labels(table: meta_csv.MetaTable, dataset: LoadedDataset, file: Path) -> np.ndarray | None:
    """The weights of the sources' possible classes, ``(M, K)``; None where all sources are labelled."""
    row, labels = meta_csv.source_labels(table, file)
    if not labels:
        return None
    names = sorted({*table.class_names, *(name for label in labels for name in label)})
    position = dict(zip(names, _positions(names, dataset, file).tolist(), strict=True))
    count = len(dataset.source_names)
    known = np.zeros((len(labels), count), np.float32)
    for values, label in zip(known, labels, strict=True):
        total = sum(label.values())
        for name, weight in label.items():
            values[position[name]] += weight / total
        if not label:
            values[:] = 1 / count
    of_class = np.array([position[name] for name in table.class_names])[table.source]
    labelled, images = row < 0, np.empty((len(row), count), np.float32)
    images[~labelled] = known[row[~labelled]]
    images[labelled] = np.eye(count, dtype=np.float32)[of_class[labelled]]
    return images


def _paths(data: Path, relative: Sequence[str], file: Path) -> list[Path]:
    root = os.path.abspath(data)  # links are left alone: resolving a million would take minutes
    paths = [os.path.normpath(os.path.join(root, text)) for text in relative]
    for row, path in enumerate(paths):
        if not path.startswith(root + os.sep):
            raise UserError(f"{file} row {row + 2}: path '{relative[row]}' leads outside {data}")
    if missing := missing_paths(paths.__getitem__, len(paths)):
        raise UserError(
            f"{file} row {missing[0] + 2}: image {paths[missing[0]]} is missing; run the command that made the subset "
            "again, or remove the row"
        )
    return list(map(Path, paths))


def _sources(table: meta_csv.MetaTable) -> list[tuple[str, int]]:
    """Each training image from which an image was made, with its class as a position among the table's names: of a source
    that of the source, of its partner the target's."""
    columns = zip(meta_csv.SOURCE_COLUMNS, (table.source, table.target), strict=True)
    cells = ((table.further[name], classes.tolist()) for name, classes in columns if name in table.further)
    return list(dict.fromkeys((str(key), label) for pair in cells for key, label in zip(*pair, strict=True) if key))


def _check_sources(sources: Sequence[tuple[str, int]], dataset: LoadedDataset, file: Path) -> None:
    used = {key for key, _ in sources}
    unexpected = used - set(dataset.train.keys)
    if unexpected:
        held = {"validation": dataset.val, "test": dataset.test}
        where = next(
            (f", a {n} image" for n, part in held.items() if part is not None and unexpected & set(part.keys)), ""
        )
        raise UserError(
            f"{file}: {len(unexpected)} of {len(used)} source images are not training images of {dataset.name}"
            f"{dataset.setting.suffix} ('{sorted(unexpected)[0]}'{where}): give the stages the same "
            "--examples_per_class, --task, --imbalance_profile, --split, --val_fraction and --subset_seed, or accept it with "
            "--allow_other_sources"
        )


def _check_labels(sources: Sequence[tuple[str, int]], position: np.ndarray, dataset: LoadedDataset, file: Path) -> None:
    label_of = dict(zip(dataset.train.keys, dataset.train.labels.tolist(), strict=True))
    recorded = [(key, int(position[label])) for key, label in sources]
    other = {key: label for key, label in recorded if label_of.get(key, label) != label}
    if other:
        names, (key, label) = dataset.source_names, next(iter(other.items()))
        raise UserError(
            f"{file}: {len(other)} of {len(dict(recorded))} source images have another label in {dataset.name}"
            f"{dataset.setting.suffix} ('{key}': {names[label]} -> {names[label_of[key]]}): give the "
            f"stages the same {NOISE_FLAGS}, or accept it with --allow_other_sources"
        )


def _check_noise(root: Path, table: meta_csv.MetaTable, dataset: LoadedDataset, file: Path) -> None:
    """Compares the label noise of a subset of ours that has no source images, where its strategy starts from noise."""
    if any(table.further.get("Source Image", ())):
        return
    record = subset_record(root)
    if not record:
        return
    changed = runs.differences(_noise_of(record["arguments"]), _noise_of(asdict(dataset.setting)), absent=ABSENT)
    if changed:
        raise UserError(
            f"{file}: it was made under other labels than those of {dataset.name}{dataset.setting.suffix} ({changed[0]}): "
            f"give the stages the same {NOISE_FLAGS}, or accept it with --allow_other_sources"
        )


def _noise_of(setting: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that decide the noisy labels; empty where there are none."""
    if not setting.get("corrupt_prob"):
        return {}
    return {
        name: setting.get(name, getattr(Setting, name)) for name in ("corrupt_prob", "corrupt_classes", "subset_seed")
    }


def _check_content(root: Path, sources: Sequence[tuple[str, int]], dataset: LoadedDataset, file: Path) -> None:
    recorded, used = read_sources(root), {key for key, _ in sources}
    if recorded is None or not used:
        return
    keys, values = recorded
    row_of = {key: row for row, key in enumerate(keys)}
    rows = [row for row, key in enumerate(dataset.train.keys) if key in used and key in row_of]
    images = dataset.train.take(rows)
    now = hash_images(images).values
    present = now.any(axis=1)  # a missing one is reported later
    other = (now != values[[row_of[key] for key in images.keys]]).any(axis=1) & present
    if other.any():
        raise UserError(
            f"{file}: {int(other.sum())} of {len(rows)} source images have another content than when the subset was made "
            f"('{images.keys[int(np.argmax(other))]}' the first): it belongs to another data set, or to an earlier state of "
            "this one; make it again with sample_mp.py, or accept it with --allow_other_sources"
        )


def _check_generator(root: Path, dataset: LoadedDataset, file: Path) -> None:
    """Compares the training images of a fine-tuned model, which images from noise show too, with the images that evaluate."""
    recorded, record = read_sources(root), subset_record(root)
    if recorded is not None and (record.get("lora_sha256") or record.get("tokens_sha256")):
        _refuse_evaluated(recorded, "images on which its generator was trained", dataset, file)


def _check_unlabelled(root: Path, table: meta_csv.MetaTable, dataset: LoadedDataset, file: Path) -> None:
    """Compares the unlabelled sources with the images that evaluate, which another setting may have chosen."""
    used = {str(key) for key in table.further.get(meta_csv.UNLABELLED_COLUMNS[0], ())} - {""}
    if not used:
        return
    recorded = read_sources(root, UNLABELLED_FILE)
    if recorded is None and (root / CONFIG_FILE).is_file():  # no subset made elsewhere
        raise UserError(
            f"{file}: {root / UNLABELLED_FILE}, the list of the unlabelled sources, is missing or damaged, so that nothing "
            "shows that none of them is a validation or test image: run the subset's sample_mp.py command again, or accept it "
            "with --allow_other_sources"
        )
    if recorded is not None:
        _refuse_evaluated(recorded, "unlabelled sources", dataset, file, used)


def _refuse_evaluated(
    recorded: tuple[list[str], np.ndarray], what: str, dataset: LoadedDataset, file: Path, used: set[str] | None = None
) -> None:
    """Refuses recorded images that evaluate, by content: the ``used`` ones under any name, or all under their own names."""
    names = used or set(recorded[0])
    known = {value.tobytes(): key for key, value in zip(*recorded, strict=True) if key in names}
    for split, held in (("validation", dataset.val), ("test", dataset.test)):
        if held is not None and used is None:
            held = held.take([row for row, key in enumerate(held.keys) if key in names])
        shared = [known[value] for value in (by_content(held) if held is not None else ()) if value in known]
        if shared:
            raise UserError(
                f"{file}: {len(shared)} {what} are {split} images of {dataset.name}{dataset.setting.suffix} ('{shared[0]}'): "
                "give the stages the same --split, --val_fraction and --subset_seed, or accept it with --allow_other_sources"
            )


def write_sources(folder: Path, keys: Sequence[str], values: np.ndarray, file: str = SOURCES_FILE) -> None:
    """Keeps the training images of a subset beside it: their names, and their content hashes, uint8 ``(N, 16)``."""
    joined = np.frombuffer("\0".join(keys).encode("utf-8", "surrogateescape"), np.uint8)
    with atomic_path(folder / file) as temporary, open(temporary, "wb") as out:
        np.savez_compressed(out, keys=joined, values=values)


def read_sources(folder: Path, file: str = SOURCES_FILE) -> tuple[list[str], np.ndarray] | None:
    """The names and hashes that :func:`write_sources` wrote; None for a subset made elsewhere."""
    arrays = load_arrays(folder / file)
    if not {"keys", "values"} <= arrays.keys():
        return None
    keys = arrays["keys"].tobytes().decode("utf-8", "surrogateescape").split("\0")
    return (keys, arrays["values"]) if len(keys) == len(arrays["values"]) else None
