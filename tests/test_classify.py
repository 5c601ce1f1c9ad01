"""Stage 3: soft labels, mixing, losses and metrics against formulas and timm; the runs as a whole."""

import json
import os
import signal
import time

import numpy as np
import pytest
import torch
from helpers import ROWS, classify_arguments, contents, refused, run_here, start, write_subset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import tiny
from semantic_aug import meta_csv, tensors
from semantic_aug.classify import data, inference, mixing, models, trainer
from semantic_aug.classify.config import LossSettings, MixSettings, SyntheticSettings, TrainSettings
from semantic_aug.classify.data import EvalBatches, ImageStore, Normaliser, TrainBatches, crop
from semantic_aug.classify.losses import make_criterion, one_hot, smooth
from semantic_aug.classify.metrics import Meter, write_scores
from semantic_aug.classify.optimizer import learning_rate, learning_rate_at
from semantic_aug.datasets import Setting, load_dataset
from semantic_aug.datasets.fingerprint import hash_images
from semantic_aug.datasets.synthetic import read_subset, read_subsets, soft_labels, write_sources
from semantic_aug.errors import UserError

# ------------------------------------------------------------------------------------------------------ soft labels


@given(st.floats(0.01, 1), st.floats(0.01, 5), st.integers(0, 4), st.integers(0, 4))
@settings(max_examples=100)
def test_soft_labels_are_the_formula(strength, gamma, source, target):
    label = soft_labels(np.array([source]), np.array([target]), np.array([strength]), gamma, 5)[0]
    wanted = np.zeros(5)
    wanted[source] += 1 - strength**gamma
    wanted[target] += strength**gamma
    assert np.allclose(label, wanted, atol=1e-6) and label.sum() == pytest.approx(1, abs=1e-6) and (label >= 0).all()


def test_soft_labels_by_hand():
    labels = soft_labels(np.array([0, 0, 2]), np.array([1, 1, 2]), np.array([0.25, 1.0, 0.5]), 0.5, 3)
    assert labels.tolist() == [[0.5, 0.5, 0], [0, 1, 0], [0, 0, 1]]


# ----------------------------------------------------------------------------------------------------------- mixing


def batch(size=8, classes=5):
    g = torch.Generator().manual_seed(0)
    return torch.randn(size, 3, 16, 16, generator=g), torch.softmax(torch.randn(size, classes, generator=g), -1)


def test_mixup_equals_timms(monkeypatch):
    from timm.data.mixup import Mixup

    images, _ = batch()
    labels = torch.arange(8) % 5
    timms = Mixup(mixup_alpha=1.0, label_smoothing=0.0, num_classes=5)
    monkeypatch.setattr(timms, "_params_per_batch", lambda: (0.3, False))
    wanted_x, wanted_y = timms(images.clone(), labels)
    x, y = mixing.mixup(images, one_hot(labels, 5), 0.3)
    assert torch.allclose(x, wanted_x) and torch.allclose(y, wanted_y)


def test_cutmix_equals_timms(monkeypatch):
    import timm.data.mixup as timm_mixup

    images, _ = batch()
    labels = torch.arange(8) % 5
    box = mixing.cut_box(16, 16, 0.4, np.random.default_rng(3))
    timms = timm_mixup.Mixup(cutmix_alpha=1.0, label_smoothing=0.0, num_classes=5)
    monkeypatch.setattr(timms, "_params_per_batch", lambda: (0.4, True))
    monkeypatch.setattr(timm_mixup, "rand_bbox", lambda *_, **__: box)
    wanted_x, wanted_y = timms(images.clone(), labels)
    y = one_hot(labels, 5)
    x, y = mixing.paste(images, y, images.flip(0), y.flip(0), box)
    assert torch.equal(x, wanted_x) and torch.allclose(y, wanted_y)


