"""Handing batches to processes: the loop that every engine runs, and the engine for one machine.

A process that dies, breaks or hangs is replaced. The batch it was making is tried again, three times at most, then set aside
and reported; where attempt after attempt fails, whatever the batch, the run ends. On one machine there is a process per entry
of ``--gpu_ids``, each on a pipe of its own: one killed in the middle of a message spoils nobody else's.
:mod:`semantic_aug.sampling.ray_engine` is the engine for many machines.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait

from tqdm import tqdm

from semantic_aug.errors import UserError, signals_to
from semantic_aug.files import write_json
from semantic_aug.sampling.job import Job, Row, Task
from semantic_aug.sampling.liveness import (
    LOADING_SECONDS,
    SILENCE_SECONDS,
    STANDSTILL_SECONDS,
    Liveness,
    processor_seconds,
)
from semantic_aug.sampling.settings import Placement

log = logging.getLogger(__name__)

WAIT_SECONDS = 0.5
"""How long an engine waits for a message before it looks for processes that hang."""
MAX_ATTEMPTS = 3
MAX_FAILURES = 20
"""Failed attempts in a row, at any batches, after which a run ends: each costs a new process."""
STATUS_FILE = "status.json"
STATUS_SECONDS = 2.0
GRACE_SECONDS = 30.0
"""How long batches in flight may take after a request to stop."""


@dataclass
class Outcome:
    """Result of a launch.

    Attributes:
        written: number of images.
        unreadable: task number -> why its source could not be read.
        set_aside: batch -> the last error of a batch that failed :data:`MAX_ATTEMPTS` times.
        interrupted: whether a signal stopped it.
        seconds: wall time, loading included.
    """

    written: int = 0
    unreadable: dict[int, str] = field(default_factory=dict)
    set_aside: dict[int, str] = field(default_factory=dict)
    interrupted: bool = False
    seconds: float = 0.0


@dataclass(kw_only=True)
class Worker:
    """A process that makes batches.

    Attributes:
        device: what it computes on.
        life: its signs of life.
        held: batches it was given, in the order it makes them.
        current: the batch it is making, which counts as failed when the process is replaced.
        running: False while a cluster looks for a place for it.
        ready: it has loaded everything.
    """

    device: str
    life: Liveness
    held: deque[int] = field(default_factory=deque)
    current: int | None = None
    running: bool = True
    ready: bool = False


class Dispatcher:
    """Base of the engines: hands out batches, replaces processes, counts what was made and what failed, shows progress.

    A subclass writes ``_start(device)``, which returns a :class:`Worker` that begins to load; ``_send(worker, batch)``;
    ``_receive()``, which waits up to :data:`WAIT_SECONDS` for reports and calls :meth:`started`, :meth:`take` and
    :meth:`_replace` by what they say; ``_observe(worker, limit)``, which looks for signs of life once a part of the limit in
    seconds is over; and ``_kill(worker)``.

    Args:
        tasks_of: a batch's number to its tasks.
        on_rows: takes (number, size, crc) rows of files that are in place.
        total: images of the whole subset (of this shard).
        already: images that existed before.
    """

    AHEAD: int
    """Batches a process holds at once."""

    def __init__(
        self,
        job: Job,
        tasks_of: Callable[[int], list[Task]],
        on_rows: Callable[[list[Row]], None],
        total: int,
        already: int,
    ):
        self.job, self.tasks_of, self.on_rows, self.total, self.already = job, tasks_of, on_rows, total, already
        self.queue: deque[int] = deque()
        self.workers: list[Worker] = []
        self.attempts: dict[int, int] = {}
        self.failed_starts = self.failures = 0  # in a row
        self.together = False  # no process begins before all have loaded
        self.outcome = Outcome()
        self.marks: dict[object, list[tuple[float, int]]] = {}
        self.bar: tqdm | None = None
        self._awake = time.monotonic()
        self._stop_requests, self._stopping_since, self._status_written = 0, None, 0.0

    @property
    def placement(self) -> Placement:
        """Devices and time limits."""
        return self.job.config.placement

    def run(self, batches: Sequence[int]) -> Outcome:
        """Makes the batches; returns when all are made, set aside, or a signal asked to stop. Raises UserError: no process can
        work (weights that do not fit, a full disk)."""
        self.queue.extend(int(b) for b in batches)
        if not self.queue:
            return self.outcome
        began = time.monotonic()
        with signals_to(self._count_request):
            try:
                self._serve()
            finally:
                self._end()
                self.outcome.seconds = time.monotonic() - began
                self.report_status("stopped" if self.outcome.interrupted else "ended", force=True)
                if self.bar is not None:
                    self.bar.close()
        return self.outcome

    def _serve(self) -> None:
        """Hands out batches until none is left or :meth:`must_return`."""
        self.workers = [self._start(device) for device in self.placement.devices[: len(self.queue)]]
        while not self.must_return():
            if not self.together or all(worker.ready for worker in self.workers):
                for worker in self.workers:
                    self._feed(worker)
            if not any(worker.held or (self.queue and not worker.ready) for worker in self.workers):
                return
            self._receive()
            self._replace_hung()
            self.report_status("running")

    def _feed(self, worker: Worker) -> None:
        while worker.ready and self.queue and len(worker.held) < self.AHEAD:
            if not worker.held:
                worker.life.hear()
            worker.held.append(self.queue.popleft())
            self._send(worker, worker.held[-1])

    def _replace(self, worker: Worker, why: str) -> None:
        """Ends a process that failed, takes its batches back, and starts another in its place."""
        self._kill(worker)
        self.workers.remove(worker)
        if not worker.ready:
            self.failed_to_start(worker.device, why)
        self.give_back(worker.held, worker.current, why)
        if self.queue:
            log.warning("a sampling process on %s is replaced: %s", worker.device, why)
            self.workers.append(self._start(worker.device))

    def _replace_hung(self) -> None:
        gap, self._awake = time.monotonic() - self._awake, time.monotonic()
        for worker in list(self.workers):
            if gap > STANDSTILL_SECONDS:  # this process itself was stopped (Ctrl-Z) or held up, and messages waited
                worker.life.skip(gap)
            if worker.ready and not worker.held:
                continue
            limit = (self.placement.worker_timeout or SILENCE_SECONDS) if worker.ready else LOADING_SECONDS
            self._observe(worker, limit)
            if why := worker.life.failure(limit):
                no_place = "it did not start: are there enough free CPUs or GPUs in the cluster?"
                self._replace(worker, why if worker.running else no_place)

    def _end(self) -> None:
        """Ends every process."""
        for worker in self.workers:
            self._kill(worker)
        self.workers = []

    def describe_workers(self) -> list[dict]:
        """The processes, for the status file."""
        return [{"device": worker.device, "batches": list(worker.held)} for worker in self.workers]

    # ------------------------------------------------------------------------------------------------------- counts

    def take(self, process: object, rows: list[Row], failures: dict[int, str]) -> None:
        """Counts a batch that a process has finished."""
        self.on_rows(rows)
        self.failures = 0
        self.outcome.written += len(rows)
        self.outcome.unreadable.update(failures)
        self.marks.setdefault(process, []).append((time.monotonic(), len(rows)))
        if self.bar is not None:
            self.bar.update(len(rows))

    def give_back(self, batches: Sequence[int], blamed: int | None, why: str) -> None:
        """Takes back the batches of a process that is gone; the one it was computing counts as a failed attempt. Raises
        UserError: so many attempts failed in a row that the batches are not the cause."""
        self.failures += blamed in batches
        if self.failures >= MAX_FAILURES:
            raise UserError(
                f"{self.failures} attempts at a batch failed in a row, each in a new process ({why}): the same command tries "
                "again; DIFFMIX_DEBUG=1 shows more"
            )
        for batch in batches:
            self.attempts[batch] = self.attempts.get(batch, 0) + (batch == blamed)
            if self.attempts[batch] >= MAX_ATTEMPTS:
                self.outcome.set_aside[batch] = why
                log.warning("batch %d failed %d times and is set aside (%s)", batch, MAX_ATTEMPTS, why)
            elif not self.outcome.interrupted:
                self.queue.append(batch)

    def failed_to_start(self, device: str, why: str) -> None:
        """Counts a process that did not finish loading. Raises UserError: it happened too often in a row."""
        self.failed_starts += 1
        if self.failed_starts >= MAX_ATTEMPTS:
            raise UserError(
                f"a sampling process on {device} could not start, {MAX_ATTEMPTS} times ({why}); DIFFMIX_DEBUG=1 shows more"
            )

    def started(self) -> None:
        """Notes that a process has loaded everything; the first one shows the progress bar."""
        self.failed_starts = 0
        if self.bar is None:
            options = {"unit": "image", "dynamic_ncols": True, "mininterval": 1.0}
            self.bar = tqdm(total=self.total, initial=self.already, desc=self.job.folder.name, **options)

    def steady_rate(self) -> float:
        """Images per second of all processes together, from the first finished batch of each on; 0 after too few batches.

        A process reports a batch when it has computed the next, but its last one at once: that report is left out, so that
        the time spanned is that of the images counted.
        """
        total = 0.0
        for marks in self.marks.values():
            if len(marks) < 3:
                return 0.0
            total += sum(count for _, count in marks[1:-1]) / (marks[-2][0] - marks[0][0])
        return total

    # -------------------------------------------------------------------------------------------- signals and status

    def must_return(self) -> bool:
        """Whether a request to stop came so long ago (or twice) that batches in flight are dropped."""
        if self._stop_requests and self._stopping_since is None:
            self._stopping_since = time.monotonic()
            self.queue.clear()
            self.outcome.interrupted = True
            tqdm.write("stopping: batches in flight are finished (a second interruption drops them)")
        if self._stopping_since is None:
            return False
        return self._stop_requests > 1 or time.monotonic() - self._stopping_since > GRACE_SECONDS

    def _count_request(self, *_) -> None:
        self._stop_requests += 1

    def report_status(self, state: str, force: bool = False) -> None:
        """Writes ``status.json`` for other tools, every few seconds."""
        now = time.monotonic()
        if not force and now - self._status_written < STATUS_SECONDS:
            return
        self._status_written = now
        elapsed = self.bar.format_dict["elapsed"] if self.bar is not None else 0.0
        rate = self.outcome.written / elapsed if elapsed else 0.0
        done = self.already + self.outcome.written
        content = {
            "state": state,
            "pid": os.getpid(),
            "images_total": self.total,
            "images_done": done,
            "images_failed": len(self.outcome.unreadable),
            "batches_set_aside": len(self.outcome.set_aside),
            "images_per_second": round(rate, 4),
            "seconds_left": round((self.total - done) / rate) if rate else None,
            "workers": self.describe_workers(),
        }
        try:
            write_json(self.job.folder / STATUS_FILE, content)
        except OSError:  # a full disk is reported where it costs an image
            log.debug("status file not written")


# ------------------------------------------------------------ processes of this machine


@dataclass(kw_only=True)
class _Process(Worker):
    process: multiprocessing.Process
    pipe: Connection


class Launcher(Dispatcher):
    """Runs batches on a fixed number of local processes; see :class:`Dispatcher` for the arguments."""

    AHEAD = 3  # one being written, one being computed, and the next

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.context = multiprocessing.get_context("spawn")

    def _start(self, device: str) -> _Process:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=_serve, args=(theirs, self.job, device), daemon=True)
        resource_tracker.ensure_running()  # which would unblock the signal
        former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:  # a process inherits what is blocked: a terminal's Ctrl-C does not end it while it loads either
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, former)
        theirs.close()
        return _Process(device=device, life=Liveness(gpu=device != "cpu"), process=process, pipe=ours)

    def _send(self, worker: _Process, batch: int) -> None:
        with contextlib.suppress(OSError):  # the closed pipe of one that died is seen in _listen
            worker.pipe.send((batch, self.tasks_of(batch)))

    def _receive(self) -> None:
        for pipe in wait([worker.pipe for worker in self.workers], timeout=WAIT_SECONDS):
            self._listen(next(worker for worker in self.workers if worker.pipe is pipe))

    def _listen(self, worker: _Process) -> None:
        try:
            message = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join(timeout=5)
            self._replace(worker, f"its process ended with status {worker.process.exitcode}")
            return
        worker.life.hear()
        match message:
            case ("ready",):
                worker.ready = True
                self.started()
            case ("begin", batch):
                worker.current = batch
            case ("done", batch, rows, failures):
                worker.held.remove(batch)
                self.take(id(worker), rows, failures)
            case ("note", text):
                log.warning("%s: %s", worker.device, text)
            case ("error", text):
                log.debug(text)
                self._replace(worker, text.strip().split("\n")[-1])
            case ("fatal", line):
                raise UserError(line)

    def _observe(self, worker: _Process, limit: float) -> None:
        if worker.life.due(limit):
            worker.life.observe(processor_seconds(worker.process.pid))

    def _kill(self, worker: _Process) -> None:
        if worker.process.is_alive():
            worker.process.kill()
        worker.process.join(timeout=10)
        worker.pipe.close()

    def _end(self) -> None:
        for worker in self.workers:
            worker.pipe.close()  # an idle process ends by itself
        for worker in self.workers:
            worker.process.join(timeout=0 if worker.held else 5)
        super()._end()

    def describe_workers(self) -> list[dict]:
        return [{"device": w.device, "pid": w.process.pid, "batches": list(w.held)} for w in self.workers]


def _serve(pipe: Connection, job: Job, device: str) -> None:
    """Body of a sampling process; the launcher itself has no need of what the worker imports."""
    from semantic_aug.sampling.worker import serve

    serve(pipe, job, device)
