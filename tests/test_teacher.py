"""Teacher labels: cross-fitting by construction, labels that sum to one, a cache that knows what it was made from."""

import csv
import logging
import shutil
from dataclasses import replace

import evaluating
import numpy as np
import pytest
import torch
from helpers import classify_arguments
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
import train_cls
from semantic_aug import SoftLabelDataset, meta_csv, runs
from semantic_aug.classify import inference, run, teacher, trainer
from semantic_aug.classify.config import read_config
from semantic_aug.classify.draws import SyntheticSettings
from semantic_aug.datasets.fingerprint import hash_bytes
from semantic_aug.datasets.synthetic import UNLABELLED_FILE, SyntheticImages, soft_labels, write_sources
from semantic_aug.errors import UserError

CLASSES = ("red fox", "blue jay", "toad")


# ----------------------------------------------------------------------------------------------- what teachers see


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(2, 6), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_folds_are_even_in_every_class_and_in_all(labels, folds, seed):
    labels = np.array(labels)
    fold = teacher.assign_folds(labels, folds, seed)
    assert np.array_equal(fold, teacher.assign_folds(labels, folds, seed)) and set(fold) <= set(range(folds))
    for some in (fold, *(fold[labels == label] for label in np.unique(labels))):
        assert np.ptp(np.bincount(some, minlength=folds)) <= 1


def test_equal_images_are_of_one_fold():
    content = np.array([[1, 2], [3, 4], [1, 2], [5, 6], [1, 2]], np.uint8)
    folds = [teacher.assign_folds(np.zeros(5, int), 5, seed, content) for seed in range(8)]
    assert all(len(set(fold[[0, 2, 4]])) == 1 for fold in folds) and any(len(set(fold)) == 3 for fold in folds)


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_no_image_is_labelled_by_a_classifier_that_saw_its_sources(data):
    count, folds = data.draw(st.integers(3, 30)), data.draw(st.integers(3, 6))
    labels = np.array(data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count)))
    fold = teacher.assign_folds(labels, folds, seed=1)
    keys = [f"{i}.png" for i in range(count)]
    known = st.sampled_from([*keys, "", "of another data set.png"])
    pairs = data.draw(st.lists(st.tuples(known, known), min_size=1, max_size=20))
    sources = np.array(pairs, object)
    of_sources = teacher.source_folds(sources, dict(zip(keys, fold.tolist(), strict=True)))
    teachers = teacher.left_out(of_sources, folds)
    clean = teacher.clean_teachers(of_sources, teachers)
    for t, without in enumerate(teachers):
        seen = {key for key, of in zip(keys, fold.tolist(), strict=True) if of not in without}  # as Teachers.rows says
        assert [bool(seen & set(pair)) for pair in pairs] == (~clean[:, t]).tolist()
    assert clean.any(axis=1).all()  # every image has a classifier
    assert clean[[not set(pair) & set(keys) for pair in pairs]].all()  # without sources all of them


def test_images_with_two_sources_need_three_folds():
    with pytest.raises(UserError, match="--teacher_folds 2: images with 2 sources .* give 3 folds"):
        teacher.left_out(np.array([[0, 1]]), 2)
    assert teacher.left_out(np.array([[1, 1], [-1, 0]]), 2) == [(0,), (1,)]
    assert teacher.left_out(np.array([[0, 1], [2, -1]]), 3) == [(0, 1), (0, 2), (1, 2)]


# ------------------------------------------------------------------------------------------------------- the labels


@given(
    st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3).filter(any), min_size=1, max_size=8),
    st.floats(0.1, 20),
    st.sampled_from(["all", "pair"]),
    st.sampled_from(["teacher", "mixed"]),
    st.floats(0, 1),
)
@settings(max_examples=80, deadline=None)
def test_labels_sum_to_one(rows, temperature, classes, kind, weight):
    q = np.array(rows) / np.sum(rows, axis=1, keepdims=True)
    source, target = np.arange(len(q)) % 3, np.arange(len(q)) // 2 % 3
    images = SyntheticImages([None] * len(q), source, target, np.full(len(q), 0.49))
    chosen = SyntheticSettings(
        soft_labels=kind, teacher_temperature=temperature, teacher_classes=classes, teacher_weight=weight
    )
    labels = teacher.label(images, q, chosen).labels(0.5, 3)
    assert labels.dtype == np.float32 and (labels >= 0).all()
    np.testing.assert_allclose(labels.sum(1), 1, atol=1e-6)
    if classes == "pair":
        outside = np.ones_like(labels, bool)
        outside[np.arange(len(q)), source] = outside[np.arange(len(q)), target] = False
        assert (labels[outside] == 0).all()


