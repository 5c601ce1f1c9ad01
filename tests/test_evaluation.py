"""Measures of synthetic images against known answers, and the commands ``measure`` and ``pictures``."""

import json
import os
import shlex
import shutil
import subprocess
import sys

import evaluating
import numpy as np
import pytest
import scipy.stats
import torch
import yaml
from helpers import ROOT, exchange
from PIL import Image

import tiny
from semantic_aug.classify.features import load_extractor
from semantic_aug.datasets import Setting, load_dataset
from semantic_aug.datasets.sets import elpv
from semantic_aug.errors import UserError, run_main
from semantic_aug.evaluation import __main__ as command
from semantic_aug.evaluation.quality import distances, faithfulness, gallery, measure, pictures, report
from semantic_aug.evaluation.quality.clip import clip_score, load_clip, presence
from semantic_aug.evaluation.quality.inputs import Inputs, ModelSettings, open_subset

NAMES = ("blue jay", "red fox", "toad")
FRECHET = "frechet_tf_efficientnet_lite0"
"""Column of the Frechet distance over the features of the default network."""


def translated(animals, strengths=(0.3, 0.9), copies=False):
    """Six images per strength: at the low one they look like the source, at the high one like the target.

    With ``copies`` they are the training images themselves.
    """
    rows, train = [], animals.train
    for strength in strengths:
        for label, name in enumerate(animals.source_names):
            for k in range(2):
                source = int(np.flatnonzero(train.labels == label)[k])
                target = (label + 1) % 3
                like = int(np.flatnonzero(train.labels == (target if strength > 0.5 else label))[3 + k])
                image = train.image(source if copies else like)
                if not copies:
                    image = Image.fromarray(np.roll(np.asarray(image), 3, axis=1))
                rows.append((image, name, animals.source_names[target], strength, train.keys[source]))
    return rows


@pytest.fixture(scope="module")
def subset(animals, tmp_path_factory):
    return evaluating.write_subset(tmp_path_factory.mktemp("subsets") / "mixed", translated(animals))


def arguments(image_folder, subset, out, **changes):
    flags = {
        "dataset": f"folder:{image_folder}",
        "syndata_dir": subset,
        "res_mode": 32,
        "gpu": "cpu",
        "cache": "off",
        "output_dir": out,
        **changes,
    }
    return [w for k, v in flags.items() for w in (f"--{k}", *map(str, v if isinstance(v, (list, tuple)) else [v]))]


# ---------------------------------------------------------------------------------------------------- distances


def test_frechet_distance_of_equal_sets_is_zero_and_of_gaussians_is_the_closed_form():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(500, 12))
    assert distances.frechet_distance(a, a) < 1e-9
    assert distances.frechet_distance(a[:6], a[:6]) < 1e-9  # fewer images than dimensions
    # two sets with diagonal covariances: the distance is |m|^2 + sum (s_a - s_b)^2, made exact by whitening
    white = np.linalg.qr(a - a.mean(0))[0] * np.sqrt(len(a) - 1)
    scale_a, scale_b, shift = rng.uniform(0.5, 2, 12), rng.uniform(0.5, 2, 12), rng.normal(size=12)
    exact = (shift**2).sum() + ((scale_a - scale_b) ** 2).sum()
    assert distances.frechet_distance(white * scale_a, white * scale_b + shift) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize(("n", "m"), [(40, 60), (8, 60), (8, 5)])
def test_frechet_distance_equals_the_formula_with_a_matrix_root(n, m):
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(n, 10)), rng.normal(1, 2, size=(m, 10))
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    nudge = 1e-10 * np.eye(10)  # the library's root wants a matrix that is not singular
    root = linalg.sqrtm((ca + nudge) @ (cb + nudge)).real
    exact = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * root)
    assert distances.frechet_distance(a, b) == pytest.approx(exact, rel=1e-3)


