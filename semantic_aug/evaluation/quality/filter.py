"""Keeps the synthetic images that CLIP, a classifier, or both are confident of; writes a second list beside meta.csv."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from semantic_aug import cli, console, files, registry, runs
from semantic_aug.datasets.settings import add_shared
from semantic_aug.datasets.synthetic import DATA, locate
from semantic_aug.errors import UserError
from semantic_aug.evaluation.quality import inputs as options
from semantic_aug.meta_csv import slug
from semantic_aug.pictures import Cell, grid

BY = ("clip", "classifier", "both")
SCORES_FILE, SHEET_FILE = "scores.csv", "dropped.png"
SHEET_COLUMNS, SHEET_ROWS, SHEET_SIZE = 10, 6, 112


def build_parser() -> cli.Parser:
    """All flags of this command."""
    parser = cli.Parser(prog="python -m semantic_aug.evaluation filter", description=__doc__)
    add_shared(parser)
    options.add_subsets(parser)
    options.add_models(parser, features=False)
    group = parser.add_argument_group("filter")
    group.add_argument(
        "--by",
        choices=BY,
        required=True,
        help='confidence in an image. clip: softmax over "a photo with a {super-class}" and "a photo without a '
        '{super-class}"; classifier: probability of the classes its label names (see --judged_as); both: their product',
    )
    group.add_argument(
        "--judged_as",
        choices=("label", "target"),
        default="label",
        help="what the classifier is to see. label: source or target, so that a translation on its way loses nothing; target: "
        "the target alone, so that sources that were left as they are go",
    )
    amount = group.add_mutually_exclusive_group(required=True)
    amount.add_argument(
        "--keep",
        type=cli.number(0, 1, open_low=True),
        default=None,
        metavar="SHARE",
        help="keep the best SHARE of every target class, in (0, 1], rounded up: no class is emptied",
    )
    amount.add_argument(
        "--threshold",
        type=cli.number(0, 1),
        default=None,
        metavar="T",
        help="keep confidences of at least T, in [0, 1]",
    )
    group.add_argument(
        "--min_per_class",
        type=cli.whole(0),
        default=1,
        metavar="N",
        help="with --threshold: the best N of a target class are kept whatever their confidence; 0: a class may be emptied",
    )
    group.add_argument(
        "--super_class", default=None, metavar="NOUN", help="for --by clip and both (default: the data set's)"
    )
    group.add_argument(
        "--name",
        default="filtered",
        metavar="NAME",
        help="the list is meta-NAME.csv in the subset's folder, which FOLDER#NAME and KEY#NAME read",
    )
    group.add_argument(
        "--register_key", default=None, metavar="KEY", help="enter it in synthetic_datasets.yaml under this key"
    )
    return parser


def kept(
    confidence: np.ndarray,
    classes: np.ndarray,
    keep: float | None = None,
    threshold: float | None = None,
    min_per_class: int = 1,
) -> np.ndarray:
    """Which images stay, decided within each target class.

    Args:
        confidence: ``(M,)`` in [0, 1].
        classes: int ``(M,)``, target classes.
        keep: share of every class, in (0, 1], rounded up; or
        threshold: least confidence.
        min_per_class: with a threshold, the best of a class that stay in any case.

    Returns:
        bool ``(M,)``; of equal confidences the earlier image stays.
    """
    stay = np.zeros(len(confidence), bool)
    for label in np.unique(classes):
        rows = np.flatnonzero(classes == label)
        best = rows[np.argsort(-confidence[rows], kind="stable")]
        if keep is not None:
            count = math.ceil(keep * len(best) - 1e-9)  # 0.1 of 30 is 3, whatever the binary fraction
        else:
            count = max(int((confidence[rows] >= threshold).sum()), min(min_per_class, len(best)))
        stay[best[:count]] = True
    return stay


def kept_lines(file: Path, stay: np.ndarray) -> str:
    """The text of a meta.csv with only some of its rows, all columns as they are."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    with open(file, newline="", encoding="utf-8-sig") as lines:
        rows = (row for row in csv.reader(lines) if row)
        writer.writerow(next(rows))
        writer.writerows(row for row, wanted in zip(rows, stay, strict=True) if wanted)
    return out.getvalue()


