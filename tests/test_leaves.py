"""Registry, prompts, meta.csv, seeding, run folders, errors."""

import errno
import fcntl
import os
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
import yaml
from helpers import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from semantic_aug import allocator, files, meta_csv, prompts, registry, runs, seeding
from semantic_aug.errors import UserError, nearest_first, run_main, unknown
from semantic_aug.run_lock import lock_folder
from semantic_aug.tensors import read_metadata, save_tensors

# --------------------------------------------------------------------------------------------------------- errors


def test_an_unknown_key_lists_the_nearest_first_and_where_to_mend():
    error = unknown("checkpoint key", "ti_db_lates", ["real", "ti_db_latest", "db"], "edit the file")
    assert str(error) == (
        "unknown checkpoint key 'ti_db_lates': did you mean 'ti_db_latest'? known: ti_db_latest, db, real; "
        "edit the file"
    )
    assert nearest_first("Resnet5", ["vit", "resnet50"])[0] == "resnet50"


def test_errors_become_one_line_and_status_two(capsys, monkeypatch):
    def fails(_):
        raise UserError("bad\nthing   here")

    monkeypatch.delenv("DIFFMIX_DEBUG", raising=False)
    assert run_main(fails) == 2
    assert capsys.readouterr().err == "error: bad thing here\n"
    monkeypatch.setenv("DIFFMIX_DEBUG", "1")
    assert run_main(fails) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_full_disk_and_an_interruption_are_one_line(capsys):
    def disk(_):
        raise OSError(28, "No space left on device", "data/x.png")

    def stop(_):
        raise KeyboardInterrupt

    assert run_main(disk) == 2
    assert "No space left on device (data/x.png)" in capsys.readouterr().err
    assert run_main(stop) == 130


def test_a_path_that_a_library_cannot_take_is_one_line(capsys):
    assert run_main(lambda _: os.fsdecode(b"/data/caf\xe9").encode()) == 2
    assert capsys.readouterr().err == "error: '/data/caf\\xe9' is not UTF-8 text: rename the file or folder\n"


def test_a_programming_error_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run_main(lambda _: 1 // 0)


# -------------------------------------------------------------------------------------------------------- seeding


def test_seeds_differ_by_every_key_and_repeat():
    keys = [(0, "a"), (0, "b"), (1, "a"), ("0", "a"), (0, "a", 0), (0, "a", 1)]
    seeds = [seeding.derive_seed(*k) for k in keys]
    assert len(set(seeds)) == len(seeds) and all(0 <= s < 2**63 for s in seeds)
    assert seeding.derive_seed(np.int64(3), "x") == seeding.derive_seed(3, "x")


def test_drawing_leaves_the_global_generators_alone():
    import torch

    before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()
    seeding.numpy_rng(1, "x").random(5)
    torch.randn(5, generator=seeding.torch_rng(1, "x"))
    assert (np.random.get_state()[1] == before).all() and torch.equal(torch.get_rng_state(), torch_before)


# -------------------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize(
    ("raw", "rules", "clean"),
    [
        ("001.Black_footed_Albatross", ("strip_number", "underscores"), "Black footed Albatross"),
        ("Boeing 747/400", ("slashes",), "Boeing 747 or 400"),
        ("F-16A_B", ("hyphens", "underscores"), "F 16A B"),
        ("737-200", ("strip_number",), "200"),
        ("Пёс", ("underscores",), "Пёс"),
        ("__", ("underscores",), "__"),
        ("RED  Fox ", ("lower",), "red fox"),
    ],
)
def test_class_names_are_cleaned(raw, rules, clean):
    assert prompts.clean_class_name(raw, rules) == clean


def test_overrides_win_over_rules():
    assert prompts.clean_class_name("a_b", ("underscores",), {"a_b": "alpha"}) == "alpha"


@pytest.mark.parametrize(
    ("template", "phrase", "text"),
    [
        ("a photo of a {}", "owl", "a photo of an owl"),
        ("a photo of a {}", "<class_0> bird", "a photo of a <class_0> bird"),
        ("a photo of an {}", "toad", "a photo of a toad"),
        ("a photo of the {}", "owl", "a photo of the owl"),
        ("{} in a wood", "owl", "owl in a wood"),
    ],
)
def test_articles_follow_the_phrase(template, phrase, text):
    assert prompts.fill(template, phrase) == text


