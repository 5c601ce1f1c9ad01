"""What a data set is: hashes of its images that follow their content and are not computed twice, and a record of them."""

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from helpers import ROOT, exchange
from PIL import Image

from semantic_aug.datasets import Setting, cache, fingerprint, load_dataset
from semantic_aug.datasets.origin import RunOrigin
from semantic_aug.datasets.readers.folder import read_folder
from semantic_aug.datasets.readers.hub import read_hub_id
from semantic_aug.errors import UserError

ALL = Setting(val_fraction=0.0)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.FOLDER_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprint, "SETTLED_SECONDS", -1.0)  # the test's files are younger than two seconds
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "data"
    for name, colour in (("cat", 50), ("dog", 150)):
        (root / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (4, 4), (colour, i, 0)).save(root / name / f"{i}.bmp")  # all of one size in bytes
    return root


@pytest.fixture
def read(monkeypatch):
    """Files that were read, in order."""
    names, hash_of = [], fingerprint._hash_of

    def counting(source):
        names.append(source)
        return hash_of(source)

    monkeypatch.setattr(fingerprint, "_hash_of", counting)
    return names


def table_of(folder):
    return read_folder(folder)["train"]


def identity_of(folder, **options):
    return fingerprint.data_identity(load_dataset(f"folder:{folder}", ALL), **options)


def blake(path):
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def test_hashes_are_those_of_the_encoded_bytes_and_files_are_read_once(folder, read):
    expected = [blake(folder / name / f"{i}.bmp") for name in ("cat", "dog") for i in range(3)]
    assert fingerprint.hash_images(table_of(folder)).hex() == expected and len(read) == 6
    assert fingerprint.hash_images(table_of(folder)).hex() == expected and len(read) == 6  # from the cache


def test_only_what_was_touched_is_read_again(folder, read):
    before = fingerprint.hash_images(table_of(folder)).hex()
    exchange(folder / "cat/1.bmp", (folder / "dog/0.bmp").read_bytes())
    shutil.copy(folder / "cat/0.bmp", folder / "cat/9.bmp")
    del read[:]
    after = fingerprint.hash_images(table_of(folder)).hex()
    assert after == [before[0], before[3], before[2], before[0], *before[3:]]
    assert sorted(map(os.path.basename, read)) == ["1.bmp", "9.bmp"]


def test_what_changed_a_moment_ago_is_not_trusted(folder, read, monkeypatch):
    monkeypatch.setattr(fingerprint, "SETTLED_SECONDS", 60.0)
    fingerprint.hash_images(table_of(folder)).hex()
    fingerprint.hash_images(table_of(folder)).hex()
    assert len(read) == 12


def test_unreadable_images_have_a_marker(folder):
    table = table_of(folder)
    for name in ("cat/0.bmp", "dog/2.bmp"):
        (folder / name).unlink()
    (folder / "dog/2.bmp").mkdir()
    hashes = fingerprint.hash_images(table).hex()
    assert [i for i, value in enumerate(hashes) if value == "0" * 32] == [0, 5]


def test_a_cache_that_cannot_be_written_or_is_damaged_costs_only_time(folder, read, cache_folder, monkeypatch):
    expected = fingerprint.hash_images(table_of(folder)).hex()
    (kept,) = cache_folder.glob("hashes-*.npy")
    kept.write_bytes(b"nonsense")
    assert fingerprint.hash_images(table_of(folder)).hex() == expected and len(read) == 12
    blocked = folder.parent / "file"
    blocked.write_text("")
    monkeypatch.setenv(cache.FOLDER_VARIABLE, str(blocked / "cache"))
    assert fingerprint.hash_images(table_of(folder)).hex() == expected and len(read) == 18


def test_hashes_count_towards_the_bound(folder, cache_folder, monkeypatch):
    cache_folder.mkdir()
    old = cache_folder / "pixels-old.npy"
    old.write_bytes(bytes(1000))
    monkeypatch.setenv(cache.BOUND_VARIABLE, str(1000 / 1e9))
    fingerprint.hash_images(table_of(folder)).hex()
    assert not old.exists() and len(list(cache_folder.glob("hashes-*.npy"))) == 1


