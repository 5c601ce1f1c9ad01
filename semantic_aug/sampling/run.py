"""Making one synthetic subset from beginning to end: checks, folder, processes, ``meta.csv``; joining shards; timing."""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from semantic_aug import registry
from semantic_aug.datasets import LoadedDataset
from semantic_aug.datasets.fingerprint import hash_images
from semantic_aug.datasets.synthetic import SOURCES_FILE, UNLABELLED_FILE
from semantic_aug.diffusion.license import license_of, warn_of_license
from semantic_aug.errors import Interrupted, UserError
from semantic_aug.files import locked, no_trace
from semantic_aug.run_lock import lock_folder
from semantic_aug.sampling import identity as identities
from semantic_aug.sampling.config import (
    SampleConfig,
    describe_plan,
    plan_of,
    subset_folder,
    task_paths,
    with_batch_size,
)
from semantic_aug.sampling.files import TaskPaths
from semantic_aug.sampling.folder import (
    CONFIG_FILE,
    DATA,
    MOMENTS,
    Records,
    finished_tasks,
    recorded_identity,
    remove_stale_moments,
    write_meta,
)
from semantic_aug.sampling.guide import GUIDE_FILE, read_guide
from semantic_aug.sampling.job import Job, Task
from semantic_aug.sampling.launcher import STATUS_FILE, Dispatcher, Launcher, Outcome
from semantic_aug.sampling.plan import Guide, Plan, batches_of_shard, repeated_tasks
from semantic_aug.sampling.sources import block_files

log = logging.getLogger(__name__)

BEFORE_RESULTS = (CONFIG_FILE, f"{MOMENTS}/*", STATUS_FILE, SOURCES_FILE, UNLABELLED_FILE, GUIDE_FILE)
"""What a run writes before its first image; see :func:`semantic_aug.files.no_trace`."""

CLAIM_LOCK = ".lock-claim"
TIMED = 3
"""Batches of each process that ``--calibrate`` times, after a first one."""


