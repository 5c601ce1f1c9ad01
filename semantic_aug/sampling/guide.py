"""The guide of a plan: a trained classifier's predictions by which sources, targets and masks are chosen.

Confusions are counted from the run's own predictions for its validation images. Everything else is computed once, on images
as they are evaluated, and kept in the subset's folder: a GPU need not give the same digits again, and a plan must not change.
"""

from __future__ import annotations

import csv
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from semantic_aug import registry, runs
from semantic_aug.datasets import ImageTable, LoadedDataset
from semantic_aug.datasets.fingerprint import files_digest, hash_images, split_identity
from semantic_aug.datasets.origin import check_classifier, class_order
from semantic_aug.errors import UserError
from semantic_aug.files import atomic_path
from semantic_aug.prompts import ClassIndex
from semantic_aug.sampling.folder import REMEDY, has_images, recorded_identity
from semantic_aug.sampling.masks import has_regions
from semantic_aug.sampling.plan import Guide
from semantic_aug.sampling.settings import ImageSettings
from semantic_aug.tensors import load_arrays

log = logging.getLogger(__name__)

GUIDE_FILE = ".guide.npz"
PREDICTIONS = "val_predictions.csv"
"""Of a finished run of stage 3: a row per validation image, with its class and the predicted one."""
AT_ONCE = 256
"""Images of which predictions are in memory."""
MOST_CLASSES, LEAST_SHARE = 10, 0.01
"""Classes kept of the prediction for an unlabelled image: at most so many, of at least this probability."""
LEAST_PROBABILITY = 1e-8
"""Lower bound of probabilities, which bounds losses at 18.4 nats."""


class Classifier(Protocol):
    """The part of :class:`semantic_aug.classify.inference.Classifier` that guides use."""

    path: Path
    class_names: tuple[str, ...]

    def probabilities(self, read: Callable[[int], Image.Image], count: int) -> np.ndarray:
        """Class probabilities ``(count, K)``."""

    def activation_maps(self, read: Callable[[int], Image.Image], classes: Sequence[int]) -> Iterator[np.ndarray]:
        """Class activation maps of each image for a class, batch by batch: ``(B, side, side)`` in [0, 1]."""


LoadClassifier = Callable[[Path, str], Classifier]
"""From the folder of a finished run and a device to its classifier."""


def make_guide(
    settings: ImageSettings,
    dataset: LoadedDataset,
    device: str,
    load_classifier: LoadClassifier,
    folder: Path,
    grid: tuple[int, int] = (0, 0),
    *,
    predict: bool = True,
) -> Guide:
    """The guide of a subset: kept in its folder, else computed by the classifier.

    Args:
        dataset: loaded under the setting.
        device: of the classifier.
        folder: of the subset, which need not exist.
        grid: (h, w) of the latents, for masks.
        predict: False in a dry run: predictions that are not kept are left out, and ``--sources hard`` takes all losses for
            equal.

    Raises:
        UserError: the classifier is none, has other classes, or was trained or validated on other images.
    """
    masked = settings.object_mask is not None and not has_regions(dataset.train)
    pool, confused = dataset.unlabelled, settings.pairing == "confusion"
    wanted = {"confusions": confused, "losses": settings.sources == "hard", "objects": masked}
    wanted |= dict.fromkeys(("pool_classes", "pool_weights"), pool is not None)
    if settings.classifier is None or not any(wanted.values()):
        return Guide()
    run = registry.resolve_path(settings.classifier)
    classifier = load_classifier(run, device)
    order = class_order(classifier.class_names, dataset, f"--classifier {run}")
    origin = check_classifier(run, dataset) | {"classifier": files_digest([classifier.path])}
    if pool is not None:
        origin["unlabelled"] = pool_identity(pool)
    if masked:
        origin["objects"] = f"{grid[0]} x {grid[1]}, {settings.mask_threshold:g}"
    kept = read_guide(folder)
    if kept.origin != origin:
        _check_begun(folder, origin)
        kept = Guide()
    parts = {name: array for name, array in kept.arrays().items() if wanted[name]}
    if confused:
        parts["confusions"] = read_confusions(run, dataset)
    missing, shown = {name for name in wanted if wanted[name]} - parts.keys(), registry.shown_path(run)
    if missing and not predict:
        log.info("the predictions of classifier %s are left to a run: counts are without them", shown)
    if "losses" in missing:
        even = np.ones(len(dataset.train), np.float32)
        parts["losses"] = losses_of(classifier, order, dataset.train) if predict else even
    if "pool_classes" in missing and predict:
        parts["pool_classes"], parts["pool_weights"] = pool_classes(classifier, order, pool)
    if "objects" in missing:
        images = dataset.train if predict else dataset.train.take([0])  # one: can maps be made?
        log.info("classifier %s: activation maps of %d images", shown, len(images))
        objects = objects_of(classifier, order, images, grid, settings.mask_threshold)
        parts |= {"objects": objects} if predict else {}
    return Guide(**parts, origin=origin)


def _check_begun(folder: Path, origin: dict[str, str]) -> None:
    """Refuses, before the classifier runs, a folder whose images followed another classifier or another pool."""
    names = {"classifier_sha256": "classifier", "unlabelled": "unlabelled"}
    record = recorded_identity(folder) or {}
    if "data" not in record or not has_images(folder):
        return
    then = {name: (record.get(name) or "")[:12] or None for name in names}
    if changed := runs.differences(then, {name: origin.get(key, "")[:12] or None for name, key in names.items()}):
        raise UserError(f"{folder} holds a subset made otherwise ({changed[0]}): {REMEDY}")


