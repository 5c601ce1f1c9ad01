"""Settings of the data set and of the part that is used, shared by the three stages of one experiment."""

from dataclasses import asdict, dataclass
from pathlib import Path

from semantic_aug import cli
from semantic_aug.datasets.readers.hub import parse_id
from semantic_aug.errors import UserError
from semantic_aug.files import home_expanded
from semantic_aug.runs import setting_suffix


def dataset_name(text: str) -> str:
    """An argument type: the name of a data set, or ``scheme:PATH`` with the path made absolute."""
    scheme, colon, rest = text.partition(":")
    rest, config = parse_id(rest) if scheme == "hf" else (rest, None)
    local = scheme in ("folder", "csv") or (scheme == "hf" and home_expanded(rest).exists())
    end = f":{config}" if config else ""
    return f"{scheme}:{cli.path(rest)}{end}" if colon and rest and local else text


HUB, DATASET = "hf:", "dataset:"
"""Prefixes of images that are named by a hub id, and by the data set whose training images they are."""


POOLS = "a folder of images, a list with the column path, hf:ID or dataset:NAME"
"""Values of ``--unlabelled``, for errors."""


def unlabelled_images(text: str) -> Path | str:
    """An argument type: a path, ``hf:ID`` with a hub id or a local copy of a hub's data set, or ``dataset:NAME``."""
    if text.startswith(DATASET):
        return DATASET + dataset_name(text.removeprefix(DATASET))
    return dataset_name(text) if text.startswith(HUB) else cli.path(text)


def check_unlabelled(images: Path | str | None) -> None:
    """Refuses unlabelled images whose path leads to nothing, before anything is read."""
    if isinstance(images, Path) and not (images.is_dir() or images.is_file()):
        raise UserError(f"--unlabelled {images}: not there; expected {POOLS}")


@dataclass(frozen=True, kw_only=True)
class DatasetName:
    """The data set."""

    TITLE = "data"
    dataset: str = cli.setting(
        type=dataset_name,
        metavar="NAME",
        help="a registered name, a name of datasets.yaml, or folder:PATH, csv:PATH, hf:ID, hf:ID:CONFIGURATION",
    )


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Images without labels, which a command may use beside the data set."""

    TITLE = "unlabelled images"
    unlabelled: Path | str | None = cli.setting(
        None,
        type=unlabelled_images,
        metavar="PATH",
        absent=None,
        help="unlabelled images: a folder, a CSV file with the column path, hf:ID, or dataset:NAME for a data set's training "
        "images; labels are not used; validation and test images of a named data set are left out, of other pools refused "
        "(default: none)",
    )


@dataclass(frozen=True)
class Setting:
    """The part of the training split that is used.

    Draws depend on ``subset_seed`` and not on ``--seed``, so that trainings of several seeds share one subset; see
    :mod:`semantic_aug.datasets.subsets`.
    """

    TITLE = "data"
    examples_per_class: int = cli.setting(
        -1, type=int, help="few-shot setting: training images per class, -1 for all (default: -1)"
    )
    task: str = cli.setting(
        "vanilla", choices=("vanilla", "imbalanced"), help="vanilla, or imbalanced for the long-tail setting"
    )
    imbalance_factor: float = cli.setting(
        0.01,
        type=cli.number(0, 1, open_low=True),
        metavar="F",
        help="long-tail setting: smallest over largest class, in (0, 1]",
    )
    imbalance_profile: str = cli.setting(
        "exponential",
        choices=("exponential", "original"),
        help="long-tail setting: exponential keeps the largest class whole, original counts as the authors' code does",
    )
    subset_seed: int = cli.setting(
        0,
        type=int,
        help="seed of the few-shot or long-tail draw and of the held-out validation split; keep it the same in "
        "all three stages",
    )
    val_fraction: float = cli.setting(
        0.1,
        type=cli.number(0, 0.9),
        metavar="F",
        help="share of each class held out of train for validation where the data set has no validation split",
    )
    val_examples_per_class: int = cli.setting(
        -1, type=int, help="validation images per class at most, drawn with --subset_seed; -1 for all (default: -1)"
    )
    corrupt_prob: float = cli.setting(
        0.0,
        type=cli.number(0, 1),
        metavar="P",
        help="label noise: probability that a training label is replaced, drawn with --subset_seed; keep it the same in all "
        "three stages",
    )
    corrupt_classes: str = cli.setting(
        "others",
        choices=("others", "all"),
        absent="others",
        help="label noise: classes that the new label is drawn from; others: all but the true one; all: the true one as "
        "well, so that (K - 1) / K of the replaced labels are wrong",
    )
    split: str = cli.setting(
        "official",
        choices=("official", "half"),
        absent="official",
        help="official: the data set's split; half: a random half of each class for training and the rest for testing, as the "
        "Diff-Mix authors split flower and caltech; keep it the same in all three stages",
    )

    def __post_init__(self):
        for name in ("examples_per_class", "val_examples_per_class"):
            value = getattr(self, name)
            if value == 0 or value < -1:
                raise UserError(f"--{name} {value}: expected -1 (all) or a positive number")
        for name, field in cli.settings_of(Setting).items():
            accepted = field.metadata["flag"].get("choices")
            if accepted and getattr(self, name) not in accepted:
                raise UserError(f"--{name} {getattr(self, name)}: expected one of {', '.join(accepted)}")
        if not 0 < self.imbalance_factor <= 1:
            raise UserError(f"--imbalance_factor {self.imbalance_factor}: expected a number in (0, 1]")
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"--val_fraction {self.val_fraction}: expected a number in [0, 1)")
        if not 0 <= self.corrupt_prob <= 1:
            raise UserError(f"--corrupt_prob {self.corrupt_prob}: expected a number in [0, 1]")

    def record(self) -> dict:
        """Values by name, as :func:`semantic_aug.cli.recorded` keeps them."""
        return cli.recorded(asdict(self), Setting)

    @property
    def suffix(self) -> str:
        """The suffix of this setting's output folders, e.g. ``_5shot``, ``_imb0.01orig``, ``_noise0.2`` or ``_noise0.2all``."""
        shown = setting_suffix(self.examples_per_class, self.task, self.imbalance_factor)
        if self.task == "imbalanced" and self.imbalance_profile == "original":
            shown += "orig"
        shown += "_half" if self.split == "half" else ""
        if self.corrupt_prob:
            shown += f"_noise{self.corrupt_prob:g}{'all' if self.corrupt_classes == 'all' else ''}"
        return shown


ABSENT = {name: getattr(Setting, name) for name in ("corrupt_prob", "corrupt_classes", "split", "imbalance_profile")}
"""Values of settings that the record of a subset or of an evaluation lacks, or holds as None."""


def add_shared(parser: cli.Parser, seed: int = 0) -> None:
    """The flags that every stage has: the data set, the part of it, and :class:`semantic_aug.cli.StageSettings`."""
    cli.add_settings(parser, DatasetName)
    cli.add_settings(parser, Setting)
    cli.add_settings(parser, cli.StageSettings, seed=seed)
