"""Folders as people have them: litter, links, other endings, awkward names, and layouts that mean something else."""

from __future__ import annotations

import io
import os
import shutil
import unicodedata
from pathlib import Path

import pytest
from PIL import Image, ImageFile

import tiny
from semantic_aug.datasets import load_dataset
from semantic_aug.datasets.fingerprint import data_identity
from semantic_aug.datasets.readers.folder import LITTER, MASKS_INSIDE, read_folder
from semantic_aug.datasets.readers.notes import collected
from semantic_aug.errors import UserError


def picture(path: Path, number: int = 0, kind: str = "PNG") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tiny.picture(number % 2, number).save(path, kind)
    return path


@pytest.fixture
def animals(tmp_path) -> Path:
    """Two classes of two images each, without splits."""
    for i, name in enumerate(("owl/0.png", "owl/1.png", "toad/0.png", "toad/1.png")):
        picture(tmp_path / "animals" / name, i)
    return tmp_path / "animals"


PLAIN = ["owl/0.png", "owl/1.png", "toad/0.png", "toad/1.png"]


def read(folder: Path) -> tuple[dict, dict[str, list[str]]]:
    """The splits, and the notes by kind."""
    with collected() as notes:
        splits = read_folder(folder)
    return splits, {note.kind: sorted(note.cases) for note in notes}


# ---------------------------------------------------------------------------------------------------------- litter


def test_litter_at_any_level_is_passed_over_without_a_word(animals):
    for number, name in enumerate(sorted(LITTER)):
        spoken = name.upper() if number % 2 else name
        for level in (animals, animals / "owl", animals / "owl" / "batch"):
            if "." in name.lstrip(".") and not name.endswith("-v100"):
                level.mkdir(exist_ok=True)
                (level / spoken).write_bytes(b"litter")
            else:
                picture(level / spoken / "thumb.png", number)
    for level in (animals, animals / "owl"):
        (level / "._0.png").write_bytes(b"Mac OS X")
    splits, notes = read(animals)
    assert splits["train"].keys == PLAIN and splits["train"].class_names == ("owl", "toad") and not notes


def test_a_class_may_look_almost_like_litter(animals):
    for name in ("misc", "recycled", "cache", "snapshot", "tmp", "icon", "git"):
        picture(animals / name / "0.png")
    assert len(read(animals)[0]["train"].class_names) == 9


# --------------------------------------------------------------------------------------------- endings and contents


def test_endings_that_hold_images_are_read(animals):
    kinds = {"a.jfif": "JPEG", "b.jpe": "JPEG", "c.JPEG": "JPEG", "d.avif": "AVIF", "e.TIF": "TIFF", "f.webp": "WEBP"}
    kinds |= {"g.heic": "PNG", "h": "JPEG", "i.jpg_large": "JPEG", "j.jp2": "JPEG2000", "k": "TIFF"}
    for name, kind in kinds.items():
        picture(animals / "owl" / name, kind=kind)
    splits, notes = read(animals)
    table = splits["train"]
    assert {f"owl/{name}" for name in kinds} <= set(table.keys) and len(table) == 4 + len(kinds) and not notes
    assert all(table.image(row).size == (40, 36) for row in range(len(table)))


def test_every_file_that_is_left_out_is_named(animals, caplog):
    owl = animals / "owl"
    heic = len(b"....ftypheic").to_bytes(4, "big") + b"ftypheic" + bytes(100)
    for name, content in {
        "phone.heic": heic,
        "notes.txt": b"x",
        "film.mp4": b"\0\0\0\x18ftypmp42" + bytes(40),
        ".secret.png": b"x",
    }.items():
        (owl / name).write_bytes(content)
    for name, kind in (("raw.nef", "TIFF"), ("0.png.part", "PNG"), ("1.png~", "PNG"), ("film.thm", "JPEG")):
        picture(owl / name, kind=kind)
    os.mkfifo(owl / "pipe.png")
    (owl / "gone.txt").symlink_to(owl / "nowhere")
    picture(animals / "outside.png")
    splits, notes = read(animals)
    assert splits["train"].keys == PLAIN
    assert notes == {
        "images beside the class folders left out": ["outside.png"],
        "hidden files or folders left out": ["owl/.secret.png"],
        "HEIC images left out: install pillow-heif (pip install pillow-heif), or convert to JPEG": ["owl/phone.heic"],
        "files left out: no images [.mp4 1, .txt 1]": ["owl/film.mp4", "owl/notes.txt"],
        "camera raw images left out: convert them to TIFF or JPEG": ["owl/raw.nef"],
        "unfinished downloads or backup copies left out": ["owl/0.png.part", "owl/1.png~"],
        "camera thumbnails left out": ["owl/film.thm"],
        "pipes, sockets or devices left out": ["owl/pipe.png"],
        "links that lead nowhere left out": ["owl/gone.txt"],
    }
    read_folder(animals)  # a line each on the log, where nobody collects them
    assert len(caplog.records) == len(notes)
    assert "files left out: no images [.mp4 1, .txt 1]: 2 ('owl/film.mp4', 'owl/notes.txt')" in caplog.messages


