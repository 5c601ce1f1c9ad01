"""What the tests of evaluation share: a classifier fitted on pre-trained features, a tiny CLIP, subsets with known content."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import tiny

BACKBONE = "tf_efficientnet_lite0"
FIVE = ("First Directory", "Second Directory", "Number", "Strength", "Path")
HEADER = (*FIVE, "Source Image")


def write_judge(
    folder: Path, images: Sequence[Image.Image], labels: Sequence[int], names: Sequence[str], side: int
) -> Path:
    """The folder of a finished run whose model is ImageNet's EfficientNet-Lite0 under a logistic regression."""
    from sklearn.linear_model import LogisticRegression

    from semantic_aug import files, runs, tensors
    from semantic_aug.classify.data import ImageStore, Normaliser, centre, resized_side
    from semantic_aug.classify.models import make_model
    from semantic_aug.classify.trainer import MODEL_FILE

    model, normalisation = make_model(BACKBONE, len(names), side)
    normalise = Normaliser(normalisation.mean, normalisation.std, torch.device("cpu"))
    store = ImageStore(images.__getitem__, len(images), resized_side(side), cache="off")
    with torch.inference_mode():
        parts = [
            model.eval().forward_head(
                model.forward_features(normalise(torch.from_numpy(centre(store.batch(rows), side)))), pre_logits=True
            )
            for rows in np.array_split(np.arange(len(images)), len(images) // 50 + 1)
        ]
    features = torch.cat(parts).numpy().astype(np.float64)
    mean, std = features.mean(0), features.std(0) + 1e-3
    fitted = LogisticRegression(C=0.05, max_iter=200).fit((features - mean) / std, labels)
    weight = fitted.coef_ / std
    state = model.state_dict() | {
        "classifier.weight": torch.from_numpy(weight).float(),
        "classifier.bias": torch.from_numpy(fitted.intercept_ - weight @ mean).float(),
    }
    tensors.save_tensors(folder / MODEL_FILE, state, {"classes": list(names)})
    files.write_text(folder / runs.ARGS_FILE, runs.arguments_text({"model": BACKBONE, "resolution": side}))
    return folder


def write_clip(folder: Path) -> Path:
    """A tiny random CLIP with its processor, in transformers' layout."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    vocabulary = tiny.byte_vocabulary()
    end = vocabulary["<|endoftext|>"]
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(vocabulary), "max_position_embeddings": 40}
    special = {"bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            text_config={**size, **text, **special},
            vision_config={**size, "image_size": 32, "patch_size": 8},
            projection_dim=8,
        )
    )
    model.save_pretrained(folder)
    CLIPProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=40),
    ).save_pretrained(folder)
    return folder


def write_subset(folder: Path, rows: Sequence[tuple], header: Sequence[str] = HEADER) -> Path:
    """A subset of given images: rows of (image, source, target, strength, key of the source image or others)."""
    (folder / "data" / "images").mkdir(parents=True)
    with open(folder / "meta.csv", "w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerow(header)
        for number, (image, source, target, strength, *further) in enumerate(rows):
            path = f"images/{number:06d}.png"
            image.save(folder / "data" / path)
            writer.writerow([source, target, number, strength, path, *further][: len(header)])
    return folder


def noise(index: int, side: int = 64) -> Image.Image:
    """Uniform noise."""
    return Image.fromarray(np.random.default_rng(index).integers(0, 256, (side, side, 3), dtype=np.uint8))


def read_rows(path: Path) -> list[dict]:
    """A CSV's rows by column."""
    with open(path, newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))
