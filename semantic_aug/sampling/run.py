"""Making one synthetic subset from beginning to end: checks, folder, processes, ``meta.csv``; joining shards; timing."""

from __future__ import annotations

import contextlib
import itertools
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from semantic_aug import registry
from semantic_aug.datasets import LoadedDataset
from semantic_aug.datasets.synthetic import SOURCES_FILE, UNLABELLED_FILE
from semantic_aug.diffusion.license import license_of, warn_of_license
from semantic_aug.errors import Interrupted, UserError
from semantic_aug.files import locked, no_trace
from semantic_aug.run_lock import lock_folder
from semantic_aug.sampling import claim as claims
from semantic_aug.sampling import folder as store
from semantic_aug.sampling.config import SampleConfig, with_batch_size
from semantic_aug.sampling.guide import GUIDE_FILE, read_guide
from semantic_aug.sampling.job import Job, Task
from semantic_aug.sampling.launcher import STATUS_FILE, Dispatcher, Launcher, Outcome
from semantic_aug.sampling.plan import batches_of_shard
from semantic_aug.sampling.sources import block_files
from semantic_aug.sampling.subset import PlannedSubset, describe, plan_subset, warn_of_repeats

log = logging.getLogger(__name__)

BEFORE_RESULTS = (store.CONFIG_FILE, f"{store.MOMENTS}/*", STATUS_FILE, SOURCES_FILE, UNLABELLED_FILE, GUIDE_FILE)
"""What a run writes before its first image; see :func:`semantic_aug.files.no_trace`."""

CLAIM_LOCK = ".lock-claim"
TIMED = 3
"""Batches of each process that ``--calibrate`` times, after a first one."""


@dataclass
class OpenedSubset:
    """A subset's folder opened for writing.

    Attributes:
        planned: request, plan and file names, with the batch size that the folder was begun with.
        batches: numbers of this run's batches, in the order they are made.
        mine: bool ``(T,)``, this run's tasks.
        records: of this run.
        done: bool ``(T,)``, tasks whose file exists.
    """

    planned: PlannedSubset
    batches: np.ndarray
    mine: np.ndarray
    records: store.Records
    done: np.ndarray

    def count(self) -> tuple[int, int]:
        """Finished images of this run, and all of them."""
        return int((self.mine & self.done).sum()), int(self.mine.sum())

    def close(self) -> None:
        """Writes ``meta.csv``, and removes what only an unfinished subset needs."""
        store.write_meta(self.planned.folder, self.planned.paths, self.done)
        if self.done.all():
            shutil.rmtree(self.planned.folder / store.MOMENTS, ignore_errors=True)


@contextlib.contextmanager
def opened(subset: PlannedSubset) -> Iterator[OpenedSubset]:
    """Takes the lock, claims the folder, and finds the finished tasks. Raises UserError: a folder of another subset, or one in
    use."""
    folder, output = subset.folder, subset.config.output
    shard = output.num_shards, output.shard_index
    with lock_folder(folder, "--output_root", *shard):
        with locked(folder / CLAIM_LOCK):  # two shards that begin together settle on one batch size and one guide
            subset = as_begun(subset)
            claims.claim(subset, alone=shard[0] == 1)
        claims.warn(subset)
        warn_of_repeats(subset)
        batches = batches_of_shard(subset.plan, *shard, subset.config.run.seed)
        mine = np.zeros(len(subset.plan), bool)
        for batch in batches:
            mine[slice(*subset.plan.starts[batch : batch + 2])] = True
        records, job = store.Records(folder, *shard), subset.job
        if shard[0] == 1 and job.sources is not None:
            usable = set(block_files(job.sources, job.encoder))  # not what dead processes left half written
            for path in (folder / store.MOMENTS).glob("*"):
                if path.name not in usable:
                    path.unlink(missing_ok=True)
        done = store.finished_tasks(folder, subset.paths, records, mine, content=output.verify == "content")
        yield OpenedSubset(subset, batches, mine, records, done)


def as_begun(subset: PlannedSubset) -> PlannedSubset:
    """The subset with the batch size and the guide that another shard has begun its folder with meanwhile."""
    config, kept = subset.config, read_guide(subset.folder)
    begun = with_batch_size(config, subset.dataset)
    if kept.origin == config.guide.origin and kept.arrays().keys() == config.guide.arrays().keys():
        begun = replace(begun, guide=kept)
    same = begun == config and begun.guide.digest == config.guide.digest
    return subset if same else plan_subset(begun, subset.dataset)


