"""Settings as fields of frozen dataclasses, the one place where a flag is declared; a parser made from them.

@dataclass(frozen=True, kw_only=True)
class Solver:
    TITLE = "solver"
    steps: int = cli.setting(25, type=cli.whole(1), metavar="N", help="steps of the whole schedule")

parser = cli.Parser(prog="sample.py")
cli.add_settings(parser, Solver)
solver = cli.read_settings(Solver, parser.parse_args(["--steps", "8"]))
"""

import argparse
import builtins
import math
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from semantic_aug import registry
from semantic_aug.errors import UserError, nearest_first, unknown
from semantic_aug.files import home_expanded
from semantic_aug.foreign_flags import instead_of

T = TypeVar("T")


class PlainParser(argparse.ArgumentParser):
    """An argument parser that raises :class:`UserError` instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help lists all flags")


class Parser(PlainParser):
    """A parser that knows the nearest flag, and the recipes.

    Args:
        recipes: section of the recipes that holds this command's rows, whose values come before the flags of the command
            line; the command has the flags of :class:`StageSettings`. None: it takes no recipes.
        spellings: flag -> the form in which its values are compared with the conditions of a row.
        options: of ``argparse.ArgumentParser``.
    """

    def __init__(
        self, recipes: str | None = None, spellings: Mapping[str, Callable[[str], str]] | None = None, **options
    ):
        super().__init__(allow_abbrev=False, formatter_class=_Formatter, **options)
        self.recipes, self.spellings = recipes, spellings or {}

    def parse_known_args(self, args: Sequence[str] | None = None, namespace=None):
        arguments = sys.argv[1:] if args is None else list(args)
        flags = [flag for action in self._actions for flag in action.option_strings]
        for word in arguments:  # before argparse complains of a required flag that was only misspelled
            if instead := instead_of(word, self.prog, flags):
                self.error(f"{word} is a flag of the Diff-Mix authors' code: here, {instead}")
            if word.startswith("--") and word.split("=")[0] not in flags:
                self.error(f"unknown argument {word}: did you mean {nearest_first(word, flags)[0]}?")
        parsed, rest = super().parse_known_args(arguments, namespace)
        return self._with_recipe(arguments, parsed) if self.recipes and not rest else (parsed, rest)

    def _with_recipe(self, arguments: Sequence[str], given: argparse.Namespace):
        """Parses once more with the recipe's values before the words of the command line, which therefore win."""
        where = f"recipe {given.recipe} of {registry.RECIPES}, {self.recipes}"
        rows = registry.recipe(given.recipe, self.recipes, given.config_dir)
        on_line = {argument.split("=")[0] for argument in arguments}
        values, looked_at = {}, dict.fromkeys(flag for row in rows for flag in row.when)
        try:
            for flag in dict.fromkeys((*looked_at, *(flag for row in rows for flag in row.set))):
                self._action(flag)
            for row in rows:  # later rows win
                if all(self._holds(given, flag, accepted) for flag, accepted in row.when.items()):
                    values |= row.set
            values = {flag: value for flag, value in values.items() if f"--{flag}" not in on_line}
            if missing := [flag for flag, value in values.items() if value is None]:
                setting = " ".join(f"--{flag} {getattr(given, flag)}" for flag in looked_at)
                raise UserError(
                    f"no {', '.join(missing)} for {setting}: give --{missing[0]} or another --recipe, or add a row"
                )
            before = [word for flag, value in values.items() for word in (f"--{flag}", *value)]
            parsed, rest = super().parse_known_args([*before, *arguments])
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        shown = ", ".join(f"{flag} {' '.join(value)}" for flag, value in values.items())
        parsed.recipe = f"{given.recipe}: {shown or 'sets nothing'}"
        return parsed, rest

    def _action(self, flag: str) -> argparse.Action:
        known = {action.dest: action for action in self._actions if action.nargs != 0}
        if flag not in known and any(action.dest == flag for action in self._actions):
            raise UserError(
                f"--{flag} is a switch, which a recipe neither sets nor asks for; correct {registry.RECIPES}"
            )
        if flag not in known:
            raise unknown("flag", flag, known, f"correct {registry.RECIPES}", limit=3)
        return known[flag]

    def _holds(self, given: argparse.Namespace, flag: str, accepted: Sequence[str]) -> bool:
        """Whether a flag has one of the accepted values; of several values it has to have no other."""
        action, spelling = self._action(flag), self.spellings.get(flag, lambda value: value)
        try:
            values = [spelling(self._get_value(action, text)) for text in accepted]
        except argparse.ArgumentError as error:
            self.error(str(error))
        value = getattr(given, flag)
        present = value if isinstance(value, (list, tuple)) else [value]
        return bool(present) and all(spelling(item) in values for item in present)


