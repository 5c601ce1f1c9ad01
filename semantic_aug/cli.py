"""What the entry scripts and the evaluation's commands share: a parser with one-line errors, shared flags, value checks."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from semantic_aug import registry
from semantic_aug.datasets.readers.hub import parse_id
from semantic_aug.datasets.subsets import PROFILES, TASKS, Setting
from semantic_aug.errors import UserError, nearest_first


class Parser(argparse.ArgumentParser):
    """An argument parser that raises :class:`UserError` instead of printing its usage, and knows the nearest flag."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=_Formatter, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help lists all flags")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace=None):
        words = sys.argv[1:] if args is None else list(args)
        flags = [flag for action in self._actions for flag in action.option_strings]
        for word in words:  # before argparse complains of a required flag that was only misspelled
            if word.startswith("--") and word.split("=")[0] not in flags:
                self.error(f"unknown argument {word}: did you mean {nearest_first(word, flags)[0]}?")
        return super().parse_known_args(words, namespace)


class _Formatter(argparse.HelpFormatter):
    """Adds the default to each help text that does not state one."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=120)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if "default" in text or action.default is argparse.SUPPRESS or not action.option_strings:
            return text
        if action.default is None or isinstance(action, argparse._StoreTrueAction):
            return text
        return text + " (default: %(default)s)"


def whole(minimum: int) -> Callable[[str], int]:
    """An argument type: a whole number of at least ``minimum``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number") from None
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value}: expected at least {minimum}")
        return value

    return parse


def number(low: float, high: float = float("inf"), open_low: bool = False) -> Callable[[str], float]:
    """An argument type: a finite number in [low, high], or in (low, high] with ``open_low``."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not a number") from None
        if not (low < value if open_low else low <= value) or value > high or not math.isfinite(value):
            bracket, end = "(" if open_low else "[", ")" if math.isinf(high) else "]"
            raise argparse.ArgumentTypeError(f"{text}: expected a number in {bracket}{low:g}, {high:g}{end}")
        return value

    return parse


def optional_word(text: str) -> str | None:
    """An argument type: a word, or ``None`` spelled out."""
    return None if text.lower() in ("none", "null", "") else text


def path(text: str) -> Path:
    """An argument type: a path, relative to the folder in which the command was typed."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path")
    return registry.typed_path(text)


def path_or(*words: str) -> Callable[[str], str]:
    """An argument type: one of ``words``, or a path as records spell it (relative to the repository root where below it)."""

    def parse(text: str) -> str:
        return text if text in words else registry.shown_path(path(text))

    return parse


def model(text: str) -> str:
    """An argument type: a model's folder, where there is one in the folder in which the command was typed; else the text
    itself, which is a hub id or a folder of the repository."""
    relative = Path(text).expanduser()
    return registry.shown_path(relative) if not relative.is_absolute() and text and relative.is_dir() else text


def dataset(text: str) -> str:
    """An argument type: the name of a data set, or ``scheme:PATH`` with the path made absolute."""
    scheme, colon, rest = text.partition(":")
    rest, config = parse_id(rest) if scheme == "hf" else (rest, None)
    local = scheme in ("folder", "csv") or (scheme == "hf" and Path(rest).expanduser().exists())
    end = f":{config}" if config else ""
    return f"{scheme}:{path(rest)}{end}" if colon and rest and local else text


def add_shared(parser: argparse.ArgumentParser, seed: int = 0) -> None:
    """The flags every stage has."""
    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset",
        type=dataset,
        required=True,
        metavar="NAME",
        help="a registered name, a name of datasets.yaml, or folder:PATH, csv:PATH, hf:ID, hf:ID:CONFIGURATION",
    )
    data.add_argument(
        "--examples_per_class",
        type=int,
        default=-1,
        metavar="N",
        help="few-shot setting: training images per class, -1 for all (default: -1)",
    )
    data.add_argument(
        "--task", choices=TASKS, default="vanilla", help="vanilla, or imbalanced for the long-tail setting"
    )
    data.add_argument(
        "--imbalance_factor",
        type=number(0, 1, open_low=True),
        default=0.01,
        metavar="F",
        help="long-tail setting: smallest over largest class, in (0, 1]",
    )
    data.add_argument(
        "--imbalance_profile",
        choices=PROFILES,
        default="exponential",
        help="long-tail setting: exponential keeps the largest class whole, original counts as the authors' code does",
    )
    data.add_argument(
        "--subset_seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of the few-shot or long-tail draw and of the held-out validation split; keep it the same in "
        "all three stages",
    )
    data.add_argument(
        "--val_fraction",
        type=number(0, 0.9),
        default=0.1,
        metavar="F",
        help="share of each class held out of train for validation where the data set has no validation split",
    )
    data.add_argument(
        "--val_examples_per_class",
        type=int,
        default=-1,
        metavar="N",
        help="validation images per class at most, drawn with --subset_seed; -1 for all (default: -1)",
    )
    run = parser.add_argument_group("run")
    run.add_argument("--seed", type=int, default=seed, metavar="N", help="seed of everything else that is drawn")
    run.add_argument(
        "--config_dir",
        type=registry.config_folder,
        default=str(registry.CONFIG_DIR),
        metavar="DIR",
        help="folder of the registry files (default: config)",
    )
    run.add_argument("--dry_run", action="store_true", help="check everything, print what would be done, and stop")


def setting_of(args: argparse.Namespace) -> Setting:
    """The data setting of parsed arguments."""
    return Setting(
        examples_per_class=args.examples_per_class,
        task=args.task,
        imbalance_factor=args.imbalance_factor,
        subset_seed=args.subset_seed,
        val_fraction=args.val_fraction,
        imbalance_profile=args.imbalance_profile,
        val_examples_per_class=args.val_examples_per_class,
        corrupt_prob=getattr(args, "corrupt_prob", 0.0),  # a flag of stage 3 only
    )
