"""Statistics of a comparison over seeds: mean and spread, and paired differences with confidence intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

CONFIDENCE = 0.95


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
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


def paired_difference(
    first: Mapping[int, float], second: Mapping[int, float], confidence: float = CONFIDENCE
) -> Difference | None:
    """Mean of ``first - second`` over common seeds, with Student's interval mean +- t * s / sqrt(n), n - 1 degrees.

    Args:
        first: seed -> score.
        second: seed -> score of what it is compared to.
        confidence: of the interval, in (0, 1).

    Returns:
        None without a common seed.
    """
    from scipy.stats import t

    seeds = sorted(set(first) & set(second))
    if not seeds:
        return None
    values = [first[seed] - second[seed] for seed in seeds]
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Difference(1, mean, math.nan, math.nan)
    half = float(t.ppf(0.5 + confidence / 2, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return Difference(len(values), mean, mean - half, mean + half)


def difference_text(difference: Difference | None) -> str:
    """A difference of accuracies in points: ``+1.20 [-0.30, 2.70]``, bold where the interval leaves zero out."""
    if difference is None:
        return ""
    text = f"{100 * difference.mean:+.2f}"
    if math.isnan(difference.low):
        return f"{text} (one seed)"
    text += f" [{100 * difference.low:.2f}, {100 * difference.high:.2f}]"
    return f"**{text}**" if difference.clear else text
