"""Local copies of hub data sets in every layout: which rows are of which split, and what is refused by name."""

import io
import json
import os
import shutil
import tarfile
import time

import datasets as hub
import numpy as np
import pandas as pd
import pytest
from helpers import start

import tiny
from semantic_aug.datasets import Setting, load_dataset
from semantic_aug.datasets import __main__ as command
from semantic_aug.datasets.readers.hub import read_hub_id
from semantic_aug.errors import UserError

CLASSES = ("owl", "toad")
COUNTS = {"train": 6, "validation": 2, "test": 4}
START = {"train": 0, "validation": 20, "test": 40}
"""Number of the first picture of each split, so that a row's picture says where it belongs."""


def encoded(label: int, number: int) -> bytes:
    out = io.BytesIO()
    tiny.picture(label, number).save(out, "PNG")
    return out.getvalue()


def rows(split: str, names=CLASSES, labels=None) -> hub.Dataset:
    """The rows of a split, as the library writes them."""
    features = hub.Features({"image": hub.Image(), "label": hub.ClassLabel(names=list(names))})
    images = [{"bytes": encoded(i % 2, START[split] + i), "path": None} for i in range(COUNTS[split])]
    labels = [names.index(CLASSES[i % 2]) for i in range(COUNTS[split])] if labels is None else labels
    return hub.Dataset.from_dict({"image": images, "label": labels}, features=features)


def frame(split: str, label="class", wrap=False) -> pd.DataFrame:
    """The same as pandas has them: bytes, without a word of the library in the file."""
    images = [encoded(i % 2, START[split] + i) for i in range(COUNTS[split])]
    kinds = {"class": [CLASSES[i % 2] for i in range(COUNTS[split])], "number": [i % 2 for i in range(COUNTS[split])]}
    kinds["category"] = pd.Categorical(kinds["class"])
    return pd.DataFrame(
        {
            "image": [{"bytes": b, "path": f"{i}.png"} for i, b in enumerate(images)] if wrap else images,
            "label": kinds[label],
        }
    )


def content_of(table) -> list[bytes]:
    return [np.asarray(table.image(i)).tobytes() for i in range(len(table))]


def check_splits(splits, names=CLASSES) -> None:
    """Every row is in its split and under its class, and none is lost."""
    assert set(splits) == {"train", "val", "test"}
    for ours, split in (("train", "train"), ("val", "validation"), ("test", "test")):
        table = splits[ours]
        assert table.class_names == tuple(names) and len(table) == COUNTS[split]
        expected = {}
        for i in range(COUNTS[split]):
            expected[np.asarray(tiny.picture(i % 2, START[split] + i)).tobytes()] = CLASSES[i % 2]
        result = dict(zip(content_of(table), (table.class_names[label] for label in table.labels), strict=True))
        assert result == expected


LAYOUTS = (
    "default/{split}/0000.parquet",
    "plain_text/pets-{split}.parquet",
    "{split}_0.parquet",
    "data/{split}/part-0.parquet",
    "{split}.parquet",
    "data/{split}-00000-of-00001.parquet",
    "{split}/train-and-more/0.parquet",
    "my.{split}.parquet",
)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("above", ["copy", "train/test-copies/validation"])
def test_splits_are_never_mixed_whatever_the_layout(tmp_path, layout, above):
    if layout.startswith("{split}/train-and-more"):
        layout = "{split}/0.parquet"
    for split in COUNTS:
        file = tmp_path / above / layout.format(split=split)
        file.parent.mkdir(parents=True, exist_ok=True)
        rows(split).to_parquet(str(file))
    check_splits(read_hub_id(str(tmp_path / above)))


@pytest.mark.parametrize(("label", "wrap"), [("class", True), ("category", False), ("number", True)])
def test_parquet_as_pandas_writes_it(tmp_path, label, wrap):
    for split in COUNTS:
        frame(split, label, wrap).to_parquet(tmp_path / f"{split}.parquet")
    splits = read_hub_id(str(tmp_path))
    if label == "number":
        assert splits["train"].class_names == ("0", "1")
        splits = {split: table.relabelled(("0", "1")) for split, table in splits.items()}
        assert [splits[s].labels.tolist() for s in ("train", "test")] == [[0, 1] * 3, [0, 1] * 2]
    else:
        check_splits(splits)


