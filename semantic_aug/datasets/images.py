"""Opening one image, whatever its mode, and bringing it to a size.

Images are PIL RGB with 8 bits a channel from here on. A file that cannot be read is a :class:`UserError` that names it.
Metadata never decides whether an image can be read: where Pillow fails on it, the image is decoded without it.
"""

import importlib.util
import io
import os
import re
import stat
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from semantic_aug.errors import UserError

EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".avif", ".bmp", ".dib", ".tif", ".tiff", ".gif",
    ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".tga",
)  # fmt: skip
"""Endings of files that are taken for images unseen; of other files the first bytes decide."""
HEAD = 64
"""First bytes of a file that :func:`sniff` looks at."""
HEIC = "HEIC"
HEIC_REMEDY = "install pillow-heif (pip install pillow-heif), or convert to JPEG"
MAX_PIXELS = 178_956_970
"""Largest image opened, in pixels (1 GiB as float32 RGB is 89 million); above it a file is taken for a decompression bomb."""
ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> the transposition that brings the image upright."""
_SIDEWAYS = (5, 6, 7, 8)
_ALPHA_MODES = ("RGBA", "LA", "PA", "La", "RGBa")


@dataclass(frozen=True)
class Stored:
    """The form in which a file stores an image.

    Attributes:
        format: Pillow's name of the format, "PNG".
        mode: Pillow's mode, "L" for greyscale.
        orientation: EXIF orientation, 1 to 8; 1 where there is none (or where the decoder has applied it).
        animated: whether there are several frames or pages.
        transparent: whether there is an alpha channel or a transparent colour.
        scaling: how samples of other than 8 bits were brought to 8 (:func:`to_rgb`); empty for 8 bits.
        damaged: whether it could only be read without its metadata.
    """

    format: str = ""
    mode: str = "RGB"
    orientation: int = 1
    animated: bool = False
    transparent: bool = False
    scaling: str = ""
    damaged: bool = False


def open_image(source: str | Path | bytes, name: str | None = None) -> Image.Image:
    """Decodes an image to RGB, upright: :func:`read_image` without how it was stored."""
    return read_image(source, name)[0]


def read_image(source: str | Path | bytes, name: str | None = None) -> tuple[Image.Image, Stored]:
    """Decodes an image to RGB, upright.

    Greyscale, palette, CMYK, LAB and 16-bit or floating-point images are converted (:func:`to_rgb`), alpha is laid over
    white, the EXIF orientation is applied, and of an animation or of several pages the first is taken. Metadata that
    Pillow cannot read is passed over; the orientation is applied as far as its own entry is intact.

    Args:
        source: a path, or the encoded bytes.
        name: what to call the image in an error (a path's own name when absent).

    Raises:
        UserError: the file is missing, empty, truncated, no image, no regular file, or larger than :data:`MAX_PIXELS`.
    """
    name = name or _name(source)
    try:
        return _decode(_stream(source, name), name)
    except (UserError, MemoryError):
        raise
    except FileNotFoundError:
        raise UserError(f"image {name} is not there: restore it or remove it from the data set") from None
    except Image.DecompressionBombError as error:
        raise UserError(f"image {name} is taken for a decompression bomb ({error}): shrink it or remove it") from None
    except PermissionError as error:
        raise UserError(f"image {name} cannot be read ({error.strerror}): give yourself permission to") from None
    except Exception as error:  # of whatever kind a damaged file provokes
        reason = "no format that Pillow reads" if isinstance(error, UnidentifiedImageError) else error
        return _decode_without_metadata(source, name, f"cannot be decoded ({reason})")


def _decode_without_metadata(source: str | Path | bytes, name: str, failure: str) -> tuple[Image.Image, Stored]:
    """Decodes an image that Pillow cannot read as it is. Raises UserError: the ``failure``, or a better reason."""
    remedy = "replace it or remove it from the data set"
    with suppress(Exception):
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
        if not content:
            failure = "is empty"
        elif sniff(content[:HEAD]) == HEIC:
            failure, remedy = "is a HEIC image, which Pillow does not read", HEIC_REMEDY
            if reads_heic():
                return _decode(io.BytesIO(content), name)
        else:
            return _decode(io.BytesIO(without_metadata(content)), name, damaged=True)
    raise UserError(f"image {name} {failure}: {remedy}") from None


def image_size(source: str | Path | bytes, name: str | None = None) -> tuple[int, int]:
    """(width, height) of the upright image in pixels, from the header where that says it. Raises UserError: as
    :func:`read_image`."""
    with suppress(Exception), Image.open(_stream(source, name or _name(source))) as image:
        width, height = image.size
        if image.format == "TIFF":  # some versions of Pillow give the upright size here, others the stored one
            width, height = image.tag_v2[256], image.tag_v2[257]
        orientation = _orientation_in_header(image)
        if orientation is not None:
            return (height, width) if orientation in _SIDEWAYS else (width, height)
    return open_image(source, name).size


def reads_alike(source: str | Path | bytes) -> bool:
    """Whether other programs that read an image with Pillow get what :func:`open_image` gives: it is stored upright, opaque, in
    8 bits a sample, with sound metadata. Its header tells, as a rule."""
    try:
        with Image.open(_stream(source, _name(source))) as image:
            plain = image.mode in ("RGB", "1", "L", "P", "CMYK") and "transparency" not in image.info
            orientation = _orientation_in_header(image)
        return plain and (read_image(source)[1].orientation if orientation is None else orientation) == 1
    except (UserError, MemoryError):
        raise
    except Exception:  # of whatever kind a damaged file provokes
        return False


def _orientation_in_header(image: Image.Image) -> int | None:
    """The orientation of an opened image; None where a PNG file may have it behind the pixels, for which Pillow would decode
    them."""
    if image.format == "PNG" and "exif" not in image.info:
        return None if metadata_follows(image.fp) else 1
    return orientation_of(image)


def _decode(source, name: str, damaged: bool = False) -> tuple[Image.Image, Stored]:
    with Image.open(source) as image:
        if image.width * image.height > MAX_PIXELS:
            raise UserError(
                f"image {name} has {image.width}x{image.height} pixels, more than the {MAX_PIXELS} "
                "allowed: it is taken for a decompression bomb; shrink it or remove it"
            )
        kind, animated = image.format or "", _animated(image)
        colour16 = image.mode[0] not in "IF" and any(";16" in str(tile[3]) for tile in image.tile)
        stored_orientation = orientation_of(image) if kind == "TIFF" else 1
        image.load()
        orientation = orientation_of(image)  # 1 if Pillow has applied it; PNG may have it behind the pixels
        transparent = image.mode in _ALPHA_MODES or "transparency" in image.info
        rgb, scaling = to_rgb(image)
        if colour16:
            scaling = "16-bit colour, upper 8 bits"
            if 0 < max(high for _, high in rgb.getextrema()) < 16:
                raise ValueError("16-bit colour that uses the lower 12 bits only; convert it to 8 bits")
        if orientation in _UPRIGHT:
            rgb = rgb.transpose(_UPRIGHT[orientation])
        elif rgb is image:
            rgb = image.copy()  # apart from the file
        applied = orientation if orientation != 1 else stored_orientation
        return rgb, Stored(kind, image.mode, applied, animated, transparent, scaling=scaling, damaged=damaged)


def _name(source: str | Path | bytes) -> str:
    return "<bytes>" if isinstance(source, bytes) else str(source)


def _stream(source: str | Path | bytes, name: str):
    if isinstance(source, bytes):
        return io.BytesIO(source)
    mode = os.stat(source).st_mode  # opening a pipe would wait for ever
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
        raise UserError(f"image {name} is {kind}: expected a file; remove it from the data set")
    return source


def reads_heic() -> bool:
    """Whether the optional package pillow-heif is installed; if so, Pillow reads HEIC images from here on."""
    if importlib.util.find_spec("pillow_heif") is None:
        return False
    if "HEIF" not in Image.OPEN:
        import pillow_heif

        pillow_heif.register_heif_opener()
    return True


def _animated(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # of whatever kind a damaged index of frames provokes; the first frame is what counts
        return False


# ---------------------------------------------------------------------------------------------------- modes, sizes


def to_rgb(image: Image.Image) -> tuple[Image.Image, str]:
    """Any PIL mode to 8-bit RGB, alpha or a transparent colour laid over white; and how samples of other than 8 bits were
    brought to 8, else empty.

    Integer samples of more than 8 bits are divided by the power of two that brings the smallest of 8, 10, 12, 14 and 16
    bits that holds the image's largest value to 8 bits. Floating-point samples in [0, 1] are multiplied by 255. Others
    (32-bit or negative integers, further floats) are stretched from the image's own range to [0, 255].

    Raises:
        ValueError: a sample that is not finite.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image, ""
    if image.mode[0] in "IF":
        values, scaling = _to_bytes(np.asarray(image))
        return Image.fromarray(values).convert("RGB"), scaling
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB"), ""
    if image.mode == "LAB":
        from PIL import ImageCms

        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB"), ""
    return image.convert("RGB"), ""


def _to_bytes(values: np.ndarray) -> tuple[np.ndarray, str]:
    """Samples of more than 8 bits to uint8, and the rule that applied."""
    low, high = (values.min(), values.max()) if values.size else (0, 0)
    if values.dtype.kind == "f":
        if not np.isfinite(values).all():
            raise ValueError("it holds values that are not finite")
        if low >= 0 and high <= 1:
            return (values * 255).round().astype(np.uint8), "floating-point, 0 to 1"
    elif low >= 0 and high < 1 << 16:
        bits = next(bits for bits in (8, 10, 12, 14, 16) if high < 1 << bits)
        return (values >> (bits - 8)).astype(np.uint8), f"integers of {bits} bits"
    span = float(high) - float(low)
    scaled = (values.astype(np.float64) - float(low)) * (255 / span if span else 0.0)
    return scaled.round().astype(np.uint8), "the image's own range"


def fit(image: Image.Image, size: int, mode: str = "squash") -> Image.Image:
    """A square image of ``size`` pixels, PIL RGB, Lanczos-resampled (what diffusers' image processor uses): ``squash``
    keeps the whole picture and lets its aspect ratio go, ``crop`` scales the shorter side to ``size`` and keeps the
    centre."""
    if mode == "squash":
        return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.LANCZOS)
    if mode == "crop":
        return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    raise ValueError(f"mode '{mode}': expected 'squash' or 'crop'")


