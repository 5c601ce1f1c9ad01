"""The search for settings: halving, budgets, parts of a pool, and what it chooses where the answer is known."""

import dataclasses
import itertools
import json
import shlex
import statistics

import numpy as np
import pytest
import yaml
from helpers import ROWS, classify_arguments, main_here, run_here, write_subset

import sample_mp
import tiny
import train_cls
from semantic_aug import cli
from semantic_aug.augmentations.strategies import STRATEGIES
from semantic_aug.classify import run
from semantic_aug.classify.config import read_config
from semantic_aug.datasets.synthetic import SyntheticImages
from semantic_aug.errors import UserError, run_main
from semantic_aug.evaluation import __main__ as dispatcher
from semantic_aug.evaluation.experiments import halving, results, tune
from semantic_aug.evaluation.experiments.grid import PLAN_FILE, Candidate, GridSettings

DEFAULT = Candidate(0.7, 0.5, 0.3, 5.0)


def settings_of(*argv):
    """What a search chooses among."""
    args = tune.build_parser().parse_args(["--dataset", "elpv", *argv])
    return cli.read_settings(GridSettings, args)


def grid():
    return settings_of("--labels", "strength", "--probs", "0.1", "0.3", "0.5").candidates(0)


def test_candidates_are_the_grid_the_default_first():
    result, values = grid(), itertools.product([0.5, 0.7, 0.9], [0.3, 0.5, 0.8], [0.1, 0.3, 0.5], [2.0, 5.0])
    assert set(result) == {Candidate(*candidate) for candidate in values}
    assert result[0] == DEFAULT and len(result) == 54 and result == grid()


def test_the_default_search_has_high_probabilities_and_teacher_labels():
    result = settings_of().candidates(0)
    assert result[0] == DEFAULT and {c.probability for c in result} == {0.1, 0.3, 0.5, 0.7}
    by_labels = {labels: [c for c in result if c.labels == labels] for labels in ("strength", "teacher")}
    assert len(by_labels["strength"]) == 72 and len(by_labels["teacher"]) == 24 == len(result) - 72
    assert {c.gamma for c in by_labels["teacher"]} == {0.5}  # which has no part in them
    assert len({c.name for c in result}) == len(result) and DEFAULT.name == "s0.7-g0.5-p0.3-m5"


def test_labels_of_one_class_do_not_depend_on_gamma_whoever_gives_them():
    argv = ["--strategy", "diff-mix", "diff-aug", "--labels", "mixed", "--gammas", "0.3", "0.5", "0.8"]
    result = [c for c in settings_of(*argv).candidates(0) if c.labels == "mixed"]
    assert {c.gamma for c in result if c.strategy == "diff-aug"} == {0.5}
    assert {c.gamma for c in result if not c.strategy} == {0.3, 0.5, 0.8}


def test_a_search_keeps_its_grid(tmp_path):
    grid, plan = settings_of(), tmp_path / PLAN_FILE
    assert grid.resumed(tmp_path) == grid
    plan.write_text(json.dumps({"asked": {}, "trials": 9, "grid": dataclasses.asdict(grid)}))
    assert settings_of("--labels", "strength", "teacher").resumed(tmp_path) == grid
    with pytest.raises(UserError, match="other values: give --probs 0.1 0.3 0.5 0.7 --labels strength teacher, or"):
        settings_of("--probs", "0.3", "--labels", "mixed").resumed(tmp_path)
    plan.write_text(json.dumps({"asked": {}, "trials": 9}))  # begun when there were fewer candidates by default
    former = settings_of("--gammas", "0.3", "0.8").resumed(tmp_path)
    assert former == settings_of("--gammas", "0.3", "0.8", "--probs", "0.1", "0.3", "0.5", "--labels", "strength")


