"""What a synthetic subset is made from: what continues it, what is refused, and data that changes while a job runs."""

import dataclasses
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import SUBSET, planned, run_here, same, sampling_arguments, wait_for_images, workers_of
from PIL import Image

import sample_mp
import tiny
from semantic_aug.datasets import load_dataset
from semantic_aug.datasets.fingerprint import data_identity, hash_images
from semantic_aug.datasets.synthetic import read_subset
from semantic_aug.errors import UserError
from semantic_aug.sampling import config as sampling
from semantic_aug.sampling import files
from semantic_aug.sampling import folder as store
from semantic_aug.sampling import run as running
from semantic_aug.sampling.claim import belongs, warn
from semantic_aug.sampling.folder import Records
from semantic_aug.sampling.identity import arguments_of
from semantic_aug.sampling.sources import DataChanged, PlannedSources, SourceImages, block_files
from semantic_aug.sampling.subset import plan_of, plan_subset
from semantic_aug.sampling.worker import BatchMaker


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A data set of this test's own."""
    return tiny.write_image_folder(tmp_path / "animals")


@pytest.fixture
def request_of(workshop, tmp_path):
    """Makes resolved requests for subsets below ``out``, as the command line does."""

    def make(pictures, *argv, **changes):
        flags = sampling_arguments(workshop, pictures, tmp_path / "out", **changes)
        return sample_mp.resolve(sample_mp.build_parser().parse_args([*map(str, flags), *argv]))

    return make


def changed(config, **changes):
    """The request with other values of its placement and its output."""
    for name in ("placement", "output"):
        part = getattr(config, name)
        values = {k: v for k, v in changes.items() if hasattr(part, k)}
        config = dataclasses.replace(config, **{name: dataclasses.replace(part, **values)})
    return config


def begin(config, dataset, rows=()) -> Path:
    """Claims the subset's folder, and puts the images that the plan makes of some training images in place."""
    subset = plan_subset(config, dataset)
    with running.opened(subset) as opened:
        for number in np.flatnonzero(np.isin(subset.plan.source, rows)).tolist():
            content = files.encode_image(np.full((8, 8, 3), number, np.uint8), subset.paths.text(number))
            row = files.write_image(subset.folder / store.DATA / subset.paths.relative(number), content)
            opened.records.append([(number, *row)])
    return subset.folder


def reopened(config, dataset) -> int:
    """Images that a restart finds."""
    with running.opened(plan_subset(config, dataset)) as subset:
        return int(subset.done.sum())


# ----------------------------------------------------------------------------------------------------- what continues it


def test_what_changes_speed_or_place_alone_continues(request_of, pictures, tmp_path):
    config, dataset = request_of(pictures)
    folder = begin(config, dataset, [0, 5])
    before = reopened(config, dataset)
    assert before == 6
    for changes in (
        {"devices": ("cpu",) * 3},
        {"compile": "on"},
        {"num_shards": 3, "shard_index": 2},
        {"engine": "ray"},
        {"worker_timeout": 9.0},
    ):
        assert reopened(changed(config, **changes), dataset) == before
    (tmp_path / "disk").mkdir()
    moved = shutil.move(pictures, tmp_path / "disk" / "animals")
    assert reopened(*request_of(moved)) == before
    assert reopened(*request_of(moved, val_fraction=0.3)) == before  # the data set has a validation split of its own
    assert np.count_nonzero(Records.latest(folder, 54)[0]) >= before


def test_how_each_part_was_computed_is_recorded_beside_the_identity(request_of, pictures, monkeypatch):
    config, dataset = request_of(pictures)
    monkeypatch.setattr(running, "make_launcher", lambda *_: _Nothing())
    for changes in ({}, {}, {"devices": ("cpu", "cpu")}, {"devices": ("cpu", "cpu"), "compile": "on"}):
        running.make(plan_subset(changed(config, **changes), dataset))
    record = store.recorded_identity(sampling.subset_folder(config, dataset))
    assert record["runs"] == [
        {"shard": "0 of 1", "after_images": 0, "compiled": compiled, "processes": processes}
        for compiled, processes in ((False, 1), (False, 2), (True, 2))
    ]
    assert record["class_names"] == ["blue jay", "red fox", "toad"] and record["data"]["train"]["images"] == 18
    assert record["arguments"]["dataset"] == "animals"


class _Nothing:
    """An engine that makes no image."""

    def run(self, batches):
        from semantic_aug.sampling.launcher import Outcome

        return Outcome()


