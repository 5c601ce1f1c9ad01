"""What synthetic images are worth: ``python -m semantic_aug.evaluation COMMAND ...``."""

import importlib
import sys

from semantic_aug import console
from semantic_aug.allocator import let_waiting_threads_sleep
from semantic_aug.errors import run_main, unknown

COMMANDS = {
    "compare": "semantic_aug.evaluation.experiments.compare",
    "export": "semantic_aug.evaluation.quality.export",
    "filter": "semantic_aug.evaluation.quality.filter",
    "gallery": "semantic_aug.evaluation.quality.gallery",
    "headroom": "semantic_aug.evaluation.experiments.headroom",
    "measure": "semantic_aug.evaluation.quality.measure",
    "pictures": "semantic_aug.evaluation.quality.pictures",
    "pseudo-label": "semantic_aug.evaluation.experiments.pseudo_label",
    "tune": "semantic_aug.evaluation.experiments.tune",
}
"""Each command's module; its ``main`` takes the arguments after the command, its first docstring line is the summary."""


def main(argv: list[str] | None = None) -> int:
    """Runs one command."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        summaries = {name: importlib.import_module(module).__doc__.split("\n")[0] for name, module in COMMANDS.items()}
        lines = [f"  {name:<12} {summary}" for name, summary in summaries.items()]
        print("usage: python -m semantic_aug.evaluation COMMAND ... (COMMAND --help lists its flags)", *lines, sep="\n")
        return 0
    if arguments[0] not in COMMANDS:
        raise unknown("command", arguments[0], COMMANDS, "python -m semantic_aug.evaluation --help says what each does")
    let_waiting_threads_sleep()
    console.quiet_libraries()
    console.set_up_logging()
    return importlib.import_module(COMMANDS[arguments[0]]).main(arguments[1:])


if __name__ == "__main__":
    sys.exit(run_main(main))
