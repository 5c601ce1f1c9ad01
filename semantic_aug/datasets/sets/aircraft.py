"""FGVC-Aircraft: 10,000 photographs of 100 aircraft variants.

``AIRCRAFT_ROOT`` names the official download, ``fgvc-aircraft-2013b.tar.gz`` unpacked (the folder with ``data``); its train,
val and test lists of 3,334, 3,333 and 3,333 photographs are kept apart.
"""

from pathlib import Path

from semantic_aug.datasets.readers import official
from semantic_aug.datasets.spec import SPLITS, DatasetSpec, Splits

HUG_LOCAL_IMAGE_TRAIN_DIR: str | None = None
HUG_LOCAL_IMAGE_TEST_DIR: str | None = None


def read_official(root: Path) -> Splits:
    """The official lists: ``data/variants.txt`` and ``data/images_variant_{train,val,test}.txt``."""
    data = official.part(root, "data/variants.txt", "variants.txt").parent
    class_names = [name for (name,) in official.read_lines(data / "variants.txt", 1)]
    splits = {}
    for split in SPLITS:
        file = data / f"images_variant_{split}.txt"
        rows = official.read_lines(file, 2)
        labels = official.labels_by_name([variant for _, variant in rows], class_names, f"variant in {file}")
        names = [f"{number}.jpg" for number, _ in rows]
        splits[split] = official.labelled_files(class_names, labels, names, data / "images", file)
    return splits


SPEC = DatasetSpec(
    name="aircraft",
    read=lambda: official.read(SPEC, HUG_LOCAL_IMAGE_TRAIN_DIR, HUG_LOCAL_IMAGE_TEST_DIR),
    read_official=read_official,
    super_class="aircraft",
    class_name_rules=("underscores", "slashes"),
    license="non-commercial research",
    citation="Maji et al., Fine-Grained Visual Classification of Aircraft, arXiv:1306.5151",
    homepage="https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
    hub=("Multimodal-Fatima/FGVC_Aircraft_train", "Multimodal-Fatima/FGVC_Aircraft_test"),
    torchvision=("FGVCAircraft", "fgvc-aircraft-2013b"),
    about=__doc__,
)
