"""Settings of stage 3, each declared once: flag, default, help, and whether it changes the result; no heavy imports.

Settings of synthetic images are declared in :mod:`semantic_aug.classify.draws`, of mixing in
:mod:`semantic_aug.classify.mixing`.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from semantic_aug import cli
from semantic_aug.classify.draws import SyntheticSettings
from semantic_aug.classify.mixing import MixSettings
from semantic_aug.datasets.cache import MODES
from semantic_aug.datasets.settings import Setting, add_shared, dataset_name
from semantic_aug.datasets.spec import SHOT_THRESHOLDS
from semantic_aug.errors import UserError
from semantic_aug.registry import resolve_path
from semantic_aug.runs import ARGS_FILE

CRITERIA = ("ce", "ls", "focal", "ldam", "bsm", "cb")
ON_DEVICE = "device"
"""Value of ``--cache``: images are decoded as with ``auto``, then held on the device, where batches are cropped."""
CACHES = (*MODES, ON_DEVICE)
WEIGHTS = ("auto", "none", "torchvision")
"""Values of ``--weights`` that are no path."""
MODEL_FILE = "model.safetensors"
"""Weight file of a finished run."""
WEIGHT_FILES = (MODEL_FILE, "pytorch_model.bin", "model_best.pth.tar")
"""Files searched for, in this order, if ``--weights`` is a folder; the last is written by timm's ``train.py``."""
DEFAULT_LR = {"sgd": 0.02, "adamw": 1e-3}
"""Peak learning rate of each optimiser without ``--lr`` or a value of the recipe."""
TORCHVISION_NAMES = {
    "vit_b_16": "vit_base_patch16_224",
    "vit_b_32": "vit_base_patch32_224",
    "vit_l_16": "vit_large_patch16_224",
    "swin_t": "swin_tiny_patch4_window7_224",
    "swin_s": "swin_small_patch4_window7_224",
    "swin_b": "swin_base_patch4_window7_224",
    "mobilenet_v2": "mobilenetv2_100",
    "mobilenet_v3_large": "mobilenetv3_large_100",
    "mobilenet_v3_small": "mobilenetv3_small_100",
    "efficientnet_v2_s": "tf_efficientnetv2_s",
    "regnet_y_400mf": "regnety_004",
    "regnet_y_8gf": "regnety_080",
}
"""torchvision's model names that differ from timm's -> timm's names."""


def network(name: str) -> str:
    """The network of a model name of timm or torchvision: timm's name without tag and image size."""
    name = name.partition(".")[0]
    return re.sub(r"_(224|256|288|320|384|448|512)$", "", TORCHVISION_NAMES.get(name, name))


@dataclass(frozen=True)
class ModelSettings:
    """The classifier and its pre-trained weights."""

    TITLE = "model"
    model: str = cli.setting(
        "resnet50", metavar="NAME", help="name of a timm model; torchvision's names are understood"
    )
    weights: str = cli.setting(
        "auto",
        type=cli.path_or(*WEIGHTS),
        metavar="auto|none|torchvision|PATH",
        help="pre-trained weights: auto (an installed package, else the hub), none, torchvision's (a ResNet's "
        "IMAGENET1K_V1; IMAGENET1K_SWAG_E2E_V1 of vit_b_16), or a file or folder",
    )
    res_mode: int = cli.setting(
        224,
        type=cli.whole(16),
        metavar="PIXELS",
        help="side of the images in pixels: 128, 224, 384, 448, ...; they are resized to 8/7 of it, then cropped",
    )
    trainable_layers: str = cli.setting(
        "all",
        metavar="PARTS",
        help="trained parts: all, or some joined by + (linear, stages4+linear, stages3+stages4+linear, ...); others are frozen",
    )