def test_shards_that_choose_their_batch_size_settle_on_the_first_ones(request_of, pictures):
    config, dataset = request_of(pictures, batch_size="auto")
    large, small = (changed(config, batch_size=size, num_shards=2) for size in (8, 4))
    with (
        running.opened(plan_subset(large, dataset)) as first,
        running.opened(plan_subset(changed(small, shard_index=1), dataset)) as second,
    ):
        sizes = [opened.planned.config.placement.batch_size for opened in (first, second)]
        assert sizes == [8, 8] and second.planned.plan.batch_size == 8
        assert (first.mine ^ second.mine).all()
    given = changed(small, automatic_batch=False)
    with pytest.raises(UserError, match="batch_size: 8 -> 4"), running.opened(plan_subset(given, dataset)):
        pass


# ------------------------------------------------------------------------------------------------------- what is refused


def exchange(pictures):
    """Two images of one class under each other's names."""
    one, other = (pictures / "train" / "toad" / f"train00{i}.png" for i in (1, 2))
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def relabel(pictures):
    """An image of one class under its name in another, whose image takes its place."""
    one, other = pictures / "train" / "toad" / "train001.png", pictures / "train" / "red fox" / "train001.png"
    one.rename(pictures / "x.png")
    other.rename(one)
    (pictures / "x.png").rename(other)


def rename_class(pictures):
    for split in ("train", "val", "test"):
        (pictures / split / "toad").rename(pictures / split / "toads")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            exchange,
            r"the same names and labels, other content \('train/toad/train001.png' has another content and 1 more\)",
        ),
        (relabel, "the same names and labels, other content"),
        (rename_class, "class_names: 'toad' -> 'toads'"),
        (
            lambda p: (p / "train/toad/train001.png").unlink(),
            r"train: 17 images now, 18 when the run began \('train/toad/train001.png' is gone\)",
        ),
        (lambda p: shutil.copy(p / "test/toad/test001.png", p / "train/toad"), "train: 19 images now, 18 when"),
        (lambda p: (p / "train/toad/train001.png").rename(p / "train/toad/a.png"), "other names"),
    ],
    ids=["exchanged", "relabelled", "class renamed", "removed", "added", "renamed"],
)
def test_a_changed_data_set_is_refused_and_nothing_is_touched(request_of, pictures, change, message):
    # class names in the prompts: a renamed class has no token, which is refused before
    config, dataset = request_of(pictures, finetune_model_key="db")
    folder = begin(config, dataset, range(18))
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".lock")}
    change(pictures)
    changed = request_of(pictures, finetune_model_key="db")
    for refusing in (
        lambda: reopened(*changed),
        lambda: running.merge(plan_subset(*changed)),
        lambda: belongs(plan_subset(*changed)),
    ):
        with pytest.raises(UserError, match=f"{message}.*nothing was touched; choose another --output_root"):
            refusing()
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".lock")}


def test_another_folder_of_the_same_name_is_refused(request_of, workshop, pictures, tmp_path):
    begin(*request_of(pictures), [0])
    other = tiny.write_image_folder(tmp_path / "other" / "animals", classes=("red fox", "toad", "blue jay"))
    with pytest.raises(UserError, match="the same names and labels, other content"):
        reopened(*request_of(other))
    argv = sampling_arguments(workshop, other, tmp_path / "out")
    with pytest.raises(UserError, match="holds a subset made otherwise"):
        sample_mp.main([*map(str, argv), "--dry_run"])


def test_prompts_and_weights_are_part_of_the_identity(request_of, pictures, workshop, tmp_path):
    (tmp_path / "config").mkdir()
    shutil.copy(workshop / "config" / "finetuned_ckpts.yaml", tmp_path / "config")
    entries, base = tmp_path / "config" / "datasets.yaml", tmp_path / "base"

    def request(super_class, **names):
        entry = {"folder": str(pictures), "super_class": super_class, "class_names": names}
        entries.write_text(yaml.safe_dump({"animals": entry}))
        return request_of(pictures, "--dataset", "animals", "--model_path", str(base), config_dir=tmp_path / "config")

    tiny.write_base(base)
    begin(*request("animal"), [0])
    assert reopened(*request("animal")) == 3
    with pytest.raises(UserError, match="super_class: 'beast' now, 'animal' when the run began"):
        reopened(*request("beast"))
    with pytest.raises(UserError, match="prompt names differ"):
        reopened(*request("animal", toad="frog"))
    moved = shutil.move(base, tmp_path / "models")
    base = Path(moved)
    assert reopened(*request("animal")) == 3
    tiny.write_base(base, seed=5)
    with pytest.raises(UserError, match="base_sha256: "):
        reopened(*request("animal"))


