"""The protocols under which results were published: Waterbirds after CUB, the authors' splits, all images for training."""

import csv
import json

import numpy as np
import pytest
import torch
from helpers import ROWS, classify_arguments, write_subset
from PIL import Image
from safetensors.torch import load_file, save_file

import official_layouts
import tiny
import train_cls
from semantic_aug.classify import crops, inference, trainer
from semantic_aug.classify.config import build_parser, read_config
from semantic_aug.classify.data import TrainBatches, share_of
from semantic_aug.classify.draws import SyntheticSettings
from semantic_aug.classify.run import resolve, run_name
from semantic_aug.classify.trainer import results_of
from semantic_aug.datasets import Setting, load_dataset
from semantic_aug.datasets.synthetic import read_subset
from semantic_aug.errors import UserError

SPECIES = ("113.Baird_Sparrow", "002.Laysan_Albatross", "001.Black_footed_Albatross", "013.Bobolink")
"""CUB's species of the test, in another order than Waterbirds lists its own."""


def write_hub_copy(root, names):
    """CUB as the hub has it: the species without numbers, 3 training and 2 test images of each."""
    import datasets as hub

    features = hub.Features({"image": hub.Image(), "label": hub.ClassLabel(names=names)})
    for split, count in (("train", 3), ("test", 2)):
        rows = [(label, i) for label in range(len(names)) for i in range(count)]
        columns = {"image": [tiny.picture(*row) for row in rows], "label": [label for label, _ in rows]}
        (root / split).mkdir(parents=True)
        hub.Dataset.from_dict(columns, features=features).to_parquet(root / split / "part.parquet")


