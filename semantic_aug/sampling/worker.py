"""One sampling process: takes batches from a pipe, makes the images, writes them, reports what it wrote.

Its messages: ``("ready",)`` once loaded; ``("begin", batch)``; ``("step",)``, at most every second, while it denoises;
``("done", batch, rows, failures)`` with (number, size, crc) rows; ``("note", text)`` for the log; ``("error", text)`` when a
batch broke and the process should be replaced; ``("fatal", line)`` when nothing can work (a full disk, weights that do not
fit). It ends when the pipe does, that is, when its parent ends, however that happens. Images are encoded and written by
threads while the next batch is computed.
"""

from __future__ import annotations

import signal
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from semantic_aug.allocator import keep_freed_memory
from semantic_aug.augmentations.engine import DTYPES, Engine
from semantic_aug.console import quiet_libraries
from semantic_aug.datasets import load_dataset
from semantic_aug.datasets.unlabelled import read_unlabelled
from semantic_aug.errors import UserError, end_with_parent, os_error_line
from semantic_aug.sampling.files import encode_image, write_image
from semantic_aug.sampling.folder import DATA
from semantic_aug.sampling.job import FATAL_ERRNOS, Job, Row, Task
from semantic_aug.sampling.liveness import Heartbeat
from semantic_aug.sampling.masks import columns_of, with_regions
from semantic_aug.sampling.sources import SourceImages, SourceInversions, SourceMasks, SourceMoments, with_pool
from semantic_aug.seeding import task_rng

WRITERS = 4
"""Threads that encode and write images."""

MOST_BLACK = 16
"""A process whose first so many images are all black cannot work."""


