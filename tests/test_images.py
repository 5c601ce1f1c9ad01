"""Images as people have them: damaged metadata, orientations, modes and depths, and files that are no images."""

from __future__ import annotations

import io
import os
import random
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from semantic_aug.datasets import images
from semantic_aug.datasets.images import image_size, open_image, read_image, sniff
from semantic_aug.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 10, 3), np.uint8)
PICTURE = Image.fromarray(PIXELS)
TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: a.transpose(1, 0, 2)[::-1],
}
"""EXIF orientation -> what makes an array upright, written down from the standard."""


def stored(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def exif_block(orientation: int, order: str = "<") -> bytes:
    exif = Image.Exif()
    exif.endian = order
    exif[0x0112], exif[0x010F], exif[0x0131], exif[282], exif[283], exif[296] = (
        orientation,
        "Maker",
        "soft",
        72.0,
        72.0,
        2,
    )
    exif.get_ifd(0x8769).update({0x9003: "2020:01:01 00:00:00", 0x829A: (1, 100)})
    exif.get_ifd(0x8825).update({1: "N", 2: (1.0, 2.0, 3.0)})
    return exif.tobytes()


def with_exif(kind: str, block: bytes) -> bytes:
    """The picture as a file whose EXIF block is the one given, whatever it holds."""
    if kind == "WEBP":
        return stored(PICTURE, kind, exif=block, lossless=True, method=0)
    clean = stored(PICTURE, kind)
    if kind == "JPEG":
        return clean[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + clean[2:]
    data = b"eXIf" + block.removeprefix(b"Exif\0\0")
    return clean[:33] + struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data)) + clean[33:]


def damaged(block: bytes, rng: random.Random, spare: range) -> bytes:
    """A block with a few bytes exchanged, set to extremes, removed or inserted; what lies in ``spare`` stays."""
    broken = bytearray(block)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        how, at = rng.random(), rng.randrange(spare.stop, len(broken))
        if how < 0.5:
            broken[at] = rng.randrange(256)
        elif how < 0.8:
            word = struct.pack("<I", rng.choice((0, 0xFFFFFFFF, 0x7FFFFFFF, rng.randrange(1 << 32))))
            broken[at : at + 4] = word
        elif how < 0.9 and len(broken) > at + 20:
            del broken[at : at + rng.randrange(1, 20)]
        else:
            broken[at:at] = rng.randbytes(8)
    return bytes(broken)


@pytest.mark.parametrize(("kind", "count"), [("JPEG", 1400), ("PNG", 1400), ("WEBP", 400)])
def test_thousands_of_damaged_exif_blocks_change_no_pixel(kind, count):
    rng = random.Random(f"{kind} 7")
    plain = np.asarray(Image.open(io.BytesIO(stored(PICTURE, kind, **({"lossless": True} if kind == "WEBP" else {})))))
    for number in range(count):
        orientation = rng.choice((1, 3, 6, 8))
        order = rng.choice("<>")
        block = exif_block(orientation, order)
        entry = block.index(struct.pack(order + "HHI", 0x0112, 3, 1))
        intact = number % 2 == 0  # up to and with the orientation's entry; entries are sorted, it comes second
        content = with_exif(kind, damaged(block, rng, range(entry + 12 if intact else 6)))
        image = np.asarray(open_image(content, "x"))
        if intact:
            assert (image == TURNS[orientation](plain)).all(), (kind, number)
        else:
            assert any(np.array_equal(image, turn(plain)) for turn in TURNS.values()), (kind, number)
        if number % 10 == 0:
            assert image_size(content) == image.shape[1::-1]


