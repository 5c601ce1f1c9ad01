#!/usr/bin/env python
"""Measures the code itself: size, longest function, longest call, import circles, places in which a flag is written.

python scripts/measure_code.py                     # this checkout
python scripts/measure_code.py OLDER_CHECKOUT .    # two of them side by side, as a Markdown table
"""

from __future__ import annotations

import argparse
import ast
import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

SCRIPTS = ("train_lora.py", "sample_mp.py", "train_cls.py")
SETTINGS_MODULES = ("cli", "config", "draws", "flags", "job", "mixing", "options", "request", "settings")
"""Names of the modules that declare or hand on settings, in earlier layouts too."""
MEASURES = (
    "files of the package",
    "lines of the package",
    "lines of the entry scripts",
    "longest function (lines)",
    "functions above 60 lines",
    "most positional arguments of a call",
    "calls with more than 6",
    "import circles",
    "places in which a flag is written (median)",
    "lines of the README",
)


def parse_package(root: Path) -> dict[str, ast.Module]:
    """Syntax trees of a checkout's package and entry scripts, by dotted module name."""
    paths = [*(root / "semantic_aug").rglob("*.py"), *(root / name for name in SCRIPTS)]
    return {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): ast.parse(
            path.read_text("utf-8")
        )
        for path in sorted(paths)
    }


def function_lengths(tree: ast.Module) -> dict[str, int]:
    """Lines of each function, without its docstring."""
    lengths = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0]
            documented = ast.get_docstring(node) is not None
            docstring = first.end_lineno - first.lineno + 1 if documented else 0
            lengths[node.name] = max(lengths.get(node.name, 0), node.end_lineno - node.lineno + 1 - docstring)
    return lengths


def positional_arguments(tree: ast.Module) -> Iterator[int]:
    """Positional arguments of every call; a starred one counts once."""
    return (len(node.args) for node in ast.walk(tree) if isinstance(node, ast.Call))


def imports(tree: ast.Module, names: set[str]) -> set[str]:
    """Modules of the package that a module imports, anywhere in it."""
    result = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            result |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            result |= parts if parts <= names else {node.module, *parts}
    return result & names


def circles(trees: dict[str, ast.Module]) -> list[set[str]]:
    """Groups of modules that import one another: strongly connected components of more than one (Tarjan 1972)."""
    graph = {name: imports(tree, set(trees)) - {name} for name, tree in trees.items()}
    order, low, stack, groups = {}, {}, [], []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for other in graph[name]:
            if other not in order:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == order[name]:
            position = stack.index(name)
            group, stack[position:] = set(stack[position:]), []
            if len(group) > 1:
                groups.append(group)

    for name in graph:
        if name not in order:
            visit(name)
    return groups


def places_of_flags(root: Path, trees: dict[str, ast.Module]) -> Counter:
    """In how many places each flag of the stages is declared or copied.

    Counted are a field of a dataclass in a module of settings, the flag in quotes, and a keyword that takes the value of an
    attribute of the same name. The evaluation has commands of its own, whose flags may have the same names.
    """
    flags = {word.strip("'\"[],").removeprefix("--") for name in SCRIPTS for word in stage_help(root, name).split()
             if word.strip("[").startswith("--")}  # fmt: skip
    places = Counter()
    for module, tree in trees.items():
        if module.startswith("semantic_aug.evaluation"):
            continue
        settings = module.rpartition(".")[2] in SETTINGS_MODULES
        for node in ast.walk(tree):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                places[node.target.id] += settings
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("--"):
                places[node.value.removeprefix("--")] += 1
            elif isinstance(node, ast.keyword) and isinstance(node.value, ast.Attribute):
                places[node.arg] += node.value.attr == node.arg
    return Counter({flag: places[flag] for flag in flags if places[flag]})


def stage_help(root: Path, script: str) -> str:
    """What a stage's ``--help`` prints."""
    import subprocess

    done = subprocess.run([sys.executable, script, "--help"], cwd=root, capture_output=True, text=True, check=True)
    return done.stdout


def measure(root: Path) -> dict[str, str]:
    """A value for each of :data:`MEASURES`."""
    trees = parse_package(root)
    lengths = Counter()
    for tree in trees.values():
        lengths |= Counter(function_lengths(tree))
    calls = [count for tree in trees.values() for count in positional_arguments(tree)]
    package = list((root / "semantic_aug").rglob("*.py"))
    (name, longest), flags = lengths.most_common(1)[0], places_of_flags(root, trees)
    values = (
        len(package),
        f"{sum(count_lines(path) for path in package):,}",
        ", ".join(str(count_lines(root / script)) for script in SCRIPTS),
        f"{longest} ({name})",
        sum(length > 60 for length in lengths.values()),
        max(calls),
        sum(count > 6 for count in calls),
        len(circles(trees)),
        f"{statistics.median(flags.values()):g}",
        count_lines(root / "README.md"),
    )
    return dict(zip(MEASURES, map(str, values), strict=True))


def count_lines(path: Path) -> int:
    """Lines of a file."""
    return len(path.read_text(encoding="utf-8").splitlines())


def main(argv: list[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkouts", nargs="*", type=Path, default=[Path(__file__).resolve().parents[1]])
    columns = [measure(root) for root in parser.parse_args(argv).checkouts]
    for name in MEASURES:
        print("| " + " | ".join([name, *(column[name] for column in columns)]) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