def test_labels_are_tempered_limited_mixed_and_where_nobody_judges_by_strength():
    q, pair = np.array([[0.1, 0.4, 0.5]]), np.array([[True, True, False]])
    np.testing.assert_allclose(teacher.tempered(q, 1.0), q)
    roots = np.sqrt(q)
    np.testing.assert_allclose(teacher.tempered(q, 2.0), roots / roots.sum())
    np.testing.assert_allclose(teacher.tempered(q, 1.0, pair), [[0.2, 0.8, 0]])
    np.testing.assert_allclose(teacher.tempered(np.array([[0.0, 0.0, 1.0]]), 1.0, pair), [[0.5, 0.5, 0]])
    images = SyntheticImages([None] * 2, np.array([0, 0]), np.array([1, 1]), np.array([0.25, 0.25]))
    mixed = SyntheticSettings(soft_labels="mixed", teacher_weight=0.8)
    labels = teacher.label(images, np.concatenate([q, np.zeros((1, 3))]), mixed).soft
    np.testing.assert_allclose(labels, [[0.8 * 0.1 + 0.1, 0.8 * 0.4 + 0.1, 0.8 * 0.5], [0.5, 0.5, 0]], atol=1e-6)
    assert np.array_equal(images.take(np.array([1])).labels(0.5, 3), [[0.5, 0.5, 0]])


def test_an_unlabelled_source_may_have_any_of_its_classes():
    q = np.array([[0.1, 0.4, 0.5]] * 3)
    known = np.array([[1 / 3, 1 / 3, 1 / 3], [0, 0.25, 0.75], [0, 1, 0]])
    images = SyntheticImages([None] * 3, np.array([0, 2, 1]), np.array([0, 1, 0]), np.full(3, 0.5), source_labels=known)
    labels = teacher.label(images, q, SyntheticSettings(soft_labels="teacher", teacher_classes="pair")).soft
    np.testing.assert_allclose(labels, [[0.1, 0.4, 0.5], [0, 4 / 9, 5 / 9], [0.2, 0.8, 0]], atol=1e-6)


# ----------------------------------------------------------------------------------------------------- real training


@pytest.fixture
def animals_folder(tmp_path):
    return tiny.write_image_folder(tmp_path / "animals", train=4, val=1, test=1)


@pytest.fixture
def subset(animals_folder, tmp_path):
    """One image of each of the twelve training images, and one without a source."""
    rows = []
    for label, name in enumerate(CLASSES):
        for index in range(4):
            target = CLASSES[(label + index) % 3]
            rows.append((tiny.picture(label, 7 + index), name, target, 0.6, f"train/{name}/train{index:03d}.png"))
    return evaluating.write_subset(tmp_path / "made", [*rows, (tiny.picture(0, 99), "toad", "toad", 1.0, "")])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFMIX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def resolved(animals_folder, subset, tmp_path, **changes):
    flags = {"syndata_dir": subset, "soft_labels": "teacher", "teacher_folds": 2, "nepoch": 1, "model": "test_resnet"}
    argv = classify_arguments(animals_folder, tmp_path / "run", **{**flags, **changes})
    return run.resolve(read_config(train_cls.build_parser().parse_args(list(map(str, argv)))))


def labelled(request, train=run.train):
    config, dataset, images = request
    return teacher.with_teacher_labels(images, teacher.subset_labels(config, dataset), config.synthetic, train)


def runs_of(cache):
    return sorted(path.parent for path in cache.glob("teachers/*/without-*/results.json"))


