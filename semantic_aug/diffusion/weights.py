"""The weight files in a base model's folder: the choice among their variants, and a check that they are whole.

diffusers and transformers store a network's weights as one file or as shards listed in an index, as safetensors or as a
pickle, each in variants (``.fp16``, ``.non_ema``) that are named before the ending. The plain files are preferred.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from semantic_aug.errors import UserError

VARIANTS = ("fp32", "fp16", "bf16", "ema")
"""Variants in order of preference after the plain files; others follow in alphabetical order, ``non_ema`` comes last."""

_STEMS = {
    "network": {"safetensors": "diffusion_pytorch_model", "bin": "diffusion_pytorch_model"},
    "text_encoder": {"safetensors": "model", "bin": "pytorch_model"},
}
_SINGLE = r"{stem}(?:\.(?P<variant>(?!.*\d{{5}}-of-\d{{5}})[\w-]+))?\.{ending}"
_INDEX = r"{stem}\.{ending}\.index(?:\.(?P<variant>[\w-]+))?\.json"
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of one network.

    Attributes:
        files: the single file, or the index and its shards.
        variant: None for the plain files.
        pickled: ``.bin`` files, which are read with ``weights_only=True``.
    """

    files: tuple[Path, ...]
    variant: str | None
    pickled: bool


def _preference(variant: str | None) -> tuple[int, str]:
    order = [None, *VARIANTS]
    if variant in order:
        return order.index(variant), ""
    return len(order) + ("non_ema" in variant), variant


def find_weights(folder: Path) -> WeightFiles | None:
    """The weight files of one network, the plain ones before a variant and safetensors before pickles. Raises UserError: an
    index that cannot be read, or a shard that is missing."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    text = folder.name.startswith("text_encoder")
    for ending, stem in _STEMS["text_encoder" if text else "network"].items():
        candidates = []
        # where a folder holds both, transformers takes the single file and diffusers the shards
        for rank, pattern in enumerate((_SINGLE, _INDEX) if text else (_INDEX, _SINGLE)):
            compiled = re.compile(pattern.format(stem=stem, ending=ending))
            for name in names:
                if match := compiled.fullmatch(name):
                    candidates.append((_preference(match["variant"]), rank, name, match["variant"]))
        if candidates:
            _, _, name, variant = min(candidates)
            return WeightFiles(_with_shards(folder / name), variant, ending == "bin")
    return None


def _with_shards(path: Path) -> tuple[Path, ...]:
    """A single file, or an index followed by its shards."""
    if path.suffix != ".json":
        return (path,)
    try:
        shards = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read as an index of shards ({error}): download it again") from None
    for name in shards:
        if not (path.parent / name).is_file():
            raise UserError(f"{path} lists {len(shards)} shards and '{name}' is missing: download it again")
    return (path, *(path.parent / name for name in shards))


def check_weights(folder: Path, parts: Iterable[str], name: str) -> None:
    """Refuses a base model without the weights of all its networks, or with a file that was cut short.

    Only file headers are read.

    Raises:
        UserError: names the part and what was expected, or the damaged file.
    """
    for part in parts:
        weights = find_weights(folder / part)
        if weights is None:
            stem = _STEMS["text_encoder" if part.startswith("text_encoder") else "network"]["safetensors"]
            present = sorted(p.name for p in (folder / part).iterdir()) if (folder / part).is_dir() else []
            raise UserError(
                f"base model '{name}' has no weights in its folder {part} (it holds {', '.join(present[:4]) or 'nothing'}): "
                f"expected {stem}.safetensors, a variant such as {stem}.fp16.safetensors, or shards with their index; "
                f"add the missing file to {folder / part}"
            )
        for path in weights.files:
            check_header(path)


def check_header(path: Path) -> None:
    """Refuses a weight file that is damaged as far as its header and length tell. Raises UserError: a Git LFS pointer instead
    of the file, or a damaged one."""
    from safetensors import SafetensorError, safe_open

    try:
        with open(path, "rb") as content:
            start = content.read(len(_LFS_POINTER))
        if start == _LFS_POINTER:
            raise UserError(f"{path} is a Git LFS pointer, not the file itself: run 'git lfs pull' in its folder")
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                pass
        elif not start:
            raise UserError(f"{path} is empty: download it again")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged ({str(error)[:120]}): download it again") from None
