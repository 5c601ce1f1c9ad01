"""The engine for many machines: the same batch maker in Ray actors, on a laptop's local cluster or a real one.

The subset's folder, the base model, the checkpoint and the images must be reachable under the same paths on every node
(a shared file system). An actor that dies with its process or its node, or hangs, is started elsewhere and its batches are
done again.
"""

import logging
from collections import deque
from dataclasses import dataclass, field

from semantic_aug.errors import UserError, os_error_line
from semantic_aug.registry import REPO_ROOT
from semantic_aug.sampling.job import FATAL_ERRNOS, Job, Row, Task
from semantic_aug.sampling.launcher import Dispatcher
from semantic_aug.sampling.liveness import Liveness, processor_seconds

log = logging.getLogger(__name__)

AHEAD = 2
"""Batches an actor holds at once: the one it makes and the next."""

WAIT_SECONDS = 0.5
PULSE = "pulse"
"""Concurrency group of the actor's method that answers while it makes a batch."""


class ImageActor:
    """One sampling process under Ray: a batch maker, and writing in the same call.

    Args:
        device: "cpu" or "cuda:0" (Ray shows an actor only its own GPU).
    """

    def __init__(self, job: Job, device: str):
        self.job, self.device, self.steps = job, device, 0

    def load(self) -> None:
        """Loads everything. (In a constructor Ray hides a user's error.)"""
        from semantic_aug.allocator import keep_freed_memory
        from semantic_aug.console import quiet_libraries

        quiet_libraries()
        keep_freed_memory()
        from semantic_aug.sampling.worker import BatchMaker

        self.maker = BatchMaker(self.job, self.device, log.warning)
        self.maker.engine.on_step = self._count

    def _count(self) -> None:
        self.steps += 1

    def pulse(self) -> tuple[float | None, int]:
        """Signs of life: the processor time of this process in seconds, and its denoising steps so far."""
        return processor_seconds(), self.steps

    def make(self, batch: int, tasks: list[Task]) -> tuple[int, list[Row], dict[int, str]]:
        """Makes and writes a batch; returns its number, the record rows, and tasks whose source cannot be read."""
        pixels, failures = self.maker.pixels(tasks)
        wanted = [(t, p) for t, p in zip(tasks, pixels, strict=True) if t.path]
        rows = [self.maker.write(t, p) for t, p in wanted if t.number not in failures]
        return batch, rows, {t.number: failures[t.number] for t, _ in wanted if t.number in failures}


@dataclass
class _Actor:
    device: str
    handle: object
    starting: object | None
    life: Liveness
    pulse: object | None = None
    running: bool = False
    held: deque = field(default_factory=deque)