def test_kernel_distance_is_the_unbiased_estimate():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(7, 5)), rng.normal(0.5, 1, size=(7, 5))

    def k(x, y):
        return (x @ y / 5 + 1) ** 3

    pairs = [(i, j) for i in range(7) for j in range(7)]
    within = sum(k(s[i], s[j]) for s in (a, b) for i, j in pairs if i != j) / 42
    exact = within - 2 * sum(k(a[i], b[j]) for i, j in pairs) / 49
    mean, std = distances.kernel_distance(a, b, np.random.default_rng(0), subsets=3, size=7)
    assert mean == pytest.approx(exact, rel=1e-9) and std < 1e-9
    # zero on average between samples of one distribution, also of very few images; FID is not
    trials = [distances.kernel_distance(*rng.normal(size=(2, 10, 6)), rng, subsets=1, size=10)[0] for _ in range(2000)]
    error = np.std(trials) / np.sqrt(len(trials))
    assert abs(np.mean(trials)) < 4 * error and np.mean(trials) < np.std(trials) / 5
    assert np.isnan(distances.kernel_distance(a[:1], b, rng)).all() and np.isnan(distances.frechet_distance(a[:1], b))


def test_neighbours_and_spread_equal_looking_at_every_pair():
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(30, 4)).astype(np.float32), rng.normal(size=(20, 4)).astype(np.float32)

    def far(x, y):
        return 1 - x @ y / np.linalg.norm(x) / np.linalg.norm(y)

    table = np.array([[far(x, y) for y in b] for x in a])
    result, rows = distances.neighbours(a, b, 3)
    assert np.allclose(result, np.sort(table, 1)[:, :3], atol=1e-6) and (rows == np.argsort(table, 1)[:, :3]).all()
    assert (distances.neighbours(a, a, 1, skip_self=True)[1][:, 0] != np.arange(30)).all()
    pairs = [far(a[i], a[j]) for i in range(30) for j in range(i)]
    assert distances.mean_pairwise(a) == pytest.approx(np.mean(pairs), rel=1e-5)
    assert np.isnan(distances.mean_pairwise(a[:1]))


def test_the_fitting_gamma_is_the_one_that_the_predictions_were_drawn_with():
    rng = np.random.default_rng(5)
    for gamma in (0.3, 1.0, 6.0):
        strengths = rng.choice([0.3, 0.5, 0.7, 0.9], 4000)
        target = rng.binomial(1, strengths**gamma).astype(float)
        assert faithfulness.fitting_gamma(strengths, 1 - target, target) == pytest.approx(gamma, rel=0.1)
    one = faithfulness.fitting_gamma(np.full(3, 0.5), np.array([0.6, 0.2, 0.1]), np.array([0.2, 0.0, 0.1]))
    assert one == pytest.approx(2, rel=1e-3)  # 0.3 of 1.2: a quarter
    never, always = np.zeros(4), np.ones(4)
    assert faithfulness.fitting_gamma(np.full(4, 0.9), always, never) > 99
    assert faithfulness.fitting_gamma(np.full(4, 0.9), never, always) < 0.0101


def test_intervals_of_distances_hold_for_other_images():
    """Of 60 draws of 50 images, about 57 intervals hold what very many images give."""
    rng = np.random.default_rng(4)

    def draw(n, shift=0.0):
        return (rng.normal(size=(n, 3)) * (1, 0.5, 0.2) + (1 + shift, 0, shift)).astype(np.float32)

    spread = distances.mean_pairwise(draw(50_000))
    kernel = distances.kernel_distance(draw(1500), draw(1500, 0.3), rng, subsets=1, size=1500)[0]
    held = np.zeros(2)
    for _ in range(60):
        a, b = draw(50), draw(50, 0.3)
        values = distances.resampled_pairwise(a, rng), distances.resampled_kernel(a, b, rng)
        for i, truth in enumerate((spread, kernel)):
            low, high = measure.percentile_interval(values[i])
            held[i] += low < truth < high
    assert (held >= 51).all(), held
    assert measure.percentile_interval(distances.resampled_pairwise(a[:2], rng)) is None
    images = measure.ImageSet("", np.array([0, 0, 0, 0, 0, 1, 1]), None, a[:7], {})
    assert images.class_distance_interval(np.arange(5), rng) and not images.class_distance_interval(np.arange(7), rng)
    assert measure.percentile_interval(distances.resampled_kernel(a[:2], b, rng)) is None


