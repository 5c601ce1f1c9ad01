#!/usr/bin/env python
"""Stage 3: trains a classifier on real and synthetic images with soft labels (1 - s^gamma) source + s^gamma target."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from semantic_aug import cli, console, registry, run_dir
from semantic_aug.errors import UserError, run_main

CRITERIA = ("ce", "ls")
OPTIMIZERS = ("sgd", "adamw")
DEFAULT_LR = {"sgd": 0.02, "adamw": 1e-3}


def build_parser() -> cli.Parser:
    """All flags of this stage."""
    parser = cli.Parser(prog="train_cls.py", description=__doc__)
    cli.add_shared(parser, seed=2020)
    syn = parser.add_argument_group("synthetic data")
    syn.add_argument(
        "--syndata_key",
        nargs="+",
        type=cli.optional_word,
        default=None,
        metavar="KEY",
        help="subsets of the data set's section in synthetic_datasets.yaml; None: the real-only baseline",
    )
    syn.add_argument(
        "--syndata_dir", nargs="+", default=None, metavar="DIR", help="folders of subsets, besides or instead of keys"
    )
    syn.add_argument(
        "--gamma",
        type=cli.number(0, open_low=True),
        default=0.5,
        metavar="G",
        help="soft labels are (1 - s^G) source + s^G target; above 0",
    )
    syn.add_argument(
        "--synthetic_prob",
        type=cli.number(0, 1),
        default=0.1,
        metavar="P",
        help="chance that a training item is synthetic, in [0, 1]",
    )
    syn.add_argument(
        "--allow_other_sources",
        action="store_true",
        help="accept subsets whose source images are not among the training images of this setting",
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", default="resnet50", metavar="NAME", help="any timm model; torchvision's names are understood"
    )
    model.add_argument(
        "--weights",
        default="auto",
        metavar="auto|none|PATH",
        help="pre-trained weights: auto (an installed package, else the hub), none, or a file or folder",
    )
    model.add_argument(
        "--res_mode",
        type=cli.whole(16),
        default=224,
        metavar="PIXELS",
        help="side of the images: 128, 224, 384, 448, ...; they are resized to 8/7 of it, then cropped",
    )
    train = parser.add_argument_group("training")
    train.add_argument("--nepoch", type=cli.whole(1), default=120, metavar="N", help="epochs over the real images")
    train.add_argument("--batch_size", type=cli.whole(1), default=32, metavar="N", help="images per step")
    train.add_argument(
        "--optimizer", choices=OPTIMIZERS, default="sgd", help="SGD with Nesterov momentum 0.9, or AdamW"
    )
    train.add_argument(
        "--lr",
        type=cli.number(0, open_low=True),
        default=None,
        metavar="LR",
        help="peak learning rate (default: learning_rates.yaml by data set, model and resolution; else 0.02 for sgd, "
        "0.001 for adamw)",
    )
    train.add_argument(
        "--weight_decay", type=cli.number(0), default=5e-4, metavar="X", help="none on biases and normalisation"
    )
    train.add_argument(
        "--warmup_epochs",
        type=cli.number(0),
        default=5,
        metavar="N",
        help="linear warm-up, at most a tenth of the run; cosine decay follows",
    )
    train.add_argument(
        "--criterion", choices=CRITERIA, default="ce", help="ce: soft cross-entropy; ls: with smoothed labels"
    )
    train.add_argument("--smoothing", type=cli.number(0, 0.99), default=0.1, metavar="E", help="of --criterion ls")
    train.add_argument("--use_cutmix", action="store_true", help="CutMix over real and synthetic images")
    train.add_argument("--use_mixup", action="store_true", help="mixup; with CutMix, each batch takes one of them")
    train.add_argument(
        "--cutmix_alpha", type=cli.number(0, open_low=True), default=1.0, metavar="A", help="of the Beta distribution"
    )
    train.add_argument(
        "--mixup_alpha", type=cli.number(0, open_low=True), default=0.4, metavar="A", help="of the Beta distribution"
    )
    train.add_argument(
        "--mix_prob", type=cli.number(0, 1), default=1.0, metavar="P", help="share of batches that are mixed"
    )
    train.add_argument(
        "--amp", choices=("auto", "no", "fp16", "bf16"), default="auto", help="auto: bf16 on a GPU, no on the CPU"
    )
    train.add_argument(
        "--eval_every", type=cli.whole(1), default=1, metavar="N", help="epochs between evaluations on validation"
    )
    where = parser.add_argument_group("where")
    where.add_argument(
        "--gpu", default=None, metavar="N|cpu", help="GPU number, or cpu (default: GPU 0 where there is one)"
    )
    where.add_argument(
        "--output_dir",
        type=Path,
        default=None,
        metavar="DIR",
        help="(default: outputs/classification/{dataset}{setting}/{model}-{res}-{data}-seed{seed})",
    )
    return parser


def device_of(gpu: str | None) -> str:
    """The device ``--gpu`` names.

    Raises:
        UserError: not a number or ``cpu``, or a GPU that is not there.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpu is None:
        return "cuda:0" if count else "cpu"
    if gpu == "cpu":
        return "cpu"
    if not gpu.isdecimal():
        raise UserError(f"--gpu {gpu}: expected a GPU number or the word cpu")
    if int(gpu) >= count:
        have = f"GPUs 0 to {count - 1}" if count else "no GPU"
        raise UserError(
            f"--gpu {gpu}: this machine has {have}; give --gpu cpu" + (" or another number" if count else "")
        )
    return f"cuda:{gpu}"


