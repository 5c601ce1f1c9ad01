"""Recipes: the authors' values for every data set, model and resolution, what wins, what is recorded, and what is refused."""

import csv
import itertools
import re
from dataclasses import replace

import evaluating
import numpy as np
import pytest
import timm
import torch
import yaml
from torchvision.models import ViT_B_16_Weights as SWAG

import sample_mp
import tiny
import train_cls
import train_lora
from official_layouts import WRITERS
from semantic_aug import prompts, registry, runs
from semantic_aug.classify import config as classify
from semantic_aug.classify import models, torchvision_weights
from semantic_aug.classify.data import Normaliser, TrainBatches, share_of
from semantic_aug.classify.mixing import MixSettings, item_boxes, mix
from semantic_aug.datasets import load_dataset
from semantic_aug.errors import UserError, run_main
from semantic_aug.finetune import config as finetune
from semantic_aug.seeding import derive_seed, numpy_rng

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


def stage_3(*argv):
    return classify.read_config(train_cls.build_parser().parse_args(list(map(str, argv))))


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """A small copy of each data set of the paper in its official layout, and a synthetic subset of each, by name."""
    root, subsets = tmp_path_factory.mktemp("copies"), {}
    with pytest.MonkeyPatch.context() as patch:
        for name in RATES["resnet50"]:
            (root / name).mkdir()
            names, _ = WRITERS[name](root / name)
            patch.setenv(f"{name.upper()}_ROOT", str(root / name))
            rows = [(tiny.picture(0, 1), names[0], names[1], 0.7, "")]
            subsets[name] = evaluating.write_subset(root / f"{name}-subset", rows, evaluating.FIVE)
        yield subsets


def dry_run(module, argv, capsys) -> tuple[dict, str]:
    """The settings that a dry run prints, which are those that a run records, and all that it prints."""
    assert run_main(module.main, [*map(str, argv), "--recipe", "paper", "--dry_run"]) == 0
    text = capsys.readouterr().out
    lines = itertools.dropwhile(lambda line: not line.startswith("dataset: "), text.splitlines())
    return yaml.safe_load("\n".join(itertools.takewhile(re.compile(r"[a-z_0-9]+:|[ -]").match, lines))) or {}, text


AUTHORS = {
    "optimizer": "sgd", "momentum": "plain", "lr_schedule": "scaled_cosine", "weight_decay": 5e-4, "weight_decay_on": "all",
    "nepoch": 120, "warmup_epochs": 12, "weights": "torchvision",  # a tenth of the steps is warm-up
}  # fmt: skip


@pytest.mark.parametrize("model", RATES)
def test_the_dry_run_of_every_row_of_stage_3_is_the_authors(model, copies, capsys):
    names, shots = itertools.cycle([model, OTHER_NAMES[model][0]]), itertools.cycle(SHOTS)
    mixings = itertools.cycle(("cutmix", "mixup"))
    for (dataset, rates), kind in zip(RATES[model].items(), mixings, strict=False):
        for resolution, rate in rates.items():
            argv = [
                "--dataset",
                dataset,
                "--res_mode",
                resolution,
                "--model",
                next(names),
                f"--use_{kind}",
                "--gpu",
                "cpu",
            ]
            argv += ["--examples_per_class", count := next(shots), "--syndata_dir", copies[dataset], "--nepoch", 120]
            record, _ = dry_run(train_cls, argv, capsys)
            row = (model, dataset, resolution)
            assert {name: record[name] for name in AUTHORS} == AUTHORS, row
            assert (record["lr"], record["batch_size"]) == (rate, BATCHES[model][resolution]), row
            assert (record["loss"]["criterion"], record["loss"]["smoothing"]) == ("ls", 0.1), row
            mixing = record["mixing"]
            assert (mixing["probability"], mixing[f"{kind}_alpha"], mixing["cutmix_per"]) == (0.5, 1, "item"), row
            assert record["draws"] == {"mode": "item", "probability": SHOTS[count], "balanced": False}, row
            setting = record["setting"]
            split = "half" if dataset in ("flower", "caltech") else "official"
            assert (setting["val_fraction"], setting.get("split", "official")) == (0, split), row


