"""Looking a data set over: every kind of trouble planted in a folder, found, named, and turned into an exit status."""

import importlib.util
import io
import json
import shutil

import numpy as np
import pytest
from helpers import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from semantic_aug.datasets import __main__ as command
from semantic_aug.datasets import check
from semantic_aug.datasets.catalog import find_spec
from semantic_aug.datasets.images import open_image, read_image
from semantic_aug.datasets.readers.folder import read_folder
from semantic_aug.errors import run_main

SIZE = (80, 72)


@pytest.fixture
def good(tmp_path):
    """A folder with nothing wrong: two classes, three splits, images that differ."""
    for split, count in (("train", 4), ("val", 2), ("test", 2)):
        for label, name in enumerate(("owl", "toad")):
            for i in range(count):
                path = tmp_path / "set" / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                noise = np.random.default_rng([label, i, len(split)]).integers(0, 256, (9, 10, 3), np.uint8)
                Image.fromarray(noise).resize(SIZE, Image.Resampling.BICUBIC).save(path)
    return tmp_path / "set"


def report_of(folder):
    word = f"folder:{folder}"
    return check.check(find_spec(word), find_spec(word).read(), workers=2)


def kinds(report):
    return {findings.kind: findings for findings in report.findings}


def test_a_good_folder_passes(good, tmp_path, capsys):
    status = run_main(command.main, ["check", f"folder:{good}", "--output_dir", str(tmp_path / "out"), "--strict"])
    out = capsys.readouterr().out
    assert status == 0 and "0 problems, 0 warnings: passed" in out and "train        8 images, 4 to 4 per class" in out
    saved = json.loads(next((tmp_path / "out").glob("set-*.json")).read_text())
    assert saved["passed"] and saved["counts"] == {"train": [4, 4], "val": [2, 2], "test": [2, 2]}
    sheet = Image.open(next((tmp_path / "out").glob("set-*.png")))
    assert sheet.width > 4 * check.SHEET_SIDE and sheet.height > 2 * check.SHEET_SIDE


def test_unreadable_and_truncated_images(good):
    (good / "train" / "owl" / "0.png").write_bytes(b"")
    path = good / "train" / "toad" / "1.png"
    path.write_bytes(path.read_bytes()[:400])
    (good / "test" / "owl" / "0.png").write_text("<html>404</html>")
    report, _ = report_of(good)
    findings = kinds(report)["unreadable image"]
    assert len(findings.cases) == 3 and findings.problem and all("\n" not in line for line in findings.cases)
    assert any("0.png is empty" in line for line in findings.cases)
    assert sum("1.png cannot be decoded" in line for line in findings.cases) == 1


def test_exact_duplicates_within_and_across_splits(good):
    shutil.copy(good / "train" / "owl" / "0.png", good / "train" / "owl" / "copy.png")
    shutil.copy(good / "train" / "owl" / "1.png", good / "train" / "toad" / "copy.png")
    shutil.copy(good / "train" / "owl" / "2.png", good / "test" / "owl" / "copy.png")
    report, _ = report_of(good)
    findings = kinds(report)
    leak = findings["exact duplicate across splits (a leak)"]
    assert leak.problem and list(leak.cases) == ["train/owl/2.png = test/owl/copy.png"]
    assert list(findings["exact duplicate under two labels"].cases) == ["train/owl/1.png = train/toad/copy.png"]
    assert not findings["exact duplicate within a class of a split"].problem
    assert report.findings[0].problem and not any("near" in kind for kind in findings)


def test_many_equal_images_are_named_across_splits_and_labels(good):
    """As a placeholder that a photo site serves for missing photographs."""
    for copy in ("train/owl/a", "train/owl/b", "train/owl/c", "train/owl/d", "train/toad/e", "val/owl/f", "test/owl/g"):
        shutil.copy(good / "train" / "owl" / "0.png", good / f"{copy}.png")
    leak = kinds(report_of(good)[0])["exact duplicate across splits (a leak)"]
    assert leak.cases == ("train/owl/0.png = val/owl/f.png = test/owl/g.png = train/toad/e.png and 4 more",)


def test_near_duplicates_within_and_across_splits(good):
    image = Image.open(good / "train" / "owl" / "0.png")
    image.save(good / "train" / "owl" / "again.jpg", quality=70)
    image.resize((160, 144)).save(good / "test" / "owl" / "larger.png")
    report, _ = report_of(good)
    findings = kinds(report)
    assert list(findings["near duplicates within a class of a split"].cases) == [
        "train/owl/0.png ~ train/owl/again.jpg"
    ]
    across = findings["near duplicates across splits (a possible leak)"]
    assert len(across.cases) == 2 and "train/owl/0.png ~ test/owl/larger.png" in across.cases and not across.problem


