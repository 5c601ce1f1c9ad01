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
from semantic_aug.classify import config as classify
from semantic_aug.datasets.catalog import find_spec
from semantic_aug.datasets.settings import DatasetName, Setting
from semantic_aug.devices import check_ids
from semantic_aug.diffusion.schedulers import SolverSettings
from semantic_aug.errors import UserError
from semantic_aug.evaluation.experiments.commands import SCRIPTS, Recipe, setting_name
from semantic_aug.finetune import config as finetune
from semantic_aug.sampling import settings as sampling

_ALL_STAGES = {*cli.settings_of(DatasetName), *cli.settings_of(Setting), "seed", "config_dir", "register_key"}
RESERVED = {
    1: {*_ALL_STAGES, "output_dir", "finetune_strategy", "pretrained_model_name_or_path"},
    2: _ALL_STAGES.union(
        "output_root sample_strategy finetune_model_key model_path aug_strength syn_dataset_multiplier".split()
    ),
    3: _ALL_STAGES.union(
        "output_dir seeds syndata_key syndata_dir syndata_max gamma synthetic_prob use_cutmix use_mixup soft_labels "
        "curriculum".split()
    ),
}
"""Flags that ``--stageN_args`` may not hold: the experiment sets them for each run. ``compare`` also refuses those that its
methods set."""


class Parser(cli.Parser):
    """A parser for ``--stageN_args VALUE``, whose value itself begins like a flag."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace=None):
        return super().parse_known_args(join_stage_args(sys.argv[1:] if args is None else args), namespace)


def join_stage_args(arguments: Sequence[str]) -> list[str]:
    """The arguments with ``--stageN_args=VALUE`` instead of ``--stageN_args VALUE``."""
    joined: list[str] = []
    for word in arguments:
        if joined and re.fullmatch("--stage[123]_args", joined[-1]):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


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
        for stage, reserved in RESERVED.items():
            if flags := self.flags(stage) & reserved:
                raise UserError(f"--stage{stage}_args: --{min(flags)} is set for each run already; leave it out")

    def flags(self, stage: int) -> set[str]:
        """Names of the flags among a stage's extra arguments."""
        return {word[2:].partition("=")[0] for word in self.by_stage()[stage] if word.startswith("--")}

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
        None, type=cli.path, help="folder of the results (default: outputs/COMMAND/{dataset})", result=False
    )

    def __post_init__(self):
        check_ids(list(self.gpu_ids or ()))

    def folder(self, command: str, args: argparse.Namespace) -> Path:
        """``--output_dir``, or ``outputs/{command}/{name of the data set}``."""
        default = Path("outputs") / command
        return registry.resolve_path(self.output_dir or default / find_spec(args.dataset, args.config_dir).name)


STAGE_SETTINGS = {
    1: (finetune.ModelSettings, finetune.TrainSettings),
    2: (SolverSettings, sampling.ImageSettings),
    3: (classify.SyntheticSettings, classify.ModelSettings, classify.TrainSettings),
}
"""Stage -> the dataclasses that declare its flags."""
IN_ALL_STAGES = "split imbalance_profile val_fraction val_examples_per_class corrupt_prob corrupt_classes".split()
"""Settings of the data that are passed on where they are given."""
BUDGET = {
    1: "pretrained_model_name_or_path max_train_steps train_batch_size learning_rate ti_learning_rate initializer".split(),
    2: ["num_inference_steps"],
    3: "model res_mode nepoch batch_size eval_every lr select_by".split(),
}
"""Stage -> its settings that are passed on where they are given."""
SYNTHETIC = {1: [], 2: ["aug_strength"], 3: ["gamma", "synthetic_prob"]}
"""Stage -> its settings that ``compare`` passes on and ``tune`` chooses."""
PER_SETTING = ("max_train_steps", "nepoch", "eval_every", "aug_strength", "gamma", "synthetic_prob")
"""Settings of which ``compare`` takes several values, one for each of ``--examples_per_class``."""
ALL_DATA_PROB, FEW_DATA_PROB = 0.1, 0.3
"""Chance of a synthetic item with all data, and for few shots and long tails."""


def declaring(stage: int, name: str) -> type:
    """The dataclass of a stage that declares a flag; its attribute of this name is the default."""
    return next(cls for cls in STAGE_SETTINGS[stage] if name in cli.settings_of(cls))


