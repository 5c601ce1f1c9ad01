"""Faithfulness, diversity, distances to real images and near-copies of synthetic subsets, per strength and class.

One row per strength and target class, and totals over either and both. Means over a row's images: faithfulness (see
:mod:`semantic_aug.evaluation.quality.faithfulness`), CLIP score, distance to the source image, distance to the nearest real
training image and the share of near-copies. Over the row's images as a set: distance within class, Frechet and kernel
distance to the real training images (of the row's class, or all), and to a reference subset. The names of these columns
hold the network whose features are compared: FID and KID are the same distances over Inception's.
"""

from __future__ import annotations

import csv
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from semantic_aug import cli, files, registry, runs
from semantic_aug.classify.config import SyntheticSettings
from semantic_aug.datasets import ImageTable
from semantic_aug.datasets.synthetic import SyntheticImages
from semantic_aug.errors import UserError
from semantic_aug.evaluation.quality import distances, faithfulness, report
from semantic_aug.evaluation.quality.inputs import (
    FeatureSettings,
    Inputs,
    OutputSettings,
    Subset,
    make_parser,
    open_subset,
    read_inputs,
)
from semantic_aug.evaluation.quality.review import list_identity
from semantic_aug.meta_csv import SOURCE_COLUMNS
from semantic_aug.seeding import numpy_rng

if TYPE_CHECKING:
    from semantic_aug.classify.features import Extractor

EQUAL_DISTANCE = 1e-5
"""Cosine distance of features in float32 below which two images count as equal."""
IMAGES_FILE = "images.csv"
"""The values of each image, subset after subset in the order of their lists."""


@dataclass(frozen=True, kw_only=True)
class MeasureSettings:
    """How subsets are measured."""

    TITLE = "measures"
    reference: str | None = cli.setting(
        None,
        type=cli.path_or(),
        metavar="DIR",
        help="another subset (DIR#NAME for a filtered one): distances to it are given too, as of fewer sampling steps to more",
    )
    gamma: float = cli.setting_of(SyntheticSettings, "gamma")
    copy_percentile: float = cli.setting(
        1.0,
        type=cli.number(0, 100),
        metavar="P",
        help="an image is a near-copy where a training image is nearer to it than the P-th percentile of the training images' "
        "distances to their own nearest neighbour",
    )


SETTINGS = (FeatureSettings, OutputSettings, MeasureSettings)


def build_parser() -> cli.Parser:
    """All flags of this command."""
    return make_parser("measure", __doc__.split("\n")[0], SETTINGS)


IMAGE_COLUMNS = (
    "source_probability target_probability source_top1 target_top1 label_agreement clip_score source_distance nearest_real "
    "near_copies"
).split()
"""Values that an image may have."""
FITTING_GAMMA = "fitting_gamma"


def column_names(network: str) -> list[str]:
    """All columns, in order; those of distances between sets name the network."""
    names = ["subset", "strength", "target_class", "images", *IMAGE_COLUMNS, FITTING_GAMMA, "class_distance"]
    for prefix in ("", "reference_"):
        names += [f"{prefix}frechet_{network}", f"{prefix}kernel_{network}", f"{prefix}kernel_{network}_std"]
    return names


