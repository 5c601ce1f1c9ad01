"""Teachers: classifiers trained on real images that label the synthetic images of source images they were not trained on.

Labels by strength assume that a translation shows its target class to the degree s^gamma; a teacher predicts the classes from
the image (as in DreamDA, Fu et al. 2024, arXiv:2403.12803). A teacher trained on the source image would recognise it, so
teachers are cross-fitted: the training images are split into folds, and each teacher, a run of stage 3 on real images alone,
is trained without one fold, or without two if images have two sources.

    {cache}/teachers/{images and settings}/without-{folds}/    runs, shared by all subsets of the same training images
    {subset}/teacher-{meta}-{digits of that folder}.safetensors    class probabilities and their origin
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from semantic_aug import files, registry, runs, tensors
from semantic_aug.classify import inference
from semantic_aug.classify.config import MAY_CHANGE, WEIGHTS, ClassifyConfig, UseSettings, classifier_file
from semantic_aug.classify.draws import SyntheticSettings
from semantic_aug.classify.models import weights_identity
from semantic_aug.classify.processes import Processes
from semantic_aug.classify.trainer import results_of
from semantic_aug.datasets import LoadedDataset, fingerprint
from semantic_aug.datasets.cache import NoRoom, cache_folder, make_room
from semantic_aug.datasets.origin import synthetic_identity
from semantic_aug.datasets.synthetic import (
    POOL_PREFIX,
    SOURCES_FILE,
    UNLABELLED_FILE,
    SyntheticImages,
    locate,
    read_sources,
    read_subset,
)
from semantic_aug.errors import UserError
from semantic_aug.seeding import numpy_rng

log = logging.getLogger(__name__)

FOLDER = "teachers"
SMALLEST = 1e-30
"""Smallest probability in logarithms."""
Train = Callable[[ClassifyConfig, LoadedDataset, None], dict]
"""Type of :func:`semantic_aug.classify.run.train`, which trains or resumes a run and skips a finished one."""


# --------------------------------------------------------------------------------------------------- cross-fitting


def assign_folds(labels: np.ndarray, folds: int, seed: int, content: np.ndarray | None = None) -> np.ndarray:
    """Splits the training images into folds at random, of nearly equal size in each class and in total.

    Args:
        labels: ``(N,)`` classes.
        folds: number of folds.
        content: ``(N, B)`` hash of each image; equal images are put in the same fold.

    Returns:
        The fold of each image, int64 ``(N,)``.
    """
    shuffled = numpy_rng(seed, "teacher folds").permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    fold = np.empty(len(labels), np.int64)
    fold[by_class] = np.arange(len(labels)) % folds
    if content is None:
        return fold
    _, first, image = np.unique(content, axis=0, return_index=True, return_inverse=True)
    return fold[first[image.reshape(-1)]]


def present_names(sources: np.ndarray, root: Path, dataset: LoadedDataset) -> np.ndarray:
    """The sources of a subset, ``(M, S)``, under their present names: a source of another listing, or an unlabelled one of a
    smaller setting, may have the content of a training image."""
    unknown = set(sources.ravel()) - {"", *dataset.train.keys}
    if not unknown:
        return sources
    recorded = {
        prefix + key: value.tobytes()
        for file, prefix in ((SOURCES_FILE, ""), (UNLABELLED_FILE, POOL_PREFIX))
        for key, value in zip(*(read_sources(root, file) or ((), ())), strict=True)
    }
    others = {key: recorded[key] for key in unknown & recorded.keys()}
    if not others:
        return sources
    present = fingerprint.by_content(dataset.train)
    return np.array([present.get(others.get(key), key) for key in sources.ravel()], object).reshape(sources.shape)


def source_folds(sources: np.ndarray, fold_of: dict[str, int]) -> np.ndarray:
    """The folds of the sources of synthetic images, int64 ``(M, S)``; -1 for a source that is no training image.

    Args:
        sources: ``(M, S)`` keys of the sources.
        fold_of: fold of each training image by its key.
    """
    return np.array([fold_of.get(key, -1) for key in sources.ravel()], np.int64).reshape(sources.shape)


def left_out(of_sources: np.ndarray, folds: int) -> list[tuple[int, ...]]:
    """The folds left out by each teacher: one fold, or each pair of folds if an image has sources in two folds. Raises
    UserError: no fold remains for training."""
    ordered = np.sort(of_sources, axis=1)
    distinct = (ordered >= 0) & np.diff(ordered, axis=1, prepend=-1).astype(bool)
    size = max(1, int(distinct.sum(axis=1).max(initial=1)))
    if folds <= size:
        raise UserError(
            f"--teacher_folds {folds}: images with {size} sources need teachers that leave out {size} folds; give {size + 1} "
            "folds at least"
        )
    return list(itertools.combinations(range(folds), size))


def clean_teachers(of_sources: np.ndarray, teachers: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Whether each teacher was trained without the sources of each image, bool ``(M, T)``; true for images without sources.

    Args:
        of_sources: ``(M, S)`` as of :func:`source_folds`.
        teachers: folds left out by each teacher.
    """
    unseen = [((of_sources < 0) | np.isin(of_sources, folds)).all(axis=1) for folds in teachers]
    return np.stack(unseen, axis=1)


