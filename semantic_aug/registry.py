"""Look-ups by (data set, key) in ``config/*.yaml``, and writing a new entry without losing the file's comments.

``finetuned_ckpts.yaml`` says where a fine-tuned checkpoint's files are, ``synthetic_datasets.yaml`` where a synthetic
subset (or several under one key) is. Relative paths are relative to the repository root.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from semantic_aug.errors import UserError, unknown
from semantic_aug.files import locked

REPO_ROOT = Path(__file__).resolve().parents[1]
CONFIG_DIR = REPO_ROOT / "config"
CHECKPOINTS = "finetuned_ckpts.yaml"
SUBSETS = "synthetic_datasets.yaml"
DATASETS = "datasets.yaml"
LEARNING_RATES = "learning_rates.yaml"
LORA_FILES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin", "pytorch_model.bin", "model.safetensors")
"""What is looked for, in this order, where a ``lora_path`` is a folder."""


def resolve_path(path: str | os.PathLike) -> Path:
    """A path of a registry or flag: ``~`` expanded, relative ones taken from the repository root."""
    path = Path(path).expanduser()
    return path if path.is_absolute() else REPO_ROOT / path


def shown_path(path: str | os.PathLike) -> str:
    """The way a path is written into a registry: relative to the repository root where it lies inside."""
    path = Path(path).absolute()
    return path.relative_to(REPO_ROOT).as_posix() if path.is_relative_to(REPO_ROOT) else path.as_posix()


@dataclass(frozen=True)
class CheckpointEntry:
    """Where one fine-tuned model's parts are.

    Attributes:
        model_path: hub id or folder of the base model.
        lora_path: file of the U-Net LoRA, or None.
        embed_path: file of the class tokens, or None.
    """

    model_path: str
    lora_path: Path | None
    embed_path: Path | None


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's mapping; an absent or empty file is an empty one.

    Raises:
        UserError: the file is not valid YAML, or not a mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML ({error}): mend the file") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a mapping of data set names: mend the file")
    return content


def look_up(dataset: str, key: str, file: str, config_dir: Path, kind: str, made_by: str) -> Any:
    """The entry (dataset, key) of a registry file.

    Args:
        dataset: section of the file.
        key: entry of the section.
        file: the registry's file name.
        config_dir: folder it lies in.
        kind: what the entry is, for the error.
        made_by: the command that makes such an entry, for the error.

    Raises:
        UserError: no such section or key; lists the known keys, the nearest first, and says what to edit.
    """
    path = config_dir / file
    section = read_yaml(path).get(dataset) or {}
    if not isinstance(section, dict):
        raise UserError(f"section '{dataset}' of {path} holds a {type(section).__name__}, expected keys with entries")
    entries = {str(k): v for k, v in section.items()}
    if key not in entries:
        where = f"add it to section '{dataset}' of {shown_path(path)}, or let {made_by} --register_key write it"
        raise unknown(f"{kind} of data set '{dataset}'", key, entries, where)
    return entries[key]


def checkpoint(dataset: str, key: str, config_dir: Path = CONFIG_DIR) -> CheckpointEntry:
    """The fine-tuned checkpoint (dataset, key).

    Raises:
        UserError: unknown key, an entry without ``model_path``, or files that are gone.
    """
    entry = look_up(dataset, key, CHECKPOINTS, config_dir, "checkpoint key", "train_lora.py")
    where = f"entry {dataset}/{key} of {shown_path(config_dir / CHECKPOINTS)}"
    if not isinstance(entry, dict) or not entry.get("model_path"):
        raise UserError(f"{where} has no model_path: expected model_path, lora_path and embed_path")
    extra = set(entry) - {"model_path", "lora_path", "embed_path"}
    if extra:
        raise UserError(
            f"{where} has the unknown field '{sorted(extra)[0]}': expected model_path, lora_path, embed_path"
        )
    paths = {}
    for field in ("lora_path", "embed_path"):
        paths[field] = resolve_path(entry[field]) if entry.get(field) else None
        if paths[field] is not None and not paths[field].exists():
            raise UserError(
                f"{where}: {field} '{entry[field]}' is not there (looked at {paths[field]}): "
                "mend the path, set it to null, or run train_lora.py again"
            )
    if paths["lora_path"] is not None:
        paths["lora_path"] = find_lora(paths["lora_path"])
    return CheckpointEntry(str(entry["model_path"]), **paths)


def find_lora(path: Path) -> Path:
    """The file of a ``lora_path``: itself, or the known file inside a folder.

    Raises:
        UserError: none there.
    """
    if path.is_dir():
        for name in LORA_FILES:
            if (path / name).is_file():
                return path / name
        raise UserError(f"lora_path {path} holds no {LORA_FILES[0]}: mend the checkpoint's entry")
    if not path.is_file():
        raise UserError(f"lora_path {path} is not there: mend the checkpoint's entry")
    return path


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
    return [f"{item.partition('#')[0]}#{variant}" for item in listed] if variant else listed


def checkpoint_block(dataset: str, key: str, entry: Mapping[str, str | None]) -> dict:
    """The YAML of a checkpoint as a mapping: {dataset: {key: entry}}."""
    return {dataset: {key: dict(entry)}}


def to_yaml(block: Mapping) -> str:
    """A block of YAML to print and paste."""
    return yaml.safe_dump(dict(block), sort_keys=False, default_flow_style=False, allow_unicode=True)


def register(file: str, dataset: str, key: str, entry: Any, config_dir: Path = CONFIG_DIR) -> bool:
    """Adds (dataset, key) to a registry file, keeping its comments and order.

    Two processes may register at once: the file is locked while it is read and replaced.

    Returns:
        True when the file changed, False when it already held exactly this entry.

    Raises:
        UserError: the key is taken by another entry.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    path = config_dir / file
    config_dir.mkdir(parents=True, exist_ok=True)
    with locked(path.with_name(f".{path.name}.lock")):
        yaml_rt = YAML()
        yaml_rt.preserve_quotes, yaml_rt.width = True, 4096
        try:
            content = yaml_rt.load(path.read_text(encoding="utf-8")) if path.exists() else None
        except YAMLError as error:
            raise UserError(f"{path} is not valid YAML ({error}): mend the file") from None
        header = None
        if content is None:  # only comments, or nothing: keep the text and write the section below it
            header = path.read_text(encoding="utf-8") if path.exists() else ""
            content = {}
        section = content.get(dataset)
        if section is None:
            content[dataset] = section = {}
        if key in section:
            if _plain(section[key]) == entry:
                return False
            raise UserError(
                f"{shown_path(path)} already has {dataset}/{key} with another entry: "
                "choose another --register_key or remove the old entry"
            )
        section[key] = entry
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with open(temporary, "w", encoding="utf-8") as out:
            if header:
                out.write(header if header.endswith("\n") else header + "\n")
            yaml_rt.dump(content, out)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)
    return True


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, str) else value


def learning_rate(dataset: str, model: str, resolution: int, config_dir: Path = CONFIG_DIR) -> tuple[float | None, str]:
    """The tuned classifier learning rate of (dataset, model, resolution), or of the model alone.

    Returns:
        The rate, or None where the table has nothing, and the entry it comes from.
    """
    table = read_yaml(config_dir / LEARNING_RATES) or read_yaml(CONFIG_DIR / LEARNING_RATES)
    for section in (dataset, "default"):
        rates = (table.get(section) or {}).get(model)
        if isinstance(rates, Mapping):
            by_resolution = {int(k): float(v) for k, v in rates.items()}
            nearest = min(by_resolution, key=lambda r: (abs(r - resolution), r), default=None)
            if nearest is not None:
                return by_resolution[nearest], f"{LEARNING_RATES}: {section}/{model}/{nearest}"
        elif rates is not None:
            return float(rates), f"{LEARNING_RATES}: {section}/{model}"
    return None, ""