@pytest.mark.parametrize("task", ["vanilla", "imbalanced"])
def test_the_dry_runs_of_stages_1_and_2_are_the_authors(task, copies, tiny_base, capsys, tmp_path):
    tail = task == "imbalanced"
    for dataset, strategy in (
        ("cub", "real-mix"),
        ("aircraft", "real-guidance"),
        ("flower", None),
        ("caltech", "real-mix"),
    ):
        argv, half = ["--dataset", dataset, "--task", task], dataset in ("flower", "caltech")
        out = ["--pretrained_model_name_or_path", tiny_base, "--report_to", "none", "--output_dir", tmp_path / "run"]
        record, _ = dry_run(train_lora, [*argv, *out], capsys)
        assert (record["learning_rate"], record["ti_learning_rate"], record["effective_batch"]) == (5e-5, 5e-5, 8)
        setting = {"split": "official", **record["setting"]}
        assert (record["training_templates"], setting["val_fraction"]) == ("photo", 0)
        assert setting["split"] == ("half" if half else "official")
        assert setting["imbalance_profile"] == ("original" if tail else "exponential")
        if strategy is None:  # the small copy of flower has images of few classes, of which stage 2 cannot plan
            continue
        argv += [
            "--model_path",
            tiny_base,
            "--sample_strategy",
            strategy,
            "--gpu_ids",
            "cpu",
            "--output_root",
            tmp_path,
        ]
        text, mixed = dry_run(sample_mp, argv, capsys)[1], strategy == "real-mix"
        values = {
            "val_fraction 0": True,
            "pairing independent": mixed,
            "split half": half,
            "imbalance_profile original": tail,
        }
        assert f"recipe paper: {', '.join(value for value, holds in values.items() if holds)}\n" in text
        assert ("pairing mixed (independent)" if mixed else "pairing same") in text


@pytest.mark.parametrize("dataset", ["cub", "flower"])
def test_the_dry_run_of_the_long_tail_is_the_authors(dataset, copies, capsys):
    tail = ["--dataset", dataset, "--task", "imbalanced", "--gpu", "cpu", "--syndata_dir", copies[dataset]]
    record, _ = dry_run(train_cls, [*tail, "--use_cutmix"], capsys)
    training = {
        "lr": 0.005,
        "batch_size": 128,
        "weight_decay": 2e-4,
        "nepoch": 200,
        "lr_schedule": "step",
        "warmup_epochs": 5,
    }
    training |= {"augmentation": "resized_crop", "synthetic_draw": "inverse_frequency"}
    assert {name: record[name] for name in training} == training
    loss = {"criterion": "ce", "class_weight_mean": "weights", "ldam_scale": 30, "cb_beta": 0.9999}
    assert {name: record["loss"][name] for name in loss} == loss
    mixing = {"probability": 0.5, "unmixed_epochs": [4, 3], "cutmix_alpha": 1}
    assert {name: record["mixing"][name] for name in mixing} == mixing
    assert record["draws"]["probability"] == 0.3
    assert (record["setting"]["imbalance_profile"], record["setting"]["val_fraction"]) == ("original", 0)
    assert record["setting"].get("split", "official") == ("half" if dataset == "flower" else "official")
    assert record["shot_thresholds"] == {"cub": [20, 5], "flower": [30, 10]}[dataset]
    assert stage_3("--dataset", dataset, "--recipe", "paper").training.augmentation == "crop"


@pytest.mark.parametrize(("model", "name"), [(m, n) for m, names in OTHER_NAMES.items() for n in names])
def test_a_rate_is_found_under_every_name_of_the_network(model, name):
    rates = [stage_3("--dataset", "elpv", "--model", m).training.lr for m in (model, name)]
    assert rates[0] == rates[1] == (1e-3 if model == "vit_b_16" else None)
    assert classify.network(model) == classify.network(name) != classify.network("resnet18")


def test_stage_2_pairs_as_the_authors_only_where_classes_are_mixed():
    parser = sample_mp.build_parser()
    for strategy, pairing in (("diff-mix", "independent"), ("real-mix", "independent"), ("diff-aug", "balanced")):
        argv = ["--dataset", "cub", "--recipe", "paper", "--sample_strategy", strategy]
        assert parser.parse_args(argv).pairing == pairing


