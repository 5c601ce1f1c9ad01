"""Which part of a source image may change: masks at the resolution of the latents, from boxes or mask files.

DA-Fusion (Trabucco et al. 2023, section 4) confines its edits to a mask of the object. The official downloads of some data
sets have boxes of their objects (column ``box``); lists and folders of one's own may name a box or a mask file for each
image (``box_text``, ``mask_path``), which are read and checked here, where a mask is asked for.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from semantic_aug.datasets import ImageTable
from semantic_aug.datasets.fingerprint import hash_files
from semantic_aug.datasets.table import BOX_TEXT, MASK_PATH
from semantic_aug.errors import UserError

BOX, MASK = "box", "mask"
"""Columns that decide what is masked: left, top, right, bottom in pixels; the content hash of the mask's file."""


def columns_of(object_mask: str | None) -> tuple[str, ...]:
    """The columns of a data set, besides names, labels and content, that decide what a translation looks like."""
    return () if object_mask is None else (BOX, MASK)


def has_regions(images: ImageTable) -> bool:
    """Whether the images have boxes or masks, which are preferred to a classifier's activation maps."""
    return bool({BOX, BOX_TEXT, MASK_PATH} & set(images.extras))


def check_mask(part: str, images: ImageTable, dataset: str, classifier: Path | None = None) -> None:
    """Refuses ``--object_mask`` where no object is known. Raises UserError: images without boxes and masks, and no classifier
    that finds their objects."""
    if classifier is None and not has_regions(images):
        raise UserError(
            f"--object_mask {part}: {dataset} has no boxes of its objects and no masks; the official downloads of cub, car "
            "and pascal have boxes; for your own images give a column box or mask, a folder masks (docs/datasets.md), or "
            "--classifier RUN, which finds objects by class activation maps"
        )


def with_regions(images: ImageTable, part: str | None) -> ImageTable:
    """The training images with the user's own boxes as numbers and the content hashes of the user's masks; unchanged where
    ``part``, the value of ``--object_mask``, is None. Raises UserError: an image without box and mask, a malformed box, or a
    mask file that does not exist; names the image."""
    texts, paths = (images.extras.get(name, [""] * len(images)) for name in (BOX_TEXT, MASK_PATH))
    if part is None or not {BOX_TEXT, MASK_PATH} & set(images.extras):
        return images
    absent = [key for key, text, path in zip(images.keys, texts, paths, strict=True) if not (text or path)]
    if absent:
        raise UserError(
            f"--object_mask {part}: {len(absent)} of {len(images)} training images have neither box nor mask "
            f"('{absent[0]}' the first): give each one"
        )
    for key, path in zip(images.keys, paths, strict=True):
        if path and not Path(path).is_file():
            raise UserError(f"mask {path} of image '{key}' does not exist: correct its row, or add the file")
    boxes = [parse_box(text, key) if text else (math.nan,) * 4 for text, key in zip(texts, images.keys, strict=True)]
    known = [path for path in paths if path]
    hashes = dict(zip(known, hash_files(known, "masks").hex(), strict=True)) if known else {}
    masks = np.array([hashes.get(path, "") for path in paths], dtype=object)
    return replace(images, extras={**images.extras, BOX: np.array(boxes, np.float64).reshape(-1, 4), MASK: masks})


def parse_box(text: str, key: str) -> tuple[float, float, float, float]:
    """Parses a box of a list, ``x, y, width, height`` in pixels, to (left, top, right, bottom). Raises UserError: another
    format; names the image."""
    cells = re.split(r"\s*[,;]\s*|\s+", text.strip().strip("[]()").strip())
    try:
        x, y, width, height = map(float, cells)
        if not (all(map(math.isfinite, (x, y))) and 0 < width < math.inf and 0 < height < math.inf):
            raise ValueError
    except ValueError:
        raise UserError(
            f"box '{text}' of image '{key}': expected x, y, width, height in pixels, such as 12, 30, 64, 48: correct its row"
        ) from None
    return x, y, x + width, y + height


