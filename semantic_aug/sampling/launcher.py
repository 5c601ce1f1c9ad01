"""The engine for one machine: a process per entry of ``--gpu_ids``, each on a pipe of its own.

A process killed in the middle of a message so spoils nobody else's. What dies, breaks or hangs is replaced.
"""

from __future__ import annotations

import logging
import multiprocessing
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path

from semantic_aug.errors import UserError
from semantic_aug.sampling.dispatch import Dispatcher
from semantic_aug.sampling.files import TaskPaths
from semantic_aug.sampling.job import Task, serve
from semantic_aug.sampling.liveness import Liveness, processor_seconds
from semantic_aug.sampling.store import DATA

log = logging.getLogger(__name__)

AHEAD = 3
"""Batches a process holds at once: one being written, one being computed, and the next."""


@dataclass
class _Worker:
    device: str
    process: multiprocessing.Process
    pipe: Connection
    life: Liveness
    held: deque[int] = field(default_factory=deque)
    current: int | None = None
    ready: bool = False


class Launcher(Dispatcher):
    """Runs batches on a fixed number of local processes; see :class:`Dispatcher` for the arguments."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.context = multiprocessing.get_context("spawn")
        self.workers: list[_Worker] = []

    def _serve(self) -> None:
        self.workers = [self._start(device) for device in self.devices[: len(self.queue)]]
        while not self.must_return():
            for one in self.workers:
                self._feed(one)
            if not any(one.held or (self.queue and not one.ready) for one in self.workers):
                return
            for pipe in wait([one.pipe for one in self.workers], timeout=0.5):
                self._listen(next(one for one in self.workers if one.pipe is pipe))
            self._replace_hung()
            self.report_status("running")

    def _feed(self, one: _Worker) -> None:
        while one.ready and self.queue and len(one.held) < AHEAD:
            batch = self.queue.popleft()
            try:
                one.pipe.send((batch, self.tasks_of(batch)))
            except OSError:  # it just died; the closed pipe will be seen in _listen
                self.queue.appendleft(batch)
                return
            if not one.held:
                one.life.hear()
            one.held.append(batch)

    def _listen(self, one: _Worker) -> None:
        try:
            message = one.pipe.recv()
        except (EOFError, OSError):
            one.process.join(timeout=5)
            self._replace(one, f"its process ended with status {one.process.exitcode}")
            return
        one.life.hear()
        kind = message[0]
        if kind == "ready":
            one.ready = True
            self.show_bar()
        elif kind == "begin":
            one.current = message[1]
        elif kind == "done":
            _, batch, rows, failures = message
            one.held.remove(batch)
            self.take(id(one), rows, failures)
        elif kind == "note":
            log.warning("%s: %s", one.device, message[1])
        elif kind == "error":
            log.debug(message[1])
            self._replace(one, message[1].strip().split("\n")[-1])
        elif kind == "fatal":
            raise UserError(message[1])

    # ------------------------------------------------------------------------------------------------- processes

    def _start(self, device: str) -> _Worker:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=serve, args=(theirs, self.job, device), daemon=True)
        process.start()
        theirs.close()
        return _Worker(device, process, ours, Liveness(gpu=device != "cpu"))

    def _replace(self, one: _Worker, why: str) -> None:
        """Ends a process that failed, gives its batches back, and starts another in its place."""
        _kill(one)
        self.workers.remove(one)
        if not one.ready:
            self.failed_to_start(one.device, why)
        self.give_back(one.held, one.current, why)
        if self.queue:
            log.warning("a sampling process on %s is replaced: %s", one.device, why)
            self.workers.append(self._start(one.device))

    def _replace_hung(self) -> None:
        stopped = self.standstill.seconds()
        for one in list(self.workers):
            one.life.skip(stopped)
            if not one.held and one.ready:
                continue
            limit = self.silence_limit(one.ready)
            if one.life.due(limit):
                one.life.observe(processor_seconds(one.process.pid))
            if why := one.life.failure(limit):
                self._replace(one, why)

    def _end(self) -> None:
        for one in self.workers:
            one.pipe.close()  # an idle process ends by itself
        for one in self.workers:
            one.process.join(timeout=0 if one.held else 5)
            _kill(one)
        self.workers = []

    def describe_workers(self) -> list[dict]:
        return [{"device": w.device, "pid": w.process.pid, "batches": list(w.held)} for w in self.workers]


def _kill(one: _Worker) -> None:
    if one.process.is_alive():
        one.process.kill()
    one.process.join(timeout=10)
    one.pipe.close()


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
        )
        for n in batch_numbers
    ]


def make_folders(folder: Path, folders: Sequence[str]) -> None:
    """The class folders under ``data/``."""
    for name in folders:
        (folder / DATA / name).mkdir(parents=True, exist_ok=True)
