"""Random damage to everything a user hands over: one line or the right images, never a traceback, never fewer than said.

Each input is drawn from its number alone, so a failure names what gives it again. All commands run in this process.
``FUZZ=10 pytest tests/test_fuzz.py`` draws ten times as many.
"""

import csv
import io
import os
import random
import re
import shutil
from pathlib import Path

import pytest
import yaml
from helpers import main_here
from PIL import Image

import sample_mp
import tiny
import train_cls
import train_lora
from semantic_aug.datasets.__main__ import main as datasets_main
from semantic_aug.finetune.config import parse
from semantic_aug.finetune.run import resolve

pytestmark = pytest.mark.slow

CLASSES = ("red fox", "blue jay")
CONFIG_FILES = ("datasets.yaml", "finetuned_ckpts.yaml", "synthetic_datasets.yaml")
NASTY = [
    '"',
    "'",
    ",",
    ";",
    ":",
    "\n",
    "\r",
    "\t",
    "{",
    "}",
    "[",
    "]",
    "#",
    "&",
    "*",
    "!",
    "|",
    ">",
    "%",
    "\\",
    "/",
    "-",
    "~",
]
NASTY += ["\0", "\ufeff", "\xe9", "\u0301", "\ud7ff", " ", "..", "null", "yes", "0", "-1", "1e999", "nan", "<<", "? "]


# ---------------------------------------------------------------------------------------------------------------- damage


