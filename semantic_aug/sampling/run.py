"""Making one synthetic subset from beginning to end: folder, processes, ``meta.csv``; joining shards; timing a few."""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from semantic_aug.augmentations.request import ClassNames
from semantic_aug.datasets import LoadedDataset
from semantic_aug.datasets.fingerprint import hash_images
from semantic_aug.errors import Interrupted, UserError
from semantic_aug.files import locked, no_trace
from semantic_aug.runs import RunLock
from semantic_aug.sampling import identity as identities
from semantic_aug.sampling import store
from semantic_aug.sampling.config import SampleConfig, plan_of, subset_folder, task_paths, with_batch_size
from semantic_aug.sampling.dispatch import STATUS_FILE, Dispatcher, Outcome
from semantic_aug.sampling.files import TaskPaths
from semantic_aug.sampling.job import Job
from semantic_aug.sampling.launcher import Launcher, image_tasks, make_folders
from semantic_aug.sampling.plan import Plan, batches_of_shard
from semantic_aug.sampling.records import Records
from semantic_aug.sampling.sources import block_files

log = logging.getLogger(__name__)

BEFORE_RESULTS = (store.CONFIG_FILE, f"{store.MOMENTS}/*", STATUS_FILE, ".sources.npz")
"""What a run writes before its first image; see :func:`semantic_aug.files.no_trace`."""

CLAIM_LOCK = ".lock-claim"


@dataclass
class Subset:
    """A subset's folder opened for writing: what is planned, what is there.

    Attributes:
        config: the request, with the batch size that the folder was begun with.
        identity: what the subset is made from.
        folder: of the subset.
        plan: of all tasks.
        paths: file names.
        batches: numbers of this run's batches, in the order they are made.
        mine: bool ``(T,)``, this run's tasks.
        records: of this run.
        done: bool ``(T,)``, tasks whose file is there.
    """

    config: SampleConfig
    identity: identities.Identity
    folder: Path
    plan: Plan
    paths: TaskPaths
    batches: np.ndarray
    mine: np.ndarray
    records: Records
    done: np.ndarray

    def count(self) -> tuple[int, int]:
        """Images of this run that are there, and all of them."""
        return int((self.mine & self.done).sum()), int(self.mine.sum())

    def close(self) -> None:
        """Writes ``meta.csv``, and removes what only an unfinished subset needs."""
        store.write_meta(self.folder, self.paths, self.done)
        if self.done.all():
            shutil.rmtree(self.folder / store.MOMENTS, ignore_errors=True)


@contextlib.contextmanager
def opened(config: SampleConfig, dataset: LoadedDataset, content: bool = False) -> Iterator[Subset]:
    """Takes the lock, claims the folder, and finds what is there.

    Args:
        config: the request.
        dataset: loaded under ``config.setting``.
        content: compare checksums of the files that are there.

    Raises:
        UserError: a folder of another subset, or in use.
    """
    folder, identity, plan = subset_folder(config, dataset), *_identified(config, dataset)
    with RunLock(folder, "--output_root", config.num_shards, config.shard_index):
        with locked(folder / CLAIM_LOCK):  # two shards that begin together settle on one batch size
            begun = with_batch_size(config, dataset)
            if begun != config:
                config, (identity, plan) = begun, _identified(begun, dataset)
            paths = task_paths(config, dataset, plan)
            identities.claim(folder, identity, paths, alone=config.num_shards == 1)
        identities.warn(config, identity)
        make_folders(folder, dataset.folders)
        batches = batches_of_shard(plan, config.num_shards, config.shard_index, config.seed)
        mine = np.zeros(len(plan), bool)
        for batch in batches:
            mine[slice(*plan.starts[batch : batch + 2])] = True
        records = Records(folder, config.num_shards, config.shard_index)
        if config.num_shards == 1 and identity.sources is not None:
            store.remove_stale_moments(folder, block_files(identity.sources, identity.encoder))
        done = store.finished(folder, paths, records, mine, content)
        yield Subset(config, identity, folder, plan, paths, batches, mine, records, done)


