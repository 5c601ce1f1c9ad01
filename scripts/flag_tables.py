#!/usr/bin/env python
"""Writes docs/flags.md: every flag of the three stages, from the parsers, which are made from the settings' dataclasses.

python scripts/flag_tables.py
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "flags.md"
STAGES = {"train_lora": "Stage 1", "sample_mp": "Stage 2", "train_cls": "Stage 3"}
HEAD = """# Flags

Every flag of the three stages. `python scripts/flag_tables.py` writes this page from the settings' declarations. The most
used ones are explained in [the three stages](stages.md);
`python -m semantic_aug.evaluation VERB --help` lists those of the evaluation.
"""


def cell(text: str) -> str:
    """A text as a cell of a Markdown table holds it."""
    return text.replace("%%", "%").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def rows(group: argparse._ArgumentGroup, parser: argparse.ArgumentParser) -> Iterator[str]:
    """A row for each flag of a group: name with what it takes, meaning with unit and default."""
    formatter = parser.formatter_class(prog="")
    for action in group._group_actions:
        if not isinstance(action, argparse._HelpAction):
            value = (
                ""
                if action.nargs == 0
                else formatter._format_args(action, formatter._metavar_formatter(action, "")(1)[0])
            )
            text = formatter._expand_help(action) + (" (required)" if action.required else "")
            yield f"| `{cell(f'{action.option_strings[0]} {value}'.strip())}` | {cell(text)} |"


def page() -> str:
    """The whole page."""
    lines = [HEAD]
    for module, title in STAGES.items():
        parser = importlib.import_module(module).build_parser()
        lines.append(f"## {title}: {module}.py\n\n| flag | meaning |\n|---|---|")
        for group in parser._action_groups:
            result = list(rows(group, parser))
            lines += [f"| **{group.title}** | |", *result] if result else []
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    """Writes the page."""
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