def test_the_super_class_is_not_said_twice():
    assert prompts.class_phrase("Laysan Albatross", "bird") == "Laysan Albatross bird"
    assert prompts.class_phrase("Blue bird", "Bird") == "Blue bird"
    assert prompts.class_phrase("mono defective", "solar cell") == "mono defective solar cell"


def test_every_template_takes_one_phrase():
    assert all(t.count("{}") == 1 for t in prompts.TEMPLATES) and prompts.SAMPLING_TEMPLATE in prompts.TEMPLATES


# ----------------------------------------------------------------------------------------------------------- slugs

NAMES = st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=20, unique=True)


@given(NAMES)
@settings(max_examples=200)
def test_slugs_are_one_to_one_safe_and_independent_of_order(names):
    result = meta_csv.slugs(names)
    assert len({s.casefold() for s in result}) == len(names)
    assert all(
        s and s.isascii() and s not in (".", "..") and not set(s) & set('/\\:*?"<>| \n') and s[0] not in ".-"
        for s in result
    )
    assert dict(zip(reversed(names), meta_csv.slugs(names[::-1]), strict=True)) == dict(zip(names, result, strict=True))


def test_plain_names_keep_readable_slugs():
    assert meta_csv.slugs(["Black footed Albatross", "Boeing 747/400"]) == ["Black-footed-Albatross", "Boeing-747-400"]
    a, b = meta_csv.slugs(["a b", "a/b"])
    assert a != b and a.startswith("a-b-") and b.startswith("a-b-")
    assert meta_csv.slugs(["con"])[0] != "con"


def test_equal_names_are_refused():
    with pytest.raises(UserError, match="class name 'x' occurs twice"):
        meta_csv.slugs(["x", "y", "x"])


# -------------------------------------------------------------------------------------------------------- meta.csv

HOSTILE = [
    "a,b",
    'say "x"',
    "line\nbreak",
    "carriage\rreturn",
    "of a DOS script\r",
    "both\r\n",
    "Ünï/cödé",
    "NA",
    " space ",
    "001",
]


def test_meta_csv_round_trip_with_hostile_class_names(tmp_path):
    rows = [(HOSTILE[i], HOSTILE[-i - 1], i, 0.3, f"x/{i}.png", f"key,{i}", 7) for i in range(len(HOSTILE))]
    assert meta_csv.write(tmp_path / "meta.csv", iter(rows)) == len(rows)
    table = meta_csv.read(tmp_path / "meta.csv")
    names = np.array(table.class_names, object)
    assert names[table.source].tolist() == [r[0] for r in rows] and names[table.target].tolist() == [r[1] for r in rows]
    assert table.number.tolist() == list(range(len(rows))) and table.path.tolist() == [r[4] for r in rows]
    assert table.further["Source Image"].tolist() == [r[5] for r in rows]
    header = (tmp_path / "meta.csv").read_text().split("\n")[0]
    assert header.startswith("First Directory,Second Directory,Number,Strength,Path")


def test_names_of_images_that_look_like_numbers_stay_text(tmp_path):
    row = ("owl", "toad", 0, 0.7, "owl/toad.png", "0001", 7, "0002", "0003", "")
    columns = (*meta_csv.FURTHER_COLUMNS, "Partner Image", *meta_csv.UNLABELLED_COLUMNS)
    meta_csv.write(tmp_path / "meta.csv", [row], columns)
    further = meta_csv.read(tmp_path / "meta.csv").further
    names = [further[name].tolist() for name in ("Source Image", "Partner Image", "Unlabelled Image")]
    assert names == [["0001"], ["0002"], ["0003"]]