@dataclass
class Subset:
    """A subset's folder opened for writing: its plan and its finished tasks.

    Attributes:
        config: the request, with the batch size that the folder was begun with.
        identity: what the subset is made from.
        folder: of the subset.
        plan: of all tasks.
        paths: file names.
        batches: numbers of this run's batches, in the order they are made.
        mine: bool ``(T,)``, this run's tasks.
        records: of this run.
        done: bool ``(T,)``, tasks whose file exists.
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
        """Finished images of this run, and all of them."""
        return int((self.mine & self.done).sum()), int(self.mine.sum())

    def job(self) -> Job:
        """What goes to the processes."""
        # the plan has been drawn; masks are still needed
        config = replace(self.config, guide=Guide(objects=self.config.guide.objects))
        return Job(config, self.folder, self.identity.origin, config.compiled(len(self.plan)))

    def close(self) -> None:
        """Writes ``meta.csv``, and removes what only an unfinished subset needs."""
        write_meta(self.folder, self.paths, self.done)
        if self.done.all():
            shutil.rmtree(self.folder / MOMENTS, ignore_errors=True)


@contextlib.contextmanager
def opened(config: SampleConfig, dataset: LoadedDataset) -> Iterator[Subset]:
    """Takes the lock, claims the folder, and finds the finished tasks. Raises UserError: a folder of another subset, or one in
    use."""
    folder, shard = subset_folder(config, dataset), (config.output.num_shards, config.output.shard_index)
    identity, plan = _identified(config, dataset)
    with lock_folder(folder, "--output_root", *shard):
        with locked(folder / CLAIM_LOCK):  # two shards that begin together settle on one batch size and one guide
            begun, kept = with_batch_size(config, dataset), read_guide(folder)
            if kept.origin == config.guide.origin and kept.arrays().keys() == config.guide.arrays().keys():
                begun = replace(begun, guide=kept)
            if begun != config or begun.guide.digest != config.guide.digest:
                config, (identity, plan) = begun, _identified(begun, dataset)
            paths = task_paths(config, dataset, plan)
            identities.claim(folder, identity, paths, config.guide, alone=shard[0] == 1)
        identities.warn(config, identity)
        warn_of_repeats(config, dataset, paths)
        make_folders(folder, paths.folders)
        batches = batches_of_shard(plan, *shard, config.run.seed)
        mine = np.zeros(len(plan), bool)
        for batch in batches:
            mine[slice(*plan.starts[batch : batch + 2])] = True
        records = Records(folder, *shard)
        if shard[0] == 1 and identity.origin.sources is not None:
            remove_stale_moments(folder, block_files(identity.origin.sources, identity.origin.encoder))
        done = finished_tasks(folder, paths, records, mine, content=config.output.verify == "content")
        yield Subset(
            config, identity, folder, plan, paths=paths, batches=batches, mine=mine, records=records, done=done
        )


def _identified(config: SampleConfig, dataset: LoadedDataset) -> tuple[identities.Identity, Plan]:
    plan = plan_of(config, dataset)
    return identities.identity_of(config, dataset, plan, hash_images(dataset.train)), plan


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
    print(
        f"{len(placement.devices)} process(es): {' '.join(placement.devices)}; {placement.dtype}, batches of "
        f"{placement.batch_size}"
    )
    warn_of_license(model.name, license_of(model.name, model.folder))
    if config.run.dry_run:
        check(config, dataset)
        print(describe_plan(config, dataset))
        if config.output.calibrate:
            print(calibrate(config, dataset))
        return
    folder = (merge if config.output.merge else make)(config, dataset)
    key, config_dir = config.output.register_key, config.run.config_dir
    entry = registry.shown_path(folder)
    print(f"subset: {entry}\nto use it, add to {registry.shown_path(config_dir / registry.SUBSETS)}:")
    print(registry.to_yaml({dataset.name: {key or default_key(config): entry}}), end="")
    if key and registry.register(registry.SUBSETS, dataset.name, key, entry, config_dir):
        print(f"registered as {dataset.name}/{key}")


def default_key(config: SampleConfig) -> str:
    """The registry key offered for a subset, e.g. ``5shot_diffmix_0.7``."""
    parts = [config.setting.suffix.lstrip("_"), config.strategy.name.replace("-", ""), config.strength_label]
    return "_".join(part for part in parts if part)


def check(config: SampleConfig, dataset: LoadedDataset) -> None:
    """Checks for ``--dry_run`` what a run finds out: installs the class tokens in the base model without its weights, and
    compares the folder. Raises UserError: tokens of another base model, a folder of another subset."""
    from semantic_aug.diffusion import tokens
    from semantic_aug.diffusion.base import load_skeleton

    base = load_skeleton(config.model.name, config.model.folder)
    if config.model.tokens is not None:
        tokens.install_all(tokens.load_tokens(config.model.tokens), base.tokenizers, base.text_encoders)
    check_folder(config, dataset)


def check_folder(config: SampleConfig, dataset: LoadedDataset) -> None:
    """Checks for ``--dry_run`` what a run checks before its processes start; nothing is written. Raises UserError: the folder
    holds another subset (says what differs)."""
    identity, plan = _identified(config, dataset)
    paths = task_paths(config, dataset, plan)
    identities.belongs(subset_folder(config, dataset), identity, paths)
    identities.warn(config, identity)
    warn_of_repeats(config, dataset, paths)


def warn_of_repeats(config: SampleConfig, dataset: LoadedDataset, paths: TaskPaths) -> None:
    """Tells of images that come out identical, since a strategy that starts from two inverted images draws nothing more."""
    plan, prompts = paths.plan, []
    if plan.partner is None:
        return
    if len(paths.templates) > 1:
        prompts.append(np.array([paths.template(n) for n in range(len(plan))]))
    if plan.context is not None and round(config.images.context_steps * config.solver.num_inference_steps):
        prompts.append(plan.context)
    if repeated := repeated_tasks(plan, prompts):
        log.warning(
            "%d of %d images repeat another one, with the same two photographs, position and prompt: lower "
            "--syn_dataset_multiplier, or give --contexts or --prompt_templates", repeated, len(plan),
        )  # fmt: skip
    single = np.flatnonzero(np.bincount(dataset.train.labels) == 1)
    if config.strategy.pairing == "same" and len(single):
        names = ", ".join(f"'{dataset.source_names[label]}'" for label in single[:5]) + ", ..." * (len(single) > 5)
        log.warning(
            "%d classes have one training image each (%s), between which and itself %s makes nothing new: raise "
            "--examples_per_class", len(single), names, config.strategy.name,
        )  # fmt: skip


def make(config: SampleConfig, dataset: LoadedDataset) -> Path:
    """Makes (what is missing of) the subset and writes ``meta.csv``; returns the subset's folder.

    Raises:
        UserError: a folder of another subset or in use, weights that do not fit, sources that cannot be read.
        Interrupted: stopped by a signal; everything made so far is in place and listed.
    """
    folder = subset_folder(config, dataset)
    with no_trace(folder, BEFORE_RESULTS), opened(config, dataset) as subset:
        missing = subset.mine & ~subset.done

        def on_rows(rows: Sequence[tuple[int, int, int]]) -> None:
            for number, size, _ in rows:
                name = subset.paths.relative(number)
                if (subset.folder / DATA / name).stat().st_size != size:
                    raise UserError(f"{name} changed while it was written: another process works in {subset.folder}")
            subset.records.append(rows)
            subset.done[[row[0] for row in rows]] = True

        finished, wanted = subset.count()
        if finished:
            log.info("%s: %d of %d images exist, %d to make", subset.folder, finished, wanted, wanted - finished)
        job = subset.job()
        launcher = make_launcher(
            job, lambda batch: image_tasks(subset.plan.numbers(batch), subset.paths, missing), on_rows, wanted, finished
        )
        if missing.any():
            with locked(subset.folder / CLAIM_LOCK):
                shard = f"{config.output.shard_index} of {config.output.num_shards}"
                how = {"compiled": job.compiled, "processes": len(config.placement.devices)}
                identities.note_run(subset.folder, shard, finished, **how)
        try:
            outcome = launcher.run([b for b in subset.batches if missing[slice(*subset.plan.starts[b : b + 2])].any()])
        except UserError:
            with contextlib.suppress(OSError):  # on a full disk the first error is the one to report
                subset.close()
            raise
        subset.close()
    return _conclude(subset, outcome)


def merge(config: SampleConfig, dataset: LoadedDataset) -> Path:
    """Joins and checks what shards made: verifies every file, writes ``meta.csv``, reports what is missing. Raises UserError:
    shards are still at work, or images are missing."""
    folder = subset_folder(config, dataset)
    if recorded_identity(folder) is None:
        raise UserError(f"--merge: {folder} holds no subset; run the shards first, or correct --output_root")
    with opened(config, dataset) as subset:
        subset.close()
        finished, wanted = subset.count()
    if finished < wanted:
        raise UserError(
            f"{subset.folder}: {finished} of {wanted} images are there and listed in meta.csv, number "
            f"{int(np.flatnonzero(~subset.done)[0])} is the first missing one: run the shards again, or the command without "
            "--num_shards"
        )
    log.info("%s: all %d images are there and listed in meta.csv", subset.folder, wanted)
    return subset.folder


def calibrate(config: SampleConfig, dataset: LoadedDataset) -> str:
    """Times a few batches on the given processes, saving included, and says how long the whole will take.

    Nothing is written into the subset's folder.
    """
    devices, (identity, plan) = config.placement.devices, _identified(config, dataset)
    paths, everything = task_paths(config, dataset, plan), np.ones(len(plan), bool)
    with tempfile.TemporaryDirectory(prefix="calibrate-") as temporary:
        folder = Path(temporary) / "calibration"
        make_folders(folder, paths.folders)
        launcher = make_launcher(
            Job(config, folder, identity.origin, config.compiled(len(plan))),
            lambda batch: image_tasks(plan.numbers(batch), paths, everything),
            lambda rows: None,
            len(plan),
            0,
        )
        launcher.run(batches_of_shard(plan, 1, 0, config.run.seed)[: (TIMED + 1) * len(devices)])
        size = sum(path.stat().st_size for path in folder.rglob(f"*.{config.images.image_format}"))
    rate, written = launcher.steady_rate(), launcher.outcome.written
    if not rate:
        return f"too few batches to time ({plan.num_batches} in all): the whole is done in moments"
    shards = config.output.num_shards
    shard = -(-len(plan) // shards)
    return (
        f"measured {rate:.3g} images/s with {len(devices)} process(es), saving included: "
        f"{len(plan) / rate / 3600:.2f} hours for all {len(plan)} images, {shard / rate / 3600:.2f} hours for one of "
        f"{shards} shard(s); {size / written * len(plan) / 1e6:,.0f} MB of disk"
    )


def make_launcher(job: Job, tasks_of: Callable, on_rows: Callable, total: int, already: int) -> Dispatcher:
    """The engine a request names; see :class:`Dispatcher` for the arguments."""
    if job.config.placement.engine == "ray":
        from semantic_aug.sampling.ray_engine import RayLauncher

        return RayLauncher(job, tasks_of, on_rows, total, already)
    return Launcher(job, tasks_of, on_rows, total, already)


def image_tasks(batch_numbers: Sequence[int], paths: TaskPaths, missing) -> list[Task]:
    """The tasks of one batch; those that are not missing go along without a path."""
    plan = paths.plan
    return [
        Task(
            number=n,
            source=int(plan.source[n]),
            target=int(plan.target[n]),
            strength=plan.strength(n),
            path=paths.relative(n) if missing[n] else None,
            text=paths.text(n) if missing[n] else {},
            template=paths.template(n),
            context=paths.context(n),
            partner=-1 if plan.partner is None else int(plan.partner[n]),
        )
        for n in batch_numbers
    ]


def make_folders(folder: Path, folders: Sequence[str]) -> None:
    """The class folders under ``data/``."""
    for name in folders:
        (folder / DATA / name).mkdir(parents=True, exist_ok=True)


def _conclude(subset: Subset, outcome: Outcome) -> Path:
    folder, written, (finished, wanted) = subset.folder, outcome.written, subset.count()
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
        batch, why = next(iter(outcome.set_aside.items()))
        raise UserError(
            f"{len(outcome.set_aside)} batches failed three times, batch {batch} the first ({why}); the others are in "
            f"{folder}; the same command tries them again"
        )
    return folder
