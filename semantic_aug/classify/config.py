"""A resolved classification request."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from semantic_aug.classify.mixing import MixSettings
from semantic_aug.datasets import Setting


@dataclass(frozen=True)
class ClassifyConfig:
    """Everything stage 3 is told.

    Attributes:
        dataset: what ``--dataset`` was given.
        setting: which part of the training split is used.
        syndata: folders of the synthetic subsets; empty for the real-only baseline.
        gamma: of the soft labels, above 0.
        synthetic_prob: chance that a training item is synthetic, in [0, 1].
        model: timm's or torchvision's name.
        weights: ``auto``, ``none``, a file or a folder.
        resolution: side of the crops in pixels.
        nepoch: epochs over the real images.
        batch_size: images per optimisation step.
        optimizer: ``sgd`` or ``adamw``.
        lr: peak learning rate.
        lr_source: where the rate comes from.
        weight_decay: of the optimiser.
        warmup_epochs: of linear warm-up; cosine decay to zero follows.
        criterion: ``ce`` or ``ls``.
        smoothing: of the labels, with ``ls``.
        mixing: mixup and CutMix.
        amp: ``no``, ``fp16`` or ``bf16``.
        device: ``cpu`` or ``cuda:N``.
        eval_every: epochs between evaluations on the validation split.
        seed: of weights, order and augmentation.
        output_dir: of the results.
    """

    dataset: str
    setting: Setting
    syndata: tuple[str, ...]
    gamma: float
    synthetic_prob: float
    model: str
    weights: str
    resolution: int
    nepoch: int
    batch_size: int
    optimizer: str
    lr: float
    lr_source: str
    weight_decay: float
    warmup_epochs: float
    criterion: str
    smoothing: float
    mixing: MixSettings
    amp: str
    device: str
    eval_every: int
    seed: int
    output_dir: Path

    def record(self) -> dict:
        """What ``args.yaml`` keeps."""
        return asdict(self)


MAY_CHANGE = ("device", "output_dir", "lr_source")
"""Arguments that a restarted run may be given differently."""
