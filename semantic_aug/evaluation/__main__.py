"""``python -m semantic_aug.evaluation COMMAND``: measures, pictures and comparisons of what the three stages make."""

from __future__ import annotations

import importlib
import sys

from semantic_aug.errors import run_main, unknown

COMMANDS = {
    "compare": "semantic_aug.evaluation.compare",
    "tune": "semantic_aug.evaluation.tune",
}
"""Command -> its module, imported only when it is chosen."""


def main(argv: list[str] | None = None) -> int:
    """Hands the words after the command to the command's module."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: python -m semantic_aug.evaluation {{{','.join(COMMANDS)}}} ...; COMMAND --help lists its flags")
        return 0
    if words[0] not in COMMANDS:
        raise unknown("command", words[0], COMMANDS, "python -m semantic_aug.evaluation COMMAND --help lists its flags")
    return importlib.import_module(COMMANDS[words[0]]).main(words[1:])


if __name__ == "__main__":
    sys.exit(run_main(main))