def test_flags_win_and_the_rest_is_said_and_recorded():
    config = stage_3("--dataset", "cub", "--recipe", "paper", "--lr=0.3", "--res_mode", 448, "--criterion", "ce")
    assert (config.training.lr, config.training.batch_size, config.loss.criterion) == (0.3, 64, "ce")
    recorded = config.record()["recipe"]
    assert (
        recorded.startswith("paper: ")
        and "batch_size 64" in recorded
        and " lr " not in recorded
        and "criterion" not in recorded
    )
    (line,) = (line for line in runs.arguments_text(config.record()).splitlines() if line.startswith("recipe: "))
    assert recorded in line
    assert stage_3("--dataset", "cub").run.recipe == finetune.parse(["--dataset", "cub"]).record()["recipe"]


@pytest.mark.parametrize(
    ("argv", "message"),
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
def test_a_missing_row_is_one_line(argv, message):
    with pytest.raises(UserError, match=message):
        stage_3(*argv.split())


def write(folder, text):
    (folder / registry.RECIPES).write_text(text)
    return ("--dataset", "elpv", "--config_dir", folder)


def test_recipes_of_ones_own_stand_beside_ours(tmp_path):
    argv = write(
        tmp_path,
        "mine:\n  train_cls:\n    - set: {nepoch: 7, syndata_key: [a, b], lr: 1e-3}\n"
        "    - {when: {res_mode: 128, gamma: 0.50}, set: {lr: 0.5}}\n",
    )
    config = stage_3(*argv, "--recipe", "mine", "--res_mode", 128)
    assert (config.training.nepoch, config.training.lr) == (7, 0.5) and config.synthetic.syndata_key == ("a", "b")
    assert config.run.recipe == "mine: nepoch 7, syndata_key a b, lr 0.5"
    assert stage_3(*argv, "--recipe", "mine").training.lr == 1e-3
    assert stage_3(*argv).run.recipe == "default: sets nothing"
    assert "-mine-" in classify_run_name(config)


@pytest.mark.parametrize(("keys", "gamma"), [("a", 3), ("b a", 3), ("a c", 0.5), ("None", 0.5), ("c", 0.5)])
def test_a_row_may_ask_for_a_flag_of_several_values(tmp_path, keys, gamma):
    rows = "- set: {lr: 1, gamma: 0.5}\n    - {when: {syndata_key: [a, b]}, set: {gamma: 3}}"
    argv = write(tmp_path, f"mine:\n  train_cls:\n    {rows}\n")
    assert stage_3(*argv, "--recipe", "mine", "--syndata_key", *keys.split()).synthetic.gamma == gamma


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
        ("- {set: {use_cutmix: true}}", "--use_cutmix is a switch, which a recipe neither sets nor asks for"),
        ("- {when: {dataset: elsewhere, modle: x}, set: {lr: 1}}", "unknown flag 'modle': did you mean 'model'"),
        ("- {when: {dataset: }, set: {lr: 1}}", "expected rows"),
        ("- {when: {dataset: {a: b}}, set: {lr: 1}}", "expected rows"),
        ("{set: {lr: fast}}", "argument --lr: 'fast' is not a number"),
        ("- {lr: 1}", "expected rows '- {when: {flag: value}, set: {flag: value}}'"),
        ("{lr: 1}", "expected rows"),
        ("- {when: , set: {lr: 1}}", "expected rows"),
    ],
)
def test_rows_that_are_none_are_named(tmp_path, rows, message):
    argv = write(tmp_path, f"mine:\n  train_cls:\n    {rows}\n")
    with pytest.raises(UserError, match=re.escape(message)):
        stage_3(*argv, "--recipe", "mine")


def test_a_recipe_without_stages_is_named(tmp_path):
    write(tmp_path, "mine: [lr, 1]\n")
    with pytest.raises(UserError, match="recipe 'mine' of .* holds a list: expected stages with their rows"):
        registry.recipe("mine", "train_cls", tmp_path)


def test_a_section_that_is_no_stage_is_named(tmp_path):
    write(tmp_path, "mine:\n  train-lora:\n    - set: {max_train_steps: 500}\n")
    with pytest.raises(UserError, match="unknown stage in recipe 'mine' of .*'train-lora': did you mean 'train_lora'"):
        registry.recipe("mine", "train_lora", tmp_path)


def test_a_table_of_learning_rates_of_earlier_versions_is_refused_by_name(tmp_path):
    (tmp_path / registry.FORMER_RATES).write_text("cub:\n  resnet50: 0.05\n")
    for module in (train_cls, train_lora):
        with pytest.raises(
            UserError, match="learning_rates.yaml is no longer read: write its rates into .*recipes.yaml"
        ):
            module.build_parser().parse_args(["--dataset", "cub", "--config_dir", str(tmp_path)])