def run(config: SampleConfig, dataset: LoadedDataset) -> None:
    """Does what a request asks for, makes, merges or only checks, and prints it.

    Raises:
        UserError: see :func:`check`, :func:`make` and :func:`merge`.
        Interrupted: stopped by a signal.
    """
    model, placement = config.model, config.placement
    print(dataset.describe())
    print(f"recipe {config.run.recipe}")
    print(f"base model {model.name}, LoRA {model.lora}, tokens {model.tokens}")
    if config.few_steps:
        solver, strengths = config.solver, ", ".join(f"{strength:.3g}" for strength in config.strengths)
        print(
            f"few steps: {solver.scheduler}, {solver.num_inference_steps} steps, guidance {solver.guidance_scale:g}; strengths "
            f"{strengths}"
        )
    processes = f"{len(placement.devices)} process(es): {' '.join(placement.devices)}; "
    print(f"{'' if config.output.merge else processes}{placement.dtype}, batches of {placement.batch_size}")
    warn_of_license(model.name, license_of(model.name, model.folder))
    subset = plan_subset(config, dataset)
    if config.run.dry_run:
        check(subset)
        print(describe(subset))
        if config.output.calibrate:
            print(calibrate(subset))
        return
    folder = (merge if config.output.merge else make)(subset)
    key, config_dir, entry = config.output.register_key, config.run.config_dir, registry.shown_path(folder)
    parts = config.setting.suffix.lstrip("_"), config.strategy.name.replace("-", ""), config.strength_label
    offered = key or "_".join(filter(None, parts))  # such as 5shot_diffmix_0.7
    print(f"subset: {entry}\nto use it, add to {registry.shown_path(config_dir / registry.SUBSETS)}:")
    print(registry.to_yaml({dataset.name: {offered: entry}}), end="")
    if key and registry.register(registry.SUBSETS, dataset.name, key, entry, config_dir):
        print(f"registered as {dataset.name}/{key}")


def check(subset: PlannedSubset) -> None:
    """Checks for ``--dry_run`` what a run finds out before its processes start: installs the class tokens in the base model
    without its weights, and compares the folder; nothing is written.

    Raises:
        UserError: tokens of another base model, a folder of another subset.
    """
    from semantic_aug.diffusion import tokens
    from semantic_aug.diffusion.base import load_skeleton

    model = subset.config.model
    base = load_skeleton(model.name, model.folder)
    if model.tokens is not None:
        tokens.install(tokens.load_tokens(model.tokens), base.tokenizers, base.text_encoders)
    claims.belongs(subset)
    claims.warn(subset)
    warn_of_repeats(subset)


def make(subset: PlannedSubset) -> Path:
    """Makes (what is missing of) the subset and writes ``meta.csv``; returns the subset's folder.

    Raises:
        UserError: a folder of another subset or in use, weights that do not fit, sources that cannot be read.
        Interrupted: stopped by a signal; everything made so far is in place and listed.
    """
    with no_trace(subset.folder, BEFORE_RESULTS), opened(subset) as run:
        subset, missing = run.planned, run.mine & ~run.done
        folder = subset.folder

        def on_rows(rows: Sequence[tuple[int, int, int]]) -> None:
            for number, size, _ in rows:
                name = subset.paths.relative(number)
                if (folder / store.DATA / name).stat().st_size != size:
                    raise UserError(f"{name} changed while it was written: another process works in {folder}")
            run.records.append(rows)
            run.done[[row[0] for row in rows]] = True

        finished, wanted = run.count()
        if finished:
            log.info("%s: %d of %d images exist, %d to make", folder, finished, wanted, wanted - finished)
        job = subset.job
        launcher = make_launcher(job, lambda batch: subset.tasks(batch, missing), on_rows, wanted, finished)
        if missing.any():
            with locked(folder / CLAIM_LOCK):
                shard = f"{job.config.output.shard_index} of {job.config.output.num_shards}"
                how = {"compiled": job.compiled, "processes": len(job.config.placement.devices)}
                claims.note_run(folder, shard, finished, **how)
        try:
            outcome = launcher.run([b for b in run.batches if missing[slice(*subset.plan.starts[b : b + 2])].any()])
        except UserError:
            with contextlib.suppress(OSError):  # on a full disk the first error is the one to report
                run.close()
            raise
        run.close()
    return _conclude(run, outcome)


