"""ELPV with a shortcut: functional or defective, where in train the cell's crystal gives the answer away in 95 of 100.

The photographs of :mod:`elpv` whose label is sure (defect probability 0 or 1): functional ones are mostly of monocrystalline
cells, defective ones of polycrystalline cells; ``val`` and ``test`` have both kinds as they come. A classifier that looks at
the crystal instead of the defect fails in two of the four groups; the worst group's accuracy shows it (after Waterbirds,
Sagawa et al. 2020). The split follows ELPV's, so that no base model trained on its train images has seen ``test``.
"""

from dataclasses import replace

import numpy as np

from semantic_aug.datasets.sets import elpv
from semantic_aug.datasets.spec import Splits
from semantic_aug.datasets.table import ImageTable
from semantic_aug.seeding import numpy_rng

CLASS_NAMES = ("functional", "defective")
GROUPS = ("mono functional", "poly functional", "mono defective", "poly defective")
MINORITY = {1: 0, 2: 3}
"""Groups that are rare in train, each with its class's other group."""
MINORITY_SHARE = 0.05


def read() -> Splits:
    """ELPV's splits without the photographs of unsure labels; in train the minorities are thinned out."""
    splits = {split: sure(table) for split, table in elpv.read().items()}
    return splits | {"train": thinned(splits["train"])}


def sure(table: ImageTable) -> ImageTable:
    """The functional and the defective photographs of ELPV's eight classes, labelled so, with their groups."""
    group_of = np.array([GROUPS.index(name) if name in GROUPS else -1 for name in table.class_names])
    table = table.take(np.flatnonzero(group_of[table.labels] >= 0))
    groups = group_of[table.labels]
    return replace(table, class_names=CLASS_NAMES, labels=groups // 2, extras={"group": groups})


def thinned(train: ImageTable) -> ImageTable:
    """All images of the majorities, and of each minority as many as make :data:`MINORITY_SHARE` of its class."""
    groups = train.extras["group"]
    rows = [np.flatnonzero(groups == group) for group in range(len(GROUPS))]
    for rare, frequent in MINORITY.items():
        count = round(len(rows[frequent]) * MINORITY_SHARE / (1 - MINORITY_SHARE))
        rows[rare] = numpy_rng(0, "elpv-shortcut", GROUPS[rare]).permutation(rows[rare])[:count]
    return train.take(np.concatenate(rows))


SPEC = replace(elpv.SPEC, name="elpv_shortcut", read=read, group_names=GROUPS, about=__doc__)
