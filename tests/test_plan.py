"""Properties of the sampling plan."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semantic_aug.augmentations import strategies
from semantic_aug.augmentations.strategies import STRATEGIES, find, weights_for
from semantic_aug.errors import UserError
from semantic_aug.sampling.config import choose_strengths
from semantic_aug.sampling.plan import batches_of_shard, make_plan

LABELS = st.lists(st.integers(0, 4), min_size=5, max_size=60).map(
    lambda extra: np.array(sorted([0, 1, 2, 3, 4, *extra]))
)


def plan_for(labels, strategy="diff-mix", strengths=(0.7,), multiplier=3, batch_size=4, seed=0, task="vanilla"):
    keys = [f"{i:05d}" for i in range(len(labels))]
    return make_plan(labels, keys, int(labels.max()) + 1, find(strategy), strengths, multiplier, batch_size, seed, task)


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


def test_a_dominant_class_leaves_as_few_self_pairs_as_it_must():
    labels = np.array([0] * 95 + [1, 2, 3, 4, 4])
    plan = plan_for(labels, multiplier=10, task="imbalanced")
    same = (plan.source_class == plan.target).mean()
    assert same <= 0.95 - 0.8 + 0.02  # 95 % of sources are class 0, 80 % of targets are others


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


def test_one_class_or_an_empty_class_or_no_task_is_refused():
    with pytest.raises(UserError, match="expected at least two, got 1"):
        plan_for(np.zeros(4, int))
    with pytest.raises(UserError, match="class number 1 has no training image"):
        plan_for(np.array([0, 0, 2]))
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
    chosen = weights_for(find(name), lora, tokens, "checkpoint x")
    assert (chosen.use_lora, chosen.use_tokens) == use


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
    assert choose_strengths(find(strategy), 0.7, how, 25) == (strengths, label)


@pytest.mark.parametrize("strength", [0, -0.1, 1.2])
def test_a_strength_outside_its_range_is_refused(strength):
    with pytest.raises(UserError, match="--aug_strength .*expected a number in \\(0, 1\\]"):
        choose_strengths(find("diff-mix"), strength, "fixed", 25)