def run_name(args: argparse.Namespace, keys: list[str]) -> str:
    """The default name of a run's folder, from what tells runs apart."""
    parts = [args.model, str(args.res_mode)]
    if keys:
        parts += ["+".join(keys), f"g{args.gamma:g}", f"p{args.synthetic_prob:g}"]
    else:
        parts.append("real")
    parts += [name for name in ("cutmix", "mixup") if getattr(args, f"use_{name}")]
    parts += [args.criterion] if args.criterion != "ce" else []
    return "-".join([*parts, f"seed{args.seed}"]).replace("/", "_")


def resolve(args: argparse.Namespace):
    """Checks the arguments and derives what was left unset; returns the request, the data set and the synthetic images."""
    from semantic_aug.classify.config import ClassifyConfig
    from semantic_aug.classify.mixing import MixSettings
    from semantic_aug.classify.models import timm_name
    from semantic_aug.datasets import load_dataset
    from semantic_aug.datasets.synthetic import read_subsets

    timm_name(args.model)
    device = device_of(args.gpu)
    dataset = load_dataset(args.dataset, cli.setting_of(args), args.config_dir)
    keys = [key for key in args.syndata_key or [] if key]
    folders = [folder for key in keys for folder in registry.subsets(dataset.name, key, args.config_dir)]
    folders += args.syndata_dir or []
    synthetic = read_subsets(folders, dataset, args.allow_other_sources) if folders else None
    lr, source = args.lr, "--lr"
    if lr is None:
        lr, source = registry.learning_rate(dataset.name, args.model, args.res_mode, args.config_dir)
    if lr is None or (args.lr is None and args.optimizer == "adamw"):
        lr, source = DEFAULT_LR[args.optimizer], f"default of {args.optimizer}"
    names = keys + [Path(folder).name for folder in args.syndata_dir or []]
    output_dir = args.output_dir or Path(
        "outputs/classification"
    ) / f"{dataset.name}{dataset.setting.suffix}" / run_name(args, names)
    config = ClassifyConfig(
        dataset=args.dataset,
        setting=dataset.setting,
        syndata=tuple(map(str, folders)),
        gamma=args.gamma,
        synthetic_prob=args.synthetic_prob if folders else 0.0,
        model=args.model,
        weights=args.weights,
        resolution=args.res_mode,
        nepoch=args.nepoch,
        batch_size=args.batch_size,
        optimizer=args.optimizer,
        lr=lr,
        lr_source=source,
        weight_decay=args.weight_decay,
        warmup_epochs=min(args.warmup_epochs, args.nepoch / 10),
        criterion=args.criterion,
        smoothing=args.smoothing if args.criterion == "ls" else 0.0,
        mixing=MixSettings(
            args.mixup_alpha if args.use_mixup else 0.0, args.cutmix_alpha if args.use_cutmix else 0.0, args.mix_prob
        ),
        amp=args.amp if args.amp != "auto" else ("no" if device == "cpu" else "bf16"),
        device=device,
        eval_every=args.eval_every,
        seed=args.seed,
        output_dir=registry.resolve_path(output_dir),
    )
    return config, dataset, synthetic


def main(argv: list[str] | None = None) -> int:
    """Parses, resolves, prints, saves, and trains."""
    args = build_parser().parse_args(argv)
    console.set_up_logging()
    config, dataset, synthetic = resolve(args)
    print(dataset.describe())
    print(
        f"synthetic: {len(synthetic)} images of {', '.join(config.syndata)}"
        if synthetic
        else "synthetic: none (real only)"
    )
    print(run_dir.arguments_text(config.record()), end="")
    if args.dry_run:
        return 0
    from semantic_aug.classify import trainer

    results = trainer.run(config, dataset, synthetic)
    for split in ("val", "test"):
        if results[split]:
            scores = ", ".join(f"{name} {100 * results[split][name]:.2f} %" for name in ("top1", "top5", "macro"))
            print(f"{split}: {scores}" + (f" (best epoch {results['epoch']})" if split == "val" else ""))
    print(f"results: {registry.shown_path(config.output_dir)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
