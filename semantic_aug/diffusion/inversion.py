"""DDIM inversion (Song et al. 2021, arXiv:2010.02502) and points on the great circle through two inverted images.

Inverted latents of real images are close to Gaussian noise, whose norm hardly varies; so Diff-II (Wang & Chen 2025,
arXiv:2408.16266) interpolates between two of them on the sphere, and denoises the points under a prompt.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from torch import Tensor

from semantic_aug.diffusion.loop import Sampler
from semantic_aug.diffusion.schedulers import make_scheduler
from semantic_aug.diffusion.text import Conditions

SPACINGS = ("leading", "trailing")
SAME = 1e-5
"""Sine of the angle below which two latents count as equal."""


def make_inversion_scheduler(config: Mapping[str, Any]) -> DDIMScheduler:
    """DDIM over the base model's noise schedule at timesteps that its inverse visits too, in the opposite order.

    ``linspace`` spacing, which the inverse does not have, is replaced by ``leading``.
    ``set_alpha_to_one``, the noise level of clean latents, is the base model's, for both directions.

    Args:
        config: the base model's ``scheduler_config``.
    """
    spacing = config.get("timestep_spacing")
    spacing = spacing if spacing in SPACINGS else SPACINGS[0]
    return make_scheduler({**config, "timestep_spacing": spacing, "thresholding": False}, "ddim")


@torch.no_grad()
def invert(sampler: Sampler, latents: Tensor, prompt_embeds: Conditions) -> Tensor:
    """DDIM inversion without guidance: the noise from which DDIM under the same prompts gives the latents back.

    The steps are diffusers' ``DDIMInverseScheduler``'s. A predicted v is converted to noise at the level of the prediction, as
    in denoising; the scheduler itself would convert it at the level before, with ten times the error.

    Args:
        sampler: U-Net and steps; its scheduler is :func:`make_inversion_scheduler`'s.
        latents: scaled, clean, ``(B, C, h, w)``.
        prompt_embeds: B rows.

    Returns:
        Latents ``(B, C, h, w)`` at the noise level of the first denoising step, float32.
    """
    known = inspect.signature(DDIMInverseScheduler.__init__).parameters
    config = {name: value for name, value in sampler.scheduler.config.items() if name in known}
    inverse = DDIMInverseScheduler(**{**config, "prediction_type": "epsilon"})
    inverse.set_timesteps(sampler.settings.num_inference_steps, device=latents.device)
    latents = latents.float()
    for t in inverse.timesteps:
        # predict the noise (or v) at the level that the step leads to, from the latents it starts with
        inputs = latents.to(prompt_embeds.dtype)
        noise = sampler.unet(inputs, t, **prompt_embeds.unet_arguments(), return_dict=False)[0].float()
        if config["prediction_type"] == "v_prediction":
            alpha = inverse.alphas_cumprod[t]
            noise = alpha.sqrt() * noise + (1 - alpha).sqrt() * latents
        latents = inverse.step(noise, t, latents, return_dict=False)[0]
    return latents


def on_circle(source: Tensor, partner: Tensor, positions: Sequence[float], whole: bool = False) -> Tensor:
    """Points on the great circle through two latents, each from ``source`` (0) towards ``partner``.

    Args:
        source: ``(B, C, h, w)``.
        partner: ``(B, C, h, w)``.
        positions: B numbers in [0, 1].
        whole: a position is a share of the whole circle, as in Diff-II's circle interpolation; else of the arc up to the
            partner (slerp, Shoemake 1985), which is reached at 1.

    Returns:
        ``(B, C, h, w)``, float32. The norm goes from the source's to the partner's along the arc and stays there. Of two
        equal latents the source.
    """
    a, b = source.flatten(1).float(), partner.flatten(1).float()
    norm_a, norm_b = a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True)
    # orthonormal basis of the plane: the source's direction, and the orthogonal part of the partner's
    first, other = a / norm_a.clamp_min(SAME), b / norm_b.clamp_min(SAME)
    cosine = (first * other).sum(1, keepdim=True)
    second = other - cosine * first
    sine = second.norm(dim=1, keepdim=True)
    second, theta = second / sine.clamp_min(SAME), torch.atan2(sine, cosine)
    share = torch.tensor(positions, dtype=torch.float32, device=a.device)[:, None]
    angle = torch.where(sine < SAME, 0, 2 * math.pi * share if whole else theta * share)
    radius = torch.lerp(norm_a, norm_b, (angle / theta.clamp_min(SAME)).clamp(0, 1))
    return (radius * (angle.cos() * first + angle.sin() * second)).view_as(source)
