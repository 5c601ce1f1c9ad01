"""The filter: what it drops, what it leaves alone, and that the registry and stage 3 read what it writes."""

import hashlib
import json
import shutil

import evaluating
import numpy as np
import pytest
import yaml
from helpers import classify_arguments
from PIL import Image

import train_cls
from semantic_aug import registry, runs
from semantic_aug.datasets.sets import elpv
from semantic_aug.datasets.synthetic import read_subset
from semantic_aug.errors import UserError, run_main
from semantic_aug.evaluation.quality import filter as command
from semantic_aug.evaluation.quality import review


@pytest.fixture
def subset(animals, tmp_path):
    """Five images of each class that are what their label says, and one of each that is the third class."""
    train, rows = animals.train, []
    for label, name in enumerate(animals.source_names):
        target = (label + 1) % 3
        of = [np.flatnonzero(train.labels == k) for k in range(3)]
        for k in range(6):
            shown = (label + 2) % 3 if k == 3 else target
            rows.append((train.image(of[shown][k]), name, animals.source_names[target], 0.7, train.keys[of[label][k]]))
    return evaluating.write_subset(tmp_path / "planted", rows)


def arguments(image_folder, subset, **changes):
    flags = {"dataset": f"folder:{image_folder}", "syndata_dir": subset, "by": "classifier", "gpu": "cpu", **changes}
    return [w for k, v in flags.items() for w in (f"--{k}", *map(str, v if isinstance(v, (list, tuple)) else [v]))]


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---------------------------------------------------------------------------------------------------- selection


def keep(confidence, classes, **settings):
    return command.kept(confidence, classes, command.FilterSettings(by="classifier", **settings))


def test_a_share_is_kept_of_every_class():
    rng = np.random.default_rng(0)
    classes = np.repeat([0, 1, 2], [30, 5, 1])
    confidence = rng.random(36)
    confidence[classes == 1] /= 100  # a class the classifier does not know
    stay = keep(confidence, classes, keep=0.1)
    assert [int(stay[classes == k].sum()) for k in range(3)] == [3, 1, 1]
    for k in range(3):
        mine = classes == k
        assert confidence[mine & stay].min() >= confidence[mine & ~stay].max(initial=0)
    assert keep(confidence, classes, keep=1.0).all()
    assert keep(np.ones(4), np.zeros(4, int), keep=0.5).tolist() == [True, True, False, False]


def test_a_threshold_leaves_the_best_of_a_class_it_would_empty():
    confidence, classes = np.array([0.9, 0.6, 0.2, 0.3, 0.1]), np.array([0, 0, 0, 1, 1])
    assert keep(confidence, classes, threshold=0.5).tolist() == [True, True, False, True, False]
    assert keep(confidence, classes, threshold=0.5, min_per_class=0).tolist() == [True, True, False, False, False]
    assert keep(confidence, classes, threshold=0.6, min_per_class=5).all()


# ------------------------------------------------------------------------------------------------------ command