def test_five_columns_of_another_tool_are_enough(tmp_path):
    (tmp_path / "meta.csv").write_text(
        "First Directory,Second Directory,Number,Strength,Path\nowl,toad,3,0.7,owl/toad-3.png\n"
    )
    table = meta_csv.read(tmp_path / "meta.csv")
    assert table.class_names == ("owl", "toad") and table.strength.tolist() == [0.7] and not table.further


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("First Directory,Number\n", "lacks the column 'Second Directory'"),
        ("First Directory,Second Directory,Number,Strength,Path\na,b,0,1.5,p\n", "row 2: strength 1.5 is outside"),
        ("First Directory,Second Directory,Number,Strength,Path\na,b,zero,0.5,p\n", "must be numbers"),
        ("", "cannot be read as CSV"),
    ],
)
def test_a_bad_meta_csv_is_one_clear_line(tmp_path, text, message):
    (tmp_path / "meta.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        meta_csv.read(tmp_path / "meta.csv")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "meta.csv"
    meta_csv.write(path, [("a", "b", 0, 0.5, "p", "", 0)])
    before = path.read_bytes()

    def rows():
        yield ("a", "b", 1, 0.5, "p", "", 0)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        meta_csv.write(path, rows())
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["meta.csv"]


# -------------------------------------------------------------------------------------------------------- registry


@pytest.fixture
def config(tmp_path):
    (tmp_path / "finetuned_ckpts.yaml").write_text(
        "# checkpoints of ours\ncub:\n  ti_db_latest:  # the good one\n    model_path: org/model\n    lora_path: null\n"
        f"    embed_path: {tmp_path}/embeds.bin\n"
    )
    (tmp_path / "embeds.bin").write_bytes(b"x")
    return tmp_path


def test_checkpoint_look_up(config):
    entry = registry.checkpoint("cub", "ti_db_latest", config)
    assert entry == registry.CheckpointEntry("org/model", None, config / "embeds.bin")


def test_unknown_keys_say_what_is_known_and_what_to_edit(config):
    with pytest.raises(
        UserError, match="'ti_db_last': did you mean 'ti_db_latest'.*finetuned_ckpts.yaml.*--register_key"
    ):
        registry.checkpoint("cub", "ti_db_last", config)
    with pytest.raises(UserError, match="none is known yet"):
        registry.subsets("cub", "x", config)


def test_files_that_are_gone_are_named(config):
    (config / "embeds.bin").unlink()
    with pytest.raises(UserError, match="embed_path '.*embeds.bin' is not there"):
        registry.checkpoint("cub", "ti_db_latest", config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cub:\n  k: just a string\n", "holds 'just a string': expected model_path, lora_path and embed_path"),
        ("cub:\n  k: {lora_path: x}\n", "has no model_path"),
        ("cub:\n  k:\n    model_path: m\n    lora: x\n", "unknown field in entry cub/k.*'lora'"),
        ("cub: [1, 2]\n", "expected keys with entries"),
        ("cub: {a\n", "finetuned_ckpts.yaml, line 2: not valid YAML"),
        ("- a\n", "holds a list"),
    ],
)
def test_damaged_registries_are_one_clear_line(tmp_path, text, message):
    (tmp_path / "finetuned_ckpts.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        registry.checkpoint("cub", "k", tmp_path)


def test_registering_keeps_comments_and_other_entries(config):
    entry = {"model_path": "m", "lora_path": "a", "embed_path": None}
    assert registry.register(registry.CHECKPOINTS, "cub", "new", entry, config)
    assert registry.register(registry.CHECKPOINTS, "my set", "k", entry, config)
    assert not registry.register(registry.CHECKPOINTS, "cub", "new", entry, config)  # the same again changes nothing
    text = (config / registry.CHECKPOINTS).read_text()
    assert "# checkpoints of ours" in text and "# the good one" in text
    content = yaml.safe_load(text)
    assert content["cub"]["new"] == entry and content["my set"]["k"] == entry and "ti_db_latest" in content["cub"]


def test_registering_into_a_file_of_comments_only_keeps_them(tmp_path):
    (tmp_path / registry.SUBSETS).write_text("# a\n# b\n")
    registry.register(registry.SUBSETS, "cub", "k", "outputs/x", tmp_path)
    assert (tmp_path / registry.SUBSETS).read_text() == "# a\n# b\ncub:\n  k: outputs/x\n"


def test_a_taken_key_is_not_overwritten(config):
    with pytest.raises(UserError, match="already has cub/ti_db_latest with another entry"):
        registry.register(registry.CHECKPOINTS, "cub", "ti_db_latest", {"model_path": "z"}, config)
    assert "z" not in yaml.safe_load((config / registry.CHECKPOINTS).read_text())["cub"]["ti_db_latest"].values()


def test_registering_from_many_threads_loses_nothing(tmp_path):
    threads = [
        threading.Thread(target=registry.register, args=(registry.SUBSETS, "cub", f"k{i}", f"p{i}", tmp_path))
        for i in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert yaml.safe_load((tmp_path / registry.SUBSETS).read_text())["cub"] == {f"k{i}": f"p{i}" for i in range(12)}


def test_subsets_are_a_folder_or_a_list(tmp_path):
    (tmp_path / registry.SUBSETS).write_text("cub:\n  one: a\n  both: [a, 'b#filtered']\n  bad: {x: 1}\n")
    assert registry.subsets("cub", "one", tmp_path) == ["a"] and registry.subsets("cub", "both", tmp_path) == [
        "a",
        "b#filtered",
    ]
    with pytest.raises(UserError, match="expected a folder or a list of folders"):
        registry.subsets("cub", "bad", tmp_path)


def test_shipped_registries_are_valid():
    for file in (registry.CHECKPOINTS, registry.SUBSETS, registry.DATASETS, registry.RECIPES):
        assert (registry.CONFIG_DIR / file).is_file()
        for section, entries in registry.read_yaml(registry.CONFIG_DIR / file).items():
            assert isinstance(section, str) and isinstance(entries, dict)


# --------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize(
    ("arguments", "suffix"),
    [
        ((-1, "vanilla", 0.01), ""),
        ((5, "vanilla", 0.01), "_5shot"),
        ((-1, "imbalanced", 0.01), "_imb0.01"),
        ((10, "imbalanced", 0.1), "_10shot_imb0.1"),
    ],
)
def test_setting_suffixes(arguments, suffix):
    assert runs.setting_suffix(*arguments) == suffix


@pytest.mark.parametrize("text", ["made: 2024-13-45\n", "a: " + "[" * 3000, "a: [1\n", "a: !!int z\n"])
def test_damaged_records_are_one_line(tmp_path, text):
    (tmp_path / "args.yaml").write_text(text)
    with pytest.raises(UserError, match="args.yaml is damaged .*: remove the folder or choose another"):
        runs.load_arguments(tmp_path)


def test_folder_names_are_the_contract():
    assert runs.finetune_dir("ti_db", "cub", "_5shot") == "outputs/finetune_model/finetune_ti_db_5shot/cub"
    assert runs.subset_name("diff-mix", 5, "ti_db_latest", "0.7") == "diff-mix-Multi5-ti_db_latest-Strength0.7"
    assert runs.subset_name("real-mix", 2.5, None, "Uniform") == "real-mix-Multi2.5-base-StrengthUniform"


def test_a_folder_is_claimed_once(tmp_path):
    folder = tmp_path / "run"
    assert not runs.claim(folder, {"lr": 0.1, "path": tmp_path}, "--output_dir")
    assert runs.claim(folder, {"lr": 0.1, "path": tmp_path}, "--output_dir")
    assert runs.claim(folder, {"lr": 0.1, "path": "elsewhere"}, "--output_dir", ignored=("path",))
    with pytest.raises(UserError, match="other arguments \\(lr: 0.1 -> 0.2\\).*choose another --output_dir"):
        runs.claim(folder, {"lr": 0.2, "path": tmp_path}, "--output_dir")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="is not empty and holds no args.yaml"):
        runs.claim(tmp_path / "other", {}, "--output_dir")


