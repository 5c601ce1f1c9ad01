"""Files of the original implementation and of other tools: class names, tokens, LoRAs and subsets, there and back."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
import yaml
from diffusers import StableDiffusionImg2ImgPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file

import tiny
from official_layouts import write_aircraft, write_cub
from semantic_aug import meta_csv
from semantic_aug.augmentations import strategies
from semantic_aug.augmentations.engine import Engine
from semantic_aug.augmentations.model import ModelFiles, Prompts, check_model
from semantic_aug.classify.config import ClassifyConfig, ModelSettings, PlacementSettings
from semantic_aug.classify.inference import load
from semantic_aug.classify.models import initial_model, make_model
from semantic_aug.datasets import Setting, find_spec, load_dataset
from semantic_aug.datasets.synthetic import read_subset
from semantic_aug.diffusion import convert, tokens
from semantic_aug.diffusion.base import load_base
from semantic_aug.diffusion.schedulers import SolverSettings, make_scheduler
from semantic_aug.errors import UserError
from semantic_aug.evaluation.quality import export, export_formats
from semantic_aug.prompts import ClassIndex, clean_class_name, original_name
from semantic_aug.registry import checkpoint
from semantic_aug.sampling.files import TaskPaths
from semantic_aug.sampling.job import Weights
from semantic_aug.sampling.plan import PlanSettings, make_plan
from semantic_aug.seeding import task_rng
from semantic_aug.tensors import save_tensors

# ------------------------------------------------------------------------------------------------------- class names

SPELLED = [  # data set, source spelling, the authors' spelling
    ("cub", "001.Black_footed_Albatross", "Black footed Albatross"),
    ("cub", "067.Anna_Hummingbird", "Anna_Hummingbird"),
    ("dog", "n02085620-Chihuahua", "Chihuahua"),
    ("dog", "n02089078-black-and-tan_coonhound", "black-and-tan coonhound"),
    ("pascal", "aeroplane", "airplane"),
    ("pascal", "diningtable", "dining table"),
    ("aircraft", "F-16A/B", "F-16A B"),
    ("car", "Ram C/V Cargo Van Minivan 2012", "Ram C V Cargo Van Minivan 2012"),
]


def index_of(dataset: str, names) -> ClassIndex:
    """The classes of a data set in its own spelling and in that of its prompts."""
    spec = find_spec(dataset)
    return ClassIndex(
        names, [clean_class_name(name, spec.class_name_rules, spec.class_name_overrides) for name in names]
    )


@pytest.mark.parametrize(("dataset", "source", "theirs"), SPELLED)
def test_a_class_is_found_by_the_authors_spelling(dataset, source, theirs):
    names = [name for other, name, _ in SPELLED if other == dataset]
    assert index_of(dataset, names).find(theirs, where="file") == names.index(source)


def test_classes_are_matched_both_ways_between_copies():
    official = ("003.Sooty_Albatross", "001.Black_footed_Albatross")
    assert ClassIndex(official).match(("Black footed Albatross", "Sooty-Albatross"), where="f") == [1, 0]
    assert index_of("cub", official).match(("Black Footed Albatross",), where="f") == [1]
    assert ClassIndex(("Black footed Albatross",)).match(official, where="f") == [None, 0]


def test_the_closest_spelling_counts_and_numbers_that_are_names_stay():
    assert ClassIndex(("red_fox", "Red Fox")).find("Red Fox", where="f") == 1
    assert ClassIndex(("tv", "television")).find("tv", "television", where="f") == 0  # the source's name comes first
    planes = ("737-200", "727-200", "767-300")
    assert ClassIndex(planes).match(("727-200", "767 300", "757-200"), where="f") == [1, 2, None]


def test_a_class_that_may_be_either_of_two_is_refused_by_both_names():
    with pytest.raises(UserError, match="^t.bin: class 'Red fox' may be 'red fox' or 'red_fox', which differ only"):
        ClassIndex(("red fox", "red_fox")).find("Red fox", where="t.bin")
    with pytest.raises(UserError, match="^t.bin: the classes '1.toad' and '2.toad' are both spelled like 'toad'"):
        ClassIndex(("toad",)).match(("1.toad", "2.toad"), where="t.bin")


# ------------------------------------------------------------------------------------------------------------ subsets

PLANES = ("707-320", "F-16A/B", "MD-11")
NAME = re.compile(r"(.+)-(\d+)-(.+)\.png")


def write_planes(folder: Path, variant: str = "meta.csv") -> Path:
    """Twelve images between three aircraft in the original's layout and spelling."""
    folders = [name.replace("/", "_") for name in PLANES]
    lines = ["First Directory,Second Directory,Number,Strength,Path"]
    for number in range(12):
        source, target, strength = number % 3, number // 3 % 3, (0.3, 0.7, 1.0)[number % 3]
        path = f"{folders[source]}/{folders[target]}-{number:06d}-{strength}.png"
        (folder / "data" / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (10 * number, 20 * source, 20 * target)).save(folder / "data" / path)
        names = (folders[label].replace("_", " ") for label in (source, target))
        lines.append(f"{','.join(names)},{number},{strength},{path}")
    (folder / variant).write_text("\n".join(lines) + "\n")
    return folder


