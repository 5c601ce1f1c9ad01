#!/usr/bin/env python
"""Stage 1: teaches a pre-trained Stable Diffusion the classes of a labelled image set (class tokens and U-Net LoRA).

Run it through accelerate: accelerate launch train_lora.py --dataset cub --finetune_strategy ti_db
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from semantic_aug import allocator, cli, console, registry, runs
from semantic_aug.datasets.settings import Setting, add_shared
from semantic_aug.errors import UserError, all_local, no_downloads, run_main

LR_SCHEDULERS = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "piecewise_constant",
)
STRATEGIES = ("ti", "db", "ti_db")
TRACKERS = ("tensorboard", "wandb", "comet_ml", "mlflow", "clearml", "aim", "dvclive", "swanlab", "trackio")
"""Of accelerate's; each is also the name of the package it needs."""


def build_parser() -> cli.Parser:
    """All flags of this stage."""
    parser = cli.Parser(prog="train_lora.py", description=__doc__.split("\n")[0])
    add_shared(parser)
    model = parser.add_argument_group("model")
    model.add_argument(
        "--pretrained_model_name_or_path",
        type=cli.model,
        default="stable-diffusion-v1-5/stable-diffusion-v1-5",
        metavar="MODEL",
        help="base model, a hub id or a folder in diffusers layout",
    )
    model.add_argument(
        "--finetune_strategy",
        choices=STRATEGIES,
        default="ti_db",
        help="ti: class tokens; db: U-Net LoRA under class names; ti_db: both",
    )
    model.add_argument("--rank", type=cli.whole(1), default=10, metavar="R", help="of the LoRA")
    model.add_argument(
        "--lora_alpha",
        type=cli.number(0, open_low=True),
        default=None,
        metavar="A",
        help="the LoRA's update is scaled by A / R (default: R)",
    )
    model.add_argument(
        "--lora_targets",
        nargs="+",
        default=["to_q", "to_k", "to_v", "to_out.0"],
        metavar="NAME",
        help="projections of the U-Net that get a LoRA",
    )
    model.add_argument(
        "--train_text_encoder_lora",
        action="store_true",
        help="a LoRA of the same rank on the text encoders' attention projections too (db and ti_db)",
    )
    model.add_argument(
        "--initializer",
        default="class_name",
        metavar="WORDS",
        help="what class tokens start from: class_name, super_class, or words of your own",
    )
    model.add_argument("--num_vectors", type=cli.whole(1), default=1, metavar="N", help="vectors per class token")
    model.add_argument("--gradient_checkpointing", action="store_true", help="less memory, more time")
    model.add_argument(
        "--mixed_precision",
        choices=("no", "fp16", "bf16"),
        default=None,
        help="precision of the frozen weights and of the arithmetic; what is trained stays fp32 (default: "
        "accelerate launch's, else no)",
    )
    model.add_argument(
        "--compile",
        choices=("auto", "on", "off"),
        default="auto",
        help="compile what trains; auto: on a GPU where the run is long enough to repay it",
    )
    train = parser.add_argument_group("training")
    train.add_argument("--max_train_steps", type=cli.whole(1), default=35000, metavar="N", help="optimiser steps")
    train.add_argument(
        "--train_batch_size", type=cli.whole(1), default=8, metavar="N", help="images per process and micro-batch"
    )
    train.add_argument(
        "--gradient_accumulation_steps", type=cli.whole(1), default=1, metavar="N", help="micro-batches per step"
    )
    train.add_argument("--learning_rate", type=cli.number(0), default=1e-4, metavar="LR", help="of the LoRA")
    train.add_argument("--ti_learning_rate", type=cli.number(0), default=5e-4, metavar="LR", help="of the class tokens")
    train.add_argument(
        "--scale_lr",
        action="store_true",
        help="multiply both learning rates by batch size, micro-batches and processes",
    )
    train.add_argument(
        "--lr_scheduler", choices=LR_SCHEDULERS, default="constant", help="schedule of both learning rates"
    )
    train.add_argument("--lr_warmup_steps", type=cli.whole(0), default=0, metavar="N", help="optimiser steps")
    train.add_argument(
        "--lr_num_cycles", type=cli.whole(1), default=1, metavar="N", help="restarts of cosine_with_restarts"
    )
    train.add_argument("--lr_power", type=cli.number(0), default=1.0, metavar="X", help="of polynomial")
    train.add_argument(
        "--lr_step_rules",
        default=None,
        metavar="RULES",
        help="of piecewise_constant: 1:1000,0.1:2000,0.01 is times 1 before step 1000, times 0.1 before 2000, then 0.01",
    )
    train.add_argument(
        "--prediction_type",
        choices=("epsilon", "v_prediction"),
        default=None,
        help="what the U-Net predicts (default: the base model's)",
    )
    train.add_argument(
        "--snr_gamma",
        type=cli.number(0, open_low=True),
        default=None,
        metavar="G",
        help="min-SNR loss weights, 5 in the paper (default: none)",
    )
    train.add_argument(
        "--noise_offset", type=cli.number(0), default=0.0, metavar="X", help="per-channel offset of the noise"
    )
    train.add_argument("--adam_weight_decay", type=cli.number(0), default=1e-2, metavar="X", help="of AdamW")
    train.add_argument("--use_8bit_adam", action="store_true", help="bitsandbytes' 8-bit AdamW")
    train.add_argument(
        "--max_grad_norm", type=cli.number(0), default=1.0, metavar="X", help="gradient clipping; 0: none"
    )
    images = parser.add_argument_group("images")
    images.add_argument(
        "--resolution",
        type=cli.whole(8),
        default=None,
        metavar="PIXELS",
        help="side of the training images (default: the base model's own)",
    )
    images.add_argument(
        "--crops",
        type=cli.whole(1),
        default=1,
        metavar="K",
        help="crops per image: the centre, and K - 1 seeded random ones",
    )
    images.add_argument(
        "--random_crops",
        action="store_true",
        help="a new crop each time an image is seen, encoded in the loop, instead of latents cached once",
    )
    images.add_argument("--no_flip", action="store_true", help="do not mirror images")
    images.add_argument(
        "--class_prompts_ratio",
        type=cli.number(0, 1),
        default=1.0,
        metavar="P",
        help="share of the images under a class prompt; the others are under their own captions, where the data set has any",
    )
    out = parser.add_argument_group("checkpoints and reports")
    out.add_argument(
        "--output_dir",
        type=cli.path,
        default=None,
        metavar="DIR",
        help="(default: outputs/finetune_model/finetune_{strategy}{setting}/{dataset})",
    )
    out.add_argument(
        "--checkpointing_steps", type=cli.whole(0), default=1000, metavar="N", help="steps between checkpoints; 0: none"
    )
    out.add_argument("--checkpoints_total_limit", type=cli.whole(1), default=2, metavar="N", help="how many are kept")
    out.add_argument("--resume_from_checkpoint", default=None, metavar="latest|PATH", help="go on from a checkpoint")
    out.add_argument(
        "--validation_steps", type=cli.whole(0), default=1000, metavar="N", help="steps between picture grids; 0: none"
    )
    out.add_argument(
        "--num_validation_images", type=cli.whole(0), default=4, metavar="N", help="pictures per class in a grid"
    )
    out.add_argument(
        "--logging_steps", type=cli.whole(1), default=50, metavar="N", help="steps between rows of metrics.csv"
    )
    out.add_argument(
        "--report_to",
        choices=("none", *TRACKERS),
        default="tensorboard",
        help="where metrics and picture grids also go",
    )
    out.add_argument(
        "--register_key", default=None, metavar="KEY", help="write the result into finetuned_ckpts.yaml under this key"
    )
    return parser


