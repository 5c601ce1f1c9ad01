"""Stage 3 as a whole: several seeds, averaged weights, freezing, accumulation, processes, evaluation, prediction."""

import argparse
import csv
import importlib.util
import json
import os
import re
import shutil
import socket
import statistics
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import yaml
from helpers import ROOT, ROWS, classify_arguments, contents, exchange, refused, run_here, start, write_subset
from safetensors.torch import load_file

import tiny
import train_cls
from semantic_aug import cli
from semantic_aug.classify import models, trainer
from semantic_aug.classify.config import (
    GROUPS,
    ClassifyConfig,
    EvaluationSettings,
    LossSettings,
    MixSettings,
    build_parser,
    read_config,
)
from semantic_aug.classify.data import Normaliser, TrainBatches
from semantic_aug.classify.draws import SyntheticSettings
from semantic_aug.classify.losses import effective_number_weights
from semantic_aug.classify.run import resolve
from semantic_aug.datasets import Setting, load_dataset
from semantic_aug.datasets.synthetic import read_subset
from semantic_aug.errors import UserError, run_main
from semantic_aug.evaluation.experiments import summary
from semantic_aug.evaluation.experiments.results import read_predictions
from semantic_aug.run_lock import lock_folder
from semantic_aug.sampling.guide import read_confusions

SMALL = {"model": "test_vit", "nepoch": 2}
"""A transformer of some hundred thousand parameters, without batch statistics."""


def train(image_folder, output_dir, **changes):
    """Runs train_cls.py in this process; returns what results.json holds, if anything."""
    argv = classify_arguments(image_folder, output_dir, **{**SMALL, **changes})
    assert train_cls.main([str(word) for word in argv]) == 0
    return trainer.results_of(output_dir)


@pytest.fixture(scope="module")
def three_seeds(image_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeds") / "all"
    train(image_folder, folder, seeds=[1, 2, 3])
    return folder


def test_images_held_on_the_device_change_no_result(image_folder, tmp_path):
    results = [train(image_folder, tmp_path / cache, cache=cache) for cache in ("auto", "device")]
    assert results[0] == {**results[1], "seconds": results[0]["seconds"]}
    one, other = ((tmp_path / cache / "model.safetensors").read_bytes() for cache in ("auto", "device"))
    assert one == other


def test_every_setting_that_changes_the_result_is_recorded():
    config = ClassifyConfig(
        dataset="elpv", syndata=("s",), loss=LossSettings("ls"), mixing=MixSettings(True, True, True)
    )
    for group, cls in GROUPS.items():
        settings = getattr(config, group)
        for name in set(cli.result_settings(cls)) - {"syndata_key", "syndata_dir"}:  # whose folders are recorded
            value = getattr(settings, name)
            other = replace(settings, **{name: not value if isinstance(value, bool) else "other"})
            assert replace(config, **{group: other}).record() != config.record(), name


def test_records_of_versions_without_a_setting_stand_for_its_default():
    thresholds = EvaluationSettings(shot_thresholds=(100, 20))
    record = ClassifyConfig(dataset="elpv", evaluation=thresholds).record()
    absent = cli.absent_values(*GROUPS.values(), Setting)
    assert {"synthetic_draw", "momentum", "unmixed_epochs", "shot_thresholds", "split"} <= absent.keys()
    assert not absent.keys() & {*record, *record["loss"], *record["mixing"], *record["draws"], *record["setting"]}
    for thresholds, recorded in (((100, 20), None), ((20, 5), (20, 5))):  # 100 and 20 were everyone's
        evaluation = EvaluationSettings(shot_thresholds=thresholds)
        assert ClassifyConfig(dataset="cub", evaluation=evaluation).record().get("shot_thresholds") == recorded


# ------------------------------------------------------------------------------------------------ seeds and summary


def test_seeds_are_runs_of_their_own_with_mean_and_spread(three_seeds, image_folder, tmp_path):
    result = json.loads((three_seeds / "seeds.json").read_text())
    each = [trainer.results_of(three_seeds / f"seed{s}")["test"] for s in (1, 2, 3)]
    losses = [scores["loss"] for scores in each]
    assert len(set(losses)) == 3 and result["seeds"]["2"]["loss"] == losses[1]
    assert result["mean"]["loss"] == pytest.approx(statistics.mean(losses))
    assert result["std"]["loss"] == pytest.approx(statistics.stdev(losses))
    rows = list(csv.reader((three_seeds / "seeds.csv").open()))
    assert [row[0] for row in rows] == ["seed", "1", "2", "3", "mean", "std"] and rows[0][1] == "top1"
    alone = train(image_folder, tmp_path / "alone", seed=2)
    assert alone["test"] == each[1]  # a seed among others is the same run


def test_seeds_go_on_where_they_were(three_seeds, image_folder, capsys, monkeypatch):
    (three_seeds / "seed2" / "results.json").unlink()
    before = (three_seeds / "seeds.csv").read_text()
    begun = []
    whole = trainer.Trainer.run
    monkeypatch.setattr(trainer.Trainer, "run", lambda self: begun.append(self.config.seed) or whole(self))
    train(image_folder, three_seeds, seeds=[1, 2, 3])
    assert begun == [2] and (three_seeds / "seeds.csv").read_text() == before
    out = capsys.readouterr().out
    assert "| mean ± std |" in out and "| seed | test top1 | test top5 | test macro |" in out


def test_seeds_and_summary_name_validation_where_there_is_no_test_split(tmp_path, capsys):
    images = tiny.write_image_folder(tmp_path / "images", train=3, val=1, test=0)
    train(images, tmp_path / "all", seeds=[1, 2], nepoch=1)
    assert "| seed | validation top1 | validation top5 |" in capsys.readouterr().out
    result = json.loads((tmp_path / "all" / "seeds.json").read_text())
    assert result["split"] == "val"
    assert next(csv.reader((tmp_path / "all" / "seeds.csv").open()))[:2] == ["seed", "val_top1"]
    header, _, line = summary.markdown(summary.find_runs([tmp_path / "all"])).splitlines()
    assert "| model | split | seeds | top1 |" in header and "| test_vit | validation | 2 |" in line


def test_one_seed_has_no_spread(image_folder, tmp_path):
    train(image_folder, tmp_path / "one", seeds=[4], nepoch=1)
    assert json.loads((tmp_path / "one" / "seeds.json").read_text())["std"]["top1"] is None
    assert list(csv.reader((tmp_path / "one" / "seeds.csv").open()))[-1][1] == ""


def test_the_summary_groups_seeds_and_tells_requests_apart(three_seeds, image_folder, tmp_path):
    train(image_folder, tmp_path / "mixed-seed1", use_mixup=True, seed=1)
    runs = summary.find_runs([three_seeds, tmp_path, three_seeds / "seed1"])  # one of them named twice
    assert [len(group) for group in summary.grouped(runs)] == [3, 1]
    lines = summary.markdown(runs).splitlines()
    result = json.loads((three_seeds / "seeds.json").read_text())
    assert lines[0].startswith("| run | data set | setting | images | model | split | seeds | top1 | macro | ece |")
    spread = f"{100 * result['mean']['ece']:.2f} ± {100 * result['std']['ece']:.2f}"
    name = load_dataset(f"folder:{image_folder}").name
    assert lines[2].startswith(f"| all | {name} | all data | 18 | test_vit | test | 3 | ") and spread in lines[2]
    assert lines[3].startswith("| mixed | ") and "±" not in lines[3] and len(lines) == 4


def test_the_summary_of_nothing_is_an_error(tmp_path):
    with pytest.raises(UserError, match="holds no finished run"):
        summary.find_runs([tmp_path])
    with pytest.raises(UserError, match="is not a folder"):
        summary.find_runs([tmp_path / "none"])


def test_summarize_prints_and_writes_the_table(three_seeds, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("summarize", ROOT / "scripts" / "summarize.py")
    summarize = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(summarize)
    argv = [str(three_seeds), "--output", str(tmp_path / "t.md"), "--scores", "top1", "loss"]
    assert run_main(summarize.main, argv) == 0
    out = capsys.readouterr().out
    assert out == (tmp_path / "t.md").read_text() and "| seeds | top1 | loss |" in out
    assert run_main(summarize.main, [str(three_seeds), "--scores", "top"]) == 2
    assert "error: unknown score of --scores 'top': did you mean" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------- what a run is made from


@pytest.fixture(scope="module")
def movable(image_folder, tmp_path_factory):
    """A finished run, and what it was made from: images, two kinds of synthetic ones, weights."""
    home = tmp_path_factory.mktemp("movable")
    shutil.copytree(image_folder, home / "animals")
    write_subset(home / "subset", ROWS)
    rows = (home / "subset/meta.csv").read_text().splitlines()
    (home / "subset/meta-kept.csv").write_text("\n".join(rows[:-1]) + "\n")
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit", num_classes=3, img_size=32).state_dict(), home / "weights.pth")
    again(home)
    return home


def again(home, **changes):
    """The same command, wherever its files lie."""
    files = {"weights": home / "weights.pth", "syndata_dir": [f"{home}/subset", f"{home}/subset#kept"]}
    argv = {"allow_other_sources": True, "synthetic_prob": 0.5, **files, "nepoch": 1, **changes}
    return train(home / "animals", home / "run", **argv)


@pytest.fixture
def moved(movable, tmp_path):
    shutil.copytree(movable, tmp_path / "moved")
    return tmp_path / "moved"


def other_bytes(file):
    exchange(file, bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])


def exchange_rows(file):
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([lines[0], lines[2], lines[1], *lines[3:]]))


