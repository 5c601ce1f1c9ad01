"""scripts/build_base.py: a base model from unlabelled images, its resumption, its captions and what it refuses."""

from __future__ import annotations

import csv
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

import tiny
from semantic_aug.diffusion.base import load_base
from semantic_aug.diffusion.license import license_of
from semantic_aug.errors import UserError
from semantic_aug.seeding import numpy_rng, torch_rng

ROOT = Path(__file__).resolve().parents[1]
SMALL = (
    "--size 16 --autoencoder_channels 8 8 --latent_channels 2 --unet_channels 16 16 --unet_attention 0 1 --crops 1 "
    "--autoencoder_batch 4 --denoiser_batch 4 --device cpu --subject shape"
).split()
LENGTHS = ["--autoencoder_images", "16", "--denoiser_images", "16"]


@pytest.fixture(scope="module", autouse=True)
def scripts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        patch.setattr("base_model.training.LOG_EVERY", 1)
        patch.setattr("base_model.card.COMPARED", 4)
        patch.setattr("base_model.card.SHOWN", 2)
        yield


def write_pool(folder: Path, count: int = 30, colour: bool = True) -> Path:
    for i in range(count):
        file = folder / f"part {i % 3}" / f"{i:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        tiny.picture(i % 3, i, (20, 18)).convert("RGB" if colour else "L").save(file)
    return folder


def build(images, output: Path, *flags: str) -> None:
    import build_base

    assert build_base.main(["--images", str(images), "--output_dir", str(output), *SMALL, *LENGTHS, *flags]) == 0


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Path:
    return write_pool(tmp_path_factory.mktemp("unlabelled"))


@pytest.fixture(scope="module")
def built(pool, tmp_path_factory, scripts) -> Path:
    """A finished model; its training lies beside it."""
    output = tmp_path_factory.mktemp("built") / "model"
    build(pool, output, "--data_license", "Apache-2.0")
    return output


def test_finished_model_loads_and_states_what_was_measured(built):
    model = load_base(str(built))
    assert model.geometry.native_resolution == 16 and model.geometry.downsampling == 2
    assert model.scheduler_config["prediction_type"] == "v_prediction"
    record = tiny.read_json(built / "recipe.json")
    assert (record["training_images"], record["kept_out_images"]) == (26, 4)
    assert (record["autoencoder_images"], record["denoiser_images"]) == (16, 16)
    assert 0 < record["reconstruction_psnr_db"] < 40 and 0 <= record["near_copies"] <= 1
    encoder = tiny.read_json(built / "text_encoder" / "config.json")
    keys = load_file(built / "text_encoder" / "model.safetensors")
    assert encoder["dtype"] == "float32" and all(key.startswith("text_model.") for key in keys)
    card = (built / "README.md").read_text()
    assert "`StableDiffusionPipeline.from_pretrained` loads it" in card
    pipeline = StableDiffusionPipeline.from_pretrained(built)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.text_encoder.dtype == pipeline.unet.dtype == pipeline.vae.dtype
    assert pipeline("cell", num_inference_steps=1, guidance_scale=1.0).images[0].size == (16, 16)
    assert f"PSNR {record['reconstruction_psnr_db']} dB" in card and "Licence of the images: Apache-2.0" in card
    assert license_of(str(built), built) == "apache-2.0"  # read from the card by stages 1 and 2
    assert f"{record['lowest_kept_out_loss']:.4f}, after {record['lowest_kept_out_loss_at']:,} images" in card
    assert {"samples.png", "nearest.png"} <= {path.name for path in built.iterdir()}
    with open(built.with_name("model-training") / "denoiser.csv", newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["images"] for row in rows] == ["4", "8", "12", "16"]
    assert float(rows[-1]["kept_out_loss"]) == pytest.approx(record["kept_out_loss"])


DIES = """
import os, signal, sys
import torch
import base_model.training as training
training.SAVE_SECONDS, torch_save, saves = 0, torch.save, 0
torch.set_num_threads(1)

def save(content, file):
    global saves
    saves += 1
    if saves == int(sys.argv[1]):  # half of the file is on the disk
        file.write(b"PK" * 1000)
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    torch_save(content, file)

torch.save = save
import build_base
build_base.main(sys.argv[2:])
"""