@pytest.mark.slow
def test_each_image_has_the_label_of_the_classifier_that_left_out_its_source(
    animals_folder, subset, tmp_path, cache, caplog
):
    caplog.set_level(logging.INFO)
    config, dataset, images = request = resolved(animals_folder, subset, tmp_path)
    plan = teacher.subset_labels(config, dataset)[0].describe()
    assert "13 images by 2 classifiers of 6 to 6 of the 12 training images (2 folds), 2 of them to train" in plan
    soft = labelled(request).soft
    assert len(runs_of(cache)) == 2 and "% on held-out training images" in caplog.text
    np.testing.assert_allclose(soft.sum(1), 1, atol=1e-6)
    held = {}
    for folder in runs_of(cache):
        with open(folder / "test_predictions.csv", encoding="utf-8") as lines:
            files = [row["file"] for row in csv.DictReader(lines)]
        assert len(files) == 6 and not (folder / "val_predictions.csv").exists()  # the images left out, and no others
        expected = inference.load_run(folder).probabilities(images.image, len(images))
        held |= dict.fromkeys(files, expected)
        both = both + expected if (both := held.get("both")) is not None else expected
        held["both"] = both
    for row, source in enumerate(images.sources[:, 0]):
        expected = held[source][row] if source else held["both"][row] / 2
        np.testing.assert_allclose(soft[row], expected, atol=1e-5)

    forbidden = lambda *_: pytest.fail("trained again")  # noqa: E731
    assert np.array_equal(labelled(request, forbidden).soft, soft)
    part = resolved(animals_folder, subset, tmp_path, syndata_max=5)
    assert np.array_equal(labelled(part, forbidden).soft, soft[[images.paths.index(p) for p in part[2].paths]])
    flatter = resolved(animals_folder, subset, tmp_path, teacher_temperature=4, gamma=0.3)
    np.testing.assert_allclose(labelled(flatter, forbidden).soft, teacher.tempered(soft, 4.0), atol=1e-4)
    by_dataset = SoftLabelDataset(
        f"folder:{animals_folder}", syndata_dir=subset, soft_labels="teacher", teacher_folds=2, synthetic_mode="concat",
        teacher="--model test_resnet --weights none --res_mode 32 --nepoch 1 --batch_size 6 --gpu cpu --lr 0.02",
    )  # fmt: skip
    assert len(runs_of(cache)) == 2 and np.array_equal(by_dataset.synthetic.soft, soft)

    # a subset made again, and other training images
    caplog.clear()
    (subset / "meta-kept.csv").write_text("\n".join((subset / "meta.csv").read_text().splitlines()[:-1]) + "\n")
    kept = labelled(resolved(animals_folder, f"{subset}#kept", tmp_path))
    assert np.array_equal(kept.soft, soft[:-1]) and len(runs_of(cache)) == 2 and "made again" not in caplog.text
    tiny.picture(2, 5).save(images.paths[0])
    again = labelled(resolved(animals_folder, subset, tmp_path)).soft
    lines = [record.message for record in caplog.records if "made again" in record.message]
    assert len(lines) == 1 and "synthetic: 13 images as before, the same labels, other content" in lines[0]
    assert np.array_equal(again[1:], soft[1:]) and not np.array_equal(again[0], soft[0]) and len(runs_of(cache)) == 2
    tiny.picture(1, 77).save(animals_folder / "train" / "toad" / "train001.png")
    config, dataset, _ = resolved(animals_folder, subset, tmp_path)
    other = teacher.subset_labels(config, dataset)[0]
    assert other.kept() is None and "2 of them to train" in other.describe()


