#!/usr/bin/env python
"""Stage 2: translates real images between classes into a synthetic subset, with one process per GPU entry."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from semantic_aug import allocator, cli, console, registry, runs
from semantic_aug.augmentations import strategies
from semantic_aug.datasets.settings import Setting, add_shared
from semantic_aug.devices import actors_of, processes_of
from semantic_aug.diffusion.schedulers import DEFAULT, FINAL_SIGMAS, SCHEDULERS, SolverSettings, scheduler_class
from semantic_aug.errors import UserError, no_downloads, run_main

SOLVER_DEFAULTS = {"num_inference_steps": 25, "guidance_scale": 7.5, "scheduler": DEFAULT}
LCM_DEFAULTS = {"num_inference_steps": 8, "guidance_scale": 1.0, "scheduler": "lcm"}


def build_parser() -> cli.Parser:
    """All flags of this stage."""
    parser = cli.Parser(prog="sample_mp.py", description=__doc__)
    add_shared(parser)
    _add_model_flags(parser)
    _add_solver_flags(parser)
    _add_run_flags(parser)
    return parser


def _add_model_flags(parser: cli.Parser) -> None:
    group = parser.add_argument_group("model and what to make")
    group.add_argument(
        "--finetune_model_key",
        type=cli.optional_word,
        default=None,
        metavar="KEY",
        help="checkpoint of the data set's section in finetuned_ckpts.yaml; not needed by real-* strategies",
    )
    group.add_argument(
        "--model_path",
        type=cli.model,
        default=None,
        metavar="MODEL",
        help="base model, a hub id or a folder (default: the checkpoint's, else Stable Diffusion 1.5)",
    )
    group.add_argument(
        "--sample_strategy",
        choices=strategies.names(),
        default="diff-mix",
        metavar="STRATEGY",
        help=f"one of {', '.join(strategies.names())}",
    )
    group.add_argument(
        "--aug_strength",
        type=cli.number(0, 1, open_low=True),
        default=0.7,
        metavar="S",
        help="how far an image is noised, in (0, 1]; from-noise strategies use 1",
    )
    group.add_argument(
        "--strength_strategy",
        choices=("fixed", "uniform"),
        default="fixed",
        help="fixed: --aug_strength; uniform: evenly from 0.3, 0.5, 0.7, 0.9",
    )
    group.add_argument(
        "--syn_dataset_multiplier",
        type=cli.number(0, 1e6, open_low=True),
        default=5,
        metavar="M",
        help="synthetic images per training image",
    )
    group.add_argument(
        "--resolution",
        type=cli.whole(8),
        default=None,
        metavar="PIXELS",
        help="side of the images (default: the base model's own)",
    )
    group.add_argument(
        "--prompt", default=None, metavar="TEMPLATE", help="with {} for the class (default: 'a photo of a {}')"
    )
    group.add_argument(
        "--prompt_templates",
        default=None,
        metavar="FILE|NAME",
        help="several prompts, of which each image draws one: a text file with one a line, or training or views",
    )
    group.add_argument(
        "--object_mask",
        choices=("object", "background"),
        default=None,
        help="change only this part of a source image, by the data set's boxes, and keep the rest (default: change all)",
    )
    group.add_argument(
        "--image_format",
        choices=("png", "webp", "jpg"),
        default="png",
        help="png and webp lose nothing; jpg (quality 95) is smaller and lossy",
    )


def _add_solver_flags(parser: cli.Parser) -> None:
    group = parser.add_argument_group("solver and speed")
    group.add_argument(
        "--num_inference_steps",
        type=cli.whole(1),
        default=None,
        metavar="N",
        help="steps of the whole schedule; strength s runs the last s*N (default: 25; with --lcm_lora 8)",
    )
    group.add_argument(
        "--guidance_scale",
        type=cli.number(0, 100),
        default=None,
        metavar="W",
        help="classifier-free guidance; 1 or less: none (default: 7.5; with --lcm_lora 1)",
    )
    group.add_argument(
        "--scheduler",
        default=None,
        metavar="NAME",
        help="dpmsolver++, unipc, ddim, euler, ... or a diffusers scheduler's class name (default: dpmsolver++; with "
        "--lcm_lora lcm)",
    )
    group.add_argument(
        "--final_sigmas_type",
        choices=FINAL_SIGMAS,
        default="zero",
        help="where the solver ends; sigma_min: as the original implementation did",
    )
    group.add_argument(
        "--lcm_lora", type=cli.path, default=None, metavar="FILE", help="an LCM-LoRA to merge too: a few steps then do"
    )
    group.add_argument(
        "--dtype",
        choices=("auto", "fp32", "fp16", "bf16"),
        default="auto",
        help="precision of the networks; auto: fp16 on a GPU, fp32 on the CPU",
    )
    group.add_argument(
        "--compile",
        choices=("auto", "on", "off"),
        default="auto",
        help="compile U-Net and decoder; auto: on GPUs where the subset is large enough to repay it",
    )


def _add_run_flags(parser: cli.Parser) -> None:
    group = parser.add_argument_group("where and how")
    group.add_argument(
        "--gpu_ids",
        nargs="+",
        default=None,
        metavar="ID",
        help="one process per entry: GPU numbers or the word cpu (default: every GPU once, else as many CPU "
        "processes as there are cores and as memory holds)",
    )
    group.add_argument(
        "--batch_size",
        type=lambda text: text if text == "auto" else cli.whole(1)(text),
        default="auto",
        metavar="N|auto",
        help="images per batch; part of the plan. auto: from the GPU's free memory, 16 on the CPU",
    )
    group.add_argument(
        "--engine",
        choices=("mp", "ray"),
        default="mp",
        help="mp: processes of this machine; ray: actors, --gpu_ids then says how many and on what",
    )
    group.add_argument(
        "--ray_address",
        default=None,
        metavar="ADDRESS",
        help="a running Ray cluster, 'auto' for the one running here (default: start one on this machine)",
    )
    group.add_argument("--cpu_threads", type=cli.whole(1), default=1, metavar="N", help="threads per CPU process")
    group.add_argument(
        "--output_root",
        type=cli.path,
        default=None,
        metavar="DIR",
        help="folder that gets {dataset}/{subset} (default: outputs/aug_samples with the setting's suffix)",
    )
    group.add_argument(
        "--register_key",
        default=None,
        metavar="KEY",
        help="write the subset into synthetic_datasets.yaml under this key",
    )
    group.add_argument("--num_shards", type=cli.whole(1), default=1, metavar="N", help="deal the batches to N runs")
    group.add_argument("--shard_index", type=cli.whole(0), default=0, metavar="I", help="which of them this is, from 0")
    group.add_argument("--merge", action="store_true", help="make nothing: join and check what shards made")
    group.add_argument(
        "--verify",
        choices=("size", "content"),
        default="size",
        help="how files that are there already are checked; content reads them all",
    )
    group.add_argument("--calibrate", action="store_true", help="with --dry_run: time a few batches")
    group.add_argument(
        "--worker_timeout",
        type=cli.number(1),
        default=None,
        metavar="SECONDS",
        help="seconds without a message, a step or processor time after which a process is replaced (default: 300; while it "
        "loads: 1800)",
    )


def solver_of(args: argparse.Namespace) -> SolverSettings:
    """The solver's settings: what the user gave, else what the rest implies."""
    defaults = LCM_DEFAULTS if args.lcm_lora else SOLVER_DEFAULTS
    chosen = {name: value if getattr(args, name) is None else getattr(args, name) for name, value in defaults.items()}
    return SolverSettings(**chosen, final_sigmas_type=args.final_sigmas_type)