class RayLauncher(Dispatcher):
    """Runs batches on Ray actors; see :class:`Dispatcher` for the arguments."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        import ray

        self.ray = ray
        self.actors: list[_Actor] = []

    def _serve(self) -> None:
        self._connect()
        self.actors = [self._start(device) for device in self.devices[: len(self.queue)]]
        while not self.must_return():
            for actor in self.actors:
                self._feed(actor)
            if not any(actor.held or (self.queue and actor.starting) for actor in self.actors):
                return
            waiting = {a.starting: a for a in self.actors if a.starting} | {
                f: a for a in self.actors for _, f in a.held
            }
            ready, _ = self.ray.wait(list(waiting), num_returns=1, timeout=WAIT_SECONDS)
            for future in ready:
                self._listen(waiting[future], future)
            self._replace_hung()
            self.report_status("running")

    @property
    def address(self) -> str | None:
        """Of a running cluster; None starts one on this machine, "auto" joins the one that is running here."""
        return self.job.config.placement.ray_address

    def _connect(self) -> None:
        if self.ray.is_initialized():
            return
        # nodes import the package from the repository's path on the shared file system
        environment = {"env_vars": {"PYTHONPATH": str(REPO_ROOT)}}
        try:
            self.ray.init(
                address=self.address,
                runtime_env=environment,
                log_to_driver=False,
                include_dashboard=False if self.address is None else None,
                configure_logging=False,
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(
                f"--ray_address {self.address}: no Ray cluster there ({str(error).splitlines()[0]}): start one with "
                "'ray start --head', or leave the flag out for one on this machine"
            ) from error

    def _start(self, device: str) -> _Actor:
        gpus = 0.0 if device == "cpu" else 1 / self.devices.count(device)
        threads = self.job.config.placement.cpu_threads if device == "cpu" else 1
        actor = self.ray.remote(num_cpus=threads, num_gpus=gpus, max_restarts=0, concurrency_groups={PULSE: 1})(
            ImageActor
        )
        handle = actor.remote(self.job, device if device == "cpu" else "cuda:0")
        return _Actor(device, handle, handle.load.remote(), Liveness(gpu=device != "cpu"))

    def _feed(self, actor: _Actor) -> None:
        while actor.starting is None and self.queue and len(actor.held) < AHEAD:
            batch = self.queue.popleft()
            if not actor.held:
                actor.life.hear()
            actor.held.append((batch, actor.handle.make.remote(batch, self.tasks_of(batch))))

    def _listen(self, actor: _Actor, future) -> None:
        actor.life.hear()
        try:
            answer = self.ray.get(future)
        except self.ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, UserError):
                raise UserError(str(cause)) from error
            if isinstance(cause, OSError) and cause.errno in FATAL_ERRNOS:
                raise UserError(os_error_line(cause)) from error
            log.debug(str(error))
            self._replace(actor, str(cause).splitlines()[0] if str(cause) else type(cause).__name__)
        except self.ray.exceptions.RayError as error:  # the actor's process or node is gone
            self._replace(actor, f"{type(error).__name__}: its process or node ended")
        else:
            if future == actor.starting:
                actor.starting = None
                self.started()
                return
            batch, rows, failures = answer
            actor.held = deque((b, f) for b, f in actor.held if b != batch)
            self.take(id(actor), rows, failures)

    def _replace_hung(self) -> None:
        stopped = self.standstill.seconds()
        for actor in list(self.actors):
            actor.life.skip(stopped)
            if not actor.held and actor.starting is None:
                continue
            limit = self.silence_limit(actor.starting is None)
            self._take_pulse(actor, limit)
            if why := actor.life.failure(limit):
                waits = "it did not start: are there enough free CPUs or GPUs in the cluster?"
                self._replace(actor, why if actor.running or actor.starting is None else waits)

    def _take_pulse(self, actor: _Actor, limit: float) -> None:
        """Asks an actor for signs of life; one that is stopped, or whose node is, does not answer."""
        if actor.pulse is None:
            if actor.life.due(limit):
                actor.pulse = actor.handle.pulse.options(concurrency_group=PULSE).remote()
        elif self.ray.wait([actor.pulse], timeout=0)[0]:
            try:
                actor.life.observe(*self.ray.get(actor.pulse))
                actor.running = True
            except self.ray.exceptions.RayError:  # it is gone, as its batch will say
                log.debug("an actor did not answer")
            actor.pulse = None

    def _replace(self, actor: _Actor, why: str) -> None:
        self.ray.kill(actor.handle)
        self.actors.remove(actor)
        if actor.starting is not None:
            self.failed_to_start(actor.device, why)
        batches = [batch for batch, _ in actor.held]
        self.give_back(
            batches, batches[0] if batches else None, why
        )  # actors answer in order: the first was being made
        if self.queue:
            log.warning("a sampling actor is replaced: %s", why)
            self.actors.append(self._start(actor.device))

    def _end(self) -> None:
        for actor in self.actors:
            self.ray.kill(actor.handle)
        self.actors = []
        if self.address is None and self.ray.is_initialized():
            self.ray.shutdown()

    def describe_workers(self) -> list[dict]:
        return [{"device": a.device, "batches": [batch for batch, _ in a.held]} for a in self.actors]