def test_a_restored_image_continues_where_nothing_was_made_from_the_damaged_one(request_of, pictures):
    damaged = pictures / "train" / "toad" / "train002.png"
    good = damaged.read_bytes()
    damaged.write_bytes(b"broken")
    config, dataset = request_of(pictures)
    row = dataset.train.keys.index("train/toad/train002.png")
    folder = begin(config, dataset, [0])
    damaged.write_bytes(good)
    shard = changed(config, num_shards=2)
    with pytest.raises(UserError, match=r"\('train/toad/train002.png' has another content\)"):
        reopened(shard, dataset)  # another shard may be at work on the old one
    assert reopened(config, dataset) == 3 and reopened(shard, dataset) == 3
    begin(config, dataset, [row])
    damaged.write_bytes(b"broken")
    with pytest.raises(UserError, match=r"\('train/toad/train002.png' has another content\)"):
        reopened(config, dataset)
    assert len(list(folder.rglob("*.png"))) == 6


def test_a_subset_of_an_earlier_version_is_refused_with_the_reason(request_of, pictures):
    config, dataset = request_of(pictures)
    folder = begin(config, dataset, [0])
    old = {"dataset": "animals", "strategy": "diff-mix", "compiled": False, "base_model": "tiny", "images": 54}
    (folder / "config.yaml").write_text(yaml.safe_dump(old))
    with pytest.raises(
        UserError, match="begun by an earlier version of this program, which did not record the training"
    ):
        reopened(config, dataset)
    assert yaml.safe_load((folder / "config.yaml").read_text()) == old
    shutil.rmtree(folder / "data")
    (folder / "records.bin").unlink()
    assert reopened(config, dataset) == 0  # without an image there is nothing to mix up


def test_the_base_models_licence_is_recorded_and_no_part_of_what_a_subset_is(request_of, pictures):
    config, dataset = request_of(pictures)
    folder = begin(config, dataset, [0])
    record = yaml.safe_load((folder / "config.yaml").read_text())
    assert record.pop("base_license") == "not known"
    for older in (record, {**record, "base_license": "another"}):
        (folder / "config.yaml").write_text(yaml.safe_dump(older))
        assert reopened(config, dataset) == 3


def test_a_subset_begun_with_the_former_speed_flag_continues_where_it_changed_nothing(request_of, pictures):
    config, dataset = request_of(pictures)
    folder = begin(config, dataset, [0])
    record = yaml.safe_load((folder / "config.yaml").read_text())
    exact = {"guidance_stop": 1.0, "reuse_interval": 1}
    (folder / "config.yaml").write_text(yaml.safe_dump(record | exact))
    assert reopened(config, dataset) == 3
    (folder / "config.yaml").write_text(yaml.safe_dump(record | {"guidance_stop": 2 / 3, "reuse_interval": 2}))
    with pytest.raises(UserError, match="with --speed fast or turbo, which it no longer has: nothing was touched"):
        reopened(config, dataset)


def test_a_subset_from_before_the_choice_of_pairing_continues_under_the_default_alone(request_of, pictures):
    config, dataset = request_of(pictures)
    folder = begin(config, dataset, [0])
    record = yaml.safe_load((folder / "config.yaml").read_text())
    assert record.pop("pairing") == "balanced"
    (folder / "config.yaml").write_text(yaml.safe_dump(record))
    assert reopened(config, dataset) == 3
    with pytest.raises(
        UserError, match=r"made otherwise \(pairing: 'balanced' -> 'independent'\): nothing was touched"
    ):
        reopened(*request_of(pictures, pairing="independent"))
    (folder / "config.yaml").write_text(yaml.safe_dump(record | {"plan_sha256": "0" * 64}))
    with pytest.raises(
        UserError, match=r"\(its plan is an earlier version's, .* within a class than needed\): nothing"
    ):
        reopened(config, dataset)