@pytest.fixture(autouse=True)
def no_copies(monkeypatch):
    """The machine's own copies of the data sets are out of sight."""
    for name in ("CUB_ROOT", "FLOWER_ROOT", "WATERBIRD_ROOT", "CALTECH_ROOT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=["official", "hub"])
def birds(request, tmp_path, monkeypatch):
    """A copy of CUB, and Waterbirds; returns CUB's class names."""
    names = SPECIES if request.param == "official" else tuple(name[4:].replace("_", " ") for name in SPECIES)
    if request.param == "official":
        official_layouts.write_cub(tmp_path / "cub", names)
        monkeypatch.setenv("CUB_ROOT", str(tmp_path / "cub"))
    else:
        write_hub_copy(tmp_path / "cub", list(names))
        for split in ("train", "test"):
            monkeypatch.setenv(f"CUB_HUG_LOCAL_IMAGE_{split.upper()}_DIR", str(tmp_path / "cub" / split))
    root = tmp_path / "download" / "waterbird_complete95_forest2water2"
    root.mkdir(parents=True)
    official_layouts.write_waterbird(root)
    monkeypatch.setenv("WATERBIRD_ROOT", str(root if request.param == "official" else root.parent))
    return names


def test_a_model_of_cub_is_tested_on_waterbirds_by_group(birds, tmp_path):
    changes = {"dataset": "cub", "test_dataset": "waterbird", "model": "test_vit", "nepoch": 1, "val_fraction": 0}
    argv = [str(word) for word in classify_arguments(None, tmp_path / "run", **changes)]
    assert train_cls.main(argv) == 0
    results, rows = results_of(tmp_path / "run"), list(csv.DictReader((tmp_path / "run/test_predictions.csv").open()))
    assert len(rows) == 6 and results["train_images"] == 12
    for row in rows:  # the label is the species of the file's folder, whichever copy of CUB named it
        assert row["class"] == row["file"].split("/")[0][4:].replace("_", " ")
        assert int(row["group"]) == 2 * row["file"].startswith("001.") + int(row["file"][-5]) % 2
    names = load_dataset("waterbird").spec.group_names
    right = {group: [] for group in range(4)}
    for row in rows:
        right[int(row["group"])].append(row["class"] == row["predicted"])
    shares = {names[group]: np.mean(hits) for group, hits in right.items()}
    assert results["test_groups"] == pytest.approx(shares)
    assert results["test"]["worst_group"] == pytest.approx(min(shares.values()))
    assert train_cls.main([*argv, "--eval_only"]) == 0
    assert json.loads((tmp_path / "run/evaluation/results.json").read_text())["test_groups"] == results["test_groups"]


@pytest.mark.parametrize("birds", ["official"], indirect=True)
def test_a_run_tested_elsewhere_has_a_folder_of_its_own_and_foreign_classes_are_refused(birds, image_folder):
    def config(*argv):
        return read_config(build_parser("").parse_args([*argv, "--gpu", "cpu", "--model", "test_vit"]))

    here, there = (run_name(config("--dataset", "cub", *argv), []) for argv in ([], ["--test_dataset", "waterbird"]))
    assert there == here + "-test_waterbird"
    with pytest.raises(UserError, match="class of --test_dataset waterbird '001.Black_footed_Albatross'"):
        resolve(config("--dataset", f"folder:{image_folder}", "--test_dataset", "waterbird"))
    own = load_dataset("waterbird", Setting())
    assert own.test.extras["group"].tolist() == load_dataset("cub").tested_on("waterbird").test.extras["group"].tolist()


# -------------------------------------------------------------------------------------------- the long tail's augmentation


@pytest.mark.parametrize("size", [(500, 375), (333, 500), (64, 64), (900, 60)])
def test_windows_are_those_of_torchvision_from_the_same_draws(size):
    from torchvision.transforms import RandomResizedCrop

    width, height = size
    for seed in range(20):
        torch.manual_seed(seed)
        top, left, h, w = RandomResizedCrop.get_params(Image.new("RGB", size), crops.AREA, crops.ASPECT)
        torch.manual_seed(seed)  # the same draws once more: area, aspect, ..., and the corner once a window fits
        logs, drawn = np.log(crops.ASPECT).tolist(), []
        while len(drawn) < 10 and (not drawn or not fits(width, height, *drawn[-1])):
            drawn.append((torch.empty(1).uniform_(*crops.AREA).item(), torch.empty(1).uniform_(*logs).exp().item()))
        corner = ((left + 0.5) / (width - w + 1), (top + 0.5) / (height - h + 1))
        result = crops.window(width, height, [a for a, _ in drawn], [r for _, r in drawn], corner)
        assert result == (left, top, left + w, top + h)


def fits(width, height, area, aspect):
    pixels = width * height * area
    return 0 < round((pixels * aspect) ** 0.5) <= width and 0 < round((pixels / aspect) ** 0.5) <= height


def test_pixels_are_torchvisions_for_the_same_window_and_factors():
    from torchvision.transforms import functional

    image = tiny.picture(1, 2, (60, 44))
    draws = crops.ResizedCrops(12, np.random.default_rng(5))
    assert (
        0 < draws.flips.sum() < 12
        and np.abs(draws.factors - 1).max() <= 0.4
        and len(np.unique(draws.orders, axis=0)) > 2
    )
    adjust = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
    for index in range(12):
        left, top, right, bottom = crops.window(60, 44, draws.areas[index], draws.aspects[index], draws.corners[index])
        wanted = functional.resized_crop(image, top, left, bottom - top, right - left, [32, 32])
        wanted = functional.hflip(wanted) if draws.flips[index] else wanted
        for kind in draws.orders[index]:
            wanted = adjust[kind](wanted, draws.factors[index, kind])
        assert np.array_equal(draws.apply(image, index, 32), np.asarray(wanted))


def test_parts_of_a_batch_have_its_resized_crops(image_folder, tmp_path):
    dataset = load_dataset(f"folder:{image_folder}")
    synthetic = read_subset(write_subset(tmp_path / "s", ROWS), dataset)
    settings = SyntheticSettings(synthetic_prob=0.5)
    batches = TrainBatches(dataset.train, synthetic, settings, 28, 7, seed=1, augmentation="resized_crop")
    whole, halves = list(batches.epoch(2)), [list(batches.epoch(2, part, 2)) for part in range(2)]
    assert whole[0][0].shape == (7, 28, 28, 3) and not torch.equal(whole[0][0], next(batches.epoch(3))[0])
    plain = TrainBatches(dataset.train, synthetic, settings, 28, 7, seed=1)
    for step, (pixels, targets) in enumerate(whole):
        assert torch.equal(targets, list(plain.epoch(2))[step][1])  # the items do not depend on the augmentation
        for part in range(2):
            rows = torch.from_numpy(share_of(7, part, 2))
            assert torch.equal(halves[part][step][0], pixels[rows])


def test_a_classifier_of_resized_crops_keeps_the_aspect_of_what_it_sees(image_folder, tmp_path):
    argv = classify_arguments(image_folder, tmp_path / "run", model="test_vit", nepoch=1, augmentation="resized_crop")
    argv = [str(word) for word in argv]
    assert train_cls.main(argv) == 0
    wide = Image.new("RGB", (200, 100), "red")
    wide.paste("blue", (50, 0, 150, 100))  # the middle square, all that is seen
    classifier = inference.load_run(tmp_path / "run")
    assert classifier.keep_aspect and not inference.Classifier.keep_aspect
    seen = [
        classifier.probabilities(lambda _, image=image: image, 1) for image in (wide, Image.new("RGB", (9, 9), "blue"))
    ]
    assert np.allclose(*seen, atol=1e-4)
    scores = results_of(tmp_path / "run")["test"]
    assert train_cls.main([*argv, "--eval_only"]) == 0
    again = json.loads((tmp_path / "run/evaluation/results.json").read_text())["test"]
    assert again == pytest.approx(scores)
    # a file without a record is used as the flags say
    plain = tmp_path / "plain.safetensors"
    save_file(load_file(tmp_path / "run" / "model.safetensors"), plain, {"format": "pt"})
    for augmentation, keeps in (("resized_crop", True), ("crop", False)):
        flags = ["--weights", str(plain), "--augmentation", augmentation, "--eval_only"]
        config, dataset, _ = resolve(read_config(build_parser("").parse_args([*argv, *flags])))
        assert inference.load(config, dataset).keep_aspect == keeps
    (tmp_path / "run" / "model.safetensors").unlink()
    assert train_cls.main(argv) == 0  # a finished run whose weights were removed


# -------------------------------------------------------------------------------------------------- the authors' splits


def test_flowers_are_split_in_halves_by_the_authors_draw(tmp_path, monkeypatch):
    official_layouts.write_flower(tmp_path)
    monkeypatch.setenv("FLOWER_ROOT", str(tmp_path))
    half, official = load_dataset("flower", Setting(split="half", val_fraction=0)), load_dataset("flower")
    rng, numbers = np.random.default_rng(0), []  # one generator permutes the four images of each class in turn
    for first in (1, 5, 9):
        numbers += sorted(first + rng.permutation(4)[:2])
    assert half.train.keys == [f"image_{number:05d}.jpg" for number in numbers]
    assert half.train.labels.tolist() == [0, 0, 76, 76, 101, 101] and half.val is None
    whole = {key for table in (official.train, official.val, official.test) for key in table.keys}
    assert set(half.train.keys) | set(half.test.keys) == whole
    assert len(half.test) == 6 and half.setting.suffix == "_half" and official.setting.suffix == ""


def test_caltech_is_split_in_halves_and_other_data_sets_are_not(tmp_path, monkeypatch, image_folder):
    names, sizes = official_layouts.write_caltech(tmp_path)
    monkeypatch.setenv("CALTECH_ROOT", str(tmp_path))
    splits = load_dataset("caltech", Setting(split="half", val_fraction=0))
    whole = splits.train.counts() + splits.test.counts()
    assert whole.sum() == sum(sizes.values()) and splits.train.counts().tolist() == ((whole + 1) // 2).tolist()
    assert not set(splits.train.keys) & set(splits.test.keys)
    with pytest.raises(
        UserError, match="--split half of 'flower' is drawn from the official download: set FLOWER_ROOT"
    ):
        load_dataset("flower", Setting(split="half"))
    with pytest.raises(UserError, match="--split half: the Diff-Mix authors take the official split of animals-"):
        load_dataset(f"folder:{image_folder}", Setting(split="half"))


def test_records_of_versions_without_splits_stand_for_the_official_one():
    assert "split" not in Setting().record() and Setting(split="half").record()["split"] == "half"


# --------------------------------------------------------------------------------------- all images, and the last epoch


@pytest.mark.parametrize("birds", ["official"], indirect=True)
def test_without_validation_all_images_train_and_the_last_epoch_is_tested_once(birds, tmp_path, monkeypatch):
    states, evaluated = [], []
    train_epoch, evaluate = trainer.Trainer._train_epoch, trainer.evaluate

    def recorded(self, call, bar):
        row = train_epoch(self, call, bar)
        states.append({name: value.clone() for name, value in self.model.state_dict().items()})
        return row

    monkeypatch.setattr(trainer.Trainer, "_train_epoch", recorded)
    monkeypatch.setattr(trainer, "evaluate", lambda *argv: evaluated.append(len(states)) or evaluate(*argv))
    changes = {"dataset": "cub", "model": "test_vit", "nepoch": 3, "val_fraction": 0}
    assert train_cls.main([str(word) for word in classify_arguments(None, tmp_path / "run", **changes)]) == 0
    results = results_of(tmp_path / "run")
    assert results["train_images"] == 12 == len(load_dataset("cub", Setting(val_fraction=0)).train)
    assert evaluated == [3] and results["val"] is None and results["epoch"] == 3
    kept = load_file(tmp_path / "run/model.safetensors")
    assert all(torch.equal(kept[name], states[-1][name]) for name in kept)
    assert not torch.equal(kept["head.weight"], states[0]["head.weight"])
