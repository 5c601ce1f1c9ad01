"""Intervals of differences: against textbook values, by hand, and by how often they hold."""

import math

import numpy as np
import pytest
import scipy.stats

from semantic_aug.evaluation.experiments.statistics import (
    crossed_difference,
    difference_text,
    image_interval,
    paired_difference,
)


def crossed(rng, effect, seeds, images, strata):
    """Shares of two candidates' runs that differ by an effect, by luck of the images, of the seeds and of both."""
    sizes = np.bincount(strata)
    weight = 1 / (np.count_nonzero(sizes) * sizes[strata])
    image = 0.5 * rng.standard_normal(images)
    first = {seed: effect + image + 0.04 * rng.standard_normal() + 0.5 * rng.standard_normal(images) for seed in seeds}
    return {seed: value * weight for seed, value in first.items()}, {seed: np.zeros(images) for seed in seeds}


def test_the_crossed_interval_holds_for_other_images_and_the_paired_one_does_not():
    rng, seeds, strata = np.random.default_rng(0), range(3), np.repeat([0, 1, 2], [8, 30, 60])
    hits, narrow, trials = 0, 0, 400
    for _ in range(trials):
        first, second = crossed(rng, 0.1, seeds, len(strata), strata)
        result = crossed_difference(first, second, strata)
        alone = paired_difference(*({s: float(v.sum()) for s, v in each.items()} for each in (first, second)))
        assert result.mean == pytest.approx(alone.mean) and result.count == 3
        hits += result.low <= 0.1 <= result.high
        narrow += alone.low <= 0.1 <= alone.high
    assert hits >= 0.94 * trials  # binomial: 95 % of 400 has a spread of 1.1 points
    assert narrow < hits - 0.03 * trials


def test_the_crossed_interval_by_hand():
    # no spread over seeds: what is left is the mean of N paired differences, with N - 1 degrees of freedom
    ones, strata = np.array([1, 1, 0, 0, 0, 0, -1, 0, 0, 1.0]), np.zeros(10, int)
    first, second = {1: ones / 10, 2: ones / 10}, {1: np.zeros(10), 2: np.zeros(10), 3: np.ones(10)}
    result = crossed_difference(first, second, strata)
    interval = scipy.stats.t.interval(0.95, 9, ones.mean(), scipy.stats.sem(ones))
    assert (result.low, result.high) == pytest.approx(interval) and result.count == 2
    assert crossed_difference(first, {3: ones}, strata) is None
    assert math.isnan(crossed_difference({1: ones}, second, strata).low)
    same = crossed_difference(first, first, strata)
    assert (same.mean, same.low, same.high) == (0, 0, 0) and not same.clear
    # an image without another of its sort is not taken for certain
    alone = crossed_difference(
        {1: np.array([1.0]), 2: np.array([1.0])}, {1: np.zeros(1), 2: np.zeros(1)}, np.zeros(1, int)
    )
    assert alone.low < 0 < alone.high


def test_the_interval_over_images_is_the_textbooks():
    right = np.array([1, 1, 0, 1, 0, 0, 1, 1, 0, 1.0])
    wanted = scipy.stats.t.interval(0.95, 9, right.mean(), scipy.stats.sem(right))
    assert image_interval(right / 10, np.zeros(10, int)) == pytest.approx(wanted)


def test_the_paired_interval_is_the_textbooks():
    """Differences 1, 2, 3, 4: mean 2.5, s = 1.290994, t(0.975, 3) = 3.182446, half width 2.054260."""
    result = paired_difference({1: 2.0, 2: 4.0, 3: 6.0, 4: 8.0, 9: 0.0}, {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0})
    assert result.count == 4 and result.mean == pytest.approx(2.5)
    assert (result.low, result.high) == (pytest.approx(0.445740, abs=1e-5), pytest.approx(4.554260, abs=1e-5))
    assert result.clear and paired_difference({1: 1.0}, {2: 1.0}) is None
    flat = paired_difference({1: 0.5, 2: 0.7}, {1: 0.4, 2: 0.6})  # ten of a hundred images each
    assert flat.mean == pytest.approx(0.1) and not flat.clear
    assert difference_text(flat) == "+10.00 (the same under 2 seeds)"
    alone = paired_difference({1: 0.5}, {1: 0.25})
    assert alone.mean == 0.25 and not alone.clear and difference_text(alone) == "+25.00 (one seed)"
