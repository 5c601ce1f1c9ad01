"""Stanford Cars: 16,185 photographs of 196 car models, 8,144 for training and 8,041 for testing.

``CAR_ROOT`` names the official download, in either layout. The newer one has ``cars_train``, ``cars_test`` and ``devkit``
(with ``cars_test_annos_withlabels.mat``, a download of its own, beside it or in ``devkit``); the older one has ``car_ims`` and
``cars_annos.mat``. The official host is often down; the files are mirrored on Kaggle and the Internet Archive.
"""

from pathlib import Path

import numpy as np

from semantic_aug.datasets.readers import official
from semantic_aug.datasets.spec import DatasetSpec, Splits
from semantic_aug.datasets.table import ImageTable
from semantic_aug.errors import UserError

HUG_LOCAL_IMAGE_TRAIN_DIR: str | None = None
HUG_LOCAL_IMAGE_TEST_DIR: str | None = None


def read_official(root: Path) -> Splits:
    """The official annotations, in whichever of the two layouts is found."""
    if (root / "cars_annos.mat").exists():
        return _read_single(root)
    meta = official.part(root, "devkit/cars_meta.mat", "cars_meta.mat")
    class_names = _names(meta)
    splits = {}
    for split, files in (
        ("train", ("devkit/cars_train_annos.mat", "cars_train_annos.mat")),
        ("test", ("cars_test_annos_withlabels.mat", "devkit/cars_test_annos_withlabels.mat")),
    ):
        file = official.part(root, *files)
        rows = _annotations(file)
        splits[split] = _table(class_names, rows, [f"cars_{split}/{n}" for n in rows["fname"]], root, file)
    return splits


def _read_single(root: Path) -> Splits:
    """One file of annotations for both splits; the paths in it start with ``car_ims/``."""
    file = root / "cars_annos.mat"
    class_names, rows = _names(file), _annotations(file)
    tested = rows["test"].astype(np.int64) == 1
    return {
        split: _table(class_names, rows[mask], [str(n) for n in rows["relative_im_path"][mask]], root, file)
        for split, mask in (("train", ~tested), ("test", tested))
    }


def _names(file: Path) -> list[str]:
    return [str(name) for name in official.variable(official.read_mat(file), "class_names", file)]


def _annotations(file: Path) -> np.ndarray:
    rows = official.variable(official.read_mat(file), "annotations", file)
    if "class" not in (rows.dtype.names or ()):
        raise UserError(f"{file} has annotations without classes: it is the unlabelled test list; get the labelled one")
    return rows


def _table(names: list[str], rows: np.ndarray, files: list[str], images: Path, where: Path) -> ImageTable:
    sides = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")
    boxes = None
    if set(sides) <= set(rows.dtype.names):
        boxes = {"box": np.stack([rows[side].astype(np.float64) for side in sides], axis=1)}
    return official.labelled_files(names, rows["class"].astype(np.int64) - 1, files, images, where, boxes)


SPEC = DatasetSpec(
    name="car",
    read=lambda: official.read(SPEC, HUG_LOCAL_IMAGE_TRAIN_DIR, HUG_LOCAL_IMAGE_TEST_DIR),
    read_official=read_official,
    super_class="car",
    class_name_rules=("underscores", "slashes"),
    license="non-commercial research",
    citation="Krause et al., 3D Object Representations for Fine-Grained Categorization, 3dRR 2013",
    homepage="https://ai.stanford.edu/~jkrause/cars/car_dataset.html",
    hub=("Multimodal-Fatima/StanfordCars_train", "Multimodal-Fatima/StanfordCars_test"),
    about=__doc__,
)
