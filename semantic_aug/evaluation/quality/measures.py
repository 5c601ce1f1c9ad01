"""Measures of synthetic subsets: one row per strength and target class, and totals over either and both.

Means over a row's images: faithfulness (see :mod:`semantic_aug.evaluation.quality.faithfulness`), CLIP score, distance to
the source image, distance to the nearest real training image and the share of near-copies. Over the row's images as a set:
distance within class, FID and KID to the real training images (of the row's class, or all), and to a reference subset.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from semantic_aug.classify.inference import Classifier
from semantic_aug.datasets import LoadedDataset
from semantic_aug.datasets.fingerprint import content_digest, hash_files, hash_images
from semantic_aug.evaluation.quality import distances, faithfulness
from semantic_aug.evaluation.quality.clip import Clip, clip_score
from semantic_aug.evaluation.quality.features import Extractor
from semantic_aug.evaluation.quality.subset import SOURCE_COLUMN, Subset
from semantic_aug.prompts import SAMPLING_TEMPLATE, class_phrase, fill
from semantic_aug.seeding import numpy_rng

log = logging.getLogger(__name__)

ALL = "all"
"""Stands for every strength or every class in the totals."""
REAL = "real"
"""Name of the rows that give the real training images' own values, to compare with."""
COPY_PERCENTILE = 1.0

IMAGE_COLUMNS = (
    *("source_probability", "target_probability", "source_top1", "target_top1", "label_agreement", "clip_score"),
    *("source_distance", "nearest_real", "near_copies"),
)
SET_COLUMNS = ("class_distance", "fid", "kid", "kid_std", "reference_fid", "reference_kid", "reference_kid_std")
COLUMNS = ("subset", "strength", "target_class", "images", *IMAGE_COLUMNS, *SET_COLUMNS)


@dataclass(frozen=True)
class Looks:
    """One set of images as the models see it.

    Attributes:
        name: of the subset, or :data:`REAL`.
        classes: int64 ``(N,)``, target classes.
        strengths: ``(N,)``, rounded; None for real images.
        features: float32 ``(N, D)``.
        values: by column, ``(N,)`` each; NaN where an image has none.
    """

    name: str
    classes: np.ndarray
    strengths: np.ndarray | None
    features: np.ndarray
    values: Mapping[str, np.ndarray]


