"""The formats of ``export``: class folders, lists, parquet shards of the Hugging Face hub, WebDataset's tar shards.

Every file appears whole or not at all, and one that exists is not written again, so that a stopped export resumes.
"""

import errno
import io
import json
import math
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from semantic_aug import files, meta_csv
from semantic_aug.datasets import ImageTable
from semantic_aug.datasets.images import HEAD, reads_alike, sniff
from semantic_aug.datasets.synthetic import SyntheticImages
from semantic_aug.errors import UserError
from semantic_aug.seeding import numpy_rng

ENDINGS = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "BMP": ".bmp", "TIFF": ".tiff"}
"""File ending of each format that torchvision's ImageFolder lists; images of other formats are stored as PNG."""

FILE_ENDINGS = {*ENDINGS.values(), ".jpeg", ".tif", ".ppm", ".pgm"}
WEBDATASET_ENDINGS = (".jpg", ".png", ".webp")
"""File endings of the images in tar shards: timm's reader passes over a sample with any other."""
NO_LINK = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EACCES}
"""Error numbers of file systems, or pairs of them, between which files cannot be hard-linked."""

HF_SPLITS = {"train": "train", "val": "validation", "test": "test"}
LIST_FILE, METADATA_FILE, CLASS_MAP_FILE, INFO_FILE = "images.csv", "metadata.csv", "class_map.txt", "_info.json"
ROW_GROUP = 100
"""Images per row group of a parquet file, as the hub's viewer wants it."""