@pytest.mark.slow
def test_killed_while_saving_and_resumed_gives_the_same_weights(built, pool, tmp_path):
    words = ["--images", str(pool), "--output_dir", str(tmp_path / "model"), *SMALL, *LENGTHS]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'scripts'}:{ROOT}"}
    # the first process dies in its third save; the second one in its fifth, after three saves of the autoencoder
    for nth, stage, step in ((3, "autoencoder", 2), (5, "denoiser", 1)):
        killed = subprocess.run([sys.executable, "-c", DIES, str(nth), *words], cwd=tmp_path, env=environment)
        assert killed.returncode == -signal.SIGKILL and not (tmp_path / "model").exists()
        assert torch.load(tmp_path / "model-training" / f"{stage}.pt", weights_only=True)["step"] == step
    build(pool, tmp_path / "model")
    for stage in ("autoencoder", "denoiser"):
        resumed, whole = (
            torch.load(model.with_name("model-training") / f"{stage}.pt", weights_only=True)["model"]
            for model in (tmp_path / "model", built)
        )
        assert resumed.keys() == whole.keys()
        assert not [name for name in whole if not torch.equal(resumed[name], whole[name])]


def test_more_images_continue_and_finished_stages_are_not_repeated(built, pool, tmp_path):
    shutil.copytree(built.with_name("model-training"), tmp_path / "model-training")
    state = tmp_path / "model-training" / "autoencoder.pt"
    before = state.stat().st_mtime_ns
    build(pool, tmp_path / "model", "--denoiser_images", "24")
    assert state.stat().st_mtime_ns == before
    assert tiny.read_json(tmp_path / "model" / "recipe.json")["denoiser_images"] == 24
    shutil.rmtree(tmp_path / "model")
    build(pool, tmp_path / "model", "--denoiser_images", "32", "--export_only")
    assert tiny.read_json(tmp_path / "model" / "recipe.json")["denoiser_images"] == 24  # exported as it was
    for larger in (["--autoencoder_images", "20"], ["--budget", "9"]):  # the denoiser's autoencoder is kept
        build(pool, tmp_path / "model", "--denoiser_images", "24", *larger)
        assert state.stat().st_mtime_ns == before
    other = torch.load(state, weights_only=True)
    torch.save({**other, "ema": {name: value + 1 for name, value in other["ema"].items()}}, state)
    with pytest.raises(UserError, match="denoiser.pt was trained on another autoencoder"):
        build(pool, tmp_path / "model")
    with pytest.raises(UserError, match=r"holds a run with other arguments \(latent_channels: 2 -> 4"):
        build(pool, tmp_path / "other", "--work_dir", str(tmp_path / "model-training"), "--latent_channels", "4")


def test_budget_of_time_ends_both_stages_and_the_card_has_the_steps_that_were_done(pool, tmp_path, monkeypatch):
    monkeypatch.setattr("base_model.training.LOG_EVERY", 50)  # no row is due
    build(pool, tmp_path / "model", "--budget", "0.0001")
    record = tiny.read_json(tmp_path / "model" / "recipe.json")
    for stage in ("autoencoder", "denoiser"):
        assert torch.load(tmp_path / "model-training" / f"{stage}.pt", weights_only=True)["step"] == 1
        assert (record[f"{stage}_steps"], record[f"{stage}_images"]) == (1, 4)


def test_greyscale_is_detected_and_captions_have_no_colour(pool, tmp_path):
    from base_model.captions import WORDS

    build(write_pool(tmp_path / "grey", colour=False), tmp_path / "grey-model", "--until", "denoiser")
    build(pool, tmp_path / "model", "--until", "denoiser", "--autoencoder_images", "4", "--denoiser_images", "4")
    colour_words = {*WORDS["saturation"], *WORDS["warmth"]}
    for name, channels in (("grey-model", 1), ("model", 3)):
        folder = tmp_path / f"{name}-training"
        assert np.load(folder / "train.npy").shape == (26, 16, 16, channels)
        used = {word for words in json.loads((folder / "words.json").read_text()) for word in words}
        assert bool(used & colour_words) == (channels == 3)


# ------------------------------------------------------------------------------------------------------------ refusals


def refused(tmp_path: Path, images, *flags: str) -> str:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as error:
        build(images, tmp_path / "refused", *flags)
    assert sorted(tmp_path.rglob("*")) == before  # nothing was written
    return str(error.value)


