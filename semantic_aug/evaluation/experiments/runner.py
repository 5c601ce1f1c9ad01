"""Runs the steps of one pair (setting, seed): each a subprocess, skipped when done, its command and time recorded."""

import contextlib
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from semantic_aug import files, registry, runs
from semantic_aug.datasets import LoadedDataset, Setting, load_dataset
from semantic_aug.datasets.fingerprint import files_digest
from semantic_aug.datasets.origin import RunOrigin
from semantic_aug.datasets.spec import SPLITS
from semantic_aug.datasets.synthetic import DATA
from semantic_aug.datasets.table import refuse_damaged
from semantic_aug.errors import EXIT_INTERRUPTED, Interrupted, UserError, end_with_parent, signals_to
from semantic_aug.evaluation.experiments.commands import SCRIPTS, StageCommands, Step

log = logging.getLogger(__name__)

STEPS_FILE = "steps.json"
LOGS = "logs"
OTHER_FLAGS = (
    "; with other flags, a corrected --stageN_args among them, it is another request: give another --output_dir"
)
MADE_FROM = "made_from"
"""Folder of a pair with the records of its images and its base model."""
COPIED = (registry.DATASETS, registry.RECIPES)
"""Files of ``--config_dir`` that are copied into the pair's registry folder."""


@contextlib.contextmanager
def pair_lock(folder: Path) -> Iterator[int | None]:
    """Holds a pair for this process; gives the lock's file descriptor, or None where another process holds it.

    A child that inherits the descriptor keeps the pair locked until it has ended too, whatever becomes of its parent.
    """
    with contextlib.ExitStack() as held:
        try:
            handle = held.enter_context(files.locked(folder / ".lock", wait=False))
        except files.LockHeld:
            yield None
            return
        yield handle.fileno()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """A context in which SIGTERM and SIGHUP interrupt as SIGINT does, so that a child is stopped with its parent. Raises
    Interrupted: one of them came."""

    def stop(*_):
        raise KeyboardInterrupt

    # nohup ignores SIGHUP on purpose; that background jobs of a shell ignore SIGINT is inherited, and undone here
    kinds = [signal.SIGINT, signal.SIGTERM]
    kinds += [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []
    with signals_to(stop, *kinds):
        try:
            yield
        except KeyboardInterrupt:
            raise Interrupted("interrupted: what is done is kept; the same command resumes from there") from None


def _prepare_child() -> None:
    """In the child, before it becomes the command: accepts SIGINT again, and is terminated when its parent dies."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs inherit that it is ignored
    end_with_parent(signal.SIGTERM)


def run_command(
    arguments: Iterable[str], log_file: Path, environment: Mapping[str, str], held: int | None = None
) -> int:
    """Runs ``python ARGUMENTS`` from the repository's root, its output appended to a file; returns its exit status. Raises
    KeyboardInterrupt: this process was interrupted; the child was interrupted too, and has ended."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with open(log_file, "a", encoding="utf-8") as out:
        out.write(f"$ python {shlex.join(arguments)}\n")
        out.flush()
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=registry.REPO_ROOT,
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **environment},
            start_new_session=True,  # the terminal's Ctrl-C reaches this process alone, which passes it on once
            pass_fds=() if held is None else (held,),
            preexec_fn=_prepare_child,
        )
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            try:
                process.wait()
            except KeyboardInterrupt:  # a second time: at once
                process.kill()
                process.wait()
            raise


def last_line(log_file: Path) -> str:
    """The last line of a step's output, that of its error where there is one."""
    lines = [line.strip() for line in log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-40:]]
    lines = [line for line in lines if line]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or ["no output"])[-1]


class Pair:
    """The steps of one pair, what is done of them, and how long they took.

    Args:
        steps: name -> step, each after what it needs.
    """

    def __init__(self, folder: Path, steps: Mapping[str, Step]):
        self.folder, self.steps = folder, dict(steps)

    @property
    def records(self) -> dict[str, dict]:
        """Name of a step -> ``stage``, ``seconds``, ``done`` and ``command``, as recorded."""
        return read_records(self.folder)

    def done(self, name: str) -> bool:
        """Whether a step was run to its end and its result still exists and is whole."""
        result = self.steps[name].result
        return self.records.get(name, {}).get("done", False) and any(map(_is_whole, self.folder.glob(result)))

    def missing(self) -> list[str]:
        """The steps still to run: classifiers without a result, and what they need."""
        wanted: set[str] = set()
        for name in reversed(self.steps):
            if (self.steps[name].stage == 3 or name in wanted) and not self.done(name):
                wanted |= {name, *self.steps[name].needs}
        return [name for name in self.steps if name in wanted and not self.done(name)]

    def run(self, name: str, held: int | None = None) -> None:
        """Runs one step and records it.

        Raises:
            UserError: it failed; says its last line and where the rest is.
            KeyboardInterrupt: it was interrupted.
        """
        step, log_file = self.steps[name], self.folder / LOGS / f"{name.replace(' ', '-')}.log"
        log.info("%s", step)
        began, status = time.monotonic(), None
        try:
            status = run_command(step.arguments, log_file, step.environment, held)
        finally:
            self._record(step, time.monotonic() - began, status == 0)
        if status == EXIT_INTERRUPTED:
            raise KeyboardInterrupt
        if status:
            raise UserError(
                f"{self.folder.parent.name}, {self.folder.name}: step '{name}' ended with status {status}: "
                f"{last_line(log_file)} (whole output: {registry.shown_path(log_file)}); once the cause is fixed, the same "
                f"command resumes from here{OTHER_FLAGS if step.arguments[0] in SCRIPTS.values() else ''}"
            )

    def _record(self, step: Step, seconds: float, done: bool) -> None:
        records = self.records
        entry = records.setdefault(step.name, {"stage": step.stage, "seconds": 0.0, "done": False})
        # a step that was run again after its result was removed counts once
        before = 0.0 if entry["done"] else entry["seconds"]
        entry.update(seconds=round(before + seconds, 1), done=done, command=str(step))
        files.write_json(self.folder / STEPS_FILE, records)