def test_planted_images_are_dropped_and_everything_reads_the_rest(
    tmp_path, image_folder, animals, subset, judge_folder, capsys
):
    before = {path: digest(path) for path in sorted(subset.rglob("*")) if path.is_file()}
    config = tmp_path / "config"
    argv = arguments(
        image_folder, subset, classifier=judge_folder, threshold=0.5, config_dir=config, register_key="clean"
    )
    assert command.main(argv) == 0
    assert {path: digest(path) for path in before} == before  # nothing that was there has changed
    full, rest = read_subset(subset, animals), read_subset(f"{subset}#filtered", animals)
    planted = {f"{number:06d}.png" for number in (3, 9, 15)}
    assert {path.name for path in full.paths} - {path.name for path in rest.paths} == planted
    lines = (subset / "meta.csv").read_text().splitlines()
    assert (subset / "meta-filtered.csv").read_text().splitlines() == [lines[0]] + [
        line for number, line in enumerate(lines[1:]) if number not in (3, 9, 15)
    ]
    scores = evaluating.read_rows(subset / "filter-filtered" / "scores.csv")
    assert {row["path"].split("/")[1] for row in scores if row["kept"] == "0"} == planted
    assert all((float(row["confidence"]) >= 0.5) == (row["kept"] == "1") for row in scores)
    with Image.open(subset / "filter-filtered" / "dropped.png") as sheet:
        assert sheet.width > 3 * command.SHEET_SIZE
    output = capsys.readouterr().out
    assert "kept 15 of 18" in output and "| toad | 6 | 5 |" in output
    # the registry, and stage 3 by key and by folder
    assert registry.subsets(animals.name, "clean", config) == [f"{registry.shown_path(subset)}#filtered"]
    by_key = classify_arguments(image_folder, tmp_path / "run", syndata_key="clean", config_dir=config)
    by_folder = classify_arguments(image_folder, tmp_path / "run", syndata_dir=f"{subset}#filtered")
    for flags in (by_key, by_folder):
        assert train_cls.main([*map(str, flags), "--dry_run"]) == 0
        assert "synthetic: 15 images of" in capsys.readouterr().out
    # the same again changes nothing, another filter needs another name and may start from the first
    assert command.main(argv) == 0
    stricter = arguments(image_folder, f"{subset}#filtered", classifier=judge_folder, keep=0.6)
    with pytest.raises(UserError, match="meta-filtered.csv was made otherwise .*choose another --name"):
        command.main(stricter)
    assert command.main([*stricter, "--name", "best"]) == 0
    assert len(read_subset(f"{subset}#best", animals)) == 9
    with pytest.raises(UserError, match="unknown variant .* 'bset': did you mean 'best'. known: best, filtered"):
        read_subset(f"{subset}#bset", animals)


def test_two_lists_of_one_folder_get_no_common_name(image_folder, animals, subset, judge_folder):
    assert command.main(arguments(image_folder, subset, classifier=judge_folder, keep=0.5)) == 0
    both = arguments(image_folder, [subset, f"{subset}#filtered"], classifier=judge_folder, keep=0.5, name="half")
    with pytest.raises(UserError, match="planted and .*planted#filtered would both become .*meta-half.csv"):
        command.main(both)
    assert not list(subset.glob("*half*"))


def test_images_and_classifier_may_be_moved(tmp_path, image_folder, subset, judge_folder):
    for data, judge in ((image_folder, judge_folder), (tmp_path / "data", tmp_path / "judge")):
        if not data.exists():
            data.symlink_to(image_folder)
            judge.symlink_to(judge_folder)
        assert command.main(arguments(data, subset, classifier=judge, keep=0.5)) == 0
    argv, folder = arguments(image_folder, subset, classifier=judge_folder, keep=0.5), subset / "filter-filtered"
    record = runs.load_arguments(folder)
    (folder / runs.ARGS_FILE).write_text(runs.arguments_text({**record, runs.MADE_FROM: {"classifier": "another"}}))
    with pytest.raises(UserError, match="was made otherwise .made_from.classifier: 'another'"):
        command.main(argv)
    del record[runs.MADE_FROM]  # as in records of earlier versions
    (folder / runs.ARGS_FILE).write_text(runs.arguments_text(record))
    with pytest.raises(UserError, match="was made otherwise .classifier: "):
        command.main(argv)


def test_a_review_may_be_moved_and_another_one_writes_no_list(tmp_path, image_folder, animals):
    names, folders, lists = animals.source_names, [], []
    for seed in range(2):
        rows = [(evaluating.noise(3 * seed + i), names[i], names[i], 1.0, "") for i in range(3)]
        folders.append(evaluating.write_subset(tmp_path / f"subset{seed}", rows, evaluating.FIVE))
        images = read_subset(folders[-1], animals)
        paths = review.relative_paths(images, str(folders[-1]))
        identity = review.list_identity(images, names)
        lists.append({"folder": str(folders[-1]), "list": "meta.csv", **identity, "rejected": paths[:1]})
    file, moved = tmp_path / "review.json", tmp_path / "elsewhere.json"
    file.write_text(json.dumps({"format": review.FORMAT, "lists": lists}))
    shutil.copy(file, moved)
    for kept in (file, moved):
        assert command.main(arguments(image_folder, folders[1], by="review", review=kept)) == 0
    lists[1]["rejected"] = []
    moved.write_text(json.dumps({"format": review.FORMAT, "lists": lists}))
    for dry_run in (["--dry_run"], []):
        with pytest.raises(UserError, match="subset1/meta-reviewed.csv already exists with other images: nothing was"):
            command.main([*arguments(image_folder, folders, by="review", review=moved), *dry_run])
    assert not (folders[0] / "meta-reviewed.csv").exists() and len(read_subset(f"{folders[1]}#reviewed", animals)) == 2


