"""A run that diverges stops in its tracks: one line, status 2, what was good is kept, nothing is registered."""

import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from helpers import classify_arguments, run_here, sampling_arguments
from PIL import Image
from safetensors.torch import load_file, save_file

import tiny
import train_cls
from semantic_aug import meta_csv, registry
from semantic_aug.classify import inference
from semantic_aug.diffusion.loop import decode_latents
from semantic_aug.divergence import LossLog, check_losses, non_finite
from semantic_aug.errors import UserError, memory_advice
from semantic_aug.finetune import checkpoints
from semantic_aug.finetune.config import parse
from semantic_aug.finetune.run import make_accelerator, resolve
from semantic_aug.finetune.trainer import Trainer


def finetune_words(tiny_base, image_folder, output_dir, **changes):
    flags = {
        "dataset": f"folder:{image_folder}",
        "pretrained_model_name_or_path": tiny_base,
        "max_train_steps": 6,
        "train_batch_size": 2,
        "validation_steps": 0,
        "report_to": "none",
        "checkpointing_steps": 1,
        "logging_steps": 100,
        "output_dir": output_dir,
        **changes,
    }
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]


# ------------------------------------------------------------------------------------------------------- the notebook


def test_the_first_bad_step_is_named():
    log = LossLog(torch.device("cpu"), capacity=5)
    for value in (1.0, 2.0, float("inf"), float("nan"), 3.0):
        log.add(torch.tensor(value))
    with pytest.raises(UserError, match=r"the loss of step 13 is inf; lower it"):
        check_losses(log.read(), last_step=15, advice="lower it")
    log.add(torch.tensor(0.5))
    losses = log.read()
    assert losses.tolist() == [0.5] and check_losses(losses, 16, "") is None


def test_the_tensor_that_is_not_finite_is_named():
    tensors = {"a": torch.ones(3), "count": torch.ones(1, dtype=torch.long), "b": torch.tensor([1.0, float("-inf")])}
    assert non_finite(tensors.items()) == "b"
    del tensors["b"]
    assert non_finite(tensors.items()) is None


# -------------------------------------------------------------------------------------------------------------- stage 1


def diverging(trainer: Trainer, step: int):
    """Makes a trained weight not finite after a step, as a step of too large a learning rate does."""
    plain = trainer.optimizer_step

    def optimizer_step():
        result = plain()
        if trainer.step == step:
            with torch.no_grad():
                trainer.model.vectors[0][0, 0] = float("nan")
        return result

    trainer.optimizer_step = optimizer_step


@pytest.mark.slow
def test_stage_1_keeps_the_last_good_checkpoint(tiny_base, image_folder, tmp_path):
    argv = finetune_words(tiny_base, image_folder, tmp_path / "o", checkpoints_total_limit=1)
    config, dataset = resolve(parse(argv))
    config.output_dir.mkdir()
    trainer = Trainer(config, dataset, make_accelerator(config))
    diverging(trainer, 3)
    with pytest.raises(UserError, match=r"after step 3 '.*' is not finite; lower .*checkpoint-2 is the last good"):
        trainer.train()
    assert [path.name for path in checkpoints.listed(config.output_dir)] == ["checkpoint-2"]
    assert not (config.output_dir / "learned_embeds.safetensors").exists()


@pytest.mark.slow
def test_stage_1_registers_nothing(tiny_base, image_folder, tmp_path):
    shutil.copytree(registry.CONFIG_DIR, tmp_path / "config")
    before = (tmp_path / "config" / "finetuned_ckpts.yaml").read_text()
    rates = {"learning_rate": 1e15, "ti_learning_rate": 1e15, "max_grad_norm": 0, "checkpointing_steps": 0}
    output = run_here(
        "train_lora.py",
        *finetune_words(tiny_base, image_folder, tmp_path / "o", **rates),
        *("--register_key", "bad", "--config_dir", tmp_path / "config"),
        status=2,
    )
    assert "training diverged" in output and "--learning_rate 1e+15" in output and "--max_grad_norm 1" in output
    assert (tmp_path / "config" / "finetuned_ckpts.yaml").read_text() == before
    assert not list((tmp_path / "o").glob("*.safetensors"))


# ------------------------------------------------------------------------------------------------------------- memory


def refuse_memory(*_):
    return torch.empty(1 << 60)


def test_stage_1_out_of_memory_is_one_line_and_leaves_no_trace(tiny_base, image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "optimizer_step", refuse_memory)
    output = run_here("train_lora.py", *finetune_words(tiny_base, image_folder, tmp_path / "o"), status=2)
    assert re.search(r"\nerror: out of memory \(.*\): lower --train_batch_size .*\n$", output)
    assert not (tmp_path / "o").exists()