def check(args: argparse.Namespace) -> None:
    """Refuses flags that contradict each other.

    Raises:
        UserError: names them.
    """
    if args.shard_index >= args.num_shards:
        raise UserError(f"--shard_index {args.shard_index}: expected a number below --num_shards {args.num_shards}")
    if args.merge and args.num_shards > 1:
        raise UserError("--merge joins all shards: give it without --num_shards and --shard_index")
    if args.ray_address and args.engine != "ray":
        raise UserError("--ray_address goes with --engine ray")
    if args.calibrate and not args.dry_run:
        raise UserError("--calibrate goes with --dry_run")
    if args.scheduler is not None and args.scheduler not in SCHEDULERS:
        scheduler_class(args.scheduler)
    if args.prompt is not None and args.prompt.count("{}") != 1:
        raise UserError(f"--prompt '{args.prompt}': expected exactly one {{}} where the class goes")
    if args.prompt is not None and args.prompt_templates is not None:
        raise UserError("--prompt is one prompt for all images, --prompt_templates several: give one of them")


def resolve(args: argparse.Namespace):
    """Checks the arguments and derives what was left unset; returns the request and the loaded data set."""
    from semantic_aug.augmentations.checks import check_files
    from semantic_aug.augmentations.request import ClassNames
    from semantic_aug.datasets import load_dataset
    from semantic_aug.diffusion.base import read_geometry
    from semantic_aug.prompts import SAMPLING_TEMPLATE, read_templates
    from semantic_aug.sampling import config as sampling

    check(args)
    strategy, solver = strategies.find(args.sample_strategy), solver_of(args)
    strengths, label = sampling.choose_strengths(
        strategy, args.aug_strength, args.strength_strategy, solver.num_inference_steps
    )
    if args.engine == "ray":
        places = actors_of(args.gpu_ids)
    else:
        places = processes_of(args.gpu_ids, args.cpu_threads)
    dataset = load_dataset(args.dataset, cli.read_settings(Setting, args), args.config_dir)
    section = dataset.section(registry.CHECKPOINTS, args.finetune_model_key or "", args.config_dir)
    files, key = sampling.choose_weights(strategy, section, args.finetune_model_key, args.model_path, args.config_dir)
    if args.lcm_lora:
        files = dataclasses.replace(files, extra_lora=registry.find_lora(args.lcm_lora))
    if args.object_mask:
        from semantic_aug.sampling import masks

        masks.check(args.object_mask, dataset.train, dataset.name, strategy.start)
    if args.gpu_ids is None and args.engine == "mp":
        places = sampling.fitting(places, files)
    templates = read_templates(args.prompt_templates) if args.prompt_templates else ()
    names = ClassNames(dataset.source_names, dataset.class_names, dataset.spec.super_class)
    check_files(files, names, templates or (args.prompt or SAMPLING_TEMPLATE,))
    geometry = read_geometry(files.folder)
    resolution = args.resolution or geometry.native_resolution
    geometry.check(resolution)
    root = args.output_root or Path(runs.aug_samples_dir(dataset.setting.suffix))
    config = sampling.SampleConfig(
        dataset=args.dataset,
        setting=dataset.setting,
        strategy=strategy,
        key=key,
        files=files,
        strengths=strengths,
        strength_label=label,
        multiplier=args.syn_dataset_multiplier,
        solver=solver,
        resolution=resolution,
        batch_size=0 if args.batch_size == "auto" else args.batch_size,
        dtype=args.dtype if args.dtype != "auto" else ("fp32" if places[0] == "cpu" else "fp16"),
        template=args.prompt or SAMPLING_TEMPLATE,
        seed=args.seed,
        output_root=registry.resolve_path(root),
        devices=tuple(places),
        cpu_threads=args.cpu_threads,
        num_shards=args.num_shards,
        shard_index=args.shard_index,
        config_dir=args.config_dir,
        worker_timeout=args.worker_timeout,
        image_format=args.image_format,
        compile=args.compile,
        engine=args.engine,
        ray_address=args.ray_address,
        templates=templates,
        object_mask=args.object_mask,
    )
    if args.register_key:
        entry = registry.shown_path(sampling.subset_folder(config, dataset))
        registry.check_key(registry.SUBSETS, dataset.name, args.register_key, entry, args.config_dir)
    return sampling.with_batch_size(config, dataset), dataset


