"""Recipes: the authors' values for every data set, model and resolution, what wins, what is recorded, and what is refused."""

import itertools
import re
from dataclasses import replace

import pytest

import sample_mp
import train_cls
import train_lora
from semantic_aug import registry, runs
from semantic_aug.classify import config as classify
from semantic_aug.datasets import catalog
from semantic_aug.errors import UserError
from semantic_aug.finetune import config as finetune

BATCHES = {
    "resnet50": {224: 256, 384: 128, 448: 64},
    "vit_b_16": {224: 128, 384: 32, 448: 32},
}
"""Images per step in the authors' trainer, by model and resolution."""

RATES = {
    "resnet50": {
        "cub": {224: 0.05, 384: 0.05, 448: 0.025},
        "aircraft": {224: 0.10, 384: 0.10, 448: 0.05},
        "car": {224: 0.10, 384: 0.10, 448: 0.05},
        "flower": dict.fromkeys((224, 384, 448), 0.05),
        "dog": dict.fromkeys((224, 384, 448), 0.005),
        "pet": {224: 0.01, 384: 0.01, 448: 0.005},
        "pascal": {224: 0.05, 384: 0.05, 448: 0.025},
        "food": dict.fromkeys((224, 384, 448), 0.01),
        "caltech": dict.fromkeys((224, 384, 448), 0.01),
    },
    "vit_b_16": {
        dataset: dict.fromkeys((224, 384, 448), rate)
        for dataset, rate in {
            "cub": 1e-3, "aircraft": 1e-3, "car": 1e-3, "flower": 5e-4, "dog": 1e-5, "pet": 1e-4, "food": 5e-5,
            "caltech": 5e-5, "pascal": 5e-5,
        }.items()
    },
}  # fmt: skip
"""Peak learning rates in the authors' scripts, by model, data set and resolution."""

SHOTS = {-1: 0.1, 1: 0.3, 5: 0.3, 10: 0.3}
"""Synthetic probability by images per class."""

OTHER_NAMES = {
    "resnet50": ("resnet50.tv_in1k", "resnet50.a1_in1k"),
    "vit_b_16": ("vit_base_patch16_384", "vit_base_patch16_224.augreg_in21k"),
}


def stage_3(*words):
    return classify.read_config(train_cls.build_parser().parse_args(list(map(str, words))))


@pytest.mark.parametrize("model", RATES)
def test_every_row_of_stage_3_is_the_authors(model):
    names, shots = itertools.cycle([model, *OTHER_NAMES[model]]), itertools.cycle(SHOTS)
    for dataset, rates in RATES[model].items():
        for resolution, rate in rates.items():
            words = ["--model", next(names), "--examples_per_class", count := next(shots)]
            config = stage_3("--dataset", dataset, "--res_mode", resolution, "--recipe", "paper", *words)
            training, loss, mixing = config.training, config.loss, config.mixing
            assert (training.lr, training.batch_size) == (rate, BATCHES[model][resolution]), (dataset, resolution)
            assert (training.optimizer, training.weight_decay) == ("sgd", 5e-4)
            assert (loss.criterion, loss.smoothing, mixing.mix_prob, mixing.mixup_alpha) == ("ls", 0.1, 0.5, 1)
            assert (config.synthetic.synthetic_prob, config.setting.val_fraction) == (SHOTS[count], 0)


@pytest.mark.parametrize("dataset", ["cub", "flower"])
def test_the_long_tail_is_the_authors(dataset):
    tail = ("--dataset", dataset, "--task", "imbalanced", "--recipe", "paper")
    config = stage_3(*tail)
    training, loss, mixing, synthetic = config.training, config.loss, config.mixing, config.synthetic
    assert (training.lr, training.batch_size, training.weight_decay, training.nepoch) == (0.005, 128, 2e-4, 200)
    assert (training.lr_schedule, training.warmup_epochs, training.augmentation) == ("step", 5, "resized_crop")
    assert (loss.criterion, loss.class_weight_mean, loss.ldam_scale, loss.cb_beta) == ("ce", "weights", 30, 0.9999)
    assert (mixing.mix_prob, mixing.unmixed_epochs, mixing.cutmix_alpha) == (0.5, (4, 3), 1)
    assert (synthetic.synthetic_draw, synthetic.synthetic_prob) == ("inverse_frequency", 0.3)
    assert (config.setting.imbalance_profile, config.setting.val_fraction) == ("original", 0)
    assert catalog.find_spec(dataset).shot_thresholds == {"cub": (20, 5), "flower": (30, 10)}[dataset]
    assert stage_3("--dataset", dataset, "--recipe", "paper").training.augmentation == "crop"
    # all stages draw the same images
    for setting in (finetune.parse(tail).setting, sample_mp.build_parser().parse_args(tail), config.setting):
        assert (setting.imbalance_profile, setting.val_fraction) == ("original", 0)
        assert setting.split == ("half" if dataset == "flower" else "official")