@dataclass(frozen=True)
class TrainSettings:
    """Length, batches, optimiser and selection of a training."""

    TITLE = "training"
    nepoch: int = cli.setting(120, type=cli.whole(1), help="epochs over the real images")
    seeds: tuple[int, ...] | None = cli.setting(
        None,
        nargs="+",
        type=int,
        help="train with each of these seeds instead of --seed, each in its own folder below the run's, and report mean "
        "and standard deviation",
        result=False,
        record=False,
    )
    batch_size: int = cli.setting(32, type=cli.whole(1), help="images per step, over all processes")
    gradient_accumulation_steps: int = cli.setting(
        1, type=cli.whole(1), help="parts into which the images of a step are divided, to save memory", result=False
    )
    augmentation: str = cli.setting(
        "crop",
        choices=("crop", "resized_crop"),
        absent="crop",
        help="crop: random windows, 7/8 wide, of the image resized to a square; resized_crop: windows of 0.08 to 1 of the "
        "image's area, resized, and brightness, contrast and saturation changed by up to 0.4, evaluation then keeping the "
        "aspect ratio; both are mirrored at random",
    )
    optimizer: str = cli.setting("sgd", choices=tuple(DEFAULT_LR), help="optimiser: SGD with momentum 0.9, or AdamW")
    momentum: str = cli.setting(
        "nesterov",
        choices=("nesterov", "plain"),
        absent="nesterov",
        help="SGD's momentum: Nesterov's, or plain (Polyak's)",
    )
    lr: float | None = cli.setting(
        None,
        type=cli.number(0, open_low=True),
        metavar="LR",
        help="peak learning rate (default: the recipe's; else 0.02 for sgd, 0.001 for adamw)",
    )
    weight_decay: float = cli.setting(5e-4, type=cli.number(0), metavar="X", help="weight decay")
    weight_decay_on: str = cli.setting(
        "weights",
        choices=("weights", "all"),
        absent="weights",
        help="parameters with weight decay: weights (without biases and normalisation), or all",
    )
    warmup_epochs: float = cli.setting(
        5, type=cli.number(0), metavar="N", help="epochs of linear warm-up, at most a tenth of the run"
    )
    lr_schedule: str = cli.setting(
        "cosine",
        choices=("cosine", "scaled_cosine", "step"),
        absent="cosine",
        help="learning rate after the warm-up; cosine: falls to 0; scaled_cosine: a cosine over the whole run, times the "
        "warm-up; step: divided by 100 after 0.8 and by 10,000 after 0.9 of the epochs, as in LDAM-DRW's code",
    )
    amp: str = cli.setting(
        "auto", choices=("auto", "no", "fp16", "bf16"), help="mixed precision; auto: bf16 on a GPU, no on the CPU"
    )
    eval_every: int = cli.setting(1, type=cli.whole(1), help="epochs between evaluations on validation")
    ema_decay: float = cli.setting(
        0.0,
        type=cli.number(0, 0.9999999),
        metavar="D",
        help="decay per step of a moving average of the weights, which is evaluated and saved in their place; 0: none",
    )
    compile: bool = cli.setting(False, help="compile the training step (faster on a GPU)", result=False)
    patience: int = cli.setting(
        0, type=cli.whole(0), help="stop after N evaluations on validation without a better score; 0: never"
    )
    select_by: str = cli.setting(
        "top1", choices=("top1", "macro", "worst_group"), help="validation score that chooses the epoch"
    )
    report_to: str = cli.setting(
        "none", choices=("none", "tensorboard"), help="tracker of the metrics, besides epochs.csv", result=False
    )

    @property
    def keep_aspect(self) -> bool:
        """Whether evaluation keeps the images' aspect ratio."""
        return self.augmentation == "resized_crop"


@dataclass(frozen=True)
class LossSettings:
    """The loss over the soft labels and its parameters."""

    TITLE = "loss and mixing"
    criterion: str = cli.setting(
        "ce",
        choices=CRITERIA,
        help="loss over the soft labels. ce: cross-entropy; ls: with smoothed labels; focal; ldam: label-distribution-aware "
        "margin; bsm: balanced softmax; cb: cross-entropy, classes weighted by their effective number",
    )
    smoothing: float = cli.setting(
        0.1, type=cli.number(0, 0.99), metavar="E", help="share of each label spread over all classes by --criterion ls"
    )
    focal_gamma: float = cli.setting(
        2.0, type=cli.number(0), metavar="G", help="exponent of the focal loss, --criterion focal"
    )
    cb_beta: float = cli.setting(
        0.9999,
        type=cli.number(0, 0.9999999),
        metavar="B",
        help="beta of the effective number of samples, for --criterion cb and --drw_epoch",
    )
    ldam_margin: float = cli.setting(
        0.5, type=cli.number(0, open_low=True), metavar="M", help="margin of the rarest class, for --criterion ldam"
    )
    ldam_scale: float = cli.setting(
        1.0,
        type=cli.number(0, open_low=True),
        metavar="S",
        help="factor on the logits, for --criterion ldam; LDAM's authors use 30 on cosines, Diff-Mix's 30 on a linear head",
    )
    drw_epoch: int = cli.setting(
        -1,
        type=cli.whole(-1),
        help="deferred reweighting: classes are weighted by their effective number once N epochs are done; -1: never",
    )
    class_weight_mean: str = cli.setting(
        "images",
        choices=("images", "weights"),
        absent="images",
        help="divisor of a batch's class-weighted losses, --criterion cb or --drw_epoch; images: their number; weights: the "
        "sum of their class weights, as LDAM-DRW and PyTorch divide",
    )

    @property
    def label_smoothing(self) -> float:
        """The label smoothing in effect."""
        return self.smoothing if self.criterion == "ls" else 0.0