@pytest.mark.parametrize(
    ("kept", "present", "cause"),
    [
        (
            {"lr": 0.05, "lr_source": "learning_rates.yaml: cub/resnet50"},
            {"lr": 0.02, "recipe": "default: sets nothing"},
            "; lr is 0.02 by flag or default and was 0.05 by learning_rates.yaml: cub/resnet50, --lr 0.05 gives the former "
            "value",
        ),
        (
            {"lr": 0.02, "lr_source": "--lr"},
            {"lr": 0.001, "recipe": "default: lr 0.001"},
            "; lr is 0.001 by recipe default and was 0.02 by flag or default, --lr 0.02 gives the former value",
        ),
        (
            {"learning_rate": 5e-5, "rank": 4, "recipe": "paper: learning_rate 5e-5, rank 4"},
            {"learning_rate": 1e-4, "rank": 4, "recipe": "default: sets nothing"},
            "; learning_rate is 0.0001 by flag or default and was 5e-05 by recipe paper, --learning_rate 5e-05 gives the "
            "former value",
        ),
        ({"lr": 0.1, "recipe": "default: sets nothing"}, {"lr": 0.2, "recipe": "default: sets nothing"}, ""),
        (  # records leave out a setting at the value that its absence means
            {"momentum": "plain", "recipe": "paper: momentum plain"},
            {"recipe": "default: sets nothing"},
            "; momentum is nesterov by flag or default and was plain by recipe paper, --momentum plain gives the former value",
        ),
        (
            {"recipe": "default: sets nothing"},
            {"momentum": "plain", "recipe": "paper: momentum plain"},
            "; momentum is plain by recipe paper and was nesterov by flag or default, --momentum nesterov gives the former "
            "value",
        ),
    ],
)
def test_a_refused_run_says_which_recipe_gave_it_other_values(tmp_path, kept, present, cause):
    runs.claim(tmp_path / "run", kept, "--output_dir")
    with pytest.raises(UserError) as error:
        absent = {"momentum": "nesterov"}
        runs.claim(tmp_path / "run", present, "--output_dir", ("recipe", "lr_source"), absent=absent)
    assert f"{cause}: nothing was touched; choose another --output_dir" in str(error.value)
    assert bool(cause) == ("former" in str(error.value))