@dataclass(frozen=True)
class ImageSet:
    """A set of images with their features and values.

    Attributes:
        name: of the subset, or :data:`report.REAL`.
        classes: int64 ``(N,)``, target classes.
        strengths: ``(N,)``, rounded; None for real images.
        features: float32 ``(N, D)``.
        values: by column, ``(N,)`` each; NaN where an image has none.
        between: ``(N,)``, strength of each image between two known classes, NaN of others; None without a classifier.
    """

    name: str
    classes: np.ndarray
    strengths: np.ndarray | None
    features: np.ndarray
    values: Mapping[str, np.ndarray]
    between: np.ndarray | None = None

    def groups(self) -> Iterator[tuple[float | str, int | None, np.ndarray]]:
        """Strength, class and rows bool ``(N,)`` of each group: the classes and the total of each strength, then of all."""
        strengths = [] if self.strengths is None else np.unique(self.strengths).tolist()
        groups = {strength: self.strengths == strength for strength in strengths}
        if len(groups) != 1:
            groups[report.ALL] = np.ones(len(self.classes), bool)
        for strength, rows in groups.items():
            for label in np.unique(self.classes[rows]).tolist():
                yield strength, label, rows & (self.classes == label)
            yield strength, None, rows

    def fitting_gamma(self, rows: np.ndarray) -> float:
        """See :func:`faithfulness.fitting_gamma`; NaN where no image is between two classes."""
        if self.between is None or not (rows := rows & ~np.isnan(self.between)).any():
            return float("nan")
        probabilities = (self.values[name][rows] for name in ("source_probability", "target_probability"))
        return faithfulness.fitting_gamma(self.between[rows], *probabilities)

    def class_distance(self, rows: np.ndarray) -> float:
        """Mean cosine distance of two images of one class, classes weighted by their images."""
        return float(self._over_classes(rows, distances.mean_pairwise))

    def class_distance_interval(self, rows: np.ndarray, rng: np.random.Generator) -> tuple[float, float] | None:
        """95 % bootstrap interval of the class distance, images resampled within each class; None where a class has two images,
        which cannot be resampled."""
        if (np.unique(self.classes[rows], return_counts=True)[1] == 2).any():
            return None
        return percentile_interval(self._over_classes(rows, lambda part: distances.resampled_pairwise(part, rng)))

    def _over_classes(self, rows: np.ndarray, spread: Callable[[np.ndarray], float | np.ndarray]) -> np.ndarray:
        """Mean of ``spread`` over the features of each class, weighted by images; NaN where no class has a value."""
        classes, features = self.classes[rows], self.features[rows]
        labels, counts = np.unique(classes, return_counts=True)
        values = np.ma.masked_invalid([spread(features[classes == label]) for label in labels])
        return np.ma.filled(np.ma.average(values, axis=0, weights=counts), np.nan)