def test_json_lines_with_images_beside_them_and_webdataset(tmp_path):
    for split in COUNTS:
        lines, folder = [], tmp_path / "lines"
        (folder / "images").mkdir(parents=True, exist_ok=True)
        (tmp_path / "shards").mkdir(exist_ok=True)
        with tarfile.open(tmp_path / "shards" / f"{split}-0.tar", "w") as tar:
            for i in range(COUNTS[split]):
                name, content = f"images/{split}{i}.png", encoded(i % 2, START[split] + i)
                (folder / name).write_bytes(content)
                lines.append(json.dumps({"file_name": name, "label": CLASSES[i % 2]}))
                for end, data in (("png", content), ("cls", str(i % 2).encode())):
                    member = tarfile.TarInfo(f"{i:04d}.{end}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    check_splits(read_hub_id(str(tmp_path / "lines")))
    for split in COUNTS:  # parquet that names its images, as pandas writes it
        frame = pd.read_json(tmp_path / "lines" / f"{split}.jsonl", lines=True)
        frame.to_parquet(tmp_path / "lines" / f"{split}.parquet")
        (tmp_path / "lines" / f"{split}.jsonl").unlink()
    check_splits(read_hub_id(str(tmp_path / "lines")))
    shards = read_hub_id(str(tmp_path / "shards"))
    assert {split: len(table) for split, table in shards.items()} == {"train": 6, "val": 2, "test": 4}
    assert len(set(content_of(shards["train"]))) == 6


def test_class_order_of_the_training_split_holds_for_all(tmp_path):
    for split, names in (("train", CLASSES), ("validation", CLASSES[::-1]), ("test", CLASSES[::-1])):
        (tmp_path / split).mkdir()
        rows(split, names).to_parquet(str(tmp_path / split / "0.parquet"))
    check_splits(read_hub_id(str(tmp_path)))


def test_files_that_would_be_passed_over_are_refused_by_name(tmp_path):
    rows("train").to_parquet(str(tmp_path / "train.parquet"))
    rows("test").to_parquet(str(tmp_path / "more.parquet"))
    with pytest.raises(UserError, match=r"the split of .*more\.parquet is unknown"):
        read_hub_id(str(tmp_path))
    (tmp_path / "train.parquet").unlink()
    assert len(read_hub_id(str(tmp_path))["train"]) == COUNTS["test"]  # one split altogether


def test_a_local_copy_is_counted_and_its_images_need_no_file_ending(tmp_path, capsys):
    hub.DatasetDict({split: rows(split) for split in COUNTS}).save_to_disk(tmp_path / "copy")
    assert command.main(["info", f"hf:{tmp_path / 'copy'}"]) == 0
    assert "2 classes, images: train 6, val 2, test 4" in capsys.readouterr().out
    assert command.main(["check", f"hf:{tmp_path / 'copy'}", "--output_dir", str(tmp_path / "out")]) == 0
    assert "ending" not in capsys.readouterr().out


def test_configurations(tmp_path):
    for config in ("small", "large"):
        for split in COUNTS:
            for file in (f"readme/{config}-{split}.parquet", f"converted/{config}/{split}/0000.parquet"):
                (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
                rows(split).to_parquet(str(tmp_path / file))
    entries = "".join(
        f"- config_name: {config}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {config}-{split}.parquet\n" for split in COUNTS)
        for config in ("small", "large")
    )
    (tmp_path / "readme" / "README.md").write_text(f"---\nconfigs:\n{entries}---\nText\n")
    for folder in (tmp_path / "readme", tmp_path / "converted"):
        with pytest.raises(UserError, match=f"has the configurations .*small.*: name one, as in hf:{folder}:"):
            load_dataset(f"hf:{folder}")
        with pytest.raises(UserError, match="unknown configuration 'smal': did you mean 'small'"):
            load_dataset(f"hf:{folder}:smal")
        check_splits(read_hub_id(f"{folder}:small"))
        names = {load_dataset(f"hf:{folder}:{config}").name for config in ("small", "large")}
        assert len(names) == 2
        (tmp_path / "datasets.yaml").write_text(f"pets: {{hub: org/pets, local: {folder}, config: large}}\n")
        assert len(load_dataset("pets", config_dir=tmp_path).train) == COUNTS["train"]


@pytest.mark.parametrize("missing", [-1, None])
def test_a_split_without_labels_is_left_out_and_a_row_without_one_is_refused(tmp_path, caplog, missing):
    for split in COUNTS:
        labels = [missing] * COUNTS[split] if split == "test" else None
        rows(split, labels=labels).to_parquet(str(tmp_path / f"{split}.parquet"))
    splits = read_hub_id(str(tmp_path))
    assert {split: len(table) for split, table in splits.items()} == {"train": 6, "val": 2}
    assert "the split test has no labels (-1, empty or no column) and is left out" in caplog.text
    rows("test", labels=[0, 1, missing, 0]).to_parquet(str(tmp_path / "test.parquet"))
    with pytest.raises(UserError, match=r"split test, row 2 has (no label|label -1)"):
        read_hub_id(str(tmp_path))
    shutil.copy(tmp_path / "validation.parquet", tmp_path / "test.parquet")
    rows("train", labels=[missing] * 6).to_parquet(str(tmp_path / "train.parquet"))
    with pytest.raises(UserError, match="its training split has no labels"):
        read_hub_id(str(tmp_path))


@pytest.mark.parametrize("layout", ["parquet", "save_to_disk"])
def test_splits_may_differ_in_their_columns(tmp_path, caplog, layout):
    splits = {split: rows(split) for split in COUNTS}
    splits["test"] = splits["test"].remove_columns("label")
    splits["validation"] = splits["validation"].add_column("place", ["pond"] * COUNTS["validation"])
    if layout == "parquet":
        for split, part in splits.items():
            part.to_parquet(str(tmp_path / f"{split}.parquet"))
    else:
        hub.DatasetDict(splits).save_to_disk(str(tmp_path))
    tables = read_hub_id(str(tmp_path))
    assert {split: len(table) for split, table in tables.items()} == {"train": 6, "val": 2}
    assert tables["val"].class_names == CLASSES and tables["val"].labels.tolist() == [0, 1]
    assert "the split test has no labels (-1, empty or no column) and is left out" in caplog.text
    splits["test"] = splits["test"].add_column(
        "kind", [0] * COUNTS["test"]
    )  # which may be the label under another name
    if layout == "parquet":
        splits["test"].to_parquet(str(tmp_path / "test.parquet"))
        with pytest.raises(UserError, match="has no label column 'label': its columns are image, kind"):
            read_hub_id(str(tmp_path))


def test_several_label_columns_are_named(tmp_path):
    table = rows("train").rename_column("label", "species")
    table = table.add_column("family", [0, 1] * 3).cast_column("family", hub.ClassLabel(names=["a", "b"]))
    table.to_parquet(str(tmp_path / "train.parquet"))
    with pytest.raises(UserError, match="has the label columns species and family: name one with label_column"):
        read_hub_id(str(tmp_path))
    assert read_hub_id(str(tmp_path), label_column="family")["train"].class_names == ("a", "b")
    lists = rows("train").remove_columns("label").add_column("label", [[0, 1]] * 6)
    lists.to_parquet(str(tmp_path / "train.parquet"))
    with pytest.raises(UserError, match="column label holds lists, expected one class a row"):
        read_hub_id(str(tmp_path))


def test_a_damaged_file_is_named(tmp_path):
    for split in COUNTS:
        rows(split).to_parquet(str(tmp_path / f"{split}.parquet"))
    file = tmp_path / "test.parquet"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"test\.parquet is not a whole parquet file"):
        read_hub_id(str(tmp_path))
    file.write_bytes(content[:4] + b"\xff" * 400 + content[404:])
    with pytest.raises(UserError, match=r"test\.parquet cannot be read"):
        read_hub_id(str(tmp_path))