def test_a_finished_run_is_found_when_all_has_moved(movable, moved, caplog):
    caplog.set_level("INFO")
    result = again(moved, cache="off", gradient_accumulation_steps=2)
    assert result == trainer.results_of(movable / "run") and "is finished already" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda home: other_bytes(home / "animals/train/toad/train000.png"),
            "train: 18 images as before, the same names and labels, other content",
        ),
        (
            lambda home: (home / "animals/test/toad/test000.png").rename(home / "animals/test/red fox/new.png"),
            "test: 9 images as before, but all others",
        ),
        (lambda home: (home / "animals/val/toad/val000.png").unlink(), "val: 5 images now, 6 when the run began"),
        (
            lambda home: shutil.copy(home / "subset/meta.csv", home / "subset/meta-kept.csv"),
            "synthetic: 8 images now, 7 when the run began",
        ),
        (
            lambda home: exchange_rows(home / "subset/meta-kept.csv"),
            "synthetic: 7 images as before, but all others",
        ),
        (
            lambda home: other_bytes(next((home / "subset/data").rglob("*.png"))),
            "synthetic: 7 images as before, the same labels, other content",
        ),
        (lambda home: other_bytes(home / "weights.pth"), "weights: "),
    ],
)
def test_a_finished_run_is_not_the_result_of_something_else(moved, change, message):
    before = contents(moved / "run", "*")
    change(moved)
    with pytest.raises(UserError, match=rf"made from other data \({message}.*choose another --output_dir"):
        again(moved)
    assert contents(moved / "run", "*") == before


def test_a_run_of_an_earlier_version_is_not_taken_for_the_present_images(moved):
    arguments = yaml.safe_load((moved / "run/args.yaml").read_text())
    del arguments["made_from"]
    (moved / "run/args.yaml").write_text(yaml.safe_dump(arguments))
    with pytest.raises(UserError, match="does not say which images it was made from"):
        again(moved)


def test_images_that_change_while_a_run_goes_on(image_folder, tmp_path, monkeypatch):
    shutil.copytree(image_folder, tmp_path / "animals")
    picture, epoch = tmp_path / "animals/train/toad/train000.png", trainer.Trainer._train_epoch

    def disturbed(self, *arguments):
        shutil.copyfile(picture.with_name("train001.png"), picture)
        return epoch(self, *arguments)

    monkeypatch.setattr(trainer.Trainer, "_train_epoch", disturbed)
    kept = picture.read_bytes()
    with pytest.raises(UserError, match=r"1 images changed during the run \('train/toad/train000.png' the first\)"):
        train(tmp_path / "animals", tmp_path / "run", nepoch=1)
    assert not list((tmp_path / "run").glob("*.json")) and not list((tmp_path / "run").glob("*.safetensors"))
    picture.write_bytes(kept)
    with pytest.raises(UserError, match="cannot be resumed"):
        train(tmp_path / "animals", tmp_path / "run", nepoch=1)