@dataclass
class Measurer:
    """Everything subsets are measured with.

    Attributes:
        inputs: the data set, whose training images are the real ones, and the classifier and CLIP where they are given.
        extractor: of the features that are compared.
        settings: gamma of the soft labels, percentile of near-copies.
        seed: of the kernel distance's subsets and of the resamples.
    """

    inputs: Inputs
    extractor: Extractor
    settings: MeasureSettings = MeasureSettings()
    seed: int = 0

    def features(self, images: ImageTable | SyntheticImages) -> np.ndarray:
        """Features ``(N, D)`` of images."""
        return self.extractor.of_images(images, self.inputs.models.batch_size)

    def measure_real(self) -> tuple[ImageSet, float]:
        """The real training images, and the distance below which an image counts as a near-copy of one.

        The threshold is a low percentile of the real images' distances to their nearest other real image, at least
        :data:`EQUAL_DISTANCE`, since photographs taken twice lower it.
        """
        train = self.inputs.dataset.train
        features = self.features(train)
        nearest = distances.neighbours(features, features, skip_self=True)[0]
        nearest = nearest[:, 0] if nearest.shape[1] else np.full(len(train), np.nan)
        threshold = float(np.fmax(np.percentile(nearest, self.settings.copy_percentile), EQUAL_DISTANCE))
        values = {"nearest_real": nearest, "near_copies": nearest < threshold}
        if self.inputs.clip:
            values["clip_score"] = self.inputs.clip_scores(train.image, train.labels)
        return ImageSet(report.REAL, train.labels, None, features, values), threshold

    def measure_subset(self, subset: Subset, real: ImageSet, threshold: float) -> ImageSet:
        """The images of a subset with all their values."""
        images, features = subset.images, self.features(subset.images)
        nearest = distances.neighbours(features, real.features)[0][:, 0]
        values = {"nearest_real": nearest, "near_copies": nearest < threshold}
        known, between = subset.sources >= 0, None
        if known.any():
            values["source_distance"] = np.full(len(subset), np.nan)
            sources = real.features[subset.sources[known]]
            values["source_distance"][known] = distances.cosine_distance(features[known], sources)
        if self.inputs.classifier:
            values |= faithfulness.scores(self.inputs.class_probabilities(images), images, self.settings.gamma)
            mixed = (images.source != images.target) & ~images.of_any_class & (images.strength < 1)
            between = np.where(mixed, images.strength, np.nan)
        if self.inputs.clip:
            values["clip_score"] = self.inputs.clip_scores(images.image, images.target)
        return ImageSet(subset.name, images.target, subset.strengths, features, values, between)

    def measure_reference(self, subset: Subset) -> ImageSet:
        """The images of the reference subset, without values: only distances between sets are measured to it."""
        return ImageSet(subset.name, subset.images.target, subset.strengths, self.features(subset.images), {})

    def rows(self, images: ImageSet, real: ImageSet, reference: ImageSet | None = None) -> list[dict]:
        """The rows of a set of images, see :func:`column_names`; columns without a value are left out."""
        names, out = self.inputs.dataset.source_names, []
        for strength, label, chosen in tqdm(
            list(images.groups()), desc=images.name, unit="row", mininterval=1.0, leave=False
        ):
            row = {
                "subset": images.name,
                "strength": strength,
                "target_class": report.ALL if label is None else names[label],
                "images": int(chosen.sum()),
            }
            with warnings.catch_warnings():  # a row without any known source: its mean is NaN, and left out
                warnings.simplefilter("ignore", RuntimeWarning)
                row |= {name: float(np.nanmean(values[chosen])) for name, values in images.values.items()}
            row[report.INTERVALS] = {name: mean_interval(values[chosen]) for name, values in images.values.items()}
            row[FITTING_GAMMA] = images.fitting_gamma(chosen)
            row["class_distance"] = images.class_distance(chosen)
            if label is None:  # the report's rows; a resample of few images of a class says little
                rng = numpy_rng(self.seed, "bootstrap", str(strength))
                row[report.INTERVALS]["class_distance"] = images.class_distance_interval(chosen, rng)
            for other, of_strength, prefix in ((real, None, ""), (reference, strength, "reference_")):
                if other is not None and not (images is real and other is real):
                    values, intervals = self._set_distances(images.features[chosen], other, label, of_strength, prefix)
                    row |= values
                    row[report.INTERVALS] |= intervals
            row[report.INTERVALS] = {name: interval for name, interval in row[report.INTERVALS].items() if interval}
            out.append({name: value for name, value in row.items() if value == value})
        return out

    def _set_distances(
        self, features: np.ndarray, other: ImageSet, label: int | None, strength: float | str | None, prefix: str
    ) -> tuple[dict[str, float], dict[str, tuple[float, float] | None]]:
        """Frechet (totals over classes only) and kernel distance to another set's images of the same class and strength.
        Returns the distances by column, and the intervals of those that have one."""
        chosen = np.ones(len(other.classes), bool) if label is None else other.classes == label
        if other.strengths is not None and strength != report.ALL and (other.strengths == strength).any():
            chosen = chosen & (other.strengths == strength)
        rng = numpy_rng(self.seed, "kid", str(label), str(strength))
        kernel = f"{prefix}kernel_{self.extractor.network}"
        mean, deviation = distances.kernel_distance(features, other.features[chosen], rng)
        values = {kernel: mean, f"{kernel}_std": deviation}
        if label is None:
            distance = distances.frechet_distance(features, other.features[chosen])
            values[f"{prefix}frechet_{self.extractor.network}"] = distance
            resamples = distances.resampled_kernel(features, other.features[chosen], rng)
            return values, {kernel: percentile_interval(resamples)}
        return values, {}

    def notes(self, real: ImageSet) -> list[str]:
        """Notes on values that are left out or biased, and on what they would need; a line each."""
        lines, dimensions = [], real.features.shape[1]
        if self.inputs.classifier is None:
            lines.append(
                "source and target probability, top-1 and label agreement are left out: they need --classifier"
            )
        if self.inputs.clip is None:
            lines.append("clip_score is left out: it needs --clip")
        for subset in self.inputs.subsets:
            unknown = int((subset.sources < 0).sum())
            if unknown:
                share = "" if unknown == len(subset) else f" for {unknown} of {len(subset)} images"
                lines.append(
                    f"source_distance of {subset.name} is left out{share}: it needs the column '{SOURCE_COLUMNS[0]}' of "
                    "meta.csv, with training images of this setting"
                )
            if min(len(subset), len(real.classes)) <= dimensions:
                lines.append(
                    f"frechet distance of {subset.name}: {len(subset)} synthetic and {len(real.classes)} real images for "
                    f"{dimensions} feature dimensions; with fewer images than dimensions it is biased upwards, the kernel "
                    "distance is not"
                )
        return lines


def mean_interval(values: np.ndarray) -> tuple[float, float] | None:
    """95 % confidence interval of a mean over images (Student's t; of a share, Wilson's); None for fewer than two values.

    It holds for other images made in the same way; images of one source image are more alike than it assumes.
    """
    from scipy import stats

    values = values[~np.isnan(values.astype(float))]
    if len(values) < 2:
        return None
    if np.isin(values, (0, 1)).all():  # a share
        interval = stats.binomtest(int(values.sum()), len(values)).proportion_ci(method="wilson")
        return float(interval.low), float(interval.high)
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return float(values.mean()) - half, float(values.mean()) + half


def percentile_interval(values: np.ndarray) -> tuple[float, float] | None:
    """95 % interval of the values ``(R,)`` of bootstrap resamples; None where they have none."""
    values = values[~np.isnan(values)]
    return tuple(np.percentile(values, (2.5, 97.5)).tolist()) if len(values) else None


