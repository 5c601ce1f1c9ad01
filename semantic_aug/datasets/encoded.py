"""Encoded images as bytes: which format they are, their EXIF orientation, and the same image without its metadata.

EXIF blocks are TIFF files in small (CIPA DC-008, section 4.6): a header, then directories of twelve-byte entries.
"""

import re
import struct
from collections.abc import Iterator

from PIL import Image

HEAD = 64
"""First bytes of a file that :func:`sniff` looks at."""
HEIC = "HEIC"
ORIENTATION = 0x0112


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


def orientation_of(image: Image.Image, exif: bytes | None = None) -> int:
    """The EXIF orientation of an opened image, 1 to 8; 1 where there is none.

    The entry is looked up in the first directory of the EXIF block, whatever the rest of the block is like; what
    Pillow finds elsewhere (XMP, TIFF) counts where that lookup finds nothing.

    Args:
        image: opened, decoded or not.
        exif: the block, where the image was opened without it.
    """
    block = image.info.get("exif") if exif is None else exif
    orientation = _orientation_in(block) if isinstance(block, bytes) else None
    if orientation is None:
        try:
            orientation = image.getexif().get(ORIENTATION, 1)
        except Exception:  # of whatever kind damaged metadata provokes
            return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _orientation_in(block: bytes) -> int | None:
    """The orientation in the first directory of a TIFF-structured block, or None."""
    block = block[6:] if block.startswith(b"Exif\0\0") else block
    order = {b"II": "<", b"MM": ">"}.get(block[:2])
    if order is None or len(block) < 10:
        return None
    (start,) = struct.unpack_from(order + "I", block, 4)
    if start + 2 > len(block):
        return None
    (count,) = struct.unpack_from(order + "H", block, start)
    for entry in range(start + 2, min(start + 2 + 12 * count, len(block) - 11), 12):
        tag, kind, values = struct.unpack_from(order + "HHI", block, entry)
        if tag == ORIENTATION and values == 1 and kind in (1, 3, 4):
            (value,) = struct.unpack_from(order + {1: "B", 3: "H", 4: "I"}[kind], block, entry + 8)
            return value if 1 <= value <= 8 else None
    return None


def metadata_follows(file) -> bool:
    """Whether a PNG file may have its orientation behind the pixels."""
    file.seek(8)
    while len(head := file.read(8)) == 8:
        if head[4:] in (b"eXIf", b"iTXt", b"zTXt", b"tEXt"):
            return True
        file.seek(int.from_bytes(head[:4], "big") + 4, 1)
    return False


def without_metadata(content: bytes) -> bytes:
    """An encoded JPEG, PNG, WebP or TIFF image without EXIF, XMP, colour profiles and comments; others as they are."""
    kind = sniff(content[:HEAD])
    if kind == "JPEG":
        return content[:2] + b"".join(part for name, part in _jpeg_parts(content) if not _is_jpeg_metadata(name))
    if kind == "PNG":
        dropped = (b"eXIf", b"iTXt", b"tEXt", b"zTXt", b"iCCP", b"tIME", b"pHYs")
        return content[:8] + b"".join(part for name, part in _png_chunks(content) if name not in dropped)
    if kind == "WEBP":
        parts = [part for name, part in _riff_chunks(content) if name not in (b"EXIF", b"XMP ", b"ICCP")]
        body = b"WEBP" + b"".join(parts)
        return b"RIFF" + struct.pack("<I", len(body)) + body
    return _tiff_of_pixels(content) if kind == "TIFF" else content


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
    """Where the last strip or tile ends, by its offset and its length."""
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


def _is_jpeg_metadata(marker: int) -> bool:
    """Application segments but JFIF's and Adobe's, which tell the colour transform; and comments."""
    return (0xE1 <= marker <= 0xEF and marker != 0xEE) or marker == 0xFE


def _jpeg_parts(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Markers and segments of a JPEG file after its first two bytes; what follows the start of the scan is one part."""
    at = 2
    while at + 4 <= len(content) and content[at] == 0xFF:
        marker = content[at + 1]
        if marker == 0xFF:  # filling
            at += 1
            continue
        if marker == 0xDA:
            break
        end = at + 2 + int.from_bytes(content[at + 2 : at + 4], "big")
        yield marker, content[at:end]
        at = end
    yield 0xDA, content[at:]


def _png_chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Names and whole chunks of a PNG file: length, name, data, checksum."""
    at = 8
    while at + 8 <= len(content):
        end = at + 12 + int.from_bytes(content[at : at + 4], "big")
        yield content[at + 4 : at + 8], content[at:end]
        at = end


def _riff_chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Names and whole chunks of a WebP file: name, length, data, filled up to an even length."""
    at = 12
    while at + 8 <= len(content):
        length = int.from_bytes(content[at + 4 : at + 8], "little")
        end = at + 8 + length + length % 2
        yield content[at : at + 4], content[at:end]
        at = end


def exif_block(content: bytes) -> bytes | None:
    """The EXIF block of an encoded JPEG, PNG or WebP image, or None."""
    kind = sniff(content[:HEAD])
    if kind == "JPEG":
        parts = (part[4:] for name, part in _jpeg_parts(content) if name == 0xE1)
        return next((part for part in parts if part.startswith(b"Exif\0\0")), None)
    if kind == "PNG":
        return next((part[8:-4] for name, part in _png_chunks(content) if name == b"eXIf"), None)
    if kind == "WEBP":
        return next((part[8:] for name, part in _riff_chunks(content) if name == b"EXIF"), None)
    return None
