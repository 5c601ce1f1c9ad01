"""Lists as people write them: encodings, separators, captions of several lines, paths of Windows, rows listed twice."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
import torch

import tiny
from semantic_aug.classify import metrics
from semantic_aug.datasets import Setting, load_dataset
from semantic_aug.datasets.readers import captions
from semantic_aug.datasets.readers.listing import read_listing
from semantic_aug.datasets.readers.notes import collected
from semantic_aug.errors import UserError

TEXT = "path,label\nimg/0.png,hibou\nimg/1.png,crapaud à ventre\n"


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "img").mkdir()
    for i in range(4):
        tiny.picture(i % 2, i).save(tmp_path / "img" / f"{i}.png")
    return tmp_path


def write(folder: Path, content: str | bytes, name: str = "list.csv") -> Path:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / name


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le-mark", "utf-32"])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings_separators_and_line_ends(folder, encoding, separator, end):
    text = TEXT.replace(",", separator).replace("\n", end)
    content = b"\xff\xfe" + text.encode("utf-16-le") if encoding.endswith("mark") else text.encode(encoding)
    table = read_listing(write(folder, content))["train"]
    assert table.class_names == ("crapaud à ventre", "hibou") and table.keys == ["img/0.png", "img/1.png"]


@pytest.mark.parametrize("codec", ["cp1252", "latin-1", "shift-jis"])
def test_other_encodings_name_the_line(folder, codec):
    text = "path,label\nimg/0.png,owl\nimg/1.png," + ("ﾊ" if codec == "shift-jis" else "à") + "\n"
    with pytest.raises(UserError, match="list.csv line 3: byte 0x.. is not UTF-8 text: save the list as UTF-8"):
        read_listing(write(folder, text.encode(codec)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04xl", "Excel workbook"),
        (b"\x1f\x8b\x08", "compressed: unpack"),
        ("path,label\n".encode("utf-16-le"), "UTF-16 without a byte-order mark"),
        (b"path,path,label\na,b,c\n", "two columns named 'path'"),
        (b"path,label\nC:\\x\\0.png,owl\n", "line 2: 'C:.*' is a path of a Windows drive"),
        (b"path,label\n\\\\nas\\x\\0.png,owl\n", "line 2: .* is a path of a Windows drive"),
        (b"path,label\nhttps://a.b/0.png,owl\n", "line 2: .* is an address: download"),
        (b"path,label\nimg/0.png,owl\n\n\nimg/1.png,a,b\n", "line 5: expected 2 columns, got 3"),
        (b'path,label,caption\nimg/0.png,owl,"one\ntwo"\nimg/1.png, ,x\n', "line 4: the label is empty"),
        (b'path,label\nimg/0.png,owl\nimg/1.png,"owl\nimg/2.png,toad\n', "line 3: unexpected end of data: correct its"),
    ],
)
def test_what_cannot_be_read_is_one_line(folder, content, message):
    with pytest.raises(UserError, match=message):
        read_listing(write(folder, content))


def test_cells_as_spreadsheets_and_people_write_them(folder):
    text = (
        "sep=;\n\n PATH ; Label;Split;other\n img/0.png ; 007 ;train;1\n\nimg/1.png;NA; Train;\n"
        "img/2.png;null;TRAINING;x\nimg/3.png;7;train;\n;;;\n ; ; ; \n"
    )
    table = read_listing(write(folder, text))["train"]
    assert table.class_names == ("007", "7", "NA", "null") and len(table) == 4 and table.image(0).size == (40, 36)


@pytest.mark.parametrize("separator", [";", "|", "\t"])
def test_a_first_line_of_excel_names_the_separator(folder, separator):
    text = f"sep={separator}\r\n" + TEXT.replace(",", separator)
    assert read_listing(write(folder, text))["train"].keys == ["img/0.png", "img/1.png"]


def test_captions_of_several_lines_at_any_size(folder):
    long = "one line\nanother, with a comma\n" + "x" * 3_000_000
    rows = [f'img/{i}.png,{"owl" if i % 2 else "toad"},"{long} {i}"' for i in range(3)]
    train = read_listing(write(folder, "path,label,caption\n" + "\n".join(rows) + "\n"))["train"]
    assert train.extras["caption"].tolist() == [f"{long} {i}" for i in range(3)]
    text = 'file_name;Text\nimg\\0.png;"' + long + '"\n'
    write(folder, text.encode("utf-16"), "metadata.csv")
    assert captions.read_metadata(folder, ["img/0.png", "img/1.png"])["caption"].tolist() == [long, ""]


def test_groups_have_one_number_in_all_splits(folder):
    text = "path,label,split,Group\nimg/0.png,owl,train,owl on snow\nimg/1.png,toad,train,a toad\n"
    splits = read_listing(write(folder, text + "img/2.png,owl,test,owl on snow\nimg/3.png,toad,test,toad by night\n"))
    assert splits["train"].extras["group"].tolist() == [1, 0] and splits["test"].extras["group"].tolist() == [1, 2]


def test_groups_keep_their_names_and_empty_cells_are_one(folder):
    text = "path,label,split,group\nimg/0.png,owl,train,snow\nimg/1.png,toad,train, \n"
    path = write(folder, text + "img/2.png,owl,test,snow\nimg/3.png,toad,test,\n")
    dataset = load_dataset(f"csv:{path}", Setting(val_fraction=0))
    assert dataset.spec.group_names == ("", "snow")
    meter = metrics.Meter(2, torch.device("cpu"), size=2)
    both_owls = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    meter.add(both_owls, torch.from_numpy(dataset.test.labels), torch.arange(2))
    assert metrics.test_groups(meter.result(), dataset) == {"test_groups": {"": 0.0, "snow": 1.0}}
    ungrouped = write(folder, "path,label\nimg/0.png,owl\nimg/1.png,toad\n")
    assert load_dataset(f"csv:{ungrouped}").spec.group_names == ()


def test_lists_in_the_cells_of_a_parquet_file(folder):
    import pyarrow as pa
    from pyarrow import parquet

    boxes, captions_of = [[1, 2, 3, 4], [5, 6, 7, 8]], [["one", "two"], None]
    for kind in (pa.list_(pa.int64()), pa.large_list(pa.int64()), pa.list_(pa.int64(), 4)):
        columns = {"path": ["img/0.png", "img/1.png"], "label": ["owl", "toad"]}
        captions_column = pa.array(captions_of, pa.large_list(pa.large_string()))
        rows = pa.table({**columns, "box": pa.array(boxes, kind), "caption": captions_column})
        parquet.write_table(rows, folder / "list.parquet")
        train = read_listing(folder / "list.parquet")["train"]
        assert train.extras["box_text"].tolist() == ["1, 2, 3, 4", "5, 6, 7, 8"]
        assert train.extras["caption"].tolist() == ["one\ntwo", ""]
    parquet.write_table(pa.table({**columns, "split": [["train"], ["train"]]}), folder / "list.parquet")
    with pytest.raises(UserError, match="list.parquet: the column 'split' holds lists: expected one text in each row"):
        read_listing(folder / "list.parquet")


def test_cells_of_a_parquet_file_that_are_no_label(folder):
    import pyarrow as pa
    from pyarrow import parquet

    paths = ["img/0.png", "img/1.png"]
    parquet.write_table(pa.table({"path": paths, "label": [1.0, float("nan")]}), folder / "list.parquet")
    with pytest.raises(UserError, match="list.parquet row 2: the label is empty"):
        read_listing(folder / "list.parquet")
    parquet.write_table(
        pa.table({"path": paths, "Path": paths[::-1], "label": ["owl", "toad"]}), folder / "list.parquet"
    )
    with pytest.raises(UserError, match="list.parquet has two columns named 'path': rename one"):
        read_listing(folder / "list.parquet")


def test_windows_paths_are_found_and_real_backslashes_kept(folder):
    (folder / "img" / "3.png").rename(folder / "odd\\name.png")
    rows = ["img\\0.png,owl", ".\\img\\1.png,toad", "odd\\name.png,owl", "img\\gone.png,toad"]
    path = write(folder, "path,label\n" + "\n".join(rows) + "\n")
    table = read_listing(path)["train"]
    assert table.keys == ["img/0.png", "img/1.png", "img/gone.png", "odd\\name.png"]
    with pytest.raises(UserError, match="1 of 4 images are not there .*img/gone.png"):
        load_dataset(f"csv:{path}")


def test_absolute_paths_homes_and_the_root(folder, tmp_path_factory, monkeypatch):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    tiny.picture(0, 9).save(elsewhere / "x.png")
    tiny.picture(1, 9).save(elsewhere / "y.png")
    monkeypatch.setenv("HOME", str(elsewhere))
    path = write(folder, f"path,label\n{folder}/img/0.png,owl\n{elsewhere}/x.png,toad\n~/y.png,owl\n")
    table = read_listing(path)["train"]
    assert set(table.keys) == {"img/0.png", f"{elsewhere}/x.png", f"{elsewhere}/y.png"}
    assert [table.image(i).size for i in range(3)] == [(40, 36)] * 3
    path = write(folder, f"path,label\n{str(folder)[1:]}/img/0.png,owl\n{folder}/img/1.png,toad\n")
    assert read_listing(path, "/")["train"].keys == [f"{str(folder)[1:]}/img/{i}.png" for i in range(2)]
    with pytest.raises(UserError, match="path '../x.png' leads outside"):
        read_listing(write(folder, "path,label\n../x.png,owl\n"))
    with pytest.raises(UserError, match="root .*nowhere of the list .* is not a folder"):
        read_listing(path, folder / "nowhere")


def test_accents_in_labels_and_paths_in_either_form(folder):
    composed, decomposed = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    (folder / "img" / "0.png").rename(folder / "img" / f"{decomposed}.png")
    path = write(folder, f"path,label\nimg/{composed}.png,{composed}\nimg/1.png,{decomposed}\nimg/2.png,owl\n")
    table = read_listing(path)["train"]
    assert table.class_names == ("owl", composed) and f"img/{decomposed}.png" in table.keys


def test_images_listed_twice(folder):
    head = "path,label,split\nimg/0.png,owl,train\nimg/1.png,toad,train\n"
    with collected() as notes:
        train = read_listing(write(folder, head + "./img/0.png,owl,train\nimg/2.png,owl,val\nimg/2.png,owl,test\n"))[
            "train"
        ]
    assert len(train) == 2 and {note.kind: note.cases for note in notes} == {
        "rows that repeat an image of their split left out": ("img/0.png",),
        "images listed for val and test": ("img/2.png",),
    }
    with pytest.raises(UserError, match="line 4: 'img/0.png' is listed under two labels, 'owl' and 'toad'"):
        read_listing(write(folder, head + f"{folder}/img/0.png,toad,train\n"))
    for split in ("val", "test"):
        with pytest.raises(UserError, match=f"lists 1 images for train and {split} \\('img/0.png' the first"):
            read_listing(write(folder, head + f"img/0.png,owl,{split}\n"))
