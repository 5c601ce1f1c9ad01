"""A folder of class folders, or a folder with a folder of class folders for each split.

Litter of operating systems, network drives, cameras, editors and notebooks (:data:`LITTER`) is passed over. Every other
file that is not read is noted (:meth:`Walk.note_left_out`). Linked folders are entered, and a real folder is read once,
whatever links lead to it. No image is decoded, and nothing is ever written into the folder.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePath

from semantic_aug.datasets.images import EXTENSIONS, HEAD, HEIC, HEIC_REMEDY, reads_heic, sniff
from semantic_aug.datasets.readers import captions
from semantic_aug.datasets.readers.notes import note
from semantic_aug.datasets.spec import Splits, split_of, unify
from semantic_aug.datasets.table import MASK_PATH, ImageTable, is_regular, table_of_files
from semantic_aug.errors import UserError
from semantic_aug.files import home_expanded

ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar", ".bz2", ".xz", ".zst")
EXPECTED = f"files ending in {', '.join(EXTENSIONS[:5])}, ..."
LITTER = frozenset(
    name.casefold()
    for name in (
        # macOS
        ".DS_Store", "__MACOSX", ".AppleDouble", ".AppleDB", ".LSOverride", ".localized", ".Trashes", ".fseventsd",
        ".Spotlight-V100", ".TemporaryItems", ".DocumentRevisions-V100", ".VolumeIcon.icns", ".apdisk", "Icon\r",
        "Network Trash Folder", "Temporary Items",
        # Windows
        "Thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "$RECYCLE.BIN",
        "System Volume Information", "FOUND.000",
        # Linux
        "lost+found", ".directory", ".thumbnails", ".Trash", ".hidden", ".cache",
        # network drives: Synology, QNAP, NetApp, ZFS
        "@eaDir", "#recycle", "#snapshot", "@tmp", "@Recycle", "@Recently-Snapshot", ".@__thumb", "@__thumb",
        ".snapshot", ".snapshots", "~snapshot", ".zfs", ".streams",
        # cameras and picture managers
        ".picasa.ini", "Picasa.ini", ".picasaoriginals", "ZbThumbnail.info", ".nomedia", ".dtrash",
        # editors, notebooks, version control
        ".ipynb_checkpoints", "__pycache__", ".git", ".gitignore", ".gitattributes", ".gitkeep", ".keep", ".svn", ".hg",
        ".dvc", ".dvcignore", ".idea", ".vscode", ".pytest_cache",
    )
)  # fmt: skip
"""Names of files and folders that are passed over at any level, in any letter case."""
LITTER_STARTS = ("._", ".nfs", ".fuse_hidden", ".~lock", ".Trash-")
"""Beginnings of such names."""

COPIES = (".part", ".partial", ".crdownload", ".download", ".tmp", ".temp", ".bak", ".old", ".orig", ".swp", "~")
"""Endings of unfinished downloads and of editors' backups: images by their first bytes, but not meant as data."""
_RAW = (
    ".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dng", ".erf", ".kdc", ".mef", ".mos", ".mrw", ".nef", ".nrw", ".orf", ".pef",
    ".raf", ".raw", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f",
)  # fmt: skip
"""Endings of cameras' raw files, which Pillow takes for TIFF files with a small picture."""
_COMPANIONS = ".txt .xml .json .jsonl .csv .tsv .md .html .yaml .yml .py .npy .npz .mat".split()
NO_IMAGE = "files left out: no images"
LEFT_OUT = {
    **dict.fromkeys(_RAW, "camera raw images left out: convert them to TIFF or JPEG"),
    **dict.fromkeys((".thm", ".ithmb", ".lrv"), "camera thumbnails left out"),
    **dict.fromkeys(_COMPANIONS, NO_IMAGE),
}
"""Endings of files that are not opened to see whether they are images -> the reason."""
MASKS = "masks"
"""Folder of the masks of a folder's images."""
MASKS_INSIDE = (
    f"folders of masks in class folders are read as images: move them to {MASKS}/CLASS beside the class folders"
)