@dataclass(frozen=True)
class SplitImages:
    """The images of one split, ``N`` in all: real ones, then synthetic ones.

    Attributes:
        name: ``train``, ``val`` or ``test``.
        class_names: in label order.
        gamma: of the soft labels.
        origins: of each synthetic image ``subset`` (its name), ``origin`` (the path below the subset's ``data/``),
            ``source_image`` (key of the source image, None where it is not known) and ``photograph`` (whether it is a real
            photograph with a classifier's label).
    """

    name: str
    class_names: tuple[str, ...]
    gamma: float
    real: ImageTable | None = None
    synthetic: SyntheticImages | None = None
    origins: Sequence[Mapping[str, Any]] = ()

    @property
    def reals(self) -> int:
        """Number of real images with their own labels."""
        return len(self.real) if self.real is not None else 0

    @property
    def counts(self) -> dict[str, int]:
        """Number of real and synthetic images, and of pseudo-labelled photographs where there are any."""
        pseudo = sum(origin["photograph"] for origin in self.origins)
        counts = {"real": self.reals, "synthetic": len(self) - self.reals - pseudo}
        return counts | ({"pseudo_labelled": pseudo} if pseudo else {})

    def __len__(self) -> int:
        return self.reals + (len(self.synthetic) if self.synthetic is not None else 0)

    @cached_property
    def classes(self) -> np.ndarray:
        """Source and target class of each image, int64 ``(2, N)``; both are a real image's label."""
        real = np.stack([self.real.labels] * 2) if self.real is not None else np.empty((2, 0), np.int64)
        if self.synthetic is None:
            return real
        return np.concatenate([real, np.stack([self.synthetic.source, self.synthetic.target])], axis=1)

    @cached_property
    def strengths(self) -> np.ndarray:
        """``(N,)`` in (0, 1]; NaN for real images."""
        return np.concatenate([np.full(self.reals, np.nan), self.synthetic.strength if self.synthetic else []])

    @cached_property
    def uncertain(self) -> np.ndarray:
        """Rows of the images whose source is of no known class; their soft labels may name more than two classes."""
        if self.synthetic is None or self.synthetic.source_labels is None:
            return np.empty(0, np.int64)
        return self.reals + np.flatnonzero(self.synthetic.source_labels.max(1) < 1)

    @cached_property
    def weights(self) -> np.ndarray:
        """``(2, N)`` weights of source and target class in the soft label: 1 - s^gamma and s^gamma; 0 and 1 for real images.

        Of a source of no known class they are the soft label's entries, which need not sum to one; where its most probable
        class is the target, or it may be of any class, the source's weight is 0.
        """
        target = np.nan_to_num(self.strengths**self.gamma, nan=1.0)
        weights, rows = np.stack([1 - target, target]), self.uncertain
        if len(rows):
            source, target = self.classes[:, rows]
            soft, each = self.soft_labels(rows), np.arange(len(rows))
            weights[:, rows] = np.where(source == target, 0, soft[each, source]), soft[each, target]
        return weights

    @cached_property
    def labels(self) -> np.ndarray:
        """``(N,)`` hard labels: the class of the largest weight in the soft label, the target of equal ones."""
        labels, rows = np.where(self.weights[1] >= 0.5, self.classes[1], self.classes[0]), self.uncertain
        if len(rows):
            soft = self.soft_labels(rows)
            labels[rows] = np.where(self.weights[1, rows] >= soft.max(1), self.classes[1, rows], soft.argmax(1))
        return labels

    @cached_property
    def of_any_class(self) -> np.ndarray:
        """bool ``(M,)``, synthetic images whose source may be of any class."""
        return self.synthetic.of_any_class if self.synthetic is not None else np.empty(0, bool)

    def soft_labels(self, rows: np.ndarray) -> np.ndarray:
        """``(B, K)`` float32, rows summing to one."""
        synthetic, count = rows >= self.reals, len(self.class_names)
        labels = np.eye(count, dtype=np.float32)[self.classes[1, rows]]  # of real images
        if synthetic.any():
            labels[synthetic] = self.synthetic.take(rows[synthetic] - self.reals).labels(self.gamma, count)
        return labels

    def file_name(self, row: int) -> str:
        """The name of an image without its ending, unique in its split."""
        return f"real-{row:06d}" if row < self.reals else f"synthetic-{row - self.reals:06d}"

    def image(self, row: int) -> Image.Image:
        """An image, decoded, PIL RGB."""
        return self.real.image(row) if row < self.reals else self.synthetic.image(row - self.reals)

    def content(self, row: int) -> tuple[Path | bytes, str]:
        """The file of an image, or its encoded bytes where the source holds no file, and its ending.

        An image that other programs would read otherwise than the stages do (sideways, with what its transparency hides,
        or 16-bit samples cut off) is encoded anew.
        """
        if row >= self.reals:
            stored = self.synthetic.paths[row - self.reals]
        else:
            stored = self.real.encoded(int(self.real.rows[row])) if self.real.encoded is not None else None
        if isinstance(stored, bytes):
            ending = ENDINGS.get(sniff(stored[:HEAD]), "")
        else:
            ending = Path(stored).suffix.lower() if stored is not None else ""
        if ending in FILE_ENDINGS and reads_alike(stored):
            return stored if isinstance(stored, bytes) else Path(stored), ending
        return _as_png(self.image(row)), ".png"

    def metadata(self, row: int) -> dict[str, Any]:
        """Hard label, both classes with their weights, and the image's origin; no source class where it may be any."""
        label, (source, target) = int(self.labels[row]), self.classes[:, row].tolist()
        (source_weight, target_weight), number = self.weights[:, row].tolist(), row - self.reals
        if number < 0:
            unknown, strength = False, None
            origin = {"subset": None, "origin": self.real.keys[row], "source_image": None, "photograph": True}
        else:
            unknown, strength, origin = self.of_any_class[number], float(self.strengths[row]), self.origins[number]
        return {
            "label": self.class_names[label],
            "label_index": label,
            "source": None if unknown else self.class_names[source],
            "target": self.class_names[target],
            "source_weight": source_weight,
            "target_weight": target_weight,
            "strength": strength,
            "synthetic": not origin["photograph"],
            **{name: origin[name] for name in ("subset", "origin", "source_image")},
        }


def _as_png(image: Image.Image) -> bytes:
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    return encoded.getvalue()


@dataclass(frozen=True)
class Target:
    """Where and how images are written.

    Attributes:
        class_folders: a folder name for each class, in label order.
        copy: files are copied, not hard-linked.
        shard_images: most images in a shard.
        seed: of the order of images in WebDataset's shards.
    """

    folder: Path
    class_folders: tuple[str, ...]
    copy: bool
    shard_images: int
    seed: int

    def put(self, content: Path | bytes, path: str) -> None:
        """Links, copies or writes a file, unless it exists. Raises UserError: the existing file has another size."""
        target = self.folder / path
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        if target.exists():
            if target.stat().st_size != size:
                raise UserError(f"{target} has another size than its image: remove it, or choose another --output_dir")
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path) and not self.copy and _linked(content, target):
            return
        with files.atomic_path(target) as temporary:
            temporary.write_bytes(content) if isinstance(content, bytes) else shutil.copyfile(content, temporary)


