"""Unlabelled images under the labels of a classifier trained on the labelled ones, as a subset that stage 3 trains on.

Lee 2013, "Pseudo-Label": an image counts under the class that the classifier gives it. As in FixMatch (Sohn et al. 2020) only
where its probability reaches a threshold. Here the labels are made once, by a classifier trained before.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from semantic_aug import cli, files, meta_csv, registry, runs
from semantic_aug.classify.config import PlacementSettings, check_run
from semantic_aug.datasets import ImageTable, LoadedDataset, Setting, load_dataset
from semantic_aug.datasets.fingerprint import content_digest, files_digest, hash_images
from semantic_aug.datasets.origin import RunOrigin, check_classifier, class_order
from semantic_aug.datasets.settings import DatasetName, Pool, check_unlabelled
from semantic_aug.datasets.synthetic import DATA, UNLABELLED_FILE, write_sources
from semantic_aug.datasets.table import missing_paths
from semantic_aug.datasets.unlabelled import read_unlabelled, without_labelled
from semantic_aug.devices import device_of
from semantic_aug.errors import UserError

log = logging.getLogger(__name__)

COLUMNS = ("Confidence", "Unlabelled Image")
"""Further columns of the subset's ``meta.csv``."""


@dataclass(frozen=True, kw_only=True)
class UnlabelledSettings:
    """The unlabelled images, and the threshold of their labels."""

    TITLE = "unlabelled images"
    unlabelled: Path | str | None = cli.setting_of(Pool, "unlabelled")
    pseudo_threshold: float = cli.setting(
        0.95,
        type=cli.number(0, 1),
        metavar="P",
        help="least probability of a pseudo-label; images below it are not used",
    )


@dataclass(frozen=True, kw_only=True)
class LabelSettings:
    """The classifier that labels, and the folder of the subset."""

    TITLE = "labels"
    classifier: Path = cli.setting(
        type=cli.path, help="output folder of a finished train_cls.py run on the labelled images"
    )
    gpu: str | None = cli.setting_of(PlacementSettings, "gpu")
    output_dir: Path = cli.setting(
        type=cli.path, help="folder of the subset, for train_cls.py --syndata_dir", result=False
    )


def read_pool(
    settings: UnlabelledSettings, dataset: LoadedDataset, config_dir: Path = registry.CONFIG_DIR
) -> ImageTable:
    """The unlabelled images without the labelled training images."""
    if settings.unlabelled is None:
        raise UserError("pseudo-labels need --unlabelled PATH: a folder of images, a list, hf:ID or dataset:NAME")
    return without_labelled(read_unlabelled(settings.unlabelled, config_dir), dataset, settings.unlabelled)


def label(
    pool: ImageTable, classifier, threshold: float, folder: Path, order: Sequence[int], names: tuple[str, ...]
) -> np.ndarray:
    """Writes the subset: links to the confident images, and ``meta.csv``, which comes last.

    Args:
        pool: unlabelled images, decoded as they come.
        classifier: a :class:`semantic_aug.classify.inference.Classifier`.
        threshold: least probability.
        order: ``(K,)``, the classifier's output for each class.
        names: K class names.

    Returns:
        ``(K,)`` images of each class.

    Raises:
        UserError: no image reaches the threshold.
    """
    probabilities = classifier.probabilities(pool.image, len(pool))[:, order]
    classes, confidence = probabilities.argmax(1), probabilities.max(1)
    rows, slugs, lines = np.flatnonzero(confidence >= threshold).tolist(), meta_csv.slugs(names), []
    if not rows:
        raise UserError(
            f"--pseudo_threshold {threshold:g}: none of {len(pool)} unlabelled images reaches it (the best has "
            f"{confidence.max():.3f}); lower it"
        )
    shutil.rmtree(folder / DATA, ignore_errors=True)  # of an interrupted run
    for number, row in enumerate(rows):
        name, image = names[classes[row]], pool.encoded(int(pool.rows[row]))
        held = isinstance(image, bytes)  # in the pool's own file; its format is told by its content
        relative = f"{slugs[classes[row]]}/{number:06d}{'.png' if held else Path(image).suffix}"
        (folder / DATA / relative).parent.mkdir(parents=True, exist_ok=True)
        if held:
            (folder / DATA / relative).write_bytes(image)
        else:
            (folder / DATA / relative).symlink_to(image)
        lines.append([name, name, number, 1.0, relative, f"{confidence[row]:.4f}", pool.keys[row]])
    write_sources(folder, pool.keys, hash_images(pool).values, UNLABELLED_FILE)  # of which stage 3 asks what evaluates
    meta_csv.write(folder / meta_csv.FILE_NAME, lines, COLUMNS)
    return np.bincount(classes[rows], minlength=len(names))


def _is_complete(folder: Path) -> bool:
    """Whether a subset has its list and all images, which are links: a pool that was moved leaves them without their files."""
    file = folder / meta_csv.FILE_NAME
    if not file.is_file():
        return False
    paths = meta_csv.read(file).path
    return not missing_paths(lambda row: folder / DATA / paths[row], len(paths))


def build_parser() -> cli.Parser:
    """All flags of ``pseudo-label``."""
    parser = cli.Parser(prog="python -m semantic_aug.evaluation pseudo-label", description=__doc__)
    cli.add_settings(parser, DatasetName)
    cli.add_settings(parser, Setting)
    cli.add_settings(parser, UnlabelledSettings)
    cli.add_settings(parser, LabelSettings)
    cli.add_settings(parser, cli.RunSettings, leave_out=("seed",))
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parses, checks, labels, reports."""
    from semantic_aug.classify.inference import load_run

    args = build_parser().parse_args(argv)
    settings, request = cli.read_settings(UnlabelledSettings, args), cli.read_settings(LabelSettings, args)
    check_run(request.classifier)
    check_unlabelled(settings.unlabelled)
    dataset = load_dataset(args.dataset, cli.read_settings(Setting, args), args.config_dir)
    classifier = load_run(request.classifier, device_of(request.gpu))
    order = class_order(classifier.class_names, dataset, f"--classifier {request.classifier}")
    check_classifier(request.classifier, dataset)
    pool, folder = read_pool(settings, dataset, args.config_dir), registry.resolve_path(request.output_dir)
    print(f"{dataset.describe()}; unlabelled {len(pool)}")
    if args.dry_run:
        return 0
    further = lambda: {  # noqa: E731
        "classifier": files_digest([classifier.path]),
        "unlabelled": content_digest(hash_images(pool).hex()),
    }
    origin = RunOrigin(dataset, ("train",), (), further=further, without=("super_class",))
    record = {"dataset": dataset.name, "pseudo_threshold": settings.pseudo_threshold}
    with files.no_trace(folder, (runs.ARGS_FILE,)):
        known = runs.claim(folder, record, "--output_dir", ("dataset",), origin=origin)  # compared by content
        if known and _is_complete(folder):
            if not (folder / UNLABELLED_FILE).is_file():  # of an earlier version
                write_sources(folder, pool.keys, hash_images(pool).values, UNLABELLED_FILE)
            log.info("%s is finished already", folder)
            return 0
        counts = label(pool, classifier, settings.pseudo_threshold, folder, order, dataset.source_names)
    print(f"{counts.sum()} of {len(pool)} unlabelled images have a pseudo-label: ", end="")
    print(", ".join(f"{name} {count}" for name, count in zip(dataset.class_names, counts, strict=True)))
    print(f"to use it: train_cls.py --syndata_dir '{registry.shown_path(folder)}'")
    return 0