def read_folder(folder: str | os.PathLike) -> Splits:
    """A folder of class folders, or a folder with ``train`` (and ``val``, ``test``) folders of class folders.

    Every image file below a class folder belongs to that class, however deep it lies; see :class:`Walk` for which files are
    images. Class names are compared and given in composed Unicode (NFC). A ``metadata.csv`` beside the class folders gives
    captions, boxes and masks (:func:`semantic_aug.datasets.readers.captions.read_metadata`); a folder ``masks`` beside the
    class folders, or beside the split folders, has the masks' files under the images' own names.

    Raises:
        UserError: not a folder, no class folders, fewer than two classes, a class folder without an image, two folders for
            one split, or a folder that may not be listed.
    """
    root = Path(os.path.abspath(home_expanded(folder)))
    if not root.is_dir():
        hint = "; unpack the archive first" if root.suffix.lower() in ARCHIVES and root.exists() else ""
        raise UserError(f"{root} is not a folder: expected a folder with one folder of images per class{hint}")
    walk = Walk(root)
    children, files = walk.entries(root)
    # a class may be called "train" or "test" too; a folder of that name is a split if it holds folders
    by_split = defaultdict(list)
    for child in children:
        if split_of(child.name):
            by_split[split_of(child.name)].append(child)
    splits = _split_folders(walk, by_split)
    if "train" in splits:
        _note_outside_splits(walk, children, files, [entry.name for entry in splits.values()])
        tables = {split: _folder_table(walk, Path(entry.path), split) for split, entry in splits.items()}
        of_splits = (f"{entry.name}/{name}" for entry in splits.values() for name in captions.METADATA)
        walk.note_left_out(*captions.METADATA, *of_splits)
        note(
            "splits without an image left out",
            [entry.name for split, entry in splits.items() if not len(tables[split])],
        )
        return unify({split: table for split, table in tables.items() if len(table)}, fixed="train")
    if splits:
        names = ", ".join(entry.name for entry in splits.values())
        raise UserError(
            f"{root} has the split folder {names} but none named train with class folders: add it, or name another folder"
        )
    if len(by_split) > 1 and len(children) == sum(map(len, by_split.values())):
        names = " and ".join(child.name for child in children)
        raise UserError(f"{root} holds {names} without class folders: expected one folder per class in each of them")
    table = _folder_table(walk, root, "train")
    walk.note_left_out(*captions.METADATA)
    return {"train": table}


def _split_folders(walk: Walk, by_split: dict[str, list[os.DirEntry]]) -> dict[str, os.DirEntry]:
    """The one folder of each split that holds folders. Raises UserError: two of them stand for one split."""
    splits = {}
    for split, folders in by_split.items():
        with_classes = [entry for entry in folders if walk.folder_names(entry)]
        if len(with_classes) > 1:
            names = " and ".join(entry.name for entry in with_classes)
            raise UserError(f"{walk.root} holds {names}, which all stand for the split {split}: remove all but one")
        if with_classes:
            splits[split] = with_classes[0]
    return splits


def _note_outside_splits(
    walk: Walk, children: list[os.DirEntry], files: list[os.DirEntry], splits: Sequence[str]
) -> None:
    for child in children:
        if child.name not in splits:
            unlabelled = "unlabelled split left out, it holds no class folders"
            if child.name == MASKS and walk.folder_names(child):
                continue
            number = len(Walk(walk.root).images(child.path))
            kind = unlabelled if split_of(child.name) else "folder beside the splits left out"
            note(kind, [f"{text_of(child.name)} with {number} images"])
    note("images beside the split folders left out", [walk.name_of(file) for file in files if walk.is_image(file)])
    lists = [file.name for file in files if file.name in captions.METADATA]
    note("lists of captions, boxes or masks beside the split folders left out: each split folder has its own", lists)


def _folder_table(walk: Walk, folder: Path, split: str) -> ImageTable:
    folders, files = walk.entries(folder)
    note("images beside the class folders left out", [walk.name_of(file) for file in files if walk.is_image(file)])
    masks = _masks_folder(walk, folder, folders, split)
    classes: dict[str, list[str]] = {}
    for entry in folders:
        if Path(entry.path) == masks:
            continue
        name = _class_name(entry)
        images = _class_images(walk, entry, split, name)
        if not images and split == "train":
            raise UserError(
                f"class folder {entry.path} holds no image: expected {EXPECTED}, or remove the folder{walk.left_out_hint()}"
            )
        if images:
            classes.setdefault(name, []).extend(images)
    if len(classes) < 2 and split == "train":
        held = f"one class folder ('{next(iter(classes))}')" if classes else "no class folders"
        raise UserError(f"{folder} holds {held}: expected at least two, each with that class's images ({EXPECTED})")
    names = sorted(classes)
    paths = [path for name in names for path in classes[name]]
    labels = [label for label, name in enumerate(names) for _ in classes[name]]
    keys = list(map(walk.name_of, paths))
    start = 0 if folder == walk.root else len(walk.name_of(folder)) + 1
    relative = [key[start:] for key in keys]
    extras = captions.read_metadata(folder, relative)
    if masks is not None:
        files = _mask_files(masks, relative)
        listed = extras.get(MASK_PATH, [""] * len(files))
        extras[MASK_PATH] = captions.as_column(path or file for path, file in zip(listed, files, strict=True))
    return table_of_files(names, labels, keys, paths.__getitem__, extras)