def write_images(path: Path, subsets: Sequence[Subset], values: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Writes a row for each image: subset, file and values, empty where it has none; ``values`` by subset and column."""
    columns = [name for name in IMAGE_COLUMNS if any(name in subset_values for subset_values in values.values())]
    with files.csv_writer(path) as writer:
        writer.writerow(["subset", "file", *columns])
        for subset in subsets:
            absent = np.full(len(subset), np.nan)
            cells = [np.asarray(values[subset.name].get(name, absent), float).tolist() for name in columns]
            for file, row in zip(subset.images.paths, zip(*cells, strict=True), strict=True):
                writer.writerow([subset.name, file.name, *(report.value_text(v, 6) if v == v else "" for v in row)])


def read_images(path: Path, subset: str, images: Sequence[Path]) -> dict[str, np.ndarray]:
    """The values of a subset's ``images`` that :func:`write_images` wrote: ``(M,)`` by column, NaN where an image has none.
    Raises UserError: the file does not list these images in this order, or a value is no number."""
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as lines:
        rows = [row for row in csv.DictReader(lines) if row.get("subset") == subset]
    damaged = UserError(f"{path} is damaged, or was edited: run `measure` into {path.parent} again")
    if [row.get("file") for row in rows] != [image.name for image in images] or None in rows[-1].values():
        raise damaged
    columns = [name for name in rows[0] if name in IMAGE_COLUMNS]
    try:
        return {name: np.array([float(row[name] or "nan") for row in rows]) for name in columns}
    except ValueError:  # as of "0,63", which a spreadsheet writes
        raise damaged from None


def measured(folder: Path | None, subset: Subset, class_names: Sequence[str]) -> dict[str, np.ndarray]:
    """Values of a subset's images in a folder that ``measure`` wrote, ``(M,)`` by column, NaN where an image has none; empty
    without a folder. Raises UserError: the folder is not a run of `measure` on these images."""
    if folder is None:
        return {}
    record = (runs.load_arguments(folder) or {}).get(runs.MADE_FROM) or {}
    if not (folder / IMAGES_FILE).is_file() or "subsets" not in record:
        raise UserError(f"--measures {folder} holds no {IMAGES_FILE}: run `measure` into it (again)")
    identity = list_identity(subset.images, class_names)
    name = next((name for name, other in record["subsets"].items() if other == identity), None)
    if name is None:
        raise UserError(
            f"--measures {folder} is not about the images of subset {subset.name} as they are now (it is about "
            f"{', '.join(record['subsets'])}): run `measure` on it"
        )
    return read_images(folder / IMAGES_FILE, name, subset.images.paths)


def main(argv: list[str] | None = None) -> int:
    """Measures, writes the files and prints the totals."""
    args = build_parser().parse_args(argv)
    inputs, settings = read_inputs(args, SETTINGS), cli.read_settings(MeasureSettings, args)
    for model in ("classifier", "clip"):
        getattr(inputs, model)  # loads it, so that a wrong one is refused before anything is computed
    reference = None
    if settings.reference:
        reference = open_subset("reference", [settings.reference], inputs.dataset, args.allow_other_sources)
    extractor = cli.read_settings(FeatureSettings, args).load(inputs.device)
    inputs.print_summary()
    if args.dry_run:
        return 0
    folder, columns = registry.resolve_path(args.output_dir), column_names(extractor.network)
    with inputs.claimed(folder):
        measurer = Measurer(inputs, extractor, settings, args.seed)
        real, threshold = measurer.measure_real()
        other = measurer.measure_reference(reference) if reference else None
        rows, values = [], {}
        for subset in inputs.subsets:
            images = measurer.measure_subset(subset, real, threshold)
            rows += measurer.rows(images, real, other)
            values[subset.name] = images.values
        rows += measurer.rows(real, real)
        notes = [*measurer.notes(real), *report.picture_notes(rows)]
        facts = {"arguments": inputs.record, "copy_threshold": threshold, "notes": notes, "versions": runs.versions()}
        links = report.subset_section(inputs.subsets, folder, args)
        written = [*report.write(folder, rows, columns, facts, links), folder / IMAGES_FILE]
        write_images(written[-1], inputs.subsets, values)
    print(report.table(rows, columns).markdown())
    print(
        f"near-copies: nearer than {threshold:.4g} to a training image (percentile {settings.copy_percentile:g} of real ones)"
    )
    print(*(f"note: {note}" for note in notes), sep="\n")
    print(f"written: {', '.join(registry.shown_path(file) for file in written)}")
    return 0
