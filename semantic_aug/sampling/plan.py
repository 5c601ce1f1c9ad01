"""The plan of a synthetic subset: a pure function of (training split, strategy, strengths, multiplier, seed).

A task is (number, source image, target class, strength). Tasks are numbered from 0 and grouped into fixed batches of
consecutive numbers and one strength; nothing about processes, shards or restarts enters. Everything is held in flat
arrays, so that ten million tasks take some hundred megabytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from semantic_aug.augmentations.strategies import Strategy
from semantic_aug.errors import UserError
from semantic_aug.seeding import numpy_rng

UNIFORM_STRENGTHS = (0.3, 0.5, 0.7, 0.9)
"""Strengths of ``--strength_strategy uniform``."""

PAIRINGS = ("balanced", "independent", "confusion")
"""How strategies with mixed pairing draw the target of each source: see :func:`_draw_pairs`."""

SOURCES = ("even", "hard", "unlabelled", "both")
"""How sources are drawn: see :func:`_draw_sources`."""

EVEN_SHARE = 0.2
"""Share of the tasks whose sources are even over the images where the others follow the loss: at the default of five tasks per
image, every image is the source of one."""

NO_SOURCE = -1
_REPAIR_ROUNDS = 200


@dataclass(frozen=True)
class Plan:
    """All tasks of one subset, ``T`` of them; a task's number is its position.

    Attributes:
        source: int32 ``(T,)``, row of the source image in the training split, or -1 when starting from noise; unlabelled
            images have the rows from N on.
        source_class: int32 ``(T,)``; equal to ``target`` when starting from noise. Of an unlabelled image the most probable
            class, or K without a classifier.
        target: int32 ``(T,)``, target class.
        strength_code: uint8 ``(T,)``, index into ``strengths``.
        strengths: the strengths that occur.
        batch_size: most tasks per batch; the last batch of each strength may be smaller.
        starts: int64 ``(batches + 1,)``, first number of each batch, and ``T``. A batch has one strength.
        digest: SHA-256 of everything else here and of the keys of the images; two plans are equal when their digests are.
        context: int32 ``(T,)``, index of the context that follows the prompt; None without contexts.
        partner: int32 ``(T,)``, row of a second image, of the target class; None where a task has one image or none.
    """

    source: np.ndarray
    source_class: np.ndarray
    target: np.ndarray
    strength_code: np.ndarray
    strengths: tuple[float, ...]
    batch_size: int
    starts: np.ndarray
    digest: str
    context: np.ndarray | None = None
    partner: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.target)

    @property
    def num_batches(self) -> int:
        return len(self.starts) - 1

    def numbers(self, batch: int) -> range:
        """The task numbers of a batch."""
        return range(int(self.starts[batch]), int(self.starts[batch + 1]))

    def strength(self, number: int) -> float:
        """The strength of a task."""
        return self.strengths[self.strength_code[number]]


@dataclass(frozen=True, eq=False)
class Guide:
    """Predictions of a classifier by which sources, targets and masks are chosen; None for those that are not needed.

    Attributes:
        confusions: int64 ``(K, K)``, number of validation images by true class (rows) and predicted class.
        losses: float32 ``(N,)``, cross-entropy of each training image in nats.
        pool_classes: int32 ``(P, M)``, the most probable classes of each unlabelled image, the best first.
        pool_weights: uint16 ``(P, M)``, their probabilities in ten thousandths; 0 beyond those that count.
        objects: uint8 ``(N, ceil(h * w / 8))``, the cells of the latents that show each training image's class, as packed bits.
        origin: digests of the classifier and the images by name; no part of the plan's digest.
    """

    confusions: np.ndarray | None = None
    losses: np.ndarray | None = None
    pool_classes: np.ndarray | None = None
    pool_weights: np.ndarray | None = None
    objects: np.ndarray | None = None
    origin: Mapping[str, str] = field(default_factory=dict)

    def arrays(self) -> dict[str, np.ndarray]:
        """The predictions by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}

    @property
    def digest(self) -> str:
        """SHA-256 of the arrays; empty without any."""
        arrays, digest = self.arrays(), hashlib.sha256()
        for name, array in arrays.items():
            digest.update(f"{name} {array.dtype} {array.shape} ".encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest() if arrays else ""


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """Everything that decides a plan besides the training images.

    Attributes:
        strengths: strengths to spread evenly over the tasks.
        multiplier: synthetic images per training image.
        task: ``vanilla`` or ``imbalanced``.
        pairing: one of :data:`PAIRINGS`; counts for mixed pairing only.
        contexts: number of contexts, of which each task draws one, all equally often and independently of everything else.
        sources: one of :data:`SOURCES`; counts where sources are images.
        guide: predictions of the classifier that ``pairing`` and ``sources`` follow.
        pool: names of the P unlabelled images among the sources.
    """

    strategy: Strategy
    strengths: Sequence[float]
    multiplier: float
    batch_size: int
    seed: int
    task: str = "vanilla"
    pairing: str = "balanced"
    contexts: int = 0
    sources: str = "even"
    guide: Guide = field(default_factory=Guide)
    pool: Sequence[str] = ()


def make_plan(labels: np.ndarray, keys: Sequence[str], num_classes: int, settings: PlanSettings) -> Plan:
    """Draws the plan of ``round(multiplier * N)`` tasks for K classes.

    Args:
        labels: ``(N,)`` class of each training image, rows sorted by key; every class has one.
        keys: ``N`` names of the images, for the digest.

    Raises:
        UserError: no task results, or mixed pairing with a single class.
    """
    count = _number_of_tasks(labels, num_classes, settings)
    seed, batch_size = settings.seed, settings.batch_size
    source, source_class, target = _draw_pairs(count, labels, num_classes, settings)
    levels = tuple(sorted({float(s) for s in settings.strengths}, reverse=True))
    code = np.sort(_even(count, len(levels), numpy_rng(seed, "plan", "strengths")), kind="stable").astype(np.uint8)
    context = _even(count, settings.contexts, numpy_rng(seed, "plan", "contexts")) if settings.contexts else None
    partner = _draw_partners(source, target, labels, settings) if settings.strategy.start == "inversion" else None
    drawn = [array for array in (context, partner) if array is not None]
    return Plan(
        source,
        source_class,
        target,
        strength_code=code,
        strengths=levels,
        batch_size=batch_size,
        starts=_batch_starts(code, batch_size),
        digest=_digest((source, source_class, target, code, *drawn), levels, keys, settings),
        context=context,
        partner=partner,
    )


def _number_of_tasks(labels: np.ndarray, num_classes: int, settings: PlanSettings) -> int:
    """The number of tasks; refuses training images of which no plan can be drawn."""
    multiplier, strategy = settings.multiplier, settings.strategy
    count = round(multiplier * len(labels))
    if count < 1:
        raise UserError(
            f"--syn_dataset_multiplier {multiplier:g} of {len(labels)} training images makes no image: raise it"
        )
    if strategy.pairing == "mixed" and num_classes < 2:
        raise UserError(
            f"strategy {strategy.name} translates between classes: expected at least two, got {num_classes}"
        )
    return count


def _draw_pairs(
    count: int, labels: np.ndarray, num_classes: int, settings: PlanSettings
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Source image, source class and target class of each task, int32 ``(count,)`` each.

    Targets are as even over the classes as the count allows, and mixed pairing never pairs a class with itself where that
    can be avoided. With ``independent`` pairing, targets are drawn uniformly and independently, as the Diff-Mix authors'
    code draws them, so that 1/K of the pairs stay within their class. With ``confusion`` pairing, those of each source
    class follow the classifier's confusions of it. Same pairing has the sources' classes as targets.
    """
    seed, strategy = settings.seed, settings.strategy
    if strategy.start == "noise":
        target = _even(count, num_classes, numpy_rng(seed, "plan", "targets"))
        return np.full(count, NO_SOURCE, np.int32), target, target
    source, classes = _draw_sources(count, labels, num_classes, settings), settings.guide.pool_classes
    of_pool = np.full(len(settings.pool), num_classes) if classes is None else classes[:, 0]
    source_class = np.concatenate([labels, of_pool])[source].astype(np.int32)
    mixed = strategy.pairing == "mixed"
    return source, source_class, _mixed_targets(source_class, num_classes, settings) if mixed else source_class


def _draw_sources(count: int, labels: np.ndarray, num_classes: int, settings: PlanSettings) -> np.ndarray:
    """Source image of each task, int32 ``(count,)``.

    Sources are training images, or unlabelled ones, each equally often, or half of them one and half the other.
    Even sources are as even over the classes as the count allows, and within a class every image is used equally often; in
    the imbalanced task with mixed pairing they follow the long-tailed set instead (every image equally often). Hard ones
    are drawn in proportion to the loss of each image, but for :data:`EVEN_SHARE` of them.
    """
    seed, mixed = settings.seed, settings.strategy.pairing == "mixed"
    rng = numpy_rng(seed, "plan", "sources")
    if settings.sources == "hard":
        return _hard_sources(count, settings.guide.losses, rng)
    if settings.sources in ("unlabelled", "both"):
        labelled = count - count // 2 if settings.sources == "both" else 0
        drawn = _draw_sources(labelled, labels, num_classes, replace(settings, sources="even"))
        rng = numpy_rng(seed, "plan", "unlabelled sources")
        return rng.permutation(np.concatenate([drawn, len(labels) + _even(count - labelled, len(settings.pool), rng)]))
    if mixed and settings.task == "imbalanced":
        return _even(count, len(labels), rng)
    classes = _even(count, num_classes, numpy_rng(seed, "plan", "classes" if mixed else "targets"))
    return _images_of(classes, labels, num_classes, rng)


def _hard_sources(count: int, losses: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Images in proportion to their loss, mixed with the even distribution."""
    losses = np.asarray(losses, np.float64)
    even = np.full(len(losses), 1 / len(losses))
    shares = (1 - EVEN_SHARE) * losses / losses.sum() + EVEN_SHARE * even if losses.sum() > 0 else even
    order = rng.permutation(len(losses))
    return rng.permutation(order[_systematic(shares[order], count, rng)]).astype(np.int32)


def _mixed_targets(source_class: np.ndarray, num_classes: int, settings: PlanSettings) -> np.ndarray:
    """The target class of each source of mixed pairing."""
    seed, count = settings.seed, len(source_class)
    if settings.pairing == "independent":
        return numpy_rng(seed, "plan", "independent targets").integers(num_classes, size=count, dtype=np.int32)
    if settings.pairing == "confusion":
        return _confused_targets(source_class, settings.guide.confusions, numpy_rng(seed, "plan", "confused targets"))
    target = _even(count, num_classes, numpy_rng(seed, "plan", "targets"))
    return _part_equal(source_class, target, num_classes, numpy_rng(seed, "plan", "repair"))


def _confused_targets(source_class: np.ndarray, confusions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """For each source a class that its own is taken for, as often as it is; any other class where that never happens, and all
    classes alike for a source of unknown class, K."""
    known = confusion_shares(confusions)
    target, shares = np.empty_like(source_class), np.vstack([known, np.full(len(known), 1 / len(known))])
    for rows, of_class in zip(rows_by_class(source_class, len(shares)), shares, strict=True):
        target[rows] = rng.permutation(_systematic(of_class, len(rows), rng))
    return target


def confusion_shares(confusions: np.ndarray) -> np.ndarray:
    """P(target | source class), ``(K, K)``: the rows of a confusion matrix without its diagonal, normalised; even over the
    other classes for a class that is confused with none."""
    errors = confusions * (1.0 - np.eye(len(confusions)))
    errors[errors.sum(1) == 0] = 1
    np.fill_diagonal(errors, 0)
    return errors / errors.sum(1, keepdims=True)


def _systematic(shares: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """``count`` draws of 0..len(shares)-1 in ascending order, each as often as its share of them, give or take one.

    Systematic sampling: the draws lie a fixed step apart on the cumulated shares, from a random offset on; the expected
    numbers are exact.
    """
    cumulated = np.cumsum(shares)
    edges = np.floor(cumulated / cumulated[-1] * count + rng.random()).astype(np.int64)
    return np.repeat(np.arange(len(shares), dtype=np.int32), np.diff(np.minimum(edges, count), prepend=0))


def _batch_starts(code: np.ndarray, batch_size: int) -> np.ndarray:
    """Where batches begin: every ``batch_size`` tasks, and wherever the (sorted) strength changes."""
    bounds = np.searchsorted(code, np.arange(int(code[-1]) + 2))
    parts = [np.arange(a, b, batch_size) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    return np.append(np.concatenate(parts), len(code)).astype(np.int64)


def _even(count: int, kinds: int, rng: np.random.Generator) -> np.ndarray:
    """``count`` draws of 0..kinds-1 in random order, each as often as any other, give or take one."""
    extra = rng.permutation(kinds)[: count % kinds]
    drawn = np.concatenate([np.repeat(np.arange(kinds, dtype=np.int32), count // kinds), extra.astype(np.int32)])
    rng.shuffle(drawn)
    return drawn


def rows_by_class(classes: np.ndarray, count: int) -> list[np.ndarray]:
    """The rows of each class 0 to ``count - 1``, int32, ascending."""
    order = np.argsort(classes, kind="stable").astype(np.int32)
    return np.split(order, np.searchsorted(classes[order], np.arange(1, count + 1)))[:count]


def _images_of(classes: np.ndarray, labels: np.ndarray, num_classes: int, rng: np.random.Generator) -> np.ndarray:
    """For each wanted class an image of it; within a class, images take turns in freshly shuffled rounds."""
    out = np.empty(len(classes), np.int32)
    of_class = zip(rows_by_class(classes, num_classes), rows_by_class(labels, num_classes), strict=True)
    for positions, candidates in of_class:
        rounds = -(-len(positions) // len(candidates))
        out[positions] = rng.permuted(np.tile(candidates, (rounds, 1)), axis=1).reshape(-1)[: len(positions)]
    return out


def _draw_partners(source: np.ndarray, target: np.ndarray, labels: np.ndarray, settings: PlanSettings) -> np.ndarray:
    """A second image for each task, of its target class and another one than its source wherever the class has two.

    Of mixed pairing the images of a class take turns. Of same pairing an image meets all others of its class before it meets
    one again: with the images in a random ring, the r-th task of each gets the one ``shift_r`` further on, so that every
    image is a partner once in each round too.
    """
    rng, size = numpy_rng(settings.seed, "plan", "partners"), np.bincount(labels)
    if settings.strategy.pairing == "mixed":
        partner = _images_of(target, labels, len(size), rng)
        for task in np.flatnonzero(partner == source):  # the next image of the class
            images = np.flatnonzero(labels == target[task])
            partner[task] = images[(np.searchsorted(images, source[task]) + 1) % len(images)]
        return partner
    by_source = np.argsort(source, kind="stable")
    ordered, turn = source[by_source], np.empty(len(source), np.int64)
    turn[by_source] = np.arange(len(source)) - np.searchsorted(ordered, ordered)
    begin, ring, position = np.cumsum(size) - size, rng.permutation(len(labels)), np.empty(len(labels), np.int64)
    ring = ring[np.argsort(labels[ring], kind="stable")].astype(np.int32)
    position[ring] = np.arange(len(labels)) - begin[labels[ring]]
    shifts = np.concatenate([rng.permutation(n - 1) + 1 if n > 1 else [0] for n in size])
    others = np.maximum(size - 1, 1)
    shift = shifts[(np.cumsum(others) - others)[target] + turn % others[target]]
    return ring[begin[target] + (position[source] + shift) % size[target]]


def _part_equal(source_class: np.ndarray, target: np.ndarray, num_classes: int, rng: np.random.Generator) -> np.ndarray:
    """Swaps targets between tasks until as few as possible have their source's class as target; counts stay as they are.

    Each round pairs the remaining collisions with tasks drawn at random and keeps the swaps that help and do no harm. What
    the rounds leave is settled class by class: a collision of class k swaps with any task that has k on neither side, which
    resolves it and makes no other. Where no such task is left, all have k on one side, and the collisions that remain,
    ``sources of k + targets of k - tasks``, cannot be avoided; they are intra-class translations.
    """
    target = target.copy()
    for _ in range(_REPAIR_ROUNDS if num_classes > 2 else 0):  # of two classes, only collisions can swap
        clash = np.flatnonzero(source_class == target)
        if len(clash) == 0:
            break
        partner = rng.integers(len(target), size=len(clash))
        # each task may take part in one swap per round: first come, first served
        _, first = np.unique(partner, return_index=True)
        clash, partner = clash[first], partner[first]
        free = (
            ~np.isin(partner, clash)
            & (source_class[clash] != target[partner])
            & (source_class[partner] != target[clash])
        )
        clash, partner = clash[free], partner[free]
        target[clash], target[partner] = target[partner], target[clash]
    for k in np.unique(target[source_class == target]):
        clash = rng.permutation(np.flatnonzero((source_class == k) & (target == k)))
        partner = rng.permutation(np.flatnonzero((source_class != k) & (target != k)))
        swaps = min(len(clash), len(partner))
        clash, partner = clash[:swaps], partner[:swaps]
        target[clash], target[partner] = target[partner], target[clash]
    return target


def _digest(
    arrays: Sequence[np.ndarray], levels: tuple[float, ...], keys: Sequence[str], settings: PlanSettings
) -> str:
    digest = hashlib.sha256(f"{levels} {settings.batch_size} {settings.seed}".encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    for key in (*keys, *settings.pool):
        digest.update(key.encode() + b"\0")
    digest.update(settings.guide.digest.encode())
    return digest.hexdigest()


def repeated_tasks(plan: Plan, prompts: Sequence[np.ndarray]) -> int:
    """The number of tasks between two images that equal an earlier task in all that decides their image.

    Args:
        plan: with partners. Where source and partner are one image, so are all positions between them.
        prompts: what decides the prompts besides the classes, ``(T,)`` each.
    """
    position = np.where(plan.source == plan.partner, -1, plan.strength_code.astype(np.int32))
    tasks = np.stack([plan.source, plan.partner, position, *prompts])
    return len(plan) - np.unique(tasks, axis=1).shape[1]


def batches_of_shard(plan: Plan, num_shards: int, shard_index: int, seed: int) -> np.ndarray:
    """The batches one shard makes, in the order it makes them.

    Batches are put in an order drawn once for all shards (so that a run stopped half-way has all strengths and classes)
    and dealt out in turn.
    """
    order = numpy_rng(seed, "plan", "order").permutation(plan.num_batches)
    return order[shard_index::num_shards]
