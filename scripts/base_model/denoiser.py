"""Second stage of a base model: U-Net and text encoder, trained together on the autoencoder's latents."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from base_model.autoencoder import digest, to_tensor
from base_model.captions import Describer, described_views, mirrorings, vocabulary_words
from base_model.recipe import Recipe
from base_model.training import Budget, Ema, LearningRate, Machine, Stage
from semantic_aug.diffusion import losses
from semantic_aug.diffusion.loop import encode_moments, sample_posterior
from semantic_aug.diffusion.text import tokenize
from semantic_aug.files import write_text
from semantic_aug.seeding import derive_seed, numpy_rng, torch_rng
from semantic_aug.tensors import create_array, open_array

TEXT_LENGTH = 48
TEXT_WIDTH = 192
SNR_GAMMA = 5.0
CAPTIONS = 32
"""Captions drawn for every described view before training starts; each step takes one of them."""
CLOSEST = 1.15
"""Largest enlargement of a random crop."""
VALIDATE_EVERY = 500
VALIDATED = 256
"""Noised latents in a validation loss, at least."""


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges that make each word one token: the most frequent pair first, ties in alphabetical order.

    The library's trainer takes equally frequent pairs in an order that changes from process to process.

    Args:
        words: in the byte-level alphabet, each counted once.
    """
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while pairs := Counter(pair for piece in pieces for pair in pairwise(piece)):
        merges.append(min(pairs, key=lambda pair: (-pairs[pair], pair)))
        for piece in pieces:
            i = 0
            while i < len(piece) - 1:
                if tuple(piece[i : i + 2]) == merges[-1]:
                    piece[i : i + 2] = ["".join(merges[-1])]
                i += 1
    return merges


def make_tokenizer(words: list[str]) -> CLIPTokenizer:
    """CLIP's kind of byte-level BPE, its merges learned from the captions' words, so that each is one token."""
    from tokenizers import pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(byte_level.alphabet())
    merges = learn_merges([piece for word in words for piece, _ in byte_level.pre_tokenize_str(word)])
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *dict.fromkeys(a + b for a, b in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, model_max_length=TEXT_LENGTH)


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The untrained text encoder: three layers of width 192."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=3,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_unet(recipe: Recipe) -> UNet2DConditionModel:
    """The untrained U-Net; levels without attention to the text are convolutions alone."""
    attends = [bool(flag) for flag in recipe.unet_attention]
    return UNet2DConditionModel(
        sample_size=recipe.size // recipe.factor,
        in_channels=recipe.latent_channels,
        out_channels=recipe.latent_channels,
        layers_per_block=1,
        block_out_channels=recipe.unet_channels,
        down_block_types=tuple("CrossAttnDownBlock2D" if flag else "DownBlock2D" for flag in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if flag else "UpBlock2D" for flag in reversed(attends)),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def make_scheduler(recipe: Recipe) -> DDPMScheduler:
    """Stable Diffusion's noise schedule."""
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
        prediction_type=recipe.prediction,
    )


# ------------------------------------------------------------------------------------------------------------ latents


