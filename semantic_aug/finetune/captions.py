"""Captions of single images, for data sets that have them, with the class's token in them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from semantic_aug.datasets import LoadedDataset
from semantic_aug.diffusion.text import check_prompts, class_prompts_of, class_words
from semantic_aug.diffusion.tokens import ClassTokens
from semantic_aug.finetune.config import check_captions
from semantic_aug.prompts import TEMPLATES, caption_prompt, class_phrase


def check_length(
    dataset: LoadedDataset, folder: Path, base_name: str, num_vectors: int | None, class_prompts_ratio: float
) -> None:
    """Refuses training prompts and captions whose class the base model would not read; before any work.

    Args:
        dataset: whose classes are learned.
        folder: of the base model.
        base_name: of the base model, for errors.
        num_vectors: vectors per class token, None without class tokens.
        class_prompts_ratio: share of the draws that use the class prompt.

    Raises:
        UserError: see :func:`semantic_aug.diffusion.text.check_prompts`.
    """
    tokens = None
    if num_vectors is not None:
        vectors = torch.zeros(len(dataset.source_names) * num_vectors, 1)
        tokens = ClassTokens(dataset.source_names, vectors, num_vectors)
    classes, super_class = list(zip(dataset.source_names, dataset.class_names, strict=True)), dataset.spec.super_class
    prompts = list(class_prompts_of(classes, super_class, tokens, TEMPLATES))
    captions = Captions(dataset, tokens, class_prompts_ratio)
    for text, label in zip(captions.texts, captions.labels, strict=True):
        source, name = classes[label]
        phrase = tokens.phrase(source) if tokens is not None else class_phrase(name, super_class)
        prompts.append((text, phrase, f"caption of an image of class '{source}'"))
    check_prompts(folder, base_name, prompts, tokens.names if tokens is not None else ())


class Captions:
    """The captions of a training split, and which one a drawn image takes.

    An image may have several, one a line; an image without any always stands under its class prompt.

    Args:
        dataset: its training split's column ``caption`` is read.
        tokens: class tokens, or None.
        class_prompts_ratio: share of the draws that use the class prompt.

    Raises:
        UserError: captions are asked for and the data set has none.
    """

    def __init__(self, dataset: LoadedDataset, tokens: ClassTokens | None, class_prompts_ratio: float):
        self.ratio, self.texts, self.labels = class_prompts_ratio, [], []
        if class_prompts_ratio == 1:
            return
        table = dataset.train
        check_captions(dataset, class_prompts_ratio)
        phrases = [
            class_words(source, name, dataset.spec.super_class, tokens)
            for source, name in zip(dataset.source_names, dataset.class_names, strict=True)
        ]
        counts = []
        for label, text in zip(table.labels.tolist(), table.extras["caption"].tolist(), strict=True):
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            self.texts += [caption_prompt(line, phrases[label], dataset.class_names[label]) for line in lines]
            self.labels += [label] * len(lines)
            counts.append(len(lines))
        self.counts = torch.tensor(counts)
        self.first = self.counts.cumsum(0) - self.counts

    def choose(self, index: Tensor, drawn: Tensor) -> Tensor | None:
        """Rows of :attr:`texts` for images ``(B,)`` and uniform numbers ``(B,)``, -1 for the class prompt; None without any."""
        if not self.texts:
            return None
        counts = self.counts[index]
        share = (drawn - self.ratio) / (1 - self.ratio)  # of those below the ratio negative, else uniform in [0, 1)
        chosen = self.first[index] + (share * counts).long().clamp(min=0).minimum((counts - 1).clamp(min=0))
        return torch.where((share >= 0) & (counts > 0), chosen, -1)
