"""What is trained: a frozen base model with trainable class vectors and a LoRA, as one module that predicts noise."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from semantic_aug.datasets import LoadedDataset
from semantic_aug.diffusion import lora as lora_io
from semantic_aug.diffusion import tokens as token_io
from semantic_aug.diffusion.base import BaseModel
from semantic_aug.diffusion.text import class_prompt, encode_ids, tokenize
from semantic_aug.finetune.config import FinetuneConfig
from semantic_aug.prompts import TEMPLATES


class TrainedModel(nn.Module):
    """The networks of stage 1; one module, so that data parallel training synchronises tokens and LoRA alike.

    Args:
        model: the base model; changed in place.
        config: of the run.
        dataset: whose classes are learned.
    """

    def __init__(self, model: BaseModel, config: FinetuneConfig, dataset: LoadedDataset):
        super().__init__()
        self.tokens: token_io.ClassTokens | None = None
        self.vectors: Tensor | None = None
        if config.trains_tokens:
            self.tokens = token_io.initial_tokens(
                dataset.source_names,
                dataset.class_names,
                dataset.spec.super_class,
                config.initializer,
                model.tokenizer,
                model.text_encoder,
                config.num_vectors,
            )
            self.tokens.base_model, self.tokens.dataset = config.base_name, dataset.name
            self.vectors = token_io.install(self.tokens, model.tokenizer, model.text_encoder, trainable=True)
        self.alpha = config.lora_alpha
        self.lora_parameters: list[nn.Parameter] = []
        if config.trains_lora:
            with torch.random.fork_rng(devices=[]):  # peft draws the first values from the global generator
                torch.manual_seed(config.seed)
                self.lora_parameters = lora_io.add_lora(model.unet, config.rank, config.lora_alpha, config.lora_targets)
        if config.gradient_checkpointing:
            model.unet.enable_gradient_checkpointing()
        self.unet, self.text_encoder = model.unet, model.text_encoder
        prompts = [
            class_prompt(source, name, dataset.spec.super_class, self.tokens, template)
            for source, name in zip(dataset.source_names, dataset.class_names, strict=True)
            for template in TEMPLATES
        ]
        ids = tokenize(model.tokenizer, prompts).view(len(dataset.class_names), len(TEMPLATES), -1)
        self.prompt_ids = ids
        self._denoise = self.unet.forward
        self._encoded: dict[tuple[int, int], Tensor] = {}

    def compile_unet(self) -> None:
        """Compiles the U-Net for batches of one size; pictures made in between still use it as it is."""
        self._denoise = torch.compile(self.unet.forward, dynamic=False)

    def conditions(self, labels: Tensor, templates: Tensor) -> Tensor:
        """What :meth:`forward` takes of the prompts of classes ``(B,)`` under templates ``(B,)``, both on the CPU.

        Returns:
            Token ids ``(B, L)`` on the CPU where class tokens train, hidden states ``(B, L, D)`` where they do not.
        """
        if self.vectors is not None:
            return self.prompt_ids[labels, templates]
        pairs = list(zip(labels.tolist(), templates.tolist(), strict=True))
        new = sorted(set(pairs) - set(self._encoded))
        if new:  # nothing in the text encoder trains: each prompt is encoded once
            with torch.no_grad():
                where = torch.tensor(new)
                encoded = encode_ids(self.text_encoder, self.prompt_ids[where[:, 0], where[:, 1]])
            self._encoded.update(zip(new, encoded.unbind(), strict=True))
        return torch.stack([self._encoded[pair] for pair in pairs])

    def hidden_states(self, conditions: Tensor) -> Tensor:
        """What the U-Net attends to ``(B, L, D)``, of :meth:`conditions`."""
        return conditions if conditions.is_floating_point() else encode_ids(self.text_encoder, conditions)

    def forward(self, noisy: Tensor, timesteps: Tensor, conditions: Tensor) -> Tensor:
        """Noisy latents ``(B, C, h, w)`` under :meth:`conditions` to the U-Net's prediction ``(B, C, h, w)``."""
        embeds = self.hidden_states(conditions).to(noisy.dtype)
        return self._denoise(noisy, timesteps, encoder_hidden_states=embeds, return_dict=False)[0]

    def parameter_groups(self, config: FinetuneConfig) -> list[dict]:
        """Optimiser groups: the LoRA and the tokens, each with its learning rate."""
        groups = []
        if self.lora_parameters:
            groups.append({"params": self.lora_parameters, "lr": config.learning_rate})
        if self.vectors is not None:
            groups.append({"params": [self.vectors], "lr": config.ti_learning_rate})
        return groups

    def current_tokens(self) -> token_io.ClassTokens | None:
        """The class tokens as they are now."""
        if self.tokens is None:
            return None
        self.tokens.vectors = self.vectors.detach().float().cpu().clone()
        return self.tokens