def _masks_folder(walk: Walk, folder: Path, folders: Sequence[os.DirEntry], split: str) -> Path | None:
    """The folder of the masks of a split's images: one whose folders are all named as the class folders are. Raises UserError:
    of training images' masks, only some of the folders are."""
    classes = {entry.name for entry in folders if entry.name != MASKS}
    for masks in (folder / MASKS, *([walk.root / MASKS / folder.name] if folder != walk.root else [])):
        inside = walk.folder_names(masks) if masks.is_dir() else []
        others = [name for name in inside if name not in classes]
        if inside and not others:
            return masks
        if len(others) < len(inside) and split == "train":
            raise UserError(
                f"{masks} holds masks by class, but no class folder is named {', '.join(map(text_of, others))}: rename or "
                "remove what is not a class"
            )
    return None


def _mask_files(folder: Path, images: Sequence[str]) -> list[str]:
    """The mask of each image, of the same path but for the ending; empty for an image that has none."""
    files = reversed(Walk(folder).images(folder))  # of two masks of an image the first in alphabetical order
    known = {Path(file).relative_to(folder).with_suffix("").as_posix(): file for file in files}
    stems = [PurePath(image).with_suffix("").as_posix() for image in images]
    note("masks without an image left out", sorted(set(known) - set(stems)))
    return [known.get(stem, "") for stem in stems]


def _class_name(folder: os.DirEntry) -> str:
    if text_of(folder.name) != folder.name:
        raise UserError(f"the name of class folder {text_of(folder)} is not UTF-8: rename it")
    return unicodedata.normalize("NFC", folder.name)


def _class_images(walk: Walk, folder: os.DirEntry, split: str, name: str) -> list[str]:
    folders = walk.folder_names(folder)
    inside = [word for word in folders if split_of(word)]
    if len(set(map(split_of, inside))) > 1:
        raise UserError(
            f"class folder {folder.path} holds the split folders {', '.join(inside)}: expected the splits above the "
            f"classes ({inside[0]}/{folder.name})"
        )
    note("folders named like a split are read as part of their class", [f"{walk.name_of(folder)}/{w}" for w in inside])
    if masks := [f"{walk.name_of(folder)}/{word}" for word in folders if word.casefold() in ("mask", MASKS)]:
        walk.left_out[MASKS_INSIDE] += masks  # one line for all classes
    return walk.images(folder, split, name)


def text_of(path: str | os.PathLike) -> str:
    """A path as text that can be written and compared: bytes that are not UTF-8 become ``\\xNN``."""
    text = os.fspath(path)
    try:
        text.encode()
    except UnicodeEncodeError:
        return os.fsencode(text).decode("utf-8", "backslashreplace")
    return text


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself, or into a folder that may not be entered
        return False