class _Formatter(argparse.HelpFormatter):
    """Adds the default to each help text that does not state one."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=120)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if "default" in text or action.default is argparse.SUPPRESS or not action.option_strings:
            return text
        if action.default in (None, ()) or isinstance(action, argparse._StoreTrueAction):
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

    parse.metavar = "N"
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


def schedule(low: float, high: float) -> Callable[[str], float | str]:
    """An argument type: a number in [low, high], or FIRST:LAST, two such numbers, as text."""
    end = number(low, high)

    def parse(text: str) -> float | str:
        ends = [end(part) for part in text.split(":")]
        if len(ends) > 2:
            raise argparse.ArgumentTypeError(f"'{text}': expected a number, or FIRST:LAST")
        return ends[0] if len(ends) == 1 else ":".join(f"{value:.12g}" for value in ends)

    return parse


def setting(
    default: Any = MISSING, *, help: str, type: Callable[[str], Any] | None = None, choices: Sequence[str] | None = None,
    metavar: str | None = None, nargs: str | None = None, result: bool = True, record: bool = True, absent: Any = MISSING,
    unused: Callable[[Any], bool] | None = None,
) -> Any:  # fmt: skip
    """A dataclass field that is a flag of the same name.

    Args:
        default: its value where the flag is not given; left out: the flag is required. False makes a switch.
        help: a whole phrase with the unit; the default is added to it unless it states one.
        type: turns a word into a value, as argparse's ``type``.
        choices: accepted values.
        metavar: stands for the value in the help; the type's where left out (``N`` of whole numbers, ``DIR`` of paths).
        nargs: ``+`` for several values, kept as a tuple.
        result: False for what changes no byte of the result (devices, where to write): no part of a run's identity.
        record: False for what a run's record leaves out: another entry stands for it, or it only names a place.
        absent: of a setting that earlier records lack, the value that they mean; records leave it out from then on.
        unused: whether, given the stage's whole request, the setting decides nothing; a resumed run may then change it.
    """
    metavar = metavar or getattr(type, "metavar", "N" if type is int else None)
    flag = {"type": type, "choices": choices, "metavar": metavar, "nargs": nargs}
    metadata = {"help": help, "flag": {k: v for k, v in flag.items() if v is not None}, "result": result}
    return field(default=default, metadata={**metadata, "record": record, "absent": absent, "unused": unused})


def setting_of(cls: builtins.type, name: str, default: Any = MISSING) -> Any:
    """A field that is declared as another dataclass's setting is, but recorded; ``default``: where it differs."""
    declared = settings_of(cls)[name]
    metadata = {**declared.metadata, "record": True, "unused": None}
    return field(default=declared.default if default is MISSING else default, metadata=metadata)


def settings_of(cls: builtins.type) -> dict[str, Field]:
    """The fields of a dataclass that are flags, by name."""
    return {f.name: f for f in fields(cls) if "flag" in f.metadata}


def result_settings(cls: builtins.type) -> tuple[str, ...]:
    """Names of the settings that change a byte of the result."""
    return tuple(name for name, f in settings_of(cls).items() if f.metadata["result"])


def absent_values(*classes: builtins.type) -> dict[str, Any]:
    """The values that records without these settings stand for, by name: ``absent`` of the settings that declare it."""
    declared = {name: f.metadata["absent"] for cls in classes for name, f in settings_of(cls).items()}
    return {name: value for name, value in declared.items() if value is not MISSING}


def recorded(values: Mapping[str, Any], *classes: builtins.type) -> dict[str, Any]:
    """Settings of these dataclasses as records keep them: all but those declared as no part of one and those whose absence
    means the very value."""
    absent = absent_values(*classes)
    left_out = {name for cls in classes for name, f in settings_of(cls).items() if not f.metadata["record"]}
    return {n: value for n, value in values.items() if n not in left_out and (n not in absent or value != absent[n])}


