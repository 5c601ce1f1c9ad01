"""Food-101: 101,000 photographs of 101 dishes, 750 of each for training and 250 for testing.

``FOOD_ROOT`` names the official download, ``food-101.tar.gz`` unpacked (the folder with ``images`` and ``meta``). The hub's
split ``validation`` is the official test split.
"""

from pathlib import Path

from semantic_aug.datasets.readers import official
from semantic_aug.datasets.spec import DatasetSpec, Splits

HUG_LOCAL_IMAGE_TRAIN_DIR: str | None = None
HUG_LOCAL_IMAGE_TEST_DIR: str | None = None


def read_official(root: Path) -> Splits:
    """The official lists: ``meta/classes.txt``, ``meta/train.txt`` and ``meta/test.txt``, "class/image"."""
    root = official.part(root, "meta/classes.txt", "food-101/meta/classes.txt").parents[1]
    class_names = [name for (name,) in official.read_lines(root / "meta" / "classes.txt", 1)]
    splits = {}
    for split in ("train", "test"):
        file = root / "meta" / f"{split}.txt"
        names = [name for (name,) in official.read_lines(file, 1)]
        labels = official.labels_by_name([name.split("/")[0] for name in names], class_names, f"class in {file}")
        files = [f"{name}.jpg" for name in names]
        splits[split] = official.labelled_files(class_names, labels, files, root / "images", file)
    return splits


SPEC = DatasetSpec(
    name="food",
    read=lambda: official.read(SPEC, HUG_LOCAL_IMAGE_TRAIN_DIR, HUG_LOCAL_IMAGE_TEST_DIR),
    read_official=read_official,
    super_class="food",
    license="the photographs are Foodspotting's; research use",
    citation="Bossard et al., Food-101: Mining Discriminative Components with Random Forests, ECCV 2014",
    homepage="https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
    hub=("ethz/food101",),
    hub_test_split="validation",
    torchvision=("Food101", "food-101"),
    about=__doc__,
)
