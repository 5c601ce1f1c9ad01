"""Output besides results: plain log lines, quiet libraries, tables in Markdown."""

import logging
import os
import sys
import warnings
from collections.abc import Sequence

from semantic_aug.errors import tolerate_encodings


def set_up_logging(main_process: bool = True) -> None:
    """Plain lines on standard error; only errors from other processes than the main one."""
    tolerate_encodings()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    level = logging.INFO if main_process else logging.ERROR
    logging.getLogger("semantic_aug").setLevel(logging.DEBUG if os.environ.get("DIFFMIX_DEBUG") else level)


def quiet_libraries() -> None:
    """Silences the libraries' advice, bars and usage reports; to be called before they are imported."""
    for name, value in (
        ("TOKENIZERS_PARALLELISM", "false"),
        ("HF_HUB_DISABLE_TELEMETRY", "1"),
        ("HF_HUB_VERBOSITY", "error"),
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("DIFFUSERS_VERBOSITY", "error"),
        ("HF_DATASETS_DISABLE_PROGRESS_BARS", "1"),
        ("TF_CPP_MIN_LOG_LEVEL", "3"),
    ):
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", module=r"PIL\b")  # on damaged metadata and large images, which are handled


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[object]], texts: int = 1) -> str:
    """A table in Markdown; all but the first ``texts`` columns hold numbers, and are set to the right."""
    marks = ["---" if i < texts else "---:" for i in range(len(columns))]
    lines = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in (columns, *rows)]
    return "\n".join([lines[0], f"|{'|'.join(marks)}|", *lines[1:]])