class BatchMaker:
    """Makes batches with one engine.

    Args:
        job: what to make.
        device: "cpu" or "cuda:N".
        note: takes lines for the log.
    """

    def __init__(self, job: Job, device: str, note: Callable[[str], None] = lambda text: None):
        self.job, self.config, self.note = job, job.config, note
        config, origin = job.config, job.origin
        if device == "cpu":
            torch.set_num_threads(config.placement.cpu_threads)
        # before the weights: a listing is checked sooner
        images = _listed(job) if origin.sources is not None else None
        self.engine = Engine(
            config.model,
            config.prompts,
            config.solver,
            config.images.resolution,
            device,
            dtype=DTYPES[config.placement.dtype],
            compiled_batch=config.placement.batch_size if job.compiled else None,
        )
        if origin.weights is not None:
            origin.weights.check(config.model)
        self.sources: SourceMoments | None = None
        self.masks: SourceMasks | None = None
        if images is not None:
            kind = SourceInversions if config.strategy.start == "inversion" else SourceMoments
            self.sources = kind(images, self.engine, origin.encoder, job.folder)
            if config.images.object_mask:
                self.masks = SourceMasks(
                    images, self.engine.latent_shape[1:], config.images.object_mask, config.guide.objects
                )
        self.at_once: int | None = None
        self.only_black: int | None = 0  # images since the start, as long as all of them are black

    def pixels(self, tasks: Sequence[Task]) -> tuple[Tensor, dict[int, str]]:
        """The images of a batch, uint8 ``(B, H, W, 3)``, and the tasks whose source cannot be read: number -> why.

        A batch is always computed whole, so that an image does not depend on what was missing when it was made. Where
        memory does not allow it, from then on in halves (quarters, ...), which is said.
        """
        while True:
            size = self.at_once or len(tasks)
            try:
                parts = [self._part(tasks[i : i + size]) for i in range(0, len(tasks), size)]
                pixels = torch.cat([p for p, _ in parts])
                failures = {n: why for _, failures in parts for n, why in failures.items()}
                return pixels, self._black(tasks, pixels) | failures
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
            self._halve(size)

    def _halve(self, size: int) -> None:
        """Goes on with half the images at once, after an exception that held on to the memory is gone."""
        self.at_once = -(-size // 2)
        torch.cuda.empty_cache()
        self.engine.compile_for(self.at_once)
        compiled = "networks are compiled for it, " if self.job.compiled else ""
        self.note(
            f"out of memory with {size} images at once: continuing with {self.at_once} ({compiled}last bits of images may "
            "differ from those of whole batches; --batch_size sets it)"
        )

    def _black(self, tasks: Sequence[Task], pixels: Tensor) -> dict[int, str]:
        """The tasks whose image is black everywhere, as those are that are not finite: number -> why it is refused. Raises
        UserError: nothing but black images has come out since the start."""
        remedy = (
            "give --dtype bf16 or fp32"
            if self.config.placement.dtype == "fp16"
            else "the model's weights are not sound"
        )
        why = f"black everywhere, since the networks' values are not finite: {remedy}"
        black = pixels.flatten(1).amax(1) == 0
        if self.only_black is not None:
            self.only_black = self.only_black + len(black) if black.all() else None
            if self.only_black is not None and self.only_black >= MOST_BLACK:
                raise UserError(f"the first {self.only_black} images are all {why}")
        return {
            task.number: f"its image is {why}" for task, refused in zip(tasks, black.tolist(), strict=True) if refused
        }

    def _part(self, tasks: Sequence[Task]) -> tuple[Tensor, dict[int, str]]:
        generators = [task_rng(self.config.run.seed, task.number) for task in tasks]
        number = self.config.prompts.number
        targets = [number(task.target, task.template, task.context) for task in tasks]  # numbers of prompts
        if self.sources is None:
            return self.engine.generate(targets, generators), {}
        if self.config.strategy.start == "inversion":
            return self._between(tasks)
        rows, strengths = [task.source for task in tasks], [task.strength for task in tasks]
        moments, broken = self.sources.batch(rows)
        failures = {task.number: broken[task.source] for task in tasks if task.source in broken}
        masks = self.masks.batch(rows) if self.masks is not None else None
        return self.engine.translate(moments, targets, strengths, generators, masks), failures

    def _between(self, tasks: Sequence[Task]) -> tuple[Tensor, dict[int, str]]:
        """The images of tasks that start from two inverted images; a context is part of the prompt in the first steps."""
        rows = [(task, row) for task in tasks for row in (task.source, task.partner)]
        latents, broken = self.sources.batch([row for _, row in rows])
        labels, config = self.sources.images.images.labels, self.config

        def prompts(contexts: bool) -> tuple[list[int], list[int]]:
            numbers = [
                config.prompts.number(int(labels[row]), task.template, task.context if contexts else None)
                for task, row in rows
            ]
            return numbers[::2], numbers[1::2]

        steps = round(config.images.context_steps * config.solver.num_inference_steps)
        pixels = self.engine.interpolate(
            (latents[::2], latents[1::2]),
            prompts(contexts=False),
            [task.strength for task in tasks],
            whole=config.strategy.pairing == "same",
            opening=(prompts(contexts=True), steps) if config.prompts.contexts else None,
        )
        causes = {task.number: broken.get(task.source) or broken.get(task.partner) for task in tasks}
        return pixels, {number: cause for number, cause in causes.items() if cause}

    def write(self, task: Task, pixels: Tensor) -> Row:
        """Encodes and writes one image; returns its record row."""
        content = encode_image(pixels.numpy(), task.text, self.config.images.image_format)
        return task.number, *write_image(self.job.folder / DATA / task.path, content)


def _listed(job: Job) -> SourceImages:
    """This process's own listing of the training images, which must be the plan's."""
    config = job.config
    images = load_dataset(config.dataset, config.setting, config.run.config_dir).train
    if config.images.unlabelled is not None:
        images = with_pool(images, read_unlabelled(config.images.unlabelled, config.run.config_dir), job.origin.sources)
    images = with_regions(images, config.images.object_mask)
    return SourceImages(images, job.origin.sources, columns_of(config.images.object_mask))


@dataclass
class _Written:
    """A computed batch whose images are on their way to disk."""

    batch: int
    rows: list[Future]
    failures: dict[int, str]


def serve(pipe: Connection, job: Job, device: str) -> None:
    """The process's body: loads, then serves batches until the pipe ends."""
    end_with_parent(signal.SIGKILL)  # in the middle of a batch, too
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interruption means
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    quiet_libraries()
    keep_freed_memory()
    try:
        maker = BatchMaker(job, device, lambda text: pipe.send(("note", text)))
    except UserError as error:
        pipe.send(("fatal", str(error)))
        return
    except Exception:
        pipe.send(("error", traceback.format_exc()))
        return
    maker.engine.on_step = Heartbeat(lambda: pipe.send(("step",)))
    pipe.send(("ready",))
    try:
        _make_batches(pipe, maker)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except UserError as error:
        pipe.send(("fatal", str(error)))
    except OSError as error:
        fatal = error.errno in FATAL_ERRNOS
        pipe.send(("fatal", os_error_line(error)) if fatal else ("error", traceback.format_exc()))
    except Exception:
        pipe.send(("error", traceback.format_exc()))


def _make_batches(pipe: Connection, maker: BatchMaker) -> None:
    written: deque[_Written] = deque()
    with ThreadPoolExecutor(WRITERS) as threads:
        while True:
            if written and (len(written) > 1 or not pipe.poll()):  # nothing else to do, or two batches behind
                _report(pipe, written.popleft())
                continue
            batch, tasks = pipe.recv()
            pipe.send(("begin", batch))
            try:
                pixels, failures = maker.pixels(tasks)
            except UserError:  # nothing more can be made: what is on its way to disk is reported first
                while written:
                    _report(pipe, written.popleft())
                raise
            wanted = [(t, p) for t, p in zip(tasks, pixels, strict=True) if t.path]
            futures = [threads.submit(maker.write, t, p) for t, p in wanted if t.number not in failures]
            written.append(
                _Written(batch, futures, {t.number: failures[t.number] for t, _ in wanted if t.number in failures})
            )


def _report(pipe: Connection, done: _Written) -> None:
    pipe.send(("done", done.batch, [row.result() for row in done.rows], done.failures))
