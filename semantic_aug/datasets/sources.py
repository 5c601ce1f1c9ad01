"""Splits of a data set of the hub, or of a local copy of one.

Labels are read without decoding an image, and nothing is ever written into a user's folder.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from semantic_aug.datasets import captions
from semantic_aug.datasets.images import open_image
from semantic_aug.datasets.spec import Splits
from semantic_aug.datasets.splits import split_of, unify
from semantic_aug.datasets.table import ImageTable, file_stamp
from semantic_aug.errors import UserError, unknown

if TYPE_CHECKING:
    import datasets as hub


@dataclass(frozen=True)
class HubSplit:
    """One split in the hub's format.

    Attributes:
        repo: hub id ("org/name").
        split: the hub's name of the split.
        local: folder of a local copy (parquet files, or what ``save_to_disk`` wrote); None loads from the hub.
    """

    repo: str
    split: str = "train"
    local: str | os.PathLike | None = None


def train_and_test(dataset: str, repo: str, train_dir: str | None, test_dir: str | None) -> dict[str, HubSplit]:
    """The two splits of a data set whose hub ids differ in one word.

    Args:
        dataset: name, for the environment variables ``{DATASET}_HUG_LOCAL_IMAGE_{TRAIN,TEST}_DIR``, which name local
            copies and take precedence over the next two.
        repo: hub id with ``{split}`` in it.
        train_dir: local copy of the training split, or None.
        test_dir: local copy of the test split, or None.
    """
    places = {}
    for split, written in (("train", train_dir), ("test", test_dir)):
        local = os.environ.get(f"{dataset.upper()}_HUG_LOCAL_IMAGE_{split.upper()}_DIR") or written
        places[split] = HubSplit(repo.format(split=split), split, local)
    return places


# ---------------------------------------------------------------------------------------------- the hub's formats


def read_hub(
    splits: Mapping[str, HubSplit], image_column: str | None = None, label_column: str | None = None
) -> Splits:
    """Splits in the hub's format, each from the hub or from a local copy.

    Args:
        splits: our split name -> where it is.
        image_column: column of images (None: the first column of images).
        label_column: column of labels (None: ``label``, ``labels``, ``fine_label``, or the only column of classes).

    Raises:
        UserError: not to be had, a missing column, a label without a name.
    """
    tables = {
        ours: _hub_table(_load_hub(where), where, ours, image_column, label_column) for ours, where in splits.items()
    }
    return unify(tables)


def read_hub_id(
    repo: str, local: str | None = None, image_column: str | None = None, label_column: str | None = None
) -> Splits:
    """All splits of one hub id (or of one local folder), the hub's split names mapped by
    :data:`semantic_aug.datasets.splits.SPLIT_NAMES`."""
    import datasets as hub

    if local or Path(repo).expanduser().exists():
        found = _load_local(Path(local or repo).expanduser())
    else:
        found = _from_hub(repo, None)
    if isinstance(found, hub.Dataset):
        found = {"train": found}
    tables = {}
    for name, rows in found.items():
        ours = split_of(name)
        if ours and ours not in tables:
            tables[ours] = _hub_table(rows, HubSplit(repo, name, local), ours, image_column, label_column)
    if "train" not in tables:
        raise UserError(f"data set {repo} has the splits {', '.join(map(str, found))}: expected one named train")
    return unify(tables)


def _load_hub(where: HubSplit) -> hub.Dataset:
    import datasets as hub

    found = _load_local(Path(where.local).expanduser()) if where.local else _from_hub(where.repo, where.split)
    if isinstance(found, hub.Dataset):
        return found
    if where.split in found:
        return found[where.split]
    if len(found) == 1:  # a copy of one split, whatever it is called there
        return next(iter(found.values()))
    raise unknown("split", where.split, map(str, found), f"looked in {where.local or where.repo}")


def _load_local(folder: Path) -> hub.Dataset | hub.DatasetDict:
    """A folder written by ``save_to_disk``, or one with parquet files (``data/train-00000-of-00001.parquet``)."""
    import datasets as hub

    if not folder.is_dir():
        raise UserError(f"local copy {folder} is not a folder: mend the path, or unset it to load from the hub")
    if (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists():
        return hub.load_from_disk(str(folder))
    files = sorted(folder.rglob("*.parquet"))
    if not files:
        raise UserError(f"{folder} holds neither parquet files nor a data set written by save_to_disk")
    by_split: dict[str, list[str]] = {}
    for file in files:
        word = file.stem.split("-")[0]
        by_split.setdefault(word if split_of(word) else "train", []).append(str(file))
    return hub.DatasetDict({name: _from_parquet(paths) for name, paths in by_split.items()})


def _from_parquet(paths: list[str]) -> hub.Dataset:
    import datasets as hub

    # converted once into the library's own cache (HF_DATASETS_CACHE), never into the user's folder
    return hub.concatenate_datasets([hub.Dataset.from_parquet(path) for path in paths])


def _from_hub(repo: str, split: str | None):
    import datasets as hub

    try:
        return hub.load_dataset(repo, split=split)
    except Exception as error:  # the library raises many kinds for "not there" and "no network"
        reason = str(error).split("\n")[0][:200]
        raise UserError(
            f"data set {repo} could not be loaded from the hub ({type(error).__name__}: {reason}): check the network or "
            "name a local copy (HUG_LOCAL_IMAGE_TRAIN_DIR, or 'local' in config/datasets.yaml)"
        ) from error


def _hub_table(
    rows: hub.Dataset, where: HubSplit, ours: str, image_column: str | None, label_column: str | None
) -> ImageTable:
    import datasets as hub

    name = str(where.local or where.repo)
    image_column = image_column or next((c for c, f in rows.features.items() if isinstance(f, hub.Image)), None)
    if image_column is None or image_column not in rows.features:
        raise UserError(
            f"data set {name} has no image column '{image_column or 'image'}': its columns are "
            f"{', '.join(rows.column_names)}; name one with image_column in config/datasets.yaml"
        )
    label_column = label_column or _label_column(rows)
    if label_column is None or label_column not in rows.features:
        raise UserError(
            f"data set {name} has no label column '{label_column or 'label'}': its columns are "
            f"{', '.join(rows.column_names)}; name one with label_column in config/datasets.yaml"
        )
    feature = rows.features[label_column]
    values = rows.select_columns([label_column]).with_format("arrow")[:][label_column].to_pylist()
    if isinstance(feature, hub.ClassLabel):
        class_names, labels = tuple(feature.names), values
    else:
        class_names = tuple(str(v) for v in sorted({v for v in values if v is not None}))
        position = {name: i for i, name in enumerate(class_names)}
        labels = [position[str(v)] if v is not None else -1 for v in values]
    bad = next((i for i, v in enumerate(labels) if v is None or not 0 <= v < len(class_names)), None)
    if bad is not None:
        raise UserError(f"data set {name}, split {where.split}, row {bad}: label {values[bad]!r} has no class name")
    encoded = rows.select_columns([image_column]).cast_column(image_column, hub.Image(decode=False))

    def stored(row: int) -> str | bytes:
        cell = encoded[row][image_column]
        if cell is None:
            raise UserError(f"data set {name}, split {where.split}, row {row} has no image: remove the row")
        return cell["bytes"] if cell["bytes"] is not None else cell["path"]

    def read(row: int):
        return open_image(stored(row), f"{name} {where.split}[{row}]")

    # the library's own hash of the data and of what was done to it, and its files, should they be written anew
    fingerprint = " ".join([str(rows._fingerprint), *(file_stamp(file["filename"]) for file in rows.cache_files)])
    # whether some images are files beside the data, which change without it
    outside = any(chunk.field("bytes").null_count for chunk in encoded.data.column(image_column).chunks)

    def stamp(row: int) -> str:
        source = stored(row) if outside else b""
        return fingerprint if isinstance(source, bytes) else f"{fingerprint} {source} {file_stamp(source)}"

    keys = [f"{ours}/{row:08d}" for row in range(len(labels))]
    column = captions.column_in(rows.column_names)
    extras = {"caption": captions.as_column(rows.select_columns([column])[:][column])} if column else None
    return ImageTable.of(class_names, labels, keys, read, stamp, extras, encoded=stored)


def _label_column(rows: hub.Dataset) -> str | None:
    import datasets as hub

    for name in ("label", "labels", "fine_label"):
        if name in rows.features:
            return name
    classes = [name for name, feature in rows.features.items() if isinstance(feature, hub.ClassLabel)]
    return classes[0] if len(classes) == 1 else None
