"""Headroom: curves with known shapes, what more images would win, the verdict's rule, and the command on real images."""

import csv
import shutil
from dataclasses import replace

import numpy as np
import pytest
from helpers import ROOT

import tiny
from semantic_aug import runs
from semantic_aug.errors import UserError, run_main
from semantic_aug.evaluation.experiments import compare, headroom, learning_curve
from semantic_aug.evaluation.experiments.learning_curve import Curve, Gain, Pool

CLASSES, EVALUATED = 4, 400


def power_curve(sizes, slope, ceiling=0.0, start=0.6, draws=5):
    """A curve whose error is ceiling + start * size^slope, the same images being wrong under every draw."""
    labels = np.repeat(np.arange(CLASSES), EVALUATED // CLASSES)
    predicted = np.zeros((len(sizes), draws, EVALUATED), np.int64)
    for row, size in enumerate(sizes):
        wrong = round((ceiling + start * size**slope) * EVALUATED / CLASSES)
        for label in range(CLASSES):
            of_class = np.flatnonzero(labels == label)
            predicted[row, :, of_class] = label
            predicted[row, :, of_class[:wrong]] = (label + 1) % CLASSES
    names = tuple("abcd")
    available = np.full(CLASSES, sizes[-1])
    return Curve(tuple(sizes), np.asarray(sizes, float), predicted, labels, tuple(map(str, labels)), names, available)


def test_the_gain_beyond_the_images_there_are_follows_the_power_law():
    curve = power_curve((1, 2, 5, 10), slope=-0.5, start=0.8)
    gain = learning_curve.gain_of(curve, 10, 4)
    now = 0.8 * 10**-0.5
    assert not gain.measured and gain.points == pytest.approx(now - now * 4**-0.5, abs=0.01)
    assert gain.share == pytest.approx(0.5, abs=0.02) and gain.low < gain.points < gain.high
    assert learning_curve.verdict(curve, gain) == learning_curve.WORTH


def test_the_gain_is_measured_where_the_images_are_there():
    # steep up to 10, flat beyond: the law through the first sizes would promise half of the errors
    curve = power_curve((1, 2, 5, 10), slope=-0.5)
    flat = power_curve((1, 2, 5, 10, 20, 40), slope=0, start=float(1 - curve.macro[-1, 0]))
    both = replace(flat, predicted=flat.predicted.copy())
    both.predicted[:4] = curve.predicted
    gain = learning_curve.gain_of(both, 10, 4)
    assert gain.measured and gain.points == pytest.approx(0, abs=1e-9)
    assert learning_curve.verdict(both, gain) == learning_curve.NOT_WORTH


def test_a_gain_is_measured_at_four_times_the_images_and_not_at_the_next_size():
    curve = power_curve((1, 2, 5, 10, 16, 31), slope=-0.5)  # small classes keep the size 20 at 16 images per class
    gain = learning_curve.gain_of(curve, 5, 4)
    assert gain.measured and gain.points == pytest.approx(0.6 * (5**-0.5 - 20**-0.5), abs=0.01)


def test_a_gain_extrapolated_from_the_large_classes_alone_says_nothing():
    even = power_curve((1, 2, 5, 10), slope=-0.5, ceiling=0.4, start=0.3)
    uneven = replace(even, available=np.array([10, 10, 10, 2]))
    gain = learning_curve.gain_of(uneven, -1, 4)
    assert learning_curve.verdict(even, learning_curve.gain_of(even, -1, 4)) == learning_curve.NOT_WORTH
    assert not gain.measured and learning_curve.verdict(uneven, gain) == learning_curve.UNKNOWN
    report = headroom.Headroom("x", headroom.HeadroomSettings(), True, uneven, 3, (gain,))
    assert report.sentence.endswith("(extrapolated, and the smallest class has 2 training images).")
    assert "the smallest class has 2 training images, so that" in headroom.report_of(report).markdown()
    measured = learning_curve.gain_of(uneven, 2, 4)  # there are four times as many
    assert measured.measured and learning_curve.verdict(uneven, measured) == learning_curve.NOT_WORTH


def test_images_of_a_class_without_training_images_are_not_hard():
    curve = power_curve((2, 5, 10), slope=0, start=0.5)
    assert curve.always_wrong(2).sum() == EVALUATED / 2
    untrained = replace(curve, available=np.array([0, 10, 10, 10]))
    assert set(curve.labels[untrained.always_wrong(2)]) == {1, 2, 3}


def test_labels_that_cap_the_accuracy_make_it_not_worth_it():
    curve = power_curve((2, 5, 10, 20, 40), slope=-0.5, ceiling=0.4, start=0.3)
    gain = learning_curve.gain_of(curve, 10, 4)
    assert gain.points < 0.08 and gain.share < 0.15  # 0.4 of the images stay wrong whatever there is
    assert learning_curve.verdict(curve, gain) == learning_curve.NOT_WORTH
    assert curve.always_wrong(4).mean() == pytest.approx(0.44, abs=0.02)
    rate, a, b = curve.confused(4)[0]  # each class is taken for the next, never the other way round
    assert rate == pytest.approx(0.22, abs=0.01) and (a - b) % CLASSES in (1, 3)


@pytest.mark.parametrize(
    ("promising", "wanted"), [(0.9, "worth it"), (0.5, "too little data to say"), (0.1, "probably not")]
)
def test_the_rule(promising, wanted):
    gain = Gain(4, True, 0.1, 0.0, 0.2, 0.4, promising)
    assert learning_curve.verdict(power_curve((2, 5, 10), -0.5), gain) == wanted
    few = power_curve((2, 5), -0.5)
    extrapolated = Gain(4, False, 0.1, 0.0, 0.2, 0.4, promising)
    assert learning_curve.verdict(few, extrapolated) == learning_curve.UNKNOWN


def test_folds_evaluate_every_image_once_and_draws_are_nested():
    labels = np.repeat(np.arange(3), (4, 9, 12))
    pool = Pool(np.zeros((25, 2), np.float32), labels, np.zeros(25, bool), ("a", "b", "c"), tuple(map(str, range(25))))
    folds = list(pool.folds(0))
    assert sorted(np.concatenate([rows for _, rows in folds])) == list(range(25))
    for drawn, evaluated in folds:
        assert not set(drawn) & set(evaluated) and len(drawn) + len(evaluated) == 25
        assert (np.bincount(labels[drawn], minlength=3) >= pool.available()).all()
    assert pool.available().tolist() == [3, 7, 9]
    assert learning_curve.sizes_of(pool.available(), 3) == (1, 2, 3, 5, 6, 9)
    held = Pool(pool.features, labels, np.arange(25) % 2 == 0, pool.class_names, pool.keys)
    ((drawn, evaluated),) = held.folds(1)
    assert not held.held_out[drawn].any() and held.held_out[evaluated].all()


def test_the_linear_classifier_separates_what_a_line_separates():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 40)
    features = (rng.normal(size=(120, 6)) + 4 * np.eye(3, 6)[labels]).astype(np.float32)
    train = np.arange(120) % 2 == 0
    predicted = learning_curve.linear_predictions(features, labels, np.flatnonzero(train), np.flatnonzero(~train))
    assert (predicted == labels[~train]).mean() > 0.95


