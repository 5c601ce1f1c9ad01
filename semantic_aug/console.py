"""What the user sees besides results: plain log lines, and libraries kept quiet."""

import logging
import os
import sys
import warnings

from semantic_aug.errors import tolerate_encodings


def set_up_logging(main_process: bool = True) -> None:
    """Plain lines on standard error; only errors from other processes than the main one."""
    tolerate_encodings()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    level = logging.INFO if main_process else logging.ERROR
    logging.getLogger("semantic_aug").setLevel(logging.DEBUG if os.environ.get("DIFFMIX_DEBUG") else level)


def quiet_libraries() -> None:
    """Keeps the libraries' own advice, bars and usage reports out; to be called before they are imported."""
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