def main(argv: list[str] | None = None) -> int:
    """Parses, resolves, prints, and makes the subset."""
    args = build_parser().parse_args(argv)
    console.set_up_logging()
    console.quiet_libraries()
    allocator.let_waiting_threads_sleep()
    with no_downloads(args.dry_run):
        config, dataset = resolve(args)
    from semantic_aug.sampling import config as sampling
    from semantic_aug.sampling import run as running

    print(dataset.describe())
    print(f"base model {config.files.name}, LoRA {config.files.lora}, tokens {config.files.tokens}")
    print(
        f"{len(config.devices)} process(es): {' '.join(config.devices)}; {config.dtype}, batches of {config.batch_size}"
    )
    from semantic_aug.sampling import early

    if args.dry_run:
        early.check(config, dataset)
        running.check_folder(config, dataset)
        print(sampling.describe_plan(config, dataset))
        if args.calibrate:
            print(running.calibrate(config, dataset))
        return 0
    early.check_disk(config, dataset)
    folder = (running.merge if args.merge else running.run)(config, dataset, args.verify)
    entry, key = registry.shown_path(folder), args.register_key or sampling.default_key(config)
    print(f"subset: {entry}\nto use it, add to {registry.shown_path(args.config_dir / registry.SUBSETS)}:")
    print(registry.to_yaml({dataset.name: {key: entry}}), end="")
    if args.register_key and registry.register(registry.SUBSETS, dataset.name, key, entry, args.config_dir):
        print(f"registered as {dataset.name}/{key}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