# --------------------------------------------------------------------------------------------- synthetic data, losses


@pytest.mark.parametrize(
    "changes",
    [
        {"synthetic_mode": "ratio", "criterion": "ldam", "drw_epoch": 1, "use_cmo": True},
        {"synthetic_mode": "concat", "synthetic_balanced": True, "criterion": "bsm", "use_cutmix": True},
        {"target_class_num": 1, "criterion": "focal", "use_mixup": True, "use_cmo": True},
    ],
)
def test_every_setting_trains(image_folder, tmp_path, changes):
    subset = write_subset(tmp_path / "s", ROWS * 3)
    results = train(image_folder, tmp_path / "run", syndata_dir=[subset], synthetic_prob=0.4, **changes)
    assert results["steps"] == (5 if changes.get("synthetic_mode") == "concat" else 3) * 2
    assert np.isfinite(results["test"]["loss"])


def test_a_ratio_with_a_remainder_resumes_alike_and_not_a_run_of_an_earlier_version(
    image_folder, tmp_path, monkeypatch
):
    subset, whole = write_subset(tmp_path / "s", ROWS * 3), tmp_path / "whole"
    changes = {"syndata_dir": [subset], "synthetic_mode": "ratio", "synthetic_prob": 0.4}  # 7.2 of 18 images an epoch
    train(image_folder, whole, **changes)
    monkeypatch.setattr(trainer, "SAVE_SECONDS", -1.0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        epoch = trainer.Trainer._train_epoch
        patch.setattr(
            trainer.Trainer, "_train_epoch", lambda self, *rest: interrupt() if self.epoch else epoch(self, *rest)
        )
        train(image_folder, tmp_path / "killed", **changes)
    train(image_folder, tmp_path / "killed", **changes)
    assert (whole / "model.safetensors").read_bytes() == (tmp_path / "killed" / "model.safetensors").read_bytes()
    record = yaml.safe_load((whole / "args.yaml").read_text())
    del record["draws"]["remainder"]  # which earlier versions dropped
    (whole / "args.yaml").write_text(yaml.safe_dump(record))
    with pytest.raises(UserError, match="draws.remainder: none -> 'carried from epoch to epoch'.*another --output_dir"):
        train(image_folder, whole, dry_run=True, **changes)


def interrupt():
    raise KeyboardInterrupt


# ----------------------------------------------------------------------------------------------------------- freezing


def test_stages_of_models_and_freezing():
    model, _ = models.make_model("resnet18", 3, 32, "none")
    parts = models.stages_of(model)
    assert list(parts) == ["stem", "stages1", "stages2", "stages3", "stages4", "linear"]
    assert parts["linear"] == ["fc.weight", "fc.bias"] and all(n.startswith("layer4.") for n in parts["stages4"])
    assert sorted(sum(parts.values(), [])) == sorted(name for name, _ in model.named_parameters())
    frozen = models.freeze(model, "stage4+linear")
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {*parts["stages4"], *parts["linear"]}
    assert model.layer3[0].bn1 in frozen and model.layer4[0].bn1 not in frozen and model not in frozen
    assert models.freeze(models.make_model("resnet18", 3, 32, "none")[0], "all") == []
    with pytest.raises(UserError, match=r"'stages5' is no part .* all, or some of linear, stem, stages1 to stages4"):
        models.freeze(model, "stages5+linear")


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_every_family_has_its_stages(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=3)
    parts = models.stages_of(model)
    assert sorted(sum(parts.values(), [])) == sorted(n for n, _ in model.named_parameters()) and parts["linear"]


@pytest.mark.parametrize("name", ["pit_ti_224", "rdnet_tiny"])
def test_of_a_network_without_stages_the_head_alone_can_be_trained(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=3)
    models.freeze(model, "linear")
    assert {parameter.shape[0] for parameter in model.parameters() if parameter.requires_grad} == {3}
    with pytest.raises(
        UserError, match="'stages4' is no part of this model; expected all, or some of linear joined by"
    ):
        models.freeze(model, "stages4")


def test_frozen_layers_and_their_statistics_stay(image_folder, tmp_path):
    train(image_folder, tmp_path / "run", model="resnet10t", trainable_layers="stages4+linear", nepoch=1)
    torch.manual_seed(trainer.derive_seed(2020, "classify", "weights"))
    fresh = models.make_model("resnet10t", 3, 32, "none")[0].state_dict()
    after = load_file(tmp_path / "run" / "model.safetensors")
    changed = {name for name in after if not torch.equal(after[name], fresh[name])}
    assert changed and all(name.startswith(("layer4", "fc")) for name in changed)
    assert any("running_mean" in name for name in changed)


# ---------------------------------------------------------------------------------- averaging, parts, resume, reports


def test_averaged_weights_are_timms(image_folder, tmp_path, monkeypatch):
    from timm.utils import ModelEmaV3

    seen = []

    class Recording(ModelEmaV3):
        def update(self, model, step=None):
            seen.append(({k: v.clone() for k, v in model.state_dict().items()}, step))
            super().update(model, step)

    monkeypatch.setattr("timm.utils.ModelEmaV3", Recording)
    train(image_folder, tmp_path / "run", ema_decay=0.9, val_fraction=0, nepoch=1)
    assert [step for _, step in seen] == [1, 2, 3]
    torch.manual_seed(trainer.derive_seed(2020, "classify", "weights"))
    model, _ = models.make_model("test_vit", 3, 32, "none")
    average = {k: v.clone().double() for k, v in model.state_dict().items()}
    for state, step in seen:
        decay = min(0.9, ModelEmaV3(model, 0.9, use_warmup=True).get_decay(step))
        average = {k: decay * v + (1 - decay) * state[k].double() for k, v in average.items()}
    after = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.allclose(after[k].double(), average[k], atol=1e-6) for k in after)
    assert not torch.equal(after["head.weight"], seen[-1][0]["head.weight"])


