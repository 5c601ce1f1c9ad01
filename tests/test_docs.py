"""Every command printed in the README and in docs/ is one that the real parsers accept, and every link leads somewhere."""

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECORDER = '#!/bin/sh\nfor word in "$@"; do printf "%s\\037" "$word"; done >>"$RECORD"\nprintf "\\036" >>"$RECORD"\n'
"""A stand-in for python that writes down its arguments: words end in a unit separator, commands in a record separator."""


def blocks(page) -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(block: str, folder) -> list[list[str]]:
    """The arguments of each python command of a block, as bash hands them over; wrappers are the real ones."""
    for name in ("python", "pip"):
        (folder / name).write_text(RECORDER)
        (folder / name).chmod(0o755)
    record = folder / "record"
    record.write_text("")
    lines = [line for line in block.splitlines() if not re.match(r"\s*(bash scripts/|export DIFFMIX)", line)]
    variables = {k: v for k, v in os.environ.items() if k not in ("GPU_IDS", "MODEL_NAME", "MULTIPLIER")}
    env = {
        **variables,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "RECORD": str(record),
        "DIFFMIX_PYTHON": str(folder / "python"),
    }
    done = subprocess.run(["bash", "-c", "\n".join(lines)], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, f"{block}\n{done.stderr}"
    return [text.split("\x1f")[:-1] for text in record.read_text().split("\x1e")[:-1]]


def parser_of(argv: list[str]):
    """The parser of a command and the words it gets; None for commands that are not ours."""
    for stage in ("train_lora", "sample_mp", "train_cls"):
        if argv[0].endswith(f"{stage}.py"):
            return importlib.import_module(stage).build_parser(), argv[1:]
    if argv[:2] == ["-m", "semantic_aug.evaluation"]:
        from semantic_aug.evaluation.__main__ import COMMANDS

        return importlib.import_module(COMMANDS[argv[2]]).build_parser(), argv[3:]
    if argv[0] == "-m" and argv[1].startswith("semantic_aug."):
        name = argv[1] if argv[1] != "semantic_aug.datasets" else "semantic_aug.datasets.__main__"
        return importlib.import_module(name).build_parser(), argv[2:]
    if argv[0] == "scripts/bench.py":
        module = importlib.import_module(f"benchmarks.{argv[1]}")
        return (module.build_parser(), argv[2:]) if hasattr(module, "build_parser") else None
    if argv[0] == "scripts/build_base.py":
        return importlib.import_module("build_base").build_parser(), argv[1:]
    if argv[0].startswith("scripts/"):
        assert (ROOT / argv[0]).is_file(), argv
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_printed_commands_are_accepted(page, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    for argv in commands("\n".join(blocks(page)), tmp_path):  # a reader goes down a page in one shell
        result = parser_of(argv)
        if result is not None:
            parser, rest = result
            parser.parse_args(rest)  # raises with the flag that is wrong


SPECIFICATION = """
source scripts/finetune.sh
bash finetune 'cub' 'ti_db' -1 35000
source scripts/finetune.sh
bash finetune 'cub' 'ti_db' 5 35000
source scripts/sample.sh
export GPU_IDS=(0 0 0 1 1 1)
bash sample 'cub' 'ti_db_latest' 'diff-mix' 0.7
bash sample 'cub' 'ti_db_latest' 'diff-aug' 0.7
bash sample 'cub' 'ti_db_latest' 'real-mix' 0.7
bash sample 'cub' 'ti_db_latest' 'real-guidance' 0.7
source scripts/sample.sh
export GPU_IDS=(0 0 0 1 1 1)
bash sample_fewshot 5 'cub' '5shot_ti_db_latest' 'diff-mix' 0.7
source scripts/classification.sh
main_cls 'cub' '0' 2020 'resnet50' '224' 120 'diffmix_0.7' 0.5 0.1
"""
"""Every command that the specification prints, as it prints it, and the strategies that it names instead of diff-mix."""


def test_the_commands_of_the_specification_are_accepted(tmp_path):
    stages = []
    for argv in commands(SPECIFICATION, tmp_path):
        parser, rest = parser_of(argv)
        args = parser.parse_args(rest)
        stages.append((Path(argv[0]).name, args.examples_per_class))
        assert args.dataset == "cub" and args.recipe.startswith("paper: ")
    scripts = ["train_lora.py"] * 2 + ["sample_mp.py"] * 5 + ["train_cls.py"]
    assert stages == [*zip(scripts, (-1, 5, -1, -1, -1, -1, 5, -1), strict=True)]


def python_blocks(page) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_python_snippets_compile_and_import_what_exists():
    for page in PAGES:
        for code in python_blocks(page):
            tree = ast.parse(code)
            imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
            exec(compile(ast.Module(imports, []), page.name, "exec"), {})


def test_small_python_snippets_run(image_folder, monkeypatch):
    """Those that the tests of their own topic do not run."""
    import torch

    from semantic_aug.augmentations.strategies import Strategy

    strategy = eval(python_blocks(ROOT / "README.md")[0], {"Strategy": Strategy})
    assert (strategy.name, strategy.start) == ("ti-gen", "noise")
    names: dict = {"Tensor": torch.Tensor, "F": torch.nn.functional}
    exec(python_blocks(ROOT / "docs/losses.md")[0], names)
    logits = torch.tensor([[2.0, 0.5, -1.0]])
    wanted = torch.nn.functional.cross_entropy(logits, torch.tensor([1])) + 1 - logits.softmax(1)[0, 1]
    assert torch.allclose(names["poly1_terms"](logits)[0, 1], wanted)
    names = {}
    exec(python_blocks(ROOT / "docs/datasets.md")[0], names)
    monkeypatch.setenv("LEAVES_ROOT", str(image_folder))
    assert len(names["SPEC"].read()["train"]) == 18


def anchors(page: Path) -> set[str]:
    """The names by which GitHub links to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_scripts_and_links_exist(page):
    text = page.read_text(encoding="utf-8")
    for script in re.findall(r"^\s*(?:bash|source) (scripts/\S+)", text, re.MULTILINE):
        assert (ROOT / script).is_file(), script
    for link, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", text):
        target = page.parent / link if link else page
        assert link.startswith("http") or target.exists(), link
        assert link.startswith("http") or not anchor or anchor in anchors(target), f"{link}#{anchor}"


def test_the_readme_is_a_newcomers_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_the_recorder_hands_over_what_bash_would(tmp_path):
    result = commands('X="--a 1"\npython train_cls.py $X "b c" \\\n    --d', tmp_path)
    assert result == [["train_cls.py", "--a", "1", "b c", "--d"]], sys.version


def test_the_page_of_flags_is_the_parsers(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import flag_tables

    assert flag_tables.PAGE.read_text(encoding="utf-8") == flag_tables.page(), "python scripts/flag_tables.py"
