"""YAML files that people edit: names as written, empty fields, damage in one line, and what is written is read back."""

from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from semantic_aug import registry, yaml_files
from semantic_aug.datasets import load_dataset
from semantic_aug.errors import UserError

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=150)
FILE = "# top\n2024: # c\n  007: {a: }  # keep\n\n  yes:\n    lora_path:\n# end\nno: {x: y}\n"


@pytest.mark.parametrize(
    "name", ["yes", "no", "on", "off", "12:30", "2024", "007", "1e3", "null", "~", "0x1F", ".5", "2024-01"]
)
def test_names_are_text_as_written(tmp_path, name):
    for text in (f"{name}:\n  {name}: {{{name}: a}}\n", f"'{name}':\n  \"{name}\": {{'{name}': a}}\n"):
        (tmp_path / "x.yaml").write_text(text)
        assert yaml_files.read(tmp_path / "x.yaml") == {name: {name: {name: "a"}}}


def test_empty_values_are_not_set_and_quoted_ones_are_text(tmp_path):
    text = "a:\nb: ~\nc: null\nd: 'null'\ne: ''\nf: [x, , ~]\ng: no\nh: 007\ni: 1.50\n"
    expected = {"a": None, "b": None, "c": None, "d": "null", "e": "", "f": ["x", None, None]}
    assert yaml_files.parse(text.replace(", ,", ", null,"), tmp_path) == {
        **expected,
        "g": "no",
        "h": "007",
        "i": "1.50",
    }


def test_anchors_and_merged_mappings_are_understood(tmp_path):
    text = "a: &x {model_path: m, lora_path: l}\nb:\n  <<: *x\n  lora_path: other\nc: [*x, *x]\n"
    content = yaml_files.parse(text, tmp_path)
    assert content["b"] == {"model_path": "m", "lora_path": "other"} and content["c"] == [content["a"]] * 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: 1\nb: 2\na: 3\n", "x.yaml: 'a' is written twice, in line 1 and in line 3"),
        (b"s:\n  yes: 1\n  'yes': 2\n", "x.yaml: 'yes' is written twice, in line 2 and in line 3"),
        (b"a: 1\nb: [1\n", "x.yaml, line 3: not valid YAML"),
        (b"a: 1\n\tb: 2\n", "x.yaml, line 2: not valid YAML"),
        (b"a: 1\n---\nb: 2\n", "x.yaml, line 2: not valid YAML"),
        (b"a: 1\nb: \x07\n", "x.yaml, line 2: not valid YAML"),
        (b"a: 1\nb: caf\xe9\n", "x.yaml, line 2: not UTF-8"),
        ("a: 1\n".encode("utf-16"), "x.yaml, line 1: not UTF-8"),
        (b"- a\n", "x.yaml holds a list, expected a mapping"),
        (b"hello\n", "x.yaml holds 'hello', expected a mapping"),
        (b"? [a]\n: b\n", "x.yaml, line 1: a list or mapping as a name"),
        (b"a: &x [*x]\n", "x.yaml, line 1: not valid YAML (found unconstructable recursive node)"),
        (b"a: &x {b: *x}\n", "x.yaml, line 1: not valid YAML (found unconstructable recursive node)"),
        (b"a: {b: c, b: d}\n", "x.yaml: 'b' is written twice, in line 1 and in line 1"),
        (b"a: *nothing\n", "x.yaml, line 1: not valid YAML"),
        (b"[" * 900, "x.yaml"),
    ],
)
def test_damage_is_one_line_with_file_and_line(tmp_path, content, message):
    (tmp_path / "x.yaml").write_bytes(content)
    with pytest.raises(UserError) as error:
        yaml_files.read(tmp_path / "x.yaml")
    assert message in str(error.value)


def test_a_byte_order_mark_and_a_folder_of_that_name(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"\xef\xbb\xbfa: b\r\n")
    assert yaml_files.read(tmp_path / "x.yaml") == {"a": "b"}
    with pytest.raises(UserError, match="cannot be read"):
        yaml_files.read(tmp_path)


