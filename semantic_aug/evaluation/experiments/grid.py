"""The candidates of a search, and the grid of values that they are made of."""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from semantic_aug import cli, files, runs
from semantic_aug.augmentations import strategies
from semantic_aug.classify.draws import SOFT_LABELS
from semantic_aug.errors import UserError
from semantic_aug.evaluation.experiments.commands import arguments_of
from semantic_aug.seeding import numpy_rng

DEFAULT = {"strength": 0.7, "gamma": 0.5, "probability": 0.3}
"""The authors' recommendation for few shots; always a candidate, at the largest multiplier."""
PLAN_FILE = "plan.json"
"""Grid and number of runs of a folder's search, fixed by its first start."""
FORMER_GRID = {"probs": (0.1, 0.3, 0.5), "labels": ("strength",)}
"""Former defaults, which hold for plans without a grid."""


@dataclass(frozen=True)
class Candidate:
    """One choice of settings.

    Attributes:
        strength: s of the translations.
        gamma: of the soft labels.
        probability: p, chance that an item is synthetic.
        multiplier: synthetic images per training image.
        labels: one of ``train_cls.py --soft_labels``.
        strategy: of the synthetic images; empty for the first strategy of the search.
    """

    strength: float | None
    gamma: float
    probability: float
    multiplier: float
    labels: str = "strength"
    strategy: str = ""

    @property
    def subset(self) -> str:
        """Key of its synthetic images."""
        return "-".join(part for part in (self.strategy, f"s{self.strength:g}" if self.strength else "") if part)

    @property
    def name(self) -> str:
        """Name in folders and tables."""
        labels = f"-{self.labels}" if self.labels != "strength" else ""
        return f"{self.subset}-g{self.gamma:g}-p{self.probability:g}-m{self.multiplier:g}{labels}"


def _values(name: str, default: tuple[float, ...], high: float, metavar: str):
    text = f"values of {name}; {DEFAULT[name]:g} is always among them (default: {' '.join(map(str, default))})"
    return cli.setting(default, type=cli.number(0, high, open_low=True), nargs="+", metavar=metavar, help=text)


@dataclass(frozen=True, kw_only=True)
class GridSettings:
    """Which settings a search chooses among."""

    TITLE = "what to choose among"
    strengths: tuple[float, ...] = _values("strength", (0.5, 0.7, 0.9), 1, "S")
    gammas: tuple[float, ...] = _values("gamma", (0.3, 0.5, 0.8), math.inf, "G")
    probs: tuple[float, ...] = _values("probability", (0.1, 0.3, 0.5, 0.7), 1, "P")
    multipliers: tuple[float, ...] = cli.setting(
        (2.0, 5.0),
        type=cli.number(0, 1e6, open_low=True),
        nargs="+",
        metavar="M",
        help="synthetic images per training image; the pool has the largest, smaller ones are parts of it (default: 2 5)",
    )
    labels: tuple[str, ...] = cli.setting(
        ("strength", "teacher"),
        choices=SOFT_LABELS,
        nargs="+",
        metavar="LABELS",
        help="labels of the synthetic images, see train_cls.py --soft_labels; strength is always among them (default: strength "
        "teacher)",
    )
    strategy: tuple[str, ...] = cli.setting(
        ("diff-mix",),
        choices=list(strategies.STRATEGIES),
        nargs="+",
        metavar="STRATEGY",
        help="strategies of the synthetic images, each with subsets of its own; the default candidate has the first, which "
        "takes a strength (default: diff-mix)",
    )

    def __post_init__(self):
        if not strategies.find(self.strategy[0]).takes_strength:
            raise UserError(
                f"--strategy {self.strategy[0]}: it takes no --strengths; name one first that does, as diff-mix"
            )

    def resumed(self, folder: Path) -> GridSettings:
        """The grid of the search begun in a folder; this one where there is none. Raises UserError: it has other values."""
        plan, record = files.read_json(folder / PLAN_FILE), runs.plain(asdict(self))
        if plan is None:
            return self
        if "grid" not in plan:  # of an earlier version
            defaults = cli.settings_of(type(self))
            former = {name: v for name, v in FORMER_GRID.items() if getattr(self, name) == defaults[name].default}
            return replace(self, **former)
        other = {name: value for name, value in plan["grid"].items() if record.get(name) != value}
        if other:
            raise UserError(
                f"{folder} holds a search among other values: give {' '.join(arguments_of(other))}, or another --output_dir"
            )
        return self

    def candidates(self, seed: int) -> list[Candidate]:
        """The candidates, the default first and the rest in a drawn order, so that any beginning is a fair sample."""
        axes = [
            (*self.strengths, DEFAULT["strength"]),
            (*self.gammas, DEFAULT["gamma"]),
            (*self.probs, DEFAULT["probability"]),
            self.multipliers,
            ("strength", *self.labels),
            self.strategy,
        ]
        default = Candidate(**DEFAULT, multiplier=max(self.multipliers))
        values = itertools.product(*(dict.fromkeys(axis) for axis in axes))
        grid = list(dict.fromkeys(self._candidate(*of_axes) for of_axes in values))
        order = numpy_rng(seed, "tune", "order").permutation(len(grid))
        return list(dict.fromkeys([default, *(grid[i] for i in order)]))

    def _candidate(
        self, strength: float, gamma: float, probability: float, multiplier: float, labels: str, strategy: str
    ) -> Candidate:
        """A candidate; values without effect are replaced by one: strength where the strategy takes none, gamma where labels
        do not depend on it."""
        row = strategies.find(strategy)
        strength = strength if row.takes_strength else None
        gamma = DEFAULT["gamma"] if labels == "teacher" or row.pairing == "same" else gamma
        other = strategy if strategy != self.strategy[0] else ""
        return Candidate(strength, gamma, probability, multiplier, labels, other)