def test_odd_modes_and_sizes(good):
    picture = Image.open(good / "train" / "owl" / "0.png")
    owl = good / "train" / "owl"
    picture.convert("L").rotate(90, expand=True).save(owl / "grey.png")
    rgba = picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM).convert("RGBA")
    rgba.putalpha(128)
    rgba.save(owl / "alpha.png")
    picture.transpose(Image.Transpose.ROTATE_180).convert("CMYK").save(owl / "print.jpg")
    wide = (np.random.default_rng(0).random((70, 80)) * 65535).astype(np.uint16)
    Image.fromarray(wide).save(owl / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.transpose(Image.Transpose.TRANSPOSE).save(owl / "turned.jpg", exif=exif)
    frames = [Image.new("RGB", (70, 70), c) for c in ("red", "blue")]
    frames[0].save(owl / "moving.gif", save_all=True, append_images=frames[1:])
    picture.resize((20, 20)).save(owl / "small.png")
    picture.resize((400, 100)).save(owl / "long.png")
    report, _ = report_of(good)
    odd = {kind.removeprefix("odd image: "): list(f.cases) for kind, f in kinds(report).items() if "odd" in kind}
    for word, name in (
        ("greyscale", "grey.png"),
        ("alpha channel", "alpha.png"),
        ("CMYK", "print.jpg"),
        ("16-bit or floating-point, scaled to 8 bits (integers of 16 bits)", "deep.png"),
        ("EXIF rotation (it is applied)", "turned.jpg"),
        ("animated or of several pages (the first is used)", "moving.gif"),
        ("shorter side below 64 pixels", "small.png"),
        ("longer side above 3 times the shorter", "long.png"),
    ):
        assert f"train/owl/{name}" in odd[word], word
    assert not report.problems and report.sizes["width"] == [20, 80, 400]


def test_names_that_collide_and_classes_without_images(good, caplog):
    for name in ("Barn_Owl", "barn owl"):
        shutil.copytree(good / "train" / "toad", good / "train" / name)
        for i, path in enumerate(sorted((good / "train" / name).iterdir())):
            Image.fromarray(
                np.random.default_rng([len(name), ord(name[0]), i]).integers(0, 256, (70, 70, 3), np.uint8)
            ).save(path)
    report, _ = report_of(good)
    findings = kinds(report)
    (collision,) = [f for kind, f in findings.items() if kind.startswith("class names that collide")]
    assert collision.problem and list(collision.cases) == ["'Barn_Owl' = 'barn owl'"]
    assert list(findings["class without a test image"].cases) == ["Barn_Owl", "barn owl"]


def test_missing_splits_are_told(good):
    shutil.rmtree(good / "val")
    shutil.rmtree(good / "test")
    report, _ = report_of(good)
    assert [f.cases[0].split()[0] for f in report.findings] == ["val", "test"] and not report.problems


def test_a_class_without_training_images_is_a_problem(good):
    splits = read_folder(good)
    train = splits["train"].take(np.flatnonzero(splits["train"].labels == 0))
    report, _ = check.check(find_spec(f"folder:{good}"), {**splits, "train": train})
    assert [list(f.cases) for f in report.problems] == [["toad"]]


def test_bombs_are_named(good):
    Image.new("1", (20000, 20000)).save(good / "train" / "owl" / "bomb.png")
    report, _ = report_of(good)
    (problem,) = report.problems
    assert len(problem.cases) == 1 and "bomb.png" in problem.cases[0] and "decompression bomb" in problem.cases[0]


def test_a_text_chunk_that_unpacks_to_gigabytes_is_passed_over():
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 80_000_000, zip=True)
    out = io.BytesIO()
    Image.new("RGB", (4, 4), (1, 2, 3)).save(out, "PNG", pnginfo=info)
    assert len(out.getvalue()) < 200_000
    image, stored = read_image(out.getvalue(), "bomb.png")
    assert image.getpixel((0, 0)) == (1, 2, 3) and stored.damaged


def test_statuses_for_scripts(good, tmp_path, capsys):
    out = ["--output_dir", str(tmp_path / "out")]
    shutil.rmtree(good / "val")
    word = f"folder:{good}"
    assert run_main(command.main, ["check", word, *out]) == 0
    assert run_main(command.main, ["check", word, *out, "--strict"]) == 1
    shutil.copy(good / "train" / "owl" / "2.png", good / "test" / "owl" / "copy.png")
    assert run_main(command.main, ["check", word, *out]) == 1
    assert "1 problems, 1 warnings: failed" in capsys.readouterr().out
    for argv in (["check", f"folder:{tmp_path / 'no'}"], ["check"], ["look"], ["check", word, "--workers", "0"]):
        assert run_main(command.main, argv) == 2
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1 and error[0].startswith("error: ")
    before = sorted(p for p in good.rglob("*"))
    run_main(command.main, ["check", word, *out])
    assert sorted(p for p in good.rglob("*")) == before


