"""Splits of a data set of the hub, or of a local copy of one in any layout that the library ``datasets`` reads.

Labels are read without decoding an image, and nothing is ever written into a user's folder.
"""

from __future__ import annotations

import logging
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semantic_aug.datasets.images import open_image
from semantic_aug.datasets.readers import captions
from semantic_aug.datasets.readers.hub_files import load_local
from semantic_aug.datasets.spec import Splits, split_of, unify
from semantic_aug.datasets.table import ImageTable, below, file_stamp
from semantic_aug.errors import UserError, WouldDownload, downloads_allowed, unknown
from semantic_aug.files import home_expanded

if TYPE_CHECKING:
    import datasets as hub

log = logging.getLogger(__name__)

LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "cls")
IMAGE_COLUMNS = ("image", "img", "picture", "file_name", "path")
LOCAL_COPY = "name a local copy with 'local' in config/datasets.yaml, or with hf:FOLDER"
HUB_SECONDS = 4.0
"""Seconds that the hub may take to answer before only the library's cache is read."""


@dataclass(frozen=True)
class HubSplit:
    """One split in the hub's format.

    Attributes:
        repo: hub id ("org/name").
        split: the hub's name of the split.
        local: folder of a local copy; None loads from the hub.
        remedy: what to set where the hub cannot be reached; empty for data sets without an official download.
    """

    repo: str
    split: str = "train"
    local: str | os.PathLike | None = None
    remedy: str = ""

    @property
    def name(self) -> str:
        """The source, for errors."""
        return str(self.local or self.repo)


def parse_id(text: str) -> tuple[str, str | None]:
    """``ID`` or ``ID:CONFIGURATION``, where ``ID`` is a hub id or a local folder."""
    if home_expanded(text).exists():
        return text, None
    repo, colon, config = text.rpartition(":")
    return (repo, config) if colon and repo and config else (text, None)


# ---------------------------------------------------------------------------------------------------------- splits


def read_hub(splits: Mapping[str, HubSplit]) -> Splits:
    """Splits in the hub's format by our names, each from the hub or a local copy, with the columns ``image`` and ``label``.
    Raises UserError: not to be had, a missing column, a label without a name, no labels in the training split."""
    tables = {ours: _hub_table(_load_split(source), source, ours, "image", "label") for ours, source in splits.items()}
    return _labelled(tables, splits["train"])


def read_hub_id(
    repo: str,
    local: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    config: str | None = None,
) -> Splits:
    """All splits of one hub id or of one local folder, by :data:`semantic_aug.datasets.spec.SPLIT_NAMES`.

    Args:
        repo: hub id or local folder; ``:CONFIGURATION`` may follow.
        image_column: column of images (None: the first column of images).
        label_column: column of labels (None: one of :data:`LABEL_COLUMNS`, or the only column of classes).
        config: the configuration to read where there are several.
    """
    if config is None:
        repo, config = parse_id(repo)
    if local is None and home_expanded(repo).exists():
        local = repo
    source, splits = HubSplit(repo, "train", local), _all_splits(repo, local, config)
    chosen, left_out = {}, []
    for name in splits:
        ours = split_of(str(name))
        if ours is None or ours in chosen:
            left_out.append(str(name))
        else:
            chosen[ours] = name
    if "train" not in chosen:
        raise UserError(f"data set {repo} has the splits {', '.join(map(str, splits))}: expected one named train")
    if left_out:
        log.warning("%s: the splits %s are left out (train, validation and test are read)", repo, ", ".join(left_out))
    tables, training = {}, splits[chosen["train"]].features
    for ours, name in chosen.items():
        rows, split = splits[name], HubSplit(repo, str(name), local)
        labels = label_column or _label_column(training, split.name)
        # a test split that is like the training split but for the labels
        unlabelled = labels not in rows.features and set(rows.features) < set(training)
        tables[ours] = None if unlabelled else _hub_table(rows, split, ours, image_column, label_column)
    return _labelled(tables, source)


def read_hub_images(word: str, class_name: str) -> ImageTable:
    """The images of a hub id or a local folder (``:CONFIGURATION`` may follow) as a table of one class, whatever labels
    they have; splits named as validation or test ones are left out. Raises UserError: not to be had, no other split, or
    splits without images."""
    import datasets as hub

    repo, config = parse_id(word)
    local = repo if home_expanded(repo).exists() else None
    splits = _all_splits(repo, local, config)
    kept = {str(name): rows for name, rows in splits.items() if split_of(str(name)) in (None, "train")}
    if not kept:
        raise UserError(f"data set {word} has only the splits {', '.join(map(str, splits))}: expected one named train")
    rows, *others = kept.values()
    column = _image_column(rows, word)
    if others:
        images = hub.Image(decode=False)
        parts = [part.select_columns([_image_column(part, word, column)]) for part in (rows, *others)]
        rows = hub.concatenate_datasets([part.cast_column(column, images) for part in parts])
    name = "+".join(kept)
    return _table_of_rows(rows, HubSplit(repo, name, local), name, column, ((class_name,), [0] * len(rows)))


