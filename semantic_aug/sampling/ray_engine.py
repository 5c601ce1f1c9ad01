"""The engine for many machines: the same batch maker in Ray actors, on a laptop's local cluster or a real one.

The subset's folder, the base model, the checkpoint and the images must be reachable under the same paths on every node
(a shared file system). An actor that hangs, or dies with its process or its node, is started elsewhere and its batches are
made again.
"""

import logging
import os
from dataclasses import dataclass, field

from semantic_aug.allocator import keep_freed_memory
from semantic_aug.console import quiet_libraries
from semantic_aug.datasets.catalog import find_spec
from semantic_aug.datasets.settings import DATASET
from semantic_aug.errors import UserError, os_error_line
from semantic_aug.registry import REPO_ROOT, typed_path
from semantic_aug.sampling.config import SampleConfig
from semantic_aug.sampling.job import FATAL_ERRNOS, Job, Row, Task
from semantic_aug.sampling.launcher import WAIT_SECONDS, Dispatcher, Worker
from semantic_aug.sampling.liveness import Liveness, processor_seconds

log = logging.getLogger(__name__)

PULSE = "pulse"
"""Concurrency group of the actor's method that answers while it makes a batch."""


def node_variables(config: SampleConfig) -> dict[str, str]:
    """The environment variables that actors need and do not have of this process: the repository's path on the shared file
    system, from which they import the package, and the folders of the data sets' downloads."""
    names, pool = [config.dataset], str(config.images.unlabelled)
    if pool.startswith(DATASET):
        names.append(pool.removeprefix(DATASET))
    variables = [variable for name in names for variable in find_spec(name, config.run.config_dir).variables]
    folders = {name: str(typed_path(os.environ[name])) for name in variables if os.environ.get(name)}
    return {"PYTHONPATH": str(REPO_ROOT), **folders}


class ImageActor:
    """One sampling process under Ray: a batch maker, and writing in the same call.

    Args:
        device: "cpu" or "cuda:0" (Ray shows an actor only its own GPU).
    """

    def __init__(self, job: Job, device: str):
        self.job, self.device, self.steps = job, device, 0

    def load(self) -> None:
        """Loads everything. (In a constructor Ray hides a user's error.)"""
        quiet_libraries()  # before they are imported
        keep_freed_memory()
        from semantic_aug.sampling.worker import BatchMaker

        self.maker = BatchMaker(self.job, self.device, log.warning)
        self.maker.engine.on_step = self._count

    def _count(self) -> None:
        self.steps += 1

    def pulse(self) -> tuple[float | None, int]:
        """The processor time of this process in seconds, and its denoising steps so far."""
        return processor_seconds(), self.steps

    def make(self, tasks: list[Task]) -> tuple[list[Row], dict[int, str]]:
        """Makes and writes a batch; returns the record rows, and why the other tasks have no image."""
        images, failures = self.maker.images(tasks)
        return [self.maker.write(*image) for image in images], failures


@dataclass(kw_only=True)
class _Actor(Worker):
    handle: object
    futures: dict[object, int | None] = field(default_factory=dict)  # to the batch that is made; None: it loads
    pulse: object | None = None


class RayLauncher(Dispatcher):
    """Runs batches on Ray actors; see :class:`Dispatcher` for the arguments."""

    AHEAD = 2  # the one being made and the next

    def __init__(self, *arguments):
        super().__init__(*arguments)
        import ray

        self.ray = ray

    def _serve(self) -> None:
        self._connect()
        super()._serve()

    def _connect(self) -> None:
        if self.ray.is_initialized():
            return
        address = self.placement.ray_address
        try:
            self.ray.init(
                address=address,
                runtime_env={"env_vars": node_variables(self.job.config)},
                log_to_driver=False,
                include_dashboard=False if address is None else None,
                configure_logging=False,
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(
                f"--ray_address {address}: no Ray cluster there ({str(error).splitlines()[0]}): start one with "
                "'ray start --head', or leave the flag out for one on this machine"
            ) from error

    def _start(self, device: str) -> _Actor:
        gpus = 0.0 if device == "cpu" else 1 / self.placement.devices.count(device)
        threads = self.placement.cpu_threads if device == "cpu" else 1
        actor = self.ray.remote(num_cpus=threads, num_gpus=gpus, max_restarts=0, concurrency_groups={PULSE: 1})(
            ImageActor
        )
        handle = actor.remote(self.job, device if device == "cpu" else "cuda:0")
        life, loading = Liveness(gpu=device != "cpu"), {handle.load.remote(): None}
        return _Actor(device=device, life=life, running=False, handle=handle, futures=loading)

    def _send(self, worker: _Actor, batch: int) -> None:
        worker.futures[worker.handle.make.remote(self.tasks_of(batch))] = batch
        worker.current = worker.held[0]  # an actor makes its batches in order

    def _receive(self) -> None:
        actor_of = {future: actor for actor in self.workers for future in actor.futures}
        for future in self.ray.wait(list(actor_of), num_returns=1, timeout=WAIT_SECONDS)[0]:
            self._listen(actor_of[future], future)

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
            batch = actor.futures.pop(future)
            if batch is None:
                actor.ready = actor.running = True
                self.started()
                return
            actor.held.remove(batch)
            actor.current = actor.held[0] if actor.held else None
            self.take(id(actor), *answer)

    def _observe(self, worker: _Actor, limit: float) -> None:
        """Asks an actor for its pulse; one that is stopped, or whose node is, does not answer."""
        if worker.pulse is None:
            if worker.life.due(limit):
                worker.pulse = worker.handle.pulse.options(concurrency_group=PULSE).remote()
        elif self.ray.wait([worker.pulse], timeout=0)[0]:
            try:
                worker.life.observe(*self.ray.get(worker.pulse))
                worker.running = True
            except self.ray.exceptions.RayError:  # it is gone, as its batch will say
                log.debug("an actor did not answer")
            worker.pulse = None

    def _kill(self, worker: _Actor) -> None:
        self.ray.kill(worker.handle)

    def _end(self) -> None:
        super()._end()
        if self.placement.ray_address is None and self.ray.is_initialized():
            self.ray.shutdown()