def test_two_processes_at_once(folder, cache_folder):
    code = (
        "import sys; from semantic_aug.datasets import fingerprint\n"
        "from semantic_aug.datasets.readers.folder import read_folder; fingerprint.SETTLED_SECONDS = -1\n"
        "for _ in range(20): print(*fingerprint.hash_images(read_folder(sys.argv[1])['train']).hex())"
    )
    pair = [
        subprocess.Popen([sys.executable, "-c", code, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    expected = " ".join(fingerprint.hash_images(table_of(folder)).hex())
    for process in pair:
        output, _ = process.communicate()
        assert process.returncode == 0 and set(output.splitlines()) == {expected}
    assert [p.suffix for p in cache_folder.iterdir()] == [".npy"]  # no leftovers


@pytest.mark.parametrize("inside", [6, 0, 2, -2])
def test_hub_tables_hold_images_or_name_files(folder, tmp_path, read, inside, monkeypatch):
    """The first (or the last) rows hold their bytes, the others name files; nothing is read or hashed twice."""
    import datasets as hub
    from pyarrow import parquet

    monkeypatch.setattr(hub.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    paths = sorted(folder.rglob("*.bmp"))
    chosen = paths[:inside] if inside >= 0 else paths[inside:]
    cells = [{"bytes": p.read_bytes(), "path": None} if p in chosen else {"path": str(p)} for p in paths]
    features = hub.Features(image=hub.Image(), label=hub.ClassLabel(names=["cat", "dog"]))
    rows = hub.Dataset.from_dict({"image": cells, "label": [0, 0, 0, 1, 1, 1]}, features=features)
    (tmp_path / "copy").mkdir()
    file = tmp_path / "copy" / "train.parquet"
    parquet.write_table(rows.data.table.replace_schema_metadata(features.arrow_schema.metadata), file)
    expected = [blake(path) for path in paths]
    for _ in range(2):
        table = read_hub_id(str(tmp_path / "copy"))["train"]
        assert fingerprint.hash_images(table).hex() == expected and len(read) == 6
    assert sum(isinstance(source, bytes) for source in read) == len(chosen)
    beside = next((i for i, path in enumerate(paths) if path not in chosen), None)
    if beside is not None:
        exchange(paths[beside], paths[beside - 1].read_bytes())
        expected[beside] = expected[beside - 1]
        assert fingerprint.hash_images(table).hex() == expected and len(read) == 7


def test_the_record_of_a_moved_data_set_is_the_same(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "elsewhere" / "renamed")
    shutil.copytree(folder, tmp_path / "links", copy_function=os.symlink)
    record = identity_of(folder)
    assert identity_of(tmp_path / "elsewhere" / "renamed") == identity_of(tmp_path / "links") == record
    assert record["train"]["images"] == 6 and record["val"] is record["test"] is None
    assert record["classes"]["count"] == 2


def test_what_differs_is_said(folder):
    record = identity_of(folder)
    before = load_dataset(f"folder:{folder}", ALL)
    assert fingerprint.data_difference(record, identity_of(folder)) == ""

    swapped = (folder / "cat/0.bmp").read_bytes()
    exchange(folder / "cat/0.bmp", (folder / "dog/0.bmp").read_bytes())
    output = fingerprint.data_difference(record, identity_of(folder))
    assert output == "train: 6 images as before, the same names and labels, other content"
    exchange(folder / "cat/0.bmp", swapped)

    other = replace(before, train=replace(before.train, labels=np.array([1, 0, 0, 1, 1, 1])))
    output = fingerprint.data_difference(record, fingerprint.data_identity(other))
    assert output == "train: 6 images as before, the same names and content, other labels"

    caption = {"caption": np.array(["a"] * 6, object)}
    other = replace(before, train=replace(before.train, extras=caption))
    assert "other captions" in fingerprint.data_difference(record, fingerprint.data_identity(other))
    assert fingerprint.data_difference(record, fingerprint.data_identity(other, columns=())) == ""

    (folder / "cat/0.bmp").rename(folder / "cat/00.bmp")
    assert "other names" in fingerprint.data_difference(record, identity_of(folder))
    (folder / "cat/00.bmp").unlink()
    assert fingerprint.data_difference(record, identity_of(folder)) == "train: 5 images now, 6 when the run began"
    (folder / "eel").mkdir()
    Image.new("RGB", (4, 4)).save(folder / "eel/0.bmp")
    assert "class names differ: 3 now, 2 when the run began" in fingerprint.data_difference(record, identity_of(folder))
    assert "does not say" in fingerprint.data_difference(None, record)


def test_images_that_change_during_a_run(folder):
    origin = RunOrigin(load_dataset(f"folder:{folder}", ALL))
    origin.describe()
    os.utime(folder / "cat/0.bmp")
    os.link(folder / "cat/1.bmp", folder.parent / "backup.bmp")
    origin.refuse_changed("nothing")  # touched, not changed
    exchange(folder / "dog/2.bmp", (folder / "cat/0.bmp").read_bytes())
    (folder / "dog/1.bmp").unlink()
    with pytest.raises(UserError, match=r"2 images changed during the run \('dog/1.bmp'.*checkpoints stay"):
        origin.refuse_changed("checkpoints stay")