def test_noisy_labels_are_part_of_what_a_subset_is_made_from(request_of, pictures):
    config, dataset = request_of(pictures, corrupt_prob=0.3, subset_seed=1)
    clean = load_dataset(f"folder:{pictures}")
    wrong = np.flatnonzero(dataset.train.labels != clean.train.labels).tolist()
    assert wrong and (np.bincount(dataset.train.labels, minlength=3) > 0).all()
    folder = begin(config, dataset, wrong)
    plan = plan_of(config, dataset)
    assert (plan.source_class == dataset.train.labels[plan.source]).all()
    assert yaml.safe_load((folder / "config.yaml").read_text())["arguments"]["corrupt_prob"] == 0.3
    with pytest.raises(UserError, match=r"labels.*; corrupt_prob: 0.3 -> 0.0"):
        reopened(*request_of(pictures, subset_seed=1))
    with running.opened(plan_subset(config, dataset)) as subset:
        subset.close()
    assert len(read_subset(folder, dataset)) == np.isin(plan.source, wrong).sum()
    with pytest.raises(
        UserError, match=f"{len(wrong)} of {len(wrong)} source images have another label in .*--corrupt_prob"
    ):
        read_subset(folder, clean)


def test_the_profile_of_a_long_tail_is_recorded_where_it_is_not_the_default(request_of, pictures):
    plain, original = (
        arguments_of(request_of(pictures, task="imbalanced", imbalance_profile=profile)[0])
        for profile in ("exponential", "original")
    )
    assert original == {**plain, "imbalance_profile": "original"} and "split" not in original


@pytest.mark.parametrize("strategy", ["diff-gen", "real-gen"])
def test_a_reader_refuses_images_of_a_model_trained_on_what_evaluates(request_of, tiny_base, tmp_path, strategy):
    pictures = tiny.write_image_folder(tmp_path / "animals", val=0)
    base = {"finetune_model_key": None, "model_path": tiny_base} if strategy == "real-gen" else {}
    config, dataset = request_of(pictures, val_fraction=0, sample_strategy=strategy, **base)
    folder, held_out = begin(config, dataset, [-1]), load_dataset(f"folder:{pictures}")
    with running.opened(plan_subset(config, dataset)) as subset:
        subset.close()
    assert len(read_subset(folder, dataset)) == 54 == len(read_subset(folder, held_out, allow_other_sources=True))
    if strategy == "real-gen":  # the base model has seen none of the images
        assert len(read_subset(folder, held_out)) == 54
        return
    with pytest.raises(UserError, match="3 images on which its generator was trained are validation images of animals"):
        read_subset(folder, held_out)


def test_a_reader_refuses_a_subset_of_other_images_under_the_same_names(request_of, pictures, tmp_path):
    config, dataset = request_of(pictures)
    folder = begin(config, dataset, [0, 1])
    with running.opened(plan_subset(config, dataset)) as subset:
        subset.close()
    assert len(read_subset(folder, dataset)) == 6
    few = load_dataset(f"folder:{pictures}", dataclasses.replace(dataset.setting, examples_per_class=5))
    assert len(read_subset(folder, few, allow_other_sources=True)) == 6
    moved = load_dataset(f"folder:{shutil.copytree(pictures, tmp_path / 'elsewhere' / 'animals')}")
    assert len(read_subset(folder, moved)) == 6
    exchange(pictures)  # of an image that nothing was made from
    assert len(read_subset(folder, dataset)) == 6
    other = tiny.write_image_folder(tmp_path / "other" / "animals", classes=("red fox", "toad", "blue jay"))
    other = load_dataset(f"folder:{other}")
    with pytest.raises(UserError, match="meta.csv: 2 of 2 source images have another content than when the subset was"):
        read_subset(folder, other)
    assert len(read_subset(folder, other, allow_other_sources=True)) == 6


def test_a_checkpoint_of_other_images_is_told_in_one_line(request_of, workshop, pictures, tmp_path, caplog):
    folder = shutil.copytree(workshop / "ck", tmp_path / "ck")
    entries = yaml.safe_load((workshop / "config" / "finetuned_ckpts.yaml").read_text())
    entry = entries["animals"]["ck"] | {
        "lora_path": str(folder),
        "embed_path": str(folder / "learned_embeds.safetensors"),
    }
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "finetuned_ckpts.yaml").write_text(yaml.safe_dump({"animals": {"ck": entry}}))
    config, dataset = request_of(pictures, config_dir=tmp_path / "config")
    trained_on = data_identity(dataset, ["train"])
    (folder / "args.yaml").write_text(yaml.safe_dump({"made_from": {"data": trained_on}}))
    caplog.set_level("WARNING")
    caplog.clear()
    warn(plan_subset(config, dataset))
    assert not caplog.messages
    (pictures / "train" / "toad" / "train001.png").write_bytes(b"other")
    warn(plan_subset(config, dataset))
    assert len(caplog.messages) == 1
    assert "was trained on other images than these (train: 18 images as before, the same names and" in caplog.text


