"""The settings of stage 1: each flag is a field here, from which the parser, the record and the identity of a run are made."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from semantic_aug import cli
from semantic_aug.datasets.settings import DatasetName, Pool, Setting, add_shared
from semantic_aug.diffusion.base import DEFAULT_MODEL
from semantic_aug.diffusion.families import LORA_TARGETS
from semantic_aug.diffusion.schedulers import PREDICTION_TYPES
from semantic_aug.errors import UserError
from semantic_aug.prompts import CAPTIONS, TEMPLATE_SETS, read_templates
from semantic_aug.registry import new_key, resolve_path

STRATEGIES = ("ti", "db", "ti_db")
LR_SCHEDULERS = tuple(
    "constant constant_with_warmup linear cosine cosine_with_restarts polynomial piecewise_constant".split()
)
"""diffusers' learning-rate schedules."""
TRACKERS = ("tensorboard", "wandb", "comet_ml", "mlflow", "clearml", "aim", "dvclive", "swanlab", "trackio")
"""accelerate's trackers; each is also the name of the package it needs."""
UNLABELLED_SHARE = 0.25
"""Share of each batch that is drawn from a pool of unlabelled images where none is given."""
PRECISIONS = ("no", "fp16", "bf16")
COMPILE_STEPS = 5000
"""Optimiser steps from which compiling (a minute or two) is worth it on a GPU."""


def without_lora(config: FinetuneConfig) -> bool:
    """Whether no LoRA is trained, so that its settings decide nothing."""
    return not config.model.trains_lora


