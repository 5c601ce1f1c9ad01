"""Whether a folder holds the very subset that is planned, and taking it for that subset.

``config.yaml`` has these parts: the identity (:mod:`.identity`), compared whenever a folder is opened; under ``arguments``
what the identity follows from and what may change (the locations of data set and base model, the few-shot setting);
``base_license``, the base model's; ``made_with``, the versions of the first run; and ``runs``, how each part was computed where
that changed: on how many processes, with compiled networks or not.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from semantic_aug import cli, registry, runs
from semantic_aug.datasets.fingerprint import content_digest, data_difference, hex_digits, split_identity
from semantic_aug.datasets.settings import ABSENT
from semantic_aug.datasets.synthetic import SOURCES_FILE, UNLABELLED_FILE, read_sources, write_sources
from semantic_aug.diffusion.schedulers import SolverSettings
from semantic_aug.errors import UserError
from semantic_aug.files import write_text
from semantic_aug.sampling.folder import CONFIG_FILE, REMEDY, Records, has_images, recorded_identity
from semantic_aug.sampling.folder import DATA as IMAGES
from semantic_aug.sampling.guide import write_guide
from semantic_aug.sampling.identity import DATA, Identity
from semantic_aug.sampling.masks import columns_of
from semantic_aug.sampling.settings import ImageSettings
from semantic_aug.sampling.subset import PlannedSubset

log = logging.getLogger(__name__)

ARGUMENTS, MADE_WITH, RUNS, LICENSE = "arguments", "made_with", "runs", "base_license"
FOLLOWS = ("images", "plan_sha256", "guide_sha256")
"""Values that differ only where another one does; named where nothing else explains the difference."""
RETIRED = {"guidance_stop": 1.0, "reuse_interval": 1}
"""Settings of earlier versions (``--speed fast`` and ``turbo``), with the values at which they change nothing."""


def warn(subset: PlannedSubset) -> None:
    """Tells what does not stop a run: images that cannot be read, a checkpoint that was trained on other images, labels that
    the images cannot follow."""
    config, identity = subset.config, subset.identity
    planned, labelled = identity.origin.sources, len(identity.table)
    content = np.empty((0, 1)) if planned is None else planned.content
    train, pool = (content[:labelled], identity.table.keys), (content[labelled:], identity.unlabelled)
    for kind, (values, keys) in (("training", train), ("unlabelled", pool)):
        if len(bad := np.flatnonzero(~values.any(axis=1))):
            text = "%d %s images cannot be read ('%s' the first): nothing will be made from them"
            log.warning(text, len(bad), kind, keys[bad[0]])
    path = config.model.lora or config.model.tokens
    then, now = _trained_on(path) if path else {}, identity.compared[DATA]["train"]
    if any(then.get(name) != now[name] for name in ("labels", "content") if then):
        log.warning(
            "checkpoint %s was trained on other images than these (%s): is --finetune_model_key of this data set and setting?",
            path,
            data_difference({"train": {**now, **then}}, {"train": now}),
        )
    if config.images.object_mask == "background" and config.strategy.pairing == "mixed":
        log.warning(
            "--object_mask background keeps the object of each source, while labels name the target of %s by s^gamma: take a "
            "strategy within a class, such as diff-aug, or a --gamma in stage 3 that leaves the target little",
            config.strategy.name,
        )


def _trained_on(path: Path) -> dict[str, Any]:
    """The record of the training images of the run that a checkpoint's file belongs to; empty where there is none."""
    folder = path.parent.parent if path.parent.name.startswith("checkpoint-") else path.parent
    with contextlib.suppress(UserError):  # not the record of our stage 1
        record = runs.load_arguments(folder) or {}
        return dict(((record.get("made_from") or {}).get(DATA) or {}).get("train") or {})
    return {}


# -------------------------------------------------------------------------------------------------- claiming a folder


