#!/usr/bin/env python
"""Stage 3: trains a classifier on real and synthetic images with soft labels (1 - s^gamma) source + s^gamma target."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from semantic_aug import allocator, cli, console, registry, runs
from semantic_aug.datasets.settings import Setting, add_shared
from semantic_aug.devices import device_of
from semantic_aug.errors import no_downloads, run_main

CRITERIA = ("ce", "ls", "focal", "ldam", "bsm", "cb")
SYNTHETIC_MODES = ("item", "ratio", "concat")
CACHES = ("auto", "ram", "disk", "off")
SELECT_BY = ("top1", "macro", "worst_group")
OPTIMIZERS = ("sgd", "adamw")


def build_parser() -> cli.Parser:
    """All flags of this stage."""
    parser = cli.Parser(prog="train_cls.py", description=__doc__)
    add_shared(parser, seed=2020, label_noise=True)
    _add_synthetic(parser)
    _add_model(parser)
    _add_training(parser)
    _add_loss(parser)
    _add_evaluation(parser)
    _add_where(parser)
    return parser


def _add_synthetic(parser: cli.Parser) -> None:
    syn = parser.add_argument_group("synthetic data")
    syn.add_argument(
        "--syndata_key",
        nargs="+",
        type=cli.optional_word,
        default=None,
        metavar="KEY",
        help="subsets of the data set's section in synthetic_datasets.yaml (KEY#VARIANT for a filtered one); None: the "
        "real-only baseline",
    )
    syn.add_argument(
        "--syndata_dir",
        nargs="+",
        type=cli.path_or(),
        default=None,
        metavar="DIR",
        help="folders of subsets (DIR#VARIANT for a filtered one), besides or instead of keys",
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
        help="chance that a training item is synthetic (ratio: share of every batch; not used by concat), in [0, 1]",
    )
    syn.add_argument(
        "--synthetic_mode",
        choices=SYNTHETIC_MODES,
        default="item",
        help="item: each item with chance p; ratio: a fixed share p of every batch; concat: real and synthetic images "
        "alike, once an epoch",
    )
    syn.add_argument(
        "--synthetic_balanced",
        action="store_true",
        help="draw a target class first, all equally often, then one of its synthetic images",
    )
    syn.add_argument(
        "--target_class_num",
        type=cli.whole(0),
        default=0,
        metavar="N",
        help="use only N target classes of each source class, drawn with --subset_seed; 0: all",
    )
    text = "use only N synthetic images, even over target classes, drawn with --subset_seed (default: all)"
    syn.add_argument("--syndata_max", type=cli.whole(1), default=None, metavar="N", help=text)
    syn.add_argument(
        "--allow_other_sources",
        action="store_true",
        help="accept subsets whose source images are not among the training images of this setting",
    )


def _add_model(parser: cli.Parser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", default="resnet50", metavar="NAME", help="any timm model; torchvision's names are understood"
    )
    model.add_argument(
        "--weights",
        type=cli.path_or("auto", "none"),
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
    model.add_argument(
        "--trainable_layers",
        default="all",
        metavar="PARTS",
        help="all, or parts joined by +, the rest being frozen: linear, stages4+linear, stages3+stages4+linear, ...",
    )


def _add_training(parser: cli.Parser) -> None:
    train = parser.add_argument_group("training")
    train.add_argument("--nepoch", type=cli.whole(1), default=120, metavar="N", help="epochs over the real images")
    train.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=None,
        metavar="N",
        help="run all of these instead of --seed, each in a folder of its own below the run's, and report mean and std",
    )
    train.add_argument(
        "--batch_size", type=cli.whole(1), default=32, metavar="N", help="images per step, over all processes"
    )
    train.add_argument(
        "--gradient_accumulation_steps",
        type=cli.whole(1),
        default=1,
        metavar="N",
        help="parts in which a step's images go through the model, to save memory",
    )
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
        "--amp", choices=("auto", "no", "fp16", "bf16"), default="auto", help="auto: bf16 on a GPU, no on the CPU"
    )
    train.add_argument(
        "--eval_every", type=cli.whole(1), default=1, metavar="N", help="epochs between evaluations on validation"
    )
    train.add_argument(
        "--ema_decay",
        type=cli.number(0, 0.9999999),
        default=0.0,
        metavar="D",
        help="per step, of a moving average of the weights that is evaluated and kept instead of them; 0: none",
    )
    train.add_argument("--compile", action="store_true", help="compile the training step (pays on a GPU)")
    train.add_argument(
        "--patience",
        type=cli.whole(0),
        default=0,
        metavar="N",
        help="stop after N evaluations on validation without a better score; 0: never",
    )
    train.add_argument("--select_by", choices=SELECT_BY, default="top1", help="validation score that chooses the epoch")
    train.add_argument(
        "--report_to", choices=("none", "tensorboard"), default="none", help="tracker, besides epochs.csv"
    )


def _add_loss(parser: cli.Parser) -> None:
    loss = parser.add_argument_group("loss and mixing")
    loss.add_argument(
        "--criterion",
        choices=CRITERIA,
        default="ce",
        help="over the soft labels. ce: cross-entropy; ls: with smoothed labels; focal; ldam: label-distribution-aware "
        "margin; bsm: balanced softmax; cb: cross-entropy, classes weighted by their effective number",
    )
    loss.add_argument("--smoothing", type=cli.number(0, 0.99), default=0.1, metavar="E", help="of --criterion ls")
    loss.add_argument("--focal_gamma", type=cli.number(0), default=2.0, metavar="G", help="of --criterion focal")
    loss.add_argument(
        "--cb_beta",
        type=cli.number(0, 0.9999999),
        default=0.9999,
        metavar="B",
        help="of the effective number of samples, for --criterion cb and --drw_epoch",
    )
    loss.add_argument(
        "--ldam_margin",
        type=cli.number(0, open_low=True),
        default=0.5,
        metavar="M",
        help="margin of the rarest class, of --criterion ldam",
    )
    loss.add_argument(
        "--ldam_scale",
        type=cli.number(0, open_low=True),
        default=1.0,
        metavar="S",
        help="factor on the logits, of --criterion ldam (the paper's 30 is for a cosine classifier)",
    )
    loss.add_argument(
        "--drw_epoch",
        type=cli.whole(-1),
        default=-1,
        metavar="N",
        help="deferred reweighting: classes are weighted by their effective number once N epochs are done; -1: never",
    )
    loss.add_argument("--use_cutmix", action="store_true", help="CutMix over real and synthetic images")
    loss.add_argument(
        "--use_mixup", action="store_true", help="mixup; of several kinds of mixing, each batch takes one"
    )
    loss.add_argument(
        "--use_cmo",
        action="store_true",
        help="CMO: boxes of images drawn in favour of rare classes are pasted into the batch, by --cutmix_alpha",
    )
    loss.add_argument(
        "--cutmix_alpha", type=cli.number(0, open_low=True), default=1.0, metavar="A", help="of the Beta distribution"
    )
    loss.add_argument(
        "--mixup_alpha", type=cli.number(0, open_low=True), default=0.4, metavar="A", help="of the Beta distribution"
    )
    loss.add_argument(
        "--mix_prob", type=cli.number(0, 1), default=1.0, metavar="P", help="share of batches that are mixed"
    )


def _add_evaluation(parser: cli.Parser) -> None:
    only = parser.add_argument_group("instead of training")
    only.add_argument(
        "--eval_only",
        action="store_true",
        help="evaluate the run in --output_dir (or the classifier of --weights PATH) on validation and test",
    )
    only.add_argument(
        "--predict",
        nargs="+",
        type=cli.path,
        default=None,
        metavar="PATH",
        help="classify images, or every image below folders, with that classifier; writes predictions.csv, in which the row "
        "of an image that cannot be read is empty (exit status 2)",
    )


def _add_where(parser: cli.Parser) -> None:
    where = parser.add_argument_group("where")
    where.add_argument(
        "--gpu",
        default=None,
        metavar="N|cpu",
        help="GPU number, or cpu (default: GPU 0 where there is one; under accelerate launch each process has its own)",
    )
    where.add_argument(
        "--cache",
        choices=CACHES,
        default="auto",
        help="where decoded and resized images are kept: in memory, in outputs/cache (shared by runs; DIFFMIX_CACHE names "
        "another folder, DIFFMIX_CACHE_GB its bound), or nowhere; auto: by size",
    )
    where.add_argument(
        "--output_dir",
        type=cli.path,
        default=None,
        metavar="DIR",
        help="(default: outputs/classification/{dataset}{setting}/{model}-{res}-{data}-seed{seed}; with --seeds without the "
        "last part)",
    )


def resolve(args: argparse.Namespace):
    """Checks the arguments and derives what was left unset; returns the request, the data set and the synthetic images."""
    from semantic_aug.classify import request
    from semantic_aug.classify.config import ClassifyConfig
    from semantic_aug.classify.draws import DrawSettings
    from semantic_aug.classify.losses import LossSettings
    from semantic_aug.classify.mixing import MixSettings
    from semantic_aug.classify.models import timm_name
    from semantic_aug.datasets import load_dataset

    timm_name(args.model)
    device = device_of(args.gpu)
    dataset = load_dataset(args.dataset, cli.read_settings(Setting, args), args.config_dir)
    keys = [key for key in args.syndata_key or [] if key]
    folders = [folder for key in keys for folder in dataset.subsets(key, args.config_dir)]
    folders += args.syndata_dir or []
    synthetic = request.load_synthetic(
        folders, dataset, args.allow_other_sources, args.target_class_num, args.syndata_max
    )
    lr, source = request.learning_rate_of(args, dataset)
    config = ClassifyConfig(
        dataset=args.dataset,
        setting=dataset.setting,
        syndata=tuple(map(str, folders)),
        gamma=args.gamma,
        target_class_num=args.target_class_num,
        syndata_max=args.syndata_max,
        draws=DrawSettings(args.synthetic_mode, args.synthetic_prob, args.synthetic_balanced)
        if folders
        else DrawSettings(balanced=args.synthetic_balanced),
        model=args.model,
        weights=args.weights,
        trainable_layers=args.trainable_layers,
        resolution=args.res_mode,
        nepoch=args.nepoch,
        batch_size=args.batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        optimizer=args.optimizer,
        lr=lr,
        lr_source=source,
        weight_decay=args.weight_decay,
        warmup_epochs=min(args.warmup_epochs, args.nepoch / 10),
        loss=LossSettings(
            criterion=args.criterion,
            smoothing=args.smoothing if args.criterion == "ls" else 0.0,
            focal_gamma=args.focal_gamma,
            cb_beta=args.cb_beta,
            ldam_margin=args.ldam_margin,
            ldam_scale=args.ldam_scale,
            drw_epoch=args.drw_epoch,
        ),
        mixing=MixSettings(
            mixup_alpha=args.mixup_alpha if args.use_mixup else 0.0,
            cutmix_alpha=args.cutmix_alpha if args.use_cutmix else 0.0,
            cmo_alpha=args.cutmix_alpha if args.use_cmo else 0.0,
            probability=args.mix_prob,
        ),
        ema_decay=args.ema_decay,
        compile=args.compile,
        amp=args.amp if args.amp != "auto" else ("no" if device == "cpu" else "bf16"),
        device=device,
        eval_every=args.eval_every,
        select_by=args.select_by,
        patience=args.patience,
        report_to=args.report_to,
        cache=args.cache,
        seed=args.seed,
        output_dir=Path(),
    )
    request.check(config, dataset)
    names = keys + [Path(folder).name for folder in args.syndata_dir or []]
    folder = args.output_dir or request.default_folder(config, dataset, names)
    if args.output_dir is None and args.seeds is None:
        folder = folder.with_name(f"{folder.name}-seed{args.seed}")
    return replace(config, output_dir=registry.resolve_path(folder)), dataset, synthetic


def main(argv: list[str] | None = None) -> int:
    """Parses, resolves, prints, saves, and trains, evaluates or predicts."""
    args = build_parser().parse_args(argv)
    console.quiet_libraries()
    allocator.prepare_process()
    from semantic_aug.classify.processes import is_main, leave

    console.set_up_logging(is_main())
    say = print if is_main() else lambda *_, **__: None
    with no_downloads(args.dry_run):
        config, dataset, synthetic = resolve(args)
    say(dataset.describe())
    if args.eval_only or args.predict:
        return apply(config, dataset, args.predict, args.dry_run)
    say(
        f"synthetic: {len(synthetic)} images of {', '.join(config.syndata)}"
        if synthetic
        else "synthetic: none (real only)"
    )
    say(runs.arguments_text(config.record()), end="")
    if args.dry_run:
        from semantic_aug.classify import early, trainer

        early.check(config, dataset)
        if not args.seeds:
            trainer.check_folder(config, dataset, synthetic)
        return 0
    if args.seeds:
        from semantic_aug.classify import seeds

        say(seeds.table(seeds.run(config, list(dict.fromkeys(args.seeds)), dataset, synthetic)))
    else:
        from semantic_aug.classify import metrics, models, trainer

        results = trainer.run(config, dataset, synthetic)
        metrics.report(results, say)
        say("the classifier in plain timm:")
        say(
            models.timm_lines(
                config.model, len(dataset.class_names), config.resolution, config.output_dir / trainer.MODEL_FILE
            )
        )
    leave()
    say(f"results: {registry.shown_path(config.output_dir)}")
    return 0


def apply(config, dataset, places: list[Path] | None, dry_run: bool) -> int:
    """``--eval_only`` and ``--predict``: a trained classifier is used as it is."""
    from semantic_aug.classify import inference, metrics

    images = inference.images_to_predict(places) if places else {}
    classifier = inference.load(config, dataset)
    print(f"classifier: {registry.shown_path(classifier.path)}")
    if dry_run:
        return 0
    if not places:
        metrics.report(inference.evaluate_splits(classifier, config, dataset), print)
        print(f"results: {registry.shown_path(config.output_dir / inference.EVAL_FOLDER)}")
    else:
        inference.predict(classifier, images, config)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
