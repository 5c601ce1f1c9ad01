"""Stage two of the embedded base model: U-Net and text encoder, trained together on the autoencoder's latents."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from base_captions import Describer, vocabulary_words
from base_training import Ema, Progress, cosine, load_state, make_optimizer, save_state
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from semantic_aug.diffusion import losses
from semantic_aug.diffusion.loop import encode_moments, sample_posterior
from semantic_aug.diffusion.text import encode_ids, tokenize
from semantic_aug.files import atomic_path
from semantic_aug.run_dir import load_pickle
from semantic_aug.seeding import derive_seed, numpy_rng, torch_rng

TEXT_LENGTH = 48
TEXT_WIDTH = 192
PEAK_LR = 5e-4
SNR_GAMMA = 5.0
FLIPS = ((), (-1,), (-2,), (-2, -1))
CAPTIONS = 32
"""Captions drawn for every image before training starts; each step takes one of them."""
VALIDATE_EVERY = 500


def make_tokenizer() -> CLIPTokenizer:
    """CLIP's kind of byte-level BPE, its merges learned from the captions' words, so that each is one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=4000, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator([word for word in vocabulary_words() for _ in range(2)], trainer)
    import json

    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    words = [*alphabet, *(letter + "</w>" for letter in alphabet), *dict.fromkeys(a + b for a, b in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=merges, model_max_length=TEXT_LENGTH)


def kept_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer of a training, kept in its folder: which of two equally frequent merges comes first varies by process."""
    place = folder / "tokenizer"
    if not place.is_dir():
        make_tokenizer().save_pretrained(place)
    return CLIPTokenizer.from_pretrained(place)


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


def make_unet(latent_channels: int) -> UNet2DConditionModel:
    """The untrained U-Net for 16x16 latents; it attends to the text at 8x8 and 4x4, the 16x16 level is convolutions."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=latent_channels,
        out_channels=latent_channels,
        layers_per_block=1,
        block_out_channels=(64, 128, 192),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def make_scheduler() -> DDPMScheduler:
    """Stable Diffusion 1's noise schedule."""
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def encode_images(vae: AutoencoderKL, images: Tensor, folder: Path) -> Tensor:
    """Posterior parameters ``(N, 4, 2C, 16, 16)`` of uint8 ``(N, 128, 128)`` images in four mirrorings, kept in a file."""
    digest = hashlib.sha256(b"".join(p.detach().cpu().numpy().tobytes() for p in vae.parameters())).hexdigest()
    path = folder / f"moments-{digest[:12]}.pt"
    if path.exists():
        return load_pickle(path, "remove it to encode the images again").to(images.device)
    out = []
    for chunk in images.split(32):
        x = (chunk.float() / 127.5 - 1)[:, None].expand(-1, 3, -1, -1)
        out.append(torch.stack([encode_moments(vae, x.flip(dims) if dims else x) for dims in FLIPS], 1))
    moments = torch.cat(out)
    with atomic_path(path) as temporary:
        torch.save(moments, temporary)
    return moments


class TextToLatents(nn.Module):
    """Text encoder and U-Net as one trained module."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel):
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet


def draw_captions(describer: Describer, tokenizer: CLIPTokenizer) -> Tensor:
    """Token ids ``(N, CAPTIONS, L)`` of captions of every image."""
    rng = numpy_rng("base", "captions")
    texts = [describer.caption(i, rng) for i in range(len(describer.words)) for _ in range(CAPTIONS)]
    return tokenize(tokenizer, texts).view(len(describer.words), CAPTIONS, -1)


class Validation:
    """The loss of the averaged weights on images kept out, under empty captions and noise that stays the same.

    It shows when a longer training starts to learn its images by heart: the loss rises again.
    """

    def __init__(self, moments: Tensor, null_ids: Tensor, scale: float, scheduler: DDPMScheduler, alphas: Tensor):
        rng, count = torch_rng("base", "validation"), len(moments)
        self.t = losses.draw_timesteps(count, scheduler.config.num_train_timesteps, rng).to(moments.device)
        shape = (count, moments.shape[2] // 2, *moments.shape[3:])
        posterior, self.noise = (torch.randn(shape, generator=rng).to(moments.device) for _ in range(2))
        latents = sample_posterior(moments[:, 0], posterior, scale)
        self.noisy = losses.add_noise(latents, self.noise, self.t, alphas)
        self.weights, self.null_ids = losses.min_snr_weights(self.t, alphas, SNR_GAMMA, "epsilon"), null_ids

    @torch.no_grad()
    def __call__(self, model: TextToLatents, ema: Ema, amp) -> Tensor:
        with amp():
            functional_call = torch.func.functional_call
            weights = {part: ema.values_of(part) for part in ("text_encoder", "unet")}
            embeds = functional_call(model.text_encoder, weights["text_encoder"], (self.null_ids,))[0]
            inputs = (self.noisy, self.t, embeds.expand(len(self.noisy), -1, -1))
            predicted = functional_call(model.unet, weights["unet"], inputs, {"return_dict": False})[0]
        return losses.denoising_loss(predicted, self.noise, self.weights)


def train_denoiser(
    vae: AutoencoderKL,
    images: Tensor,
    kept_out: Tensor,
    describer: Describer,
    steps: int,
    batch: int,
    folder: Path,
    amp,
    compiled: bool,
) -> tuple[CLIPTokenizer, TextToLatents]:
    """Trains U-Net and text encoder; returns the tokenizer and the EMA weights' module.

    Sets the autoencoder's scaling factor so that latents have unit variance. ``kept_out`` images are only looked at:
    the loss on them stands in the log.
    """
    device = images.device
    moments = encode_images(vae, images, folder)
    vae.register_to_config(scaling_factor=float(1 / moments[:, 0].chunk(2, dim=1)[0].std()))
    tokenizer = kept_tokenizer(folder)
    captions = draw_captions(describer, tokenizer).to(device)
    torch.manual_seed(2)
    model = TextToLatents(make_text_encoder(tokenizer), make_unet(vae.config.latent_channels))
    model.to(device, memory_format=torch.channels_last)
    unet = torch.compile(model.unet, dynamic=False) if compiled else model.unet
    optimizer = make_optimizer(model, PEAK_LR)
    ema = Ema(model, 0.9995)
    state = folder / "denoiser.pt"
    start = load_state(state, model=model, ema=ema, optimizer=optimizer)
    scheduler, scale = make_scheduler(), vae.config.scaling_factor
    alphas = losses.alphas_cumprod(scheduler).to(device)
    null_ids = tokenize(tokenizer, [""]).to(device)
    validation = Validation(encode_images(vae, kept_out, folder), null_ids, scale, scheduler, alphas)
    kept_out_loss = torch.full((), float("nan"))
    with Progress("denoiser", start, steps, folder) as progress:
        for step in range(start, steps):
            for group in optimizer.param_groups:
                group["lr"] = cosine(step, steps, peak=PEAK_LR, warmup=300)
            rng = torch.Generator(device).manual_seed(derive_seed("base", "denoiser", step))
            index = torch.randint(len(images), (batch,), generator=rng, device=device)
            flip = torch.randint(len(FLIPS), (batch,), generator=rng, device=device)
            caption = torch.randint(CAPTIONS, (batch,), generator=rng, device=device)
            t = torch.randint(scheduler.config.num_train_timesteps, (batch,), generator=rng, device=device)
            chosen = moments[index, flip]
            shape = (batch, vae.config.latent_channels, *chosen.shape[2:])
            posterior, noise = (torch.randn(shape, generator=rng, device=device) for _ in range(2))
            noisy = losses.add_noise(sample_posterior(chosen, posterior, scale), noise, t, alphas)
            with amp():
                embeds = encode_ids(model.text_encoder, captions[index, caption])
                predicted = unet(noisy, t, embeds, return_dict=False)[0]
            weights = losses.min_snr_weights(t, alphas, SNR_GAMMA, "epsilon")
            loss = losses.denoising_loss(predicted, noise, weights)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            ema.update(model, step)
            if (step + 1) % VALIDATE_EVERY == 0:
                kept_out_loss = validation(model, ema, amp)
            progress.step(loss=loss, grad_norm=norm, kept_out_loss=kept_out_loss)
            if progress.time_to_save():
                save_state(state, step + 1, model=model, ema=ema, optimizer=optimizer)
    save_state(state, steps, model=model, ema=ema, optimizer=optimizer)
    ema.copy_to(model)
    return tokenizer, model.eval()


def count_parameters(*modules: nn.Module) -> int:
    """Parameters of all modules together."""
    return sum(p.numel() for module in modules for p in module.parameters())


def words_as_tokens(tokenizer: CLIPTokenizer) -> float:
    """Share of the caption words that are one token each."""
    words = vocabulary_words()
    return float(np.mean([len(tokenizer(word, add_special_tokens=False).input_ids) == 1 for word in words]))
