#!/usr/bin/env python
"""Trains a small Stable Diffusion on unlabelled images and writes it in diffusers layout with a model card.

    python scripts/build_base.py --images PATH --subject leaf --output_dir my-base      # the same command resumes it
    python scripts/build_base.py --images dataset:elpv --preset elpv --output_dir base  # the embedded model's recipe

No label is read: captions come from measurements of the pixels and from the names of clusters. Stages: autoencoder,
denoiser (U-Net and text encoder), export. A training that was stopped or killed resumes where it was; a finished stage
is not repeated.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import fields, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from base_model.recipe import AUTOENCODER_SHARE, NOT_STATED, PRESETS, STAGES, Config, Recipe  # noqa: E402

from semantic_aug import cli, console  # noqa: E402
from semantic_aug.errors import run_main  # noqa: E402


def build_parser() -> cli.Parser:
    """The parser: flags of the run, and one flag for each field of the recipe."""
    parser = cli.Parser(prog="build_base.py", description=__doc__.split("\n")[0])
    run = parser.add_argument_group("run")
    run.add_argument(
        "--images",
        required=True,
        metavar="PATH",
        help="folder of images (folders below it included), text file with a path a line, or dataset:NAME for the "
        "training images of a data set, whose validation images are then kept out",
    )
    run.add_argument(
        "--exclude",
        nargs="+",
        default=[],
        metavar="PATH",
        help="folders or lists, a test split for example: the training is refused if --images holds one of their files "
        "(default: none)",
    )
    run.add_argument("--output_dir", type=cli.path, required=True, metavar="DIR", help="folder of the finished model")
    run.add_argument(
        "--work_dir", type=cli.path, metavar="DIR", help="folder of states and logs (default: OUTPUT_DIR-training)"
    )
    run.add_argument(
        "--budget",
        type=cli.number(0, open_low=True),
        metavar="MINUTES",
        help=f"most minutes of training, restarts included, {AUTOENCODER_SHARE:.0%} of them for the autoencoder; a stage "
        "ends at its number of images if that comes first (default: no limit)".replace("%", "%%"),
    )
    run.add_argument("--until", choices=STAGES, default="export", help="last stage to run")
    run.add_argument(
        "--export_only", action="store_true", help="write the model as trained by now; a training under way continues"
    )
    run.add_argument("--compile", action="store_true", help="compile the networks: minutes to begin with, faster steps")
    run.add_argument("--device", choices=("cuda", "cpu"), help="where to train (default: cuda where there is a GPU)")
    run.add_argument("--data_source", default=NOT_STATED, metavar="TEXT", help="origin of the images, for the card")
    run.add_argument("--data_license", default=NOT_STATED, metavar="TEXT", help="licence of the images, for the card")
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--preset", choices=sorted(PRESETS), default="general", help="values of the flags below")
    for f in fields(Recipe):
        options = {"nargs": "*", "metavar": "N"} if isinstance(f.default, tuple) else {}
        kind = str if f.name == "vocabulary" else int if isinstance(f.default, tuple) else type(f.default)
        shown = " ".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
        text = f"{f.metadata['help']} (default: that of the preset, {shown or 'none'} for general)"
        recipe.add_argument(f"--{f.name}", type=kind, choices=f.metadata["choices"], help=text, **options)
    return parser


def parse(argv: list[str] | None = None) -> Config:
    """Command-line arguments as a checked configuration.

    Raises:
        UserError: an unknown flag, or settings that do not fit together.
    """
    args = build_parser().parse_args(argv)
    given = {f.name: getattr(args, f.name) for f in fields(Recipe) if getattr(args, f.name) is not None}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    recipe = replace(PRESETS[args.preset], **given)
    recipe.check()
    work_dir = args.work_dir or args.output_dir.with_name(f"{args.output_dir.name}-training")
    return Config(
        images=args.images,
        exclude=tuple(args.exclude),
        recipe=recipe,
        output_dir=args.output_dir,
        work_dir=work_dir,
        minutes=args.budget,
        until=args.until,
        export_only=args.export_only,
        compile=args.compile,
        device=args.device,
        data_source=args.data_source,
        data_license=args.data_license,
        preset=args.preset,
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the stages that are not finished yet."""
    config = parse(argv)
    console.set_up_logging()
    console.quiet_libraries()
    logging.getLogger("base_model").setLevel(logging.INFO)
    from base_model.build import build  # after the flags are checked: it loads torch

    build(config)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
