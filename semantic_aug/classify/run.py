"""Stage 3 from the request to the results: resolve, check, train (with one seed or several), evaluate, predict."""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from semantic_aug import console, files, registry, runs
from semantic_aug.classify import inference, metrics, teacher
from semantic_aug.classify.checkpoints import metadata_of
from semantic_aug.classify.config import (
    ABSENT,
    DEFAULT_LR,
    MAY_CHANGE,
    MODEL_FILE,
    WEIGHTS,
    ClassifyConfig,
    SyntheticSettings,
    classifier_file,
)
from semantic_aug.classify.draws import NEED_SYNTHETIC, EpochDraws
from semantic_aug.classify.losses import make_criterion
from semantic_aug.classify.models import (
    check_resolution,
    freeze,
    make_model,
    timm_lines,
    weights_identity,
)
from semantic_aug.classify.optimizer import make_optimizer
from semantic_aug.classify.processes import Processes, is_main, leave
from semantic_aug.classify.trainer import BEFORE_RESULTS, Trainer, check_disk, check_parts, results_of
from semantic_aug.datasets import LoadedDataset, load_dataset
from semantic_aug.datasets.catalog import find_spec
from semantic_aug.datasets.fingerprint import refuse_known_images
from semantic_aug.datasets.origin import RunOrigin
from semantic_aug.datasets.spec import SPLITS
from semantic_aug.datasets.subsets import class_groups
from semantic_aug.datasets.synthetic import SyntheticImages, locate, read_subsets
from semantic_aug.devices import device_of
from semantic_aug.errors import UserError, WouldDownload, memory_advice, no_downloads
from semantic_aug.meta_csv import hashed_slug
from semantic_aug.registry import DEFAULT_RECIPE
from semantic_aug.run_lock import lock_folder

log = logging.getLogger(__name__)

LESS_MEMORY = (
    "raise --gradient_accumulation_steps, which divides a step's images into parts, give --amp bf16, or lower "
    "--batch_size or --res_mode"
)


def run(config: ClassifyConfig) -> int:
    """Resolves and prints the request, then trains, evaluates or predicts; returns the exit status."""
    console.set_up_logging(is_main())
    say = print if is_main() else lambda *_, **__: None
    with no_downloads(config.run.dry_run):
        config, dataset, synthetic = resolve(config)
    say(dataset.describe())
    if config.use.eval_only or config.use.predict:
        return use_classifier(config, dataset)
    images = f"{len(synthetic)} images of {', '.join(config.syndata)}" if synthetic else "none (real only)"
    say(f"synthetic: {images}")
    say(runs.arguments_text(config.record()), end="")
    seeds = list(dict.fromkeys(config.training.seeds or ()))
    if config.run.dry_run:
        check_start(config, dataset, synthetic)
    labels = teacher.subset_labels(config, dataset)
    if config.run.dry_run or labels:  # output folders are checked before teachers are trained
        for request in [seeded(config, seed) for seed in seeds] or [config]:
            check_folder(request, dataset, synthetic, labels)
    if config.run.dry_run:
        for subset in labels:
            say(subset.describe())
        return 0
    synthetic = teacher.with_teacher_labels(synthetic, labels, config.synthetic, train)
    if seeds:
        say(metrics.statistics_table(train_seeds(config, seeds, dataset, synthetic)))
    else:
        metrics.report(train(config, dataset, synthetic), say)
        model, path = config.classifier, config.output_dir / MODEL_FILE
        if path.is_file():  # may have been removed from a finished run
            say("the classifier in plain timm:")
            say(timm_lines(model.model, len(dataset.class_names), model.res_mode, path))
            if "mean" in (metadata := metadata_of(path)):
                say(f"# images are normalised by mean {metadata['mean']} and std {metadata['std']}")
    leave()
    say(f"results: {registry.shown_path(config.output_dir)}")
    return 0


