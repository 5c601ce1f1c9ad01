"""Inference with a trained classifier: evaluation on a data set's splits, and predictions for other images."""

import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from semantic_aug import cli, files, runs
from semantic_aug.classify.activation import activation_maps
from semantic_aug.classify.checkpoints import metadata_of, misfit, read_state
from semantic_aug.classify.config import MODEL_FILE, WEIGHTS, ClassifyConfig, check_run, classifier_file, weight_file
from semantic_aug.classify.data import EvalBatches, ImageStore, Normaliser, centre, resized_side
from semantic_aug.classify.metrics import autocast, evaluate, groups_of, test_groups, write_predictions, write_scores
from semantic_aug.classify.models import make_model, normalisation_of
from semantic_aug.classify.processes import Processes
from semantic_aug.classify.trainer import RESULTS_FILE
from semantic_aug.datasets import LoadedDataset, Setting, load_dataset
from semantic_aug.datasets.fingerprint import content_digest, data_identity, hash_images, shared_images
from semantic_aug.datasets.images import open_image
from semantic_aug.datasets.origin import class_order
from semantic_aug.datasets.readers.folder import EXPECTED, Walk, text_of
from semantic_aug.divergence import check_outputs
from semantic_aug.errors import UserError, WouldDownload, no_downloads
from semantic_aug.registry import resolve_path, shown_path

log = logging.getLogger(__name__)

EVAL_FOLDER = "evaluation"
PREDICTIONS_FILE = "predictions.csv"


@dataclass
class Classifier:
    """A trained classifier and the preprocessing of its images.

    Attributes:
        path: weight file.
        model: images ``(B, 3, H, W)`` to logits ``(B, K)``, in evaluation mode.
        class_names: the K classes, in the data set's spelling.
        normalise: uint8 batches to the model's input.
        resolution: side of the images in pixels.
        amp: mixed precision, ``no``, ``fp16`` or ``bf16``.
        keep_aspect: whether images keep their aspect ratio, see :class:`semantic_aug.classify.data.ImageStore`.
    """

    path: Path
    model: nn.Module
    class_names: tuple[str, ...]
    normalise: Normaliser
    resolution: int
    amp: str = "no"
    keep_aspect: bool = False

    def batches(self, read: Callable[[int], Image.Image], count: int, size: int) -> Iterator[tuple[range, Tensor]]:
        """Classifies images batch by batch: yields their indices and class probabilities, float32 ``(B, K)`` on the CPU.

        Args:
            read: function from an index to a PIL RGB image.
            count: number of images.
            size: images per batch.

        Raises:
            UserError: the model's outputs are not finite.
        """
        # images are decoded when needed and not cached
        store = ImageStore(read, count, resized_side(self.resolution), cache="off", keep_aspect=self.keep_aspect)
        for start in range(0, count, size):
            rows = range(start, min(count, start + size))
            pixels = torch.from_numpy(centre(store.batch(np.asarray(rows)), self.resolution))
            with torch.inference_mode(), autocast(self.normalise.device, self.amp):
                probabilities = self.model(self.normalise(pixels)).float().softmax(-1).cpu()
            check_outputs(float(probabilities.sum()), self.amp)
            yield rows, probabilities

    def activation_maps(self, read: Callable[[int], Image.Image], classes: Sequence[int]) -> Iterator[np.ndarray]:
        """Class activation maps of images; see :func:`semantic_aug.classify.activation.activation_maps`."""
        return activation_maps(self.model, self.normalise, self.resolution, read, classes)

    def probabilities(self, read: Callable[[int], Image.Image], count: int) -> np.ndarray:
        """Class probabilities of all images, ``(count, K)``; arguments as of :meth:`batches`."""
        return np.concatenate([batch.numpy() for _, batch in self.batches(read, count, size=64)])


def load(config: ClassifyConfig, dataset: LoadedDataset) -> Classifier:
    """Loads the classifier of ``--weights`` or ``--output_dir``. Raises UserError: no such file, another model, or other
    classes."""
    flag, path = classifier_file(config)
    names = metadata_of(path).get("classes", dataset.source_names)
    order = class_order(names, dataset, f"{flag} {path}")
    model_name, resolution = config.classifier.model, config.classifier.res_mode
    classifier = _load(path, flag, model_name, resolution, names, Processes(config.device).device)
    model = classifier.model if order == sorted(order) else Reordered(classifier.model, order).eval()
    side = _record_of(path).get("resolution", resolution)
    if side != resolution:
        log.warning("%s was trained at --res_mode %s and is used at %d", shown_path(path), side, resolution)
    # the memory layout of training, which gives the same scores to the last digit
    model = model.to(memory_format=torch.channels_last)
    keep_aspect = classifier.keep_aspect if "classes" in metadata_of(path) else config.training.keep_aspect
    options = {"amp": config.training.amp, "keep_aspect": keep_aspect}
    return replace(classifier, model=model, class_names=dataset.source_names, **options)


