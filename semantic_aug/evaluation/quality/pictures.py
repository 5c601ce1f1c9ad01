"""Sheets of synthetic images: translations beside their sources, nearest real images, and failures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from semantic_aug import cli, console, files, registry, runs
from semantic_aug.datasets.fingerprint import content_digest, hash_files, hash_images
from semantic_aug.datasets.settings import add_shared
from semantic_aug.evaluation.quality import inputs as options
from semantic_aug.meta_csv import slug
from semantic_aug.pictures import Cell, grid
from semantic_aug.seeding import numpy_rng

KINDS = ("translations", "neighbours", "failures")
MOST_COLUMNS = 12
RIGHT, WRONG = (40, 140, 60), (200, 40, 40)


def build_parser() -> cli.Parser:
    """All flags of this command."""
    parser = cli.Parser(prog="python -m semantic_aug.evaluation pictures", description=__doc__)
    add_shared(parser)
    options.add_subsets(parser)
    options.add_models(parser)
    options.add_output(parser)
    group = parser.add_argument_group("pictures")
    group.add_argument(
        "--kinds",
        nargs="+",
        choices=KINDS,
        default=None,
        help="translations: a source image in each row; neighbours: synthetic images and the real ones nearest to them; "
        "failures: the lowest target probability under --classifier (default: all that what is given allows)",
    )
    group.add_argument("--rows", type=cli.whole(1), default=8, metavar="N", help="rows of each sheet")
    group.add_argument(
        "--neighbours", type=cli.whole(1), default=5, metavar="N", help="real images beside each synthetic one"
    )
    group.add_argument("--size", type=cli.whole(16), default=160, metavar="PIXELS", help="side of each image")
    return parser


def chosen_sources(subsets: Sequence, classes: np.ndarray, count: int, seed: int) -> list[int]:
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


def translations(given: options.Given, rows: int, size: int, seed: int) -> Image.Image | None:
    """Each row a source image and what one subset made of it, by target and strength; None where no source is known."""
    train, names = given.dataset.train, given.dataset.class_names
    lines, titles = [], []
    for source in chosen_sources(given.subsets, train.labels, rows, seed):
        for subset in given.subsets:
            mine = np.flatnonzero(subset.sources == source)
            images = subset.images
            mine = sorted(mine.tolist(), key=lambda i: (images.target[i], images.strength[i]))[: MOST_COLUMNS - 1]
            if mine:
                cells = [Cell(images.image(i), f"{names[images.target[i]]}, s={images.strength[i]:g}") for i in mine]
                lines.append([Cell(train.image(source), f"real: {names[train.labels[source]]}"), *cells])
                titles.append(subset.name if len(given.subsets) > 1 else "")
    if not lines:
        return None
    return grid(lines, titles if any(titles) else (), size=size, title="real images and their translations")


def neighbours(
    given: options.Given, subset, extractor, rows: int, count: int, size: int, batch_size: int
) -> Image.Image:
    """Synthetic images from the most like a training image to the least, evenly over the ranks, and their neighbours."""
    from semantic_aug.evaluation.quality import distances

    train, names, images = given.dataset.train, given.dataset.class_names, subset.images
    real = extractor.features(train.image, len(train), content_digest(hash_images(train).hex()), batch_size)
    made = extractor.features(images.image, len(images), content_digest(hash_files(images.paths).hex()), batch_size)
    distance, nearest = distances.neighbours(made, real, count)
    ranked = np.argsort(distance[:, 0], kind="stable")
    shown = ranked[np.unique(np.linspace(0, len(ranked) - 1, min(rows, len(ranked))).round().astype(int))]
    lines = []
    for i in shown.tolist():
        cells = [
            Cell(
                train.image(row),
                f"{away:.3f} {names[train.labels[row]]}" + (" (its source)" if row == subset.sources[i] else ""),
                RIGHT if train.labels[row] == images.target[i] else None,
            )
            for away, row in zip(distance[i], nearest[i].tolist(), strict=True)
        ]
        lines.append([Cell(images.image(i), f"{names[images.target[i]]}, s={images.strength[i]:g}"), *cells])
    columns = ["synthetic", *("nearest real" if k == 0 else "" for k in range(count))]
    title = (
        f"{subset.name}: cosine distance to the nearest training images, most alike first; framed: the target's class"
    )
    return grid(lines, (), columns, size, title)


def failures(given: options.Given, subset, judge, rows: int, size: int) -> Image.Image:
    """For the target classes that fare worst, the images with the lowest target probability, and what they are taken for."""
    from semantic_aug.evaluation.quality.faithfulness import judged

    names, images = given.dataset.class_names, subset.images
    probabilities = judged(judge, images, given.dataset)
    score, taken = probabilities[np.arange(len(images)), images.target], probabilities.argmax(1)
    mean = {label: score[images.target == label].mean() for label in np.unique(images.target).tolist()}
    lines, titles = [], []
    for label in sorted(mean, key=mean.get)[:rows]:
        mine = np.flatnonzero(images.target == label)
        worst = mine[np.argsort(score[mine], kind="stable")][: MOST_COLUMNS // 2].tolist()
        lines.append(
            [
                Cell(images.image(i), f"{score[i]:.2f} looks {names[taken[i]]}", RIGHT if taken[i] == label else WRONG)
                for i in worst
            ]
        )
        titles.append(f"{names[label]} ({mean[label]:.2f})")
    title = f"{subset.name}: lowest probability of the target class (mean of the class in brackets)"
    return grid(lines, titles, size=size, title=title)


def main(argv: list[str] | None = None) -> int:
    """Draws the sheets into the output folder."""
    args = build_parser().parse_args(argv)
    console.quiet_libraries()
    console.set_up_logging()
    given = options.resolve(args)
    wanted = args.kinds or [kind for kind in KINDS if kind != "failures" or args.classifier]
    if "failures" in wanted and args.classifier is None:
        from semantic_aug.errors import UserError

        raise UserError("--kinds failures needs a classifier: give --classifier")
    judge = options.judge(args, given) if "failures" in wanted else None
    extractor = options.extractor(args, given.device) if "neighbours" in wanted else None
    print(given.dataset.describe())
    folder = registry.resolve_path(args.output_dir)
    if args.dry_run:
        print(f"would draw {', '.join(wanted)} into {registry.shown_path(folder)}")
        return 0
    runs.claim(folder, options.record(args), "--output_dir", options.MAY_CHANGE, origin=options.origin(args, given))
    if "translations" in wanted:
        sheet = translations(given, args.rows, args.size, args.seed)
        if sheet is None:
            print("note: translations are left out: they need the column 'Source Image' of meta.csv")
        else:
            _save(folder / "translations.png", sheet)
    for subset in given.subsets:
        end = f"{slug(subset.name)}.png" if len(given.subsets) > 1 else "all.png"
        if extractor:
            sheet = neighbours(given, subset, extractor, args.rows, args.neighbours, args.size, args.batch_size)
            _save(folder / f"neighbours-{end}", sheet)
        if judge:
            _save(folder / f"failures-{end}", failures(given, subset, judge, args.rows, args.size))
    if args.kinds is None and args.classifier is None:
        print("note: failures are left out: they need --classifier")
    return 0


def _save(path: Path, sheet: Image.Image) -> None:
    with files.atomic_path(path) as temporary:
        sheet.save(temporary, "PNG")
    print(f"written: {registry.shown_path(path)}")