def test_the_command_writes_its_report_and_never_reads_test(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DIFFMIX_CACHE", str(tmp_path / "cache"))
    folder = tiny.write_image_folder(tmp_path / "animals")
    for file in (folder / "test").rglob("*.png"):
        file.write_bytes(b"not an image")
    out = tmp_path / "out"
    argv = [
        "--dataset",
        f"folder:{folder}",
        "--weights",
        "none",
        "--res_mode",
        "32",
        "--gpu",
        "cpu",
        "--output_dir",
        str(out),
    ]
    assert headroom.main([*argv, "--seeds", "0", "1"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("headroom of animals") and "too little data to say" in first
    report = (out / headroom.REPORT).read_text()
    assert first[1:] in report and "cross-validation" in report and (out / headroom.CHART).stat().st_size > 5000
    assert "too little data to say" in (out / "report.html").read_text()
    rows = list(csv.DictReader((out / headroom.TABLE).read_text().splitlines()))
    assert {row["seed"] for row in rows} == {"0", "1"} and all(0 <= float(row["macro"]) <= 1 for row in rows)
    (out / headroom.SUMMARY).write_text('{"verdict": "too')  # cut off: it is measured again, the same
    assert headroom.main([*argv, "--seeds", "0", "1"]) == 0
    assert (out / headroom.REPORT).read_text() == report
    assert run_main(headroom.main, [*argv, "--seeds", "3"]) == 2
    assert "seeds: [0, 1] -> [3]" in capsys.readouterr().err


def test_a_failure_leaves_no_folder_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFMIX_CACHE", str(tmp_path / "cache"))
    folder = tiny.write_image_folder(tmp_path / "animals", train=1)
    settings = headroom.HeadroomSettings(weights="none", gpu="cpu", output_dir=tmp_path / "out")
    with pytest.raises(UserError, match="no class has two training images"):
        headroom.run(settings, f"folder:{folder}", ROOT / "config")
    assert not (tmp_path / "out").exists()


def test_compare_says_first_whether_there_is_anything_to_win(tmp_path, monkeypatch, capsys, image_folder):
    monkeypatch.setenv("DIFFMIX_CACHE", str(tmp_path / "cache"))
    argv = ["--dataset", f"folder:{image_folder}", "--examples_per_class", "2", "--gpu_ids", "cpu"]
    compare.print_headroom(compare.build_parser().parse_args(argv), tmp_path)
    first, line = capsys.readouterr().out.splitlines()
    assert first == "measuring headroom of 2shot, on at most 10 images per class"
    assert line.startswith("headroom of animals") and "too little data to say" in line
    assert (tmp_path / "headroom" / "2shot" / headroom.REPORT).is_file()
    assert "split" not in runs.load_arguments(tmp_path / "headroom" / "2shot")  # as records of earlier versions
    moved = shutil.copytree(image_folder, tmp_path / "elsewhere" / image_folder.name)  # has another default name
    compare.print_headroom(compare.build_parser().parse_args([argv[0], f"folder:{moved}", *argv[2:]]), tmp_path)
    assert capsys.readouterr().out.splitlines() == [first, line]
    tail = ["--task", "imbalanced"]  # a curve over images per class says nothing of a long tail
    compare.print_headroom(compare.build_parser().parse_args([*argv, *tail]), tmp_path)
    assert capsys.readouterr().out == ""


def printed_by_compare(capsys, folder, *argv):
    compare.print_headroom(compare.build_parser().parse_args(["--dataset", *map(str, argv)]), folder)
    return capsys.readouterr().out.splitlines()


def test_compare_measures_the_split_it_trains_on_and_no_label_noise(tmp_path, capsys, image_folder):
    half = printed_by_compare(capsys, tmp_path, f"folder:{image_folder}", "--gpu_ids", "cpu", "--split", "half")
    assert half[0] == "measuring headroom of all, on at most 200 images per class"
    assert half[1].startswith("headroom was not measured: --split half: the Diff-Mix authors take the official split")
    (noisy,) = printed_by_compare(capsys, tmp_path, f"folder:{image_folder}", "--corrupt_prob", 0.2)
    assert noisy.startswith("headroom is not measured with --corrupt_prob")
    assert not (tmp_path / "headroom").exists()


def test_no_failure_of_the_headroom_ends_a_comparison(tmp_path, monkeypatch, capsys, image_folder):
    def fail(*_):
        raise RuntimeError("DefaultCPUAllocator:\nnot enough memory")

    monkeypatch.setattr(headroom, "load_pool", fail)
    _, line = printed_by_compare(capsys, tmp_path, f"folder:{image_folder}", "--gpu_ids", "cpu")
    assert line == "headroom was not measured: DefaultCPUAllocator: not enough memory"


@pytest.mark.parametrize("shots", [1, 2, 3, 5, 16])
def test_cross_validation_leaves_four_times_the_shots(shots):
    labels = np.repeat(np.arange(2), compare.pool_per_class(shots))
    pool = Pool(np.zeros((len(labels), 1)), labels, np.zeros(len(labels), bool), ("a", "b"), tuple(map(str, labels)))
    assert pool.available().tolist() == [4 * shots, 4 * shots]


def test_a_wrong_number_of_images_is_refused():
    with pytest.raises(UserError, match="--pool_per_class 0: expected a number of images, or -1 for all"):
        headroom.HeadroomSettings(pool_per_class=0)


def test_a_draw_counts_once():
    assert headroom.HeadroomSettings(seeds=(3, 3, 1)).seeds == (3, 1)