@pytest.mark.parametrize(("model", "name"), [(m, n) for m, names in OTHER_NAMES.items() for n in names])
def test_a_rate_is_found_under_every_name_of_the_network(model, name):
    rates = [stage_3("--dataset", "elpv", "--model", m).training.lr for m in (model, name)]
    assert rates[0] == rates[1] == (1e-3 if model == "vit_b_16" else None)
    assert classify.network(model) == classify.network(name) != classify.network("resnet18")


def test_stages_1_and_2():
    words = ["--dataset", "cub", "--recipe", "paper"]
    config = finetune.parse(words)
    assert (config.train.learning_rate, config.train.ti_learning_rate, config.setting.val_fraction) == (5e-5, 5e-5, 0)
    assert sample_mp.build_parser().parse_args(words).val_fraction == 0  # the same training images in all stages


def test_flags_win_and_the_rest_is_said_and_recorded():
    config = stage_3("--dataset", "cub", "--recipe", "paper", "--lr=0.3", "--res_mode", 448, "--criterion", "ce")
    assert (config.training.lr, config.training.batch_size, config.loss.criterion) == (0.3, 64, "ce")
    recorded = config.record()["recipe"]
    assert recorded.startswith("paper: batch_size 64, ") and "lr" not in recorded and "criterion" not in recorded
    (line,) = (line for line in runs.arguments_text(config.record()).splitlines() if line.startswith("recipe: "))
    assert recorded in line
    assert stage_3("--dataset", "cub").run.recipe == finetune.parse(["--dataset", "cub"]).record()["recipe"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--dataset cub --recipe papr", "unknown --recipe 'papr': did you mean 'paper'"),
        (
            "--dataset elpv --recipe paper --batch_size 8",
            "train_cls: no lr for .*--dataset elpv.*: give --lr or another",
        ),
        ("--dataset cub --recipe paper --model resnet18", "no lr, batch_size for .*--model resnet18"),
        ("--dataset cub --recipe paper --optimizer adamw", "no lr for .*--optimizer adamw"),
    ],
)
def test_a_missing_row_is_one_line(words, message):
    with pytest.raises(UserError, match=message):
        stage_3(*words.split())


def write(folder, text):
    (folder / registry.RECIPES).write_text(text)
    return ("--dataset", "elpv", "--config_dir", folder)


def test_recipes_of_ones_own_stand_beside_ours(tmp_path):
    words = write(
        tmp_path,
        "mine:\n  train_cls:\n    - set: {nepoch: 7, syndata_key: [a, b], lr: 1e-3}\n"
        "    - {when: {res_mode: 128, gamma: 0.50}, set: {lr: 0.5}}\n",
    )
    config = stage_3(*words, "--recipe", "mine", "--res_mode", 128)
    assert (config.training.nepoch, config.training.lr) == (7, 0.5) and config.synthetic.syndata_key == ("a", "b")
    assert config.run.recipe == "mine: nepoch 7, syndata_key a b, lr 0.5"
    assert stage_3(*words, "--recipe", "mine").training.lr == 1e-3
    assert stage_3(*words).run.recipe == "default: sets nothing"
    assert "-mine-" in classify_run_name(config)


def classify_run_name(config):
    from semantic_aug.classify.run import run_name

    return run_name(replace(config, syndata=()), [])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("- {set: {lrr: 1}}", "recipe mine of recipes.yaml, train_cls: unknown flag 'lrr': did you mean 'lr'"),
        ("- {set: {lr: fast}}", "recipe mine of recipes.yaml, train_cls: argument --lr: 'fast' is not a number"),
        ("- {when: {modle: x}, set: {lr: 1}}", "unknown flag 'modle': did you mean 'model'"),
        ("- {when: {res_mode: big}, set: {lr: 1}}", "'big' is not a whole number"),
        ("- {set: {use_cutmix: true}}", "unknown flag 'use_cutmix'"),
        ("- {lr: 1}", "expected rows '- {when: {flag: value}, set: {flag: value}}'"),
        ("{lr: 1}", "expected rows"),
        ("- {when: , set: {lr: 1}}", "expected rows"),
    ],
)
def test_rows_that_are_none_are_named(tmp_path, rows, message):
    words = write(tmp_path, f"mine:\n  train_cls:\n    {rows}\n")
    with pytest.raises(UserError, match=re.escape(message)):
        stage_3(*words, "--recipe", "mine")


def test_a_table_of_learning_rates_of_earlier_versions_is_refused_by_name(tmp_path):
    (tmp_path / registry.FORMER_RATES).write_text("cub:\n  resnet50: 0.05\n")
    for module in (train_cls, train_lora):
        with pytest.raises(
            UserError, match="learning_rates.yaml is no longer read: write its rates into .*recipes.yaml"
        ):
            module.build_parser().parse_args(["--dataset", "cub", "--config_dir", str(tmp_path)])
