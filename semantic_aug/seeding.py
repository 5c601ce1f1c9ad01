"""Random numbers as a pure function of named keys.

Whatever is drawn (a few-shot subset, the plan of a synthetic set, the noise of one image, the batch of one training
step) comes from a generator made for it from (seed, purpose, index). Nothing reads or moves the global generators, so
a draw does not depend on what ran before it, on the number of processes, or on a restart.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def derive_seed(*keys: int | str) -> int:
    """A 63-bit seed from any sequence of integers and strings; equal keys give equal seeds on every machine."""
    text = "\x1f".join(f"{type(key).__name__[0]}:{key}" for key in keys)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def numpy_rng(*keys: int | str) -> np.random.Generator:
    """A private numpy generator for ``keys``."""
    return np.random.default_rng(derive_seed(*keys))


def torch_rng(*keys: int | str) -> torch.Generator:
    """A private torch generator on the CPU for ``keys``; drawing on the CPU keeps values equal across devices."""
    import torch

    return torch.Generator("cpu").manual_seed(derive_seed(*keys))


def task_rng(seed: int, number: int) -> torch.Generator:
    """The generator of one sampling task: first the VAE's posterior sample, then the noise, come from it."""
    return torch_rng(seed, "sample", number)
