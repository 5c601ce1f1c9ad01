"""CUB-200-2011: 11,788 photographs of 200 bird species.

``CUB_ROOT`` names the official download, ``CUB_200_2011.tgz`` unpacked (the folder with ``images.txt``); it has the boxes too.
"""

from pathlib import Path

import numpy as np

from semantic_aug.datasets.readers import official
from semantic_aug.datasets.spec import DatasetSpec, Splits
from semantic_aug.errors import UserError

HUG_LOCAL_IMAGE_TRAIN_DIR: str | None = None
HUG_LOCAL_IMAGE_TEST_DIR: str | None = None


def read_official(root: Path) -> Splits:
    """The official lists: ``images.txt``, ``image_class_labels.txt``, ``train_test_split.txt``, ``bounding_boxes.txt``."""
    root = official.part(root, "images.txt", "CUB_200_2011/images.txt").parent
    names = dict(official.read_lines(root / "images.txt", 2))
    label_of = dict(official.read_lines(root / "image_class_labels.txt", 2))
    is_train = dict(official.read_lines(root / "train_test_split.txt", 2))
    class_names = [name for _, name in official.read_lines(root / "classes.txt", 2)]
    lists, box_of = {"image_class_labels.txt": label_of, "train_test_split.txt": is_train}, {}
    if (root / "bounding_boxes.txt").exists():
        box_of = {row[0]: row[1:] for row in official.read_lines(root / "bounding_boxes.txt", 5)}
        lists["bounding_boxes.txt"] = box_of
    for file, content in lists.items():
        if missing := set(names) - set(content):
            raise UserError(f"{root / file} has no line for image {min(missing)}: unpack the official download again")
    if unexpected := [number for number in names if is_train[number] not in ("0", "1")]:
        shown = f"image {unexpected[0]} has '{is_train[unexpected[0]]}'"
        raise UserError(f"{root / 'train_test_split.txt'}: {shown}, expected 1 (train) or 0 (test)")
    splits = {}
    for split, flag in (("train", "1"), ("test", "0")):
        chosen = [number for number in names if is_train[number] == flag]
        where = f"{root / 'bounding_boxes.txt'}, image"
        boxes = [[official.number(value, f"{where} {n}") for value in box_of[n]] for n in chosen] if box_of else None
        if boxes is not None:
            boxes = np.array(boxes).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]  # left, top, width, height in the file
        splits[split] = official.labelled_files(
            class_names,
            [int(official.number(label_of[n], f"{root / 'image_class_labels.txt'}, image {n}")) - 1 for n in chosen],
            [names[number] for number in chosen],
            root / "images",
            root / "images.txt",
            {"box": boxes} if boxes is not None else None,
        )
    return splits


SPEC = DatasetSpec(
    name="cub",
    read=lambda: official.read(SPEC, HUG_LOCAL_IMAGE_TRAIN_DIR, HUG_LOCAL_IMAGE_TEST_DIR),
    read_official=read_official,
    super_class="bird",
    class_name_rules=("strip_number", "underscores"),
    license="non-commercial research and education",
    citation="Wah et al., The Caltech-UCSD Birds-200-2011 Dataset, CNS-TR-2011-001",
    homepage="https://www.vision.caltech.edu/datasets/cub_200_2011/",
    hub=("Multimodal-Fatima/CUB_train", "Multimodal-Fatima/CUB_test"),
    shot_thresholds=(20, 5),
    about=__doc__,
)