def test_images_that_cannot_be_used_are_refused(pool, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no image" in refused(tmp_path, tmp_path / "empty")
    assert "does not exist" in refused(tmp_path, tmp_path / "absent")
    few = write_pool(tmp_path / "few", 20)
    for i in range(10):  # copies do not count
        shutil.copy(few / "part 0" / "000.png", few / f"copy{i}.png")
    assert "holds 20 different images: expected at least 24" in refused(tmp_path, few)
    (tmp_path / "list.txt").write_text("few/part 0/000.png\nfew/absent.png\n")
    assert f"{tmp_path / 'few/absent.png'} does not exist" in refused(tmp_path, tmp_path / "list.txt")
    (tmp_path / "test split").mkdir()
    shutil.copy(pool / "part 1" / "004.png", tmp_path / "test split" / "renamed.png")
    assert "holds 1 of the images" in (line := refused(tmp_path, pool, "--exclude", str(tmp_path / "test split")))
    assert "part 1/004.png is its renamed.png" in line


def test_folders_are_read_as_data_sets_are(tmp_path):
    """Litter of systems and editors is no image of the pool, and a test split of links is found in it."""
    from base_model import images

    folder = write_pool(tmp_path / "pool", 24)
    elsewhere = write_pool(tmp_path / "elsewhere", 3)
    for name in ("@eaDir/SYNOPHOTO_THUMB_M.png", ".ipynb_checkpoints/copy.png", "._000.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        tiny.picture(1, 99).save(folder / name)
    assert len(images.open_table(str(folder), "--images")) == 24
    (folder / "linked").symlink_to(elsewhere)
    keys = images.open_table(str(folder), "--images").keys
    assert len(keys) == 27 and "linked/part 0/000.png" in keys
    (folder / "linked").unlink()
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "linked").symlink_to(folder / "part 1")
    tiny.picture(0, 98).save(tmp_path / "test" / "another.png")
    with pytest.raises(UserError, match="--images holds 8 of the images of --exclude"):
        images.open_pool(str(folder), [str(tmp_path / "test")], 0.1)


def test_a_list_may_be_saved_by_an_editor_of_windows(pool, tmp_path):
    from base_model import images

    (tmp_path / "list.txt").write_bytes("\ufeff# ours\r\npart 0/000.png\r\npart 1/001.png\r\n".encode())
    (tmp_path / "part 0").symlink_to(pool / "part 0")
    (tmp_path / "part 1").symlink_to(pool / "part 1")
    assert images.open_table(str(tmp_path / "list.txt"), "--images").keys == ["part 0/000.png", "part 1/001.png"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--size 18", "--size 18: expected a multiple of 4 px"),
        ("--unet_channels 16 24", "--unet_channels 16 24: expected multiples of 16"),
        ("--unet_attention 0 0", "--unet_attention 0 0: expected 0 or 1 for each of --unet_channels"),
        ("--kept_out 0.7", "--kept_out 0.7"),
        ("--denoiser_batch 0", "--denoiser_batch 0: expected a number above 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(pool, tmp_path, flags, expected):
    assert expected in refused(tmp_path, pool, *flags.split())


def test_the_cards_command_is_read_as_it_was_typed_and_folders_may_begin_at_home():
    import build_base
    from base_model.card import command

    typed = ["--subject", "solar cell", "--vocabulary", "mono functional", "it's", "--crops", "0"]
    config = build_base.parse(["--images", "x", "--output_dir=~/base", "--work_dir=~/states", *typed])
    assert (config.output_dir, config.work_dir) == (Path.home() / "base", Path.home() / "states")
    counts = {"autoencoder_images": 5, "denoiser_images": 6}
    again = build_base.parse(shlex.split(command(config, counts))[2:]).recipe
    assert again == replace(config.recipe, **counts)


def test_output_folder_of_something_else_is_left_alone(pool, tmp_path):
    (tmp_path / "refused").mkdir()
    (tmp_path / "refused" / "notes.txt").write_text("mine")
    assert "holds something else than a model of this training" in refused(tmp_path, pool)


def test_smaller_images_are_reported(tmp_path, caplog):
    from base_model import images

    table = images.open_table(str(write_pool(tmp_path, 24)), "--images")
    assert images.pixel_file(table, 40, 3, tmp_path / "train.npy").shape == (24, 40, 40, 3)
    assert "24 of the 24 train images are smaller, the smallest 18 px" in caplog.text


# ---------------------------------------------------------------------------------------------------------- algorithms


def test_images_kept_out_follow_from_content_not_names(pool, tmp_path):
    from base_model import images

    for i, file in enumerate(sorted(pool.rglob("*.png"))):
        shutil.copy(file, tmp_path / f"{(7 * i) % 30}.png")
    pools = [images.open_pool(str(folder), [], 0.2) for folder in (pool, tmp_path)]
    first, second = ({np.asarray(p.kept_out.image(i)).tobytes() for i in range(6)} for p in pools)
    assert len(first) == 6 and first == second


def test_mirrored_view_gets_mirrored_words():
    from base_model.captions import Describer, described_views
    from base_model.recipe import Recipe

    images = np.full((24, 32, 32, 3), 200, np.uint8)
    for i in range(24):  # a textured square at the left, lower from image to image
        images[i, i : i + 8, 2:10] = np.random.default_rng(i).integers(0, 255, (8, 8, 3))
    recipe = Recipe(subject="shape")
    words = Describer.of(images, recipe, None).words
    assert described_views(recipe) == 2 and len(words) == 48
    left, right = ([i for i, some in enumerate(words) if side in some] for side in ("left", "right"))
    assert len(left) == len(right) == 16 and not any(i % 2 for i in left) and all(i % 2 for i in right)
    assert {"high"} <= set(words[0]) and {"low"} <= set(words[-1])


def test_captions_are_drawn_from_the_words_and_a_tenth_is_empty():
    from base_model.captions import Describer

    describer, rng = Describer([("dim", "cedar")], "leaf"), np.random.default_rng(0)
    captions = [describer.caption(0, rng) for _ in range(2000)]
    assert 0.08 < np.mean([caption == "" for caption in captions]) < 0.12
    assert all("leaf" in caption for caption in captions if caption)
    assert 0.4 < np.mean(["cedar" in caption for caption in captions if caption]) < 0.6


def test_nearest_finds_a_mirrored_copy():
    from base_model.card import nearest

    images = np.random.default_rng(0).integers(0, 255, (20, 40, 40, 3)).astype(np.uint8)
    distance, which = nearest(images[[7, 3], :, ::-1], images, block=8)
    assert which.tolist() == [7, 3] and distance.max() < 1e-3
    assert nearest(255 - images[:1], images)[0][0] > 10


def test_crops_stay_inside_and_are_at_most_15_percent_closer():
    from base_model.denoiser import crop

    ramp = np.broadcast_to(np.arange(80, dtype=np.uint8)[None, None, :, None], (6, 80, 80, 1))
    rows = crop(ramp, 64, numpy_rng("crop"))[:, 10, :, 0].astype(float)
    spans = rows[:, -1] - rows[:, 0]
    assert rows.shape == (6, 64) and (spans <= 79).all() and (spans >= 79 / 1.15 - 3).all() and np.ptp(spans) > 1


def test_batches_have_crops_of_enlarged_images_for_the_lower_half_of_the_draws():
    from base_model.autoencoder import draw_batch

    images, enlarged = np.zeros((4, 8, 8, 1), np.uint8), np.ones((4, 10, 10, 1), np.uint8)
    rng = torch_rng("base", "autoencoder", 3)
    torch.randint(4, (16,), generator=rng)
    closer = torch.rand(5, 16, generator=rng)[0] < 0.5
    batch = draw_batch(images, enlarged, 16, "both", torch_rng("base", "autoencoder", 3))
    assert batch.any(axis=(1, 2, 3)).tolist() == closer.tolist()


def test_training_state_of_another_recipe_cannot_be_taken_for_ones_own():
    from base_model.recipe import PRESETS

    recipe = PRESETS["general"]
    assert replace(recipe, denoiser_images=1).identity() == recipe.identity()
    assert replace(recipe, subject="leaf").identity() != recipe.identity()


def test_colour_loss_sees_hue_and_not_brightness():
    from base_model.autoencoder import colour_loss

    images = torch.rand(2, 3, 16, 16) * 0.5
    assert float(colour_loss(images + 0.3, images, 8)) < 1e-6
    redder = images + torch.tensor([0.1, 0, 0]).view(1, 3, 1, 1)
    assert float(colour_loss(redder, images, 8)) == pytest.approx(0.05)  # of red - green and blue - green, one by 0.1


def test_grey_pixels_are_the_mean_of_the_three_channels():
    from base_model.autoencoder import to_tensor, to_uint8

    pixels = np.asarray(Image.linear_gradient("L").resize((8, 8)))[None, :, :, None]
    x = to_tensor(pixels)
    assert x.shape == (1, 3, 8, 8) and float(x.max()) <= 1 and (to_uint8(x, 1) == pixels).all()