def read_as_the_original(folder: Path, label_of: dict[str, int]) -> list[tuple]:
    """(source, target, strength, pixels) as its dataset classes read a subset: through the five columns."""
    table = pandas.read_csv(folder / "meta.csv")
    assert list(table.columns) == ["First Directory", "Second Directory", "Number", "Strength", "Path"]
    labels = [(label_of[a], label_of[b]) for a, b in zip(table.iloc[:, 0], table.iloc[:, 1], strict=True)]
    images = [np.asarray(Image.open(folder / "data" / path).convert("RGB")) for path in table["Path"]]
    return [(*pair, float(s), image) for pair, s, image in zip(labels, table["Strength"], images, strict=True)]


def listed_as_the_original(folder: Path) -> set[tuple]:
    """The rows that its scripts/compose_syn_data.py makes of folder and file names alone."""
    rows = set()
    for path in (folder / "data").rglob("*.png"):
        target, number, strength = NAME.fullmatch(path.name).groups()
        source = path.parent.name.replace("_", " ")
        place = path.relative_to(folder / "data").as_posix()
        rows.add((source, target.replace("_", " "), int(number), float(strength), place))
    return rows


@pytest.fixture
def planes(tmp_path, monkeypatch):
    write_aircraft(tmp_path / "official")
    monkeypatch.setenv("AIRCRAFT_ROOT", str(tmp_path / "official"))
    return load_dataset("aircraft")


def test_a_subset_goes_there_and_back(planes, tmp_path):
    argv = ["--dataset", "aircraft", "--syndata_dir", str(write_planes(tmp_path / "theirs")), "--format", "original"]
    assert export.main([*argv, "--output_dir", str(tmp_path / "ours")]) == 0
    first, again = (read_subset(tmp_path / name, planes) for name in ("theirs", "ours"))
    assert np.array_equal(first.labels(0.5, 3), again.labels(0.5, 3)) and len(again) == 12
    table = pandas.read_csv(tmp_path / "ours" / "meta.csv")
    assert set(table["First Directory"]) == {"707-320", "F-16A B", "MD-11"}
    assert listed_as_the_original(tmp_path / "ours") == set(table.itertuples(index=False, name=None))
    label_of = {name.replace("/", " "): label for label, name in enumerate(PLANES)}  # as its aircraft class has it
    rows = read_as_the_original(tmp_path / "ours", label_of)
    assert [row[:3] for row in rows] == [*zip(first.source, first.target, first.strength, strict=True)]
    assert all(np.array_equal(row[3], np.asarray(first.image(i))) for i, row in enumerate(rows))


