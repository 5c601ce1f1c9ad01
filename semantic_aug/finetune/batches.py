"""Batches of the optimiser steps, a pure function of (seed, step), and the captions of single images.

All random numbers of a step (images, flips, crops, captions, timesteps, noise) are drawn for the whole effective batch
from one generator keyed by the step, and each process and micro-batch takes its slice. So a resumed run continues as if
never stopped, without any saved random state, and two processes at half the batch see what one process sees.
"""

from __future__ import annotations

import functools
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from semantic_aug.datasets import LoadedDataset
from semantic_aug.diffusion.families import family_of
from semantic_aug.diffusion.text import check_prompts, class_prompts_of, class_words
from semantic_aug.diffusion.tokens import ClassTokens
from semantic_aug.errors import UserError
from semantic_aug.finetune.config import ImageSettings
from semantic_aug.prompts import caption_prompt, class_phrase, contexts_of, fill, with_context
from semantic_aug.seeding import numpy_rng, torch_rng


@dataclass(frozen=True)
class Draw:
    """The random numbers of one step, each with the effective batch size ``E`` as its first dimension.

    Attributes:
        index: int64 ``(E,)``, rows of the training images, labelled ones first.
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


@functools.lru_cache(maxsize=4)
def _epoch_order(seed: int, kind: str, count: int, epoch: int) -> np.ndarray:
    return numpy_rng(seed, "train", kind, epoch).permutation(count)


@dataclass(frozen=True, eq=False)
class BatchSource:
    """Draws the steps' batches.

    Attributes:
        labels: ``(N,)`` classes of the training images.
        batch_size: effective batch size, over all processes and micro-batches.
        latent_shape: (C, h, w).
        views: cached crops per image; 0 for a new crop each time.
        flip: whether images are mirrored half of the time.
        templates: number of caption templates.
        num_train_timesteps: length of the noise schedule.
        noise_offset: scale of the per-channel offset.
        class_balanced: draw classes evenly instead of images.
        unlabelled: number of unlabelled images, whose rows follow the labelled ones'.
        unlabelled_share: of each batch; a fraction of an image is carried to the next step.
    """

    labels: np.ndarray
    batch_size: int
    latent_shape: tuple[int, int, int]
    _: KW_ONLY
    views: int
    flip: bool
    templates: int
    num_train_timesteps: int
    noise_offset: float
    class_balanced: bool
    seed: int
    unlabelled: int = 0
    unlabelled_share: float | None = None

    def indices(self, step: int) -> np.ndarray:
        """The rows of a step, labelled ones and the share of unlabelled ones in one random order."""
        begin, end = step * self.batch_size, (step + 1) * self.batch_size
        if not self.unlabelled:
            return self._labelled(step, begin, end)
        before, after = (round(n * self.batch_size * self.unlabelled_share) for n in (step, step + 1))
        labelled = self._labelled(step, begin - before, end - after)
        unlabelled = len(self.labels) + self._next("unlabelled", self.unlabelled, before, after)
        rng = numpy_rng(self.seed, "train", "unlabelled order", step)
        return rng.permutation(np.concatenate([labelled, unlabelled]))

    def _labelled(self, step: int, begin: int, end: int) -> np.ndarray:
        """The next rows of an endless sequence of shuffled epochs, or evenly drawn classes."""
        if not self.class_balanced:
            return self._next("epoch", len(self.labels), begin, end)
        rng = numpy_rng(self.seed, "train", "balanced", step)
        classes = rng.integers(len(self._by_class), size=end - begin)
        return np.array([rng.choice(self._by_class[k]) for k in classes], np.int64)

    @functools.cached_property
    def _by_class(self) -> list[np.ndarray]:
        """The rows of each class that has any."""
        return [np.flatnonzero(self.labels == k) for k in np.unique(self.labels)]

    def _next(self, kind: str, count: int, begin: int, end: int) -> np.ndarray:
        """A part of an endless sequence of shuffled epochs over ``count`` images."""
        rows = [_epoch_order(self.seed, kind, count, n // count)[n % count] for n in range(begin, end)]
        return np.array(rows, np.int64)

    def draw(self, step: int) -> Draw:
        """All random numbers of a step."""
        size, rng = self.batch_size, torch_rng(self.seed, "train", "step", step)
        if self.views:
            view = torch.randint(self.views, (size,), generator=rng)
        else:
            view = torch.rand(size, 2, generator=rng)
        flip = torch.rand(size, generator=rng) < 0.5 if self.flip else torch.zeros(size, dtype=torch.bool)
        template = torch.randint(self.templates, (size,), generator=rng)
        timestep = torch.randint(self.num_train_timesteps, (size,), generator=rng)
        posterior = torch.randn(size, *self.latent_shape, generator=rng)
        noise = torch.randn(size, *self.latent_shape, generator=rng)
        if self.noise_offset:
            noise = noise + self.noise_offset * torch.randn(size, self.latent_shape[0], 1, 1, generator=rng)
        caption = torch.rand(size, generator=rng)  # drawn last, so that the other draws are the same without captions
        return Draw(
            torch.from_numpy(self.indices(step)), view, flip, template, timestep,
            posterior=posterior, noise=noise, caption=caption,
        )  # fmt: skip


class Captions:
    """The captions of a training split, with the classes' tokens in them, and the choice of one for each drawn image.

    An image may have several captions, one a line; an image without any always has its class prompt.

    Args:
        dataset: its training split's column ``caption`` is read.
        tokens: class tokens, or None.
        images: settings of the run. With ``contexts`` a caption is a class prompt followed by the context in the image's own
            caption, as BOB fine-tunes (Yang et al. 2026): what varies besides the class is named, not learned as part of it.

    Raises:
        UserError: captions are asked for and the data set has none.
    """

    def __init__(self, dataset: LoadedDataset, tokens: ClassTokens | None, images: ImageSettings):
        self.ratio = 0.0 if images.contexts else images.class_prompts_ratio
        self.templates = images.templates if images.contexts else ()
        self.texts: list[str] = []
        self.labels: list[int] = []
        if not images.uses_captions:
            return
        table, super_class = dataset.train, dataset.spec.super_class
        names = list(zip(dataset.source_names, dataset.class_names, strict=True))
        self.phrases = [class_words(source, name, super_class, tokens) for source, name in names]
        column, labels = table.extras.get("caption", np.full(len(table), "")).tolist(), table.labels.tolist()
        if images.contexts:
            texts = contexts_of(column, labels, names, super_class)
        else:
            lines = [[line.strip() for line in text.splitlines() if line.strip()] for text in column]
            texts = [
                [caption_prompt(line, self.phrases[label], names[label][1], super_class) for line in captions]
                for label, captions in zip(labels, lines, strict=True)
            ]
        if not any(texts):
            flag = f"--class_prompts_ratio {self.ratio:g}"
            if images.contexts:
                flag = f"--contexts {images.contexts} (what captions say besides the class)"
            raise UserError(
                f"{flag}: data set {dataset.name} has no captions; give it a column 'caption' (in its list, on the hub, or in "
                "a metadata.csv beside a folder's images), or leave the flag out"
            )
        self.texts = [text for each in texts for text in each]
        self.labels = [label for label, each in zip(labels, texts, strict=True) for _ in each]
        texts += [[]] * len(dataset.unlabelled or ())
        self.counts = torch.tensor([len(each) for each in texts])
        self.first = self.counts.cumsum(0) - self.counts

    def choose(self, index: Tensor, drawn: Tensor, template: Tensor) -> Tensor | None:
        """Numbers of prompts for images ``(B,)``, -1 for the class prompt; None without any.

        Args:
            index: rows of the training split.
            drawn: ``(B,)`` uniform in [0, 1).
            template: ``(B,)`` class prompts that contexts follow.
        """
        if not self.texts:
            return None
        counts = self.counts[index]
        share = (drawn - self.ratio) / (1 - self.ratio)  # of those below the ratio negative, else uniform in [0, 1)
        chosen = self.first[index] + (share * counts).long().clamp(min=0).minimum((counts - 1).clamp(min=0))
        if self.templates:
            chosen = chosen * len(self.templates) + template
        return torch.where((share >= 0) & (counts > 0), chosen, -1)

    def prompt(self, number: int) -> str:
        """The prompt of a number that :meth:`choose` gives."""
        if not self.templates:
            return self.texts[number]
        row, template = divmod(number, len(self.templates))
        return with_context(fill(self.templates[template], self.phrases[self.labels[row]]), self.texts[row])


def check_training_prompts(
    dataset: LoadedDataset, folder: Path, base_name: str, num_vectors: int | None, images: ImageSettings
) -> None:
    """Refuses training prompts and captions whose class the base model would cut off; contexts, which follow the class, need
    no check. ``num_vectors`` is None without class tokens. Raises UserError: see :class:`Captions` and
    :func:`semantic_aug.diffusion.text.check_prompts`."""
    tokens = None
    if num_vectors is not None:
        vectors = torch.zeros(len(dataset.source_names) * num_vectors, 1)
        tokens = ClassTokens(dataset.source_names, vectors, num_vectors)
    classes, super_class = list(zip(dataset.source_names, dataset.class_names, strict=True)), dataset.spec.super_class
    prompts = list(class_prompts_of(classes, super_class, tokens, images.templates))
    captions = Captions(dataset, tokens, images)
    for text, label in () if images.contexts else zip(captions.texts, captions.labels, strict=True):
        source, name = classes[label]
        phrase = tokens.phrase(source) if tokens is not None else class_phrase(name, super_class)
        prompts.append((text, phrase, f"caption of an image of class '{source}'"))
    check_prompts(folder, family_of(folder, base_name).tokenizers, prompts, tokens.names if tokens is not None else ())