@dataclass
class Measurer:
    """Everything subsets are measured with.

    Attributes:
        dataset: whose training images are the real ones.
        extractor: of features.
        judge: None: no faithfulness by a classifier.
        clip: None: no CLIP score.
        gamma: of the soft labels.
        seed: of KID's subsets.
        copy_percentile: see :meth:`real`.
        batch_size: images at a time.
    """

    dataset: LoadedDataset
    extractor: Extractor
    judge: Classifier | None = None
    clip: Clip | None = None
    gamma: float = 0.5
    seed: int = 0
    copy_percentile: float = COPY_PERCENTILE
    batch_size: int = 64

    def real(self) -> tuple[Looks, float]:
        """The real training images, and the distance below which an image counts as a copy of one.

        The threshold is a low percentile of the real images' distances to their nearest other real image: an image nearer to
        a training image than all but that share of real ones is not a new one. Photographs taken twice lower it.
        """
        train = self.dataset.train
        features = self.extractor.features(
            train.image, len(train), content_digest(hash_images(train).hex()), self.batch_size
        )
        nearest = distances.neighbours(features, features, skip_self=True)[0]
        nearest = nearest[:, 0] if nearest.shape[1] else np.full(len(train), np.nan)
        threshold = float(np.percentile(nearest, self.copy_percentile))
        values = {"nearest_real": nearest, "near_copies": nearest < threshold}
        if self.clip:
            values["clip_score"] = self._clip_scores(train.image, train.labels)
        return Looks(REAL, train.labels, None, features, values), threshold

    def look(self, subset: Subset, real: Looks, threshold: float) -> Looks:
        """A subset's images, each with the values it has."""
        images = subset.images
        features = self.features(subset)
        nearest = distances.neighbours(features, real.features)[0][:, 0]
        values = {"nearest_real": nearest, "near_copies": nearest < threshold}
        known = subset.sources >= 0
        if known.any():
            values["source_distance"] = np.full(len(subset), np.nan)
            values["source_distance"][known] = distances.cosine_distance(
                features[known], real.features[subset.sources[known]]
            )
        if self.judge:
            values |= faithfulness.scores(faithfulness.judged(self.judge, images, self.dataset), images, self.gamma)
        if self.clip:
            values["clip_score"] = self._clip_scores(images.image, images.target)
        return Looks(subset.name, images.target, subset.strengths, features, values)

    def features(self, subset: Subset) -> np.ndarray:
        """Features ``(M, D)`` of a subset."""
        content = content_digest(hash_files(subset.images.paths, "synthetic images").hex())
        return self.extractor.features(subset.images.image, len(subset), content, batch_size=self.batch_size)

    def reference(self, subset: Subset) -> Looks:
        """A subset that others are compared with by FID and KID only."""
        return Looks(subset.name, subset.images.target, subset.strengths, self.features(subset), {})

    def _clip_scores(self, read, classes: np.ndarray) -> np.ndarray:
        super_class = self.dataset.spec.super_class
        phrases = [fill(SAMPLING_TEMPLATE, class_phrase(name, super_class)) for name in self.dataset.class_names]
        return clip_score(
            self.clip.images(read, len(classes), self.batch_size), self.clip.texts(phrases)[np.asarray(classes)]
        )

    def rows(self, looks: Looks, real: Looks, reference: Looks | None = None) -> list[dict]:
        """The rows of one set of images, see :data:`COLUMNS`; what it does not have is left out."""
        names, out = self.dataset.source_names, []
        groups = list(_groups(looks))
        for strength, label, which in tqdm(groups, desc=looks.name, unit="row", mininterval=1.0, leave=False):
            row = {
                "subset": looks.name,
                "strength": strength,
                "target_class": ALL if label is None else names[label],
                "images": int(which.sum()),
            }
            with warnings.catch_warnings():  # a row without any known source: its mean is NaN, and left out
                warnings.simplefilter("ignore", RuntimeWarning)
                row |= {name: float(np.nanmean(values[which])) for name, values in looks.values.items()}
            row["class_distance"] = _within_class(looks, which)
            if looks is not real:
                row |= self._to(looks, which, real, label, None, "")
            if reference is not None:
                row |= self._to(looks, which, reference, label, strength, "reference_")
            out.append({name: value for name, value in row.items() if value == value})
        return out

    def _to(
        self,
        looks: Looks,
        which: np.ndarray,
        other: Looks,
        label: int | None,
        strength: float | str | None,
        prefix: str,
    ) -> dict[str, float]:
        """FID (totals over classes only) and KID of a row's images to another set's of the same class and strength."""
        theirs = np.ones(len(other.classes), bool) if label is None else other.classes == label
        if other.strengths is not None and strength != ALL and (other.strengths == strength).any():
            theirs = theirs & (other.strengths == strength)
        a, b = looks.features[which], other.features[theirs]
        rng = numpy_rng(self.seed, "kid", str(label), str(strength))
        found = {prefix + "fid": distances.frechet_distance(a, b)} if label is None else {}
        return found | dict(
            zip((prefix + "kid", prefix + "kid_std"), distances.kernel_distance(a, b, rng), strict=True)
        )


def _groups(looks: Looks) -> Iterator[tuple[float | str, int | None, np.ndarray]]:
    """Strength, class and rows ``(N,)`` of each group, totals last: per strength, per class where strengths differ, all."""
    classes = np.unique(looks.classes)
    strengths = [] if looks.strengths is None else np.unique(looks.strengths).tolist()
    everything = np.ones(len(looks.classes), bool)
    for strength in strengths if len(strengths) > 1 else []:
        mine = looks.strengths == strength
        for label in classes:
            if (mine & (looks.classes == label)).any():
                yield strength, int(label), mine & (looks.classes == label)
        yield strength, None, mine
    whole = strengths[0] if len(strengths) == 1 else ALL
    for label in classes:
        yield whole, int(label), looks.classes == label
    yield whole, None, everything


def _within_class(looks: Looks, which: np.ndarray) -> float:
    """Mean cosine distance of two images of one class, classes weighted by their images."""
    classes = looks.classes[which]
    labels, counts = np.unique(classes, return_counts=True)
    spread = np.array([distances.mean_pairwise(looks.features[which][classes == label]) for label in labels])
    known = ~np.isnan(spread)
    return float(np.average(spread[known], weights=counts[known])) if known.any() else float("nan")


def missing(subsets: Sequence[Subset], measurer: Measurer, dimensions: int, real: int) -> list[str]:
    """What is left out or to be read with care, and what it would need; one line each."""
    lines = []
    if measurer.judge is None:
        lines.append("source and target probability, top-1 and label agreement are left out: they need --classifier")
    if measurer.clip is None:
        lines.append("clip_score is left out: it needs --clip")
    for subset in subsets:
        unknown = int((subset.sources < 0).sum())
        if unknown:
            share = "" if unknown == len(subset) else f" for {unknown} of {len(subset)} images"
            lines.append(
                f"source_distance of {subset.name} is left out{share}: it needs the column '{SOURCE_COLUMN}' of meta.csv, "
                "with training images of this setting"
            )
        if len(subset) <= dimensions or real <= dimensions:
            lines.append(
                f"fid of {subset.name}: {len(subset)} synthetic and {real} real images for {dimensions} feature dimensions; "
                "with fewer images than dimensions it is biased upwards, kid is not"
            )
    return lines
