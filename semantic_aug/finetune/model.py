"""What is trained: a frozen base model with trainable class vectors and a LoRA, as one module that predicts noise."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from semantic_aug.datasets import LoadedDataset
from semantic_aug.diffusion import lora as lora_io
from semantic_aug.diffusion import tokens as token_io
from semantic_aug.diffusion.base import BaseModel
from semantic_aug.diffusion.text import Conditions, class_prompt, tokenize
from semantic_aug.finetune.captions import Captions
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
        self.family, self.alpha = model.family, config.lora_alpha
        self.lora_parameters = self._add_lora(model, config) if config.trains_lora else []
        self.tokens: token_io.ClassTokens | None = None
        self.vectors: list[Tensor] = []
        if config.trains_tokens:
            self.tokens = _initial_tokens(model, config, dataset)
            self.vectors = token_io.install_all(self.tokens, model.tokenizers, model.text_encoders, trainable=True)
        if config.gradient_checkpointing:
            model.unet.enable_gradient_checkpointing()
        self.unet, self.text_encoders = model.unet, nn.ModuleList(model.text_encoders)
        self.text_components = [encoder.component for encoder in model.family.encoders]
        self.trains_text = any(p.requires_grad for p in self.text_encoders.parameters())
        prompts = [
            class_prompt(source, name, dataset.spec.super_class, self.tokens, template)
            for source, name in zip(dataset.source_names, dataset.class_names, strict=True)
            for template in TEMPLATES
        ]
        self.captions = Captions(dataset, self.tokens, config.class_prompts_ratio)
        self.class_prompts = len(prompts)
        for position, tokenizer in enumerate(model.tokenizers):
            ids = tokenize(tokenizer, [*prompts, *self.captions.texts])
            self.register_buffer(f"prompt_ids_{position}", ids, persistent=False)
        self._encoded: dict[int, Conditions] = {}

    def _add_lora(self, model: BaseModel, config: FinetuneConfig) -> list[nn.Parameter]:
        with torch.random.fork_rng(devices=[]):  # peft draws the first values from the global generator
            torch.manual_seed(config.seed)
            parameters = lora_io.add_lora(model.unet, config.rank, config.lora_alpha, config.lora_targets)
            for position, encoder in enumerate(model.text_encoders if config.train_text_encoder_lora else ()):
                layers = model.family.trained_layers(position, encoder)
                parameters += lora_io.add_text_lora(encoder, config.rank, config.lora_alpha, layers)
        return parameters

    @property
    def networks(self) -> dict[str, nn.Module]:
        """What a LoRA may change, by the prefix its keys have in a file."""
        return {"unet": self.unet, **dict(zip(self.text_components, self.text_encoders, strict=True))}

    def encode(
        self, labels: Tensor, templates: Tensor, captions: Tensor | None = None, time_ids: Tensor | None = None
    ) -> Conditions:
        """Prompts of classes to what the U-Net is told.

        Args:
            labels: ``(B,)`` classes.
            templates: ``(B,)`` templates.
            captions: ``(B,)`` rows of the captions that stand instead, -1 for none.
            time_ids: ``(B, 6)`` image sizes, for base models that are told them.
        """
        rows = labels * len(TEMPLATES) + templates
        if captions is not None:
            rows = torch.where(captions >= 0, self.class_prompts + captions, rows)
        if self.trains_text:
            return self._encode_rows(rows, time_ids)
        # nothing in the text encoders trains: each class prompt is encoded once, captions (one per image) as they come
        wanted, fresh = rows.tolist(), {}
        new = sorted(set(wanted) - set(self._encoded))
        if new:
            with torch.no_grad():
                sizes = None if time_ids is None else time_ids[:1].expand(len(new), -1)
                made = self._encode_rows(torch.tensor(new, device=rows.device), sizes)
            fresh = {row: made[[i]] for i, row in enumerate(new)}
        conditions = Conditions.cat(fresh[row] if row in fresh else self._encoded[row] for row in wanted)
        self._encoded.update((row, one) for row, one in fresh.items() if row < self.class_prompts)
        if time_ids is None:
            return conditions
        return Conditions(conditions.hidden, {**conditions.added, "time_ids": time_ids.to(conditions.hidden)})

    def _encode_rows(self, rows: Tensor, time_ids: Tensor | None) -> Conditions:
        ids = [getattr(self, f"prompt_ids_{position}")[rows] for position in range(len(self.text_encoders))]
        return self.family.encode_ids(self.text_encoders, ids, time_ids)

    def forward(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        labels: Tensor,
        templates: Tensor,
        captions: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> Tensor:
        """Noisy latents ``(B, C, h, w)`` under the prompts of :meth:`encode` to the U-Net's prediction."""
        told = self.encode(labels, templates, captions, time_ids).to(noisy.dtype)
        return self.unet(noisy, timesteps, **told.unet_arguments(), return_dict=False)[0]

    def parameter_groups(self, config: FinetuneConfig) -> list[dict]:
        """Optimiser groups: the LoRA and the tokens, each with its learning rate."""
        groups = []
        if self.lora_parameters:
            groups.append({"params": self.lora_parameters, "lr": config.learning_rate})
        if self.vectors:
            groups.append({"params": self.vectors, "lr": config.ti_learning_rate})
        return groups

    def current_tokens(self) -> token_io.ClassTokens | None:
        """The class tokens as they are now."""
        if self.tokens is None:
            return None
        tables = [vectors.detach().float().cpu().clone() for vectors in self.vectors]
        self.tokens = replace(self.tokens, vectors=tables[0], further=tuple(tables[1:]))
        return self.tokens


def _initial_tokens(model: BaseModel, config: FinetuneConfig, dataset: LoadedDataset) -> token_io.ClassTokens:
    """Untrained class tokens for every text encoder of the base model."""
    each = [
        token_io.initial_tokens(
            dataset.source_names,
            dataset.class_names,
            dataset.spec.super_class,
            config.initializer,
            tokenizer,
            text_encoder,
            config.num_vectors,
        )
        for tokenizer, text_encoder in zip(model.tokenizers, model.text_encoders, strict=True)
    ]
    further = tuple(tokens.vectors for tokens in each[1:])
    return replace(each[0], further=further, base_model=config.base_name, dataset=dataset.name)