def test_a_class_without_training_images_is_refused_by_name(tmp_path):
    import datasets as hub

    features = hub.Features({"image": hub.Image(), "label": hub.ClassLabel(names=["owl", "toad", "newt"])})
    rows = {"image": [tiny.picture(i % 2, i) for i in range(6)], "label": [0, 1] * 3}
    hub.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "mine")
    with pytest.raises(UserError, match="class 'newt' of .* has no training image, so that none of it can be made"):
        plan_of(None, load_dataset(f"hf:{tmp_path / 'mine'}"))


def test_merging_where_there_is_no_subset_makes_none(request_of, pictures, tmp_path):
    with pytest.raises(UserError, match="--merge: .* holds no subset"):
        running.merge(plan_subset(*request_of(pictures)))
    assert not (tmp_path / "out").exists()


def test_a_machine_without_gpus_merges_what_gpus_have_made(request_of, pictures):
    config, dataset = request_of(pictures)
    record = begin(config, dataset, [0]) / store.CONFIG_FILE
    text = record.read_text()
    record.write_text(text.replace("device: cpu", "device: cuda").replace("dtype: fp32", "dtype: fp16"))
    for gpu_ids in (None, ["0", "1"]):
        with pytest.raises(UserError, match="3 of 54 images exist and are listed"):
            running.merge(plan_subset(*request_of(pictures, "--merge", gpu_ids=gpu_ids)))
    with pytest.raises(UserError, match="holds a subset made otherwise .dtype: 'fp16' -> 'bf16'.:"):
        running.merge(plan_subset(*request_of(pictures, "--merge", "--dtype", "bf16")))
    with pytest.raises(
        UserError, match="holds a subset made otherwise .dtype: 'fp16' -> 'fp32'; device: 'cuda' -> 'cpu'"
    ):
        reopened(*request_of(pictures))


# --------------------------------------------------------------------------------------- tasks name their training images


def test_a_process_refuses_another_listing_and_an_exchanged_image(pictures):
    table = load_dataset(f"folder:{pictures}").train
    plan, key = planned(table), "train/toad/train001.png"
    row = table.keys.index(key)
    images = SourceImages(table, plan)
    assert np.array_equal(np.asarray(images.image(row)), np.asarray(Image.open(pictures / key)))
    exchange(pictures)
    with pytest.raises(DataChanged, match="train001.png was exchanged while images were made from it"):
        images.image(row)
    (pictures / key).unlink()
    with pytest.raises(UserError, match=f"image {pictures / key} does not exist") as missing:
        images.image(row)
    assert not isinstance(missing.value, DataChanged)  # costs its own images alone
    with pytest.raises(DataChanged, match=r"17 training images now, 18 in the plan \(0 new, 1 gone\)"):
        SourceImages(load_dataset(f"folder:{pictures}").train, plan)
    shutil.copy(pictures / "val" / "toad" / "val000.png", pictures / "train" / "red fox" / "train001b.png")
    with pytest.raises(DataChanged, match=r"1 new, 1 gone; 'train/red fox/train001b.png' is new or has another label"):
        SourceImages(load_dataset(f"folder:{pictures}").train, plan)


def test_an_image_that_could_not_be_read_when_the_plan_was_made_is_not_used_later(pictures):
    path = pictures / "train" / "toad" / "train001.png"
    table, content = load_dataset(f"folder:{pictures}").train, path.read_bytes()
    path.unlink()
    plan = planned(table)
    path.write_bytes(content)
    with pytest.raises(UserError, match="could not be read when this run began"):
        SourceImages(table, plan).image(table.keys.index("train/toad/train001.png"))


def test_a_pipe_in_place_of_an_image_is_told_and_not_waited_for(request_of, pictures, caplog):
    path, (config, dataset) = pictures / "train" / "toad" / "train001.png", request_of(pictures)
    path.unlink()
    os.mkfifo(path)
    warn(plan_subset(config, dataset))
    assert "1 training images cannot be read ('train/toad/train001.png' the first): nothing will be made" in caplog.text


