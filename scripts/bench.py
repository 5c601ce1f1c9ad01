#!/usr/bin/env python
"""Benchmarks: each stage against a faithful port of the original's way of doing it, side by side in one run.

    python scripts/bench.py [--output DIR] NAME [--help]

NAME: sampling, finetune, classify (the stages); gpu (all that is to be known of a card); kernels, plans, data, busy, inversion.

A table goes to the terminal, the same with every measured figure to ``{DIR}/{name}.json`` (default: outputs/bench).
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from semantic_aug.errors import UserError, run_main, unknown  # noqa: E402


def known() -> list[str]:
    """The benchmarks there are: modules of ``scripts/benchmarks`` with a ``main``."""
    folder = Path(__file__).parent / "benchmarks"
    others = ("common", "original_")
    return sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith(("_", *others)))


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark named first with the remaining arguments."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["--output"] and len(arguments) > 1:
        from benchmarks import common

        common.OUTPUT, arguments = Path(arguments[1]).resolve(), arguments[2:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    if arguments[0] not in known():
        raise unknown("benchmark", arguments[0], known(), "python scripts/bench.py NAME --help shows its flags")
    module = importlib.import_module(f"benchmarks.{arguments[0]}")
    if not hasattr(module, "main"):
        raise UserError(f"benchmark {arguments[0]} has no main")
    return module.main(arguments[1:])


if __name__ == "__main__":
    sys.exit(run_main(main))