def test_masks_below_the_classes_are_read_as_images_and_named(animals):
    for name in ("owl", "toad"):
        (animals / name / "masks").mkdir()
        picture(animals / name / "masks" / "0.png")
    splits, notes = read(animals)
    assert len(splits["train"]) == len(PLAIN) + 2 and notes == {MASKS_INSIDE: ["owl/masks", "toad/masks"]}


def test_a_class_whose_files_are_all_left_out_says_why(animals):
    shutil.rmtree(animals / "owl")
    picture(animals / "owl" / "raw.nef", kind="TIFF")
    with pytest.raises(UserError, match="class folder .*owl holds no image.*camera raw images left out.*: 1"):
        read_folder(animals)


def test_broken_links_are_counted_before_a_run(animals):
    for i in range(3):
        (animals / "owl" / f"link{i}.png").symlink_to("/nowhere/at/all.png")
    with pytest.raises(UserError, match="3 of 7 images are not there .*link0.png"):
        load_dataset(f"folder:{animals}")


# ----------------------------------------------------------------------------------------------------------- links


def test_linked_folders_are_entered_and_loops_end(animals, tmp_path):
    for i in range(3):
        picture(tmp_path / "elsewhere" / "deep" / f"{i}.png", i)
    (animals / "owl" / "batch").symlink_to(tmp_path / "elsewhere")
    (animals / "owl" / "again").symlink_to(tmp_path / "elsewhere" / "deep")
    (animals / "owl" / "loop").symlink_to(animals / "owl")
    (animals / "owl" / "self").symlink_to("self")
    splits, notes = read(animals)
    keys = [key for key in splits["train"].keys if key not in PLAIN]
    assert keys == [f"owl/again/{i}.png" for i in range(3)]  # in the order of names, each real file once
    assert notes.pop("linked folders left out: read already under another name") == ["owl/batch/deep", "owl/loop"]
    assert notes == {"links that lead nowhere left out": ["owl/self"]}


def test_a_real_folder_is_read_before_links_to_it(animals):
    picture(animals / "owl" / "real" / "9.png")
    (animals / "owl" / "a link").symlink_to("real")
    splits, notes = read(animals)
    assert "owl/real/9.png" in splits["train"].keys and list(notes.values()) == [["owl/a link"]]


def test_links_across_classes_and_splits_are_refused(animals, image_folder, tmp_path):
    (animals / "owl" / "all").symlink_to(animals)
    with pytest.raises(UserError, match="toad is read for train, class 'owl' and train, class 'toad': a link"):
        read_folder(animals)
    shutil.copytree(image_folder, tmp_path / "split")
    shutil.rmtree(tmp_path / "split" / "test" / "toad")
    (tmp_path / "split" / "test" / "toad").symlink_to(tmp_path / "split" / "train" / "toad")
    with pytest.raises(UserError, match="toad is read for .*train, class 'toad'"):
        read_folder(tmp_path / "split")


def test_a_validation_split_linked_to_test_is_noted(image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "split")
    shutil.rmtree(tmp_path / "split" / "val")
    (tmp_path / "split" / "val").symlink_to("test")
    splits, notes = read(tmp_path / "split")
    assert len(splits["val"]) == len(splits["test"]) and len(notes["folders that serve two splits"]) == 1


# ---------------------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize(("one", "other"), [("val", "valid"), ("train", "Training"), ("test", "TEST")])
def test_two_folders_for_one_split_are_refused(image_folder, tmp_path, one, other):
    shutil.copytree(image_folder, tmp_path / "set")
    shutil.copytree(tmp_path / "set" / one, tmp_path / "set" / other)
    with pytest.raises(
        UserError, match=f"({one} and {other}|{other} and {one}), which all stand for the split .*remove"
    ):
        read_folder(tmp_path / "set")


def test_split_folders_in_any_letter_case(image_folder, tmp_path):
    for split, name in (("train", "TRAIN"), ("val", "Validation"), ("test", "Test")):
        shutil.copytree(image_folder / split, tmp_path / "set" / name)
    assert sorted(read_folder(tmp_path / "set")) == ["test", "train", "val"]


def test_a_test_folder_without_classes_is_left_out_with_a_line(image_folder, tmp_path):
    shutil.copytree(image_folder / "train", tmp_path / "set" / "train")
    for i in range(3):
        picture(tmp_path / "set" / "test" / f"{i}.png", i)
    picture(tmp_path / "set" / "extra" / "x.png")
    picture(tmp_path / "set" / "cover.png")
    splits, notes = read(tmp_path / "set")
    assert list(splits) == ["train"] and splits["train"].class_names == ("blue jay", "red fox", "toad")
    assert notes == {
        "unlabelled split left out, it holds no class folders": ["test with 3 images"],
        "folder beside the splits left out": ["extra with 1 images"],
        "images beside the split folders left out": ["cover.png"],
    }


def test_splits_without_class_folders_are_not_taken_for_classes(tmp_path):
    for split in ("train", "test"):
        picture(tmp_path / "set" / split / "0.png")
    with pytest.raises(UserError, match="test and train without class folders: expected one folder per class"):
        read_folder(tmp_path / "set")


