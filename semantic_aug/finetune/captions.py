"""Captions of single images, for data sets that have them, with the class's token in them."""

from __future__ import annotations

import torch
from torch import Tensor

from semantic_aug.datasets import LoadedDataset
from semantic_aug.diffusion.text import class_words
from semantic_aug.diffusion.tokens import ClassTokens
from semantic_aug.finetune.config import check_captions
from semantic_aug.prompts import caption_prompt


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
        self.ratio, self.texts = class_prompts_ratio, []
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
