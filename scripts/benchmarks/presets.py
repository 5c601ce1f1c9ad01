"""What the lossy presets of stage 2 cost and save, against simply taking fewer steps at equal time.

python scripts/bench.py presets --finetune_model_key K --classifier DIR   # a checkpoint, a classifier of real images

The same Diff-Mix plan and noise are sampled with each setting; images are compared with those of ``--speed exact``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import sample_mp
from benchmarks import common
from semantic_aug import cli, console, registry, runs
from semantic_aug.classify.inference import load_run
from semantic_aug.datasets import Setting, load_dataset
from semantic_aug.diffusion.schedulers import SPEEDS, SolverSettings
from semantic_aug.evaluation.quality.features import load_extractor
from semantic_aug.evaluation.quality.measures import ALL, Measurer
from semantic_aug.evaluation.quality.subset import open_subset
from semantic_aug.sampling.dispatch import STATUS_FILE

STEPS = SolverSettings().num_inference_steps
FIGURES = ("reference_kid", "target_top1", "kid", "source_distance")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(prog="bench.py presets", description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", default="elpv", help="whose training images are translated")
    parser.add_argument("--finetune_model_key", required=True, metavar="KEY", help="registered checkpoint")
    parser.add_argument("--config_dir", type=Path, default=registry.CONFIG_DIR, help="folder of the registry files")
    parser.add_argument("--classifier", required=True, metavar="DIR", help="train_cls.py run on real images: the judge")
    parser.add_argument("--images", type=cli.whole(1), default=480, help="images per setting")
    parser.add_argument("--strength", default="0.7", help="of the translation, in (0, 1]")
    parser.add_argument("--gpu_ids", nargs="+", default=["cpu", "cpu"], help="as of sample_mp.py")
    return parser.parse_args(argv)


def sample(args: argparse.Namespace, folder: Path, multiplier: float, *words: str) -> tuple[Path, float]:
    """Makes the subset under one setting; returns its folder and images/s, loading apart and saving included."""
    sample_mp.main(
        ["--dataset", args.dataset, "--finetune_model_key", args.finetune_model_key, "--config_dir", str(args.config_dir),
         "--sample_strategy", "diff-mix", "--aug_strength", args.strength, "--syn_dataset_multiplier", str(multiplier),
         "--output_root", str(folder), "--gpu_ids", *args.gpu_ids, *words]
    )  # fmt: skip
    made = next((folder / args.dataset).iterdir())
    return made, json.loads((made / STATUS_FILE).read_text())["images_per_second"]


def main(argv: list[str] | None = None) -> int:
    """Samples every setting, measures it, prints and writes the table."""
    args = parse(argv)
    console.set_up_logging()
    console.quiet_libraries()
    dataset = load_dataset(args.dataset, Setting(), args.config_dir)
    judge = load_run(registry.resolve_path(args.classifier))
    measurer = Measurer(dataset, load_extractor(), judge)
    real, threshold = measurer.real()
    multiplier, rates, figures = args.images / len(dataset.train), {}, {}
    with tempfile.TemporaryDirectory(prefix="presets-") as place:
        reference = None

        def run(name: str, *words: str) -> None:
            nonlocal reference
            folder, rates[name] = sample(args, Path(place) / name.replace(" ", "-"), multiplier, *words)
            subset = open_subset(name, [str(folder)], dataset)
            reference = measurer.reference(subset) if reference is None else reference
            rows = measurer.rows(measurer.look(subset, real, threshold), real, reference)
            figures[name] = next(r for r in rows if r["target_class"] == ALL)  # of the one strength

        run("exact")
        for speed in (name for name in SPEEDS if name != "exact"):
            run(speed, "--speed", speed)
            steps = max(2, round(STEPS * rates["exact"] / rates[speed]))  # the time of an image is that of its steps
            run(f"{steps} steps", "--num_inference_steps", str(steps))
    table = [
        [name, f"{rates[name]:.2f}", f"{rates[name] / rates['exact']:.2f}", *(f"{found[f]:.4f}" for f in FIGURES)]
        for name, found in figures.items()
    ]
    header = [
        "setting", "images/s", "ratio", "KID to exact", "target-class accuracy", "KID to real", "distance to source",
    ]  # fmt: skip
    common.publish("presets", header, table, {"arguments": runs.plain(vars(args)), "figures": figures, "rates": rates})
    return 0
