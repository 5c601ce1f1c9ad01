"""Stage 1's fast loop is the plain one: same losses, same tokens, same LoRA, as a loop with nothing cached or left out."""

import os
import shutil
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.optimization import get_scheduler
from helpers import ROOT, contents, exchange
from PIL import Image
from safetensors.torch import load_file

import tiny
from semantic_aug import files
from semantic_aug.datasets import load_dataset
from semantic_aug.datasets.spec import SPLITS
from semantic_aug.diffusion.base import load_base
from semantic_aug.diffusion.loop import encode_moments, to_pixels
from semantic_aug.diffusion.tokens import load_tokens
from semantic_aug.errors import Interrupted, UserError
from semantic_aug.finetune import checkpoints, trainer
from semantic_aug.finetune.batches import BatchSource
from semantic_aug.finetune.config import LR_SCHEDULERS, parse
from semantic_aug.finetune.latents import PixelCache, scaled_size
from semantic_aug.finetune.model import make_schedule
from semantic_aug.finetune.run import resolve, train

TOLERANCE = 1e-4
"""Largest difference of a trained weight after 50 steps, and ten times that of a loss: Adam divides by
the root of a running mean square, so gradients that differ in their last bits give steps that differ in more."""


@pytest.fixture(autouse=True)
def any_precision():
    """Accelerate remembers the precision of the first accelerator in a process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


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
    argv = []
    for name, value in flags.items():
        argv += [f"--{name}", *map(str, value if isinstance(value, tuple) else [] if value is True else [value])]
    return resolve(parse(argv))


def make_trainer(*arguments, cpu=True, **changes):
    """A trainer ready for :meth:`optimizer_step`, in process."""
    config, dataset = request(*arguments, **changes)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    running = trainer.Trainer(config, dataset, Accelerator(cpu=cpu, mixed_precision=config.model.mixed_precision))
    running.prepare()
    return running


def trained(folder) -> dict[str, torch.Tensor]:
    names = ("pytorch_lora_weights.safetensors", "learned_embeds.safetensors")
    return {k: v for name in names if (folder / name).is_file() for k, v in load_file(folder / name).items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "changes"),
    [
        ("ti", {"num_vectors": 2}),
        ("db", {"lora_alpha": 4, "learning_rate": 1e-3}),
        ("ti_db", {"crops": 2, "lr_scheduler": "cosine"}),
    ],
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
    result, wanted = trained(tmp_path / "run"), plain.result()
    assert result.keys() == wanted.keys() and len(result) > 0
    assert np.abs(losses[:, 0] - losses[:, 1]).max() < TOLERANCE / 10
    assert all((result[k] - wanted[k]).abs().max() < TOLERANCE for k in wanted)
    assert any((wanted[k] - begin[k]).abs().max() > 100 * TOLERANCE for k in wanted)  # it did train
    assert losses[0, 0] == pytest.approx(losses[0, 1], abs=1e-6)
    fresh = load_base(str(tiny_base)).text_encoder.get_input_embeddings().weight
    table = ours.base.text_encoder.get_input_embeddings().weight
    assert torch.equal(table, fresh)  # words are as they were
    if plain.tokens is not None:
        assert torch.equal(plain.table[: len(fresh)], fresh)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stop", "changes"),
    [
        (1, {"gradient_accumulation_steps": 2}),
        (6, {"gradient_accumulation_steps": 2, "mixed_precision": "bf16"}),
        (4, {"random_crops": True, "noise_offset": 0.1}),
    ],
)
def test_stopped_at_any_step_and_resumed_equals_not_stopped(
    tiny_base, image_folder, tmp_path, monkeypatch, stop, changes
):
    changes |= {"max_train_steps": 7, "logging_steps": 7, "lr_scheduler": "polynomial", "train_batch_size": 2}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    make_trainer(tiny_base, image_folder, whole, **changes).train()
    running = make_trainer(tiny_base, image_folder, parts, **changes)
    plain = running.optimizer_step

    def step():
        if running.step + 1 == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain()

    monkeypatch.setattr(running, "optimizer_step", step)
    with pytest.raises(Interrupted, match=rf"interrupted at step {stop} of 7.*--resume_from_checkpoint latest resumes"):
        running.train()
    later = parts / f".checkpoint-{stop + 1}.tmp"  # as if a later one had been cut off in the middle of its writing
    shutil.copytree(parts / f"checkpoint-{stop}", later)
    assert checkpoints.find(parts, "latest") == parts / f"checkpoint-{stop}"
    make_trainer(tiny_base, image_folder, parts, resume_from_checkpoint="latest", **changes).train()
    result, wanted = trained(parts), trained(whole)
    assert result.keys() == wanted.keys()
    assert all(torch.equal(result[k], wanted[k]) for k in wanted)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-6)  # a row's mean is over all its steps
    assert not list(parts.glob(".*"))  # leftovers are gone


# -------------------------------------------------------------------------------------------- what a run is made from


def finetune(home, *, images="animals", base="base", output="run", **changes):
    """The same short command, wherever its files lie."""
    flags = {"max_train_steps": 4, "logging_steps": 1, "checkpointing_steps": 2, "lr_scheduler": "cosine", **changes}
    config, dataset = request(home / base, home / images, home / output, **flags)
    return train(config, dataset, Accelerator(cpu=True))


@pytest.fixture(scope="module")
def movable(tiny_base, image_folder, tmp_path_factory):
    """A finished run beside the images and the base model that it was made from."""
    home = tmp_path_factory.mktemp("movable")
    shutil.copytree(image_folder, home / "animals")
    shutil.copytree(tiny_base, home / "base")
    finetune(home)
    yield home
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def moved(movable, tmp_path):
    shutil.copytree(movable, tmp_path / "moved")
    return tmp_path / "moved"


def losses(folder):
    rows = (folder / "metrics.csv").read_text().splitlines()[1:]
    return {int(row.split(",")[0]): float(row.split(",")[1]) for row in rows}


def test_a_finished_run_is_found_when_all_has_moved(moved, caplog):
    caplog.set_level("INFO")
    (moved / "animals").rename(moved / "creatures")
    (moved / "base").rename(moved / "model")
    changes = {"train_batch_size": 1, "gradient_accumulation_steps": 4, "lr_power": 2.0}  # the power is not used
    before = contents(moved / "run", "*")
    finetune(moved, images="creatures", base="model", **changes)
    assert "is finished already (4 steps)" in caplog.text and contents(moved / "run", "*") == before


def other_bytes(file):
    exchange(file, file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda home: other_bytes(home / "animals/train/toad/train000.png"),
            "train: 18 images as before, the same names and labels, other content",
        ),
        (lambda home: (home / "animals/train/toad/train000.png").unlink(), "train: 17 images now, 18 when"),
        (
            lambda home: [(home / "animals" / s / "toad").rename(home / "animals" / s / "newt") for s in SPLITS],
            "class names differ; prompt names differ",
        ),
        (lambda home: other_bytes(home / "base/vae/diffusion_pytorch_model.safetensors"), "base_model: "),
    ],
)
def test_a_finished_run_is_not_the_result_of_something_else(moved, change, message):
    before = contents(moved / "run", "*")
    change(moved)
    with pytest.raises(UserError, match=rf"made from other data \(.*{message}.*choose another --output_dir"):
        finetune(moved)
    assert contents(moved / "run", "*") == before


def test_checkpoints_of_other_images_are_not_gone_on_with(moved):
    other_bytes(moved / "animals/train/toad/train000.png")
    for argv in ({}, {"output": "new"}):
        with pytest.raises(UserError, match="the same names and labels, other content"):
            finetune(moved, resume_from_checkpoint=moved / "run/checkpoint-2", **argv)
    assert not list((moved / "new").glob("[!.]*"))


def test_a_run_goes_on_with_another_split_of_the_same_batch(movable, moved):
    for name in ("summary.json", "checkpoint-4"):
        (shutil.rmtree if name.startswith("c") else os.remove)(moved / "run" / name)
    split = {"train_batch_size": 1, "gradient_accumulation_steps": 4}
    with pytest.raises(UserError, match="effective_batch: 4 -> 8"):
        finetune(moved, resume_from_checkpoint="latest", **(split | {"train_batch_size": 2}))
    finetune(moved, resume_from_checkpoint="latest", **split)
    result, wanted = losses(moved / "run"), losses(movable / "run")
    assert result.keys() == wanted.keys() == {1, 2, 3, 4}
    assert all(result[step] == pytest.approx(wanted[step], abs=1e-5) for step in wanted)
    result, wanted = trained(moved / "run"), trained(movable / "run")
    assert all((result[k] - wanted[k]).abs().max() < TOLERANCE for k in wanted)


def test_images_that_change_while_a_run_goes_on(movable, moved, monkeypatch):
    picture, step = moved / "animals/train/toad/train000.png", trainer.Trainer.optimizer_step
    kept = picture.read_bytes()

    def disturbed(self):
        picture.write_bytes(picture.with_name("train001.png").read_bytes())
        return step(self)

    monkeypatch.setattr(trainer.Trainer, "optimizer_step", disturbed)
    with pytest.raises(UserError, match=r"1 images changed during the run \('train/toad/train000.png'.*"):
        finetune(moved, output="new", checkpointing_steps=3)
    names = sorted(path.name for path in (moved / "new").iterdir() if not path.name.startswith((".", "latents")))
    assert names == ["args.yaml", "checkpoint-3", "checkpoint-4", "metrics.csv"]
    monkeypatch.undo()
    picture.write_bytes(kept)
    finetune(moved, output="new", resume_from_checkpoint="latest")
    result, wanted = trained(moved / "new"), trained(movable / "run")
    assert result.keys() == wanted.keys() and all(torch.equal(result[k], wanted[k]) for k in wanted)


def test_tokens_say_which_images_they_were_trained_on(movable):
    record = yaml.safe_load((movable / "run/args.yaml").read_text())["made_from"]
    tokens = load_tokens(movable / "run/learned_embeds.safetensors")
    assert tokens.images == record["data"]["train"]["digest"] and record["data"]["classes"]["count"] == 3
    assert load_tokens(movable / "run/checkpoint-2/learned_embeds.safetensors").images == tokens.images


# ------------------------------------------------------------------------------------------- checkpoints, caches, speed


def test_a_checkpoint_deleted_by_half_is_not_taken_for_whole(tmp_path, monkeypatch):
    model = SimpleNamespace(lora_parameters=[], current_tokens=lambda: None)
    for step in (1, 2):
        checkpoints.save_checkpoint(tmp_path, step, model, {}, None)
    monkeypatch.setattr(shutil, "rmtree", lambda path, **options: None)  # a kill before any file is gone
    checkpoints.save_checkpoint(tmp_path, 3, model, {}, 2)
    assert [path.name for path in checkpoints.listed(tmp_path)] == ["checkpoint-2", "checkpoint-3"]
    checkpoints.save_checkpoint(tmp_path, 3, model, {}, 2)  # the same step again
    assert [path.name for path in checkpoints.listed(tmp_path)] == ["checkpoint-2", "checkpoint-3"]


def test_a_kill_while_a_checkpoint_is_replaced_loses_none(tmp_path, monkeypatch):
    model = SimpleNamespace(lora_parameters=[], current_tokens=lambda: None)
    checkpoints.save_checkpoint(tmp_path, 3, model, {}, 1)
    remove = shutil.rmtree

    def killed(path, ignore_errors=False):
        if not ignore_errors:  # the removal of what was there before
            raise KeyboardInterrupt
        remove(path, ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save_checkpoint(tmp_path, 3, model, {}, 1)
    assert [path.name for path in checkpoints.listed(tmp_path)] == ["checkpoint-3"]


def test_the_checkpoint_just_written_stays_where_later_ones_exist(tmp_path):
    model = SimpleNamespace(lora_parameters=[], current_tokens=lambda: None)
    for step in (100, 200, 300):
        checkpoints.save_checkpoint(tmp_path, step, model, {}, 3)
    checkpoints.save_checkpoint(tmp_path, 220, model, {}, 1)  # resumed from the second, under a lower limit
    assert [path.name for path in checkpoints.listed(tmp_path)] == ["checkpoint-220", "checkpoint-300"]
    checkpoints.save_checkpoint(tmp_path, 300, model, {}, 1)
    assert [path.name for path in checkpoints.listed(tmp_path)] == ["checkpoint-300"]


def test_a_result_of_more_steps_is_not_taken_for_one_of_fewer(tiny_base, image_folder, tmp_path, caplog):
    caplog.set_level("INFO")
    folder = tmp_path / "run"

    def take(**changes):  # the learning rate is constant, so that a run may be continued for more steps
        config, dataset = request(tiny_base, image_folder, folder, **changes)
        checkpoints.take_folder(config, checkpoints.origin_of(config, dataset), 1)

    take(max_train_steps=4)
    state = folder / "checkpoint-4" / checkpoints.STATE_FILE
    state.parent.mkdir()
    state.touch()
    with pytest.raises(
        UserError, match="checkpoint-4 has been trained for 4 steps, --max_train_steps 2 asks for fewer"
    ):
        take(max_train_steps=2, resume_from_checkpoint="latest")
    (folder / checkpoints.SUMMARY_FILE).write_text('{"steps": 4}')
    take(max_train_steps=4)
    assert "is finished already (4 steps)" in caplog.text
    with pytest.raises(UserError, match="run holds the result of 4 steps, --max_train_steps 2 asks for fewer"):
        take(max_train_steps=2)


def test_a_kill_right_after_the_summary_leaves_no_latents(tiny_base, image_folder, tmp_path, monkeypatch):
    write = files.write_json

    def killed(path, content):
        write(path, content)
        if path.name == checkpoints.SUMMARY_FILE:
            raise KeyboardInterrupt

    running = make_trainer(tiny_base, image_folder, tmp_path, max_train_steps=1)
    monkeypatch.setattr(files, "write_json", killed)
    assert list(tmp_path.glob("latents-*"))
    with pytest.raises(KeyboardInterrupt):
        running.train()
    assert checkpoints.finished(tmp_path)["steps"] == 1 and not list(tmp_path.glob("latents-*"))


@pytest.mark.parametrize(("kind", "changes"), [("latents", {}), ("pixels", {"random_crops": True})])
def test_encoded_images_of_an_earlier_state_take_no_room(kind, changes, tiny_base, image_folder, tmp_path):
    for name in (f"{kind}-0123456789abcdef.npy", f"{kind}-0123456789abcdef.part", f"{kind}-0123456789abcdef.sizes.npy"):
        (tmp_path / name).touch()  # the data set has been moved between two starts of the run
    running, names = make_trainer(tiny_base, image_folder, tmp_path, max_train_steps=1, **changes), f"{kind}-*"
    kept = {path.name for path in tmp_path.glob(names)}
    assert kept and not any("0123456789abcdef" in name for name in kept)
    again = make_trainer(tiny_base, image_folder, tmp_path, max_train_steps=1, **changes)
    assert {path.name for path in tmp_path.glob(names)} == kept
    draw = running.source.draw(0)
    moments = [each.latents.gather(draw.index, draw.view, draw.flip) for each in (running, again)]
    assert torch.equal(*moments)


def test_an_optimiser_of_other_parameters_is_not_taken(tiny_base, image_folder, tmp_path):
    make_trainer(tiny_base, image_folder, tmp_path / "run", max_train_steps=1, checkpointing_steps=1).train()
    path = tmp_path / "run" / "checkpoint-1" / checkpoints.STATE_FILE
    state = torch.load(path, weights_only=True)
    state["optimizer"]["param_groups"][0]["params"] += [7, 8]
    torch.save(state, path)
    again = make_trainer(tiny_base, image_folder, tmp_path / "run", max_train_steps=2, resume_from_checkpoint="latest")
    with pytest.raises(UserError, match="an optimiser of other parameters"):
        again.train()


def test_random_crops_are_cut_from_the_whole_image_and_encoded_as_a_batch(tiny_base, image_folder, tmp_path):
    vae, table = load_base(str(tiny_base)).vae, load_dataset(f"folder:{image_folder}").train
    alone = PixelCache(table, tmp_path / "one", vae, tiny.RESOLUTION, accelerator=Accelerator(cpu=True))
    barrier = threading.Barrier(2, timeout=60)

    def of_two(position: int) -> PixelCache:
        process = SimpleNamespace(
            process_index=position, num_processes=2, is_main_process=position == 0, wait_for_everyone=barrier.wait
        )
        return PixelCache(table, tmp_path / "two", vae, tiny.RESOLUTION, accelerator=process)

    with ThreadPoolExecutor(2) as pool:
        shared = list(pool.map(of_two, range(2)))
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == [
        shared[0].path.name,
        shared[0].sizes_path.name,
    ]
    index, flip = torch.tensor([3, 7, 12]), torch.tensor([True, False, False])
    position = torch.tensor([[0.0, 0.0], [0.999, 0.5], [0.5, 0.5]])
    wanted = []
    for row, (x, _), mirrored in zip(index.tolist(), position.tolist(), flip.tolist(), strict=True):
        image = table.image(row)  # 40 x 36 pixels: 36 x 32, five places from left to right
        assert scaled_size(image.size, tiny.RESOLUTION) == (36, 32)
        whole = image.resize((36, 32), Image.Resampling.LANCZOS)
        left = int(x * 5)
        pixels = to_pixels([whole.crop((left, 0, left + tiny.RESOLUTION, tiny.RESOLUTION))])
        wanted.append(pixels.flip(-1) if mirrored else pixels)
    wanted = encode_moments(vae, torch.cat(wanted))
    for cache in (alone, *shared):
        assert (cache.gather(index, position, flip) - wanted).abs().max() < 1e-5
    shared[0].remove()
    assert not list((tmp_path / "two").iterdir())


def test_crop_positions_are_drawn_afresh_for_every_step():
    options = dict(templates=5, num_train_timesteps=100, noise_offset=0.0, class_balanced=False, seed=3)
    source = BatchSource(np.arange(20) % 3, 6, (4, 2, 2), views=0, flip=True, **options)
    first, second = source.draw(0).view, source.draw(1).view
    assert first.shape == (6, 2) and first.min() >= 0 and first.max() < 1 and not torch.equal(first, second)
    assert torch.equal(first, source.draw(0).view)


def test_class_names_are_encoded_once(tiny_base, image_folder, tmp_path):
    running = make_trainer(tiny_base, image_folder, tmp_path, finetune_strategy="db")
    labels, templates = torch.tensor([0, 1, 1]), torch.tensor([3, 3, 4])
    first = running.model.conditions(labels, templates)["hidden"]
    calls = []
    running.base.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    again = running.model.conditions(labels.flip(0), templates.flip(0))["hidden"]
    assert torch.equal(again, first.flip(0)) and not calls
    running.model.conditions(labels, templates + 1)
    assert calls == [1, 1] and not first.requires_grad  # the third prompt is new with another template


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_prompt_is_encoded_alike_whatever_is_held(bases, image_folder, tmp_path, family):
    """A resumed run holds none of them, and pictures add theirs."""
    labels, templates = torch.arange(8) % 3, torch.arange(8)
    sizes = torch.full((8, 6), 32.0)
    results = []
    for held in (8, 3):
        running = make_trainer(bases[family], image_folder, tmp_path / str(held), finetune_strategy="db")
        for rows in (slice(held), slice(8)):
            conditions = running.model.conditions(labels[rows], templates[rows], time_ids=sizes[rows])
        results.append(conditions)
    assert all(torch.equal(results[0][name], value) for name, value in results[1].items())


@pytest.fixture
def graphs(monkeypatch) -> list:
    """What is traced for compiling, which is then not compiled: that would be minutes of C++."""
    compiler, traced = torch.compile, []

    def backend(graph, _, options):
        traced.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda call, **arguments: compiler(call, backend=backend, **arguments))
    return traced


@pytest.mark.slow
def test_compiled_runs_in_one_process_are_not_taken_for_each_other(tiny_base, image_folder, tmp_path, graphs):
    """What was compiled is soon taken unchecked."""
    losses = {}
    for mode in ("off", "on"):
        folders = {alpha: tmp_path / f"{mode}-{alpha}" for alpha in (2, 64)}
        runs = [
            make_trainer(tiny_base, image_folder, folder, compile=mode, lora_alpha=alpha)
            for alpha, folder in folders.items()
        ]
        losses[mode] = [float(running.optimizer_step()[0]) for _ in range(5) for running in runs]
    assert len(graphs) >= 3  # two U-Nets; the text encoders are alike
    assert losses["on"] == pytest.approx(losses["off"], abs=1e-4)
    assert abs(losses["on"][-1] - losses["on"][-2]) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_compiled_networks_train_alike(tiny_base, image_folder, tmp_path, graphs, precision):
    plain, compiled = (
        make_trainer(
            tiny_base,
            image_folder,
            tmp_path / mode,
            compile=mode,
            num_validation_images=1,
            mixed_precision=precision,
        )
        for mode in ("off", "on")
    )
    losses = [[float(running.optimizer_step()[0]) for _ in range(3)] for running in (plain, compiled)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    traced = len(graphs)
    assert traced >= 2  # the U-Net and the text encoder
    compiled._validate()
    compiled.optimizer_step()
    assert len(graphs) == traced  # pictures, in other sizes, are made without tracing anew, and change nothing
    assert (tmp_path / "on" / "validation" / "step-000003.png").is_file()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_gradient_checkpointing_changes_no_step(tiny_base, image_folder, tmp_path, precision):
    losses = []
    for name, changes in (("kept", {}), ("again", {"gradient_checkpointing": True})):
        changes |= {"mixed_precision": precision, "gradient_accumulation_steps": 2}
        running = make_trainer(tiny_base, image_folder, tmp_path / name, **changes)
        losses.append([float(running.optimizer_step()[0]) for _ in range(3)])
    assert running.model.unet.is_gradient_checkpointing
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


@pytest.mark.parametrize("targets", [("proj_in",), ("proj_in", "to_v")])
def test_convolutions_may_have_a_lora(tiny_base, image_folder, tmp_path, targets):
    """Which peft computes itself."""
    running = make_trainer(tiny_base, image_folder, tmp_path / "run", lora_targets=targets)
    weights = [p for n, p in running.model.named_parameters() if "lora_A" in n or "lora_B" in n]
    before = [p.detach().clone() for p in weights]
    for _ in range(2):
        running.optimizer_step()
    assert not any(torch.equal(p, q) for p, q in zip(weights, before, strict=True))
    trained = running.model.lora_parameters
    assert sum(p.numel() for p in trained) == sum(p.numel() for p in weights) > 0


def test_half_precision_keeps_its_small_updates(tiny_base, image_folder, tmp_path):
    changes = {"mixed_precision": "bf16", "learning_rate": 1e-4, "num_validation_images": 1}
    running = make_trainer(tiny_base, image_folder, tmp_path / "run", **changes)
    before = [p.detach().clone() for p in running.model.lora_parameters]
    running._validate()
    running.optimizer_step()
    after = running.model.lora_parameters
    assert all(p.dtype == torch.float32 for p in after)
    moved = [float((p.detach() - q).abs().max()) for p, q in zip(after, before, strict=True)]
    assert max(moved) == pytest.approx(1e-4, rel=0.01)  # finer than bfloat16 beside values of 0.1 and more
    drawn = tmp_path / "run" / "validation" / "step-000001.png"
    running._validate()
    first = drawn.read_bytes()
    with torch.no_grad():
        for parameter in after:
            parameter += 0.5
    running._validate()
    assert drawn.read_bytes() != first  # pictures are of the weights as they are now


def test_pictures_are_decoded_in_the_autoencoders_own_precision(tiny_base, image_folder, tmp_path):
    """Beside networks in fp16 it stays in float32, where it does not overflow."""
    running = make_trainer(tiny_base, image_folder, tmp_path, mixed_precision="bf16", num_validation_images=1)
    running.base.vae.float()
    seen = []
    running.base.vae.decoder.conv_out.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    running._validate()
    assert set(seen) == {torch.float32}


def test_compiling_is_for_long_runs_on_a_gpu(tiny_base, image_folder, tmp_path):
    long, _ = request(tiny_base, image_folder, tmp_path, max_train_steps=35000)
    short, _ = request(tiny_base, image_folder, tmp_path)
    on, _ = request(tiny_base, image_folder, tmp_path, compile="on")
    assert long.compiled("cuda") and not long.compiled("cpu") and not short.compiled("cuda") and on.compiled("cpu")


@pytest.mark.slow
def test_picture_grids_reach_tensorboard(tiny_base, image_folder, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    changes = {"max_train_steps": 2, "logging_steps": 1, "validation_steps": 2, "num_validation_images": 1}
    config, dataset = request(tiny_base, image_folder, tmp_path / "run", report_to="tensorboard", **changes)
    train(config, dataset, Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path / "logs"))
    events = EventAccumulator(str(next((tmp_path / "logs").rglob("events.*")).parent)).Reload()
    assert events.Tags()["images"] == ["validation/image/0"] or events.Tags()["images"] == ["validation"]
    assert [event.step for event in events.Scalars("loss")] == [1, 2]


# ------------------------------------------------------------------------------------------------------ schedules


def rates(name, steps=12, **changes):
    options = {
        "lr_warmup_steps": 2,
        "max_train_steps": steps,
        "lr_num_cycles": 2,
        "lr_power": 0.5,
        "lr_step_rules": None,
    }
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = make_schedule(optimizer, SimpleNamespace(lr_scheduler=name, **{**options, **changes}))
    out = []
    for _ in range(steps):
        out.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return out


@pytest.mark.parametrize("name", [n for n in LR_SCHEDULERS if n != "piecewise_constant"])
def test_every_schedule_of_diffusers_is_to_be_had(name):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=2, num_training_steps=12, num_cycles=2, power=0.5)
    wanted = []
    for _ in range(12):
        wanted.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    assert rates(name) == wanted


def test_piecewise_constant_rates():
    result = rates("piecewise_constant", lr_step_rules="1:3,0.5:6,0.1")
    assert result == [1] * 3 + [0.5] * 3 + [0.1] * 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr_scheduler": "piecewise_constant"}, "piecewise_constant with --lr_step_rules .not given.*1:1000,0.1:2000"),
        ({"lr_step_rules": "1:3,0.1"}, "constant with --lr_step_rules 1:3,0.1.*only it, takes rules"),
        (
            {"lr_scheduler": "piecewise_constant", "lr_step_rules": "half:3,0.1"},
            "--lr_step_rules half:3,0.1: could not",
        ),
        ({"random_crops": True, "crops": 3}, "--random_crops with --crops 3"),
        ({"report_to": "wandb"}, "--report_to wandb needs the package wandb"),
        ({"prediction_type": "v_prediction"}, "scheduler_config.json of the base model says epsilon, by which stage 2"),
        ({"use_8bit_adam": True}, "--use_8bit_adam needs the package bitsandbytes"),
    ],
)
def test_bad_requests_name_the_flag(tiny_base, image_folder, tmp_path, monkeypatch, changes, message):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=message):
        make_trainer(tiny_base, image_folder, tmp_path / "run", **changes)


# ------------------------------------------------------------------------------------------------------ benchmark


@pytest.mark.slow
def test_the_benchmark_trains_both_ways_on_the_same(tiny_base, image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'scripts'}:{ROOT}")
    from benchmarks import common, finetune

    monkeypatch.setattr(common, "OUTPUT", tmp_path / "bench")
    argv = ["--base", tiny_base, "--dataset", f"folder:{image_folder}", "--steps", 2, "--batch_size", 4]
    argv += ["--pairs", 1, "--rounds", 2]
    assert finetune.main([str(word) for word in [*argv, "--device", "cpu"]]) == 0
    result = tiny.read_json(tmp_path / "bench" / "finetune.json")
    assert result["largest_difference_of_losses"] < TOLERANCE and result["ratio"] > 0
    for side in result["sides"].values():
        assert len(side["losses"]) == 3 + 2 * 2 and len(side["rates"]) == 2 and side["peak_memory_mb"] > 0
    port, ours = (result["sides"][side]["calls_per_step"] for side in ("the original's way", "ours"))
    assert 0 < ours < 0.7 * port
    assert "| the original's way | " in capsys.readouterr().out
