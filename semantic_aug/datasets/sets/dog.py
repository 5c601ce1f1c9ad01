"""Stanford Dogs: 20,580 photographs of 120 breeds, 100 of each for training (12,000) and the rest (8,580) for testing.

Read from the official download: unpack ``images.tar`` (the folder ``Images``) and ``lists.tar`` (``train_list.mat``,
``test_list.mat``) into one folder and set ``DOG_ROOT`` to it. Breeds are named by the folders, ``n02085620-Chihuahua``.
"""

from pathlib import Path

from semantic_aug.datasets.readers import official
from semantic_aug.datasets.spec import DatasetSpec, Splits
from semantic_aug.errors import UserError

NUM_CLASSES = 120


def read_official(root: Path) -> Splits:
    """The official lists: ``train_list.mat`` and ``test_list.mat`` with ``file_list`` and ``labels``."""
    splits = {}
    for split in ("train", "test"):
        file = official.part(root, f"{split}_list.mat", f"lists/{split}_list.mat")
        content = official.read_mat(file)
        names = [str(name) for name in official.variable(content, "file_list", file)]
        splits[split] = file, names, official.variable(content, "labels", file).astype(int) - 1
    name_of: dict[int, str] = {}
    for file, names, labels in splits.values():
        for name, label in zip(names, labels.tolist(), strict=True):
            folder = name.split("/")[0]
            if not 0 <= label < NUM_CLASSES:
                raise UserError(f"{file}: '{name}' has the label {label + 1}, expected 1 to {NUM_CLASSES}")
            if name_of.setdefault(label, folder) != folder:
                raise UserError(f"{file}: label {label + 1} stands for '{name_of[label]}' and for '{folder}'")
    class_names = [name_of.get(label, f"class {label + 1}") for label in range(max(name_of) + 1)]
    return {
        split: official.labelled_files(class_names, labels, names, root / "Images", file)
        for split, (file, names, labels) in splits.items()
    }


SPEC = DatasetSpec(
    name="dog",
    read=lambda: official.read(SPEC),
    read_official=read_official,
    super_class="dog",
    class_name_rules=("strip_wordnet", "underscores"),
    license="non-commercial research (the photographs are ImageNet's)",
    citation="Khosla et al., Novel Dataset for Fine-Grained Image Categorization, FGVC 2011",
    homepage="http://vision.stanford.edu/aditya86/ImageNetDogs/",
    about=__doc__,
)
