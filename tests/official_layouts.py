"""Each data set's official download in small: its true folders and files, rendered images, a few classes.

Every ``write_*`` fills a folder and returns what should be read from it: the class names and the images of each split.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

import tiny


def _save(path: Path, label: int, index: int, size=(40, 36), **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tiny.picture(label, index, size).save(path, **options)


def _text(path: Path, lines) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def _cells(values) -> np.ndarray:
    """A MATLAB column of cells, each holding a text."""
    column = np.empty((len(values), 1), dtype=object)
    column[:, 0] = values
    return column


CUB = ("001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross")


def write_cub(root: Path, names: Sequence[str] = CUB) -> tuple[list[str], dict[str, int]]:
    images = [(label, i) for label in range(len(names)) for i in range(5)]
    files = [f"{names[label]}/{names[label][4:]}_{i:04d}_{100 + i}.jpg" for label, i in images]
    for (label, i), file in zip(images, files, strict=True):
        _save(root / "images" / file, label, i)
    _text(root / "images.txt", [f"{n} {file}" for n, file in enumerate(files, 1)])
    _text(root / "image_class_labels.txt", [f"{n} {label + 1}" for n, (label, _) in enumerate(images, 1)])
    _text(root / "train_test_split.txt", [f"{n} {int(i < 3)}" for n, (_, i) in enumerate(images, 1)])
    _text(root / "classes.txt", [f"{n} {name}" for n, name in enumerate(names, 1)])
    _text(root / "bounding_boxes.txt", [f"{n} 4.0 3.0 20.0 {10 + i}.0" for n, (_, i) in enumerate(images, 1)])
    return names, {"train": 9, "test": 6}


def write_aircraft(root: Path) -> tuple[list[str], dict[str, int]]:
    names, number = ["707-320", "F-16A/B", "MD-11"], 0
    rows: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for split, count in (("train", 4), ("val", 2), ("test", 3)):
        for label, name in enumerate(names):
            for i in range(count):
                number += 1
                _save(root / "data" / "images" / f"{number:07d}.jpg", label, 10 * number + i)
                rows[split].append(f"{number:07d} {name}")
        _text(root / "data" / f"images_variant_{split}.txt", rows[split])
    _text(root / "data" / "variants.txt", names)
    return names, {"train": 12, "val": 6, "test": 9}


def write_flower(root: Path) -> tuple[list[str], dict[str, int]]:
    from scipy.io import savemat

    from semantic_aug.datasets.sets.flower import CLASS_NAMES

    labels = np.array([1, 1, 1, 1, 77, 77, 77, 77, 102, 102, 102, 102], np.uint8)
    for n, label in enumerate(labels, 1):
        _save(root / "jpg" / f"image_{n:05d}.jpg", int(label), n)
    savemat(root / "imagelabels.mat", {"labels": labels[None]})
    sets = {"trnid": [1, 2, 5, 6, 9, 10], "valid": [3, 7, 11], "tstid": [4, 8, 12]}
    savemat(root / "setid.mat", {name: np.array([ids], np.uint16) for name, ids in sets.items()})
    return list(CLASS_NAMES), {"train": 6, "val": 3, "test": 3}


def write_dog(root: Path) -> tuple[list[str], dict[str, int]]:
    from scipy.io import savemat

    names = ["n02085620-Chihuahua", "n02085782-Japanese_spaniel", "n02096051-Airedale"]
    for split, first, count in (("train", 0, 4), ("test", 4, 2)):
        files = [f"{name}/{name[:9]}_{i}.jpg" for name in names for i in range(first, first + count)]
        labels = np.repeat(np.arange(1, 4, dtype=np.uint8), count)[:, None]
        for file, label in zip(files, labels[:, 0], strict=True):
            _save(root / "Images" / file, int(label), 10 * first + len(file))
        savemat(
            root / f"{split}_list.mat",
            {"file_list": _cells(files), "annotation_list": _cells([f[:-4] for f in files]), "labels": labels},
        )
    return names, {"train": 12, "test": 6}


CARS = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Ram C/V Cargo Van Minivan 2012"]


def _car_rows(fields, rows) -> np.ndarray:
    kinds = [(field, object) for field in fields]
    return np.array([tuple(row) for row in rows], dtype=kinds)[None]


def write_car(root: Path) -> tuple[list[str], dict[str, int]]:
    from scipy.io import savemat

    names = np.empty((1, 3), dtype=object)
    names[0] = CARS
    (root / "devkit").mkdir(parents=True)
    savemat(root / "devkit" / "cars_meta.mat", {"class_names": names})
    fields = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")
    for split, file, count in (
        ("train", "devkit/cars_train_annos.mat", 4),
        ("test", "cars_test_annos_withlabels.mat", 2),
    ):
        rows = []
        for n in range(3 * count):
            _save(root / f"cars_{split}" / f"{n + 1:05d}.jpg", n % 3, n)
            rows.append((2, 3, 30, 31, n % 3 + 1, f"{n + 1:05d}.jpg"))
        savemat(root / file, {"annotations": _car_rows(fields, rows)})
    return CARS, {"train": 12, "test": 6}


def write_car_single(root: Path) -> tuple[list[str], dict[str, int]]:
    from scipy.io import savemat

    names = np.empty((1, 3), dtype=object)
    names[0] = CARS
    fields = ("relative_im_path", "bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "test")
    rows = []
    for n in range(18):
        _save(root / "car_ims" / f"{n + 1:06d}.jpg", n % 3, n)
        rows.append((f"car_ims/{n + 1:06d}.jpg", 2, 3, 30, 31, n % 3 + 1, int(n >= 12)))
    savemat(root / "cars_annos.mat", {"annotations": _car_rows(fields, rows), "class_names": names})
    return CARS, {"train": 12, "test": 6}


def write_pet(root: Path) -> tuple[list[str], dict[str, int]]:
    names = ["Abyssinian", "american_bulldog", "Bengal"]
    for split, first, count in (("trainval", 1, 4), ("test", 100, 2)):
        lines = []
        for label, name in enumerate(names, 1):
            for i in range(first, first + count):
                _save(root / "images" / f"{name}_{i}.jpg", label, i)
                lines.append(f"{name}_{i} {label} {1 if name[0].isupper() else 2} {label}")
        _text(root / "annotations" / f"{split}.txt", lines)
    _text(root / "annotations" / "list.txt", ["#Image CLASS-ID SPECIES BREED ID", "#ID: 1:37 Class ids"])
    return names, {"train": 12, "test": 6}


def write_food(root: Path) -> tuple[list[str], dict[str, int]]:
    names = ["apple_pie", "baby_back_ribs", "waffles"]
    for split, first, count in (("train", 1000, 4), ("test", 2000, 2)):
        listed = [f"{name}/{first + i + 10 * k}" for k, name in enumerate(names) for i in range(count)]
        for n, item in enumerate(listed):
            _save(root / "images" / f"{item}.jpg", n // count, first + n)
        _text(root / "meta" / f"{split}.txt", listed)
    _text(root / "meta" / "classes.txt", names)
    _text(root / "meta" / "labels.txt", ["Apple pie", "Baby back ribs", "Waffles"])
    return names, {"train": 12, "test": 6}


def _annotation(image: str, objects) -> str:
    nodes = "".join(
        f"<object><name>{name}</name><pose>Left</pose><truncated>0</truncated><difficult>0</difficult><bndbox>"
        f"<xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"
        for name, box in objects
    )
    size = "<size><width>40</width><height>36</height><depth>3</depth></size>"
    return f"<annotation><folder>VOC2012</folder><filename>{image}.jpg</filename>{size}{nodes}</annotation>"


def write_pascal(root: Path) -> tuple[list[str], dict[str, int]]:
    from semantic_aug.datasets.sets.pascal import CLASS_NAMES

    number = 0
    for split, count in (("train", 4), ("val", 2)):
        listed = []
        for label, name in ((0, "aeroplane"), (10, "diningtable"), (19, "tvmonitor")):
            for _ in range(count):
                number += 1
                image = f"2007_{number:06d}"
                listed.append(image)
                _save(root / "JPEGImages" / f"{image}.jpg", label, number)
                objects = [("person", (1, 1, 9, 9)), (name, (2, 2, 38, 30)), ("dog", (5, 5, 12, 12))]
                _text(root / "Annotations" / f"{image}.xml", [_annotation(image, objects)])
        _text(root / "ImageSets" / "Segmentation" / f"{split}.txt", listed)
    return list(CLASS_NAMES), {"train": 12, "test": 6}


def write_caltech(root: Path) -> tuple[list[str], dict[str, int]]:
    names = ["Faces", "accordion", "water_lilly"]
    for label, (name, count) in enumerate([("BACKGROUND_Google", 3), *((name, 33) for name in names)]):
        for i in range(1, count + 1):
            _save(root / "101_ObjectCategories" / name / f"image_{i:04d}.jpg", label, i, (20, 18))
    return names, {"train": 90, "test": 9}


def write_waterbird(root: Path) -> tuple[list[str], dict[str, int]]:
    names = ["001.Black_footed_Albatross", "013.Bobolink", "113.Baird_Sparrow"]
    rows = ["img_id,img_filename,y,split,place,place_filename"]
    for split, count in ((0, 4), (1, 2), (2, 2)):
        for label, name in enumerate(names):
            for i in range(count):
                file = f"{name}/{name[4:]}_{split}{i:03d}.jpg"
                _save(root / file, label, 10 * split + i)
                rows.append(f"{len(rows)},{file},{int(label == 0)},{split},{i % 2},/o/ocean/{i:08d}.jpg")
    _text(root / "metadata.csv", rows)
    return names, {"train": 12, "val": 6, "test": 6}


def write_seedlings(root: Path) -> tuple[list[str], dict[str, int]]:
    names = ["Black-grass", "Maize", "Shepherds Purse"]
    for label, name in enumerate(names):
        for i in range(1, 15):
            _save(root / name / f"{i}.png", label, i)
    return names, {"train": 27, "val": 6, "test": 9}


def write_signs(root: Path) -> tuple[list[str], dict[str, int]]:
    for digit in range(10):
        (root / "Dataset" / str(digit)).mkdir(parents=True)
    for digit in range(3):
        for number in (1118, 1201, 4200, 5126, 5136, 5456, 5469, 5479, 5989):
            _save(root / "Dataset" / str(digit) / f"IMG_{number + digit}.JPG", digit, number, format="JPEG")
    # 5,136 to 5,138 and 5,456 to 5,458 are validation photographs
    return [f"digit_{digit}" for digit in range(10)], {"train": 12, "val": 6, "test": 9}


WRITERS = {
    "aircraft": write_aircraft,
    "caltech": write_caltech,
    "car": write_car,
    "cub": write_cub,
    "dog": write_dog,
    "flower": write_flower,
    "food": write_food,
    "pascal": write_pascal,
    "pet": write_pet,
    "seedlings": write_seedlings,
    "signs": write_signs,
    "waterbird": write_waterbird,
}


def encoded_like(path: Path, image: Image.Image, kind: str, **options) -> Path:
    """Saves an image in a given format whatever its extension says, as some downloads have them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, kind, **options)
    return path