def crop(enlarged: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """A random crop of each image, at most :data:`CLOSEST` times closer than the whole one; uint8 ``(B, size, size, C)``."""
    views, side = [], enlarged.shape[1]
    for image in enlarged:
        taken = round(side / rng.uniform(1, CLOSEST))
        top, left = rng.integers(side - taken + 1, size=2)
        x = torch.from_numpy(image[top : top + taken, left : left + taken].copy()).permute(2, 0, 1)[None].float()
        x = F.interpolate(x, (size, size), mode="bicubic", antialias=True, align_corners=False)
        views.append(x[0].clamp(0, 255).round().byte().permute(1, 2, 0).numpy())
    return np.stack(views)


@torch.no_grad()
def encode_views(
    vae: AutoencoderKL, pixels: np.ndarray, enlarged: np.ndarray, recipe: Recipe, path: Path, machine: Machine
) -> np.ndarray:
    """Posterior parameters of every view of every image, in a file made once and mapped into memory.

    Args:
        vae: trained autoencoder.
        pixels: uint8 ``(N, S, S, C)``.
        enlarged: the same images, from which crops are taken; without any for views that are not cropped.
        recipe: its number of crops and its mirroring.
        path: of the file; rows already in an unfinished one are kept.
        machine: device and precision.

    Returns:
        float32 ``(N, (1 + crops) * mirrorings, 2 * channels, s, s)``; mirrored views of one crop follow one another.
    """
    crops, flips = (recipe.crops if len(enlarged) else 0), mirrorings(recipe.mirror)
    side = recipe.size // recipe.factor
    shape = (len(pixels), (1 + crops) * len(flips), 2 * recipe.latent_channels, side, side)
    finished = open_array(path, np.float32, shape)
    if finished is not None:
        return finished
    part, count = path.with_suffix(".part"), path.with_suffix(".count")
    moments = (
        np.load(part, mmap_mode="r+") if count.exists() and part.exists() else create_array(part, np.float32, shape)
    )
    start = int(count.read_text()) if count.exists() else 0
    for first in range(start, len(pixels), 32):
        rows = slice(first, first + 32)
        views = [pixels[rows]]
        views += [crop(enlarged[rows], recipe.size, numpy_rng("base", "crop", first, i)) for i in range(crops)]
        batches = [x.flip(dims) if dims else x for x in (to_tensor(v, machine.device) for v in views) for dims in flips]
        with machine.amp():
            moments[rows] = torch.stack([encode_moments(vae, x).float() for x in batches], 1).cpu().numpy()
        moments.flush()
        write_text(count, str(first + 32))
    part.replace(path)
    count.unlink(missing_ok=True)
    return np.load(path, mmap_mode="r")


# ----------------------------------------------------------------------------------------------------------- training


class TextToLatents(nn.Module):
    """Text encoder and U-Net as one trained module."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel):
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet


def draw_captions(describer: Describer, tokenizer: CLIPTokenizer) -> Tensor:
    """Token ids ``(N, CAPTIONS, L)`` of captions of every described view."""
    rng = numpy_rng("base", "captions")
    texts = [describer.caption(i, rng) for i in range(len(describer.words)) for _ in range(CAPTIONS)]
    return tokenize(tokenizer, texts).view(len(describer.words), CAPTIONS, -1)


class Validation:
    """The loss of the averaged weights on fixed images under empty captions and noise that stays the same.

    On images kept out it rises again once a longer training learns its images by heart; on as many training images it
    falls further: the difference says how far that went.
    """

    def __init__(self, moments: np.ndarray, null_ids: Tensor, scale: float, recipe: Recipe, machine: Machine):
        scheduler, rng = make_scheduler(recipe), torch_rng("base", "validation")
        self.alphas = scheduler.alphas_cumprod.to(machine.device)
        first = torch.from_numpy(np.array(moments[:, 0])).to(machine.device)
        first = first.repeat(math.ceil(VALIDATED / len(first)), 1, 1, 1)
        self.t = torch.randint(scheduler.config.num_train_timesteps, (len(first),), generator=rng).to(machine.device)
        shape = (len(first), first.shape[1] // 2, *first.shape[2:])
        posterior, noise = (torch.randn(shape, generator=rng).to(machine.device) for _ in range(2))
        latents = sample_posterior(first, posterior, scale)
        self.noisy = losses.add_noise(latents, noise, self.t, self.alphas)
        self.target = losses.target(latents, noise, self.t, self.alphas, recipe.prediction)
        self.weights = losses.min_snr_weights(self.t, self.alphas, SNR_GAMMA, recipe.prediction)
        self.null_ids, self.machine = null_ids, machine

    @torch.no_grad()
    def __call__(self, model: TextToLatents, ema: Ema) -> float:
        functional_call, total = torch.func.functional_call, 0.0
        weights = {part: ema.values_of(part) for part in ("text_encoder", "unet")}
        with self.machine.amp():
            embeds = functional_call(model.text_encoder, weights["text_encoder"], (self.null_ids,))[0]
            for rows in torch.arange(len(self.t)).split(128):
                inputs = (self.noisy[rows], self.t[rows], embeds.expand(len(rows), -1, -1))
                predicted = functional_call(model.unet, weights["unet"], inputs, {"return_dict": False})[0]
                loss = losses.denoising_loss(predicted, self.target[rows], self.weights[rows])
                total += float(loss) * len(rows) / len(self.t)
        return total


class Batches:
    """Noised latents, their captions and targets, each step's drawn from the step alone."""

    def __init__(self, moments: np.ndarray, captions: Tensor, scale: float, recipe: Recipe, machine: Machine):
        self.moments, self.captions, self.scale, self.recipe, self.machine = moments, captions, scale, recipe, machine
        scheduler = make_scheduler(recipe)
        self.alphas = scheduler.alphas_cumprod.to(machine.device)
        self.timesteps, self.described = scheduler.config.num_train_timesteps, described_views(recipe)

    def draw(self, step: int, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Noised latents, timesteps, token ids, targets and loss weights of one step."""
        device, recipe = self.machine.device, self.recipe
        rng = torch.Generator(device).manual_seed(derive_seed("base", "denoiser", step))

        def integers(below: int) -> Tensor:
            return torch.randint(below, (count,), generator=rng, device=device)

        image, view, caption = integers(len(self.moments)), integers(self.moments.shape[1]), integers(CAPTIONS)
        t = integers(self.timesteps)
        chosen = torch.from_numpy(self.moments[image.cpu().numpy(), view.cpu().numpy()]).to(device)
        shape = (count, recipe.latent_channels, *chosen.shape[2:])
        posterior, noise = (torch.randn(shape, generator=rng, device=device) for _ in range(2))
        latents = sample_posterior(chosen, posterior, self.scale)
        noisy = losses.add_noise(latents, noise, t, self.alphas)
        target = losses.target(latents, noise, t, self.alphas, recipe.prediction)
        ids = self.captions[(image * self.described + view % self.described).cpu(), caption.cpu()].to(device)
        return noisy, t, ids, target, losses.min_snr_weights(t, self.alphas, SNR_GAMMA, recipe.prediction)


def train_denoiser(
    vae: AutoencoderKL, moments: np.ndarray, kept_out: np.ndarray, describer: Describer, recipe: Recipe, budget: Budget,
    folder: Path, machine: Machine,
) -> tuple[CLIPTokenizer, TextToLatents]:  # fmt: skip
    """Trains U-Net and text encoder, or resumes where that stopped; returns the tokenizer and the averaged weights' module.

    Args:
        vae: trained autoencoder; its scaling factor is set so that latents have unit variance.
        moments: posterior parameters of the views of all training images (:func:`encode_views`).
        kept_out: those of images only looked at.
        describer: words of the training images.
        recipe: architecture, prediction and learning rate.
        budget: images or time to spend.
        folder: of states and logs.
        machine: device, precision and compilation.
    """
    device, identity = machine.device, digest(vae)
    vae.register_to_config(scaling_factor=float(1 / np.std(moments[:, 0, : recipe.latent_channels])))
    scale = vae.config.scaling_factor
    tokenizer = make_tokenizer(vocabulary_words(recipe))
    torch.manual_seed(2)
    model = TextToLatents(make_text_encoder(tokenizer), make_unet(recipe)).to(device, memory_format=torch.channels_last)
    ema = Ema(model, recipe.denoiser_ema)
    rate = LearningRate(recipe.denoiser_lr, warmup=300, schedule=recipe.denoiser_schedule)
    columns = ["loss", "grad_norm", "kept_out_loss", "seen_loss"]
    stage = Stage("denoiser", folder, model, ema, budget=budget, rate=rate, columns=columns, identity=identity)
    unet, null_ids = machine.compiled(model.unet), tokenize(tokenizer, [""]).to(device)
    checks = {
        name: Validation(some, null_ids, scale, recipe, machine)
        for name, some in (("kept_out_loss", kept_out), ("seen_loss", moments[: len(kept_out)]))
    }
    batches = Batches(moments, draw_captions(describer, tokenizer), scale, recipe, machine)
    for step in stage.steps():
        noisy, t, ids, target, weights = batches.draw(step, budget.batch)
        with machine.amp():
            predicted = unet(noisy, t, model.text_encoder(ids)[0], return_dict=False)[0]
        loss = losses.denoising_loss(predicted, target, weights)
        norm = stage.optimise(loss)
        due = (step + 1) % VALIDATE_EVERY == 0 or step + 1 == budget.steps
        validate = (lambda: {name: check(model, ema) for name, check in checks.items()}) if due else None
        stage.record({"loss": loss, "grad_norm": norm}, validate)
    ema.copy_to(model)
    return tokenizer, model.eval()
