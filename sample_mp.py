#!/usr/bin/env python
"""Stage 2: translates real images between classes into a synthetic subset, with one process per GPU entry."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from semantic_aug import allocator, console
from semantic_aug.classify.config import check_run
from semantic_aug.errors import no_downloads, run_main
from semantic_aug.sampling.settings import build_parser


def resolve(args: argparse.Namespace):
    """The request of parsed arguments, with everything unset derived, and the loaded data set."""
    from semantic_aug.sampling import config  # it imports torch, for which --help does not wait

    return config.resolve(args, load_classifier)


def load_classifier(folder: Path, device: str):
    """The classifier of a finished run of stage 3, which stage 2 itself does not know."""
    from semantic_aug.classify.inference import load_run

    return load_run(folder, device)


def main(argv: list[str] | None = None) -> int:
    """Parses, resolves, prints, and makes the subset."""
    args = build_parser().parse_args(argv)
    if args.classifier:
        check_run(args.classifier)
    console.set_up_logging()
    console.quiet_libraries()
    allocator.let_waiting_threads_sleep()
    with no_downloads(args.dry_run):
        config, dataset = resolve(args)
    from semantic_aug.sampling.run import run

    run(config, dataset)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