def test_halves_of_real_photographs_are_near_and_noise_is_far():
    """The known answers on real data, with real ImageNet features."""
    train = elpv.read()["train"]
    picked = train.take(np.random.default_rng(0).permutation(len(train))[:240])
    extractor = load_extractor(resolution=64, keep=False)
    real = extractor.features(picked.image, len(picked))
    wrong = extractor.features(evaluating.noise, 120)
    assert real.shape == (240, 1280) and real.dtype == np.float32
    order = np.random.default_rng(1).permutation(240)
    first, second = real[order[:120]], real[order[120:]]
    halves, far = distances.frechet_distance(first, second), distances.frechet_distance(first, wrong)
    assert far > 5 * halves > 0
    mean, std = distances.kernel_distance(first, second, np.random.default_rng(0))
    off, _ = distances.kernel_distance(first, wrong, np.random.default_rng(0))
    assert abs(mean) < std and off > 20 * std
    print(f"FID {halves:.1f} between halves, {far:.1f} to noise; KID {mean:.4f} +- {std:.4f}, {off:.4f} to noise")
    near = distances.neighbours(second, first)[0].mean()
    assert distances.neighbours(wrong, first)[0].mean() > 3 * near


# ------------------------------------------------------------------------------------------------- faithfulness


def test_scores_and_label_mass_follow_the_labels(animals, subset):
    from semantic_aug.datasets.synthetic import read_subset

    images = read_subset(subset, animals)
    p = np.tile([0.2, 0.5, 0.3], (len(images), 1))
    result = faithfulness.scores(p, images, gamma=0.5)
    i = int(np.flatnonzero((images.source == 0) & (images.strength == 0.9))[0])  # 0 -> 1
    weight = 0.9**0.5
    assert result["label_agreement"][i] == pytest.approx((1 - weight) * 0.2 + weight * 0.5, rel=1e-5)
    assert (result["source_probability"][i], result["target_probability"][i]) == (0.2, 0.5)
    assert result["target_top1"][i] == 1 and result["source_top1"][i] == 0
    assert faithfulness.label_mass(p, images)[i] == pytest.approx(0.7)
    same = images.take(np.array([i]))
    same.target[:] = 0
    assert faithfulness.label_mass(p[:1], same)[0] == pytest.approx(0.2)  # one class is not counted twice


def test_clip_equals_the_librarys_own_forward_pass(clip_folder):
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(clip_folder).eval(), CLIPProcessor.from_pretrained(clip_folder)
    images = [tiny.picture(label, 0) for label in range(3)]
    texts = ["a photo with a bird", "a photo without a bird"]
    with torch.inference_mode():
        out = model(**processor(text=texts, images=images, return_tensors="pt", padding=True))
    clip = load_clip(str(clip_folder))
    vectors = clip.images(images.__getitem__, 3, batch_size=2)
    shares = out.logits_per_image.softmax(-1)[:, 0].numpy()
    assert np.allclose(presence(clip, vectors, "bird"), shares, atol=1e-5) and shares.std() > 0.01
    cosines = 100 * (out.image_embeds @ out.text_embeds[0]).numpy()
    assert np.allclose(clip_score(vectors, clip.texts(texts[:1] * 3)), np.maximum(cosines, 0), atol=1e-4)


# ------------------------------------------------------------------------------------------------------ measure