def write_own(folder: Path, planes) -> Path:
    """The same subset as stage 2 writes it."""
    folders, spelled, rows = meta_csv.slugs(PLANES), meta_csv.without_slashes(PLANES), []
    for number in range(12):
        source, target, strength = number % 3, number // 3 % 3, (0.3, 0.7, 1.0)[number % 3]
        path = meta_csv.relative_path(folders[source], folders[target], number, strength)
        (folder / "data" / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (10 * number, 20 * source, 20 * target)).save(folder / "data" / path)
        key = planes.train.keys[int(np.flatnonzero(planes.train.labels == source)[0])]
        rows.append((spelled[source], spelled[target], number, strength, path, key, 0))
    meta_csv.write(folder / "meta.csv", rows)
    return folder


def compose(folder: Path, kept: int) -> None:
    """As its scripts/compose_syn_data.py does: some images of a folder alone, and a list made of their names."""
    for path in sorted((folder / "data").rglob("*.png"))[kept:]:
        path.unlink()
    columns = ["First Directory", "Second Directory", "Number", "Strength", "Path"]
    pandas.DataFrame(sorted(listed_as_the_original(folder)), columns=columns).to_csv(folder / "meta.csv", index=False)


def test_its_classes_read_our_folder_and_its_script_composes_the_export(planes, tmp_path):
    own = write_own(tmp_path / "own", planes)
    subset, label_of = read_subset(own, planes), {name.replace("/", " "): label for label, name in enumerate(PLANES)}
    table = pandas.read_csv(own / "meta.csv")
    assert [label_of[name] for name in table["First Directory"]] == subset.source.tolist()
    assert [label_of[name] for name in table["Second Directory"]] == subset.target.tolist()
    for index in (True, False):  # as its filter writes what it keeps, rows' numbers before them or not
        table[np.arange(12) > 1].to_csv(own / "meta_10-100per.csv", index=index)
        filtered = read_subset(f"{own}#10-100per", planes)
        assert np.array_equal(filtered.labels(0.5, 3), subset.labels(0.5, 3)[2:]) and filtered.paths == subset.paths[2:]
    argv = ["--dataset", "aircraft", "--syndata_dir", str(own), "--format", "original"]
    assert export.main([*argv, "--output_dir", str(tmp_path / "export")]) == 0
    compose(tmp_path / "export", 7)
    composed = read_subset(tmp_path / "export", planes)
    rows = read_as_the_original(tmp_path / "export", label_of)  # every class name is one that it knows
    assert [row[:3] for row in rows] == [*zip(composed.source, composed.target, composed.strength, strict=True)]
    colours = [tuple(row[3][0, 0] // 20) for row in rows]
    assert len(rows) == 7 and all(colour[1:] == row[:2] for colour, row in zip(colours, rows, strict=True))
    compose(own, 7)  # its script names classes by our folders then; we find them, its classes do not
    assert np.array_equal(read_subset(own, planes).labels(0.5, 3), composed.labels(0.5, 3))
    assert "F-16A-B" in set(pandas.read_csv(own / "meta.csv")["First Directory"])


def test_the_originals_names_of_the_classes():
    for dataset, source, theirs in SPELLED:
        assert original_name(source, dataset) == theirs.replace("Anna_Humm", "Anna Humm")
    assert original_name("cyclamen", "flower") == "cyclamen "  # its list has the space
    assert original_name("Faces_easy", "caltech") == "faces easy"


def test_real_images_and_classes_of_one_folder_do_not_fit_that_layout(planes, tmp_path):
    argv = ["--dataset", "aircraft", "--syndata_dir", str(write_planes(tmp_path / "theirs")), "--format", "original"]
    with pytest.raises(UserError, match="--with_real with --format original"):
        export.main([*argv, "--with_real", "--output_dir", str(tmp_path / "ours")])
    with pytest.raises(UserError, match="class 'a_b' shares the folder"):
        export_formats.original_folders(["a b", "a_b"])
    assert not (tmp_path / "ours").exists()


def test_stage_2_spells_a_slash_as_the_original_does():
    row = strategies.find("diff-mix")
    settings = PlanSettings(strategy=row, strengths=(0.7,), multiplier=1, batch_size=2, seed=0)
    plan = make_plan(np.arange(6) % 3, [str(i) for i in range(6)], 3, settings)
    paths = TaskPaths(plan, PLANES, meta_csv.slugs(PLANES), [str(i) for i in range(6)], 0)
    assert {row[0] for row in paths.meta_rows(np.arange(6))} == {"707-320", "F-16A B", "MD-11"}
    assert meta_csv.without_slashes(["a/b", "a b"]) == ["a/b", "a b"]


def test_the_originals_filtered_list_is_a_variant(planes, tmp_path):
    folder = write_planes(tmp_path / "theirs", "meta_10-100per.csv")
    assert len(read_subset(f"{folder}#10-100per", planes)) == 12
    with pytest.raises(UserError, match="10-100per"):
        read_subset(f"{folder}#90-100per", planes)


# ------------------------------------------------------------------------------------------- tokens and LoRA, as images

BIRDS = ("Black footed Albatross", "Laysan Albatross", "Sooty Albatross")


def vectors(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, tiny.WIDTH, generator=torch.Generator().manual_seed(seed))


def write_original(folder: Path, base: Path) -> Path:
    """A checkpoint as the original's stage 1 leaves it: its last state, and that of step 10."""
    generator = torch.Generator().manual_seed(4)
    unet, state = UNet2DConditionModel.from_pretrained(base / "unet"), {}
    for name, module in unet.named_modules():
        projection = next((p for p in ("to_q", "to_k", "to_v", "to_out.0") if name.endswith(f".{p}")), None)
        if projection:
            stem = f"{name.removesuffix(projection)}processor.{projection.removesuffix('.0')}_lora"
            state[f"{stem}.down.weight"] = torch.randn(3, module.in_features, generator=generator) * 0.2
            state[f"{stem}.up.weight"] = torch.randn(module.out_features, 3, generator=generator) * 0.2
    placeholder_of = {name.replace(" ", "_"): f"<class_{i}>" for i, name in enumerate(BIRDS)}
    content = {
        "learned_embeds_dict": dict(zip(placeholder_of.values(), vectors(3), strict=True)),
        "name2placeholder": placeholder_of,
        "placeholder2name": {placeholder: name for name, placeholder in placeholder_of.items()},
    }
    (folder / "checkpoint-10").mkdir(parents=True)
    save_file(state, folder / "pytorch_lora_weights.safetensors")
    torch.save(state, folder / "checkpoint-10" / "pytorch_model.bin")
    for step in ("last", 10):
        torch.save(content, folder / f"learned_embeds-steps-{step}.bin")
    return folder


def images_of_the_original(base: Path, folder: Path, sources, prompts, strengths) -> list[np.ndarray]:
    """Translations by the plain pipeline, with tokens and LoRA put in as the original's augmentation does."""
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(base, safety_checker=None)
    content = torch.load(folder / "learned_embeds-steps-last.bin", weights_only=True)
    for token, vector in content["learned_embeds_dict"].items():
        assert pipe.tokenizer.add_tokens(token) == 1
        pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
        table = pipe.text_encoder.get_input_embeddings().weight.data
        table[pipe.tokenizer.convert_tokens_to_ids(token)] = vector
    state = torch.load(folder / "checkpoint-10" / "pytorch_model.bin", weights_only=True)
    pipe.unet.load_lora_adapter(state, prefix=None)  # today's load_lora_weights no longer knows these names
    pipe.scheduler = make_scheduler(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 6, "guidance_scale": 4.0, "output_type": "np"}
    created = [
        pipe(prompt, image=image, strength=s, generator=[task_rng(0, i)], **options).images[0]
        for i, (image, prompt, s) in enumerate(zip(sources, prompts, strengths, strict=True))
    ]
    return [(255 * image).round().astype(np.uint8) for image in created]


def differences(created, wanted) -> np.ndarray:
    """In grey levels, by image."""
    return np.stack([np.abs(a.astype(int) - b.astype(int)) for a, b in zip(created, wanted, strict=True)])


@pytest.fixture
def cub(tmp_path, monkeypatch):
    write_cub(tmp_path / "cub")
    monkeypatch.setenv("CUB_ROOT", str(tmp_path / "cub"))
    return load_dataset("cub")


def prompts_of(dataset) -> Prompts:
    return Prompts(dataset.source_names, dataset.class_names, dataset.spec.super_class)


def test_both_layouts_make_the_images_of_the_plain_pipeline(tiny_base, cub, tmp_path):
    folder, strengths = write_original(tmp_path / "theirs", tiny_base), (0.5, 0.9, 1.0)
    sources = [tiny.picture(i, i, (tiny.RESOLUTION,) * 2) for i in range(3)]
    output = [f"a photo of a <class_{(i + 1) % 3}> bird" for i in range(3)]
    wanted = images_of_the_original(tiny_base, folder, sources, output, strengths)
    for lora, step in ((folder / "pytorch_lora_weights.safetensors", "last"), (folder / "checkpoint-10", 10)):
        files = ModelFiles("tiny", tiny_base, lora, folder / f"learned_embeds-steps-{step}.bin")
        engine = Engine(files, prompts_of(cub), SolverSettings(6, 4.0), tiny.RESOLUTION)
        assert engine.prompts[1] == output[0]
        generators = [task_rng(0, i) for i in range(3)]
        created = engine.translate(engine.encode(sources), [1, 2, 0], strengths, generators).numpy()
        assert differences(created, wanted).max() <= 1
    for changes in ({"lora": None}, {"tokens": None}):  # each file shows in the images
        engine = Engine(replace(files, **changes), prompts_of(cub), SolverSettings(6, 4.0), tiny.RESOLUTION)
        created = engine.translate(
            engine.encode(sources), [1, 2, 0], strengths, [task_rng(0, i) for i in range(3)]
        ).numpy()
        assert differences(created, wanted)[2].max() > 1


def test_our_checkpoint_in_their_layout_has_their_names(tmp_path):
    names = ("003.Sooty_Albatross", "001.Black_footed_Albatross")
    tiny.write_tokens(tmp_path / "ours.safetensors", names)
    convert.convert(None, tmp_path / "ours.safetensors", tmp_path / "out", "original")
    content = torch.load(tmp_path / "out" / "learned_embeds-steps-last.bin", weights_only=True)
    # the original's loader spells the keys so, and looks a class up by its name in the hub's copy
    assert {name.replace("/", " ").replace("_", " "): v for name, v in content["name2placeholder"].items()} == {
        "Sooty Albatross": "<class_0>", "Black footed Albatross": "<class_1>",
    }  # fmt: skip
    back = tokens.load_tokens(tmp_path / "out").for_classes(names, names, "file")
    first = tokens.load_tokens(tmp_path / "ours.safetensors")
    assert torch.equal(back.vectors, first.vectors) and [back.phrase(n) for n in names] == ["<class_0>", "<class_1>"]
    tiny.write_tokens(tmp_path / "twice.safetensors", ("1.toad", "2.toad"))
    with pytest.raises(UserError, match="two classes would be 'toad'"):
        convert.convert(None, tmp_path / "twice.safetensors", tmp_path / "no", "original")


# ---------------------------------------------------------------------------------------------- tokens of other tools

THINGS = ("aeroplane", "diningtable", "tvmonitor")
THINGS_SPOKEN = ("airplane", "dining table", "television")


def write_da_fusion(folder: Path, merged: bool) -> Path:
    """Its tokens: a .bin in each class's folder, or the .pt that its script merges them into."""
    entries = {f"<{name.replace(' ', '_')}>": v for name, v in zip(THINGS_SPOKEN, vectors(3), strict=True)}
    folder.mkdir()
    if merged:
        torch.save(entries, folder / "pascal-0-4.pt")
    else:
        for placeholder, vector in entries.items():
            (folder / placeholder[1:-1]).mkdir()
            torch.save({placeholder: vector}, folder / placeholder[1:-1] / "learned_embeds.bin")
    return folder


@pytest.mark.parametrize("merged", [True, False])
def test_tokens_of_da_fusion(tiny_base, tmp_path, merged):
    folder = write_da_fusion(tmp_path / "tokens", merged)
    learned = tokens.load_tokens(folder).for_classes(THINGS, THINGS_SPOKEN, "file")
    assert [learned.phrase(name) for name in THINGS] == ["<airplane>", "<dining_table>", "<television>"]
    for row, name in enumerate(THINGS):
        assert torch.equal(learned.vectors[learned.class_names.index(name)], vectors(3)[row])
    entry = {"model_path": str(tiny_base), "lora_path": None, "embed_path": str(folder)}
    (tmp_path / "finetuned_ckpts.yaml").write_text(yaml.safe_dump({"pascal": {"theirs": entry}}))
    files = ModelFiles("tiny", tiny_base, tokens=checkpoint("pascal", "theirs", tmp_path).embed_path)
    check_model(files, Prompts(THINGS, THINGS_SPOKEN))
    before, changed = Weights.of(files), next(path for path in sorted(folder.rglob("*.*")) if path.is_file())
    torch.save({name: 2 * vector for name, vector in torch.load(changed, weights_only=True).items()}, changed)
    assert Weights.of(files).tokens != before.tokens


def test_placeholders_that_differ_in_letter_case_are_tokens_of_their_own(tiny_base, tmp_path):
    save_file({"<É>": vectors(2)[0], "<é>": vectors(2)[1]}, tmp_path / "letters.safetensors")
    learned, model = tokens.load_tokens(tmp_path / "letters.safetensors"), load_base(str(tiny_base))
    first = len(model.tokenizer)
    tokens.install(learned, model.tokenizers, model.text_encoders)
    ids = [model.tokenizer(f"a photo of a {placeholder} sign").input_ids for placeholder in ("<É>", "<é>")]
    looked_up = [model.text_encoder.get_input_embeddings()(torch.tensor(row))[row.index(max(row))] for row in ids]
    assert [max(row) for row in ids] == [first + learned.class_names.index(name) for name in "Éé"]
    assert all(map(torch.equal, looked_up, vectors(2)))


def test_tokens_of_da_fusion_that_do_not_belong_together(tmp_path):
    folder = write_da_fusion(tmp_path / "tokens", merged=True)
    torch.save({"<airplane>": torch.zeros(tiny.WIDTH)}, folder / "pascal-1-4.pt")
    with pytest.raises(UserError, match="pascal-0-4.pt and pascal-1-4.pt both hold '<airplane>': name one file"):
        tokens.load_tokens(folder)
    torch.save({"<lamp>": torch.zeros(7)}, folder / "pascal-1-4.pt")
    with pytest.raises(UserError, match="its 2 files differ in their layout"):
        tokens.load_tokens(folder)
    torch.save({"conv.weight": torch.zeros(7)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="has another layout .its entries are conv.weight"):
        tokens.load_tokens(tmp_path / "other.pt")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="holds no class tokens: expected learned_embeds.safetensors or"):
        tokens.load_tokens(tmp_path / "none")


def test_tokens_of_unidiffda(tmp_path):
    save_file({"learned_embeds": vectors(6)}, tmp_path / "learned_embeds.safetensors", {"format": "pt"})
    learned = tokens.load_tokens(tmp_path).for_classes(THINGS, THINGS_SPOKEN, "file")
    assert learned.vectors_per_class == 2 and learned.phrase("diningtable") == "<class_1> <class_1_1>"
    assert torch.equal(learned.vectors, vectors(6))
    with pytest.raises(UserError, match="file holds 6 vectors without the names .* the data set has 4 classes"):
        tokens.load_tokens(tmp_path).for_classes("abcd", "abcd", "file")
    with pytest.raises(UserError, match="do not name their classes"):
        convert.convert(None, tmp_path, tmp_path / "out", "original")


def test_tokens_of_several_vectors_as_diffusers_saves_them(tmp_path):
    save_file({"<lamp>": vectors(2)}, tmp_path / "learned_embeds.safetensors")
    learned = tokens.load_tokens(tmp_path / "learned_embeds.safetensors").for_classes(("Lamp",), ("Lamp",), "file")
    assert learned.phrase("Lamp") == "<lamp> <lamp>_1" and torch.equal(learned.vectors, vectors(2))


def test_leafy_spurge_is_read_by_its_configuration(tmp_path):
    """Its layout on the hub: the configurations crop and context, a label and the place of each photograph."""
    import datasets as hub

    features = hub.Features(
        {"image": hub.Image(), "label": hub.ClassLabel(names=["not_spurge", "spurge"]), "idx": hub.Value("int64"),
         "latitude": hub.Value("float64"), "cluster": hub.Value("int64")}
    )  # fmt: skip
    for config, side in (("crop", 39), ("context", 64)):
        for split, count in (("train", 4), ("test", 2)):
            columns = {
                "image": [tiny.picture(i % 2, i, (side, side)) for i in range(count)],
                "label": [i % 2 for i in range(count)], "idx": list(range(count)),
                "latitude": [46.7] * count, "cluster": [1] * count,
            }  # fmt: skip
            (tmp_path / config).mkdir(exist_ok=True)
            file = tmp_path / config / f"{split}-00000-of-00001.parquet"
            hub.Dataset.from_dict(columns, features=features).to_parquet(str(file))
    entries = [
        {"config_name": c, "data_files": [{"split": s, "path": f"{c}/{s}-*"} for s in ("train", "test")]}
        for c in ("crop", "context")
    ]
    (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': entries})}---\n")
    read = load_dataset(f"hf:{tmp_path}:context", Setting(val_fraction=0))
    assert read.class_names == ("not spurge", "spurge") and read.train.image(0).size == (64, 64)
    assert len(read.train) == 4 and len(read.test) == 2
    with pytest.raises(UserError, match="has the configurations .*crop"):
        load_dataset(f"hf:{tmp_path}")


# --------------------------------------------------------------------------------------------------------- classifiers


def test_a_classifiers_head_starts_in_the_class_order_of_another_copy(cub, tmp_path):
    trained, _ = make_model("test_vit", 3, 32, "none")
    head = dict(trained.get_classifier().named_parameters())
    for names, order in ((BIRDS[::-1], [2, 1, 0]), (("owl", "toad", "newt"), [0, 1, 2])):  # others: as they are
        save_tensors(tmp_path / "model.safetensors", trained.state_dict(), {"classes": names})
        settings = ModelSettings(model="test_vit", res_mode=32, weights=str(tmp_path))
        model, _ = initial_model(settings, cub)
        for key, value in model.get_classifier().named_parameters():
            assert torch.equal(value, head[key][order])


def test_the_originals_classifier_is_read_in_the_data_sets_order(cub, tmp_path):
    trained, _ = make_model("resnet18", 3, 32, "none")
    torch.save(trained.state_dict(), tmp_path / "max_acc.pth", _use_new_zipfile_serialization=False)
    settings = ModelSettings(model="resnet18", res_mode=32, weights=str(tmp_path / "max_acc.pth"))
    placement = PlacementSettings(gpu="cpu", output_dir=tmp_path)
    classifier = load(ClassifyConfig(dataset="cub", classifier=settings, placement=placement), cub)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert classifier.class_names == cub.source_names
    assert torch.allclose(classifier.model(x), trained.eval()(x), atol=1e-5)
