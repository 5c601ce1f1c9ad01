"""Flags that ``compare`` and ``tune`` share: the data, the budget passed on to the three stages, and where to run."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from semantic_aug import cli, registry
from semantic_aug.datasets.catalog import find_spec
from semantic_aug.datasets.settings import PROFILES, dataset_name
from semantic_aug.devices import check_ids
from semantic_aug.diffusion.base import DEFAULT_MODEL
from semantic_aug.errors import UserError
from semantic_aug.evaluation.experiments import commands as recipes
from semantic_aug.evaluation.experiments.commands import Devices, Recipe

_ALL_STAGES = (
    "dataset examples_per_class task imbalance_factor imbalance_profile val_fraction val_examples_per_class subset_seed seed "
    "config_dir register_key"
)
OWN_FLAGS = {
    1: f"{_ALL_STAGES} output_dir finetune_strategy pretrained_model_name_or_path".split(),
    2: f"{_ALL_STAGES} output_root sample_strategy finetune_model_key model_path aug_strength syn_dataset_multiplier".split(),
    3: f"{_ALL_STAGES} output_dir seeds syndata_key syndata_dir syndata_max gamma synthetic_prob use_cutmix use_mixup".split(),
}
"""Flags that ``--stageN_args`` may not hold: they are what runs differ in, or must agree in."""

_ARGS = re.compile(r"--stage[123]_args")


def add_settings(parser: argparse.ArgumentParser, several: bool) -> None:
    """The flags that say which data; ``several``: many few-shot settings at once."""
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", type=dataset_name, required=True, metavar="NAME", help="as in the three stages")
    data.add_argument(
        "--examples_per_class",
        type=int,
        nargs="+" if several else None,
        default=[-1] if several else -1,
        metavar="N",
        help=("few-shot settings, several at once" if several else "few-shot setting")
        + "; -1: all images (default: -1)",
    )
    data.add_argument("--task", choices=("vanilla", "imbalanced"), default="vanilla", help="imbalanced: the long tail")
    data.add_argument(
        "--imbalance_factor",
        type=cli.number(0, 1, open_low=True),
        default=0.01,
        metavar="F",
        help="long tail: smallest over largest class, in (0, 1]",
    )
    data.add_argument("--imbalance_profile", choices=PROFILES, default=None, help="long tail: see the stages' --help")
    data.add_argument(
        "--val_fraction",
        type=cli.number(0, 0.9),
        default=None,
        metavar="F",
        help="share held out for validation where the data set has no such split (default: the stages' 0.1)",
    )
    data.add_argument(
        "--val_examples_per_class",
        type=cli.whole(1),
        default=None,
        metavar="N",
        help="validation images per class at most (default: all)",
    )


def add_budget(parser: argparse.ArgumentParser, several: bool) -> None:
    """The flags that are passed on to the stages; what is not given is the stage's own default."""

    def per_setting(group, name: str, kind: Callable, metavar: str, text: str) -> None:
        number = {"nargs": "+"} if several else {}
        tail = "; one value, or one for each of --examples_per_class" if several else ""
        group.add_argument(f"--{name}", type=kind, default=None, metavar=metavar, help=text + tail, **number)

    one = parser.add_argument_group("stage 1")
    one.add_argument(
        "--pretrained_model_name_or_path",
        type=cli.model,
        default=DEFAULT_MODEL,
        metavar="MODEL",
        help="base model of stages 1 and 2",
    )
    per_setting(one, "max_train_steps", cli.whole(1), "N", "optimiser steps (default: stage 1's)")
    one.add_argument(
        "--train_batch_size", type=cli.whole(1), default=None, metavar="N", help="images per step (default: stage 1's)"
    )
    one.add_argument(
        "--learning_rate", type=cli.number(0), default=None, metavar="LR", help="of the LoRA (default: stage 1's)"
    )
    one.add_argument(
        "--ti_learning_rate",
        type=cli.number(0),
        default=None,
        metavar="LR",
        help="of the class tokens (default: stage 1's)",
    )
    one.add_argument(
        "--initializer", default=None, metavar="WORDS", help="what class tokens start from (default: stage 1's)"
    )
    two = parser.add_argument_group("stage 2")
    two.add_argument(
        "--num_inference_steps", type=cli.whole(1), default=None, metavar="N", help="of the solver (default: stage 2's)"
    )
    three = parser.add_argument_group("stage 3")
    if several:
        per_setting(
            two, "aug_strength", cli.number(0, 1, open_low=True), "S", "how far images are noised (default: 0.7)"
        )
        per_setting(
            two, "multiplier", cli.number(0, 1e6, open_low=True), "M", "synthetic images per image (default: 5)"
        )
        per_setting(three, "gamma", cli.number(0, open_low=True), "G", "of the soft labels (default: 0.5)")
        per_setting(
            three,
            "synthetic_prob",
            cli.number(0, 1),
            "P",
            "chance that an item is synthetic (default: 0.1 with all data, 0.3 for few shots and long tails)",
        )
    three.add_argument("--model", default="resnet50", metavar="NAME", help="any timm model")
    three.add_argument("--res_mode", type=cli.whole(16), default=224, metavar="PIXELS", help="side of the images")
    per_setting(three, "nepoch", cli.whole(1), "N", "epochs over the real images (default: stage 3's)")
    three.add_argument(
        "--batch_size", type=cli.whole(1), default=None, metavar="N", help="images per step (default: stage 3's)"
    )
    per_setting(three, "eval_every", cli.whole(1), "N", "epochs between evaluations on validation (default: stage 3's)")
    three.add_argument(
        "--lr", type=cli.number(0, open_low=True), default=None, metavar="LR", help="(default: stage 3's)"
    )
    three.add_argument(
        "--select_by",
        choices=("top1", "macro", "worst_group"),
        default=None,
        help="validation score that chooses (default: stage 3's)",
    )
    for stage in (1, 2, 3):
        parser.add_argument(
            f"--stage{stage}_args",
            type=shlex.split,
            default=[],
            metavar="WORDS",
            help=f"further words for {recipes.SCRIPTS[stage]}, quoted as one",
        )


