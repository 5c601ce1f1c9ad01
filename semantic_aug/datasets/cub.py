"""CUB-200-2011: 11,788 photographs of 200 bird species, from the hub's copy or a local one.

``HUG_LOCAL_IMAGE_TRAIN_DIR`` / ``HUG_LOCAL_IMAGE_TEST_DIR`` below may name a local copy (a folder with the hub's parquet
files, or one written by ``save_to_disk``); the environment variables ``CUB_HUG_LOCAL_IMAGE_TRAIN_DIR`` and
``CUB_HUG_LOCAL_IMAGE_TEST_DIR`` take precedence.
"""

from __future__ import annotations

from semantic_aug.datasets.sources import read_hub, train_and_test
from semantic_aug.datasets.spec import DatasetSpec, Splits

HUG_LOCAL_IMAGE_TRAIN_DIR: str | None = None
HUG_LOCAL_IMAGE_TEST_DIR: str | None = None


def read() -> Splits:
    """The hub's 5,994 training and 5,794 test photographs."""
    places = train_and_test("cub", "Multimodal-Fatima/CUB_{split}", HUG_LOCAL_IMAGE_TRAIN_DIR, HUG_LOCAL_IMAGE_TEST_DIR)
    return read_hub(places, image_column="image", label_column="label")


SPEC = DatasetSpec(
    name="cub",
    read=read,
    super_class="bird",
    class_name_rules=("strip_number", "underscores"),
    license="non-commercial research and education",
    citation="Wah et al., The Caltech-UCSD Birds-200-2011 Dataset, CNS-TR-2011-001",
    homepage="https://www.vision.caltech.edu/datasets/cub_200_2011/",
)