def tempered(probabilities: np.ndarray, temperature: float, allowed: np.ndarray | None = None) -> np.ndarray:
    """Probabilities at a temperature: q^(1/T), normalised; float64 ``(M, K)``, rows summing to one.

    Args:
        probabilities: q, ``(M, K)``.
        temperature: T; above 1 flatter.
        allowed: classes with a nonzero probability, bool ``(M, K)``; None: all.
    """
    logits = np.log(np.maximum(probabilities.astype(np.float64), SMALLEST)) / temperature
    if allowed is not None:
        logits[~allowed] = -np.inf
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


def pairs(images: SyntheticImages, classes: int) -> np.ndarray:
    """The target and source class of each image, bool ``(M, K)``; for an unlabelled source all its possible classes."""
    one_hot, known = np.eye(classes, dtype=bool), images.source_labels
    return one_hot[images.target] | (one_hot[images.source] if known is None else known > 0)


def label(images: SyntheticImages, probabilities: np.ndarray, settings: SyntheticSettings) -> SyntheticImages:
    """Sets the images' soft labels from the teachers' probabilities ``(M, K)``; images without a teacher (rows of zeros) keep
    their labels by strength."""
    by_strength, classes = images.labels(settings.gamma, probabilities.shape[1]), probabilities.shape[1]
    allowed = pairs(images, classes) if settings.teacher_classes == "pair" else None
    weight = settings.teacher_weight if settings.soft_labels == "mixed" else 1.0
    labels = weight * tempered(probabilities, settings.teacher_temperature, allowed) + (1 - weight) * by_strength
    labelled = probabilities.any(axis=1, keepdims=True)
    return replace(images, soft=np.where(labelled, labels, by_strength).astype(np.float32))


# -------------------------------------------------------------------------------------------------------- teachers