def test_accumulated_parts_are_the_whole_batch(image_folder, tmp_path):
    subset = write_subset(tmp_path / "s", ROWS)
    same = {"syndata_dir": [subset], "synthetic_prob": 0.4, "use_cmo": True, "use_cutmix": True, "batch_size": 9}
    weighted = {
        "drw_epoch": 1,
        "cb_beta": 0.9,
        "class_weight_mean": "weights",
        "task": "imbalanced",
        "imbalance_factor": 0.3,
    }
    same |= {**weighted, "unmixed_epochs": [1, 0]}
    train(image_folder, tmp_path / "one", **same)
    train(image_folder, tmp_path / "four", **same, gradient_accumulation_steps=4)
    one, four = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "four"))
    assert all(torch.allclose(one[k], four[k], atol=1e-5) for k in one)
    losses = [[row[2] for row in csv.reader((tmp_path / n / "epochs.csv").open())][1:] for n in ("one", "four")]
    assert np.allclose(np.array(losses[0], float), np.array(losses[1], float), atol=1e-5)


def test_class_weighted_losses_are_torchs_weighted_mean_of_each_batch(image_folder, tmp_path):
    changes = {
        "nepoch": 1,
        "lr": 1e-12,
        "drw_epoch": 0,
        "cb_beta": 0.9,
        "class_weight_mean": "weights",
        "batch_size": 3,
    }
    train(image_folder, tmp_path / "run", **changes, val_fraction=0, task="imbalanced", imbalance_factor=0.3)
    dataset = load_dataset(f"folder:{image_folder}", Setting(val_fraction=0, task="imbalanced", imbalance_factor=0.3))
    torch.manual_seed(trainer.derive_seed(2020, "classify", "weights"))
    model, normalisation = models.make_model("test_vit", 3, 32, "none")
    normalise = Normaliser(normalisation.mean, normalisation.std, torch.device("cpu"))
    weights = torch.tensor(effective_number_weights(dataset.train.counts(), 0.9), dtype=torch.float32)
    batches = TrainBatches(dataset.train, None, SyntheticSettings(), 32, 3, seed=2020)
    with torch.no_grad():
        each = [
            torch.nn.functional.cross_entropy(model(normalise(x)), y.argmax(1), weights) for x, y in batches.epoch(0)
        ]
    [row] = csv.DictReader((tmp_path / "run" / "epochs.csv").open())
    assert len(set(dataset.train.counts())) > 1 and len(each) > 1
    assert float(row["train_loss"]) == pytest.approx(torch.stack(each).mean().item(), abs=1e-5)


def test_going_on_is_exact_with_averaging_patience_and_parts(image_folder, tmp_path, monkeypatch):
    changes = {
        "nepoch": 6, "ema_decay": 0.8, "patience": 4, "use_cmo": True, "gradient_accumulation_steps": 2,
        "criterion": "ldam", "drw_epoch": 2, "optimizer": "adamw", "report_to": "tensorboard",
    }  # fmt: skip
    train(image_folder, tmp_path / "whole", **changes)
    monkeypatch.setattr(trainer, "SAVE_SECONDS", -1.0)
    epoch = trainer.Trainer._train_epoch

    def killed(self, *rest):
        if self.epoch == 3:
            raise KeyboardInterrupt
        return epoch(self, *rest)

    monkeypatch.setattr(trainer.Trainer, "_train_epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        train(image_folder, tmp_path / "killed", **changes)
    monkeypatch.setattr(trainer.Trainer, "_train_epoch", epoch)
    train(image_folder, tmp_path / "killed", **changes)
    whole, after = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "killed"))
    assert whole == after
    rows = [[row[:-1] for row in csv.reader((tmp_path / n / "epochs.csv").open())] for n in ("whole", "killed")]
    assert rows[0] == rows[1]


def plant(monkeypatch, *top1):
    """Evaluations find these scores, one after the other, whatever the classifier says."""
    result = iter([{"top1": value, "macro": 1 - value, "loss": 1.0} for value in top1])
    monkeypatch.setattr(trainer.Scores, "summary", lambda *_: next(result))


def test_predictions_are_those_of_the_best_epoch(image_folder, tmp_path, monkeypatch):
    plant(monkeypatch, 0.9, 0.6, 0.4, 0.5)
    scores, output = trainer.Trainer._scores, []

    def noted(self, batches):
        output.append(scores(self, batches).predicted.tolist())
        return scores(self, batches)

    monkeypatch.setattr(trainer.Trainer, "_scores", noted)
    assert train(image_folder, tmp_path / "run", nepoch=3)["epoch"] == 1
    names = ["blue jay", "red fox", "toad"]
    for split, wanted in (("val", output[0]), ("test", output[3])):
        rows = list(csv.DictReader((tmp_path / "run" / f"{split}_predictions.csv").open()))
        assert [row["predicted"] for row in rows] == [names[i] for i in wanted]
        table = getattr(load_dataset(f"folder:{image_folder}"), split)
        assert [row["file"] for row in rows] == list(table.keys)
        assert [row["class"] for row in rows] == [names[i] for i in table.labels]
    assert output[2] != output[0]


def test_a_folder_in_use_is_left_alone(image_folder, tmp_path, capsys):
    folder = tmp_path / "run"
    with lock_folder(folder, "--output_dir"):
        argv = [str(word) for word in classify_arguments(image_folder, folder, **SMALL)]
        assert run_main(train_cls.main, argv) == 2
    err = capsys.readouterr().err
    assert (
        err.startswith(f"error: {folder} is being written by another run (process {os.getpid()} on")
        and err.count("\n") == 1
    )
    assert "another --output_dir" in err and [p.name for p in folder.iterdir()] == [".lock"]
    assert train(image_folder, folder)["epochs"] == train(image_folder, folder)["epochs"]  # free again


def test_patience_stops_the_run(image_folder, tmp_path, monkeypatch):
    plant(monkeypatch, 0.5, 0.6, 0.6, 0.4, 0.9)
    results = train(image_folder, tmp_path / "run", nepoch=6, patience=2)
    assert results["epochs"] == 4 and results["epoch"] == 2 and results["steps"] == 12
    assert results["test"]["top1"] == 0.9  # the fifth evaluation is the one on test


def test_the_chosen_score_chooses_the_epoch(image_folder, tmp_path, monkeypatch):
    plant(monkeypatch, 0.5, 0.6, 0.4, 0.9)
    assert train(image_folder, tmp_path / "run", nepoch=3, select_by="macro")["epoch"] == 3


