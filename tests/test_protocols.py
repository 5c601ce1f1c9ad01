"""The protocols under which results were published: Waterbirds after CUB, the authors' splits, all images for training."""

import csv
import json

import numpy as np
import pytest
from helpers import classify_arguments

import official_layouts
import tiny
import train_cls
from semantic_aug.classify.config import build_parser, read_config
from semantic_aug.classify.run import resolve, run_name
from semantic_aug.classify.trainer import results_of
from semantic_aug.datasets import Setting, load_dataset
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
    words = [str(word) for word in classify_arguments(None, tmp_path / "run", **changes)]
    assert train_cls.main(words) == 0
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
    assert train_cls.main([*words, "--eval_only"]) == 0
    assert json.loads((tmp_path / "run/evaluation/results.json").read_text())["test_groups"] == results["test_groups"]


@pytest.mark.parametrize("birds", ["official"], indirect=True)
def test_a_run_tested_elsewhere_has_a_folder_of_its_own_and_foreign_classes_are_refused(birds, image_folder):
    def config(*words):
        return read_config(build_parser("").parse_args([*words, "--gpu", "cpu", "--model", "test_vit"]))

    here, there = (run_name(config("--dataset", "cub", *words), []) for words in ([], ["--test_dataset", "waterbird"]))
    assert there == here + "-test_waterbird"
    with pytest.raises(UserError, match="class of --test_dataset waterbird '001.Black_footed_Albatross'"):
        resolve(config("--dataset", f"folder:{image_folder}", "--test_dataset", "waterbird"))
    own = load_dataset("waterbird", Setting())
    assert own.test.extras["group"].tolist() == load_dataset("cub").tested_on("waterbird").test.extras["group"].tolist()
