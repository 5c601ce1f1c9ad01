"""Output folders: names, the arguments and the origin kept beside the results, and metrics row by row."""

import csv
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import yaml

from semantic_aug.errors import UserError
from semantic_aug.files import csv_writer, write_text

ARGS_FILE = "args.yaml"
MADE_FROM, SPOILED = "made_from", "spoiled"
"""Entries of a record beside the arguments: the run's origin, and why it must not be resumed."""
SPLIT_TITLES = {"test": "test", "val": "validation"}
"""Splits that a classifier may be judged on, by their order of preference -> what tables call them."""
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "timm", "datasets", "numpy", "pillow")


def setting_suffix(examples_per_class: int = -1, task: str = "vanilla", imbalance_factor: float = 1.0) -> str:
    """The suffix of a setting's output folders: ``_5shot``, ``_imb0.01``, both, or nothing for all data."""
    shots = f"_{examples_per_class}shot" if examples_per_class > 0 else ""
    return shots + (f"_imb{imbalance_factor:g}" if task == "imbalanced" else "")


def finetune_dir(strategy: str, dataset: str, suffix: str) -> str:
    """``outputs/finetune_model/finetune_{strategy}{suffix}/{dataset}``."""
    return f"outputs/finetune_model/finetune_{strategy}{suffix}/{dataset}"


def subset_name(strategy: str, multiplier: float, key: str | None, strength: str) -> str:
    """``{strategy}-Multi{m}-{checkpoint key, or 'base'}-Strength{s | Uniform}``."""
    return f"{strategy}-Multi{multiplier:g}-{key or 'base'}-Strength{strength}"


def aug_samples_dir(suffix: str) -> str:
    """``outputs/aug_samples{suffix}``, the root under which subsets of a setting lie."""
    return f"outputs/aug_samples{suffix}"


def plain(value: Any) -> Any:
    """Arguments as YAML can hold them: paths as strings, tuples as lists."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, os.PathLike) else value


def arguments_text(arguments: Mapping[str, Any]) -> str:
    """Arguments as YAML, a line each in the order given."""
    options = {"sort_keys": False, "allow_unicode": True, "width": float("inf")}
    return "".join(
        yaml.safe_dump({name: value}, default_flow_style=None if isinstance(value, (dict, list)) else False, **options)
        for name, value in plain(arguments).items()
    )


def load_arguments(folder: Path, file: str = ARGS_FILE) -> dict[str, Any] | None:
    """The arguments a run folder was made with, or None where it holds none. Raises UserError: the file is damaged."""
    path = folder / file
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no text, or no date as in 2024-13-45
        raise UserError(f"{path} is damaged ({error}): remove the folder or choose another") from None
    return content if isinstance(content, dict) else {}


def differences(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    ignored: Sequence[str] = (),
    absent: Mapping[str, Any] = MappingProxyType({}),
) -> list[str]:
    """The differences between two sets of arguments, each as ``name: old -> new``; groups of arguments are compared one by one.

    Args:
        ignored: names that may differ.
        absent: values of arguments that a set lacks, or has as None.
    """
    old, new, lines = plain(old), plain(new), []
    for name in [name for name in {**old, **new} if name not in ignored]:
        then, now = (plain(absent.get(name)) if s.get(name) is None else s[name] for s in (old, new))
        if isinstance(then, Mapping) and isinstance(now, Mapping):
            lines += [f"{name}.{line}" for line in differences(then, now, absent=absent)]
        elif then != now:
            lines.append(difference(name, then, now))
    return lines


def difference(name: str, then: Any, now: Any) -> str:
    """One value's difference, ``name: then -> now``."""
    return f"{name}: {value_text(then)} -> {value_text(now)}"


def value_text(value: Any) -> str:
    """A value as messages show it: ``none`` stands for None."""
    return "none" if value is None else repr(value)


def judged_split(results: Mapping[str, Any]) -> str | None:
    """The split that the results of a classifier are judged on: ``test``, or ``val`` where there is no test split; None without
    either."""
    return next((split for split in SPLIT_TITLES if results[split]), None)


class Origin(Protocol):
    """The origin of a run, apart from its arguments: data and weights by content."""

    def describe(self) -> Mapping[str, Any]:
        """The record, plain values; asked for when the arguments agree, since it may take reading many images."""

    def compare(self, kept: Mapping[str, Any], present: Mapping[str, Any]) -> str:
        """The differences between a kept record and the present one, in words; empty where there are none."""


