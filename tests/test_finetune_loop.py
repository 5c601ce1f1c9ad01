"""Stage 1's fast loop is the plain one: same losses, same tokens, same LoRA, as a loop with nothing cached or left out."""

import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers import ROOT
from safetensors.torch import load_file

import tiny
import train_lora
from semantic_aug.datasets import load_dataset
from semantic_aug.diffusion.base import load_base
from semantic_aug.diffusion.loop import encode_moments, to_pixels
from semantic_aug.errors import UserError
from semantic_aug.finetune import checkpoints, trainer
from semantic_aug.finetune.batches import BatchSource
from semantic_aug.finetune.pixels import PixelCache, scaled

TOLERANCE = 1e-4
"""Largest difference of a trained weight after 50 steps at a rate of 1e-2, and ten times that of a loss: Adam divides by
the root of a running mean square, so gradients that differ in their last bits give steps that differ in more."""


def request(tiny_base, image_folder, output_dir, **changes):
    """A resolved request and its data set."""
    flags = {
        "dataset": f"folder:{image_folder}",
        "pretrained_model_name_or_path": tiny_base,
        "max_train_steps": 50,
        "train_batch_size": 4,
        "learning_rate": 1e-2,
        "ti_learning_rate": 1e-2,
        "rank": 2,
        "checkpointing_steps": 0,
        "validation_steps": 0,
        "report_to": "none",
        "output_dir": output_dir,
        **changes,
    }
    words = []
    for name, value in flags.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return train_lora.resolve(train_lora.build_parser().parse_args(words))


def make_trainer(*arguments, **changes):
    """A trainer ready for :meth:`optimizer_step`, in process."""
    config, dataset = request(*arguments, **changes)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    running = trainer.Trainer(config, dataset, Accelerator(cpu=True))
    running.prepare()
    return running


def trained(folder) -> dict[str, torch.Tensor]:
    names = ("pytorch_lora_weights.safetensors", "learned_embeds.safetensors")
    return {k: v for name in names if (folder / name).is_file() for k, v in load_file(folder / name).items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "changes"),
    [("ti", {"num_vectors": 2}), ("db", {"lora_alpha": 4}), ("ti_db", {"crops": 2, "lr_scheduler": "cosine"})],
)
def test_fifty_steps_equal_the_plain_loops(tiny_base, image_folder, tmp_path, monkeypatch, strategy, changes):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from benchmarks.original_finetune import OriginalTrainer

    ours = make_trainer(tiny_base, image_folder, tmp_path / "run", finetune_strategy=strategy, **changes)
    plain = OriginalTrainer(ours.config, ours.dataset, Accelerator(cpu=True))
    draws = [ours.source.draw(step) for step in range(50)]
    begin = {name: value.clone() for name, value in plain.result().items()}
    losses = np.array([[float(ours.optimizer_step()[0]), plain.step(draw)] for draw in draws])
    checkpoints.save_weights(ours.model, tmp_path / "run")
    found, wanted = trained(tmp_path / "run"), plain.result()
    assert found.keys() == wanted.keys() and len(found) > 0
    assert np.abs(losses[:, 0] - losses[:, 1]).max() < TOLERANCE / 10
    assert all((found[k] - wanted[k]).abs().max() < TOLERANCE for k in wanted)
    assert any((wanted[k] - begin[k]).abs().max() > 1e3 * TOLERANCE for k in wanted)  # it did train
    assert losses[0, 0] == pytest.approx(losses[0, 1], abs=1e-6)
    fresh = load_base(str(tiny_base)).text_encoder.get_input_embeddings().weight
    table = ours.base.text_encoder.get_input_embeddings().weight
    assert torch.equal(table, fresh)  # words are as they were
    if plain.tokens is not None:
        assert torch.equal(plain.table[: len(fresh)], fresh)
