"""Captions of single images: where they are read from, how the class gets in, and how often they are used."""

import json

import numpy as np
import pytest
import torch

import tiny
from semantic_aug.datasets import load_dataset
from semantic_aug.datasets.readers.notes import collected
from semantic_aug.diffusion import tokens
from semantic_aug.errors import UserError
from semantic_aug.finetune.batches import Captions
from semantic_aug.finetune.config import ImageSettings, parse
from semantic_aug.finetune.run import resolve
from semantic_aug.prompts import caption_prompt
from semantic_aug.sampling.masks import parse_box


@pytest.mark.parametrize(
    ("caption", "wanted"),
    [
        ("an {} on a stone", "a <class_0> animal on a stone"),
        ("an {} beside another {}", "a <class_0> animal beside another <class_0> animal"),
        ("A Red Fox in snow", "A <class_0> animal in snow"),
        ("a red fox animal in snow", "a <class_0> animal in snow"),  # the super-class is in the phrase already
        ("an {} animal and two {}s", "a <class_0> animal and two <class_0> animals"),
        ("a red fox animalcule", "a <class_0> animal animalcule"),
        ("sleeping in the sun", "a photo of a <class_0> animal, sleeping in the sun"),
        ("red foxes at play", "a photo of a <class_0> animal, red foxes at play"),  # a longer word is not the name
    ],
)
def test_the_class_gets_into_a_caption(caption, wanted):
    assert caption_prompt(caption, "<class_0> animal", "red fox", "animal") == wanted


def metadata(folder, rows, header="file_name,caption"):
    (folder / "train" / "metadata.csv").write_text("\n".join([header, *rows]) + "\n")


@pytest.fixture
def captioned(tmp_path):
    folder = tiny.write_image_folder(tmp_path / "animals")
    rows = [
        'red fox/train000.png,"in snow\nasleep"',
        "red fox/train001.png,a red fox at night",
        "toad/train000.png,wet",
    ]
    metadata(folder, rows)
    return folder


def test_a_folders_metadata_gives_captions(captioned):
    table = load_dataset(f"folder:{captioned}").train
    result = dict(zip(table.keys, table.extras["caption"].tolist(), strict=True))
    assert result["train/red fox/train000.png"] == "in snow\nasleep" and result["train/blue jay/train000.png"] == ""
    assert len(table.take([0, 1]).extras["caption"]) == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("red fox/none.png,x", "line 2: 'red fox/none.png' is no image of"),
        ("../val/toad/val000.png,x", "leads outside"),
        ("toad/train000.png,x\ntoad/train000.png,y", "line 3: .* is listed twice"),
    ],
)
def test_bad_rows_of_a_folders_metadata(tmp_path, row, message):
    folder = tiny.write_image_folder(tmp_path / "animals", train=1)
    metadata(folder, [row])
    with pytest.raises(UserError, match=message):
        load_dataset(f"folder:{folder}")


def test_a_metadata_file_about_something_else_is_passed_over(tmp_path):
    folder = tiny.write_image_folder(tmp_path / "animals", train=2)
    metadata(folder, ["a.png,3"], header="file_name,width")
    assert "caption" not in load_dataset(f"folder:{folder}").train.extras


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_a_list_above_the_splits_is_not_passed_over_in_silence(tmp_path, name):
    """The hub's image folders may have one list for all splits; here each split has its own."""
    folder = tiny.write_image_folder(tmp_path / "animals", train=2)
    (folder / name).write_text("file_name,caption\ntrain/toad/train000.png,wet\n")
    with collected() as notes:
        assert "caption" not in load_dataset(f"folder:{folder}").train.extras
    assert [(note.cases, "each split folder has its own" in note.kind) for note in notes] == [((name,), True)]