def test_damaged_tiff_entries_beside_the_pixels_change_no_pixel(capfd):
    rng = random.Random(3)
    exif = Image.Exif()
    exif[0x010F], exif[0x0131], exif[0x0132], exif[282], exif[283], exif[0x0112] = (
        "Maker",
        "soft",
        "2020",
        72.0,
        72.0,
        6,
    )
    exif.get_ifd(0x8769)[0x9003] = "2020:01:01 00:00:00"
    clean = stored(PICTURE, "TIFF", exif=exif)
    start, count = struct.unpack_from("<I", clean, 4)[0], struct.unpack_from("<H", clean, 8)[0]
    (count,) = struct.unpack_from("<H", clean, start)
    entries = range(start + 2, start + 2 + 12 * count, 12)
    beside = [at for at in entries if struct.unpack_from("<H", clean, at)[0] not in images._PIXEL_TAGS]
    assert len(beside) >= 5
    for _ in range(300):
        broken = bytearray(clean)
        for _ in range(rng.choice((1, 2, 4))):
            broken[rng.choice(beside) + rng.randrange(2, 12)] = rng.randrange(256)
        image = open_image(bytes(broken), "x.tif")
        assert (np.asarray(image) == TURNS[6](PIXELS)).all() and image_size(bytes(broken)) == image.size == (6, 10)


def test_decoding_in_threads_leaves_the_filters_of_warnings_alone():
    content = with_exif("JPEG", exif_block(6)[:60])
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: open_image(content), range(2000)))
    assert list(warnings.filters) == before


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_applied_and_sizes_need_no_pixels(kind, orientation):
    options = {"lossless": True} if kind == "WEBP" else {}
    plain = np.asarray(Image.open(io.BytesIO(stored(PICTURE, kind, **options))))
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = stored(PICTURE, kind, exif=exif, **options)
    image, how = read_image(content)
    assert (np.asarray(image) == TURNS[orientation](plain)).all() and how.orientation == orientation
    assert image_size(content) == image.size
    if kind in ("JPEG", "PNG"):
        cut = content[: content.rindex(b"\xff\xda" if kind == "JPEG" else b"IDAT") + 16]
        assert image_size(cut) == image.size
        with pytest.raises(UserError, match="cannot be decoded"):
            open_image(cut)


def test_the_size_of_a_png_without_metadata_needs_no_pixels():
    content = stored(PICTURE)
    assert image_size(content[: content.rindex(b"IDAT") + 16]) == PICTURE.size


def test_an_orientation_behind_the_pixels_of_a_png_counts_for_its_size():
    data = b"eXIf" + exif_block(6).removeprefix(b"Exif\0\0")
    clean = stored(PICTURE)
    chunk = struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    content = clean[:-12] + chunk + clean[-12:]
    assert open_image(content).size == image_size(content) == (6, 10)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "MPO"])
def test_damaged_texts_profiles_and_indices_change_no_pixel(kind):
    options = {"WEBP": {"lossless": True}, "MPO": {"save_all": True, "append_images": [PICTURE]}}.get(kind, {})
    if kind == "PNG":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_text("Comment", "note " * 60)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    content = stored(PICTURE, kind, exif=exif_block(6), icc_profile=profile, **options)
    wanted = np.asarray(open_image(content))
    starts = [content.find(word) for word in (b"MPF\0", b"Comment", b"ICC_PROFILE", b"iCCP", b"ICCP")]
    spans = [range(start + 12, start + 60) for start in starts if start > 0]
    rng = random.Random(kind)
    for _ in range(100):
        broken = bytearray(content)
        for span in spans:
            for _ in range(rng.choice((1, 4, 16))):
                broken[rng.choice(span)] = rng.randrange(256)
        assert (np.asarray(open_image(bytes(broken))) == wanted).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF"])
def test_truncated_files_are_refused_by_name(tmp_path, kind):
    path = tmp_path / "half"
    big = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8))
    content = stored(big, kind, **({"exif": exif_block(6)} if kind != "GIF" else {}))
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="half cannot be decoded"):
        open_image(path)


