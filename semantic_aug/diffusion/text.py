"""Prompts to the hidden states the U-Net attends to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from semantic_aug.diffusion.tokens import ClassTokens
from semantic_aug.prompts import SAMPLING_TEMPLATE, class_phrase, fill


def tokenize(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    """Prompts to ids ``(B, L)``, padded or cut to the tokenizer's length."""
    return tokenizer(
        list(prompts), padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    ).input_ids


def encode_ids(text_encoder: CLIPTextModel, ids: Tensor) -> Tensor:
    """Ids ``(B, L)`` to the last hidden states ``(B, L, D)``; gradients flow to trainable class vectors only."""
    return text_encoder(ids.to(text_encoder.device))[0]


@torch.no_grad()
def encode_prompts(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, prompts: Sequence[str]) -> Tensor:
    """Prompts to ``(B, L, D)``, without gradients."""
    return encode_ids(text_encoder, tokenize(tokenizer, prompts))


def class_prompt(
    source_name: str, prompt_name: str, super_class: str, tokens: ClassTokens | None, template: str = SAMPLING_TEMPLATE
) -> str:
    """The prompt of one class: its token where there is one, else its name, followed by the super-class.

    Args:
        source_name: the class as the data set spells it; tokens are found by it.
        prompt_name: the class as prompts speak it.
        super_class: of the data set; may be empty.
        tokens: class tokens of the checkpoint, or None.
        template: with ``{}`` for the phrase.
    """
    if tokens is None:
        return fill(template, class_phrase(prompt_name, super_class))
    return fill(template, f"{tokens.phrase(source_name)} {super_class}".strip())