def confidences(args, given, judge, clip, images) -> dict[str, np.ndarray]:
    """Each confidence that ``--by`` asks for, and the one that decides, by name; ``(M,)`` each."""
    from semantic_aug.evaluation.quality import faithfulness

    found = {}
    if args.by in ("clip", "both"):
        from semantic_aug.evaluation.quality.clip import presence

        vectors = clip.images(images.image, len(images), args.batch_size)
        found["clip"] = presence(clip, vectors, args.super_class or given.dataset.spec.super_class)
    if args.by in ("classifier", "both"):
        probabilities = faithfulness.judged(judge, images, given.dataset)
        mass = {"label": faithfulness.label_mass, "target": faithfulness.target_mass}[args.judged_as]
        found["classifier"] = mass(probabilities, images)
    found["confidence"] = np.prod(list(found.values()), axis=0)
    return found


def check(args, given) -> None:
    """Refuses what cannot work before anything is computed.

    Raises:
        UserError: a model or a super-class is missing, the name cannot be a file's, or the list is there already.
    """
    for model, needed in (("clip", args.by != "classifier"), ("classifier", args.by != "clip")):
        if needed and getattr(args, model) is None:
            raise UserError(f"--by {args.by} needs a model: give --{model}")
    if args.by != "classifier" and not (args.super_class or given.dataset.spec.super_class):
        raise UserError(
            f"--by {args.by}: data set {given.dataset.name} has no super-class; give --super_class, such as --super_class bird"
        )
    if not args.name or slug(args.name) != args.name:
        raise UserError(f"--name '{args.name}': expected ASCII letters, digits, dots and hyphens")
    for subset in given.subsets:
        for folder in subset.folders:
            root, source = locate(folder)
            old = runs.load_arguments(folder_of(root, args.name))
            changed = runs.differences(old or {}, arguments_of(args, source), options.MAY_CHANGE)
            if list_of(root, args.name).exists() and (old is None or changed):
                what = f" ({'; '.join(changed[:4])})" if old else ""
                raise UserError(
                    f"{list_of(root, args.name)} was made otherwise{what}: nothing was touched; choose another --name"
                )


def list_of(root: Path, name: str) -> Path:
    """``meta-{name}.csv``."""
    return root / f"meta-{name}.csv"


def folder_of(root: Path, name: str) -> Path:
    """``filter-{name}/``: arguments, scores and the sheet of a filter."""
    return root / f"filter-{name}"


def arguments_of(args, source: Path) -> dict:
    """What decides a filter's outcome for one list of images."""
    left_out = ("syndata_key", "syndata_dir", "config_dir", "register_key", "seed")
    return {"list": source.name, **{k: v for k, v in options.record(args).items() if k not in left_out}}


def sheet(images, found: dict[str, np.ndarray], dropped: np.ndarray, dataset, title: str):
    """The dropped images with the lowest confidence, worst first, captioned with confidence, source and target."""
    shown = dropped[np.argsort(found["confidence"][dropped], kind="stable")][: SHEET_COLUMNS * SHEET_ROWS]
    names = dataset.class_names
    cells = [
        Cell(
            images.image(i),
            f"{found['confidence'][i]:.2f} {names[images.source[i]]} > {names[images.target[i]]}",
        )
        for i in shown.tolist()
    ]
    rows = [cells[start : start + SHEET_COLUMNS] for start in range(0, len(cells), SHEET_COLUMNS)]
    return grid(rows, size=SHEET_SIZE, title=title)