def damaged_bytes(content: bytes, rng: random.Random) -> bytes:
    """A file after one or two accidents of disks, copies and transfers."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 2)):
        start = rng.randrange(len(data) + 1)
        end = min(len(data), start + rng.choice((1, 2, 8, 64, 512)))
        kind = rng.randrange(8)
        if kind == 0:  # flipped bits
            for position in rng.sample(range(len(data)), min(len(data), rng.choice((1, 3, 20)))):
                data[position] ^= 1 << rng.randrange(8)
        elif kind == 1:  # cut off
            del data[start:]
        elif kind == 2:  # a lost block
            del data[start:end]
        elif kind == 3:  # a block of zeros
            data[start:end] = bytes(end - start)
        elif kind == 4:  # a block written twice
            data[start:start] = data[start:end]
        elif kind == 5:  # foreign bytes
            data[start:start] = rng.randbytes(rng.choice((1, 7, 100)))
        elif kind == 6:  # the head is damaged
            for position in range(min(len(data), 64)):
                if rng.random() < 0.1:
                    data[position] = rng.randrange(256)
        elif rng.random() < 0.1:  # nothing is left
            data.clear()
    return bytes(data)


def damaged_text(content: str, rng: random.Random) -> bytes:
    """A text file after one to three slips of an editor, a script or a spreadsheet program."""
    lines = content.split("\n")
    for _ in range(rng.randint(1, 3)):
        position = rng.randrange(len(lines))
        line, kind = lines[position], rng.randrange(7)
        at = rng.randrange(len(line) + 1)
        if kind == 0:
            lines[position] = line[:at] + rng.choice(NASTY) + line[at:]
        elif kind == 1:
            lines[position] = line[:at] + rng.choice(NASTY) + line[at + 1 :]
        elif kind == 2:
            del lines[position]
            lines = lines or [""]
        elif kind == 3:
            lines.insert(rng.randrange(len(lines) + 1), line)
        elif kind == 4:
            lines[position] = line[:at]
        elif kind == 5:
            lines[position] = rng.choice(("  ", "\t", "")) + line.strip()
        else:
            lines[position] = line.replace(rng.choice((",", ":", "/", ".")), rng.choice(NASTY), 1)
    encoding = rng.choice(("utf-8", "utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "cp1252", "latin-1"))
    data = rng.choice(("\n", "\n", "\n", "\r\n", "\r")).join(lines).encode(encoding, "replace")
    return damaged_bytes(data, rng) if data and rng.random() < 0.2 else data


# --------------------------------------------------------------------------------------------------------------- running


class Outcome:
    """What one command came to."""

    def __init__(self, main, *argv):
        self.status, self.out, self.err = main_here(main, argv)

    @property
    def line(self) -> str:
        return next((line for line in self.err.splitlines() if line.startswith("error: ")), "")

    def complaint(self, allowed=(0, 2)) -> str | None:
        """What is wrong with the way it ended, or None."""
        if self.status not in allowed:
            return f"status {self.status}: {self.err[-300:]}"
        if self.status == 2 and (not self.line or len(self.line) > 900):
            return f"status 2 without one clear line: {self.err[-900:]}"
        return "a traceback" if "Traceback" in self.out + self.err else None

    def images(self) -> int:
        """How many images of all splits the command says there are."""
        return sum(int(n) for n in re.findall(r"(?:train|val|test) (\d+)", self.out.split("images:")[1].split("\n")[0]))


def trials(kind: str, count: int, attempt) -> None:
    """Runs ``attempt(rng, number)`` for every number; it returns a complaint or None."""
    failures, count = [], count * int(os.environ.get("FUZZ", "1"))
    for number in range(count):
        try:
            complaint = attempt(random.Random(f"{kind} {number}"), number)
        except Exception as error:  # what a user would see as a traceback
            complaint = f"{type(error).__name__}: {error}"
        if complaint:
            failures.append(f"{kind} {number}: {complaint}")
    assert not failures, f"{len(failures)} of {count}:\n" + "\n".join(failures[:8])


@pytest.fixture(scope="module")
def house(tmp_path_factory, tiny_base):
    """Base model, pictures in several formats, checkpoint, subset, list, and registry files that name them."""
    folder = tmp_path_factory.mktemp("fuzz")
    pictures = folder / "animals"
    endings = ("png", "jpg", "webp", "bmp", "tif", "gif")
    for label, name in enumerate(CLASSES):
        (pictures / name).mkdir(parents=True)
        for index, ending in enumerate(endings):
            tiny.picture(label, index, (24, 20)).save(pictures / name / f"{index}.{ending}")
    tiny.write_lora(folder / "ck" / "pytorch_lora_weights.safetensors", tiny_base)
    tiny.write_tokens(folder / "ck" / "learned_embeds.safetensors", CLASSES)
    rows = [(a, b, 0.7) for a, b in ((CLASSES[0], CLASSES[1]), (CLASSES[1], CLASSES[0])) for _ in range(3)]
    lines = ["First Directory,Second Directory,Number,Strength,Path"]
    for number, (source, target, strength) in enumerate(rows):
        path = Path(source.replace(" ", "-"), f"{target.replace(' ', '-')}-{number:06d}-{strength}.png")
        (folder / "subset" / "data" / path).parent.mkdir(parents=True, exist_ok=True)
        tiny.picture(number, 1, (24, 24)).save(folder / "subset" / "data" / path)
        lines.append(f"{source},{target},{number},{strength},{path}")
    (folder / "subset" / "meta.csv").write_text("\n".join(lines) + "\n")
    listed = [p.relative_to(folder) for p in sorted(pictures.rglob("*.*"))]
    text = "path,label,caption\n" + "".join(f"{p},{p.parent.name},a photo of {p.stem}\n" for p in listed)
    (folder / "list.csv").write_text(text)
    checkpoint = {
        "model_path": str(tiny_base),
        "lora_path": str(folder / "ck"),
        "embed_path": str(folder / "ck" / "learned_embeds.safetensors"),
    }
    entries = (
        {
            "mine": {
                "folder": str(pictures),
                "super_class": "animal",
                "class_names": {"red fox": "fox"},
                "license": "CC0",
            }
        },
        {"mine": {"ck": checkpoint, "db": {**checkpoint, "embed_path": None}}},
        {"mine": {"s": str(folder / "subset"), "both": [str(folder / "subset"), str(folder / "subset")]}},
    )
    (folder / "config").mkdir()
    for name, entry in zip(CONFIG_FILES, entries, strict=True):
        (folder / "config" / name).write_text(yaml.safe_dump(entry, sort_keys=False))
    return folder


def classify(folder: Path, *argv, config: Path | None = None) -> Outcome:
    """``train_cls.py --dry_run``."""
    flags = (
        "--model",
        "test_vit",
        "--weights",
        "none",
        "--res_mode",
        32,
        "--nepoch",
        1,
        "--batch_size",
        4,
        "--gpu",
        "cpu",
    )
    where = ("--config_dir", config or folder / "config", "--output_dir", folder / "out", "--val_fraction", 0)
    return Outcome(train_cls.main, *flags, *where, "--dry_run", *argv)


def sample(folder: Path, *argv, config: Path | None = None) -> Outcome:
    """``sample_mp.py --dry_run``."""
    flags = (
        "--gpu_ids",
        "cpu",
        "--num_inference_steps",
        4,
        "--syn_dataset_multiplier",
        1,
        "--output_root",
        folder / "out",
    )
    return Outcome(
        sample_mp.main, *flags, "--config_dir", config or folder / "config", "--val_fraction", 0, "--dry_run", *argv
    )


def finetune(folder: Path, base: Path, *argv, config: Path | None = None) -> Outcome:
    """``train_lora.py --dry_run``."""
    flags = ("--pretrained_model_name_or_path", base, "--report_to", "none", "--output_dir", folder / "out")
    return Outcome(
        train_lora.main, *flags, "--config_dir", config or folder / "config", "--val_fraction", 0, "--dry_run", *argv
    )


def check(folder: Path, word: str, config: Path | None = None) -> Outcome:
    """``python -m semantic_aug.datasets check``."""
    config = config or folder / "config"
    return Outcome(
        datasets_main, "--config_dir", config, "check", word, "--output_dir", folder / "check", "--workers", 1
    )


def counted(outcome: Outcome) -> int:
    """How many images ``check`` says there are."""
    return sum(map(int, re.findall(r"^  (?:train|val|test) +(\d+) images", outcome.out, re.MULTILINE)))


def test_nothing_is_wrong_with_what_is_damaged(house, tiny_base):
    assert check(house, "mine").status == 0 and counted(check(house, f"csv:{house}/list.csv")) == 12
    assert sample(house, "--dataset", "mine", "--finetune_model_key", "ck").status == 0
    assert finetune(house, tiny_base, "--dataset", "mine").images() == 12
    assert "6 images of" in classify(house, "--dataset", "mine", "--syndata_key", "s").out
    assert not (house / "out").exists()


# ----------------------------------------------------------------------------------------------------------------- kinds


def decodes(path: Path) -> bool:
    """Whether Pillow alone reads all of an image's pixels."""
    try:
        with Image.open(path) as image:
            image.load()
    except Exception:
        return False
    return True


