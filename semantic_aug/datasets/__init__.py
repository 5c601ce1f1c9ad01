"""Data sets: what they are (``spec``), how they are read (``readers``), which part is used (``subsets``)."""

from semantic_aug.datasets.catalog import LoadedDataset, find_spec, known_names, load_dataset
from semantic_aug.datasets.settings import Setting
from semantic_aug.datasets.spec import DatasetSpec
from semantic_aug.datasets.table import ImageTable

__all__ = ["DatasetSpec", "ImageTable", "LoadedDataset", "Setting", "find_spec", "known_names", "load_dataset"]
