"""Look-ups by (data set, key) in ``config/*.yaml``, and writing a new entry without losing the file's comments.

``finetuned_ckpts.yaml`` says where a fine-tuned checkpoint's files are, ``synthetic_datasets.yaml`` where a synthetic
subset (or several under one key) is. Relative paths are relative to the repository root.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from semantic_aug import yaml_files
from semantic_aug.errors import UserError, unknown
from semantic_aug.files import home_expanded, locked
from semantic_aug.yaml_files import as_list, kind_of
from semantic_aug.yaml_files import read as read_yaml
from semantic_aug.yaml_files import to_text as to_yaml  # noqa: F401 (a block to print and paste)

REPO_ROOT = Path(__file__).resolve().parents[1]
CONFIG_DIR = REPO_ROOT / "config"
CHECKPOINTS = "finetuned_ckpts.yaml"
SUBSETS = "synthetic_datasets.yaml"
DATASETS = "datasets.yaml"
RECIPES = "recipes.yaml"
DEFAULT_RECIPE = "default"
STAGES = ("train_lora", "sample_mp", "train_cls")
FORMER_RATES = "learning_rates.yaml"
NO_KEYS = ("none", "null")
FILES = (CHECKPOINTS, SUBSETS, DATASETS, RECIPES)
CHECKPOINT_FIELDS = dict.fromkeys(("model_path", "lora_path", "embed_path"), str)
KINDS = {str: "one text", list: "a list of texts", dict: "a mapping of a text to a text each"}
LORA_FILES = (
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "pytorch_model.bin",
    "model.safetensors",
)
"""Names of the file in a ``lora_path`` that is a folder, in the order in which they are looked for."""
TOKEN_FILES = ("learned_embeds.safetensors", "learned_embeds-steps-last.bin")
"""Names of the file in an ``embed_path`` that is a folder, in the order in which they are looked for."""
TOKENS_PER_CLASS = ("*/learned_embeds.bin", "*/learned_embeds.safetensors", "*.pt", "*.bin")
"""Patterns of files of single classes in a folder without such a file; the first pattern with a match counts."""
ADAPTER_CONFIG = "adapter_config.json"
"""The settings beside a LoRA that PEFT saved, its scale among them."""


def resolve_path(path: str | os.PathLike) -> Path:
    """A path of a registry or a default: ``~`` expanded, relative ones taken from the repository root."""
    path = home_expanded(path)
    return path if path.is_absolute() else REPO_ROOT / path


def typed_path(text: str) -> Path:
    """A path of a flag: ``~`` expanded, relative ones taken from the folder in which the command was typed."""
    return home_expanded(text).absolute()


def shown_path(path: str | os.PathLike) -> str:
    """The way a path is written into a registry: relative to the repository root where it lies inside."""
    path = Path(path).absolute()
    return path.relative_to(REPO_ROOT).as_posix() if path.is_relative_to(REPO_ROOT) else path.as_posix()


@dataclass(frozen=True)
class CheckpointEntry:
    """The parts of one fine-tuned model: the base model, the file of the U-Net LoRA and that of the class tokens, or None."""

    model_path: str
    lora_path: Path | None
    embed_path: Path | None


def config_folder(text: str) -> Path:
    """The folder that ``--config_dir`` names, its files checked."""
    folder = typed_path(text)
    check_files(folder)
    return folder


def check_files(config_dir: Path = CONFIG_DIR) -> None:
    """Reads every registry file once, so that a damaged one is found before anything runs. Raises UserError: see
    :func:`read_yaml`; or a section that is no mapping."""
    for file in FILES:
        for section in read_yaml(config_dir / file):
            _section(section, file, config_dir)


def fields(entry: Any, kinds: Mapping[str, type], where: str, expected: str) -> dict[str, Any]:
    """The fields of an entry that are set.

    Args:
        kinds: the type of every known field, one of :data:`KINDS`.

    Raises:
        UserError: not a mapping, an unknown field, or a value of another kind.
    """
    if not isinstance(entry, dict):
        raise UserError(f"{where} holds {kind_of(entry)}: expected {expected}")
    out = {}
    for name, value in entry.items():
        if name not in kinds:
            raise unknown(f"field in {where}", name, kinds, "correct the entry")
        if value is None or value == "":
            continue
        if isinstance(value, list):
            value = [item for item in value if item not in (None, "")]
        elif isinstance(value, dict):
            value = {key: item for key, item in value.items() if item not in (None, "")}
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        if not isinstance(value, kinds[name]) or not all(isinstance(part, str) for part in parts):
            raise UserError(f"{where}: {name} is {kind_of(value)}, expected {KINDS[kinds[name]]}: correct the entry")
        out[name] = value
    return out


def _section(section: str, file: str, config_dir: Path) -> dict[str, Any]:
    """The entries of a section; none where it is absent or empty."""
    entries = read_yaml(config_dir / file).get(section)
    if entries is None:
        return {}
    if not isinstance(entries, dict):
        raise UserError(
            f"section '{section}' of {shown_path(config_dir / file)} holds {kind_of(entries)}, "
            "expected keys with entries: correct the file"
        )
    return entries


def keys(dataset: str, file: str, config_dir: Path = CONFIG_DIR) -> list[str]:
    """The keys of a data set's section in a registry file."""
    return list(_section(dataset, file, config_dir))


