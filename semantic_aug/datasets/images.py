"""Opening one image, whatever its mode, and bringing it to a size.

Images are PIL RGB with 8 bits a channel from here on. A file that cannot be read is a :class:`UserError` that names it.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from semantic_aug.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")
MAX_PIXELS = 178_956_970
"""Largest image opened, in pixels (1 GiB as float32 RGB is 89 million); above it a file is taken for a decompression bomb."""


def open_image(source: str | Path | bytes, name: str | None = None) -> Image.Image:
    """Decodes an image to RGB, upright.

    Greyscale, palette, CMYK and 16-bit images are converted, alpha is laid over white, the EXIF rotation is applied,
    and of an animation the first frame is taken.

    Args:
        source: a path, or the encoded bytes.
        name: what to call the image in an error (a path's own name when absent).

    Raises:
        UserError: the file is missing, empty, truncated, not an image, or larger than :data:`MAX_PIXELS`.
    """
    name = name or (str(source) if not isinstance(source, bytes) else "<bytes>")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise UserError(
                        f"image {name} has {image.width}x{image.height} pixels, more than the {MAX_PIXELS} "
                        "allowed: it is taken for a decompression bomb; shrink it or remove it"
                    )
                image.load()
                return to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise UserError(f"image {name} is not there: restore it or remove it from the data set") from None
    except Image.DecompressionBombError as error:
        raise UserError(f"image {name} is taken for a decompression bomb ({error}): shrink it or remove it") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError) as error:
        size = len(source) if isinstance(source, bytes) else _size(source)
        what = "is empty" if size == 0 else f"cannot be decoded ({error})"
        raise UserError(f"image {name} {what}: replace it or remove it from the data set") from None


def _size(path: str | Path) -> int | None:
    try:
        return Path(path).stat().st_size
    except OSError:
        return None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode to 8-bit RGB; 16-bit samples keep their upper byte, alpha is laid over white."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if image.mode != "I" or values.max(initial=0) > 255:
            values = values >> 8
        return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def fit(image: Image.Image, size: int, mode: str = "squash") -> Image.Image:
    """A square image of ``size`` pixels, Lanczos-resampled (what diffusers' image processor uses).

    Args:
        image: PIL RGB of any size.
        size: side in pixels.
        mode: ``squash`` keeps the whole picture and lets its aspect ratio go; ``crop`` scales the shorter side to
            ``size`` and keeps the centre.
    """
    if mode == "squash":
        return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.LANCZOS)
    if mode == "crop":
        return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    raise ValueError(f"mode '{mode}': expected 'squash' or 'crop'")