def _linked(source: Path, target: Path) -> bool:
    """Makes a hard link; False where the file system has none."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError as error:
        if error.errno not in NO_LINK:
            raise
        return False
    return True


def ordered_folders(folders: Sequence[str]) -> tuple[str, ...]:
    """Folder names of classes whose order is the labels', as torchvision and timm sort them; numbered where it is not."""

    def natural(name: str) -> list:
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.lower())]

    if sorted(folders) == list(folders) and sorted(folders, key=natural) == list(folders):
        return tuple(folders)
    digits = len(str(len(folders) - 1))
    return tuple(f"{label:0{digits}d}-{folder}" for label, folder in enumerate(folders))


def original_folders(names: Sequence[str]) -> tuple[str, ...]:
    """Folder names of classes as the original makes them and reads the names from: underscores for spaces. Raises UserError:
    two classes would share a folder."""
    folders = tuple(name.replace(" ", "_").replace("/", "_") for name in names)
    if twice := next((name for row, name in enumerate(names) if folders[row] in folders[:row]), None):
        raise UserError(f"--format original: class '{twice}' shares the folder of another class: rename one of them")
    return folders


# --------------------------------------------------------------------------------------------------- files and a list


def write_imagefolder(target: Target, splits: Sequence[SplitImages], bar: tqdm) -> None:
    """``{split}/{class}/{image}``, ``metadata.csv``, and ``class_map.txt``: the classes' folders in label order."""
    folders = target.class_folders
    files.write_text(target.folder / CLASS_MAP_FILE, "".join(f"{name}\n" for name in folders))
    listing, folder_of = (METADATA_FILE, "file_name"), lambda split, row: f"{split.name}/{folders[split.labels[row]]}"
    _place_all(target, splits, bar, listing, folder_of)


def write_csv(target: Target, splits: Sequence[SplitImages], bar: tqdm) -> None:
    """``images.csv``, a line an image, and the images below ``images/{split}``."""
    _place_all(target, splits, bar, (LIST_FILE, "path"), lambda split, row: f"images/{split.name}")


def write_original(target: Target, splits: Sequence[SplitImages], bar: tqdm) -> None:
    """A subset in the original's layout: ``data/{source}/{target}-{number:06d}-{strength}.png`` and five columns.

    Its scripts read class names from folders and files, underscores being spaces.
    """
    (split,), names = splits, [folder.replace("_", " ") for folder in target.class_folders]
    rows = []
    for row, (a, b) in enumerate(split.classes.T.tolist()):
        strength = float(split.strengths[row])
        path = meta_csv.relative_path(target.class_folders[a], target.class_folders[b], row, strength)
        content, ending = split.content(row)
        target.put(content if ending == ".png" else _as_png(split.image(row)), f"data/{path}")
        rows.append((names[a], names[b], row, meta_csv.strength_text(strength), path))
        bar.update()
    meta_csv.write(target.folder / meta_csv.FILE_NAME, rows, ())


def _place_all(
    target: Target,
    splits: Sequence[SplitImages],
    bar: tqdm,
    listing: tuple[str, str],
    folder_of: Callable[[SplitImages, int], str],
) -> None:
    """Writes every image into its folder, and the list of all (name of the file, name of its first column)."""
    name, first = listing
    with files.csv_writer(target.folder / name) as writer:
        for split in splits:
            for row in range(len(split)):
                content, ending = split.content(row)
                path = f"{folder_of(split, row)}/{split.file_name(row)}{ending}"
                target.put(content, path)
                values = split.metadata(row)
                if split is splits[0] and row == 0:
                    writer.writerow([first, "split", *values])
                cells = [int(value) if isinstance(value, bool) else value for value in values.values()]
                writer.writerow([path, split.name, *cells])
                bar.update()


# ------------------------------------------------------------------------------------------------------------- shards


