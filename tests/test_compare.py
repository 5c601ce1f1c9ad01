"""The comparison: its commands, its runner on real subprocesses, sharing of pairs, and the numbers of its report."""

import csv
import dataclasses
import fcntl
import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import unquote

import pytest
from browsing import check_contrasts, press, requests_outside, until
from helpers import ROOT, exchange, main_here

import sample_mp
import train_cls
import train_lora
from semantic_aug import registry
from semantic_aug.augmentations.strategies import STRATEGIES
from semantic_aug.errors import UserError, run_main
from semantic_aug.evaluation import __main__ as dispatcher
from semantic_aug.evaluation.experiments import checks, compare, report, results, runner
from semantic_aug.evaluation.experiments.commands import METHODS, StageCommands, Step, stage1_environment

STAGES_ALONE = [name for name, method in METHODS.items() if not method.unlabelled]
"""The methods whose steps are runs of the three stages on labelled images alone."""
ENTRY = {"train_lora.py": train_lora, "sample_mp.py": sample_mp, "train_cls.py": train_cls}


def arguments(image_folder, base, out, *more):
    """Flags of a small comparison."""
    return [
        "--dataset", f"folder:{image_folder}", "--pretrained_model_name_or_path", str(base), "--examples_per_class", "2",
        "--max_train_steps", "2", "--train_batch_size", "2", "--multiplier", "1", "--num_inference_steps", "4",
        "--model", "test_vit", "--res_mode", "32", "--nepoch", "2", "--batch_size", "3", "--gpu_ids", "cpu",
        "--stage3_args", "--weights none", "--skip_headroom", "--output_dir", str(out), *map(str, more),
    ]  # fmt: skip


def parsed(argv):
    return compare.build_parser().parse_args(argv)


def recipe(*argv):
    """The budget of the first setting."""
    return compare.recipe_of(parsed(["--dataset", "elpv", *argv]))


# ----------------------------------------------------------------------------------------------------- the commands


def test_every_command_is_one_its_entry_script_takes(image_folder, tmp_path):
    argv = arguments(
        image_folder, "base", tmp_path, "--methods", *STAGES_ALONE, "--seeds", 1, 2, "--stage2_args", "--cpu_threads 2"
    )
    jobs = compare.jobs_of(parsed(argv), tmp_path)
    assert [(job.setting, job.commands.subset_seed) for job in jobs] == [("2shot", 1), ("2shot", 2)]
    for job in jobs:
        taken = {}
        for name, step in job.pair.steps.items():
            args = ENTRY[step.arguments[0]].build_parser().parse_args(list(step.arguments[1:]))
            assert args.seed == args.subset_seed == job.commands.subset_seed and args.examples_per_class == 2
            assert set(step.needs) <= set(taken)  # what it needs comes before it
            taken[name] = args
        assert taken["sample diff-mix"].finetune_model_key == "ti_db" == taken["ti_db"].register_key
        assert taken["sample da-fusion"].finetune_model_key == "ti" == taken["ti"].register_key
        assert taken["sample real-mix"].model_path == "base" and taken["sample real-mix"].finetune_model_key is None
        classifiers = [args for name, args in taken.items() if name.startswith("classify")]
        assert {args.nepoch for args in classifiers} == {2} and {args.batch_size for args in classifiers} == {3}
        assert taken["classify diff-mix+cutmix"].use_cutmix and taken["classify diff-mix+cutmix"].syndata_key == [
            "diff-mix"
        ]
        assert taken["classify cutmix"].syndata_key is None and not taken["classify real-only"].use_cutmix
        assert {taken[name].syn_dataset_multiplier for name in taken if name.startswith("sample")} == {1}
        assert taken["sample diff-mix"].cpu_threads == 2 and taken["classify mixup"].weights == "none"
        teacher, curriculum = taken["classify diff-mix+teacher"], taken["classify diff-mix+curriculum"]
        assert (teacher.soft_labels, teacher.syndata_key) == ("teacher", ["diff-mix"])
        assert (curriculum.curriculum, curriculum.syndata_key) == ("strength", ["diff-mix+curriculum"])
        assert taken["sample diff-mix+curriculum"].strength_strategy == "uniform"
        assert {f"sample {name}" for name in STRATEGIES} <= set(taken)  # every strategy is a method


def test_stage_one_runs_only_for_methods_that_need_it(image_folder, tmp_path):
    argv = arguments(image_folder, "base", tmp_path, "--seeds", 1, "--methods", "real-only", "cutmix", "real-guidance")
    assert {step.stage for step in compare.jobs_of(parsed(argv), tmp_path)[0].pair.steps.values()} == {2, 3}
    argv = arguments(image_folder, "base", tmp_path, "--seeds", 1, "--methods", "diff-mix", "diff-aug")
    assert [s for s in compare.jobs_of(parsed(argv), tmp_path)[0].pair.steps if s in ("ti", "ti_db")] == ["ti_db"]


