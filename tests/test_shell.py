"""The shell wrappers, as the documentation prints them: arguments, arrays, exit statuses, the user's shell."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ECHO = "echo program"


@pytest.fixture(params=[kind for kind in ("bash", "zsh") if shutil.which(kind)])
def shell(request, tmp_path):
    """Runs lines in bash, and in zsh, with a python that prints its arguments and ends with the status in $STATUS."""
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\nprintf "[%s] " "$@"; echo; exit ${STATUS:-0}\n')
    program.chmod(0o755)

    def run(lines: str, **env) -> subprocess.CompletedProcess:
        base = {
            k: v
            for k, v in os.environ.items()
            if k not in ("MODEL_NAME", "GPU_IDS", "CUDA_VISIBLE_DEVICES", "MULTIPLIER")
        }
        return subprocess.run(
            [request.param, "-c", lines],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={**base, "DIFFMIX_PYTHON": str(program), **env},
        )

    return run


def command_line(done: subprocess.CompletedProcess) -> list[str]:
    return [word.strip("[]") for word in done.stdout.strip().split("] [")]


def flag(result: list[str], name: str, count: int = 1) -> list[str]:
    position = result.index(name)
    return result[position + 1 : position + 1 + count]


def test_finetune_as_printed(shell):
    result = command_line(
        shell("source scripts/finetune.sh\nbash finetune 'cub' 'ti_db' 5 35000 --rank 4 --prompt 'a b'")
    )
    assert result[0].endswith("train_lora.py")
    assert flag(result, "--dataset") == ["cub"] and flag(result, "--finetune_strategy") == ["ti_db"]
    assert flag(result, "--examples_per_class") == ["5"] and flag(result, "--max_train_steps") == ["35000"]
    assert flag(result, "--pretrained_model_name_or_path") == ["stable-diffusion-v1-5/stable-diffusion-v1-5"]
    assert result[-4:] == ["--rank", "4", "--prompt", "a b"]  # further words are passed on, quoted ones whole


def test_several_gpus_go_through_accelerate(shell):
    result = command_line(
        shell("source scripts/finetune.sh; finetune cub ti_db -1 10", CUDA_VISIBLE_DEVICES="0,3", MODEL_NAME="my base")
    )
    assert result[:3] == ["-m", "accelerate.commands.accelerate_cli", "launch"] and flag(result, "--num_processes") == [
        "2"
    ]
    assert flag(result, "--pretrained_model_name_or_path") == ["my base"]


@pytest.mark.parametrize("ids", ["GPU_IDS=(0 0 1)", "GPU_IDS='0 0 1'", "export GPU_IDS=(0 0 1)"])
def test_sample_takes_gpu_ids_as_array_or_string(shell, ids):
    result = command_line(shell(f"source scripts/sample.sh\n{ids}\nbash sample 'cub' 'ti_db_latest' 'diff-mix' 0.7"))
    assert result[0].endswith("sample_mp.py") and flag(result, "--gpu_ids", 3) == ["0", "0", "1"]
    assert flag(result, "--finetune_model_key") == ["ti_db_latest"] and flag(result, "--aug_strength") == ["0.7"]
    assert flag(result, "--syn_dataset_multiplier") == ["5"] and flag(result, "--examples_per_class") == ["-1"]


def test_sample_fewshot_as_printed(shell):
    lines = "source scripts/sample.sh\nexport GPU_IDS=(0 0 0 1 1 1)\n"
    result = command_line(shell(lines + "bash sample_fewshot 5 'cub' '5shot_ti_db_latest' 'diff-mix' 0.7"))
    assert flag(result, "--examples_per_class") == ["5"] and flag(result, "--gpu_ids", 6) == [
        "0",
        "0",
        "0",
        "1",
        "1",
        "1",
    ]
    assert flag(
        command_line(shell("source scripts/sample.sh; sample cub None real-mix uniform")), "--strength_strategy"
    ) == ["uniform"]
    assert "--gpu_ids" not in command_line(shell("source scripts/sample.sh; sample cub k diff-mix 0.7"))


def test_variables_become_flags_of_their_own(shell):
    result = command_line(
        shell("source scripts/finetune.sh; finetune cub ti_db 5 9", MODEL_NAME="my base", MIXED_PRECISION="fp16")
    )
    assert flag(result, "--mixed_precision") == ["fp16"]
    assert flag(result, "--pretrained_model_name_or_path") == ["my base"]
    result = command_line(
        shell("source scripts/sample.sh; sample cub k diff-mix 0.7", MODEL_NAME="my base", MULTIPLIER="2")
    )
    assert flag(result, "--model_path") == ["my base"] and flag(result, "--syn_dataset_multiplier") == ["2"]


def test_main_cls_as_printed(shell):
    lines = "source scripts/classification.sh\nmain_cls 'cub' '0' 2020 'resnet50' '224' 120 'diffmix_0.7' 0.5 0.1 --use_cutmix"
    result = command_line(shell(lines))
    expected = {
        "--dataset": "cub",
        "--gpu": "0",
        "--seed": "2020",
        "--model": "resnet50",
        "--res_mode": "224",
        "--nepoch": "120",
        "--syndata_key": "diffmix_0.7",
        "--gamma": "0.5",
        "--synthetic_prob": "0.1",
    }
    assert (
        result[0].endswith("train_cls.py")
        and {k: flag(result, k)[0] for k in expected} == expected
        and result[-1] == "--use_cutmix"
    )
    chosen = command_line(shell(f"{lines} --gpu cpu"))
    assert [chosen[i + 1] for i, word in enumerate(chosen) if word == "--gpu"] == ["0", "cpu"]  # the last one wins
    few = command_line(
        shell("source scripts/classification.sh; main_cls_fewshot 5 cub 0 2020 resnet50 224 120 None 0.5 0.1")
    )
    assert flag(few, "--examples_per_class") == ["5"] and flag(few, "--syndata_key") == ["None"]


def test_several_gpus_train_one_classifier_through_accelerate(shell):
    result = command_line(
        shell("source scripts/classification.sh; main_cls cub 0,2,3 2020 resnet50 224 120 None 0.5 0.1 --ema_decay 0.9")
    )
    assert result[:3] == ["-m", "accelerate.commands.accelerate_cli", "launch"] and "--gpu" not in result
    assert flag(result, "--num_processes") == ["3"] and flag(result, "--res_mode") == ["224"] and result[-1] == "0.9"


@pytest.mark.parametrize(
    ("visible", "numbers", "used"),
    [("4,6,7", "0,2", "4,7"), ("GPU-a,GPU-b", "1,0", "GPU-b,GPU-a"), (None, "0,2", "0,2")],
)
def test_gpu_numbers_of_stage_3_count_the_visible_gpus(shell, tmp_path, visible, numbers, used):
    """As one number does: on a shared machine the others belong to someone else."""
    (tmp_path / "python").write_text("#!/bin/sh\necho $CUDA_VISIBLE_DEVICES\n")
    env = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    call = f"source scripts/classification.sh; set -euo pipefail; main_cls cub {numbers} 0 resnet50 224 1 None 0.5 0.1"
    assert shell(call, **env).stdout == f"{used}\n"
    done = shell(call.replace(numbers, f"{numbers},9"), CUDA_VISIBLE_DEVICES=visible or "")
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: GPU ") and f"CUDA_VISIBLE_DEVICES={visible or ''} shows" in done.stderr


@pytest.mark.parametrize(
    ("wrapper", "first", "flags"),
    [
        ("main_cls", "", {"--examples_per_class": "-1"}),
        ("main_cls_cutmix", "", {"--use_cutmix": ""}),
        ("main_cls_waterbird", "", {"--test_dataset": "waterbird"}),
        ("main_cls_fewshot", "10", {"--examples_per_class": "10"}),
        ("main_cls_imb", "0.01", {"--task": "imbalanced", "--imbalance_factor": "0.01", "--examples_per_class": "-1"}),
    ],
)
def test_every_setting_has_a_wrapper_with_main_cls_order(shell, wrapper, first, flags):
    call = f"bash {wrapper} {first} elpv cpu 2021 vit_b_16 384 30 'a key' 0.8 0.3 --nepoch 2 --seeds 1 2"
    result = command_line(shell(f"source scripts/classification.sh; {call}"))
    fixed = {"--dataset": "elpv", "--gpu": "cpu", "--seed": "2021", "--model": "vit_b_16", "--res_mode": "384"}
    fixed |= {"--syndata_key": "a key", "--gamma": "0.8", "--synthetic_prob": "0.3", "--seeds": "1"}
    assert result[0].endswith("train_cls.py") and {k: flag(result, k)[0] for k in fixed} == fixed
    for name, value in flags.items():
        assert name in result and (name == "--use_cutmix" or flag(result, name) == [value])
    last = len(result) - 1 - result[::-1].index("--nepoch")
    assert result[last + 1] == "2" and result.index("--nepoch") < last  # a flag given after the words wins
    assert max(result.index(name) for name in flags) < last
    few = shell(f"source scripts/classification.sh; {wrapper} {first} elpv cpu")
    assert few.returncode == 2 and few.stderr.startswith(f"error: {wrapper} needs {10 if first else 9} arguments")


def test_training_on_waterbirds_is_chosen_by_the_worst_group(shell):
    call = "main_cls_waterbird waterbird 0 2020 resnet50 224 120 None 0.5 0.1"
    result = command_line(shell(f"source scripts/classification.sh; {call}"))
    assert flag(result, "--select_by") == ["worst_group"] and "--test_dataset" not in result


@pytest.mark.parametrize(
    ("script", "call"),
    [
        ("finetune", "bash finetune cub ti_db 5 10"),
        ("sample", "bash sample cub k diff-mix 0.7"),
        ("classification", "main_cls cub 0 1 m 224 1 k 0.5 0.1"),
    ],
)
def test_a_wrapper_returns_the_programs_status_and_the_shell_lives_on(shell, script, call):
    done = shell(f"source scripts/{script}.sh\n{call} >/dev/null; echo status $?; echo alive", STATUS="2")
    assert done.stdout.split("\n")[:2] == ["status 2", "alive"]


@pytest.mark.parametrize(
    ("script", "call"),
    [
        ("finetune", "finetune DATA ti_db 5 10"),
        ("sample", "sample DATA k diff-mix 0.7"),
        ("classification", "main_cls DATA 0 1 resnet50 224 1 k 0.5 0.1"),
    ],
)
def test_the_papers_data_sets_take_its_recipe_unless_told_otherwise(shell, script, call):
    for dataset, recipe in {"cub": "paper", "pascal": "paper", "elpv": "default", "folder:/cub": "default"}.items():
        result = command_line(shell(f"source scripts/{script}.sh; {call.replace('DATA', dataset)} --recipe mine"))
        assert flag(result, "--recipe") == [recipe] and "mine" in result[result.index("--recipe") + 2 :]


def test_too_few_words_are_one_line(shell):
    done = shell("source scripts/finetune.sh; bash finetune cub; echo status $?")
    assert done.stdout == "status 2\n" and done.stderr.startswith(
        "error: finetune needs 4 arguments, got 1; usage: finetune DATASET"
    )


def test_bash_itself_still_works_and_strict_shells_do_too(shell, tmp_path):
    (tmp_path / "x.sh").write_text("echo script $1\n")
    (tmp_path / "finetune").mkdir()  # a folder is no script
    done = shell(
        f"set -euo pipefail\nfor s in finetune sample classification; do source scripts/$s.sh; done\n"
        f"bash {tmp_path}/x.sh one; bash -c 'echo two'; cd {tmp_path}; bash finetune a b 1 2"
    )
    assert done.returncode == 0 and done.stdout.startswith("script one\ntwo\n") and "--max_train_steps" in done.stdout


def test_sourcing_works_from_anywhere(shell, tmp_path):
    done = shell(f"cd {tmp_path}; source {ROOT}/scripts/sample.sh; bash sample cub k diff-mix 0.7")
    assert str(ROOT / "sample_mp.py") in done.stdout


def test_a_search_path_for_cd_changes_nothing(shell, tmp_path):
    """With CDPATH, cd prints where it goes, and prefers another folder of the same name."""
    (tmp_path / "scripts").mkdir()
    for search in (".", tmp_path):
        done = shell(f"CDPATH={search}\nsource scripts/sample.sh\nsample cub k diff-mix 0.7; echo $CDPATH")
        assert command_line(done)[0] == str(ROOT / "sample_mp.py") and done.stdout.endswith(f"\n{search}\n")


@pytest.mark.parametrize("habit", ['cd() { builtin cd "$@" && ls; }', "chpwd() { ls; }", "alias cd='echo going; cd'"])
def test_a_cd_that_lists_the_folder_changes_nothing(shell, habit):
    done = shell(f"shopt -s expand_aliases 2>/dev/null\n{habit}\nsource scripts/sample.sh\nsample cub k diff-mix 0.7")
    assert command_line(done)[0] == str(ROOT / "sample_mp.py")


@pytest.mark.parametrize(
    ("active", "own"),
    [
        ({}, True),
        ({"CONDA_DEFAULT_ENV": "base"}, True),
        ({"CONDA_DEFAULT_ENV": "cells"}, False),
        ({"VIRTUAL_ENV": "/v"}, False),
    ],
)
def test_an_active_environment_comes_before_the_repositorys_own(shell, tmp_path, active, own):
    shutil.copytree(
        ROOT / "scripts", tmp_path / "scripts", ignore=lambda folder, names: {n for n in names if "." not in n}
    )
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to("/bin/echo")
    lines = f"PATH={tmp_path}:$PATH; source {tmp_path}/scripts/finetune.sh; finetune cub ti_db 5 9"
    done = shell(lines, **{"DIFFMIX_PYTHON": "", "VIRTUAL_ENV": "", "CONDA_DEFAULT_ENV": "", **active})
    assert done.stdout.startswith(f"{tmp_path}/train_lora.py" if own else f"[{tmp_path}/train_lora.py]")


def test_an_alias_of_python_is_not_run_as_a_program(shell, tmp_path):
    lines = f"shopt -s expand_aliases 2>/dev/null\nalias python=python3\nPATH={tmp_path}:$PATH\nsource scripts/finetune.sh\n"
    done = shell(f"{lines}finetune cub ti_db 5 9; alias python", DIFFMIX_PYTHON="", VIRTUAL_ENV=str(tmp_path))
    assert command_line(done)[0] == f"{ROOT}/train_lora.py" and "python3" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("script", ["setup", "test", "quickstart"])
def test_a_search_path_for_cd_leads_no_script_elsewhere(script, tmp_path):
    (tmp_path / "repository" / "scripts").mkdir(parents=True)
    (tmp_path / "elsewhere" / "scripts").mkdir(parents=True)
    lines = (ROOT / "scripts" / f"{script}.sh").read_text().splitlines(keepends=True)
    cd = next(number for number, line in enumerate(lines) if "cd " in line and "BASH_SOURCE" in line)
    (tmp_path / "repository" / "scripts" / "begin.sh").write_text("".join(lines[: cd + 1]) + "pwd\n")
    done = subprocess.run(
        ["bash", "scripts/begin.sh"],
        cwd=tmp_path / "repository",
        env={**os.environ, "CDPATH": str(tmp_path / "elsewhere")},
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"{tmp_path / 'repository'}\n"


@pytest.mark.slow
def test_setup_goes_on_where_an_environment_has_no_pip(tmp_path):
    """As after Ctrl-C in its first seconds, or on Debian before python3-venv is installed."""
    for folder in ("scripts", "config"):
        (tmp_path / folder).mkdir()
    shutil.copy(ROOT / "scripts" / "setup.sh", tmp_path / "scripts")
    for name in ("none.txt", "config/constraints.txt"):
        (tmp_path / name).write_text("# nothing to install\n")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", ".venv"], cwd=tmp_path, check=True)
    env = {**os.environ, "PYTHON": sys.executable}
    command = ["bash", "scripts/setup.sh", "none.txt"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and list((tmp_path / ".venv").glob("installed-*")), done.stderr


@pytest.mark.parametrize(
    "ids", ["GPU_IDS=$(printf '0\\n1\\n2')", "IFS=$'\\n'; GPU_IDS=(0 1 2)", "IFS=,; GPU_IDS=(0 1 2)"]
)
def test_gpu_ids_on_several_lines_are_all_taken(shell, ids):
    result = command_line(shell(f"source scripts/sample.sh\n{ids}\nsample cub k diff-mix 0.7"))
    assert flag(result, "--gpu_ids", 4) == ["0", "1", "2", "--aug_strength"]


MISMATCH = "Failed to initialize NVML: Driver/library version mismatch\\nNVML library version: 535.161\\n"


@pytest.mark.parametrize(
    ("says", "status", "visible", "count"),
    [
        ("GPU 0: H200 (UUID: a)\\nGPU 1: H200 (UUID: b)\\n", 0, None, 2),
        ("GPU 0: H200 (UUID: a)\\nGPU 1: H200 (UUID: b)\\n", 0, "", 1),
        (MISMATCH, 18, None, 1),
        ("No devices were found\\n", 6, None, 1),
        ("", 9, None, 1),
    ],
)
def test_finetune_counts_the_gpus_there_are(shell, tmp_path, says, status, visible, count):
    """A driver that fails prints its message where the list of GPUs would stand."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '{says}'; exit {status}\n")
    program.chmod(0o755)
    lines = "" if visible is None else f"export CUDA_VISIBLE_DEVICES={visible}\n"
    done = shell(f"set -euo pipefail\nPATH={tmp_path}:$PATH\n{lines}source scripts/finetune.sh; finetune cub ti_db 5 9")
    result = command_line(done)
    assert done.returncode == 0 and done.stderr == ""
    assert (flag(result, "--num_processes") == ["2"]) if count == 2 else result[0].endswith("train_lora.py")


def test_a_number_of_processes_that_is_none_is_one_line(shell):
    done = shell("source scripts/finetune.sh; finetune cub ti_db 5 10; echo status $?", NUM_PROCESSES="two")
    assert done.stdout == "status 2\n" and done.stderr == "error: NUM_PROCESSES=two: expected a whole number\n"
