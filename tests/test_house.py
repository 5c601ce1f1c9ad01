"""The house's rules: imports only go down, importing does nothing, every file says what it is."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "semantic_aug"

# A module may import only from groups to the right of its own; leaves import nothing of the package but `files` and `errors`.
ORDER = "entry evaluation finetune sampling classify augmentations datasets diffusion cli leaf files errors".split()
SIDE_BY_SIDE = [{"finetune", "sampling", "classify"}, {"augmentations", "datasets"}]
LEAVES = set(
    "registry prompts meta_csv seeding runs run_lock tensors console pictures allocator devices divergence "
    "foreign_flags".split()
)


def group_of(module: str) -> str:
    """The group of a dotted module name."""
    parts = module.split(".")
    if parts[0] in ("train_lora", "sample_mp", "train_cls"):
        return "entry"
    if len(parts) == 1:
        return "leaf"  # the package itself: a version
    name = parts[1]
    return "leaf" if name in LEAVES else "files" if name == "yaml_files" else name


def modules() -> list[tuple[str, Path]]:
    result = [
        (".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), p)
        for p in PACKAGE.rglob("*.py")
    ]
    return sorted(result + [(p.stem, p) for p in ROOT.glob("*.py")])


def imported(path: Path) -> set[str]:
    """Modules of the project that a file imports, anywhere in it."""
    out = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            out |= {
                node.module
                if (ROOT / Path(*node.module.split("."))).with_suffix(".py").exists()
                else f"{node.module}.{alias.name}"
                for alias in node.names
            }
    return {name for name in out if name.split(".")[0] in ("semantic_aug", "train_lora", "sample_mp", "train_cls")}


@pytest.mark.parametrize(("module", "path"), modules(), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_only_go_down(module, path):
    own = group_of(module)
    for other in imported(path):
        theirs = group_of(other)
        same_folder = own == theirs and own not in ("leaf", "entry")
        beside = any({own, theirs} <= side and own != theirs for side in SIDE_BY_SIDE)
        assert same_folder or (ORDER.index(theirs) > ORDER.index(own) and not beside), (
            f"{module} ({own}) imports {other} ({theirs})"
        )


REQUEST = "settings solver config identity subset claim run".split()
"""Modules that a request of stage 2 passes, in this order."""


def test_a_request_goes_one_way_through_stage_2():
    folder, before = PACKAGE / "sampling", []
    for path in folder.glob("*.py"):
        names = {name.rpartition(".")[2] for name in imported(path) if name.startswith("semantic_aug.sampling.")}
        position = REQUEST.index(path.stem) if path.stem in REQUEST else REQUEST.index("identity")
        assert not names & set(REQUEST[position + 1 :]), path
        before += sorted(names & set(REQUEST[:position]))
    assert {"config", "identity", "subset", "claim"} <= set(before)


@pytest.mark.parametrize(("house", "other"), [("quality", "experiments"), ("experiments", "quality")])
def test_the_two_houses_of_evaluation_do_not_import_each_other(house, other):
    folder = PACKAGE / "evaluation" / house
    assert len(list(folder.glob("*.py"))) > 3
    for path in folder.rglob("*.py"):
        result = [name for name in imported(path) if name.startswith(f"semantic_aug.evaluation.{other}")]
        assert not result, f"{path} imports {result}"


def test_the_rule_can_fail():
    assert ORDER.index(group_of("semantic_aug.diffusion.loop")) > ORDER.index(group_of("semantic_aug.datasets.table"))
    assert group_of("semantic_aug.registry") == "leaf" and group_of("train_cls") == "entry"


@pytest.mark.parametrize(("module", "path"), modules(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_module_says_what_it_is_and_fits_in_a_head(module, path):
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)), f"{path} has no docstring"
    assert len(text.splitlines()) <= 450, f"{path} has grown long: is it still one thing?"


@pytest.mark.parametrize(("module", "path"), modules(), ids=lambda value: value if isinstance(value, str) else "")
def test_public_functions_and_classes_have_docstrings(module, path):
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{module}.{node.name}"


def library_imports() -> str:
    """The import statements at the top of all files that bring in libraries."""
    result = set()
    for _, path in modules():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] not in ("semantic_aug", "__future__"):
                result.add(ast.unparse(node))
            elif isinstance(node, ast.Import):
                result |= {f"import {alias.name}" for alias in node.names if not alias.name.startswith("semantic_aug")}
    return "\n".join(sorted(result))


@pytest.fixture(scope="module")
def measure_code():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        import measure_code

        yield measure_code


def test_functions_and_calls_stay_short_and_imports_have_no_circle(measure_code):
    trees = measure_code.parse_package(ROOT)
    for module, tree in trees.items():
        long = [name for name, lines in measure_code.function_lengths(tree).items() if lines > 60]
        assert not long, f"{module}: {long}"
        assert max(measure_code.positional_arguments(tree), default=0) <= 6, module
    assert not measure_code.circles(trees)


def test_circles_and_long_calls_are_found(measure_code):
    a, b = (
        ast.parse("from semantic_aug import b\nf(1, 2, 3, 4, 5, 6, 7)"),
        ast.parse("def g():\n    import semantic_aug.a"),
    )
    trees = {"semantic_aug.a": a, "semantic_aug.b": b, "semantic_aug": ast.parse("import torch")}
    assert measure_code.circles(trees) == [{"semantic_aug.a", "semantic_aug.b"}]
    assert list(measure_code.positional_arguments(a)) == [7]


@pytest.mark.parametrize("script", ["train_lora.py", "sample_mp.py", "train_cls.py"])
def test_entry_scripts_parse_and_make_one_call(script):
    assert len((ROOT / script).read_text(encoding="utf-8").splitlines()) <= 60


def test_importing_everything_changes_nothing_and_reaches_for_no_network():
    names = [name for name, _ in modules()]
    code = f"""
