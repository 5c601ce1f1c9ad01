"""FGVC-Aircraft: 10,000 photographs of 100 aircraft variants, from the hub's copy or a local one.

``HUG_LOCAL_IMAGE_TRAIN_DIR`` / ``HUG_LOCAL_IMAGE_TEST_DIR`` below may name a local copy (a folder with the hub's parquet
files, or one written by ``save_to_disk``); the environment variables ``AIRCRAFT_HUG_LOCAL_IMAGE_TRAIN_DIR`` and
``AIRCRAFT_HUG_LOCAL_IMAGE_TEST_DIR`` take precedence.
"""

from __future__ import annotations

from semantic_aug.datasets.sources import read_hub, train_and_test
from semantic_aug.datasets.spec import DatasetSpec, Splits

HUG_LOCAL_IMAGE_TRAIN_DIR: str | None = None
HUG_LOCAL_IMAGE_TEST_DIR: str | None = None


def read() -> Splits:
    """The hub's training and test photographs, labelled by variant."""
    places = train_and_test(
        "aircraft", "Multimodal-Fatima/FGVC_Aircraft_{split}", HUG_LOCAL_IMAGE_TRAIN_DIR, HUG_LOCAL_IMAGE_TEST_DIR
    )
    return read_hub(places, image_column="image", label_column="label")


SPEC = DatasetSpec(
    name="aircraft",
    read=read,
    super_class="aircraft",
    class_name_rules=("underscores", "slashes"),
    license="non-commercial research",
    citation="Maji et al., Fine-Grained Visual Classification of Aircraft, arXiv:1306.5151",
    homepage="https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
)
