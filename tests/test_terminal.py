"""What a command says and where its paths start: odd terminals, errors of the system, numbers, paths, registry keys."""

import argparse
import errno
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

import sample_mp
import train_cls
import train_lora
from semantic_aug import cli, registry
from semantic_aug.datasets.settings import dataset_name
from semantic_aug.errors import os_error_line
from semantic_aug.evaluation.experiments import compare, tune
from semantic_aug.evaluation.quality import filter, measure, pictures

PARSERS = [train_lora, sample_mp, train_cls, compare, filter, measure, pictures, tune]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_an_error_of_the_disk_says_that_the_same_command_goes_on(number):
    line = os_error_line(OSError(number, os.strerror(number), "out/x.png"))
    assert os.strerror(number) in line and "(out/x.png)" in line and "the same command resumes" in line


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file or directory", "list.csv"),
        PermissionError(errno.EACCES, "Permission denied", "a", None, "list.csv"),
        OSError("cannot identify image file list.csv\nsecond line"),
    ],
)
def test_another_error_of_the_system_names_the_file_and_promises_nothing(error):
    line = os_error_line(error)
    assert "list.csv" in line and "lost" not in line and "\n" not in line


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e400", "-1e400", "Infinity"])
def test_numbers_are_finite(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected a number in"):
        cli.number(0)(text)
    assert math.isclose(cli.number(0)("1e-4"), 1e-4)


@pytest.mark.parametrize("module", PARSERS, ids=lambda m: m.__name__)
def test_every_flag_with_a_number_refuses_what_is_not_finite_and_every_path_starts_at_the_working_folder(
    module, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for action in module.build_parser()._actions:
        name = action.option_strings[-1] if action.option_strings else ""
        assert action.type not in (float, registry.resolve_path), name
        if name.endswith(("_dir", "_root", "--reference", "--classifier", "--lcm_lora", "--predict")):
            assert str(action.type("a/b")) == f"{tmp_path}/a/b", name
            assert str(action.type("~/b")) == str(Path("~/b").expanduser()), name


def test_paths_below_the_repository_are_recorded_relative_to_it(monkeypatch):
    monkeypatch.chdir(ROOT / "scripts")
    weights = cli.path_or("auto", "none")
    assert [weights(text) for text in ("auto", "none", "x/y.pth")] == ["auto", "none", "scripts/x/y.pth"]
    assert cli.path_or()("../outputs/a#kept") == "scripts/../outputs/a#kept"
    assert cli.model("quickstart/base") == "scripts/quickstart/base"  # a folder of the working folder
    assert cli.model("scripts/quickstart/base") == "scripts/quickstart/base"  # one of the repository
    assert cli.model("org/model") == "org/model"
    assert dataset_name("folder:data") == f"folder:{ROOT}/scripts/data" and dataset_name("cub") == "cub"
    assert dataset_name("hf:org/name") == "hf:org/name"


def test_class_names_of_any_script_do_not_stop_a_command_on_a_plain_terminal(tmp_path):
    from PIL import Image

    for name in ("Käfer", "鳥"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(tmp_path / "data" / name / "0.png")
        Image.new("RGB", (64, 64), "red").save(tmp_path / "data" / name / "1.png")
    (tmp_path / "cfg").mkdir()
    command = ["sample_mp.py", "--sample_strategy", "real-mix", "--model_path", "scripts/quickstart/base", "--gpu_ids", "cpu",
               "--dataset", f"folder:{tmp_path}/data", "--dry_run", "--config_dir", str(tmp_path / "cfg")]  # fmt: skip
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, env=env)
    assert done.returncode == 0, done.stderr
    assert b"K\\xe4fer" in done.stdout and b"\\u9ce5" in done.stdout
    command[-3:] = ["--finetune_model_key", "鳥", "--config_dir", str(tmp_path / "cfg")]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, env=env)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and b"unknown checkpoint key" in done.stderr


@pytest.mark.parametrize("script", ["train_lora.py", "sample_mp.py", "train_cls.py"])
def test_a_doubled_section_stops_every_stage_before_anything_else(script, tmp_path, capsys):
    (tmp_path / registry.RECIPES).write_text("cub: {a: 1}\nno: {}\ncub: {}\n")
    from semantic_aug.errors import run_main

    module = {"train_lora.py": train_lora, "sample_mp.py": sample_mp, "train_cls.py": train_cls}[script]
    assert run_main(module.main, ["--dataset", "no-such", "--config_dir", str(tmp_path)]) == 2
    assert "recipes.yaml: 'cub' is written twice, in line 1 and in line 3" in capsys.readouterr().err