class Walk:
    """One reading of a data folder: finds images, and remembers what it leaves out under names relative to ``root``."""

    def __init__(self, root: Path):
        self.root = root
        self.left_out: dict[str, list[str]] = defaultdict(list)
        self._owners: dict[tuple[int, int], tuple[str, str]] = {}
        self._read: set[tuple[tuple[int, int], tuple[str, str]]] = set()

    def entries(self, folder: str | os.PathLike) -> tuple[list[os.DirEntry], list[os.DirEntry]]:
        """Folders (linked ones too) and other entries of a folder that are not litter, each sorted by name. Raises UserError:
        it cannot be listed."""
        try:
            with os.scandir(folder) as scan:
                kept = (e for e in scan if e.name.casefold() not in LITTER and not e.name.startswith(LITTER_STARTS))
                entries = sorted(kept, key=lambda entry: entry.name)
            names = {entry.name for entry in entries if _is_folder(entry)}
        except OSError as error:
            raise UserError(
                f"folder {text_of(folder)} cannot be listed ({error.strerror}): give yourself permission to, or remove it"
            ) from None
        shown = [entry for entry in entries if not entry.name.startswith(".")]
        if hidden := [entry for entry in entries if entry.name.startswith(".")]:
            self.left_out["hidden files or folders left out"] += map(self.name_of, hidden)
        return [e for e in shown if e.name in names], [e for e in shown if e.name not in names]

    def folder_names(self, folder: str | os.PathLike) -> list[str]:
        """Names of the folders in a folder, without a note on anything left out."""
        return [entry.name for entry in Walk(self.root).entries(folder)[0]]

    def name_of(self, path: str | os.PathLike) -> str:
        """A path as notes give it: relative to the root, with forward slashes."""
        text = text_of(path)
        start = text_of(self.root).rstrip(os.sep) + os.sep
        return text[len(start) :].replace(os.sep, "/") if text.startswith(start) else text

    def images(self, folder: str | os.PathLike, split: str = "", owner: str = "") -> list[str]:
        """Paths of all image files below a folder, sorted.

        Args:
            split: that the images belong to.
            owner: whose images they are (the class); a real folder may belong to one only.

        Raises:
            UserError: a folder cannot be listed, or is reached by links as part of another class or of train and another
                split.
        """
        images: list[str] = []
        linked, pending = [], [os.fspath(folder)]
        while pending or linked:
            # real folders first, so that a link never takes the place of what it leads to
            path = pending.pop() if pending else linked.pop(0)
            if not self._enter(path, split, owner):
                continue
            folders, others = self.entries(path)
            for entry in folders:
                (linked if entry.is_symlink() else pending).append(entry.path)
            images += [entry.path for entry in others if self.is_image(entry)]
        return sorted(images)

    def _enter(self, folder: str, split: str, owner: str) -> bool:
        """Whether a folder is to be read: a real one is, once."""
        try:
            status = os.stat(folder)
        except OSError as error:
            raise UserError(f"folder {text_of(folder)} cannot be entered ({error.strerror}): repair it") from None
        inode, asked = (status.st_dev, status.st_ino), (split, owner)
        if (inode, asked) in self._read:
            self.left_out["linked folders left out: read already under another name"].append(self.name_of(folder))
            return False
        self._read.add((inode, asked))
        known = self._owners.setdefault(inode, asked)
        if known != asked:
            both = " and ".join(f"{which[0] or 'all'}, class '{which[1]}'" for which in (known, asked))
            if known[0] == split or "train" in (known[0], split):
                raise UserError(f"folder {text_of(folder)} is read for {both}: a link leads there; remove it")
            note("folders that serve two splits", [f"{self.name_of(folder)}: {both}"])
        return True

    def is_image(self, entry: os.DirEntry) -> bool:
        name, ending = entry.name, PurePath(entry.name).suffix.lower()
        reason = self._reason(entry, name.lower(), ending)
        if reason:
            self.left_out[reason].append(self.name_of(entry.path))
        return reason is None

    def _reason(self, entry: os.DirEntry, name: str, ending: str) -> str | None:
        """Why a file is left out; None for an image. A broken link with an image's ending is one, to be missed later."""
        if not is_regular(entry):
            if not entry.is_symlink() or Path(entry.path).exists():
                return "pipes, sockets or devices left out"
            return None if name.endswith(EXTENSIONS) else "links that lead nowhere left out"
        if name.endswith(EXTENSIONS):
            return None
        if name.endswith(COPIES):
            return "unfinished downloads or backup copies left out"
        return LEFT_OUT[ending] if ending in LEFT_OUT else self._by_content(entry, ending)

    def _by_content(self, entry: os.DirEntry, ending: str) -> str | None:
        try:
            with open(entry.path, "rb") as file:
                kind = sniff(file.read(HEAD))
        except OSError as error:
            raise UserError(
                f"file {text_of(entry.path)} cannot be read ({error.strerror}): give yourself permission to, or remove it"
            ) from None
        if kind == HEIC:
            return None if reads_heic() else f"HEIC images left out: {HEIC_REMEDY}"
        if kind is None or (kind == "TIFF" and ending):  # many raw formats begin as TIFF does
            return NO_IMAGE
        return None

    def left_out_hint(self) -> str:
        """The files left out, for an error that reports missing images; empty where there are none."""
        reasons = {reason: len(cases) for reason, cases in self.left_out.items()}
        return "; " + ", ".join(f"{reason}: {number}" for reason, number in reasons.items()) if reasons else ""

    def note_left_out(self, *read: str) -> None:
        """Notes what was left out, a line for each reason, but the files that were ``read`` as something else."""
        for reason, cases in self.left_out.items():
            cases = sorted(case for case in cases if case not in read)
            endings = Counter(PurePath(case).suffix.lower() or "no ending" for case in cases)
            counts = ", ".join(f"{ending} {count}" for ending, count in endings.most_common(5))
            note(f"{reason} [{counts}]" if reason == NO_IMAGE else reason, cases, reason.startswith("HEIC"))
        self.left_out.clear()
