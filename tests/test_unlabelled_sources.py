"""Unlabelled images as sources: the draws, the labels, one subset from the command to stage 3, and what is refused."""

import csv
import json
import os
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from helpers import CLASSES, contents, run_here, sampling_arguments, write_subset
from hypothesis import given, settings
from hypothesis import strategies as st
from test_guide import plan_for

import sample_mp
import tiny
from semantic_aug import meta_csv
from semantic_aug.classify.inference import load_run
from semantic_aug.datasets import load_dataset
from semantic_aug.datasets.synthetic import (
    UNLABELLED_FILE,
    SyntheticImages,
    _source_labels,
    read_sources,
    read_subset,
    soft_labels,
)
from semantic_aug.datasets.unlabelled import read_unlabelled, with_unlabelled
from semantic_aug.errors import UserError
from semantic_aug.evaluation.quality import faithfulness
from semantic_aug.evaluation.quality.export_formats import SplitImages
from semantic_aug.sampling import claim as claims
from semantic_aug.sampling.guide import make_guide, pool_classes, read_guide, write_guide
from semantic_aug.sampling.plan import Guide
from semantic_aug.sampling.run import check, opened
from semantic_aug.sampling.settings import ImageSettings, build_parser
from semantic_aug.sampling.subset import describe, plan_subset


@pytest.fixture
def pool(tmp_path):
    """Five images whose folders say nothing of their class."""
    for index in range(5):
        path = tmp_path / "pool" / f"batch{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        tiny.picture(index % 3, 2000 + index).save(path)
    return tmp_path / "pool"


@given(st.sampled_from(["unlabelled", "both"]), st.integers(1, 40), st.booleans(), st.integers(0, 20))
@settings(max_examples=60, deadline=None)
def test_pool_images_take_turns_and_targets_stay_even(sources, size, known, seed):
    labels, keys = np.repeat(np.arange(4), 5), [f"p{i}" for i in range(size)]
    classes = np.random.default_rng(seed).integers(4, size=(size, 2)).astype(np.int32) if known else None
    guide = Guide(pool_classes=classes, pool_weights=None if classes is None else np.full((size, 2), 5000, np.uint16))
    plan = plan_for(labels, guide, sources=sources, pool=keys, seed=seed)
    of_pool = plan.source >= 20
    assert of_pool.sum() == (100 if sources == "unlabelled" else 50)
    for part in (plan.source[of_pool] - 20, plan.source[~of_pool]):
        uses = np.bincount(part, minlength=size if part is not plan.source[~of_pool] else 20)
        assert not len(part) or uses.max() - uses[uses > 0].min() <= 1
    assert (np.bincount(plan.target, minlength=4) == 25).all()
    expected = classes[plan.source[of_pool] - 20, 0] if known else 4
    assert (plan.source_class[of_pool] == expected).all()
    assert (plan.source_class[~of_pool] == labels[plan.source[~of_pool]]).all()
    collisions = np.count_nonzero(plan.source_class == plan.target)
    least = np.maximum(np.bincount(plan.source_class, minlength=5)[:4] + 25 - 100, 0).sum()
    assert collisions == least  # none, unless nearly all of a small pool is of one class
    assert plan.digest != plan_for(labels, guide, sources=sources, pool=[*keys[:-1], "other"], seed=seed).digest


def test_a_label_is_the_sources_distribution_and_the_target():
    known = np.array([[0.7, 0.3, 0], [1 / 3] * 3, [0, 0, 1]])
    images = SyntheticImages(
        [None] * 3, np.array([0, 1, 2]), np.array([2, 1, 0]), np.array([0.25, 1.0, 0.49]), source_labels=known
    )
    labels, weight = images.labels(0.5, 3), np.array([0.5, 1.0, 0.7])[:, None]
    assert np.allclose(labels, (1 - weight) * known + weight * np.eye(3)[[2, 1, 0]], atol=1e-7)
    assert np.allclose(labels.sum(1), 1) and np.allclose(images.take(np.array([1])).labels(0.5, 3), [[0, 1, 0]])
    plain = SyntheticImages([None], np.array([0]), np.array([1]), np.array([0.25]))
    both = SyntheticImages.joined([plain, images])
    assert np.allclose(both.labels(0.5, 3), np.concatenate([plain.labels(0.5, 3), labels]))
    assert np.allclose(soft_labels(np.eye(3)[[0]], [1], [0.25], 0.5, 3), soft_labels([0], [1], [0.25], 0.5, 3))


