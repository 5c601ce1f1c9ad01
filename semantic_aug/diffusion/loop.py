"""The batched denoising loop: img2img (SDEdit, Meng et al. 2022) and generation from noise, many images at once.

Every sample of a batch has its own prompt, strength and random generator, and comes out as diffusers' pipelines would
make it alone from the same generator. Classifier-free guidance (Ho & Salimans 2022) runs as one doubled batch.
"""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from semantic_aug.diffusion.schedulers import SolverSettings, first_step, make_scheduler
from semantic_aug.diffusion.text import Conditions
from semantic_aug.errors import UserError

TRIAL_RMS = 10.0
"""Root mean square of the latents with which a solver is tried, large so that a wrong noise level is noticed."""


def to_pixels(images: Sequence, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """PIL RGB images of one size to ``(B, 3, H, W)`` in [-1, 1]."""
    stacked = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images]))
    return (stacked.permute(0, 3, 1, 2).to(device).float() / 255 * 2 - 1).to(dtype)


def to_uint8(pixels: Tensor) -> Tensor:
    """``(B, 3, H, W)`` in [-1, 1] to uint8 ``(B, H, W, 3)``, rounded as diffusers' image processor does."""
    return ((pixels / 2 + 0.5).clamp(0, 1).float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


@torch.no_grad()
def encode_moments(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Images ``(B, 3, H, W)`` in [-1, 1] to the posterior's parameters ``(B, 2C, h, w)``: mean and log-variance."""
    return vae.encode(pixels).latent_dist.parameters


def sample_posterior(moments: Tensor, noise: Tensor, scaling_factor: float) -> Tensor:
    """Scaled latents from posterior parameters ``(B, 2C, h, w)`` and standard normal ``noise`` ``(B, C, h, w)``."""
    posterior = DiagonalGaussianDistribution(moments)
    return scaling_factor * (posterior.mean + posterior.std * noise.to(moments))


@torch.no_grad()
def decode_latents(
    vae: AutoencoderKL, latents: Tensor, micro_batch: int = 8, decode: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Scaled latents ``(B, C, h, w)`` to images, uint8 ``(B, H, W, 3)``; a few at a time, decoding takes much memory.

    Args:
        latents: ``(B, C, h, w)``.
        micro_batch: images decoded at once.
        decode: a compiled form of the VAE's decoding; it is always given whole micro-batches, padded where need be.

    Returns:
        The images; one whose latents or pixels are not all finite (half precision overflowed) is black everywhere.
    """
    images = []
    for part in (latents.to(vae.dtype) / vae.config.scaling_factor).split(micro_batch):
        if decode is None:
            pixels = vae.decode(part, return_dict=False)[0]
        else:
            padded = torch.cat([part, part[-1:].expand(micro_batch - len(part), -1, -1, -1)])
            pixels = decode(padded)[: len(part)]
        finite = part.isfinite().flatten(1).all(1) & pixels.isfinite().flatten(1).all(1)
        images.append(to_uint8(torch.where(finite[:, None, None, None], pixels, -1)))
    return torch.cat(images)


def draw(shape: tuple[int, ...], generators: Sequence[torch.Generator], like: Tensor) -> Tensor:
    """Standard normal noise ``(B, *shape)``, one generator per sample, drawn on the CPU in ``like``'s precision."""
    return randn_tensor((len(generators), *shape), generator=list(generators), device=like.device, dtype=like.dtype)


@dataclass(frozen=True)
class Sampler:
    """A denoiser: U-Net, solver and guidance.

    Attributes:
        unet: of diffusers, or a function with its signature.
        scheduler: noise schedule and solver, from :func:`semantic_aug.diffusion.schedulers.make_scheduler`; copied for each
            batch, never changed.
        null_embeds: conditioning of the empty prompt, one row.
        settings: steps and guidance.
    """

    unet: Callable
    scheduler: Any
    null_embeds: Conditions
    settings: SolverSettings


@dataclass(frozen=True)
class Opening:
    """The prompts of the first ``steps`` of denoising in two phases, one row per image (Diff-II: with a context, then
    without)."""

    prompt_embeds: Conditions
    steps: int


@torch.no_grad()
def translate(
    sampler: Sampler,
    moments: Tensor,
    scaling_factor: float,
    prompt_embeds: Conditions,
    strengths: Sequence[float],
    generators: Sequence[torch.Generator],
    masks: Tensor | None = None,
) -> Tensor:
    """Image to image: noises each source to its strength and denoises it under its own prompt.

    Args:
        moments: ``(B, 2C, h, w)`` posterior parameters of the sources.
        prompt_embeds: B rows.
        strengths: B numbers in (0, 1]; they may differ.
        generators: B CPU generators; each gives its sample's posterior draw, then its noise, then the draws of a stochastic
            solver.
        masks: bool ``(B, 1, h, w)``, True where an image may change; elsewhere the source, noised to each step's level,
            is put back after the step (latent blending, Avrahami et al. 2023; the inpainting of DA-Fusion). None: everywhere.

    Returns:
        Scaled latents ``(B, C, h, w)``.

    Raises:
        UserError: a strength too small for the number of steps.
    """
    shape, steps = (moments.shape[1] // 2, *moments.shape[2:]), sampler.settings.num_inference_steps
    # draw the sources' latents from the VAE's posterior
    latents = sample_posterior(moments, draw(shape, generators, moments), scaling_factor).to(prompt_embeds.dtype)
    noise = draw(shape, generators, latents)
    groups = _groups(sampler.scheduler, [first_step(steps, s) for s in strengths], steps, latents.device)
    kept = None if masks is None else _Kept(masks.to(latents.device), latents.clone(), noise)
    for group in groups:  # noise each source to its strength
        step = group.scheduler.timesteps[group.begin : group.begin + 1].repeat(len(group.samples))
        index = torch.tensor(group.samples, device=latents.device)
        latents[index] = group.scheduler.add_noise(latents[index], noise[index], step)
    return _denoise(sampler, groups, latents, prompt_embeds, generators, kept)


@torch.no_grad()
def generate(
    sampler: Sampler,
    latent_shape: tuple[int, int, int],
    prompt_embeds: Conditions,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Noise to image, each sample under its own of B prompts and from its own CPU generator; ``latent_shape`` is (C, h, w).
    Returns scaled latents ``(B, C, h, w)``."""
    steps = sampler.settings.num_inference_steps
    groups = _groups(sampler.scheduler, [0] * len(generators), steps, prompt_embeds.device)
    latents = draw(latent_shape, generators, prompt_embeds.hidden) * groups[0].scheduler.init_noise_sigma
    return _denoise(sampler, groups, latents, prompt_embeds, generators)


@torch.no_grad()
def denoise(sampler: Sampler, latents: Tensor, prompt_embeds: Conditions, opening: Opening | None = None) -> Tensor:
    """Latents ``(B, C, h, w)`` at the first step's noise level to scaled latents of images under B prompts, by a solver that
    draws nothing; ``opening`` gives the first steps other prompts."""
    groups = _groups(sampler.scheduler, [0] * len(latents), sampler.settings.num_inference_steps, latents.device)
    return _denoise(sampler, groups, latents, prompt_embeds, [None] * len(latents), opening=opening)


@dataclass
class _Group:
    """The samples of a batch that start at the same step, with their scheduler (multistep solvers keep a history)."""

    samples: list[int]
    begin: int
    scheduler: Any


@dataclass
class _Kept:
    """The sources under a mask (True: may change): their clean latents, and the noise added to them."""

    masks: Tensor
    latents: Tensor
    noise: Tensor

    def put_back(self, scheduler, samples: list[int], x: Tensor, following: Tensor | None) -> Tensor:
        """Latents after a step, with the sources where nothing may change, at the noise level of the following step."""
        index = torch.tensor(samples, device=x.device)
        known = self.latents[index]
        if following is not None:
            known = scheduler.add_noise(known, self.noise[index], following.repeat(len(samples)))
        return torch.where(self.masks[index], x, known.to(x.dtype))


def _groups(template, starts: Sequence[int], num_inference_steps: int, device: torch.device) -> list[_Group]:
    groups = []
    for start in sorted(set(starts)):
        scheduler = copy.deepcopy(template)
        scheduler.set_timesteps(num_inference_steps, device=device)
        begin = start * scheduler.order
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        groups.append(_Group([i for i, s in enumerate(starts) if s == start], begin, scheduler))
    return groups


def _denoise(
    sampler: Sampler,
    groups: list[_Group],
    latents: Tensor,
    prompt_embeds: Conditions,
    generators: Sequence[torch.Generator | None],
    kept: _Kept | None = None,
    opening: Opening | None = None,
) -> Tensor:
    """Runs every group from its own first step to the last; samples wait until their first step."""
    timesteps, guidance = groups[0].scheduler.timesteps, sampler.settings.guidance_scale
    for position in range(min(group.begin for group in groups), len(timesteps)):
        t, active = timesteps[position], [group for group in groups if group.begin <= position]
        index = torch.tensor([i for group in active for i in group.samples], device=latents.device)
        sizes = [len(group.samples) for group in active]
        parts = latents[index].split(sizes)
        scaled = torch.cat([g.scheduler.scale_model_input(x, t) for g, x in zip(active, parts, strict=True)])
        # predict the noise (or v), under the empty prompt too where guidance needs it
        embeds = (opening.prompt_embeds if opening and position < opening.steps else prompt_embeds)[index]
        if guidance > 1:
            scaled = torch.cat([scaled, scaled])
            embeds = Conditions.cat([sampler.null_embeds.expand(len(embeds)), embeds])
        predicted = sampler.unet(scaled.to(embeds.dtype), t, **embeds.unet_arguments(), return_dict=False)[0]
        if guidance > 1:  # classifier-free guidance
            unconditional, conditional = predicted.chunk(2)
            predicted = unconditional + guidance * (conditional - unconditional)
        stepped = []
        for group, x, prediction in zip(active, parts, predicted.split(sizes), strict=True):
            # one step of the solver
            options = _step_options(group.scheduler, [generators[i] for i in group.samples], sampler.settings.eta)
            x = group.scheduler.step(prediction, t, x, return_dict=False, **options)[0]
            if kept is not None:  # latent blending
                following = timesteps[position + 1 : position + 2] if position + 1 < len(timesteps) else None
                x = kept.put_back(group.scheduler, group.samples, x, following)
            stepped.append(x)
        latents = latents.index_copy(0, index, torch.cat(stepped).to(latents.dtype))
    return latents


def _step_options(scheduler, generators: list[torch.Generator], eta: float | None) -> dict:
    """The options of a solver's step that it knows: the samples' generators and ``eta``."""
    options = {"generator": generators, **({} if eta is None else {"eta": eta})}
    return {name: options[name] for name in options if name in inspect.signature(scheduler.step).parameters}


# ------------------------------------------------------------------------------------------------- trying a solver


def check_solver(config: Mapping[str, Any], settings: SolverSettings, masked: bool = False) -> None:
    """Tries a solver, in milliseconds, on random latents and a network that knows their noise: denoising has to restore the
    latents at any strength.

    Args:
        config: the base model's ``scheduler_config``.
        masked: whether sources are put back under a mask after each step.

    Raises:
        UserError: the solver fails, does not denoise by the base model's noise schedule, draws random numbers of its own, or
            takes steps between which sources cannot be put back.
    """
    steps, settings = settings.num_inference_steps, replace(settings, guidance_scale=1.0)
    scheduler = make_scheduler(config, settings.scheduler, settings.final_sigmas_type, settings.timestep_spacing)
    for strength in sorted({1.0, (steps + 1) // 2 / steps}):
        try:
            (noises, error), (again, _) = (_trial(config, scheduler, settings, strength) for _ in range(2))
        except Exception as error:  # solvers that do not support img2img fail with errors of many kinds
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"--scheduler {settings.scheduler} with {steps} steps: {reason}") from None
        # the first input has the noise level of its timestep, and denoising restores the latents
        if not (abs(_rms(noises[0]) - 1) < 0.3 and _rms(error) < TRIAL_RMS / 10):
            raise UserError(
                f"--scheduler {settings.scheduler} with {steps} steps does not denoise by the base model's noise schedule: "
                "choose another one, such as dpmsolver++, or more steps"
            )
        if not all(map(torch.equal, noises, again)):
            raise UserError(
                f"--scheduler {settings.scheduler} draws random numbers of its own, so that no image could be made again: "
                "choose another one, such as euler_a"
            )
        if not masked:
            continue
        levels = [_rms(noise) for noise in _trial(config, scheduler, settings, strength, masked=True)[0]]
        if not all(abs(level / levels[0] - 1) < 0.05 for level in levels):
            raise UserError(
                f"--scheduler {settings.scheduler} with --object_mask: what a mask keeps would come back at another noise "
                "level than that of the solver's half steps; choose another one, such as dpmsolver++"
            )


def _rms(values: Tensor) -> float:
    return float(values.pow(2).mean().sqrt())


def _trial(
    config: Mapping[str, Any], scheduler: Any, settings: SolverSettings, strength: float, masked: bool = False
) -> tuple[list[Tensor], Tensor]:
    """Denoises noised latents, where ``masked`` under a mask that keeps all of them. Returns the noise in the network's inputs,
    call by call, relative to the level of their timestep, and the denoised minus the original latents."""
    alphas = make_scheduler(config, "ddpm").alphas_cumprod.double().clamp(2**-24)  # not 0, as some solvers have it
    logits, noises = torch.logit(alphas), []
    latents = TRIAL_RMS * torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0))

    def unet(inputs: Tensor, t: Tensor, return_dict: bool, **conditioning) -> tuple[Tensor]:
        """The true noise (or v) of the inputs; between two timesteps the log-SNR is interpolated."""
        t = t.double().clamp(0, len(alphas) - 1)
        alpha = torch.lerp(logits[t.floor().long()], logits[t.ceil().long()], t.frac()).sigmoid().float()
        noises.append((inputs - alpha.sqrt() * latents) / (1 - alpha).sqrt())
        v = alpha.sqrt() * noises[-1] - (1 - alpha).sqrt() * latents
        return (v if config.get("prediction_type") == "v_prediction" else noises[-1],)

    none = Conditions(torch.zeros(1, 1, 1))
    moments = torch.cat([latents, torch.full_like(latents, -30)], dim=1)  # a posterior without variance
    sampler, generator = Sampler(unet, scheduler, none, settings), torch.Generator().manual_seed(1)
    masks = torch.zeros(1, 1, 8, 8, dtype=torch.bool) if masked else None
    return noises, translate(sampler, moments, 1.0, none, [strength], [generator], masks=masks) - latents