def claim(subset: PlannedSubset, alone: bool) -> None:
    """Takes the folder for this subset, or finds that it already is this subset; see :func:`belongs`. The caller keeps other
    processes from claiming it meanwhile.

    Args:
        alone: no shard of this subset can be at work.

    Raises:
        UserError: the folder holds a subset made otherwise, or other files.
    """
    folder, identity, known = subset.folder, subset.identity, belongs(subset, alone)
    lists = {SOURCES_FILE: (identity.table.keys, identity.images.values)}
    if (planned := identity.origin.sources) is not None and identity.unlabelled:
        lists[UNLABELLED_FILE] = identity.unlabelled, planned.content[len(identity.table) :]
    for file, (keys, values) in lists.items():  # before the record, without which stage 3 does not ask for them
        if not known or read_sources(folder, file) is None:
            write_sources(folder, keys, values, file)
    write_guide(folder, subset.config.guide)
    if known:
        return
    old = recorded_identity(folder) or {}
    made_with = {"versions": runs.versions(), "git_revision": runs.git_revision(registry.REPO_ROOT)}
    kept = {name: old[name] for name in (MADE_WITH, RUNS) if name in old and has_images(folder)}
    record = {ARGUMENTS: identity.arguments, LICENSE: identity.license, MADE_WITH: made_with}
    _write(folder, {**identity.compared, **record, **kept})


def belongs(subset: PlannedSubset, alone: bool = True) -> bool:
    """Whether the folder holds this very subset; False where it is free to be claimed. Nothing is written.

    A subset without an image is free. So is one that differs in replaced training images alone, where nothing has been made
    from the old ones and no other run is at work: a damaged file that was restored, as the error about it asks for.

    Raises:
        UserError: the folder holds a subset made otherwise, with what differs, or other files.
    """
    folder, identity = subset.folder, subset.identity
    old = recorded_identity(folder)
    if old is None:
        others = [p.name for p in folder.iterdir() if not p.name.startswith(".")] if folder.exists() else []
        if others:
            raise UserError(
                f"{folder} is not empty ('{sorted(others)[0]}') and holds no {CONFIG_FILE}: nothing was touched; "
                "choose another --output_root"
            )
        return False
    if DATA in old and _compared(old) == identity.compared:
        _warn_of_versions(folder, old)
        return True
    if alone and not has_images(folder):
        return False
    if DATA not in old:
        raise UserError(
            f"{folder} was begun by an earlier version of this program, which did not record the training images, class "
            f"names and prompts, so that nothing shows that they are the same: {REMEDY} (train_cls.py reads it as it is)"
        )
    if any(old.get(name, value) != value for name, value in RETIRED.items()):
        raise UserError(
            f"{folder} was begun by an earlier version of this program with --speed fast or turbo, which it no longer has: "
            f"{REMEDY} (train_cls.py reads it as it is)"
        )
    replaced = _replaced(old, identity, folder)
    if not (alone and len(replaced) and _unused(subset, replaced)):
        raise UserError(f"{folder} holds a subset made otherwise ({_differences(old, identity, folder)}): {REMEDY}")
    log.warning(
        "%d training images were replaced since this subset was begun ('%s' the first); nothing had been made from them",
        len(replaced),
        identity.table.keys[replaced[0]],
    )
    return False


def note_run(folder: Path, shard: str, after: int, **how: Any) -> None:
    """Records how a run computes, where that is not what the last run of its shard recorded.

    Args:
        shard: which part of the subset the run makes.
        after: images of this part that other runs have made.
        how: compiled networks or not, the number of processes.
    """
    record = recorded_identity(folder)
    runs = list(record.get(RUNS) or [])
    last = next((run for run in reversed(runs) if run.get("shard") == shard), {})
    if any(last.get(name) != value for name, value in how.items()):
        runs.append({"shard": shard, "after_images": after, **how})
        _write(folder, {**record, RUNS: runs})


def _write(folder: Path, record: Mapping[str, Any]) -> None:
    write_text(folder / CONFIG_FILE, runs.arguments_text(record))


def _compared(record: Mapping[str, Any]) -> dict[str, Any]:
    """The compared part of a record, with what the absence of a setting means."""
    retired = (name for name, value in RETIRED.items() if record.get(name) == value)
    left_out = {ARGUMENTS, MADE_WITH, RUNS, LICENSE, *retired}
    absent = cli.absent_values(ImageSettings, SolverSettings)
    return {**absent, **{name: value for name, value in record.items() if name not in left_out}}