def test_what_is_known_of_a_source_decides_hard_labels_and_weights():
    known = np.array([[0.4, 0.35, 0.25], [1 / 3] * 3, [0, 1, 0], [0.5, 0.2, 0.3]], np.float32)
    classes, strengths = (np.array([0, 2, 1, 0]), np.array([2, 2, 0, 0])), np.array([0.4, 0.3, 0.3, 0.5]) ** 2
    images = SyntheticImages([None] * 4, *classes, strengths, source_labels=known)
    origin = {"subset": "s", "origin": "", "source_image": None, "photograph": False}
    split = SplitImages("train", ("a", "b", "c"), 0.5, synthetic=images, origins=[origin] * 4)
    assert split.labels.tolist() == [2, 2, 1, 0] == images.labels(0.5, 3).argmax(1).tolist()
    records = [split.metadata(row) for row in range(4)]
    assert [record["source"] for record in records] == ["a", None, "b", "a"]
    weights = [[record["source_weight"], record["target_weight"]] for record in records]
    assert np.allclose(weights, [[0.24, 0.55], [0, 0.3 + 0.7 / 3], [0.7, 0.3], [0, 0.75]], atol=1e-6)


def test_faithfulness_counts_every_class_that_a_source_may_be_of():
    known = np.array([[0.6, 0.4, 0, 0], [0.25] * 4, [0, 0, 0, 1]], np.float32)
    classes = np.array([0, 2, 3]), np.array([2, 2, 3])
    images = SyntheticImages([None] * 3, *classes, np.full(3, 0.5), source_labels=known)
    p = np.array([[0.1, 0.2, 0.3, 0.4]] * 3)
    assert np.allclose(faithfulness.label_mass(p, images), [0.6, 1, 0.4])
    values = faithfulness.scores(p, images, 0.5)
    assert np.allclose(values["source_probability"], [0.1, np.nan, 0.4], equal_nan=True)
    assert np.allclose(values["source_top1"], [0, np.nan, 1], equal_nan=True)
    assert np.allclose(values["label_agreement"], (images.labels(0.5, 4) * p).sum(1))


def test_sources_of_any_class_draw_their_targets_as_one_more_class():
    known = np.concatenate([np.full((12, 3), 1 / 3), np.eye(3)[[0, 0]]]).astype(np.float32)
    target = np.r_[np.arange(12) % 3, 1, 2]
    images = SyntheticImages([*range(14)], np.r_[target[:12], 0, 0], target, np.full(14, 0.5), source_labels=known)
    for number, kept in ((1, 5), (2, 10), (3, 14)):
        chosen = images.with_targets(number, ("a", "b", "c"))
        assert len(chosen) == kept and len(np.unique(chosen.target[chosen.of_any_class])) == number


def test_labels_of_many_sources_are_read_in_moments(animals):
    names = tuple(f"class {k}" for k in range(200))
    dataset = replace(animals, source_names=names, class_names=names)
    weights = np.random.default_rng(0).integers(1, 5000, (3000, 3)).tolist()
    cells = [json.dumps({names[(row + k) % 200]: w[k] for k in range(3)}) for row, w in enumerate(weights)] + [""]
    zeros, rows = np.zeros(3001, np.int32), np.arange(3000)
    table = meta_csv.MetaTable(
        names[:1], zeros, zeros, zeros, zeros + 0.5, zeros, {"Source Label": np.array(cells, object)}
    )
    start = time.process_time()
    known = _source_labels(table, dataset, None)
    assert time.process_time() - start < 1.5  # an index of the classes for each label takes several times as long
    expected = np.array(weights) / np.sum(weights, 1, keepdims=True)
    assert known.dtype == np.float32 and np.allclose(known.sum(1), 1)
    assert np.allclose(known[rows[:, None], (rows[:, None] + np.arange(3)) % 200], expected)
    assert known[3000].argmax() == 0 and known[3000].max() == 1


