"""Teachers: classifiers of the real images that give the soft labels of the synthetic images whose sources they never saw.

Labels by strength assume that a translation shows its target class to the degree s^gamma; a classifier looks (as DreamDA's
does, Fu et al. 2024, arXiv:2403.12803). One that trained on the source image would recognise it, so teachers are cross-fitted:
the training images are dealt into folds, and each teacher, an ordinary run of stage 3 on real images alone, leaves out one
fold, or two where images have two sources.

    {cache}/teachers/{images and settings}/without-{folds}/    the runs, shared by all subsets of the same training images
    {subset}/teacher-{meta}-{digits of that folder}.safetensors    class probabilities, and what they were made from
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
from semantic_aug.datasets.synthetic import SyntheticImages, locate, read_subset
from semantic_aug.errors import UserError
from semantic_aug.seeding import numpy_rng

log = logging.getLogger(__name__)

FOLDER = "teachers"
SMALLEST = 1e-30
"""Probability that stands for zero in logarithms."""
Train = Callable[[ClassifyConfig, LoadedDataset, None], dict]
""":func:`semantic_aug.classify.run.train`: trains, resumes, or finds the run finished."""


# --------------------------------------------------------------------------------------------------- cross-fitting


def assign_folds(labels: np.ndarray, folds: int, seed: int, content: np.ndarray | None = None) -> np.ndarray:
    """The fold of each training image, int64 ``(N,)``: drawn, and as even in each class and in all as can be.

    Args:
        labels: ``(N,)`` classes.
        folds: their number.
        content: ``(N, B)`` hash of each image; equal images are of one fold.
    """
    shuffled = numpy_rng(seed, "teacher folds").permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    fold = np.empty(len(labels), np.int64)
    fold[by_class] = np.arange(len(labels)) % folds
    if content is None:
        return fold
    _, first, image = np.unique(content, axis=0, return_index=True, return_inverse=True)
    return fold[first[image.reshape(-1)]]


def source_folds(sources: np.ndarray, fold_of: dict[str, int]) -> np.ndarray:
    """The folds of the sources of synthetic images, int64 ``(M, S)``, from their keys ``(M, S)`` and the fold of each training
    image's key; -1 where a source is no training image."""
    flat = np.fromiter((fold_of.get(key, -1) for key in sources.ravel()), np.int64, sources.size)
    return flat.reshape(sources.shape)


def left_out(of_sources: np.ndarray, folds: int) -> list[tuple[int, ...]]:
    """The folds that each teacher leaves out: one, or every two of them where an image has sources in two folds. Raises
    UserError: nothing would be left to train on."""
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
    """Which teachers, given as the folds that each leaves out, saw none of an image's sources, bool ``(M, T)``; all of them
    where no source is a training image. For ``of_sources`` see :func:`source_folds`."""
    unseen = [((of_sources < 0) | np.isin(of_sources, folds)).all(axis=1) for folds in teachers]
    return np.stack(unseen, axis=1)


def tempered(probabilities: np.ndarray, temperature: float, allowed: np.ndarray | None = None) -> np.ndarray:
    """q^(1/T), normalised; float64 ``(M, K)``, rows summing to one.

    Args:
        probabilities: q, ``(M, K)``.
        temperature: T; above 1 flatter.
        allowed: the classes with a share, bool ``(M, K)``; None: all.
    """
    logits = np.log(np.maximum(probabilities.astype(np.float64), SMALLEST)) / temperature
    if allowed is not None:
        logits[~allowed] = -np.inf
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


def pairs(images: SyntheticImages, classes: int) -> np.ndarray:
    """Target and source of each image, bool ``(M, K)``; of an unlabelled source every class that it may have."""
    one_hot, known = np.eye(classes, dtype=bool), images.source_labels
    return one_hot[images.target] | (one_hot[images.source] if known is None else known > 0)


def label(images: SyntheticImages, probabilities: np.ndarray, settings: SyntheticSettings) -> SyntheticImages:
    """The images under labels from probabilities ``(M, K)``; a row of zeros is of an image that no teacher labels, which keeps
    its label by strength."""
    by_strength, classes = images.labels(settings.gamma, probabilities.shape[1]), probabilities.shape[1]
    allowed = pairs(images, classes) if settings.teacher_classes == "pair" else None
    weight = settings.teacher_weight if settings.soft_labels == "mixed" else 1.0
    labels = weight * tempered(probabilities, settings.teacher_temperature, allowed) + (1 - weight) * by_strength
    labelled = probabilities.any(axis=1, keepdims=True)
    return replace(images, soft=np.where(labelled, labels, by_strength).astype(np.float32))