def test_json_lines_give_captions_boxes_and_masks(tmp_path):
    folder = tiny.write_image_folder(tmp_path / "animals", train=2)
    lines = [
        {"file_name": "toad/train000.png", "text": ["wet", None, "green"], "box": [1, 2, 30, 20]},
        {"file_name": "toad/train001.png", "objects": {"bbox": [[1, 2, 3, 4], [5, 6, 20, 10.5]], "categories": [0, 1]}},
        {"file_name": "red fox/train000.png", "mask": "m.png", "width": 40},
    ]
    (folder / "train/metadata.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    with collected() as notes:
        train = load_dataset(f"folder:{folder}").train
    assert not notes  # the list is read, and so not left out
    columns = [train.extras[name].tolist() for name in ("caption", "box_text", "mask_path")]
    result = dict(zip(train.keys, map(list, zip(*columns, strict=True)), strict=True))
    assert result["train/toad/train000.png"] == ["wet\ngreen", "[1, 2, 30, 20]", ""]
    assert result["train/toad/train001.png"] == ["", "[5, 6, 20, 10.5]", ""]  # the largest of several
    assert result["train/red fox/train000.png"] == ["", "", str(folder / "train/m.png")]
    assert parse_box(result["train/toad/train001.png"][1], "") == (5, 6, 25, 16.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"file_name": "toad/train000.png", "text": "x"}\n[1]', "metadata.jsonl line 2: expected a JSON object"),
        ('{"file_name": "toad/train000.png"', "metadata.jsonl line 1: expected a JSON object"),
        ('{"file_name": "toad/none.png", "text": "x"}', "line 1: 'toad/none.png' is no image of"),
        ('{"file_name": "toad/train000.png", "text": "x"}\n{"text": "y"}', "line 2: no file_name"),
        ('{"file_name": "toad/train000.png", "text": "\\ud83d"}', "line 1: expected a JSON object"),
        ('{"file_name": ' + "[" * 100_000, "line 1: expected a JSON object"),
    ],
)
def test_bad_json_lines_are_named(tmp_path, text, message):
    folder = tiny.write_image_folder(tmp_path / "animals", train=1)
    (folder / "train/metadata.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        load_dataset(f"folder:{folder}")
    metadata(folder, ["toad/train000.png,x"])
    with pytest.raises(UserError, match="holds metadata.csv and metadata.jsonl: remove one"):
        load_dataset(f"folder:{folder}")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_lists_captions_stay_with_their_rows(tmp_path, kind):
    import pyarrow as pa
    from pyarrow import csv, parquet

    folder = tiny.write_image_folder(tmp_path / "animals", val=0, test=0)
    paths = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.png"))[::-1]
    columns = {"path": paths, "label": [p.split("/")[1] for p in paths], "caption": [f"seen in {p}" for p in paths]}
    table = pa.table(columns)
    file = folder / f"list.{kind}"
    csv.write_csv(table, file) if kind == "csv" else parquet.write_table(table, file)
    train = load_dataset(f"csv:{file}").train
    assert [f"seen in {key}" for key in train.keys] == train.extras["caption"].tolist()


def test_captions_of_the_hubs_format(tmp_path):
    import datasets as hub

    rows = hub.Dataset.from_dict(
        {"image": [tiny.picture(i % 2, i) for i in range(4)], "label": [0, 1, 0, 1],
         "description": ["one\ntwo", None, "three", "four"]},
        features=hub.Features({"image": hub.Image(), "label": hub.ClassLabel(names=["a", "b"]),
                               "description": hub.Value("string")}),
    )  # fmt: skip
    rows.save_to_disk(tmp_path / "copy")
    dataset = load_dataset(f"hf:{tmp_path / 'copy'}")
    assert set(dataset.train.extras["caption"].tolist()) <= {"one\ntwo", "", "three", "four"}


def test_the_share_of_class_prompts_and_lines_drawn_evenly(captioned):
    dataset = load_dataset(f"folder:{captioned}")
    learned = tokens.ClassTokens(dataset.source_names, torch.zeros(3, 4))
    captions = Captions(dataset, learned, ImageSettings(class_prompts_ratio=0.25))
    row = dataset.train.keys.index("train/red fox/train000.png")
    bare = dataset.train.keys.index("train/blue jay/train000.png")
    drawn = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    template = torch.zeros(4000, dtype=torch.int64)
    chosen = captions.choose(torch.full((4000,), row), drawn, template)
    texts, counts = np.unique([captions.texts[i] if i >= 0 else "class" for i in chosen.tolist()], return_counts=True)
    shares = dict(zip(texts.tolist(), (counts / 4000).tolist(), strict=True))
    position = dataset.source_names.index("red fox")
    assert shares == pytest.approx(
        {
            "class": 0.25,
            f"a photo of a <class_{position}>, in snow": 0.375,
            f"a photo of a <class_{position}>, asleep": 0.375,
        },
        abs=0.03,
    )
    assert (captions.choose(torch.full((4000,), bare), drawn, template) == -1).all()  # no caption of its own
    assert Captions(dataset, learned, ImageSettings()).choose(torch.tensor([row]), drawn[:1], template[:1]) is None


def test_captions_reach_the_text_encoder(captioned, tiny_base, tmp_path):
    from semantic_aug.diffusion.base import load_base
    from semantic_aug.finetune.model import TrainedModel

    for strategy in ("ti_db", "db"):  # encoded with gradients, and kept once encoded
        argv = ["--dataset", f"folder:{captioned}", "--pretrained_model_name_or_path", str(tiny_base),
                 "--class_prompts_ratio", "0", "--finetune_strategy", strategy,
                 "--output_dir", str(tmp_path / "x")]  # fmt: skip
        config, dataset = resolve(parse(argv))
        base = load_base(str(tiny_base))
        model = TrainedModel(base, config, dataset)
        label, row = torch.tensor([2, 2]), torch.tensor([-1, model.captions.texts.index(model.captions.texts[-1])])
        conditioning = model.conditioning(model.conditions(label, torch.tensor([0, 0]), row))
        phrase = "<class_2>" if strategy == "ti_db" else "toad"
        prompts = [f"a photo of a {phrase}", f"a photo of a {phrase}, wet"]
        assert torch.allclose(conditioning.hidden, base.encode(prompts, tiny.RESOLUTION).hidden, atol=1e-5)
        assert len(model._encoded) == (0 if strategy == "ti_db" else 1)


def test_a_share_of_captions_without_captions_is_refused(image_folder, tiny_base, tmp_path):
    argv = ["--dataset", f"folder:{image_folder}", "--pretrained_model_name_or_path", str(tiny_base),
             "--class_prompts_ratio", "0.5", "--output_dir", str(tmp_path / "x")]  # fmt: skip
    with pytest.raises(
        UserError, match="--class_prompts_ratio 0.5: data set animals-.* has no captions; give it a column"
    ):
        resolve(parse(argv))


def test_prompts_that_lose_their_class_are_refused_in_both_stages(bases, image_folder, tmp_path, workshop):
    from helpers import sampling_arguments

    import sample_mp

    def train(base, **flags):
        flags = {"dataset": f"folder:{image_folder}", "pretrained_model_name_or_path": base, **flags}
        argv = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        resolve(parse(argv))

    def sample(**flags):
        argv = sampling_arguments(workshop, image_folder, tmp_path / "samples", **flags)
        sample_mp.resolve(sample_mp.build_parser().parse_args([str(word) for word in argv]))

    train(bases["sd1"])  # the tiny tokenizer reads 48 tokens, a letter each
    for base in (bases["sd1"], bases["sdxl"]):
        with pytest.raises(
            UserError, match="prompt 'a .*takes .* tokens up to its class .*tokenizer reads 48 .*--num_vec"
        ):
            train(base, num_vectors=30)
    sample(prompt="a {} " + "x" * 60)  # cut after the class
    with pytest.raises(UserError, match="prompt 'xxx.* takes .* reads 48"):
        sample(prompt="x" * 60 + " {}")
