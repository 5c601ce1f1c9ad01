"""Files of the original implementation and of other tools: class names, tokens, LoRAs and subsets, there and back."""

import pytest

from semantic_aug.errors import UserError
from semantic_aug.prompts import ClassIndex, clean_class_name

# ------------------------------------------------------------------------------------------------------- class names

SPELLED = [  # data set, source spelling, the authors' spelling
    ("cub", "001.Black_footed_Albatross", "Black footed Albatross"),
    ("cub", "067.Anna_Hummingbird", "Anna_Hummingbird"),
    ("dog", "n02085620-Chihuahua", "Chihuahua"),
    ("dog", "n02089078-black-and-tan_coonhound", "black-and-tan coonhound"),
    ("pascal", "aeroplane", "airplane"),
    ("pascal", "diningtable", "dining table"),
    ("aircraft", "F-16A/B", "F-16A B"),
    ("car", "Ram C/V Cargo Van Minivan 2012", "Ram C V Cargo Van Minivan 2012"),
]


def index_of(dataset: str, names) -> ClassIndex:
    """The classes of a data set in its own spelling and in that of its prompts."""
    from semantic_aug.datasets import find_spec

    spec = find_spec(dataset)
    return ClassIndex(
        names, [clean_class_name(name, spec.class_name_rules, spec.class_name_overrides) for name in names]
    )


@pytest.mark.parametrize(("dataset", "source", "theirs"), SPELLED)
def test_a_class_is_found_by_the_authors_spelling(dataset, source, theirs):
    names = [name for other, name, _ in SPELLED if other == dataset]
    assert index_of(dataset, names).find(theirs, where="file") == names.index(source)


def test_classes_are_matched_both_ways_between_copies():
    official = ("003.Sooty_Albatross", "001.Black_footed_Albatross")
    assert ClassIndex(official).match(("Black footed Albatross", "Sooty-Albatross"), where="f") == [1, 0]
    assert index_of("cub", official).match(("Black Footed Albatross",), where="f") == [1]
    assert ClassIndex(("Black footed Albatross",)).match(official, where="f") == [None, 0]


def test_the_closest_spelling_counts_and_numbers_that_are_names_stay():
    assert ClassIndex(("red_fox", "Red Fox")).find("Red Fox", where="f") == 1
    assert ClassIndex(("tv", "television")).find("tv", "television", where="f") == 0  # the source's name comes first
    planes = ("737-200", "727-200", "767-300")
    assert ClassIndex(planes).match(("727-200", "767 300", "757-200"), where="f") == [1, 2, None]


def test_a_class_that_may_be_either_of_two_is_refused_by_both_names():
    with pytest.raises(UserError, match="^t.bin: class 'Red fox' may be 'red fox' or 'red_fox', which differ only"):
        ClassIndex(("red fox", "red_fox")).find("Red fox", where="t.bin")
    with pytest.raises(UserError, match="^t.bin: the classes '1.toad' and '2.toad' are both spelled like 'toad'"):
        ClassIndex(("toad",)).match(("1.toad", "2.toad"), where="t.bin")