@settings(max_examples=60, deadline=None)
@given(TEXTS, TEXTS, TEXTS, TEXTS)
@example("yes", "12:30", "2024", "no")
@example("2024", "on", "007", "null")
@example("no", "a # b", "c: d", "\x85 \u2028")
def test_any_names_that_are_written_are_read_back_and_nothing_else_changes(section, key, other, value):
    before = yaml_files.parse(FILE, "x.yaml")
    if key in (before.get(section) or {}) or other in (before.get(section) or {}) or key == other:
        return
    text = yaml_files.extended(FILE, "x.yaml", section, key, {"p": value, "q": None})
    text = yaml_files.extended(text, "x.yaml", section, other, [value, "b"])
    expected = {**before, section: {**(before.get(section) or {}), key: {"p": value, "q": None}, other: [value, "b"]}}
    assert yaml_files.parse(text, "x.yaml") == expected
    assert all(part in text for part in ("# top", "# c", "# keep", "# end", "\n  007: {a:", "\n  yes:"))
    block = yaml_files.to_text({section: {key: value}})
    assert yaml_files.parse(block, "x.yaml") == yaml.safe_load(block) == {section: {key: value}}


@settings(max_examples=40, deadline=None)
@given(TEXTS, TEXTS)
@example("cub", "yes")
def test_any_registered_key_is_found_again_or_refused(tmp_path_factory, dataset, key):
    folder = tmp_path_factory.mktemp("config")
    try:
        registry.register(registry.SUBSETS, dataset, key, "outputs/x", folder)
    except UserError as error:
        assert str(error).startswith("--register_key") and not (folder / registry.SUBSETS).exists()
    else:
        assert registry.subsets(dataset, key, folder) == ["outputs/x"]


def test_an_entry_to_add_by_hand_is_yaml_in_one_line():
    text, entry = "base: &base {p: x}\nset: *base\n", {"p": "a folder", "q": None}
    with pytest.raises(UserError, match="add to its section set by hand: ") as refused:
        yaml_files.extended(text, Path("x.yaml"), "set", "key", entry)
    line = str(refused.value).partition("by hand: ")[2]
    assert yaml_files.parse(line, Path("x.yaml")) == {"key": entry}


@pytest.mark.parametrize("key", ["", " a", "a#b", "None", "null", "a\nb"])
def test_keys_that_no_flag_can_name_are_refused(tmp_path, key):
    with pytest.raises(UserError, match="--register_key"):
        registry.check_key(registry.SUBSETS, "cub", key, "outputs/x", tmp_path)
    assert not list(tmp_path.iterdir())


def test_registering_keeps_line_endings_links_and_permissions(tmp_path):
    real = tmp_path / "shared.yaml"
    real.write_bytes(b"\xef\xbb\xbf# ours\r\ncub:\r\n  a: b\r\n")
    real.chmod(0o664)
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / registry.SUBSETS).symlink_to(real)
    registry.register(registry.SUBSETS, "cub", "on", "outputs/x", tmp_path / "config")
    assert real.read_bytes() == b"# ours\r\ncub:\r\n  a: b\r\n  'on': outputs/x\r\n"
    assert (tmp_path / "config" / registry.SUBSETS).is_symlink() and real.stat().st_mode & 0o777 == 0o664


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("super_class: [a]", "entry 'd' of datasets.yaml: super_class is a list, expected one text"),
        ("class_names: [cat]", "class_names is a list, expected a mapping of a text to a text each"),
        ("class_names: {cat: [a]}", "class_names is a mapping, expected a mapping of a text to a text each"),
        ("class_name_rules: lower", "class_name_rules is 'lower', expected a list of texts"),
        ("folders: x", "unknown field in entry 'd' of datasets.yaml 'folders': did you mean 'folder'"),
    ],
)
def test_fields_of_another_kind_are_named(tmp_path, entry, message):
    (tmp_path / registry.DATASETS).write_text(f"d:\n  folder: {tmp_path}\n  {entry}\n")
    with pytest.raises(UserError) as error:
        load_dataset("d", config_dir=tmp_path)
    assert message in str(error.value)


def test_all_registry_files_are_checked_at_once(tmp_path):
    registry.check_files(tmp_path)
    for file in registry.FILES:
        (tmp_path / file).write_text("a: {x: y}\nb: {}\na: {}\n")
        with pytest.raises(UserError, match=f"{file}: 'a' is written twice, in line 1 and in line 3"):
            registry.check_files(tmp_path)
        (tmp_path / file).unlink()