def test_groups_are_evaluated_and_can_choose(image_folder, tmp_path, monkeypatch):
    dataset = load_dataset(f"folder:{image_folder}")
    parts = {}
    for split in ("val", "test"):
        table = getattr(dataset, split)
        parts[split] = replace(table, extras={"group": np.arange(len(table)) % 2})
    monkeypatch.setattr("semantic_aug.classify.run.load_dataset", lambda *_: replace(dataset, **parts))
    results = train(image_folder, tmp_path / "run", select_by="worst_group", nepoch=3)
    rows = list(csv.DictReader((tmp_path / "run" / "epochs.csv").open()))
    assert results["val"]["worst_group"] == pytest.approx(max(float(row["val_worst_group"]) for row in rows))
    assert results["test"]["worst_group"] <= results["test"]["average_group"] <= 1
    output = read_predictions(tmp_path / "run")
    assert output.shares("worst_group").sum() == pytest.approx(results["val"]["worst_group"])
    run, *_ = summary.find_runs([tmp_path])
    assert "| worst_group | average_group |" in summary.markdown([run])


@pytest.mark.parametrize("image", ["animals/test/toad/test001.png", "subset/data/red_fox/toad-000003-1.0.png"])
def test_a_damaged_image_that_is_not_cached_is_refused_before_training(image_folder, tmp_path, image):
    shutil.copytree(image_folder, tmp_path / "animals")
    argv = {"syndata_dir": write_subset(tmp_path / "subset", ROWS), "synthetic_prob": 1e-9, "cache": "off"}
    (tmp_path / image).write_bytes((tmp_path / image).read_bytes()[:50])
    with pytest.raises(UserError, match=f"{image} cannot be decoded"):
        train(tmp_path / "animals", tmp_path / "run", **argv)
    assert not (tmp_path / "run").exists()


def test_groups_without_a_validation_image_are_told(tmp_path, image_folder, caplog):
    images = sorted(image_folder.glob("train/*/*.png"))
    rows = [f"{path},{path.parent.name},{'on snow' if i % 6 == 0 else 'on grass'}" for i, path in enumerate(images)]
    (tmp_path / "list.csv").write_text("\n".join(["path,label,group", *rows]))
    select = {"select_by": "worst_group", "val_examples_per_class": 1, "dry_run": True}
    train(image_folder, tmp_path / "run", dataset=f"csv:{tmp_path / 'list.csv'}", **select)
    assert "no validation image is of 'on snow': the worst of the others counts" in caplog.text