def _all_splits(repo: str, local: str | None, config: str | None) -> Mapping[str, hub.Dataset]:
    splits = load_local(home_expanded(local), config) if local else _from_hub(HubSplit(repo), None, config)
    return splits if isinstance(splits, dict) else {"train": splits}


def _labelled(tables: Mapping[str, ImageTable | None], source: HubSplit) -> Splits:
    """The splits that have labels, on one class list."""
    if tables["train"] is None:
        raise UserError(f"data set {source.name}: its training split has no labels (-1 or empty in every row)")
    for split, table in tables.items():
        if table is None:
            log.warning("%s: the split %s has no labels (-1, empty or no column) and is left out", source.name, split)
    return unify({split: table for split, table in tables.items() if table is not None})


def _load_split(source: HubSplit) -> hub.Dataset:
    rows = load_local(home_expanded(source.local)) if source.local else _from_hub(source, source.split)
    if not isinstance(rows, dict):
        return rows
    if source.split in rows:
        return rows[source.split]
    if len(rows) == 1:  # a copy of one split, whatever it is called there
        return next(iter(rows.values()))
    raise unknown("split", source.split, map(str, rows), f"looked in {source.name}")


# --------------------------------------------------------------------------------------------------------- the hub


def answers(address: str) -> bool:
    """Whether a server answers within :data:`HUB_SECONDS`, whatever it says; proxies of the environment are used."""
    answered = threading.Event()

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=HUB_SECONDS):
                answered.set()
        except urllib.error.HTTPError:
            answered.set()
        except (OSError, ValueError):
            return

    # on a thread of its own, since looking up a name has no time limit
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    return answered.is_set()


@contextmanager
def _reachable_or_offline() -> Iterator[None]:
    """One short attempt to reach the hub; without an answer only the library's cache is looked at, at once."""
    import datasets as hub
    from huggingface_hub import constants

    before = hub.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    if not any(before) and not (downloads_allowed() and answers(constants.ENDPOINT)):
        hub.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def _from_hub(source: HubSplit, split: str | None, config: str | None = None) -> hub.Dataset | hub.DatasetDict:
    import datasets as hub

    try:
        with _reachable_or_offline():
            return hub.load_dataset(source.repo, name=config, split=split)
    except Exception as error:  # the library raises many kinds for "not there" and "no network"
        reason = " ".join(str(error).split())[:300]
        if isinstance(error, ValueError) and "onfig" in reason:
            raise UserError(
                f"data set {source.repo}: {reason}; name a configuration, as in hf:{source.repo}:NAME"
            ) from error
        if not downloads_allowed():
            unless = f" (unless you {source.remedy})" if source.remedy else ""
            raise WouldDownload(f"the data set {source.repo} from the hub{unless}") from None
        raise UserError(
            f"data set {source.repo} could not be loaded from the hub ({type(error).__name__}: {reason[:150]}): check the "
            f"network, or {source.remedy or LOCAL_COPY}"
        ) from error


# ---------------------------------------------------------------------------------------------------------- columns


def _hub_table(
    rows: hub.Dataset, source: HubSplit, ours: str, image_column: str | None, label_column: str | None
) -> ImageTable | None:
    """The table of one split; None where none of its rows has a label."""
    image_column = _image_column(rows, source.name, image_column)
    label_column = label_column or _label_column(rows.features, source.name)
    if label_column is None or label_column not in rows.features:
        raise _no_column("label", label_column, rows, source.name)
    labelled = _labels(rows, label_column, f"data set {source.name}, split {source.split}")
    return _table_of_rows(rows, source, ours, image_column, labelled) if labelled is not None else None


def _no_column(kind: str, column: str | None, rows: hub.Dataset, name: str) -> UserError:
    return UserError(
        f"data set {name} has no {kind} column '{column or kind}': its columns are {', '.join(rows.column_names)}; name one "
        f"with {kind}_column in config/datasets.yaml"
    )


