"""Stage one of the embedded base model: an f=8 autoencoder with 8 latent channels.

Trained with L1, image-gradient and perceptual losses and a small KL term; no discriminator is needed to keep thin cracks.
Images are greyscale photographs repeated to three channels, ``(B, 3, 128, 128)`` in [-1, 1].
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from base_training import Ema, Progress, cosine, load_state, make_optimizer, save_state
from diffusers import AutoencoderKL
from torch import Tensor, nn

from semantic_aug.seeding import torch_rng

SIZE, ZOOM = 128, 160
KL_WEIGHT, PERCEPTUAL_WEIGHT = 3e-4, 0.1


def make_autoencoder() -> AutoencoderKL:
    """The untrained autoencoder: 128 px images to 16x16x8 latents, one million parameters."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=SIZE,
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


def draw_batch(images: Tensor, zoomed: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """Half whole cells, half crops of a 1.25x enlargement, each flipped at random; ``(count, 3, 128, 128)`` in [-1, 1]."""
    device = images.device
    index = torch.randint(len(images), (count,), generator=rng).to(device)
    crop, top, left, flip, flop = torch.rand(5, count, generator=rng).to(device)
    along = torch.arange(SIZE, device=device)
    rows = torch.where(flip[:, None] < 0.5, along.flip(0), along)[:, :, None]
    columns = torch.where(flop[:, None] < 0.5, along.flip(0), along)[:, None, :]
    top, left = ((corner * (ZOOM - SIZE + 1)).long()[:, None, None] for corner in (top, left))
    item = index[:, None, None]
    views = torch.where(
        crop[:, None, None] < 0.5, zoomed[item, top + rows, left + columns], images[item, rows, columns]
    )
    return (views.float() / 127.5 - 1)[:, None].expand(-1, 3, -1, -1).contiguous()


def gradient_loss(images: Tensor, targets: Tensor) -> Tensor:
    """L1 distance of horizontal and vertical finite differences: keeps thin lines from being averaged away."""
    return F.l1_loss(images.diff(dim=-1), targets.diff(dim=-1)) + F.l1_loss(images.diff(dim=-2), targets.diff(dim=-2))


def train_autoencoder(
    images: Tensor, zoomed: Tensor, perceptual: Perceptual, steps: int, batch: int, folder: Path, amp
) -> AutoencoderKL:
    """Trains the autoencoder on uint8 ``(N, 128, 128)`` images and their ``(N, 160, 160)`` enlargements; returns its EMA."""
    torch.manual_seed(0)  # initial weights; every batch below has a generator of its own
    model = make_autoencoder().to(images.device)
    optimizer = make_optimizer(model, 2e-3)
    ema = Ema(model, 0.999)
    state = folder / "autoencoder.pt"
    start = load_state(state, model=model, ema=ema, optimizer=optimizer)
    with Progress("autoencoder", start, steps, folder) as progress:
        for step in range(start, steps):
            for group in optimizer.param_groups:
                group["lr"] = cosine(step, steps, peak=2e-3, warmup=100)
            rng = torch_rng("base", "autoencoder", step)
            x = draw_batch(images, zoomed, batch, rng)
            with amp():
                posterior = model.encode(x).latent_dist
                noise = torch.randn(posterior.mean.shape, generator=rng).to(x.device)
                y = model.decode(posterior.mean + posterior.std * noise).sample
                p = perceptual(y, x)
            y = y.float()
            l1, grad, kl = F.l1_loss(y, x), gradient_loss(y, x), posterior.kl().mean() / posterior.mean[0].numel()
            loss = l1 + grad + PERCEPTUAL_WEIGHT * p + KL_WEIGHT * kl
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            ema.update(model, step)
            progress.step(l1=l1, gradient=grad, perceptual=p, kl=kl)
            if progress.time_to_save():
                save_state(state, step + 1, model=model, ema=ema, optimizer=optimizer)
    save_state(state, steps, model=model, ema=ema, optimizer=optimizer)
    ema.copy_to(model)
    return model.eval()


@torch.no_grad()
def reconstruct(model: AutoencoderKL, images: Tensor) -> Tensor:
    """Images through the autoencoder (posterior mode); uint8 ``(N, 128, 128)`` in and out."""
    out = []
    for chunk in images.split(32):
        x = (chunk.float() / 127.5 - 1)[:, None].expand(-1, 3, -1, -1)
        y = model.decode(model.encode(x).latent_dist.mode()).sample.mean(1)
        out.append(((y.clamp(-1, 1) + 1) * 127.5).round().byte())
    return torch.cat(out)


def psnr(images: Tensor, references: Tensor) -> float:
    """Mean over images of the peak signal-to-noise ratio in dB; uint8 ``(N, H, W)``."""
    mse = (images.float() - references.float()).div(255).pow(2).flatten(1).mean(1).clamp_min(1e-10)
    return float((-10 * mse.log10()).mean())