def test_measure_tells_strengths_apart_and_writes_everything(
    tmp_path, image_folder, subset, judge_folder, clip_folder, capsys
):
    out = tmp_path / "out"
    argv = arguments(image_folder, subset, out, classifier=judge_folder, clip=clip_folder, reference=subset)
    assert measure.main(argv) == 0
    rows = evaluating.read_rows(out / "measures.csv")
    totals = {row["strength"]: row for row in rows if row["target_class"] == "all" and row["subset"] == "mixed"}
    assert set(totals) == {"0.3", "0.9", "all"} and totals["all"]["images"] == "12"
    assert {row["target_class"] for row in rows} == {*NAMES, "all"}
    low, high = totals["0.3"], totals["0.9"]
    assert float(low["source_top1"]) > 0.8 > 0.2 > float(low["target_top1"])
    assert float(high["target_top1"]) > 0.8 and float(high["target_probability"]) > float(low["target_probability"])
    assert float(high["source_distance"]) > float(low["source_distance"]) > 0
    assert float(low[f"reference_{FRECHET}"]) < 1e-3 < float(low[FRECHET])  # the subset is its own reference
    content = json.loads((out / "measures.json").read_text())
    assert len(content["rows"]) == len(rows) and content["copy_threshold"] > 0
    assert any("frechet distance of mixed: 12 synthetic" in note for note in content["notes"])
    whole = {"subset": "mixed", "strength": "all", "target_class": "all"}
    total = next(row for row in content["rows"] if whole.items() <= row.items())
    shares = measure.read_images(out / "images.csv", "mixed", sorted((subset / "data").rglob("*.png")))
    target, source = (shares[f"{name}_probability"][:6].sum() for name in ("target", "source"))  # of s = 0.3
    fitting = float(low["fitting_gamma"])
    assert fitting == pytest.approx(np.log(target / (target + source)) / np.log(0.3), rel=1e-3)
    assert float(high["fitting_gamma"]) < 1 < fitting  # at 0.9 images look like the target, at 0.3 like the source
    values = shares["source_distance"]
    interval = scipy.stats.t.interval(0.95, 11, values.mean(), scipy.stats.sem(values))
    assert total["intervals"]["source_distance"] == pytest.approx(interval, rel=1e-4)
    text = f"95 % interval: {interval[0]:.3g} to {interval[1]:.3g}"
    page, table = (out / "report.html").read_text(), (out / "measures.md").read_text()
    for name in ("class_distance", FRECHET.replace("frechet", "kernel")):
        low_end, high_end = total["intervals"][name]
        assert low_end < total[name] < high_end and f"95 % interval: {low_end:.3g} to {high_end:.3g}" in page
    assert FRECHET not in total["intervals"] and "no interval: resampled images repeat" in page
    assert (
        text in page and f'<a href="{os.path.relpath(subset, out)}/">' in page and "faithfulness_diversity.png" in page
    )
    assert "evaluation gallery --dataset" in table and "| mixed | 0.3 | 6 |" in table
    with Image.open(out / "faithfulness_diversity.png") as picture:
        assert picture.size[0] > 400
    output = capsys.readouterr().out
    assert "| mixed | 0.3 | 6 |" in output and "| real | all | 18 |" in output and "near-copies" in output
    assert measure.main(argv) == 0  # the same again is no other run
    with pytest.raises(UserError, match="other arguments .*gamma.*choose another --output_dir"):
        measure.main([*argv, "--gamma", "0.9"])
    picture = next(subset.rglob("*.png"))
    kept = picture.read_bytes()
    try:
        exchange(picture, kept[:-1] + bytes([kept[-1] ^ 1]))
        with pytest.raises(UserError, match="mixed: 12 images as before, the same labels, other content.*--output_dir"):
            measure.main(argv)
    finally:
        picture.write_bytes(kept)