def claim(
    folder: Path,
    arguments: Mapping[str, Any],
    flag: str,
    ignored: Sequence[str] = (),
    *,
    file: str = ARGS_FILE,
    origin: Origin | None = None,
    absent: Mapping[str, Any] = MappingProxyType({}),
    dry_run: bool = False,
) -> bool:
    """Takes a folder for a run with these arguments; returns whether it already holds one of the same arguments and origin.

    A folder whose record does not say what it was made from (earlier versions wrote none) is never resumed: nothing
    can show that its images are the present ones.

    Args:
        ignored: arguments that may differ between the first start and a restart.
        file: where in the folder the arguments are kept.
        origin: data and weights, kept as ``made_from`` beside the arguments.
        absent: see :func:`differences`.
        dry_run: write nothing.

    Raises:
        UserError: the folder holds a run with other arguments or of another origin (says what differs), one that cannot be
            resumed, or other files.
    """
    # looked at first: another process that begins the same run may write its record meanwhile
    occupied = folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir())
    if load_arguments(folder, file) is not None:
        refuse_other_run(folder, arguments, flag, ignored, file=file, origin=origin, absent=absent)
        return True
    if occupied:
        raise UserError(f"{folder} is not empty and holds no {file}: nothing was touched; choose another {flag}")
    if not dry_run:
        made_from = {MADE_FROM: origin.describe()} if origin else {}
        write_text(folder / file, arguments_text({**arguments, **made_from}))
    return False


def refuse_other_run(
    folder: Path,
    arguments: Mapping[str, Any],
    flag: str,
    ignored: Sequence[str] = (),
    *,
    file: str = ARGS_FILE,
    origin: Origin | None = None,
    absent: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Refuses a folder whose run has other arguments or another origin; see :func:`claim`."""
    kept, remedy = load_arguments(folder, file) or {}, "nothing was touched; choose another"
    if kept.get(SPOILED):
        raise UserError(f"{folder} cannot be resumed ({kept[SPOILED]}): choose another {flag}")
    if origin and not kept.get(MADE_FROM):
        raise UserError(
            f"{folder} holds a run whose {file} does not say which images it was made from (an earlier version began it): "
            f"{remedy} {flag}"
        )
    changed = differences(kept, arguments, (*ignored, MADE_FROM), absent)
    if changed:
        shown = "; ".join(changed[:6]) + ("; ..." if len(changed) > 6 else "")
        cause = _changed_defaults({**plain(absent), **kept}, {**absent, **arguments})
        raise UserError(f"{folder} holds a run with other arguments ({shown}){cause}: {remedy} {flag}")
    difference = origin.compare(kept[MADE_FROM], plain(origin.describe())) if origin else ""
    if difference:
        raise UserError(
            f"{folder} holds a run made from other data ({difference}): {remedy} {flag}, or restore what changed"
        )


def _changed_defaults(kept: Mapping[str, Any], present: Mapping[str, Any]) -> str:
    """Settings that differ since a recipe gave one of the values, and the flag that gives the former value again."""
    then, now, value = _recipe_of(kept), _recipe_of(present), plain(present)
    parts = []
    for name in {**then, **now}:
        if kept.get(name) is None or kept[name] == value.get(name):
            continue
        present_value = f"{value[name]} by {now.get(name, 'flag or default')}" if name in value else "at its default"
        former_value = f"{kept[name]} by {then.get(name, 'flag or default')}"
        parts.append(
            f"; {name} is {present_value} and was {former_value}, --{name} {kept[name]} gives the former value"
        )
    return "".join(parts)


def _recipe_of(record: Mapping[str, Any]) -> dict[str, str]:
    """The recipe that gave a recorded value, by setting; earlier versions had a table of learning rates."""
    name, _, values = str(record.get("recipe") or "").partition(": ")
    recipe = {value.split()[0]: f"recipe {name}" for value in values.split(", ") if value and value != "sets nothing"}
    source = record.get("lr_source", "--lr")
    return recipe if source == "--lr" else {**recipe, "lr": source}


def spoil(folder: Path, reason: str) -> None:
    """Notes in a run's record why it must not be resumed; :func:`claim` refuses it from then on."""
    write_text(folder / ARGS_FILE, arguments_text({**(load_arguments(folder) or {}), SPOILED: reason}))


class MetricsCsv:
    """A CSV that grows row by row and survives a kill: reopened for a resumed run, rows past the resume point go."""

    def __init__(self, path: Path, columns: Sequence[str], keep_below: float | None = None):
        """Opens ``path`` for appending, of existing rows with those whose first column is at most ``keep_below`` (None:
        with none)."""
        self.path, self.columns = path, list(columns)
        kept: list[list[str]] = []
        if keep_below is not None and path.exists():
            with open(path, newline="", encoding="utf-8") as lines:
                rows = list(csv.reader(lines))
            if rows and rows[0] == self.columns:
                kept = [r for r in rows[1:] if len(r) == len(self.columns) and float(r[0]) <= keep_below]
        with csv_writer(path) as writer:
            writer.writerow(self.columns)
            writer.writerows(kept)

    def add(self, **values: Any) -> None:
        """Appends one row; columns not given are left empty. Raises ValueError: a column that the file lacks."""
        row = {column: f"{cell:.8g}" if isinstance(cell, float) else cell for column, cell in values.items()}
        with open(self.path, "a", newline="", encoding="utf-8") as out:
            csv.DictWriter(out, self.columns, lineterminator="\n").writerow(row)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what comes out."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def git_revision(folder: Path) -> str | None:
    """The commit of a checkout, with ``-dirty`` where tracked files were changed; None outside one."""
    try:
        run = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty", "--exclude", "*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip() or None
