"""PASCAL VOC 2012 as a classification set of 20 classes: each image is labelled by its largest object.

The images of the segmentation lists are used, as the works on generative augmentation do: 1,464 for training and the
1,449 of ``val``, whose labels are public, as test. Read from the official download: unpack
``VOCtrainval_11-May-2012.tar`` and set ``PASCAL_ROOT`` to ``VOCdevkit/VOC2012``.

The largest object is that of the largest bounding box in ``Annotations/*.xml``, so that no image is decoded to learn a
label; Diff-Mix and DA-Fusion count mask pixels, which can choose another object where a thin one has a wide box.
"""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np

from semantic_aug.datasets.readers import official
from semantic_aug.datasets.spec import DatasetSpec, Splits
from semantic_aug.errors import UserError, unknown
from semantic_aug.prompts import ORIGINAL_NAMES

CLASS_NAMES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
    "sofa train tvmonitor"
).split()


def read_official(root: Path) -> Splits:
    """The lists ``ImageSets/Segmentation/{train,val}.txt`` (``Main`` where there is no such folder) and annotations."""
    lists = official.part(root, "ImageSets/Segmentation", "ImageSets/Main", "VOCdevkit/VOC2012/ImageSets/Segmentation")
    root = lists.parents[1]
    splits = {}
    for split, name in (("train", "train"), ("test", "val")):
        file = lists / f"{name}.txt"
        images = [image for (image,) in official.read_lines(file, 1)]
        objects = [largest_object(root / "Annotations" / f"{image}.xml") for image in images]
        splits[split] = official.labelled_files(
            CLASS_NAMES,
            [label for label, _ in objects],
            [f"{image}.jpg" for image in images],
            root / "JPEGImages",
            file,
            {"box": np.array([box for _, box in objects], dtype=np.float64).reshape(-1, 4)},
        )
    return splits


def largest_object(file: Path) -> tuple[int, tuple[float, float, float, float]]:
    """The class of the object with the largest box in an annotation, the first of equals, and the box. Raises UserError: not
    there, not XML, no object, or a class that is not one of the 20."""
    try:
        objects = ElementTree.parse(file).getroot().findall("object")
        objects = [
            (node.findtext("name", "").strip(), *(float(node.findtext(f"bndbox/{s}", "")) for s in _SIDES))
            for node in objects
        ]
    except FileNotFoundError:
        raise UserError(f"{file} is not there: unpack the official download again") from None
    except (ElementTree.ParseError, ValueError) as error:
        raise UserError(f"{file} is not a VOC annotation ({error}): unpack the official download again") from None
    if not objects:
        raise UserError(f"{file} names no object: an image without one has no label; remove it from the list")
    name, *box = max(objects, key=lambda row: (row[3] - row[1]) * (row[4] - row[2]))
    if name not in CLASS_NAMES:
        raise unknown(f"class in {file}", name, CLASS_NAMES, "unpack the official download again")
    return CLASS_NAMES.index(name), tuple(box)


_SIDES = ("xmin", "ymin", "xmax", "ymax")

SPEC = DatasetSpec(
    name="pascal",
    read=lambda: official.read(SPEC),
    read_official=read_official,
    class_name_rules=(),
    class_name_overrides=ORIGINAL_NAMES["pascal"],
    license="the photographs are Flickr's, under its terms of use",
    citation="Everingham et al., The PASCAL Visual Object Classes (VOC) Challenge, IJCV 2010",
    homepage="http://host.robots.ox.ac.uk/pascal/VOC/voc2012/",
    torchvision=("VOCSegmentation", "VOCdevkit/VOC2012"),
    about=__doc__,
)
