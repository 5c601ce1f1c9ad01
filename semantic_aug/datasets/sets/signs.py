"""Sign Language Digits: 2,062 photographs of hands that show the digits 0 to 9, of 218 pupils.

``SIGNS_ROOT`` names either of two folders:

* the official download (16 MB, fetched by ``python -m semantic_aug.datasets get signs``), the folder that holds
  ``Dataset/0`` to ``Dataset/9`` with files such as ``IMG_1118.JPG``. It comes without a split. Files are numbered person
  by person, so the split here is by number, 60 % train, 15 % val, 25 % test: but for the two people at the cuts, nobody
  is in two of the parts.
* a folder with ``train``, ``val`` and ``test``, each with one folder for each class.
"""

import re
from pathlib import Path

from semantic_aug.datasets.readers import official
from semantic_aug.datasets.readers.folder import read_folder
from semantic_aug.datasets.spec import DatasetSpec, Splits
from semantic_aug.errors import UserError

CLASS_NAMES = tuple(f"digit_{digit}" for digit in range(10))
FIRST_VAL, FIRST_TEST = 5136, 5469
"""Numbers of the first files of the validation and the test split."""


def read_official(root: Path) -> Splits:
    """The official folders, or folders of splits."""
    if (root / "train").is_dir():
        return read_folder(root)
    images = official.part(root, "Dataset/0", "0").parent
    rows: dict[str, list[tuple[int, str]]] = {"train": [], "val": [], "test": []}
    for digit in range(10):
        folder = official.part(images, str(digit))
        for file in official.images_in(folder):
            number = re.search(r"\d+", file.stem)
            if number is None:
                raise UserError(f"{file} has no number in its name, which decides its split: unpack the download again")
            value = int(number.group())
            split = "train" if value < FIRST_VAL else "val" if value < FIRST_TEST else "test"
            rows[split].append((digit, f"{digit}/{file.name}"))
    return official.labelled_splits(CLASS_NAMES, rows, images)


SPEC = DatasetSpec(
    name="signs",
    read=lambda: official.read(SPEC),
    read_official=read_official,
    super_class="hand",
    license="Apache-2.0",
    citation="Mavi, A New Dataset and Proposed Convolutional Neural Network Architecture for Classification of American "
    "Sign Language Digits, arXiv:2011.08927, 2020",
    homepage="https://github.com/ardamavi/Sign-Language-Digits-Dataset",
    archive=(
        "https://github.com/ardamavi/Sign-Language-Digits-Dataset/archive/refs/heads/master.zip",
        "Sign-Language-Digits-Dataset-master",
    ),
    about=__doc__,
)
