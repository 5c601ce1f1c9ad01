"""Pseudo-labels: which unlabelled images are taken and refused, the subset they become, and the method in a comparison."""

import re
import shutil
from dataclasses import replace

import evaluating
import numpy as np
import pytest

import tiny
from semantic_aug import runs, tensors
from semantic_aug.classify.inference import Classifier
from semantic_aug.classify.models import make_model
from semantic_aug.classify.trainer import MODEL_FILE
from semantic_aug.datasets import Setting, load_dataset
from semantic_aug.datasets.fingerprint import data_identity
from semantic_aug.datasets.settings import unlabelled_images
from semantic_aug.datasets.synthetic import UNLABELLED_FILE, read_subset
from semantic_aug.datasets.unlabelled import read_unlabelled, without_labelled
from semantic_aug.errors import UserError, run_main
from semantic_aug.evaluation.experiments import checks, compare, pseudo_label
from semantic_aug.evaluation.experiments.commands import LABEL_STEP, METHODS
from semantic_aug.evaluation.experiments.pseudo_label import UnlabelledSettings
from semantic_aug.registry import CONFIG_DIR

NAMES = ("blue jay", "red fox", "toad")


@pytest.fixture
def pool(tmp_path):
    """Nine unlabelled images of another size, in folders that say nothing, and a file that is no image."""
    for index in range(9):
        path = tmp_path / "pool" / f"batch{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        tiny.picture(index % 3, 1000 + index).resize((50, 30)).save(path)
    (tmp_path / "pool" / "notes.txt").write_text("not an image")
    return tmp_path / "pool"


@pytest.fixture
def animals(image_folder):
    return load_dataset(f"folder:{image_folder}", Setting(examples_per_class=2))


def test_a_folder_and_a_list_give_the_same_images(pool, tmp_path):
    images = read_unlabelled(pool)
    assert len(images) == 9 and images.keys[0] == "batch0/0.png" and images.image(0).size == (50, 30)
    (pool / "list.csv").write_text("id;path\n" + "".join(f"{n};{key}\n" for n, key in enumerate(images.keys)))
    assert read_unlabelled(pool / "list.csv").keys == images.keys
    again = [f"./{images.keys[0]}", str(pool / images.keys[1])]  # two images under other names
    (pool / "list.csv").write_text("path\n" + "\n".join([*images.keys, *again]))
    assert read_unlabelled(pool / "list.csv").keys == images.keys


@pytest.mark.parametrize(("split", "title"), [("test", "test"), ("val", "validation")])
def test_labelled_images_that_evaluate_are_refused_by_content(pool, animals, image_folder, split, title):
    leaked = next((image_folder / split / "toad").iterdir())
    shutil.copy(leaked, pool / "holiday.png")  # under another name
    with pytest.raises(UserError, match=f"holds 1 {title} images of animals.*'holiday.png' is '.*{leaked.name}'"):
        without_labelled(read_unlabelled(pool), animals, pool)


def test_labelled_training_images_are_left_out(pool, animals):
    shutil.copy(animals.train.encoded(int(animals.train.rows[0])), pool / "known.png")
    rest = without_labelled(read_unlabelled(pool), animals, pool)
    assert len(rest) == 9 and "known.png" not in rest.keys


def test_nothing_to_read_is_one_line(tmp_path, pool):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"--unlabelled .*empty: no image there; expected files ending in"):
        read_unlabelled(tmp_path / "empty")
    with pytest.raises(
        UserError, match="gone: not there; expected a folder of images, a list with the column path, hf:ID or"
    ):
        read_unlabelled(tmp_path / "gone")
    (pool / "list.csv").write_text("path\nbatch0/0.png\nmissing.png\n")
    with pytest.raises(UserError, match=r"1 listed images are not there \('missing.png'\)"):
        read_unlabelled(pool / "list.csv")
    (pool / "list.csv").write_text("file\nbatch0/0.png\n")
    with pytest.raises(UserError, match="expected a list with the column path"):
        read_unlabelled(pool / "list.csv")


