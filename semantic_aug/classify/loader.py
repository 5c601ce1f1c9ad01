"""Real and synthetic images with soft labels for other training loops, sampled as in stage 3."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from semantic_aug import cli, registry
from semantic_aug.classify.config import build_parser, read_config
from semantic_aug.classify.draws import EpochDraws, SyntheticSettings
from semantic_aug.classify.losses import one_hot
from semantic_aug.classify.models import check_resolution
from semantic_aug.classify.run import check_synthetic, load_synthetic, subset_folders, train, with_derived
from semantic_aug.classify.teacher import subset_labels, with_teacher_labels
from semantic_aug.datasets import Setting, load_dataset
from semantic_aug.datasets.settings import dataset_name
from semantic_aug.datasets.spec import SPLITS
from semantic_aug.errors import UserError
from semantic_aug.seeding import numpy_rng


class SoftLabelDataset(Dataset):
    """Items (image, soft label): the batches of ``train_cls.py`` with the same settings, for other training loops.

    The items of an epoch are shuffled as in stage 3. A ``DataLoader`` without ``shuffle`` and with :attr:`batch_size` gives the
    batches of stage 3, with any number of workers. Call :meth:`set_epoch` before each epoch.

    Args:
        dataset: as for ``--dataset``: a name, ``folder:PATH``, ``csv:PATH`` or ``hf:ID``.
        transform: applied to each PIL RGB image; None: items hold the PIL image.
        split: ``train``; or ``val`` or ``test``, which hold real images in order.
        setting: part of the training split that is used.
        batch_size: items per batch, on which the draws depend; an epoch's last, smaller batch is dropped.
        seed: seed of the draws.
        epochs: epochs of the whole training, over which a curriculum and a changing probability extend.
        teacher: flags of ``train_cls.py`` for the classifiers that ``soft_labels="teacher"`` trains first, in one string:
            ``--model resnet50 --nepoch 40``.
        **synthetic: other settings of synthetic data, by the names of ``train_cls.py``'s flags: ``syndata_dir``,
            ``syndata_key``, ``gamma``, ``synthetic_prob``, ``synthetic_mode``, ``synthetic_balanced``, ...

    Attributes:
        class_names: names of the K classes, in label order.
        batch_size: items per batch, at most the number of images.

    Raises:
        UserError: a setting that stage 3 refuses.
    """

    def __init__(
        self,
        dataset: str,
        transform: Callable[[Image.Image], Any] | None = None,
        *,
        split: str = "train",
        setting: Setting | None = None,
        batch_size: int = 32,
        seed: int = 2020,
        epochs: int | None = None,
        teacher: str = "",
        config_dir: Path = registry.CONFIG_DIR,
        **synthetic,
    ):
        chosen = {"split": split, "setting": setting, "batch_size": batch_size, "seed": seed, "epochs": epochs}
        chosen |= {"teacher": teacher, "config_dir": config_dir}
        self._arguments = {"dataset": dataset, "transform": transform, **chosen, **synthetic}
        settings = _settings(synthetic)
        dataset = load_dataset(dataset_name(dataset), setting, config_dir)
        self.class_names, self.transform, self.seed = dataset.class_names, transform, seed
        self.gamma, self._epoch = settings.gamma, torch.zeros((), dtype=torch.int64).share_memory_()
        self._items: tuple[int, np.ndarray] | None = None
        if split not in SPLITS or getattr(dataset, split) is None:
            raise UserError(f"split '{split}': {dataset.name} has no such images; expected one of {', '.join(SPLITS)}")
        self.real, self.synthetic, self.draws = getattr(dataset, split), None, None
        if split != "train":
            self.batch_size = batch_size
            return
        check_synthetic(settings)
        folders = subset_folders(settings, dataset, config_dir)
        self.synthetic = load_synthetic(folders, dataset, settings)
        if settings.soft_labels != "strength" and self.synthetic is not None:
            flags = ["--dataset", dataset.name, "--config_dir", str(config_dir), *shlex.split(teacher)]
            request = read_config(build_parser("").parse_args(flags))
            request = replace(request, synthetic=settings, syndata=folders)
            check_resolution(request.classifier.model, request.classifier.res_mode)
            labels = subset_labels(with_derived(request, dataset), dataset)
            self.synthetic = with_teacher_labels(self.synthetic, labels, settings, train)
        images, options = self.synthetic, {"counts": self.real.counts(), "epochs": epochs}
        targets, strengths = (images.target, images.strength) if images is not None else (None, None)
        self.draws = EpochDraws(len(self.real), targets, settings, batch_size, seed, strengths=strengths, **options)
        self.batch_size = self.draws.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the items, counted from 0; also in running workers."""
        self._epoch.fill_(epoch)

    def items(self) -> np.ndarray:
        """The items of the epoch: indices below the number of real images are real images, the others synthetic images."""
        epoch = int(self._epoch)
        if self._items is None or self._items[0] != epoch:
            self._items = epoch, self._draw(epoch)
        return self._items[1]

    def _draw(self, epoch: int) -> np.ndarray:
        if self.draws is None:
            return np.arange(len(self.real))
        order = self.draws.order(epoch)
        rngs = (numpy_rng(self.seed, "classify", "batch", epoch, step) for step in range(self.draws.steps_per_epoch))
        return np.concatenate([self.draws.batch(epoch, step, order, rng) for step, rng in enumerate(rngs)])

    def __len__(self) -> int:
        return self.draws.steps_per_epoch * self.batch_size if self.draws is not None else len(self.real)

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        """The transformed image and its soft label, float32 ``(K,)``, summing to one."""
        item, classes = int(self.items()[index]), len(self.class_names)
        if item < len(self.real):
            image, soft_label = self.real.image(item), one_hot(torch.tensor(self.real.labels[item]), classes)
        else:
            drawn = self.synthetic.take(np.array([item - len(self.real)]))
            image, soft_label = drawn.image(0), torch.from_numpy(drawn.labels(self.gamma, classes)[0])
        return self.transform(image) if self.transform is not None else image, soft_label

    def __getstate__(self) -> dict:
        # readers may not be picklable: the copy opens the same data again
        return {"arguments": self._arguments, "epoch": self._epoch}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state["arguments"])
        self._epoch = state["epoch"]


def _settings(given: dict) -> SyntheticSettings:
    """The settings of names and values, checked as the parser checks flags. Raises UserError: a value that the flag refuses."""
    for name, f in cli.settings_of(SyntheticSettings).items():
        value, flag = given.get(name), f.metadata["flag"]
        if value is None:
            continue
        if value not in flag.get("choices", [value]):
            raise UserError(f"{name} '{value}': expected one of {', '.join(flag['choices'])}")
        if "type" in flag:
            several = "nargs" in flag and not isinstance(value, (str, Path))
            try:
                values = tuple(flag["type"](str(item)) for item in (value if several else [value]))
            except argparse.ArgumentTypeError as error:
                raise UserError(f"{name} {error}") from None
            given = {**given, name: values if "nargs" in flag else values[0]}
    return SyntheticSettings(**given)
