"""Inputs of the commands that examine subsets: a data set, synthetic subsets, and models, as the flags name them."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from semantic_aug import cli, files, registry, runs
from semantic_aug.classify.config import MODEL_FILE, SyntheticSettings
from semantic_aug.datasets import LoadedDataset, load_dataset
from semantic_aug.datasets.fingerprint import files_digest
from semantic_aug.datasets.origin import RunOrigin, class_order
from semantic_aug.datasets.settings import ABSENT, DatasetName, Setting, add_shared
from semantic_aug.datasets.synthetic import SyntheticImages, is_pseudo_labelled, locate, read_subset
from semantic_aug.devices import device_of
from semantic_aug.errors import UserError
from semantic_aug.evaluation.quality.review import list_identity
from semantic_aug.prompts import SAMPLING_TEMPLATE, class_phrase, fill

if TYPE_CHECKING:
    from semantic_aug.classify.features import Extractor
    from semantic_aug.classify.inference import Classifier
    from semantic_aug.evaluation.quality.clip import Clip

REAL = "real"
"""Name of the training images in tables; no subset is shown under this name."""
NO_PART = ("config_dir", "dataset", "syndata_key", "syndata_dir", "classifier", "measures")
"""Entries of records that name places, which may move: what lies there is compared by content, or read anew."""


@dataclass(frozen=True, kw_only=True)
class SubsetSettings:
    """Which synthetic images are examined."""

    TITLE = "synthetic data"
    syndata_key: tuple[str, ...] = cli.setting(
        (),
        nargs="+",
        metavar="KEY",
        help="subsets of the data set's section in synthetic_datasets.yaml (KEY#VARIANT for a filtered one)",
    )
    syndata_dir: tuple[str, ...] = cli.setting_of(SyntheticSettings, "syndata_dir", default=())
    allow_other_sources: bool = cli.setting_of(SyntheticSettings, "allow_other_sources")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The models that judge images."""

    TITLE = "models"
    classifier: str | None = cli.setting(
        None,
        type=cli.path_or(),
        metavar="DIR",
        help="output folder of a train_cls.py run on this data set; trained on real images only, it judges independently",
    )
    clip: str | None = cli.setting(
        None, type=cli.model, metavar="DIR|ID", help="CLIP model: a folder in transformers' layout, or a hub id"
    )
    batch_size: int = cli.setting(64, type=cli.whole(1), help="images at a time", result=False)
    gpu: str | None = cli.setting(
        None, metavar="N|cpu", help="GPU number, or cpu (default: GPU 0 where there is one)", result=False
    )


@dataclass(frozen=True, kw_only=True)
class FeatureSettings:
    """The network whose features are compared."""

    TITLE = "models"
    model: str = cli.setting(
        "tf_efficientnet_lite0",
        metavar="NAME",
        help="any timm model, whose features are compared; torchvision's names are understood",
    )
    weights: str = cli.setting(
        "auto",
        type=cli.path_or("auto", "none"),
        metavar="auto|none|PATH",
        help="weights of --model: auto (an installed package, else the hub), none (random), or a file or folder",
    )
    res_mode: int = cli.setting(
        224, type=cli.whole(16), metavar="PIXELS", help="side to which images are resized for --model"
    )
    cache: str = cli.setting(
        "disk",
        choices=("disk", "off"),
        help="whether features are kept in outputs/cache (DIFFMIX_CACHE names another folder) for the next command",
        result=False,
    )

    def load(self, device: str) -> Extractor:
        """The feature extractor."""
        from semantic_aug.classify.features import load_extractor

        return load_extractor(self.model, self.weights, self.res_mode, device, keep=self.cache == "disk")


@dataclass(frozen=True, kw_only=True)
class OutputSettings:
    """Where results go."""

    TITLE = "output"
    output_dir: Path = cli.setting(type=cli.path, help="folder of the results, created if absent", result=False)


COMMON = (DatasetName, Setting, cli.RunSettings, SubsetSettings, ModelSettings)
"""Settings of every command of this folder that reads subsets and models."""


@dataclass(frozen=True)
class Subset:
    """One or several folders under one name, ``M`` images in all.

    Attributes:
        name: key or folder, as the tables show it.
        parts: each folder as given, a ``#variant`` included, and its images.
        images: of all folders.
        sources: int64 ``(M,)``, each image's source as a row of the data set's training images; -1: not known.
        photographs: bool ``(M,)``, images that are real photographs with a classifier's label.
    """

    name: str
    parts: tuple[tuple[str, SyntheticImages], ...]
    images: SyntheticImages
    sources: np.ndarray
    photographs: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    @property
    def folders(self) -> list[str]:
        """The folders as given."""
        return [folder for folder, _ in self.parts]

    @property
    def strengths(self) -> np.ndarray:
        """``(M,)`` strengths to group by: two decimals, or one where that leaves more than 20 different ones."""
        rounded = np.round(self.images.strength, 2)
        return rounded if len(np.unique(rounded)) <= 20 else np.round(self.images.strength, 1)