class Judge(Classifier):
    """Gives the i-th of nine images class i % 3, with probability 0.99 for the first six and 0.6 for the rest."""

    def __init__(self):
        pass

    def probabilities(self, read, count, size=64):
        p = np.full((count, 3), 0.005)
        p[6:] = 0.2
        p[np.arange(count), np.arange(count) % 3] = np.where(np.arange(count) < 6, 0.99, 0.6)
        return p


def test_confident_images_become_a_subset_with_hard_labels(pool, animals, tmp_path):
    images = read_unlabelled(pool)
    counts = pseudo_label.label(images, Judge(), 0.95, tmp_path / "subset", [0, 1, 2], NAMES)
    assert counts.tolist() == [2, 2, 2]
    subset = read_subset(tmp_path / "subset", animals)
    labels = subset.labels(gamma=0.5, num_classes=3)
    assert len(subset) == 6 and (labels == np.eye(3)[np.arange(6) % 3]).all()
    assert np.array_equal(np.asarray(subset.image(4)), np.asarray(images.image(4)))
    with pytest.raises(UserError, match="1 unlabelled sources are validation images of animals.*'batch0/2.png'"):
        read_subset(tmp_path / "subset", replace(animals, val=images.take([images.keys.index("batch0/2.png")])))
    other = tmp_path / "other"  # of a classifier that has the last class first
    assert pseudo_label.label(images, Judge(), 0.5, other, [1, 2, 0], NAMES).sum() == 9
    assert read_subset(other, animals).labels(gamma=0.5, num_classes=3).argmax(1).tolist() == [2, 0, 1] * 3
    with pytest.raises(UserError, match=r"--pseudo_threshold 0.995: none of 9 .* reaches it \(the best has 0.990\)"):
        pseudo_label.label(images, Judge(), 0.995, tmp_path / "none", [0, 1, 2], NAMES)


