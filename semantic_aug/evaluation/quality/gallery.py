"""A page to look at synthetic images beside their sources and to reject the bad ones; opens from disk, without a server.

The output folder holds ``index.html`` with its style and script, ``data.js`` (every image's record, by column), ``thumbnails/``
and ``images/`` (the images themselves, as links or copies). Files are named by content, so that a stopped run resumes.
"""

import contextlib
import io
import json
import math
import multiprocessing
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from semantic_aug import cli, files, meta_csv, registry
from semantic_aug.classify.config import SyntheticSettings
from semantic_aug.datasets.fingerprint import hash_files, hash_images, hex_digits
from semantic_aug.datasets.images import open_image
from semantic_aug.datasets.synthetic import SyntheticImages, locate, subset_record
from semantic_aug.datasets.unlabelled import CLASS as UNLABELLED
from semantic_aug.evaluation import document
from semantic_aug.evaluation.quality import faithfulness
from semantic_aug.evaluation.quality.inputs import Inputs, OutputSettings, Subset, make_parser, read_inputs
from semantic_aug.evaluation.quality.measure import measured
from semantic_aug.evaluation.quality.review import FORMAT, list_identity, relative_paths
from semantic_aug.prompts import class_phrase, fill

PAGE = Path(__file__).with_name("gallery_page")
"""Template, style and script of the page."""
STATIC = ("gallery.css", "gallery.js")
FULL_SIZE = ("link", "copy", "none")
SHOWN_BY_BROWSERS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".avif")
SOURCE_SIDE = 1024
"""Longest side of a source image in the full-size view, in pixels."""
SCORES = {
    "target_probability": "target probability",
    "source_probability": "source probability",
    "label_agreement": "label agreement",
    "clip_score": "CLIP score",
    "source_distance": "distance to source",
    "nearest_real": "distance to nearest real image",
}
"""Values an image may have, and their names on the page."""


@dataclass(frozen=True, kw_only=True)
class GallerySettings:
    """How a gallery is made."""

    TITLE = "gallery"
    measures: Path | None = cli.setting(
        None, type=cli.path,
        help="output folder of a `measure` run on the same subsets: its values of each image are shown and sorted by",
    )  # fmt: skip
    gamma: float = cli.setting_of(SyntheticSettings, "gamma")
    thumbnail: int = cli.setting(
        192, type=cli.whole(16), metavar="PIXELS", help="longest side of a thumbnail in pixels"
    )
    full_size: str = cli.setting(
        "link", choices=FULL_SIZE,
        help="images in full size. link: symbolic links, which take no disk; copy: copies, so that the folder can be moved "
        "to another machine; none: thumbnails only",
    )  # fmt: skip
    processes: int = cli.setting(
        0, type=cli.whole(0), help="processes that make thumbnails; 0: one per CPU", result=False
    )


SETTINGS = (OutputSettings, GallerySettings)


def build_parser() -> cli.Parser:
    """All flags of this command."""
    return make_parser("gallery", __doc__.split("\n")[0], SETTINGS)


# ------------------------------------------------------------------------------------------------------ thumbnails


@dataclass(frozen=True)
class Picture:
    """One image of the gallery.

    Attributes:
        name: first digits of its content's hash, which names its files.
        source: its file, or the encoded bytes.
        real: a real image, kept in full size as a JPEG of at most :data:`SOURCE_SIDE`.
    """

    name: str
    source: str | bytes
    real: bool = False

    @property
    def thumbnail(self) -> str:
        """Its thumbnail's path in the gallery."""
        return f"thumbnails/{self.name[:2]}/{self.name}.jpg"

    @property
    def full_size(self) -> str:
        """Its full-size file's path in the gallery; a format that browsers do not show becomes PNG."""
        ending = ".jpg" if self.real else Path(self.source).suffix.lower()
        return f"images/{self.name[:2]}/{self.name}{ending if ending in SHOWN_BY_BROWSERS else '.png'}"


def write_picture(picture: Picture, folder: Path, side: int, full_size: str) -> None:
    """Writes an image's thumbnail, and its full-size file where wanted; existing ones stay. Raises UserError: the image cannot
    be read."""
    thumbnail, whole = folder / picture.thumbnail, folder / picture.full_size
    if not _exists(thumbnail):
        image = open_image(picture.source)
        image.thumbnail((side, side))
        _save(image, thumbnail, quality=85)
    if full_size == "none" or _exists(whole):
        return
    if picture.real:
        image = open_image(picture.source)
        image.thumbnail((SOURCE_SIDE, SOURCE_SIDE))
        _save(image, whole, quality=92)
    elif Path(picture.source).suffix.lower() not in SHOWN_BY_BROWSERS:
        _save(open_image(picture.source), whole)
    else:
        _link_or_copy(Path(picture.source), whole, full_size == "copy")