def test_sources_left_as_they_were_go_only_where_the_target_must_be_seen(
    tmp_path, image_folder, animals, judge_folder, capsys
):
    """Four translations of each class that show their target, and two that still show their source."""
    train, rows = animals.train, []
    for label, name in enumerate(animals.source_names):
        target = (label + 1) % 3
        of = [np.flatnonzero(train.labels == k) for k in range(3)]
        for k in range(6):
            shown = label if k < 2 else target
            rows.append((train.image(of[shown][k]), name, animals.source_names[target], 0.7, train.keys[of[label][k]]))
    subset = evaluating.write_subset(tmp_path / "half-way", rows)
    for judged_as, left in (("label", 18), ("target", 12)):
        argv = arguments(
            image_folder, subset, classifier=judge_folder, threshold=0.5, judged_as=judged_as, name=judged_as
        )
        assert command.main(argv) == 0
        assert len(read_subset(f"{subset}#{judged_as}", animals)) == left
    numbers = {int(path.stem) % 6 for path in read_subset(f"{subset}#target", animals).paths}
    assert numbers == {2, 3, 4, 5}


def test_clip_and_both_decide_by_what_they_say(tmp_path, image_folder, animals, subset, judge_folder, clip_folder):
    from semantic_aug.evaluation.quality.clip import load_clip, presence

    flags = {"keep": 0.5, "clip": clip_folder, "super_class": "animal"}
    assert command.main(arguments(image_folder, subset, by="clip", name="clip", **flags)) == 0
    assert command.main(arguments(image_folder, subset, by="both", name="both", classifier=judge_folder, **flags)) == 0
    images, clip = read_subset(subset, animals), load_clip(str(clip_folder))
    expected = presence(clip, clip.images(images.image, len(images)), "animal")
    rows = evaluating.read_rows(subset / "filter-both" / "scores.csv")
    columns = {name: np.array([float(row[name]) for row in rows]) for name in ("clip", "classifier", "confidence")}
    assert np.allclose(columns["clip"], expected, atol=1e-5)
    assert np.allclose(columns["confidence"], columns["clip"] * columns["classifier"], atol=1e-5)
    assert len(read_subset(f"{subset}#clip", animals)) == len(read_subset(f"{subset}#both", animals)) == 9


def test_five_columns_and_a_key_of_several_folders(tmp_path, image_folder, animals, judge_folder):
    train, names = animals.train, animals.source_names
    rows = [(train.image(i), names[train.labels[i]], names[train.labels[i]], 1.0, "") for i in range(len(train))]
    folders = [str(evaluating.write_subset(tmp_path / name, rows, evaluating.FIVE)) for name in ("one", "two")]
    config = tmp_path / "config"
    config.mkdir()
    (config / "synthetic_datasets.yaml").write_text(yaml.safe_dump({animals.name: {"pair": folders}}))
    argv = ["--dataset", f"folder:{image_folder}", "--syndata_key", "pair", "--by", "classifier", "--keep", "0.5"]
    argv += ["--classifier", str(judge_folder), "--config_dir", str(config), "--register_key", "half", "--gpu", "cpu"]
    assert command.main(argv) == 0
    assert registry.subsets(animals.name, "half", config) == [f"{registry.shown_path(f)}#filtered" for f in folders]
    assert registry.subsets(animals.name, "pair#filtered", config) == [f"{f}#filtered" for f in folders]
    assert len(read_subset(f"{folders[1]}#filtered", animals)) == 9
    evaluating.write_subset(tmp_path / "three", [(rows[-1][0], names[0], names[0], 1.0, "")], evaluating.FIVE)
    argv = [
        *argv[:2],
        "--syndata_dir",
        folders[0],
        str(tmp_path / "three"),
        "--by",
        "classifier",
        "--threshold",
        "0.5",
    ]
    argv += ["--min_per_class", "0", "--classifier", str(judge_folder), "--gpu", "cpu", "--name", "strict"]
    with pytest.raises(UserError, match="keeps none of 1 images of .*three .*: nothing was written"):
        command.main(argv)
    assert not (tmp_path / "one" / "meta-strict.csv").exists()


