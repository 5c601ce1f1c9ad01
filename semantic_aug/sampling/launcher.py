"""The parent of the sampling processes: hands out batches, takes back results, replaces what dies.

Each process has a pipe of its own, so that a process killed in the middle of a message spoils nobody else's. A batch
whose process died or broke is done again by another, three times at most, then set aside and reported.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path

from tqdm import tqdm

from semantic_aug.errors import UserError
from semantic_aug.run_dir import write_json
from semantic_aug.sampling.job import Job, Task, serve
from semantic_aug.sampling.store import DATA

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
AHEAD = 2
"""Batches a process holds at once: the one it works on and the next."""

LOADING_SECONDS = 1800.0
PATIENCE = 20.0
STATUS_FILE = "status.json"
STATUS_SECONDS = 2.0
GRACE_SECONDS = 30.0


@dataclass
class Outcome:
    """What a launch did.

    Attributes:
        made: images written.
        unreadable: task number -> why its source could not be read.
        set_aside: batch -> the last error of a batch that failed :data:`MAX_ATTEMPTS` times.
        interrupted: whether a signal stopped it.
        seconds: wall time from the first batch handed out.
    """

    made: int = 0
    unreadable: dict[int, str] = field(default_factory=dict)
    set_aside: dict[int, str] = field(default_factory=dict)
    interrupted: bool = False
    seconds: float = 0.0


@dataclass
class _Worker:
    device: str
    process: multiprocessing.Process
    pipe: Connection
    held: deque[int] = field(default_factory=deque)
    ready: bool = False
    heard: float = field(default_factory=time.monotonic)


class Launcher:
    """Runs batches on a fixed number of processes.

    Args:
        job: what to make.
        devices: one process each: "cpu" or "cuda:N".
        tasks_of: a batch's number to its tasks.
        on_rows: takes (number, size, crc) rows of files that are in place.
        total: images of the whole subset (of this shard).
        already: images that were there before.
        timeout: seconds of silence after which a process counts as hung; None: :data:`PATIENCE` times the slowest
            batch so far, at least five minutes.
    """

    def __init__(
        self,
        job: Job,
        devices: Sequence[str],
        tasks_of: Callable[[int], list[Task]],
        on_rows: Callable[[list[tuple[int, int, int]]], None],
        total: int,
        already: int,
        timeout: float | None = None,
    ):
        self.job, self.devices, self.tasks_of, self.on_rows = job, list(devices), tasks_of, on_rows
        self.total, self.already, self.timeout = total, already, timeout
        self.context = multiprocessing.get_context("spawn")
        self.workers: list[_Worker] = []
        self.queue: deque[int] = deque()
        self.attempts: dict[int, int] = {}
        self.slowest = 0.0
        self.stop_requests = 0
        self.outcome = Outcome()
        self.status_written = 0.0
        self.bar: tqdm | None = None

    def run(self, batches: Sequence[int]) -> Outcome:
        """Makes the batches; returns when all are made, set aside, or a signal asked to stop.

        Raises:
            UserError: no process can work (weights that do not fit, a full disk).
        """
        self.queue.extend(int(b) for b in batches)
        if not self.queue:
            return self.outcome
        began = time.monotonic()
        with self._signals():
            try:
                self.workers = [self._start(device) for device in self.devices[: len(self.queue)]]
                self._serve()
            finally:
                self._end_workers()
                self.outcome.seconds = time.monotonic() - began
                self._status("stopped" if self.outcome.interrupted else "ended", force=True)
                if self.bar is not None:
                    self.bar.close()
        return self.outcome

    # -------------------------------------------------------------------------------------------------- the loop

    def _serve(self) -> None:
        stopping_since = None
        while True:
            if self.stop_requests and stopping_since is None:
                stopping_since = time.monotonic()
                self.queue.clear()
                self.outcome.interrupted = True
                tqdm.write("stopping: batches in flight are finished (a second interruption drops them)")
            if stopping_since and (self.stop_requests > 1 or time.monotonic() - stopping_since > GRACE_SECONDS):
                return
            for one in self.workers:
                self._feed(one)
            busy = [one for one in self.workers if one.held or (self.queue and not one.ready)]
            if not busy:
                return
            for pipe in wait([one.pipe for one in self.workers], timeout=0.5):
                self._listen(next(one for one in self.workers if one.pipe is pipe))
            self._replace_hung()
            self._status("running")

    def _feed(self, one: _Worker) -> None:
        while one.ready and self.queue and len(one.held) < AHEAD:
            batch = self.queue.popleft()
            try:
                one.pipe.send((batch, self.tasks_of(batch)))
            except OSError:  # it just died; the closed pipe will be seen in _listen
                self.queue.appendleft(batch)
                return
            if not one.held:
                one.heard = time.monotonic()
            one.held.append(batch)

    def _listen(self, one: _Worker) -> None:
        try:
            message = one.pipe.recv()
        except (EOFError, OSError):
            one.process.join(timeout=5)
            self._replace(one, f"its process ended with status {one.process.exitcode}")
            return
        now = time.monotonic()
        kind = message[0]
        if kind == "ready":
            one.ready, one.heard = True, now
            if self.bar is None:
                self.bar = tqdm(
                    total=self.total,
                    initial=self.already,
                    unit="image",
                    desc=self.job.folder.name,
                    dynamic_ncols=True,
                    mininterval=1.0,
                )
        elif kind == "done":
            _, batch, rows, failures = message
            self.slowest = max(self.slowest, now - one.heard)
            one.heard = now
            one.held.remove(batch)
            self._take(rows, failures)
        elif kind == "error":
            self._replace(one, message[2].strip().split("\n")[-1], message[2])
        elif kind == "fatal":
            raise UserError(message[1])

    def _take(self, rows: list[tuple[int, int, int]], failures: dict[int, str]) -> None:
        self.on_rows(rows)
        self.outcome.made += len(rows)
        self.outcome.unreadable.update(failures)
        self.bar.update(len(rows))

    # ------------------------------------------------------------------------------------------------- processes

    def _start(self, device: str) -> _Worker:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=serve, args=(theirs, self.job, device), daemon=True)
        process.start()
        theirs.close()
        return _Worker(device, process, ours)

    def _replace(self, one: _Worker, why: str, details: str = "") -> None:
        """Ends a process that failed, gives its batches back, and starts another in its place."""
        _kill(one)
        self.workers.remove(one)
        if not one.ready:  # it never got as far as a batch: that will not change, unless it was killed
            self.attempts[-1] = self.attempts.get(-1, 0) + 1
            if self.attempts[-1] >= MAX_ATTEMPTS:
                log.debug(details)
                raise UserError(
                    f"a sampling process on {one.device} could not start, {MAX_ATTEMPTS} times ({why}); "
                    "DIFFMIX_DEBUG=1 shows more"
                )
        for position, batch in enumerate(one.held):
            # only the batch it was working on can be to blame
            self.attempts[batch] = self.attempts.get(batch, 0) + (position == 0)
            if self.attempts[batch] >= MAX_ATTEMPTS:
                self.outcome.set_aside[batch] = why
                log.warning("batch %d failed %d times and is set aside (%s)", batch, MAX_ATTEMPTS, why)
            elif not self.outcome.interrupted:
                self.queue.append(batch)
        if details:
            log.debug(details)
        if self.queue:
            log.warning("a sampling process on %s is replaced: %s", one.device, why)
            self.workers.append(self._start(one.device))

    def _replace_hung(self) -> None:
        now = time.monotonic()
        for one in list(self.workers):
            if not one.ready:
                limit = LOADING_SECONDS
            else:
                limit = self.timeout or max(300.0, PATIENCE * self.slowest)
            if (one.held or not one.ready) and now - one.heard > limit:
                self._replace(one, f"silent for {now - one.heard:.0f} s")

    def _end_workers(self) -> None:
        for one in self.workers:
            one.pipe.close()  # an idle process ends by itself
        for one in self.workers:
            one.process.join(timeout=0 if one.held else 5)
            _kill(one)
        self.workers = []

    # ------------------------------------------------------------------------------------------ signals and status

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def ask(*_):
            self.stop_requests += 1

        old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _status(self, state: str, force: bool = False) -> None:
        now = time.monotonic()
        if not force and now - self.status_written < STATUS_SECONDS:
            return
        self.status_written = now
        rate = (
            self.outcome.made / self.bar.format_dict["elapsed"] if self.bar and self.bar.format_dict["elapsed"] else 0.0
        )
        done = self.already + self.outcome.made
        content = {
            "state": state,
            "pid": os.getpid(),
            "images_total": self.total,
            "images_done": done,
            "images_failed": len(self.outcome.unreadable),
            "batches_set_aside": len(self.outcome.set_aside),
            "images_per_second": round(rate, 4),
            "seconds_left": round((self.total - done) / rate) if rate else None,
            "workers": [{"device": w.device, "pid": w.process.pid, "batches": list(w.held)} for w in self.workers],
        }
        try:
            write_json(self.job.folder / STATUS_FILE, content)
        except OSError:  # a full disk is reported where it costs an image
            log.debug("status file not written")


def _kill(one: _Worker) -> None:
    if one.process.is_alive():
        one.process.kill()
    one.process.join(timeout=10)
    one.pipe.close()


def devices_of(gpu_ids: Sequence[str] | None, cpu_threads: int) -> list[str]:
    """The processes that ``--gpu_ids`` asks for: ``0 0 1`` or ``cpu cpu``; by default one per GPU, or per CPU thread group.

    Raises:
        UserError: neither a number nor ``cpu``, or a GPU that is not there.
    """
    if gpu_ids and set(gpu_ids) == {"cpu"}:
        return list(gpu_ids)
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not gpu_ids:
        if count:
            return [f"cuda:{i}" for i in range(count)]
        return ["cpu"] * max(1, len(os.sched_getaffinity(0)) // cpu_threads)
    devices = []
    for word in gpu_ids:
        if word == "cpu":
            devices.append("cpu")
        elif not word.isdecimal():
            raise UserError(
                f"--gpu_ids {word}: expected GPU numbers or the word cpu, one per process, e.g. 0 0 1 or cpu cpu"
            )
        elif int(word) >= count:
            have = f"GPUs 0 to {count - 1}" if count else "no GPU"
            raise UserError(f"--gpu_ids {word}: this machine has {have}; give other numbers, or cpu")
        else:
            devices.append(f"cuda:{word}")
    if len({d == "cpu" for d in devices}) > 1:
        raise UserError("--gpu_ids mixes GPUs and cpu: images would differ in their last bits; give one kind")
    return devices


def image_tasks(batch_numbers: Sequence[int], paths, missing) -> list[Task]:
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
        )
        for n in batch_numbers
    ]


def make_folders(folder: Path, folders: Sequence[str]) -> None:
    """The class folders under ``data/``."""
    for name in folders:
        (folder / DATA / name).mkdir(parents=True, exist_ok=True)