def test_the_command_for_the_missing_gallery_runs(tmp_path, image_folder, animals):
    other = [(*row[:4], "elsewhere.png") for row in translated(animals)]
    known, foreign = (
        evaluating.write_subset(tmp_path / name, rows)
        for name, rows in (("known", translated(animals)), ("foreign", other))
    )
    (known / "meta-few.csv").write_text("".join((known / "meta.csv").read_text().splitlines(keepends=True)[:7]))
    (tmp_path / "config").mkdir()
    registered = {animals.name: {"pair": [f"{known}#few", str(foreign)]}}
    (tmp_path / "config" / "synthetic_datasets.yaml").write_text(yaml.safe_dump(registered))
    requests = (
        {"syndata_dir": f"{known}#few"},
        {"syndata_dir": foreign, "allow_other_sources": True},
        {"syndata_key": "pair", "config_dir": tmp_path / "config", "allow_other_sources": True},
    )
    for number, request in enumerate(requests):
        flags = {"res_mode": 32, "gpu": "cpu", "cache": "off", "output_dir": tmp_path / f"measures{number}", **request}
        given = [f"--{name}" if value is True else f"--{name}={value}" for name, value in flags.items()]
        assert measure.main([f"--dataset=folder:{image_folder}", *given]) == 0
        lines = (tmp_path / f"measures{number}" / "measures.md").read_text().splitlines()
        arguments = next(shlex.split(line) for line in lines if "evaluation gallery" in line)
        assert gallery.main([*arguments[4:], "--gpu", "cpu"]) == 0
        for folder in (known, foreign):
            shutil.rmtree(folder / "gallery", ignore_errors=True)


def test_images_subsets_and_classifier_may_be_moved(tmp_path, image_folder, subset, judge_folder):
    former = [image_folder, subset, judge_folder]
    moved = [tmp_path / "elsewhere" / path.name for path in former]
    (tmp_path / "elsewhere").mkdir()
    for path, place in zip(former, moved, strict=True):
        place.symlink_to(path)
    for data, images, judge in (former, moved):
        assert measure.main(arguments(data, images, tmp_path / "out", classifier=judge)) == 0
    with pytest.raises(UserError, match=r"made from other data \(classifier: none now"):
        measure.main(arguments(image_folder, subset, tmp_path / "out"))


def test_a_damaged_image_is_refused_and_may_be_replaced(tmp_path, image_folder, animals, capsys):
    subset = evaluating.write_subset(tmp_path / "subset", translated(animals, strengths=(0.9,)))
    image = sorted(subset.rglob("*.png"))[-1]  # not on the first sheet, which is made before
    whole = image.read_bytes()
    for name, main in (("measure", measure.main), ("pictures", pictures.main)):
        image.write_bytes(whole[:300])
        argv = arguments(image_folder, subset, tmp_path / name, **({"rows": 1} if name == "pictures" else {}))
        assert run_main(main, argv) == 2 and "replace it or remove it" in capsys.readouterr().err
        assert not (tmp_path / name).exists()
        image.write_bytes(whole)
        assert main(argv) == 0


def test_copies_are_found_where_every_photograph_stands_twice(tmp_path):
    rows = [(evaluating.noise(k, 16), "ab"[k % 2], "ab"[k % 2], 1.0, "") for k in range(4)]
    for k, (image, name, *_) in enumerate(rows * 2):
        (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "data" / name / f"{k}.png")
    rows = [*rows, (evaluating.noise(9, 16), "a", "a", 1.0, "")]
    subset = evaluating.write_subset(tmp_path / "copies", rows, evaluating.FIVE)
    dataset = load_dataset(f"folder:{tmp_path / 'data'}", Setting(val_fraction=0))
    extractor = load_extractor("test_resnet", "none", 32, keep=False)
    measurer = measure.Measurer(Inputs(dataset, [], ModelSettings(), {}), extractor)
    images = measurer.measure_subset(open_subset("copies", [subset], dataset), *measurer.measure_real())
    assert images.values["near_copies"].tolist() == [True] * 4 + [False]


