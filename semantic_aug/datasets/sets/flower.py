"""Oxford Flowers 102: 8,189 photographs of 102 flowers, 10 of each for training, 10 for validation, the rest for testing.

``FLOWER_ROOT`` names the official download, ``102flowers.tgz`` unpacked (the folder ``jpg``) with ``imagelabels.mat`` and
``setid.mat`` beside it; the official lists of 1,020, 1,020 and 6,149 photographs are kept apart. The hub's copy has another
split: 7,169 for training, 1,020 for testing.

``--split half``, of the official download alone: the authors of Diff-Mix draw a random half of each flower's photographs for
training and test on the rest; the draw is theirs, image for image.

The download has no class names; those below are the ones its authors list, in the order of its labels.
"""

from pathlib import Path

import numpy as np

from semantic_aug.datasets.readers import official
from semantic_aug.datasets.spec import DatasetSpec, Splits
from semantic_aug.datasets.subsets import halves
from semantic_aug.datasets.table import ImageTable
from semantic_aug.errors import UserError

HUG_LOCAL_IMAGE_TRAIN_DIR: str | None = None
HUG_LOCAL_IMAGE_TEST_DIR: str | None = None

SETS = {"train": "trnid", "val": "valid", "test": "tstid"}
CLASS_NAMES = tuple(
    name.strip()
    for name in """
    pink primrose, hard-leaved pocket orchid, canterbury bells, sweet pea, english marigold, tiger lily, moon orchid,
    bird of paradise, monkshood, globe thistle, snapdragon, colt's foot, king protea, spear thistle, yellow iris,
    globe-flower, purple coneflower, peruvian lily, balloon flower, giant white arum lily, fire lily, pincushion flower,
    fritillary, red ginger, grape hyacinth, corn poppy, prince of wales feathers, stemless gentian, artichoke,
    sweet william, carnation, garden phlox, love in the mist, mexican aster, alpine sea holly, ruby-lipped cattleya,
    cape flower, great masterwort, siam tulip, lenten rose, barbeton daisy, daffodil, sword lily, poinsettia,
    bolero deep blue, wallflower, marigold, buttercup, oxeye daisy, common dandelion, petunia, wild pansy, primula,
    sunflower, pelargonium, bishop of llandaff, gaura, geranium, orange dahlia, pink-yellow dahlia, cautleya spicata,
    japanese anemone, black-eyed susan, silverbush, californian poppy, osteospermum, spring crocus, bearded iris,
    windflower, tree poppy, gazania, azalea, water lily, rose, thorn apple, morning glory, passion flower, lotus,
    toad lily, anthurium, frangipani, clematis, hibiscus, columbine, desert-rose, tree mallow, magnolia, cyclamen,
    watercress, canna lily, hippeastrum, bee balm, ball moss, foxglove, bougainvillea, camellia, mallow,
    mexican petunia, bromelia, blanket flower, trumpet creeper, blackberry lily
    """.replace("\n", " ").split(",")
)


def read_labels(root: Path) -> tuple[Path, np.ndarray]:
    """``imagelabels.mat``, and what it holds: the label of ``image_00001.jpg`` and on, counted from 0."""
    file = official.part(root, "imagelabels.mat")
    return file, official.variable(official.read_mat(file), "labels", file).astype(int) - 1


def labelled(root: Path, file: Path, labels: np.ndarray, numbers: np.ndarray) -> ImageTable:
    """The photographs of some numbers, which count from 1."""
    names = [f"image_{number:05d}.jpg" for number in numbers]
    return official.labelled_files(CLASS_NAMES, labels[numbers - 1], names, root / "jpg", file)


def read_half() -> Splits:
    """The Diff-Mix authors' split."""
    root = official.chosen_root(SPEC)
    if root is None:
        raise UserError(
            f"--split half of '{SPEC.name}' is drawn from the official download: set {SPEC.variables[0]} to it "
            f"({SPEC.homepage}), or give --split official"
        )
    file, labels = read_labels(root)
    return halves(labelled(root, file, labels, np.arange(len(labels)) + 1))


def read_official(root: Path) -> Splits:
    """The labels, and ``setid.mat`` (image numbers of each split)."""
    (file, labels), sets = read_labels(root), official.part(root, "setid.mat")
    content = official.read_mat(sets)
    splits = {}
    for split, name in SETS.items():
        numbers = official.variable(content, name, sets).astype(int)
        if len(numbers) and not 1 <= numbers.min() <= numbers.max() <= len(labels):
            raise UserError(f"{sets}: {name} numbers images up to {numbers.max()}, {file.name} has {len(labels)}")
        splits[split] = labelled(root, file, labels, numbers)
    return splits


SPEC = DatasetSpec(
    name="flower",
    read=lambda: official.read(SPEC, HUG_LOCAL_IMAGE_TRAIN_DIR, HUG_LOCAL_IMAGE_TEST_DIR),
    read_official=read_official,
    read_half=read_half,
    super_class="flower",
    license="research use; the photographs are their authors'",
    citation="Nilsback and Zisserman, Automated Flower Classification over a Large Number of Classes, ICVGIP 2008",
    homepage="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
    hub=("nelorth/oxford-flowers",),
    torchvision=("Flowers102", "flowers-102"),
    shot_thresholds=(30, 10),
    about=__doc__,
)