def _warn_of_versions(folder: Path, record: Mapping[str, Any]) -> None:
    mixed = runs.differences((record.get(MADE_WITH) or {}).get("versions") or {}, runs.versions())
    if mixed:
        log.warning(
            "%s was begun with other versions (%s): new files may differ in their last bits", folder, "; ".join(mixed)
        )


# --------------------------------------------------------------------------------------------------- what has changed


def _recorded_images(old: Mapping[str, Any], folder: Path) -> dict[str, bytes]:
    """The training images of a record and their content hashes, by name; empty where the folder does not have them."""
    keys, values = read_sources(folder) or ([], np.empty((0, 0), np.uint8))
    if content_digest(hex_digits(values)) != (old[DATA].get("train") or {}).get("content"):
        return {}
    return dict(zip(keys, (value.tobytes() for value in values), strict=True))


def _replaced(old: Mapping[str, Any], identity: Identity, folder: Path) -> np.ndarray:
    """Rows of the training images whose content is all that differs; none where anything else does."""
    before, keys, now = _recorded_images(old, folder), identity.table.keys, identity.compared
    if before.keys() == set(keys):
        hashes, columns = [before[key] for key in keys], columns_of(now["object_mask"])
        train = split_identity(identity.table, (value.hex() for value in hashes), columns)
        if {**now, DATA: {**now[DATA], "train": train}} == _compared(old):
            then = np.frombuffer(b"".join(hashes), np.uint8).reshape(len(keys), -1)
            return np.flatnonzero((then != identity.images.values).any(axis=1))
    return np.empty(0, np.int64)


def _unused(subset: PlannedSubset, rows: np.ndarray) -> bool:
    """Whether no image of the subset has been made from these training images."""
    plan, folder = subset.plan, subset.folder
    used = np.isin(plan.source, rows)
    if plan.partner is not None:
        used |= np.isin(plan.partner, rows)
    tasks = np.flatnonzero(used)
    recorded = Records.latest(folder, len(plan))[0]
    return not recorded[tasks].any() and not any((folder / IMAGES / subset.paths.relative(n)).exists() for n in tasks)


def _differences(old: Mapping[str, Any], identity: Identity, folder: Path) -> str:
    """What differs: the data, then the arguments it follows from, then everything else."""
    parts = [data_difference(old[DATA], identity.compared[DATA])]
    before = _recorded_images(old, folder) if parts[0] else {}
    now = dict(zip(identity.table.keys, (value.tobytes() for value in identity.images.values), strict=True))
    names = [
        *(f"'{key}' is new" for key in now if key not in before),
        *(f"'{key}' is gone" for key in before if key not in now),
        *(f"'{key}' has another content" for key in now if key in before and now[key] != before[key]),
    ]
    if before and names:
        parts[0] += f" ({names[0]}" + (f" and {len(names) - 1} more)" if len(names) > 1 else ")")
    parts += runs.differences(old.get(ARGUMENTS) or {}, identity.arguments, absent=ABSENT)
    then, now = ({k: v for k, v in d.items() if k != DATA} for d in (_compared(old), identity.compared))
    follows = []
    for name in {**then, **now}:
        if then.get(name) != now.get(name):
            (follows if name in FOLLOWS else parts).append(_difference(name, then.get(name), now.get(name)))
    parts = [text for text in parts if text]
    if not parts and old.get("pairing") is None:
        parts.append("its plan is an earlier version's, which kept more pairs within a class than needed")
    parts = parts or follows
    return "; ".join(parts[:6]) + ("; ..." if len(parts) > 6 else "")


def _difference(name: str, then: Any, now: Any) -> str:
    """One value's difference; of lists the first entry that differs."""
    if isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        position = next(i for i, (a, b) in enumerate(zip(then, now, strict=True)) if a != b)
        then, now = then[position], now[position]
    elif isinstance(then, list) and isinstance(now, list) and max(len(then), len(now)) > 10:
        then, now = f"{len(then)} entries", f"{len(now)} entries"
    return runs.difference(name, then, now)
