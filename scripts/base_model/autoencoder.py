"""First stage of a base model: an AutoencoderKL between pixels and small latents.

Trained with L1, image-gradient, perceptual and colour losses and a small KL term. No discriminator is needed to
keep thin lines.
Pixels are ``(B, 3, S, S)`` in [-1, 1]; greyscale images are repeated to three channels.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from base_model.recipe import Recipe
from base_model.training import Budget, Ema, LearningRate, Machine, Stage
from semantic_aug.seeding import torch_rng

KL_WEIGHT, PERCEPTUAL_WEIGHT, COLOUR_WEIGHT = 3e-4, 0.1, 5.0
VALIDATE_EVERY = 500


def make_autoencoder(recipe: Recipe) -> AutoencoderKL:
    """The untrained autoencoder: each level after the first halves the side."""
    levels = len(recipe.autoencoder_channels)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=recipe.latent_channels,
        block_out_channels=recipe.autoencoder_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=recipe.size,
    )


class Perceptual(nn.Module):
    """Squared distance of unit-normalised EfficientNet-Lite0 features at strides 2, 4 and 8 (Johnson et al. 2016)."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.stem = nn.Sequential(backbone.conv_stem, backbone.bn1)
        self.blocks = nn.ModuleList(backbone.blocks[:3])
        self.eval().requires_grad_(False)

    def features(self, images: Tensor) -> list[Tensor]:
        """``(B, 3, H, W)`` in [-1, 1] to three normalised maps."""
        x, maps = self.stem(images), []
        for block in self.blocks:
            x = block(x)
            maps.append(x.float() / (x.float().pow(2).mean(1, keepdim=True) + 1e-4).sqrt())
        return maps

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.features(targets)
        return sum(F.mse_loss(got, want) for got, want in zip(self.features(images), wanted, strict=True))


