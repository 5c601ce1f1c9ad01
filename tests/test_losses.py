"""Losses, draws and mixing of stage 3 for long tails and synthetic images, against torch's and the papers' formulas."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ROWS, write_subset
from hypothesis import given, settings
from hypothesis import strategies as st

from semantic_aug.classify import losses, mixing
from semantic_aug.classify.config import CRITERIA, LossSettings, MixSettings, SyntheticSettings
from semantic_aug.classify.data import TrainBatches, share_of
from semantic_aug.classify.draws import EpochDraws, balanced_rows, curriculum_weights
from semantic_aug.classify.losses import expected, make_criterion, one_hot
from semantic_aug.classify.metrics import Meter
from semantic_aug.datasets import load_dataset
from semantic_aug.datasets.synthetic import read_subset, read_subsets, soft_labels
from semantic_aug.errors import UserError

COUNTS = [500, 120, 40, 6, 1]
CPU = torch.device("cpu")


def logits_and_labels(scale=3.0):
    g = torch.Generator().manual_seed(0)
    return torch.randn(12, 5, generator=g) * scale, torch.arange(12) % 5


# ----------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_is_the_papers_and_for_two_classes_torchvisions(gamma):
    from torchvision.ops import sigmoid_focal_loss

    logits, labels = logits_and_labels()
    p = logits.softmax(-1)[torch.arange(12), labels]
    result = expected(losses.focal_terms(logits, gamma), one_hot(labels, 5))
    assert torch.allclose(result, -((1 - p) ** gamma) * p.log(), atol=1e-5)
    z, two = logits[:, 0], labels % 2
    pair = torch.stack([torch.zeros(12), z], -1)
    wanted = sigmoid_focal_loss(z, two.float(), alpha=-1, gamma=gamma)
    assert torch.allclose(expected(losses.focal_terms(pair, gamma), one_hot(two, 2)), wanted, atol=1e-5)


def test_focal_has_a_gradient_where_a_class_is_certain():
    logits = torch.tensor([[200.0, -200.0]], requires_grad=True)
    expected(losses.focal_terms(logits, 0.5), torch.tensor([[1.0, 0.0]])).sum().backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_ldam_lowers_the_labels_logit_by_its_margin(scale):
    logits, labels = logits_and_labels(1.0)
    margins = torch.tensor(losses.ldam_margins(COUNTS, 0.5))
    result = expected(losses.ldam_terms(logits, margins, scale), one_hot(labels, 5))
    lowered = logits.double() - one_hot(labels, 5) * margins
    assert torch.allclose(result, F.cross_entropy(scale * lowered, labels, reduction="none").float(), atol=1e-4)
    assert margins.max() == 0.5 == margins[4] and margins[0] == pytest.approx(0.5 * 500**-0.25)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0, 70.0, 100.0, 1000.0])
@pytest.mark.parametrize("spread", [0.0, 1.0, 20.0])
def test_ldam_and_its_gradient_are_exact_at_any_scale_and_certainty(scale, spread, soft):
    logits, labels = logits_and_labels(spread)
    targets = torch.softmax(logits.flip(0) / 4, -1) if soft else one_hot(labels, 5)
    margins = torch.tensor(losses.ldam_margins(COUNTS, 0.5))
    ours, plain = (logits.clone().to(dtype).requires_grad_() for dtype in (torch.float32, torch.float64))
    # for each label its logit lowered by its margin, (B, K, K), and the plain cross-entropy of that
    lowered = scale * (plain[:, None] - torch.diag(margins))
    wanted = expected(-lowered.log_softmax(-1).diagonal(dim1=1, dim2=2), targets.double())
    result = expected(losses.ldam_terms(ours, margins, scale), targets)
    wanted.sum().backward(), result.sum().backward()
    assert torch.allclose(result.double(), wanted, rtol=1e-6, atol=1e-12) and torch.isfinite(ours.grad).all()
    assert torch.allclose(ours.grad.double(), plain.grad, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("scale", [30.0, 200.0])
def test_ldam_is_finite_where_a_class_is_certain(scale):
    """Right by far, wrong by far, and two that are equal."""
    logits = torch.tensor([[200.0, -200.0, 0.0], [-200.0, 200.0, 0.0], [7.0, 7.0, -9.0]], requires_grad=True)
    loss = expected(losses.ldam_terms(logits, torch.full((3,), 0.5), scale), one_hot(torch.zeros(3), 3))
    loss.sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert loss.tolist() == pytest.approx([0, 400.5 * scale, 0.5 * scale], abs=1e-4)


def test_balanced_softmax_shifts_by_log_frequency():
    logits, labels = logits_and_labels()
    result = expected(losses.balanced_softmax_terms(logits, torch.tensor(COUNTS)), one_hot(labels, 5))
    weighted = logits.exp() * torch.tensor(COUNTS)
    wanted = -(weighted[torch.arange(12), labels] / weighted.sum(-1)).log()
    assert torch.allclose(result, wanted, atol=1e-5)


def test_cross_entropy_of_soft_labels_is_timms():
    from timm.loss import SoftTargetCrossEntropy

    logits, _ = logits_and_labels()
    targets = torch.softmax(logits.flip(0), -1)
    assert torch.allclose(expected(losses.ce_terms(logits), targets).mean(), SoftTargetCrossEntropy()(logits, targets))


def test_effective_numbers_by_hand():
    weights = losses.effective_number_weights([2, 1], beta=0.5)  # (1 - b) / (1 - b^n): 1 / 1.5 and 1
    assert np.allclose(weights, np.array([2 / 3, 1]) * 2 / (5 / 3)) and weights.sum() == pytest.approx(2)
    assert np.allclose(losses.effective_number_weights(COUNTS, 0.0), 1)
    assert losses.effective_number_weights([0, 5])[0] > 1  # a class without images counts as one


def test_classes_without_images_leave_weights_and_margins_of_the_others_alone():
    """As in a copy of the hub whose list of classes is longer than its images need."""
    present, counts = np.array(COUNTS), np.array([*COUNTS, *[0] * 90])
    weights = losses.effective_number_weights(counts, 0.99)
    assert np.allclose(weights[:5], losses.effective_number_weights(present, 0.99))
    margins = losses.ldam_margins(counts * 2, 0.5)
    assert np.allclose(margins[:5], losses.ldam_margins(present * 2, 0.5)) and margins.max() == 0.5


@pytest.mark.parametrize("soft", [False, True])
def test_class_balanced_equals_torchs_weighted_cross_entropy(soft):
    logits, labels = logits_and_labels()
    targets = torch.softmax(logits.flip(0), -1) if soft else one_hot(labels, 5)
    criterion = make_criterion(LossSettings("cb", cb_beta=0.99), COUNTS, CPU)
    weights = torch.tensor(losses.effective_number_weights(COUNTS, 0.99), dtype=torch.float32)
    wanted = F.cross_entropy(logits, targets, weight=weights, reduction="none")
    assert torch.allclose(criterion(logits, targets, 0), wanted, atol=1e-5)


def test_weights_divide_as_torchs_weighted_mean():
    logits, labels = logits_and_labels()
    criterion = make_criterion(LossSettings("ldam", ldam_scale=30.0, drw_epoch=3), COUNTS, CPU)
    # Cao et al. 2019: cross-entropy of 30 (z - m_y e_y), classes weighted, mean over the weights; on a linear head
    lowered = logits - one_hot(labels, 5) * torch.tensor(losses.ldam_margins(COUNTS, 0.5), dtype=torch.float32)
    weights = torch.tensor(losses.effective_number_weights(COUNTS), dtype=torch.float32)
    targets = one_hot(labels, 5)
    result = criterion(logits, targets, 3).sum() / criterion.weight_sum(targets)
    assert result.item() == pytest.approx(F.cross_entropy(30 * lowered, labels, weight=weights).item(), rel=1e-5)
    assert not criterion.weighted(2) and criterion.weighted(3)


def test_reweighting_is_deferred():
    logits, labels = logits_and_labels()
    targets = one_hot(labels, 5)
    for name in CRITERIA:
        plain = make_criterion(LossSettings(name), COUNTS, CPU)
        deferred = make_criterion(LossSettings(name, drw_epoch=3), COUNTS, CPU)
        assert torch.equal(plain(logits, targets, 2), deferred(logits, targets, 2))
        changed = not torch.equal(plain(logits, targets, 3), deferred(logits, targets, 3))
        assert changed == (name != "cb")  # cb has the weights from the start


@pytest.mark.parametrize("name", CRITERIA)
def test_a_soft_labels_loss_is_the_mean_of_the_hard_ones(name):
    logits, _ = logits_and_labels()
    criterion = make_criterion(LossSettings(name, drw_epoch=0), COUNTS, CPU)
    soft = torch.tensor([[0.3, 0, 0.7, 0, 0]]).expand(12, 5)
    hard = [criterion(logits, one_hot(torch.full((12,), k), 5), 0) for k in (0, 2)]
    assert torch.allclose(criterion(logits, soft, 0), 0.3 * hard[0] + 0.7 * hard[1], atol=1e-5)


@given(
    st.sampled_from(CRITERIA),
    st.sampled_from([(0.4, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.4, 1.0, 1.0), (0.0, 0.0, 0.0)]),
    st.floats(0, 0.9),
    st.floats(0.05, 1),
    st.floats(0.05, 4),
    st.integers(0, 50),
)
@settings(max_examples=80, deadline=None)
def test_targets_sum_to_one_under_every_combination(name, alphas, smoothing, strength, gamma, seed):
    rng = np.random.default_rng(seed)
    source, target = rng.integers(5, size=(2, 8))
    targets = torch.from_numpy(soft_labels(source, target, np.full(8, strength), gamma, 5))
    images = torch.randn(8, 3, 8, 8)
    foregrounds = torch.randn(8, 3, 8, 8), one_hot(torch.from_numpy(rng.integers(5, size=8)), 5)
    kinds = MixSettings(
        use_mixup=alphas[0] > 0,
        mixup_alpha=alphas[0],
        use_cutmix=alphas[1] > 0,
        use_cmo=alphas[2] > 0,
        cutmix_alpha=max(alphas[1:]),
    )
    _, mixed = mixing.mix(images, targets, kinds, rng, foregrounds)
    final = losses.smooth(mixed, smoothing)
    assert torch.allclose(final.sum(-1), torch.ones(8), atol=1e-5) and (final >= 0).all()
    criterion = make_criterion(LossSettings(name, smoothing, drw_epoch=0), COUNTS, CPU)
    value = criterion(torch.randn(8, 5), mixed, 0)
    assert value.shape == (8,) and torch.isfinite(value).all() and (value >= -1e-6).all()


# -------------------------------------------------------------------------------------------------------------- CMO


def test_cmo_pastes_the_foreground_and_its_label_by_area():
    images, others = torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8)
    targets, theirs = one_hot(torch.tensor([0, 1]), 3), one_hot(torch.tensor([2, 2]), 3)
    mixed, labels = mixing.paste(images, targets, others, theirs, (0, 4, 2, 6))
    assert mixed.sum() == 2 * 3 * 16 and mixed[0, 0, 0, 2] == 1 and mixed[0, 0, 4, 2] == 0
    assert torch.allclose(labels, torch.tensor([[0.75, 0, 0.25], [0, 0.75, 0.25]]))


def test_foregrounds_are_drawn_by_inverse_frequency():
    labels = np.repeat([0, 1, 2], [90, 9, 1])
    rows = balanced_rows(labels, 6000, np.random.default_rng(0))
    shares = np.bincount(labels[rows], minlength=3) / 6000
    assert np.abs(shares - 1 / 3).max() < 0.03 and len(np.unique(rows)) == 100


def test_mixing_leaves_out_the_first_and_the_last_epochs():
    cmo = MixSettings(use_cmo=True, unmixed_epochs=(4, 3))  # of 200 epochs, 4 to 196 as in CMO's code
    assert [e for e in range(200) if cmo.mixes(e, 200)] == list(range(4, 197))
    assert MixSettings(use_mixup=True).mixes(0, 1) and not MixSettings(unmixed_epochs=(0, 0)).mixes(0, 1)


# ------------------------------------------------------------------------------------------------------------ draws


def drawn_by(mode: str = "item", probability: float = 0.0, balanced: bool = False) -> SyntheticSettings:
    """Settings of the draws alone."""
    return SyntheticSettings(synthetic_mode=mode, synthetic_prob=probability, synthetic_balanced=balanced)


def counted(settings, targets=None, real=40, epochs=30, batch=7, **options):
    """How many items of each step of some epochs are synthetic, and which."""
    targets = np.arange(12) % 3 if targets is None else targets
    draws = EpochDraws(real, targets, settings, batch, seed=1, epochs=epochs, **options)
    steps = []
    for epoch in range(epochs):
        order = draws.order(epoch)
        for step in range(draws.steps_per_epoch):
            items = draws.batch(epoch, step, order, np.random.default_rng([epoch, step]))
            assert len(items) == draws.batch_size
            steps.append(items[items >= real] - real)
    return draws, steps


def test_ratio_gives_every_batch_its_share():
    _, steps = counted(drawn_by("ratio", 3 / 7))
    assert {len(s) for s in steps} == {3}
    assert {len(s) for s in counted(drawn_by("ratio", 0.25))[1]} == {1, 2}  # 1.75 a batch
    assert {len(s) for s in counted(drawn_by("ratio", 1.0))[1]} == {7}


@pytest.mark.parametrize("probability", [0.02, 0.1, 0.25, 0.3, 1 / 3, "0.9:0.2", "0.01:0.5"])
def test_the_remainder_of_a_ratio_is_carried_over_the_whole_run(probability):
    settings = SyntheticSettings(synthetic_mode="ratio", synthetic_prob=probability)
    draws, steps = counted(settings, epochs=30)
    p = np.repeat(np.linspace(*settings.probabilities, 30), draws.steps_per_epoch)
    assert np.abs(np.cumsum([len(s) for s in steps]) - 7 * np.cumsum(p)).max() < 1
    again = EpochDraws(40, np.arange(12) % 3, settings, 7, seed=1, epochs=30)  # as a resumed run draws
    resumed = again.batch(17, 3, again.order(17), np.random.default_rng([17, 3]))
    assert np.array_equal(resumed[resumed >= 40] - 40, steps[17 * draws.steps_per_epoch + 3]) and draws.carried


@pytest.mark.parametrize(
    ("mode", "probability", "epochs"), [("ratio", 0.2, 300), ("ratio", 3 / 7, 300), ("ratio", 0.3, 1), ("item", 0.3, 9)]
)
def test_nothing_is_carried_where_an_epoch_holds_its_share(mode, probability, epochs):
    assert not counted(drawn_by(mode, probability), epochs=epochs)[0].carried


def test_item_draws_each_item_alone():
    _, steps = counted(drawn_by("item", 0.3), epochs=100)
    sizes = np.array([len(s) for s in steps])
    assert abs(sizes.mean() / 7 - 0.3) < 0.03 and sizes.var() == pytest.approx(7 * 0.3 * 0.7, rel=0.2)


def test_concat_runs_through_both_once_an_epoch():
    draws = EpochDraws(40, np.zeros(16), drawn_by("concat"), 7, seed=1)
    order = draws.order(0)
    assert sorted(order.tolist()) == list(range(56)) and draws.steps_per_epoch == 8
    assert not np.array_equal(order, draws.order(1))


@pytest.mark.parametrize("mode", ["item", "ratio", "concat"])
def test_balanced_draws_every_target_class_alike(mode):
    targets = np.repeat([0, 2, 3], [50, 9, 1])
    shares = {}
    for balanced in (False, True):
        _, steps = counted(drawn_by(mode, 0.5, balanced), targets)
        shares[balanced] = np.bincount(targets[np.concatenate(steps)], minlength=4) / sum(map(len, steps))
    assert np.abs(shares[True][[0, 2, 3]] - 1 / 3).max() < 0.06 and shares[False][0] > 0.7


@pytest.mark.parametrize("mode", ["item", "ratio", "concat"])
def test_target_classes_are_drawn_by_the_inverse_of_their_real_images(mode):
    targets, counts = np.repeat([0, 2, 3], [50, 9, 1]), np.array([9, 4, 1, 0])
    settings = SyntheticSettings(synthetic_mode=mode, synthetic_prob=0.5, synthetic_draw="inverse_frequency")
    _, steps = counted(settings, targets, epochs=60, counts=counts)
    shares = np.bincount(targets[np.concatenate(steps)], minlength=4) / sum(map(len, steps))
    wanted = np.array([1 / 10, 0, 1 / 2, 1]) / 1.6  # 1 / (n + 1) of the classes that have synthetic images
    assert np.abs(shares - wanted).max() < 0.05
    with pytest.raises(UserError, match="--synthetic_balanced and --synthetic_draw inverse_frequency exclude"):
        SyntheticSettings(synthetic_balanced=True, synthetic_draw="inverse_frequency")


@given(st.lists(st.sampled_from((0.1, 0.3, 0.5, 0.7, 0.9, 1.0)), min_size=1, max_size=30), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_a_curriculum_prefers_strong_images_first_and_none_over_the_whole_run(strengths, progress):
    strengths = np.array(strengths)
    weights, reverse = (curriculum_weights(strengths, p, "strong_first") for p in (progress, 1 - progress))
    np.testing.assert_allclose(weights + reverse, 1)  # what an epoch prefers, its mirror image makes up for
    assert weights.mean() == pytest.approx(0.5) and weights.min() > 0
    np.testing.assert_allclose(curriculum_weights(strengths, progress, "weak_first"), reverse)
    rising = np.diff(weights[np.argsort(strengths, kind="stable")]) * (0.5 - progress)
    assert (rising >= -1e-12).all()
    assert all(np.ptp(weights[strengths == s]) == 0 for s in strengths)


@pytest.mark.parametrize("mode", ["item", "ratio", "concat"])
@pytest.mark.parametrize("balanced", [False, True])
def test_the_share_of_strong_images_falls_over_the_epochs(mode, balanced):
    targets, strengths = np.repeat([0, 1], [30, 10]), np.tile([0.2, 0.9], 20)
    settings = SyntheticSettings(
        synthetic_mode=mode, synthetic_prob=0.5, synthetic_balanced=balanced, curriculum="strength"
    )
    draws, steps = counted(settings, targets, epochs=300, strengths=strengths)
    third = len(steps) // 3
    shares = [(strengths[np.concatenate(steps[i * third :][:third])] > 0.5).mean() for i in range(3)]
    # rank 3/4 of the strong half: its share goes from 3/4 to 1/4, so its mean over the first third is 2/3
    np.testing.assert_allclose(shares, [2 / 3, 1 / 2, 1 / 3], atol=0.04)
    assert (targets[np.concatenate(steps)] == 0).mean() == pytest.approx(0.5 if balanced else 0.75, abs=0.03)
    again = EpochDraws(40, targets, settings, 7, seed=1, strengths=strengths, epochs=300)  # as a resumed run draws
    resumed = again.batch(200, 3, again.order(200), np.random.default_rng([200, 3]))
    assert np.array_equal(resumed[resumed >= 40] - 40, steps[200 * draws.steps_per_epoch + 3])


def test_the_probability_goes_along_a_line():
    _, steps = counted(SyntheticSettings(synthetic_mode="ratio", synthetic_prob="0.9:0.1"), epochs=9, batch=40)
    assert [len(s) / 40 for s in steps] == pytest.approx([0.9 - 0.1 * epoch for epoch in range(9)])
    assert (
        len(counted(SyntheticSettings(synthetic_mode="ratio", synthetic_prob="0.2:1"), epochs=1, batch=40)[1][0]) == 8
    )
    with pytest.raises(UserError, match="epochs=N"):
        EpochDraws(40, np.zeros(4), SyntheticSettings(synthetic_prob="0.9:0.1"), 7, seed=1)


def test_balanced_rows_reach_every_image():
    labels = np.array([3, 1, 1, 3, 3, 1, 0])
    rows = balanced_rows(labels, 500, np.random.default_rng(0))
    assert set(rows.tolist()) == set(range(7))


@given(st.integers(1, 40), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_shares_of_a_batch_are_disjoint_and_closed_under_reversal(batch, parts):
    shares = [share_of(batch, part, parts) for part in range(parts)]
    assert sorted(np.concatenate(shares).tolist()) == list(range(batch))
    for share in shares:
        assert np.array_equal(share[::-1], batch - 1 - share)  # reversing the share is reversing the batch


def test_parts_put_together_are_the_batch(tmp_path, image_folder):
    dataset = load_dataset(f"folder:{image_folder}")
    synthetic = read_subset(write_subset(tmp_path / "s", ROWS), dataset)
    batches = TrainBatches(dataset.train, synthetic, drawn_by("item", 0.5), 28, 7, seed=1)
    whole, halves = list(batches.epoch(2)), [list(batches.epoch(2, part, 2)) for part in range(2)]
    for step, (pixels, targets) in enumerate(whole):
        for part in range(2):
            where = torch.from_numpy(share_of(7, part, 2))
            assert torch.equal(halves[part][step][0], pixels[where])
            assert torch.equal(halves[part][step][1], targets[where])


# --------------------------------------------------------------------------------------------------- target classes


def test_target_class_num_keeps_some_targets_of_each_source(tmp_path, image_folder):
    dataset = load_dataset(f"folder:{image_folder}")
    pairs = [(a, b, 0.7) for a in dataset.source_names for b in dataset.source_names for _ in range(2)]
    images = read_subset(write_subset(tmp_path / "s", pairs), dataset)
    one, two, all_of = (images.with_targets(n, dataset.source_names, seed=3) for n in (1, 2, 9))
    assert (len(one), len(two), len(all_of)) == (6, 12, 18)
    for source in range(3):
        kept = [set(part.target[part.source == source].tolist()) for part in (one, two)]
        assert len(kept[0]) == 1 and len(kept[1]) == 2 and kept[0] < kept[1]
    assert set(one.paths) < set(two.paths) and one.image(0).size == (32, 32)
    again = images.with_targets(1, dataset.source_names, seed=3)
    assert again.paths == one.paths
    assert any(images.with_targets(1, dataset.source_names, seed=s).paths != one.paths for s in range(4, 9))


def test_filtered_variants(tmp_path, image_folder):
    dataset = load_dataset(f"folder:{image_folder}")
    folder = write_subset(tmp_path / "s", ROWS)
    lines = (folder / "meta.csv").read_text().splitlines()
    (folder / "meta-best.csv").write_text("\n".join(lines[:3]) + "\n")
    assert len(read_subset(f"{folder}#best", dataset)) == 2
    assert len(read_subsets([folder, f"{folder}#best"], dataset)) == 6
    with pytest.raises(
        UserError, match="unknown variant of synthetic subset .* 'bset': did you mean 'best'.*meta-bset"
    ):
        read_subset(f"{folder}#bset", dataset)


def test_a_registered_key_takes_a_variant(tmp_path):
    from semantic_aug import registry

    (tmp_path / "synthetic_datasets.yaml").write_text("d:\n  one: a/b\n  two: ['a/b', 'a/c#old']\n")
    assert registry.subsets("d", "one", tmp_path) == ["a/b"]
    assert registry.subsets("d", "two#best", tmp_path) == ["a/b#best", "a/c#best"]
    with pytest.raises(UserError, match="'three'"):
        registry.subsets("d", "three#best", tmp_path)


def test_a_folder_may_have_a_number_sign_in_its_name(tmp_path, image_folder):
    """``--output_root "/data/run #2"`` makes subsets below such a folder."""
    from semantic_aug import registry

    dataset, above = load_dataset(f"folder:{image_folder}"), tmp_path / "run #2"
    for folder in (write_subset(above / "s", ROWS), write_subset(tmp_path / "s#1", ROWS)):
        lines = (folder / "meta.csv").read_text().splitlines()
        (folder / "meta-best.csv").write_text("\n".join(lines[:3]) + "\n")
        assert len(read_subset(folder, dataset)) == 4 and len(read_subset(f"{folder}#best", dataset)) == 2
        (tmp_path / "synthetic_datasets.yaml").write_text(f"d: {{one: '{folder}', two: ['{folder}#old']}}\n")
        assert registry.subsets("d", "one#best", tmp_path) == registry.subsets("d", "two#best", tmp_path)
        assert registry.subsets("d", "one#best", tmp_path) == [f"{folder}#best"]


# ---------------------------------------------------------------------------------------------------------- metrics


def scores_of(shares, labels):
    meter = Meter(len(shares[0]), CPU, len(labels))
    half = len(labels) // 2
    logits, labels = torch.tensor(shares).log(), torch.tensor(labels)
    meter.add(logits[:half], labels[:half], torch.arange(half))
    meter.add(logits[half:], labels[half:], torch.arange(half, len(labels)))
    return meter.result()


def test_calibration_error_by_hand():
    # three images in the bin of 0.9 (two right), one in the bin of 0.6 (wrong)
    scores = scores_of([[0.9, 0.1], [0.1, 0.9], [0.9, 0.1], [0.6, 0.4]], [0, 1, 1, 1])
    assert scores.ece == pytest.approx((3 * abs(0.9 - 2 / 3) + 1 * 0.6) / 4, abs=1e-6)
    assert scores_of([[1.0, 1e-9], [1e-9, 1.0]], [0, 1]).ece == pytest.approx(0, abs=1e-6)


def test_many_medium_few_by_training_counts():
    shares = [[0.9, 0.05, 0.05], [0.9, 0.05, 0.05], [0.05, 0.9, 0.05], [0.9, 0.05, 0.05]]
    scores = scores_of(shares, [0, 0, 1, 2])
    assert scores.by_frequency([101, 100, 19]) == {"many": 1.0, "medium": 1.0, "few": 0.0}
    assert scores.by_frequency([21, 20, 4], (20, 5)) == {"many": 1.0, "medium": 1.0, "few": 0.0}
    assert scores.by_frequency([101, 20, 101]) == {"many": 0.5, "medium": 1.0}


def test_worst_and_average_group():
    scores = scores_of([[0.9, 0.1]] * 4, [0, 0, 0, 1])
    groups = np.array([7, 7, 9, 9])
    assert scores.by_group(groups) == {"worst_group": 0.5, "average_group": 0.75}
    assert scores.by_group(None) == {}
    assert set(scores.summary([1, 1], groups)) >= {"ece", "few", "worst_group", "average_group"}


def test_counts_of_processes_add_up():
    shares, labels = [[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7]], [0, 0, 1, 1]
    meters = [Meter(2, CPU, 4) for _ in range(2)]
    for part, meter in enumerate(meters):
        rows = torch.arange(part, 4, 2)
        meter.add(torch.tensor(shares).log()[rows], torch.tensor(labels)[rows], rows)
    before = {
        name: [getattr(m, name) for m in meters]
        for name in ("confusion", "top5", "loss", "bins", "correct", "predicted")
    }
    both = iter([sum(parts) for parts in before.values()])
    meters[0].combine(lambda _: next(both))
    one, whole = meters[0].result(), scores_of(shares, labels)
    assert one.summary() == pytest.approx(whole.summary()) and np.array_equal(one.correct, whole.correct)
    assert one.predicted.tolist() == whole.predicted.tolist() == [0, 1, 0, 1]