@pytest.mark.parametrize(
    ("argv", "processes", "size", "steps"),
    [("", 1, 8, 1), ("", 4, 2, 1), ("--train_batch_size 2", 1, 2, 4), ("--train_batch_size 3", 1, None, 0),
     ("--gradient_accumulation_steps 2", 2, 2, 2), ("--effective_batch 16", 2, 8, 1), ("", 3, None, 0),
     ("--train_batch_size 1 --gradient_accumulation_steps 2", 1, None, 0),  # micro-batches of 4
     ("--train_batch_size 4 --gradient_accumulation_steps 2", 1, 4, 2), ("--train_batch_size 32", 1, 8, 1)],
)  # fmt: skip
def test_stage_1_takes_batches_of_8_over_all_processes(argv, processes, size, steps):
    config = finetune.parse(["--dataset", "cub", "--recipe", "paper", *argv.split()])
    assert config.images.templates == ("a photo of a {}",)
    if size is None:
        with pytest.raises(UserError, match="--effective_batch 8: it does not split evenly over"):
            config.train.split(processes)
    else:
        train = config.train.split(processes)
        assert (train.train_batch_size, train.gradient_accumulation_steps) == (size, steps)
        assert replace(config, train=train).record(processes)["effective_batch"] == (16 if "16" in argv else 8)


def test_training_templates(tmp_path):
    own = finetune.parse(["--dataset", "cub"])
    assert own.images.templates == prompts.TEMPLATES and own.train.split(2) is own.train
    older = finetune.parse(["--dataset", "cub", "--training_templates", "textual_inversion"]).images.templates
    assert len(set(older)) == 27 and all(text.count("{}") == 1 for text in older)
    (tmp_path / "t.txt").write_text("a sketch of a {}\n{}\n")
    argv = ["--dataset", "cub", "--training_templates", str(tmp_path / "t.txt")]
    assert finetune.parse(argv).images.templates == ("a sketch of a {}", "{}")
    with pytest.raises(UserError, match="--training_templates .*: expected a text file"):
        assert finetune.parse([*argv[:-1], str(tmp_path / "none.txt")]).images.templates


# ------------------------------------------------------------------------------------------- the authors' training, plainly


NETWORK = "test_resnet"


