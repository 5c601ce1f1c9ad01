"""What every engine keeps account of: which batches wait, which failed how often, what was made, what the user sees.

A batch whose process died or broke is done again, three times at most, then set aside and reported. Engines differ in
where processes run (:mod:`launcher` on this machine, :mod:`ray_engine` under Ray) and share this.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from tqdm import tqdm

from semantic_aug.errors import UserError
from semantic_aug.files import write_json
from semantic_aug.sampling.job import Job, Task
from semantic_aug.sampling.liveness import LOADING_SECONDS, SILENCE_SECONDS, Standstill

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
STATUS_FILE = "status.json"
STATUS_SECONDS = 2.0
GRACE_SECONDS = 30.0
"""How long batches in flight may take after a request to stop."""

FATAL_ERRNOS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM,
}  # fmt: skip
"""Errors of the file system that no other process would be spared."""

Row = tuple[int, int, int]


@dataclass
class Outcome:
    """What a launch did.

    Attributes:
        made: images written.
        unreadable: task number -> why its source could not be read.
        set_aside: batch -> the last error of a batch that failed :data:`MAX_ATTEMPTS` times.
        interrupted: whether a signal stopped it.
        seconds: wall time, loading included.
    """

    made: int = 0
    unreadable: dict[int, str] = field(default_factory=dict)
    set_aside: dict[int, str] = field(default_factory=dict)
    interrupted: bool = False
    seconds: float = 0.0


class Dispatcher:
    """Base of the engines; a subclass writes :meth:`_serve` and :meth:`_end`.

    Args:
        job: what to make.
        devices: one process each.
        tasks_of: a batch's number to its tasks.
        on_rows: takes (number, size, crc) rows of files that are in place.
        total: images of the whole subset (of this shard).
        already: images that were there before.
        timeout: seconds of silence after which a process counts as hung (see :mod:`liveness`), or None for the default.
    """

    def __init__(
        self,
        job: Job,
        devices: Sequence[str],
        tasks_of: Callable[[int], list[Task]],
        on_rows: Callable[[list[Row]], None],
        total: int,
        already: int,
        timeout: float | None = None,
    ):
        self.job, self.devices, self.tasks_of, self.on_rows = job, list(devices), tasks_of, on_rows
        self.total, self.already, self.timeout = total, already, timeout
        self.queue: deque[int] = deque()
        self.attempts: dict[int, int] = {}
        self.failed_starts = 0
        self.outcome = Outcome()
        self.marks: dict[object, list[tuple[float, int]]] = {}
        self.bar: tqdm | None = None
        self.standstill = Standstill()
        self._stop_requests, self._stopping_since, self._status_written = 0, None, 0.0

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
                self._serve()
            finally:
                self._end()
                self.outcome.seconds = time.monotonic() - began
                self.report_status("stopped" if self.outcome.interrupted else "ended", force=True)
                if self.bar is not None:
                    self.bar.close()
        return self.outcome

    def _serve(self) -> None:
        """Hands out batches until :meth:`finished_or_stopped`."""
        raise NotImplementedError

    def _end(self) -> None:
        """Ends every process."""
        raise NotImplementedError

    def describe_workers(self) -> list[dict]:
        """The processes, for the status file."""
        return []

    # -------------------------------------------------------------------------------------------------- book-keeping

    def take(self, process: object, rows: list[Row], failures: dict[int, str]) -> None:
        """Books a batch that a process finished."""
        self.on_rows(rows)
        self.outcome.made += len(rows)
        self.outcome.unreadable.update(failures)
        self.marks.setdefault(process, []).append((time.monotonic(), len(rows)))
        if self.bar is not None:
            self.bar.update(len(rows))

    def give_back(self, batches: Sequence[int], blamed: int | None, why: str) -> None:
        """Takes back the batches of a process that is gone; the one it was computing counts as a failed attempt."""
        for batch in batches:
            self.attempts[batch] = self.attempts.get(batch, 0) + (batch == blamed)
            if self.attempts[batch] >= MAX_ATTEMPTS:
                self.outcome.set_aside[batch] = why
                log.warning("batch %d failed %d times and is set aside (%s)", batch, MAX_ATTEMPTS, why)
            elif not self.outcome.interrupted:
                self.queue.append(batch)

    def failed_to_start(self, device: str, why: str) -> None:
        """Books a process that never came to work.

        Raises:
            UserError: it happened too often; it will not change.
        """
        self.failed_starts += 1
        if self.failed_starts >= MAX_ATTEMPTS:
            raise UserError(
                f"a sampling process on {device} could not start, {MAX_ATTEMPTS} times ({why}); DIFFMIX_DEBUG=1 shows more"
            )

    def silence_limit(self, ready: bool) -> float:
        """Seconds without a sign of life after which a process, loading or ready, is replaced."""
        return self.timeout or SILENCE_SECONDS if ready else LOADING_SECONDS

    def show_bar(self) -> None:
        """Shows the progress bar, once there is a process to make progress."""
        if self.bar is None:
            self.bar = tqdm(
                total=self.total,
                initial=self.already,
                unit="image",
                desc=self.job.folder.name,
                dynamic_ncols=True,
                mininterval=1.0,
            )

    def steady_rate(self) -> float:
        """Images per second of all processes together once each had finished a batch; 0 where there is too little to tell.

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

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def ask(*_):
            self._stop_requests += 1

        old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def report_status(self, state: str, force: bool = False) -> None:
        """Writes ``status.json`` for other tools, every few seconds."""
        now = time.monotonic()
        if not force and now - self._status_written < STATUS_SECONDS:
            return
        self._status_written = now
        elapsed = self.bar.format_dict["elapsed"] if self.bar is not None else 0.0
        rate = self.outcome.made / elapsed if elapsed else 0.0
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
            "workers": self.describe_workers(),
        }
        try:
            write_json(self.job.folder / STATUS_FILE, content)
        except OSError:  # a full disk is reported where it costs an image
            log.debug("status file not written")
