#!/usr/bin/env python
"""One Markdown table of finished train_cls.py runs, seeds grouped.

python scripts/summarize.py outputs/classification [more folders ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from semantic_aug import cli, files  # noqa: E402
from semantic_aug.errors import run_main  # noqa: E402


def build_parser() -> cli.Parser:
    """All flags."""
    parser = cli.Parser(prog="summarize.py", description=__doc__.split("\n")[0])
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="output folders of train_cls.py, or folders above them"
    )
    parser.add_argument("--output", type=cli.path, default=None, metavar="FILE", help="write the table here as well")
    parser.add_argument(
        "--scores", nargs="+", default=None, metavar="NAME", help="columns (default: all but top5 and loss)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Finds the runs and prints the table."""
    args = build_parser().parse_args(argv)
    from semantic_aug.classify.metrics import SCORE_NAMES
    from semantic_aug.errors import unknown
    from semantic_aug.evaluation.experiments import summary

    for name in args.scores or ():
        if name not in SCORE_NAMES:
            raise unknown("score of --scores", name, SCORE_NAMES, "choose among these")
    text = summary.markdown(summary.find_runs(args.folders), args.scores or summary.SHOWN)
    print(text)
    if args.output:
        files.write_text(args.output, text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