def refuse_seen_images(
    path: Path, config: ClassifyConfig, dataset: LoadedDataset, flag: str, splits: Sequence[str] = ("test", "val")
) -> None:
    """Refuses weights of a run that was trained on images of some splits, or that began from weights of such a run.

    The training images are those of the runs' records. The splits of the run's data set are compared by image name, the
    splits of another data set by content.

    Args:
        path: weight file.
        flag: flag that uses the weights; begins the error.
        splits: splits that must not hold training images of the run.

    Raises:
        UserError: names a shared image and the settings that differ.
    """
    for file in _lineage(path):
        _refuse_seen_by(file, config, dataset, flag, splits)


def _lineage(path: Path) -> list[Path]:
    """A weight file, that from which its run began, and so on back, as far as records and files are there."""
    lineage: list[Path] = []
    while path not in lineage:
        lineage.append(path)
        word = str(_record_of(path).get("weights", "none"))
        if word not in WEIGHTS:
            with contextlib.suppress(UserError):
                path = weight_file(resolve_path(word))
    return lineage


def _refuse_seen_by(
    path: Path, config: ClassifyConfig, dataset: LoadedDataset, flag: str, splits: Sequence[str]
) -> None:
    record, test_dataset = _record_of(path), config.evaluation.test_dataset
    if not isinstance(record.get("setting"), Mapping):
        return
    setting = Setting(**{name: value for name, value in record["setting"].items() if name in cli.settings_of(Setting)})
    same_dataset = record.get("dataset") == config.dataset
    if same_dataset and setting == dataset.setting and "train" not in splits and not test_dataset:
        return
    trained = _training_data(record, setting, config)
    for split in splits if trained is not None else ():
        table = getattr(dataset, split)
        if table is None:
            continue
        if same_dataset and not (split == "test" and test_dataset):
            shared = sorted(set(trained.train.keys).intersection(table.keys))
            how = "; ".join(runs.differences(asdict(setting), asdict(dataset.setting)))
            advice = "give the flags that it was trained with"
        else:
            known = getattr(trained, split) if split != "train" else None
            shared = [name for name, _ in shared_images(table, trained.train, known)]
            how = f"by content, of {trained.name}{setting.suffix}"
            advice = "give images that it was not trained on"
        if shared:
            raise UserError(
                f"{flag}: {len(shared)} {runs.SPLIT_TITLES.get(split, 'training')} images ('{shared[0]}') are training images "
                f"of the classifier {shown_path(path)}{f' ({how})' if how else ''}: "
                f"{advice if config.use.eval_only else 'give other --weights'}"
            )


def _training_data(record: Mapping[str, Any], setting: Setting, config: ClassifyConfig) -> LoadedDataset | None:
    """The data set that a run was trained on, from its record; else the present data set, if its training images are the
    same; else None."""
    name, options = record.get("dataset"), (setting, config.run.config_dir)
    if name == config.dataset:
        return load_dataset(name, *options)
    with contextlib.suppress(UserError, OSError, WouldDownload), no_downloads(True):
        return load_dataset(str(name), *options)
    with contextlib.suppress(UserError):
        data, made_from = load_dataset(config.dataset, *options), record.get(runs.MADE_FROM) or {}
        train = (made_from.get("data") or {}).get("train") or {}
        return data if content_digest(hash_images(data.train).hex()) == train.get("content") else None
    return None


def _record_of(path: Path) -> Mapping[str, Any]:
    """The arguments of the run that wrote a weight file; empty for other files."""
    with contextlib.suppress(UserError):
        return runs.load_arguments(path.parent) or {}
    return {}


class Reordered(nn.Module):
    """A classifier with its outputs in another order.

    Args:
        model: images to logits ``(B, K)``.
        order: ``(K,)``, index of each output in the model's logits.
    """

    def __init__(self, model: nn.Module, order: Sequence[int]):
        super().__init__()
        self.model, self.order = model, list(order)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)[:, self.order]


def load_run(folder: str | Path, device: str = "cpu") -> Classifier:
    """Loads the classifier of a finished ``train_cls.py`` run. Raises UserError: not the folder of a finished run."""
    folder = Path(folder)
    check_run(folder)
    arguments, path = runs.load_arguments(folder) or {}, folder / MODEL_FILE
    names = metadata_of(path).get("classes")
    if not {"model", "resolution"} <= arguments.keys():
        raise UserError(
            f"{folder / runs.ARGS_FILE} is damaged or not train_cls.py's (no model and resolution): restore it"
        )
    if names is None:
        raise UserError(f"{path} is damaged or not train_cls.py's (no class names): run train_cls.py again")
    return _load(path, "--classifier", arguments["model"], int(arguments["resolution"]), names, torch.device(device))


