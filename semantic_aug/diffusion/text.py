"""The U-Net's conditioning from prompts: hidden states it attends to and, in some families, a pooled vector and sizes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from semantic_aug.diffusion.tokens import ClassTokens, add_placeholders
from semantic_aug.errors import UserError
from semantic_aug.prompts import SAMPLING_TEMPLATE, class_phrase, fill

PROMPT_BYTES = 1 << 29
"""Bound of the encoded prompts that a process keeps on its device; many classes and templates would take gigabytes."""

MOST_TOKENS = 10_000
"""Above any prompt length of a text encoder; transformers uses a larger number where the length is not given."""


@dataclass(frozen=True)
class Conditions:
    """The U-Net's conditioning for each of B images.

    Attributes:
        hidden: ``(B, L, D)``, the prompts' hidden states.
        added: the U-Net's ``added_cond_kwargs``, each with B rows. Empty in Stable Diffusion 1.x and 2.x; in XL the
            pooled prompt ``text_embeds`` ``(B, P)`` and ``time_ids`` ``(B, 6)``: original size, crop's corner and target
            size, each as (height, width) in pixels.
    """

    hidden: Tensor
    added: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, rows) -> Conditions:
        """The chosen rows; a list, a slice or an index tensor."""
        return self._each(lambda value: value[rows])

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def nbytes(self) -> int:
        return self.hidden.nbytes + sum(value.nbytes for value in self.added.values())

    def to(self, *where) -> Conditions:
        """On another device or in another precision."""
        return self._each(lambda value: value.to(*where))

    def expand(self, count: int) -> Conditions:
        """One row, ``count`` times."""
        return self._each(lambda value: value.expand(count, *value.shape[1:]))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Conditions:
        return Conditions(change(self.hidden), {name: change(value) for name, value in self.added.items()})

    def lerp(self, other: Conditions, weights: Tensor) -> Conditions:
        """Between this (weight 0) and another batch (1), linearly; ``weights`` ``(B,)``."""

        def between(a: Tensor, b: Tensor) -> Tensor:
            return torch.lerp(a, b, weights.to(a).view(-1, *[1] * (a.dim() - 1)))

        return Conditions(
            between(self.hidden, other.hidden), {name: between(a, other.added[name]) for name, a in self.added.items()}
        )

    @staticmethod
    def cat(parts: Iterable[Conditions]) -> Conditions:
        """Several batches as one."""
        parts = list(parts)
        added = {name: torch.cat([part.added[name] for part in parts]) for name in parts[0].added}
        return Conditions(torch.cat([part.hidden for part in parts]), added)

    def unet_arguments(self) -> dict:
        """Keyword arguments of a U-Net's call."""
        return {"encoder_hidden_states": self.hidden, **({"added_cond_kwargs": dict(self.added)} if self.added else {})}


class ConditionCache:
    """Encoded prompts by key, within a bound of bytes (one entry is always kept); the least recently used is dropped first."""

    def __init__(self, bound: int):
        self.bound, self.nbytes = bound, 0
        self._entries: OrderedDict[int, Conditions] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: int) -> Conditions | None:
        """An entry, or None where there is none."""
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def put(self, key: int, conditions: Conditions) -> None:
        """Adds a new entry."""
        self._entries[key] = conditions
        self.nbytes += conditions.nbytes
        while self.nbytes > self.bound and len(self._entries) > 1:
            self.nbytes -= self._entries.popitem(last=False)[1].nbytes


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer in a folder of a base model. Raises UserError: absent, incomplete or damaged."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if (
        "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names
    ):  # transformers would make an empty one
        raise UserError(
            f"{folder} holds no tokenizer: expected tokenizer.json, or vocab.json and merges.txt; download it again"
        )
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder)
    except Exception as error:  # the library raises many kinds for a damaged file
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{folder} holds a tokenizer that cannot be read ({reason}): download it again") from None
    if tokenizer.model_max_length > MOST_TOKENS:
        raise UserError(f"{folder / 'tokenizer_config.json'} gives no model_max_length: download it again")
    return tokenizer


def tokenize(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    """Prompts to ids ``(B, L)``, padded or cut to the tokenizer's length."""
    return tokenizer(
        list(prompts), padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    ).input_ids


def check_prompts(
    folder: Path, tokenizers: Sequence[str], prompts: Iterable[tuple[str, str, str]], placeholders: Sequence[str] = ()
) -> None:
    """Refuses prompts whose class is behind the last token that a text encoder reads.

    A prompt that is cut after its class is allowed. Only the tokenizers are loaded.

    Args:
        folder: of the base model.
        tokenizers: its folders of the tokenizers.
        prompts: (prompt, the phrase that names its class, its origin).
        placeholders: of the class tokens.

    Raises:
        UserError: names the prompt, its origin and the tokenizer's length.
    """
    prompts = list(prompts)
    # the prompt up to the end of the class has to fit, with the start and end tokens
    starts = [prompt[: prompt.index(phrase) + len(phrase)] for prompt, phrase, _ in prompts]
    for part in tokenizers:
        tokenizer = load_tokenizer(folder / part)
        add_placeholders(tokenizer, placeholders)
        for row, ids in enumerate(tokenizer(starts, verbose=False).input_ids if starts else []):
            if len(ids) > tokenizer.model_max_length:
                prompt, phrase, origin = prompts[row]
                raise UserError(
                    f"{origin}: '{prompt[:80]}' takes {len(ids)} tokens up to its class '{phrase[:40]}', the base model's "
                    f"{part} reads {tokenizer.model_max_length} (start and end included): the class would be "
                    "cut off; shorten the prompt or the class name, or lower --num_vectors"
                )


def class_prompts_of(
    classes: Sequence[tuple[str, str]], super_class: str, tokens: ClassTokens | None, templates: Sequence[str]
) -> Iterator[tuple[str, str, str]]:
    """Every template with every class (source name, prompt name), as :func:`check_prompts` takes them."""
    for source, name in classes:
        phrase = tokens.phrase(source) if tokens is not None else class_phrase(name, super_class)
        for template in templates:
            prompt = class_prompt(source, name, super_class, tokens, template)
            yield prompt, phrase, f"prompt '{template[:60]}' of class '{source}'"


def class_prompt(
    source_name: str, prompt_name: str, super_class: str, tokens: ClassTokens | None, template: str = SAMPLING_TEMPLATE
) -> str:
    """A template with :func:`class_words`."""
    return fill(template, class_words(source_name, prompt_name, super_class, tokens))


def class_words(source_name: str, prompt_name: str, super_class: str, tokens: ClassTokens | None) -> str:
    """The words for a class in a prompt: its token, found by the data set's own spelling, or without ``tokens`` its cleaned-up
    name, then the super-class."""
    if tokens is None:
        return class_phrase(prompt_name, super_class)
    return f"{tokens.phrase(source_name)} {super_class}".strip()
