"""Stage 2 as a whole: real processes, real kills, real folders."""

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import CLASSES, SUBSET, refused, run_here, same, sampling_arguments, start, wait_for_images, workers_of
from PIL import Image

import tiny
from semantic_aug import meta_csv
from semantic_aug.run_lock import lock_folder
from semantic_aug.sampling import files
from semantic_aug.sampling.folder import Records


@pytest.mark.slow
def test_one_run_has_everything_the_contract_names(undisturbed, image_folder):
    folder = Path(undisturbed[""])
    table = meta_csv.read(folder / "meta.csv")
    assert table.number.tolist() == list(range(54)) and set(table.class_names) == set(CLASSES)
    assert (table.source != table.target).all() and (table.strength == 0.7).all()
    row = 5
    with Image.open(folder / "data" / table.path[row]) as image:
        assert image.size == (32, 32) and image.text["number"] == "5" and image.text["strength"] == "0.7"
        assert image.text["target"] == table.class_names[table.target[row]]
    slug = table.class_names[table.source[row]].replace(" ", "-")
    assert table.path[row].startswith(f"{slug}/") and table.path[row].endswith("-000005-0.7.png")
    assert (image_folder / table.further["Source Image"][row]).is_file()
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["strategy"] == "diff-mix" and len(config["lora_sha256"]) == len(config["plan_sha256"]) == 64
    assert {"versions", "git_revision"} <= set(config["made_with"]) and not list(folder.rglob(".*.tmp"))


@pytest.mark.slow
def test_three_processes_make_the_same_files(workshop, image_folder, tmp_path, undisturbed):
    run_here("sample_mp.py", *sampling_arguments(workshop, image_folder, tmp_path, gpu_ids=["cpu"] * 3))
    assert same(tmp_path / SUBSET, undisturbed)


@pytest.mark.slow
@pytest.mark.usefixtures("slow_images")
def test_killed_in_the_middle_and_started_again_makes_the_same_files(workshop, image_folder, tmp_path, undisturbed):
    argv = sampling_arguments(workshop, image_folder, tmp_path, gpu_ids=["cpu", "cpu"], num_inference_steps=6)
    process = start("sample_mp.py", *argv)
    wait_for_images(tmp_path, 6, process)
    os.kill(process.pid, signal.SIGKILL)  # the parent alone: its workers must notice by themselves
    process.communicate()
    assert 6 <= len(list(tmp_path.rglob("*.png"))) < 54
    victims = sorted((tmp_path / SUBSET).rglob("*.png"))
    victims[0].unlink()
    victims[1].write_bytes(victims[1].read_bytes()[:100])
    moved = shutil.copytree(image_folder, tmp_path / "another disk" / "animals")
    argv = sampling_arguments(workshop, moved, tmp_path)
    run_here("sample_mp.py", *argv, "--num_shards", "2", "--shard_index", "1")
    argv = sampling_arguments(workshop, moved, tmp_path, gpu_ids=["cpu"] * 3)
    run_here("sample_mp.py", *argv)
    assert same(tmp_path / SUBSET, undisturbed)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / SUBSET).rglob("*.png")}
    assert "54 of 54 images (0 made now" in run_here("sample_mp.py", *argv)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / SUBSET).rglob("*.png")}


@pytest.mark.slow
@pytest.mark.usefixtures("slow_images")
def test_an_interruption_says_how_to_go_on_and_keeps_a_consistent_table(workshop, image_folder, tmp_path, undisturbed):
    argv = sampling_arguments(workshop, image_folder, tmp_path)
    process = start("sample_mp.py", *argv)
    wait_for_images(tmp_path, 4, process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal's Ctrl-C does, to parent and workers alike
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130 and "the same command makes the rest" in err
    table = meta_csv.read(tmp_path / SUBSET / "meta.csv")
    assert 4 <= len(table) < 54 and len(table) == len(list((tmp_path / SUBSET).rglob("*.png")))
    run_here("sample_mp.py", *argv)
    assert same(tmp_path / SUBSET, undisturbed)


@pytest.mark.slow
@pytest.mark.usefixtures("slow_images")
def test_a_killed_worker_is_replaced(workshop, image_folder, tmp_path, undisturbed):
    def kill():
        wait_for_images(tmp_path, 3)
        os.kill(workers_of()[0], signal.SIGKILL)

    argv = sampling_arguments(workshop, image_folder, tmp_path)
    assert "is replaced" in run_here("sample_mp.py", *argv, meanwhile=kill)
    assert same(tmp_path / SUBSET, undisturbed)


@pytest.mark.slow
def test_shards_make_the_same_files(workshop, image_folder, tmp_path, undisturbed):
    for index in (1, 0):
        run_here("sample_mp.py", *sampling_arguments(workshop, image_folder, tmp_path, num_shards=2, shard_index=index))
    assert same(tmp_path / SUBSET, undisturbed)


@pytest.mark.slow
def test_a_folder_made_otherwise_or_in_use_is_not_touched(workshop, image_folder, undisturbed):
    folder = Path(undisturbed[""])
    argv = sampling_arguments(workshop, image_folder, folder.parents[1])
    line = refused("sample_mp.py", *argv, "--guidance_scale", "3", "--seed", "5")
    assert "guidance_scale: 7.5 -> 3.0" in line and "seed: 0 -> 5" in line and "--output_root" in line
    with lock_folder(folder, "--output_root"):
        assert f"is being written by another run (process {os.getpid()} on" in refused(
            "sample_mp.py", *argv, alone=True
        )
    assert same(folder, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "key", "changes", "name"),
    [
        ("diff-gen", "ck", {}, "diff-gen-Multi1-ck-Strength1.0"),
        ("real-mix", None, {"model_path": "TINY"}, "real-mix-Multi1-base-Strength0.7"),
        ("diff-aug", "db", {"strength_strategy": "uniform"}, "diff-aug-Multi1-db-StrengthUniform"),
    ],
)
def test_other_strategies(workshop, image_folder, tiny_base, tmp_path, strategy, key, changes, name):
    changes = {k: str(tiny_base) if v == "TINY" else v for k, v in changes.items()}
    run_here(
        "sample_mp.py",
        *sampling_arguments(
            workshop,
            image_folder,
            tmp_path,
            sample_strategy=strategy,
            finetune_model_key=key,
            syn_dataset_multiplier=1,
            **changes,
        ),
    )
    table = meta_csv.read(tmp_path / "animals" / name / "meta.csv")
    assert len(table) == 18
    if strategy == "real-mix":
        assert (table.source != table.target).all()
    else:
        assert (table.source == table.target).all()
    if "strength_strategy" in changes:
        assert set(table.strength) == {0.3, 0.5, 0.7, 0.9}


