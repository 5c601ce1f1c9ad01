"""Successive halving over training seeds (Jamieson and Talwalkar 2016): which settings to try on how many seeds.

A single classifier run is noisy. Repeating it reduces the noise; cutting it shorter favours other settings than a whole run
does. So the resource is the number of seeds: all candidates run on the first seed, the better third also on the second, and
so on. The default candidate is never dropped, so the winner was compared with it over the same seeds.
"""

import math
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

KEPT = 3
"""One candidate in this many continues with the next seed."""

FINALISTS = 2
"""At least this many continue, the default among them."""

Candidate = TypeVar("Candidate", bound=Hashable)
"""A choice of settings."""


def rungs(first: int, seeds: int) -> list[int]:
    """How many candidates are tried on each seed when ``first`` are on the first."""
    sizes = [first]
    for _ in range(seeds - 1):
        sizes.append(min(sizes[-1], max(FINALISTS, math.ceil(sizes[-1] / KEPT))))
    return sizes


def affordable(trials: int, count: int, seeds: int) -> int:
    """The largest number of the ``count`` candidates whose rungs need at most ``trials`` runs; 0 where not even two fit."""
    fitting = [first for first in range(min(FINALISTS, count), count + 1) if sum(rungs(first, seeds)) <= trials]
    return max(fitting, default=0)


def search(
    tried: Sequence[Candidate], seeds: Sequence[int], run: Callable[[Candidate, int], float]
) -> tuple[Candidate, dict[Candidate, dict[int, float]]]:
    """Runs the rungs and chooses.

    Args:
        tried: candidates of the first rung, the default first.
        seeds: one rung each.
        run: trains a candidate under a seed and returns its validation score.

    Returns:
        The candidate with the best mean among those tried on every seed (the earlier of equals, the default before any
        other), and all scores.
    """
    default, alive = tried[0], list(tried)
    scores: dict[Candidate, dict[int, float]] = {candidate: {} for candidate in tried}
    sizes = [*rungs(len(tried), len(seeds))[1:], 1]
    for seed, keep in zip(seeds, sizes, strict=True):
        for candidate in alive:
            scores[candidate][seed] = run(candidate, seed)
        last, best = alive, best_first(alive, scores)[:keep]
        if default not in best and seed != seeds[-1]:
            best = [default, *best[: keep - 1]]
        alive = [candidate for candidate in alive if candidate in best]
    return best_first(last, scores)[0], scores


def best_first(candidates: Sequence[Candidate], scores: Mapping[Candidate, Mapping[int, float]]) -> list[Candidate]:
    """Candidates by falling mean score; of equals the earlier one first."""
    return sorted(candidates, key=lambda candidate: -statistics.fmean(scores[candidate].values()))
