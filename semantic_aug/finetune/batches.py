"""What each optimiser step trains on, as a pure function of (seed, step).

All random numbers of a step (images, flips, crops, captions, timesteps, noise) are drawn for the whole effective batch
from one generator keyed by the step, and each process and micro-batch takes its slice. So a resumed run continues as if
never stopped, without any saved random state, and two processes at half the batch see what one process sees.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from semantic_aug.diffusion.losses import draw_timesteps
from semantic_aug.seeding import numpy_rng, torch_rng


@dataclass(frozen=True)
class Draw:
    """The random numbers of one step, each with the effective batch size ``E`` as its first dimension.

    Attributes:
        index: int64 ``(E,)``, rows of the training split.
        view: int64 ``(E,)``, which cached crop; or float ``(E, 2)`` in [0, 1), where to crop.
        flip: bool ``(E,)``.
        template: int64 ``(E,)``, which caption template.
        timestep: int64 ``(E,)``.
        posterior: ``(E, C, h, w)`` standard normal, for the VAE's posterior.
        noise: ``(E, C, h, w)`` standard normal plus the offset.
        caption: ``(E,)`` uniform in [0, 1), whether the image's own caption is used, and which.
    """

    index: Tensor
    view: Tensor
    flip: Tensor
    template: Tensor
    timestep: Tensor
    posterior: Tensor
    noise: Tensor
    caption: Tensor

    def part(self, position: int, size: int) -> Draw:
        """Slice ``position`` of ``size`` samples."""
        rows = slice(position * size, (position + 1) * size)
        return Draw(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


class BatchSource:
    """Draws the steps' batches.

    Args:
        labels: ``(N,)`` classes of the training images.
        batch_size: effective batch size, over all processes and micro-batches.
        latent_shape: (C, h, w).
        views: cached crops per image; 0 for a new crop each time.
        flip: whether images are mirrored half of the time.
        templates: number of caption templates.
        num_train_timesteps: length of the noise schedule.
        noise_offset: scale of the per-channel offset.
        class_balanced: draw classes evenly instead of images.
        seed: of the run.
    """

    def __init__(
        self,
        labels: np.ndarray,
        batch_size: int,
        latent_shape: tuple[int, int, int],
        views: int,
        flip: bool,
        templates: int,
        num_train_timesteps: int,
        noise_offset: float,
        class_balanced: bool,
        seed: int,
    ):
        self.labels, self.batch_size, self.latent_shape = labels, batch_size, latent_shape
        self.views, self.flip, self.templates = views, flip, templates
        self.num_train_timesteps, self.noise_offset = num_train_timesteps, noise_offset
        self.class_balanced, self.seed = class_balanced, seed
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty(0))
        self._by_class = [np.flatnonzero(labels == k) for k in np.unique(labels)]

    def indices(self, step: int) -> np.ndarray:
        """The rows of a step: the next ones of an endless sequence of shuffled epochs, or evenly drawn classes."""
        if self.class_balanced:
            rng = numpy_rng(self.seed, "train", "balanced", step)
            classes = rng.integers(len(self._by_class), size=self.batch_size)
            return np.array([rng.choice(self._by_class[k]) for k in classes])
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        return np.array([self._order(int(p) // len(self.labels))[int(p) % len(self.labels)] for p in positions])

    def _order(self, epoch: int) -> np.ndarray:
        if self._epoch[0] != epoch:
            self._epoch = epoch, numpy_rng(self.seed, "train", "epoch", epoch).permutation(len(self.labels))
        return self._epoch[1]

    def draw(self, step: int) -> Draw:
        """All random numbers of a step."""
        size, rng = self.batch_size, torch_rng(self.seed, "train", "step", step)
        if self.views:
            view = torch.randint(self.views, (size,), generator=rng)
        else:
            view = torch.rand(size, 2, generator=rng)
        flip = torch.rand(size, generator=rng) < 0.5 if self.flip else torch.zeros(size, dtype=torch.bool)
        template = torch.randint(self.templates, (size,), generator=rng)
        timestep = draw_timesteps(size, self.num_train_timesteps, rng)
        posterior = torch.randn(size, *self.latent_shape, generator=rng)
        noise = torch.randn(size, *self.latent_shape, generator=rng)
        if self.noise_offset:
            noise = noise + self.noise_offset * torch.randn(size, self.latent_shape[0], 1, 1, generator=rng)
        caption = torch.rand(size, generator=rng)  # drawn last: what comes before stays as it was without captions
        return Draw(torch.from_numpy(self.indices(step)), view, flip, template, timestep, posterior, noise, caption)
