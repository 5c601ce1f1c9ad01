"""Encoded images as bytes: which format they are, their EXIF orientation, and the same image without its metadata."""

import re
import struct
import zlib
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
