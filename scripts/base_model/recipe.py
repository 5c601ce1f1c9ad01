"""What is trained: the settings of a base model, and the presets that name whole recipes."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

from semantic_aug.datasets.sets import elpv
from semantic_aug.errors import UserError

MIRRORS = ("none", "horizontal", "both")
CAPTIONS = ("general", "solar-cell")
PREDICTIONS = ("v_prediction", "epsilon")
SCHEDULES = ("constant", "cosine")
STAGES = ("autoencoder", "denoiser", "export")
NOT_STATED = "not stated"
"""Origin and licence of images of which the command says nothing."""
AUTOENCODER_SHARE = 0.35
"""Share of ``--budget`` that the autoencoder may spend."""


def setting(default, help: str, choices: tuple | None = None, identity: bool = True):
    """A field of the recipe with its help text and choices, from which its flag is made.

    Args:
        default: value of the general preset.
        help: help text of the flag.
        choices: accepted values; None: any.
        identity: whether another value makes another model, so that a training begun with one is not continued with it.
    """
    return field(default=default, metadata={"help": help, "choices": choices, "identity": identity})


@dataclass(frozen=True)
class Recipe:
    """Every setting of a base model's training."""

    size: int = setting(96, "side of the images in pixels")
    subject: str = setting("object", "noun that every caption names")
    vocabulary: tuple[str, ...] = setting((), "further words that become tokens of their own, class names for example")
    captions: str = setting("general", "measurements that captions name", CAPTIONS)
    mirror: str = setting("horizontal", "mirroring under which an image stays a valid one", MIRRORS)
    crops: int = setting(3, "random crops of each image that the denoiser sees beside the whole one")
    kept_out: float = setting(0.08, "share of the images kept out of training, for the validation losses")
    autoencoder_channels: tuple[int, ...] = setting(
        (16, 32, 64, 96), "channels of each level of the autoencoder; each level after the first halves the side"
    )
    latent_channels: int = setting(12, "channels of the latents")
    autoencoder_images: int = setting(
        50_000,
        "images the autoencoder is trained on, repeats counted; fixed once the denoiser has begun",
        identity=False,
    )
    autoencoder_batch: int = setting(16, "images per step of the autoencoder")
    autoencoder_lr: float = setting(2e-3, "peak learning rate of the autoencoder, cosine decay")
    autoencoder_ema: float = setting(0.999, "decay of the autoencoder's averaged weights")
    unet_channels: tuple[int, ...] = setting((96, 128, 160), "channels of each level of the U-Net")
    unet_attention: tuple[int, ...] = setting((0, 1, 1), "for each level of the U-Net, 1 where it attends to the text")
    prediction: str = setting("v_prediction", "what the U-Net predicts", PREDICTIONS)
    denoiser_images: int = setting(
        700_000, "images the denoiser is trained on, repeats counted; may be raised later", identity=False
    )
    denoiser_batch: int = setting(32, "images per step of the denoiser")
    denoiser_lr: float = setting(5e-4, "peak learning rate of the denoiser")
    denoiser_schedule: str = setting("constant", "learning rate of the denoiser after its warm-up", SCHEDULES)
    denoiser_ema: float = setting(0.9995, "decay of the denoiser's averaged weights")

    @property
    def factor(self) -> int:
        """Side of an image over the side of its latents."""
        return 2 ** (len(self.autoencoder_channels) - 1)

    def identity(self) -> dict:
        """The settings that a training must keep from its first start on."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.metadata["identity"]}

    def check(self) -> None:
        """Refuses settings that do not fit together.

        Raises:
            UserError: names the flag and what it must be.
        """
        smallest = self.factor * 2 ** (len(self.unet_channels) - 1)
        if self.size < smallest or self.size % smallest:
            raise UserError(
                f"--size {self.size}: expected a multiple of {smallest} px, because autoencoder and U-Net halve it"
            )
        for flag, channels, multiple in (
            ("autoencoder_channels", self.autoencoder_channels, 8), ("unet_channels", self.unet_channels, 16),
        ):  # fmt: skip
            if not channels or any(count < multiple or count % multiple for count in channels):
                raise UserError(f"--{flag} {' '.join(map(str, channels))}: expected multiples of {multiple}")
        flags = self.unet_attention
        if len(flags) != len(self.unet_channels) or not set(flags) <= {0, 1} or not any(flags):
            shown = " ".join(map(str, flags))
            raise UserError(
                f"--unet_attention {shown}: expected 0 or 1 for each of --unet_channels, at least one of them 1"
            )
        if not 0 < self.kept_out < 0.5:
            raise UserError(f"--kept_out {self.kept_out}: expected a share above 0 and below 0.5")
        if self.crops < 0:
            raise UserError(f"--crops {self.crops}: expected a whole number of at least 0")
        positive = [f.name for f in fields(self) if f.type in ("int", "float") and f.name != "crops"]
        for name in positive:
            if not getattr(self, name) > 0:
                raise UserError(f"--{name} {getattr(self, name)}: expected a number above 0")


@dataclass(frozen=True)
class Config:
    """A training: its images, recipe, folders and machine.

    Attributes:
        images: folder, list, or ``dataset:NAME``.
        exclude: folders and lists of which no image may be among ``images``.
        recipe: settings of the model and its training.
        output_dir: the finished model.
        work_dir: states, logs and pixels, from which a training resumes.
        minutes: of training; None: only the numbers of images limit it.
        until: last stage.
        export_only: write the model as it is trained by now.
        compile: whether networks are compiled.
        device: ``cuda`` or ``cpu``; None: the GPU where there is one.
        data_source: what the images are and where they come from, for the model card.
        data_license: licence of the images, for the model card.
        preset: name of the recipe's preset.
    """

    images: str
    exclude: tuple[str, ...]
    recipe: Recipe
    output_dir: Path
    work_dir: Path
    minutes: float | None
    until: str
    export_only: bool
    compile: bool
    device: str | None
    data_source: str
    data_license: str
    preset: str


PRESETS = {
    "general": Recipe(),
    "signs": Recipe(subject="hand", autoencoder_images=72_000, denoiser_images=432_000),
    "elpv": Recipe(
        size=128,
        subject="solar cell",
        vocabulary=elpv.CLASS_NAMES,
        captions="solar-cell",
        mirror="both",
        crops=0,
        autoencoder_channels=(16, 32, 64, 64),
        latent_channels=8,
        autoencoder_images=51_200,
        autoencoder_batch=32,
        unet_channels=(64, 128, 192),
        unet_attention=(0, 1, 1),
        prediction="epsilon",
        denoiser_images=716_800,
        denoiser_batch=256,
        denoiser_schedule="cosine",
    ),
}
"""Recipes by name; single flags replace their settings."""