def test_a_folder_of_another_pool_is_refused_before_the_classifier_is_asked(pool, animals, judge_folder, tmp_path):
    request = ImageSettings(sources="both", unlabelled=pool, classifier=judge_folder)
    dataset, folder = with_unlabelled(animals, pool), tmp_path / "subset"
    origin = make_guide(request, dataset, "cpu", load_run, folder).origin
    (folder / "data" / "toad").mkdir(parents=True)
    (folder / "data" / "toad" / "0.png").write_bytes(b"made")
    record = {"data": {}, "classifier_sha256": origin["classifier"], "unlabelled": origin["unlabelled"]}

    class Unasked:
        path, class_names = load_run(judge_folder).path, load_run(judge_folder).class_names

    for name in ("classifier_sha256", "unlabelled"):
        (folder / "config.yaml").write_text(yaml.safe_dump(record | {name: "other"}))
        with pytest.raises(UserError, match=rf"holds a subset made otherwise \({name}: 'other' -> "):
            make_guide(request, dataset, "cpu", lambda *_: Unasked, folder)
    (folder / "config.yaml").write_text(yaml.safe_dump(record))
    assert make_guide(request, dataset, "cpu", load_run, folder).pool_classes is not None


@pytest.mark.skipif(torch.cuda.is_available(), reason="as on the head of a cluster, which has no GPU")
def test_a_head_without_a_gpu_asks_the_classifier_on_its_cpu(pool, workshop, image_folder, judge_folder, tmp_path):
    options = {"sources": "both", "unlabelled": pool, "classifier": judge_folder, "engine": "ray", "gpu_ids": [0]}

    def resolved(batch_size):
        argv = sampling_arguments(workshop, image_folder, tmp_path, **options, batch_size=batch_size)
        return sample_mp.resolve(build_parser().parse_args(list(map(str, argv))))[0]

    assert resolved(4).guide.pool_classes.shape == (5, 3)
    with pytest.raises(UserError, match="--batch_size: this machine has no GPU"):
        resolved(None)


COLUMNS = "First Directory,Second Directory,Number,Strength,Path,Unlabelled Image,Source Label"


