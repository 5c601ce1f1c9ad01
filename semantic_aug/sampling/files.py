"""The image files of a subset: their names, their metadata and rows of ``meta.csv``, their encoding."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from semantic_aug import meta_csv
from semantic_aug.files import atomic_path
from semantic_aug.prompts import with_context
from semantic_aug.sampling.plan import Plan
from semantic_aug.seeding import derive_seed

TEMPORARY_SUFFIXES = (".tmp", ".part")
"""Ends of the names of files that are being written, the second one by earlier versions."""

FORMATS = {
    "png": {"format": "PNG", "compress_level": 4},
    "webp": {"format": "WEBP", "lossless": True, "quality": 30, "method": 2},
    "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
}
"""How images are encoded; all but jpg are lossless."""

_DESCRIPTION = 0x010E
_CHUNK = 65_536
"""Tasks whose numbers are turned from arrays into Python's at once: many times faster than one by one."""


@dataclass(frozen=True, eq=False)
class TaskPaths:
    """File names, metadata and ``meta.csv`` rows of a plan's tasks.

    Attributes:
        class_names: source spelling, for ``meta.csv``.
        folders: slug of each class.
        keys: name of each training image.
        seed: the run's ``--seed``.
        image_format: key of :data:`FORMATS`.
        templates: prompts of which each task draws one; empty: all have the same.
        contexts: what follows the prompts, in the plan's order; ``templates`` are then given.
        source_label: from the row of a source to its column ``Source Label``, empty for a labelled source; None where all
            sources are labelled.
    """

    plan: Plan
    class_names: Sequence[str]
    folders: Sequence[str]
    keys: Sequence[str]
    seed: int
    image_format: str = "png"
    templates: Sequence[str] = ()
    contexts: Sequence[str] = ()
    source_label: Callable[[int], str] | None = None

    @property
    def further_columns(self) -> tuple[str, ...]:
        """The columns of ``meta.csv`` after the first five."""
        partner = meta_csv.SOURCE_COLUMNS[1:] if self.plan.partner is not None else ()
        prompt, unlabelled = ("Prompt",) if self.templates else (), ()
        if self.source_label is not None:
            unlabelled = meta_csv.UNLABELLED_COLUMNS
        return (*meta_csv.FURTHER_COLUMNS, *prompt, *partner, *unlabelled)

    def template(self, number: int) -> int:
        """The index of a task's prompt in ``templates``: a pure function of (seed, number)."""
        if len(self.templates) < 2:
            return 0
        return derive_seed(self.seed, "template", number) % len(self.templates)

    def context(self, number: int) -> int | None:
        """The index of a task's context in ``contexts``; None without contexts."""
        return None if self.plan.context is None else int(self.plan.context[number])

    def prompt(self, number: int) -> str:
        """A task's prompt, ``{}`` for the class."""
        context = self.context(number)
        return with_context(self.templates[self.template(number)], "" if context is None else self.contexts[context])

    def relative(self, number: int) -> str:
        """A task's path relative to ``data/``."""
        plan = self.plan
        return meta_csv.relative_path(
            self.folders[plan.source_class[number]],
            self.folders[plan.target[number]],
            number,
            plan.strength(number),
            self.image_format,
        )

    def text(self, number: int) -> dict[str, str]:
        """The metadata that is written into a task's image file."""
        plan = self.plan
        prompt = {"prompt": self.prompt(number)} if self.templates else {}
        partner = {"partner_image": self.keys[plan.partner[number]]} if plan.partner is not None else {}
        return {
            "source": self.class_names[plan.source_class[number]],
            "target": self.class_names[plan.target[number]],
            "source_image": self.keys[plan.source[number]] if plan.source[number] >= 0 else "",  # noise has none
            "strength": meta_csv.strength_text(plan.strength(number)),
            "seed": str(self.seed),
            "number": str(number),
            "plan": plan.digest,
            **prompt,
            **partner,
        }

    def file_names(self, numbers: np.ndarray) -> Iterator[str]:
        """Names of some tasks' files within the folders of their source classes."""
        # millions of them: what depends on the class or the strength alone is formatted once
        targets, strengths = self.folders, [meta_csv.strength_text(s) for s in self.plan.strengths]
        ends = [f"-{strength}.{self.image_format}" for strength in strengths]
        for number, target, code in self._columns(numbers, self.plan.target, self.plan.strength_code):
            yield f"{targets[target]}-{number:06d}{ends[code]}"

    def meta_rows(self, numbers: np.ndarray) -> Iterator[tuple]:
        """The rows of ``meta.csv`` for some tasks."""
        plan, folders, keys, seed = self.plan, self.folders, self.keys, str(self.seed)
        names = meta_csv.without_slashes(self.class_names)
        strengths = [meta_csv.strength_text(s) for s in plan.strengths]
        columns = self._columns(numbers, plan.source_class, plan.target, plan.strength_code, plan.source)
        for (number, a, b, code, row), file in zip(columns, self.file_names(numbers), strict=True):
            key = keys[row] if row >= 0 else ""
            prompt, unlabelled = (self.prompt(number),) if self.templates else (), ()
            partner = (keys[plan.partner[number]],) if plan.partner is not None else ()
            if self.source_label is not None:
                label = self.source_label(row)
                key, unlabelled = ("", (key.partition("/")[2], label)) if label else (key, ("", ""))
            file, further = f"{folders[a]}/{file}", (*prompt, *partner, *unlabelled)
            yield (names[a], names[b], number, strengths[code], file, key, seed, *further)

    @staticmethod
    def _columns(numbers: np.ndarray, *columns: np.ndarray) -> Iterator[tuple[int, ...]]:
        """Each number with its value in every column, as Python's own."""
        for chunk in np.array_split(numbers, range(_CHUNK, len(numbers), _CHUNK)):
            yield from zip(chunk.tolist(), *(column[chunk].tolist() for column in columns), strict=True)


def encode_image(pixels: np.ndarray, text: dict[str, str], image_format: str = "png") -> bytes:
    """Encodes a uint8 ``(H, W, 3)`` image with its metadata; the same input gives the same bytes.

    PNG keeps the text in its text chunks, WebP and JPEG as JSON in the EXIF image description.
    """
    out, image, options = io.BytesIO(), Image.fromarray(pixels), dict(FORMATS[image_format])
    if image_format == "png":
        info = PngInfo()
        for key, value in text.items():
            info.add_itxt(key, value)
        image.save(out, pnginfo=info, **options)
    else:
        exif = Image.Exif()
        exif[_DESCRIPTION] = json.dumps(text, ensure_ascii=True)
        image.save(out, exif=exif, **options)
    return out.getvalue()


def text_of(image: Image.Image) -> dict[str, str]:
    """The metadata that :func:`encode_image` wrote into an image; empty for an image made elsewhere."""
    if image.format == "PNG":
        return {key: str(value) for key, value in image.text.items()}
    try:
        return json.loads(image.getexif().get(_DESCRIPTION, "{}"))
    except ValueError:
        return {}


def is_whole(content: bytes) -> bool:
    """Whether an encoded image has its end; decoders accept a file that lacks its last few bytes."""
    if content.startswith(b"RIFF"):
        return len(content) == 8 + int.from_bytes(content[4:8], "little")
    return content.endswith((b"IEND\xaeB`\x82", b"\xff\xd9"))


def write_image(path: Path, content: bytes) -> tuple[int, int]:
    """Writes a file whole or not at all; returns its size and CRC-32."""
    with atomic_path(path, flush=False) as temporary:
        temporary.write_bytes(content)
    return len(content), zlib.crc32(content)
