"""Waterbirds: CUB's birds pasted onto land or water, to see whether a classifier looks at the bird or behind it.

11,788 images (4,795 train, 1,199 val, 5,794 test). In train 95 % of the water birds are on water and of the land birds on
land; in val and test every bird is on either half the time. As in Diff-Mix, the labels are CUB's 200 species, in CUB's
order, so that a model trained on ``cub`` (``--dataset cub --test_dataset waterbird``) or here is tested by group: ``group`` is
2 * water bird + on water. ``test`` has the birds of CUB's test images, and of none of its training images.

Read from the official download: unpack ``waterbird_complete95_forest2water2.tar.gz`` and set ``WATERBIRD_ROOT`` to the
folder with ``metadata.csv``.
"""

import csv
from pathlib import Path

from semantic_aug.datasets.readers import official
from semantic_aug.datasets.spec import SPLITS, DatasetSpec, Splits
from semantic_aug.errors import UserError

GROUPS = ("land bird on land", "land bird on water", "water bird on land", "water bird on water")
COLUMNS = ("img_filename", "y", "split", "place")


def read_official(root: Path) -> Splits:
    """``metadata.csv``: ``img_filename`` (species/file), ``y`` (1: water bird), ``split`` (0, 1, 2), ``place`` (1: water)."""
    file = official.part(root, "metadata.csv", "waterbird_complete95_forest2water2/metadata.csv")
    try:
        with open(file, newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines)
            missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file} is no list ({error}): unpack the official download again") from None
    if missing:
        raise UserError(f"{file} lacks the column '{missing[0]}': expected {', '.join(COLUMNS)}")
    for line, row in enumerate(rows, 2):
        for column, accepted in (("y", "01"), ("place", "01"), ("split", "012")):
            if row[column] not in tuple(accepted):
                raise UserError(f"{file} line {line}: {column} '{row[column]}': expected {', '.join(accepted)}")
    species = [str(row["img_filename"]).split("/")[0] for row in rows]
    class_names = sorted(set(species))  # their numbers lead: CUB's order
    splits = {}
    for number, split in enumerate(SPLITS):
        chosen = [i for i, row in enumerate(rows) if int(row["split"]) == number]
        splits[split] = official.labelled_files(
            class_names,
            [class_names.index(species[i]) for i in chosen],
            [rows[i]["img_filename"] for i in chosen],
            file.parent,
            file,
            {"group": [2 * int(rows[i]["y"]) + int(rows[i]["place"]) for i in chosen]},
        )
    return splits


SPEC = DatasetSpec(
    name="waterbird",
    read=lambda: official.read(SPEC),
    read_official=read_official,
    super_class="bird",
    class_name_rules=("strip_number", "underscores"),
    license="non-commercial research (CUB's birds, Places' backgrounds)",
    citation="Sagawa et al., Distributionally Robust Neural Networks for Group Shifts, ICLR 2020",
    homepage="https://github.com/kohpangwei/group_DRO",
    group_names=GROUPS,
    about=__doc__,
)
