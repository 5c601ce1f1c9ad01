"""Drawing a subset of a split: few-shot, long-tail, held-out validation, noisy labels, as pure functions with a seed.

Each class is drawn with a generator of its own, keyed by the class *name*, from rows sorted by key. So a draw depends on
neither the listing order of files nor the other classes, and the 5-shot set contains the 1-shot set.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from semantic_aug.datasets.readers.notes import note
from semantic_aug.datasets.settings import Setting
from semantic_aug.datasets.spec import SHOT_THRESHOLDS, Splits
from semantic_aug.datasets.table import ImageTable
from semantic_aug.errors import UserError
from semantic_aug.seeding import numpy_rng


def per_class(table: ImageTable, counts: Sequence[int], purpose: str, seed: int) -> ImageTable:
    """The first ``counts[k]`` rows of class k, in an order drawn for (seed, purpose, class name): larger counts contain
    smaller ones. Where the images have groups, those of a class keep their shares."""
    by_class = np.split(np.argsort(table.labels, kind="stable"), np.cumsum(table.counts())[:-1])
    rows = [
        _in_turn(numpy_rng(seed, purpose, name).permutation(members), table.extras.get("group"))[:count]
        for name, members, count in zip(table.class_names, by_class, counts, strict=True)
    ]
    return table.take(np.concatenate(rows) if rows else np.empty(0, np.int64))


def _in_turn(rows: np.ndarray, groups: np.ndarray | None) -> np.ndarray:
    """Rows ordered such that the groups of every beginning have, to within one image, the shares of the whole.

    The j-th of a group's n rows stands at (j + 1/2) / n.
    """
    if groups is None:
        return rows
    position = np.empty(len(rows))
    for group in np.unique(groups[rows]):
        members = np.flatnonzero(groups[rows] == group)
        position[members] = (np.arange(len(members)) + 0.5) / len(members)
    return rows[np.argsort(position, kind="stable")]


def halves(table: ImageTable, round_up: bool = False) -> Splits:
    """A random half of each class for training, the rest for testing, drawn as the Diff-Mix authors draw it: one generator
    with the seed 0 permutes the images of each class, sorted by key, class after class. With ``round_up`` the middle image
    of an odd class is for training."""
    rng, train = np.random.default_rng(0), np.zeros(len(table), bool)
    for label in range(len(table.class_names)):
        rows = np.flatnonzero(table.labels == label)
        train[rows[rng.permutation(len(rows))[: (len(rows) + round_up) // 2]]] = True
    return {"train": table.take(np.flatnonzero(train)), "test": table.take(np.flatnonzero(~train))}


def few_shot(table: ImageTable, examples_per_class: int, seed: int = 0, purpose: str = "few-shot") -> ImageTable:
    """``examples_per_class`` images of each class, or all where a class has fewer; -1 returns the table itself."""
    if examples_per_class < 0:
        return table
    return per_class(table, np.minimum(table.counts(), examples_per_class), purpose, seed)


def long_tail_counts(counts: Sequence[int], imbalance_factor: float, profile: str = "exponential") -> np.ndarray:
    """Images to keep of each class, falling off exponentially over the classes sorted by size (Cui et al. 2019).

    ``exponential``: n_max * IF^(rank / (K - 1)), rounded; the largest class keeps everything, IF is the smallest class over
    the largest. ``original``, as the Diff-Mix authors' code counts: n_mean * IF^(rank / (K - 2)), cut to a whole number;
    its last class falls a little below IF, and a class smaller than its share keeps all (there the code fails).

    Args:
        counts: ``(K,)`` images available in each class.
        imbalance_factor: smallest over largest count, in (0, 1].
        profile: ``exponential`` or ``original``.

    Returns:
        ``(K,)`` images to keep: at least 1 of a class that has any, never more than there are. Classes without images do not
        count.
    """
    counts = np.asarray(counts, dtype=np.int64)
    classes = np.count_nonzero(counts)
    order = np.argsort(-counts, kind="stable")
    ranks = np.empty(len(counts), dtype=np.int64)
    ranks[order] = np.arange(len(counts))
    if profile == "original":
        wanted = np.floor(counts.sum() / max(1, classes) * imbalance_factor ** (ranks / max(1, classes - 2)))
    else:
        wanted = np.round(counts.max(initial=0) * imbalance_factor ** (ranks / max(1, classes - 1)))
    return np.minimum(counts, np.maximum(wanted.astype(np.int64), 1))


def class_groups(
    counts: Sequence[int], many: int = SHOT_THRESHOLDS[0], few: int = SHOT_THRESHOLDS[1]
) -> dict[str, np.ndarray]:
    """Classes by how many training images they have, as long-tail results are reported (Liu et al. 2019).

    Args:
        counts: ``(K,)`` training images of each class.
        many: above it a class is a ``many``-shot one.
        few: below it a class is a ``few``-shot one; what is left, both ends included, is ``medium``.

    Returns:
        ``many``, ``medium`` and ``few``, each the ascending indices of its classes; together every class once.

    Raises:
        UserError: the thresholds cross.
    """
    if few > many + 1:
        raise UserError(f"class groups: few-shot below {few} and many-shot above {many} overlap; lower the first")
    counts = np.asarray(counts)
    masks = {"many": counts > many, "medium": (counts <= many) & (counts >= few), "few": counts < few}
    return {name: np.flatnonzero(mask) for name, mask in masks.items()}


def corrupt_labels(table: ImageTable, probability: float, seed: int = 0, classes: str = "others") -> ImageTable:
    """The same images, each with probability ``probability`` under a class drawn uniformly: the labels of all three stages.

    ``others`` draws from all classes but the true one, so that every replaced label is wrong; ``all`` from every class, as
    in random-label experiments (Zhang et al. 2017), so that a share of 1/K keeps its label. Each row is decided by draws of
    its own, from (seed, key): a label that is wrong at one probability is wrong in the same way at every higher one, and in
    every larger subset.
    """
    count = len(table.class_names)
    if probability == 0 or count < 2:
        return table
    labels = table.labels.copy()
    for i, key in enumerate(table.keys):
        rng = numpy_rng(seed, "label-noise", key)
        if rng.random() < probability:
            labels[i] = rng.integers(count) if classes == "all" else (labels[i] + 1 + rng.integers(count - 1)) % count
    return replace(table, labels=labels)


def hold_out(table: ImageTable, fraction: float, seed: int = 0) -> tuple[ImageTable, ImageTable | None]:
    """Splits a validation set off, ``fraction`` of each class (rounded; a class keeps at least one training image). Returns
    the rest, and the held-out part or None where nothing is held out."""
    counts = table.counts()
    held = np.minimum(np.maximum(np.round(counts * fraction).astype(np.int64), 1), np.maximum(counts - 1, 0))
    if fraction == 0 or held.sum() == 0:
        return table, None
    val = per_class(table, held, "hold-out", seed)
    return table.take(np.flatnonzero(~np.isin(table.rows, val.rows))), val


def apply_setting(train: ImageTable, setting: Setting) -> ImageTable:
    """The training images a setting uses: the long tail first, then the few shots, then the wrong labels; classes that these
    leave without an image are noted."""
    if setting.task == "imbalanced":
        counts = long_tail_counts(train.counts(), setting.imbalance_factor, setting.imbalance_profile)
        train = per_class(train, counts, "long-tail", setting.subset_seed)
    train = few_shot(train, setting.examples_per_class, setting.subset_seed)
    noisy = corrupt_labels(train, setting.corrupt_prob, setting.subset_seed, setting.corrupt_classes)
    empty = np.flatnonzero((train.counts() > 0) & (noisy.counts() == 0))
    note(
        "classes whose training images all got another label by --corrupt_prob",
        map(train.class_names.__getitem__, empty),
    )
    return noisy
