"""Properties of the sampling plan."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semantic_aug.augmentations import strategies
from semantic_aug.augmentations.strategies import STRATEGIES, find, weights_for
from semantic_aug.errors import UserError
from semantic_aug.sampling.config import choose_strengths
from semantic_aug.sampling.plan import PlanSettings, batches_of_shard, make_plan
from semantic_aug.sampling.settings import ImageSettings, build_parser

LABELS = st.lists(st.integers(0, 4), min_size=5, max_size=60).map(
    lambda extra: np.array(sorted([0, 1, 2, 3, 4, *extra]))
)


def plan_for(labels, strategy="diff-mix", strengths=(0.7,), multiplier=3, batch_size=4, seed=0, **options):
    keys = [f"{i:05d}" for i in range(len(labels))]
    common = {"strengths": strengths, "multiplier": multiplier, "batch_size": batch_size, "seed": seed}
    return make_plan(labels, keys, int(labels.max()) + 1, PlanSettings(strategy=find(strategy), **common, **options))


@given(LABELS, st.sampled_from(sorted(STRATEGIES)), st.sampled_from([0.5, 1, 3, 5]), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_counts_targets_sources_and_pairing(labels, strategy, multiplier, seed):
    plan, row, k = plan_for(labels, strategy, multiplier=multiplier, seed=seed), find(strategy), 5
    assert len(plan) == round(multiplier * len(labels))
    targets = np.bincount(plan.target, minlength=k)
    assert targets.max() - targets.min() <= 1  # even over the classes
    sources = np.bincount(plan.source_class, minlength=k)
    assert sources.max() - sources.min() <= 1
    if row.start == "noise":
        assert (plan.source == -1).all()
        return
    assert (labels[plan.source] == plan.source_class).all()
    if row.pairing == "mixed":
        assert (plan.source_class != plan.target).all()
    else:
        assert (plan.source_class == plan.target).all()
    for c in range(k):  # within a class the images take turns
        uses = np.bincount(plan.source[plan.source_class == c], minlength=len(labels))[labels == c]
        assert uses.max() - uses.min() <= 1


@given(LABELS, st.integers(0, 3))
@settings(max_examples=80, deadline=None)
def test_imbalanced_sources_follow_the_set_and_targets_are_even(labels, seed):
    plan = plan_for(labels, seed=seed, task="imbalanced")
    uses = np.bincount(plan.source, minlength=len(labels))
    targets = np.bincount(plan.target, minlength=5)
    assert uses.max() - uses.min() <= 1 and targets.max() - targets.min() <= 1


@given(st.sampled_from([2, 3, 8, 200]), st.integers(0, 99), st.sampled_from(["vanilla", "imbalanced"]), st.booleans())
@settings(max_examples=80, deadline=None)
def test_pairs_within_a_class_are_only_those_that_no_pairing_avoids(classes, seed, task, long_tailed):
    rng = np.random.default_rng(seed)
    images = np.maximum(60 * 0.02 ** (np.arange(classes) / (classes - 1)), 1).astype(int) if long_tailed else 3
    labels = np.sort(np.r_[np.arange(classes), rng.permutation(np.repeat(np.arange(classes), images))])
    plan = plan_for(labels, seed=seed, task=task)
    sources, targets = (np.bincount(c, minlength=classes) for c in (plan.source_class, plan.target))
    assert targets.max() - targets.min() <= 1
    least = np.maximum(sources + targets - len(plan), 0).sum()  # k is on one side of every other task
    assert np.count_nonzero(plan.source_class == plan.target) == least
    assert task == "imbalanced" or least <= 1  # an odd number of tasks between two classes leaves one


def test_two_classes_always_swap():
    for labels in (np.arange(200) % 2, np.array([0] * 190 + [1] * 10)):
        plan = plan_for(np.sort(labels), multiplier=5)
        assert np.count_nonzero(plan.source_class == plan.target) == 0


@pytest.mark.parametrize(
    ("classes", "images", "task", "digest"),
    [
        (3, 40, "vanilla", "d322c460fdca2279"),
        (8, 25, "vanilla", "f0ea92886fdb1754"),
        (200, 5, "vanilla", "0cebc7e27576d7a8"),
        (200, 5, "imbalanced", "dd3ca6267934342a"),
    ],
)
def test_plans_of_earlier_versions_that_needed_no_more_stay(classes, images, task, digest):
    """Digests recorded before pairs left by the random swaps were settled class by class."""
    assert plan_for(np.repeat(np.arange(classes), images), multiplier=5, task=task).digest[:16] == digest


def test_independent_pairing_draws_every_class_alike():
    labels = np.repeat(np.arange(4), [97, 1, 1, 1])
    plan = plan_for(labels, multiplier=400, task="imbalanced", pairing="independent")
    table = np.zeros((4, 4), int)
    np.add.at(table, (plan.source_class, plan.target), 1)
    expected = table.sum(1, keepdims=True) / 4
    assert ((table - expected) ** 2 / expected).sum() < 32.9  # chi-square of 12 degrees of freedom, p = 0.001
    balanced = plan_for(labels, multiplier=400, task="imbalanced")
    assert (plan.source == balanced.source).all() and (plan.strength_code == balanced.strength_code).all()
    assert plan.digest == plan_for(labels, multiplier=400, task="imbalanced", pairing="independent").digest
    with pytest.raises(
        UserError, match="--pairing independent with --sample_strategy real-aug, which keeps every image"
    ):
        ImageSettings(sample_strategy="real-aug", pairing="independent")


@given(LABELS, st.integers(1, 7), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_shards_cover_every_batch_once(labels, batch_size, shards):
    plan = plan_for(labels, batch_size=batch_size)
    dealt = [batches_of_shard(plan, shards, i, 0).tolist() for i in range(shards)]
    assert sorted(b for part in dealt for b in part) == list(range(plan.num_batches))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
    covered = [n for b in range(plan.num_batches) for n in plan.numbers(b)]
    assert covered == list(range(len(plan)))


@given(LABELS)
@settings(max_examples=30, deadline=None)
def test_the_plan_is_a_function_of_its_arguments(labels):
    a, b = plan_for(labels, strengths=(0.3, 0.9)), plan_for(labels, strengths=(0.9, 0.3))
    assert a.digest == b.digest and (a.source == b.source).all() and (a.strength_code == b.strength_code).all()
    others = [
        plan_for(labels, seed=1),
        plan_for(labels, multiplier=4),
        plan_for(labels, strengths=(0.5,)),
        plan_for(labels, batch_size=8),
        plan_for(labels, "real-guidance"),
    ]
    assert len({a.digest, *(o.digest for o in others)}) == 6


def test_strengths_are_even_and_every_batch_has_one_strength():
    plan = plan_for(np.arange(100) % 5, strengths=(0.3, 0.5, 0.7, 0.9), multiplier=4, batch_size=16)
    assert np.bincount(plan.strength_code).tolist() == [100, 100, 100, 100]
    assert all(len({plan.strength(n) for n in plan.numbers(b)}) == 1 for b in range(plan.num_batches))
    assert plan.num_batches == 4 * 7 and max(len(plan.numbers(b)) for b in range(plan.num_batches)) == 16


def test_one_class_or_no_task_is_refused():
    with pytest.raises(UserError, match="expected at least two, got 1"):
        plan_for(np.zeros(4, int))
    with pytest.raises(UserError, match="makes no image"):
        plan_for(np.array([0, 1]), multiplier=0.1)


def test_the_strategy_table_is_the_contract():
    rows = {name: (row.weights, row.start, row.pairing) for name, row in STRATEGIES.items()}
    assert rows == {
        "diff-mix": ("tokens+lora", "image", "mixed"),
        "diff-aug": ("tokens+lora", "image", "same"),
        "diff-gen": ("tokens+lora", "noise", "same"),
        "real-mix": ("base", "image", "mixed"),
        "real-guidance": ("base", "image", "same"),
        "real-gen": ("base", "noise", "same"),
        "ti-mix": ("tokens", "image", "mixed"),
        "ti-aug": ("tokens", "image", "same"),
        "da-fusion": ("tokens", "image", "same"),
        "diff-ii": ("tokens+lora", "inversion", "same"),
        "inversion-mix": ("tokens+lora", "inversion", "mixed"),
    }
    assert find("real-aug") is find("real-guidance") and "real-aug" in strategies.names()


@pytest.mark.parametrize(
    ("name", "lora", "tokens", "use"),
    [
        ("diff-mix", True, True, (True, True)),
        ("diff-mix", True, False, (True, False)),
        ("diff-mix", False, True, (False, True)),
        ("ti-aug", True, True, (False, True)),
        ("real-mix", True, True, (False, False)),
    ],
)
def test_weights_follow_from_table_and_record(name, lora, tokens, use):
    assert weights_for(find(name), lora, tokens, "checkpoint x") == use


def test_a_record_without_what_a_strategy_needs_is_refused():
    with pytest.raises(UserError, match="checkpoint x has neither a LoRA"):
        weights_for(find("diff-mix"), False, False, "checkpoint x")
    with pytest.raises(UserError, match="needs class tokens, checkpoint x has none"):
        weights_for(find("ti-mix"), True, False, "checkpoint x")


@pytest.mark.parametrize(
    ("strategy", "how", "strengths", "label"),
    [
        ("diff-mix", "fixed", (0.7,), "0.7"),
        ("diff-mix", "uniform", (0.3, 0.5, 0.7, 0.9), "Uniform"),
        ("diff-gen", "fixed", (1.0,), "1.0"),
    ],
)
def test_strengths_of_a_subset(strategy, how, strengths, label):
    settings = ImageSettings(sample_strategy=strategy, strength_strategy=how)
    assert choose_strengths(settings, 25) == (strengths, label)


@pytest.mark.parametrize("strength", [0, -0.1, 1.2])
def test_a_strength_outside_its_range_is_refused(strength):
    with pytest.raises(UserError, match="--aug_strength.*expected a number in \\(0, 1\\]"):
        build_parser().parse_args(["--dataset", "x", "--aug_strength", str(strength)])