def test_images_that_follow_the_real_only_classifier_come_after_it(tmp_path):
    method = METHODS["diff-mix+hard"]
    steps = StageCommands(recipe(), 3, tmp_path).method_steps(["diff-mix", method.name])
    names = ["ti_db", "sample diff-mix", "classify diff-mix", "classify real-only", "sample diff-mix+hard"]
    assert list(steps) == [*names, "classify diff-mix+hard"]
    sample, classify = steps["sample diff-mix+hard"], steps["classify diff-mix+hard"]
    assert set(sample.needs) == {"classify real-only", "ti_db"} and classify.needs == ("sample diff-mix+hard",)
    assert f"--sources hard --classifier {tmp_path}/classify/real-only " in shlex.join(sample.arguments)
    assert "--syndata_key diff-mix+hard " in shlex.join(classify.arguments)
    assert method.step_names == {1: "ti_db", 2: sample.name, 3: classify.name}
    alone = StageCommands(recipe(), 3, tmp_path).method_steps([method.name])
    assert runner.Pair(tmp_path, alone).missing() == ["classify real-only", "ti_db", sample.name, classify.name]


def test_values_may_be_given_for_each_setting(tmp_path):
    argv = [
        "--dataset",
        "elpv",
        "--examples_per_class",
        "5",
        "-1",
        "--nepoch",
        "40",
        "4",
        "--seeds",
        "1",
        "--gamma",
        "0.8",
    ]
    jobs = compare.jobs_of(parsed(argv), tmp_path)
    assert [(j.setting, j.commands.recipe.classify["nepoch"]) for j in jobs] == [("5shot", 40), ("all", 4)]
    assert [j.commands.recipe.synthetic for j in jobs] == [{"gamma": 0.8, "synthetic_prob": p} for p in (0.3, 0.1)]