def write(args, given, folder: str, images, found: dict[str, np.ndarray], stay: np.ndarray) -> None:
    """The list, the scores and the sheet of one folder; the list comes last, when all else is there."""
    root, source = locate(folder)
    text, out, target = kept_lines(source, stay), folder_of(root, args.name), list_of(root, args.name)
    if target.exists() and target.read_text(encoding="utf-8") != text:
        raise UserError(f"{target} is there with other images: nothing was touched; choose another --name")
    files.write_text(out / runs.ARGS_FILE, runs.arguments_text(arguments_of(args, source)))
    with (
        files.atomic_path(out / SCORES_FILE) as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as lines,
    ):
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow(["path", "source", "target", "strength", *found, "kept"])
        names = given.dataset.source_names
        for i, path in enumerate(images.paths):
            place = path.relative_to(os.path.abspath(root / DATA)).as_posix()
            scores = [f"{values[i]:.6f}" for values in found.values()]
            classes = [names[images.source[i]], names[images.target[i]]]
            writer.writerow([place, *classes, images.strength[i], *scores, int(stay[i])])
    dropped = np.flatnonzero(~stay)
    if len(dropped):
        title = f"{len(dropped)} of {len(images)} images dropped by {args.by}; the least confident of them"
        with files.atomic_path(out / SHEET_FILE) as temporary:
            sheet(images, found, dropped, given.dataset, title).save(temporary, "PNG")
    files.write_text(target, text)


def describe(images, stay: np.ndarray, confidence: np.ndarray, names: Sequence[str], args) -> list[str]:
    """What was kept of each target class, and where a class kept images only because it would be empty."""
    lines = ["| target class | images | kept | least confidence kept |", "|---|---:|---:|---:|"]
    rescued = []
    for label in np.unique(images.target):
        mine = images.target == label
        least = confidence[mine & stay].min() if (mine & stay).any() else float("nan")
        lines.append(f"| {names[label]} | {mine.sum()} | {(mine & stay).sum()} | {least:.3f} |")
        if args.threshold is not None and not least >= args.threshold:
            rescued.append(names[label])
    if rescued:
        what = f"keep their best {args.min_per_class}" if args.min_per_class else "are left without synthetic images"
        lines.append(f"warning: {len(rescued)} target classes have too few images above --threshold {args.threshold:g} and "
                     f"{what}: {', '.join(rescued[:8])}")  # fmt: skip
    return lines


def main(argv: list[str] | None = None) -> int:
    """Scores every image, writes the new lists, prints what was kept and registers them where asked."""
    args = build_parser().parse_args(argv)
    console.quiet_libraries()
    console.set_up_logging()
    given = options.resolve(args)
    check(args, given)
    judge = options.judge(args, given) if args.by != "clip" else None
    clip = options.clip(args, given.device) if args.by != "classifier" else None
    print(given.dataset.describe())
    from semantic_aug.datasets.synthetic import read_subset

    entries = [
        f"{registry.shown_path(locate(folder)[0])}#{args.name}" for one in given.subsets for folder in one.folders
    ]
    entry = entries[0] if len(entries) == 1 else entries
    if args.register_key:
        registry.check_key(registry.SUBSETS, given.dataset.name, args.register_key, entry, args.config_dir)
    for folder in [folder for subset in given.subsets for folder in subset.folders]:
        images = read_subset(folder, given.dataset, args.allow_other_sources)
        root, _ = locate(folder)
        print(f"synthetic: {folder}, {len(images)} images")
        if args.dry_run:
            continue
        found = confidences(args, given, judge, clip, images)
        stay = kept(found["confidence"], images.target, args.keep, args.threshold, args.min_per_class)
        if not stay.any():
            raise UserError(
                f"--threshold {args.threshold:g} keeps none of {len(images)} images (the best has "
                f"{found['confidence'].max():.3f}): nothing was written; lower it, or give --keep"
            )
        write(args, given, folder, images, found, stay)
        print(*describe(images, stay, found["confidence"], given.dataset.class_names, args), sep="\n")
        print(f"kept {stay.sum()} of {len(images)}: {registry.shown_path(list_of(root, args.name))}")
        print(f"scores and dropped images: {registry.shown_path(folder_of(root, args.name))}")
    if args.register_key and not args.dry_run:
        registry.register(registry.SUBSETS, given.dataset.name, args.register_key, entry, args.config_dir)
        print(f"registered: {given.dataset.name}/{args.register_key}")
    print("to use it: " + " ".join(["train_cls.py --syndata_dir", *(f"'{entry}'" for entry in entries)]))
    return 0