@dataclass(frozen=True)
class EvaluationSettings:
    """The test images of a classifier, and the groups of its scores."""

    TITLE = "evaluation"
    test_dataset: str | None = cli.setting(
        None,
        type=dataset_name,
        metavar="NAME",
        absent=None,
        help="test on the test images of another data set, its classes matched by name, and report its groups: waterbird for "
        "a model of cub (default: the data set's own test images)",
    )
    shot_thresholds: tuple[int, int] | None = cli.setting(
        None,
        nargs=2,
        type=cli.whole(0),
        absent=SHOT_THRESHOLDS,
        help="results by class frequency: many-shot classes have more training images than the first number, few-shot "
        "classes fewer than the second (default: by data set, 20 5 for cub, 30 10 for flower, 100 20 for others)",
    )


@dataclass(frozen=True)
class UseSettings:
    """Use of a trained classifier."""

    TITLE = "instead of training"
    eval_only: bool = cli.setting(
        False,
        help="evaluate the run in --output_dir (or the classifier of --weights PATH) on validation and test",
        result=False,
    )
    predict: tuple[Path, ...] | None = cli.setting(
        None,
        nargs="+",
        type=cli.path,
        metavar="PATH",
        help="classify images, or every image below folders, with that classifier; writes predictions.csv, in which the row "
        "of an image that cannot be read is empty (exit status 2)",
        result=False,
    )