@pytest.mark.slow
def test_a_teacher_that_was_interrupted_goes_on(animals_folder, subset, tmp_path, cache, monkeypatch):
    undisturbed = labelled(resolved(animals_folder, subset, tmp_path, nepoch=3)).soft
    for created in (*cache.iterdir(), subset / next(p.name for p in subset.glob("teacher-*"))):
        shutil.rmtree(created) if created.is_dir() else created.unlink()
    monkeypatch.setattr(trainer, "SAVE_SECONDS", -1.0)
    epochs, train_epoch = [], trainer.Trainer._train_epoch

    def killed_in_the_second_teacher(self, *arguments):
        epochs.append((self.config.output_dir.name, self.epoch))
        if epochs.count(("without-1", 2)) == 1 and epochs[-1] == ("without-1", 2):
            raise KeyboardInterrupt
        return train_epoch(self, *arguments)

    monkeypatch.setattr(trainer.Trainer, "_train_epoch", killed_in_the_second_teacher)
    request = resolved(animals_folder, subset, tmp_path, nepoch=3)
    with pytest.raises(KeyboardInterrupt):
        labelled(request)
    assert not list(subset.glob("teacher-*"))
    assert np.array_equal(labelled(request).soft, undisturbed)
    assert epochs == [*(("without-0", e) for e in range(3)), *(("without-1", e) for e in (0, 1, 2, 2))]


def test_classes_that_a_classifier_has_not_seen_keep_their_labels_by_strength(tmp_path):
    folder = tiny.write_image_folder(tmp_path / "animals", train=2, val=1, test=1)
    (folder / "train" / "toad" / "train001.png").unlink()  # the only toad is in one of the folds
    rows = [
        (tiny.picture(0, 1), "red fox", "toad", 0.5, f"train/red fox/train{index:03d}.png") for index in range(2)
    ] + [(tiny.picture(2, 2), "toad", "blue jay", 0.5, "train/toad/train000.png")]
    subset = evaluating.write_subset(tmp_path / "made", rows)
    config, dataset, images = request = resolved(folder, subset, tmp_path, nepoch=1, batch_size=2)
    labels = teacher.subset_labels(config, dataset)[0]
    # of the two foxes one is in the toad's fold; the classifier without the toad knows no toad
    assert labels.labelling.any(axis=1).sum() == 1 and not labels.labelling[2].any()
    assert "2 images keep their labels by strength" in labels.describe()
    soft, by_strength = labelled(request).soft, images.labels(0.5, 3)
    same = (soft == by_strength).all(axis=1)
    assert same.tolist() == (~labels.labelling.any(axis=1)).tolist()
    only = replace(dataset, train=dataset.train.take([0, 2, 4]))
    anywhere = replace(config, synthetic=replace(config.synthetic, allow_other_sources=True))
    with pytest.raises(UserError, match="expected two training images per class at least"):
        teacher.subset_labels(anywhere, only)


def test_each_kind_of_classifier_has_its_own_folder_and_labels(animals_folder, subset, tmp_path):
    config, dataset, _ = resolved(animals_folder, subset, tmp_path)
    teachers = teacher.Teachers.of(config, dataset)
    pretrained = replace(teachers, origin={**teachers.origin, "weights": {"files": "0"}})
    prompted = replace(teachers, dataset=replace(dataset, class_names=("a", "b", "c")))
    kinds = (teachers, pretrained, prompted)
    assert len({kind.folder for kind in kinds}) == len({teacher.SubsetLabels(kind, subset).path for kind in kinds}) == 3
    spoiled, whole = (teachers.run_folder((fold,)) for fold in range(2))
    for folder in (spoiled, whole):
        runs.claim(folder, {}, "--output_dir")
    runs.spoil(spoiled, "its images changed during the run")
    teachers.remove_spoiled()
    assert not spoiled.exists() and whole.exists()


def test_images_whose_sources_are_not_recorded_are_counted(animals_folder, tmp_path, caplog):
    rows = [(tiny.picture(0, n), "toad", "red fox", strength, "") for n, strength in enumerate((0.5, 0.7, 1.0))]
    created = evaluating.write_subset(
        tmp_path / "made", [*rows, (tiny.picture(0, 9), "toad", "toad", 0.5, "train/toad/train000.png")]
    )
    config, dataset, _ = resolved(animals_folder, created, tmp_path)
    teacher.subset_labels(config, dataset)
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and "the sources of 2 images are not recorded" in warnings[0]