# ------------------------------------------------------------------------------------------- encoded images as bytes


def sniff(head: bytes | None) -> str | None:
    """The image format that a file's first bytes (:data:`HEAD` of them) say, or None."""
    if not head:
        return None
    for start, kind in (
        (b"\xff\xd8\xff", "JPEG"),
        (b"\x89PNG\r\n\x1a\n", "PNG"),
        (b"GIF87a", "GIF"),
        (b"GIF89a", "GIF"),
        (b"II*\0", "TIFF"),
        (b"MM\0*", "TIFF"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG2000"),
    ):
        if head.startswith(start):
            return kind
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[:2] == b"BM" and head[6:10] == b"\0\0\0\0" and head[15:18] == b"\0\0\0":
        return "BMP"
    if head[4:8] == b"ftyp":
        brands = head[8 : max(8, int.from_bytes(head[:4], "big"))]
        if b"avif" in brands or b"avis" in brands:
            return "AVIF"
        if re.search(rb"hei[cxms]|hev[cxms]|mif1|msf1", brands):
            return HEIC
    return None


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation of an opened image, 1 to 8; 1 where there is none, or where the metadata are damaged before it."""
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # of whatever kind damaged metadata provokes
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def metadata_follows(file) -> bool:
    """Whether a PNG file may have its orientation behind the pixels."""
    file.seek(8)
    while len(head := file.read(8)) == 8:
        if head[4:] in (b"eXIf", b"iTXt", b"zTXt", b"tEXt"):
            return True
        file.seek(int.from_bytes(head[:4], "big") + 4, 1)
    return False


def without_metadata(content: bytes) -> bytes:
    """An encoded PNG, JPEG or TIFF image without the metadata on which Pillow may fail; others as they are. The orientation
    stays."""
    kind = sniff(content[:HEAD])
    if kind == "PNG":
        return content[:8] + b"".join(_png_chunks_of_pixels(content))
    if kind == "JPEG":
        return content.replace(b"MPF\0", b"    ", 1)  # the index of further pictures
    return _tiff_of_pixels(content) if kind == "TIFF" else content


def _png_chunks_of_pixels(content: bytes) -> Iterator[bytes]:
    """The chunks of a PNG file (length, name, data, checksum) but texts, times and profiles; EXIF with the right checksum."""
    at = 8
    while at + 8 <= len(content):
        end = at + 12 + int.from_bytes(content[at : at + 4], "big")
        name, chunk = content[at + 4 : at + 8], content[at:end]
        if name == b"eXIf":
            chunk = chunk[:-4] + struct.pack(">I", zlib.crc32(chunk[4:-4]))
        if name not in (b"iTXt", b"tEXt", b"zTXt", b"iCCP", b"tIME", b"pHYs"):
            yield chunk
        at = end


_PIXEL_TAGS = {*range(254, 260), 262, 266, 273, 274, *range(277, 281), 284, 317, 320, *range(322, 326), 338, 339, 347}
_PIXEL_TAGS |= {530, 531, 532}
"""TIFF entries that say where the pixels are and how they are coded."""


def _tiff_of_pixels(content: bytes) -> bytes:
    """A TIFF file whose first directory has entries about the pixels only."""
    order = "<" if content[:2] == b"II" else ">"
    (start,) = struct.unpack_from(order + "I", content, 4)
    (count,) = struct.unpack_from(order + "H", content, start)
    entries = [content[at : at + 12] for at in range(start + 2, start + 2 + 12 * count, 12)]
    entries = [entry for entry in entries if struct.unpack_from(order + "H", entry)[0] in _PIXEL_TAGS]
    if _end_of_pixels(content, entries, order) > len(content):
        raise ValueError("the pixels are cut off")  # else a decoder would take what is appended for the last of them
    directory = struct.pack(order + "H", len(entries)) + b"".join(entries) + bytes(4)
    body = content[8:] + bytes(len(content) % 2)
    return content[:4] + struct.pack(order + "I", 8 + len(body)) + body + directory


def _end_of_pixels(content: bytes, entries: list[bytes], order: str) -> int:
    """The end of the last strip or tile, by its offset and its length."""
    values: dict[int, tuple[int, ...]] = {}
    for entry in entries:
        tag, kind, count = struct.unpack_from(order + "HHI", entry)
        if tag in (273, 279, 324, 325):
            code = order + str(count) + {3: "H", 4: "I"}[kind]
            inside = struct.calcsize(code) <= 4
            location = (entry, 8) if inside else (content, struct.unpack_from(order + "I", entry, 8)[0])
            values[tag] = struct.unpack_from(code, *location)
    offsets, lengths = values.get(273) or values[324], values.get(279) or values[325]
    return max(offset + length for offset, length in zip(offsets, lengths, strict=True))