def without_tokens(config: FinetuneConfig) -> bool:
    """Whether no class tokens are trained, so that their settings decide nothing."""
    return not config.model.trains_tokens


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The model: base model, class tokens and LoRA."""

    TITLE = "model"
    pretrained_model_name_or_path: str = cli.setting(
        DEFAULT_MODEL,
        type=cli.model,
        metavar="MODEL",
        help="base model, a hub id or a folder in diffusers layout",
        result=False,  # compared by content
    )
    finetune_strategy: str = cli.setting(
        "ti_db", choices=STRATEGIES, help="ti: class tokens; db: U-Net LoRA under class names; ti_db: both"
    )
    rank: int = cli.setting(10, type=cli.whole(1), metavar="R", help="rank of the LoRA", unused=without_lora)
    lora_alpha: float | None = cli.setting(
        None,
        type=cli.number(0, open_low=True),
        metavar="A",
        help="the LoRA's update is scaled by A / R (default: R)",
        unused=without_lora,
    )
    lora_targets: tuple[str, ...] = cli.setting(
        LORA_TARGETS, nargs="+", metavar="NAME", help="projections of the U-Net that get a LoRA", unused=without_lora
    )
    train_text_encoder_lora: bool = cli.setting(
        False,
        help="a LoRA of the same rank on the text encoders' attention projections too (db and ti_db)",
        unused=without_lora,
    )
    initializer: str = cli.setting(
        "class_name",
        metavar="TEXT",
        help="initial class tokens: class_name, super_class, or words of your own",
        unused=without_tokens,
    )
    num_vectors: int = cli.setting(1, type=cli.whole(1), help="vectors per class token", unused=without_tokens)
    gradient_checkpointing: bool = cli.setting(False, help="less memory, more time", result=False)
    mixed_precision: str | None = cli.setting(
        None,
        choices=PRECISIONS,
        help="precision of the frozen weights and of the arithmetic; what is trained stays fp32 (default: "
        "accelerate launch's, else no)",
    )
    compile: str = cli.setting(
        "auto",
        choices=("auto", "on", "off"),
        help="compile what trains; auto: on a GPU where the run is long enough to repay it",
        result=False,
    )
    cuda_graph: bool = cli.setting(
        False,
        help="record forward and backward pass as one CUDA graph and replay it, compiled or not: on one GPU, without "
        "micro-batches and --gradient_checkpointing",
        result=False,
        absent=False,
    )

    def __post_init__(self):
        if self.train_text_encoder_lora and not self.trains_lora:
            raise UserError(
                f"--train_text_encoder_lora with --finetune_strategy {self.finetune_strategy}, which trains no LoRA: give "
                "db or ti_db"
            )

    @property
    def precision(self) -> str:
        """``mixed_precision``, or what ``accelerate launch`` sets. Raises UserError: that is not supported (``fp8``)."""
        precision = self.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if precision not in PRECISIONS:
            raise UserError(
                f"accelerate launch sets the mixed precision {precision}, expected one of {', '.join(PRECISIONS)}: give "
                "--mixed_precision, or change accelerate's configuration"
            )
        return precision

    @property
    def trains_tokens(self) -> bool:
        """Textual inversion."""
        return self.finetune_strategy != "db"

    @property
    def trains_lora(self) -> bool:
        """DreamBooth style."""
        return self.finetune_strategy != "ti"


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The training: batches, learning rates, loss."""

    TITLE = "training"
    max_train_steps: int = cli.setting(
        35000, type=cli.whole(1), help="optimiser steps", unused=lambda config: "constant" in config.train.lr_scheduler
    )
    # A step draws for the whole effective batch, and each process and micro-batch takes its slice: the split changes no
    # result, so the effective batch is compared instead.
    train_batch_size: int = cli.setting(8, type=cli.whole(1), help="images per process and micro-batch", result=False)
    gradient_accumulation_steps: int = cli.setting(
        1, type=cli.whole(1), help="micro-batches per optimiser step", result=False
    )
    effective_batch: int | None = cli.setting(
        None,
        type=cli.whole(1),
        help="images per optimiser step over all processes, in micro-batches of at most --train_batch_size (default: "
        "--train_batch_size x --gradient_accumulation_steps x processes)",
        result=False,  # the resulting batch is compared
    )
    learning_rate: float = cli.setting(
        1e-4, type=cli.number(0), metavar="LR", help="learning rate of the LoRA", unused=without_lora
    )
    ti_learning_rate: float = cli.setting(
        5e-4, type=cli.number(0), metavar="LR", help="learning rate of the class tokens", unused=without_tokens
    )
    scale_lr: bool = cli.setting(
        False, help="multiply both learning rates by batch size, micro-batches and processes", record=False
    )
    lr_scheduler: str = cli.setting("constant", choices=LR_SCHEDULERS, help="schedule of both learning rates")
    lr_warmup_steps: int = cli.setting(
        0,
        type=cli.whole(0),
        help="warm-up of the rates, optimiser steps",
        unused=lambda config: config.train.lr_scheduler in ("constant", "piecewise_constant"),
    )
    lr_num_cycles: int = cli.setting(
        1,
        type=cli.whole(1),
        help="restarts of cosine_with_restarts",
        unused=lambda config: config.train.lr_scheduler != "cosine_with_restarts",
    )
    lr_power: float = cli.setting(
        1.0,
        type=cli.number(0),
        metavar="X",
        help="power of the polynomial schedule",
        unused=lambda config: config.train.lr_scheduler != "polynomial",
    )
    lr_step_rules: str | None = cli.setting(
        None,
        metavar="RULES",
        help="steps of piecewise_constant: 1:1000,0.1:2000,0.01 is times 1 before step 1000, times 0.1 before 2000, "
        "then 0.01",
    )
    prediction_type: str | None = cli.setting(
        None,
        choices=PREDICTION_TYPES,
        help="what the U-Net predicts; another one than the base model's is refused (default: the base model's)",
    )
    snr_gamma: float | None = cli.setting(
        None,
        type=cli.number(0, open_low=True),
        metavar="G",
        help="min-SNR loss weights, 5 in the paper (default: none)",
    )
    noise_offset: float = cli.setting(
        0.0, type=cli.number(0), metavar="X", help="scale of a per-channel offset of the noise"
    )
    adam_weight_decay: float = cli.setting(1e-2, type=cli.number(0), metavar="X", help="AdamW weight decay")
    use_8bit_adam: bool = cli.setting(False, help="bitsandbytes' 8-bit AdamW")
    max_grad_norm: float = cli.setting(
        1.0, type=cli.number(0), metavar="X", help="largest norm of the gradient, which is clipped to it; 0: any"
    )

    def split(self, processes: int) -> TrainSettings:
        """The settings with ``effective_batch`` split over processes and micro-batches. Raises UserError: it cannot be split
        evenly, or only into more than ``train_batch_size`` images at once."""
        if self.effective_batch is None:
            return self
        share, steps = self.effective_batch // processes, self.gradient_accumulation_steps
        if steps == 1:
            steps = -(-share // self.train_batch_size)
        size = share // steps
        if not 0 < size <= self.train_batch_size or size * steps * processes != self.effective_batch:
            raise UserError(
                f"--effective_batch {self.effective_batch}: it does not split evenly over {processes} process(es) and "
                f"{steps} micro-batch(es) of at most --train_batch_size {self.train_batch_size}; change one of them"
            )
        return replace(self, train_batch_size=size, gradient_accumulation_steps=steps)


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """The training images and their prompts."""

    TITLE = "images"
    resolution: int | None = cli.setting(
        None, type=cli.whole(8), metavar="PIXELS", help="side of the training images (default: the base model's own)"
    )
    crops: int = cli.setting(
        1, type=cli.whole(1), metavar="K", help="crops per image: the centre, and K - 1 seeded random ones"
    )
    random_crops: bool = cli.setting(
        False, help="a new crop each time an image is seen, encoded in the loop, instead of latents cached once"
    )
    no_flip: bool = cli.setting(False, help="do not mirror images", record=False)
    training_templates: str = cli.setting(
        "training",
        type=cli.path_or(*TEMPLATE_SETS),
        metavar="SET|FILE",
        help="class prompts, one drawn for each image and step: training (15 of ours), photo ('a photo of a {}' alone), "
        "textual_inversion (the 27 of that paper), views, or a file with one caption a line, {} for the class",
        result=False,  # compared by content
    )
    class_prompts_ratio: float = cli.setting(
        1.0,
        type=cli.number(0, 1),
        metavar="P",
        help="share of the images under a class prompt; the others are under their own captions, where the data set has "
        "any",
    )

    contexts: str | None = cli.setting(
        None,
        choices=(CAPTIONS,),
        help="captions: each class prompt is followed by what the image's own caption says besides its class, so that "
        "backgrounds are not learned as part of classes (default: class prompts alone)",
        absent=None,
    )
    unlabelled: Path | str | None = cli.setting_of(Pool, "unlabelled")
    unlabelled_share: float | None = cli.setting(
        None,
        type=cli.number(0, 1),
        metavar="R",
        absent=None,
        help="share of each batch that is drawn from --unlabelled, in (0, 1), under captions that name the super-class or "
        f"nothing: the LoRA learns from it, class tokens do not (default: {UNLABELLED_SHARE} with --unlabelled)",
    )

    def __post_init__(self):
        if self.contexts and self.class_prompts_ratio != 1:
            raise UserError(
                f"--contexts {self.contexts} with --class_prompts_ratio {self.class_prompts_ratio:g}: captions either follow "
                "the class prompts or stand instead of some; give one of them"
            )
        if self.unlabelled_share is not None and not 0 < self.unlabelled_share < 1:
            raise UserError(f"--unlabelled_share {self.unlabelled_share:g}: expected a number in (0, 1)")
        if self.unlabelled_share is not None and self.unlabelled is None:
            raise UserError(f"--unlabelled_share {self.unlabelled_share:g} goes with --unlabelled PATH")
        if self.random_crops and self.crops != 1:
            raise UserError(
                f"--random_crops with --crops {self.crops}: crops are either drawn each time or cached; give one"
            )

    @property
    def uses_captions(self) -> bool:
        """Whether captions of single images are in any prompt."""
        return self.contexts is not None or self.class_prompts_ratio < 1

    @property
    def templates(self) -> tuple[str, ...]:
        """The class prompts, ``{}`` for the class."""
        word = self.training_templates
        return read_templates(word if word in TEMPLATE_SETS else str(resolve_path(word)), "--training_templates")


@dataclass(frozen=True, kw_only=True)
class OutputSettings:
    """Checkpoints and reports, all of which a resumed run may change."""

    TITLE = "checkpoints and reports"
    output_dir: Path | None = cli.setting(
        None,
        type=cli.path,
        help="folder of the results (default: outputs/finetune_model/finetune_{strategy}{setting}/{dataset})",
        result=False,
    )
    checkpointing_steps: int = cli.setting(
        1000, type=cli.whole(0), help="steps between checkpoints; 0: none", result=False
    )
    checkpoints_total_limit: int = cli.setting(2, type=cli.whole(1), help="checkpoints that are kept", result=False)
    resume_from_checkpoint: str | None = cli.setting(
        None, metavar="latest|PATH", help="continue from a checkpoint", result=False
    )
    validation_steps: int = cli.setting(
        1000, type=cli.whole(0), help="steps between picture grids; 0: none", result=False
    )
    num_validation_images: int = cli.setting(4, type=cli.whole(0), help="pictures per class in a grid", result=False)
    logging_steps: int = cli.setting(50, type=cli.whole(1), help="steps between rows of metrics.csv", result=False)
    report_to: str = cli.setting(
        "tensorboard", choices=("none", *TRACKERS), help="where metrics and picture grids also go", result=False
    )
    register_key: str | None = cli.setting(
        None,
        type=new_key,
        metavar="KEY",
        help="write the result into finetuned_ckpts.yaml under this key",
        result=False,
        record=False,
    )


GROUPS = {"model": ModelSettings, "train": TrainSettings, "images": ImageSettings, "output": OutputSettings}
RECORDED_AS = {"pretrained_model_name_or_path": "base_name", "finetune_strategy": "strategy"}


@dataclass(frozen=True)
class FinetuneConfig:
    """A request of stage 1; :func:`semantic_aug.finetune.run.resolve` derives the settings without a flag, and ``base_folder``,
    the base model's folder on this machine."""

    dataset: str
    setting: Setting
    run: cli.StageSettings
    model: ModelSettings
    train: TrainSettings
    images: ImageSettings
    output: OutputSettings
    base_folder: Path | None = None

    def __post_init__(self):
        if self.images.unlabelled is not None and not self.model.trains_lora:
            raise UserError(
                f"--unlabelled with --finetune_strategy {self.model.finetune_strategy}, which trains no LoRA: nothing would "
                "learn from images without a class; give ti_db or db"
            )

    @property
    def seed(self) -> int:
        """Seed of everything drawn."""
        return self.run.seed

    @property
    def output_dir(self) -> Path:
        """Folder of the results."""
        return self.output.output_dir

    @property
    def class_balanced(self) -> bool:
        """Whether classes are drawn evenly instead of images, for the long tail."""
        return self.setting.task == "imbalanced"

    def effective_batch(self, processes: int) -> int:
        """Images of an optimiser step, over all micro-batches and processes."""
        return self.train.train_batch_size * self.train.gradient_accumulation_steps * processes

    def compiled(self, device_type: str) -> bool:
        """Whether the networks are compiled on a device of this type; ``auto``: on GPUs, where the run repays it."""
        if self.model.compile != "auto":
            return self.model.compile == "on"
        return device_type == "cuda" and self.train.max_train_steps >= COMPILE_STEPS

    def record(self, processes: int = 1) -> dict:
        """The content of ``args.yaml`` for a run on so many processes."""
        values = {n: getattr(getattr(self, group), n) for group, cls in GROUPS.items() for n in cli.settings_of(cls)}
        settings = cli.recorded(values, *GROUPS.values())
        return {
            "dataset": self.dataset,
            "setting": self.setting.record(),
            "recipe": self.run.recipe,
            **{RECORDED_AS.get(name, name): value for name, value in settings.items()},
            "random_flip": not self.images.no_flip,
            "class_balanced": self.class_balanced,
            "seed": self.seed,
            "effective_batch": self.effective_batch(processes),
        }

    def may_change(self) -> tuple[str, ...]:
        """Entries of the record that a resumed run may change, since they change nothing that a step computes."""
        fields = [field for cls in GROUPS.values() for field in cli.settings_of(cls).values()]
        free = {RECORDED_AS.get(field.name, field.name) for field in fields if not field.metadata["result"]}
        free -= {"effective_batch"}  # the record holds the resulting batch
        unused = [field.name for field in fields if field.metadata["unused"] and field.metadata["unused"](self)]
        return ("dataset", "unlabelled", "recipe", *free, *unused)  # images are compared by content


def build_parser() -> cli.Parser:
    """All flags of this stage."""
    parser = cli.Parser(
        "train_lora",
        prog="train_lora.py",
        description="Stage 1: teaches a pre-trained Stable Diffusion the classes of a labelled image set (class tokens and "
        "U-Net LoRA).",
    )
    add_shared(parser)
    for cls in GROUPS.values():
        cli.add_settings(parser, cls)
    return parser


def parse(argv: Sequence[str] | None = None) -> FinetuneConfig:
    """The request that a command line makes. Raises UserError: flags that do not exist, cannot be read, or exclude each
    other."""
    args = build_parser().parse_args(argv)
    groups = {"setting": Setting, "run": cli.StageSettings, **GROUPS}
    settings = {name: cli.read_settings(cls, args) for name, cls in groups.items()}
    return FinetuneConfig(cli.read_settings(DatasetName, args).dataset, **settings)