def use_classifier(config: ClassifyConfig, dataset: LoadedDataset) -> int:
    """``--eval_only`` and ``--predict``: evaluates or predicts with a trained classifier."""
    images = inference.images_to_predict(config.use.predict) if config.use.predict else {}
    classifier = inference.load(config, dataset)
    print(f"classifier: {registry.shown_path(classifier.path)}")
    if not images:
        inference.refuse_seen_images(classifier.path, config, dataset, "--eval_only")
    if config.run.dry_run:
        return 0
    if images:
        inference.predict(classifier, images, config)
    else:
        metrics.report(inference.evaluate_splits(classifier, config, dataset), print)
        print(f"results: {registry.shown_path(config.output_dir / inference.EVAL_FOLDER)}")
    return 0


# ------------------------------------------------------------------------------------------------------ the request


def resolve(config: ClassifyConfig) -> tuple[ClassifyConfig, LoadedDataset, SyntheticImages | None]:
    """Loads the data set and the synthetic images, and derives the settings that were not given. Raises UserError: an unknown
    value, or settings that exclude each other."""
    synthetic, classifier, placement = config.synthetic, config.classifier, config.placement
    device_of(placement.gpu)
    check_flags(config)
    check_resolution(classifier.model, classifier.res_mode)
    dataset = load_dataset(config.dataset, config.setting, config.run.config_dir)
    training = not (config.use.eval_only or config.use.predict)
    if word := config.evaluation.test_dataset:
        tested = dataset.tested_on(word, config.run.config_dir)
        if training:  # for a trained classifier its record is compared
            refuse_known_images(dataset, tested.test, f"--test_dataset {word}")
        dataset = tested
    if training and classifier.weights not in WEIGHTS:
        inference.refuse_seen_images(classifier_file(config)[1], config, dataset, "--weights")
    folders = subset_folders(synthetic, dataset, config.run.config_dir)
    images = load_synthetic(folders, dataset, synthetic)
    resolved = replace(
        with_derived(config, dataset), syndata=folders, carried=draws_of(config, dataset, images).carried
    )
    check(resolved, dataset)
    folder = placement.output_dir
    if folder is None:
        names = [*filter(None, synthetic.syndata_key or ()), *(Path(path).name for path in synthetic.syndata_dir or ())]
        folder = Path("outputs/classification", f"{dataset.name}{dataset.setting.suffix}", run_name(resolved, names))
        if config.training.seeds is None:
            folder = folder.with_name(f"{folder.name}-seed{config.seed}")
    return resolved.with_seed(config.seed, registry.resolve_path(folder)), dataset, images


def with_derived(config: ClassifyConfig, dataset: LoadedDataset) -> ClassifyConfig:
    """Derives the settings that depend on the data set and machine: learning rate, warm-up, precision, device, thresholds."""
    training, device = config.training, device_of(config.placement.gpu)
    lr = DEFAULT_LR[training.optimizer] if training.lr is None else training.lr
    amp = training.amp if training.amp != "auto" else ("no" if device == "cpu" else "bf16")
    training = replace(training, lr=lr, warmup_epochs=min(training.warmup_epochs, training.nepoch / 10), amp=amp)
    thresholds = config.evaluation.shot_thresholds or dataset.spec.shot_thresholds
    evaluation = replace(config.evaluation, shot_thresholds=thresholds)
    return replace(config, setting=dataset.setting, training=training, evaluation=evaluation, device=device)


def subset_folders(settings: SyntheticSettings, dataset: LoadedDataset, config_dir: Path) -> tuple[str, ...]:
    """The folders of the synthetic subsets. Raises UserError: an unknown key."""
    keys = filter(None, settings.syndata_key or ())
    return (*(folder for key in keys for folder in dataset.subsets(key, config_dir)), *(settings.syndata_dir or ()))


def check_synthetic(settings: SyntheticSettings) -> None:
    """Refuses settings of synthetic images without synthetic images."""
    if any(settings.syndata_key or ()) or settings.syndata_dir:
        return
    for name in NEED_SYNTHETIC:
        if getattr(settings, name) != getattr(SyntheticSettings, name):
            raise UserError(f"--{name}: there are no synthetic images; give --syndata_key or --syndata_dir")