def resolve(args: argparse.Namespace):
    """Checks the arguments and derives what was left unset; returns the request and the loaded data set."""
    from semantic_aug.datasets import load_dataset
    from semantic_aug.diffusion.base import find_base, read_geometry
    from semantic_aug.diffusion.families import family_of
    from semantic_aug.finetune.captions import check_length
    from semantic_aug.finetune.config import FinetuneConfig, check_captions

    dataset, folder = all_local(
        lambda: load_dataset(args.dataset, cli.read_settings(Setting, args), args.config_dir),
        lambda: find_base(args.pretrained_model_name_or_path),
    )
    geometry = read_geometry(folder)
    resolution = args.resolution or geometry.native_resolution
    geometry.check(resolution)
    check_captions(dataset, args.class_prompts_ratio)
    vectors = args.num_vectors if args.finetune_strategy != "db" else None
    check_length(dataset, folder, args.pretrained_model_name_or_path, vectors, args.class_prompts_ratio)
    if args.train_text_encoder_lora and args.finetune_strategy == "ti":
        raise UserError("--train_text_encoder_lora with --finetune_strategy ti, which trains no LoRA: give db or ti_db")
    if args.random_crops and args.crops != 1:
        raise UserError(
            f"--random_crops with --crops {args.crops}: crops are either drawn each time or cached; give one"
        )
    if args.random_crops and family_of(folder, args.pretrained_model_name_or_path).sizes:
        raise UserError(
            "--random_crops with a Stable Diffusion XL model, which is told where each image was cropped: give --crops K"
        )
    output_dir = args.output_dir or runs.finetune_dir(args.finetune_strategy, dataset.name, dataset.setting.suffix)
    world = int(os.environ.get("WORLD_SIZE", 1))
    scale = args.train_batch_size * args.gradient_accumulation_steps * world if args.scale_lr else 1
    copied = [
        "max_train_steps",
        "train_batch_size",
        "gradient_accumulation_steps",
        "lr_scheduler",
        "lr_warmup_steps",
        "lr_num_cycles",
        "lr_power",
        "lr_step_rules",
        "rank",
        "lora_alpha",
        "train_text_encoder_lora",
        "class_prompts_ratio",
        "initializer",
        "num_vectors",
        "prediction_type",
        "snr_gamma",
        "noise_offset",
        "adam_weight_decay",
        "max_grad_norm",
        "use_8bit_adam",
        "gradient_checkpointing",
        "compile",
        "crops",
        "random_crops",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "resume_from_checkpoint",
        "validation_steps",
        "num_validation_images",
        "logging_steps",
        "report_to",
        "seed",
    ]
    config = FinetuneConfig(
        dataset=args.dataset,
        setting=dataset.setting,
        base_name=args.pretrained_model_name_or_path,
        base_folder=folder,
        strategy=args.finetune_strategy,
        output_dir=registry.resolve_path(output_dir),
        resolution=resolution,
        learning_rate=args.learning_rate * scale,
        ti_learning_rate=args.ti_learning_rate * scale,
        lora_targets=tuple(args.lora_targets),
        random_flip=not args.no_flip,
        class_balanced=args.task == "imbalanced",
        mixed_precision=args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
        **{name: getattr(args, name) for name in copied},
    )
    check_tracker(config.report_to)
    if args.register_key:
        entry = checkpoint_entry(config)
        registry.check_key(registry.CHECKPOINTS, dataset.name, args.register_key, entry, args.config_dir)
    return config, dataset