@dataclass(frozen=True)
class Teachers:
    """The teachers of one request: their folds, settings and run folders.

    Attributes:
        config: the resolved request whose synthetic images are labelled.
        dataset: data set under the request's setting.
        folds: number of folds, at most the number of training images.
        fold: ``(N,)`` fold of each training image.
        origin: identity of the training images, classes and pre-trained weights.
    """

    config: ClassifyConfig
    dataset: LoadedDataset
    folds: int
    fold: np.ndarray
    origin: dict[str, Any]

    @classmethod
    def of(cls, config: ClassifyConfig, dataset: LoadedDataset) -> Teachers:
        """The teachers of a request; hashes the training images."""
        hashes, classifier = fingerprint.hash_images(dataset.train), config.classifier
        folds = min(config.synthetic.teacher_folds, len(dataset.train))
        fold = assign_folds(dataset.train.labels, folds, dataset.setting.subset_seed, hashes.values)
        origin = {
            "train": fingerprint.split_identity(dataset.train, hashes.hex(), ("group",)),
            "classes": fingerprint.names_identity(dataset.source_names),
            "weights": weights_identity(classifier.model, classifier.weights),
        }
        return cls(config, dataset, folds, fold, origin)

    @functools.cached_property
    def folder(self) -> Path:
        """Folder of the runs, named after the settings, the origin and the class names."""
        record = self.request(Path()).record()
        kept = {name: value for name, value in runs.plain(record).items() if name not in MAY_CHANGE}
        settings = files.sha256_text(json.dumps([self.folds, kept], sort_keys=True))[:8]
        parts = [settings, self.origin, fingerprint.names_identity(self.dataset.class_names)]
        return cache_folder() / FOLDER / files.sha256_text(json.dumps(parts, sort_keys=True))[:16]

    def request(self, folder: Path) -> ClassifyConfig:
        """The request of a teacher's run: the same network and training, on real images alone, to the last epoch."""
        config, dataset = self.config, self.dataset
        training = replace(config.training, seeds=None, patience=0, select_by="top1", eval_every=1, report_to="none")
        evaluation = replace(config.evaluation, test_dataset=None, shot_thresholds=tuple(dataset.spec.shot_thresholds))
        request = replace(config, training=training, evaluation=evaluation, use=UseSettings())
        request = replace(request, syndata=(), synthetic=SyntheticSettings())
        return request.with_seed(dataset.setting.subset_seed, folder)

    def run_folder(self, teacher: tuple[int, ...]) -> Path:
        """Folder of a teacher's run."""
        return self.folder / f"without-{'-'.join(map(str, teacher))}"

    def rows(self, teacher: tuple[int, ...]) -> np.ndarray:
        """Rows of a teacher's training images."""
        return np.flatnonzero(~np.isin(self.fold, teacher))

    def train(self, teacher: tuple[int, ...], train: Train) -> None:
        """Trains or resumes a teacher, or skips a finished one; it is tested on the training images left out."""
        seen, table = self.rows(teacher), self.dataset.train
        rest = np.setdiff1d(np.arange(len(table)), seen)
        dataset = replace(self.dataset, train=table.take(seen), val=None, test=table.take(rest) if len(rest) else None)
        train(self.request(self.run_folder(teacher)), dataset, None)

    def remove_spoiled(self) -> None:
        """Removes runs whose images changed during training, which cannot be resumed."""
        for record in self.folder.glob(f"*/{runs.ARGS_FILE}"):
            if (runs.load_arguments(record.parent) or {}).get(runs.SPOILED):
                shutil.rmtree(record.parent)