@dataclass(frozen=True)
class PlacementSettings:
    """Device, cache and output folder."""

    TITLE = "where"
    gpu: str | None = cli.setting(
        None,
        metavar="N|cpu",
        help="GPU number, or cpu (default: GPU 0 where there is one; under accelerate launch each process has its own)",
        result=False,
        record=False,
    )
    cache: str = cli.setting(
        "auto",
        choices=CACHES,
        help="where decoded and resized images are kept: in memory, in outputs/cache (shared by runs; DIFFMIX_CACHE names "
        "another folder, DIFFMIX_CACHE_GB its bound), or nowhere; auto: by size; device: on the GPU, where batches are "
        "cropped",
        result=False,
    )
    output_dir: Path | None = cli.setting(
        None,
        type=cli.path,
        help="output folder (default: outputs/classification/{dataset}{setting}/{model}-{res}-{data}-seed{seed}; with "
        "--seeds without the last part)",
        result=False,
    )


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig:
    """All settings of stage 3.

    :func:`semantic_aug.classify.run.resolve` derives the learning rate, warm-up, precision and output folder that were not
    given, and the last three attributes.

    Attributes:
        syndata: folders of the synthetic subsets.
        carried: see :attr:`semantic_aug.classify.draws.EpochDraws.carried`.
        device: ``cpu`` or ``cuda:N``.
    """

    dataset: str
    setting: Setting = field(default_factory=Setting)
    run: cli.StageSettings = field(default_factory=cli.StageSettings)
    synthetic: SyntheticSettings = field(default_factory=SyntheticSettings)
    classifier: ModelSettings = field(default_factory=ModelSettings)
    training: TrainSettings = field(default_factory=TrainSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    mixing: MixSettings = field(default_factory=MixSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    use: UseSettings = field(default_factory=UseSettings)
    placement: PlacementSettings = field(default_factory=PlacementSettings)
    syndata: tuple[str, ...] = ()
    carried: bool = False
    device: str = "cpu"

    @property
    def seed(self) -> int:
        """Seed of weights, order and augmentation."""
        return self.run.seed

    @property
    def output_dir(self) -> Path:
        """Folder of the results."""
        return self.placement.output_dir

    def with_seed(self, seed: int, output_dir: Path) -> ClassifyConfig:
        """The same request with another seed and output folder."""
        placement = replace(self.placement, output_dir=output_dir)
        return replace(self, run=replace(self.run, seed=seed), placement=placement)

    def record(self) -> dict:
        """The settings in effect, as recorded in ``args.yaml``."""
        synthetic, mixing = self.synthetic, self.mixing
        return {
            "dataset": self.dataset,
            "setting": self.setting.record(),
            "recipe": self.run.recipe,
            "syndata": self.syndata,
            **_recorded(synthetic),
            "draws": synthetic.draws_record(bool(self.syndata), self.carried),
            **_recorded(self.classifier),
            **_recorded(self.training),
            "loss": _recorded(self.loss) | {"smoothing": self.loss.label_smoothing},
            "mixing": {f"{kind}_alpha": mixing.alphas.get(kind, 0.0) for kind in ("mixup", "cutmix", "cmo")}
            | {"probability": mixing.mix_prob}
            | _recorded(mixing),
            **_recorded(self.evaluation),
            **_recorded(self.placement),
            "device": self.device,
            "seed": self.seed,
        }


GROUPS = {
    "synthetic": SyntheticSettings,
    "classifier": ModelSettings,
    "training": TrainSettings,
    "loss": LossSettings,
    "mixing": MixSettings,
    "evaluation": EvaluationSettings,
    "use": UseSettings,
    "placement": PlacementSettings,
}
"""Settings of this stage alone, in the order of the help."""

BY_CONTENT = ("dataset", "test_dataset", "syndata", "weights")
"""Settings that name files, which may move between the starts of a run; their content is compared instead."""

MAY_CHANGE = (
    *(name for cls in GROUPS.values() for name in cli.settings_of(cls) if name not in cli.result_settings(cls)),
    *("device", "recipe", "lr_source"),  # the last one is in records of earlier versions
    *BY_CONTENT,
)
"""Recorded settings that may differ when a run is restarted."""

ABSENT = cli.absent_values(Setting, *GROUPS.values())
"""Values of settings that a record lacks."""


def _recorded(settings: object) -> dict:
    """The recorded settings of a group, under their names in records."""
    values = {name: getattr(settings, name) for name in cli.settings_of(type(settings))}
    values = cli.recorded(values, type(settings))
    return {"resolution" if name == "res_mode" else name: value for name, value in values.items()}


# ---------------------------------------------------------------------------------------------------- files of requests


def check_paths(config: ClassifyConfig) -> None:
    """Refuses paths of a request that do not exist, before anything is read. Raises UserError: names the first."""
    for path in config.use.predict or ():
        if not path.exists():
            raise UserError(f"--predict {path}: not a folder or file; expected images or folders with images")
    used = config.use.eval_only or config.use.predict
    if config.classifier.weights not in WEIGHTS or used and config.output_dir is not None:
        classifier_file(config)


def classifier_file(config: ClassifyConfig) -> tuple[str, Path]:
    """The flag of a trained classifier and its weight file. Raises UserError: no such file."""
    if config.classifier.weights not in WEIGHTS:
        return "--weights", weight_file(resolve_path(config.classifier.weights))
    path = resolve_path(config.output_dir) / MODEL_FILE
    if not path.is_file():
        raise UserError(
            f"--output_dir {path.parent}: no trained classifier there (looked for {path.name}); train it first"
        )
    return "--output_dir", path


def weight_file(path: Path) -> Path:
    """The weight file of ``--weights PATH``, a file or a folder with one. Raises UserError: no such file."""
    if path.is_dir():
        path = next((path / name for name in WEIGHT_FILES if (path / name).is_file()), path)
    if not path.is_file():
        raise UserError(f"--weights {path}: expected a .safetensors or .pth file, or a folder with {MODEL_FILE}")
    return path


def check_run(folder: Path) -> None:
    """Refuses a ``--classifier`` folder without a finished run."""
    if not ((folder / ARGS_FILE).is_file() and (folder / MODEL_FILE).is_file()):
        raise UserError(
            f"--classifier {folder} holds no finished classifier: expected the output folder of train_cls.py with {MODEL_FILE}"
        )


def build_parser(description: str) -> cli.Parser:
    """All flags of this stage."""
    parser = cli.Parser("train_cls", {"model": network}, prog="train_cls.py", description=description)
    add_shared(parser, seed=2020)
    for cls in GROUPS.values():
        cli.add_settings(parser, cls)
    return parser


def read_config(args: argparse.Namespace) -> ClassifyConfig:
    """The request of parsed arguments, before settings that were not given are derived."""
    groups = {"setting": Setting, "run": cli.StageSettings, **GROUPS}
    return ClassifyConfig(dataset=args.dataset, **{name: cli.read_settings(cls, args) for name, cls in groups.items()})
