"""Settings that ``compare`` and ``tune`` share: the data, the budget passed on to the three stages, and where to run."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from semantic_aug import cli, registry
from semantic_aug.datasets.catalog import find_spec
from semantic_aug.datasets.settings import DatasetName, Setting
from semantic_aug.devices import check_ids
from semantic_aug.diffusion.base import DEFAULT_MODEL
from semantic_aug.errors import UserError
from semantic_aug.evaluation.experiments.commands import SCRIPTS, Devices, Recipe, setting_name

_ALL_STAGES = (
    "dataset examples_per_class task imbalance_factor imbalance_profile val_fraction val_examples_per_class subset_seed seed "
    "config_dir register_key"
)
RESERVED = {
    1: f"{_ALL_STAGES} output_dir finetune_strategy pretrained_model_name_or_path".split(),
    2: f"{_ALL_STAGES} output_root sample_strategy finetune_model_key model_path aug_strength syn_dataset_multiplier".split(),
    3: f"{_ALL_STAGES} output_dir seeds syndata_key syndata_dir syndata_max gamma synthetic_prob use_cutmix use_mixup".split(),
}
"""Flags that ``--stageN_args`` may not hold: they are what runs differ in, or must agree in."""

_ARGS = re.compile(r"--stage[123]_args")


class Parser(cli.Parser):
    """A parser that makes each ``--stageN_args VALUE`` one word, since the value itself begins like a flag."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace=None):
        return super().parse_known_args(join_stage_args(sys.argv[1:] if args is None else args), namespace)


def join_stage_args(arguments: Sequence[str]) -> list[str]:
    """The arguments with ``--stageN_args=VALUE`` instead of ``--stageN_args VALUE``."""
    out: list[str] = []
    for word in arguments:
        if out and _ARGS.fullmatch(out[-1]):
            out[-1] = f"{out[-1]}={word}"
        else:
            out.append(word)
    return out


def _extra(stage: int) -> Any:
    text = f"extra arguments passed to {SCRIPTS[stage]}, quoted as one (default: none)"
    return cli.setting((), type=shlex.split, metavar="ARGUMENTS", help=text)