def test_what_meta_csv_says_of_a_source(animals, tmp_path):
    folder = write_subset(tmp_path / "s", [("toad", "red fox", 0.49)] * 2 + [("unlabelled", "toad", 0.49)])
    path = folder / meta_csv.FILE_NAME
    rows = [row.split(",") for row in path.read_text().splitlines()[1:]]
    cells = ["", json.dumps({"toad": 0.5, "blue jay": 0.3}), meta_csv.EVEN]
    with open(path, "w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(COLUMNS.split(","))
        writer.writerows([*row, cell and "p.png", cell] for row, cell in zip(rows, cells, strict=True))
    images = read_subset(folder, animals)
    assert np.allclose(
        images.labels(0.5, 3), [[0, 0.7, 0.3], [0.3 * 0.375, 0.7, 0.3 * 0.625], [0.1, 0.1, 0.8]], atol=1e-6
    )
    assert images.source.tolist() == [2, 2, 2]
    for bad in ("toad", '{"toad": 0}', "[1]", "{}", "[" * 100_000):
        path.write_text(f'{COLUMNS}\ntoad,toad,0,0.5,{rows[0][4]},p,"{bad.replace(chr(34), chr(34) * 2)}"\n')
        with pytest.raises(UserError, match=r"row 2: Source Label .*: expected \{\"class name\": weight"):
            read_subset(folder, animals)
    path.write_text(f'{COLUMNS}\ntoad,toad,0,0.5,{rows[0][4]},p,"{{""newt"": 1}}"\n')
    with pytest.raises(UserError, match="has the class 'newt', which data set animals"):
        read_subset(folder, animals)


def test_predictions_keep_the_best_classes_and_sum_to_one(pool, animals, judge_folder, tmp_path):
    dataset, judge = with_unlabelled(animals, pool), load_run(judge_folder)
    classes, weights = pool_classes(judge, [2, 0, 1], dataset.unlabelled)  # as if its classes came in another order
    probabilities = judge.probabilities(dataset.unlabelled.image, 5)[:, [2, 0, 1]]
    assert (classes[:, 0] == probabilities.argmax(1)).all() and (abs(weights.sum(1).astype(int) - 10_000) <= 1).all()
    spread = np.zeros((5, 3))
    np.put_along_axis(spread, classes, weights / 10_000, 1)
    assert np.abs(spread - probabilities).max() < 0.02
    request = ImageSettings(sources="both", unlabelled=pool, classifier=judge_folder)
    guide = make_guide(request, dataset, "cpu", load_run, tmp_path / "subset")
    write_guide(tmp_path / "subset", replace(guide, pool_weights=guide.pool_weights - (guide.pool_weights > 0)))
    again = make_guide(request, dataset, "cpu", load_run, tmp_path / "subset")
    assert (again.pool_weights <= guide.pool_weights).all() and again.digest != guide.digest
    assert make_guide(request, dataset, "cpu", load_run, tmp_path / "new", predict=False).pool_classes is None
    (pool / "new.png").write_bytes((pool / "batch0" / "0.png").read_bytes())
    grown = make_guide(request, with_unlabelled(animals, pool), "cpu", load_run, tmp_path / "subset")
    assert len(grown.pool_classes) == 6  # of another pool nothing is taken over


def test_a_pool_of_the_hubs_format_is_read_without_its_labels(pool, animals, tmp_path):
    import datasets as hub

    cells = [{"bytes": path.read_bytes(), "path": None} for path in sorted(pool.rglob("*.png"))]
    features = hub.Features({"image": hub.Image(), "label": hub.Value("int64")})
    embedded = hub.Dataset.from_dict({"image": cells, "label": [-1, 7, 0, 0, 1]}, features=features)
    parts = {"train": embedded.select([0, 1]), "unsupervised": embedded.select([2, 3]), "test": embedded.select([4])}
    hub.DatasetDict(parts).save_to_disk(str(tmp_path / "copy"))
    images = read_unlabelled(f"hf:{tmp_path / 'copy'}")
    assert len(images) == 4 and images.class_names == ("unlabelled",)
    assert [images.image(i).tobytes() for i in range(4)] == [
        read_unlabelled(pool).image(i).tobytes() for i in (0, 1, 2, 3)
    ]
    assert len(with_unlabelled(animals, f"hf:{tmp_path / 'copy'}").unlabelled) == 4
    parts["unsupervised"] = hub.Dataset.from_dict(
        {"image": [cell["bytes"] for cell in cells[2:4]]}
    )  # as pandas writes them
    hub.DatasetDict(parts).save_to_disk(str(tmp_path / "mixed"))
    assert len(read_unlabelled(f"hf:{tmp_path / 'mixed'}")) == 4
    parts["unsupervised"] = hub.Dataset.from_dict({"text": ["no image"]})
    hub.DatasetDict(parts).save_to_disk(str(tmp_path / "texts"))
    with pytest.raises(UserError, match="no image column 'image': its columns are text"):
        read_unlabelled(f"hf:{tmp_path / 'texts'}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": "both"}, "--sources both needs --unlabelled PATH"),
        ({"unlabelled": "pool"}, "--unlabelled pool: --sources even does not use it"),
        (
            {"sources": "unlabelled", "unlabelled": "pool", "sample_strategy": "diff-gen"},
            "diff-gen, which starts from noise",
        ),
        ({"sources": "unlabelled", "unlabelled": "pool", "sample_strategy": "real-aug"}, "by a \\*-mix strategy"),
        ({"sources": "both", "unlabelled": "pool", "object_mask": "object"}, "unlabelled images have no masks"),
    ],
)
def test_settings_that_do_not_go_together(options, message):
    with pytest.raises(UserError, match=message):
        ImageSettings(**options)


@pytest.mark.slow
def test_a_subset_of_both_kinds_of_sources_reaches_stage_3(
    pool, workshop, image_folder, judge_folder, animals, tmp_path
):
    options = {"sources": "both", "unlabelled": pool, "syn_dataset_multiplier": 1, "gpu_ids": ["cpu", "cpu"]}
    command = sampling_arguments(workshop, image_folder, tmp_path / "a", **options, classifier=judge_folder)
    run_here("sample_mp.py", *command)
    (folder,) = (tmp_path / "a" / "animals").iterdir()
    before, record = contents(folder, "*.png", "*.csv"), yaml.safe_load((folder / "config.yaml").read_text())
    assert record["sources"] == "both" and len(record["unlabelled"]) == 32 and "guide_sha256" in record
    with open(folder / "meta.csv", newline="") as lines:
        rows = list(csv.DictReader(lines))
    of_pool = [row for row in rows if row["Unlabelled Image"]]
    assert (
        len(rows) == 18
        and len(of_pool) == 9
        and {r["Unlabelled Image"] for r in of_pool} <= {*read_unlabelled(pool).keys}
    )
    assert all(bool(r["Source Image"]) != bool(r["Unlabelled Image"]) == bool(r["Source Label"]) for r in rows)
    assert all(max(d := json.loads(r["Source Label"]), key=d.get) == r["First Directory"] for r in of_pool)
    images = read_subset(folder, animals)
    assert np.allclose(images.labels(0.5, 3).sum(1), 1) and images.source_labels.max(1).min() < 1
    # what was made is made again from what the folder keeps: some files, and the list
    (folder / "data" / of_pool[0]["Path"]).unlink()
    (folder / "meta.csv").unlink()
    run_here("sample_mp.py", *command)
    assert contents(folder, "*.png", "*.csv") == before


