"""Keeps the synthetic images that CLIP, a classifier, both or a review accept; writes a second list beside meta.csv."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from semantic_aug import cli, console, files, registry, runs
from semantic_aug.datasets.synthetic import SyntheticImages, locate
from semantic_aug.errors import UserError
from semantic_aug.evaluation.quality import faithfulness
from semantic_aug.evaluation.quality.inputs import NO_PART, Inputs, make_parser, read_inputs
from semantic_aug.evaluation.quality.review import kept_after_review, read_review, relative_paths
from semantic_aug.meta_csv import slug
from semantic_aug.pictures import Cell, grid

SCORES_FILE, SHEET_FILE = "scores.csv", "dropped.png"
SHEET_COLUMNS, SHEET_ROWS, SHEET_SIZE = 10, 6, 112
NOT_RECORDED = ("syndata_key", "syndata_dir", "seed")
"""Settings that have no part in which images of a list are kept."""
PLACES = (*NO_PART, "review")
"""Recorded settings that name places, which may move: the kept images and the classifier's weights are compared instead."""


@dataclass(frozen=True, kw_only=True)
class FilterSettings:
    """Which images are kept, and under which name."""

    TITLE = "filter"
    by: str = cli.setting(
        choices=("clip", "classifier", "both", "review"),
        help='confidence in an image. clip: softmax over "a photo with a {super-class}" and "a photo without a '
        '{super-class}"; classifier: probability of the classes its label names (see --judged_as); both: their product; '
        "review: 1, or 0 for an image rejected in a gallery",
    )
    review: Path | None = cli.setting(
        None, type=cli.path, metavar="FILE", help="for --by review: the file saved by the gallery's page"
    )
    judged_as: str = cli.setting(
        "label",
        choices=("label", "target"),
        help="classes whose probability counts. label: source and target, so that a translation on its way loses nothing; "
        "target: the target alone, so that sources that were left as they are go",
    )
    keep: float | None = cli.setting(
        None,
        type=cli.number(0, 1, open_low=True),
        metavar="SHARE",
        help="keep the best SHARE of every target class, in (0, 1], rounded up: no class is emptied",
    )
    threshold: float | None = cli.setting(
        None, type=cli.number(0, 1), metavar="T", help="instead of --keep: keep confidences of at least T, in [0, 1]"
    )
    min_per_class: int = cli.setting(
        1,
        type=cli.whole(0),
        help="with --threshold: the best N of a target class are kept whatever their confidence; 0: a class may be emptied",
    )
    super_class: str | None = cli.setting(
        None, metavar="NOUN", help="object of --by clip and both (default: the data set's super-class)"
    )
    name: str | None = cli.setting(
        None,
        metavar="NAME",
        help="the list is meta-NAME.csv in the subset's folder, which FOLDER#NAME and KEY#NAME read (default: filtered, or "
        "reviewed with --by review)",
    )
    register_key: str | None = cli.setting(
        None,
        type=registry.new_key,
        metavar="KEY",
        help="enter it in synthetic_datasets.yaml under this key",
        result=False,
    )

    def __post_init__(self):
        if self.name is None:
            object.__setattr__(self, "name", "reviewed" if self.by == "review" else "filtered")
        amount = next((name for name in ("keep", "threshold") if getattr(self, name) is not None), None)
        if (self.by == "review") != (self.review is not None):
            raise UserError("--by review and --review FILE belong together: give both, or neither")
        if self.review and amount:
            raise UserError(f"--by review decides alone: leave out --{amount}")
        if not self.review and not amount:
            raise UserError("one of the arguments --keep --threshold is required")
        if self.keep is not None and self.threshold is not None:
            raise UserError("argument --threshold: not allowed with argument --keep")
        if not self.name or slug(self.name) != self.name:
            raise UserError(f"--name '{self.name}': expected ASCII letters, digits, dots and hyphens")

    def list_path(self, root: Path) -> Path:
        """The list of kept images, ``meta-{name}.csv``."""
        return root / f"meta-{self.name}.csv"

    def folder(self, root: Path) -> Path:
        """Arguments, scores and the sheet of dropped images, ``filter-{name}/``."""
        return root / f"filter-{self.name}"

    def record(self, inputs: Inputs, source: Path) -> dict:
        """Settings that decide which images of the list ``source`` are kept."""
        kept = {k: v for k, v in inputs.record.items() if k not in NOT_RECORDED}
        weights = inputs.classifier_digest if self.by in ("classifier", "both") else None
        return {"list": source.name, **kept, "name": self.name, runs.MADE_FROM: {"classifier": weights}}


def build_parser() -> cli.Parser:
    """All flags of this command."""
    return make_parser("filter", __doc__, (FilterSettings,))