def shards(target: Target, split: SplitImages, rows: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
    """(number of the shard, number of shards, rows of its images)."""
    count = max(1, math.ceil(len(split) / target.shard_images))
    for number, part in enumerate(np.array_split(rows, count)):
        yield number, count, part


def _bytes(content: Path | bytes) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


def write_hf(target: Target, splits: Sequence[SplitImages], bar: tqdm) -> None:
    """``data/{split}-{shard}-of-{shards}.parquet`` with images, class labels and soft labels, as the hub stores them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = splits[0].class_names
    schema = features_of(names).arrow_schema
    position = {name: label for label, name in enumerate(names)}
    for split in splits:
        for number, count, rows in shards(target, split, np.arange(len(split))):
            path = target.folder / f"data/{HF_SPLITS[split.name]}-{number:05d}-of-{count:05d}.parquet"
            if not path.exists():
                records = [split.metadata(row) for row in rows.tolist()]
                columns = {name: [record[name] for record in records] for name in schema.names if name in records[0]}
                for name in ("label", "source", "target"):
                    columns[name] = [position.get(value) for value in columns[name]]
                columns["soft_label"] = split.soft_labels(rows).tolist()
                stored = ((split.file_name(row), *split.content(row)) for row in rows.tolist())
                columns["image"] = [{"bytes": _bytes(content), "path": name + end} for name, content, end in stored]
                table = pa.Table.from_pydict({name: columns[name] for name in schema.names}, schema=schema)
                with files.atomic_path(path) as temporary:
                    pq.write_table(table, temporary, row_group_size=ROW_GROUP)
            bar.update(len(rows))


def features_of(class_names: Sequence[str]):
    """The columns of an export in the ``datasets`` library's terms."""
    from datasets import ClassLabel, Features, Image, List, Value

    classes = ClassLabel(names=list(class_names))
    number, text = Value("float32"), Value("string")
    return Features(
        {
            "image": Image(),
            "label": classes,
            "soft_label": List(number, length=len(class_names)),
            "source": classes,
            "target": classes,
            "source_weight": number,
            "target_weight": number,
            "strength": number,
            "synthetic": Value("bool"),
            "subset": text,
            "origin": text,
            "source_image": text,
        }
    )


def write_webdataset(target: Target, splits: Sequence[SplitImages], bar: tqdm) -> None:
    """``{split}-{shard}.tar``: each sample an image, its hard label (``.cls``) and its metadata (``.json``).

    Samples are in an order drawn for each split, since shards are read one after the other. ``_info.json`` lists the
    shards and their lengths, as timm reads them.
    """
    info = {}
    for split in splits:
        names, lengths = [], []
        order = numpy_rng(target.seed, "export", split.name).permutation(len(split))
        for number, _, rows in shards(target, split, order):
            path = target.folder / f"{split.name}-{number:06d}.tar"
            if not path.exists():
                with files.atomic_path(path) as temporary, tarfile.open(temporary, "w") as tar:
                    for row, soft in zip(rows.tolist(), split.soft_labels(rows), strict=True):
                        _add_sample(tar, split, row, soft)
            names, lengths = [*names, path.name], [*lengths, len(rows)]
            bar.update(len(rows))
        info[split.name] = {"name": split.name, "num_samples": len(split), "filenames": names, "shard_lengths": lengths}
    files.write_json(target.folder / INFO_FILE, {"splits": info, "class_names": list(splits[0].class_names)})


def _add_sample(tar: tarfile.TarFile, split: SplitImages, row: int, soft: np.ndarray) -> None:
    content, ending = split.content(row)
    ending = {".jpeg": ".jpg"}.get(ending, ending)
    if ending not in WEBDATASET_ENDINGS:
        content, ending = _as_png(split.image(row)), ".png"
    metadata = {**split.metadata(row), "soft_label": [float(f"{weight:.8g}") for weight in soft]}
    parts = {
        ending: _bytes(content),
        ".cls": str(metadata["label_index"]).encode(),
        ".json": json.dumps(metadata, ensure_ascii=False).encode(),
    }
    for end, data in parts.items():
        member = tarfile.TarInfo(split.file_name(row) + end)  # its time is 0: equal samples are equal bytes
        member.size, member.mode = len(data), 0o644
        tar.addfile(member, io.BytesIO(data))


FORMATS: dict[str, Callable[[Target, Sequence[SplitImages], tqdm], None]] = {
    "imagefolder": write_imagefolder,
    "hf": write_hf,
    "webdataset": write_webdataset,
    "csv": write_csv,
    "original": write_original,
}