def test_a_class_that_would_be_emptied_is_named(image_folder, animals, subset, judge_folder, capsys):
    argv = arguments(image_folder, subset, classifier=judge_folder, threshold=1.0)
    assert command.main(argv) == 0
    assert "target classes have too few images above --threshold 1 and keep their best 1" in capsys.readouterr().out
    assert len(np.unique(read_subset(f"{subset}#filtered", animals).target)) == 3
    with pytest.raises(UserError, match="--threshold 1 keeps none of 18 images .*nothing was written; lower it"):
        command.main([*argv, "--name", "none", "--min_per_class", "0"])
    assert not (subset / "meta-none.csv").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": 0.5}, "--by classifier needs a model: give --classifier"),
        ({"keep": 0.5, "by": "clip"}, "--by clip needs a model: give --clip"),
        ({"keep": 0.5, "by": "both", "classifier": "x"}, "--by both needs a model: give --clip"),
        ({"keep": 0.5, "by": "clip", "clip": "x"}, "has no super-class; give --super_class"),
        ({"keep": 0.5, "by": "taste"}, "invalid choice: 'taste'"),
        ({"keep": 0}, "--keep: 0: expected a number in (0, 1]"),
        ({"keep": 0.5, "threshold": 0.5}, "--threshold: not allowed with argument --keep"),
        ({}, "one of the arguments --keep --threshold is required"),
        ({"keep": 0.5, "classifier": "x", "name": "a/b"}, "--name 'a/b': expected ASCII letters"),
        ({"keep": 0.5, "classifier": "gone"}, "gone holds no finished classifier"),
    ],
)
def test_the_filter_refuses_in_one_line(image_folder, subset, changes, message, capsys):
    assert run_main(command.main, arguments(image_folder, subset, **changes)) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in last and last.startswith("error: ")
    assert not list(subset.glob("meta-*")) and not list(subset.glob("filter-*"))


@pytest.mark.slow
def test_precision_on_photographs_with_planted_noise_and_wrong_cells(tmp_path):
    """ELPV: 160 photographs under their own label, 40 planted ones (noise, and cells of the other type), a share of 0.8."""
    splits = elpv.read()
    train, val, side = splits["train"], splits["val"], 96
    rng = np.random.default_rng(0)
    fitted = train.take(rng.permutation(len(train))[:800])
    judge = evaluating.write_judge(
        tmp_path / "judge", [fitted.image(i) for i in range(len(fitted))], fitted.labels, train.class_names, side
    )
    mono = np.array([name.startswith("mono") for name in val.class_names])
    rows, bad = [], []
    for label, name in enumerate(val.class_names):
        mine = rng.permutation(np.flatnonzero(val.labels == label))
        other = rng.permutation(np.flatnonzero(mono[val.labels] != mono[label]))
        # where the split has fewer than 20 of a class, some come twice
        rows += [(val.image(i), name, name, 1.0, "") for i in np.resize(mine, 20)]
        rows += [(evaluating.noise(int(rng.integers(1 << 30)), 128), name, name, 1.0, "") for _ in range(3)]
        rows += [(val.image(i), name, name, 1.0, "") for i in other[:2]]
        bad += [False] * 20 + [True] * 5
    subset = evaluating.write_subset(tmp_path / "planted", rows, evaluating.FIVE)
    argv = ["--dataset", "elpv", "--syndata_dir", str(subset), "--by", "classifier", "--classifier", str(judge)]
    assert command.main([*argv, "--keep", "0.8", "--gpu", "cpu"]) == 0
    dropped = np.array([row["kept"] == "0" for row in evaluating.read_rows(subset / "filter-filtered" / "scores.csv")])
    bad = np.array(bad)
    precision = bad[dropped].mean()
    print(
        f"precision {precision:.3f}: {(bad & dropped).sum()} of {bad.sum()} planted images among {dropped.sum()} dropped"
    )
    assert dropped.sum() == bad.sum() == 40 and precision > 0.7  # by chance it would be 0.2
