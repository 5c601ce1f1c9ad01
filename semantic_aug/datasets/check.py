"""Checks of a data set before training: unreadable files, duplicates, leaks, odd images, class names.

Every image is opened once, by several threads. Duplicates are found by the SHA-256 of the stored bytes, near duplicates by a
difference hash: 256 bits, each saying whether one of 16 x 17 grey values is darker than its right neighbour.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

import numpy as np
from PIL import Image, ImageOps

from semantic_aug.datasets.catalog import prompt_names
from semantic_aug.datasets.images import Stored, read_image
from semantic_aug.datasets.readers.notes import Note
from semantic_aug.datasets.spec import SPLITS, DatasetSpec, Splits
from semantic_aug.datasets.table import ImageTable, in_threads
from semantic_aug.errors import UserError
from semantic_aug.pictures import Cell, grid
from semantic_aug.prompts import folded

HASH_SIDE = 16
NEAR_BITS = 10
"""Two images are near duplicates if at most this many of the 256 bits of their hashes differ."""
MAX_PAIRS = 100_000
"""Near pairs looked for; a set of blank images would have millions."""
MAX_EXAMPLES = 1000
SMALL_SIDE = 64
LONG_RATIO = 3.0
DARK = 16
"""An image whose values all lie below is nearly black."""
SHEET_COLUMNS, SHEET_ROWS, SHEET_SIDE = 8, 200, 96


@dataclass
class Summary:
    """Properties of one image; ``error`` alone is set where it cannot be read."""

    split: str
    label: int
    key: str
    error: str = ""
    size: tuple[int, int] = (0, 0)
    oddities: tuple[str, ...] = ()
    digest: str = ""
    hash: bytes = b""
    thumbnail: Image.Image | None = None


@dataclass
class Report:
    """The result of :func:`check`: images of each class by split (``counts``), and the smallest, median and largest width and
    height (``sizes``)."""

    name: str
    class_names: list[str]
    counts: dict[str, list[int]]
    sizes: dict[str, list[int]] = field(default_factory=dict)
    findings: list[Note] = field(default_factory=list)

    @property
    def problems(self) -> list[Note]:
        """The findings that fail the check."""
        return [finding for finding in self.findings if finding.problem]

    def as_dict(self) -> dict:
        """For a JSON file; of each finding the first thousand cases."""
        findings = [
            {"kind": f.kind, "count": len(f.cases), "examples": f.cases[:MAX_EXAMPLES], "problem": f.problem}
            for f in self.findings
        ]
        return {**vars(self), "findings": findings, "passed": not self.problems}


def oddities(stored: Stored, size: tuple[int, int], name: str = "") -> tuple[str, ...]:
    """Unusual properties of an image of upright size (width, height), by how a file of this name stores it; no name: it is no
    file of its own."""
    oddities = []
    if stored.mode in ("1", "L"):
        oddities.append("greyscale")
    elif stored.mode in ("CMYK", "LAB"):
        oddities.append(stored.mode)
    if stored.scaling:
        oddities.append(f"16-bit or floating-point, scaled to 8 bits ({stored.scaling})")
    if stored.transparent:
        oddities.append("alpha channel")
    if stored.animated:
        oddities.append("animated or of several pages (the first is used)")
    if stored.orientation != 1:
        oddities.append("EXIF rotation (it is applied)")
    if stored.damaged:
        oddities.append("damaged metadata (it is passed over)")
    ending = PurePath(name).suffix.lower()
    expected = {"MPO": "JPEG"}.get(stored.format, stored.format)
    if name and expected and Image.registered_extensions().get(ending) != expected:
        oddities.append(f"{expected} file with {f'the ending {ending}' if ending else 'no ending'}")
    short, long = sorted(size)
    if short < SMALL_SIDE:
        oddities.append(f"shorter side below {SMALL_SIDE} pixels")
    if long > LONG_RATIO * short:
        oddities.append(f"longer side above {LONG_RATIO:g} times the shorter")
    return tuple(oddities)


def difference_hash(image: Image.Image) -> bytes:
    """The 256-bit difference hash of an image, 32 bytes."""
    grey = np.asarray(image.convert("L").resize((HASH_SIDE + 1, HASH_SIDE), Image.Resampling.BOX), dtype=np.int16)
    return np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes()


def summarize(table: ImageTable, index: int, split: str, thumbnail: bool = False) -> Summary:
    """Opens and decodes one image."""
    summary = Summary(split, int(table.labels[index]), table.keys[index])
    try:
        source = table.encoded(int(table.rows[index])) if table.encoded is not None else None
        if source is None:
            image = table.image(index)
            summary.digest = hashlib.sha256(image.tobytes()).hexdigest()
        else:
            inside = isinstance(source, bytes)
            image, stored = read_image(source, summary.key if inside else None)
            summary.digest = hashlib.sha256(source if inside else Path(source).read_bytes()).hexdigest()
            summary.oddities = oddities(stored, image.size, "" if inside else os.fspath(source))
        if max(high for _, high in image.getextrema()) < DARK:
            summary.oddities += (f"nearly black, no value above {DARK - 1} of 255",)
        summary.size = image.size
        summary.hash = difference_hash(image)
        if thumbnail:
            summary.thumbnail = ImageOps.fit(image, (SHEET_SIDE, SHEET_SIDE))
    except UserError as error:
        summary.error = str(error)
    except OSError as error:
        summary.error = f"image {summary.key} cannot be read ({error.strerror}): is the disk failing?"
    return summary


def near_pairs(hashes: Sequence[bytes], bits: int = NEAR_BITS) -> list[tuple[int, int]]:
    """All pairs of hashes that differ in at most ``bits`` bits, each as (smaller index, larger index), sorted;
    no more than :data:`MAX_PAIRS`.

    Two such hashes have numbers of set bits that differ by no more than that: sorted by it, each has to be compared with
    a window only.
    """
    if len(hashes) < 2:
        return []
    words = np.frombuffer(b"".join(hashes), dtype=np.uint64).reshape(len(hashes), -1)
    ones = np.bitwise_count(words).sum(axis=1).astype(np.int64)
    order = np.argsort(ones, kind="stable")
    words, ones = words[order], ones[order]
    pairs, step = [], max(1, 4_000_000 // len(words))
    for start in range(0, len(words), step):
        stop = min(len(words), start + step)
        end = int(np.searchsorted(ones, ones[stop - 1] + bits, side="right"))
        distance = np.zeros((stop - start, end - start), dtype=np.uint16)
        for word in range(words.shape[1]):
            distance += np.bitwise_count(words[start:stop, None, word] ^ words[None, start:end, word])
        i, j = np.nonzero(distance <= bits)
        i, j = order[start + i[i < j]], order[start + j[i < j]]
        pairs += zip(np.minimum(i, j).tolist(), np.maximum(i, j).tolist(), strict=True)
        if len(pairs) >= MAX_PAIRS:
            break
    return sorted(pairs[:MAX_PAIRS])


def check(
    spec: DatasetSpec, splits: Splits, workers: int | None = None, progress=None, notes: Sequence[Note] = ()
) -> tuple[Report, Image.Image]:
    """Checks every image of a data set, whose splits are as the source gives them, with the notes taken when they were
    read; ``progress`` wraps the iterable of images. Returns the report, and a contact sheet of the first images of each
    class."""
    splits = {split: splits[split] for split in SPLITS if split in splits}
    names = splits["train"].class_names
    report = Report(spec.name, list(names), {split: table.counts().tolist() for split, table in splits.items()})
    on_sheet = _rows_on_sheet(splits["train"])
    tasks = [(table, i, split) for split, table in splits.items() for i in range(len(table))]
    summaries = in_threads(lambda task: summarize(*task, task[2] == "train" and task[1] in on_sheet), tasks, workers)
    summaries = list(progress(summaries, len(tasks)) if progress else summaries)
    unreadable = Note("unreadable image", tuple(image.error for image in summaries if image.error), True)
    good = [image for image in summaries if not image.error]
    findings = [*notes, *_classes(report, spec), unreadable, *_duplicates(good), *_odd_images(good)]
    report.findings = sorted((f for f in findings if f.cases), key=lambda finding: not finding.problem)
    if good:
        sizes = np.array([image.size for image in good])
        for word, values in zip(("width", "height"), sizes.T, strict=True):
            report.sizes[word] = [int(values.min()), int(np.median(values)), int(values.max())]
    return report, contact_sheet(report, good)


def _rows_on_sheet(table: ImageTable) -> set[int]:
    """The first rows of each class."""
    rows_of_class = (np.flatnonzero(table.labels == label)[:SHEET_COLUMNS] for label in range(SHEET_ROWS))
    return {row for rows in rows_of_class for row in rows.tolist()}


def _classes(report: Report, spec: DatasetSpec) -> Iterator[Note]:
    names = report.class_names

    def empty(split: str) -> tuple[str, ...]:
        return tuple(name for name, count in zip(names, report.counts[split], strict=True) if count == 0)

    yield Note("class without a training image", empty("train"), True)
    for split, consequence in (("val", "one is held out of train"), ("test", "nothing can be tested")):
        if split in report.counts:
            yield Note(f"class without a {split} image", empty(split))
        else:
            yield Note("missing split", (f"{split} ({consequence})",))
    spellings = defaultdict(list)
    for name, prompt_name in zip(names, prompt_names(tuple(names), spec), strict=True):
        spellings[folded(prompt_name.replace("-", " "))].append(f"'{name}'")
    alike = tuple(" = ".join(group) for group in spellings.values() if len(group) > 1)
    yield Note("class names that collide (case, spaces, hyphens and underscores aside)", alike, True)


def _name_of(image: Summary) -> str:
    return image.key if image.key.split("/")[0] == image.split else f"{image.split}: {image.key}"


def _names_of(group: Sequence[Summary]) -> str:
    """Names of equal images, four at most: the first of each split, then the first of each label, then others."""
    splits, labels = ({getattr(image, name): image for image in reversed(group)} for name in ("split", "label"))
    firsts = *reversed(splits.values()), *reversed(labels.values())
    names = list(dict.fromkeys(map(_name_of, (*firsts, *group))))
    return " = ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _duplicates(images: Sequence[Summary]) -> Iterator[Note]:
    by_digest = defaultdict(list)
    for image in images:
        by_digest[image.digest].append(image)
    exact: dict[str, list[str]] = defaultdict(list)
    for group in by_digest.values():
        if len(group) > 1:
            exact[_relation(group)].append(_names_of(group))
    yield Note("exact duplicate across splits (a leak)", tuple(exact["splits"]), True)
    yield Note("exact duplicate under two labels", tuple(exact["labels"]), True)
    yield Note("exact duplicate within a class of a split", tuple(exact["same"]))
    firsts = [group[0] for group in by_digest.values()]
    near: dict[str, list[str]] = defaultdict(list)
    for a, b in near_pairs([image.hash for image in firsts]):
        near[_relation((firsts[a], firsts[b]))].append(f"{_name_of(firsts[a])} ~ {_name_of(firsts[b])}")
    yield Note("near duplicates across splits (a possible leak)", tuple(near["splits"]))
    yield Note("near duplicates under two labels", tuple(near["labels"]))
    yield Note("near duplicates within a class of a split", tuple(near["same"]))


def _relation(group: Sequence[Summary]) -> str:
    if len({image.split for image in group}) > 1:
        return "splits"
    return "labels" if len({image.label for image in group}) > 1 else "same"


def _odd_images(images: Sequence[Summary]) -> list[Note]:
    cases = defaultdict(list)
    for image in images:
        for kind in image.oddities:
            cases[f"odd image: {kind}"].append(_name_of(image))
    return [Note(kind, tuple(names)) for kind, names in sorted(cases.items(), key=lambda item: -len(item[1]))]


def contact_sheet(report: Report, images: Sequence[Summary]) -> Image.Image:
    """The first training images of each class, a row per class."""
    rows: dict[int, list[Cell | None]] = defaultdict(list)
    for image in images:
        if image.thumbnail is not None:
            rows[image.label].append(Cell(image.thumbnail))
    labels = sorted(rows)
    if not labels:
        return Image.new("RGB", (SHEET_SIDE, SHEET_SIDE), (255, 255, 255))
    titles = [f"{report.class_names[label]} ({report.counts['train'][label]})" for label in labels]
    left_out = f", the first {SHEET_ROWS}" if len(report.class_names) > SHEET_ROWS else ""
    title = f"{report.name}: {len(report.class_names)} classes{left_out}"
    return grid([rows[label] for label in labels], titles, size=SHEET_SIDE, title=title)
