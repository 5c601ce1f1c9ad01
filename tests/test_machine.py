"""The machine: how much memory is available, space on the disk reserved before it is mapped, and what devices are named."""

import contextlib
import errno
import os
import resource
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from accelerate import Accelerator

import tiny
from semantic_aug import devices, files, tensors
from semantic_aug.augmentations.model import ModelFiles
from semantic_aug.datasets import cache, load_dataset
from semantic_aug.diffusion.base import load_base, weight_files
from semantic_aug.diffusion.convert import convert
from semantic_aug.diffusion.tokens import ClassTokens, save_tokens
from semantic_aug.errors import UserError
from semantic_aug.finetune import checkpoints
from semantic_aug.finetune.latents import LatentCache, PixelCache
from semantic_aug.sampling import resources

GB = 1 << 30


@contextlib.contextmanager
def file_size_limit(size: int):
    """No file of this process may become larger: a full disk for those who write one large file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def group(folder, **files):
    """A control group's folder with the files the kernel shows in it; ``_`` stands for the dot in their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("memory_", "memory.", 1).replace("cgroup_", "cgroup.")).write_text(f"{content}\n")


# --------------------------------------------------------------------------------------------------------- memory


def test_page_cache_counts_as_free_in_control_groups_of_version_2(tmp_path):
    group(tmp_path / "mount", cgroup_controllers="memory")
    group(tmp_path / "mount" / "job", memory_max=8 * GB, memory_high="max", memory_current=7 * GB,
          memory_stat=f"anon {2 * GB}\ninactive_file {3 * GB}\nactive_file {GB}")  # fmt: skip
    group(tmp_path / "mount" / "job" / "step", memory_max="max", memory_high=6 * GB, memory_current=3 * GB,
          memory_stat=f"anon {3 * GB}\ninactive_file 0\nactive_file 0")  # fmt: skip
    (tmp_path / "membership").write_text("0::/job/step\n")
    rooms = list(devices.cgroup_rooms(tmp_path / "membership", tmp_path / "mount"))
    assert rooms == [3 * GB, 5 * GB]  # 6 - 3; 8 - (7 - 3 - 1)


