"""A resolved classification request."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from semantic_aug.classify.draws import DrawSettings
from semantic_aug.classify.losses import LossSettings
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
        target_class_num: target classes kept of each source class; 0: all.
        draws: how synthetic images enter the batches.
        model: timm's or torchvision's name.
        weights: ``auto``, ``none``, a file or a folder.
        trainable_layers: ``all``, or parts joined by ``+``.
        resolution: side of the crops in pixels.
        nepoch: epochs over the real images.
        batch_size: images per optimisation step, over all processes.
        gradient_accumulation_steps: parts in which a process takes its share of a step.
        optimizer: ``sgd`` or ``adamw``.
        lr: peak learning rate.
        lr_source: where the rate comes from.
        weight_decay: of the optimiser.
        warmup_epochs: of linear warm-up; cosine decay to zero follows.
        loss: over the soft labels.
        mixing: mixup, CutMix and CMO.
        ema_decay: of the moving average of the weights; 0: none.
        compile: whether the training step is compiled.
        amp: ``no``, ``fp16`` or ``bf16``.
        device: ``cpu`` or ``cuda:N``.
        eval_every: epochs between evaluations on the validation split.
        select_by: the validation score that chooses the epoch.
        patience: evaluations without a better score after which training stops; 0: never.
        report_to: ``none`` or ``tensorboard``.
        cache: where decoded images are kept.
        seed: of weights, order and augmentation.
        output_dir: of the results.
        syndata_max: synthetic images used; None: all.
    """

    dataset: str
    setting: Setting
    syndata: tuple[str, ...]
    gamma: float
    target_class_num: int
    draws: DrawSettings
    model: str
    weights: str
    trainable_layers: str
    resolution: int
    nepoch: int
    batch_size: int
    gradient_accumulation_steps: int
    optimizer: str
    lr: float
    lr_source: str
    weight_decay: float
    warmup_epochs: float
    loss: LossSettings
    mixing: MixSettings
    ema_decay: float
    compile: bool
    amp: str
    device: str
    eval_every: int
    select_by: str
    patience: int
    report_to: str
    cache: str
    seed: int
    output_dir: Path
    syndata_max: int | None = None

    def record(self) -> dict:
        """What ``args.yaml`` keeps."""
        return asdict(self)


BY_CONTENT = ("dataset", "syndata", "weights")
"""Arguments that name files; a restarted run may find them elsewhere, what they hold is compared instead."""

MAY_CHANGE = (
    "device",
    "output_dir",
    "lr_source",
    "gradient_accumulation_steps",
    "compile",
    "report_to",
    "cache",
    *BY_CONTENT,
)
"""Arguments that a restarted run may be given differently."""