def plain_training(config, dataset):
    """Mean loss of each epoch of a training by the authors' description, on the batches and draws of stage 3.

    CutMix on half of the images or mixup on half of the batches, label smoothing 0.1, SGD with
    momentum 0.9 and weight decay 5e-4 on every parameter, a cosine over all steps times a linear warm-up over a tenth of them.
    """
    training, classes = config.training, len(dataset.class_names)
    torch.manual_seed(derive_seed(config.seed, "classify", "weights"))
    model = timm.create_model(NETWORK, num_classes=classes).to(memory_format=torch.channels_last)
    batches = TrainBatches(dataset.train, None, config.synthetic, 64, training.batch_size, config.seed)
    total = training.nepoch * len(dataset.train) // training.batch_size
    optimizer = torch.optim.SGD(model.parameters(), lr=training.lr, momentum=0.9, weight_decay=5e-4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total)
    normalise = Normaliser(model.pretrained_cfg["mean"], model.pretrained_cfg["std"], torch.device("cpu"))
    losses, done = [], 0
    for epoch in range(training.nepoch):
        model.train()
        sums = []
        for step, (pixels, labels) in enumerate(batches.epoch(epoch)):
            images = normalise(pixels)
            rng = numpy_rng(config.seed, "classify", "mix", epoch, step)
            mixed = rng.random() < 0.5
            if config.mixing.use_mixup and mixed:
                ratio = rng.beta(1, 1)
                images = ratio * images + (1 - ratio) * images.flip(0)
                labels = ratio * labels + (1 - ratio) * labels.flip(0)
            if config.mixing.use_cutmix:
                whole, others = images.clone(), labels.clone()
                for item, (top, bottom, left, right) in enumerate(item_boxes(len(images), 64, 64, config.mixing, rng)):
                    images[item, :, top:bottom, left:right] = whole[-1 - item, :, top:bottom, left:right]
                    share = (bottom - top) * (right - left) / 64**2
                    labels[item] = (1 - share) * others[item] + share * others[-1 - item]
            labels = 0.9 * labels + 0.1 / classes
            loss = -(labels * model(images).log_softmax(1)).sum(1).mean()
            rate = cosine.get_last_lr()[0]
            for group in optimizer.param_groups:  # the warm-up dampens the cosine
                group["lr"] = rate * min(1, (done + 1) / max(1, int(0.1 * total)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for group in optimizer.param_groups:
                group["lr"] = rate
            cosine.step()
            done += 1
            sums.append(loss.item())
        losses.append(sum(sums) / len(sums))
    return losses


@pytest.mark.parametrize("kind", ["use_cutmix", "use_mixup"])
def test_ten_epochs_follow_the_authors_training(kind, image_folder, tmp_path):
    argv = ["--dataset", f"folder:{image_folder}", "--recipe", "paper", "--model", NETWORK, "--weights", "none"]
    argv += ["--res_mode", "64", "--nepoch", "10", "--batch_size", "7", "--lr", "0.01", "--gpu", "cpu", f"--{kind}"]
    argv += ["--output_dir", str(tmp_path / "run")]
    assert train_cls.main(argv) == 0
    with open(tmp_path / "run" / "epochs.csv") as rows:
        losses = [float(row["train_loss"]) for row in csv.DictReader(rows)]
    config = stage_3(*argv)
    dataset = load_dataset(config.dataset, config.setting)
    assert len(dataset.train) % 7  # an epoch drops a part of a batch, which the schedule counts
    assert losses == pytest.approx(plain_training(config, dataset), rel=0, abs=1e-5) and len(losses) == 10


def test_a_box_for_each_image_whatever_part_of_the_batch_it_is_in():
    images, targets = torch.randn(9, 3, 16, 12), torch.eye(9)
    settings = MixSettings(use_cutmix=True, cutmix_per="item", mix_prob=0.5)
    whole = mix(images, targets, settings, np.random.default_rng(3))
    changed = (whole[0] != images).any(1)  # (9, 16, 12)
    assert len({tuple(pixels.flatten().tolist()) for pixels in changed}) > 3
    assert torch.allclose(whole[1].sum(1), torch.ones(9))
    shares = changed.float().mean((1, 2))
    shares[4] = 0  # the middle one is its own partner
    assert torch.allclose(1 - whole[1].diagonal()[:4], shares[:4]) and (shares > 0).any() and (shares[:4] == 0).any()
    for part in range(2):
        positions = share_of(9, part, 2)
        rows = mix(images[positions], targets[positions], settings, np.random.default_rng(3), share=(positions, 9))
        assert torch.equal(rows[0], whole[0][positions]) and torch.equal(rows[1], whole[1][positions])


# ------------------------------------------------------------------------------------------------- torchvision's weights


def test_torchvisions_vit_computes_the_same_under_timms_names():
    from timm.models.vision_transformer import VisionTransformer
    from torchvision.models import vision_transformer as torchvision

    size = {"image_size": 32, "patch_size": 16, "num_layers": 2, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 16}
    theirs = torchvision.VisionTransformer(**size, num_classes=5).eval()
    torch.nn.init.normal_(theirs.heads.head.weight)
    ours = VisionTransformer(img_size=32, patch_size=16, depth=2, num_heads=2, embed_dim=8, mlp_ratio=2, num_classes=5)
    ours.load_state_dict(torchvision_weights.rename_torchvision_vit(theirs.state_dict()))
    images = torch.randn(3, 3, 32, 32)
    assert torch.allclose(ours.eval()(images), theirs(images), atol=1e-6)


def test_which_weights_of_torchvision():
    assert models.weights_identity("resnet50", "torchvision") == "timm/resnet50.tv_in1k"
    assert models.weights_identity("resnet50", "torchvision") != models.weights_identity("resnet50", "auto")
    assert (
        models.weights_identity("vit_b_16", "torchvision")
        == torchvision_weights.SWAG_URL
        == SWAG.IMAGENET1K_SWAG_E2E_V1.url
    )
    for name in ("convnext_tiny", "resnet50.a1_in1k", "vit_base_patch16_224.dino"):
        with pytest.raises(UserError, match=f"--weights torchvision: it has none for --model {name}"):
            models.weights_identity(name, "torchvision")