def to_tensor(pixels: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """uint8 ``(N, S, S, 1 | 3)`` to ``(N, 3, S, S)`` in [-1, 1]."""
    x = torch.from_numpy(np.array(pixels)).to(device)  # a copy: mapped files are read-only
    x = x.permute(0, 3, 1, 2).float() / 127.5 - 1
    return x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


def to_uint8(x: Tensor, channels: int) -> np.ndarray:
    """``(N, 3, S, S)`` in [-1, 1] to uint8 ``(N, S, S, channels)``; one channel is the mean of three."""
    x = x.float().mean(1, keepdim=True) if channels == 1 else x.float()
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def draw_batch(images: np.ndarray, enlarged: np.ndarray, count: int, mirror: str, rng: torch.Generator) -> np.ndarray:
    """Half whole images, half crops of the enlarged ones, each mirrored at random; uint8 ``(count, S, S, C)``."""
    size, zoom = images.shape[1], enlarged.shape[1]
    index = torch.randint(len(images), (count,), generator=rng).numpy()
    crop, top, left, flip, flop = torch.rand(5, count, generator=rng).numpy()
    views = []
    for i in range(count):
        y, x = (int(corner * (zoom - size + 1)) for corner in (top[i], left[i]))
        view = enlarged[index[i], y : y + size, x : x + size] if crop[i] < 0.5 else images[index[i]]
        view = view[::-1] if mirror == "both" and flip[i] < 0.5 else view
        views.append(view[:, ::-1] if mirror != "none" and flop[i] < 0.5 else view)
    return np.stack(views)


def gradient_loss(images: Tensor, targets: Tensor) -> Tensor:
    """L1 distance of horizontal and vertical finite differences: keeps thin lines from being averaged away."""
    return F.l1_loss(images.diff(dim=-1), targets.diff(dim=-1)) + F.l1_loss(images.diff(dim=-2), targets.diff(dim=-2))


def colour_loss(images: Tensor, targets: Tensor, factor: int) -> Tensor:
    """L1 distance of the colour differences red - green and blue - green, averaged over ``factor`` pixels.

    Hues that vary little between images (skin) cost next to nothing in the other losses and would be averaged away.
    """
    chroma = [F.avg_pool2d(x[:, ::2] - x[:, 1:2], factor) for x in (images, targets)]
    return F.l1_loss(*chroma)


def train_autoencoder(
    images: np.ndarray, enlarged: np.ndarray, kept_out: np.ndarray, recipe: Recipe, budget: Budget, folder: Path,
    perceptual: Perceptual | None, machine: Machine,
) -> AutoencoderKL:  # fmt: skip
    """Trains the autoencoder, or resumes where it stopped; returns the averaged weights' module.

    Args:
        images: uint8 ``(N, S, S, C)``.
        enlarged: the same images, 1.25 times as large.
        kept_out: images only looked at, for the PSNR in the log.
        recipe: architecture and learning rate.
        budget: images or time to spend.
        folder: of states and logs.
        perceptual: the perceptual loss, None to do without.
        machine: device, precision and compilation.
    """
    device = machine.device
    torch.manual_seed(0)  # initial weights; every batch below has a generator of its own
    model = make_autoencoder(recipe).to(device, memory_format=torch.channels_last)
    ema = Ema(model, recipe.autoencoder_ema)
    rate = LearningRate(recipe.autoencoder_lr, warmup=100, schedule="cosine")
    columns = ["l1", "gradient", "perceptual", "kl", "colour", "kept_out_psnr"]
    stage = Stage("autoencoder", folder, model, ema, budget=budget, rate=rate, columns=columns)
    psnr_of = Averaged(recipe, ema, device)

    def autoencode(x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        posterior = model.encode(x).latent_dist
        return model.decode(posterior.mean + posterior.std * noise).sample, posterior.kl()

    autoencode = machine.compiled(autoencode)
    side = recipe.size // recipe.factor
    for step in stage.steps():
        rng = torch_rng("base", "autoencoder", step)
        x = to_tensor(draw_batch(images, enlarged, budget.batch, recipe.mirror, rng), device)
        noise = torch.randn(len(x), recipe.latent_channels, side, side, generator=rng).to(device)
        with machine.amp():
            y, kl = autoencode(x, noise)
            p = perceptual(y, x) if perceptual else torch.zeros(())
        y = y.float()
        l1, grad, kl = F.l1_loss(y, x), gradient_loss(y, x), kl.mean() / noise[0].numel()
        colour = colour_loss(y, x, recipe.factor) if images.shape[3] == 3 else torch.zeros(())
        stage.optimise(l1 + grad + PERCEPTUAL_WEIGHT * p + KL_WEIGHT * kl + COLOUR_WEIGHT * colour)
        due = (step + 1) % VALIDATE_EVERY == 0 or step + 1 == budget.steps
        values = {"l1": l1, "gradient": grad, "perceptual": p, "kl": kl, "colour": colour}
        stage.record(values, (lambda: {"kept_out_psnr": psnr_of(kept_out)}) if due else None)
    ema.copy_to(model)
    return model.eval()


class Averaged:
    """The averaged weights' reconstruction of images kept out, in dB."""

    def __init__(self, recipe: Recipe, ema: Ema, device: torch.device):
        self.model, self.ema = make_autoencoder(recipe).to(device).eval(), ema

    def __call__(self, kept_out: np.ndarray) -> float:
        self.ema.copy_to(self.model)
        return psnr(reconstruct(self.model, kept_out), kept_out)


def digest(model: nn.Module) -> str:
    """Hash of a module's parameters."""
    return hashlib.sha256(b"".join(p.detach().float().cpu().numpy().tobytes() for p in model.parameters())).hexdigest()[
        :12
    ]


@torch.no_grad()
def reconstruct(model: AutoencoderKL, images: np.ndarray) -> np.ndarray:
    """Images through the autoencoder (posterior mode); uint8 ``(N, S, S, C)`` in and out."""
    device, out = next(model.parameters()).device, []
    for start in range(0, len(images), 32):
        x = to_tensor(images[start : start + 32], device)
        out.append(to_uint8(model.decode(model.encode(x).latent_dist.mode()).sample, images.shape[3]))
    return np.concatenate(out)


def psnr(images: np.ndarray, references: np.ndarray) -> float:
    """Mean over images of the peak signal-to-noise ratio in dB; uint8 ``(N, H, W, C)``."""
    error = (images.astype(np.float32) - references) / 255
    mse = np.maximum(np.square(error).reshape(len(error), -1).mean(1), 1e-10)
    return float((-10 * np.log10(mse)).mean())
