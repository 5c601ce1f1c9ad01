"""Sheets of synthetic images: translations beside their sources, nearest real images, and failures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from semantic_aug import cli, files, registry
from semantic_aug.errors import UserError
from semantic_aug.evaluation.quality import distances, faithfulness
from semantic_aug.evaluation.quality.inputs import (
    FeatureSettings,
    Inputs,
    OutputSettings,
    Subset,
    make_parser,
    read_inputs,
)
from semantic_aug.meta_csv import SOURCE_COLUMNS, slugs
from semantic_aug.pictures import Cell, grid
from semantic_aug.seeding import numpy_rng

if TYPE_CHECKING:
    from semantic_aug.classify.features import Extractor

KINDS = ("translations", "neighbours", "failures")
MOST_COLUMNS = 12
RIGHT, WRONG = (40, 140, 60), (200, 40, 40)


@dataclass(frozen=True, kw_only=True)
class PictureSettings:
    """Which sheets are drawn, and how large."""

    TITLE = "pictures"
    kinds: tuple[str, ...] | None = cli.setting(
        None,
        nargs="+",
        choices=KINDS,
        help="translations: a source image in each row; neighbours: synthetic images and the real ones nearest to them; "
        "failures: the lowest target probability under --classifier (default: all that the given flags allow)",
    )
    rows: int = cli.setting(8, type=cli.whole(1), help="rows of each sheet")
    neighbours: int = cli.setting(5, type=cli.whole(1), help="real images beside each synthetic one")
    size: int = cli.setting(160, type=cli.whole(16), metavar="PIXELS", help="side of each image")


SETTINGS = (FeatureSettings, OutputSettings, PictureSettings)


def build_parser() -> cli.Parser:
    """All flags of this command."""
    return make_parser("pictures", __doc__, SETTINGS)


def chosen_sources(subsets: Sequence[Subset], classes: np.ndarray, count: int, seed: int) -> list[int]:
    """Training images to show: those most subsets have translations of, taking turns over their classes.

    Args:
        subsets: with ``sources`` ``(M,)``, rows of the training images or -1.
        classes: int ``(N,)`` labels of the training images.
        count: how many are wanted.
        seed: decides among images that are equally good.
    """
    used = np.zeros(len(classes), int)
    for subset in subsets:
        used[np.unique(subset.sources[subset.sources >= 0])] += 1
    order = numpy_rng(seed, "pictures").permutation(len(classes))
    order = order[np.argsort(-used[order], kind="stable")]
    turn, seen = np.zeros(len(classes), int), {}
    for row in order.tolist():
        turn[row] = seen[classes[row]] = seen.get(classes[row], 0) + 1
    order = [row for row in sorted(order.tolist(), key=lambda row: (-used[row], turn[row])) if used[row]]
    return sorted(order[:count], key=lambda row: (classes[row], row))


def _translation(inputs: Inputs, subset: Subset, row: int) -> Cell:
    images, names = subset.images, inputs.dataset.class_names
    return Cell(images.image(row), f"{names[images.target[row]]}, s={images.strength[row]:g}")


def translations(inputs: Inputs, settings: PictureSettings, seed: int) -> Image.Image | None:
    """Each row a source image and its translations in one subset, by target and strength; None without known sources."""
    train, names = inputs.dataset.train, inputs.dataset.class_names
    lines, titles = [], []
    for source in chosen_sources(inputs.subsets, train.labels, settings.rows, seed):
        for subset in inputs.subsets:
            rows, images = np.flatnonzero(subset.sources == source).tolist(), subset.images
            rows = sorted(rows, key=lambda i: (images.target[i], images.strength[i]))[: MOST_COLUMNS - 1]
            if rows:
                real = Cell(train.image(source), f"real: {names[train.labels[source]]}")
                lines.append([real, *(_translation(inputs, subset, row) for row in rows)])
                titles.append(subset.name if len(inputs.subsets) > 1 else "")
    if not lines:
        return None
    title = "real images and their translations"
    return grid(lines, titles if any(titles) else (), size=settings.size, title=title)


def neighbours(inputs: Inputs, settings: PictureSettings, subset: Subset, extractor: Extractor) -> Image.Image:
    """Synthetic images from the most to the least similar to a training image, evenly over the ranks, and their neighbours."""
    train, names, images = inputs.dataset.train, inputs.dataset.class_names, subset.images
    real, synthetic = (extractor.of_images(each, inputs.models.batch_size) for each in (train, images))
    distance, nearest = distances.neighbours(synthetic, real, settings.neighbours)
    ranked = np.argsort(distance[:, 0], kind="stable")
    count = min(settings.rows, len(ranked))
    shown = ranked[np.unique(np.linspace(0, len(ranked) - 1, count).round().astype(int))]
    lines = []
    for i in shown.tolist():
        cells = [_translation(inputs, subset, i)]
        for away, row in zip(distance[i], nearest[i].tolist(), strict=True):
            caption = f"{away:.3f} {names[train.labels[row]]}" + (" (its source)" if row == subset.sources[i] else "")
            frame = RIGHT if train.labels[row] == images.target[i] else None
            cells.append(Cell(train.image(row), caption, frame))
        lines.append(cells)
    columns = ["synthetic", "nearest real", *[""] * (settings.neighbours - 1)]
    title = (
        f"{subset.name}: cosine distance to the nearest training images, most alike first; framed: the target's class"
    )
    return grid(lines, (), columns, settings.size, title)


def failures(inputs: Inputs, settings: PictureSettings, subset: Subset) -> Image.Image:
    """Images with the lowest target probability, of the target classes with the lowest mean, and their predictions."""
    names, images = inputs.dataset.class_names, subset.images
    probabilities = inputs.class_probabilities(images)
    score, predicted = faithfulness.target_mass(probabilities, images), probabilities.argmax(1)
    mean = {label: score[images.target == label].mean() for label in np.unique(images.target).tolist()}
    lines, titles = [], []
    for label in sorted(mean, key=mean.get)[: settings.rows]:
        of_class = np.flatnonzero(images.target == label)
        worst = of_class[np.argsort(score[of_class], kind="stable")][: MOST_COLUMNS // 2].tolist()
        captions = [f"{score[i]:.2f} looks {names[predicted[i]]}" for i in worst]
        frames = [RIGHT if predicted[i] == label else WRONG for i in worst]
        lines.append([Cell(images.image(i), *rest) for i, *rest in zip(worst, captions, frames, strict=True)])
        titles.append(f"{names[label]} ({mean[label]:.2f})")
    title = f"{subset.name}: lowest probability of the target class (mean of the class in brackets)"
    return grid(lines, titles, size=settings.size, title=title)


def main(argv: list[str] | None = None) -> int:
    """Draws the sheets into the output folder."""
    args = build_parser().parse_args(argv)
    inputs, settings = read_inputs(args, SETTINGS), cli.read_settings(PictureSettings, args)
    kinds = settings.kinds or [kind for kind in KINDS if kind != "failures" or args.classifier]
    if "failures" in kinds and inputs.classifier is None:  # loaded here, so that a wrong one is refused first
        raise UserError("--kinds failures needs a classifier: give --classifier")
    extractor = cli.read_settings(FeatureSettings, args).load(inputs.device) if "neighbours" in kinds else None
    print(inputs.dataset.describe())
    folder = registry.resolve_path(args.output_dir)
    if args.dry_run:
        print(f"would draw {', '.join(kinds)} into {registry.shown_path(folder)}")
        return 0
    with inputs.claimed(folder, "*.png"):
        if "translations" in kinds:
            sheet = translations(inputs, settings, args.seed)
            if sheet is None:
                print(
                    f"note: translations are left out: they need the column '{SOURCE_COLUMNS[0]}' of meta.csv, with training "
                    "images of this setting"
                )
            else:
                _save(folder / "translations.png", sheet)
        names = slugs([subset.name for subset in inputs.subsets])
        for subset, name in zip(inputs.subsets, names, strict=True):
            end = f"{name}.png" if len(inputs.subsets) > 1 else "all.png"
            if extractor:
                _save(folder / f"neighbours-{end}", neighbours(inputs, settings, subset, extractor))
            if "failures" in kinds:
                _save(folder / f"failures-{end}", failures(inputs, settings, subset))
    if settings.kinds is None and args.classifier is None:
        print("note: failures are left out: they need --classifier")
    return 0


def _save(path: Path, sheet: Image.Image) -> None:
    with files.atomic_path(path) as temporary:
        sheet.save(temporary, "PNG")
    print(f"written: {registry.shown_path(path)}")