def _identified(config: SampleConfig, dataset: LoadedDataset) -> tuple[identities.Identity, Plan]:
    plan = plan_of(config, dataset)
    return identities.identity_of(config, dataset, plan, hash_images(dataset.train)), plan


def check_folder(config: SampleConfig, dataset: LoadedDataset) -> None:
    """Checks for ``--dry_run`` what a run checks before its processes start; nothing is written.

    Raises:
        UserError: the folder holds another subset (says what differs).
    """
    identity, plan = _identified(config, dataset)
    identities.belongs(subset_folder(config, dataset), identity, task_paths(config, dataset, plan))
    identities.warn(config, identity)


def run(config: SampleConfig, dataset: LoadedDataset, verify: str = "size") -> Path:
    """Makes (what is missing of) the subset and writes ``meta.csv``.

    Args:
        config: the request.
        dataset: loaded under ``config.setting``.
        verify: how files that are there are checked: by ``size`` or by ``content``.

    Returns:
        The subset's folder.

    Raises:
        UserError: a folder of another subset or in use, weights that do not fit, sources that cannot be read.
        Interrupted: stopped by a signal; everything made so far is in place and listed.
    """
    folder = subset_folder(config, dataset)
    with no_trace(folder, BEFORE_RESULTS), opened(config, dataset, verify == "content") as subset:
        missing = subset.mine & ~subset.done

        def on_rows(rows: Sequence[tuple[int, int, int]]) -> None:
            for number, size, _ in rows:
                name = subset.paths.relative(number)
                if (subset.folder / store.DATA / name).stat().st_size != size:
                    raise UserError(f"{name} changed while it was written: another process works in {subset.folder}")
            subset.records.append(rows)
            subset.done[[row[0] for row in rows]] = True

        there, wanted = subset.count()
        if there:
            log.info("%s: %d of %d images are there, %d to make", subset.folder, there, wanted, wanted - there)
        job = job_of(subset.config, dataset, subset.folder, subset.identity, len(subset.plan))
        launcher = make_launcher(
            config,
            job,
            lambda batch: image_tasks(subset.plan.numbers(batch), subset.paths, missing),
            on_rows,
            wanted,
            there,
        )
        if missing.any():
            with locked(subset.folder / CLAIM_LOCK):
                shard = f"{config.shard_index} of {config.num_shards}"
                how = {"compiled": job.compiled_batch is not None, "processes": len(config.devices)}
                identities.note_run(subset.folder, shard, there, **how)
        try:
            outcome = launcher.run([b for b in subset.batches if missing[slice(*subset.plan.starts[b : b + 2])].any()])
        except UserError:
            with contextlib.suppress(OSError):  # on a full disk the first error is the one to tell
                subset.close()
            raise
        subset.close()
    return _conclude(subset, outcome)


def merge(config: SampleConfig, dataset: LoadedDataset, verify: str = "size") -> Path:
    """Joins and checks what shards made: verifies every file, writes ``meta.csv``, says what is missing.

    Raises:
        UserError: shards are still at work, or images are missing.
    """
    folder = subset_folder(config, dataset)
    if store.recorded_identity(folder) is None:
        raise UserError(f"--merge: {folder} holds no subset; run the shards first, or mend --output_root")
    with opened(config, dataset, verify == "content") as subset:
        subset.close()
        there, wanted = subset.count()
    if there < wanted:
        raise UserError(
            f"{subset.folder}: {there} of {wanted} images are there and listed in meta.csv, number "
            f"{int(np.flatnonzero(~subset.done)[0])} is the first missing one: run the shards again, or the command without "
            "--num_shards"
        )
    log.info("%s: all %d images are there and listed in meta.csv", subset.folder, wanted)
    return subset.folder