def test_tensorboard_gets_every_epoch(image_folder, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(image_folder, tmp_path / "run", report_to="tensorboard")
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    rows = list(csv.DictReader((tmp_path / "run" / "epochs.csv").open()))
    assert [e.step for e in board.Scalars("val/top1")] == [1, 2]
    assert [e.value for e in board.Scalars("train/train_loss")] == pytest.approx([float(r["train_loss"]) for r in rows])


def test_a_compiled_step_is_called(image_folder, tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(torch, "compile", lambda model: lambda x: called.append(1) or model(x))
    train(image_folder, tmp_path / "run", compile=True, nepoch=1)
    assert len(called) == 3


# ------------------------------------------------------------------------------------------------ several processes


@pytest.mark.slow
def test_two_processes_equal_one_with_the_same_batch(image_folder, tmp_path):
    subset = write_subset(tmp_path / "s", ROWS)
    same = {"syndata_dir": [subset], "synthetic_prob": 0.4, "use_cmo": True, "use_mixup": True, "batch_size": 9}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = classify_arguments(image_folder, tmp_path / "two", **{**SMALL, **same})
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    both = [start("train_cls.py", *argv, env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
    train(image_folder, tmp_path / "one", **same)
    for rank, process in enumerate(both):
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert ("test: top1" in out) == (rank == 0)  # only the main one speaks
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(one[k], two[k], atol=1e-5) for k in one)
    one, two = (trainer.results_of(tmp_path / name) for name in ("one", "two"))
    assert one["test"] == pytest.approx(two["test"], abs=1e-4) and one["epoch"] == two["epoch"]
    assert len((tmp_path / "two" / "epochs.csv").read_text().splitlines()) == 3


# -------------------------------------------------------------------------------------------- evaluation, prediction


def test_a_checkpoint_loads_in_plain_timm_with_the_printed_lines(image_folder, tmp_path, capsys):
    results = train(image_folder, tmp_path / "run", model="vit_tiny_patch16_224", nepoch=1)
    lines = capsys.readouterr().out.splitlines()
    position = lines.index("import timm")
    names = {}
    exec("\n".join(lines[position : position + 2]), names)
    dataset = load_dataset(f"folder:{image_folder}")
    batches = trainer.EvalBatches(dataset.test, 32, 9)
    normalise = trainer.Normaliser((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), torch.device("cpu"))
    (_, pixels, labels), *_ = batches.part()
    with torch.no_grad():
        right = (names["model"](normalise(pixels)).argmax(-1) == labels).float().mean()
    assert float(right) == pytest.approx(results["test"]["top1"])


def test_evaluation_alone_gives_the_runs_scores(three_seeds, image_folder, tmp_path, capsys):
    wanted = trainer.results_of(three_seeds / "seed1")
    before = (three_seeds / "seed1" / "args.yaml").read_text()
    train(image_folder, three_seeds / "seed1", eval_only=True)
    result = json.loads((three_seeds / "seed1" / "evaluation" / "results.json").read_text())
    assert result["test"] == pytest.approx(wanted["test"]) and result["val"]["top1"] == wanted["val"]["top1"]
    for split, count in (("val", 6), ("test", 9)):
        ours, again = (three_seeds / "seed1" / part / f"{split}_predictions.csv" for part in ("", "evaluation"))
        assert ours.read_bytes() == again.read_bytes()
        run = read_predictions(three_seeds / "seed1", split)
        assert run.shares("top1").sum() == pytest.approx(wanted[split]["top1"]) and len(run.files) == count
        assert run.shares("macro").sum() == pytest.approx(wanted[split]["macro"])
    assert (three_seeds / "seed1" / "args.yaml").read_text() == before
    capsys.readouterr()
    train(image_folder, tmp_path / "other", eval_only=True, weights=three_seeds / "seed1")
    assert f"test: top1 {100 * wanted['test']['top1']:.2f} %" in capsys.readouterr().out
    assert (tmp_path / "other" / "evaluation" / "test_per_class.csv").exists()


def test_evaluations_of_weights_take_no_folder_of_a_training(three_seeds, image_folder):
    def default_folder(**changes):
        argv = classify_arguments(image_folder, "none", **SMALL, **changes)
        request = read_config(build_parser("").parse_args([str(word) for word in argv]))
        return resolve(request.with_seed(1, None))[0].output_dir

    runs = [three_seeds / name for name in ("seed1", "seed2")]
    folders = {default_folder(eval_only=True, weights=run) for run in runs} | {default_folder()}
    assert len(folders) == 3 and default_folder(predict=[image_folder], weights=runs[0]) in folders


def test_confusions_on_validation_are_told_by_a_run_that_was_tested(three_seeds, image_folder):
    dataset, results = load_dataset(f"folder:{image_folder}"), trainer.results_of(three_seeds / "seed1")
    confusions = read_confusions(three_seeds / "seed1", dataset)
    assert confusions.sum(1).tolist() == dataset.val.counts().tolist() and results["test"]
    assert np.trace(confusions) / len(dataset.val) == results["val"]["top1"]


@pytest.fixture
def recorded_run(three_seeds, image_folder, tmp_path):
    """A data set whose validation images are drawn, a run that says it was trained on it, and the setting of that."""
    data = tmp_path / "animals"
    for split in ("train", "test"):
        shutil.copytree(image_folder / split, data / split)
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(three_seeds / "seed1" / "model.safetensors", run)
    record = yaml.safe_load((three_seeds / "seed1" / "args.yaml").read_text())
    setting = {"subset_seed": 3, "val_fraction": 0.3}
    record |= {"dataset": f"folder:{data}", "setting": Setting(**setting).record(), "resolution": 64}
    (run / "args.yaml").write_text(yaml.safe_dump(record))
    return data, run, setting


def test_a_run_is_not_evaluated_on_images_it_was_trained_on(recorded_run, caplog):
    data, run, setting = recorded_run
    for dry in ({}, {"dry_run": True}):
        with pytest.raises(
            UserError, match=r"--eval_only: \d+ validation images .* training images of .*subset_seed: 3 -> 0"
        ):
            train(data, run, eval_only=True, val_fraction=0.3, **dry)
    assert not (run / "evaluation").exists()
    train(data, run, eval_only=True, **setting)
    assert "was trained at --res_mode 64 and is used at 32" in caplog.text


def test_a_run_does_not_start_from_weights_that_have_seen_its_validation_images(recorded_run, tmp_path):
    data, weights, setting = recorded_run
    for dry in ({}, {"dry_run": True}):
        with pytest.raises(
            UserError, match=r"--weights: \d+ validation images .*subset_seed: 3 -> 0.*\): give other --weights"
        ):
            train(data, tmp_path / "new", weights=weights, val_fraction=0.3, **dry)
    assert not (tmp_path / "new").exists()
    train(data, tmp_path / "new", weights=weights, dry_run=True, **setting)


def test_weights_of_a_run_that_began_from_others_are_followed_back(recorded_run, other_set, tmp_path):
    data, first, _ = recorded_run
    second = shutil.copytree(first, tmp_path / "second")
    record = yaml.safe_load((first / "args.yaml").read_text())
    record |= {"dataset": f"folder:{other_set}", "setting": Setting().record(), "weights": str(first)}
    (second / "args.yaml").write_text(yaml.safe_dump(record))
    with pytest.raises(
        UserError, match=r"--weights: \d+ validation images .* of the classifier .*/run/model.safetensors"
    ):
        train(data, tmp_path / "new", weights=second, val_fraction=0.3, dry_run=True)
    (first / "args.yaml").write_text(yaml.safe_dump(record | {"weights": str(second)}))  # each from the other
    train(data, tmp_path / "new", weights=second, val_fraction=0.3, dry_run=True)


@pytest.fixture
def other_set(image_folder, tmp_path):
    """Another data set of the same classes: new training and validation images, and the animals' own test images."""
    folder = tiny.write_image_folder(tmp_path / "other", train=3, val=1, test=0)
    for number, path in enumerate(sorted(folder.rglob("*.png"))):
        tiny.picture(number % 3, 5000 + number).save(path)
    shutil.copytree(image_folder / "test", folder / "test")
    return folder


@pytest.mark.parametrize("dry", [{}, {"dry_run": True}])
@pytest.mark.parametrize(("split", "kind"), [("train", "training"), ("val", "validation")])
def test_a_test_set_with_training_or_validation_images_is_refused_by_content(
    image_folder, other_set, tmp_path, dry, split, kind
):
    image = min((image_folder / split / "toad").iterdir())
    shutil.copy(image, other_set / "test" / "toad" / "holiday.png")
    message = rf"--test_dataset .*other holds 1 {kind} images of animals.* \('.*holiday.png' is '.*{image.name}'\)"
    with pytest.raises(UserError, match=message):
        train(image_folder, tmp_path / "run", test_dataset=f"folder:{other_set}", **dry)
    assert not (tmp_path / "run").exists()


def test_a_data_set_that_repeats_its_training_photographs_in_its_test_split_trains(image_folder, other_set, tmp_path):
    data = shutil.copytree(image_folder, tmp_path / "animals")
    for folder in (data, other_set):  # the other one's test images are the data set's own
        shutil.copy(data / "train" / "toad" / "train002.png", folder / "test" / "toad" / "again.png")
    train(data, tmp_path / "run", dry_run=True)
    train(data, tmp_path / "run", dry_run=True, test_dataset=f"folder:{other_set}")


def test_a_run_is_not_evaluated_on_another_data_set_with_its_training_images(
    three_seeds, image_folder, other_set, tmp_path
):
    run, gone = three_seeds / "seed1", shutil.copytree(three_seeds / "seed1", tmp_path / "gone")
    record = yaml.safe_load((run / "args.yaml").read_text())
    (gone / "args.yaml").write_text(yaml.safe_dump(record | {"dataset": f"folder:{tmp_path / 'unmounted'}"}))
    moved, changes = shutil.copytree(image_folder, tmp_path / "moved"), {"eval_only": True, "dry_run": True}
    separate = {"test_dataset": f"folder:{other_set}"}
    requests = [(image_folder, run, separate), (other_set, run, {}), (moved, run, separate), (moved, gone, separate)]
    for data, more in ((other_set, {}), (moved, {}), (moved, separate)):
        train(data, tmp_path / "out", weights=run, **changes, **more)
    shutil.copy(image_folder / "train" / "toad" / "train002.png", other_set / "test" / "toad" / "holiday.png")
    message = (
        r"--eval_only: 1 test images \('.*holiday.png'\) are training images of the classifier .* \(by content, of "
    )
    for data, weights, more in requests:
        with pytest.raises(UserError, match=message):
            train(data, tmp_path / "out", weights=weights, **changes, **more)


def test_a_classifier_is_evaluated_on_a_copy_that_spells_its_classes_otherwise(three_seeds, image_folder, tmp_path):
    other = {"blue jay": "003.Blue_Jay", "red fox": "001.red-fox", "toad": "002.toad"}  # in another order, too
    for split in ("train", "val", "test"):
        for name, spelling in other.items():
            shutil.copytree(image_folder / split / name, tmp_path / "copy" / split / spelling)
    train(tmp_path / "copy", tmp_path / "out", eval_only=True, weights=three_seeds / "seed1")
    result = json.loads((tmp_path / "out" / "evaluation" / "results.json").read_text())
    assert result["test"]["loss"] == pytest.approx(trainer.results_of(three_seeds / "seed1")["test"]["loss"])
    rows = list(csv.DictReader((tmp_path / "out" / "evaluation" / "test_predictions.csv").open()))
    wanted = {r["file"]: r for r in csv.DictReader((three_seeds / "seed1" / "test_predictions.csv").open())}
    back = {text: name for name, spelling in other.items() for text in (spelling, spelling.replace("_", " "))}
    for row in rows:
        split, folder, file = row["file"].split("/")
        assert back[row["predicted"]] == wanted[f"{split}/{back[folder]}/{file}"]["predicted"]


def test_prediction_of_a_folder(three_seeds, image_folder):
    train(image_folder, three_seeds / "seed1", predict=image_folder / "test")
    rows = list(csv.DictReader((three_seeds / "seed1" / "predictions.csv").open()))
    assert len(rows) == 9 and [r["file"] for r in rows] == sorted(r["file"] for r in rows)
    right = [row["class"] == row["file"].split("/")[0] for row in rows]
    assert np.mean(right) == pytest.approx(trainer.results_of(three_seeds / "seed1")["test"]["top1"])
    for row in rows:
        shares = {name: float(row[name]) for name in ("blue jay", "red fox", "toad")}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
        assert float(row["probability"]) == max(shares.values()) == shares[row["class"]]


def test_prediction_passes_over_litter_and_loses_no_run_to_a_broken_file(three_seeds, image_folder, tmp_path, capsys):
    shutil.copytree(image_folder / "test" / "toad", tmp_path / "new" / "batch")
    good = sorted(f"batch/{path.name}" for path in (tmp_path / "new" / "batch").iterdir())
    (tmp_path / "new" / "._0.png").write_bytes(b"Mac OS X")
    (tmp_path / "new" / "@eaDir").mkdir()
    shutil.copy(tmp_path / "new" / good[0], tmp_path / "new" / "@eaDir" / "thumb.png")
    os.mkfifo(tmp_path / "new" / "pipe.png")
    out = three_seeds / "seed1" / "predictions.csv"
    train(image_folder, three_seeds / "seed1", predict=tmp_path / "new")
    whole = {row["file"]: row for row in csv.DictReader(out.open())}
    assert list(whole) == good
    (tmp_path / "new" / "cut.png").write_bytes((tmp_path / "new" / good[0]).read_bytes()[:300])
    with pytest.raises(UserError, match=r"1 of \d+ images could not be read .* image .*cut.png cannot be decoded"):
        train(image_folder, three_seeds / "seed1", predict=tmp_path / "new")
    assert f"{len(good)} images classified" in capsys.readouterr().out
    rows = {row["file"]: row for row in csv.DictReader(out.open())}
    assert set(rows.pop("cut.png").values()) == {"cut.png", ""} and rows == whole
    files = [tmp_path / "new" / name for name in good[:2]]
    train(image_folder, three_seeds / "seed1", predict=files)
    rows = list(csv.DictReader(out.open()))
    assert [row["file"] for row in rows] == list(map(str, files))
    assert [row["class"] for row in rows] == [whole[name]["class"] for name in good[:2]]


def test_predictions_do_not_replace_others(three_seeds, image_folder, tmp_path):
    folder = tmp_path / "out"
    predict = lambda split: train(  # noqa: E731
        image_folder, folder, weights=three_seeds / "seed1", predict=image_folder / split
    )
    written = []
    for split in ("test", "val", "val", "train"):
        predict(split)
        written.append((folder / "predictions.csv").read_bytes())
    kept = [(folder / f"predictions-{number}.csv").read_bytes() for number in (1, 2)]
    assert kept == written[:2] and written[1] == written[2] and not (folder / "predictions-3.csv").exists()


def test_an_evaluation_without_a_split_has_no_files_of_an_earlier_one(three_seeds, image_folder, tmp_path):
    (tmp_path / "classes").mkdir()
    for name in ("train", "test"):
        shutil.copytree(image_folder / name, tmp_path / "classes" / name)
    out = tmp_path / "out"
    for data in (image_folder, tmp_path / "classes"):
        train(data, out, eval_only=True, weights=three_seeds / "seed1", val_fraction=0)
        names = {path.name.partition("_")[0] for path in (out / "evaluation").iterdir()}
        assert ("val" in names) == (data == image_folder) and "test" in names


def test_a_classifier_that_does_not_fit_is_one_clear_line(three_seeds, image_folder, tmp_path):
    others = tiny.write_image_folder(tmp_path / "others", classes=("newt", "owl", "toad"))
    (tmp_path / "empty").mkdir()
    seed1 = three_seeds / "seed1"
    for changes, message in [
        ({"eval_only": True, "output_dir": tmp_path / "none"}, "--output_dir .*: no trained classifier there"),
        ({"eval_only": True, "weights": seed1, "model": "resnet18"}, "does not fit resnet18 .*--model and --res_mode"),
        (
            {"eval_only": True, "weights": seed1, "dataset": f"folder:{others}"},
            "differ from the 3 of others.* .'blue jay' is in only one",
        ),
        ({"predict": tmp_path / "none", "weights": seed1}, "--predict .*: not a folder or file"),
        ({"predict": tmp_path / "empty", "weights": seed1}, "--predict .*: no image there"),
    ]:
        folder = changes.pop("output_dir", tmp_path / "x")
        argv = classify_arguments(image_folder, folder, **{**SMALL, **changes})
        with pytest.raises(UserError, match=message):
            train_cls.main([str(word) for word in argv])


# --------------------------------------------------------------------------------------------------------- benchmark


def test_the_benchmarks_port_trains_on_the_same_labels(image_folder, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from benchmarks import classify, original_classify

    dataset = load_dataset(f"folder:{image_folder}")
    subset = classify.write_subset(tmp_path / "s", dataset, 5)
    wanted = read_subset(subset, dataset).labels(0.5, 3)
    keep = lambda image: torch.zeros(3, 4, 4)  # noqa: E731
    synthetic = original_classify.OriginalItems(dataset.train, subset, 1.0, 0.5, keep)
    for i in range(20):
        assert np.isclose(wanted, synthetic[i % 18][1].numpy(), atol=1e-6).all(1).any()
    real = original_classify.OriginalItems(dataset.train, None, 0.0, 0.5, keep)
    assert [int(real[i][1].argmax()) for i in range(18)] == dataset.train.labels.tolist()
    model, normalisation = models.make_model("test_vit", 3, 32, "none")
    settings = argparse.Namespace(resolution=32, batch_size=6, nepoch=2, lr=0.01, synthetic_prob=0.5, gamma=0.5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    parts = (dataset.train, dataset.val, subset, settings, torch.device("cpu"), 0)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)  # the port sets it; put back afterwards
    assert original_classify.train(model, normalisation, *parts) == 36
    assert not torch.equal(before["head.weight"], model.head.weight)


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainable_layers": "stages9"}, "--trainable_layers stages9: 'stages9' is no part of this model"),
        (
            {"select_by": "worst_group"},
            r"--select_by worst_group: the validation images of animals-\w{6} have no groups",
        ),
        ({"synthetic_balanced": True}, "--synthetic_balanced: there are no synthetic images"),
        ({"target_class_num": 2}, "--target_class_num: there are no synthetic images"),
        ({"drw_epoch": 1, "criterion": "cb"}, "--drw_epoch 1: --criterion cb weights classes from the start"),
        ({"use_cmo": True, "unmixed_epochs": [1, 1]}, "--unmixed_epochs 1 1: none of the --nepoch 2 epochs is left"),
        ({"shot_thresholds": [5, 20]}, "few-shot below 20 and many-shot above 5 overlap"),
        ({"drw_epoch": 2}, "--drw_epoch 2: expected fewer than the --nepoch 2 epochs"),
        ({"synthetic_mode": "both"}, "invalid choice: 'both'"),
        ({"ema_decay": 1.5}, "argument --ema_decay: 1.5: expected a number in"),
        ({"batch_size": 6, "gradient_accumulation_steps": 4}, "--batch_size 6 .* is too small for 4 parts"),
        ({"target_class_num": -1}, "argument --target_class_num: -1: expected at least 0"),
        ({"syndata_dir": ["foreign"]}, r"has the class 'newt', which data set animals-\w{6} does not have"),
        ({"syndata_dir": ["empty"]}, "is empty"),
        ({"syndata_dir": ["gone"]}, "is missing"),
        ({"syndata_dir": ["gone#good"]}, "unknown variant of synthetic subset .* 'good'"),
        ({"weights": "other.pth"}, "do not fit test_vit .*missing.*the file seems to hold"),
    ],
)
def test_bad_requests_raise_one_line_that_names_the_flag(image_folder, tmp_path, changes, message):
    write_subset(tmp_path / "foreign", [("blue jay", "newt", 0.7)])
    write_subset(tmp_path / "empty", [])
    next((write_subset(tmp_path / "gone", ROWS) / "data").rglob("*.png")).unlink()
    torch.save({"conv": torch.zeros(1)}, tmp_path / "other.pth")
    if "syndata_dir" in changes:
        changes = {"syndata_dir": [tmp_path / changes["syndata_dir"][0]]}
    if "weights" in changes:
        changes = {"weights": tmp_path / changes["weights"]}
    argv = classify_arguments(image_folder, tmp_path / "run", **{**SMALL, **changes})
    with pytest.raises(UserError) as caught:
        train_cls.main([str(word) for word in argv])
    assert re.search(message, str(caught.value)), caught.value


def test_a_dry_run_judges_the_batches_as_the_run_does(image_folder, tmp_path):
    subset = write_subset(tmp_path / "s", ROWS)
    for changes, message in (
        ({"model": "resnet10t", "batch_size": 1}, "error: a part of a training batch is a single image"),
        # 3 real images are too few for 4 parts, with 4 synthetic ones there are enough
        (
            {**SMALL, "examples_per_class": 1, "batch_size": 9, "gradient_accumulation_steps": 4},
            "too small for 4 parts",
        ),
    ):
        argv = classify_arguments(image_folder, tmp_path / "run", **changes)
        assert all(message in refused("train_cls.py", *argv, *further) for further in (["--dry_run"], []))
    run_here("train_cls.py", *argv, "--syndata_dir", subset, "--synthetic_mode", "concat", "--dry_run")


def test_a_damaged_subset_ends_the_program_with_status_2(image_folder, tmp_path, capsys):
    folder = write_subset(tmp_path / "gone", ROWS)
    next((folder / "data").rglob("*.png")).unlink()
    argv = classify_arguments(image_folder, tmp_path / "run", syndata_dir=[folder])
    assert run_main(train_cls.main, [str(word) for word in argv]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and "is missing" in lines[0]
    assert not (tmp_path / "run").exists()