def test_kept_encodings_are_named_after_content_and_encoder_and_stale_ones_go(request_of, pictures):
    config, dataset = request_of(pictures)
    plan = planned(dataset.train)
    names = block_files(plan, "vae")
    assert len(names) == 3 and not set(names) & set(block_files(plan, "another vae"))
    exchange(pictures)
    changed = block_files(PlannedSources.of(dataset.train, hash_images(dataset.train)), "vae")
    assert [a == b for a, b in zip(names, changed, strict=True)] == [True, False, True]  # rows 13 and 14 of 18
    folder = begin(config, dataset)
    job = plan_subset(config, dataset).job
    usable = block_files(job.sources, job.encoder)
    (folder / ".moments").mkdir()
    for name in (usable[0], names[0], "0000000.safetensors", f".{usable[1]}.123"):
        (folder / ".moments" / name).write_bytes(b"")
    reopened(config, dataset)
    assert [p.name for p in (folder / ".moments").iterdir()] == [usable[0]]


def test_a_process_refuses_weights_that_changed_since_the_plan(request_of, pictures, workshop, tmp_path):
    config, dataset = request_of(pictures)
    lora = shutil.copy(config.model.lora, tmp_path / "lora.safetensors")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, lora=Path(lora)))
    job = dataclasses.replace(plan_subset(config, dataset).job, folder=tmp_path)
    assert BatchMaker(job, "cpu").sources is not None
    shutil.copy(config.model.tokens, lora)
    with pytest.raises(UserError, match=f"the weights in {lora} changed while images were made with them"):
        job.weights.check(job.config.model)


# ------------------------------------------------------------------------------------------------ other numbers of shards


def test_the_list_of_the_latest_run_is_right_whatever_the_number_of_shards(tmp_path):
    everything, crc = np.ones(4, bool), np.full(4, 1, np.uint32)
    Records(tmp_path, 2, 0).append([(0, 10, 1), (2, 10, 1)])
    Records(tmp_path, 2, 1).append([(1, 10, 1), (3, 10, 1)])
    whole = Records(tmp_path)
    whole.update(everything, np.array([10, 0, 10, 10], np.uint32), crc)  # file 1 is gone
    assert Records.latest(tmp_path, 4)[0].tolist() == [10, 0, 10, 10]
    whole.append([(1, 12, 5)])  # and made again, in other bytes
    half = Records(tmp_path, 2, 1)
    time.sleep(0.01)
    half.update(np.array([False, True, False, True]), np.array([10, 12, 10, 10], np.uint32), np.array([1, 5, 1, 1]))
    assert Records.latest(tmp_path, 4)[0].tolist() == [10, 12, 10, 10]
    assert Records.latest(tmp_path, 4)[1].tolist() == [1, 5, 1, 1]


# --------------------------------------------------------------------------------------------- changes while a job runs


@pytest.mark.slow
@pytest.mark.usefixtures("slow_images")
def test_data_that_changes_while_a_job_runs_never_becomes_an_image(
    workshop, pictures, request_of, tmp_path, undisturbed
):
    argv = sampling_arguments(workshop, pictures, tmp_path / "out", num_inference_steps=6)
    folder, image = tmp_path / "out" / SUBSET, pictures / "train" / "toad" / "train001.png"
    content = image.read_bytes()

    def exchange_source():
        while not (folder / "config.yaml").exists():
            time.sleep(0.01)
        shutil.copy(pictures / "train" / "red fox" / "train001.png", image)  # before a process has read it

    err = run_here("sample_mp.py", *argv, status=2, meanwhile=exchange_source)
    assert f"image {image} was exchanged while images were made from it" in err
    image.write_bytes(content)

    def add_source_and_kill():
        wait_for_images(folder, 3)
        shutil.copy(pictures / "test" / "toad" / "test001.png", pictures / "train" / "blue jay" / "new.png")
        os.kill(workers_of()[0], signal.SIGKILL)  # its replacement lists the data set anew

    err = run_here("sample_mp.py", *argv, status=2, meanwhile=add_source_and_kill)
    assert "19 training images now, 18 in the plan (1 new, 0 gone; 'train/blue jay/new.png' is new" in err
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1
    assert (folder / "meta.csv").exists()
    with pytest.raises(UserError, match="train: 19 images now, 18 when the run began"):
        reopened(*request_of(pictures))
    (pictures / "train" / "blue jay" / "new.png").unlink()
    run_here("sample_mp.py", *argv)
    assert same(folder, undisturbed)