def calibrate(config: SampleConfig, dataset: LoadedDataset, batches_each: int = 3) -> str:
    """Times a few batches on the given processes, saving included, and says how long the whole will take.

    Nothing is written into the subset's folder.
    """
    identity, plan = _identified(config, dataset)
    paths, everything = task_paths(config, dataset, plan), np.ones(len(plan), bool)
    with tempfile.TemporaryDirectory(prefix="calibrate-") as place:
        folder = Path(place) / "calibration"
        make_folders(folder, dataset.folders)
        launcher = make_launcher(
            config,
            job_of(config, dataset, folder, identity, len(plan)),
            lambda batch: image_tasks(plan.numbers(batch), paths, everything),
            lambda rows: None,
            len(plan),
            0,
        )
        launcher.run(batches_of_shard(plan, 1, 0, config.seed)[: (batches_each + 1) * len(config.devices)])
        size = sum(path.stat().st_size for path in folder.rglob(f"*.{config.image_format}"))
    rate, made = launcher.steady_rate(), launcher.outcome.made
    if not rate:
        return f"too few batches to time ({plan.num_batches} in all): the whole is done in moments"
    shard = -(-len(plan) // config.num_shards)
    return (
        f"measured {rate:.3g} images/s with {len(config.devices)} process(es), saving included: "
        f"{len(plan) / rate / 3600:.2f} hours for all {len(plan)} images, {shard / rate / 3600:.2f} hours for one of "
        f"{config.num_shards} shard(s); {size / made * len(plan) / 1e6:,.0f} MB of disk"
    )


def make_launcher(
    config: SampleConfig, job: Job, tasks_of: Callable, on_rows: Callable, total: int, already: int
) -> Dispatcher:
    """The engine a request names; see :class:`Dispatcher` for the arguments."""
    if config.engine == "ray":
        from semantic_aug.sampling.ray_engine import RayLauncher

        return RayLauncher(
            job, config.devices, tasks_of, on_rows, total, already, config.worker_timeout, address=config.ray_address
        )
    return Launcher(job, config.devices, tasks_of, on_rows, total, already, config.worker_timeout)


def job_of(
    config: SampleConfig, dataset: LoadedDataset, folder: Path, identity: identities.Identity, images: int
) -> Job:
    """What the processes are told.

    Args:
        config: the request.
        dataset: loaded under ``config.setting``.
        folder: that gets the images.
        identity: of the subset.
        images: of the whole subset.
    """
    return Job(
        folder=folder,
        dataset=config.dataset,
        setting=config.setting,
        config_dir=config.config_dir,
        files=config.files,
        classes=ClassNames(dataset.source_names, dataset.class_names, dataset.spec.super_class),
        solver=config.solver,
        resolution=config.resolution,
        dtype=config.dtype,
        template=config.template,
        templates=config.templates,
        object_mask=config.object_mask,
        from_noise=config.strategy.start == "noise",
        seed=config.seed,
        cpu_threads=config.cpu_threads,
        image_format=config.image_format,
        compiled_batch=config.batch_size if config.compiled(images) else None,
        sources=identity.sources,
        encoder=identity.encoder,
        weights=identity.weights,
    )


def _conclude(subset: Subset, outcome: Outcome) -> Path:
    folder, made, (there, wanted) = subset.folder, outcome.made, subset.count()
    rate = f", {made / outcome.seconds:.2f} images/s" if made and outcome.seconds else ""
    log.info("%s: %d of %d images (%d made now in %.0f s%s)", folder, there, wanted, made, outcome.seconds, rate)
    if outcome.interrupted:
        raise Interrupted(f"interrupted: {there} of {wanted} images are in {folder}; the same command makes the rest")
    if outcome.unreadable:
        number, why = next(iter(outcome.unreadable.items()))
        raise UserError(
            f"{len(outcome.unreadable)} images could not be made, number {number} the first: {why}; the others are in {folder}"
        )
    if outcome.set_aside:
        batch, why = next(iter(outcome.set_aside.items()))
        raise UserError(
            f"{len(outcome.set_aside)} batches failed three times, batch {batch} the first ({why}); the others are in "
            f"{folder}; the same command tries them again"
        )
    return folder
