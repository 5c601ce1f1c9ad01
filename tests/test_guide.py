"""Sources and targets that follow a classifier: the draws, what is read of its run, and what is refused."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semantic_aug import runs
from semantic_aug.augmentations.strategies import find
from semantic_aug.classify.inference import load_run
from semantic_aug.classify.metrics import write_predictions
from semantic_aug.datasets import load_dataset
from semantic_aug.datasets.fingerprint import data_identity
from semantic_aug.datasets.synthetic import SOURCES_FILE, read_sources, write_sources
from semantic_aug.errors import UserError
from semantic_aug.sampling.guide import GUIDE_FILE, PREDICTIONS, make_guide, read_confusions, read_guide, write_guide
from semantic_aug.sampling.plan import EVEN_SHARE, Guide, PlanSettings, confusion_shares, make_plan
from semantic_aug.sampling.settings import ImageSettings


def plan_for(labels, guide=None, strategy="diff-mix", multiplier=5, seed=0, **options):
    settings = PlanSettings(
        strategy=find(strategy), strengths=(0.7,), multiplier=multiplier, batch_size=4, seed=seed, guide=guide or Guide(),
        **options,
    )  # fmt: skip
    return make_plan(labels, [f"{i:04d}" for i in range(len(labels))], int(labels.max()) + 1, settings)


@given(st.integers(2, 12), st.integers(1, 9), st.sampled_from(["vanilla", "imbalanced"]), st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_targets_are_as_frequent_as_the_confusions_and_never_the_own_class(classes, images, task, seed):
    rng = np.random.default_rng(seed)
    labels = np.sort(np.r_[np.arange(classes), rng.integers(classes, size=classes * images)])
    confusions = rng.integers(0, 5, (classes, classes)) * (rng.random((classes, classes)) < 0.4)
    plan = plan_for(labels, Guide(confusions=confusions), pairing="confusion", task=task, seed=seed)
    table = np.zeros((classes, classes), int)
    np.add.at(table, (plan.source_class, plan.target), 1)
    assert not np.diag(table).any()
    errors = confusions - np.diag(np.diag(confusions))
    for row, counts in zip(errors, table, strict=True):
        k = len(row)
        expected = (
            row / row.sum() if row.sum() else (np.arange(k) != list(errors.tolist()).index(row.tolist())) / (k - 1)
        )
        if row.sum():  # of a class that is never confused, see the next test
            assert (np.abs(counts - counts.sum() * expected) < 1 + 1e-9).all()


def test_a_class_confused_with_none_has_even_targets_and_the_mean_over_seeds_is_exact():
    confusions = np.array([[9, 0, 0, 0], [1, 5, 3, 0], [0, 0, 0, 0], [2, 2, 2, 0]])
    shares = confusion_shares(confusions)
    third = 1 / 3
    assert np.allclose(
        shares, [[0, third, third, third], [0.25, 0, 0.75, 0], [third, third, 0, third], [third] * 3 + [0]]
    )
    labels, table = np.repeat(np.arange(4), 5), np.zeros((4, 4))
    for seed in range(300):  # 7 tasks of each class, of which a third is not a whole number
        plan = plan_for(labels, Guide(confusions=confusions), pairing="confusion", multiplier=1.4, seed=seed)
        np.add.at(table, (plan.source_class, plan.target), 1)
    assert np.abs(table / table.sum(1, keepdims=True) - shares).max() < 0.02  # four standard errors are 0.016


@given(st.lists(st.floats(0, 20, width=32), min_size=6, max_size=60), st.sampled_from(["diff-mix", "diff-aug"]))
@settings(max_examples=60, deadline=None)
def test_hard_sources_follow_the_loss_and_every_image_occurs(losses, strategy):
    losses = np.array(losses, np.float32)
    labels = np.sort(np.arange(len(losses)) % 3)
    plan = plan_for(labels, Guide(losses=losses), strategy, sources="hard")
    uses, even = np.bincount(plan.source, minlength=len(losses)), 1 / len(losses)
    total = losses.astype(float).sum()
    shares = (1 - EVEN_SHARE) * losses / total + EVEN_SHARE * even if total else np.full(len(losses), even)
    assert (np.abs(uses - 5 * len(losses) * shares) < 1 + 1e-6).all() and uses.min() >= 1
    assert (plan.source_class == labels[plan.source]).all()
    assert strategy == "diff-mix" or (plan.target == plan.source_class).all()


@pytest.mark.parametrize("sources", ["unlabelled", "both"])
def test_targets_of_sources_that_no_classifier_has_seen_are_even(sources):  # as in a dry run
    labels, pool = np.repeat(np.arange(3), 4), [f"{i:04d}" for i in range(20)]
    guide = Guide(confusions=np.array([[5, 1, 0], [0, 5, 1], [1, 0, 5]]))
    plan = plan_for(labels, guide, pairing="confusion", sources=sources, pool=pool, multiplier=10)
    unknown = plan.source_class == 3
    assert unknown.sum() == (120 if sources == "unlabelled" else 60)
    assert (np.bincount(plan.target[unknown], minlength=3) == unknown.sum() // 3).all()
    assert (plan.target[~unknown] == (plan.source_class[~unknown] + 1) % 3).all()


def test_a_damaged_file_of_a_subset_counts_as_absent(tmp_path):
    losses = np.random.default_rng(0).random(40).astype(np.float32)
    write_guide(tmp_path, Guide(losses=losses, origin={"classifier": "a"}))
    write_sources(tmp_path, [f"{i}.png" for i in range(40)], np.arange(640, dtype=np.uint8).reshape(40, 16))
    for name, read in ((GUIDE_FILE, read_guide), (SOURCES_FILE, read_sources)):
        content = (tmp_path / name).read_bytes()
        for position in range(0, len(content), 3):
            damaged = bytearray(content)
            damaged[position] ^= 0x5A
            (tmp_path / name).write_bytes(damaged)
            read(tmp_path)


def test_what_decides_is_part_of_the_digest():
    labels, ones = np.repeat(np.arange(3), 4), np.ones((3, 3), int)
    plans = [
        plan_for(labels),
        plan_for(labels, Guide(confusions=ones), pairing="confusion"),
        plan_for(labels, Guide(confusions=2 * ones), pairing="confusion"),  # the same shares, another matrix
        plan_for(labels, Guide(losses=np.ones(12, np.float32)), sources="hard"),
    ]
    assert len({plan.digest for plan in plans}) == 4
    again = plan_for(labels, Guide(confusions=ones, origin={"train": "x"}), pairing="confusion")
    assert again.digest == plans[1].digest


# ------------------------------------------------------------------------------------------------ a classifier's run


@pytest.fixture
def finished(judge_folder, animals, tmp_path):
    """The judge's run with confusions on validation and the record of what it was trained on."""
    folder = shutil.copytree(judge_folder, tmp_path / "run")
    confusion = np.array([[3, 1, 0], [0, 4, 0], [2, 0, 2]])
    cells = [(true, predicted) for true in range(3) for predicted in range(3)]
    labels, predicted = np.repeat(cells, confusion.ravel(), axis=0).T
    validated = replace(animals.train.take(range(len(labels))), labels=labels)
    write_predictions(validated, predicted, animals.class_names, folder, "val")
    record = runs.load_arguments(folder) | {runs.MADE_FROM: {"data": data_identity(animals, columns=("group",))}}
    (folder / runs.ARGS_FILE).write_text(runs.arguments_text(record))
    return folder


