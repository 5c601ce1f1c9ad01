"""Signs of life of sampling processes: messages, denoising steps and processor time.

A batch may take hours (a large model on a CPU, networks being compiled); it has not failed while its process computes. A
process that is stopped or blocked sends nothing and uses no processor time, and counts as hung after a limit of silence.
"""

import time
from collections.abc import Callable

SILENCE_SECONDS = 300.0
"""Limit of silence of a process that has a batch, unless ``--worker_timeout`` gives another."""

LOADING_SECONDS = 1800.0
"""Limit of silence while a process loads its networks (or waits for resources of a cluster)."""

STEP_SECONDS = 1800.0
"""Limit between two steps on a GPU: waiting for a GPU that hangs takes processor time too."""

BUSY_SHARE = 0.03
"""Share of one core from which a process counts as working; the threads of an idle process take less."""

HEARTBEAT_SECONDS = 1.0
STANDSTILL_SECONDS = 10.0
"""Time between two looks at the processes from which the launcher itself counts as stopped."""


def processor_seconds(pid: int | None = None) -> float | None:
    """Processor time of a process and its descendants (compilers among them), or None where it has ended."""
    import psutil

    try:
        process = psutil.Process(pid)
        total = sum(process.cpu_times()[:4])
        for child in process.children(recursive=True):
            try:
                total += sum(child.cpu_times()[:4])
            except psutil.Error:  # it has just ended
                continue
        return total
    except psutil.Error:
        return None


class Liveness:
    """The signs of life of one process."""

    def __init__(self, gpu: bool):
        self.gpu, self.steps = gpu, 0
        self.heard = self.stepped = self.observed = time.monotonic()
        self._work: tuple[float, float] | None = None  # when it was last seen working, and its processor time then

    def hear(self) -> None:
        """A message came, a step was done, or a batch was handed over."""
        self.heard = self.stepped = time.monotonic()
        self._work = None

    def due(self, limit: float) -> bool:
        """Whether it is time to look at the process, which costs some milliseconds."""
        return time.monotonic() - max(self.heard, self.observed) >= max(0.5, limit / 20)

    def observe(self, processor: float | None, steps: int = 0) -> None:
        """Takes the process's processor time in seconds and the number of its steps so far."""
        self.observed = now = time.monotonic()
        if steps != self.steps:
            self.steps = steps
            self.hear()
        if processor is None:
            return
        since, before = self._work or (now, processor)
        if processor > before and processor - before >= BUSY_SHARE * (now - since):
            self.heard = now
            self._work = now, processor
        elif self._work is None or processor < before:
            self._work = now, processor

    def skip(self, seconds: float) -> None:
        """Leaves out a time during which nobody could have heard anything."""
        self.heard, self.stepped, self.observed = (t + seconds for t in (self.heard, self.stepped, self.observed))
        self._work = None

    def failure(self, limit: float) -> str | None:
        """Why the process counts as hung, or None; ``limit`` is that of its silence in seconds."""
        now = time.monotonic()
        if now - self.heard > limit:
            return f"silent for {now - self.heard:.0f} s"
        if self.gpu and now - self.stepped > max(limit, STEP_SECONDS):
            return f"without a step for {now - self.stepped:.0f} s"
        return None


class Heartbeat:
    """Announces denoising steps, at most one a second."""

    def __init__(self, send: Callable[[], None]):
        self.send, self.sent = send, time.monotonic()

    def __call__(self) -> None:
        now = time.monotonic()
        if now - self.sent >= HEARTBEAT_SECONDS:
            self.sent = now
            self.send()