def kept(confidence: np.ndarray, classes: np.ndarray, settings: FilterSettings) -> np.ndarray:
    """Which images are kept, decided within each target class.

    Args:
        confidence: ``(M,)`` in [0, 1].
        classes: int ``(M,)``, target classes.
        settings: share of every class, or threshold and the least number of a class.

    Returns:
        bool ``(M,)``; of equal confidences the earlier image is kept.
    """
    selected = np.zeros(len(confidence), bool)
    for label in np.unique(classes):
        rows = np.flatnonzero(classes == label)
        best_first = rows[np.argsort(-confidence[rows], kind="stable")]
        if settings.keep is not None:
            count = math.ceil(settings.keep * len(rows) - 1e-9)  # 0.1 of 30 is 3, whatever the binary fraction
        else:
            count = max(int((confidence[rows] >= settings.threshold).sum()), min(settings.min_per_class, len(rows)))
        selected[best_first[:count]] = True
    return selected


def kept_lines(file: Path, selected: np.ndarray) -> str:
    """The text of a meta.csv with some of its rows and all of its columns."""
    out = io.StringIO()
    writer = files.csv_rows(out)
    with open(file, newline="", encoding="utf-8-sig") as lines:
        rows = (row for row in csv.reader(lines) if any(cell.strip() for cell in row))
        writer.writerow(next(rows))
        writer.writerows(row for row, chosen in zip(rows, selected, strict=True) if chosen)
    return out.getvalue()


def confidences(
    inputs: Inputs, settings: FilterSettings, folder: str, images: SyntheticImages
) -> dict[str, np.ndarray]:
    """The confidences of ``--by`` and the one that decides, ``confidence``, by name; ``(M,)`` in [0, 1] each."""
    if settings.review:
        names = inputs.dataset.source_names
        return {"confidence": kept_after_review(settings.review, folder, images, names).astype(float)}
    scores = {}
    if settings.by in ("clip", "both"):
        from semantic_aug.evaluation.quality.clip import presence

        vectors = inputs.clip.images(images.image, len(images), inputs.models.batch_size)
        scores["clip"] = presence(inputs.clip, vectors, settings.super_class or inputs.dataset.spec.super_class)
    if settings.by in ("classifier", "both"):
        mass = {"label": faithfulness.label_mass, "target": faithfulness.target_mass}[settings.judged_as]
        scores["classifier"] = mass(inputs.class_probabilities(images), images)
    scores["confidence"] = np.prod(list(scores.values()), axis=0)
    return scores


def check(inputs: Inputs, settings: FilterSettings) -> None:
    """Checks the request before anything is computed, and loads the models. Raises UserError: a model or a super-class is
    missing, two lists would get one name, or the list already exists and was made with other settings."""
    by, dataset = settings.by, inputs.dataset
    models = [model for model in ("clip", "classifier") if by in (model, "both")]
    for model in models:
        if getattr(inputs.models, model) is None:
            raise UserError(f"--by {by} needs a model: give --{model}")
    if "clip" in models and not (settings.super_class or dataset.spec.super_class):
        raise UserError(
            f"--by {by}: data set {dataset.name} has no super-class; give --super_class, such as --super_class bird"
        )
    for model in reversed(models):
        getattr(inputs, model)
    targets: dict[Path, str] = {}
    for folder in [folder for subset in inputs.subsets for folder in subset.folders]:
        root, source = locate(folder)
        target, old = settings.list_path(root), runs.load_arguments(settings.folder(root))
        if target in targets:
            raise UserError(f"{targets[target]} and {folder} would both become {target}: filter one of them alone")
        targets[target] = folder
        record = settings.record(inputs, source)
        absent = {**inputs.absent, runs.MADE_FROM: record[runs.MADE_FROM]}
        # records of earlier versions have the classifier's path alone
        ignored = [name for name in PLACES if name != "classifier" or runs.MADE_FROM in (old or {})]
        changed = runs.differences(old or {}, record, ignored, absent)
        if target.exists() and (old is None or changed):
            what = f" ({'; '.join(changed[:4])})" if old else ""
            raise UserError(f"{target} was made otherwise{what}: nothing was touched; choose another --name")


def sheet(images: SyntheticImages, confidence: np.ndarray, dropped: np.ndarray, names, title: str) -> Image.Image:
    """The dropped images with the lowest confidence, worst first, captioned with confidence, source and target."""
    shown = dropped[np.argsort(confidence[dropped], kind="stable")][: SHEET_COLUMNS * SHEET_ROWS].tolist()
    captions = [f"{confidence[i]:.2f} {images.source_text(i, names)} > {names[images.target[i]]}" for i in shown]
    cells = [Cell(images.image(i), caption) for i, caption in zip(shown, captions, strict=True)]
    rows = [cells[start : start + SHEET_COLUMNS] for start in range(0, len(cells), SHEET_COLUMNS)]
    return grid(rows, size=SHEET_SIZE, title=title)


