"""Exports synthetic and real images for other trainers: class folders, a Hugging Face data set, WebDataset, a list."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from semantic_aug import cli, files, registry, runs
from semantic_aug.classify.config import SyntheticSettings
from semantic_aug.datasets import LoadedDataset, load_dataset
from semantic_aug.datasets.origin import RunOrigin
from semantic_aug.datasets.settings import Setting, add_shared
from semantic_aug.datasets.spec import SPLITS
from semantic_aug.datasets.synthetic import SyntheticImages
from semantic_aug.datasets.table import refuse_damaged
from semantic_aug.errors import UserError
from semantic_aug.evaluation.quality import card
from semantic_aug.evaluation.quality.export_formats import (
    FORMATS,
    SplitImages,
    Target,
    ordered_folders,
    original_folders,
)
from semantic_aug.evaluation.quality.inputs import OutputSettings, Subset, SubsetSettings, open_subsets
from semantic_aug.evaluation.quality.review import relative_paths
from semantic_aug.prompts import original_name
from semantic_aug.run_lock import lock_folder

SHARDED = ("hf", "webdataset")
CARD_FILE, FACTS_FILE = "README.md", "export.json"
BEFORE_RESULTS = (runs.ARGS_FILE,)
"""Files that an export writes before its first image; see :func:`semantic_aug.files.no_trace`."""


@dataclass(frozen=True, kw_only=True)
class ExportSettings(OutputSettings):
    """What is exported, and how."""

    TITLE = "export"
    format: str = cli.setting(
        choices=tuple(FORMATS),
        help="imagefolder: class folders and metadata.csv; hf: a folder that datasets.load_dataset opens; webdataset: tar "
        "shards; csv: images.csv and the images; original: a subset as the original Diff-Mix code names and reads it",
    )
    gamma: float = cli.setting_of(SyntheticSettings, "gamma")
    with_real: bool = cli.setting(
        False, help="export the real images too: training images into train, validation and test images as splits"
    )
    min_target_weight: float = cli.setting(
        0.0,
        type=cli.number(0, 1),
        metavar="W",
        help="leave out synthetic images whose target class weighs less than W in the soft label, in [0, 1]",
    )
    shard_images: int = cli.setting(1000, type=cli.whole(1), help="images in a shard at most, for hf and webdataset")
    measures: Path | None = cli.setting(
        None,
        type=cli.path,
        help="output folder of measure on these subsets, whose share of near-copies the card states",
        result=False,
    )
    copy: bool = cli.setting(
        False, help="copy image files instead of hard-linking them (for imagefolder, csv and original)", result=False
    )


def build_parser() -> cli.Parser:
    """All flags of this command."""
    parser = cli.Parser(prog="python -m semantic_aug.evaluation export", description=__doc__)
    add_shared(parser)
    for cls in (SubsetSettings, ExportSettings):
        cli.add_settings(parser, cls)
    return parser


def collect(dataset: LoadedDataset, subsets: Sequence[Subset], settings: ExportSettings) -> list[SplitImages]:
    """The images of every split that has any, the training split first. Raises UserError: ``--min_target_weight`` leaves no
    synthetic image."""
    origins = []
    for subset in subsets:
        paths = [path for folder, images in subset.parts for path in relative_paths(images, folder)]
        for path, row, photograph in zip(paths, subset.sources.tolist(), subset.photographs.tolist(), strict=True):
            source = dataset.train.keys[row] if row >= 0 else None
            names = {"subset": subset.name, "origin": path, "source_image": source}
            origins.append({**names, "photograph": photograph})
    images = SyntheticImages.joined([subset.images for subset in subsets])
    weights = np.where(images.source == images.target, 1.0, images.strength**settings.gamma)
    if images.source_labels is not None:
        if settings.format == "original":
            raise UserError(
                "--format original: its five columns cannot say what is known of unlabelled sources; expected another format"
            )
        weights = images.labels(settings.gamma, len(dataset.source_names))[np.arange(len(images)), images.target]
    kept = np.flatnonzero(weights >= settings.min_target_weight)
    if not len(kept):
        raise UserError(
            f"--min_target_weight {settings.min_target_weight:g} leaves none of {len(images)} synthetic images: the largest "
            f"target weight is {weights.max():.3f} with --gamma {settings.gamma:g}; lower either"
        )
    chosen = {"synthetic": images.take(kept), "origins": [origins[row] for row in kept.tolist()]}
    train = SplitImages("train", dataset.source_names, settings.gamma, **chosen)
    if not settings.with_real:
        return [train]
    if settings.format == "original":
        raise UserError(
            "--with_real with --format original: the original's subsets hold synthetic images alone; leave it out"
        )
    others = [
        SplitImages(name, dataset.source_names, settings.gamma, table)
        for name, table in (("val", dataset.val), ("test", dataset.test))
        if table is not None and len(table)
    ]
    return [replace(train, real=dataset.train), *others]


def without_places(subsets: Sequence[Subset]) -> list[Subset]:
    """The subsets, those named by an absolute path under the end of it in which they differ, since exports are published."""
    absolute = [subset.name for subset in subsets if Path(subset.name).is_absolute()]
    if not absolute:
        return list(subsets)
    shared = os.path.commonpath([Path(name).parent.parent for name in absolute])
    return [replace(s, name=os.path.relpath(s.name, shared)) if s.name in absolute else s for s in subsets]


def folders_of(dataset: LoadedDataset, format: str) -> tuple[str, ...]:
    """A folder name for each class, in label order."""
    if format == "original":
        return original_folders([original_name(name, dataset.name) for name in dataset.source_names])
    return ordered_folders(dataset.folders)


def arguments_of(args, settings: ExportSettings) -> dict:
    """The settings that change a byte of an export; no paths, since exports are published."""
    names = [
        name for name in cli.result_settings(ExportSettings) if name != "shard_images" or settings.format in SHARDED
    ]
    drawn = {"seed": args.seed} if settings.format == "webdataset" else {}
    # earlier versions handed on all files as they are, some of which now have another ending: they cannot be resumed
    real = {"real_images": "as the stages read them"} if settings.with_real else {}
    return {**{name: getattr(settings, name) for name in names}, **real, **drawn}


def notes(splits: Sequence[SplitImages], settings: ExportSettings) -> list[str]:
    """Notes on classes without an image in a split of class folders."""
    if settings.format != "imagefolder":
        return []
    lines, count = [], len(splits[0].class_names)
    for split in splits:
        empty = count - len(np.unique(split.labels))
        if empty:
            lines.append(
                f"note: {empty} of {count} classes have no image in {split.name}, so that torchvision and timm number the rest "
                f"otherwise; timm takes --class-map {settings.output_dir}/class_map.txt, and metadata.csv holds the labels"
            )
    return lines


def write(
    args, settings: ExportSettings, origin: RunOrigin, facts: dict, splits: Sequence, folders: Sequence[str]
) -> None:
    """Claims the folder and writes the images, then the card and the facts. Raises UserError: the folder holds anything else,
    another export among it, or an image cannot be read."""
    folder = settings.output_dir
    claim = partial(runs.claim, folder, arguments_of(args, settings), "--output_dir", origin=origin)
    with files.no_trace(folder, BEFORE_RESULTS), lock_folder(folder, "--output_dir"):
        if not claim(dry_run=True):  # the images of an export that goes on were checked when it began
            for split in splits:
                refuse_damaged(split.image, range(len(split)))
        if claim():
            for leftover in folder.rglob(".*.tmp"):  # of a run that was killed
                leftover.unlink()
        target = Target(folder, tuple(folders), settings.copy, settings.shard_images, args.seed)
        options = {"desc": f"export {settings.format}", "unit": "image", "dynamic_ncols": True, "mininterval": 1}
        with tqdm(total=sum(map(len, splits)), **options) as bar:
            FORMATS[settings.format](target, splits, bar)
        shards = -(-len(splits[0]) // settings.shard_images)
        files.write_text(folder / CARD_FILE, card.write_card(facts, folder, shards))
        files.write_json(folder / FACTS_FILE, facts)


def main(argv: list[str] | None = None) -> int:
    """Reads the subsets, writes the export, and prints what it holds."""
    args = build_parser().parse_args(argv)
    settings = cli.read_settings(ExportSettings, args)
    dataset = load_dataset(args.dataset, cli.read_settings(Setting, args), args.config_dir)
    subsets = without_places(open_subsets(cli.read_settings(SubsetSettings, args), dataset, args.config_dir))
    splits = collect(dataset, subsets, settings)
    print(dataset.describe())
    for split in splits:
        counts = split.counts
        pseudo = f", {counts['pseudo_labelled']} pseudo-labelled photographs" if "pseudo_labelled" in counts else ""
        print(f"{split.name}: {counts['real']} real and {counts['synthetic']} synthetic images{pseudo}")
    folders = folders_of(dataset, settings.format)
    for note in notes(splits, settings):
        print(note)
    left_out = sum(map(len, subsets)) - (len(splits[0]) - splits[0].reals)
    facts = card.describe(dataset, subsets, splits, settings, left_out)
    origin = RunOrigin(dataset, SPLITS if settings.with_real else (), synthetic=splits[0].synthetic)
    if args.dry_run:
        runs.claim(settings.output_dir, arguments_of(args, settings), "--output_dir", origin=origin, dry_run=True)
        return 0
    write(args, settings, origin, facts, splits, folders)
    print(f"exported {sum(map(len, splits))} images as {settings.format}: {registry.shown_path(settings.output_dir)}")
    return 0
