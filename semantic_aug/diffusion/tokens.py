"""Class tokens: one trained vector (or several) per class, spliced into the text encoder's embedding look-up.

Textual inversion (Gal et al. 2023, arXiv:2208.01618) trains rows of the token table. Training a separate ``(K * V, D)``
parameter is the same under AdamW and leaves the table of tens of thousands of rows frozen.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AddedToken, CLIPTextModel, CLIPTokenizer

from semantic_aug.divergence import non_finite
from semantic_aug.errors import UserError
from semantic_aug.prompts import ClassIndex, class_token
from semantic_aug.registry import token_files
from semantic_aug.tensors import load_pickle, read_metadata, save_tensors

log = logging.getLogger(__name__)

FILE_NAME = "learned_embeds.safetensors"
TABLES = ("clip_l", "clip_g")
"""Names of the two text encoders' tables in a file, as is the custom for Stable Diffusion XL."""


@dataclass
class ClassTokens:
    """Learned vectors of the classes of one data set.

    Attributes:
        class_names: source class names in the order of their tokens; empty where the file has none.
        vectors: ``(K * V, D)`` float32, V vectors of class 0, then of class 1, and so on.
        vectors_per_class: V.
        base_model: the base model they were trained on (may be empty).
        dataset: the data set they were trained on (may be empty).
        images: digest of the training images, as ``made_from`` of the run's ``args.yaml`` has it (may be empty).
        names: placeholders, one per vector; by default ``<class_i>``, and ``<class_i_v>`` for further vectors.
        further: of a base model with several text encoders, the others' vectors, ``(K * V, D')`` each.
    """

    class_names: tuple[str, ...]
    vectors: Tensor
    vectors_per_class: int = 1
    base_model: str = ""
    dataset: str = ""
    names: tuple[str, ...] = field(default=())
    further: tuple[Tensor, ...] = ()
    images: str = ""

    def __post_init__(self):
        if not self.names:
            count, per_class = len(self.class_names) or len(self.vectors), self.vectors_per_class
            self.names = tuple(class_token(i, v) for i in range(count) for v in range(per_class))
        for table in self.tables:
            if table.ndim != 2 or len(self.names) != len(table):
                raise ValueError(f"{len(self.names)} placeholders for vectors of the shape {tuple(table.shape)}")
        if self.class_names and len(self.class_names) * self.vectors_per_class != len(self.names):
            raise ValueError(
                f"{len(self.class_names)} classes x {self.vectors_per_class}, {len(self.names)} placeholders"
            )

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """The vectors for each text encoder."""
        return (self.vectors, *self.further)

    def for_classes(self, source_names: Sequence[str], prompt_names: Sequence[str], where: str) -> ClassTokens:
        """These tokens under a data set's own spelling of its classes; see :class:`semantic_aug.prompts.ClassIndex`. Raises
        UserError: names the first class without a token, or two classes of one name."""
        if not self.class_names:
            return self._in_order(source_names, where)
        positions = ClassIndex(self.class_names).match(source_names, prompt_names, where=where)
        missing = [name for name, position in zip(source_names, positions, strict=True) if position is None]
        if missing:
            raise UserError(
                f"{where} has no token for {len(missing)} of {len(source_names)} classes ('{missing[0]}' the first): it was "
                f"trained on {self.dataset or 'a data set'} with the classes {', '.join(self.class_names[:5])}, ...; "
                "use a checkpoint of this data set"
            )
        class_names = list(self.class_names)
        for name, position in zip(source_names, positions, strict=True):
            class_names[position] = name
        return replace(self, class_names=tuple(class_names))

    def _in_order(self, source_names: Sequence[str], where: str) -> ClassTokens:
        """The vectors of a file without class names, assigned to a data set's classes in their order."""
        rows, count = len(self.vectors), len(source_names)
        if rows % count:
            raise UserError(
                f"{where} holds {rows} vectors without the names of their classes, the data set has {count} classes: expected "
                "as many vectors or a multiple, in the order of its classes; use a file of this data set"
            )
        log.info("%s names no classes: its vectors are taken in the order of the data set's classes", where)
        return replace(self, class_names=tuple(source_names), vectors_per_class=rows // count, names=())

    def phrase(self, class_name: str) -> str:
        """The placeholder(s) of a class, as they stand in a prompt. Raises ValueError: the class has no token;
        :meth:`for_classes` comes first."""
        start = self.class_names.index(class_name) * self.vectors_per_class
        return " ".join(self.names[start : start + self.vectors_per_class])


class SplicedEmbedding(nn.Module):
    """A token look-up that takes ids from ``first_id`` upwards from ``class_vectors``.

    Args:
        table: the text encoder's own embedding, unchanged.
        first_id: id of the first class token, at most the table's number of rows.
        class_vectors: ``(K * V, D)``; may be a parameter.
    """

    def __init__(self, table: nn.Embedding, first_id: int, class_vectors: Tensor):
        super().__init__()
        self.table, self.first_id = table, first_id
        if isinstance(class_vectors, nn.Parameter):
            self.class_vectors = class_vectors
        else:
            self.register_buffer("class_vectors", class_vectors, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The base table; transformers asks an embedding for it."""
        return self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        vectors = self.table(ids.clamp(max=self.first_id - 1))
        classes = F.embedding((ids - self.first_id).clamp(min=0), self.class_vectors).to(vectors.dtype)
        return torch.where((ids >= self.first_id).unsqueeze(-1), classes, vectors)


def install(
    tokens: ClassTokens,
    tokenizers: Sequence[CLIPTokenizer],
    text_encoders: Sequence[CLIPTextModel],
    trainable: bool = False,
) -> list[Tensor]:
    """Teaches the tokenizers and text encoders of a base model the class tokens, in place: a tokenizer gets the placeholders,
    with ids from its present size upwards, a text encoder a :class:`SplicedEmbedding` of copies of its vectors, a float32
    parameter where ``trainable``. Returns the installed ``(K * V, D)`` vectors of each text encoder.

    Raises:
        UserError: vectors for another number of text encoders or of another width, or a tokenizer that knows a placeholder
            already.
    """
    if len(tokens.tables) != len(text_encoders):
        raise UserError(
            f"class tokens hold vectors for {_encoders(len(tokens.tables))}, the base model has "
            f"{_encoders(len(text_encoders))}: they were trained on another base model "
            f"({tokens.base_model or 'not recorded'}); correct model_path or embed_path of the checkpoint's entry"
        )
    parts = zip(tokens.tables, tokenizers, text_encoders, strict=True)
    return [_install(tokens, *part, trainable) for part in parts]


def _install(
    tokens: ClassTokens, vectors: Tensor, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, trainable: bool
) -> Tensor:
    """Teaches one tokenizer and text encoder the class tokens with these vectors."""
    table = text_encoder.get_input_embeddings()
    if vectors.shape[-1] != table.embedding_dim:
        raise UserError(
            f"class tokens have {vectors.shape[-1]} values, the base model's text encoder takes {table.embedding_dim}: "
            f"they were trained on another base model ({tokens.base_model or 'not recorded'})"
        )
    known = tokenizer.get_vocab()
    if taken := next((name for name in tokens.names if name in known), None):
        raise UserError(
            f"the base model's tokenizer already has a token '{taken}': use the base model without class tokens"
        )
    first_id = len(tokenizer)
    if first_id > table.num_embeddings:
        raise UserError(
            f"the base model's tokenizer has {first_id} tokens, its text encoder {table.num_embeddings}: "
            "the folder is damaged"
        )
    add_placeholders(tokenizer, tokens.names)
    vectors = vectors.detach().clone().to(table.weight.device, torch.float32)
    vectors = nn.Parameter(vectors) if trainable else vectors.to(table.weight.dtype)
    text_encoder.set_input_embeddings(SplicedEmbedding(table, first_id, vectors))
    # where the published configurations have 2, the pooled prompt would be read at the largest id, a class token
    getattr(text_encoder, "text_model", text_encoder).eos_token_id = tokenizer.eos_token_id
    return vectors


def add_placeholders(tokenizer: CLIPTokenizer, names: Sequence[str]) -> None:
    """Teaches a tokenizer placeholders as they are spelled: normalised, ``<A>`` and ``<a>`` would be one token."""
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in names])


def _encoders(count: int) -> str:
    return "one text encoder" if count == 1 else f"{count} text encoders (Stable Diffusion XL)"


def initial_tokens(
    class_names: Sequence[str],
    prompt_names: Sequence[str],
    super_class: str,
    initializer: str,
    tokenizers: Sequence[CLIPTokenizer],
    text_encoders: Sequence[CLIPTextModel],
    vectors_per_class: int = 1,
) -> ClassTokens:
    """Untrained class tokens for every text encoder, the vectors of a class all alike: the mean embedding of the initialiser's
    words, which are ``class_name``, ``super_class``, or the user's own."""
    tables = []
    for tokenizer, text_encoder in zip(tokenizers, text_encoders, strict=True):
        embeddings = text_encoder.get_input_embeddings().weight.detach().float().cpu()
        rows = []
        for name in prompt_names:
            words = {"class_name": name, "super_class": super_class or name}.get(initializer, initializer)
            ids = tokenizer(words, add_special_tokens=False).input_ids
            rows += [embeddings[ids].mean(0) if ids else embeddings.mean(0)] * vectors_per_class
        tables.append(torch.stack(rows))
    return ClassTokens(tuple(class_names), tables[0], vectors_per_class, further=tuple(tables[1:]))


def save_tokens(tokens: ClassTokens, path: Path) -> None:
    """Writes placeholders -> vectors ``(D,)`` as safetensors; names, base model and data set go into the metadata.

    Of a base model with two text encoders the file holds their tables ``clip_l`` and ``clip_g`` instead, ``(K * V, D)``
    each with a row per placeholder, which ``load_textual_inversion`` takes with the list of placeholders.
    """
    metadata = {
        "class_names": tokens.class_names,
        "placeholders": tokens.names,
        "vectors_per_class": tokens.vectors_per_class,
        "base_model": tokens.base_model,
        "dataset": tokens.dataset,
        "images": tokens.images,
    }
    if tokens.further:
        tensors = {name: table.float() for name, table in zip(TABLES, tokens.tables, strict=True)}
    else:
        tensors = {name: v.float() for name, v in zip(tokens.names, tokens.vectors, strict=True)}
    save_tensors(path, tensors, metadata)


def load_tokens(path: Path) -> ClassTokens:
    """Reads class tokens of this project, of the original implementation, or of tools whose placeholders name the classes.

    ==========================  ===========================================================================================
    ours                        placeholder -> ``(D,)``, class names in the metadata (``.safetensors``)
    the original                ``learned_embeds_dict`` (placeholder -> ``(D,)``), ``name2placeholder``, ``placeholder2name``
    DA-Fusion, diffusers        ``<dining_table>`` -> ``(D,)`` or ``(V, D)``, of one class or of all; a folder of such files
    UniDiffDA                   ``learned_embeds`` ``(K * V, D)`` in the order of the data set's classes
    ==========================  ===========================================================================================

    Raises:
        UserError: missing, damaged, of another format, or with values that are not finite.
    """
    parts = {
        file: _load_bin(file) if file.suffix in (".bin", ".pt", ".pth") else _load_safetensors(file)
        for file in token_files(path)
    }
    tokens = _joined(parts, path)
    if bad := non_finite(zip(TABLES, tokens.tables, strict=False)):
        table = tokens.tables[TABLES.index(bad)]
        name = bad if tokens.further else tokens.names[int(table.isfinite().all(1).int().argmin())]
        raise UserError(
            f"class tokens {path} hold values that are not finite ('{name}' the first): their training diverged; use an "
            "earlier checkpoint"
        )
    return tokens


def _joined(parts: Mapping[Path, ClassTokens], path: Path) -> ClassTokens:
    """The classes of several files as one."""
    first, *others = parts.values()
    if not others:
        return first
    names = [name for part in parts.values() for name in part.names]
    kinds = {
        (part.vectors_per_class, part.vectors.shape[-1], bool(part.class_names), part.further)
        for part in parts.values()
    }
    if twice := next((name for name, count in Counter(names).items() if count > 1), None):
        files = [file.relative_to(path) for file, part in parts.items() if twice in part.names]
        raise UserError(
            f"class tokens {path}: {files[0]} and {files[1]} both hold '{twice}': name one file with embed_path"
        )
    if len(kinds) > 1 or not first.class_names or first.further:
        raise UserError(
            f"class tokens {path}: its {len(parts)} files differ in their layout: name one file with embed_path"
        )
    class_names = tuple(name for part in parts.values() for name in part.class_names)
    vectors = torch.cat([part.vectors for part in parts.values()])
    return ClassTokens(class_names, vectors, first.vectors_per_class, names=tuple(names))


def _load_safetensors(path: Path) -> ClassTokens:
    try:
        with safe_open(path, "pt") as content:
            metadata = read_metadata(content.metadata(), "class_names", "placeholders")
            if "placeholders" not in metadata:
                return _without_names({name: content.get_tensor(name) for name in content.keys()}, path)  # noqa: SIM118
            names = tuple(metadata["placeholders"])
            if TABLES[0] in content.keys():  # noqa: SIM118
                tables = [content.get_tensor(name).float() for name in TABLES]
            else:
                tables = [torch.stack([content.get_tensor(name) for name in names]).float()]
        return ClassTokens(
            tuple(metadata["class_names"]),
            tables[0],
            int(metadata["vectors_per_class"]),
            names=names,
            further=tuple(tables[1:]),
            **{name: metadata.get(name, "") for name in ("base_model", "dataset", "images")},
        )
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"class tokens {path} are damaged ({reason}): run train_lora.py again") from None


EXPECTED = "expected class tokens: learned_embeds_dict and name2placeholder, <class> -> vector, or learned_embeds"


def _load_bin(path: Path) -> ClassTokens:
    content = load_pickle(path, EXPECTED)
    try:
        if "learned_embeds_dict" not in content:
            return _without_names(content, path)
        vectors, placeholder_of = content["learned_embeds_dict"], content["name2placeholder"]
        names = tuple(placeholder_of.values())
        stacked = torch.stack([vectors[name].detach().float().reshape(-1) for name in names])
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path} has another layout ({type(error).__name__}: {error}): {EXPECTED}") from None
    return ClassTokens(tuple(placeholder_of), stacked, names=names)


def _without_names(content: Mapping[str, Tensor], path: Path) -> ClassTokens:
    """Tokens of files that have no list of class names. Raises UserError: other tensors, or tokens of different sizes."""
    tables = {
        name: value.detach().float().reshape(-1, value.shape[-1]) for name, value in content.items() if value.ndim
    }
    if list(tables) == ["learned_embeds"]:
        return ClassTokens((), tables["learned_embeds"])
    shapes = {tuple(table.shape) for table in tables.values()}
    if len(shapes) != 1 or not all(name.startswith("<") and name.endswith(">") for name in content):
        raise UserError(f"{path} has another layout (its entries are {', '.join(list(content)[:3])}, ...): {EXPECTED}")
    ((per_class, _),) = shapes
    # diffusers numbers the further vectors of a token: <cat>, <cat>_1
    names = tuple(f"{name}_{vector}" if vector else name for name in tables for vector in range(per_class))
    return ClassTokens(tuple(name[1:-1] for name in tables), torch.cat(list(tables.values())), per_class, names=names)