import random, signal, socket, sys
import numpy, torch
def no(*_): raise AssertionError("network")
socket.socket.connect = no
def state():
    return (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), torch.get_num_threads(),
            torch.get_default_dtype(), torch.is_grad_enabled(), signal.getsignal(signal.SIGINT),
            signal.getsignal(signal.SIGTERM), torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled())
before = state()
{library_imports()}
before = (random.getstate(), *before[1:])  # a library may draw from it when imported; we may not
sys.argv = ["x", "--no-such-flag"]
import importlib
for name in {names!r}:
    importlib.import_module(name)
after = state()
assert before == after, [i for i, (a, b) in enumerate(zip(before, after)) if a != b]
import gc
assert sum(o.numel() for o in gc.get_objects() if isinstance(o, torch.nn.Parameter)) == 0
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", ["train_lora.py", "sample_mp.py", "train_cls.py"])
def test_help_is_quick_and_gives_every_flag_a_text(script):
    import importlib

    parser = importlib.import_module(script.removesuffix(".py")).build_parser()
    for action in parser._actions:
        assert action.help and len(action.help) > 3, action.option_strings
        assert "-" not in "".join(action.option_strings).replace("--", "").replace("-h", ""), action.option_strings
    code = f"import sys, {script[:-3]} as m; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0, "--help should not wait for torch"


def test_nothing_names_a_machine():
    """No absolute paths of a person's machine in what is shipped."""
    prefixes = ["/" + "work/", "/" + "home/", "/" + "Users/", "/" + "root/"]
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    for name in files:
        path = ROOT / name
        if path.suffix in (".py", ".sh", ".md", ".yaml", ".toml", ".txt") and path.is_file():
            text = path.read_text(encoding="utf-8")
            assert not [w for w in prefixes if w in text], f"{name}: {[w for w in prefixes if w in text]}"


def test_pickles_are_opened_with_weights_only():
    for _, path in modules():
        for line in path.read_text(encoding="utf-8").splitlines():
            assert "torch.load(" not in line or "weights_only=True" in line, f"{path}: {line.strip()}"


assert os.environ.get("HF_HUB_OFFLINE") == "1", "the tests run without a hub"


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_style(command):
    """Code, and the Python in Markdown: ``ruff check --fix . && ruff format .`` puts most of it right."""
    done = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