def add_settings(
    parser: argparse.ArgumentParser, cls: builtins.type, *, leave_out: Collection[str] = (), **defaults: Any
) -> None:
    """Adds the flags of a dataclass as a group titled by its ``TITLE``, but those that are no flags of this command
    (``leave_out``, whose defaults hold); ``defaults``: those of this command that differ from the dataclass's."""
    groups = {group.title: group for group in parser._action_groups}
    group = groups.get(cls.TITLE) or parser.add_argument_group(cls.TITLE)
    for name, f in settings_of(cls).items():
        if name not in leave_out:
            _add_flag(group, f, defaults.get(name, f.default))


def add_passed_on(
    group, cls: builtins.type, names: Iterable[str], stage: int, several: bool = False, **defaults: str
) -> None:
    """Adds flags that a command passes on to a stage: None where they are not given, so that the stage's default holds.

    Args:
        cls: the stage's dataclass, which declares them.
        stage: number of the stage, for the help.
        several: accept several values, one for each of ``--examples_per_class``.
        defaults: what the help says of the default where it is not the stage's.
    """
    tail = "; one value, or one for each of --examples_per_class" if several else ""
    for name in names:
        f = settings_of(cls)[name]
        text = re.sub(r"\s*\(default: .*\)$", "", f.metadata["help"])
        default = defaults.get(name, f"stage {stage}'s")
        flag = {**f.metadata["flag"], **({"nargs": "+"} if several else {})}
        group.add_argument(f"--{name}", default=None, help=f"{text}{tail} (default: {default})", **flag)


def _add_flag(group, f: Field, default: Any) -> None:
    if default is False:
        group.add_argument(f"--{f.name}", action="store_true", help=f.metadata["help"])
        return
    default = str(default) if isinstance(default, Path) else default  # argparse gives the types of flags texts alone
    kept = {"required": True} if default is MISSING else {"default": default}
    group.add_argument(f"--{f.name}", help=f.metadata["help"], **kept, **f.metadata["flag"])


def read_settings(cls: builtins.type[T], args: argparse.Namespace, **values: Any) -> T:
    """The dataclass of parsed arguments; ``values`` win, and flags left out of the parser have the dataclass's defaults."""
    given = {name: getattr(args, name) for name in settings_of(cls) if hasattr(args, name)}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return cls(**{**given, **values})


def optional_word(text: str) -> str | None:
    """An argument type: a word, or ``None`` spelled out."""
    return None if text.lower() in ("none", "null", "") else text


def path(text: str) -> Path:
    """An argument type: a path, relative to the folder in which the command was typed."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path")
    return registry.typed_path(text)


path.metavar = "DIR"


def path_or(*choices: str) -> Callable[[str], str]:
    """An argument type: one of ``choices``, or a path as records spell it (relative to the repository root where below it)."""

    def parse(text: str) -> str:
        return text if text in choices else registry.shown_path(path(text))

    return parse


def model(text: str) -> str:
    """An argument type: a model's folder, where there is one in the folder in which the command was typed; else the text
    itself, which is a hub id or a folder of the repository."""
    relative = home_expanded(text)
    return registry.shown_path(relative) if not relative.is_absolute() and text and relative.is_dir() else text


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Settings of every stage besides its data: seed, registry folder, dry run."""

    TITLE = "run"
    seed: int = setting(0, type=int, metavar="N", help="seed of everything else that is drawn")
    config_dir: Path = setting(
        registry.CONFIG_DIR,
        type=registry.config_folder,
        metavar="DIR",
        help="folder of the registry files (default: config)",
        result=False,
    )
    dry_run: bool = setting(False, help="check everything, print what would be done, and stop", result=False)


@dataclass(frozen=True, kw_only=True)
class StageSettings(RunSettings):
    """Settings of the three stages alone: where the defaults of their flags come from.

    Parsed, ``recipe`` is the name and the values that it set, as the record keeps it.
    """

    recipe: str = setting(
        registry.DEFAULT_RECIPE,
        metavar="NAME",
        help="defaults of this command's flags by data set, model, resolution and setting, from recipes.yaml: default, or "
        "paper for the Diff-Mix authors' settings; flags given here win",
        result=False,
    )