def _load(
    path: Path, flag: str, model_name: str, resolution: int, class_names: tuple[str, ...], device: torch.device
) -> Classifier:
    model, _ = make_model(model_name, len(class_names), resolution, "none")
    wanted = model.state_dict()
    state = read_state(path, wanted, flag)
    if reason := misfit(state, wanted):
        raise UserError(
            f"{flag} {path} does not fit {model_name} ({reason}: give the --model and --res_mode it was trained with"
        )
    model.load_state_dict({key: state[key] for key in wanted if key in state}, strict=False)
    normalise = Normaliser(*normalisation_of(model, path), device)
    keep_aspect = metadata_of(path).get("keep_aspect", False)
    return Classifier(path, model.to(device).eval(), tuple(class_names), normalise, resolution, keep_aspect=keep_aspect)


def evaluate_splits(classifier: Classifier, config: ClassifyConfig, dataset: LoadedDataset) -> dict:
    """Evaluates on validation and test; writes and returns ``{output_dir}/evaluation/results.json``: the scores ``val`` and
    ``test`` (None for a split without images) and the identity of the images. A split without images has no files there."""
    folder = config.output_dir / EVAL_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    results = {"dataset": dataset.name, "classifier": str(classifier.path), "val": None, "test": None}
    results["data"] = data_identity(dataset, ("val", "test"), ("group",))
    processes = Processes(config.device)
    for split, table in (("val", dataset.val), ("test", dataset.test)):
        if table is None:
            for earlier in folder.glob(f"{split}_*"):  # of an evaluation on other images
                earlier.unlink()
        else:
            size = 2 * config.training.batch_size
            options = {"device": processes.device, "keep_aspect": classifier.keep_aspect}
            batches = EvalBatches(table, classifier.resolution, size, cache=config.placement.cache, **options)
            classes = len(classifier.class_names)
            scores = evaluate(classifier.model, batches, classifier.normalise, classes, processes, classifier.amp)
            results[split] = scores.summary(dataset.train.counts(), groups_of(table), config.evaluation.shot_thresholds)
            results |= test_groups(scores, dataset) if split == "test" else {}
            write_scores(scores, dataset.class_names, folder, split)
            write_predictions(table, scores.predicted, dataset.class_names, folder, split)
    files.write_json(folder / RESULTS_FILE, results)
    return results


def images_to_predict(paths: Sequence[Path]) -> dict[str, str]:
    """The images of ``--predict``: name in the list of predictions -> path.

    Folders are searched as data folders are (:mod:`semantic_aug.datasets.readers.folder`); skipped files are logged. A file
    is used whatever its name. Names are relative to the folder if one path is given, else they are paths.

    Raises:
        UserError: no image.
    """
    images: dict[str, str] = {}
    for path in paths:
        if path.is_dir():
            walk = Walk(Path(os.path.abspath(path)))
            files_below = walk.images(walk.root)
            walk.note_left_out()
            images |= {walk.name_of(file) if len(paths) == 1 else text_of(file): file for file in files_below}
        else:
            images[text_of(path)] = os.fspath(path)
    if not images:
        raise UserError(f"--predict {' '.join(map(str, paths))}: no image there; expected {EXPECTED}")
    return images


def predict(classifier: Classifier, images: Mapping[str, str], config: ClassifyConfig) -> None:
    """Classifies images; writes ``predictions.csv`` with one probability per class.

    The row of an unreadable image has no class and no probabilities. Earlier predictions that differ are kept under another
    name.

    Args:
        images: name in the list -> path.

    Raises:
        UserError: some images are unreadable; the file is written first.
    """
    names, paths = list(images), list(images.values())
    unreadable: dict[str, str] = {}

    def read(index: int) -> Image.Image:
        try:
            return open_image(paths[index])
        except UserError as error:
            unreadable[names[index]] = str(error)
            return Image.new("RGB", (1, 1))

    out, size = config.output_dir / PREDICTIONS_FILE, 2 * config.training.batch_size
    batches = classifier.batches(read, len(paths), size)
    with files.csv_writer(out, keep_earlier=True) as writer:
        writer.writerow(["file", "class", "probability", *classifier.class_names])
        for rows, probabilities in tqdm(
            batches, total=math.ceil(len(paths) / size), unit="batch", desc="predict", mininterval=1.0
        ):
            for row, values in zip(rows, probabilities, strict=True):
                if names[row] in unreadable:
                    writer.writerow([names[row], *[""] * (2 + len(values))])
                    continue
                best = int(values.argmax())
                numbers = [f"{value:.6f}" for value in (values[best], *values)]
                writer.writerow([names[row], classifier.class_names[best], *numbers])
    print(f"{len(images) - len(unreadable)} images classified: {shown_path(out)}")
    if unreadable:
        reasons = "; ".join(unreadable[name] for name in sorted(unreadable)[:3])
        raise UserError(
            f"{len(unreadable)} of {len(images)} images could not be read and have empty rows in {shown_path(out)}: {reasons}"
        )