@given(st.sampled_from([(0.4, 0.0), (0.0, 1.0), (0.4, 1.0), (0.0, 0.0)]), st.floats(0, 0.5), st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_targets_sum_to_one_under_every_combination(alphas, smoothing, seed):
    images, targets = batch()
    _, mixed = mixing.mix(
        images,
        targets,
        MixSettings(use_mixup=alphas[0] > 0, mixup_alpha=alphas[0], use_cutmix=alphas[1] > 0, cutmix_alpha=alphas[1]),
        np.random.default_rng(seed),
    )
    final = smooth(mixed, smoothing)
    assert torch.allclose(final.sum(-1), torch.ones(8), atol=1e-5) and (final >= 0).all()


def test_mixing_can_be_off_and_rare():
    images, targets = batch()
    assert mixing.mix(images, targets, MixSettings(), np.random.default_rng(0))[0] is images
    rare = MixSettings(use_cutmix=True, cutmix_alpha=1.0, mix_prob=0.25)
    changed = [mixing.mix(images, targets, rare, np.random.default_rng(i))[0] is not images for i in range(400)]
    assert 0.17 < np.mean(changed) < 0.33


# --------------------------------------------------------------------------------------------------- losses, metrics


def test_cross_entropy_of_soft_labels_equals_torchs():
    logits, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    hard = torch.nn.functional.cross_entropy
    for name, smoothing in (("ce", 0.0), ("ls", 0.1)):
        criterion = make_criterion(LossSettings(criterion=name, smoothing=0.1), [1] * 4, torch.device("cpu"))
        losses = criterion(logits, one_hot(labels, 4), 0)
        assert torch.allclose(losses, hard(logits, labels, label_smoothing=smoothing, reduction="none"))


def test_metrics_by_hand():
    meter = Meter(6, torch.device("cpu"))
    logits = torch.zeros(4, 6)
    logits[0, 0], logits[1, 1], logits[2, 0], logits[3, 5] = 9, 9, 9, 9
    logits[2] += torch.tensor([0.0, 5, 4, 3, 2, -5])
    meter.add(logits, torch.tensor([0, 1, 5, 5]))
    scores = meter.result()
    assert scores.top1 == 0.75 and scores.top5 == 0.75  # the third's true class is the sixth best
    assert scores.confusion[5, 0] == 1 and scores.confusion[5, 5] == 1
    assert scores.macro == pytest.approx((1 + 1 + 0.5) / 3) and np.isnan(scores.per_class[2])


def test_class_names_with_dollars_are_no_formulas(tmp_path):
    meter = Meter(2, torch.device("cpu"))
    meter.add(torch.eye(2), torch.tensor([0, 1]))
    write_scores(meter.result(), ("$5 (10%) to $10", r"a $\frac$"), tmp_path, "test")
    assert (tmp_path / "test_confusion.png").stat().st_size


def test_warm_up_and_cosine():
    rates = [learning_rate_at(s, 100, 10, 1.0) for s in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and max(rates) == 1.0 and rates[-1] < 0.01
    assert rates[55] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("warmup", [0.5, 1.5, 2.5])
def test_no_part_of_an_epoch_warms_up_beyond_the_peak(warmup):
    settings = TrainSettings(nepoch=25, lr=0.1, lr_schedule="step", warmup_epochs=warmup)
    assert max(learning_rate(settings, epoch, 8, 8) for epoch in range(25)) == 0.1


def test_a_weight_file_says_how_its_images_were_normalised(tmp_path):
    model, _ = models.make_model("resnet18", 3, 32, "none")
    tensors.save_tensors(tmp_path / "plain.safetensors", model.state_dict(), {"classes": ["a", "b", "c"]})
    metadata = {"classes": ["a", "b", "c"], "mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 1.0]}
    tensors.save_tensors(tmp_path / "other.safetensors", model.state_dict(), metadata)
    means = [
        models.make_model("resnet18", 3, 32, str(tmp_path / f"{n}.safetensors"))[1].mean for n in ("plain", "other")
    ]
    assert means == [(0.485, 0.456, 0.406), (0.1, 0.2, 0.3)]


@pytest.mark.parametrize("record", ["", "model: resnet18\n", "- model\n"])
def test_a_classifier_with_an_incomplete_record_is_refused(record, tmp_path):
    (tmp_path / "args.yaml").write_text(record)
    tensors.save_tensors(tmp_path / "model.safetensors", {"fc.bias": torch.zeros(2)}, {"classes": ["a", "b"]})
    with pytest.raises(UserError, match="args.yaml is damaged or not train_cls.py's"):
        inference.load_run(tmp_path)


def test_the_stepped_schedule_is_ldam_drws():
    settings = TrainSettings(nepoch=200, lr=0.005, lr_schedule="step")
    rates = [learning_rate(settings, epoch * 12 + step, 12 * 128, 128) for epoch in range(200) for step in range(12)]
    wanted = [0.005 * (epoch + 1) / 5 for epoch in range(5)] + [0.005] * 155 + [5e-5] * 20 + [5e-7] * 20
    assert rates == pytest.approx(np.repeat(wanted, 12))


# ------------------------------------------------------------------------------------------------------------- data


def test_a_subset_of_another_tool_reads(tmp_path, animals):
    subset = read_subset(write_subset(tmp_path / "s", [("blue_jay", "TOAD", 0.7), ("red fox", "toad", 0.5)]), animals)
    assert subset.source.tolist() == [0, 1] and subset.target.tolist() == [2, 2] and subset.image(0).size == (32, 32)
    both = read_subsets([tmp_path / "s", tmp_path / "s"], animals)
    assert len(both) == 4 and both.labels(0.5, 3).shape == (4, 3)


def test_a_filtered_variant_reads_its_own_table(tmp_path, animals):
    write_subset(tmp_path / "s", ROWS)
    lines = (tmp_path / "s" / "meta.csv").read_text().splitlines()
    (tmp_path / "s" / "meta.filtered.csv").write_text("\n".join(lines[:2]) + "\n")
    assert len(read_subset(f"{tmp_path / 's'}#filtered", animals)) == 1


def test_bad_subsets_are_one_clear_line(tmp_path, animals):
    with pytest.raises(UserError, match="is not a folder"):
        read_subset(tmp_path / "none", animals)
    write_subset(tmp_path / "foreign", [("blue jay", "newt", 0.7)])
    with pytest.raises(
        UserError, match="has the class 'newt', which data set animals-\\w+ does not have \\(nearest: 'toad'"
    ):
        read_subset(tmp_path / "foreign", animals)
    write_subset(tmp_path / "empty", [])
    with pytest.raises(UserError, match="is empty"):
        read_subset(tmp_path / "empty", animals)
    folder = write_subset(tmp_path / "gone", ROWS)
    next((folder / "data").rglob("*000001*")).unlink()
    with pytest.raises(UserError, match="row 3: image .*000001.* is missing"):
        read_subset(folder, animals)
    folder = write_subset(tmp_path / "out", ROWS)
    text = (folder / "meta.csv").read_text().replace("blue_jay/toad-000000-0.7.png", "../../secret.png")
    (folder / "meta.csv").write_text(text)
    with pytest.raises(UserError, match="leads outside"):
        read_subset(folder, animals)
    (folder / "meta.csv").unlink()
    (folder / "config.yaml").write_text("x: 1")
    with pytest.raises(UserError, match="is unfinished"):
        read_subset(folder, animals)


def test_sources_from_validation_or_test_are_refused(tmp_path, animals, image_folder):
    write_subset(tmp_path / "leak", ROWS[:2])
    rows = [("blue jay", "toad", 0, 0.7, "blue_jay/toad-000000-0.7.png", animals.val.keys[0], 0)]
    meta_csv.write(tmp_path / "leak" / "meta.csv", rows)
    with pytest.raises(UserError, match="1 of 1 source images are not training images.*a validation image"):
        read_subset(tmp_path / "leak", animals)
    assert len(read_subset(tmp_path / "leak", animals, allow_other_sources=True)) == 1
    few = load_dataset(f"folder:{image_folder}", Setting(examples_per_class=1))
    other = next(k for k in animals.train.keys if k not in few.train.keys)
    meta_csv.write(tmp_path / "leak" / "meta.csv", [(*rows[0][:5], other, 0)])
    with pytest.raises(UserError, match="not training images of animals-\\w+_1shot"):
        read_subset(tmp_path / "leak", few)


def test_partners_are_checked_as_sources_are(tmp_path, animals):
    folder, train = write_subset(tmp_path / "s", ROWS[:1]), animals.train
    jay, toad = (train.keys[int(np.flatnonzero(train.labels == k)[0])] for k in (0, 2))
    row = ("blue jay", "toad", 0, 0.7, "blue_jay/toad-000000-0.7.png", jay, 0)

    def refused_partner(partner, message):
        meta_csv.write(folder / "meta.csv", [(*row, partner)], (*meta_csv.FURTHER_COLUMNS, "Partner Image"))
        with pytest.raises(UserError, match=message):
            read_subset(folder, animals)
        assert len(read_subset(folder, animals, allow_other_sources=True)) == 1

    refused_partner(animals.test.keys[0], "1 of 2 source images are not training images.*a test image")
    refused_partner(jay, f"1 of 1 source images have another label .*'{jay}': toad -> blue jay")
    write_sources(folder, [jay, toad], hash_images(train.take(np.array([0, 0]))).values)
    refused_partner(toad, f"1 of 2 source images have another content .*'{toad}' the first")


def test_a_subset_without_sources_is_refused_under_other_label_noise(tmp_path, animals, image_folder):
    def noisy(**values):
        return load_dataset(f"folder:{image_folder}", Setting(**values))

    folder = write_subset(tmp_path / "s", ROWS)  # as a strategy that starts from noise lists it, without source images
    (folder / "config.yaml").write_text("strategy: diff-gen\narguments: {corrupt_prob: 0.2, corrupt_classes: others}\n")
    assert len(read_subset(folder, noisy(corrupt_prob=0.2))) == 4
    for other, change in (
        ({}, "corrupt_prob: 0.2 -> 0.0"),
        ({"corrupt_prob": 0.2, "corrupt_classes": "all"}, "corrupt_classes: 'others' -> 'all'"),
        ({"corrupt_prob": 0.2, "subset_seed": 1}, "subset_seed: 0 -> 1"),
    ):
        with pytest.raises(UserError, match=f"made under other labels than those of animals.*{change}.*--corrupt_prob"):
            read_subset(folder, noisy(**other))
    assert len(read_subset(folder, animals, allow_other_sources=True)) == 4
    for clean in ("arguments: {dataset: x, subset_seed: 5}", "arguments: {corrupt_prob: null, corrupt_classes: null}"):
        (folder / "config.yaml").write_text(clean + "\n")
        assert len(read_subset(folder, animals)) == 4
        with pytest.raises(UserError, match="corrupt_prob: 0.0 -> 0.2"):
            read_subset(folder, noisy(corrupt_prob=0.2))
    for foreign in ("seed: 1\n", "!!python/object:argparse.Namespace {seed: 1}\n"):
        (folder / "config.yaml").write_text(foreign)
        assert len(read_subset(folder, noisy(corrupt_prob=0.2))) == 4


def test_the_share_of_synthetic_items_is_p(tmp_path, animals):
    synthetic = read_subset(write_subset(tmp_path / "s", ROWS), animals)
    for p in (0.0, 0.3, 1.0):
        batches = TrainBatches(animals.train, synthetic, SyntheticSettings(synthetic_prob=p), 28, 6, seed=1)
        drawn = [y for epoch in range(60) for _, y in batches.epoch(epoch)]
        targets = torch.cat(drawn)
        soft = ((targets > 0) & (targets < 1)).any(1)  # three of the four synthetic images have soft labels
        assert abs(soft.float().mean().item() - 0.75 * p) < 0.05 and len(drawn) == 180
        assert torch.allclose(targets.sum(1), torch.ones(len(targets)))


def test_synthetic_images_come_with_their_own_labels(tmp_path, animals):
    synthetic = read_subset(write_subset(tmp_path / "s", ROWS), animals)
    batches = TrainBatches(animals.train, synthetic, SyntheticSettings(synthetic_prob=1.0), 28, 6, seed=1)
    labels = synthetic.labels(0.5, 3)
    for pixels, targets in batches.epoch(0):
        for image, target in zip(pixels, targets):
            assert torch.allclose(target, torch.from_numpy(labels[int(image[14, 14, 1])]))  # green says which image


def test_batches_repeat_and_do_not_depend_on_the_cache(tmp_path, animals):
    synthetic = read_subset(write_subset(tmp_path / "s", ROWS), animals)

    def make(budget, seed=1):
        return TrainBatches(animals.train, synthetic, SyntheticSettings(synthetic_prob=0.5), 28, 6, seed, budget=budget)

    one, two, other = (list(b.epoch(3)) for b in (make(10**9), make(0), make(10**9, 2)))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(one, two))
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(one, other))


def test_batches_cut_on_the_device_are_the_same(tmp_path, animals, monkeypatch):
    monkeypatch.setattr(data, "COPIED_IMAGES", 4)
    synthetic = read_subset(write_subset(tmp_path / "s", ROWS), animals)
    half = SyntheticSettings(synthetic_prob=0.5)
    for subset in (synthetic, None):
        one, other = (TrainBatches(animals.train, subset, half, 28, 6, 1, cache=cache) for cache in ("off", "device"))
        for a, b in zip(one.epoch(3), other.epoch(3), strict=True):
            assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
        assert other.real.pixels is None  # held once
    one, other = (EvalBatches(animals.test, 28, 4, cache=cache) for cache in ("off", "device"))
    for a, b in zip(one.part(), other.part(), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    monkeypatch.setattr(data, "available_memory", lambda: 18 * 32 * 32 * 3)
    with pytest.raises(UserError, match=r"^--cache device: 18 images of 32 px take .* more than 40% of the .* on cpu"):
        TrainBatches(animals.train, None, half, 28, 6, 1, cache="device")


def test_crops_are_each_images_own():
    pixels = np.arange(2 * 5 * 5 * 3, dtype=np.uint8).reshape(2, 5, 5, 3)
    out = crop(pixels, np.array([0, 2]), np.array([1, 0]), 3, np.array([False, True]))
    assert np.array_equal(out[0], pixels[0, 0:3, 1:4]) and np.array_equal(out[1], pixels[1, 2:5, 2::-1])
    assert np.array_equal(
        crop(pixels, np.array([0, 2]), np.array([1, 0]), 3, np.zeros(2, bool))[1], pixels[1, 2:5, 0:3]
    )


def test_evaluation_crops_the_centre_in_order(animals):
    batches = [(pixels, labels) for _, pixels, labels in EvalBatches(animals.test, 28, 4).part()]
    assert [len(x) for x, _ in batches] == [4, 4, 1] and torch.cat(
        [y for _, y in batches]
    ).tolist() == animals.test.labels.tolist()
    resized = np.asarray(animals.test.image(0).resize((32, 32), Image.Resampling.BICUBIC))
    assert np.array_equal(batches[0][0][0].numpy(), resized[2:30, 2:30])


def test_normalisation_equals_torchvisions():
    from torchvision.transforms import functional

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    image = tiny.picture(1, 1)
    wanted = functional.normalize(functional.to_tensor(image), mean, std)
    got = Normaliser(mean, std, torch.device("cpu"))(torch.from_numpy(np.asarray(image).copy())[None])
    assert torch.allclose(got[0], wanted, atol=1e-5)


def test_an_image_store_names_the_broken_image(tmp_path):
    def read(index):
        raise UserError(f"image {index} cannot be decoded")

    with pytest.raises(UserError, match="image 0 cannot be decoded"):
        ImageStore(read, 3, 8, 10**9)


# ----------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize(("photograph", "label"), [("flower.jpg", 985), ("china.jpg", 698)])  # ImageNet: daisy, palace
def test_packaged_imagenet_weights_recognise_photographs(photograph, label):
    from PIL import ImageOps
    from sklearn.datasets import load_sample_image

    image = ImageOps.fit(Image.fromarray(load_sample_image(photograph)), (224, 224), Image.Resampling.BICUBIC)
    with torch.no_grad():
        logits = models.efficientnet_lite0()(
            torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 127.5 - 1
        )
    assert int(logits.argmax()) == label


def test_every_packaged_tensor_is_used():
    import timm

    state = torch.load(models.efficientnet_lite0_file(), weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0")
    assert model.load_state_dict(models.rename_lite0(state, model)) and len(state) == len(model.state_dict())
    with pytest.raises(UserError, match="does not hold EfficientNet-Lite0"):
        models.rename_lite0(dict(list(state.items())[1:]), model)


def test_models_by_either_librarys_name():
    assert models.timm_name("vit_b_16") == "vit_base_patch16_224" and models.timm_name("resnet50") == "resnet50"
    with pytest.raises(UserError, match="unknown --model 'resnet5O': did you mean 'resnet50'"):
        models.timm_name("resnet5O")
    model, normalisation = models.make_model("vit_tiny_patch16_224", 3, 64, "none")
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 3) and normalisation.mean == (0.5, 0.5, 0.5)
    model, _ = models.make_model("tf_efficientnet_lite0", 4, 64)
    assert torch.equal(model.conv_stem.weight, models.efficientnet_lite0().conv_stem.weight)


def test_checkpoints_of_other_scripts_are_read(tmp_path, caplog):
    import argparse

    import timm

    caplog.set_level("INFO")
    donor = timm.create_model("resnet18", num_classes=3)
    state = donor.state_dict()
    other = {key: value + 1 for key, value in state.items()}
    files = {
        "timm": {"state_dict": state, "state_dict_ema": other, "args": argparse.Namespace(lr=0.1), "arch": "resnet18"},
        "ema": {"state_dict_ema": state},
        "ddp": {f"module.{key}": value for key, value in state.items()},
        "compiled": {"model": {f"module._orig_mod.{key}": value for key, value in state.items()}},
        "lightning": {
            "state_dict": {f"model.backbone.{k}": v for k, v in state.items()} | {"loss.weight": torch.ones(3)}
        },
        "moco": {f"module.{p}.{k}": v for p, s in (("encoder_k", other), ("encoder_q", state)) for k, v in s.items()},
    }
    for name, content in files.items():
        torch.save(content, tmp_path / f"{name}.pth")
        model, _ = models.make_model("resnet18", 3, 64, str(tmp_path / f"{name}.pth"))
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items()), name
    assert "'state_dict' is used; its moving average 'state_dict_ema' is passed over" in caplog.text
    assert "'state_dict_ema' is used" in caplog.text and "below 'encoder_q.' are used" in caplog.text
    torch.save({f"{p}.{k}": v for p in "ab" for k, v in state.items()}, tmp_path / "two.pth")
    with pytest.raises(UserError, match="several such networks .below 'a.', 'b.'."):
        models.make_model("resnet18", 3, 64, str(tmp_path / "two.pth"))
    torch.save({**state, "conv1.weight": state["conv1.weight"] * float("nan")}, tmp_path / "nan.pth")
    with pytest.raises(UserError, match="nan.pth holds values that are not finite .'conv1.weight'"):
        models.make_model("resnet18", 3, 64, str(tmp_path / "nan.pth"))
    torch.save({"state_dict": state, "model": torch.nn.Linear(1, 1)}, tmp_path / "module.pth")
    with pytest.raises(UserError, match="holds an object of torch.nn.modules.linear.Linear, not tensors alone"):
        models.make_model("resnet18", 3, 64, str(tmp_path / "module.pth"))


@pytest.mark.parametrize(
    ("name", "resolution", "smallest", "fits"),
    [("resnet18", 32, 1, False), ("resnet18", 64, 1, True), ("resnet18", 32, 2, True), ("test_vit", 160, 1, True)],
)
def test_one_image_is_refused_only_where_batch_norm_sees_one_value(name, resolution, smallest, fits):
    model, _ = models.make_model(name, 3, resolution, "none")
    image = torch.zeros(smallest, 3, resolution, resolution)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    if fits:
        models.check_batch_norm(model.train(), resolution, smallest, "advice")
        model(image)
    else:
        with pytest.raises(UserError, match="a single image.*BatchNorm.*advice"):
            models.check_batch_norm(model.train(), resolution, smallest, "advice")
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        with pytest.raises(ValueError, match="more than 1 value"):
            model(image)


@pytest.mark.parametrize(
    ("name", "resolution"), [("resnet18", 16), ("test_vit", 128), ("vit_b_16", 100), ("halonet26t", 256)]
)
def test_a_resolution_that_a_model_takes_is_not_refused(name, resolution):
    state = torch.get_rng_state()
    models.check_resolution(name, resolution)
    assert torch.equal(torch.get_rng_state(), state)


class NeedsValues(torch.nn.Module):
    """Takes shapes from values, which tensors on the meta device do not have."""

    def __init__(self, largest):
        super().__init__()
        self.largest = largest

    def forward(self, images):
        if int(images.new_full((), images.shape[-1])) > self.largest:
            raise AssertionError
        return images


def test_only_a_model_that_fails_with_values_is_refused(monkeypatch):
    monkeypatch.setattr(models, "make_model", lambda *_: (NeedsValues(32), None))
    models.check_resolution("resnet18", 32)
    with pytest.raises(
        UserError, match=r"--res_mode 64: --model resnet18 .*64 x 64 pixels \(AssertionError\); give another"
    ):
        models.check_resolution("resnet18", 64)


def test_weights_from_files(tmp_path):
    import timm
    from safetensors.torch import save_file

    donor = timm.create_model("resnet18", num_classes=1000)
    torch.save(donor.state_dict(), tmp_path / "w.pth")
    model, _ = models.make_model("resnet18", 3, 64, str(tmp_path / "w.pth"))
    assert torch.equal(model.layer1[0].conv1.weight, donor.layer1[0].conv1.weight) and model.fc.out_features == 3
    former = {key: value for key, value in donor.state_dict().items() if not key.endswith("num_batches_tracked")}
    torch.save(former, tmp_path / "former.pth")  # as PyTorch before 0.4.1 wrote it
    model, _ = models.make_model("resnet18", 3, 64, str(tmp_path / "former.pth"))
    assert torch.equal(model.layer4[1].bn2.running_var, donor.layer4[1].bn2.running_var)
    names = tuple(map(str, range(1000)))
    loaded = inference._load(tmp_path / "former.pth", "--weights", "resnet18", 64, names, torch.device("cpu"))
    assert torch.equal(loaded.model.fc.weight, donor.fc.weight)
    save_file(timm.create_model("resnet10t").state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="do not fit resnet18 .*missing.*the file seems to hold a ResNet of b"):
        models.make_model("resnet18", 3, 64, str(tmp_path / "other.safetensors"))
    (tmp_path / "bad.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(UserError, match="cannot be read"):
        models.make_model("resnet18", 3, 64, str(tmp_path / "bad.safetensors"))
    with pytest.raises(UserError, match="expected a .safetensors or .pth file"):
        models.make_model("resnet18", 3, 64, str(tmp_path / "none.pth"))


def test_without_a_hub_the_error_offers_a_file_or_none():
    with pytest.raises(UserError, match="weights of resnet18 cannot be loaded .*--weights none"):
        models.make_model("resnet18", 3, 64)


# -------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="session")
def subset(tmp_path_factory):
    return write_subset(tmp_path_factory.mktemp("subset") / "s", ROWS)


@pytest.fixture(scope="session")
def trained(image_folder, subset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("classify") / "run"
    out = run_here(
        "train_cls.py",
        *classify_arguments(image_folder, folder, syndata_dir=[subset], synthetic_prob=0.3, use_cutmix=True),
    )
    return folder, out


@pytest.mark.slow
def test_results_files(trained, image_folder):
    folder, out = trained
    results = json.loads((folder / "results.json").read_text())
    assert set(results["test"]) == {"top1", "top5", "macro", "loss", "ece", "few"} and results["steps"] == 12
    assert f"test: top1 {100 * results['test']['top1']:.2f} %" in out and "synthetic: 4 images" in out
    assert len((folder / "epochs.csv").read_text().splitlines()) == 5
    confusion = (folder / "test_confusion.csv").read_text().splitlines()
    assert confusion[0] == "true \\ predicted,blue jay,red fox,toad" and len(confusion) == 4
    per_class = (folder / "test_per_class.csv").read_text().splitlines()
    assert per_class[0] == "class,images,accuracy" and per_class[1].startswith("blue jay,3,")
    with Image.open(folder / "test_confusion.png") as image:
        assert image.width > 100
    import timm

    model = timm.create_model("resnet18", num_classes=3, checkpoint_path=str(folder / "model.safetensors")).eval()
    dataset, correct = load_dataset(f"folder:{image_folder}"), 0
    normalise = Normaliser(model.pretrained_cfg["mean"], model.pretrained_cfg["std"], torch.device("cpu"))
    for _, pixels, labels in EvalBatches(dataset.test, 32, 9).part():
        with torch.no_grad():
            correct += int((model(normalise(pixels)).argmax(-1) == labels).sum())
    assert correct / 9 == pytest.approx(results["test"]["top1"])


@pytest.mark.slow
def test_the_best_epoch_is_validations(trained):
    folder, _ = trained
    rows = [line.split(",") for line in (folder / "epochs.csv").read_text().splitlines()]
    top1 = [float(row[rows[0].index("val_top1")]) for row in rows[1:]]
    results = json.loads((folder / "results.json").read_text())
    assert results["val"]["top1"] == pytest.approx(max(top1)) and top1[results["epoch"] - 1] == pytest.approx(max(top1))


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers_and_another_does_not(trained, image_folder, subset, tmp_path):
    argv = {"syndata_dir": [subset], "synthetic_prob": 0.3, "use_cutmix": True}
    run_here("train_cls.py", *classify_arguments(image_folder, tmp_path / "same", **argv))
    run_here("train_cls.py", *classify_arguments(image_folder, tmp_path / "other", **argv, seed=1))
    losses = [
        [row.split(",")[2] for row in (f / "epochs.csv").read_text().splitlines()]
        for f in (trained[0], tmp_path / "same", tmp_path / "other")
    ]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.slow
def test_killed_and_started_again_equals_uninterrupted(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "SAVE_SECONDS", 0.0)
    run_here("train_cls.py", *classify_arguments(image_folder, tmp_path / "whole", nepoch=6))
    process = start("tests/saving_every_epoch.py", *classify_arguments(image_folder, tmp_path / "killed", nepoch=6))
    while not (tmp_path / "killed" / "last.pt").exists() and process.poll() is None:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed" / "results.json").exists()
    assert "resuming after epoch" in run_here(
        "train_cls.py", *classify_arguments(image_folder, tmp_path / "killed", nepoch=6)
    )
    one, two = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "killed"))
    assert one == two
    whole, killed = (json.loads((tmp_path / n / "results.json").read_text()) for n in ("whole", "killed"))
    assert whole["test"] == killed["test"] and whole["epoch"] == killed["epoch"]


@pytest.mark.slow
def test_a_finished_run_is_not_run_again_and_other_arguments_are_refused(trained, image_folder, subset):
    folder, _ = trained
    before = contents(folder, "*")
    argv = {"syndata_dir": [subset], "synthetic_prob": 0.3, "use_cutmix": True}
    assert "is finished already" in run_here("train_cls.py", *classify_arguments(image_folder, folder, **argv))
    assert "other arguments (nepoch: 4 -> 5;" in refused(
        "train_cls.py", *classify_arguments(image_folder, folder, **{**argv, "nepoch": 5}), alone=True
    )
    assert contents(folder, "*") == before


@pytest.mark.slow
def test_without_validation_or_test_the_run_says_what_it_has(image_folder, tmp_path):
    out = run_here(
        "train_cls.py", *classify_arguments(image_folder / "train", tmp_path / "run", val_fraction=0, nepoch=1)
    )
    assert "val:" not in out and "test:" not in out and (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "resnet5O"}, "unknown --model 'resnet5O'"),
        ({"gamma": 0}, "argument --gamma: 0: expected a number in (0, inf)"),
        ({"synthetic_prob": 1.5}, "argument --synthetic_prob: 1.5: expected a number in [0, 1]"),
        ({"syndata_key": "nokey"}, "unknown subset key of data set 'animals-"),
        ({"syndata_dir": ["/no/such"]}, "synthetic subset /no/such is not a folder"),
        ({"gpu": 0}, "--gpu 0: this machine has no GPU; give --gpu cpu"),
        ({"gpu": "cuda"}, "--gpu cuda: expected a GPU number or the word cpu"),
        ({"criterion": "hinge"}, "invalid choice: 'hinge'"),
        ({"res_mod": 3}, "unknown argument --res_mod: did you mean --res_mode?"),
    ],
)
def test_bad_requests_are_one_line(image_folder, tmp_path, changes, message):
    if torch.cuda.is_available() and changes.get("gpu") == 0:
        pytest.skip("this machine has a GPU")
    assert message in refused("train_cls.py", *classify_arguments(image_folder, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
