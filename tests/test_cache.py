"""The pixel cache: right, shared, bounded, never stale, safe when killed, and nothing of it in the user's folders."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
from helpers import ROOT

import tiny
from semantic_aug.classify.data import ImageStore
from semantic_aug.datasets import cache
from semantic_aug.datasets.readers.folder import read_folder
from semantic_aug.errors import UserError
from semantic_aug.files import locked

SHAPE = (6, 8, 8, 3)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.FOLDER_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(cache.BOUND_VARIABLE, raising=False)
    return tmp_path / "cache"


class Decoder:
    """Makes images from their indices and counts how often it was asked."""

    def __init__(self, seed=0):
        self.seed, self.calls = seed, 0

    def __call__(self, index):
        self.calls += 1
        return np.full(SHAPE[1:], 10 * self.seed + index, np.uint8)


def opened(decode, identity="a", mode="disk", memory=0, count=6):
    return cache.open_pixels(decode, count, 8, identity, mode, memory)


def test_decoded_once_then_mapped(folder):
    first, second = Decoder(), Decoder()
    one, two = opened(first), opened(second)
    assert one.shape == SHAPE and one[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5] and np.array_equal(one, two)
    assert (first.calls, second.calls) == (6, 0) and not one.flags.writeable
    assert one[np.array([3, 1])].flags.writeable  # a batch is the caller's own
    assert sorted(p.suffix for p in folder.iterdir()) == [".lock", ".npy"]


def test_modes(folder):
    assert opened(Decoder(), mode="off", memory=10**9) is None
    ram = opened(Decoder(), mode="ram", memory=10**9)
    assert ram.flags.writeable and not folder.exists()
    assert opened(Decoder(), mode="auto", memory=10**9).flags.writeable and not folder.exists()  # small: memory
    assert not opened(Decoder(), mode="auto", memory=10).flags.writeable and folder.exists()
    assert opened(Decoder(), identity=None, mode="auto", memory=10) is None
    assert opened(Decoder(), identity=None, mode="disk", memory=10) is None
    assert opened(Decoder(), mode="disk", count=0) is None


def test_what_cannot_be_done_is_one_clear_line(folder, monkeypatch):
    with pytest.raises(UserError, match="--cache dsk: expected one of auto, ram, disk, off"):
        opened(Decoder(), mode="dsk")
    with pytest.raises(UserError, match="--cache ram: 6 images of 8 px take .* GB are free; give --cache disk"):
        opened(Decoder(), mode="ram", memory=100)
    monkeypatch.setenv(cache.BOUND_VARIABLE, "0.0000001")
    with pytest.raises(UserError, match="--cache disk: .*of decoded images, .* allowed in .*raise DIFFMIX_CACHE_GB"):
        opened(Decoder())
    assert opened(Decoder(), mode="auto", memory=10) is None  # auto falls back to decoding each time
    monkeypatch.setenv(cache.BOUND_VARIABLE, "lots")
    with pytest.raises(UserError, match="DIFFMIX_CACHE_GB=lots: expected the cache's bound in GB"):
        opened(Decoder())


def test_a_place_that_cannot_be_written_to(folder, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache.FOLDER_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(UserError, match="--cache disk: .*file cannot be written to"):
        opened(Decoder())
    assert opened(Decoder(), mode="auto", memory=10) is None


def test_a_full_disk_is_told_and_leaves_nothing_behind(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="No space left on device"):
        opened(Decoder())
    assert [p.suffix for p in folder.iterdir()] == [".lock"]


def test_the_least_recently_used_goes_first(folder, monkeypatch):
    size = 6 * 8 * 8 * 3
    monkeypatch.setenv(cache.BOUND_VARIABLE, str((3 * (size + 128) + 10) / 1e9))
    decoders = {name: Decoder(i) for i, name in enumerate("abcd")}
    for i, name in enumerate("abc"):
        opened(decoders[name], name)
        path = max(folder.glob("*.npy"), key=lambda p: p.stat().st_mtime_ns)
        os.utime(path, (1000 + i, 1000 + i))
    held = opened(Decoder(), "a")  # used again: b is now the oldest
    opened(decoders["d"], "d")
    assert len(list(folder.glob("*.npy"))) == 3 and held[5, 0, 0, 0] == 5
    again = {name: Decoder(i) for i, name in enumerate("abcd")}
    opened(again["a"], "a")
    opened(again["d"], "d")
    opened(again["c"], "c")
    assert [again[name].calls for name in "acd"] == [0, 0, 0]
    opened(again["b"], "b")
    assert again["b"].calls == 6


def test_a_damaged_file_is_made_again(folder):
    opened(Decoder())
    (path,) = folder.glob("*.npy")
    path.write_bytes(path.read_bytes()[:200])
    assert opened(Decoder())[5, 0, 0, 0] == 5
    path.write_bytes(b"not an array")
    assert opened(Decoder())[5, 0, 0, 0] == 5


def test_more_images_than_one_block(folder, monkeypatch):
    monkeypatch.setattr(cache, "in_threads", partial(cache.in_threads, block=4))
    assert opened(Decoder())[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]


def test_an_image_that_cannot_be_decoded_leaves_nothing_behind(folder):
    def broken(index):
        if index == 4:
            raise UserError("image 4 cannot be decoded")
        return np.zeros(SHAPE[1:], np.uint8)

    with pytest.raises(UserError, match="image 4"):
        opened(broken)
    assert not list(folder.glob("*.npy")) and not list(folder.glob("*.part"))


# ---------------------------------------------------------------------------------------------- real images, never stale


def store_of(table, mode="disk"):
    return ImageStore(table.image, len(table), 16, 0, cache=mode, identity=table.signature())


def test_the_store_gives_the_same_pixels_from_everywhere(folder, image_folder):
    table = read_folder(image_folder)["train"]
    rows = np.array([5, 0, 17, 5])
    wanted = ImageStore(table.image, len(table), 16, 10**9).batch(rows)
    for mode in ("disk", "disk", "off"):
        assert np.array_equal(store_of(table, mode).batch(rows), wanted)
    assert store_of(table).pixels is not None and store_of(table, "off").pixels is None


def test_never_stale(folder, tmp_path, image_folder):
    shutil.copytree(image_folder, tmp_path / "mine")
    table = read_folder(tmp_path / "mine")["train"]
    before = store_of(table).batch(np.arange(len(table)))
    path = tmp_path / "mine" / "train" / "toad" / "train000.png"
    status = path.stat()
    row = table.keys.index("train/toad/train000.png")

    tiny.picture(7, 7).save(path)  # other pixels, the file's time set back
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = store_of(read_folder(tmp_path / "mine")["train"]).batch(np.arange(len(table)))
    assert not np.array_equal(after[row], before[row])

    (tmp_path / "mine" / "train" / "toad" / "train001.png").unlink()  # a file less: other rows, another name
    fewer = read_folder(tmp_path / "mine")["train"]
    assert np.array_equal(store_of(fewer).batch(np.array([row])), after[[row]])
    assert len(list(folder.glob("*.npy"))) == 3


def test_same_size_and_time_still_tells(tmp_path):
    from semantic_aug.datasets.table import file_stamp

    path = tmp_path / "x"
    path.write_bytes(b"aaaa")
    status, before = path.stat(), file_stamp(path)
    time.sleep(0.02)
    path.write_bytes(b"bbbb")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_mtime_ns == status.st_mtime_ns and file_stamp(path) != before


def test_nothing_is_written_into_the_users_folder(folder, image_folder):
    before = {p: p.stat().st_mtime_ns for p in image_folder.rglob("*")}
    for table in read_folder(image_folder).values():
        store_of(table).batch(np.arange(3))
    assert {p: p.stat().st_mtime_ns for p in image_folder.rglob("*")} == before
    assert cache.cache_folder() == folder


def test_below_outputs_without_the_variable(monkeypatch):
    monkeypatch.delenv(cache.FOLDER_VARIABLE, raising=False)
    assert cache.cache_folder() == ROOT / "outputs" / "cache"


def test_synthetic_images_have_a_signature_too(tmp_path):
    from semantic_aug.datasets.synthetic import SyntheticImages

    paths = [tmp_path / "a.png", tmp_path / os.fsdecode(b"caf\xe9.png")]  # a name that is no UTF-8
    for i, path in enumerate(paths):
        tiny.picture(0, i).save(path)
    images = SyntheticImages(paths, np.array([0, 1]), np.array([1, 0]), np.array([0.7, 0.7]))
    before = images.signature()
    assert images.signature() == before
    tiny.picture(3, 3).save(paths[1])
    assert images.signature() != before


def test_teachers_of_soft_labels_go_by_the_same_rule_unless_a_process_uses_them(folder, monkeypatch):
    def teachers(name, used):
        runs = folder / "teachers" / name / "without-0"
        runs.mkdir(parents=True)
        (runs / "model.safetensors").write_bytes(bytes(10_000))
        (runs.parent / ".lock").touch()
        os.utime(runs.parent / ".lock", (used, used))
        return runs.parent

    in_use, _, _, latest = (teachers(name, 1000 + k) for k, name in enumerate("dcba"))
    (folder / "features-x.npy").write_bytes(bytes(10_000))
    os.utime(folder / "features-x.npy", (1001.5, 1001.5))
    monkeypatch.setenv(cache.BOUND_VARIABLE, "35e-6")
    with locked(in_use / ".lock"):
        os.utime(in_use / ".lock", (1000, 1000))
        cache.make_room(folder, 10_000)
        assert {path.name for path in (folder / "teachers").iterdir()} == {"d", "a"}
        assert not (folder / "features-x.npy").exists()
        with pytest.raises(cache.NoRoom):
            cache.make_room(folder, 30_000)
    latest.mkdir()  # which went for nothing
    in_use.rename(in_use.with_name("e.removed"))  # a process that removed it was killed
    cache.make_room(folder, 30_000)
    assert list((folder / "teachers").iterdir()) == [latest]


def test_teachers_stay_where_no_lock_can_tell_who_uses_them(folder, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.EOPNOTSUPP, "no locks on this file system")

    model = folder / "teachers" / "a" / "without-0" / "model.safetensors"
    model.parent.mkdir(parents=True)
    model.write_bytes(bytes(10_000))
    monkeypatch.setenv(cache.BOUND_VARIABLE, "1e-6")
    monkeypatch.setattr(cache.fcntl, "flock", no_locks)
    with pytest.raises(cache.NoRoom):
        cache.make_room(folder, 100)
    assert model.is_file()


# ------------------------------------------------------------------------------------------------------ several processes

WORKER = """
import sys, time
import numpy as np
from semantic_aug.datasets import cache
log, pause = sys.argv[1], float(sys.argv[2])
def decode(index):
    with open(log, "a") as out:
        out.write(f"{index}\\n")
    time.sleep(pause)
    return np.full((8, 8, 3), index, np.uint8)
pixels = cache.open_pixels(decode, 20, 8, "shared", "disk", 0, 1)
print(int(pixels.sum()))
"""


def start(log, pause):
    argv = [sys.executable, "-c", WORKER, str(log), str(pause)]
    return subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_processes_that_start_at_once_decode_each_image_once(folder, tmp_path):
    workers = [start(tmp_path / "log", 0.02) for _ in range(3)]
    sums = {worker.communicate(timeout=300)[0].strip() for worker in workers}
    assert sums == {str(sum(range(20)) * 192)}
    assert sorted(map(int, (tmp_path / "log").read_text().split())) == list(range(20))


def test_a_builder_that_is_killed_is_followed_by_another(folder, tmp_path):
    first = start(tmp_path / "log", 0.2)
    while not (tmp_path / "log").exists():
        time.sleep(0.01)
    second = start(tmp_path / "log2", 0.0)
    time.sleep(0.3)
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=300)
    assert second.communicate(timeout=300)[0].strip() == str(sum(range(20)) * 192)
    assert not list(folder.glob("*.part")) and len(list(folder.glob("*.npy"))) == 1