def write(
    inputs: Inputs, settings: FilterSettings, folder: str, images: SyntheticImages, scores: dict, selected: np.ndarray
) -> None:
    """Writes the list, the scores and the sheet of one folder; the list comes last and marks the rest as complete."""
    root, source = locate(folder)
    out = settings.folder(root)
    files.write_text(out / runs.ARGS_FILE, runs.arguments_text(settings.record(inputs, source)))
    with files.csv_writer(out / SCORES_FILE) as writer:
        writer.writerow(["path", "source", "target", "strength", *scores, "kept"])
        names, unknown = inputs.dataset.source_names, images.of_any_class
        for i, relative in enumerate(relative_paths(images, folder)):
            cells = [f"{values[i]:.6f}" for values in scores.values()]
            classes = ["" if unknown[i] else names[images.source[i]], names[images.target[i]]]
            writer.writerow([relative, *classes, images.strength[i], *cells, int(selected[i])])
    dropped = np.flatnonzero(~selected)
    if len(dropped):
        title = f"{len(dropped)} of {len(images)} images dropped by {settings.by}; the least confident of them"
        with files.atomic_path(out / SHEET_FILE) as temporary:
            picture = sheet(images, scores["confidence"], dropped, inputs.dataset.class_names, title)
            picture.save(temporary, "PNG")
    files.write_text(settings.list_path(root), kept_lines(source, selected))


def print_counts(
    images: SyntheticImages,
    selected: np.ndarray,
    confidence: np.ndarray,
    names: Sequence[str],
    settings: FilterSettings,
) -> None:
    """Prints how many images of each target class are kept, and which classes the threshold would have emptied."""
    rows, rescued = [], []
    for label in np.unique(images.target):
        of_class = images.target == label
        least = confidence[of_class & selected].min() if (of_class & selected).any() else float("nan")
        rows.append([names[label], of_class.sum(), (of_class & selected).sum(), f"{least:.3f}"])
        if settings.threshold is not None and not least >= settings.threshold:
            rescued.append(names[label])
    print(console.markdown_table(["target class", "images", "kept", "least confidence kept"], rows))
    if rescued:
        count = settings.min_per_class
        what = f"keep their best {count}" if count else "are left without synthetic images"
        print(
            f"warning: {len(rescued)} target classes have too few images above --threshold {settings.threshold:g} "
            f"and {what}: {', '.join(rescued[:8])}"
        )


def choose(inputs: Inputs, settings: FilterSettings, folder: str, images: SyntheticImages) -> tuple[dict, np.ndarray]:
    """The confidences of the images of one folder, and which of them are kept, bool ``(M,)``. Raises UserError: none is, or the
    list already exists with others."""
    scores = confidences(inputs, settings, folder, images)
    confidence = scores["confidence"]
    selected = confidence > 0 if settings.review else kept(confidence, images.target, settings)
    if settings.review and not selected.any():
        raise UserError(
            f"--review {settings.review} keeps none of {len(images)} images of {folder}: nothing was written"
        )
    if not selected.any():
        raise UserError(
            f"--threshold {settings.threshold:g} keeps none of {len(images)} images of {folder} (the best has "
            f"{confidence.max():.3f}): nothing was written; lower it, or give --keep"
        )
    root, source = locate(folder)
    target = settings.list_path(root)
    if target.exists() and target.read_text(encoding="utf-8") != kept_lines(source, selected):
        raise UserError(f"{target} already exists with other images: nothing was touched; choose another --name")
    return scores, selected


def filter_folder(
    inputs: Inputs, settings: FilterSettings, folder: str, images: SyntheticImages, scores: dict, selected: np.ndarray
) -> None:
    """Writes the list of one folder and prints what was kept."""
    root, confidence = locate(folder)[0], scores["confidence"]
    write(inputs, settings, folder, images, scores, selected)
    print_counts(images, selected, confidence, inputs.dataset.class_names, settings)
    print(f"kept {selected.sum()} of {len(images)}: {registry.shown_path(settings.list_path(root))}")
    print(f"scores and dropped images: {registry.shown_path(settings.folder(root))}")


def main(argv: list[str] | None = None) -> int:
    """Scores every image, writes the new lists, prints what was kept and registers them where asked."""
    args = build_parser().parse_args(argv)
    settings = cli.read_settings(FilterSettings, args)
    if settings.review:
        read_review(settings.review)  # a damaged file is refused before images are read
    inputs = read_inputs(args, (FilterSettings,))
    check(inputs, settings)
    dataset, key = inputs.dataset, settings.register_key
    print(dataset.describe())
    parts = [part for subset in inputs.subsets for part in subset.parts]
    entries = [f"{registry.shown_path(locate(folder)[0])}#{settings.name}" for folder, _ in parts]
    entry = entries[0] if len(entries) == 1 else entries
    if key:
        registry.check_key(registry.SUBSETS, dataset.name, key, entry, args.config_dir)
    chosen = []
    for folder, images in parts:
        print(f"synthetic: {folder}, {len(images)} images")
        if settings.review or not args.dry_run:
            chosen.append(choose(inputs, settings, folder, images))
    if not args.dry_run:  # where no folder is refused
        for part, choice in zip(parts, chosen, strict=True):
            filter_folder(inputs, settings, *part, *choice)
        if key:
            registry.register(registry.SUBSETS, dataset.name, key, entry, args.config_dir)
            print(f"registered: {dataset.name}/{key}")
    print("to use it: " + " ".join(["train_cls.py --syndata_dir", *(f"'{entry}'" for entry in entries)]))
    return 0