def test_splits_below_the_classes_are_refused(animals):
    for split in ("train", "test"):
        picture(animals / "owl" / split / "0.png")
    with pytest.raises(
        UserError, match="owl holds the split folders test, train: expected the splits above the classes"
    ):
        read_folder(animals)


def test_classes_without_test_images_and_classes_of_test_only(image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "set")
    shutil.rmtree(tmp_path / "set" / "test" / "toad")
    (tmp_path / "set" / "test" / "toad").mkdir()
    (tmp_path / "set" / "test" / "never trained").mkdir()
    splits = read_folder(tmp_path / "set")
    assert splits["test"].class_names == splits["train"].class_names and splits["test"].counts()[2] == 0
    picture(tmp_path / "set" / "test" / "never trained" / "0.png")
    with pytest.raises(UserError, match="split test has the class 'never trained', which split train lacks"):
        read_folder(tmp_path / "set")


# ----------------------------------------------------------------------------------------------------------- names


def test_composed_and_decomposed_accents_are_one_class(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "chouette effraie à poils") for form in ("NFC", "NFD"))
    assert composed != decomposed
    for split, name in (("train", composed), ("train", decomposed), ("test", decomposed)):
        picture(tmp_path / split / name / f"{split}{len(name)}.png")
        picture(tmp_path / split / "owl" / f"{split}.png")
    splits = read_folder(tmp_path)
    assert splits["train"].class_names == splits["test"].class_names == (composed, "owl")
    assert splits["train"].counts().tolist() == [2, 1] and splits["test"].counts().tolist() == [1, 1]


def test_awkward_file_names_reach_their_images(tmp_path):
    names = [
        "new\nline.png",
        "tab\t.png",
        "quo'te\".png",
        "\U0001f989.png",
        " space .png",
        "a,b.png",
        "back\\slash.png",
    ]
    for i, name in enumerate(names):
        picture(tmp_path / "set" / "owl" / name, i)
        picture(tmp_path / "set" / "toad" / f"{i}.png", i)
    raw = os.fsencode(tmp_path / "set" / "owl") + b"/caf\xe9.png"
    shutil.copy(os.fsencode(tmp_path / "set" / "toad" / "0.png"), raw)
    data = load_dataset(f"folder:{tmp_path / 'set'}")
    keys = [*data.train.keys, *data.val.keys]
    assert {f"owl/{name}" for name in names} < set(keys) and "owl/caf\\xe9.png" in keys
    assert all(table.image(row).size == (40, 36) for table in (data.train, data.val) for row in range(len(table)))
    assert data.train.signature() and data_identity(data)["train"]["images"] == len(data.train)


def test_a_class_name_that_is_not_utf_8_is_named(animals):
    shutil.copytree(animals / "owl", os.fsdecode(os.fsencode(animals) + b"/caf\xe9"))
    with pytest.raises(UserError, match=r"caf\\xe9 is not UTF-8: rename it"):
        read_folder(animals)


@pytest.fixture
def as_a_user():
    """Without the rights of root, which may enter every folder."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


def test_a_folder_without_permission_is_named_and_a_read_only_one_is_read(animals, request):
    locked = animals / "owl" / "locked"
    picture(locked / "0.png")
    for path in (animals, *animals.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    for parent in list(animals.parents)[:4]:
        if parent.stat().st_uid == os.geteuid() and parent != Path("/tmp"):
            parent.chmod(parent.stat().st_mode | 0o055)
    locked.chmod(0)
    request.getfixturevalue("as_a_user")
    try:
        with pytest.raises(UserError, match=r"folder .*locked cannot be listed \(Permission denied\)"):
            read_folder(animals)
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        for path in (animals, *animals.rglob("*")):
            path.chmod(0o755)
    locked.chmod(0o555)
    assert len(read_folder(animals)["train"]) == 5


def test_a_folder_of_links_to_files(animals, tmp_path):
    for i in range(2):
        path = picture(tmp_path / "store" / f"{i}.png", i)
        (animals / "owl" / f"link{i}.png").symlink_to(path)
    table = read_folder(animals)["train"]
    assert len(table) == 6 and table.image(table.keys.index("owl/link1.png")).tobytes() == tiny.picture(1, 1).tobytes()


def test_reading_opens_no_image(animals, monkeypatch):
    monkeypatch.setattr(io, "open", None)
    monkeypatch.setattr(Image, "open", None)
    assert len(read_folder(animals)["train"]) == 4


def test_sizes_are_those_of_the_upright_images_and_decode_nothing(animals, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    tiny.picture(0, 5).save(animals / "owl" / "turned.jpg", exif=exif)
    tiny.picture(0, 6).resize((30, 50)).convert("P").save(animals / "owl" / "palette.gif")
    table = read_folder(animals)["train"]
    expected = [table.image(row).size for row in range(len(table))]
    assert (36, 40) in expected and (30, 50) in expected and (40, 36) in expected

    def refuse(self, *args):
        raise AssertionError("an image was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    assert [table.size(row) for row in range(len(table))] == expected
