"""A sampling process: takes batches from a pipe, makes and writes their images, and reports what it wrote.

Its messages: ``("ready",)`` once loaded; ``("begin", batch)``; ``("step",)``, at most every second, while it denoises;
``("done", batch, rows, failures)`` with (number, size, crc) rows; ``("note", text)`` for the log; ``("error", text)`` when a
batch failed and the process should be replaced; ``("fatal", line)`` when no process can work (a full disk, weights that do
not fit). It ends when the pipe is closed, at the latest when its parent ends. Threads encode and write the images while the
next batch is computed.
"""

from __future__ import annotations

import signal
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
from semantic_aug.sampling.masks import with_regions
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
        config = job.config
        if device == "cpu":
            torch.set_num_threads(config.placement.cpu_threads)
        # before the weights: a listing is checked sooner
        images = _listed(job) if job.sources is not None else None
        self.engine = Engine(
            config.model,
            config.prompts,
            config.solver,
            config.images.resolution,
            device,
            dtype=DTYPES[config.placement.dtype],
            compiled_batch=config.placement.batch_size if job.compiled else None,
        )
        if job.weights is not None:
            job.weights.check(config.model)
        self.sources: SourceMoments | None = None
        self.masks: SourceMasks | None = None
        if images is not None:
            kind = SourceInversions if config.strategy.start == "inversion" else SourceMoments
            self.sources = kind(images, self.engine, job.encoder, job.folder)
            if config.images.object_mask:
                self.masks = SourceMasks(
                    images, self.engine.latent_shape[1:], config.images.object_mask, config.guide.objects
                )
        self.at_once: int | None = None
        self.only_black: int | None = 0  # images since the start, as long as all of them are black

    def pixels(self, tasks: Sequence[Task]) -> tuple[Tensor, dict[int, str]]:
        """The images of a batch, uint8 ``(B, H, W, 3)``, and the tasks whose source cannot be read: number -> why.

        A batch is always computed whole, so that an image does not depend on what was missing when it was made. Where
        memory runs out, batches are computed in halves (quarters, ...) from then on, with a note.
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
        """Halves the images computed at once; called after the exception, which holds memory, is gone."""
        self.at_once = -(-size // 2)
        torch.cuda.empty_cache()
        self.engine.compile_for(self.at_once)
        compiled = "networks are compiled for it, " if self.job.compiled else ""
        self.note(
            f"out of memory with {size} images at once: continuing with {self.at_once} ({compiled}last bits of images may "
            "differ from those of whole batches; --batch_size sets it)"
        )

    def _black(self, tasks: Sequence[Task], pixels: Tensor) -> dict[int, str]:
        """The tasks whose image is black everywhere, as one with values that are not finite is: number -> why it is refused.
        Raises UserError: all images since the start are black."""
        half = self.config.placement.dtype == "fp16"
        remedy = "give --dtype bf16 or fp32" if half else "the model's weights are not sound"
        why = f"black everywhere, since the networks' values are not finite: {remedy}"
        black = pixels.flatten(1).amax(1) == 0
        if self.only_black is not None:
            self.only_black = self.only_black + len(black) if black.all() else None
            if self.only_black is not None and self.only_black >= MOST_BLACK:
                raise UserError(f"the first {self.only_black} images are all {why}")
        return {tasks[i].number: f"its image is {why}" for i in black.nonzero().flatten().tolist()}

    def _part(self, tasks: Sequence[Task]) -> tuple[Tensor, dict[int, str]]:
        if self.config.strategy.start == "inversion":
            return self._between(tasks)
        generators = [task_rng(self.config.run.seed, task.number) for task in tasks]
        number = self.config.prompts.number
        targets = [number(task.target, task.template, task.context) for task in tasks]  # numbers of prompts
        if self.sources is None:
            return self.engine.generate(targets, generators), {}
        rows, strengths = [task.source for task in tasks], [task.strength for task in tasks]
        moments, broken = self.sources.batch(rows)
        failures = {task.number: broken[task.source] for task in tasks if task.source in broken}
        masks = self.masks.batch(rows) if self.masks is not None else None
        return self.engine.translate(moments, targets, strengths, generators, masks), failures

    def _between(self, tasks: Sequence[Task]) -> tuple[Tensor, dict[int, str]]:
        """The images of tasks that start from two inverted images; a context is part of the prompt in the first steps."""
        rows = [(task, row) for task in tasks for row in (task.source, task.partner)]
        latents, broken = self.sources.batch([row for _, row in rows])
        labels, config = self.sources.images.table.labels, self.config

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

    def images(self, tasks: Sequence[Task]) -> tuple[list[tuple[Task, Tensor]], dict[int, str]]:
        """The images of a batch that are to be written, each after its task, and the tasks that get none: number -> why."""
        pixels, failures = self.pixels(tasks)
        wanted = [(task, image) for task, image in zip(tasks, pixels, strict=True) if task.path]
        failed = {task.number: failures[task.number] for task, _ in wanted if task.number in failures}
        return [(task, image) for task, image in wanted if task.number not in failed], failed

    def write(self, task: Task, pixels: Tensor) -> Row:
        """Encodes and writes one image; returns its record row."""
        content = encode_image(pixels.numpy(), task.text, self.config.images.image_format)
        return task.number, *write_image(self.job.folder / DATA / task.path, content)


def _listed(job: Job) -> SourceImages:
    """The source images as this process lists them. Raises DataChanged: they are not the plan's."""
    config = job.config
    images = load_dataset(config.dataset, config.setting, config.run.config_dir).train
    if config.images.unlabelled is not None:
        images = with_pool(images, read_unlabelled(config.images.unlabelled, config.run.config_dir), job.sources)
    return SourceImages(with_regions(images, config.images.object_mask), job.sources)


def serve(pipe: Connection, job: Job, device: str) -> None:
    """Body of the process: loads, then makes batches until the pipe is closed."""
    end_with_parent(signal.SIGKILL)  # in the middle of a batch, too
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interruption means
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    quiet_libraries()
    keep_freed_memory()
    try:
        maker = BatchMaker(job, device, lambda text: pipe.send(("note", text)))
        maker.engine.on_step = Heartbeat(lambda: pipe.send(("step",)))
        pipe.send(("ready",))
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
    written: deque[tuple[int, list[Future], dict[int, str]]] = deque()  # batches whose images are on their way to disk
    with ThreadPoolExecutor(WRITERS) as threads:
        while True:
            if written and (len(written) > 1 or not pipe.poll()):  # nothing else to do, or two batches behind
                _report(pipe, *written.popleft())
                continue
            batch, tasks = pipe.recv()
            pipe.send(("begin", batch))
            try:
                images, failures = maker.images(tasks)
            except UserError:  # nothing more can be made: what is on its way to disk is reported first
                while written:
                    _report(pipe, *written.popleft())
                raise
            written.append((batch, [threads.submit(maker.write, *image) for image in images], failures))


def _report(pipe: Connection, batch: int, rows: list[Future], failures: dict[int, str]) -> None:
    pipe.send(("done", batch, [row.result() for row in rows], failures))