def test_damaged_images(house, tmp_path):
    pictures = tmp_path / "animals"
    shutil.copytree(house / "animals", pictures)
    originals = {path: path.read_bytes() for path in sorted(pictures.rglob("*.*"))}

    def attempt(rng, number):
        path = rng.choice(list(originals))
        path.write_bytes(damaged_bytes(originals[path], rng))
        outcome = check(house, f"folder:{pictures}")
        whole = decodes(path)
        path.write_bytes(originals[path])
        if complaint := outcome.complaint((0, 1, 2)):
            return complaint
        output = outcome.out + outcome.err
        if outcome.status == 0 and not whole:
            return f"{path.name} does not decode, check passes"
        if path.name not in output and (counted(outcome) != 12 if outcome.status < 2 else True):
            return f"{path.name} is not named: {output[-300:]}"
        return None

    trials("image", 120, attempt)


def test_damaged_lists(house, tiny_base):
    content = (house / "list.csv").read_text()
    path = house / "damaged.csv"

    def attempt(rng, number):
        path.write_bytes(damaged_text(content, rng))
        word = f"csv:{path}"
        if number % 4 == 0:
            outcome = check(house, word)
            if outcome.status == 1:  # a problem, which is named
                return outcome.complaint((1,)) or (None if "PROBLEM" in outcome.out else "status 1 without a problem")
            output = counted(outcome) if outcome.status == 0 else 0
        else:
            run = (classify, sample, lambda folder, *argv: finetune(folder, tiny_base, *argv))[number % 4 - 1]
            more = ("--sample_strategy", "real-mix", "--model_path", tiny_base) if number % 4 == 2 else ()
            outcome = run(house, "--dataset", word, *more)
            output = outcome.images() if outcome.status == 0 else 0
        if complaint := outcome.complaint():
            return complaint
        if outcome.status == 0 and output < rows_of(path) and not outcome.err.strip():
            return f"{rows_of(path)} rows, {output} images, without a word"
        return None

    trials("list", 240, attempt)


def rows_of(path: Path) -> int:
    """Records below the header of a list that a plain CSV reader finds."""
    data = path.read_bytes()
    encodings = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16", b"\xef\xbb": "utf-8-sig"}
    try:
        text = data.decode(encodings.get(data[:2], "utf-8"))
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    return len([row for row in csv.reader(io.StringIO(text, newline=""), strict=False) if any(map(str.strip, row))]) - 1


def test_damaged_lists_of_unlabelled_images(house, tiny_base, tmp_path):
    for index in range(6):
        tiny.picture(5, index, (24, 20)).save(tmp_path / f"{index}.png")
    content, path = (
        "path,taken\n" + "".join(f"{index}.png,2026-11-{index}\n" for index in range(6)),
        tmp_path / "pool.csv",
    )
    argv = ("--dataset", "mine", "--config_dir", house / "config", "--pretrained_model_name_or_path", tiny_base)

    def resolved(arguments):
        print(f"images: train {len(resolve(parse(arguments))[1].unlabelled)}")
        return 0

    def attempt(rng, number):
        path.write_bytes(damaged_text(content, rng))
        outcome = Outcome(resolved, *argv, "--val_fraction", 0, "--report_to", "none", "--unlabelled", path)
        if complaint := outcome.complaint():
            return complaint
        return None if outcome.status or outcome.images() <= 6 else f"{outcome.images()} of 6 images"

    trials("pool", 60, attempt)