def test_every_strategy_can_be_searched(tmp_path):
    names, without_strength = list(STRATEGIES), {"diff-gen", "real-gen", "da-fusion", "diff-ii"}
    argv = ["--strategy", *names, "--strengths", "0.7", "--probs", "0.3", "--multipliers", "5"]
    result = settings_of(*argv).candidates(0)
    of = {name: [c for c in result if c.strategy == name] for name in names[1:]}
    # a start from noise has no strength, da-fusion draws its own, and a label of one class does not depend on gamma
    for name in ("diff-gen", "da-fusion"):
        assert sorted(c.name for c in of[name]) == [f"{name}-g0.5-p0.3-m5", f"{name}-g0.5-p0.3-m5-teacher"]
    assert sorted(c.name for c in of["diff-aug"]) == [
        "diff-aug-s0.7-g0.5-p0.3-m5",
        "diff-aug-s0.7-g0.5-p0.3-m5-teacher",
    ]
    tuning = tune.tuning_of(tune.build_parser().parse_args(["--dataset", "elpv", *argv]), tmp_path)
    for name, step in tuning.pair.steps.items():
        if step.stage == 2:
            args = sample_mp.build_parser().parse_args(list(step.arguments[1:]))
            assert name == f"sample {args.register_key}" and args.register_key in {c.subset for c in result}
            assert args.register_key.startswith(args.sample_strategy) or args.register_key == "s0.7"
            assert ("--aug_strength" in step.arguments) == (args.sample_strategy not in without_strength)
    assert len({s.name for s in tuning.pair.steps.values() if s.stage == 2}) == len(names)


@pytest.mark.parametrize(
    ("first", "seeds", "sizes"), [(54, 3, [54, 18, 6]), (5, 3, [5, 2, 2]), (2, 4, [2, 2, 2, 2]), (1, 2, [1, 1])]
)
def test_rungs_keep_a_third_and_two_at_least(first, seeds, sizes):
    assert halving.rungs(first, seeds) == sizes


def test_the_search_fits_the_trials():
    for trials in range(6, 90):
        first = halving.affordable(trials, 54, 3)
        assert sum(halving.rungs(first, 3)) <= trials
        assert first == 54 or sum(halving.rungs(first + 1, 3)) > trials
    assert halving.affordable(5, 54, 3) == 0 and halving.affordable(10**9, 54, 3) == 54


def planted(best, noise=0.02, better=0.08):
    """Scores of runs in which one candidate is better by some points, and every run is noisy."""
    runs = []

    def run(one, seed):
        runs.append((one, seed))
        rng = np.random.default_rng(
            [seed, *(int(100 * v) for v in (one.strength, one.gamma, one.probability, one.multiplier))]
        )
        return 0.5 + better * (one == best) + noise * rng.standard_normal()

    return run, runs


def test_a_planted_better_setting_is_chosen():
    best = Candidate(0.9, 0.3, 0.5, 5.0)
    run, runs = planted(best)
    chosen, scores = halving.search(grid(), [1, 2, 3], run)
    assert chosen == best and len(runs) == len(set(runs)) == 54 + 18 + 6
    assert len(scores[best]) == len(scores[DEFAULT]) == 3