def check_tracker(name: str) -> None:
    """Raises UserError where a tracker's package is not installed, or cannot be imported."""
    try:
        if name != "none":
            importlib.import_module(name)
    except Exception as error:  # a package of another version can raise anything
        raise UserError(
            f"--report_to {name} needs the package {name} ({type(error).__name__}: {error}): pip install it, or give "
            "--report_to none"
        ) from None


def checkpoint_entry(config) -> dict[str, str | None]:
    """The registry entry of a finished run."""
    from semantic_aug.diffusion import lora, tokens

    return {
        "model_path": config.base_name,
        "lora_path": registry.shown_path(config.output_dir / lora.FILE_NAME) if config.trains_lora else None,
        "embed_path": registry.shown_path(config.output_dir / tokens.FILE_NAME) if config.trains_tokens else None,
    }


def main(argv: list[str] | None = None) -> int:
    """Parses, resolves, prints, saves, and trains."""
    args = build_parser().parse_args(argv)
    main_process = int(os.environ.get("RANK", 0)) == 0
    console.set_up_logging(main_process)
    console.quiet_libraries()
    allocator.prepare_process()
    with no_downloads(args.dry_run):
        config, dataset = resolve(args)
    if main_process:
        print(dataset.describe())
        print(runs.arguments_text(config.record(int(os.environ.get("WORLD_SIZE", 1)))), end="")
    if args.dry_run:
        from semantic_aug.finetune import early, folder

        early.check(config, dataset)
        folder.take_folder(
            config, folder.origin_of(config, dataset), int(os.environ.get("WORLD_SIZE", 1)), dry_run=True
        )
        return 0
    from semantic_aug.finetune import trainer

    trainer.run(config, dataset, trainer.make_accelerator(config))
    if not main_process:
        return 0
    entry = checkpoint_entry(config)
    suffix = config.setting.suffix.lstrip("_")
    key = args.register_key or f"{suffix}{'_' if suffix else ''}{config.strategy}_latest"
    print(f"to use it, add to {registry.shown_path(args.config_dir / registry.CHECKPOINTS)}:")
    print(registry.to_yaml({dataset.name: {key: entry}}), end="")
    if args.register_key and registry.register(registry.CHECKPOINTS, dataset.name, key, entry, args.config_dir):
        print(f"registered as {dataset.name}/{key}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