def test_a_file_exchanged_in_place_is_read_anew_even_under_its_old_time(tmp_path):
    file = tmp_path / "train.parquet"
    rows("train").to_parquet(str(file))
    before, status = read_hub_id(str(tmp_path))["train"], file.stat()
    rows("train", labels=[1, 0] * 3).to_parquet(str(file))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = read_hub_id(str(tmp_path))["train"]
    assert after.labels.tolist() == [1, 0] * 3 and before.labels.tolist() == [0, 1] * 3
    assert before.signature() != after.signature()


def test_a_registered_data_set_without_data_says_within_seconds_what_to_set():
    unset = dict.fromkeys(("CUB_ROOT", "CUB_HUG_LOCAL_IMAGE_TRAIN_DIR", "CUB_HUG_LOCAL_IMAGE_TEST_DIR"), "")
    nowhere = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    begin = time.monotonic()
    process = start("train_cls.py", "--dataset", "cub", "--gpu", "cpu", env={**unset, **nowhere})
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and len(err.strip().splitlines()) == 1
    assert "set CUB_ROOT to the unpacked official download" in err and "Multimodal-Fatima/CUB_train" in err
    assert "CUB_HUG_LOCAL_IMAGE_TRAIN_DIR and CUB_HUG_LOCAL_IMAGE_TEST_DIR to local copies" in err
    assert "caltech.edu" in err
    assert time.monotonic() - begin < 30  # 5 s on an idle machine, most of it imports


def test_the_setting_applies_to_hub_copies(tmp_path):
    for split in COUNTS:
        rows(split).to_parquet(str(tmp_path / f"{split}.parquet"))
    assert load_dataset(f"hf:{tmp_path}", Setting(examples_per_class=1)).train.counts().tolist() == [1, 1]


def test_images_in_the_rows_and_beside_them_are_read_together(tmp_path):
    copy = hub.DatasetDict({"train": rows("train"), "test": rows("test")})
    (tmp_path / "3.png").write_bytes(encoded(1, 3))
    mixed = copy["train"].cast_column("image", hub.Image(decode=False)).to_list()
    mixed[3]["image"] = {"bytes": None, "path": str(tmp_path / "3.png")}
    for first in (0, 3):  # an image that holds its bytes comes first, or one that is a file
        order = [mixed[first], *(row for i, row in enumerate(mixed) if i != first)]
        hub.DatasetDict({**copy, "train": hub.Dataset.from_list(order, copy["train"].features)}).save_to_disk(
            tmp_path / f"{first}"
        )
        train = load_dataset(f"hf:{tmp_path / str(first)}", Setting(val_fraction=0)).train
        wanted = [np.asarray(tiny.picture(i % 2, i)).tobytes() for i in range(6)]
        assert sorted(content_of(train)) == sorted(wanted)
