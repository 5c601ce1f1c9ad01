"""The licence of a base model as its model card states it, and a warning where it forbids uses of synthetic images."""

import logging
import re
from pathlib import Path

import yaml

log = logging.getLogger(__name__)

CARD = "README.md"
NOT_KNOWN = "not known"
OPEN_RAIL, OPEN_RAIL_PLUS = "CreativeML OpenRAIL-M", "CreativeML Open RAIL++-M"
KNOWN = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": OPEN_RAIL,
    "runwayml/stable-diffusion-v1-5": OPEN_RAIL,
    "CompVis/stable-diffusion-v1-4": OPEN_RAIL,
    "stabilityai/stable-diffusion-xl-base-1.0": OPEN_RAIL_PLUS,
}
"""Licences by hub id, for copies without a model card."""
STABLE_DIFFUSION_2 = ("sd2-community/", "stabilityai/stable-diffusion-2")
FORBIDDEN = {
    r"\bnc\b|non-?commercial|\bresearch\b": "commercial use",
    r"stabilityai-ai-community|stability ai community": "training other generative foundation models on its images",
}
"""Patterns of licence names, and the uses that these licences forbid."""


def license_of(name: str, folder: Path) -> str:
    """The licence that a base model's card in its folder names, or else the known one of its hub id, or
    :data:`NOT_KNOWN`."""
    try:
        head = (folder / CARD).read_text(encoding="utf-8-sig", errors="replace").split("---")
        front = yaml.safe_load(head[1]) if len(head) > 2 and not head[0].strip() else None
    except (OSError, yaml.YAMLError, ValueError, RecursionError):  # ValueError: no date, as in 2024-13-45
        front = None
    if isinstance(front, dict) and front.get("license"):
        return str(front.get("license_name") or front["license"])
    return OPEN_RAIL_PLUS if name.startswith(STABLE_DIFFUSION_2) else KNOWN.get(name, NOT_KNOWN)


def warn_of_license(name: str, license: str) -> None:
    """Warns once, before a stage begins, of a base model whose licence forbids commercial use or training other models."""
    forbidden = [what for pattern, what in FORBIDDEN.items() if re.search(pattern, license.lower())]
    if forbidden:
        log.warning("base model %s: its licence (%s) forbids %s", name, license, " and ".join(forbidden))
