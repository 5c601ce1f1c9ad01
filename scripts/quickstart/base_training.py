"""What the stages of the base model's training share: averaged weights, a schedule, saved states and a progress bar."""

from __future__ import annotations

import csv
import math
import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from semantic_aug.run_dir import load_pickle


class Ema:
    """Exponential moving average of a module's floating-point state, with a warm-up of the decay."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.values = {k: v.detach().clone() for k, v in module.state_dict().items() if v.is_floating_point()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        state = module.state_dict()
        torch._foreach_lerp_(list(self.values.values()), [state[key] for key in self.values], 1 - decay)

    def values_of(self, part: str) -> dict[str, Tensor]:
        """The averages of the submodule ``part``, under its own names."""
        return {key.removeprefix(part + "."): value for key, value in self.values.items() if key.startswith(part + ".")}

    def copy_to(self, module: nn.Module) -> None:
        module.load_state_dict({**module.state_dict(), **self.values})

    def state_dict(self) -> dict[str, Tensor]:
        return self.values

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for key, value in self.values.items():
            value.copy_(state[key])


def make_optimizer(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW as both stages use it, fused."""
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)


def cosine(step: int, steps: int, peak: float, warmup: int, floor: float = 0.01) -> float:
    """Learning rate with linear warm-up and a cosine decay to ``floor * peak``."""
    shape = 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps))))
    return peak * min(1.0, (step + 1) / warmup) * (floor + (1 - floor) * shape)


def save_state(path: Path, step: int, **parts) -> None:
    """Writes the state of every part; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save({"step": step, **{name: part.state_dict() for name, part in parts.items()}}, temporary)
    os.replace(temporary, path)


def load_state(path: Path, **parts) -> int:
    """Restores every part from ``path`` where it exists; returns the step to go on from (0 for a fresh start)."""
    if not path.exists():
        return 0
    saved = load_pickle(path, "remove it to start this stage afresh")
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    return saved["step"]


class Progress:
    """A progress bar, a CSV row every ``every`` steps, and a clock that says when to save."""

    def __init__(self, name: str, start: int, steps: int, folder: Path, every: int = 50, save_seconds: float = 120):
        self.path, self.every, self.save_seconds = folder / f"{name}.csv", every, save_seconds
        self.bar = tqdm(total=steps, initial=start, desc=name, mininterval=5, dynamic_ncols=True)
        self.count, self.saved, self.began = start, time.monotonic(), time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def step(self, **values: Tensor) -> None:
        self.count += 1
        self.bar.update()
        if self.count % self.every == 0:
            shown = {name: float(value) for name, value in values.items()}
            self.bar.set_postfix({name: f"{value:.4f}" for name, value in shown.items()}, refresh=False)
            new = not self.path.exists()
            with open(self.path, "a", newline="") as out:
                writer = csv.writer(out)
                if new:
                    writer.writerow(["step", "seconds", *shown])
                writer.writerow([self.count, round(time.monotonic() - self.began, 1), *shown.values()])

    def time_to_save(self) -> bool:
        if time.monotonic() - self.saved < self.save_seconds:
            return False
        self.saved = time.monotonic()
        return True