def _exists(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except OSError:
        return False


def _save(image, path: Path, **options) -> None:
    with files.atomic_path(path, flush=False) as temporary:
        image.save(temporary, "JPEG" if path.suffix == ".jpg" else "PNG", **options)


def _link_or_copy(source: Path, path: Path, copy: bool) -> None:
    # no hard link: it would change the original's time of change, by which caches know it
    with files.atomic_path(path, flush=False) as temporary:
        if not copy:
            try:
                temporary.symlink_to(os.path.abspath(source))
                return
            except OSError:  # a file system without symbolic links
                pass
        shutil.copyfile(source, temporary)


def write_pictures(pictures: Sequence[Picture], folder: Path, settings: GallerySettings) -> None:
    """Writes the files of all images, in several processes under one progress bar."""
    pictures = list({picture.full_size: picture for picture in pictures}.values())  # one content may have two endings
    count = min(settings.processes or os.cpu_count() or 1, math.ceil(len(pictures) / 64))
    options = {"desc": "thumbnails", "unit": "image", "total": len(pictures), "mininterval": 1.0, "dynamic_ncols": True}
    work = partial(write_picture, folder=folder, side=settings.thumbnail, full_size=settings.full_size)
    with contextlib.ExitStack() as stack:
        results = map(work, pictures)
        if count > 1:  # spawned: a process forked from one that holds torch's threads may hang
            pool = ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))
            results = stack.enter_context(pool).map(work, pictures, chunksize=16)
        for _ in tqdm(results, **options):
            pass


# --------------------------------------------------------------------------------------------------------- records


def real_pictures(train, rows: Sequence[int]) -> list[Picture]:
    """The training images at some rows."""
    names = hex_digits(hash_images(train.take(rows)).values) if len(rows) else []
    return [Picture(name[:20], _encoded(train, row), real=True) for name, row in zip(names, rows, strict=True)]


def _encoded(train, row: int) -> str | bytes:
    if train.encoded is not None:
        source = train.encoded(int(train.rows[row]))
        return source if isinstance(source, bytes) else str(source)
    out = io.BytesIO()
    train.image(row).save(out, "PNG", compress_level=1)
    return out.getvalue()


def scores_of(settings: GallerySettings, inputs: Inputs) -> list[dict[str, np.ndarray]]:
    """The scores of each subset's images, by name, from ``--measures``, ``--classifier`` and ``--clip``. Raises UserError:
    ``--measures`` is not a run of `measure` on these images."""
    scores = [measured(settings.measures, subset, inputs.dataset.source_names) for subset in inputs.subsets]
    for subset, values in zip(inputs.subsets, scores, strict=True):
        images = subset.images
        if inputs.classifier:
            values |= faithfulness.scores(inputs.class_probabilities(images), images, settings.gamma)
        if inputs.clip:
            values["clip_score"] = inputs.clip_scores(images.image, images.target)
    return [{name: value for name, value in values.items() if name in SCORES} for values in scores]


def prompts_of(folder: str, table: meta_csv.MetaTable, targets: Sequence[str]) -> list[str]:
    """The prompt of each image: its own where the list has a column ``Prompt``, else that of the subset's ``config.yaml``.

    Args:
        targets: the target class of each image, as prompts spell it.
    """
    record = subset_record(locate(folder)[0])
    templates = table.further.get("Prompt", [record.get("template") or ""] * len(table))
    super_class = (record.get("data") or {}).get("super_class") or ""
    phrases = {name: class_phrase(name, super_class) for name in set(targets)}
    return [
        fill(template, phrases[target]) if "{}" in template else template
        for template, target in zip(map(str, templates), targets, strict=True)
    ]