def add_where(parser: argparse.ArgumentParser, folder: str) -> None:
    """The flags that say where to run and to write."""
    where = parser.add_argument_group("where")
    where.add_argument(
        "--gpu_ids",
        nargs="+",
        default=None,
        metavar="ID",
        help="stage 2 has one process per entry, stages 1 and 3 run on the first; GPU numbers or the word cpu "
        "(default: each stage's own choice)",
    )
    where.add_argument("--output_dir", type=cli.path, default=None, metavar="DIR", help=f"(default: {folder})")
    where.add_argument(
        "--config_dir",
        type=registry.config_folder,
        default=str(registry.CONFIG_DIR),
        metavar="DIR",
        help="folder of the registry files (default: config)",
    )


def joined_words(words: Sequence[str]) -> list[str]:
    """The words with each ``--stageN_args VALUE`` made one word, since the value itself begins like a flag."""
    out: list[str] = []
    for word in words:
        if out and _ARGS.fullmatch(out[-1]):
            out[-1] = f"{out[-1]}={word}"
        else:
            out.append(word)
    return out


def check_passed_on(args: argparse.Namespace) -> None:
    """Refuses devices that are none, and words for the stages that would undo the equal budgets.

    Raises:
        UserError: one line.
    """
    check_ids(args.gpu_ids or [])
    for stage, owned in OWN_FLAGS.items():
        for word in getattr(args, f"stage{stage}_args"):
            if word.startswith("--") and word[2:].split("=")[0] in owned:
                raise UserError(f"--stage{stage}_args: {word} is set for each run already; leave it out")


def make_recipe(
    args: argparse.Namespace, shots: int, max_train_steps: int | None, sample: dict, classify: dict, synthetic: dict
) -> Recipe:
    """A recipe from the flags that are the same for all settings, and what is the setting's own."""
    tail = args.task == "imbalanced"
    return Recipe(
        name=recipes.setting_name(shots, args.task, args.imbalance_factor),
        base=args.pretrained_model_name_or_path,
        shared={
            "dataset": args.dataset,
            "examples_per_class": shots,
            "task": args.task,
            "imbalance_factor": args.imbalance_factor if tail else None,
            "imbalance_profile": args.imbalance_profile if tail else None,
            "val_fraction": args.val_fraction,
            "val_examples_per_class": args.val_examples_per_class,
        },
        finetune={
            "max_train_steps": max_train_steps,
            "train_batch_size": args.train_batch_size,
            "learning_rate": args.learning_rate,
            "ti_learning_rate": args.ti_learning_rate,
            "initializer": args.initializer,
        },
        sample={**sample, "num_inference_steps": args.num_inference_steps},
        classify={
            "model": args.model,
            "res_mode": args.res_mode,
            "batch_size": args.batch_size,
            "lr": args.lr,
            "select_by": args.select_by,
            **classify,
        },
        synthetic=synthetic,
        extra={stage: tuple(getattr(args, f"stage{stage}_args")) for stage in (1, 2, 3)},
    )


def default_folder(args: argparse.Namespace, parent: str) -> Path:
    """``outputs/{parent}/{name of the data set}``."""
    return Path("outputs") / parent / find_spec(args.dataset, args.config_dir).name


def devices_of(args: argparse.Namespace) -> Devices:
    """Where the stages run."""
    return Devices(tuple(args.gpu_ids) if args.gpu_ids else None)
