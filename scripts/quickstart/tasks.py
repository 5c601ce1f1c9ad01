"""The quickstart's tasks: a data set with its base model, and every setting of the three stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Size:
    """The counts of a run.

    Attributes:
        shots: training photographs per class.
        finetune_steps: of stage 1, at ``finetune_batch`` images each.
        finetune_batch: images per step.
        multiplier: synthetic images per photograph.
        steps: solver steps of stage 2.
        epochs: of each classifier; equal, so are its optimisation steps.
        eval_every: epochs between evaluations on validation.
        picture_rows: rows of the report's picture.
    """

    shots: int
    finetune_steps: int
    finetune_batch: int = 16
    multiplier: float
    steps: int = 25
    epochs: int
    eval_every: int
    picture_rows: int


@dataclass(frozen=True, kw_only=True)
class Task:
    """One data set, taken from photographs to a table of classifiers.

    Attributes:
        title: of the report.
        dataset: word for ``--dataset``.
        base: folder of the base model.
        folder: results, under ``outputs``.
        size: counts of the full run.
        setting: further flags of the data set for all three stages, without dashes.
        finetune: flags of stage 1.
        sample: flags of stage 2; the name of a method among them stands for the folder of its classifier, which is trained
            first.
        classifier: flags of every classifier.
        methods: further flags of each classifier, by its name in the table.
        targets: the two classes to which the picture translates a photograph, from its label and the number of classes.
        strengths: of the picture.
        note: sentence about the classifiers, below the table.
    """

    title: str
    dataset: str
    base: str
    folder: str
    size: Size
    setting: Mapping[str, int] = field(default_factory=dict)
    finetune: tuple[str, ...]
    sample: tuple[str, ...]
    classifier: tuple[str, ...]
    methods: Mapping[str, tuple[str, ...]]
    targets: Callable[[int, int], tuple[int, int]]
    strengths: tuple[float, ...] = (0.3, 0.5, 0.7, 0.9)
    note: str


SMOKE = Size(shots=2, finetune_steps=6, finetune_batch=4, multiplier=1, steps=4, epochs=2, eval_every=2, picture_rows=2)
"""Counts of every task under ``--smoke``."""

RATES = ("--learning_rate", "5e-4", "--ti_learning_rate", "5e-3", "--initializer", "super_class")
NETWORK = ("--model", "tf_efficientnet_lite0", "--batch_size", "16", "--seed", "2020")
SUBSET = "quickstart_diffmix"
"""Key of the synthetic images."""


def _other_cells(label: int, classes: int) -> tuple[int, int]:
    """The other cell type at the same level of defect, and the same type at the opposite level."""
    half = classes // 2
    return (label + half) % classes, label // half * half + (half - 1 - label % half)


def _other_digits(label: int, classes: int) -> tuple[int, int]:
    """A digit a few fingers away, and one further."""
    return (label + 3) % classes, (label + 5) % classes


ELPV = Task(
    title="ELPV",
    dataset="elpv",
    base="scripts/quickstart/base",
    folder="quickstart",
    size=Size(shots=10, finetune_steps=400, multiplier=5, epochs=40, eval_every=5, picture_rows=6),
    finetune=RATES,
    sample=("--sample_strategy", "diff-mix", "--aug_strength", "0.7"),
    classifier=(*NETWORK, "--res_mode", "128", "--gamma", "0.5", "--synthetic_prob", "0.3"),
    methods={"real only": (), "real + CutMix": ("--use_cutmix",), "real + Diff-Mix": ("--syndata_key", SUBSET)},
    targets=_other_cells,
    note="EfficientNet-Lite0 at 128 px",
)

SIGNS = Task(
    title="Sign Language Digits",
    dataset="signs",
    base="scripts/quickstart/base-signs",
    folder="quickstart_signs",
    size=Size(shots=5, finetune_steps=600, multiplier=10, epochs=120, eval_every=20, picture_rows=5),
    setting={"subset_seed": 2020},
    finetune=(
        *("--learning_rate", "4e-3", "--ti_learning_rate", "5e-3", "--initializer", "super_class", "--rank", "16"),
        *("--lora_targets", "to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "conv1", "conv2"),
    ),
    sample=(
        *("--sample_strategy", "diff-mix", "--aug_strength", "0.5"),
        *("--sources", "unlabelled", "--unlabelled", "dataset:signs", "--classifier", "real only"),
    ),
    classifier=(*NETWORK, "--res_mode", "96", "--gamma", "3", "--synthetic_prob", "0.7", "--select_by", "macro"),
    methods={"real only": (), "real + mixup": ("--use_mixup",), "real + Diff-Mix": ("--syndata_key", SUBSET)},
    targets=_other_digits,
    note="EfficientNet-Lite0 at 96 px; Diff-Mix translates the other training photographs, whose labels are not used",
)

TASKS = {"elpv": ELPV, "signs": SIGNS}
