#!/usr/bin/env python
"""Stage 1: teaches a pre-trained Stable Diffusion the classes of a labelled image set (class tokens and U-Net LoRA).

Run it through accelerate: accelerate launch train_lora.py --dataset cub --finetune_strategy ti_db
"""

from __future__ import annotations

import os
import sys

from semantic_aug import allocator, console
from semantic_aug.errors import run_main
from semantic_aug.finetune.config import build_parser, parse

__all__ = ["build_parser", "main"]


def main(argv: list[str] | None = None) -> int:
    """Parses the flags and runs the request; returns the exit status."""
    config = parse(argv)
    console.set_up_logging(main_process=int(os.environ.get("RANK", 0)) == 0)
    console.quiet_libraries()
    allocator.prepare_process()
    from semantic_aug.finetune.run import run  # imports torch, which has to find the process prepared

    run(config)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
