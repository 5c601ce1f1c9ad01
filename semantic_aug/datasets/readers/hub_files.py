"""Local copies of hub data sets: which file is of which split, by the library's own rules, and which configuration.

What the library would do in silence is refused by name: a file in no split or in two, one that is cut off. Files are
converted into the library's cache (``HF_DATASETS_CACHE``), under a folder named by their sizes and times.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from semantic_aug.datasets.images import EXTENSIONS
from semantic_aug.datasets.spec import split_of
from semantic_aug.datasets.table import file_stamp
from semantic_aug.errors import UserError, unknown

if TYPE_CHECKING:
    import datasets as hub

TABLES = {".parquet": "parquet", ".jsonl": "json", ".csv": "csv"}
"""Endings of tables, and the library's reader of each."""
CONVERTED = re.compile(r"(?P<config>[^/]+)/(?:partial-)?(?P<split>[^/]+)/\d{4}\.parquet")
"""Files of the hub's branch ``refs/convert/parquet``."""


def load_local(folder: Path, config: str | None = None) -> hub.Dataset | dict[str, hub.Dataset]:
    """A folder written by ``save_to_disk``, or one with files that the library reads, whatever their layout."""
    import datasets as hub

    if not folder.is_dir():
        raise UserError(f"local copy {folder} is not a folder: correct the path, or unset it to load from the hub")
    if (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists():
        try:
            rows = hub.load_from_disk(str(folder))
        except Exception as error:  # the library and Arrow raise many kinds for damaged files
            raise UserError(f"{folder} was written by save_to_disk and cannot be read ({reason_of(error)})") from None
        saved = next(iter(rows.values())).config_name if isinstance(rows, dict) else rows.config_name
        if config not in (None, saved):
            raise UserError(
                f"{folder} was written by save_to_disk from the configuration '{saved or 'default'}': leave out '{config}'"
            )
        return rows
    folder, config = _configuration(folder, config)
    kind, files = _files_of_splits(folder, config)
    _check_files(folder, files)
    stamps = "".join(f"{path}\0{file_stamp(path)}\0" for paths in files.values() for path in sorted(paths))
    digest = hashlib.sha256(f"{config}\0{stamps}".encode(errors="surrogateescape")).hexdigest()[:16]
    cache = str(Path(hub.config.HF_DATASETS_CACHE) / f"local-{digest}")
    try:
        if kind is None and not _alike(files):
            kind = "parquet"  # the library would read every split by the columns and the class list of the first
        if kind is None:
            splits = hub.load_dataset(str(folder), name=config, cache_dir=cache)
        else:
            options = {"split": "train", "cache_dir": cache}
            splits = {split: hub.load_dataset(kind, data_files=paths, **options) for split, paths in files.items()}
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{_damaged(files) or folder} cannot be read ({reason_of(error)}): copy it again") from None
    for split, rows in splits.items():  # the library's own fingerprints know neither size nor time of a file
        rows._fingerprint = hashlib.sha256(f"{digest}-{split}".encode()).hexdigest()[:16]
    return splits


def _files_of_splits(folder: Path, config: str | None) -> tuple[str | None, dict[str, list[str]]]:
    """The files of each split by the library's rules, and its reader where that is not the one it would choose.

    Images that lie beside a table outnumber it, and the library takes the folder for one of images alone; here the table
    leads. ``metadata`` files belong to such a folder of images.
    """
    import datasets as hub
    from datasets.data_files import DataFilesDict, get_data_patterns

    try:
        builder = hub.load_dataset_builder(str(folder), name=config)
        files = {str(split): list(map(str, paths)) for split, paths in (builder.config.data_files or {}).items()}
        endings = {Path(path).suffix.lower() for paths in files.values() for path in paths}
        images_and_tables = endings <= {*EXTENSIONS, *TABLES} and not endings.isdisjoint(EXTENSIONS)
        for suffix, kind in TABLES.items() if images_and_tables else ():
            if any(path.stem != "metadata" for path in _data_files(folder, (suffix,))):
                patterns = get_data_patterns(str(folder))
                chosen = DataFilesDict.from_patterns(patterns, base_path=str(folder), allowed_extensions=[suffix])
                return kind, {str(split): list(map(str, paths)) for split, paths in chosen.items() if paths}
        return None, files
    except Exception as error:  # the library raises many kinds
        if _data_files(folder, tuple(TABLES)):
            raise UserError(f"the files of {folder} cannot be assigned to splits ({reason_of(error)})") from None
        raise UserError(
            f"{folder} holds neither files in the hub's formats (parquet) nor a data set written by save_to_disk"
        ) from None


def _configuration(folder: Path, config: str | None) -> tuple[Path, str | None]:
    """The folder and the configuration's name for the library. Raises UserError: there are several and none is named, or the
    named one is not among them."""
    import datasets as hub

    matches = [CONVERTED.fullmatch(path.relative_to(folder).as_posix()) for path in _data_files(folder, (".parquet",))]
    converted = sorted({match["config"] for match in matches if match})
    if matches and all(matches) and not any(split_of(name) for name in converted):
        known = {name: (folder / name, None) for name in converted}
    else:
        try:
            known = {name: (folder, name) for name in hub.get_dataset_config_names(str(folder))}
            default = hub.get_dataset_default_config_name(str(folder))
        except Exception:  # no file that the library knows, or a damaged README: the builder says which
            return folder, config
        config = default if config is None and default in known else config
    if config is None and len(known) > 1:
        raise UserError(
            f"{folder} has the configurations {', '.join(known)}: name one, as in hf:{folder}:{next(iter(known))} "
            "(or 'config' in config/datasets.yaml)"
        )
    if config not in (None, *known):
        raise unknown("configuration", config, known, f"looked in {folder}")
    return known[config or next(iter(known))]


def _data_files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Files with one of the suffixes below a folder, hidden ones left out."""
    files = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in suffixes and path.is_file())
    return [path for path in files if not any(p.startswith((".", "__")) for p in path.relative_to(folder).parts)]


def _check_files(folder: Path, files: Mapping[str, Sequence[str]]) -> None:
    """Refuses what the library would do in silence: one file in two splits, a file in none, a file that is cut off."""
    split_of_file: dict[str, str] = {}
    for split, paths in files.items():
        for path in paths:
            if split_of_file.setdefault(path, split) != split:
                raise UserError(
                    f"{path} belongs to the splits {split_of_file[path]} and {split} by its name: rename it"
                )
    readme = folder / "README.md"
    if not (readme.is_file() and "data_files:" in readme.read_text(encoding="utf-8", errors="replace")):
        suffixes = {Path(path).suffix.lower() for path in split_of_file}
        listed = {os.path.abspath(path) for path in split_of_file}
        for path in _data_files(folder, tuple(suffixes - set(EXTENSIONS))):
            if os.path.abspath(path) not in listed:
                raise UserError(
                    f"the split of {path} is unknown, while other files are of {' and '.join(files)}: name its "
                    "split in the file's or folder's name (train, validation, test), or remove it"
                )
    damaged = _damaged(files, whole=False)
    if damaged:
        raise UserError(f"{damaged} is not a whole parquet file: copy it again")


def _alike(files: Mapping[str, Sequence[str]]) -> bool:
    """Whether all parquet files have the same columns, and one class list, in one order, where they have one at all. Raises
    UserError: two files of one split have different class lists."""
    import pyarrow.parquet as parquet

    known: dict[str, str] = {}
    columns: dict[str, list[str]] = {}
    for split, paths in files.items():
        for path in (path for path in paths if path.endswith(".parquet")):
            schema = parquet.read_schema(path)
            columns.setdefault(split, sorted(schema.names))
            features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
            features = features.get("info", {}).get("features", {})
            classes = json.dumps({name: kind.get("names") for name, kind in features.items() if isinstance(kind, dict)})
            if known.setdefault(split, classes) != classes:
                raise UserError(f"{path} has another class list than {paths[0]}: write both with one list")
    return len(set(known.values())) <= 1 and all(names == next(iter(columns.values())) for names in columns.values())


def _damaged(files: Mapping[str, Sequence[str]], whole: bool = True) -> str | None:
    """The first parquet file whose footer, or with ``whole`` whose content, cannot be read."""
    import pyarrow.parquet as parquet

    for path in (path for paths in files.values() for path in paths if path.endswith(".parquet")):
        try:
            with parquet.ParquetFile(path) as file:
                for batch in file.iter_batches() if whole else ():
                    batch.validate(full=True)
        except Exception:  # Arrow raises whatever the damaged bytes lead to
            return path
    return None


def reason_of(error: BaseException) -> str:
    """The first line of what the library or Arrow says."""
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {str(cause).strip().splitlines()[0][:200] if str(cause).strip() else ''}"
