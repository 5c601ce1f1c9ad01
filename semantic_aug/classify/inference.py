"""A trained classifier used as it is: evaluated on a data set's splits, or asked about a folder of images."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from semantic_aug import files
from semantic_aug.classify.config import ClassifyConfig
from semantic_aug.classify.data import EvalBatches, ImageStore, Normaliser, centre, resized_side
from semantic_aug.classify.metrics import groups_of, write_predictions, write_scores
from semantic_aug.classify.models import make_model, read_state
from semantic_aug.classify.processes import Processes
from semantic_aug.classify.trainer import MODEL_FILE, RESULTS_FILE, autocast, evaluate
from semantic_aug.datasets import LoadedDataset
from semantic_aug.datasets.fingerprint import data_identity
from semantic_aug.datasets.images import EXTENSIONS, open_image
from semantic_aug.divergence import check_outputs
from semantic_aug.errors import UserError
from semantic_aug.registry import resolve_path

EVAL_FOLDER = "evaluation"
PREDICTIONS_FILE = "predictions.csv"


@dataclass
class Classifier:
    """A trained classifier, ready to look at images.

    Attributes:
        path: of its weights.
        model: in evaluation mode.
        class_names: K, source spelling.
        normalise: uint8 batches to the model's input.
        device: of the model.
    """

    path: Path
    model: nn.Module
    class_names: tuple[str, ...]
    normalise: Normaliser
    device: torch.device


def load(config: ClassifyConfig, dataset: LoadedDataset) -> Classifier:
    """The classifier that ``--weights`` names, or the one in ``--output_dir``.

    Raises:
        UserError: it is not there, is another model, or was trained on other classes.
    """
    given = config.weights not in ("auto", "none")
    path = resolve_path(config.weights) if given else config.output_dir
    path = path / MODEL_FILE if path.is_dir() or path.suffix == "" else path
    flag = "--weights" if given else "--output_dir"
    if not path.is_file():
        raise UserError(f"{flag} {path.parent}: no trained classifier there (looked for {path.name}); train it first")
    names = class_names_of(path) or dataset.source_names
    if names != dataset.source_names:
        strange = next((name for name in names if name not in dataset.source_names), names[0])
        raise UserError(
            f"{flag} {path} knows {len(names)} classes ('{strange}' is one) that are not those of {dataset.name}: give "
            "the --dataset it was trained on"
        )
    model, normalisation = make_model(config.model, len(names), config.resolution, "none")
    state, own = read_state(path), model.state_dict()
    strange = sorted(k for k in {*own, *state} if k not in state or k not in own or own[k].shape != state[k].shape)
    if strange:
        raise UserError(
            f"{flag} {path} does not fit {config.model} ('{strange[0]}', the first of {len(strange)} tensors): give the "
            "--model and --res_mode it was trained with"
        )
    model.load_state_dict(state)
    device = torch.device(config.device)
    normalise = Normaliser(normalisation.mean, normalisation.std, device)
    return Classifier(path, model.to(device, memory_format=torch.channels_last).eval(), names, normalise, device)


def class_names_of(path: Path) -> tuple[str, ...] | None:
    """The class names a weight file of ours carries, or None."""
    if path.suffix != ".safetensors":
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return tuple(json.loads((file.metadata() or {})["classes"]))
    except (SafetensorError, KeyError, ValueError):  # a damaged file is reported when its tensors are read
        return None


def evaluate_splits(classifier: Classifier, config: ClassifyConfig, dataset: LoadedDataset) -> dict:
    """Scores on validation and test; files go to ``{output_dir}/evaluation``.

    Returns:
        ``val`` and ``test``, None where there is no such split, and what images these are.
    """
    folder = config.output_dir / EVAL_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    found = {"dataset": dataset.name, "classifier": str(classifier.path), "val": None, "test": None}
    found["data"] = data_identity(dataset, ("val", "test"), ("group",))
    processes = Processes(config.device)
    for split, table in (("val", dataset.val), ("test", dataset.test)):
        if table is not None:
            batches = EvalBatches(table, config.resolution, 2 * config.batch_size, cache=config.cache)
            classes = len(classifier.class_names)
            scores = evaluate(classifier.model, batches, classifier.normalise, classes, processes, config.amp)
            found[split] = scores.summary(dataset.train.counts(), groups_of(table))
            write_scores(scores, dataset.class_names, folder, split)
            write_predictions(table, scores.predicted, dataset.class_names, folder, split)
    files.write_json(folder / RESULTS_FILE, found)
    return found


@torch.inference_mode()
def predict(classifier: Classifier, folder: Path, config: ClassifyConfig) -> tuple[Path, int]:
    """Classifies every image below a folder; writes ``predictions.csv`` with one probability per class.

    Returns:
        The file and the number of images.

    Raises:
        UserError: no such folder, no image in it, or one that cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"--predict {folder}: not a folder; expected one with images ({', '.join(EXTENSIONS)})")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
    if not paths:
        raise UserError(f"--predict {folder}: no image there; expected files ending in {', '.join(EXTENSIONS)}")
    # decoded as they come, never kept
    store = ImageStore(lambda index: open_image(paths[index]), len(paths), resized_side(config.resolution), -1)
    out = config.output_dir / PREDICTIONS_FILE
    size = 2 * config.batch_size
    with files.atomic_path(out) as temporary, open(temporary, "w", newline="", encoding="utf-8") as lines:
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow(["file", "class", "probability", *classifier.class_names])
        for start in tqdm(range(0, len(paths), size), unit="batch", desc="predict", mininterval=1.0):
            rows = np.arange(start, min(len(paths), start + size))
            pixels = torch.from_numpy(centre(store.batch(rows), config.resolution))
            with autocast(classifier.device, config.amp):
                shares = classifier.model(classifier.normalise(pixels)).float().softmax(-1).cpu()
            check_outputs(float(shares.sum()), config.amp)
            for row, share in zip(rows.tolist(), shares, strict=True):
                best = int(share.argmax())
                name = paths[row].relative_to(folder).as_posix()
                numbers = [f"{value:.6f}" for value in (share[best], *share)]
                writer.writerow([name, classifier.class_names[best], *numbers])
    return out, len(paths)
