"""What a data set is: data, not a class hierarchy.

A module per data set declares one :class:`DatasetSpec`. Its ``read`` is a plain function, usually one of
:mod:`semantic_aug.datasets.readers` with its arguments bound, that returns the splits it has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from semantic_aug.datasets.table import ImageTable

SPLITS = ("train", "val", "test")
Splits = dict[str, ImageTable]


@dataclass(frozen=True)
class DatasetSpec:
    """One image-classification data set.

    Attributes:
        name: the word given to ``--dataset``; it also names the registry section and the output folders.
        read: returns the splits the source has, a subset of :data:`SPLITS` that contains ``train``.
        super_class: what every class is a kind of ("bird"); appended to the class in prompts. May be empty.
        class_name_rules: clean-up of the source's class names for prompts (:data:`semantic_aug.prompts.RULES`).
        class_name_overrides: source class name -> name used in prompts, applied instead of the rules.
        license: of the images.
        citation: who to cite.
        homepage: where to get it.
        hub: hub ids it is read from where no local copy is named.
        variables: environment variables that name local copies.
        group_names: meaning of the values of the tables' ``group`` column, where they have one.
        about: what it is and how to get it, the module's own docstring.
        former_name: the name that earlier versions made from the path, whose registry sections are still read.
    """

    name: str
    read: Callable[[], Splits]
    super_class: str = ""
    class_name_rules: tuple[str, ...] = ("underscores",)
    class_name_overrides: Mapping[str, str] = field(default_factory=dict)
    license: str = "not stated"
    citation: str = ""
    homepage: str = ""
    hub: tuple[str, ...] = ()
    variables: tuple[str, ...] = ()
    group_names: tuple[str, ...] = ()
    about: str = ""
    former_name: str = ""