@dataclass(frozen=True)
class Inputs:
    """Data set, subsets and models of a command.

    Attributes:
        record: every setting that changes a byte of the result, kept beside the results.
        absent: values of settings that earlier records lack, by name.
    """

    dataset: LoadedDataset
    subsets: list[Subset]
    models: ModelSettings
    record: dict
    absent: dict = field(default_factory=dict)

    @property
    def device(self) -> str:
        """Where the models run."""
        return device_of(self.models.gpu)

    @cached_property
    def classifier(self) -> Classifier | None:
        """The classifier of ``--classifier``. Raises UserError: not a finished run, or one on other classes."""
        if self.models.classifier is None:
            return None
        from semantic_aug.classify.inference import load_run

        classifier = load_run(registry.resolve_path(self.models.classifier), self.device)
        class_order(classifier.class_names, self.dataset, "--classifier")
        return classifier

    @cached_property
    def clip(self) -> Clip | None:
        """The model of ``--clip``."""
        if self.models.clip is None:
            return None
        from semantic_aug.evaluation.quality.clip import load_clip

        return load_clip(self.models.clip, self.device)

    @property
    def classifier_digest(self) -> str | None:
        """Digest of the weights of ``--classifier``; None without one."""
        run = self.models.classifier
        return files_digest([registry.resolve_path(run) / MODEL_FILE]) if run else None

    def class_probabilities(self, images: SyntheticImages) -> np.ndarray:
        """Class probabilities ``(M, K)`` of synthetic images under ``--classifier``, classes in the data set's order."""
        order = class_order(self.classifier.class_names, self.dataset, "--classifier")
        return self.classifier.probabilities(images.image, len(images))[:, order]

    def clip_scores(self, read: Callable[[int], Image.Image], classes: np.ndarray) -> np.ndarray:
        """CLIP score ``(N,)`` of images read by index, each with the prompt of its class."""
        from semantic_aug.evaluation.quality.clip import clip_score

        super_class = self.dataset.spec.super_class
        phrases = [fill(SAMPLING_TEMPLATE, class_phrase(name, super_class)) for name in self.dataset.class_names]
        images = self.clip.images(read, len(classes), self.models.batch_size)
        return clip_score(images, self.clip.texts(phrases)[np.asarray(classes)])

    def print_summary(self) -> None:
        """Prints the data set and the subsets, a line each."""
        print(self.dataset.describe(), *(f"synthetic: {s.name}, {len(s)} images" for s in self.subsets), sep="\n")

    @contextlib.contextmanager
    def claimed(self, folder: Path, *partial: str) -> Iterator[None]:
        """Claims the output folder for results of these settings, training images, subsets and classifier; where the work fails
        before its first result, as on a damaged image, no record is left that would refuse another image. Raises UserError: the
        folder holds results of others.

        Args:
            partial: patterns of files that are no result without the rest.
        """

        def further() -> dict:
            subsets = {subset.name: list_identity(subset.images, self.dataset.source_names) for subset in self.subsets}
            return {"subsets": subsets, "classifier": self.classifier_digest}

        origin = RunOrigin(self.dataset, ("train",), further=further)
        with files.no_trace(folder, (runs.ARGS_FILE, *partial)):
            runs.claim(folder, self.record, "--output_dir", NO_PART, origin=origin, absent=self.absent)
            yield


def make_parser(command: str, description: str, classes: Sequence[type]) -> cli.Parser:
    """The parser of a command: the settings of every command, then its own."""
    parser = cli.Parser(prog=f"python -m semantic_aug.evaluation {command}", description=description)
    add_shared(parser)
    for cls in (SubsetSettings, ModelSettings, *classes):
        cli.add_settings(parser, cls)
    return parser


def read_inputs(args: argparse.Namespace, classes: Sequence[type]) -> Inputs:
    """Loads the data set and reads the subsets.

    Args:
        args: parsed by the parser of :func:`make_parser`.
        classes: the command's own settings, which are recorded, too.
    """
    models = cli.read_settings(ModelSettings, args)
    device_of(models.gpu)
    dataset = load_dataset(args.dataset, cli.read_settings(Setting, args), args.config_dir)
    subsets = open_subsets(cli.read_settings(SubsetSettings, args), dataset, args.config_dir)
    names = [name for cls in (*COMMON, *classes) for name in cli.result_settings(cls) if hasattr(args, name)]
    record = cli.recorded({name: getattr(args, name) for name in names}, *COMMON, *classes)
    if not args.corrupt_prob:
        del record["corrupt_prob"]  # records of these commands, other than those of the stages, may lack it
    return Inputs(dataset, subsets, models, record, {**ABSENT, **cli.absent_values(*COMMON, *classes)})


def open_subset(name: str, folders: Sequence[str], dataset: LoadedDataset, allow_other_sources: bool = False) -> Subset:
    """Reads the folders of one name."""
    parts = [read_subset(folder, dataset, allow_other_sources) for folder in folders]
    images, rows = SyntheticImages.joined(parts), {key: row for row, key in enumerate(dataset.train.keys)}
    sources = np.array([rows.get(key, -1) for key in images.sources[:, 0]], np.int64)
    photographs = np.repeat([is_pseudo_labelled(locate(folder)[0]) for folder in folders], list(map(len, parts)))
    return Subset(name, tuple(zip(map(str, folders), parts, strict=True)), images, sources, photographs)


def open_subsets(settings: SubsetSettings, dataset: LoadedDataset, config_dir: Path) -> list[Subset]:
    """The subsets of the registry keys, then those of the folders, each under a name of its own. Raises UserError: none at
    all, one given twice, an unknown key, or a subset that cannot be read."""
    shown = lambda name: f"subset {name}" if name == REAL else name  # noqa: E731
    named = {shown(key): dataset.subsets(key, config_dir) for key in settings.syndata_key}
    short = [shown(Path(folder).name) for folder in settings.syndata_dir]
    for folder, name in zip(settings.syndata_dir, short, strict=True):
        name = name if short.count(name) == 1 and name not in named else str(folder)
        if name in named:
            raise UserError(f"subset {folder} is given twice: expected each of --syndata_key, --syndata_dir once")
        named[name] = [folder]
    if not named:
        raise UserError("no synthetic subset is given: expected --syndata_key or --syndata_dir")
    return [open_subset(name, folders, dataset, settings.allow_other_sources) for name, folders in named.items()]
