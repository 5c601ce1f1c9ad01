"""One sampling process: takes batches from a pipe, makes the images, writes them, reports what it wrote.

What it says: ``("ready",)`` once loaded; ``("done", batch, rows, failures)`` with (number, size, crc) rows; ``("error", batch,
text)`` when a batch broke and the process should be replaced; ``("fatal", line)`` when nothing can work (a full disk,
weights that do not fit). It ends when the pipe does, that is, when its parent ends, however that happens.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import sys
import traceback
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from semantic_aug.augmentations.engine import DTYPES, Engine
from semantic_aug.console import quiet_libraries
from semantic_aug.datasets import ImageTable, load_dataset
from semantic_aug.datasets.images import fit
from semantic_aug.errors import UserError, os_error_line
from semantic_aug.sampling.job import Job, Task
from semantic_aug.sampling.store import DATA, encode_png, write_image
from semantic_aug.seeding import task_rng

MOMENTS_CACHE_BYTES = 1 << 29
"""Memory for encoded sources; each source is used several times."""

_FATAL_ERRNOS = {errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EPERM}


class BatchMaker:
    """Makes batches with one engine and writes them.

    Args:
        job: what to make.
        device: "cpu" or "cuda:N".
    """

    def __init__(self, job: Job, device: str):
        if device == "cpu":
            torch.set_num_threads(job.cpu_threads)
        self.job = job
        self.engine = Engine(
            job.files, job.classes, job.solver, job.resolution, device, DTYPES[job.dtype], job.template
        )
        self.images: ImageTable | None = None
        if not job.from_noise:
            self.images = load_dataset(job.dataset, job.setting, job.config_dir).train
        self.moments: OrderedDict[int, Tensor | UserError] = OrderedDict()
        self.moments_bytes = 0

    def encoded(self, row: int) -> Tensor | UserError:
        """The posterior parameters ``(1, 2C, h, w)`` of a source, or the error of an image that cannot be read."""
        if row in self.moments:
            self.moments.move_to_end(row)
            return self.moments[row]
        try:
            value = self.engine.encode([fit(self.images.image(row), self.job.resolution)])
            self.moments_bytes += value.nbytes
        except UserError as error:
            value = error
        self.moments[row] = value
        while self.moments_bytes > MOMENTS_CACHE_BYTES and len(self.moments) > 1:
            _, dropped = self.moments.popitem(last=False)
            self.moments_bytes -= dropped.nbytes if isinstance(dropped, Tensor) else 0
        return value

    def pixels(self, tasks: Sequence[Task]) -> tuple[Tensor, dict[int, str]]:
        """The images of a batch, uint8 ``(B, H, W, 3)``, and the tasks whose source cannot be read: number -> why.

        A batch is always computed whole, so that an image does not depend on what was missing when it was made.
        """
        generators = [task_rng(self.job.seed, task.number) for task in tasks]
        targets = [task.target for task in tasks]
        if self.job.from_noise:
            return self.engine.generate(targets, generators), {}
        encoded = [self.encoded(task.source) for task in tasks]
        failures = {t.number: str(e) for t, e in zip(tasks, encoded, strict=True) if isinstance(e, UserError)}
        c, h, w = self.engine.latent_shape
        blank = torch.zeros(1, 2 * c, h, w, dtype=self.engine.dtype)
        moments = torch.cat([blank if isinstance(e, UserError) else e for e in encoded])
        return self.engine.translate(moments, targets, [task.strength for task in tasks], generators), failures

    def write(self, task: Task, pixels: Tensor) -> tuple[int, int, int]:
        """Encodes and writes one image; returns its record row."""
        return task.number, *write_image(self.job.folder / DATA / task.path, encode_png(pixels.numpy(), task.text))


def die_with_parent() -> None:
    """Asks the kernel (Linux) to end this process when its parent does, in the middle of a batch too."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG


def main(pipe: Connection, job: Job, device: str) -> None:
    """The process's body: loads, then serves batches until the pipe ends."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interruption means
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    quiet_libraries()
    try:
        maker = BatchMaker(job, device)
    except UserError as error:
        pipe.send(("fatal", str(error)))
        return
    except Exception:
        pipe.send(("error", None, traceback.format_exc()))
        return
    pipe.send(("ready",))
    writers = ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1))
    try:
        while True:
            batch, tasks = pipe.recv()
            pixels, failures = maker.pixels(tasks)
            wanted = [(t, p) for t, p in zip(tasks, pixels, strict=True) if t.path and t.number not in failures]
            rows = list(writers.map(lambda pair: maker.write(*pair), wanted))
            pipe.send(
                ("done", batch, rows, {t.number: failures[t.number] for t in tasks if t.path and t.number in failures})
            )
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except OSError as error:
        pipe.send(
            ("fatal", os_error_line(error))
            if error.errno in _FATAL_ERRNOS
            else ("error", batch, traceback.format_exc())
        )
    except Exception:
        pipe.send(("error", batch, traceback.format_exc()))
    finally:
        writers.shutdown(wait=False, cancel_futures=True)