def records(
    inputs: Inputs, scores: Sequence[Mapping[str, np.ndarray]], settings: GallerySettings
) -> tuple[dict[str, Any], list[Picture]]:
    """The content of the page's ``data.js``, with the records of all images by column, and the images.

    Args:
        scores: of each subset, ``(M,)`` by name.
    """
    names, train = inputs.dataset.source_names, inputs.dataset.train
    used = np.unique(np.concatenate([subset.sources for subset in inputs.subsets]))
    used = used[used >= 0].tolist()
    position, real = {row: i for i, row in enumerate(used)}, real_pictures(train, used)
    lists, pictures = [], []
    columns = "list source target strength group path number seed prompt real thumbnail full_size unlabelled".split()
    columns: dict[str, list] = {name: [] for name in columns}
    prompts, unlabelled, classes = {}, {}, list(inputs.dataset.class_names)
    for label, subset in enumerate(inputs.subsets):
        columns["real"] += [position.get(row, -1) for row in subset.sources.tolist()]
        columns["group"] += subset.strengths.tolist()
        for folder, images in subset.parts:
            root, file = locate(folder)
            table, targets = meta_csv.read(file), images.target.tolist()
            hashes = hex_digits(hash_files(images.paths, "synthetic images").values)
            pictures += [Picture(name[:20], str(path)) for name, path in zip(hashes, images.paths, strict=True)]
            texts = prompts_of(folder, table, [classes[target] for target in targets])
            known = unlabelled_texts(images, classes)
            part = {
                "list": [len(lists)] * len(images),
                "source": np.where(images.of_any_class, len(classes), images.source).tolist(),
                "target": targets,
                "strength": images.strength.tolist(),
                "path": relative_paths(images, folder),
                "number": table.number.tolist(),
                "seed": [str(seed) for seed in table.further.get("Seed", [""] * len(table))],
                "prompt": [prompts.setdefault(text, len(prompts)) for text in texts],
                "unlabelled": [-1 if text is None else unlabelled.setdefault(text, len(unlabelled)) for text in known],
            }
            for name, values in part.items():
                columns[name] += values
            identity = list_identity(images, names)
            lists.append({"subset": label, "folder": registry.shown_path(root), "list": file.name, **identity})
    columns["thumbnail"] = [picture.thumbnail for picture in pictures]
    columns["full_size"] = [picture.full_size for picture in pictures] if settings.full_size != "none" else []
    content = {
        "format": FORMAT,
        "id": files.sha256_text(json.dumps(lists))[:16],
        "dataset": inputs.dataset.name,
        "gamma": settings.gamma,
        "classes": [*classes, UNLABELLED] if len(classes) in columns["source"] else classes,
        "subsets": [subset.name for subset in inputs.subsets],
        "lists": lists,
        "prompts": list(prompts),
        "unlabelled": [{"title": title, "label": label} for title, label in unlabelled],
        "images": columns,
        "sources": {
            "key": [train.keys[row] for row in used],
            "thumbnail": [picture.thumbnail for picture in real],
            "full_size": [picture.full_size for picture in real] if settings.full_size != "none" else [],
        },
        "scores": _score_columns(inputs.subsets, scores),
    }
    return content, pictures + real


def unlabelled_texts(images: SyntheticImages, class_names: Sequence[str]) -> list[tuple[str, str] | None]:
    """For each image from an unlabelled source, the text for the source's class and its label; None for other images."""
    if images.source_labels is None:
        return [None] * len(images)
    texts: list[tuple[str, str] | None] = []
    for row, known in enumerate(images.source_labels):
        order = [k for k in np.argsort(-known, kind="stable").tolist() if known[k]]
        parts = [f"{known[k]:.3f} {class_names[k]}" for k in order] if known.max() > known.min() else ["any class"]
        texts.append(None if known.max() == 1 else (images.source_text(row, class_names), " + ".join(parts)))
    return texts


def _score_columns(subsets: Sequence[Subset], scores: Sequence[Mapping[str, np.ndarray]]) -> dict[str, dict]:
    """The scores over the images of all subsets, by name; None where an image has none."""
    out = {}
    for name, label in SCORES.items():
        if any(name in values for values in scores):
            parts = [values.get(name, np.full(len(s), np.nan)) for s, values in zip(subsets, scores, strict=True)]
            column = np.concatenate(parts).astype(float).tolist()
            out[name] = {"label": label, "values": [round(v, 5) if math.isfinite(v) else None for v in column]}
    return out


# ------------------------------------------------------------------------------------------------------------ page


def write_page(folder: Path, content: Mapping[str, Any]) -> None:
    """Writes the page; ``index.html`` comes last, when all that it needs exists."""
    for name in STATIC:
        files.write_text(folder / name, (PAGE / name).read_text(encoding="utf-8"))
    data = json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    files.write_text(folder / "data.js", f"window.GALLERY = {data};\n")
    images, classes = content["images"], content["classes"]
    by_name = sorted(range(len(classes)), key=classes.__getitem__)
    used = {side: set(images[side]) for side in ("source", "target")}
    choices = {
        "subset": list(enumerate(content["subsets"])) if len(content["subsets"]) > 1 else [],
        **{side: [(label, classes[label]) for label in by_name if label in used[side]] for side in used},
        "strength": [(strength, f"{strength:g}") for strength in sorted(set(images["group"]))],
    }  # fmt: skip
    text = document.render(PAGE / "index.html.j2", gallery=content, choices=choices, count=len(images["path"]))
    files.write_text(folder / "index.html", text)


def main(argv: list[str] | None = None) -> int:
    """Makes the thumbnails, then the page."""
    args = build_parser().parse_args(argv)
    settings = cli.read_settings(GallerySettings, args)
    inputs = read_inputs(args, SETTINGS)
    inputs.print_summary()
    folder = registry.resolve_path(args.output_dir)
    if args.dry_run:
        print(f"would make a gallery in {registry.shown_path(folder)}")
        return 0
    scores = scores_of(settings, inputs)
    with inputs.claimed(folder, "thumbnails/*", "images/*"):
        content, pictures = records(inputs, scores, settings)
        write_pictures(pictures, folder, settings)
        write_page(folder, content)
    print(f"{len(content['images']['path'])} images: open {registry.shown_path(folder / 'index.html')} in a browser")
    print("to drop what you reject: python -m semantic_aug.evaluation filter --by review --review review.json ...")
    return 0
