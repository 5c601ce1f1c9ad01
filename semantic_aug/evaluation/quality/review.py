"""The review file: which images of which lists a person rejected in a gallery.

A gallery's page saves it as ``review.json``: ``{"format": "semantic_aug review 1", "gallery": ..., "lists": [...]}``. Each list
has ``folder`` and ``list`` (for people), its identity (``images``, ``labels``, ``content``) and ``rejected``, paths relative to
``data/``. Rejections hold for the images that were looked at: a list is found by its identity, never by its name alone.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from semantic_aug import registry
from semantic_aug.datasets.fingerprint import hash_files
from semantic_aug.datasets.origin import synthetic_identity
from semantic_aug.datasets.synthetic import DATA, SyntheticImages, locate
from semantic_aug.errors import UserError
from semantic_aug.files import read_json_object

FORMAT = "semantic_aug review 1"
IDENTITY = ("images", "labels", "content")


def relative_paths(images: SyntheticImages, folder: str) -> list[str]:
    """Path of each image of a subset relative to its ``data/``, as ``meta.csv`` spells it."""
    root = os.path.join(os.path.abspath(locate(folder)[0] / DATA), "")
    return [str(path).removeprefix(root) for path in images.paths]


def list_identity(images: SyntheticImages, class_names: Sequence[str]) -> dict[str, Any]:
    """What a list of images is: their number, and digests of their labels and content."""
    return synthetic_identity(images, hash_files(images.paths, "synthetic images"), class_names)


def read_review(file: Path) -> list[dict[str, Any]]:
    """The lists of a review file. Raises UserError: it is not there, or not a file that a gallery saved."""
    try:
        content = read_json_object(file)
    except FileNotFoundError:
        raise UserError(f"--review {file} does not exist: save the review in the gallery first") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--review {file} cannot be read ({error}): expected a file saved by a gallery") from None
    lists = content.get("lists")
    if content.get("format") != FORMAT or not isinstance(lists, list) or not all(_is_list(part) for part in lists):
        raise UserError(f"--review {file} is not a review: expected a JSON file with 'format': '{FORMAT}'")
    return lists


def _is_list(part: Any) -> bool:
    return (
        isinstance(part, dict)
        and all(name in part for name in ("folder", "list", *IDENTITY))
        and isinstance(part.get("rejected"), list)
        and all(isinstance(path, str) for path in part["rejected"])
    )


def kept_after_review(file: Path, folder: str, images: SyntheticImages, class_names: Sequence[str]) -> np.ndarray:
    """Which images of a subset's list a review keeps, bool ``(M,)``. Raises UserError: the review is not of these images."""
    lists = read_review(file)
    identity, shown = list_identity(images, class_names), registry.shown_path(locate(folder)[0])
    same = [part for part in lists if all(part[name] == identity[name] for name in IDENTITY)]
    if not same:
        known = ", ".join(f"{part['folder']} ({part['list']}, {part['images']} images)" for part in lists[:4])
        raise UserError(
            f"--review {file} is not about the {len(images)} images of {folder} as they are now (it is about "
            f"{known or 'none'}): make a gallery of them and review it"
        )
    part = next((part for part in same if part["folder"] == shown), same[0])
    paths = relative_paths(images, folder)
    unknown = set(part["rejected"]) - set(paths)
    if unknown:
        raise UserError(f"--review {file} rejects '{sorted(unknown)[0]}', which {folder} does not list: save it again")
    rejected = set(part["rejected"])
    return np.array([path not in rejected for path in paths], bool)