# -------------------------------------------------------------------------------------------------------- teachers


@dataclass(frozen=True)
class Teachers:
    """The teachers of one request: which folds there are, how each teacher is trained, and where.

    Attributes:
        config: the resolved request whose synthetic images are labelled.
        dataset: loaded under its setting.
        folds: their number; fewer than asked for where there are fewer training images.
        fold: ``(N,)`` fold of each training image.
        origin: what the teachers are made from apart from their settings.
    """

    config: ClassifyConfig
    dataset: LoadedDataset
    folds: int
    fold: np.ndarray
    origin: dict[str, Any]

    @classmethod
    def of(cls, config: ClassifyConfig, dataset: LoadedDataset) -> Teachers:
        """The teachers of a request; reads the training images' hashes."""
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
        """Of the runs, named after their settings and origin; the records of runs have the names of the prompts besides."""
        record = self.request(Path()).record()
        kept = {name: value for name, value in runs.plain(record).items() if name not in MAY_CHANGE}
        settings = files.sha256_text(json.dumps([self.folds, kept], sort_keys=True))[:8]
        parts = [settings, self.origin, fingerprint.names_identity(self.dataset.class_names)]
        return cache_folder() / FOLDER / files.sha256_text(json.dumps(parts, sort_keys=True))[:16]

    def request(self, folder: Path) -> ClassifyConfig:
        """A teacher's run: this request's network and training, on real images alone, to the last epoch."""
        config, dataset = self.config, self.dataset
        training = replace(config.training, seeds=None, patience=0, select_by="top1", eval_every=1, report_to="none")
        evaluation = replace(config.evaluation, test_dataset=None, shot_thresholds=tuple(dataset.spec.shot_thresholds))
        settings = {
            "training": training,
            "evaluation": evaluation,
            "synthetic": SyntheticSettings(),
            "use": UseSettings(),
        }
        return replace(config, syndata=(), **settings).with_seed(dataset.setting.subset_seed, folder)

    def run_folder(self, teacher: tuple[int, ...]) -> Path:
        """Of the run of the teacher without some folds."""
        return self.folder / f"without-{'-'.join(map(str, teacher))}"

    def rows(self, teacher: tuple[int, ...]) -> np.ndarray:
        """The training images that a teacher sees."""
        return np.flatnonzero(~np.isin(self.fold, teacher))

    def train(self, teacher: tuple[int, ...], train: Train) -> None:
        """Trains a teacher, resumes it, or finds it finished. It is tested on the images left out, and sees no others."""
        seen, table = self.rows(teacher), self.dataset.train
        rest = np.setdiff1d(np.arange(len(table)), seen)
        dataset = replace(self.dataset, train=table.take(seen), val=None, test=table.take(rest) if len(rest) else None)
        train(self.request(self.run_folder(teacher)), dataset, None)

    def remove_spoiled(self) -> None:
        """Removes the runs that cannot be resumed, whose images changed meanwhile: they are trained anew."""
        for record in self.folder.glob(f"*/{runs.ARGS_FILE}"):
            if (runs.load_arguments(record.parent) or {}).get(runs.SPOILED):
                shutil.rmtree(record.parent)