def test_the_default_is_never_dropped_and_never_beaten_by_what_is_no_better():
    worse = lambda one, seed: 0.4 if one == DEFAULT else 0.5 + one.strength / 100  # noqa: E731
    chosen, scores = halving.search(grid(), [1, 2, 3], worse)
    assert chosen.strength == 0.9 and len(scores[DEFAULT]) == 3
    assert halving.search(grid(), [1, 2, 3], lambda one, seed: 0.5)[0] == DEFAULT  # of equals
    scores = {1: {"default": 0.5, "other": 0.6}, 2: {"default": 0.6, "other": 0.5}}  # equal means, of other orders
    assert halving.search(["default", "other"], [1, 2], lambda one, seed: scores[seed][one])[0] == "default"
    for seed in range(20):  # at least as good as the default on validation, whatever the noise
        run, _ = planted(None, noise=0.1)
        chosen, scores = halving.search(grid()[:12], [seed, seed + 100], run)
        assert statistics.fmean(scores[chosen].values()) >= statistics.fmean(scores[DEFAULT].values())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seeds", "1"], "--seeds 1: expected two or more"),
        (["--trials", "5"], "--trials 5: the smallest search has 6 runs"),
        (["--strategy", "diff-gen"], "--strategy diff-gen: it takes no --strengths; name one first that does"),
        (["--strategy", "da-fusion"], "--strategy da-fusion: it takes no --strengths; name one first that does"),
        (["--strengths", "1.5"], "1.5: expected a number in (0, 1]"),
        (["--stage3_args", "--output_dir x"], "--stage3_args: --output_dir is set for each run already"),
        (["--stage2_args", "--strength_strategy uniform"], "--strength_strategy would replace each of --strengths"),
    ],
)
def test_mistakes_are_one_line(argv, message, capsys):
    assert run_main(dispatcher.main, ["tune", "--dataset", "elpv", *argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


# ------------------------------------------------------------------------------------------------ a part of a subset


def subset(targets):
    targets = np.asarray(targets)
    return SyntheticImages([f"{i}.png" for i in range(len(targets))], targets, targets, np.full(len(targets), 0.7))


def test_parts_of_a_subset_are_nested_and_even_over_targets():
    images = subset([0] * 10 + [1] * 10 + [2] * 4)
    parts = [images.at_most(n, seed=3) for n in range(1, 25)]
    for n, (small, large) in enumerate(zip(parts, parts[1:], strict=False), 1):
        assert len(small) == n and set(small.paths) < set(large.paths)
    assert np.bincount(parts[11].target).tolist() == [4, 4, 4] and np.bincount(parts[17].target).tolist() == [7, 7, 4]
    assert images.at_most(99).paths == images.paths
    assert images.at_most(6, seed=4).paths != parts[5].paths


# ------------------------------------------------------------------------------------------------ with fake stages


def write_predictions(folder, right, images):
    """Predictions of one class, the first ``right`` of which are right."""
    output = [f"{i}.png,a,{'a' if i < right else 'b'}" for i in range(images)]
    (folder / "val_predictions.csv").write_text("\n".join(["file,class,predicted", *output]) + "\n")


@pytest.fixture
def search(tmp_path, tiny_base, monkeypatch):
    """A search whose subprocesses are replaced by a planted answer; returns what was run."""
    began, images, noisy = [], 200, False

    def fake(pair, name, held=None):
        step = pair.steps[name]
        began.append(name)
        if step.stage == 3:
            args = train_cls.build_parser().parse_args(list(step.arguments[1:]))
            good = (args.gamma == 0.8) + (args.syndata_max is None)
            score = {"top1": 0.5 + 0.1 * good, "macro": 0.3}
            if noisy and (args.gamma, args.synthetic_prob) == (0.3, 0.1):
                score["top1"] = 0.99 if args.seed == 1 else 0.6
            position = pair.folder / "classify" / name.removeprefix("classify ")
            position.mkdir(parents=True, exist_ok=True)
            (position / "results.json").write_text(json.dumps({"val": score, "test": score, "steps": 4}))
            if images:
                write_predictions(position, round(images * score["top1"]), images)
        elif step.stage == 2:
            position = pair.folder / "aug_samples" / name.removeprefix("sample ") / "elpv" / "subset"
            (position / "data" / "fox").mkdir(parents=True)
            (position / "data" / "fox" / "0.png").touch()
            (position / "meta.csv").write_text("")
            (position / "config.yaml").write_text(yaml.safe_dump({"images": 200, "arguments": {}}))
        else:
            (pair.folder / name).mkdir(parents=True)
            (pair.folder / name / "summary.json").write_text("{}")
        pair._record(step, 36.0, True)

    monkeypatch.setattr(tune.Pair, "run", fake)
    monkeypatch.setattr(tune, "check_stages", lambda *_: [])

    def start(*argv, val_images=200, noisy_gamma=False):
        nonlocal images, noisy
        images, noisy = val_images, noisy_gamma
        began.clear()
        given = [
            "--dataset",
            "elpv",
            "--pretrained_model_name_or_path",
            str(tiny_base),
            "--examples_per_class",
            "5",
            "--output_dir",
            str(tmp_path),
            "--seeds",
            "1",
            "2",
            *argv,
        ]
        return run_main(tune.main, given), list(began)

    return start


def test_the_whole_search_reports_registers_and_goes_on(search, tmp_path, capsys):
    argv = ["--trials", "30", "--register_key", "best", "--config_dir", str(tmp_path / "config")]
    status, began = search(*argv)
    out = capsys.readouterr().out
    assert status == 0 and began[:4] == ["ti_db", "sample s0.5", "sample s0.7", "sample s0.9"]
    assert sum(name.startswith("classify") for name in began) <= 30
    assert "chosen: s" in out and "-g0.8-" in out and "-m5;" in out
    registered = yaml.safe_load((tmp_path / "config" / "synthetic_datasets.yaml").read_text())
    command = out.strip().splitlines()[-1]
    args = train_cls.build_parser().parse_args(shlex.split(command)[2:])
    assert args.gamma == 0.8 and args.syndata_key == ["best"] and args.subset_seed == 0 and args.syndata_max is None
    report = (tmp_path / "5shot" / "report.md").read_text()
    assert registered["elpv"]["best"].endswith("elpv/subset") and registered["elpv"]["best"] in report
    assert any("-teacher-seed" in name for name in began) and "| labels | strength | gamma |" in report
    assert "(chosen)" in report and command in report and "s0.7-g0.5-p0.3-m5 (default)" in report
    assert (tmp_path / "5shot" / "report.png").exists() and "the default;" not in report
    assert search(*argv) == (0, [])  # all is done


def test_a_key_that_another_subset_has_is_refused_before_the_search(search, tmp_path, capsys):
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "synthetic_datasets.yaml").write_text("elpv: {best: outputs/aug_samples/elpv/other}")
    assert search("--register_key", "best", "--config_dir", str(tmp_path / "config")) == (2, [])
    assert "already has elpv/best with another entry" in capsys.readouterr().err


def test_few_validation_images_do_not_take_the_defaults_place(search, tmp_path, capsys):
    # ahead by ten points under every seed, which is two images of twenty, the same two
    argv = ["--trials", "30", "--register_key", "best", "--config_dir", str(tmp_path / "config")]
    assert search(*argv, val_images=20)[0] == 0
    out, report = capsys.readouterr().out, (tmp_path / "5shot" / "report.md").read_text()
    assert "chosen: s0.7-g0.5-p0.3-m5 (the default; s" in out and "within what chance does" in out
    assert (
        "strategy diff-mix, labels strength), the default; s" in report
        and "--gamma 0.5" in out
        and "+10.00 [-" in report
    )
    command = out.strip().splitlines()[-1]
    args = train_cls.build_parser().parse_args(shlex.split(command)[2:])
    assert (args.gamma, args.synthetic_prob, args.syndata_max) == (0.5, 0.3, None)


def test_a_clear_lead_counts_though_another_has_a_better_mean(search, tmp_path, capsys):
    assert search("--trials", "40", "--labels", "strength", "--multipliers", "5", noisy_gamma=True)[0] == 0
    out, report = capsys.readouterr().out, (tmp_path / "5shot" / "report.md").read_text()
    assert "-g0.8-" in out.partition(" (clearly ahead of the default; s")[0] and "-g0.3-" in out.partition("; s")[2]
    assert "-g0.8-" in report.partition(", clearly ahead of the default; s")[0]


def test_a_search_without_validation_images_is_refused_before_the_pool_is_made(search, tiny_base, tmp_path, capsys):
    images = tiny.write_image_folder(tmp_path / "images", train=3, val=0)
    argv = ["--dataset", f"folder:{images}", "--pretrained_model_name_or_path", str(tiny_base), "--seeds", "1", "2"]
    argv += ["--val_fraction", "0", "--output_dir", str(tmp_path / "out")]
    for dry in ([], ["--dry_run"]):
        assert run_main(tune.main, [*argv, *dry]) == 2
        assert "has no validation images to choose by: give --val_fraction" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("args.yaml"))  # which would refuse the correction


