#!/usr/bin/env python
"""Stage 3: trains a classifier on real and synthetic images with soft labels (1 - s^gamma) source + s^gamma target."""

from __future__ import annotations

import sys

from semantic_aug import allocator, cli, console
from semantic_aug.classify import config
from semantic_aug.errors import run_main


def build_parser() -> cli.Parser:
    """All flags of this stage, as :mod:`semantic_aug.classify.config` declares them."""
    return config.build_parser(__doc__)


def main(argv: list[str] | None = None) -> int:
    """Trains, evaluates or predicts, by the flags; returns the exit status."""
    request = config.read_config(build_parser().parse_args(argv))
    config.check_paths(request)
    console.quiet_libraries()
    allocator.prepare_process()
    from semantic_aug.classify.run import run

    return run(request)


if __name__ == "__main__":
    sys.exit(run_main(main))