@dataclass(frozen=True, kw_only=True)
class ExtraArguments:
    """Extra arguments of the stages, the same for all runs of a setting."""

    TITLE = "extra arguments"
    stage1_args: tuple[str, ...] = _extra(1)
    stage2_args: tuple[str, ...] = _extra(2)
    stage3_args: tuple[str, ...] = _extra(3)

    def __post_init__(self):
        for stage, extra in self.by_stage().items():
            for word in extra:
                if word.startswith("--") and word[2:].split("=")[0] in RESERVED[stage]:
                    raise UserError(f"--stage{stage}_args: {word} is set for each run already; leave it out")

    def by_stage(self) -> dict[int, tuple[str, ...]]:
        """Stage -> its extra arguments."""
        return {1: self.stage1_args, 2: self.stage2_args, 3: self.stage3_args}


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where to run and to write."""

    TITLE = "where"
    gpu_ids: tuple[str, ...] | None = cli.setting(
        None,
        nargs="+",
        metavar="ID",
        help="stage 2 has one process per entry, stages 1 and 3 run on the first; GPU numbers or the word cpu "
        "(default: each stage's own choice)",
        result=False,
    )
    output_dir: Path | None = cli.setting(
        None,
        type=cli.path,
        metavar="DIR",
        help="folder of the results (default: outputs/COMMAND/{dataset})",
        result=False,
    )

    def __post_init__(self):
        check_ids(list(self.gpu_ids or ()))

    @property
    def devices(self) -> Devices:
        """Where the stages run."""
        return Devices(self.gpu_ids)

    def folder(self, command: str, args: argparse.Namespace) -> Path:
        """``--output_dir``, or ``outputs/{command}/{name of the data set}``."""
        default = Path("outputs") / command
        return registry.resolve_path(self.output_dir or default / find_spec(args.dataset, args.config_dir).name)


@dataclass(frozen=True, kw_only=True)
class Stage1:
    """Stand-in."""

    pretrained_model_name_or_path: str = cli.setting(
        DEFAULT_MODEL, type=cli.model, metavar="MODEL", help="base model, a hub id or a folder in diffusers layout"
    )
    max_train_steps: int = cli.setting(35000, type=cli.whole(1), metavar="N", help="optimiser steps")
    train_batch_size: int = cli.setting(2, type=cli.whole(1), metavar="N", help="images per step")
    learning_rate: float = cli.setting(1e-4, type=cli.number(0), metavar="LR", help="learning rate of the LoRA")
    ti_learning_rate: float = cli.setting(
        5e-4, type=cli.number(0), metavar="LR", help="learning rate of the class tokens"
    )
    initializer: str = cli.setting("class_name", metavar="TEXT", help="initial class tokens")


@dataclass(frozen=True, kw_only=True)
class Stage2:
    """Stand-in."""

    num_inference_steps: int = cli.setting(25, type=cli.whole(1), metavar="N", help="steps of the whole schedule")
    aug_strength: float = cli.setting(
        0.7, type=cli.number(0, 1, open_low=True), metavar="S", help="share of the noise schedule"
    )


@dataclass(frozen=True, kw_only=True)
class Stage3:
    """Stand-in."""

    model: str = cli.setting("resnet50", metavar="NAME", help="any timm model")
    res_mode: int = cli.setting(224, type=cli.whole(16), metavar="PIXELS", help="side of the images")
    nepoch: int = cli.setting(120, type=cli.whole(1), metavar="N", help="epochs over the real images")
    batch_size: int = cli.setting(32, type=cli.whole(1), metavar="N", help="images per step")
    eval_every: int = cli.setting(1, type=cli.whole(1), metavar="N", help="epochs between evaluations on validation")
    lr: float = cli.setting(None, type=cli.number(0, open_low=True), metavar="LR", help="peak learning rate")
    select_by: str = cli.setting("top1", choices=("top1", "macro", "worst_group"), help="validation score that chooses")
    gamma: float = cli.setting(0.5, type=cli.number(0, open_low=True), metavar="G", help="exponent of the soft labels")
    synthetic_prob: float = cli.setting(0.1, type=cli.number(0, 1), metavar="P", help="chance of a synthetic item")


IN_ALL_STAGES = ("imbalance_profile", "val_fraction", "val_examples_per_class")
"""Settings of the data that are passed on where they are given."""
BUDGET = (
    (1, Stage1, ("pretrained_model_name_or_path", "max_train_steps", "train_batch_size", "learning_rate")),
    (1, Stage1, ("ti_learning_rate", "initializer")),
    (2, Stage2, ("num_inference_steps",)),
    (3, Stage3, ("model", "res_mode", "nepoch", "batch_size", "eval_every", "lr", "select_by")),
)
"""Stage, dataclass that declares them, and names of the settings that are passed on to the stage."""
SYNTHETIC = ((2, Stage2, ("aug_strength",)), (3, Stage3, ("gamma", "synthetic_prob")))
"""Those that ``tune`` chooses."""
PER_SETTING = ("max_train_steps", "nepoch", "eval_every", "aug_strength", "gamma", "synthetic_prob")
"""Settings of which ``compare`` takes several values, one for each of ``--examples_per_class``."""
ALL_DATA_PROB, FEW_DATA_PROB = 0.1, 0.3
"""Chance of a synthetic item with all data, and for few shots and long tails."""


def add_shared(parser: cli.Parser, several: bool) -> None:
    """The flags of both commands.

    Args:
        parser: gets the flags.
        several: many few-shot settings at once, which the command itself declares, and each seed with a draw of its own.
    """
    cli.add_settings(parser, DatasetName)
    own = ("examples_per_class", "subset_seed") if several else ()
    cli.add_settings(parser, Setting, leave_out=(*own, "corrupt_prob", *IN_ALL_STAGES))
    texts = dict.fromkeys(IN_ALL_STAGES, "the stages'")
    texts["synthetic_prob"] = f"{ALL_DATA_PROB} with all data, {FEW_DATA_PROB} for few shots and long tails"
    data = next(group for group in parser._action_groups if group.title == Setting.TITLE)
    cli.add_passed_on(data, Setting, IN_ALL_STAGES, 1, **texts)
    groups = {stage: parser.add_argument_group(f"stage {stage}") for stage in SCRIPTS}
    for stage, cls, names in (*BUDGET, *(SYNTHETIC if several else ())):
        for name in names:
            cli.add_passed_on(groups[stage], cls, (name,), stage, several and name in PER_SETTING, **texts)
    for cls in (ExtraArguments, Placement):
        cli.add_settings(parser, cls)
    cli.add_settings(parser, cli.RunSettings, leave_out=("seed",))


def recipe_of(args: argparse.Namespace, index: int = 0) -> Recipe:
    """The budget of one setting; flags of stages that were not given are left to the stages.

    Args:
        args: of a parser with :func:`add_shared`.
        index: of the setting in ``--examples_per_class``.

    Raises:
        UserError: a flag with neither one value nor one for each setting.
    """
    several = isinstance(args.examples_per_class, (list, tuple))
    count = len(args.examples_per_class) if several else 1

    def value(name: str, default: Any = None) -> Any:
        values = getattr(args, name)
        if isinstance(values, (list, tuple)):
            if len(values) not in (1, count):
                raise UserError(
                    f"--{name} {' '.join(f'{v:g}' for v in values)}: expected one value, or one for each of the {count} of "
                    "--examples_per_class"
                )
            return values[index if len(values) > 1 else 0]
        return default if values is None else values

    def budget(stage: int) -> dict[str, Any]:
        return {name: value(name) for number, _, names in BUDGET if number == stage for name in names}

    finetune, sample, classify, synthetic = budget(1), budget(2), budget(3), {}
    base = finetune.pop("pretrained_model_name_or_path") or Stage1.pretrained_model_name_or_path
    classify |= {name: classify[name] or getattr(Stage3, name) for name in ("model", "res_mode")}
    shots, tail = value("examples_per_class"), args.task == "imbalanced"
    if several:
        strength, multiplier = value("aug_strength", Stage2.aug_strength), value("multiplier")
        sample |= {"aug_strength": strength, "syn_dataset_multiplier": multiplier}
        prob = FEW_DATA_PROB if shots > 0 or tail else ALL_DATA_PROB
        synthetic = {"gamma": value("gamma", Stage3.gamma), "synthetic_prob": value("synthetic_prob", prob)}
    shared = {
        "dataset": args.dataset,
        "examples_per_class": shots,
        "task": args.task,
        "imbalance_factor": args.imbalance_factor if tail else None,
        **{name: value(name) for name in IN_ALL_STAGES},
    }
    if not tail:
        shared["imbalance_profile"] = None
    name, extra = setting_name(shots, args.task, args.imbalance_factor), cli.read_settings(ExtraArguments, args)
    return Recipe(
        name=name, base=base, shared=shared, finetune=finetune, sample=sample, classify=classify, synthetic=synthetic,
        extra=extra.by_stage(),
    )  # fmt: skip