def test_differences_name_the_value_that_holds():
    absent = {"split": "official", "loss": "ce", "epochs": (0, 0)}
    old = {"lr": 0.1, "nested": {"split": "half", "n": 1}, "loss": None, "clip": 5.0, "epochs": [0, 0]}
    new = {"lr": 0.1, "nested": {"n": 2}, "loss": "ls", "clip": None}
    assert runs.differences(old, new, absent=absent) == [
        "nested.split: 'half' -> 'official'", "nested.n: 1 -> 2", "loss: 'ce' -> 'ls'", "clip: 5.0 -> none",
    ]  # fmt: skip
    assert runs.differences(old, new, ("nested", "loss", "clip"), absent) == []


def test_two_processes_may_begin_the_same_run_at_once(tmp_path, monkeypatch):
    load = runs.load_arguments

    def load_before_the_other_writes(folder, file):
        kept = load(folder, file)
        (folder / file).write_text("lr: 0.1\n")
        return kept

    monkeypatch.setattr(runs, "load_arguments", load_before_the_other_writes)
    assert not runs.claim(tmp_path, {"lr": 0.1}, "--output_dir")
    assert load(tmp_path) == {"lr": 0.1}


def test_a_claimed_folder_keeps_what_its_run_was_made_from(tmp_path):
    class Weights:
        def __init__(self, name):
            self.name, self.asked = name, 0

        def describe(self):
            self.asked += 1
            return {"weights": self.name}

        def compare(self, kept, present):
            return "" if kept == present else f"{kept['weights']} became {present['weights']}"

    folder, arguments = tmp_path / "run", {"lr": 0.1}
    assert not runs.claim(folder, arguments, "--output_dir", origin=Weights("a"))
    assert runs.claim(folder, arguments, "--output_dir", origin=Weights("a"))
    with pytest.raises(UserError, match="made from other data \\(a became b\\).*choose another --output_dir"):
        runs.claim(folder, arguments, "--output_dir", origin=Weights("b"))
    asked = Weights("a")
    with pytest.raises(UserError, match="other arguments"):  # said before anything is read
        runs.claim(folder, {"lr": 0.2}, "--output_dir", origin=asked)
    assert asked.asked == 0
    runs.spoil(folder, "its images changed")
    with pytest.raises(UserError, match="cannot be resumed \\(its images changed\\)"):
        runs.claim(folder, arguments, "--output_dir", origin=asked)
    runs.claim(tmp_path / "old", arguments, "--output_dir")
    with pytest.raises(UserError, match="does not say which images it was made from"):
        runs.claim(tmp_path / "old", arguments, "--output_dir", origin=asked)


def test_metrics_survive_and_are_cut_back_to_the_resume_point(tmp_path):
    metrics = runs.MetricsCsv(tmp_path / "m.csv", ("step", "loss"))
    for step in (10, 20, 30):
        metrics.add(step=step, loss=1 / step)
    with open(tmp_path / "m.csv", "a") as out:
        out.write("40,0.")  # a kill in the middle of a row still leaves a row of two cells; one of too few goes
        out.write("\n50\n")
    again = runs.MetricsCsv(tmp_path / "m.csv", ("step", "loss"), keep_below=20)
    again.add(step=30, loss=0.5)
    assert (tmp_path / "m.csv").read_text() == "step,loss\n10,0.1\n20,0.05\n30,0.5\n"
    with pytest.raises(ValueError):
        again.add(step=1, los=2)