@pytest.mark.parametrize("dry", [False, True])
def test_flags_of_every_step_are_checked_before_anything_runs(dry, image_folder, tmp_path, capsys):
    argv = ["--dataset", f"folder:{image_folder}", "--strategy", "diff-mix", "inversion-mix", "--seeds", "1", "2"]
    argv += ["--stage2_args", "--eta 0.5 --scheduler ddim", "--output_dir", str(tmp_path / "out")]
    assert run_main(tune.main, [*argv, *(["--dry_run"] if dry else [])]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1 and "refuses 'sample inversion-mix-s0.5': --eta 0.5 with --sample_strategy" in err[0]
    assert not list(tmp_path.rglob("*.*")) or not dry


def test_runs_without_predictions_are_one_line(search, capsys):
    assert search("--trials", "6", val_images=0)[0] == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("error: ") and "has no val_predictions.csv" in err and "remove that folder" in err


def test_a_run_whose_results_are_damaged_is_run_again(search, tmp_path):
    argv = [
        "--strengths",
        "0.7",
        "--gammas",
        "0.5",
        "0.8",
        "--probs",
        "0.3",
        "--multipliers",
        "5",
        "--labels",
        "strength",
    ]
    assert search(*argv)[0] == 0
    (folder,) = (tmp_path / "5shot" / "classify").glob("s0.7-g0.8-*-seed2")
    (folder / "results.json").write_text('{"val": {"top1"')
    assert search(*argv) == (0, [f"classify {folder.name}"])


def test_shares_add_up_to_each_score(tmp_path):
    rows = ["1,a,a,0", "2,a,b,0", "3,a,a,1", "4,b,a,1"]
    (tmp_path / "val_predictions.csv").write_text("\n".join(["file,class,predicted,group", *rows]) + "\n")
    run = results.read_predictions(tmp_path)
    assert run.files == ("1", "2", "3", "4") and run.right.tolist() == [True, False, True, False]
    assert run.shares("top1").sum() == 0.5 and run.shares("macro").sum() == pytest.approx(1 / 3)
    assert run.worst_class == 0
    assert run.shares("worst_group").sum() == 0.5 and run.strata("worst_group").tolist() == [0, 0, 1, 1]
    rows[2] = "3,a,b,1"
    (tmp_path / "val_predictions.csv").write_text("\n".join(["file,class,predicted,group", *rows]) + "\n")
    assert results.read_predictions(tmp_path).shares("worst_group").sum() == 0
    for damaged in (b"", b"file,class,predicted\n", b"file,class\n1,a\n", b"file,class,predicted\n1,a\n", b"\xff\xfe"):
        (tmp_path / "val_predictions.csv").write_bytes(damaged)
        with pytest.raises(UserError, match="val_predictions.csv is damaged: remove that folder"):
            results.read_predictions(tmp_path)


def test_a_smaller_multiplier_is_a_part_of_the_pool(search, tmp_path):
    search("--trials", "6", "--multipliers", "2", "5", "--seeds", "1", "2")
    tuning = tune.tuning_of(
        tune.build_parser().parse_args(["--dataset", "elpv", "--seeds", "1", "2"]), tmp_path / "5shot"
    )
    assert tuning.images(Candidate(0.7, 0.5, 0.3, 2.0)) == 80 and tuning.images(DEFAULT) is None


def test_a_pool_whose_record_is_damaged_is_one_line(search, tmp_path, capsys):
    argv = ["--strengths", "0.7", "--gammas", "0.5", "--probs", "0.3", "--labels", "strength"]
    assert search(*argv)[0] == 0
    (tmp_path / "5shot" / "aug_samples" / "s0.7" / "elpv" / "subset" / "config.yaml").write_text("arguments: {")
    assert search(*argv) == (2, []) and "config.yaml is damaged: remove that folder" in capsys.readouterr().err


def test_a_budget_in_hours_bounds_the_runs_and_is_fixed_at_the_start(search, tmp_path, capsys):
    # 900 s: the pool takes 4 x 36 s, the teachers 5 x 36 s, 16 classifiers are left
    status, began = search("--budget_hours", "0.25")
    assert status == 0
    count = sum(name.startswith("classify") for name in began)
    assert 12 <= count <= 16 and json.loads((tmp_path / "5shot" / "plan.json").read_text())["trials"] == 16
    assert search("--budget_hours", "0.25") == (0, [])


def test_a_budget_in_hours_counts_the_teachers_that_are_asked_for(search, tmp_path):
    # 900 s: the pool takes 4 x 36 s, the teachers 2 x 36 s, 19 classifiers are left
    assert search("--budget_hours", "0.25", "--stage3_args", "--teacher_folds 2")[0] == 0
    assert json.loads((tmp_path / "5shot" / "plan.json").read_text())["trials"] == 19


def test_a_budget_that_is_too_small_says_how_much_is_needed(search, capsys):
    argv = ["--labels", "strength", "--budget_hours"]
    assert search(*argv, "0.05")[0] == 2
    assert "--budget_hours 0.05: 3 min are spent, and the smallest search has 4 runs of 36 s" in capsys.readouterr().err
    assert search("--budget_hours", "0.1")[0] == 2
    assert "--budget_hours 0.1: 6 min are spent or needed by teachers, and the smallest" in capsys.readouterr().err
    assert search(*argv, "0.1")[0] == 0


def test_a_search_with_more_seeds_than_its_plan_has_runs_for_is_planned_anew(search, tmp_path, capsys):
    argv = ["--labels", "strength", "--budget_hours", "0.1"]
    assert search(*argv)[0] == 0 and json.loads((tmp_path / "5shot" / "plan.json").read_text())["trials"] == 6
    capsys.readouterr()
    assert search(*argv, "--seeds", "1", "2", "3", "4")[0] == 2
    assert "and the smallest search has 8 runs of 36 s: give at least" in capsys.readouterr().err


def test_a_search_over_many_seeds_has_runs_for_two_candidates_by_default(search, tmp_path):
    argv = ["--labels", "strength", "--strengths", "0.7", "--seeds", *map(str, range(21))]
    assert search(*argv)[0] == 0  # the smallest search has 42 runs
    assert json.loads((tmp_path / "5shot" / "plan.json").read_text())["trials"] == 42


# ------------------------------------------------------------------------------------------------- from end to end


@pytest.mark.slow
def test_a_search_from_end_to_end(image_folder, tiny_base, tmp_path):
    argv = [
        "--dataset", f"folder:{image_folder}", "--pretrained_model_name_or_path", tiny_base, "--examples_per_class", 2,
        "--max_train_steps", 2, "--train_batch_size", 2, "--multipliers", 1, 2, "--num_inference_steps", 4, "--model",
        "test_vit", "--res_mode", 32, "--nepoch", 2, "--batch_size", 3, "--gpu_ids", "cpu", "--stage3_args",
        "--weights none", "--labels", "strength", "--strengths", 0.7, "--gammas", 0.5, "--probs", 0.3, "--seeds", 1, 2,
        "--trials", 4,
        "--output_dir", tmp_path / "out", "--config_dir", tmp_path / "config", "--register_key", "best",
    ]  # fmt: skip
    status, printed, err = main_here(dispatcher.main, ["tune", *argv])
    assert status == 0, err
    runs = sorted(p.parent.name for p in (tmp_path / "out" / "2shot" / "classify").glob("*/results.json"))
    assert runs == [f"s0.7-g0.5-p0.3-m{m}-seed{s}" for m in (1, 2) for s in (1, 2)]
    arguments = yaml.safe_load((tmp_path / "out" / "2shot" / "classify" / runs[0] / "args.yaml").read_text())
    assert arguments["syndata_max"] == 6  # 1 x 6 of the pool's 12
    script, *use = shlex.split(printed.strip().splitlines()[-1].removeprefix("python "))
    run_here(script, *use, "--dry_run")


def test_a_flag_that_a_stage_refuses_is_refused_before_anything_runs(image_folder, tiny_base, tmp_path, capsys):
    argv = [
        "--dataset",
        f"folder:{image_folder}",
        "--pretrained_model_name_or_path",
        str(tiny_base),
        "--seeds",
        "1",
        "2",
    ]
    argv += ["--examples_per_class", "3", "--stage3_args", "--criterion foccal", "--output_dir", str(tmp_path / "tune")]
    assert run_main(tune.main, argv) == 2
    assert "train_cls.py refuses" in capsys.readouterr().err
    assert not (tmp_path / "tune" / "args.yaml").exists() and not list((tmp_path / "tune").glob(".check*"))


def test_a_data_set_without_validation_images_is_refused(search, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tune.Tuning, "results", lambda *_: {"val": None})
    with pytest.raises(UserError):
        tuning = tune.tuning_of(tune.build_parser().parse_args(["--dataset", "elpv"]), tmp_path / "x")
        tuning.pair.done = lambda name: True
        tuning.trial(tuning.default, 1, None)


def resolved(argv):
    """What stage 3 makes of a command line."""
    return run.resolve(read_config(train_cls.build_parser().parse_args(list(map(str, argv)))))


def test_a_part_of_no_subset_is_refused(image_folder, tmp_path):
    argv = [*classify_arguments(image_folder, tmp_path), "--syndata_max", 5]
    with pytest.raises(UserError, match="--syndata_max: there are no synthetic images"):
        resolved(argv)


def test_the_part_reaches_the_training_images(image_folder, tmp_path):
    write_subset(tmp_path / "syn", ROWS)
    argv = [*classify_arguments(image_folder, tmp_path / "out"), "--syndata_dir", tmp_path / "syn", "--syndata_max", 3]
    config, _, synthetic = resolved(argv)
    assert len(synthetic) == 3 and config.synthetic.syndata_max == 3 and len(set(synthetic.target.tolist())) == 3
