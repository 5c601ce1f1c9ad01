"""Oxford-IIIT Pet: 7,349 photographs of 37 breeds of cats and dogs, 3,680 for training and 3,669 for testing.

``PET_ROOT`` names the official download, ``images.tar.gz`` and ``annotations.tar.gz`` unpacked into one folder.
"""

from pathlib import Path

from semantic_aug.datasets.readers import official
from semantic_aug.datasets.spec import DatasetSpec, Splits
from semantic_aug.errors import UserError

HUG_LOCAL_IMAGE_TRAIN_DIR: str | None = None
HUG_LOCAL_IMAGE_TEST_DIR: str | None = None

NUM_CLASSES = 37


def read_official(root: Path) -> Splits:
    """The official lists: ``annotations/trainval.txt`` and ``annotations/test.txt``, "image class species breed"."""
    lists = {"train": root / "annotations" / "trainval.txt", "test": root / "annotations" / "test.txt"}
    rows = {split: official.read_lines(file, 4) for split, file in lists.items()}
    name_of: dict[int, str] = {}
    for split, listed in rows.items():
        for image, number, _, _ in listed:
            if not number.isdecimal() or not 1 <= int(number) <= NUM_CLASSES:
                raise UserError(
                    f"{lists[split]}: image '{image}' has the class '{number}', expected 1 to {NUM_CLASSES}"
                )
            name_of.setdefault(int(number), image.rpartition("_")[0])
    class_names = [name_of.get(number, f"class {number}") for number in range(1, max(name_of) + 1)]
    return {
        split: official.labelled_files(
            class_names,
            [int(number) - 1 for _, number, _, _ in listed],
            [f"{image}.jpg" for image, *_ in listed],
            root / "images",
            lists[split],
        )
        for split, listed in rows.items()
    }


SPEC = DatasetSpec(
    name="pet",
    read=lambda: official.read(SPEC, HUG_LOCAL_IMAGE_TRAIN_DIR, HUG_LOCAL_IMAGE_TEST_DIR),
    read_official=read_official,
    super_class="animal",
    license="CC BY-SA 4.0",
    citation="Parkhi et al., Cats and Dogs, CVPR 2012",
    homepage="https://www.robots.ox.ac.uk/~vgg/data/pets/",
    hub=("timm/oxford-iiit-pet",),
    torchvision=("OxfordIIITPet", "oxford-iiit-pet"),
    about=__doc__,
)
