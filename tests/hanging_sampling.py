"""``sample_mp.py`` whose processes never finish reading one image, as on a network file system that is gone."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sample_mp
from semantic_aug.errors import run_main
from semantic_aug.sampling import sources

HANGING = ("blue jay", "train000.png")
_read = sources._read


def read(path: Path) -> bytes:
    """The file's content; of the one image never."""
    while path.parts[-2:] == HANGING:
        time.sleep(1)
    return _read(path)


sources._read = read  # in every process: each imports this file anew

if __name__ == "__main__":
    sys.exit(run_main(sample_mp.main))
