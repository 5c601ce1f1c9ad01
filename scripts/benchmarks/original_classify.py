"""A faithful port of how the original implementation trains its classifier, for comparison.

Each item is looked up with pandas' ``iloc`` and decoded twice (once for its label), resized and cropped with torchvision
on the CPU; the loader has neither pinned memory nor persistent workers; cuDNN is deterministic; the loss is read after
every step; evaluation is in full precision, after every epoch.
"""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from semantic_aug.datasets import ImageTable


class OriginalItems(Dataset):
    """Real images of which each is replaced by a synthetic one with probability p.

    Args:
        table: real images.
        subset: folder of a synthetic subset, or None.
        probability: p.
        gamma: of the soft labels.
        transform: from a PIL image to a tensor.
    """

    def __init__(self, table: ImageTable, subset: Path | None, probability: float, gamma: float, transform):
        self.table, self.probability, self.gamma, self.transform = table, probability, gamma, transform
        self.real = pd.DataFrame({"row": range(len(table)), "label": table.labels})
        self.names = {name: i for i, name in enumerate(table.class_names)}
        self.subset = subset
        self.synthetic = pd.read_csv(subset / "meta.csv") if subset is not None else None

    def __len__(self) -> int:
        return len(self.real)

    def _one_hot(self, label: int) -> Tensor:
        return F.one_hot(torch.tensor(label), len(self.names)).float()

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if self.synthetic is not None and random.random() < self.probability:
            result = self.synthetic.iloc[random.randrange(len(self.synthetic))]
            weight = result["Strength"] ** self.gamma
            image = Image.open(self.subset / "data" / result["Path"]).convert("RGB")
            source, target = (self.names[result[f"{which} Directory"]] for which in ("First", "Second"))
            label = (1 - weight) * self._one_hot(source) + weight * self._one_hot(target)
            return self.transform(image), label
        image = self.table.image(int(self.real.iloc[index]["row"]))
        self.table.image(index)  # the label's look-up decodes the whole example again
        return self.transform(image), self._one_hot(int(self.real.iloc[index]["label"]))


def transform_of(resolution: int, mean, std, training: bool):
    """The original's transforms: resize to 8/7, a random or central crop, a flip, normalisation."""
    crop = (
        [transforms.RandomHorizontalFlip(), transforms.RandomCrop(resolution)]
        if training
        else [transforms.CenterCrop(resolution)]
    )
    side = round(resolution / 0.875)
    return transforms.Compose(
        [transforms.Resize((side, side)), *crop, transforms.ToTensor(), transforms.Normalize(mean, std)]
    )


def train(
    model: nn.Module,
    normalisation,
    train_table: ImageTable,
    eval_table: ImageTable | None,
    subset: Path | None,
    settings,
    device: torch.device,
    workers: int,
) -> int:
    """Trains and evaluates as the original does; returns the number of images trained on.

    Args:
        model: fresh.
        normalisation: its mean and std.
        train_table: real images.
        eval_table: evaluated after every epoch.
        subset: folder of a synthetic subset.
        settings: ``resolution, batch_size, nepoch, lr, synthetic_prob, gamma``.
        device: of the model.
        workers: of the loader.
    """
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    mean, std = normalisation.mean, normalisation.std
    items = OriginalItems(
        train_table,
        subset,
        settings.synthetic_prob,
        settings.gamma,
        transform_of(settings.resolution, mean, std, True),
    )
    loader = DataLoader(items, settings.batch_size, shuffle=True, num_workers=workers)
    model = model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.lr, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.nepoch)
    half = device.type == "cuda"
    scaler, seen = torch.amp.GradScaler(device.type, enabled=half), 0
    for _ in range(settings.nepoch):
        model.train()
        running = 0.0
        for images, targets in loader:
            images, targets = images.to(device), targets.to(device)
            optimizer.zero_grad()
            with torch.autocast("cuda") if half else contextlib.nullcontext():
                loss = -(targets * F.log_softmax(model(images), dim=-1)).sum(-1).mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            running += loss.item()
            seen += len(images)
        scheduler.step()
        if eval_table is not None:
            evaluate(model, eval_table, transform_of(settings.resolution, mean, std, False), settings, device, workers)
    return seen


@torch.no_grad()
def evaluate(model: nn.Module, table: ImageTable, transform, settings, device: torch.device, workers: int) -> float:
    """Top-1 accuracy in full precision."""
    model.eval()
    loader = DataLoader(OriginalItems(table, None, 0, 1, transform), settings.batch_size, num_workers=workers)
    correct = 0
    for images, targets in loader:
        predicted = model(images.to(device)).argmax(-1)
        correct += (predicted == targets.to(device).argmax(-1)).sum().item()
    return correct / len(table)