def load_synthetic(
    folders: Sequence[str], dataset: LoadedDataset, settings: SyntheticSettings
) -> SyntheticImages | None:
    """Loads the images of the synthetic subsets; None without subsets. Raises UserError: a curriculum over one strength."""
    if not folders:
        return None
    images, seed = read_subsets(folders, dataset, settings.allow_other_sources), dataset.setting.subset_seed
    if settings.target_class_num:
        images = images.with_targets(settings.target_class_num, dataset.source_names, seed)
    if settings.syndata_max is not None:
        images = images.at_most(settings.syndata_max, seed)
    if settings.curriculum != "none" and len(set(images.strength.tolist())) == 1:
        raise UserError(
            f"--curriculum {settings.curriculum}: all synthetic images have the strength {images.strength[0]:g}; expected "
            "several (sample_mp.py --strength_strategy uniform, or several subsets)"
        )
    return images


def draws_of(config: ClassifyConfig, dataset: LoadedDataset, images: SyntheticImages | None) -> EpochDraws:
    """The items of every batch of a training."""
    training, options = config.training, {"counts": dataset.train.counts(), "epochs": config.training.nepoch}
    targets, strengths = (None, None) if images is None else (images.target, images.strength)
    options |= {"strengths": strengths}
    return EpochDraws(len(dataset.train), targets, config.synthetic, training.batch_size, config.seed, **options)


def check(config: ClassifyConfig, dataset: LoadedDataset) -> None:
    """Refuses settings that this data set does not support."""
    training = config.training
    if dataset.val is None and training.patience:
        raise UserError(f"--patience {training.patience}: {dataset.name} has no validation images; give --val_fraction")
    if training.select_by == "worst_group":
        check_groups(dataset)
    class_groups([], *config.evaluation.shot_thresholds)


def check_groups(dataset: LoadedDataset) -> None:
    """Refuses to select by the worst group where validation images have no groups; warns where they lack groups of the training
    images."""
    val, train = (None if t is None else metrics.groups_of(t) for t in (dataset.val, dataset.train))
    if val is None:
        raise UserError(
            f"--select_by worst_group: the validation images of {dataset.name} have no groups; expected top1 or macro"
        )
    if train is not None and (missing := sorted({*train.tolist()} - {*val.tolist()})):
        names = dict(enumerate(dataset.train.group_names or dataset.spec.group_names))
        shown = ", ".join(f"'{names.get(group, group)}'" for group in missing)
        log.warning("--select_by worst_group: no validation image is of %s: the worst of the others counts", shown)


def check_flags(config: ClassifyConfig) -> None:
    """Refuses flags that exclude each other on any data set. Raises UserError: names one of them."""
    synthetic, training, loss = config.synthetic, config.training, config.loss
    if config.use.eval_only and config.use.predict:
        raise UserError("--eval_only and --predict each use a classifier in their own way: give one of them")
    if training.seeds and (config.use.eval_only or config.use.predict):
        raise UserError("--seeds is for training: leave it out, and name one of its runs by --output_dir")
    if config.evaluation.test_dataset:
        find_spec(config.evaluation.test_dataset, config.run.config_dir)
    for folder in synthetic.syndata_dir or ():
        locate(folder)
    check_synthetic(synthetic)
    if loss.drw_epoch >= 0 and loss.criterion == "cb":
        raise UserError(
            f"--drw_epoch {loss.drw_epoch}: --criterion cb weights classes from the start; expected another"
        )
    if loss.drw_epoch >= training.nepoch:
        raise UserError(
            f"--drw_epoch {loss.drw_epoch}: expected fewer than the --nepoch {training.nepoch} epochs there are"
        )
    first, last = config.mixing.unmixed_epochs
    if config.mixing.alphas and first + last >= training.nepoch:
        raise UserError(
            f"--unmixed_epochs {first} {last}: none of the --nepoch {training.nepoch} epochs is left for mixing"
        )
    try:
        if training.report_to == "tensorboard":
            importlib.import_module("torch.utils.tensorboard")
    except ImportError:
        raise UserError("--report_to tensorboard needs the package tensorboard: pip install tensorboard") from None