def test_the_command_labels_by_a_finished_run_once(image_folder, pool, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DIFFMIX_CACHE", str(tmp_path / "cache"))
    images, labels = [tiny.picture(i % 3, 500 + i) for i in range(60)], [i % 3 for i in range(60)]
    judge = evaluating.write_judge(tmp_path / "judge", images, labels, NAMES, 64)
    out = tmp_path / "subset"
    argv = ["--dataset", f"folder:{image_folder}", "--classifier", judge, "--unlabelled", pool, "--output_dir", out]
    argv = [str(word) for word in [*argv, "--pseudo_threshold", 0.5, "--gpu", "cpu"]]
    assert pseudo_label.main([*argv, "--dry_run"]) == 0 and not out.exists()
    assert "unlabelled 9" in capsys.readouterr().out
    assert run_main(pseudo_label.main, [*argv, "--pseudo_threshold", "0.999999"]) == 2 and not out.exists()
    assert "none of 9 unlabelled images reaches it" in capsys.readouterr().err
    assert pseudo_label.main(argv) == 0
    assert "of 9 unlabelled images have a pseudo-label: blue jay" in capsys.readouterr().out
    before = (out / "meta.csv").read_bytes()
    (out / UNLABELLED_FILE).unlink()  # as an earlier version leaves it
    assert pseudo_label.main(argv) == 0 and (out / "meta.csv").read_bytes() == before
    assert (out / UNLABELLED_FILE).is_file()
    assert run_main(pseudo_label.main, [*argv, "--pseudo_threshold", "0.6"]) == 2
    assert "pseudo_threshold: 0.5 -> 0.6" in capsys.readouterr().err
    pool = pool.rename(tmp_path / "moved")  # which leaves the links of the subset without their files
    argv[argv.index("--unlabelled") + 1] = str(pool)
    assert pseudo_label.main(argv) == 0 and (out / "meta.csv").read_bytes() == before
    assert all(image.exists() for image in (out / "data").glob("*/*"))
    argv[1] = f"folder:{shutil.copytree(image_folder, tmp_path / 'elsewhere')}"  # has another default name
    assert pseudo_label.main(argv) == 0 and (out / "meta.csv").read_bytes() == before
    (pool / "more.png").write_bytes((pool / "batch0" / "0.png").read_bytes())
    assert run_main(pseudo_label.main, argv) == 2
    assert "made from other data (unlabelled:" in capsys.readouterr().err


def test_a_classifier_of_other_images_is_refused_before_the_pool_is_read(image_folder, pool, tmp_path, monkeypatch):
    run, whole = tmp_path / "run", load_dataset(f"folder:{image_folder}")
    tensors.save_tensors(run / MODEL_FILE, make_model("test_vit", 3, 32, "none")[0].state_dict(), {"classes": NAMES})
    record = {"model": "test_vit", "resolution": 32}
    record[runs.MADE_FROM] = {"data": data_identity(whole, columns=("group",))}
    (run / runs.ARGS_FILE).write_text(runs.arguments_text(record))
    argv = ["--dataset", f"folder:{image_folder}", "--unlabelled", pool, "--output_dir", tmp_path / "out", "--dry_run"]
    argv = [str(word) for word in (*argv, "--gpu", "cpu", "--classifier")]
    assert pseudo_label.main([*argv, str(run)]) == 0
    monkeypatch.setattr(pseudo_label, "read_pool", None)
    with pytest.raises(
        UserError, match="was trained on other images than those of animals.*2shot.*train: 6 images now"
    ):
        pseudo_label.main([*argv, str(run), "--examples_per_class", "2"])
    with pytest.raises(UserError, match="gone holds no finished classifier"):
        pseudo_label.main([*argv, str(tmp_path / "gone")])


# --------------------------------------------------------------------------------------------------------- compare


def parsed(image_folder, *more):
    argv = ["--dataset", f"folder:{image_folder}", "--examples_per_class", "2", "--seeds", "7", "--gpu_ids", "cpu"]
    return compare.build_parser().parse_args([*argv, *map(str, more)])


def test_the_method_labels_by_the_real_only_classifier_of_its_seed(image_folder, pool, tmp_path):
    args = parsed(image_folder, "--methods", "pseudo-label", "cutmix", "--unlabelled", pool, "--pseudo_threshold", 0.8)
    args.corrupt_prob = 0.2
    (job,) = compare.jobs_of(args, tmp_path / "out")
    names = ["classify real-only", "label unlabelled", "classify pseudo-label", "classify cutmix"]
    assert list(job.pair.steps) == names and {step.stage for step in job.pair.steps.values()} == {
        3
    }  # no base model is asked for
    assert job.pair.missing() == names
    label, student = job.pair.steps["label unlabelled"], job.pair.steps["classify pseudo-label"]
    request = pseudo_label.build_parser().parse_args(list(label.arguments[3:]))
    assert label.arguments[:3] == ("-m", "semantic_aug.evaluation", "pseudo-label")
    assert request.classifier == tmp_path / "out" / "2shot" / "seed7" / "classify" / "real-only"
    assert request.unlabelled == pool and request.pseudo_threshold == 0.8 and request.subset_seed == 7
    assert request.corrupt_prob == 0.2
    flags = dict(zip(student.arguments, student.arguments[1:], strict=False))
    assert flags["--syndata_dir"] == str(request.output_dir) and flags["--synthetic_prob"] == "0.3"
    assert flags["--seed"] == "7" and student.needs == (label.name,) and label.needs == ("classify real-only",)


def test_other_classifiers_label_too(image_folder, pool, tmp_path):
    methods = ["pseudo-label-twice", "pseudo-label-by-diff-aug"]
    (job,) = compare.jobs_of(parsed(image_folder, "--methods", *methods, "--unlabelled", pool), tmp_path / "out")
    first = ["classify real-only", "label unlabelled", "classify pseudo-label"]
    second = ["label unlabelled by pseudo-label", "classify pseudo-label-twice"]
    generated = ["ti_db", "sample diff-aug", "classify diff-aug", "label unlabelled by diff-aug"]
    assert list(job.pair.steps) == [*first, *second, *generated, "classify pseudo-label-by-diff-aug"]
    for labeller, method in (("pseudo-label", "pseudo-label-twice"), ("diff-aug", "pseudo-label-by-diff-aug")):
        label, student = job.pair.steps[f"label unlabelled by {labeller}"], job.pair.steps[f"classify {method}"]
        request = pseudo_label.build_parser().parse_args(list(label.arguments[3:]))
        assert request.classifier == tmp_path / "out" / "2shot" / "seed7" / "classify" / labeller
        flags = dict(zip(student.arguments, student.arguments[1:], strict=False))
        assert flags["--syndata_dir"] == str(request.output_dir) and "--syndata_key" not in flags
        assert label.result == f"{request.output_dir.name}/meta.csv" and student.needs == (label.name,)
        assert label.needs == (f"classify {labeller}",)
    checks.check_flags(job.pair.steps.values(), CONFIG_DIR)
    # its time is that of the synthetic images of its labeller too
    assert METHODS["pseudo-label-by-diff-aug"].step_names == {
        1: "ti_db",
        2: "sample diff-aug",
        3: "classify pseudo-label-by-diff-aug",
    }


def test_a_comparison_refuses_a_pool_with_test_images_before_it_starts(image_folder, pool, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "check_stages", lambda *_: [])
    shutil.copy(next((image_folder / "test" / "toad").iterdir()), pool / "holiday.png")
    args = parsed(image_folder, "--methods", "pseudo-label", "--unlabelled", pool)
    (job,) = compare.jobs_of(args, tmp_path / "out")
    for dry_run in (True, False):
        with pytest.raises(UserError, match="holds 1 test images"):
            compare.claim_pool(job, tmp_path / "out", load_dataset(args.dataset), CONFIG_DIR, dry_run)
        with pytest.raises(UserError, match="holds 1 test images"):
            compare.claim([job], [job], tmp_path / "out", CONFIG_DIR, dry_run=dry_run)
    (pool / "holiday.png").unlink()
    compare.claim_pool(job, tmp_path / "out", load_dataset(args.dataset), CONFIG_DIR, dry_run=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "result",
    [
        "pseudo-label/meta.csv",
        "classify/pseudo-label/results.json",
        "pseudo-label-by-diff-aug/meta.csv",
        "classify/diff-mix+unlabelled+pseudo-label/results.json",
        "aug_samples/diff-mix+unlabelled/frogs/subset/meta.csv",
        "classify/diff-mix+unlabelled/results.json",  # which stays where the images are removed
    ],
)
def test_a_setting_keeps_the_pool_of_its_first_results_and_the_threshold_of_its_labels(
    image_folder, pool, tmp_path, result
):
    dataset = load_dataset(f"folder:{image_folder}", Setting(examples_per_class=2, subset_seed=7))

    def claim(threshold):
        methods = ["pseudo-label", "diff-mix+unlabelled"]
        argv = ["--methods", *methods, "--unlabelled", pool, "--pseudo_threshold", threshold]
        (job,) = compare.jobs_of(parsed(image_folder, *argv), tmp_path / "out")
        compare.claim_pool(job, tmp_path / "out", dataset, CONFIG_DIR)
        return job.pair.folder / result

    claim(0.95)
    first = claim(0.5)  # nothing is made of the pool yet
    first.parent.mkdir(parents=True)
    first.touch()
    claim(0.5)
    if "pseudo-label" in result:
        with pytest.raises(UserError, match=r"pseudo_threshold: 0.5 -> 0.95.*choose another --output_dir"):
            claim(0.95)
    else:
        claim(0.95)  # translations have no threshold
    shutil.copy(dataset.train.encoded(int(dataset.train.rows[0])), pool / "known.png")  # labelled under this seed alone
    with pytest.raises(UserError, match=r"other arguments \(unlabelled: '\w+' -> '\w+'\).*choose another --output_dir"):
        claim(0.5 if "pseudo-label" in result else 0.95)


def test_the_arguments_of_the_label_step_are_checked_before_it(image_folder, pool, tmp_path):
    (job,) = compare.jobs_of(parsed(image_folder, "--methods", "pseudo-label", "--unlabelled", pool), tmp_path / "out")
    step = job.pair.steps[LABEL_STEP]
    job.pair.steps[LABEL_STEP] = replace(step, arguments=(*step.arguments, "--res_mode", "64"))
    with pytest.raises(UserError, match="unknown argument --res_mode"):
        compare.claim_pool(job, tmp_path / "out", load_dataset(f"folder:{image_folder}"), CONFIG_DIR)


@pytest.mark.parametrize(
    "changes", [{}, {"subset_seed": 5}, {"val_fraction": 0.5}], ids=["default", "draw", "fraction"]
)
def test_the_other_training_images_of_a_data_set_are_a_pool(image_folder, tmp_path, changes):
    (tmp_path / "datasets.yaml").write_text(f"pets:\n  folder: {image_folder}\n")
    whole = load_dataset("pets", Setting(val_fraction=0), tmp_path)  # nothing is held out
    few = load_dataset("pets", Setting(examples_per_class=2, **changes), tmp_path)
    images = read_unlabelled(unlabelled_images("dataset:pets"), tmp_path)
    assert list(images.keys) == list(whole.train.keys) and images.class_names == ("unlabelled",)
    rest = without_labelled(images, few, "dataset:pets")
    assert set(rest.keys) == set(whole.train.keys) - set(few.train.keys) - set(few.val.keys)
    assert np.array_equal(np.asarray(images.image(1)), np.asarray(whole.train.image(1)))


@pytest.mark.parametrize("method", ["pseudo-label", "diff-mix+unlabelled", "diff-mix+unlabelled+pseudo-label"])
def test_the_pool_and_the_method_need_each_other(image_folder, pool, tmp_path, method):
    with pytest.raises(UserError, match=rf"--methods {re.escape(method)} uses unlabelled images: give --unlabelled"):
        compare.jobs_of(parsed(image_folder, "--methods", "real-only", method), tmp_path)
    with pytest.raises(UserError, match=r"no method uses it; add pseudo-label or diff-mix\+unlabelled to --methods"):
        compare.jobs_of(parsed(image_folder, "--methods", "real-only", "--unlabelled", pool), tmp_path)


def test_unlabelled_sources_get_the_pool_and_the_classifier_of_their_seed(image_folder, pool, tmp_path):
    args = parsed(image_folder, "--methods", "diff-mix+unlabelled", "--unlabelled", pool)
    (job,) = compare.jobs_of(args, tmp_path / "out")
    sample = job.pair.steps["sample diff-mix+unlabelled"]
    flags = dict(zip(sample.arguments, sample.arguments[1:], strict=False))
    assert flags["--sources"] == "unlabelled" and flags["--unlabelled"] == str(pool)
    assert flags["--classifier"] == str(job.pair.folder / "classify" / "real-only")
    assert set(sample.needs) == {"classify real-only", "ti_db"} and LABEL_STEP not in job.pair.steps


def test_pseudo_labels_and_translations_are_one_pool_made_once(image_folder, pool, tmp_path):
    methods = ["pseudo-label", "diff-mix+unlabelled", "diff-mix+unlabelled+pseudo-label"]
    (job,) = compare.jobs_of(parsed(image_folder, "--methods", *methods, "--unlabelled", pool), tmp_path / "out")
    steps = job.pair.steps
    assert [name for name in steps if not name.startswith("classify")] == [
        LABEL_STEP,
        "ti_db",
        "sample diff-mix+unlabelled",
    ]
    both = steps["classify diff-mix+unlabelled+pseudo-label"]
    flags = dict(zip(both.arguments, both.arguments[1:], strict=False))
    assert set(both.needs) == {"sample diff-mix+unlabelled", LABEL_STEP} and both.arguments.count("--gamma") == 1
    assert flags["--syndata_key"] == "diff-mix+unlabelled"
    assert flags["--syndata_dir"] == str(job.pair.folder / "pseudo-label")
    checks.check_flags([both], CONFIG_DIR)


def test_the_unlabelled_settings_have_the_papers_threshold():
    assert UnlabelledSettings().pseudo_threshold == 0.95  # FixMatch