def look_up(dataset: str, key: str, file: str, config_dir: Path, kind: str, made_by: str) -> Any:
    """The entry (dataset, key) of a registry file. Raises UserError: no such section or key; lists the known keys, the nearest
    first, and says what to edit."""
    entries = _section(dataset, file, config_dir)
    if key not in entries:
        where = f"add it to section '{dataset}' of {shown_path(config_dir / file)}, or let {made_by} --register_key write it"
        raise unknown(f"{kind} of data set '{dataset}'", key, entries, where)
    return entries[key]


def checkpoint(dataset: str, key: str, config_dir: Path = CONFIG_DIR) -> CheckpointEntry:
    """The fine-tuned checkpoint (dataset, key). Raises UserError: unknown key, an entry without ``model_path``, or files that
    are gone."""
    entry = look_up(dataset, key, CHECKPOINTS, config_dir, "checkpoint key", "train_lora.py")
    where = f"entry {dataset}/{key} of {shown_path(config_dir / CHECKPOINTS)}"
    entry = fields(entry, CHECKPOINT_FIELDS, where, "model_path, lora_path and embed_path")
    if "model_path" not in entry:
        raise UserError(f"{where} has no model_path: expected model_path, lora_path and embed_path")
    paths = {}
    for field in ("lora_path", "embed_path"):
        paths[field] = resolve_path(entry[field]) if entry.get(field) else None
        if paths[field] is not None and not paths[field].exists():
            raise UserError(
                f"{where}: {field} '{entry[field]}' is not there (looked at {paths[field]}): "
                "correct the path, set it to null, or run train_lora.py again"
            )
    if paths["lora_path"] is not None:
        paths["lora_path"] = find_lora(paths["lora_path"])
    if paths["embed_path"] is not None and len(files := token_files(paths["embed_path"])) == 1:
        paths["embed_path"] = files[0]
    return CheckpointEntry(entry["model_path"], **paths)


def find_lora(path: Path, flag: str | None = None) -> Path:
    """The file of a LoRA: itself, or the known file inside a folder. Raises UserError: no such file; names ``flag``, or the
    ``lora_path`` of a checkpoint."""
    what, remedy = (flag, "correct the path") if flag else ("lora_path", "correct the checkpoint's entry")
    if path.is_dir():
        for name in LORA_FILES:
            if (path / name).is_file():
                return path / name
        raise UserError(f"{what} {path} holds no {LORA_FILES[0]} or {LORA_FILES[2]}: {remedy}")
    if not path.is_file():
        raise UserError(f"{what} {path} is not there: {remedy}")
    return path


def lora_files(path: Path) -> list[Path]:
    """The files that decide what a LoRA does: its weights and, of one that PEFT saved, its settings."""
    file = find_lora(path)
    config = file.with_name(ADAPTER_CONFIG)
    return [file, config] if config.is_file() else [file]


def token_files(path: Path) -> list[Path]:
    """The files of an ``embed_path``: itself, the known file inside a folder, or the files of its classes, sorted by name.
    Raises UserError: none there."""
    if not path.is_dir():
        if not path.is_file():
            raise UserError(f"class tokens {path} are not there: correct embed_path of the checkpoint's entry")
        return [path]
    known = [path / name for name in TOKEN_FILES if (path / name).is_file()]
    files_of_classes = known[:1] or next(
        (files for pattern in TOKENS_PER_CLASS if (files := sorted(path.glob(pattern)))), []
    )
    if not files_of_classes:
        raise UserError(
            f"embed_path {path} holds no class tokens: expected {' or '.join(TOKEN_FILES)}, or a .pt or .bin file per class"
        )
    return files_of_classes


def subsets(dataset: str, key: str, config_dir: Path = CONFIG_DIR) -> list[str]:
    """The folders of the synthetic subset(s) (dataset, key), as written in the registry (a ``#variant`` may follow).

    A key, too, may be followed by ``#variant``: that variant of every folder of the key.

    Raises:
        UserError: unknown key, or an entry that is neither a path nor a list of paths.
    """
    key, _, variant = key.partition("#")
    entry = look_up(dataset, key, SUBSETS, config_dir, "subset key", "sample_mp.py")
    listed = [entry] if isinstance(entry, str) else entry
    if not isinstance(listed, list) or not listed or not all(isinstance(item, str) for item in listed):
        raise UserError(
            f"entry {dataset}/{key} of {shown_path(config_dir / SUBSETS)} holds {entry!r}: "
            "expected a folder or a list of folders"
        )
    return [f"{part_variant(item)[0]}#{variant}" for item in listed] if variant else listed


