#!/usr/bin/env python
"""Stage 2: translates real images between classes into a synthetic subset, with one process per GPU entry."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from semantic_aug import cli, console, registry, run_dir
from semantic_aug.augmentations import strategies
from semantic_aug.errors import UserError, run_main


def build_parser() -> cli.Parser:
    """All flags of this stage."""
    parser = cli.Parser(prog="sample_mp.py", description=__doc__)
    cli.add_shared(parser)
    model = parser.add_argument_group("model")
    model.add_argument(
        "--finetune_model_key",
        type=cli.optional_word,
        default=None,
        metavar="KEY",
        help="checkpoint of the data set's section in finetuned_ckpts.yaml; not needed by real-* strategies",
    )
    model.add_argument(
        "--model_path",
        default=None,
        metavar="MODEL",
        help="base model, a hub id or a folder (default: the checkpoint's, else Stable Diffusion 1.5)",
    )
    model.add_argument(
        "--dtype",
        choices=("auto", "fp32", "fp16", "bf16"),
        default="auto",
        help="precision of the networks; auto: fp16 on a GPU, fp32 on the CPU",
    )
    what = parser.add_argument_group("what to make")
    what.add_argument(
        "--sample_strategy",
        choices=strategies.names(),
        default="diff-mix",
        metavar="STRATEGY",
        help=f"one of {', '.join(strategies.names())}",
    )
    what.add_argument(
        "--aug_strength",
        type=float,
        default=0.7,
        metavar="S",
        help="how far an image is noised, in (0, 1]; from-noise strategies use 1",
    )
    what.add_argument(
        "--strength_strategy",
        choices=("fixed", "uniform"),
        default="fixed",
        help="fixed: --aug_strength; uniform: evenly from 0.3, 0.5, 0.7, 0.9",
    )
    what.add_argument(
        "--syn_dataset_multiplier",
        type=cli.number(0, 1e6, open_low=True),
        default=5,
        metavar="M",
        help="synthetic images per training image",
    )
    what.add_argument(
        "--resolution",
        type=cli.whole(8),
        default=None,
        metavar="PIXELS",
        help="side of the images (default: the base model's own)",
    )
    what.add_argument(
        "--prompt", default=None, metavar="TEMPLATE", help="prompt with {} for the class (default: 'a photo of a {}')"
    )
    solver = parser.add_argument_group("solver")
    solver.add_argument(
        "--num_inference_steps",
        type=cli.whole(1),
        default=25,
        metavar="N",
        help="steps of the whole schedule; strength s runs the last s*N",
    )
    solver.add_argument(
        "--guidance_scale",
        type=cli.number(0, 100),
        default=7.5,
        metavar="W",
        help="classifier-free guidance; 1 or less: none",
    )
    solver.add_argument(
        "--scheduler",
        default="dpmsolver++",
        metavar="NAME",
        help="dpmsolver++, unipc, ddim, euler, ... or a diffusers scheduler's class name",
    )
    solver.add_argument(
        "--final_sigmas_type",
        choices=("zero", "sigma_min"),
        default="zero",
        help="where the solver ends; sigma_min: as the original implementation did",
    )
    where = parser.add_argument_group("where and how")
    where.add_argument(
        "--gpu_ids",
        nargs="+",
        default=None,
        metavar="ID",
        help="one process per entry: GPU numbers or the word cpu (default: every GPU once, else all CPU cores)",
    )
    where.add_argument(
        "--batch_size", type=cli.whole(1), default=16, metavar="N", help="images per batch; part of the plan"
    )
    where.add_argument(
        "--cpu_threads", type=cli.whole(1), default=1, metavar="N", help="arithmetic threads per CPU process"
    )
    where.add_argument(
        "--output_root",
        type=Path,
        default=None,
        metavar="DIR",
        help="folder that gets {dataset}/{subset} (default: outputs/aug_samples with the setting's suffix)",
    )
    where.add_argument(
        "--register_key",
        default=None,
        metavar="KEY",
        help="write the subset into synthetic_datasets.yaml under this key",
    )
    where.add_argument(
        "--num_shards", type=cli.whole(1), default=1, metavar="N", help="deal the batches to N separate runs"
    )
    where.add_argument(
        "--shard_index", type=cli.whole(0), default=0, metavar="I", help="which of them this run is, from 0"
    )
    where.add_argument(
        "--worker_timeout",
        type=cli.number(1),
        default=None,
        metavar="SECONDS",
        help="silence after which a process is replaced (default: 20 times its slowest batch, at least 300)",
    )
    return parser


def resolve(args: argparse.Namespace):
    """Checks the arguments and derives what was left unset; returns the request and the loaded data set."""
    from semantic_aug.datasets import load_dataset
    from semantic_aug.diffusion.base import read_geometry
    from semantic_aug.diffusion.schedulers import SolverSettings
    from semantic_aug.prompts import SAMPLING_TEMPLATE
    from semantic_aug.sampling.launcher import devices_of
    from semantic_aug.sampling.run import SampleConfig, choose_strengths, choose_weights

    if args.shard_index >= args.num_shards:
        raise UserError(f"--shard_index {args.shard_index}: expected a number below --num_shards {args.num_shards}")
    template = args.prompt or SAMPLING_TEMPLATE
    if template.count("{}") != 1:
        raise UserError(f"--prompt '{template}': expected exactly one {{}} where the class goes")
    strategy = strategies.find(args.sample_strategy)
    strengths, label = choose_strengths(strategy, args.aug_strength, args.strength_strategy, args.num_inference_steps)
    devices = devices_of(args.gpu_ids, args.cpu_threads)
    dataset = load_dataset(args.dataset, cli.setting_of(args), args.config_dir)
    files, key = choose_weights(strategy, dataset.name, args.finetune_model_key, args.model_path, args.config_dir)
    geometry = read_geometry(files.folder)
    resolution = args.resolution or geometry.native_resolution
    geometry.check(resolution)
    dtype = args.dtype if args.dtype != "auto" else ("fp32" if devices[0] == "cpu" else "fp16")
    root = args.output_root or Path(run_dir.aug_samples_dir(dataset.setting.suffix))
    config = SampleConfig(
        dataset=args.dataset,
        setting=dataset.setting,
        strategy=strategy,
        key=key,
        files=files,
        strengths=strengths,
        strength_label=label,
        multiplier=args.syn_dataset_multiplier,
        solver=SolverSettings(args.num_inference_steps, args.guidance_scale, args.scheduler, args.final_sigmas_type),
        resolution=resolution,
        batch_size=args.batch_size,
        dtype=dtype,
        template=template,
        seed=args.seed,
        output_root=registry.resolve_path(root),
        devices=tuple(devices),
        cpu_threads=args.cpu_threads,
        num_shards=args.num_shards,
        shard_index=args.shard_index,
        config_dir=args.config_dir,
        worker_timeout=args.worker_timeout,
    )
    return config, dataset


def main(argv: list[str] | None = None) -> int:
    """Parses, resolves, prints, and makes the subset."""
    args = build_parser().parse_args(argv)
    console.set_up_logging()
    console.quiet_libraries()
    config, dataset = resolve(args)
    from semantic_aug.sampling import run as sampling

    folder = sampling.subset_folder(config, dataset)
    print(dataset.describe())
    print(f"base model {config.files.name}, LoRA {config.files.lora}, tokens {config.files.tokens}")
    print(
        f"{len(config.devices)} process(es) on {' '.join(config.devices)}, {config.dtype}, batches of {config.batch_size}"
    )
    if args.dry_run:
        print(sampling.describe_plan(config, dataset, sampling.plan_of(config, dataset), folder))
        return 0
    folder = sampling.run(config, dataset)
    shown = registry.shown_path(folder)
    key = (
        args.register_key
        or f"{config.setting.suffix.lstrip('_')}{'_' if config.setting.suffix else ''}"
        f"{config.strategy.name.replace('-', '')}_{config.strength_label}"
    )
    print(f"subset: {shown}\nto use it, add to {registry.shown_path(args.config_dir / registry.SUBSETS)}:")
    print(registry.to_yaml({dataset.name: {key: shown}}), end="")
    if args.register_key and registry.register(registry.SUBSETS, dataset.name, key, shown, args.config_dir):
        print(f"registered as {dataset.name}/{key}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
