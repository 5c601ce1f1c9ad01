"""Claiming a subset's folder: its record ``config.yaml`` is written, or compared with the planned subset.

The record has these parts: the identity (:mod:`.identity`), compared whenever a folder is opened; under ``arguments`` the
request from which the identity follows, and what may change (the locations of data set and base model, the few-shot setting);
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
from semantic_aug.diffusion.license import license_of
from semantic_aug.diffusion.schedulers import SolverSettings
from semantic_aug.errors import UserError
from semantic_aug.files import write_text
from semantic_aug.sampling.folder import CONFIG_FILE, REMEDY, Records, has_images, recorded_identity
from semantic_aug.sampling.folder import DATA as IMAGES
from semantic_aug.sampling.guide import write_guide
from semantic_aug.sampling.identity import DATA, arguments_of
from semantic_aug.sampling.masks import columns_of
from semantic_aug.sampling.settings import ImageSettings
from semantic_aug.sampling.subset import PlannedSubset

log = logging.getLogger(__name__)

ARGUMENTS, MADE_WITH, RUNS, LICENSE = "arguments", "made_with", "runs", "base_license"
FOLLOWS = ("images", "plan_sha256", "guide_sha256")
"""Values that follow from others; they are named as different only where no other value is."""
RETIRED = {"guidance_stop": 1.0, "reuse_interval": 1}
"""Settings of earlier versions (``--speed fast`` and ``turbo``), with the values at which they change nothing."""


def warn(subset: PlannedSubset) -> None:
    """Warns of images that cannot be read, of a checkpoint that was trained on other images, and of labels that do not fit
    masked images; none of them stops a run."""
    config, dataset = subset.config, subset.dataset
    if (sources := subset.job.sources) is not None:
        train, pool = np.split(~sources.content.any(axis=1), [len(dataset.train)])
        for kind, images, unreadable in (("training", dataset.train, train), ("unlabelled", dataset.unlabelled, pool)):
            if unreadable.any():
                log.warning(
                    "%d %s images cannot be read ('%s' the first): nothing will be made from them",
                    unreadable.sum(), kind, images.keys[unreadable.argmax()],
                )  # fmt: skip
    path = config.model.lora or config.model.tokens
    then, now = _trained_on(path) if path else {}, subset.identity[DATA]["train"]
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
    """Writes the record of this subset into its folder, unless the folder holds this subset already; see :func:`belongs`. The
    caller holds the lock against other processes that claim it.

    Args:
        alone: no other shard of this subset can be at work.

    Raises:
        UserError: the folder holds a subset made otherwise, or other files.
    """
    folder, dataset, known = subset.folder, subset.dataset, belongs(subset, alone)
    lists = {SOURCES_FILE: (dataset.train.keys, subset.images.values)}
    if dataset.unlabelled is not None:
        lists[UNLABELLED_FILE] = dataset.unlabelled.keys, subset.job.sources.content[len(dataset.train) :]
    for file, (keys, values) in lists.items():  # before the record, without which stage 3 does not ask for them
        if not known or read_sources(folder, file) is None:
            write_sources(folder, keys, values, file)
    write_guide(folder, subset.config.guide)
    if known:
        return
    old, model = recorded_identity(folder) or {}, subset.config.model
    kept = {name: old[name] for name in (MADE_WITH, RUNS) if name in old and has_images(folder)}
    record = subset.identity | {ARGUMENTS: arguments_of(subset.config), LICENSE: license_of(model.name, model.folder)}
    record[MADE_WITH] = {"versions": runs.versions(), "git_revision": runs.git_revision(registry.REPO_ROOT)}
    _write(folder, record | kept)


def belongs(subset: PlannedSubset, alone: bool = True) -> bool:
    """Whether the folder holds this subset; False where it may be claimed. Nothing is written.

    A folder without images may be claimed. So may one whose subset differs only in training images that were replaced, where
    nothing has been made from the old ones and no other run is at work: a damaged file was restored, as its error asks for.

    Raises:
        UserError: the folder holds a subset made otherwise, with what differs, or other files.
    """
    folder = subset.folder
    old = recorded_identity(folder)
    if old is None:
        others = [p.name for p in folder.iterdir() if not p.name.startswith(".")] if folder.exists() else []
        if others:
            raise UserError(
                f"{folder} is not empty ('{sorted(others)[0]}') and holds no {CONFIG_FILE}: nothing was touched; "
                "choose another --output_root"
            )
        return False
    if DATA in old and _compared(old) == subset.identity:
        then = (old.get(MADE_WITH) or {}).get("versions") or {}
        if mixed := "; ".join(runs.differences(then, runs.versions())):
            log.warning("%s was begun with other versions (%s): new files may differ in their last bits", folder, mixed)
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
    replaced = _replaced(old, subset)
    if not (alone and len(replaced) and _unused(subset, replaced)):
        raise UserError(f"{folder} holds a subset made otherwise ({_differences(old, subset)}): {REMEDY}")
    log.warning(
        "%d training images were replaced since this subset was begun ('%s' the first); nothing had been made from them",
        len(replaced),
        subset.dataset.train.keys[replaced[0]],
    )
    return False


def note_run(folder: Path, shard: str, after: int, **how: Any) -> None:
    """Records how a run computes, where it differs from the last run of its shard.

    Args:
        shard: part of the subset that the run makes.
        after: images of this part that earlier runs have made.
        how: whether networks are compiled, the number of processes.
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
    """The compared part of a record, with the values of settings that it lacks."""
    retired = (name for name, value in RETIRED.items() if record.get(name) == value)
    left_out = {ARGUMENTS, MADE_WITH, RUNS, LICENSE, *retired}
    absent = cli.absent_values(ImageSettings, SolverSettings)
    return {**absent, **{name: value for name, value in record.items() if name not in left_out}}


