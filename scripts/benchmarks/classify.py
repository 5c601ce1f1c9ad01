"""Stage 3 against a faithful port of the original's loop, in one run: training and evaluation, decoding included.

python scripts/bench.py classify                                             # EfficientNet-Lite0 at 128 px, CPU
python scripts/bench.py classify --model resnet50 --res_mode 448 --compile --epochs 8 --cache auto device   # a GPU
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import common, original_classify
from semantic_aug import allocator, cli, console, meta_csv
from semantic_aug.classify import trainer
from semantic_aug.classify.config import (
    CACHES,
    ClassifyConfig,
    ModelSettings,
    PlacementSettings,
    SyntheticSettings,
    TrainSettings,
)
from semantic_aug.classify.models import make_model
from semantic_aug.classify.run import with_derived
from semantic_aug.datasets import LoadedDataset, Setting, load_dataset
from semantic_aug.datasets.synthetic import read_subset

GFLOP = {("resnet50", 448): 97.0, ("vit_b_16", 384): 332.0}
"""GFLOP of one image forward and backward."""


def write_subset(folder: Path, dataset: LoadedDataset, count: int) -> Path:
    """A synthetic subset for timing: real training images saved again, with soft labels."""
    rng = np.random.default_rng(0)
    rows, names = [], dataset.source_names
    for number, row in enumerate(rng.integers(len(dataset.train), size=count).tolist()):
        source, target = int(dataset.train.labels[row]), int(rng.integers(len(names)))
        path = f"{dataset.folders[source]}/{number:06d}.png"
        (folder / "data" / path).parent.mkdir(parents=True, exist_ok=True)
        dataset.train.image(row).save(folder / "data" / path)
        rows.append((names[source], names[target], number, 0.7, path))
    meta_csv.write(folder / "meta.csv", rows, further=())
    return folder


def settings_of(args: argparse.Namespace, dataset: LoadedDataset, folder: Path) -> ClassifyConfig:
    """The request both sides train, as stage 3 resolves it."""
    training = TrainSettings(
        nepoch=args.epochs,
        batch_size=args.batch_size,
        lr=0.02,
        warmup_epochs=0,
        compile=args.compile,
        amp=args.amp,
    )
    config = ClassifyConfig(
        dataset=args.dataset,
        syndata=("bench",),
        synthetic=SyntheticSettings(synthetic_prob=args.synthetic_prob),
        classifier=ModelSettings(model=args.model, weights="none", res_mode=args.res_mode),
        training=training,
        placement=PlacementSettings(gpu="cpu" if args.device == "cpu" else "0", output_dir=folder),
    )
    return with_derived(config, dataset)


def time_original(config: ClassifyConfig, dataset: LoadedDataset, subset: Path, workers: int) -> float:
    """Images per second of the port."""
    device, classifier = torch.device(config.device), config.classifier
    began = time.perf_counter()
    model, normalisation = make_model(classifier.model, len(dataset.class_names), classifier.res_mode, "none")
    settings = argparse.Namespace(resolution=classifier.res_mode, **vars(config.training), **vars(config.synthetic))
    seen = original_classify.train(
        model,
        normalisation,
        dataset.train,
        dataset.val,
        subset=subset,
        settings=settings,
        device=device,
        workers=workers,
    )  # every step ends by reading its loss, so the device has finished
    return seen / (time.perf_counter() - began)


def time_ours(config: ClassifyConfig, dataset: LoadedDataset, subset: Path, cache: str) -> dict[str, Any]:
    """Images per second of stage 3 as it is: from nothing to results, in its fastest epoch, and in each."""
    torch.backends.cudnn.deterministic = False
    allocator.keep_freed_memory()  # as train_cls.py does; the port has run before
    synthetic = read_subset(subset, dataset)
    config = replace(config, placement=replace(config.placement, cache=cache, output_dir=config.output_dir / cache))
    config.output_dir.mkdir(parents=True)
    began = time.perf_counter()
    running = trainer.Trainer(config, dataset, synthetic)
    ready = time.perf_counter() - began
    running.run()
    seconds = time.perf_counter() - began
    lines = (config.output_dir / trainer.EPOCHS_FILE).read_text().splitlines()
    position = trainer.COLUMNS.index("images_per_second")
    rates = [float(line.split(",")[position]) for line in lines[1:]]
    seen = config.training.nepoch * running.steps_per_epoch * running.train_batches.batch_size
    rate = seen / seconds
    figures = {"images_per_second": rate, "steady": max(rates), "rates": rates, "seconds_to_first_step": ready}
    return {"cache": cache, **figures}


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = cli.PlainParser(prog="bench.py classify", description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", default="elpv", help="whose images are classified (default: elpv)")
    parser.add_argument("--model", default="tf_efficientnet_lite0", help="default: tf_efficientnet_lite0")
    parser.add_argument("--res_mode", type=cli.whole(1), default=128, help="side of the crops in pixels (default: 128)")
    parser.add_argument("--batch_size", type=cli.whole(1), default=32, help="images per step (default: 32)")
    parser.add_argument(
        "--epochs", type=cli.whole(1), default=5, help="each with an evaluation on validation (default: 5)"
    )
    parser.add_argument("--port_epochs", type=cli.whole(1), default=None, help="of the port (default: --epochs)")
    parser.add_argument(
        "--images",
        type=cli.whole(0),
        default=0,
        help="most real images of training and of validation; 0: all (default: 0)",
    )
    parser.add_argument("--synthetic", type=cli.whole(1), default=400, help="synthetic images (default: 400)")
    parser.add_argument(
        "--synthetic_prob", type=cli.number(0, 1), default=0.1, help="share of them in training (default: 0.1)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--amp", choices=("auto", "no", "fp16", "bf16"), default="auto", help="of ours (default: auto)")
    parser.add_argument("--compile", action="store_true", help="of ours")
    parser.add_argument(
        "--cache", nargs="+", choices=CACHES, default=["auto"], help="of ours, the best counts (default: auto)"
    )
    parser.add_argument(
        "--workers",
        type=cli.whole(1),
        nargs="+",
        default=None,
        help="loader workers of the port, the best counts (default: the cores, and the original's 4)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Times the port with each number of workers, and ours; prints and writes the table."""
    args = build_parser().parse_args(argv)
    console.set_up_logging()
    cores = common.machine()["cores"]
    workers = args.workers or sorted({min(cores, 16), 4})
    dataset = load_dataset(args.dataset, Setting())
    train, val = (common.first_images(table, args.images) for table in (dataset.train, dataset.val))
    dataset = replace(dataset, train=train, val=val, test=None)  # both evaluate on validation only
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        folder = Path(temporary)
        subset = write_subset(folder / "subset", dataset, args.synthetic)
        config = settings_of(args, dataset, folder)
        # libraries and kernels, for both alike
        warm = replace(config, training=replace(config.training, nepoch=1))
        small = replace(dataset, train=train.take(np.arange(min(len(train), args.batch_size))), val=None)
        time_original(warm, small, subset, 0)
        short = replace(config, training=replace(config.training, nepoch=args.port_epochs or args.epochs))
        port = {count: time_original(short, dataset, subset, count) for count in workers}
        ways = [time_ours(config, dataset, subset, cache) for cache in args.cache]
    best, ours = max(port.values()), max(ways, key=lambda way: way["images_per_second"])
    name = torch.cuda.get_device_name(0) if args.device == "cuda" else None
    work = GFLOP.get((args.model, args.res_mode))
    peak = lambda rate: common.share_of_peak(work and rate * work / 1000, name)  # noqa: E731
    rows = [
        [f"the original's way, {count} workers", f"{rate:.1f}", f"{rate / best:.2f}", peak(rate)]
        for count, rate in port.items()
    ]
    for way in ways:
        rate, steady = way["images_per_second"], way["steady"]
        rows.append([f"ours, --cache {way['cache']}, end to end", f"{rate:.1f}", f"{rate / best:.2f}", peak(rate)])
        rows.append(["training in its fastest epoch", f"{steady:.1f}", f"{steady / best:.2f}", peak(steady)])
    header = [f"{args.model}, {args.res_mode} px, batch {args.batch_size}, {args.epochs} epochs", "images/s", "ratio"]
    details = {
        "arguments": vars(args),
        "train_images": len(train),
        "original": {str(count): rate for count, rate in port.items()},
        "ours": ours,
        "ours_by_cache": {way["cache"]: way for way in ways},
        "ratio_to_best": ours["images_per_second"] / best,
    }
    common.publish("classify", [*header, "of peak"], rows, details)
    return 0
