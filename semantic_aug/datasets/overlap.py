"""Images of one data set among those of another, compared by content, not by name."""

from semantic_aug.datasets.catalog import LoadedDataset
from semantic_aug.datasets.fingerprint import UNREADABLE, hash_images
from semantic_aug.datasets.table import ImageTable
from semantic_aug.errors import UserError


def by_content(table: ImageTable) -> dict[bytes, str]:
    """The name of each image that can be read, under its content hash."""
    values = [value.tobytes() for value in hash_images(table).values]
    return {value: key for value, key in zip(values, table.keys, strict=True) if value != UNREADABLE}


def shared_images(images: ImageTable, others: ImageTable, known: ImageTable | None = None) -> list[tuple[str, str]]:
    """Which images are among others: the name of each and its name there.

    Args:
        known: images that may be shared, such as the others' own test split, which may repeat photographs of their training
            split; None: none.
    """
    names, shared = by_content(others), []
    for key, value in zip(images.keys, hash_images(images).values, strict=True):
        if value.tobytes() in names:
            shared.append((key, value.tobytes()))
    left_out = by_content(known) if shared and known is not None else {}
    return [(key, names[value]) for key, value in shared if value not in left_out]


def refuse_known_images(dataset: LoadedDataset, test: ImageTable, where: str) -> None:
    """Refuses test images of another data set that this one trains on, or chooses the epoch by. Raises UserError: names one of
    them.

    Photographs that the data set's own test split shares with its other splits are no matter of the other's.
    """
    for kind, table in (("training", dataset.train), ("validation", dataset.val)):
        if table is not None and (shared := shared_images(test, table, dataset.test)):
            raise UserError(
                f"{where} holds {len(shared)} {kind} images of {dataset.name}{dataset.setting.suffix} among its test images "
                f"('{shared[0][0]}' is '{shared[0][1]}'): remove them from it, or give a data set of other images"
            )