def check_regions(images: ImageTable) -> None:
    """Reads the user's own masks, and compares masks and boxes with their images, before long work.

    Images that cannot be read are skipped: nothing is made from them, which a run reports.

    Raises:
        UserError: a box outside its image, or a mask that is damaged, empty or of another size; names the image.
    """
    if {BOX_TEXT, MASK_PATH} & set(images.extras):
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for _ in pool.map(lambda row: _check_region(images, row), range(len(images))):
                pass


def _check_region(images: ImageTable, row: int) -> None:
    try:
        width, height = images.size(row)
    except UserError:
        return
    if images.extras[MASK][row]:
        read_mask(images.extras[MASK_PATH][row], (width, height), images.keys[row])
        return
    left, top, right, bottom = images.extras[BOX][row].tolist()
    if left >= width or top >= height or right <= 0 or bottom <= 0:
        raise UserError(
            f"box '{images.extras[BOX_TEXT][row]}' of image '{images.keys[row]}' lies outside its {width} x {height} pixels: "
            "expected x, y, width, height; correct its row"
        )


def read_mask(path: str, size: tuple[int, int], key: str, content: bytes | None = None) -> np.ndarray:
    """Reads a mask file, bool ``(height, width)``: pixels that are not black, or not transparent, are the object.

    Args:
        path: of an image of any kind; palettes count by index.
        size: (width, height) that it must have.
        key: name of the image it belongs to.
        content: of the file, where it has been read already.

    Raises:
        UserError: not an image, of another size, or without an object; names the image.
    """
    try:
        with Image.open(path if content is None else io.BytesIO(content)) as image:
            image.load()
            alpha = np.asarray(image.getchannel("A")) if "A" in image.getbands() else None
            pixels = np.asarray(image)
    except Exception as error:  # of whatever kind a damaged file provokes
        reason = str(error).split("\n")[0][:120]
        raise UserError(f"mask {path} of image '{key}' cannot be read ({reason}): replace it") from None
    if alpha is not None and (alpha == 0).any():
        mask = alpha > 0
    else:
        colours = pixels if pixels.ndim == 2 else pixels[..., : pixels.shape[2] - (alpha is not None)].any(axis=-1)
        mask = colours.astype(bool)
    if mask.shape != size[::-1]:
        raise UserError(
            f"mask {path} has {mask.shape[1]} x {mask.shape[0]} pixels, its image '{key}' {size[0]} x {size[1]}: expected the "
            "same size"
        )
    if not mask.any():
        raise UserError(f"mask {path} of image '{key}' is empty: expected the object in any colour but black")
    return mask


def box_mask(box: Sequence[float], size: tuple[int, int], latent: tuple[int, int], part: str = "object") -> Tensor:
    """The cells of the latents that may change, by a box.

    The image is squashed to a square before it is encoded, and the box with it. Every cell the box touches is the
    object's; a box outside the image counts as its nearest cell.

    Args:
        box: left, top, right, bottom in pixels of the image.
        size: (width, height) of the image.

    Returns:
        bool ``(1, h, w)``, ``latent`` being (h, w).
    """
    spans = []
    for low, high, side, cells in ((box[1], box[3], size[1], latent[0]), (box[0], box[2], size[0], latent[1])):
        first = min(max(math.floor(low * cells / side), 0), cells - 1)  # exact at the borders of cells
        spans.append(slice(first, min(max(math.ceil(high * cells / side), first + 1), cells)))
    mask = torch.zeros(1, *latent, dtype=torch.bool)
    mask[:, spans[0], spans[1]] = True
    return mask if part == "object" else ~mask


def pixel_mask(mask: np.ndarray, latent: tuple[int, int], part: str) -> Tensor:
    """The cells of the latents that may change, bool ``(1, h, w)``, by a mask, bool ``(height, width)``: every cell that a
    pixel of the object touches is the object's."""
    cells = torch.nn.functional.adaptive_max_pool2d(torch.from_numpy(mask)[None].float(), latent) > 0
    return cells if part == "object" else ~cells