class SubsetLabels:
    """The class probabilities of a subset's images, made once and kept beside it.

    Args:
        teachers: that give them.
        folder: of the subset; ``#NAME`` at its end chooses ``meta-NAME.csv``.

    Raises:
        UserError: no teacher can label any image, too few folds, or labels are to be made where they cannot be kept.
    """

    def __init__(self, teachers: Teachers, folder: str):
        dataset, config = teachers.dataset, teachers.config
        root, table = locate(folder)
        self.ensemble, self.shown, self._reported = teachers, registry.shown_path(root), False
        self.images = read_subset(folder, dataset, config.synthetic.allow_other_sources)
        self.path = root / f"teacher-{table.stem}-{teachers.folder.name[:8]}.safetensors"
        fold_of = dict(zip(dataset.train.keys, teachers.fold.tolist(), strict=True))
        sources = self.images.sources
        of_sources = source_folds(sources, fold_of)
        candidates = left_out(of_sources, teachers.folds)
        # the classes that each teacher has images of, bool (T, K)
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
        """What is there, and what would be made."""
        if self.kept() is not None:
            return f"teacher labels of {self.shown}: {self.path.name}"
        return self._description()

    def _description(self) -> str:
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
        """The probabilities ``(M, K)`` that are kept, or None where there are none of these images."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, "np") as content:
                record = tensors.read_metadata(content.metadata())
                probabilities = content.get_tensor("probabilities")
        except (OSError, ValueError, SafetensorError):
            return None
        difference = fingerprint.data_difference(record, self.origin)
        if difference and not self._reported:
            log.info("%s is not of the present images and is made again (%s)", self.path, difference)
            self._reported = True
        return None if difference else probabilities

    def make(self, train: Train) -> np.ndarray:
        """The probabilities ``(M, K)``, kept or made. The processes of one training share the work, and all have those of the
        main one; of several runs at once one makes them. Raises UserError: of a training; or another run makes the same labels,
        and several processes would have to wait for it."""
        processes, folder = Processes(self.ensemble.config.device), self.ensemble.folder
        with contextlib.ExitStack() as held:
            probabilities = None
            if processes.main:
                try:
                    waiting = "another run that makes the same teacher labels"
                    lock = files.locked(folder / files.LOCK_FILE, wait=processes.count == 1, waiting_for=waiting)
                    held.enter_context(lock)
                except files.LockHeld as other:
                    raise UserError(
                        f"{folder}: another run ({other.holder()}) makes the same teacher labels; start this one again once it "
                        "has them"
                    ) from None
                probabilities = self.kept()
            if processes.add_up(torch.tensor(int(probabilities is not None), device=processes.device)):
                return self._sum(probabilities, processes)
            if processes.main:
                log.info("%s", self._description())
                self.ensemble.remove_spoiled()
            processes.wait()
            for teacher in self.teachers:
                self.ensemble.train(teacher, train)
            probabilities = self._probabilities(processes)
            if processes.main:
                tensors.save_tensors(self.path, {"probabilities": torch.from_numpy(probabilities)}, self.origin)
        if processes.main:
            with contextlib.suppress(NoRoom):  # the rest of the cache is in use
                make_room(cache_folder(), 0)
        return probabilities

    def _sum(self, probabilities: np.ndarray | None, processes: Processes) -> np.ndarray:
        """The sum over the processes of their ``(M, K)`` float32, None standing for zeros."""
        if processes.count == 1:
            return probabilities
        shape = len(self.images), len(self.ensemble.dataset.class_names)
        values = torch.zeros(shape) if probabilities is None else torch.from_numpy(probabilities)
        return processes.add_up(values.to(processes.device)).cpu().numpy()

    def _probabilities(self, processes: Processes) -> np.ndarray:
        """The mean of each image's teachers, float32 ``(M, K)``; zeros where it has none. Each process labels a share."""
        total = np.zeros((len(self.images), len(self.ensemble.dataset.class_names)), np.float32)
        right, tested, share = 0.0, 0, slice(processes.rank, None, processes.count)
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
                right += left * results_of(folder)["test"]["top1"] if left else 0.0
                tested += left
        if processes.main:
            log.info("teachers: %.1f %% right on training images that they had not seen", 100 * right / max(tested, 1))
        return self._sum(total, processes) / np.maximum(self.labelling.sum(axis=1, keepdims=True), 1).astype(np.float32)


def subset_labels(config: ClassifyConfig, dataset: LoadedDataset) -> list[SubsetLabels]:
    """The teacher labels of each subset of a resolved request; none where labels are those of the strengths."""
    if config.synthetic.soft_labels == "strength" or not config.syndata:
        return []
    if config.classifier.weights not in WEIGHTS:  # which would carry what they saw into every teacher
        flag = f"--soft_labels {config.synthetic.soft_labels}"
        inference.refuse_seen_images(classifier_file(config)[1], config, dataset, flag, ("train",))
    teachers = Teachers.of(config, dataset)
    return [SubsetLabels(teachers, folder) for folder in config.syndata]


def with_teacher_labels(
    images: SyntheticImages, subsets: Sequence[SubsetLabels], settings: SyntheticSettings, train: Train | None
) -> SyntheticImages | None:
    """The images under the labels of their teachers; as they are without any.

    Args:
        images: of all subsets, or a part of them.
        subsets: see :func:`subset_labels`.
        settings: how labels are made of the teachers' probabilities.
        train: trains a teacher; None: nothing is made, and the result is None where labels are missing.
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