def test_devices_reach_every_stage(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert stage1_environment("1") == {"CUDA_VISIBLE_DEVICES": "7"} and stage1_environment(None) == {}
    assert stage1_environment("cpu") == {"CUDA_VISIBLE_DEVICES": ""}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert stage1_environment("1") == {"CUDA_VISIBLE_DEVICES": "1"}
    argv = ["--dataset", "elpv", "--gpu_ids", "1", "1", "--seeds", "1", "--methods", "diff-mix"]
    created = compare.jobs_of(parsed(argv), tmp_path)[0].pair.steps
    assert "--gpu_ids 1 1 " in shlex.join(created["sample diff-mix"].arguments)
    assert "--gpu 1 " in shlex.join(created["classify diff-mix"].arguments)
    assert str(created["ti_db"]).startswith("CUDA_VISIBLE_DEVICES=")


def test_extra_arguments_may_set_what_the_methods_do_not(tmp_path):
    argv = ["--dataset", "elpv", "--seeds", "1", "--methods", "diff-mix", "--stage2_args", "--contexts x"]
    assert compare.jobs_of(parsed(argv), tmp_path)[0].pair.steps["sample diff-mix"].arguments[-2:] == (
        "--contexts",
        "x",
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--methods", "diffmix"], "unknown method of --methods 'diffmix': did you mean 'diff-mix'?"),
        (["--shard_index", "2", "--num_shards", "2"], "--shard_index 2: expected a number below --num_shards 2"),
        (["--nepoch", "1", "2"], "--nepoch 1 2: expected one value, or one for each of the 1"),
        (["--examples_per_class", "0"], "--examples_per_class 0: expected a number of images, or -1"),
        (["--examples_per_class", "3", "3"], "--examples_per_class 3 twice: a setting has one budget"),
        (["--gpu_ids", "gpu0"], "--gpu_ids gpu0: expected GPU numbers or the word cpu"),
        (["--stage3_args", "--seed 3"], "--stage3_args: --seed is set for each run already"),
        (
            ["--methods", "diff-mix+contexts", "--stage2_args", "--contexts x"],
            "--stage2_args: --contexts is what the method diff-mix+contexts sets",
        ),
        (["--metods", "mixup"], "unknown argument --metods: did you mean --methods?"),
    ],
)
def test_mistakes_are_one_line(argv, message, capsys):
    assert run_main(dispatcher.main, ["compare", "--dataset", "elpv", *argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


def test_a_report_of_a_folder_without_a_comparison_leaves_no_trace(tmp_path, capsys):
    argv = ["compare", "--dataset", "elpv", "--report_only", "--output_dir", str(tmp_path / "gone")]
    assert run_main(dispatcher.main, argv) == 2
    assert "holds no comparison" in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_an_unknown_command_names_the_nearest(capsys):
    assert run_main(dispatcher.main, ["compar"]) == 2
    assert "unknown command 'compar': did you mean 'compare'?" in capsys.readouterr().err


@pytest.mark.slow
def test_a_dry_run_prints_the_runs_and_their_number(tmp_path, capsys):
    argv = [
        "--dataset",
        "elpv",
        "--examples_per_class",
        "5",
        "--methods",
        "real-only",
        "diff-mix",
        "--output_dir",
        str(tmp_path),
        "--pretrained_model_name_or_path",
        "no-such/model",
    ]
    assert compare.main([*argv, "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert out.count("a run would download the base model no-such/model from the hub; what depends") == 1
    assert "12 runs (3 of stage 1, 3 of stage 2, 6 of stage 3) in 3 pairs of setting and seed; 12 to do" in out
    assert len(re.findall("^python train_cls.py ", out, re.M)) == 6 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("dry", [False, True])
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--methods", "real-only", "diff-ii", "--stage2_args", "--eta 0.5"],
            "sample_mp.py refuses 'sample diff-ii': --eta 0.5 with --sample_strategy diff-ii, which inverts images",
        ),
        (
            ["--methods", "real-only", "cutmix", "--stage3_args", "--unmixed_epochs 1 1"],
            "train_cls.py refuses 'classify cutmix': --unmixed_epochs 1 1: none of the --nepoch 2 epochs is left for mixing",
        ),
        (
            ["--methods", "real-only", "da-fusion", "--stage1_args", "--report_to clearml"],
            "train_lora.py refuses 'ti': --report_to clearml needs the package clearml",
        ),
        (
            ["--methods", "diff-mix+curriculum", "--num_inference_steps", "1"],
            "sample_mp.py refuses 'sample diff-mix+curriculum': --strength_strategy uniform: strength 0.3",
        ),
        (
            ["--methods", "real-only", "pseudo-label", "--unlabelled", "gone"],
            "gone: not there; expected a folder of images",
        ),
    ],
)
def test_flags_of_every_method_are_checked_before_anything_runs(argv, message, dry, image_folder, tmp_path, capsys):
    argv = [*arguments(image_folder, "base", tmp_path / "out", "--seeds", 1), *argv, *(["--dry_run"] if dry else [])]
    assert run_main(compare.main, argv) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1 and message in err[0] and not list(tmp_path.iterdir())


def test_commands_checked_without_a_checkpoint_refuse_nothing_that_the_methods_take(tmp_path):
    (tmp_path / "contexts.txt").write_text("in the snow\n")
    extra = ["--stage2_args", f"--contexts {tmp_path}/contexts.txt --context_steps 0.5", "--num_inference_steps", "4"]
    extra += ["--stage3_args", "--synthetic_balanced --weights none --target_class_num 2"]
    (job,) = compare.jobs_of(
        parsed(["--dataset", "elpv", "--seeds", "1", "--methods", "inversion-mix", "--aug_strength", "0.02", *extra]),
        tmp_path,
    )
    steps = job.pair.steps.values()
    instead = [*checks.sample_checks(job.commands, ["inversion-mix"]), *checks.classify_checks(job.commands, steps)]
    checks.check_flags([*steps, *instead], ROOT / "config")
    assert [step.arguments[-2:] for step in instead] == [
        ("--contexts", f"{tmp_path}/contexts.txt"),
        ("--weights", "none"),
    ]
    real = StageCommands(job.commands.recipe, 1, tmp_path).method_steps(["real-only", "inversion-mix"])
    (refused,) = checks.classify_checks(job.commands, real.values())
    with pytest.raises(UserError, match="'classify real-only': --synthetic_balanced: there are no synthetic images"):
        checks.check_flags([refused], ROOT / "config")


@pytest.mark.slow
def test_a_dry_run_checks_data_base_model_and_classifier_and_leaves_no_trace(image_folder, tiny_base, tmp_path, capsys):
    argv = arguments(image_folder, tiny_base, tmp_path / "out", "--seeds", 1, "--methods", "diff-mix", "--dry_run")
    good = [*argv, "--stage3_args", "--weights none --synthetic_balanced"]
    assert run_main(compare.main, good) == 0, capsys.readouterr().err
    assert "3 runs (1 of stage 1, 1 of stage 2, 1 of stage 3)" in capsys.readouterr().out
    for flags, message in (
        (["--model", "resnet1800"], "train_cls.py refuses: unknown --model 'resnet1800'"),
        (["--pretrained_model_name_or_path", str(tmp_path / "gone")], "sample_mp.py refuses: base model folder '"),
    ):
        assert run_main(compare.main, [*argv, *flags]) == 2
        err = capsys.readouterr().err.strip().splitlines()
        assert len(err) == 1 and message in err[0]
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------- the runner

SCRIPT = """
import pathlib, signal, sys, time
kind, folder, seconds = sys.argv[1], pathlib.Path(sys.argv[2]), float(sys.argv[3])
folder.mkdir(parents=True, exist_ok=True)
with open(folder / "runs.txt", "a") as out: out.write(kind + "\\n")
try: time.sleep(seconds)
except KeyboardInterrupt: (folder / "interrupted").touch(); sys.exit(130)
if kind == "bad": print("some noise"); print("error: no such class", file=sys.stderr); sys.exit(2)
(folder / (kind + ".json")).write_text("{}")
"""


@pytest.fixture
def make_pair(tmp_path):
    """A pair whose steps are small scripts: a writes a.json, b needs it, and so on."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def make(folder, kinds="ab", seconds=0.0):
        created = {}
        for stage, kind in enumerate(kinds, 4 - len(kinds)):
            argv = (str(script), kind, str(folder), str(seconds))
            needs = tuple(created)[-1:]
            created[kind] = Step(kind, stage, argv, needs, f"{kind}.json", {})
        return runner.Pair(folder, created)

    return make


def runs(folder):
    return (folder / "runs.txt").read_text().split()


def test_steps_run_once_and_only_what_is_needed_is_repeated(make_pair, tmp_path):
    pair = make_pair(tmp_path / "pair", seconds=0.1)
    for name in pair.missing():
        pair.run(name)
    assert runs(pair.folder) == ["a", "b"] and pair.missing() == []
    (pair.folder / "a.json").unlink()
    assert pair.missing() == []  # the result is there, nothing needs a
    (pair.folder / "b.json").unlink()
    assert pair.missing() == ["a", "b"]
    for name in pair.missing():
        pair.run(name)
    (pair.folder / "b.json").write_text('{"top1": 0.')  # cut off
    assert pair.missing() == ["b"]
    record = pair.records["a"]
    assert record["done"] and record["seconds"] > 0 and record["command"].startswith("python ")


def test_images_whose_pool_was_moved_are_linked_again(tmp_path):
    step = Step("label", 3, (), (), "pseudo-label/meta.csv", {})
    pair, link = runner.Pair(tmp_path / "pair", {"label": step}), tmp_path / "pair/pseudo-label/data/toad/000000.png"
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "pool.png")
    (pair.folder / step.result).touch()
    (tmp_path / "pool.png").touch()
    pair._record(step, 1.0, True)
    assert pair.done("label")
    (tmp_path / "pool.png").rename(tmp_path / "moved.png")
    assert not pair.done("label")


def test_a_failed_step_says_why_and_where_the_rest_is(make_pair, tmp_path):
    pair = runner.Pair(tmp_path / "set" / "seed1", {})
    pair.steps = make_pair(pair.folder, ["bad"]).steps
    with pytest.raises(
        UserError, match=r"set, seed1: step 'bad' ended with status 2: no such class \(whole output: .*bad.log"
    ):
        pair.run("bad")
    assert "some noise" in (pair.folder / "logs" / "bad.log").read_text() and pair.missing() == ["bad"]


def test_a_refused_stage_says_what_resumes_and_what_is_another_request(tmp_path):
    pair = runner.Pair(
        tmp_path / "set" / "seed1", {"c": Step("c", 3, ("train_cls.py", "--no_such_flag"), (), "c.json", {})}
    )
    with pytest.raises(UserError, match="unknown argument --no_such_flag") as caught:
        pair.run("c")
    text = str(caught.value)
    assert (
        "once the cause is fixed, the same command resumes from here; with other flags, a corrected --stageN_args"
        in text
    )
    assert text.endswith("it is another request: give another --output_dir")


DRIVER = """
import sys; sys.path.insert(0, {root!r})
from semantic_aug.errors import run_main
from semantic_aug.evaluation.experiments import runner
from semantic_aug.evaluation.experiments.commands import Step
def main(argv):
    step = Step("a", 3, ({script!r}, "a", {folder!r}, "60"), (), "a.json", {{}})
    pair = runner.Pair(__import__("pathlib").Path({folder!r}), {{"a": step}})
    with runner.interruptible(), runner.pair_lock(pair.folder) as held:
        pair.run("a", held)
sys.exit(run_main(main))
"""


def begun(make_pair, tmp_path):
    """A process of its own in the middle of a long step."""
    folder = tmp_path / "pair"
    make_pair(folder)
    code = DRIVER.format(root=str(ROOT), script=str(tmp_path / "script.py"), folder=str(folder))
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, start_new_session=True)
    for _ in range(6000):
        if (folder / "runs.txt").exists():
            time.sleep(0.3)
            return process, folder
        time.sleep(0.05)
    raise AssertionError("the step did not begin")


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_stops_the_child_gently(kind, make_pair, tmp_path):
    process, folder = begun(make_pair, tmp_path)
    os.kill(process.pid, kind)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130 and "the same command resumes from there" in err
    assert (folder / "interrupted").exists()  # the child had its chance to save
    record = json.loads((folder / "steps.json").read_text())["a"]
    assert not record["done"] and record["seconds"] > 0


def test_a_killed_parent_takes_its_child_along_and_the_pair_is_free_then(make_pair, tmp_path):
    process, folder = begun(make_pair, tmp_path)
    with runner.pair_lock(folder) as held:
        assert held is None
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    for _ in range(6000):
        with runner.pair_lock(folder) as held:
            if held is not None:
                break
        time.sleep(0.05)
    assert held is not None and not (folder / "a.json").exists()


def test_pairs_another_process_has_are_waited_for_and_not_run_twice(make_pair, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(compare, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(report, "write_comparison", lambda folder: None)
    pairs = [make_pair(tmp_path / f"pair{i}", "a") for i in range(2)]
    commands = [StageCommands(recipe(), i, pair.folder) for i, pair in enumerate(pairs)]
    jobs = [compare.Job(*both, ("real-only",)) for both in zip(commands, pairs, strict=True)]
    other_ends = logging.Handler()
    other_ends.emit = lambda record: other.close() if "waiting" in record.msg else None  # its pair undone
    monkeypatch.setattr(compare.log, "handlers", [other_ends])
    caplog.set_level("INFO", "semantic_aug")
    pairs[0].folder.mkdir()
    other = open(pairs[0].folder / ".lock", "a")  # noqa: SIM115 - closed when the other process is to end
    fcntl.flock(other, fcntl.LOCK_EX)
    compare.run_jobs(jobs, tmp_path, tmp_path, "all")
    assert caplog.text.count("waiting for another process") == 1
    assert all(runs(pair.folder) == ["a"] for pair in pairs)
    compare.run_jobs(jobs, tmp_path, tmp_path, "all")
    assert all(runs(pair.folder) == ["a"] for pair in pairs)


def test_shards_have_every_pair_once(tmp_path):
    args = parsed(["--dataset", "elpv", "--examples_per_class", "5", "10", "--seeds", "1", "2", "3"])
    jobs = compare.jobs_of(args, tmp_path)
    shards = [jobs[i::4] for i in range(4)]
    assert sorted(str(j.pair.folder) for part in shards for j in part) == sorted(str(j.pair.folder) for j in jobs)


# ------------------------------------------------------------------------------------------------------- the report


def finished(folder, setting, method, seed, top1, macro, steps_taken=8, splits=("test", "val")):
    """Writes what a finished classifier leaves, on a data set with some of the splits."""
    path = results.pair_folder(folder, setting, seed)
    (path / "classify" / method).mkdir(parents=True)
    scores = {"test": {"top1": top1, "macro": macro, "loss": 1.0}, "val": {"top1": top1 - 0.01, "macro": macro}}
    content = {split: scores[split] if split in splits else None for split in scores} | {"steps": steps_taken}
    (path / "classify" / method / "results.json").write_text(json.dumps(content))
    records = runner.read_records(path)
    records[f"classify {method}"] = {
        "stage": 3,
        "seconds": 36.0,
        "done": True,
        "command": f"python train_cls.py {method}",
    }
    if METHODS[method].strategy:
        records["ti_db"] = {"stage": 1, "seconds": 100.0, "done": True, "command": "python train_lora.py"}
        command = f"python sample_mp.py --finetune_model_key ti_db --sample_strategy {method}"
        records[f"sample {method}"] = {"stage": 2, "seconds": 50.0, "done": True, "command": command}
    (path / "steps.json").write_text(json.dumps(records))


@pytest.fixture
def partial(tmp_path):
    """A comparison of two seeds of which one of six classifiers is missing."""
    results.claim_setting(tmp_path, recipe())
    results.save_request(tmp_path, ["--dataset", "elpv"], ["5shot"], [1, 2], ["real-only", "cutmix", "diff-mix"])
    finished(tmp_path, "5shot", "real-only", 1, 0.50, 0.40)
    finished(tmp_path, "5shot", "real-only", 2, 0.52, 0.44)
    finished(tmp_path, "5shot", "diff-mix", 1, 0.60, 0.50)
    finished(tmp_path, "5shot", "diff-mix", 2, 0.64, 0.56)
    finished(tmp_path, "5shot", "cutmix", 1, 0.55, 0.45)
    return tmp_path


def test_the_report_has_hand_computed_numbers_and_says_what_is_missing(partial):
    report.write_comparison(partial)
    text = (partial / "report.md").read_text()
    assert "5 of 6 classifiers are finished." in text and "Missing: 5shot cutmix seed 2." in text
    assert "| real-only | 2 | 51.00 ± 1.41 | 42.00 ± 2.83 | 50.00 ± 1.41 | 8 |" in text
    assert "| cutmix | 1 | 55.00 | 45.00 | 54.00 | 8 |" in text
    # differences 10 and 12 points: mean 11, s = sqrt 2, t(0.975, 1) = 12.7062, half width 12.7062; macro 10 and 12 too
    row = "| diff-mix | +11.00 [-1.71, 23.71] | +5.00 (one seed) | +11.00 [-1.71, 23.71] | +5.00 (one seed) |"
    assert row in text
    assert "| 5shot | 3 classify | 5 | 0.05 | 36 s |" in text and "| 5shot | 1 fine-tune | 2 | 0.06 | 2 min |" in text
    rows = list(csv.DictReader((partial / "results.csv").open()))
    assert len(rows) == 5 and [r["method"] for r in rows] == ["real-only"] * 2 + ["cutmix"] + ["diff-mix"] * 2
    assert rows[3] == {
        "setting": "5shot", "method": "diff-mix", "seed": "1", "top1": "0.6", "macro": "0.5", "val_top1": "0.59",
        "val_macro": "0.5", "steps": "8", "seconds_stage1": "100.0", "seconds_stage2": "50.0", "seconds_stage3": "36.0",
        "split": "test",
    }  # fmt: skip
    assert (partial / "report.png").read_bytes().startswith(b"\x89PNG")
    assert (partial / "commands.sh").read_text().count("python train_cls.py") == 5
    assert "| method | seeds | test top1 | test macro | validation top1 | steps |" in text
    assert "| method | test top1 - real-only | test top1 - cutmix |" in text and "on these test images" in text
    assert "Validation chooses the epoch, test is evaluated once." in text and "no test split" not in text


def test_differences_over_fewer_seeds_than_the_method_has_say_so(partial):
    finished(partial, "5shot", "cutmix", 2, 0.55, 0.47)
    finished(partial, "5shot", "diff-mix", 3, 0.70, 0.60)
    for seed in (1, 2, 3):
        finished(partial, "5shot", "pseudo-label", seed, 0.60 + seed / 100, 0.5 + seed**2 / 100)
    results.save_request(
        partial, ["--seeds"], ["5shot"], [1, 2, 3], ["real-only", "cutmix", "diff-mix", "pseudo-label"]
    )
    report.write_comparison(partial)
    text = (partial / "report.md").read_text()
    # to cutmix 5 and 9 points, to pseudo-labels -1, 2 and 7
    row = next(line for line in text.splitlines() if line.startswith("| diff-mix | +"))
    assert "| +7.00 [-18.41, 32.41] (2 seeds) | +2.67 [-7.37, 12.71] |" in row
    assert "test macro - pseudo-label" in text


def test_the_report_says_where_methods_took_other_steps(partial):
    finished(partial, "5shot", "real-only", 3, 0.50, 0.40, steps_taken=9)  # of another draw
    results.save_request(partial, ["--seeds"], ["5shot"], [1, 2, 3], ["real-only", "cutmix", "diff-mix"])
    report.write_comparison(partial)
    assert "all methods have the same optimisation steps and, where" in (partial / "report.md").read_text()
    finished(partial, "5shot", "cutmix", 2, 0.50, 0.40, steps_taken=6)  # stopped by --patience
    report.write_comparison(partial)
    assert "all methods have different optimisation steps (see the tables) and" in (partial / "report.md").read_text()


def test_the_worst_class_is_read_from_the_predictions(partial):
    for method, seed, *right in (("real-only", 1, 25, 0), ("real-only", 2, 12, 14), ("diff-mix", 1, 15, 15)):
        rows = [
            f"{i},{name},{name if 25 - n <= i else '?'}" for name, n in zip("ab", right, strict=True) for i in range(25)
        ]
        path = partial / "5shot" / f"seed{seed}" / "classify" / method / "test_predictions.csv"
        path.write_text("\n".join(["file,class,predicted", *rows]) + "\n")
    report.write_comparison(partial)
    rows = list(csv.DictReader((partial / "results.csv").open()))
    assert [row["worst_class"] for row in rows] == ["0", "0.48", "", "0.6", ""]  # two are of an earlier version
    text = (partial / "report.md").read_text()
    assert "| method | seeds | test top1 | test macro | test worst_class | validation top1 | steps |" in text
    assert "| real-only | 2 | 51.00 ± 1.41 | 42.00 ± 2.83 | 24.00 ± 33.94 | 50.00 ± 1.41 | 8 |" in text
    assert (
        "| diff-mix | +11.00 [-1.71, 23.71] | +5.00 (one seed) | +11.00 [-1.71, 23.71] | +5.00 (one seed) | +60.00"
        in text
    )
    path.write_text(path.read_text()[:-2])  # the last row is cut off: "24,b," for "24,b,b"
    report.write_comparison(partial)
    rows = list(csv.DictReader((partial / "results.csv").open()))
    assert [row["worst_class"] for row in rows] == ["0", "0.48", "", "", ""]


def test_scores_on_validation_are_called_so(tmp_path):
    results.claim_setting(tmp_path, recipe())
    results.save_request(tmp_path, ["--dataset", "elpv"], ["5shot"], [1, 2], ["real-only", "mixup"])
    for seed in (1, 2):
        finished(tmp_path, "5shot", "real-only", seed, 0.51, 0.4, splits=["val"])
        finished(tmp_path, "5shot", "mixup", seed, 0.61, 0.5, splits=["val"])
    report.write_comparison(tmp_path)
    for text in ((tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()):
        assert "There is no test split: scores are on the validation images, which chose the epoch as well" in text
        assert "test is evaluated once" not in text and "these test images" not in text and "test top1" not in text
        assert "on these validation images" in text
    text = (tmp_path / "report.md").read_text()
    assert "| method | seeds | validation top1 | validation macro | steps |" in text
    assert "| mixup | 2 | 60.00 ± 0.00 | 50.00 ± 0.00 | 8 |" in text
    assert "| method | validation top1 - real-only | validation macro - real-only |" in text
    row, *_ = csv.DictReader((tmp_path / "results.csv").open())
    assert "top1" not in row and (row["val_top1"], row["val_macro"], row["split"]) == ("0.5", "0.4", "val")
    finished(tmp_path, "10shot", "mixup", 1, 0.7, 0.6)  # another data set has one
    results.save_request(tmp_path, ["--dataset", "elpv"], ["10shot"], [1], ["mixup"])
    report.write_comparison(tmp_path)
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [(row["top1"], row["val_top1"], row["split"]) for row in rows[-2:]] == [
        ("", "0.6", "val"),
        ("0.7", "0.69", "test"),
    ]
    text = (tmp_path / "report.md").read_text()
    assert (
        "test is evaluated once. The others have no test split" in text and "| 1 | 70.00 | 60.00 | 69.00 | 8 |" in text
    )


def test_runs_without_any_split_have_a_report_without_scores(tmp_path):
    results.claim_setting(tmp_path, recipe())
    results.save_request(tmp_path, ["--dataset", "elpv"], ["5shot"], [1], ["real-only"])
    finished(tmp_path, "5shot", "real-only", 1, 0.5, 0.4, splits=[])
    report.write_comparison(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "have no scores" in text and "| real-only | 1 | 8 |" in text and not (tmp_path / "report.png").exists()


@pytest.mark.slow
def test_in_a_browser_the_report_shows_intervals_without_a_mouse_and_loads_nothing_from_outside(partial, browser):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    subset = partial / "5shot/seed1/aug_samples/diff-mix/elpv/diff-mix-Multi5"
    (subset / "gallery").mkdir(parents=True)
    for file in (subset / "meta.csv", subset / "gallery/index.html", partial / "5shot/seed1/ti_db/summary.json"):
        file.parent.mkdir(exist_ok=True)
        file.touch()
    report.write_comparison(partial)
    requests_outside(browser, partial)
    browser.get((partial / "report.html").as_uri())
    until(lambda: browser.execute_script("return document.querySelector('img').naturalWidth > 400"))
    figure = next(f for f in browser.find_elements("css selector", ".figure") if f.text == "51.00 ± 1.41")
    # seeds 50 and 52: mean 51, s = sqrt 2, t(0.975, 1) = 12.7062, half width 12.7062
    detail = "seed 1: 50.00\nseed 2: 52.00\n95 % interval of the mean: 38.29 to 63.71"
    tip = browser.find_element("id", figure.get_attribute("aria-describedby"))
    assert tip.get_attribute("textContent") == detail and not tip.is_displayed()
    ActionChains(browser).move_to_element(figure).perform()
    assert tip.is_displayed() and tip.rect["x"] >= 0
    ActionChains(browser).move_to_element(browser.find_element("css selector", "h1")).perform()
    assert not tip.is_displayed()
    press(browser, Keys.TAB)  # the first figure with a detail is the first thing that takes the focus
    assert browser.switch_to.active_element == figure and tip.is_displayed()
    check_contrasts(browser)
    names = {a.text: a.get_attribute("href") for a in browser.find_elements("css selector", "a")}
    assert set(names) == {"ti_db", "diff-mix-Multi5", "gallery", "real-only", "cutmix", "diff-mix"}
    assert all(Path(unquote(url.removeprefix("file://"))).exists() for url in names.values())
    number, outside = requests_outside(browser, partial)
    assert number >= 2 and not outside and not browser.get_log("browser")


def test_a_damaged_request_is_one_line(tmp_path):
    results.save_request(tmp_path, ["--dataset", "elpv"], ["5shot"], [1], ["real-only"])
    (file,) = results.requests_in(tmp_path)
    for text in ("settings: [5shot", ""):
        file.write_text(text)
        with pytest.raises(UserError, match=f"{file.name} is damaged"):
            results.collect(tmp_path)


def test_requests_add_up_and_another_budget_is_refused(partial):
    results.save_request(partial, ["--dataset", "elpv"], ["5shot"], [1, 2], ["real-only", "cutmix", "diff-mix"])
    results.save_request(partial, ["--seeds", "3"], ["5shot", "10shot"], [3], ["real-only"])
    result = results.collect(partial)
    assert len(result.commands) == 2 and result.settings == ["5shot", "10shot"] and len(result.missing) == 3
    for flag, value, difference in (
        ("--multiplier", "7", "sample.syn_dataset_multiplier: 5.0 -> 7.0"),
        ("--val_fraction", "0.2", "shared.val_fraction: '0.1 by default' -> 0.2"),
        ("--lr", "0.2", "classify.lr: 'by default' -> 0.2"),
    ):
        with pytest.raises(UserError, match=rf"other arguments \({difference}\)"):
            results.claim_setting(partial, recipe(flag, value))


def test_a_setting_keeps_what_recipes_set_in_its_stages(tmp_path):
    (job,) = compare.jobs_of(parsed(["--dataset", "elpv", "--seeds", "1", "--model", "resnet18"]), tmp_path)

    def claim(lr):
        row = f"{{when: {{model: resnet18}}, set: {{lr: {lr}}}}}"
        (tmp_path / "recipes.yaml").write_text(f"# rates\ndefault: {{train_cls: [{row}]}}\n")
        results.claim_setting(tmp_path / "out", job.commands.recipe, checks.recipes_in_effect(job.commands, tmp_path))

    claim(0.1)
    (tmp_path / "recipes.yaml").write_text("")
    claim(0.1)
    with pytest.raises(UserError, match="stage3_recipe: 'default: lr 0.1' -> 'default: lr 0.2'.*choose another"):
        claim(0.2)
    results.claim_setting(tmp_path / "old", job.commands.recipe)  # an earlier version's record
    results.claim_setting(tmp_path / "old", job.commands.recipe, checks.recipes_in_effect(job.commands, tmp_path))


def test_a_pair_takes_corrected_recipes_until_it_has_finished_a_step_and_follows_data_sets(tmp_path):
    pair, copy = tmp_path / "pair", tmp_path / "pair" / "config" / "recipes.yaml"
    for text, done, wanted in (("a: 1", None, "a: 1"), ("a: 2", False, "a: 2"), ("a: 3", True, "a: 2")):
        for name in ("datasets.yaml", "recipes.yaml"):
            (tmp_path / name).write_text(text)
        if done is not None:
            (pair / runner.STEPS_FILE).write_text(json.dumps({"ti_db": {"stage": 1, "seconds": 1.0, "done": done}}))
        runner.prepare_config(pair, tmp_path)
        assert copy.read_text() == wanted and copy.with_name("datasets.yaml").read_text() == text  # moved ones


def test_a_pair_that_was_moved_finds_its_own_files(tmp_path):
    former, base = tmp_path / "former" / "5shot" / "seed1", tmp_path / "base"
    subset, tokens = former / "aug_samples/real-mix/elpv/subset", former / "ti/learned_embeds.safetensors"
    for folder in (subset, tokens, base):
        folder.mkdir(parents=True)
    registry.register(registry.SUBSETS, "elpv", "real-mix", str(subset), former / "config")
    entry = {"model_path": str(base), "lora_path": None, "embed_path": str(tokens)}
    registry.register(registry.CHECKPOINTS, "elpv", "ti", entry, former / "config")
    pair = (tmp_path / "former").rename(tmp_path / "moved") / "5shot" / "seed1"
    runner.prepare_config(pair, tmp_path)
    assert registry.subsets("elpv", "real-mix", pair / "config") == [str(pair / "aug_samples/real-mix/elpv/subset")]
    checkpoint = registry.look_up("elpv", "ti", registry.CHECKPOINTS, pair / "config", "", "")
    assert checkpoint == {**entry, "embed_path": str(pair / "ti/learned_embeds.safetensors")}


def test_stage_3_checks_every_new_setting_before_the_first_run(tmp_path, monkeypatch):
    argv = ["--dataset", "elpv", "--examples_per_class", "5", "-1", "--nepoch", "40", "4", "--methods", "diff-mix"]
    jobs, checked = compare.jobs_of(parsed(argv), tmp_path), []
    monkeypatch.setattr(checks, "check_commands", lambda steps, folder: checked.append((folder.name, steps)) or [])
    compare.check_stages(jobs, tmp_path, tmp_path)
    (first, steps), (second, (alone,)) = checked
    assert [step.arguments[step.arguments.index("--sample_strategy") + 1] for step in steps if step.stage == 2] == [
        "real-mix"
    ]
    assert (first, second) == ("5shot", "all") and sorted(step.stage for step in steps) == [1, 2, 3]
    assert "--nepoch 4 " in shlex.join(alone.arguments) and "--nepoch 40 " in shlex.join(steps[0].arguments)


def test_confusions_need_validation_images(tmp_path, animals):
    (job,) = compare.jobs_of(parsed(["--dataset", "elpv", "--seeds", "1", "--methods", "diff-mix+confusion"]), tmp_path)
    compare.refuse_without_validation(job, animals)
    with pytest.raises(UserError, match=r"--methods diff-mix\+confusion: animals.* has no validation images"):
        compare.refuse_without_validation(job, dataclasses.replace(animals, val=None))


def test_the_words_that_share_the_work_are_no_part_of_a_request():
    argv = ["--dataset", "x", "--num_shards", "2", "--shard_index=1", "--report_only", "--seeds", "1"]
    assert compare._request_arguments(argv) == ["--dataset", "x", "--seeds", "1"]


# ---------------------------------------------------------------------------------------------------- from end to end


def test_a_pair_belongs_to_its_images_and_its_base_model(image_folder, tiny_base, tmp_path):
    for name, folder in (("animals", image_folder), ("base", tiny_base)):
        shutil.copytree(folder, tmp_path / name)
    argv = ["--dataset", f"folder:{tmp_path}/animals", "--pretrained_model_name_or_path", str(tmp_path / "base")]
    budget = compare.recipe_of(parsed(argv))

    def claim(*stages):
        commands = StageCommands(budget, 1, tmp_path / "pair")
        dataset = runner.claim_data(commands, ROOT / "config")
        if 1 in stages:
            runner.claim_base(commands, dataset)

    claim(3)
    claim(1, 2, 3)  # methods that need a base model may come later
    claim(3)
    weights = tmp_path / "base/vae/diffusion_pytorch_model.safetensors"
    exchange(weights, weights.read_bytes()[:-1] + bytes([weights.read_bytes()[-1] ^ 1]))
    with pytest.raises(UserError, match="made from other data .base_model: .*choose another --output_dir"):
        claim(1, 2, 3)
    (tmp_path / "animals/test/toad/test000.png").unlink()
    with pytest.raises(UserError, match="test: 8 images now, 9 when the run began.*choose another --output_dir"):
        claim(3)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / runner.STEPS_FILE).write_text('{"ti_db": {"done": true}}')
    with pytest.raises(UserError, match="does not say which images its steps were made from"):
        runner.claim_data(StageCommands(budget, 1, tmp_path / "old"), ROOT / "config")


def test_a_damaged_image_is_refused_before_a_pair_is_recorded_and_may_be_replaced(image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "animals")
    budget, checked = compare.recipe_of(parsed(["--dataset", f"folder:{tmp_path}/animals"])), set()
    commands = StageCommands(budget, 1, tmp_path / "pair")
    image = tmp_path / "animals/test/toad/test000.png"
    whole = image.read_bytes()
    image.write_bytes(whole[: len(whole) // 2])  # the header is sound
    with pytest.raises(UserError, match="test000.png cannot be decoded .*replace it or remove it"):
        runner.claim_data(commands, ROOT / "config", True, checked)
    assert not (tmp_path / "pair").exists()
    image.write_bytes(whole)
    for dry_run in (True, False):
        dataset = runner.claim_data(commands, ROOT / "config", dry_run, checked)
    assert len(checked) == sum(map(len, (dataset.train, dataset.val, dataset.test)))


@pytest.mark.slow
def test_a_comparison_from_end_to_end_killed_and_gone_on_with(image_folder, tiny_base, tmp_path):
    out = tmp_path / "out"
    argv = arguments(
        image_folder, tiny_base, out, "--seeds", 1, "--methods", "real-only", "diff-mix", "--keep", "results"
    )
    command = [sys.executable, "-m", "semantic_aug.evaluation", "compare", *argv]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    steps_file = out / "2shot" / "seed1" / "steps.json"
    while process.poll() is None and not steps_file.exists():  # the first classifier is done
        time.sleep(0.1)
    process.kill()
    process.wait()
    first = json.loads(steps_file.read_text())["classify real-only"]
    status, printed, err = main_here(dispatcher.main, ["compare", *argv])
    assert status == 0, err
    assert "2 of 2 classifiers" in printed
    records = json.loads(steps_file.read_text())
    assert records["classify real-only"] == first and all(entry["done"] for entry in records.values())
    assert not (out / "2shot" / "seed1" / "aug_samples").exists()
    text = (out / "report.md").read_text()
    assert "2 of 2 classifiers are finished." in text and "diff-mix" in text
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert rows[0]["steps"] == rows[1]["steps"] == "4"
    status, printed, err = main_here(dispatcher.main, ["compare", *argv])
    assert status == 0 and "train_cls.py" not in printed + err  # nothing is left to do