def test_a_killed_writer_leaves_the_old_content(tmp_path):
    path = tmp_path / "f.txt"
    files.write_text(path, "old")
    code = (
        "import os, signal, sys; from pathlib import Path; from semantic_aug.files import atomic_path\n"
        f"with atomic_path(Path({str(path)!r})) as t:\n t.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=registry.REPO_ROOT, check=False)
    assert path.read_text() == "old"


def test_saved_tensors_are_the_same_bytes_in_every_process(tmp_path):
    script = (
        "import sys, torch; from pathlib import Path; from semantic_aug.tensors import save_tensors;"
        "save_tensors(Path(sys.argv[1]), {'b': torch.arange(3.0), 'a': torch.ones(2, 2).half()},"
        "dict(zip('edcba', ['é', '2', '3', '4', '5'])))"
    )
    paths = [tmp_path / str(i) for i in range(2)]
    for path in paths:
        env = {**os.environ, "PYTHONHASHSEED": path.name}  # sets, and whatever is hashed, in another order
        subprocess.run([sys.executable, "-c", script, str(path)], check=True, cwd=ROOT, env=env)
    assert len({path.read_bytes() for path in paths}) == 1
    with safe_open(paths[0], "pt") as content:
        assert list(content.metadata()) == ["diffmix"]
        assert read_metadata(content.metadata()) == {"a": "5", "b": "4", "c": "3", "d": "2", "e": "é"}
        assert content.get_tensor("b").tolist() == [0, 1, 2] and content.get_tensor("a").dtype == torch.float16
    assert read_metadata({"model": "5", "classes": '["a"]'}, "classes") == {"model": "5", "classes": ["a"]}


def test_layers_that_a_network_shares_are_saved_under_each_name(tmp_path):
    shared = torch.nn.Linear(2, 2)
    state = torch.nn.ModuleList([shared, shared]).state_dict()
    save_tensors(tmp_path / "model.safetensors", state)
    with safe_open(tmp_path / "model.safetensors", "pt") as content:
        assert sorted(content.keys()) == sorted(state)
        assert all(torch.equal(content.get_tensor(name), value) for name, value in state.items())


# ------------------------------------------------------------------------------------------------------ allocator


def page_faults_of_many_big_tensors(*before: str) -> int:
    """Minor page faults of a fresh process while it makes and frees a 64 MB tensor fifty times."""
    code = [
        "import resource, torch",
        *before,
        "torch.ones(1 << 24)",
        "start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt",
        "for _ in range(50): torch.ones(1 << 24)",
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start)",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(code)], cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_freed_memory_is_used_again_without_page_faults():
    kept = page_faults_of_many_big_tensors(
        "from semantic_aug.allocator import keep_freed_memory", "assert keep_freed_memory()"
    )
    assert kept < page_faults_of_many_big_tensors() / 4  # a few tensors until the heap has its size


@pytest.mark.parametrize("chosen", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}])
def test_threads_spin_briefly_unless_the_user_says_otherwise(chosen):
    """Every command sets it before torch is loaded, since the library reads it once."""
    code = (
        "import os, sys\n"
        "sys.argv = ['train_cls.py', '--dataset', 'no-such-set']\n"
        "import train_cls\n"
        "try: train_cls.main()\n"
        "except Exception: pass\n"
        "print(os.environ.get('GOMP_SPINCOUNT'), os.environ.get('OMP_WAIT_POLICY'))"
    )
    env = {k: v for k, v in os.environ.items() if k not in allocator.SPIN_VARIABLES}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**env, **chosen}, capture_output=True, text=True)
    spins = chosen.get("GOMP_SPINCOUNT") if chosen else str(allocator.SPINS)
    assert done.stdout.split() == [str(spins), str(chosen.get("OMP_WAIT_POLICY"))], done.stderr


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    def none(*_):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(fcntl, "flock", none)
    with lock_folder(tmp_path / "run", "--output_dir"):
        assert "no locks on this file system" in caplog.text
    assert registry.register(registry.SUBSETS, "cub", "k", "outputs/x", tmp_path)
    assert registry.subsets("cub", "k", tmp_path) == ["outputs/x"]


def test_a_lock_is_waited_for_shared_or_refused_and_names_its_holder(tmp_path, caplog):
    caplog.set_level("INFO", "semantic_aug")
    path, entered = tmp_path / "new" / ".lock", threading.Event()

    def waiter():
        with files.locked(path, waiting_for="the first"):
            entered.set()

    with files.locked(path):
        with pytest.raises(files.LockHeld) as held, files.locked(path, wait=False):
            pass
        assert held.value.holder() == f"process {os.getpid()} on {socket.gethostname()}"
        thread = threading.Thread(target=waiter)
        thread.start()
        assert not entered.wait(0.2)
    thread.join(10)
    assert entered.is_set() and caplog.text.count("waiting for the first") == 1
    with (
        files.locked(path, shared=True, wait=False),
        files.locked(path, shared=True, wait=False),
        pytest.raises(files.LockHeld),
        files.locked(path, wait=False),
    ):
        pass
