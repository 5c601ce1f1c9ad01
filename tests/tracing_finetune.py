"""train_lora.py, keeping what every process holds after every step: ``trace-{rank}.pt``, one dictionary per step."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_lora  # noqa: E402
from semantic_aug.errors import run_main  # noqa: E402
from semantic_aug.finetune import trainer  # noqa: E402

TRAINED = "lora_A", "lora_B", "vectors"
plain_step, plain_train, trace = trainer.Trainer.optimizer_step, trainer.Trainer.train, []


def optimizer_step(self):
    """The step, and a copy of what it trained."""
    out = plain_step(self)
    weights = {n: p for n, p in self.model.named_parameters() if any(part in n for part in TRAINED)}
    trace.append({n: p.detach().clone() for n, p in weights.items()})
    return out


def train(self):
    """The run, and its trace on disk."""
    summary = plain_train(self)
    torch.save(trace, self.config.output_dir / f"trace-{self.accelerator.process_index}.pt")
    return summary


trainer.Trainer.optimizer_step, trainer.Trainer.train = optimizer_step, train
sys.exit(run_main(train_lora.main))