class SubsetLabels:
    """The teachers' class probabilities of a subset's images, computed once and saved in the subset's folder.

    Args:
        teachers: all teachers of the request.
        folder: folder of the subset; ``#NAME`` at its end selects ``meta-NAME.csv``.

    Attributes:
        teachers: the teachers used, as the folds that each leaves out.
        labelling: bool ``(M, T)``, which teachers label each image.

    Raises:
        UserError: no teacher can label any image, too few folds, or a folder in which labels cannot be saved.
    """

    def __init__(self, teachers: Teachers, folder: str):
        dataset, config = teachers.dataset, teachers.config
        root, table = locate(folder)
        self.ensemble, self.shown, self._reported = teachers, registry.shown_path(root), False
        self.images = read_subset(folder, dataset, config.synthetic.allow_other_sources)
        self.path = root / f"teacher-{table.stem}-{teachers.folder.name[:8]}.safetensors"
        fold_of = dict(zip(dataset.train.keys, teachers.fold.tolist(), strict=True))
        sources = present_names(self.images.sources, root, dataset)
        of_sources = source_folds(sources, fold_of)
        candidates = left_out(of_sources, teachers.folds)
        # classes in the training images of each teacher, bool (T, K)
        known = np.stack([dataset.train.take(teachers.rows(folds)).counts() > 0 for folds in candidates])
        labelling = clean_teachers(of_sources, candidates)
        labelling &= known[:, self.images.source].T & known[:, self.images.target].T
        used = labelling.any(axis=0)
        self.teachers, self.labelling = list(itertools.compress(candidates, used)), labelling[:, used]
        self.origin = {
            **teachers.origin,
            "synthetic": synthetic_identity(
                self.images, fingerprint.hash_files(self.images.paths, "synthetic images"), dataset.source_names
            ),
            "sources": hashlib.sha256("\0".join(sources.ravel()).encode("utf-8", "surrogateescape")).hexdigest()[:32],
        }
        if not self.labelling.any():
            raise UserError(
                f"--soft_labels {config.synthetic.soft_labels}: no classifier that has not seen the sources of {self.shown} "
                f"knows their classes ({len(dataset.train)} training images of {len(dataset.class_names)} classes); expected "
                "two training images per class at least"
            )
        if not os.access(root, os.W_OK) and self.kept() is None:
            raise UserError(
                f"--soft_labels {config.synthetic.soft_labels}: {self.shown} cannot be written, and the labels are kept there; "
                "make it writable, or give a copy"
            )
        if unknown := int(((sources == "").all(axis=1) & (self.images.strength < 1)).sum()):
            text = "%s: the sources of %d images are not recorded: classifiers that saw them may label them"
            log.warning(text, self.shown, unknown)

    def describe(self) -> str:
        """The saved labels, or the teachers and labels still to be computed."""
        if self.kept() is not None:
            return f"teacher labels of {self.shown}: {self.path.name}"
        missing = [teacher for teacher in self.teachers if results_of(self.ensemble.run_folder(teacher)) is None]
        images, rest = len(self.images), int((~self.labelling.any(axis=1)).sum())
        seen = [len(self.ensemble.rows(teacher)) for teacher in self.teachers]
        return (
            f"teacher labels of {self.shown}: {images - rest} images by {len(self.teachers)} classifiers of {min(seen)} to "
            f"{max(seen)} of the {len(self.ensemble.fold)} training images ({self.ensemble.folds} folds), {len(missing)} of "
            f"them to train in {registry.shown_path(self.ensemble.folder)}"
            + (f"; {rest} images keep their labels by strength: no such classifier knows their classes" if rest else "")
        )

    def kept(self) -> np.ndarray | None:
        """The saved probabilities ``(M, K)``, or None without those of the present images."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, "np") as content:
                record = tensors.read_metadata(content.metadata())
                probabilities = content.get_tensor("probabilities")
        except (OSError, ValueError, SafetensorError):
            return None
        difference = fingerprint.data_difference(record, self.origin)
        if difference and not self._reported:
            log.info("%s belongs to other images and is made again (%s)", self.path, difference)
            self._reported = True
        return None if difference else probabilities

    def make(self, train: Train) -> np.ndarray:
        """Returns the probabilities ``(M, K)``, saved or computed.

        The processes of a training share the work. Of several runs at once, one computes the labels and the others wait.

        Raises:
            UserError: an error of a teacher's training; or another run computes the same labels, and this run has several
                processes, which cannot wait.
        """
        processes, folder = Processes(self.ensemble.config.device), self.ensemble.folder
        with contextlib.ExitStack() as stack:
            probabilities = None
            if processes.main:
                try:
                    waiting = "another run that makes the same teacher labels"
                    lock = files.locked(folder / files.LOCK_FILE, wait=processes.count == 1, waiting_for=waiting)
                    stack.enter_context(lock)
                except files.LockHeld as other:
                    raise UserError(
                        f"{folder}: another run ({other.holder()}) makes the same teacher labels; start this one again when "
                        "they are finished"
                    ) from None
                probabilities = self.kept()
            if processes.add_up(torch.tensor(int(probabilities is not None), device=processes.device)):
                return self._sum(probabilities, processes)
            if processes.main:
                log.info("%s", self.describe())
                self.ensemble.remove_spoiled()
            processes.wait()
            for teacher in self.teachers:
                self.ensemble.train(teacher, train)
            probabilities = self._predict(processes)
            if processes.main:
                tensors.save_tensors(self.path, {"probabilities": torch.from_numpy(probabilities)}, self.origin)
        if processes.main:
            with contextlib.suppress(NoRoom):  # other parts of the cache are in use
                make_room(cache_folder(), 0)
        return probabilities

    def _sum(self, probabilities: np.ndarray | None, processes: Processes) -> np.ndarray:
        """The sum of the processes' probabilities, float32 ``(M, K)``; None counts as zeros."""
        if processes.count == 1:
            return probabilities
        shape = len(self.images), len(self.ensemble.dataset.class_names)
        values = torch.zeros(shape) if probabilities is None else torch.from_numpy(probabilities)
        return processes.add_up(values.to(processes.device)).cpu().numpy()

    def _predict(self, processes: Processes) -> np.ndarray:
        """The mean probabilities of each image's teachers, float32 ``(M, K)``; zeros without a teacher. Each process labels a
        share of the images."""
        total = np.zeros((len(self.images), len(self.ensemble.dataset.class_names)), np.float32)
        correct, tested, share = 0.0, 0, slice(processes.rank, None, processes.count)
        with tqdm(
            total=int(self.labelling[share].sum()),
            desc="teacher labels",
            unit="image",
            mininterval=1.0,
            dynamic_ncols=True,
            disable=not processes.main,
        ) as bar:
            for teacher, labelled in zip(self.teachers, self.labelling.T, strict=True):
                folder, rows = self.ensemble.run_folder(teacher), np.arange(len(labelled))[share][labelled[share]]
                classifier = inference.load_run(folder, str(processes.device))
                subset, size = self.images.take(rows), 2 * self.ensemble.config.training.batch_size
                for batch, probabilities in classifier.batches(subset.image, len(rows), size):
                    total[rows[batch]] += probabilities.numpy()
                    bar.update(len(batch))
                left = len(self.ensemble.fold) - len(self.ensemble.rows(teacher))
                correct += left * results_of(folder)["test"]["top1"] if left else 0.0
                tested += left
        if processes.main:
            log.info("teachers: top-1 %.1f %% on held-out training images", 100 * correct / max(tested, 1))
        return self._sum(total, processes) / np.maximum(self.labelling.sum(axis=1, keepdims=True), 1).astype(np.float32)