def run_name(config: ClassifyConfig, keys: Sequence[str]) -> str:
    """The default name of a run's folder, without the seed: the settings that differ from the defaults.

    The results of ``--weights PATH`` with ``--eval_only`` or ``--predict`` are named after the file, apart from any training's.
    """
    synthetic, classifier, loss = config.synthetic, config.classifier, config.loss
    recipe = config.run.recipe.partition(":")[0]
    parts = [classifier.model, str(classifier.res_mode), *([recipe] if recipe != DEFAULT_RECIPE else [])]
    if (config.use.eval_only or config.use.predict) and classifier.weights not in WEIGHTS:
        file = classifier_file(config)[1]
        parts.append(hashed_slug(f"{file.parent.name}-{file.stem}", str(file)))
    elif keys:
        parts += ["+".join(keys).replace("#", "."), f"g{synthetic.gamma:g}"]
        parts += [synthetic.synthetic_mode] if synthetic.synthetic_mode != "item" else []
        weight = f"{synthetic.teacher_weight:g}" if synthetic.soft_labels == "mixed" else ""
        parts += [f"{synthetic.soft_labels}{weight}"] if synthetic.soft_labels != "strength" else []
        probability = "to".join(f"{p:g}" for p in dict.fromkeys(synthetic.probabilities))
        parts += [f"p{probability}"] if synthetic.synthetic_mode != "concat" else []
        parts += [synthetic.curriculum_order] if synthetic.curriculum != "none" else []
        parts += ["balanced"] if synthetic.synthetic_balanced else []
        parts += ["inverse"] if synthetic.inverse_frequency else []
        parts += [f"t{synthetic.target_class_num}"] if synthetic.target_class_num else []
        parts += [f"n{synthetic.syndata_max}"] if synthetic.syndata_max else []
    else:
        parts.append("real")
    parts += [kind for kind in ("cutmix", "mixup", "cmo") if kind in config.mixing.alphas]
    parts += [config.training.augmentation] if config.training.augmentation != "crop" else []
    parts += [config.training.lr_schedule] if config.training.lr_schedule != "cosine" else []
    parts += [loss.criterion] if loss.criterion != "ce" else []
    parts += [f"drw{loss.drw_epoch}"] if loss.drw_epoch >= 0 else []
    parts += [classifier.trainable_layers] if classifier.trainable_layers != "all" else []
    parts += ["ema"] if config.training.ema_decay else []
    test = config.evaluation.test_dataset
    parts += [f"test_{find_spec(test, config.run.config_dir).name}"] if test else []
    return "-".join(parts).replace("/", "_")


# ------------------------------------------------------------------------------------------------------- the dry run


def check_start(config: ClassifyConfig, dataset: LoadedDataset, synthetic: SyntheticImages | None) -> None:
    """Creates the model, its optimiser and its loss, and checks the batches and the disk space.

    Raises:
        UserError: a part that cannot be created.
        WouldDownload: the weights are not on this machine; raised after all other checks.
    """
    missing, classifier, training = None, config.classifier, config.training
    classes, resolution = len(dataset.class_names), classifier.res_mode
    try:
        with no_downloads(True):
            model, _ = make_model(classifier.model, classes, resolution, classifier.weights)
    except WouldDownload as error:
        missing = error
        model, _ = make_model(classifier.model, classes, resolution, "none")
    frozen = freeze(model, classifier.trainable_layers)
    check_parts(model, frozen, config, Processes(config.device), draws_of(config, dataset, synthetic).batch_size)
    make_criterion(config.loss, dataset.train.counts(), torch.device("cpu"))
    make_optimizer(model, training)
    check_disk(config, model)
    if missing is not None:
        raise missing


