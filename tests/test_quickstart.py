"""scripts/quickstart.sh: the commands of each task, what it says of the outcome, and a download that fails."""

from __future__ import annotations

import csv
import functools
import importlib

import pytest
import run
from tasks import TASKS

from semantic_aug.datasets import download
from semantic_aug.errors import run_main
from semantic_aug.evaluation import __main__ as evaluation


@functools.cache
def parser(program: str):
    return importlib.import_module(program.removesuffix(".py")).build_parser()


@pytest.mark.parametrize("smoke", [False, True], ids=["full", "smoke"])
@pytest.mark.parametrize("name", TASKS)
def test_every_step_is_a_command_that_its_program_accepts(name, smoke):
    quickstart = run.Quickstart(TASKS[name], smoke)
    steps, subsets, classifiers = quickstart.commands(), set(), []
    for program, *flags in steps.values():
        args = parser(program).parse_args(flags)
        assert (args.dataset, args.examples_per_class) == (TASKS[name].dataset, quickstart.size.shots)
        assert str(args.config_dir).endswith(f"{quickstart.out}/config")
        if program == "sample_mp.py":
            subsets.add(args.register_key)
            assert args.classifier is None or args.classifier in classifiers
        elif program == "train_cls.py":
            assert set(args.syndata_key or []) <= subsets  # made by an earlier step
            classifiers.append(args.output_dir)
    _, _, command, *flags = quickstart.headroom()
    args = importlib.import_module(evaluation.COMMANDS[command]).build_parser().parse_args(flags)
    assert (args.dataset, args.examples_per_class) == (TASKS[name].dataset, quickstart.size.shots)
    assert len({flags[flags.index("--output_dir") + 1] for flags in steps.values() if "--output_dir" in flags}) == 4


def test_a_step_whose_result_was_removed_or_damaged_is_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "ROOT", tmp_path)
    quickstart = run.Quickstart(TASKS["elpv"])
    monkeypatch.setattr(quickstart, "commands", lambda: {"real only": quickstart.classify("real only", (), ())})
    results = tmp_path / quickstart.result_folder("real only") / "results.json"
    results.parent.mkdir(parents=True)
    (tmp_path / "train_cls.py").write_text(f"open({str(results)!r}, 'w').write('{{}}')")
    for damage in (results.unlink, lambda: results.write_text('{"test": '), lambda: None):
        quickstart.run_steps()
        assert results.read_text() == "{}" and quickstart.times["real only"]["done"]
        damage()


def test_the_picture_of_cells_goes_to_the_other_type_and_the_opposite_level():
    from semantic_aug.datasets.sets.elpv import CLASS_NAMES

    for label, name in enumerate(CLASS_NAMES):
        (kind, level), count = name.split(" ", 1), len(CLASS_NAMES)
        other, opposite = (CLASS_NAMES[target].split(" ", 1) for target in TASKS["elpv"].targets(label, count))
        assert other[0] != kind and other[1] == level and opposite[0] == kind and opposite[1] != level
        assert label not in TASKS["signs"].targets(label, count)


def test_the_sentence_below_the_table_compares_photographs_with_photographs(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "ROOT", tmp_path)
    quickstart = run.Quickstart(TASKS["signs"])
    right = {"real only": "1100 1000", "real + mixup": "1111 1000", "real + Diff-Mix": "1111 1100"}
    for name, answers in right.items():
        folder = tmp_path / quickstart.result_folder(name)
        folder.mkdir(parents=True)
        with open(folder / "test_predictions.csv", "w", newline="") as lines:
            writer = csv.writer(lines)
            writer.writerow(["file", "class", "predicted"])
            for label, group in enumerate(answers.split()):
                writer.writerows([f"{label}{i}.jpg", label, label if a == "1" else 9] for i, a in enumerate(group))
    text = quickstart.differences()
    # two of four more in the first class, one of four in the second: the mean of 50 and 25 points
    assert "Test macro of real + Diff-Mix, in points: +37.5 [" in text and "+12.5 [" in text
    assert text.count(" to real") == 2


def test_without_photographs_and_network_one_line_says_what_to_fetch(tmp_path, monkeypatch, capsys):
    for variable in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # refuses connections
    monkeypatch.delenv("SIGNS_ROOT", raising=False)
    monkeypatch.setattr(download, "ROOT", tmp_path / "datasets")
    assert run_main(run.main, ["--task", "signs"]) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and "Sign-Language-Digits-Dataset/archive" in err and "set SIGNS_ROOT" in err
    assert not out and not list(tmp_path.iterdir())
