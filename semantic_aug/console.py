"""What the user sees besides results: plain log lines, and libraries kept quiet."""

from __future__ import annotations

import logging
import os
import sys
import warnings


def set_up_logging(main_process: bool = True) -> None:
    """Plain lines on standard error; only errors from other processes than the main one."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    level = logging.INFO if main_process else logging.ERROR
    logging.getLogger("semantic_aug").setLevel(logging.DEBUG if os.environ.get("DIFFMIX_DEBUG") else level)


def quiet_libraries() -> None:
    """Keeps the libraries' own progress bars, advice and usage reports out; to be called before they do any work."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    import datasets
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    datasets.disable_progress_bars()