def _is_whole(result: Path) -> bool:
    """Whether a step's result can be read: JSON, or a list of images, which may be links to a pool that was moved."""
    if result.suffix == ".json":
        return files.read_json(result) is not None
    image = next((result.parent / DATA).glob("*/*"), None)
    return image is not None and image.exists()


def claim_data(
    commands: StageCommands, config_dir: Path, dry_run: bool = False, checked: set[tuple[str, str]] | None = None
) -> LoadedDataset:
    """Records the images that a pair draws, or compares them with the record.

    A dry run writes nothing. Where there is no record, it decodes the images: a damaged one would end a step after hours, and
    could not be replaced once it is recorded.

    Args:
        checked: split and name of images decoded for other pairs; those of this pair are added.

    Returns:
        The data set under the pair's setting.

    Raises:
        UserError: the steps were made from other images, or by a version that did not record them; or an image is damaged.
    """
    folder, recipe = commands.folder, commands.recipe
    data_folder = folder / MADE_FROM / "data"
    if read_records(folder) and not data_folder.is_dir():
        raise UserError(
            f"{registry.shown_path(folder)} does not say which images its steps were made from (an earlier version ran "
            "them): nothing was touched; choose another --output_dir"
        )
    chosen = {name: value for name, value in recipe.shared.items() if name != "dataset" and value is not None}
    setting = Setting(**chosen, subset_seed=commands.subset_seed)
    dataset = load_dataset(recipe.shared["dataset"], setting, config_dir)
    known = runs.claim(data_folder, {}, "--output_dir", origin=RunOrigin(dataset), dry_run=dry_run)
    if dry_run and not known:
        checked = set() if checked is None else checked
        for split, table in ((split, getattr(dataset, split)) for split in SPLITS):
            if table is not None:
                refuse_damaged(table.image, [row for row, key in enumerate(table.keys) if (split, key) not in checked])
                checked.update((split, key) for key in table.keys)
    return dataset


def claim_base(commands: StageCommands, dataset: LoadedDataset, dry_run: bool = False) -> None:
    """Records the base model of a pair that runs stages 1 or 2, or compares it with the record, as :func:`claim_data`.

    Stage 3 alone needs no base model: so the two have a record each, and methods may be added later.
    """
    from semantic_aug.diffusion.base import find_base, weight_files

    base = find_base(commands.recipe.base)
    weights = RunOrigin(dataset, (), further=lambda: {"base_model": files_digest(weight_files(base), base)})
    folder = commands.folder / MADE_FROM / "base_model"
    runs.claim(folder, {}, "--output_dir", origin=weights, dry_run=dry_run)


def prepare_config(folder: Path, config_dir: Path) -> None:
    """Writes a pair's registry folder with the user's data sets, which may have moved and are compared by content, and recipes;
    a pair that has finished a step keeps the recipes of its first start."""
    kept = any(entry["done"] for entry in read_records(folder).values())
    for name in COPIED:
        target = folder / "config" / name
        if (config_dir / name).is_file() and not (kept and name == registry.RECIPES and target.exists()):
            files.write_text(target, (config_dir / name).read_text(encoding="utf-8"))
    for name in (registry.CHECKPOINTS, registry.SUBSETS):
        entries = registry.read_yaml(folder / "config" / name)
        if (present := _inside(entries, folder)) != entries:
            files.write_text(folder / "config" / name, registry.to_yaml(present))


def _inside(entry: Any, folder: Path) -> Any:
    """Entries of a pair's registries with the present places of its own files, whose folder may have been moved."""
    if isinstance(entry, dict):
        return {name: _inside(value, folder) for name, value in entry.items()}
    _, mark, rest = str(entry).rpartition(f"/{folder.name}/")
    return registry.shown_path(folder / rest) if mark and (folder / rest).exists() else entry


def read_records(folder: Path) -> dict[str, dict]:
    """The recorded steps of a pair's folder; see :attr:`Pair.records`."""
    return files.read_json(folder / STEPS_FILE) or {}


def duration(seconds: float) -> str:
    """A duration as text: ``45 s``, ``12 min``, ``3.4 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
