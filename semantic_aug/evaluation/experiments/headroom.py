"""Is there anything to win? The learning curve of real images alone, measured in minutes before any diffusion.

A linear classifier on the frozen features of a pre-trained network is trained on growing numbers of images per class.
Validation images (cross-validation where there are few) decide; test images are never read.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from semantic_aug import cli, files, registry, runs
from semantic_aug.classify import config as classify
from semantic_aug.datasets import LoadedDataset, Setting, load_dataset
from semantic_aug.datasets.origin import RunOrigin
from semantic_aug.datasets.settings import DatasetName
from semantic_aug.datasets.subsets import few_shot
from semantic_aug.devices import device_of
from semantic_aug.errors import UserError
from semantic_aug.evaluation.document import Block, Report, Table
from semantic_aug.evaluation.document import write as write_document
from semantic_aug.evaluation.experiments import learning_curve as curves
from semantic_aug.evaluation.experiments.learning_curve import Curve, Gain, Pool

REPORT, SUMMARY, TABLE = "headroom.md", "headroom.json", "headroom.csv"
HARD, CHART = "hard_images.csv", "headroom.png"
SHOWN_PAIRS = 5
BY_CONTENT = ("dataset", "weights")
"""Recorded settings that depend on places, which may move: images and weights are compared instead."""
MIN_VALIDATION = 5
"""Fewest validation images per class; with fewer, cross-validation over all images decides."""
MOST_SHARED = 0.7
"""Share of all images up to which draws count as different."""
INSEPARABLE = 0.25
"""Rate of confusion from which two classes count as hard to tell apart: half the rate of guessing between them."""


@dataclass(frozen=True, kw_only=True)
class HeadroomSettings:
    """Data, classifier and output of a measurement."""

    TITLE = "headroom"
    examples_per_class: int = cli.setting(
        -1,
        type=int,
        help="training images per class that there are or would be used; labelled images beyond them show what more would "
        "win (default: -1, all)",
    )
    pool_per_class: int = cli.setting(
        -1,
        type=int,
        help="labelled training images of each class that are looked at, at most, which bounds the time (default: -1, all)",
    )
    val_examples_per_class: int = cli.setting_of(Setting, "val_examples_per_class")
    split: str = cli.setting_of(Setting, "split")
    seeds: tuple[int, ...] = cli.setting(
        (0, 1, 2, 3, 4), type=int, nargs="+", help="draws of the training images (default: 0 1 2 3 4)"
    )
    model: str = cli.setting(
        "tf_efficientnet_lite0", metavar="NAME", help="timm model, on whose frozen features the classifiers are trained"
    )
    weights: str = cli.setting_of(classify.ModelSettings, "weights")
    res_mode: int = cli.setting_of(classify.ModelSettings, "res_mode", 128)
    gpu: str | None = cli.setting_of(classify.PlacementSettings, "gpu")
    output_dir: Path | None = cli.setting(
        None, type=cli.path, help="folder of the report (default: outputs/headroom/{dataset}{setting})", result=False
    )

    def __post_init__(self):
        for name in ("examples_per_class", "pool_per_class", "val_examples_per_class"):
            if getattr(self, name) < 1 and getattr(self, name) != -1:
                raise UserError(f"--{name} {getattr(self, name)}: expected a number of images, or -1 for all")
        object.__setattr__(self, "seeds", tuple(dict.fromkeys(self.seeds)))  # a draw counts once


@dataclass(frozen=True)
class Headroom:
    """The outcome of a measurement; every report is made from it.

    Attributes:
        held_out: whether validation images decided; else cross-validation.
        curve: predictions by number of images.
        present: position of the present number of images on the curve.
        gains: of twice and of four times the images; the last decides.
    """

    dataset: str
    settings: HeadroomSettings
    held_out: bool
    curve: Curve
    present: int
    gains: tuple[Gain, ...]

    @property
    def verdict(self) -> str:
        """``worth it``, ``probably not`` or ``too little data to say``."""
        return curves.verdict(self.curve, self.gains[-1])

    @property
    def sentence(self) -> str:
        """The verdict with its figures, one line."""
        gain, accuracy = self.gains[-1], 100 * self.curve.macro[self.present].mean()
        source = "measured" if gain.measured else "extrapolated"
        if not gain.reliable:
            source += f", and the smallest class has {self.curve.smallest} training images"
        return (
            f"headroom of {self.dataset} at {self.curve.images[self.present]:.4g} images per class: {self.verdict}. "
            f"{gain.factor} times the real images would win {100 * gain.points:.1f} points of {accuracy:.1f} % macro "
            f"accuracy [{100 * gain.low:.1f}, {100 * gain.high:.1f}], {100 * gain.share:.0f} % of the errors ({source})."
        )

    @property
    def repeated(self) -> int:
        """Position of the largest size whose draws share few images, for errors that every draw makes."""
        apart = np.flatnonzero(self.curve.images <= MOST_SHARED * self.curve.images[-1])
        return int(apart[-1]) if len(apart) else 0


def load_pool(settings: HeadroomSettings, dataset: LoadedDataset) -> Pool:
    """Features of the training and validation images, kept in the cache for the next command. Raises UserError: the model's
    weights are not available, or there are too few images."""
    from semantic_aug.classify.features import load_extractor

    tables = [table for table in (dataset.train, dataset.val) if table is not None and len(table)]
    counts = dataset.train.counts()
    if counts.max() < 2:
        raise UserError(f"headroom of {dataset.name}: no class has two training images; expected 3 or more per class")
    device = device_of(settings.gpu)
    extractor = load_extractor(settings.model, settings.weights, settings.res_mode, device, levels=True)
    features = [extractor.of_images(table) for table in tables]
    enough = len(tables) > 1 and len(tables[1]) >= MIN_VALIDATION * len(counts)
    held_out = np.repeat([False, enough][: len(tables)], list(map(len, tables)))
    labels, keys = np.concatenate([table.labels for table in tables]), [key for table in tables for key in table.keys]
    return Pool(np.concatenate(features), labels, held_out, dataset.source_names, tuple(keys))


def load_data(settings: HeadroomSettings, word: str, config_dir: Path) -> LoadedDataset:
    """The labelled images; validation images only where the data set has such a split."""
    setting = Setting(val_fraction=0.0, val_examples_per_class=settings.val_examples_per_class, split=settings.split)
    dataset = load_dataset(word, setting, config_dir)
    return replace(dataset, train=few_shot(dataset.train, settings.pool_per_class))


def measure(settings: HeadroomSettings, dataset: LoadedDataset) -> Headroom:
    """Measures the curve and what more images would win."""
    pool = load_pool(settings, dataset)
    curve = curves.measure_curve(pool, settings.examples_per_class, settings.seeds)
    gains = tuple(curves.gain_of(curve, settings.examples_per_class, factor) for factor in (2, curves.FACTOR))
    position = curves.present_index(curve, settings.examples_per_class)
    return Headroom(dataset.name, settings, bool(pool.held_out.any()), curve, position, gains)


def run(settings: HeadroomSettings, word: str, config_dir: Path) -> tuple[str, Path]:
    """Measures and writes the report, unless it is written already. Returns the sentence and the folder of the report. Raises
    UserError: the folder holds a report of other settings or images."""
    from semantic_aug.classify.models import weights_identity

    dataset = load_data(settings, word, config_dir)
    suffix = Setting(examples_per_class=settings.examples_per_class, split=settings.split).suffix
    folder = registry.resolve_path(settings.output_dir or f"outputs/headroom/{dataset.name}{suffix}")
    results = {name: getattr(settings, name) for name in cli.result_settings(HeadroomSettings)}
    record = {"dataset": dataset.name, **cli.recorded(results, HeadroomSettings)}
    weights = lambda: {"weights": weights_identity(settings.model, settings.weights)}  # noqa: E731
    origin = RunOrigin(dataset, ("train", "val"), (), further=weights, without=("super_class",))
    with files.no_trace(folder, (runs.ARGS_FILE,)):
        options = {"origin": origin, "absent": cli.absent_values(HeadroomSettings)}
        known = runs.claim(folder, record, "--output_dir", BY_CONTENT, **options)
        if known and (summary := files.read_json(folder / SUMMARY)):
            return summary["sentence"], folder
        headroom = measure(settings, dataset)
        write(headroom, folder)
    return headroom.sentence, folder


# ----------------------------------------------------------------------------------------------------------- reports


def write(headroom: Headroom, folder: Path) -> None:
    """Writes the report, the tables and the chart."""
    curve, wrong = headroom.curve, headroom.curve.always_wrong(headroom.repeated)
    names = curve.class_names
    rows = [
        [size, f"{images:.4g}", seed, f"{score:.6f}"]
        for size, images, scores in zip(curve.sizes, curve.images, curve.macro, strict=True)
        for seed, score in zip(headroom.settings.seeds, scores, strict=True)
    ]
    with files.csv_writer(folder / TABLE) as writer:
        writer.writerows([["per_class", "images_per_class", "seed", "macro"], *rows])
    often = [np.bincount(column).argmax() for column in curve.predicted[headroom.repeated].T[wrong]]
    hard = [
        [curve.keys[row], names[curve.labels[row]], names[label]]
        for row, label in zip(np.flatnonzero(wrong), often, strict=True)
    ]
    with files.csv_writer(folder / HARD) as writer:
        writer.writerows([["file", "class", "predicted"], *hard])
    draw(headroom, folder / CHART)
    write_document(report_of(headroom), folder / REPORT)
    gains = [asdict(gain) for gain in headroom.gains]
    # written last: its presence marks the report as complete
    files.write_json(folder / SUMMARY, {"verdict": headroom.verdict, "sentence": headroom.sentence, "gains": gains})


def report_of(headroom: Headroom) -> Report:
    """The report: the sentence, the curve, what more images would win, and what caps the accuracy."""
    settings, curve = headroom.settings, headroom.curve
    how = "the validation images" if headroom.held_out else f"{curves.FOLDS}-fold cross-validation"
    rows = []
    for position, (images, scores) in enumerate(zip(curve.images, curve.macro, strict=True)):
        spread = f" ± {100 * scores.std(ddof=1):.1f}" if len(scores) > 1 and scores.std() > 0 else ""
        notes = ["now"] * (position == headroom.present) + ["all"] * (position + 1 == len(curve.sizes))
        rows.append([f"{images:.4g}", f"{100 * scores.mean():.1f}{spread}", ", ".join(notes)])
    blocks = [
        f"{headroom.sentence[0].upper()}{headroom.sentence[1:]}",
        f"![learning curve]({CHART})",
        (
            f"Real images alone: linear classifiers on frozen features of {settings.model} at {settings.res_mode} px, "
            f"{len(settings.seeds)} draws of each size, macro accuracy on {how} ({len(curve.labels)} images); test images "
            "were not read. Percent, mean ± standard deviation."
        ),
        Table(["images per class", "macro accuracy", ""], rows),
    ]
    title = f"Headroom of {headroom.dataset}"
    return Report(title, [*blocks, *_gain_section(headroom), *_cap_section(headroom)])


def _gain_section(headroom: Headroom) -> list[Block]:
    last, rows = headroom.gains[-1], []
    for gain in headroom.gains:
        interval = f"[{100 * gain.low:.1f}, {100 * gain.high:.1f}]"
        source = "measured" if gain.measured else "extrapolated: power law of the error"
        rows.append([f"{gain.factor} x", f"{100 * gain.points:+.1f}", interval, f"{100 * gain.share:.0f} %", source])
    rule = (
        f"Synthetic images are taken to be worth at most as much as {last.factor} times the real ones. The rule: "
        f"{curves.WORTH} where {last.factor} times the images win at least {100 * curves.WORTH_POINTS:.0f} points and remove "
        f"at least {100 * curves.WORTH_SHARE:.0f} % of the errors in {100 * curves.SURE:.0f} % of {curves.RESAMPLES} resamples "
        f"of draws and evaluated images, {curves.NOT_WORTH} where they do in at most {100 - 100 * curves.SURE:.0f} %, else "
        f"{curves.UNKNOWN}. Here: in {100 * last.promising:.0f} %."
    )
    if not last.reliable:
        rule += (
            f" But the gain is extrapolated, and the smallest class has {headroom.curve.smallest} training images, so that "
            f"larger sizes add images to the other classes alone: {curves.UNKNOWN}."
        )
    columns = ["images", "points", "95 % interval", "errors removed", ""]
    return ["## What more real images would win", Table(columns, rows), rule]


def _cap_section(headroom: Headroom) -> list[Block]:
    """Causes that cap the accuracy: classes that are confused, and images that every draw gets wrong."""
    curve, size = headroom.curve, headroom.repeated
    names, wrong, errors = curve.class_names, curve.always_wrong(size), (curve.predicted[size] != curve.labels).mean()
    early, pairs = {(a, b): rate for rate, a, b in curve.confused(headroom.present)}, curve.confused(size)
    hard = sum(rate >= INSEPARABLE for rate, _, _ in pairs)
    text = (
        f"At {curve.images[size]:.4g} images per class {100 * errors:.1f} % of the images are misclassified in the mean, "
        f"{100 * wrong.mean():.1f} % ({int(wrong.sum())}) under every draw: more images of the same kind do not help those, "
        f"look at their labels first ({HARD}). {hard} pairs of classes are hard to tell apart (confused in "
        f"{100 * INSEPARABLE:.0f} % or more; guessing between two classes gives 50 %)."
    )
    rows = [
        [names[a], names[b], f"{100 * early[a, b]:.0f} %", f"{100 * rate:.0f} %"]
        for rate, a, b in pairs[:SHOWN_PAIRS]
        if rate > 0
    ]
    columns = ["class", "class", "confused now", f"at {curve.images[size]:.4g} per class"]
    return ["## What caps it", text, *([Table(columns, rows, texts=2)] if rows else [])]


def draw(headroom: Headroom, path: Path) -> None:
    """Draws the curve with every draw as a dot, and the gains as intervals."""
    from matplotlib.figure import Figure

    curve, macro = headroom.curve, 100 * headroom.curve.macro
    figure = Figure(figsize=(6, 3.6))
    axis = figure.subplots()
    axis.plot(curve.images, macro.mean(1), color="#5b8db8")
    axis.plot(np.repeat(curve.images, macro.shape[1]), macro.ravel(), ".", color="#1f2d3a", markersize=4)
    now = headroom.present
    axis.axvline(curve.images[now], color="#b0b7bd", linestyle="--", linewidth=1)
    for gain in headroom.gains:
        points = 100 * np.array([gain.points, gain.points - gain.low, gain.high - gain.points])
        bars = [[max(0.0, points[1])], [max(0.0, points[2])]]
        centre = macro[now].mean() + points[0]
        axis.errorbar([gain.factor * curve.images[now]], [centre], yerr=bars, fmt="o", color="#c0504d", capsize=3)
    axis.set_xscale("log")
    axis.set_xlabel("real images per class")
    axis.set_ylabel("macro accuracy, %")
    axis.set_title(f"{headroom.dataset}: {headroom.verdict}", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    with files.atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def build_parser() -> cli.Parser:
    """All flags of ``headroom``."""
    parser = cli.Parser(prog="python -m semantic_aug.evaluation headroom", description=__doc__)
    cli.add_settings(parser, DatasetName)
    cli.add_settings(parser, HeadroomSettings)
    cli.add_settings(parser, cli.RunSettings, leave_out=("seed",))
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parses, measures, reports."""
    from semantic_aug.classify.models import check_resolution

    args = build_parser().parse_args(argv)
    settings = cli.read_settings(HeadroomSettings, args)
    if settings.weights not in classify.WEIGHTS:
        classify.weight_file(registry.resolve_path(settings.weights))
    check_resolution(settings.model, settings.res_mode)
    if args.dry_run:
        print(load_data(settings, args.dataset, args.config_dir).describe())
        return 0
    sentence, folder = run(settings, args.dataset, args.config_dir)
    print(sentence)
    print(f"report: {registry.shown_path(folder / REPORT)}")
    return 0