def budget_defaults() -> dict[str, str]:
    """What messages show of the flags that a budget leaves to the stages, by their names in its record."""
    values = {f"shared.{name}": getattr(Setting, name) for name in IN_ALL_STAGES}
    for stage, part in enumerate(("finetune", "sample", "classify"), 1):
        values |= {f"{part}.{name}": getattr(declaring(stage, name), name) for name in BUDGET[stage]}
    return {name: "by default" if value is None else f"{value} by default" for name, value in values.items()}


def add_shared(parser: cli.Parser, several: bool) -> None:
    """The flags of both commands.

    Args:
        several: the command itself declares several few-shot settings, and each of its seeds has a draw of its own.
    """
    cli.add_settings(parser, DatasetName)
    left_out = ("examples_per_class", "subset_seed") if several else ()
    cli.add_settings(parser, Setting, leave_out=(*left_out, *IN_ALL_STAGES))
    texts = dict.fromkeys(IN_ALL_STAGES, "the stages'")
    texts["synthetic_prob"] = f"{ALL_DATA_PROB} with all data, {FEW_DATA_PROB} for few shots and long tails"
    data = next(group for group in parser._action_groups if group.title == Setting.TITLE)
    cli.add_passed_on(data, Setting, IN_ALL_STAGES, 1, **texts)
    groups = {stage: parser.add_argument_group(f"stage {stage}") for stage in SCRIPTS}
    for stage, group in groups.items():
        for name in (*BUDGET[stage], *(SYNTHETIC[stage] if several else ())):
            cli.add_passed_on(group, declaring(stage, name), (name,), stage, several and name in PER_SETTING, **texts)
    for cls in (ExtraArguments, Placement):
        cli.add_settings(parser, cls)
    cli.add_settings(parser, cli.RunSettings, leave_out=("seed",))


def recipe_of(args: argparse.Namespace, index: int = 0) -> Recipe:
    """The budget of one setting; flags of stages that were not given are left to the stages.

    Args:
        index: of the setting in ``--examples_per_class``.

    Raises:
        UserError: a flag with neither one value nor one for each setting.
    """
    several = isinstance(args.examples_per_class, (list, tuple))
    count = len(args.examples_per_class) if several else 1

    def value(name: str, stage: int | None = None) -> Any:
        """The setting's value of a flag; where it is not given, None or the default of a stage."""
        values = getattr(args, name)
        if isinstance(values, (list, tuple)):
            if len(values) not in (1, count):
                raise UserError(
                    f"--{name} {' '.join(map(str, values))}: expected one value, or one for each of the {count} of "
                    "--examples_per_class"
                )
            return values[index if len(values) > 1 else 0]
        return getattr(declaring(stage, name), name) if values is None and stage else values

    tune, sample, train = ({name: value(name) for name in BUDGET[stage]} for stage in SCRIPTS)
    del tune["pretrained_model_name_or_path"]
    train |= {name: value(name, 3) for name in ("model", "res_mode")}
    shots, tail, synthetic = value("examples_per_class"), args.task == "imbalanced", {}
    if several:
        sample |= {"aug_strength": value("aug_strength", 2), "syn_dataset_multiplier": value("multiplier")}
        prob, usual = value("synthetic_prob"), FEW_DATA_PROB if shots > 0 or tail else ALL_DATA_PROB
        synthetic = {"gamma": value("gamma", 3), "synthetic_prob": usual if prob is None else prob}
    shared = {
        "dataset": args.dataset,
        "examples_per_class": shots,
        "task": args.task,
        "imbalance_factor": args.imbalance_factor if tail else None,
        **{name: value(name) for name in IN_ALL_STAGES},
    }
    if not tail:
        shared["imbalance_profile"] = None
    return Recipe(
        name=setting_name(shots, args.task, args.imbalance_factor),
        base=value("pretrained_model_name_or_path", 1),
        shared=shared,
        finetune=tune,
        sample=sample,
        classify=train,
        synthetic=synthetic,
        extra=cli.read_settings(ExtraArguments, args).by_stage(),
        pseudo={name: getattr(args, name, None) for name in ("unlabelled", "pseudo_threshold")},
    )
