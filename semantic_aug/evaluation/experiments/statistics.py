"""Statistics over seeds and images: paired differences with confidence intervals."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
NO_SPREAD = 1e-9
"""Width below which an interval is meaningless: a few seeds differ by the same number of images."""


@dataclass(frozen=True)
class Difference:
    """A paired difference over common seeds.

    Attributes:
        count: seeds that both have.
        mean: of the differences.
        low: lower end of the confidence interval; NaN for fewer than two seeds.
        high: upper end.
    """

    count: int
    mean: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Whether the interval has a width and excludes zero."""
        return (self.low > 0 or self.high < 0) and not self.flat

    @property
    def flat(self) -> bool:
        """Whether the interval has no width."""
        return self.high - self.low < NO_SPREAD


def paired_difference(first: Mapping[int, float], second: Mapping[int, float]) -> Difference | None:
    """Mean of ``first - second``, scores by seed, over common seeds, with Student's interval mean +- t * s / sqrt(n), n - 1
    degrees; None without a common seed."""
    return mean_interval([first[seed] - second[seed] for seed in sorted(set(first) & set(second))])


def crossed_difference(
    first: Mapping[int, np.ndarray], second: Mapping[int, np.ndarray], strata: np.ndarray
) -> Difference | None:
    """Mean of ``first - second`` over common seeds, with an interval for other seeds *and* other images.

    All seeds are scored on the same images, so their spread alone leaves out the chance in those images. Seeds and
    images are crossed; the variance of the mean is at most the sum of the seeds' variance, s^2 / n, and of the images',
    each averaged over the seeds (Owen 2007, "The pigeonhole bootstrap"). Degrees of freedom after Satterthwaite
    (1946).

    Args:
        first: seed -> ``(N,)`` contribution of each image to the score, in the same order for every seed.
        second: likewise, of what it is compared to.
        strata: ``(N,)`` int, groups of images whose numbers do not vary (classes, for a mean over classes).

    Returns:
        None without a common seed.
    """
    parts = [first[seed] - second[seed] for seed in sorted(set(first) & set(second))]
    image_variance, freedom = _image_variance(parts, strata) if parts else (0.0, 1)
    return mean_interval([float(part.sum()) for part in parts], image_variance, freedom)


def image_interval(part: np.ndarray, strata: np.ndarray) -> tuple[float, float]:
    """Student's interval of one run's score, for other images; ``part`` ``(N,)`` is each image's contribution, whose sum is the
    score. For ``strata`` see :func:`crossed_difference`."""
    from scipy.stats import t

    variance, freedom = _image_variance([part], strata)
    half = float(t.ppf(0.5 + CONFIDENCE / 2, freedom)) * math.sqrt(variance)
    return float(part.sum()) - half, float(part.sum()) + half


def _image_variance(parts: Sequence[np.ndarray], strata: np.ndarray) -> tuple[float, int]:
    """Variance of the sum over images that is due to their choice, and its degrees of freedom; ``parts`` of each seed."""
    image, counts = np.mean(parts, axis=0), np.bincount(strata)
    centres = np.bincount(strata, image) / np.maximum(counts, 1)
    centres[counts < 2] = 0  # a single image has no spread: its distance from no difference stands for it
    factors = counts / np.maximum(counts - 1, 1)
    variance = float((factors * np.bincount(strata, (image - centres[strata]) ** 2)).sum())
    return variance, max(1, len(image) - np.count_nonzero(counts))


def mean_interval(values: Sequence[float], image_variance: float = 0.0, image_freedom: int = 1) -> Difference | None:
    """The mean of one value per seed (scores or differences), with Student's interval; None without a value.

    Args:
        image_variance: variance of the mean that is due to the images.
        image_freedom: its degrees of freedom.
    """
    from scipy.stats import t

    count = len(values)
    if count == 0:
        return None
    mean = statistics.fmean(values)
    if count < 2:
        return Difference(count, mean, math.nan, math.nan)
    seed_variance = statistics.variance(values) / count
    total = seed_variance + image_variance
    freedom = (
        total**2 / (seed_variance**2 / (count - 1) + image_variance**2 / image_freedom) if total > 0 else count - 1
    )
    half = float(t.ppf(0.5 + CONFIDENCE / 2, freedom)) * math.sqrt(total)
    return Difference(count, mean, mean - half, mean + half)


def difference_text(difference: Difference | None) -> str:
    """A difference of accuracies in points: ``+1.20 [-0.30, 2.70]``, bold where the interval leaves zero out."""
    if difference is None:
        return ""
    text = f"{100 * difference.mean:+.2f}"
    if math.isnan(difference.low):
        return f"{text} (one seed)"
    if difference.flat:
        return f"{text} (the same under {difference.count} seeds)"
    text += f" [{100 * difference.low:.2f}, {100 * difference.high:.2f}]"
    return f"**{text}**" if difference.clear else text