def merge(subset: PlannedSubset) -> Path:
    """Joins and checks what shards made: verifies every file, writes ``meta.csv``, reports what is missing. Raises UserError:
    shards are still at work, or images are missing."""
    folder = subset.folder
    if store.recorded_identity(folder) is None:
        raise UserError(f"--merge: {folder} holds no subset; run the shards first, or correct --output_root")
    with opened(subset) as run:
        run.close()
        finished, wanted = run.count()
    if finished < wanted:
        raise UserError(
            f"{folder}: {finished} of {wanted} images exist and are listed in meta.csv, number "
            f"{int(np.flatnonzero(~run.done)[0])} is the first missing one: run the shards again, or the command without "
            "--num_shards"
        )
    log.info("%s: all %d images exist and are listed in meta.csv", folder, wanted)
    return folder


def calibrate(subset: PlannedSubset) -> str:
    """Times a few batches on the given processes, saving included, and says how long the whole will take.

    Nothing is written into the subset's folder.
    """
    config, plan = subset.config, subset.plan
    batches = batches_of_shard(plan, 1, 0, config.run.seed)[: (TIMED + 1) * len(config.placement.devices)]
    with tempfile.TemporaryDirectory(prefix="calibrate-") as temporary:
        job = replace(subset.job, folder=Path(temporary) / "calibration")
        launcher = make_launcher(job, timed_tasks(subset), lambda rows: None, len(plan), 0)
        launcher.together = config.placement.engine == "mp"  # a cluster may have room for some of the actors only
        outcome = launcher.run(batches)
        size = sum(path.stat().st_size for path in job.folder.rglob(f"*.{config.images.image_format}"))
    if outcome.interrupted:
        raise Interrupted("interrupted: nothing was measured")
    if outcome.set_aside:
        raise UserError(f"nothing was measured: {_failed(outcome)}")
    rate, written = launcher.steady_rate(), outcome.written
    if not rate:
        return (
            f"too few batches to time: {written} of {len(plan)} images took {outcome.seconds:.0f} s, loading included"
        )
    shards = config.output.num_shards
    shard = -(-len(plan) // shards)
    return (
        f"measured {rate:.3g} images/s with {len(launcher.marks)} process(es), saving included: "
        f"{len(plan) / rate / 3600:.2f} hours for all {len(plan)} images, {shard / rate / 3600:.2f} hours for one of "
        f"{shards} shard(s); {size / written * len(plan) / 1e6:,.0f} MB of disk"
    )


def timed_tasks(subset: PlannedSubset) -> Callable[[int], list[Task]]:
    """The tasks of a batch for :func:`calibrate`.

    Every source is encoded once. So sources come one after the other, new ones as often as in the whole plan; at the beginning
    of the plan itself, nearly every task would wait for a block of them to be encoded.
    """
    plan, count = subset.plan, itertools.count()
    used = np.unique(plan.source)

    def tasks(batch: int) -> list[Task]:
        planned = subset.tasks(batch, np.ones(len(plan), bool))
        return [replace(task, source=int(used[next(count) * len(used) // len(plan) % len(used)])) for task in planned]

    return tasks


def make_launcher(job: Job, *arguments) -> Dispatcher:
    """The engine that a request names; see :class:`Dispatcher` for the arguments."""
    if job.config.placement.engine == "ray":
        from semantic_aug.sampling.ray_engine import RayLauncher

        return RayLauncher(job, *arguments)
    return Launcher(job, *arguments)


def _conclude(run: OpenedSubset, outcome: Outcome) -> Path:
    folder, written, (finished, wanted) = run.planned.folder, outcome.written, run.count()
    rate = f", {written / outcome.seconds:.2f} images/s" if written and outcome.seconds else ""
    seconds = f"{outcome.seconds:.0f} s{rate}"
    log.info("%s: %d of %d images (%d made now in %s)", folder, finished, wanted, written, seconds)
    if outcome.interrupted:
        raise Interrupted(
            f"interrupted: {finished} of {wanted} images are in {folder}; the same command makes the rest"
        )
    if outcome.unreadable:
        number, why = next(iter(outcome.unreadable.items()))
        raise UserError(
            f"{len(outcome.unreadable)} images could not be made, number {number} the first: {why}; the others are in {folder}"
        )
    if outcome.set_aside:
        raise UserError(f"{_failed(outcome)}; the others are in {folder}; the same command tries them again")
    return folder


def _failed(outcome: Outcome) -> str:
    batch, why = next(iter(outcome.set_aside.items()))
    return f"{len(outcome.set_aside)} batches failed three times, batch {batch} the first ({why})"