def _table_of_rows(
    rows: hub.Dataset, source: HubSplit, ours: str, image_column: str, labelled: tuple[Sequence[str], Sequence[int]]
) -> ImageTable:
    """The table of rows with these class names and labels."""
    import datasets as hub

    class_names, labels = labelled
    encoded = rows.select_columns([image_column]).cast_column(image_column, hub.Image(decode=False))

    def stored(row: int) -> str | bytes:
        cell = encoded[row][image_column]
        if cell is None or (cell["bytes"] is None and not cell["path"]):
            raise UserError(f"data set {source.name}, split {source.split}, row {row} has no image: remove the row")
        return cell["bytes"] if cell["bytes"] is not None else _located(cell["path"], source)

    def read(row: int):
        return open_image(stored(row), f"{source.name} {source.split}[{row}]")

    # the library's own hash of the data and of what was done to it, and its files, should they be written anew
    fingerprint = " ".join([str(rows._fingerprint), *(file_stamp(file["filename"]) for file in rows.cache_files)])
    # whether some images are files beside the data, which change without it
    outside = any(chunk.field("bytes").null_count for chunk in encoded.data.column(image_column).chunks)

    def stamp(row: int) -> str:
        source = stored(row) if outside else b""
        return fingerprint if isinstance(source, bytes) else f"{fingerprint} {source} {file_stamp(source)}"

    keys = [f"{ours}/{row:08d}" for row in range(len(labels))]
    column = next((name for name in captions.COLUMNS if name in rows.column_names), None)
    extras = {"caption": captions.as_column(rows.select_columns([column])[:][column])} if column else None
    return ImageTable.of(class_names, labels, keys, read, stamp, extras, encoded=stored)


def _located(path: str, source: HubSplit) -> str:
    """The file of an image that is not in the rows themselves: relative paths start at the local copy."""
    if source.local is None or "://" in path or Path(path).is_absolute():
        return path
    root = home_expanded(source.local)
    return str(root / below(root, path, f"data set {source.local}, split {source.split}"))


def _labels(rows: hub.Dataset, column: str, where: str) -> tuple[tuple[str, ...], list[int]] | None:
    """Class names and the label of every row; None where no row has one. Raises UserError: rows without a label among others,
    a label without a class name, or a column of another kind."""
    import datasets as hub

    feature = rows.features[column]
    values = rows.select_columns([column]).with_format("arrow")[:][column].to_pylist()
    if any(isinstance(value, (list, dict, bytes)) for value in values[:1]):
        raise UserError(f"{where}: column {column} holds {type(values[0]).__name__}s, expected one class a row")
    values = [int(v) if isinstance(v, float) and v.is_integer() else None if v != v else v for v in values]
    if all(value is None or value in (-1, "") for value in values):
        return None
    missing = next((i for i, v in enumerate(values) if v is None or v in (-1, "")), None)
    if missing is not None:
        shown = "no label" if values[missing] in (None, "") else "label -1, which has no class name"
        raise UserError(f"{where}, row {missing} has {shown}: remove the row, or name another label_column")
    if isinstance(feature, hub.ClassLabel):
        bad = next((i for i, v in enumerate(values) if not 0 <= v < len(feature.names)), None)
        if bad is not None:
            raise UserError(f"{where}, row {bad}: label {values[bad]!r} has no class name")
        return tuple(feature.names), values
    names = tuple(str(value) for value in sorted(set(values)))
    position = {name: i for i, name in enumerate(names)}
    return names, [position[str(value)] for value in values]


def _image_column(rows: hub.Dataset, name: str, given: str | None = None) -> str:
    """The column of images: by its kind, else of bytes (as pandas writes them) or of paths under a usual name. Raises
    UserError: there is none, or not the ``given`` one."""
    import datasets as hub

    features = rows.features
    images = [column for column, feature in features.items() if isinstance(feature, hub.Image)]
    stored = [column for column, feature in features.items() if _holds_bytes(feature)]
    texts = [n for n in IMAGE_COLUMNS if isinstance(features.get(n), hub.Value) and "string" in features[n].dtype]
    usual = [column for column in IMAGE_COLUMNS if column in (*stored, *texts)]
    column = given or next(iter(images or (stored if len(stored) == 1 else usual)), None)
    if column is None or column not in features:
        raise _no_column("image", column, rows, name)
    return column


def _holds_bytes(feature: Any) -> bool:
    import datasets as hub

    if isinstance(feature, Mapping):
        return "bytes" in feature
    return isinstance(feature, hub.Value) and "binary" in feature.dtype


def _label_column(features: Mapping[str, Any], name: str) -> str | None:
    """The column of labels. Raises UserError: several could be meant."""
    import datasets as hub

    usual = next((column for column in LABEL_COLUMNS if column in features), None)
    if usual:
        return usual
    classes = [column for column, feature in features.items() if isinstance(feature, hub.ClassLabel)]
    if len(classes) > 1:
        raise UserError(
            f"data set {name} has the label columns {' and '.join(classes)}: name one with label_column in "
            "config/datasets.yaml"
        )
    return classes[0] if classes else None
