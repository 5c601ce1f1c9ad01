"""What both stages of a base model's training share: averaged weights, learning rates, saved states, the loop's clock."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from semantic_aug.runs import MetricsCsv
from semantic_aug.tensors import load_pickle, save_pickle

LOG_EVERY = 50
SAVE_SECONDS = 120


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


@dataclass(frozen=True)
class Machine:
    """Where a training runs.

    Attributes:
        device: cuda or cpu.
        compile: whether networks are compiled: some minutes first, a third faster after.
    """

    device: torch.device
    compile: bool = False

    @contextlib.contextmanager
    def amp(self):
        """Context of mixed precision: bfloat16 where it saves time, which is any GPU and a CPU with instructions for it.

        On a CPU attention is computed by plain matrix products: at these sizes the backward pass of torch's fused kernel
        takes a quarter of a step (35 against 53 images per processor second at 96 px).
        """
        cpu = self.device.type == "cpu"
        fast = not cpu or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        attention = sdpa_kernel(SDPBackend.MATH) if cpu else contextlib.nullcontext()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=fast), attention:
            yield

    def compiled(self, function: Callable) -> Callable:
        """The function, compiled where that was asked for."""
        return torch.compile(function, dynamic=False) if self.compile else function

    def name(self) -> str:
        """The device in words."""
        return torch.cuda.get_device_name(0) if self.device.type == "cuda" else f"{torch.get_num_threads()} CPU core(s)"


@dataclass(frozen=True)
class Budget:
    """What a stage may spend; it ends at whichever limit comes first.

    Attributes:
        images: training images, repeats counted.
        batch: images per step.
        seconds: of training, restarts included; None for no limit.
    """

    images: int
    batch: int
    seconds: float | None = None

    @property
    def steps(self) -> int:
        return max(1, math.ceil(self.images / self.batch))

    def share(self, step: int, seconds: float) -> float:
        """The share of the budget that is spent, in [0, 1]."""
        spent = step / self.steps
        if self.seconds is None:
            return min(1.0, spent)
        return min(1.0, max(spent, seconds / self.seconds)) if self.seconds > 0 else 1.0


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up, then a constant rate, or a cosine decay over the budget to ``floor * peak``."""

    peak: float
    warmup: int
    schedule: str = "cosine"
    floor: float = 0.01

    def __call__(self, step: int, share: float) -> float:
        shape = 0.5 * (1 + math.cos(math.pi * share)) if self.schedule == "cosine" else 1.0
        return self.peak * min(1.0, (step + 1) / self.warmup) * (self.floor + (1 - self.floor) * shape)


def make_optimizer(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW as both stages use it, fused."""
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)


class Stage:
    """One stage's training: a loop over steps that can be killed at any point, its log, its saved state.

    The state holds weights, averaged weights, optimiser, step and seconds. Random numbers are a function of the step, so
    a resumed training draws what an undisturbed one would have.

    Args:
        name: of the stage; names the state ``{name}.pt`` and the log ``{name}.csv``.
        folder: working folder.
        model: trained module.
        ema: its averaged weights.
        budget: of the stage.
        rate: learning rate as a function of the step and of the share of the budget spent.
        columns: logged values.
        identity: what the state belongs to (the autoencoder's digest, for the denoiser); another one is refused.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        model: nn.Module,
        ema: Ema,
        *,
        budget: Budget,
        rate: LearningRate,
        columns: Sequence[str],
        identity: str = "",
    ):
        self.name, self.path, self.budget, self.rate, self.identity = (
            name,
            folder / f"{name}.pt",
            budget,
            rate,
            identity,
        )
        self.parts = {"model": model, "ema": ema, "optimizer": make_optimizer(model, rate.peak)}
        self.step, self.seconds = self._load()
        self.log_path, self.columns = folder / f"{name}.csv", ["images", "seconds", *columns]

    def _load(self) -> tuple[int, float]:
        if not self.path.exists():
            return 0, 0.0
        saved = load_pickle(self.path, "remove it to start this stage afresh")
        if saved["identity"] != self.identity:
            from semantic_aug.errors import UserError

            raise UserError(
                f"{self.path} was trained on another autoencoder than the one in this folder: remove it to train "
                f"this stage afresh, or give --work_dir another folder"
            )
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])
        return saved["step"], saved["seconds"]

    def save(self) -> None:
        """Writes the state; the file appears whole or not at all."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        save_pickle(self.path, {"step": self.step, "seconds": self.seconds, "identity": self.identity, **state})

    def steps(self) -> Iterator[int]:
        """The steps that are left, learning rate set; saves the state now and then and at the end."""
        began, start = time.monotonic() - self.seconds, self.step
        if self.budget.share(start, self.seconds) >= 1:
            return
        self.log = MetricsCsv(self.log_path, self.columns, keep_below=start * self.budget.batch)
        last_save = time.monotonic()
        images = self.budget.images
        with tqdm(total=images, initial=start * self.budget.batch, desc=self.name, unit="image", mininterval=5) as bar:
            self.bar = bar
            while (share := self.budget.share(self.step, self.seconds)) < 1:
                for group in self.parts["optimizer"].param_groups:
                    group["lr"] = self.rate(self.step, share)
                yield self.step
                self.step, self.seconds = self.step + 1, time.monotonic() - began
                bar.update(self.budget.batch)
                if time.monotonic() - last_save > SAVE_SECONDS:
                    self.save()
                    last_save = time.monotonic()
        if self.step > start:
            self.save()

    def optimise(self, loss: Tensor) -> Tensor:
        """One clipped optimiser step on the loss; returns the gradient's norm before clipping."""
        model, optimizer = self.parts["model"], self.parts["optimizer"]
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        self.parts["ema"].update(model, self.step)
        return norm

    def record(self, values: dict[str, Tensor | float], validation: Callable[[], dict] | None = None) -> None:
        """Adds a row to the log every ``LOG_EVERY`` steps, or at once where there are validation values."""
        if validation is None and (self.step + 1) % LOG_EVERY:
            return
        shown = {
            name: float(value.detach() if isinstance(value, Tensor) else value)
            for name, value in {**values, **(validation() if validation else {})}.items()
        }
        self.bar.set_postfix({name: f"{value:.4f}" for name, value in shown.items()}, refresh=False)
        seen = (self.step + 1) * self.budget.batch
        self.log.add(images=seen, seconds=round(self.seconds, 1), **shown)