def test_damaged_registry_files(house, tmp_path, tiny_base):
    config = tmp_path / "config"
    shutil.copytree(house / "config", config)
    originals = {name: (config / name).read_text() for name in CONFIG_FILES}

    def attempt(rng, number):
        name = CONFIG_FILES[number % 3]
        (config / name).write_bytes(damaged_text(originals[name], rng))
        try:
            if name == "finetuned_ckpts.yaml":
                argv = ("--dataset", "mine", "--finetune_model_key", rng.choice(("ck", "db")))
                outcome = sample(house, *argv, config=config)
                wanted = " 12 images (1 x 12"
            elif name == "synthetic_datasets.yaml":
                key = rng.choice(("s", "both"))
                outcome = classify(house, "--dataset", "mine", "--syndata_key", key, config=config)
                wanted = "images of"  # a line written twice lists a subset once more
            else:
                run = rng.choice((classify, lambda folder, *w, **k: finetune(folder, tiny_base, *w, **k)))
                outcome = run(house, "--dataset", "mine", config=config)
                wanted = "train 12"
        finally:
            (config / name).write_text(originals[name])
        if complaint := outcome.complaint():
            return complaint
        if outcome.status == 0 and wanted.strip() not in outcome.out and "12 images" not in outcome.out:
            return f"other images than the registry's: {outcome.out[:200]}"
        return None

    trials("registry", 240, attempt)


def test_damaged_parquet(house, tmp_path):
    import datasets as hub

    features = hub.Features({"image": hub.Image(), "label": hub.ClassLabel(names=list(CLASSES))})
    encoded = [{"bytes": path.read_bytes(), "path": None} for path in sorted((house / "animals").rglob("*.png"))]
    data = {"image": encoded * 4, "label": [0, 1] * 4}
    path = tmp_path / "copy" / "train-00000-of-00001.parquet"
    path.parent.mkdir()
    hub.Dataset.from_dict(data, features=features).to_parquet(path)
    content = path.read_bytes()

    def attempt(rng, number):
        path.write_bytes(damaged_bytes(content, rng))
        outcome = check(house, f"hf:{path.parent}")
        if complaint := outcome.complaint((0, 1, 2)):
            return complaint
        return None if outcome.status or counted(outcome) == 8 else f"{counted(outcome)} of 8 rows, check passes"

    trials("parquet", 60, attempt)


def test_damaged_weights(house, tmp_path):
    import timm
    from safetensors.torch import save_file

    folder = tmp_path / "ck"
    shutil.copytree(house / "ck", folder)
    entries = yaml.safe_load((house / "config" / "finetuned_ckpts.yaml").read_text())["mine"]["ck"]
    entries |= {"lora_path": str(folder), "embed_path": str(folder / "learned_embeds.safetensors")}
    config = tmp_path / "config"
    shutil.copytree(house / "config", config)
    (config / "finetuned_ckpts.yaml").write_text(yaml.safe_dump({"mine": {"ck": entries}}))
    save_file(timm.create_model("test_vit", num_classes=2).state_dict(), folder / "classifier.safetensors")
    originals = {path: path.read_bytes() for path in sorted(folder.iterdir())}

    def attempt(rng, number):
        path = list(originals)[number % len(originals)]
        content = bytearray(originals[path])
        length = 8 + int.from_bytes(content[:8], "little")
        # mostly the header, where damage can be told from other weights
        content = damaged_bytes(bytes(content[:length]), rng) + bytes(content[length:])
        path.write_bytes(content if rng.random() < 0.8 else damaged_bytes(originals[path], rng))
        if path.name == "classifier.safetensors":
            outcome = classify(house, "--dataset", "mine", "--weights", path)
        else:
            outcome = sample(house, "--dataset", "mine", "--finetune_model_key", "ck", config=config)
        path.write_bytes(originals[path])
        return outcome.complaint()

    trials("weights", 120, attempt)


def test_damaged_meta_csv(house, tmp_path):
    subset = tmp_path / "subset"
    shutil.copytree(house / "subset", subset)
    content = (subset / "meta.csv").read_text()

    def attempt(rng, number):
        (subset / "meta.csv").write_bytes(damaged_text(content, rng))
        outcome = classify(house, "--dataset", "mine", "--syndata_dir", subset)
        if complaint := outcome.complaint():
            return complaint
        if outcome.status == 0:
            output = int(re.search(r"synthetic: (\d+) images", outcome.out)[1])
            if output < rows_of(subset / "meta.csv"):
                return f"{rows_of(subset / 'meta.csv')} rows, {output} synthetic images"
        return None

    trials("meta", 160, attempt)
