"""Class names, class tokens and the sentences they stand in.

A prompt names a class by its token ``<class_i>`` (textual inversion, Gal et al. 2023) or, where a checkpoint has no
tokens, by its cleaned-up name, followed by the data set's super-class: "a photo of a <class_3> bird".
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from semantic_aug.errors import UserError, nearest_first
from semantic_aug.files import home_expanded

TEMPLATES = (
    "a photo of a {}",
    "a rendering of a {}",
    "a cropped photo of a {}",
    "a photo of the {}",
    "a close-up photo of a {}",
    "a bright photo of a {}",
    "a dark photo of a {}",
    "a good photo of a {}",
    "a blurry photo of a {}",
    "a clean picture of a {}",
    "a picture of one {}",
    "a detailed image of a {}",
    "an image of the {}",
    "a snapshot of a {}",
    "a depiction of a {}",
)
"""Training captions, one drawn at random per image and step. ``{}`` takes the class phrase."""

SAMPLING_TEMPLATE = "a photo of a {}"
"""The caption under which images are made."""

TEMPLATE_SETS = {
    "training": TEMPLATES,
    "photo": (SAMPLING_TEMPLATE,),
    # those of textual inversion's code (Gal et al. 2023), under which the Diff-Mix authors' earlier version trained
    "textual_inversion": (
        *(f"a photo of {word} {{}}" for word in ("a", "my", "the", "one")),
        *(f"a photo of {word} {{}}" for word in ("a clean", "a dirty", "a nice", "a cool", "a small")),
        *(f"a photo of the {word} {{}}" for word in ("cool", "clean", "nice", "small", "weird", "large")),
        *(f"a {word} photo of the {{}}" for word in ("cropped", "dark", "bright", "good", "close-up")),
        *(f"a {word} photo of a {{}}" for word in ("cropped", "good", "close-up")),
        *("the photo of a {}", "a rendering of a {}", "a rendition of a {}", "a rendition of the {}"),
    ),
    "views": (
        "a photo of a {}",
        "a photo of a {} seen from the side",
        "a photo of a {} seen from the front",
        "a photo of a {} from far away",
        "a close-up photo of a {}",
        "a photo of a {} in bright light",
        "a photo of a {} in the shade",
        "a photo of a {} on a plain background",
        "a photo of a {} in its usual surroundings",
    ),
}
"""Named sets of captions for ``--training_templates`` and ``--prompt_templates``."""

_SAID_WITH_CONSONANT = re.compile(r"(eu|ewe|uni([^nm]|$)|use|usu|uta|uk|ura|uv|one\b|once)", re.IGNORECASE)
"""Starts that are spelled with a vowel and spoken with a consonant: European, unicorn, one."""
_SAID_WITH_VOWEL = re.compile(r"(hour|hono|heir|8|11\b|18\b)", re.IGNORECASE)
_SPELLED_OUT = re.compile(r"[A-Z]{1,3}(?=[- ]?\d)|[A-Z]\b")
"""A start read letter by letter: MD-11, F-16, UH 60."""
_LETTERS_WITH_VOWEL = "AEFHILMNORSX"


def class_token(index: int, vector: int = 0) -> str:
    """The placeholder of class ``index``; further vectors of the same class get a numbered one."""
    return f"<class_{index}>" if vector == 0 else f"<class_{index}_{vector}>"


RULES: dict[str, Callable[[str], str]] = {
    "strip_number": lambda name: re.sub(r"^\d+[._\-\s]+", "", name),
    "strip_wordnet": lambda name: re.sub(r"^n\d{8}-", "", name),
    "underscores": lambda name: name.replace("_", " "),
    "hyphens": lambda name: name.replace("-", " "),
    "slashes": lambda name: re.sub(r"\s*/\s*", " or ", name),
    "lower": str.lower,
}
"""Clean-up rules by name, applied in the order a data set lists them."""


def clean_class_name(
    name: str, rules: Sequence[str] = ("underscores",), overrides: Mapping[str, str] | None = None
) -> str:
    """A source's class name as it stands in prompts: ``001.Black_footed_Albatross`` -> ``Black footed Albatross``; by the
    ``overrides``, else by :data:`RULES` of these names. Raises KeyError: a rule that does not exist."""
    if overrides and name in overrides:
        return overrides[name]
    cleaned = name
    for rule in rules:
        cleaned = RULES[rule](cleaned)
    return re.sub(r"\s+", " ", cleaned).strip() or name


def folded(name: str) -> str:
    """A class name without letter case, underscores, slashes and repeated spaces, to compare spellings by."""
    return " ".join(name.replace("_", " ").replace("/", " ").casefold().split())


_CATALOGUE = re.compile(r"^(?:\d+\.\s*(?=\D)|n\d{8}[-_ ])")
"""Prefixes of names in official downloads: CUB's ``001.``, WordNet's ``n02085620-``; not the numbers of "707-320"."""


def _bare(name: str) -> str:
    return folded(_CATALOGUE.sub("", name).replace("-", " "))


ORIGINAL_NAMES = {
    "pascal": {
        "aeroplane": "airplane",
        "diningtable": "dining table",
        "motorbike": "motorcycle",
        "pottedplant": "potted plant",
        "tvmonitor": "television",
    },
    "caltech": {"Faces": "faces", "Faces_easy": "faces easy", "Leopards": "leopards", "Motorbikes": "motorbikes"},
    "flower": {"cyclamen": "cyclamen ", "hippeastrum": "hippeastrum "},
}
"""By data set, the class names that follow no rule in the original implementation; those of flower end with a space there."""


def original_name(name: str, dataset: str) -> str:
    """A class as the original implementation spells it: without catalogue number, underscores and slashes ("F-16A B")."""
    plain = re.sub(r"[_/]", " ", _CATALOGUE.sub("", name))
    return ORIGINAL_NAMES.get(dataset, {}).get(name, plain)


class ClassIndex:
    """The classes of a data set or of a file, found by any spelling of their names.

    Copies of a data set spell its classes differently (``001.Black_footed_Albatross``, ``Black footed Albatross``). A name is
    looked up as it is, then :func:`folded`, then without catalogue numbers and hyphens too; the first that fits counts.

    Args:
        spellings: lists of K names in one order, the preferred ones first (a data set's source names, then its prompt names).
    """

    def __init__(self, *spellings: Sequence[str]):
        self.names = tuple(spellings[0])
        self._tables: list[tuple[Callable[[str], str], dict[str, list[int]]]] = []
        for form in (str, folded, _bare):
            for names in spellings:
                table: dict[str, list[int]] = {}
                for position, name in enumerate(names):
                    table.setdefault(form(name), []).append(position)
                self._tables.append((form, table))

    def find(self, *names: str, where: str) -> int | None:
        """Position of one class, or None where no class is spelled so.

        Args:
            names: spellings of the class, the preferred one first.

        Raises:
            UserError: several classes fit equally well; names two.
        """
        for form, table in self._tables:
            for name in names:
                positions = table.get(form(name), ())
                if len(positions) > 1:
                    first, second = (self.names[position] for position in positions[:2])
                    raise UserError(
                        f"{where}: class '{names[0]}' may be '{first}' or '{second}', which differ only in letter case, "
                        "numbers or punctuation: rename one of them"
                    )
                if positions:
                    return positions[0]
        return None

    def match(self, *spellings: Sequence[str], where: str) -> list[int | None]:
        """Positions of N classes, no two alike; None for a class that is not here.

        Args:
            spellings: lists of N names in one order, the preferred ones first.

        Raises:
            UserError: a class may be either of two, or two classes are the same one; names both.
        """
        positions = [self.find(*names, where=where) for names in zip(*spellings, strict=True)]
        owner: dict[int, str] = {}
        for position, name in zip(positions, spellings[0], strict=True):
            if position is not None and owner.setdefault(position, name) != name:
                raise UserError(
                    f"{where}: the classes '{owner[position]}' and '{name}' are both spelled like '{self.names[position]}': "
                    "rename one of them"
                )
        return positions


def class_phrase(name: str, super_class: str = "") -> str:
    """The class with its super-class, not said twice: ("Laysan Albatross", "bird") -> "Laysan Albatross bird"."""
    words = name.casefold().split()
    tail = super_class.casefold().split()
    if not tail or words[-len(tail) :] == tail:
        return name
    return f"{name} {super_class}"


def article(phrase: str) -> str:
    """ "a" or "an", as the phrase's start is spoken: a European Goldfinch, an MD-11; a class token takes "a"."""
    start = phrase.lstrip("\"'(")
    if _SPELLED_OUT.match(start):
        return "an" if start[0] in _LETTERS_WITH_VOWEL else "a"
    if _SAID_WITH_VOWEL.match(start):
        return "an"
    return "an" if start[:1].casefold() in tuple("aeiou") and not _SAID_WITH_CONSONANT.match(start) else "a"


def fill(template: str, phrase: str) -> str:
    """A template with its phrase, with the phrase's :func:`article` before it where the template has one."""
    before, _, after = template.partition("{}")
    word = article(phrase)
    before = re.sub(r"\b[Aa]n? $", lambda m: ("A" if m.group()[0] == "A" else "a") + word[1:] + " ", before)
    return f"{before}{phrase}{after}"


def caption_without_class(template: str, super_class: str) -> str:
    """A template of class prompts about an image of unknown class: of the super-class, else without what it is of.

    "a photo of a {}" gives "a photo of a bird", and "a photo" where the data set has no super-class.
    """
    if super_class:
        return fill(template, super_class)
    return template.partition("{}")[0].rpartition(" of ")[0] or "a photo"


def read_templates(word: str, flag: str = "--prompt_templates") -> tuple[str, ...]:
    """Captions to draw from: a named set, or the lines of a file (blank ones and those starting with ``#`` aside). Raises
    UserError: neither, a file without a caption, or a caption without exactly one ``{}``."""
    if word in TEMPLATE_SETS:
        return TEMPLATE_SETS[word]
    templates = _read_lines(word, flag, f"caption a line, or one of {', '.join(nearest_first(word, TEMPLATE_SETS))}")
    if not templates:
        raise UserError(f"{flag} {word}: the file holds no caption; expected one a line, with {{}} for the class")
    for line in templates:
        if line.count("{}") != 1:
            raise UserError(f"{flag} {word}: '{line}': expected exactly one {{}} where the class goes")
    return templates


def _read_lines(word: str, flag: str, expected: str) -> tuple[str, ...]:
    """The distinct lines of a text file, without blank ones and those starting with ``#``."""
    try:  # a byte-order mark, as Windows' editors write it, is no part of the first line
        lines = [line.strip() for line in home_expanded(word).read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{flag} {word}: expected a text file with one {expected}") from None
    return tuple(dict.fromkeys(line for line in lines if line and not line.startswith("#")))


def caption_prompt(caption: str, phrase: str, name: str, super_class: str = "") -> str:
    """An image's own caption, speaking of the class by its phrase, which replaces ``{}`` or the class's name and a super-class
    after it; a caption with neither follows :data:`SAMPLING_TEMPLATE`: "a photo of a <class_3> bird, perched on a branch"."""
    spelled, count = (r"\{\}", 0) if "{}" in caption else (re.escape(name), 1)
    kind = rf"(?:\s+{re.escape(super_class)})?" if super_class else ""
    named = re.sub(rf"(?<!\w){spelled}{kind}(?!\w)", "{}", caption, count=count, flags=re.IGNORECASE)
    return fill(named if "{}" in named else f"{SAMPLING_TEMPLATE}, {caption}", phrase).replace("{}", phrase)


# --------------------------------------------------------------------------------------------------------- contexts
# A context is what a picture shows besides its class: background, pose, light (BOB, Yang et al. 2026, arXiv:2510.24078).

_LEAD = re.compile(
    r"^(?:(?:an?|the|one)\s+)?(?:[\w-]+\s+){0,2}(?:photo|photograph|picture|image|view|shot|rendering|drawing)s?\s+of\s+$",
    re.IGNORECASE,
)
"""Beginnings of captions that tell nothing about the picture: "a close-up photo of"."""
_NO_ADJECTIVE = r"(?!(?:an?|the|of|in|on|at|by|with|and|or|to|from|near|under|over|behind|beside|is|are)\b)"


CAPTIONS = "captions"
"""The word that asks for the contexts in the captions of a data set."""


def with_context(prompt: str, context: str) -> str:
    """A prompt or template followed by a context, which may be empty."""
    return f"{prompt}, {context}" if context else prompt


def read_contexts(path: str) -> tuple[str, ...]:
    """The contexts of a text file, one a line (blank ones and those starting with ``#`` aside). Raises UserError: no such
    file, or one without a context; a line with ``{}``, which is a template."""
    contexts = _read_lines(path, "--contexts", "context a line, such as 'in the snow', or the word captions")
    if not contexts:
        raise UserError(f"--contexts {path}: the file holds no context; expected one a line, such as 'in the snow'")
    for line in contexts:
        if "{}" in line:
            raise UserError(
                f"--contexts {path}: '{line}': expected a context without a class; --prompt_templates takes {{}}"
            )
    return contexts


def context_of(caption: str, names: Sequence[str], super_class: str = "") -> str:
    """The context in a caption: its text without the class; may be empty.

    The class is cut from the caption's start, with what leads to it ("a photo of a small red fox asleep" -> "asleep");
    where it stands further back, "it" takes its place ("snow around a red fox" -> "snow around it").

    Args:
        caption: one line; ``{}`` may stand for the class.
        names: spellings of the class.
        super_class: of the data set, which may follow the name.
    """
    spelled = "|".join(re.escape(name) for name in sorted({"{}", *names}, key=len, reverse=True))
    kind = rf"(?:\s+{re.escape(super_class)})?" if super_class else ""
    adjectives = rf"(?:\b(?:an?|the|this|one|two|three|some|several|many)\s+(?:{_NO_ADJECTIVE}[\w-]+\s+){{0,3}})?"
    mention = re.compile(rf"{adjectives}(?<!\w)(?:{spelled}){kind}(?:e?s)?(?!\w)", re.IGNORECASE)
    text, first = caption.strip(), mention.search(caption.strip())
    if first and (not text[: first.start()].strip() or _LEAD.match(text[: first.start()])):
        text = re.sub(r"^(?:is|are)\s+", "", text[first.end() :].lstrip(" ,;:-"))
    return re.sub(r"\s+", " ", mention.sub("it", text)).strip(" ,;:.")


def contexts_of(
    captions: Iterable[str], labels: Iterable[int], names: Sequence[Sequence[str]], super_class: str = ""
) -> list[list[str]]:
    """The contexts in the captions of N images, several of one image one a line; ``names`` are the spellings of each class."""
    return [
        [context for line in caption.splitlines() if (context := context_of(line, names[label], super_class))]
        for caption, label in zip(captions, labels, strict=True)
    ]


def without_classes(contexts: Iterable[str], names: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The distinct contexts that name no class: they may follow the prompt of any."""
    spelled = "|".join(re.escape(name) for spellings in names for name in spellings)
    named = re.compile(rf"(?<!\w)(?:{spelled})(?:e?s)?(?!\w)", re.IGNORECASE)
    return tuple(context for context in dict.fromkeys(contexts) if not named.search(context))