def test_list_and_info(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("CUB_ROOT", raising=False)
    assert run_main(command.main, ["list"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n{name} " in f"\n{out}" for name in ("cub", "flower", "waterbird", "elpv"))
    assert "elpv_shortcut solar cell  package" in out
    assert run_main(command.main, ["info", "waterbird"]) == 0
    out = capsys.readouterr().out
    assert "WATERBIRD_ROOT" in out and "land bird on water" in out and "Sagawa" in out and "not readable here" in out
    assert run_main(command.main, ["info", "elpv"]) == 0
    assert "8 classes, images: train 1575" in capsys.readouterr().out
    assert run_main(command.main, ["info", "cub"]) == 0
    assert "reading them would download" in capsys.readouterr().out
    (tmp_path / "datasets.yaml").write_text("mine: {folder: /nowhere}\n")
    assert run_main(command.main, ["--config_dir", str(tmp_path), "list"]) == 0
    assert "\nmine " in capsys.readouterr().out


def test_the_module_runs():
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "semantic_aug.datasets", "info", "nothing"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("error: unknown data set 'nothing'")


@given(st.lists(st.binary(min_size=32, max_size=32), max_size=30), st.integers(0, 200), st.randoms())
@settings(max_examples=60, deadline=None)
def test_near_pairs_are_those_of_comparing_all(hashes, bits, random):
    if hashes:  # plant some that are near
        for _ in range(5):
            near = bytearray(random.choice(hashes))
            near[random.randrange(32)] ^= random.randrange(256)
            hashes.append(bytes(near))
    distance = lambda a, b: sum((x ^ y).bit_count() for x, y in zip(a, b, strict=True))  # noqa: E731
    wanted = [
        (i, j) for i in range(len(hashes)) for j in range(i + 1, len(hashes)) if distance(hashes[i], hashes[j]) <= bits
    ]
    assert check.near_pairs(hashes, bits) == wanted


def test_blank_images_do_not_make_millions_of_pairs(monkeypatch):
    monkeypatch.setattr(check, "MAX_PAIRS", 50)
    assert len(check.near_pairs([bytes(32)] * 40)) == 50


def test_the_hash_bears_what_near_duplicates_go_through():
    noise = np.random.default_rng(0).integers(0, 256, (2, 9, 10, 3), np.uint8)
    image, other = (Image.fromarray(n).resize((256, 200), Image.Resampling.BICUBIC) for n in noise)
    first = check.difference_hash(image)
    for changed in (
        image.resize((128, 100)),
        image.resize((300, 300)),
        image.convert("L").convert("RGB"),
        image.point(lambda v: 20 + 0.8 * v),
    ):
        out = io.BytesIO()
        changed.save(out, "JPEG", quality=60)
        assert check.near_pairs([first, check.difference_hash(open_image(out.getvalue()))]) == [(0, 1)]
    assert check.near_pairs([first, check.difference_hash(other)]) == []


def test_what_was_left_out_or_scaled_is_named(good, tmp_path, capsys):
    owl = good / "train" / "owl"
    (owl / "phone.heic").write_bytes((24).to_bytes(4, "big") + b"ftypheic" + bytes(4) + b"mif1heic" + bytes(99))
    (owl / "notes.txt").write_text("x")
    deep = np.random.default_rng(5).random((70, 80))
    Image.fromarray((deep * 4095).astype(np.uint16)).save(owl / "deep.png")
    Image.fromarray(deep[::-1].astype(np.float32)).save(owl / "float.tif")
    Image.new("RGB", (80, 70), (3, 3, 3)).save(owl / "dark.png")
    Image.fromarray((deep.T * 255).astype(np.uint8)).convert("RGB").save(owl / "picture.jpg", "PNG")
    status = run_main(command.main, ["check", f"folder:{good}", "--output_dir", str(tmp_path / "out")])
    out = capsys.readouterr().out
    heic = importlib.util.find_spec("pillow_heif") is None
    assert status == 1 and ("PROBLEM: HEIC images left out: install pillow-heif" if heic else "unreadable image") in out
    for line in (
        "warning: files left out: no images [.txt 1]: 1",
        "scaled to 8 bits (integers of 12 bits): 1",
        "scaled to 8 bits (floating-point, 0 to 1): 1",
        "nearly black, no value above 15 of 255: 1",
        "PNG file with the ending .jpg: 1",
    ):
        assert line in out