# --------------------------------------------------------------------------------------------------- what has changed


def _recorded_images(old: Mapping[str, Any], folder: Path) -> dict[str, bytes]:
    """The training images of a record and their content hashes, by name; empty where the folder does not have them."""
    keys, values = read_sources(folder) or ([], np.empty((0, 0), np.uint8))
    if content_digest(hex_digits(values)) != (old[DATA].get("train") or {}).get("content"):
        return {}
    return dict(zip(keys, (value.tobytes() for value in values), strict=True))


def _replaced(old: Mapping[str, Any], subset: PlannedSubset) -> np.ndarray:
    """Rows of the training images whose content differs; none where anything else differs too."""
    train, now, before = subset.dataset.train, subset.identity, _recorded_images(old, subset.folder)
    if before.keys() == set(train.keys):
        hashes = [before[key] for key in train.keys]
        split = split_identity(train, (value.hex() for value in hashes), columns_of(now["object_mask"]))
        if {**now, DATA: {**now[DATA], "train": split}} == _compared(old):
            then = np.frombuffer(b"".join(hashes), np.uint8).reshape(len(train), -1)
            return np.flatnonzero((then != subset.images.values).any(axis=1))
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


def _differences(old: Mapping[str, Any], subset: PlannedSubset) -> str:
    """Describes what differs: the data, then the arguments, then everything else."""
    keys = subset.dataset.train.keys
    parts = [data_difference(old[DATA], subset.identity[DATA])]
    before = _recorded_images(old, subset.folder) if parts[0] else {}
    now = dict(zip(keys, (value.tobytes() for value in subset.images.values), strict=True))
    names = [
        *(f"'{key}' is new" for key in now if key not in before),
        *(f"'{key}' is gone" for key in before if key not in now),
        *(f"'{key}' has another content" for key in now if key in before and now[key] != before[key]),
    ]
    if before and names:
        parts[0] += f" ({names[0]}" + (f" and {len(names) - 1} more)" if len(names) > 1 else ")")
    parts += runs.differences(old.get(ARGUMENTS) or {}, arguments_of(subset.config), absent=ABSENT)
    then, now = ({k: v for k, v in d.items() if k != DATA} for d in (_compared(old), subset.identity))
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
    """Describes the difference of one value; of lists, of the first entry that differs."""
    if isinstance(then, list) and isinstance(now, list):
        if len(then) == len(now):
            then, now = next(pair for pair in zip(then, now, strict=True) if pair[0] != pair[1])
        elif max(len(then), len(now)) > 10:
            then, now = f"{len(then)} entries", f"{len(now)} entries"
    return runs.difference(name, then, now)