def check_folder(
    config: ClassifyConfig,
    dataset: LoadedDataset,
    synthetic: SyntheticImages | None,
    labels: Sequence[teacher.SubsetLabels] = (),
) -> None:
    """Refuses an output folder of another run; teacher labels that are not computed yet are not compared."""
    labelled = teacher.with_teacher_labels(synthetic, labels, config.synthetic, None)
    kind = BeforeLabels if labels and labelled is None else RunOrigin
    origin = origin_of(config, dataset, labelled or synthetic, kind)
    options = {"origin": origin, "absent": ABSENT, "dry_run": True}
    runs.claim(config.output_dir, config.record(), "--output_dir", MAY_CHANGE, **options)


# ---------------------------------------------------------------------------------------------------------- training


class BeforeLabels(RunOrigin):
    """The origin of a run before its teacher labels are computed: labels are not compared."""

    @staticmethod
    def compare(kept: Mapping[str, Any], present: Mapping[str, Any]) -> str:
        """See :meth:`semantic_aug.datasets.origin.RunOrigin.compare`."""
        records = []
        for record in (kept, present):
            synthetic = record.get("synthetic") or {}
            records.append({**record, "synthetic": {n: value for n, value in synthetic.items() if n != "labels"}})
        return RunOrigin.compare(*records)


def origin_of(
    config: ClassifyConfig, dataset: LoadedDataset, synthetic: SyntheticImages | None, kind: type[RunOrigin] = RunOrigin
) -> RunOrigin:
    """The data and weights of a run; a classifier uses neither captions nor the super-class."""
    classifier = config.classifier
    weights = lambda: {"weights": weights_identity(classifier.model, classifier.weights)}  # noqa: E731
    return kind(dataset, SPLITS, ("group",), synthetic, weights, without=("super_class",))


def train(
    config: ClassifyConfig, dataset: LoadedDataset, synthetic: SyntheticImages | None, origin: RunOrigin | None = None
) -> dict:
    """Trains in the output folder or resumes an interrupted run; returns the results, also of a finished run.

    Args:
        origin: see :func:`origin_of`; shared by the runs of one command.

    Raises:
        UserError: a folder in use, or with a run of other arguments or images; images that changed during training.
    """
    processes, folder = Processes(config.device), config.output_dir
    origin = origin or origin_of(config, dataset, synthetic)
    with contextlib.ExitStack() as stack:
        exists = True
        if processes.main:
            stack.enter_context(files.no_trace(folder, BEFORE_RESULTS))
            stack.enter_context(lock_folder(folder, "--output_dir"))
            exists = runs.claim(folder, config.record(), "--output_dir", MAY_CHANGE, origin=origin, absent=ABSENT)
        processes.wait()  # all processes read the results after the main one has claimed the folder, before it trains
        results = results_of(folder) if exists else None
        processes.wait()
        if results is not None:
            log.info("%s is finished already", folder)
            return results
        with memory_advice(LESS_MEMORY):
            return Trainer(config, dataset, synthetic, origin).run()


def seeded(config: ClassifyConfig, seed: int) -> ClassifyConfig:
    """The request with one of its ``--seeds``, in a subfolder of its output folder."""
    return config.with_seed(seed, config.output_dir / f"seed{seed}")


def train_seeds(
    config: ClassifyConfig, seeds: Sequence[int], dataset: LoadedDataset, synthetic: SyntheticImages | None
) -> dict:
    """Trains with every seed, each in a subfolder of ``config.output_dir``; writes and returns the statistics.

    Finished runs are kept, interrupted runs are resumed.

    Returns:
        As :func:`semantic_aug.classify.metrics.statistics_of`.
    """
    origin = origin_of(config, dataset, synthetic)  # computed once: the averaged runs must have the same origin
    results = {seed: train(seeded(config, seed), dataset, synthetic, origin) for seed in seeds}
    rows = {seed: metrics.scores_of(of_seed) for seed, of_seed in results.items()}
    statistics = metrics.statistics_of(rows, runs.judged_split(results[seeds[0]]))
    if Processes(config.device).main:
        metrics.write_statistics(statistics, config.output_dir)
    return statistics