def subset_labels(config: ClassifyConfig, dataset: LoadedDataset) -> list[SubsetLabels]:
    """The teacher labels of each subset of a resolved request; empty with ``--soft_labels strength``."""
    if config.synthetic.soft_labels == "strength" or not config.syndata:
        return []
    if config.classifier.weights not in WEIGHTS:  # every teacher would start from what these weights have learned
        flag = f"--soft_labels {config.synthetic.soft_labels}"
        inference.refuse_seen_images(classifier_file(config)[1], config, dataset, flag, ("train",))
    teachers = Teachers.of(config, dataset)
    return [SubsetLabels(teachers, folder) for folder in config.syndata]


def with_teacher_labels(
    images: SyntheticImages, subsets: Sequence[SubsetLabels], settings: SyntheticSettings, train: Train | None
) -> SyntheticImages | None:
    """Sets the synthetic images' teacher labels; without ``subsets`` the images are returned unchanged.

    Args:
        images: images of all subsets, or a part of them.
        subsets: see :func:`subset_labels`.
        settings: how labels follow from the teachers' probabilities.
        train: trains a teacher; None: nothing is computed, and the result is None if labels are missing.
    """
    if not subsets:
        return images
    probabilities: dict[Path, np.ndarray] = {}
    for subset in subsets:
        rows = subset.make(train) if train is not None else subset.kept()
        if rows is None:
            return None
        probabilities |= zip(subset.images.paths, rows, strict=True)
    return label(images, np.stack([probabilities[path] for path in images.paths]), settings)