def depths() -> list[tuple[np.ndarray, list[int], str]]:
    return [
        (np.array([[0, 255, 16]], np.uint16), [0, 255, 16], "integers of 8 bits"),
        (np.array([[0, 1023, 64]], np.uint16), [0, 255, 16], "integers of 10 bits"),
        (np.array([[0, 4095, 2048]], np.uint16), [0, 255, 128], "integers of 12 bits"),
        (np.array([[0, 16383, 64]], np.uint16), [0, 255, 1], "integers of 14 bits"),
        (np.array([[0, 65535, 40000]], np.uint16), [0, 255, 156], "integers of 16 bits"),
        (np.array([[0, 4095, 2048]], np.int32), [0, 255, 128], "integers of 12 bits"),
        (np.array([[0, 1 << 20, 1 << 19]], np.int32), [0, 255, 128], "the image's own range"),
        (np.array([[-1000, 3000, 1000]], np.int32), [0, 255, 128], "the image's own range"),
        (np.array([[0, 1, 0.5]], np.float32), [0, 255, 128], "floating-point, 0 to 1"),
        (np.array([[20, 30, 25]], np.float32), [0, 255, 128], "the image's own range"),
        (np.array([[7, 7, 7]], np.float32), [0, 0, 0], "the image's own range"),
    ]


@pytest.mark.parametrize(("values", "expected", "rule"), depths())
def test_deep_images_keep_their_contrast_by_a_stated_rule(values, expected, rule):
    image, how = read_image(stored(Image.fromarray(values), "TIFF"))
    assert np.asarray(image)[0, :, 1].tolist() == expected and how.scaling == rule


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused_by_name(value):
    with pytest.raises(UserError, match="x.tif cannot be decoded \\(it holds values that are not finite\\)"):
        open_image(stored(Image.fromarray(np.array([[0, value]], np.float32)), "TIFF"), "x.tif")


def png_of_16_bit_colour(values: np.ndarray) -> bytes:
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)]
    chunks += [b"IDAT" + zlib.compress(rows), b"IEND"]
    parts = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_16_bit_colour():
    image, how = read_image(png_of_16_bit_colour(np.full((2, 2, 3), 40000)))
    assert image.getpixel((0, 0)) == (156, 156, 156) and how.scaling == "16-bit colour, upper 8 bits"
    with pytest.raises(UserError, match="lower 12 bits only; convert it to 8 bits"):
        open_image(png_of_16_bit_colour(np.full((2, 2, 3), 4000)), "x.png")


def test_lab_pages_and_frames():
    lab = ImageCms.profileToProfile(
        Image.new("RGB", (4, 4), (200, 40, 40)), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), 0, "LAB"
    )
    assert np.abs(np.array(open_image(stored(lab, "TIFF")).getpixel((0, 0))) - (200, 40, 40)).max() <= 3
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for kind in ("TIFF", "WEBP", "PNG", "GIF", "AVIF"):
        options = {"lossless": True} if kind == "WEBP" else {}
        image, how = read_image(stored(frames[0], kind, save_all=True, append_images=frames[1:], **options))
        assert how.animated and min(image.getpixel((1, 1))[:1]) > 250 and max(image.getpixel((1, 1))[1:]) < 5, kind


def test_pipes_and_folders_are_named_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for name, kind in (("pipe.png", "a pipe, a socket or a device"), (".", "a folder")):
        for read in (open_image, image_size):
            with pytest.raises(UserError, match=f"is {kind}: expected a file"):
                read(tmp_path / name)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "AVIF", "JPEG2000"])
def test_formats_are_known_by_their_first_bytes(kind):
    assert sniff(stored(PICTURE, kind)[: images.HEAD]) == kind


@pytest.mark.parametrize("content", [b"", b"hello", b"BMW is a car, not a bitmap", b"%PDF-1.7", b"PK\3\4", b"II"])
def test_other_files_are_no_images(content):
    assert sniff(content) is None


def test_a_heic_image_names_the_package(tmp_path: Path):
    path = tmp_path / "IMG_0001.jpg"
    path.write_bytes(struct.pack(">I", 24) + b"ftypheic" + bytes(4) + b"mif1heic" + bytes(200))
    with pytest.raises(UserError, match="IMG_0001.jpg (is a HEIC image, .*pip install pillow-heif|cannot be decoded)"):
        open_image(path)
