"""Plant Seedlings: photographs of seedlings of 12 species on soil, 5,539 in the second version; long-tailed by nature.

``SEEDLINGS_ROOT`` names any of these folders:

* the official download (``NonsegmentedV2.zip`` unpacked) or another copy with one folder for each species, directly or in
  ``train`` (the Kaggle copy of 4,750 photographs, whose ``test`` has no labels). Neither has a split. Each species is cut
  in the order of its file names, 70 % train, 15 % val, 15 % test, so that numbered pictures of one plant stay together.
* a folder with ``train`` and ``val`` or ``test`` or both, each with one folder for each species.

The photographs are of about 960 plants, which the file names do not tell apart: a plant can be in two splits.
"""

from pathlib import Path

from semantic_aug.datasets.readers import official
from semantic_aug.datasets.readers.folder import Walk, read_folder
from semantic_aug.datasets.spec import DatasetSpec, Splits, split_of
from semantic_aug.errors import UserError

TRAIN, VAL = 70, 15
"""Shares of each species in per cent; the rest is test."""


def read_official(root: Path) -> Splits:
    """One folder for each species, or folders of splits."""
    walk = Walk(root)
    others = [folder for folder in walk.entries(root)[0] if split_of(folder.name) in ("val", "test")]
    if (root / "train").is_dir() and any(map(walk.folder_names, others)):
        return read_folder(root)
    images = root / "train" if (root / "train").is_dir() else root
    species = sorted(p.name for p in images.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(species) == 1 and not official.images_in(images / species[0]):  # the archive's own top folder
        return read_official(images / species[0])
    rows: dict[str, list[tuple[int, str]]] = {"train": [], "val": [], "test": []}
    for label, name in enumerate(species):
        files = official.images_in(images / name)
        if not files:
            raise UserError(f"{images / name} holds no image: unpack the official download again")
        numbered = all(file.stem.isdigit() for file in files)
        files.sort(key=lambda file: (int(file.stem), file.name) if numbered else (0, file.name))
        first_val = len(files) * TRAIN // 100
        first_test = first_val + len(files) * VAL // 100
        for position, file in enumerate(files):
            split = "train" if position < first_val else "val" if position < first_test else "test"
            rows[split].append((label, f"{name}/{file.name}"))
    if len(species) < 2:
        raise UserError(f"{root} lacks a folder for each species: unpack the official download and name its folder")
    return official.labelled_splits(species, rows, images)


SPEC = DatasetSpec(
    name="seedlings",
    read=lambda: official.read(SPEC),
    read_official=read_official,
    super_class="seedling",
    license="CC BY-SA 4.0",
    citation="Giselsson et al., A Public Image Database for Benchmark of Plant Seedling Classification Algorithms, "
    "arXiv:1711.05458, 2017",
    homepage="https://vision.eng.au.dk/plant-seedlings-dataset/",
    about=__doc__,
)
