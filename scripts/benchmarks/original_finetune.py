"""A faithful port of how the original implementation fine-tunes, for comparison, and the plain loop our own is tested against.

Images are opened, resized and turned into tensors in the loop, without workers, and encoded by the VAE at every step;
prompts are tokenised every time; every weight of the text encoder gets a gradient, of which only the embedding table's is
used: the whole table trains, and after each step every row but the class tokens' is put back from a clone; noise and loss
are diffusers' and torch's own; the loss is read after every step. The random numbers of a step come from outside
(:class:`semantic_aug.finetune.batches.Draw`), so that both ways train on the same.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from PIL import ImageOps
from torch import Tensor
from torchvision import transforms
from transformers import CLIPTextModel, CLIPTokenizer

from semantic_aug.datasets import LoadedDataset
from semantic_aug.diffusion import lora
from semantic_aug.diffusion.text import class_prompt
from semantic_aug.diffusion.tokens import initial_tokens
from semantic_aug.finetune.batches import Draw
from semantic_aug.finetune.config import FinetuneConfig
from semantic_aug.finetune.latents import view_of
from semantic_aug.prompts import TEMPLATES

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class OriginalTrainer:
    """Pipeline components of diffusers, and the original's step over them.

    Args:
        config: what our own trainer is given; read are the base model, strategy, sizes and rates.
        dataset: of the images and class names.
        accelerator: decides device and precision; None for one as the original makes it.
    """

    def __init__(self, config: FinetuneConfig, dataset: LoadedDataset, accelerator: Accelerator | None = None):
        self.config, self.dataset = config, dataset
        self.accelerator = accelerator or Accelerator(mixed_precision=config.model.mixed_precision)
        folder: Path = config.base_folder
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
        self.vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32).requires_grad_(False)
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32).requires_grad_(False)
        self.noise_scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
        self.normalise = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5], [0.5])])
        self.tokens = self._add_tokens() if config.model.trains_tokens else None
        device, dtype = self.accelerator.device, DTYPES[config.model.mixed_precision]
        self.vae.to(device, torch.float32 if dtype == torch.float16 else dtype)
        unet.to(device, dtype)
        if config.model.trains_lora:
            torch.manual_seed(config.seed)
            unet.add_adapter(
                LoraConfig(
                    r=config.model.rank,
                    lora_alpha=config.model.lora_alpha or config.model.rank,
                    init_lora_weights="gaussian",
                    target_modules=list(config.model.lora_targets),
                ),
                lora.ADAPTER,
            )
            cast_training_params(unet, torch.float32)
        lora_parameters = [p for p in unet.parameters() if p.requires_grad]
        groups = [{"params": lora_parameters, "lr": config.train.learning_rate}] if lora_parameters else []
        self.table = None
        if self.tokens is not None:
            self.text_encoder.to(device)
            self.table = self.text_encoder.get_input_embeddings().weight
            self.untouched = self.table.detach().clone()
            groups.append({"params": [self.table], "lr": config.train.ti_learning_rate})
        else:
            self.text_encoder.requires_grad_(False).to(device, dtype)
        optimizer = torch.optim.AdamW(groups, weight_decay=config.train.adam_weight_decay)
        schedule = get_scheduler(
            config.train.lr_scheduler,
            optimizer,
            num_warmup_steps=config.train.lr_warmup_steps,
            num_training_steps=config.train.max_train_steps,
        )
        self.unet, self.text_encoder, self.optimizer, self.schedule = self.accelerator.prepare(
            unet, self.text_encoder, optimizer, schedule
        )
        self.trained = list(itertools.chain.from_iterable(group["params"] for group in groups))
        self.unet.train()
        self.text_encoder.train()

    def _add_tokens(self):
        """Class tokens added to tokenizer and table one by one, each with its own resize; nothing is frozen."""
        tokens = initial_tokens(
            self.dataset.source_names,
            self.dataset.class_names,
            self.dataset.spec.super_class,
            self.config.model.initializer,
            [self.tokenizer],
            [self.text_encoder],
            self.config.model.num_vectors,
        )
        known = len(self.tokenizer)
        for name, vector in zip(tokens.names, tokens.vectors, strict=True):
            self.tokenizer.add_tokens(name)
            self.text_encoder.resize_token_embeddings(len(self.tokenizer), mean_resizing=False)
            table = self.text_encoder.get_input_embeddings().weight.data
            table[self.tokenizer.convert_tokens_to_ids(name)] = vector
        self.is_class_token = torch.zeros(len(self.tokenizer), dtype=torch.bool)
        self.is_class_token[known:] = True
        self.is_class_token = self.is_class_token.to(self.accelerator.device)
        return tokens

    def _example(self, row: int, view: int, flip: bool, template: int) -> tuple[Tensor, Tensor]:
        """One training example: pixels ``(3, H, W)`` in [-1, 1] and token ids ``(L,)``."""
        table, config, label = self.dataset.train, self.config, int(self.dataset.train.labels[row])
        image = view_of(table.image(row), view, config.images.resolution, table.keys[row], config.seed)
        prompt = class_prompt(
            self.dataset.source_names[label],
            self.dataset.class_names[label],
            self.dataset.spec.super_class,
            self.tokens,
            TEMPLATES[template],
        )
        ids = self.tokenizer(
            prompt,
            max_length=self.tokenizer.model_max_length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        ).input_ids[0]
        return self.normalise(ImageOps.mirror(image) if flip else image), ids

    def step(self, draw: Draw) -> float:
        """One optimiser step over the batch of a draw; returns its loss, read from the device."""
        chosen = zip(draw.index.tolist(), draw.view.tolist(), draw.flip.tolist(), draw.template.tolist(), strict=True)
        pixels, ids = (torch.stack(parts) for parts in zip(*(self._example(*item) for item in chosen), strict=True))
        device, dtype = self.accelerator.device, DTYPES[self.config.model.mixed_precision]
        with torch.no_grad():
            posterior = self.vae.encode(pixels.to(device, self.vae.dtype)).latent_dist
            latents = posterior.mean + posterior.std * draw.posterior.to(posterior.mean)
            latents = (latents * self.vae.config.scaling_factor).to(dtype)
        noise, timesteps = draw.noise.to(latents), draw.timestep.to(device)
        noisy = self.noise_scheduler.add_noise(latents, noise, timesteps)
        hidden = self.text_encoder(ids.to(device))[0].to(dtype)
        predicted = self.unet(noisy, timesteps, hidden).sample
        wanted = noise
        if self.noise_scheduler.config.prediction_type == "v_prediction":
            wanted = self.noise_scheduler.get_velocity(latents, noise, timesteps)
        loss = F.mse_loss(predicted.float(), wanted.float(), reduction="mean")
        self.accelerator.backward(loss)
        if self.table is not None:
            self.table.grad[~self.is_class_token] = 0
        if self.config.train.max_grad_norm:
            self.accelerator.clip_grad_norm_(self.trained, self.config.train.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        if self.table is not None:
            with torch.no_grad():
                self.table[~self.is_class_token] = self.untouched[~self.is_class_token]
        return loss.detach().item()

    def result(self) -> dict[str, Tensor]:
        """What was trained, by the names our own files give it: LoRA weights and class tokens."""
        result = {}
        if self.config.model.trains_lora:
            result |= lora.trained_state(self.accelerator.unwrap_model(self.unet))
        if self.tokens is not None:
            rows = self.table.detach().float().cpu()[self.is_class_token.cpu()]
            result |= dict(zip(self.tokens.names, rows, strict=True))
        return result
