"""A resolved fine-tuning request."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from semantic_aug.datasets import LoadedDataset, Setting
from semantic_aug.errors import UserError

STRATEGIES = {
    "ti": "class tokens only (textual inversion)",
    "db": "U-Net LoRA only, class names in the prompts (DreamBooth style)",
    "ti_db": "class tokens and U-Net LoRA together",
}

COMPILE_STEPS = 5000
"""Optimiser steps from which compiling (a minute or two) is worth it on a GPU."""


@dataclass(frozen=True)
class FinetuneConfig:
    """Everything stage 1 is told.

    Attributes:
        dataset: what ``--dataset`` was given.
        setting: which part of the training split is used.
        base_name: base model as the user named it.
        base_folder: where it is on this machine.
        strategy: ``ti``, ``db`` or ``ti_db``.
        output_dir: of the checkpoints.
        max_train_steps: optimiser steps.
        resolution: side of the training images in pixels.
        train_batch_size: images per process and micro-batch.
        gradient_accumulation_steps: micro-batches per optimiser step.
        learning_rate: of the LoRA.
        ti_learning_rate: of the class tokens.
        lr_scheduler: name of a diffusers schedule.
        lr_warmup_steps: optimiser steps.
        lr_num_cycles: restarts of ``cosine_with_restarts``.
        lr_power: of ``polynomial``.
        lr_step_rules: of ``piecewise_constant``, None for the others.
        rank: of the LoRA.
        lora_alpha: None for the rank.
        lora_targets: projections that get a LoRA.
        train_text_encoder_lora: a LoRA on the text encoders' attention projections too.
        class_prompts_ratio: share of the images under class prompts, the others are under their captions.
        initializer: ``class_name``, ``super_class`` or words.
        num_vectors: vectors per class token.
        prediction_type: None for the base model's own.
        snr_gamma: min-SNR loss weights, None for none.
        noise_offset: scale of a per-channel offset added to the noise.
        adam_weight_decay: AdamW's.
        max_grad_norm: gradient clipping, 0 for none.
        use_8bit_adam: bitsandbytes' AdamW.
        gradient_checkpointing: trade time for memory in the U-Net.
        mixed_precision: ``no``, ``fp16`` or ``bf16``.
        compile: the U-Net and the text encoders that train; ``auto``, ``on`` or ``off``.
        crops: 1 for the centre crop, more for further seeded random ones.
        random_crops: a new crop each time an image is seen, encoded in the loop, instead of ``crops`` cached ones.
        random_flip: mirror half of the images.
        class_balanced: draw classes evenly (long-tail setting).
        checkpointing_steps: steps between checkpoints.
        checkpoints_total_limit: how many are kept, None for all.
        resume_from_checkpoint: None, ``latest`` or a checkpoint folder.
        validation_steps: steps between picture grids, 0 for none.
        num_validation_images: pictures per class in a grid.
        logging_steps: steps between rows of the metrics CSV.
        report_to: ``none`` or a tracker of accelerate's.
        seed: of everything drawn.
    """

    dataset: str
    setting: Setting
    base_name: str
    base_folder: Path
    strategy: str
    output_dir: Path
    max_train_steps: int
    resolution: int
    train_batch_size: int
    gradient_accumulation_steps: int
    learning_rate: float
    ti_learning_rate: float
    lr_scheduler: str
    lr_warmup_steps: int
    lr_num_cycles: int
    lr_power: float
    lr_step_rules: str | None
    rank: int
    lora_alpha: float | None
    lora_targets: tuple[str, ...]
    train_text_encoder_lora: bool
    class_prompts_ratio: float
    initializer: str
    num_vectors: int
    prediction_type: str | None
    snr_gamma: float | None
    noise_offset: float
    adam_weight_decay: float
    max_grad_norm: float
    use_8bit_adam: bool
    gradient_checkpointing: bool
    mixed_precision: str
    compile: str
    crops: int
    random_crops: bool
    random_flip: bool
    class_balanced: bool
    checkpointing_steps: int
    checkpoints_total_limit: int | None
    resume_from_checkpoint: str | None
    validation_steps: int
    num_validation_images: int
    logging_steps: int
    report_to: str
    seed: int

    @property
    def trains_tokens(self) -> bool:
        return self.strategy != "db"

    @property
    def trains_lora(self) -> bool:
        return self.strategy != "ti"

    def compiled(self, device_type: str) -> bool:
        """Whether they are compiled on a device of this type; ``auto``: on GPUs, where the run repays it."""
        if self.compile != "auto":
            return self.compile == "on"
        return device_type == "cuda" and self.max_train_steps >= COMPILE_STEPS

    def record(self, processes: int = 1) -> dict:
        """What ``args.yaml`` keeps of a run on so many processes."""
        fields = asdict(self)
        fields["effective_batch"] = self.train_batch_size * self.gradient_accumulation_steps * processes
        fields["setting"] = asdict(self.setting)
        del fields["base_folder"]  # where a hub model lies differs between machines
        return fields


MAY_CHANGE = (
    "resume_from_checkpoint",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "validation_steps",
    "num_validation_images",
    "logging_steps",
    "report_to",
    "output_dir",
    "gradient_checkpointing",
    "compile",
    # compared by content instead
    "dataset",
    "base_name",
    # compared as effective_batch: a step draws for all of it, each process and micro-batch takes its slice
    "train_batch_size",
    "gradient_accumulation_steps",
)
"""Arguments a resumed run may be given differently: they do not change what a step computes."""

UNUSED = {
    "lr_num_cycles": lambda config: config.lr_scheduler != "cosine_with_restarts",
    "lr_power": lambda config: config.lr_scheduler != "polynomial",
    "lr_warmup_steps": lambda config: config.lr_scheduler in ("constant", "piecewise_constant"),
    "max_train_steps": lambda config: "constant" in config.lr_scheduler,
    **dict.fromkeys(
        ("rank", "lora_alpha", "lora_targets", "train_text_encoder_lora", "learning_rate"),
        lambda config: not config.trains_lora,
    ),
    **dict.fromkeys(("ti_learning_rate", "num_vectors", "initializer"), lambda config: not config.trains_tokens),
}
"""Arguments that decide nothing under some others, ``max_train_steps`` of a step's learning rate."""


def may_change(config: FinetuneConfig) -> tuple[str, ...]:
    """:data:`MAY_CHANGE`, and what decides nothing in this run (:data:`UNUSED`)."""
    return (*MAY_CHANGE, *(name for name, unused in UNUSED.items() if unused(config)))


def check_captions(dataset: LoadedDataset, class_prompts_ratio: float) -> None:
    """Refuses a share of captions where there are none.

    Raises:
        UserError: no image of the training split has a caption.
    """
    column = dataset.train.extras.get("caption")
    if class_prompts_ratio < 1 and (column is None or not any(text.strip() for text in column.tolist())):
        raise UserError(
            f"--class_prompts_ratio {class_prompts_ratio:g}: data set {dataset.name} has no captions; give it a column "
            "'caption' (in its list, on the hub, or in a metadata.csv beside a folder's images), or leave the flag at 1"
        )