def test_a_subset_of_another_tool_is_measured_without_what_it_lacks(tmp_path, image_folder, animals, capsys):
    rows = translated(animals, strengths=(0.9,), copies=True)
    other = evaluating.write_subset(tmp_path / "other", rows, evaluating.FIVE)
    assert measure.main(arguments(image_folder, other, tmp_path / "out")) == 0
    output = capsys.readouterr().out
    for note in (
        "source_distance of other is left out: it needs the column 'Source Image'",
        "they need --classifier",
        "clip_score is left out: it needs --clip",
        "faithfulness_diversity.png is left out: it needs --classifier or --clip",
    ):
        assert note in output
    row = next(r for r in evaluating.read_rows(tmp_path / "out" / "measures.csv") if r["target_class"] == "all")
    assert (
        not {"source_distance", "target_probability", "clip_score"} & set(row)
        and FRECHET.replace("frechet", "kernel") in row
    )
    assert float(row["near_copies"]) == 1.0 and float(row["nearest_real"]) < 1e-5  # they are training images
    assert not (tmp_path / "out" / "faithfulness_diversity.png").exists()


def test_a_chart_without_diversity_does_not_ask_for_the_classifier_that_was_given(
    tmp_path, image_folder, animals, judge_folder, capsys
):
    rows = translated(animals, strengths=(0.9,))[::2]  # one image per class, and no sources
    other = evaluating.write_subset(tmp_path / "other", rows, evaluating.FIVE)
    assert measure.main(arguments(image_folder, other, tmp_path / "out", classifier=judge_folder)) == 0
    output = capsys.readouterr().out
    assert (
        "faithfulness_diversity.png is left out: every subset and strength needs a distance of the same kind" in output
    )
    assert "needs --classifier" not in output and not (tmp_path / "out" / "faithfulness_diversity.png").exists()


CONTENT = "a digest of the images"


def test_features_are_kept_and_found_again(tmp_path, monkeypatch, animals):
    monkeypatch.setenv("DIFFMIX_CACHE", str(tmp_path))
    train, read = animals.train, []

    def image(index):
        read.append(index)
        return train.image(index)

    extractor = load_extractor(weights="none", resolution=32)
    first = extractor.features(image, len(train), CONTENT)
    again = load_extractor(weights="none", resolution=32).features(image, len(train), CONTENT)
    assert np.array_equal(first, again) and len(read) == len(train)
    other = load_extractor(weights="none", resolution=48).features(image, len(train), CONTENT)
    assert len(read) == 2 * len(train) and not np.allclose(first, other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"syndata_dir": ["gone"]}, "subset gone is not a folder"),
        ({"syndata_key": "nothing"}, "unknown subset key of data set 'animals-"),
        ({"classifier": "gone"}, "gone holds no finished classifier"),
        ({"clip": "gone"}, "--clip gone cannot be loaded"),
        ({"model": "resnet51"}, "unknown --model 'resnet51': did you mean"),
        ({"reference": "gone"}, "subset gone is not a folder"),
        ({"gpu": "fast"}, "--gpu fast: expected a GPU number or the word cpu"),
        ({"gamma": "0"}, "--gamma: 0: expected a number in"),
    ],
)
def test_measure_refuses_in_one_line(tmp_path, image_folder, subset, changes, message, capsys):
    assert run_main(measure.main, arguments(image_folder, subset, tmp_path / "out", **changes)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1] and lines[-1].startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_a_subset_is_never_shown_under_the_name_of_the_training_images(tmp_path, image_folder, subset):
    folder = tmp_path / "real"
    folder.symlink_to(subset, target_is_directory=True)
    argv = arguments(image_folder, folder, tmp_path / "out")
    assert measure.main(argv) == 0
    names = [row["subset"] for row in evaluating.read_rows(tmp_path / "out" / "measures.csv")]
    assert set(names) == {"real", "subset real"}


