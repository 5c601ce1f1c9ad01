"""Flags that the evaluation commands share, and what they stand for."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

from semantic_aug import cli, registry
from semantic_aug.datasets.settings import Setting
from semantic_aug.devices import device_of

if TYPE_CHECKING:
    from semantic_aug.classify.inference import Classifier
    from semantic_aug.datasets import LoadedDataset
    from semantic_aug.datasets.origin import RunOrigin
    from semantic_aug.evaluation.quality.clip import Clip
    from semantic_aug.evaluation.quality.features import Extractor
    from semantic_aug.evaluation.quality.subset import Subset

MAY_CHANGE = ("gpu", "batch_size", "cache", "dry_run")
"""Flags that have no part in the outcome."""


def add_subsets(parser: cli.Parser) -> None:
    """Which synthetic images are looked at."""
    syn = parser.add_argument_group("synthetic data")
    syn.add_argument(
        "--syndata_key",
        nargs="+",
        default=[],
        metavar="KEY",
        help="subsets of the data set's section in synthetic_datasets.yaml (KEY#NAME for a filtered one)",
    )
    syn.add_argument(
        "--syndata_dir",
        nargs="+",
        type=cli.path_or(),
        default=[],
        metavar="DIR",
        help="folders of subsets (DIR#NAME for a filtered one), besides or instead of keys",
    )
    syn.add_argument(
        "--allow_other_sources",
        action="store_true",
        help="accept subsets whose source images are not among the training images of this setting",
    )


def add_models(parser: cli.Parser, features: bool = True) -> None:
    """The models that look at them."""
    models = parser.add_argument_group("models")
    models.add_argument(
        "--classifier",
        type=cli.path_or(),
        default=None,
        metavar="DIR",
        help="output folder of a train_cls.py run on this data set; one trained on real images only is an independent judge",
    )
    models.add_argument(
        "--clip",
        type=cli.model,
        default=None,
        metavar="DIR|ID",
        help="a CLIP model: folder in transformers' layout, or hub id",
    )
    if features:
        models.add_argument(
            "--model",
            default="tf_efficientnet_lite0",
            metavar="NAME",
            help="any timm model, whose features are compared; torchvision's names are understood",
        )
        models.add_argument(
            "--weights",
            type=cli.path_or("auto", "none"),
            default="auto",
            metavar="auto|none|PATH",
            help="its weights: auto (an installed package, else the hub), none (random), or a file or folder",
        )
        models.add_argument(
            "--res_mode",
            type=cli.whole(16),
            default=224,
            metavar="PIXELS",
            help="side to which pictures are resized for it",
        )
        models.add_argument(
            "--cache",
            choices=("disk", "off"),
            default="disk",
            help="whether features are kept in outputs/cache (DIFFMIX_CACHE names another folder) for the next command",
        )
    models.add_argument("--batch_size", type=cli.whole(1), default=64, metavar="N", help="images at a time")
    models.add_argument(
        "--gpu", default=None, metavar="N|cpu", help="GPU number, or cpu (default: GPU 0 where there is one)"
    )


def add_output(parser: cli.Parser) -> None:
    """Where results go."""
    parser.add_argument(
        "--output_dir", type=cli.path, required=True, metavar="DIR", help="folder of the results; made if absent"
    )


@dataclass
class Given:
    """What the shared flags stand for.

    Attributes:
        dataset: under its setting.
        subsets: to be looked at.
        device: where models run.
    """

    dataset: LoadedDataset
    subsets: list[Subset]
    device: str


def resolve(args: argparse.Namespace) -> Given:
    """Loads the data set and reads the subsets.

    Raises:
        UserError: any of them is not what it should be.
    """
    from semantic_aug.datasets import load_dataset
    from semantic_aug.evaluation.quality.subset import open_subsets

    device = device_of(args.gpu)
    dataset = load_dataset(args.dataset, cli.read_settings(Setting, args), args.config_dir)
    subsets = open_subsets(args.syndata_key, args.syndata_dir, dataset, args.config_dir, args.allow_other_sources)
    return Given(dataset, subsets, device)


def extractor(args: argparse.Namespace, device: str) -> Extractor:
    """The feature extractor of ``--model``."""
    from semantic_aug.evaluation.quality.features import load_extractor

    return load_extractor(args.model, args.weights, args.res_mode, device, keep=args.cache == "disk")


def judge(args: argparse.Namespace, given: Given) -> Classifier | None:
    """The classifier of ``--classifier``, or None.

    Raises:
        UserError: not a finished run, or one on other classes.
    """
    if args.classifier is None:
        return None
    from semantic_aug.classify.inference import load_run
    from semantic_aug.evaluation.quality.faithfulness import class_positions

    found = load_run(registry.resolve_path(args.classifier), given.device)
    class_positions(found, given.dataset)
    return found


def clip(args: argparse.Namespace, device: str) -> Clip | None:
    """The model of ``--clip``, or None."""
    if args.clip is None:
        return None
    from semantic_aug.evaluation.quality.clip import load_clip

    return load_clip(args.clip, device)


def record(args: argparse.Namespace) -> dict:
    """The arguments as they are kept beside the results."""
    return {name: value for name, value in vars(args).items() if name not in (*MAY_CHANGE, "output_dir")}


def origin(args: argparse.Namespace, given: Given) -> RunOrigin:
    """What results are made from: training images, the subsets, and the weights of ``--classifier``."""
    from semantic_aug.classify.trainer import MODEL_FILE
    from semantic_aug.datasets.fingerprint import files_digest, hash_files
    from semantic_aug.datasets.origin import RunOrigin, synthetic_identity

    def further() -> dict:
        names, subsets = given.dataset.source_names, {}
        for subset in given.subsets:
            hashes = hash_files(subset.images.paths, "synthetic images")
            subsets[subset.name] = synthetic_identity(subset.images, hashes, names)
        classifier = getattr(args, "classifier", None)
        file = registry.resolve_path(classifier) / MODEL_FILE if classifier else None
        return {"subsets": subsets, "classifier": files_digest([file]) if file else None}

    return RunOrigin(given.dataset, ("train",), further=further)
