"""The engine of every strategy: a loaded model that makes one batch of images at a time."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

from semantic_aug.augmentations.model import ModelFiles, Prompts
from semantic_aug.diffusion import lora as lora_io
from semantic_aug.diffusion import tokens as token_io
from semantic_aug.diffusion.base import BaseModel, load_base
from semantic_aug.diffusion.inversion import invert, make_inversion_scheduler, on_circle
from semantic_aug.diffusion.loop import (
    Opening,
    Sampler,
    decode_latents,
    denoise,
    encode_moments,
    generate,
    to_pixels,
    translate,
)
from semantic_aug.diffusion.schedulers import SolverSettings, make_scheduler
from semantic_aug.diffusion.text import PROMPT_BYTES, Conditions, class_prompt
from semantic_aug.prompts import with_context

log = logging.getLogger(__name__)

PROMPT_BATCH = 64
ENCODE_BATCH = DECODE_BATCH = 8
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class EncodedPrompts:
    """The conditioning of numbered prompts, encoded in fixed chunks so that it depends on nothing but the list of prompts.

    Where all of it fits the bound it is encoded at once and the text encoders are let go. Otherwise they stay, chunks are
    encoded when a prompt of theirs is needed, and the least recently used ones are dropped. With contexts, of whose prompts
    there may be millions and neighbours are hardly ever needed together, prompts are encoded batch by batch.

    Args:
        encode: prompts to their conditioning.
        prompts: all plain prompts.
        row_bytes: size of a prompt's conditioning.
        bound: most bytes held.
        contexts: texts that may follow each prompt.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[str]], Conditions],
        prompts: Sequence[str],
        row_bytes: int,
        bound: int = PROMPT_BYTES,
        contexts: Sequence[str] = (),
    ):
        self.prompts, self.contexts = prompts, contexts
        self.encode: Callable | None = encode
        self.chunk = functools.lru_cache(max(1, bound // (PROMPT_BATCH * row_bytes)))(self._chunk)
        self.whole: Conditions | None = None
        if not contexts and len(prompts) * row_bytes <= bound:
            chunks = range(-(-len(prompts) // PROMPT_BATCH))
            self.whole = Conditions.cat(self._chunk(chunk) for chunk in chunks)
            self.encode = None

    def __getitem__(self, rows: Sequence[int]) -> Conditions:
        """The conditioning of the prompts of these numbers, in their order."""
        if self.whole is not None:
            return self.whole[rows]
        numbers = sorted(set(rows))  # the conditioning depends on the batch alone, and each chunk is encoded once
        if self.contexts:
            parts = (numbers[i : i + PROMPT_BATCH] for i in range(0, len(numbers), PROMPT_BATCH))
            encoded = (self.encode([self.prompt(number) for number in part]) for part in parts)
        else:
            encoded = (self.chunk(number // PROMPT_BATCH)[[number % PROMPT_BATCH]] for number in numbers)
        return Conditions.cat(encoded)[[numbers.index(row) for row in rows]]

    def prompt(self, number: int) -> str:
        """The prompt of a number, counted as by :meth:`Prompts.number`: all plain ones, all with the first context, ..."""
        context, plain = divmod(number, len(self.prompts))
        return with_context(self.prompts[plain], self.contexts[context - 1] if context else "")

    def _chunk(self, number: int) -> Conditions:
        return self.encode(self.prompts[number * PROMPT_BATCH : (number + 1) * PROMPT_BATCH])


class Engine:
    """A base model with LoRA merged and class tokens installed, and every class's prompt encoded once.

    Args:
        prompts: classes, templates and contexts; prompts are counted by :meth:`Prompts.number`.
        solver: steps, guidance, scheduler.
        resolution: side of the images in pixels.
        device: where to run.
        dtype: precision of the networks; merging happens in float32 before the cast.
        compiled_batch: compile U-Net and decoder for batches of exactly this many images (smaller ones are padded);
            None runs them as they are.

    Raises:
        UserError: weights that do not fit, a class without its token, a resolution the model cannot make.
    """

    def __init__(
        self,
        files: ModelFiles,
        prompts: Prompts,
        solver: SolverSettings,
        resolution: int,
        device: torch.device | str = "cpu",
        *,
        dtype: torch.dtype = torch.float32,
        compiled_batch: int | None = None,
    ):
        model, tokens = load_model(files)
        model.geometry.check(resolution)
        if tokens is not None:
            tokens = tokens.for_classes(prompts.source_names, prompts.prompt_names, str(files.tokens))
            token_io.install(tokens, model.tokenizers, model.text_encoders)
        self.prompts = [
            class_prompt(source, name, prompts.super_class, tokens, template)
            for template in prompts.every_template
            for source, name in zip(prompts.source_names, prompts.prompt_names, strict=True)
        ]
        model.to(device, dtype)
        null_embeds = model.encode_null(resolution)
        encode = functools.partial(model.family.encode_prompts, model.tokenizers, model.text_encoders)
        self.prompt_embeds = EncodedPrompts(
            lambda batch: encode(batch, resolution), self.prompts, null_embeds.nbytes, contexts=prompts.contexts
        )
        self.unet, self.vae, self.batch, self.encode_batch = model.unet, model.vae, compiled_batch, ENCODE_BATCH
        self.device, self.resolution = torch.device(device), resolution
        self.latent_shape = model.geometry.latent_shape(resolution)
        self.denoiser, self.decode = self._networks()
        self.on_step: Callable[[], None] = lambda: None
        scheduler = make_scheduler(
            model.scheduler_config, solver.scheduler, solver.final_sigmas_type, solver.timestep_spacing
        )
        self.sampler = Sampler(self._predict, scheduler, null_embeds, solver)
        self.inverter = replace(self.sampler, scheduler=make_inversion_scheduler(model.scheduler_config))

    def _networks(self):
        """The denoiser and the decoder, compiled (channels last, static shapes) where a batch size was given."""
        if self.batch is None:
            return self.unet, None
        compiled = functools.partial(torch.compile, fullgraph=True, dynamic=False)
        self.unet.to(memory_format=torch.channels_last)
        self.vae.to(memory_format=torch.channels_last)
        return compiled(self.unet), compiled(lambda latents: self.vae.decode(latents, return_dict=False)[0])

    def compile_for(self, batch: int) -> None:
        """Compiles the networks anew for batches of another size, where they are compiled at all."""
        if self.batch is not None:
            self.batch = batch
            self.denoiser = self.decode = None
            torch.compiler.reset()
            self.denoiser, self.decode = self._networks()

    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """Sources, PIL RGB of ``resolution`` pixels, to posterior parameters ``(B, 2C, h, w)`` on the CPU."""
        return self._in_parts(
            len(images), lambda i: encode_moments(self.vae, to_pixels(images[i], self.device, self.vae.dtype))
        )

    def invert(self, moments: Tensor, prompts: Sequence[int]) -> Tensor:
        """Means of encoded sources to inverted latents ``(B, C, h, w)`` under their prompts; float32, on the CPU."""
        means = moments.chunk(2, dim=1)[0] * self.vae.config.scaling_factor

        def inverted(part: slice) -> Tensor:
            rows = range(*part.indices(len(prompts)))
            # compiled networks keep one shape: the last image is repeated
            rows = [*rows, *[rows[-1]] * (self.encode_batch - len(rows) if self.batch else 0)]
            embeds = self.prompt_embeds[[prompts[i] for i in rows]]
            return invert(self.inverter, means[rows].to(self.device), embeds)[: part.stop - part.start]

        return self._in_parts(len(prompts), inverted)

    def _in_parts(self, count: int, compute: Callable[[slice], Tensor]) -> Tensor:
        """Computes source images 0 to ``count`` part by part, in smaller parts after memory runs out; joined, on the CPU."""
        while True:
            size = min(self.encode_batch, count)
            try:
                parts = [slice(i, min(i + size, count)) for i in range(0, count, size)]
                return torch.cat([compute(part).cpu() for part in parts])
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
            self.encode_batch = -(-size // 2)
            torch.cuda.empty_cache()
            log.warning("out of memory: from now on %d source images are encoded at once", self.encode_batch)

    def translate(
        self,
        moments: Tensor,
        targets: Sequence[int],
        strengths: Sequence[float],
        generators: Sequence[torch.Generator],
        masks: Tensor | None = None,
    ) -> Tensor:
        """Img2img of encoded sources, each towards its target's prompt; uint8 ``(B, H, W, 3)`` on the CPU.

        ``masks``, bool ``(B, 1, h, w)``, is True where an image may change; None: everywhere.
        """
        padded = self._padding(len(targets))
        latents = translate(
            self.sampler,
            moments[padded].to(self.device, self.vae.dtype),
            self.vae.config.scaling_factor,
            self.prompt_embeds[[targets[i] for i in padded]],
            [strengths[i] for i in padded],
            _padded(generators, len(padded)),
            masks=None if masks is None else masks[padded],
        )
        return self._decoded(latents[: len(targets)])

    def interpolate(
        self,
        inversions: tuple[Tensor, Tensor],
        prompts: tuple[Sequence[int], Sequence[int]],
        positions: Sequence[float],
        *,
        whole: bool,
        opening: tuple[tuple[Sequence[int], Sequence[int]], int] | None = None,
    ) -> Tensor:
        """Images between two inverted ones, on the circle through both; uint8 ``(B, H, W, 3)`` on the CPU.

        Args:
            inversions: of the sources and of their partners.
            prompts: of the sources and of their partners; the conditioning lies between them as the image does.
            positions: B numbers in [0, 1]; see :func:`semantic_aug.diffusion.inversion.on_circle`.
            whole: positions are shares of the whole circle.
            opening: other prompts for the first steps, and how many these are.
        """
        padded = self._padding(len(positions))
        padded_positions = [positions[i] for i in padded]
        weights = torch.tensor(padded_positions)

        def between(pair: tuple[Sequence[int], Sequence[int]]) -> Conditions:
            source, partner = (self.prompt_embeds[[numbers[i] for i in padded]] for numbers in pair)
            return source.lerp(partner, weights)

        latents = on_circle(*(part[padded].to(self.device) for part in inversions), padded_positions, whole)
        first = None if opening is None else Opening(between(opening[0]), opening[1])
        return self._decoded(denoise(self.inverter, latents, between(prompts), first)[: len(positions)])

    def generate(self, targets: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
        """Images of the targets' prompts from noise; uint8 ``(B, H, W, 3)`` on the CPU."""
        padded = self._padding(len(targets))
        embeds = self.prompt_embeds[[targets[i] for i in padded]]
        latents = generate(self.sampler, self.latent_shape, embeds, _padded(generators, len(padded)))
        return self._decoded(latents[: len(targets)])

    def _predict(self, *inputs, **options):
        """Calls ``on_step``, then the denoiser."""
        self.on_step()
        return self.denoiser(*inputs, **options)

    def _padding(self, count: int) -> list[int]:
        """Indices of a batch, the last sample repeated up to the size the networks were compiled for."""
        return [*range(count), *[count - 1] * max(0, (self.batch or 0) - count)]

    def _decoded(self, latents: Tensor) -> Tensor:
        return decode_latents(self.vae, latents, min(DECODE_BATCH, self.batch or DECODE_BATCH), self.decode).cpu()


def _padded(generators: Sequence[torch.Generator], count: int) -> list[torch.Generator]:
    """The samples' generators, and others for the padding, up to ``count``."""
    return [*generators, *(torch.Generator("cpu") for _ in range(count - len(generators)))]


def load_model(files: ModelFiles) -> tuple[BaseModel, token_io.ClassTokens | None]:
    """The base model with the LoRA merged (float32, on the CPU), and the class tokens, not yet installed."""
    model = load_base(files.name, files.folder)
    for path in (files.lora, files.extra_lora):
        if path is not None:
            lora_io.merge_into(model.networks, lora_io.read_lora(path), str(path))
    return model, token_io.load_tokens(files.tokens) if files.tokens is not None else None