def test_subsets_must_be_given_once_and_the_judge_must_know_the_classes(tmp_path, image_folder, subset, capsys):
    argv = arguments(image_folder, subset, tmp_path / "out")
    bare = argv[:2] + argv[4:]
    with pytest.raises(UserError, match="no synthetic subset is given: expected --syndata_key or --syndata_dir"):
        measure.main(bare)
    with pytest.raises(UserError, match="is given twice"):
        measure.main([*bare, "--syndata_dir", str(subset), str(subset)])
    images = [tiny.picture(label, k) for label in range(3) for k in range(4)]
    other = evaluating.write_judge(tmp_path / "judge", images, [0] * 4 + [1] * 4 + [2] * 4, ("cat", "dog", "cow"), 32)
    with pytest.raises(UserError, match="--classifier has 3 classes, which differ from the 3 of animals"):
        measure.main([*argv, "--classifier", str(other)])


# ----------------------------------------------------------------------------------------------------- pictures


def test_pictures_show_translations_neighbours_and_failures(
    tmp_path, image_folder, animals, subset, judge_folder, capsys
):
    out = tmp_path / "out"
    other = evaluating.write_subset(tmp_path / "other", translated(animals), evaluating.FIVE)
    argv = arguments(image_folder, [subset, other], out, classifier=judge_folder, rows=4, size=32)
    assert pictures.main(argv) == 0
    names = {
        "translations.png",
        *(f"{kind}-{n}.png" for kind in ("neighbours", "failures") for n in ("mixed", "other")),
    }
    assert {path.name for path in out.glob("*.png")} == names
    with Image.open(out / "translations.png") as sheet:
        assert sheet.height > 4 * 32
    alone = arguments(image_folder, other, tmp_path / "alone", rows=4, size=32)
    assert pictures.main(alone) == 0
    output = capsys.readouterr().out
    assert "translations are left out: they need the column 'Source Image'" in output
    assert "failures are left out: they need --classifier" in output
    assert {path.name for path in (tmp_path / "alone").glob("*.png")} == {"neighbours-all.png"}
    with pytest.raises(UserError, match="--kinds failures needs a classifier: give --classifier"):
        pictures.main([*alone, "--kinds", "failures"])


def test_sources_are_shown_over_all_classes(animals, subset):
    from semantic_aug.evaluation.quality.inputs import open_subset

    opened = open_subset("mixed", [str(subset)], animals)
    shown = pictures.chosen_sources([opened], animals.train.labels, 3, seed=0)
    assert sorted(animals.train.labels[shown].tolist()) == [0, 1, 2] and set(shown) <= set(opened.sources.tolist())


# ------------------------------------------------------------------------------------------------------ command


def test_the_command_line_lists_its_commands_and_knows_the_nearest(capsys):
    assert command.main(["--help"]) == 0
    output = capsys.readouterr().out
    assert all(f"\n  {name} " in output for name in command.COMMANDS)
    done = subprocess.run(
        [sys.executable, "-m", "semantic_aug.evaluation", "mesure"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "unknown command 'mesure': did you mean 'measure'?" in done.stderr


@pytest.mark.parametrize("name", ["filter", "measure", "pictures"])
def test_help_is_quick_and_gives_every_flag_a_text(name):
    import importlib

    for action in importlib.import_module(command.COMMANDS[name]).build_parser()._actions:
        assert action.help and len(action.help) > 3, action.option_strings
    code = f"import sys, {command.COMMANDS[name]} as m; m.build_parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0, "--help should not wait for torch"


def test_names_with_dollars_are_no_formulas_in_the_chart(tmp_path):
    values = {"target_class": report.ALL, "strength": report.ALL, "source_distance": 0.2, "target_probability": 0.5}
    report.draw(
        tmp_path / "x.png", [{"subset": "$5 (10%) to $10", **values}], ("source_distance", "target_probability")
    )
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
