"""The denoising objective (Ho et al. 2020), in epsilon or v (Salimans & Ho 2022), with optional min-SNR weights.

Latents and noise are ``(B, C, h, w)``, timesteps ``(B,)``, ``alphas`` ``(T,)`` a scheduler's cumulative products of 1 - beta.
"""

from torch import Tensor


def _at(values: Tensor, timesteps: Tensor, like: Tensor) -> Tensor:
    return values.to(like.device)[timesteps].view(-1, *[1] * (like.ndim - 1)).to(like.dtype)


def add_noise(latents: Tensor, noise: Tensor, timesteps: Tensor, alphas: Tensor) -> Tensor:
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e."""
    return _at(alphas.sqrt(), timesteps, latents) * latents + _at((1 - alphas).sqrt(), timesteps, latents) * noise


def target(latents: Tensor, noise: Tensor, timesteps: Tensor, alphas: Tensor, prediction_type: str) -> Tensor:
    """What the U-Net should predict: the noise, or v = sqrt(a_t) e - sqrt(1 - a_t) x_0."""
    if prediction_type == "v_prediction":
        return _at(alphas.sqrt(), timesteps, latents) * noise - _at((1 - alphas).sqrt(), timesteps, latents) * latents
    return noise


def min_snr_weights(timesteps: Tensor, alphas: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Loss weights ``(B,)`` of Hang et al. 2023 (arXiv:2303.09556): min(SNR, gamma) / SNR, for v over SNR + 1."""
    a = alphas.to(timesteps.device)[timesteps]
    snr = a / (1 - a)
    return snr.clamp(max=gamma) / (snr + 1 if prediction_type == "v_prediction" else snr)


def denoising_loss(predicted: Tensor, wanted: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean squared error over everything, each sample's mean weighted by ``weights`` ``(B,)`` where given."""
    per_sample = (predicted.float() - wanted.float()).pow(2).flatten(1).mean(1)
    return (per_sample if weights is None else per_sample * weights).mean()