def test_losses_and_confusions_are_the_classifiers_and_are_kept(finished, animals, tmp_path):
    settings = ImageSettings(pairing="confusion", sources="hard", classifier=finished)
    guide = make_guide(settings, animals, "cpu", load_run, tmp_path / "subset")
    assert guide.confusions.tolist() == [[3, 1, 0], [0, 4, 0], [2, 0, 2]]
    probabilities = load_run(finished).probabilities(animals.train.image, len(animals.train))
    wanted = -np.log(probabilities[np.arange(len(animals.train)), animals.train.labels])
    assert np.allclose(guide.losses, wanted, atol=1e-5)
    write_guide(tmp_path / "subset", replace(guide, losses=guide.losses + 1e-7))  # as another GPU would have it
    again = make_guide(settings, animals, "cpu", load_run, tmp_path / "subset")
    assert (again.losses == guide.losses + np.float32(1e-7)).all() and again.digest == read_guide(
        tmp_path / "subset"
    ).digest
    dry = make_guide(settings, animals, "cpu", load_run, tmp_path / "subset", predict=False)
    assert dry.digest == again.digest  # what the folder has kept is taken
    fresh = make_guide(settings, animals, "cpu", load_run, tmp_path / "new", predict=False)
    assert (fresh.losses == 1).all() and fresh.confusions.tolist() == guide.confusions.tolist()


def test_confusions_of_classes_in_another_spelling_are_read_by_name(finished, animals):
    text = (finished / PREDICTIONS).read_text()
    (finished / PREDICTIONS).write_text(text.replace("blue jay", "Blue_Jay"))
    assert read_confusions(finished, animals).tolist() == [[3, 1, 0], [0, 4, 0], [2, 0, 2]]


def test_runs_that_cannot_guide_are_refused(finished, animals, image_folder, tmp_path):
    settings = ImageSettings(pairing="confusion", classifier=finished)
    few = load_dataset(f"folder:{image_folder}", replace(animals.setting, examples_per_class=2))
    with pytest.raises(
        UserError, match="was trained on other images than those of animals.*2shot.*train: 6 images now"
    ):
        make_guide(settings, few, "cpu", load_run, tmp_path)
    others = replace(animals, source_names=("a", "b", "c"), class_names=("a", "b", "c"))
    with pytest.raises(UserError, match="has 3 classes, which differ from the 3 of animals"):
        make_guide(settings, others, "cpu", load_run, tmp_path)
    for text, message in (
        ("file,class\na.png,toad\n", "is damaged"),
        ("class,predicted\ntoad,owl\n", "the class 'owl'"),
    ):
        (finished / PREDICTIONS).write_text(text)
        with pytest.raises(UserError, match=f"val_predictions.csv .*{message}"):
            make_guide(settings, animals, "cpu", load_run, tmp_path)
    (finished / PREDICTIONS).unlink()
    with pytest.raises(UserError, match="has no val_predictions.csv.*--val_fraction"):
        make_guide(settings, animals, "cpu", load_run, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairing": "confusion"}, "--pairing confusion follows a classifier: give --classifier RUN"),
        ({"sources": "hard"}, "--sources hard follows a classifier"),
        ({"classifier": "run"}, "--classifier run: nothing follows it"),
        ({"mask_threshold": 0.5}, "--mask_threshold 0.5 goes with --object_mask and --classifier"),
        ({"mask_threshold": 0.5, "object_mask": "object"}, "--mask_threshold 0.5 goes with --object_mask and"),
        ({"sources": "hard", "classifier": "run", "sample_strategy": "real-gen"}, "real-gen, which starts from noise"),
        (
            {"pairing": "confusion", "classifier": "run", "sample_strategy": "real-aug"},
            "keeps every image in its class",
        ),
    ],
)
def test_settings_that_do_not_go_together(options, message):
    with pytest.raises(UserError, match=message):
        ImageSettings(**options)