def test_page_cache_counts_as_free_in_control_groups_of_version_1(tmp_path):
    group(tmp_path / "mount" / "memory", memory_limit_in_bytes=4 * GB, memory_usage_in_bytes=4 * GB,
          memory_stat=f"cache {3 * GB}\ntotal_inactive_file {2 * GB}\ntotal_active_file {GB // 2}")  # fmt: skip
    # inside a container the listed path is the host's; the mount shows the container's own group
    (tmp_path / "membership").write_text("5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/\n")
    rooms = list(devices.cgroup_rooms(tmp_path / "membership", tmp_path / "mount"))
    assert rooms == [5 * GB // 2]


def test_without_control_groups_all_that_the_system_can_give_counts(tmp_path):
    assert list(devices.cgroup_rooms(tmp_path / "absent", tmp_path)) == []
    (tmp_path / "membership").write_text("0::/\n")
    assert list(devices.cgroup_rooms(tmp_path / "membership", tmp_path)) == []


def test_processes_of_one_machine_share_its_memory(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = devices.available_memory()
    assert 0 < alone <= psutil.virtual_memory().total
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert devices.available_memory() == pytest.approx(alone / 4, rel=0.5)


# ----------------------------------------------------------------------------------------------------------- disk


def test_an_array_has_its_space_before_it_is_mapped(tmp_path, monkeypatch):
    created = tensors.create_array(tmp_path / "a.npy", np.float32, (300, 1000))
    assert os.stat(tmp_path / "a.npy").st_blocks * 512 >= created.nbytes and not created.any()
    created[7] = 3
    created.flush()
    assert tensors.open_array(tmp_path / "a.npy", np.float32, (300, 1000))[7, 0] == 3

    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, "no such call on this file system")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    created = tensors.create_array(tmp_path / "b.npy", np.float32, (300, 1000))
    assert os.stat(tmp_path / "b.npy").st_blocks * 512 >= created.nbytes
    assert tensors.open_array(tmp_path / "b.npy", np.float32).shape == (300, 1000)
    (tmp_path / "b.npy").write_bytes((tmp_path / "b.npy").read_bytes()[:-10])
    assert tensors.open_array(tmp_path / "b.npy", np.float32) is None


@pytest.mark.parametrize("call", [True, False], ids=["fallocate", "zeros"])
def test_an_array_without_space_is_an_error_and_leaves_nothing(tmp_path, monkeypatch, call):
    if not call:
        monkeypatch.delattr(os, "posix_fallocate")
    with file_size_limit(100_000), pytest.raises(OSError) as caught:
        tensors.create_array(tmp_path / "a.npy", np.uint8, (200_000,))
    assert files.is_full(caught.value) and caught.value.filename == str(tmp_path / "a.npy")
    assert not list(tmp_path.iterdir())


def test_a_state_without_space_is_an_error_of_the_system_and_the_earlier_one_stays(tmp_path):
    tensors.save_pickle(tmp_path / "state.pt", {"step": 1})
    with file_size_limit(100_000), pytest.raises(OSError) as caught:
        tensors.save_pickle(tmp_path / "state.pt", {"step": 2, "weights": torch.zeros(100_000)})
    assert files.is_full(caught.value) and caught.value.filename == str(tmp_path / "state.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]
    assert tensors.load_pickle(tmp_path / "state.pt", "") == {"step": 1}


@pytest.mark.parametrize("write", ["checkpoint", "convert"])
def test_a_checkpoint_without_space_is_an_error_of_the_system(tmp_path, write):
    model = SimpleNamespace(lora_parameters=[], current_tokens=lambda: None)
    if write == "convert":
        vectors = torch.zeros(2, 50_000)
        save_tokens(ClassTokens(("a", "b"), vectors), tmp_path / "tokens.safetensors")
    with file_size_limit(100_000), pytest.raises(OSError) as caught:
        if write == "checkpoint":
            checkpoints.save_checkpoint(tmp_path, 1, model, {"optimizer": torch.zeros(100_000)}, None)
        else:
            convert(None, tmp_path / "tokens.safetensors", tmp_path / "out", "original")
    assert files.is_full(caught.value)
    assert not checkpoints.listed(tmp_path) and not list(tmp_path.glob("out/*"))


def test_latents_and_pixels_without_space_are_one_line_before_any_is_encoded(tiny_base, image_folder, tmp_path):
    vae, table = load_base(str(tiny_base)).vae, load_dataset(f"folder:{image_folder}").train
    alone = Accelerator(cpu=True)
    with file_size_limit(30_000):
        # 18 images x 8 crops x 2 x (8, 4, 4) numbers of 4 bytes: 147 kB
        with pytest.raises(UserError, match=r"--output_dir .*18 images \(8 crop\(s\), with mirror.* take 0.000147 GB"):
            LatentCache(
                table, tmp_path / "a", vae, "digest", tiny.RESOLUTION, views=8, flip=True, seed=0, accelerator=alone
            )
        # 18 images of 36 x 32 pixels: 62 kB
        with pytest.raises(
            UserError, match=r"--output_dir .*decoded images take 6.22e-05 GB, which the disk does not hold"
        ):
            PixelCache(table, tmp_path / "b", vae, tiny.RESOLUTION, accelerator=alone)
    assert not list(tmp_path.rglob("*.*"))
    LatentCache(table, tmp_path / "a", vae, "digest", tiny.RESOLUTION, views=8, flip=True, seed=0, accelerator=alone)


def test_cached_pixels_without_space_are_one_line_or_decoded_each_time(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.FOLDER_VARIABLE, str(tmp_path))
    decode = lambda index: np.full((64, 64, 3), index, np.uint8)  # noqa: E731
    with file_size_limit(100_000):
        with pytest.raises(UserError, match="--cache disk: .*File too large"):
            cache.open_pixels(decode, 20, 64, "images", "disk")
        assert cache.open_pixels(decode, 20, 64, "images", "auto", memory=10) is None
    assert not [p for p in tmp_path.iterdir() if p.suffix != ".lock"]
    assert cache.open_pixels(decode, 20, 64, "images", "disk")[19, 0, 0, 0] == 19


# -------------------------------------------------------------------------------------------------------- devices


def test_no_more_processes_than_memory_holds(tiny_base, monkeypatch):
    files, size = ModelFiles("tiny", tiny_base), sum(p.stat().st_size for p in weight_files(tiny_base))
    need = resources.PROCESS_BYTES + 2 * size
    for available, count in ((need * 5, 4), (need * 3 - 1, 2), (0, 1)):
        monkeypatch.setattr(resources, "available_memory", lambda available=available: available)
        assert resources.fitting(["cpu"] * 4, files) == ["cpu"] * count
    assert resources.fitting(["cuda:0"] * 4, files) == ["cuda:0"] * 4


def test_what_the_flags_name(monkeypatch):
    monkeypatch.setattr(devices, "gpu_count", lambda: 2)
    assert devices.processes_of(None, 1) == ["cuda:0", "cuda:1"]
    assert devices.processes_of(["0", "0", "1"], 1) == ["cuda:0", "cuda:0", "cuda:1"]
    assert devices.processes_of(["cpu", "cpu"], 1) == ["cpu", "cpu"]
    assert devices.actors_of(None) == ["cpu"] and devices.actors_of(["7", "7"]) == ["cuda:7", "cuda:7"]
    assert devices.device_of(None) == "cuda:0" and devices.device_of("1") == "cuda:1"
    monkeypatch.setenv("WORLD_SIZE", "2")
    for call, line in (
        (lambda: devices.processes_of(["2"], 1), "--gpu_ids 2: this machine has GPUs 0 to 1"),
        (lambda: devices.processes_of(["0", "cpu"], 1), "--gpu_ids mixes GPUs and cpu"),
        (
            lambda: devices.actors_of(["0", "cpu"]),
            "--gpu_ids 0 cpu: expected GPU numbers, or the word cpu, one per actor",
        ),
        (lambda: devices.device_of("1"), "--gpu 1: a launcher started 2 processes"),
    ):
        with pytest.raises(UserError, match=line):
            call()