def losses_of(classifier: Classifier, order: list[int], images: ImageTable) -> np.ndarray:
    """Cross-entropy of each image in nats, float32 ``(N,)``, without augmentation; ``order`` is the index of each class of the
    images among the classifier's."""
    parts = _predicted(classifier, order, images, "losses of training images")
    of_class = np.concatenate([part[np.arange(len(rows)), images.labels[rows]] for rows, part in parts])
    return -np.log(np.maximum(of_class, LEAST_PROBABILITY)).astype(np.float32)


def pool_classes(classifier: Classifier, order: list[int], images: ImageTable) -> tuple[np.ndarray, np.ndarray]:
    """The most probable classes of unlabelled images and their probabilities, as :class:`Guide` has them.

    Up to :data:`MOST_CLASSES` classes of at least :data:`LEAST_SHARE` count, the best always; their weights sum to one.
    """
    best, weights = [], []
    for _, part in _predicted(classifier, order, images, "classes of unlabelled images"):
        classes = np.argsort(-part, axis=1, kind="stable")[:, :MOST_CLASSES]
        shares = np.take_along_axis(part, classes, 1).astype(np.float64)
        shares[:, 1:][shares[:, 1:] < LEAST_SHARE] = 0
        best.append(classes)
        weights.append(np.round(10_000 * shares / shares.sum(1, keepdims=True)))
    return np.concatenate(best).astype(np.int32), np.concatenate(weights).astype(np.uint16)


def _predicted(
    classifier: Classifier, order: list[int], images: ImageTable, title: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of the images and their class probabilities ``(B, K)``, a part at a time, so that no more is in memory."""
    for start in tqdm(range(0, len(images), AT_ONCE), unit_scale=AT_ONCE, unit="image", desc=title, mininterval=1.0):
        rows = np.arange(start, min(len(images), start + AT_ONCE))
        yield rows, classifier.probabilities(lambda i, rows=rows: _image(images, int(rows[i])), len(rows))[:, order]


def _image(images: ImageTable, row: int) -> Image.Image:
    """The decoded image, or a black one in place of an image that cannot be read."""
    try:
        return images.image(row)
    except UserError:  # nothing is made from it, which a run reports
        return Image.new("RGB", (1, 1))


def pool_identity(images: ImageTable) -> str:
    """Digest of the names and contents of unlabelled images."""
    return str(split_identity(images, hash_images(images).hex())["digest"])


def objects_of(
    classifier: Classifier, order: list[int], images: ImageTable, grid: tuple[int, int], threshold: float
) -> np.ndarray:
    """The object of each image by the activation map of its own class: the cells whose mean is at least ``threshold`` of the
    map's maximum (Zhou et al. 2016, arXiv:1512.04150, take a fifth), packed as :class:`Guide` has them.

    An image whose map is zero, or that cannot be read, has no object.

    Args:
        order: index of each class of ``images`` among the classifier's.
        grid: (h, w) of the latents.
    """
    packed, classes = [], [order[label] for label in images.labels.tolist()]
    for maps in classifier.activation_maps(partial(_image, images), classes):
        cells = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(maps), grid) >= threshold
        packed.append(np.packbits(cells.flatten(1).numpy(), axis=1))
    objects = np.concatenate(packed)
    if empty := int((~objects.any(axis=1)).sum()):
        log.warning("%d training images show nothing of their class to the classifier: all of them may change", empty)
    return objects


def read_confusions(run: Path, dataset: LoadedDataset) -> np.ndarray:
    """The confusions of a run on its validation images, int64 ``(K, K)`` in the data set's class order, rows true classes.
    Raises UserError: the run has no predictions for such images, or they are damaged or of other classes."""
    path, pairs = run / PREDICTIONS, Counter()
    try:
        with open(path, newline="", encoding="utf-8") as lines:
            pairs.update((row.get("class"), row.get("predicted")) for row in csv.DictReader(lines))
    except FileNotFoundError:
        raise UserError(
            f"--classifier {run} has no {PREDICTIONS}, the predictions for validation images: expected a finished "
            "train_cls.py run on a data set with validation images (--val_fraction)"
        ) from None
    except UnicodeDecodeError:
        pairs.clear()
    if not pairs or any(None in pair for pair in pairs):
        raise UserError(f"{path} is damaged: run train_cls.py again")
    names = sorted({name for pair in pairs for name in pair})
    index = ClassIndex(dataset.source_names, dataset.class_names)
    position = dict(zip(names, index.match(names, where=str(path)), strict=True))
    if other := [name for name, row in position.items() if row is None]:
        raise UserError(f"{path} names the class '{other[0]}', which {dataset.name} does not have")
    table = np.zeros((len(dataset.source_names),) * 2, np.int64)
    for (true, predicted), count in pairs.items():
        table[position[true], position[predicted]] += count
    return table


# ---------------------------------------------------------------------------------------------------------- its file


def read_guide(folder: Path) -> Guide:
    """The guide that a subset's folder keeps; empty where there is none, or a damaged one."""
    arrays = load_arrays(folder / GUIDE_FILE)
    if "origin" not in arrays or not arrays.keys() <= set(Guide.__dataclass_fields__):  # a damaged name
        return Guide()
    return Guide(**arrays | {"origin": json.loads(str(arrays["origin"]))})


def write_guide(folder: Path, guide: Guide) -> None:
    """Writes a guide into the subset's folder, unless the folder keeps it already."""
    kept = read_guide(folder)
    if guide.digest and (kept.digest, kept.origin) != (guide.digest, guide.origin):
        with atomic_path(folder / GUIDE_FILE) as temporary, open(temporary, "wb") as out:
            np.savez_compressed(out, **guide.arrays(), origin=np.array(json.dumps(guide.origin)))
