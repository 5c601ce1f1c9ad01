"""train_cls.py, saving its state after every epoch instead of every minute, so that a kill finds one to resume from."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_cls  # noqa: E402
from semantic_aug.classify import trainer  # noqa: E402
from semantic_aug.errors import run_main  # noqa: E402

trainer.SAVE_SECONDS = 0.0
sys.exit(run_main(train_cls.main))