def part_variant(item: str) -> tuple[str, str]:
    """The folder of a subset, and the variant after a ``#``, empty without one. A ``#`` before the last slash is part of the
    folder's name, and so is one in the name of a folder that exists."""
    folder, mark, variant = item.rpartition("#")
    if not mark or "/" in variant or resolve_path(item).is_dir():
        return item, ""
    return folder, variant


def register(file: str, dataset: str, key: str, entry: Any, config_dir: Path = CONFIG_DIR) -> bool:
    """Adds (dataset, key) to a registry file, keeping its comments and order; returns whether the file changed, False where it
    held exactly this entry. Two processes may register at once: the file is locked while it is read and replaced."""
    path = config_dir / file
    with locked(path.with_name(f".{path.name}.lock")):
        text = check_key(file, dataset, key, entry, config_dir)
        if text is not None:
            yaml_files.write(path, text)
    return text is not None


def check_key(file: str, dataset: str, key: str, entry: Any, config_dir: Path = CONFIG_DIR) -> str | None:
    """Everything that can refuse :func:`register`, without writing: to be called before the work whose result it is.
    Returns the file's new text, or None where it already holds exactly this entry. Raises UserError: a key that no flag
    could name, a damaged file, one that cannot be written, or a key taken by another entry."""
    path = config_dir / file
    check_writable(file, key, config_dir)
    entries = _section(dataset, file, config_dir)
    if key in entries and entries[key] != yaml_files.as_read(entry):
        raise UserError(
            f"--register_key {key}: {shown_path(path)} already has {dataset}/{key} with another entry: "
            "choose another --register_key or remove the old entry"
        )
    if key in entries:
        return None
    return yaml_files.extended(yaml_files.read_text(path) or "", path, dataset, key, entry)


def new_key(text: str) -> str:
    """An argument type: a key to register. Raises UserError: no flag could name it."""
    if not text.strip() or text != text.strip() or "#" in text or not text.isprintable() or text.lower() in NO_KEYS:
        raise UserError(
            f"--register_key '{text}': expected a name without '#' (which parts a key from a variant) or blanks around it, "
            "and other than None"
        )
    return text


def check_writable(file: str, key: str, config_dir: Path = CONFIG_DIR) -> None:
    """Refuses a ``--register_key`` that no flag could name, and a registry file that is damaged or cannot be written."""
    path = config_dir / file
    new_key(key)
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise UserError(
            f"--register_key {key}: {path} cannot be written; change its permissions or give another --config_dir"
        )
    read_yaml(path)


@dataclass(frozen=True)
class RecipeRow:
    """Defaults of flags under conditions, a row of a recipe.

    Attributes:
        when: flag -> the values under which the row holds.
        set: flag -> what is typed after it; None: a further row or the command line has to give it.
    """

    when: Mapping[str, list[str]]
    set: Mapping[str, list[str] | None]


def recipe(name: str, stage: str, config_dir: Path = CONFIG_DIR) -> list[RecipeRow]:
    """The rows that a recipe of ``recipes.yaml`` has for a stage; from the folder's file, else from the repository's.

    Args:
        stage: one of :data:`STAGES`.

    Raises:
        UserError: an unknown recipe, a section of it that is no stage, or rows that are none.
    """
    path, former = config_dir / RECIPES, config_dir / FORMER_RATES
    if former.exists():
        raise UserError(
            f"{shown_path(former)} is no longer read: write its rates into {shown_path(path)} as rows "
            "'- {when: {dataset: cub, model: resnet50}, set: {lr: 0.05}}' under default: train_cls:, and remove it"
        )
    recipes = {}
    for file in dict.fromkeys((CONFIG_DIR / RECIPES, path)):
        recipes |= read_yaml(file)
    if name not in recipes:
        raise unknown("--recipe", name, recipes, f"add it to {shown_path(path)}")
    stages = recipes[name] or {}
    if not isinstance(stages, dict):
        raise UserError(
            f"recipe '{name}' of {shown_path(path)} holds {kind_of(stages)}: expected stages with their rows; "
            "correct the file"
        )
    if other := next((section for section in stages if section not in STAGES), None):
        raise unknown(f"stage in recipe '{name}' of {shown_path(path)}", other, STAGES, "correct the file")
    rows = stages.get(stage) or []
    return [_recipe_row(row, f"recipe '{name}' of {shown_path(path)}: {stage}") for row in as_list(rows)]


def _recipe_row(row: Any, where: str) -> RecipeRow:
    parts = {"when": {}, **row} if isinstance(row, dict) else {}
    whole = set(parts) == {"when", "set"} and all(isinstance(part, dict) for part in parts.values()) and parts["set"]
    if whole:
        when = {flag: as_list(value) for flag, value in parts["when"].items()}
        values = {flag: None if value is None else as_list(value) for flag, value in parts["set"].items()}
        texts = [text for part in (when, values) for value in part.values() for text in value or ()]
    if not whole or not all(isinstance(text, str) for text in texts):
        raise UserError(
            f"{where} holds {row}, expected rows '- {{when: {{flag: value}}, set: {{flag: value}}}}'; correct the file"
        )
    return RecipeRow(when, values)
