"""SoftLabelDataset gives what stage 3 trains on; and the examples of the page about other trainers run."""

import pickle
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler

import evaluating
import numpy as np
import pytest
import torch
from helpers import ROOT, run_example
from PIL import Image
from torch.utils.data import DataLoader

from semantic_aug import SoftLabelDataset, runs
from semantic_aug.classify.config import SyntheticSettings
from semantic_aug.classify.data import TrainBatches
from semantic_aug.datasets import load_dataset
from semantic_aug.datasets.synthetic import read_subset
from semantic_aug.errors import UserError

CLASSES, BATCH, SEED, EPOCHS = ("heron", "ibis", "stork"), 5, 11, 5


def colour(number: int) -> Image.Image:
    """A picture of one colour, which tells it from every other whatever is cropped or flipped."""
    return Image.new("RGB", (24, 24), (number, 255 - number, number // 2))


def first_pixel(image: Image.Image) -> torch.Tensor:
    return torch.tensor(image.getpixel((0, 0)))


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    """(folder of 23 training images, subset of 16): the numbers 0 to 22 and 100 to 115 as colours."""
    folder, rows = tmp_path_factory.mktemp("birds"), []
    for split, first, count in (("train", 0, 23), ("val", 200, 6)):
        for number in range(count):
            path = folder / "photos" / split / CLASSES[number % 3] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            colour(first + number).save(path)
    for number in range(16):
        target = CLASSES[0 if number > 2 else 1]  # uneven, so that a balanced draw differs
        rows.append((colour(100 + number), CLASSES[number % 3], target, (0.3, 0.7, 1.0)[number % 3], ""))
    return folder / "photos", evaluating.write_subset(folder / "made", rows, evaluating.FIVE)


def arguments(birds, **changes):
    return {"dataset": f"folder:{birds[0]}", "syndata_dir": birds[1], "batch_size": BATCH, "seed": SEED, **changes}


def epochs_of(dataset, **options):
    """Colours and soft labels of five epochs."""
    loader, out = DataLoader(dataset, batch_size=dataset.batch_size, **options), []
    for epoch in range(EPOCHS):
        dataset.set_epoch(epoch)
        out.append([torch.cat(parts) for parts in zip(*loader, strict=True)])
    return out


MODES = [
    {"synthetic_prob": 0.3},
    {"synthetic_prob": 0.3, "synthetic_balanced": True, "gamma": 0.8},
    {"synthetic_prob": 0.3, "synthetic_mode": "ratio"},
    {"synthetic_mode": "concat", "synthetic_balanced": True},
    {"synthetic_prob": 0.5, "syndata_max": 6, "target_class_num": 1},
    {"synthetic_prob": 0.0},
    {"synthetic_prob": "0.2:0.9", "curriculum": "strength"},
    {"synthetic_mode": "concat", "curriculum": "strength", "curriculum_order": "weak_first"},
]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(map(str, mode.values())))
def test_images_and_labels_are_those_of_stage_3(birds, mode):
    data, settings = load_dataset(f"folder:{birds[0]}"), SyntheticSettings(**mode)
    synthetic = read_subset(birds[1], data)
    if settings.target_class_num:
        synthetic = synthetic.with_targets(settings.target_class_num, data.source_names).at_most(settings.syndata_max)
    stage3 = TrainBatches(data.train, synthetic, settings, 16, BATCH, SEED, cache="off", epochs=EPOCHS)
    dataset = SoftLabelDataset(**arguments(birds, **mode, epochs=EPOCHS), transform=first_pixel)
    drawn = 0
    for epoch, (colours, labels) in enumerate(epochs_of(dataset)):
        pixels, targets = (torch.cat(parts) for parts in zip(*stage3.epoch(epoch), strict=True))
        assert torch.equal(colours.to(torch.uint8), pixels[:, 0, 0]) and torch.equal(labels, targets)
        assert len(colours) == len(dataset)
        torch.testing.assert_close(labels.sum(1), torch.ones(len(dataset)))
        drawn += int((colours[:, 0] >= 100).sum())
    if settings.synthetic_mode == "ratio":
        assert drawn == EPOCHS * int(0.3 * len(dataset))
    assert (drawn > 0) == settings.active


def test_workers_give_what_one_process_gives_and_hear_of_the_epoch(birds):
    dataset = SoftLabelDataset(**arguments(birds, synthetic_prob=0.4), transform=first_pixel)
    alone = epochs_of(dataset)
    assert not torch.equal(alone[0][0], alone[1][0])
    for options in ({}, {"persistent_workers": True}):
        for once, again in zip(alone, epochs_of(dataset, num_workers=4, **options), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_a_copy_reads_the_same_and_keeps_the_epoch(birds):
    dataset = SoftLabelDataset(**arguments(birds, synthetic_prob=0.4), transform=first_pixel)
    dataset.set_epoch(3)
    copy = pickle.loads(pickle.dumps(dataset))
    for (colours, labels), (same, alike) in zip(copy, dataset, strict=True):
        assert torch.equal(colours, same) and torch.equal(labels, alike)
    started = pickle.loads(ForkingPickler.dumps(dataset))  # as a spawned worker gets it
    dataset.set_epoch(4)
    assert np.array_equal(started.items(), dataset.items()) and not np.array_equal(copy.items(), dataset.items())


def test_the_key_none_is_the_baseline_of_real_images(birds):
    dataset = SoftLabelDataset(f"folder:{birds[0]}", syndata_key="None", batch_size=BATCH)
    assert dataset.synthetic is None and len(dataset) == 20


def test_other_splits_come_in_order_with_hard_labels(birds):
    val = SoftLabelDataset(f"folder:{birds[0]}", split="val")
    assert len(val) == 6 and isinstance(val[0][0], Image.Image)
    assert torch.stack([label for _, label in val]).argmax(1).tolist() == [0, 0, 1, 1, 2, 2]


def test_teachers_follow_the_recipes_of_the_same_folder(birds, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFMIX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "recipes.yaml").write_text("default: {train_cls: [{set: {nepoch: 1, batch_size: 7}}]}\n")
    teacher = "--model test_vit --weights none --res_mode 32 --gpu cpu"
    options = {"soft_labels": "teacher", "teacher_folds": 2, "teacher": teacher, "config_dir": tmp_path}
    SoftLabelDataset(**arguments(birds, **options))
    records = [runs.load_arguments(file.parent) for file in (tmp_path / "cache").rglob("args.yaml")]
    assert [(record["nepoch"], record["batch_size"]) for record in records] == [(1, 7)] * 2


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"synthetic_mode": "often"}, "item, ratio, concat"),
        ({"synthetic_prob": 1.5}, r"\[0, 1\]"),
        ({"gamma": 0}, r"\(0, inf\)"),
        ({"split": "test"}, "no such images"),
        ({"syndata_dir": "nowhere"}, "not a folder"),
        (
            {"syndata_dir": None, "syndata_key": "None", "syndata_max": 3},
            "--syndata_max: there are no synthetic images",
        ),
    ],
)
def test_wrong_settings_are_one_line(birds, wrong, text):
    with pytest.raises(UserError, match=text):
        SoftLabelDataset(**arguments(birds, **wrong))


def test_the_package_is_imported_without_torch():
    code = "import sys, semantic_aug; assert 'torch' not in sys.modules; assert not hasattr(semantic_aug, 'nothing')"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# ----------------------------------------------------------------------------------------------- example of the page


def test_the_loop_of_the_page_runs(birds):
    small = {
        '"cub"': f'"folder:{birds[0]}"',
        'syndata_key="diffmix_0.7"': f'syndata_dir="{birds[1]}"',
        "batch_size=32": "batch_size=8",
        "(224)": "(32)",
        "resnet50": "test_resnet",
        "pretrained=True": "pretrained=False",
        "range(30)": "range(2)",
        "num_workers=4": "num_workers=0",
    }
    names = run_example("use-anywhere", 1, small)
    assert names["loss"].isfinite() and names["soft_labels"].shape == (8, 3)