def test_stage_3_out_of_memory_is_one_line(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("semantic_aug.classify.trainer.Trainer._moved", refuse_memory)
    output = run_here("train_cls.py", *classify_arguments(image_folder, tmp_path / "o"), status=2)
    assert re.search(r"\nerror: out of memory \(.*\): raise --gradient_accumulation_steps.*\n$", output)


@pytest.mark.parametrize(
    ("error", "advised"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_only_errors_of_memory_get_advice(error, advised):
    with (
        pytest.raises(UserError if advised else RuntimeError, match="lower it" if advised else "illegal"),
        memory_advice("lower it"),
    ):
        raise error


# -------------------------------------------------------------------------------------------------------------- stage 2


@pytest.mark.slow
def test_images_that_are_not_finite_are_counted_and_refused(workshop, image_folder, tmp_path, undisturbed):
    tokens = load_file(workshop / "ck" / "learned_embeds.safetensors")
    first = sorted(tokens)[0]
    entries = yaml.safe_load((workshop / "config" / "finetuned_ckpts.yaml").read_text())
    section = next(iter(entries))
    shutil.copytree(workshop / "ck", tmp_path / "ck")
    from safetensors import safe_open

    with safe_open(workshop / "ck" / "learned_embeds.safetensors", "pt") as file:
        metadata = file.metadata()
    tokens[first] = torch.full_like(tokens[first], 3e38)  # finite, but not what the text encoder makes of it
    save_file(tokens, tmp_path / "ck" / "learned_embeds.safetensors", metadata)
    entry = {**entries[section]["ck"], "embed_path": str(tmp_path / "ck" / "learned_embeds.safetensors")}
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "finetuned_ckpts.yaml").write_text(yaml.safe_dump({section: {"ck": entry}}))
    argv = sampling_arguments(workshop, image_folder, tmp_path / "s", config_dir=tmp_path / "config")
    output = run_here("sample_mp.py", *argv, status=2)
    assert "18 images could not be made" in output and "its image is black everywhere" in output
    (table,) = [meta_csv.read(path) for path in (tmp_path / "s").rglob("meta.csv")]
    created = sorted((tmp_path / "s").rglob("*.png"))
    assert len(created) == len(table) == 36 and all(np.asarray(Image.open(path)).any() for path in created)
    targets = {table.class_names[target] for target in table.target}
    assert len(targets) == 2  # those of the class with the broken token are not there


@pytest.mark.slow
def test_a_run_whose_images_are_all_black_ends_at_once(workshop, image_folder, tmp_path, tiny_base):
    tiny.write_lora(tmp_path / "lora" / "pytorch_lora_weights.safetensors", tiny_base, scale=1e25)
    entries = yaml.safe_load((workshop / "config" / "finetuned_ckpts.yaml").read_text())
    section = next(iter(entries))
    entry = {**entries[section]["ck"], "lora_path": str(tmp_path / "lora")}
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "finetuned_ckpts.yaml").write_text(yaml.safe_dump({section: {"ck": entry}}))
    argv = sampling_arguments(workshop, image_folder, tmp_path / "s", config_dir=tmp_path / "config")
    assert "images are all black everywhere, since" in run_here("sample_mp.py", *argv, status=2)
    assert not list((tmp_path / "s").rglob("*.png"))


def test_only_the_image_that_is_not_finite_is_black(tiny_base):
    from semantic_aug.diffusion.base import load_base

    vae = load_base(str(tiny_base), tiny_base).vae
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = decode_latents(vae, latents)
    latents[1, 2, 3, 4] = float("nan")
    images = decode_latents(vae, latents)
    assert torch.equal(images[[0, 2]], plain[[0, 2]]) and not images[1].any()


# -------------------------------------------------------------------------------------------------------------- stage 3


@pytest.mark.slow
def test_stage_3_stops_and_writes_no_result(image_folder, tmp_path, capsys):
    argv = [str(word) for word in classify_arguments(image_folder, tmp_path / "o", lr=1e30)]
    with pytest.raises(UserError, match=r"training diverged: .*lower --lr 1e\+30 and choose another --output_dir"):
        train_cls.main(argv)
    assert not (tmp_path / "o" / "results.json").exists() and not (tmp_path / "o" / "model.safetensors").exists()


@pytest.mark.slow
def test_an_evaluation_is_not_made_of_outputs_that_are_not_finite(image_folder, tmp_path):
    argv = [str(word) for word in classify_arguments(image_folder, tmp_path / "o", nepoch=1)]
    assert train_cls.main(argv) == 0
    weights = load_file(tmp_path / "o" / "model.safetensors")
    for name in ("layer4.1.bn2.weight", "fc.weight"):
        weights[name] *= 1e30  # finite weights, outputs that are not
    save_file(weights, tmp_path / "o" / "model.safetensors")
    with pytest.raises(UserError, match="outputs are not finite"):
        train_cls.main([*argv, "--eval_only"])
    with pytest.raises(UserError, match="outputs are not finite"):
        train_cls.main([*argv, "--predict", str(image_folder / "test")])
    assert not (tmp_path / "o" / inference.PREDICTIONS_FILE).exists()
    assert not (tmp_path / "o" / inference.EVAL_FOLDER / "results.json").exists()