@pytest.mark.slow
def test_an_unreadable_source_costs_only_its_own_images(workshop, tmp_path):
    folder = tiny.write_image_folder(tmp_path / "animals")
    (folder / "train" / "toad" / "train002.png").write_bytes(b"broken")
    err = run_here("sample_mp.py", *sampling_arguments(workshop, folder, tmp_path / "out"), status=2)
    assert "3 images could not be made" in err and "toad/train002.png cannot be decoded" in err
    table = meta_csv.read(tmp_path / "out" / SUBSET / "meta.csv")
    assert len(table) == 51 and not any("toad/train002" in key for key in table.further["Source Image"])


@pytest.mark.slow
def test_a_dry_run_prints_the_plan_and_writes_nothing(workshop, image_folder, tmp_path):
    out = run_here("sample_mp.py", *sampling_arguments(workshop, image_folder, tmp_path / "out"), "--dry_run")
    assert "54 images (3 x 18 training images) in 14 batches of 4" in out and "as target" in out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"finetune_model_key": "ckk"}, "unknown checkpoint key of data set 'animals' 'ckk': did you mean 'ck'"),
        ({"finetune_model_key": None}, "strategy diff-mix needs a fine-tuned checkpoint: give --finetune_model_key"),
        ({"finetune_model_key": "bare"}, "checkpoint animals/bare has neither a LoRA"),
        ({"aug_strength": 1.5}, "--aug_strength: 1.5: expected a number in (0, 1]"),
        ({"aug_strength": 0.05}, "--aug_strength 0.05 of --num_inference_steps 6 leaves no step"),
        ({"gpu_ids": ["7"]}, "--gpu_ids 7: this machine has"),
        ({"gpu_ids": ["gpu0"]}, "--gpu_ids gpu0: expected GPU numbers or the word cpu"),
        ({"sample_strategy": "diffmix"}, "invalid choice: 'diffmix'"),
        ({"resolution": 44}, "--resolution 44: expected a multiple of 8 pixels"),
        ({"model_path": "/no/such/model"}, "base model folder '/no/such/model' is not there"),
        ({"shard_index": 3}, "--shard_index 3: expected a number below --num_shards 1"),
        ({"guidance": 3}, "unknown argument --guidance: did you mean --guidance_scale?"),
        ({"scheduler": "dpm"}, "unknown --scheduler 'dpm'"),
    ],
)
def test_bad_requests_are_one_line(workshop, image_folder, tmp_path, changes, message):
    assert message in refused("sample_mp.py", *sampling_arguments(workshop, image_folder, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_weights_that_do_not_fit_are_one_line_and_leave_no_image(workshop, image_folder, tmp_path):
    line = refused(
        "sample_mp.py", *sampling_arguments(workshop, image_folder, tmp_path / "out", finetune_model_key="foreign")
    )
    assert "others.safetensors has no token for 3 of 3 classes ('blue jay' the first)" in line
    assert not list((tmp_path / "out").rglob("*.png"))


def test_a_full_disk_is_one_line_and_loses_nothing(monkeypatch, tmp_path):
    written = files.write_image(tmp_path / "a.png", b"x" * 10)
    assert written[0] == 10

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_image(tmp_path / "a.png", b"y" * 20)
    assert (tmp_path / "a.png").read_bytes() == b"x" * 10 and len(list(tmp_path.iterdir())) == 1


def test_records_survive_a_torn_write(tmp_path):
    records = Records(tmp_path)
    records.append([(0, 10, 1), (1, 20, 2)])
    with open(records.path, "ab") as out:
        out.write(b"\x07\0\0")
    assert Records.latest(tmp_path, 3)[0].tolist() == [10, 20, 0]
    records.append([(2, 30, 3)])
    assert Records.latest(tmp_path, 3)[0].tolist() == [10, 20, 30]


def test_png_bytes_are_a_function_of_the_pixels():
    pixels = np.asarray(tiny.picture(1, 1))
    assert files.encode_image(pixels, {"a": "ü"}) == files.encode_image(pixels.copy(), {"a": "ü"})