def test_an_unlabelled_source_that_became_a_training_image_is_labelled_by_who_did_not_see_it(animals_folder, tmp_path):
    rows = [(tiny.picture(0, n), "toad", "red fox", 0.7, f"{n}.png", "even") for n in range(2)]
    created = evaluating.write_subset(tmp_path / "made", rows, (*evaluating.FIVE, *meta_csv.UNLABELLED_COLUMNS))
    name = "train/toad/train001.png"  # labelled since the subset was made from it
    contents = (animals_folder / name).read_bytes(), b"of another photograph"
    values = np.stack([np.frombuffer(hash_bytes(content), np.uint8) for content in contents])
    write_sources(created, ["0.png", "1.png"], values, UNLABELLED_FILE)
    config, dataset, _ = resolved(animals_folder, created, tmp_path)
    [labels] = teacher.subset_labels(config, dataset)
    fold = int(labels.ensemble.fold[dataset.train.keys.index(name)])
    assert labels.teachers == [(0,), (1,)] and labels.labelling.tolist() == [[fold == 0, fold == 1], [True, True]]


def test_a_run_of_other_images_is_refused_before_its_labels_are_made():
    record = {"data": {"test": None}, "synthetic": {"images": 3, "labels": "by teachers", "content": "a"}}
    before = {"data": {"test": None}, "synthetic": {"images": 3, "labels": "by strength", "content": "a"}}
    assert run.BeforeLabels.compare(record, before) == "" != run.RunOrigin.compare(record, before)
    assert "synthetic: 3 images" in run.BeforeLabels.compare(
        record, {**before, "synthetic": {"images": 3, "content": "b"}}
    )
    assert "synthetic: 3 images now, 0" in run.BeforeLabels.compare({"data": {"test": None}}, before)


def test_teachers_do_not_start_from_weights_that_have_seen_the_sources(animals_folder, subset, tmp_path):
    seen = tmp_path / "seen"
    train_cls.main([*map(str, classify_arguments(animals_folder, seen, nepoch=1, model="test_resnet"))])
    message = r"--soft_labels teacher: \d+ training images \('train/.*\) are training images of .*: give other --w"
    with pytest.raises(UserError, match=message):
        labelled(resolved(animals_folder, subset, tmp_path, weights=seen))
    argv = classify_arguments(animals_folder, tmp_path / "warm", weights=seen, model="test_resnet", dry_run=True)
    assert train_cls.main([*map(str, argv)]) == 0


def test_the_command_says_what_it_would_train_and_refuses_early(animals_folder, subset, tmp_path, cache, capsys):
    argv = classify_arguments(
        animals_folder, tmp_path / "run", model="test_resnet", syndata_dir=subset, soft_labels="mixed"
    )
    assert train_cls.main([*map(str, argv), "--dry_run"]) == 0
    assert "13 images by 5 classifiers of 9 to 10 of the 12 training images" in capsys.readouterr().out
    assert not (tmp_path / "run").exists() and not cache.joinpath("teachers").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("not to be touched")
    with pytest.raises(UserError, match="is not empty"):
        train_cls.main(list(map(str, argv)))
    assert not list(cache.glob("teachers/*/without-*"))
    with pytest.raises(UserError, match="--soft_labels: there are no synthetic images"):
        train_cls.main([*map(str, classify_arguments(animals_folder, tmp_path / "x")), "--soft_labels", "teacher"])


def test_labels_reach_the_batches_and_the_identity(animals_folder, subset, tmp_path):
    config, dataset, images = resolved(animals_folder, subset, tmp_path, synthetic_mode="concat")
    soft = np.full((len(images), 3), 1 / 3, np.float32)
    given = replace(images, soft=soft)
    trained = trainer.TrainBatches(dataset.train, given, config.synthetic, 28, 6, 1, cache="off")
    assert torch.equal(trained.targets[-len(images) :], torch.from_numpy(soft))
    plain, other = (run.origin_of(config, dataset, part).describe()["synthetic"] for part in (images, given))
    assert plain["labels"] != other["labels"] and plain["content"] == other["content"]
    assert np.array_equal(images.labels(0.5, 3), soft_labels(images.source, images.target, images.strength, 0.5, 3))