def test_without_a_classifier_a_source_is_of_no_class_of_the_data_set(pool, workshop, image_folder, tmp_path):
    argv = sampling_arguments(workshop, image_folder, tmp_path, sources="unlabelled", unlabelled=pool)
    config, dataset = sample_mp.resolve(build_parser().parse_args(list(map(str, argv))))
    subset = plan_subset(config, dataset)
    paths = subset.paths
    assert paths.folders[-1] == "unlabelled" and "unlabelled" in describe(subset)
    meta_csv.write(tmp_path / "meta.csv", paths.meta_rows(np.arange(54)), paths.further_columns)
    with open(tmp_path / "meta.csv", newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert {row["First Directory"] for row in rows} == {"unlabelled"} and {row["Source Label"] for row in rows} == {
        "even"
    }
    assert {row["Unlabelled Image"] for row in rows} == set(read_unlabelled(pool).keys)
    assert all(row["Path"].startswith("unlabelled/") and row["Source Image"] == "" for row in rows)
    assert sorted(meta_csv.read(tmp_path / "meta.csv").class_names) == sorted(CLASSES)


def test_stage_3_refuses_sources_that_another_setting_evaluates_on(pool, image_folder, animals, tmp_path):
    from semantic_aug.datasets.fingerprint import hash_images
    from semantic_aug.datasets.synthetic import write_sources

    shutil.copy(animals.val.encoded(int(animals.val.rows[0])), pool / "kept.png")
    images, rest = read_unlabelled(pool), load_dataset(f"folder:{image_folder}")
    folder = write_subset(tmp_path / "s", [("toad", "red fox", 0.5)])
    lines = (folder / "meta.csv").read_text().splitlines()
    (folder / "meta.csv").write_text(f"{lines[0]},Unlabelled Image,Source Label\n{lines[1]},kept.png,even\n")
    write_sources(folder, images.keys, hash_images(images).values, UNLABELLED_FILE)
    with pytest.raises(UserError, match="1 unlabelled sources are validation images of animals.*'kept.png'"):
        read_subset(folder, rest)
    assert len(read_subset(folder, replace(rest, val=None))) == 1
    (folder / UNLABELLED_FILE).unlink()
    assert len(read_subset(folder, rest)) == 1  # as of another tool
    (folder / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(UserError, match="the list of the unlabelled sources, is missing or damaged"):
        read_subset(folder, rest)
    assert len(read_subset(folder, rest, allow_other_sources=True)) == 1


def test_a_killed_run_leaves_no_record_without_its_lists(
    pool, workshop, image_folder, judge_folder, tmp_path, monkeypatch, caplog
):
    (pool / "broken.png").write_bytes(b"no image")
    options = {"sources": "both", "unlabelled": pool, "classifier": judge_folder}
    argv = sampling_arguments(workshop, image_folder, tmp_path, **options)
    config, dataset = sample_mp.resolve(build_parser().parse_args(list(map(str, argv))))
    assert len(config.guide.pool_classes) == 6  # an image that cannot be read refuses no other

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(claims, "_write", killed)
        opened(plan_subset(config, dataset)).__enter__()
    (folder,) = (tmp_path / "animals").iterdir()
    recorded = [read_sources(folder, UNLABELLED_FILE), read_sources(folder)]
    assert recorded[0][0] == list(dataset.unlabelled.keys) and recorded[1][0] == list(dataset.train.keys)
    assert read_guide(folder).digest == config.guide.digest and not (folder / "config.yaml").exists()
    with opened(plan_subset(config, dataset)):
        assert (folder / "config.yaml").exists() and "cannot be read" not in caplog.text
    (folder / UNLABELLED_FILE).unlink()
    with opened(plan_subset(config, dataset)):  # of a run that an earlier version began
        assert read_sources(folder, UNLABELLED_FILE)[0] == recorded[0][0]
    (pool / "broken.png").unlink()
    os.mkfifo(pool / "broken.png")
    check(plan_subset(replace(config, output=replace(config.output, output_root=tmp_path / "other")), dataset))
    assert "1 unlabelled images cannot be read ('broken.png' the first): nothing will be made" in caplog.text
