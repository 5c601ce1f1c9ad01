"""The trained model: a frozen base model with trainable class vectors and a LoRA, as one module that predicts noise; its
optimiser and learning-rate schedule."""

import contextlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from semantic_aug.datasets import LoadedDataset
from semantic_aug.diffusion import lora as lora_io
from semantic_aug.diffusion import tokens as token_io
from semantic_aug.diffusion.base import BaseModel
from semantic_aug.diffusion.text import PROMPT_BYTES, ConditionCache, Conditions, class_prompts_of, tokenize
from semantic_aug.errors import UserError
from semantic_aug.finetune.batches import Captions
from semantic_aug.finetune.config import FinetuneConfig, TrainSettings
from semantic_aug.finetune.projections import FlatLora, join_projections
from semantic_aug.prompts import caption_without_class

WARM_UP_CALLS = 2
"""Calls of a compiled network whose inputs are checked against its compilation; later calls skip the check."""


class TrainedModel(nn.Module):
    """The networks of stage 1; one module, so that data parallel training synchronises tokens and LoRA alike."""

    def __init__(self, model: BaseModel, config: FinetuneConfig, dataset: LoadedDataset):
        super().__init__()
        self.base, self.alpha = model, config.model.lora_alpha
        self.lora_parameters = self._add_lora(model, config) if config.model.trains_lora else []
        self.tokens: token_io.ClassTokens | None = None
        self.vectors: list[Tensor] = []
        if config.model.trains_tokens:
            self.tokens = _initial_tokens(model, config, dataset)
            self.vectors = token_io.install(self.tokens, model.tokenizers, model.text_encoders, trainable=True)
        if config.model.gradient_checkpointing:
            model.unet.enable_gradient_checkpointing()
        self.unet, self.text_encoders = model.unet, nn.ModuleList(model.text_encoders)
        self.trains_text = any(p.requires_grad for p in self.text_encoders.parameters())
        self.templates = config.images.templates
        classes = list(zip(dataset.source_names, dataset.class_names, strict=True))
        spelled = class_prompts_of(classes, dataset.spec.super_class, self.tokens, self.templates)
        prompts = [prompt for prompt, _, _ in spelled]
        if dataset.unlabelled is not None:  # a further class, whose prompts do not name any
            prompts += [caption_without_class(template, dataset.spec.super_class) for template in self.templates]
        self.captions = Captions(dataset, self.tokens, config.images)
        self.class_prompts = len(prompts)
        self.prompt_ids = [tokenize(tokenizer, prompts) for tokenizer in model.tokenizers]
        self._encoded = ConditionCache(PROMPT_BYTES)
        self._compiled, self._calls = False, 0
        self.flat_lora: FlatLora | None = None

    def _add_lora(self, model: BaseModel, config: FinetuneConfig) -> list[nn.Parameter]:
        with torch.random.fork_rng(devices=[]):  # peft draws the first values from the global generator
            torch.manual_seed(config.seed)
            rank, alpha = config.model.rank, config.model.lora_alpha
            parameters = lora_io.add_lora(model.unet, rank, alpha, config.model.lora_targets)
            for position, encoder in enumerate(model.text_encoders if config.model.train_text_encoder_lora else ()):
                layers = model.family.trained_layers(position, encoder)
                parameters += lora_io.add_text_lora(encoder, rank, alpha, layers)
        return parameters

    def compile_networks(self) -> None:
        """Compiles the U-Net and, where anything in them trains, the text encoders for batches of one size."""
        for network in (self.unet, *(self.text_encoders if self.trains_text else ())):
            network.compile(dynamic=False, options={"size_asserts": False})
        self._compiled = True

    def join_projections(self) -> None:
        """Lets the networks, on their device and in their precision, compute attention and LoRA with few calls; the LoRA of all
        joined projections becomes one of ``lora_parameters``."""
        groups = [group for network in self.base.networks.values() for group in join_projections(network)]
        if groups:
            self.flat_lora = FlatLora(groups)
            others = [parameter for parameter in self.lora_parameters if parameter.requires_grad]  # of convolutions
            self.lora_parameters = [self.flat_lora.values, *others]

    def refresh(self) -> None:
        """Updates the networks' copies of the LoRA, as :meth:`forward` does too."""
        if self.flat_lora is not None:
            self.flat_lora.refresh()

    def _unchecked(self) -> AbstractContextManager:
        """A context in which compiled code runs without checks of its inputs, whose shapes are the same in all steps."""
        warm = self._compiled and self._calls >= WARM_UP_CALLS
        return torch.compiler.set_stance(skip_guard_eval_unsafe=True) if warm else contextlib.nullcontext()

    def uncompiled(self) -> AbstractContextManager:
        """A context in which the networks run as they are, for batches of other sizes than the training's."""
        return torch.compiler.set_stance("force_eager") if self._compiled else contextlib.nullcontext()

    def conditions(
        self, labels: Tensor, templates: Tensor, captions: Tensor | None = None, time_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The conditions of a batch, for :meth:`forward`. All arguments are on the CPU, so that no GPU is waited for.

        Args:
            labels: ``(B,)`` classes.
            templates: ``(B,)`` templates.
            captions: ``(B,)`` numbers of the captions that replace class prompts, -1 for none.
            time_ids: ``(B, 6)`` image sizes, for base models conditioned on them.

        Returns:
            Token ids ``(B, L)`` for each text encoder where anything in them trains, else the U-Net's conditioning of each
            prompt (``hidden`` ``(B, L, D)`` and the added conditions); and ``time_ids`` where given.
        """
        rows = labels * len(self.templates) + templates
        if captions is not None:
            rows = torch.where(captions >= 0, self.class_prompts + captions, rows)
        sizes = {} if time_ids is None else {"time_ids": time_ids}
        if self.trains_text:
            return self._ids(rows.tolist()) | sizes
        encoded = self._encoded_once(rows.tolist(), time_ids)
        return {"hidden": encoded.hidden, **encoded.added, **sizes}

    def _ids(self, rows: list[int]) -> dict[str, Tensor]:
        """Token ids ``(B, L)`` of prompts for each text encoder; captions, one per image, are tokenized when drawn."""
        if max(rows) < self.class_prompts:
            return {f"ids_{position}": ids[rows] for position, ids in enumerate(self.prompt_ids)}
        captions = [self.captions.prompt(row - self.class_prompts) for row in rows if row >= self.class_prompts]
        is_caption = torch.tensor(rows) >= self.class_prompts
        ids = {}
        for position, (known, tokenizer) in enumerate(zip(self.prompt_ids, self.base.tokenizers, strict=True)):
            ids[f"ids_{position}"] = known[[min(row, self.class_prompts - 1) for row in rows]]
            ids[f"ids_{position}"][is_caption] = tokenize(tokenizer, captions)
        return ids

    def _encoded_once(self, rows: list[int], time_ids: Tensor | None) -> Conditions:
        """The conditioning where no text encoder trains: class prompts are encoded once, captions when drawn."""
        held = {row: self._encoded.get(row) for row in set(rows)}
        fresh = {}
        for row in sorted(row for row, encoded in held.items() if encoded is None):
            # one by one: a batch of another size may change the last bits, and after a restart other prompts are cached
            sizes = {} if time_ids is None else {"time_ids": time_ids[:1]}
            with torch.no_grad():
                fresh[row] = self.conditioning(self._ids([row]) | sizes)
        conditioning = Conditions.cat(fresh[row] if row in fresh else held[row] for row in rows)
        for row, encoded in fresh.items():
            if row < self.class_prompts:
                self._encoded.put(row, encoded)
        return conditioning

    def conditioning(self, conditions: Mapping[str, Tensor]) -> Conditions:
        """The conditioning of the U-Net from :meth:`conditions`."""
        if "hidden" in conditions:
            hidden = conditions["hidden"]
            return Conditions(hidden, {k: v.to(hidden) for k, v in conditions.items() if k != "hidden"})
        ids = [conditions[f"ids_{position}"] for position in range(len(self.text_encoders))]
        return self.base.family.encode_ids(self.text_encoders, ids, conditions.get("time_ids"))

    def forward(self, noisy: Tensor, timesteps: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """Noisy latents ``(B, C, h, w)`` under :meth:`conditions` to the U-Net's prediction ``(B, C, h, w)``."""
        self.refresh()
        with (
            self._unchecked(),
            torch.autocast(noisy.device.type, enabled=False),
        ):  # all inputs have the networks' precision
            conditioning = self.conditioning(conditions).to(noisy.dtype)
            predicted = self.unet(noisy, timesteps, **conditioning.unet_arguments(), return_dict=False)[0]
        self._calls += 1
        return predicted

    def parameter_groups(self, settings: TrainSettings) -> list[dict]:
        """Optimiser groups: the LoRA and the tokens, each with its learning rate."""
        rates = ((self.lora_parameters, settings.learning_rate), (self.vectors, settings.ti_learning_rate))
        return [{"params": parameters, "lr": rate} for parameters, rate in rates if parameters]

    def describe_images(self, digest: str) -> None:
        """Records the digest of the training images in the class tokens."""
        if self.tokens is not None:
            self.tokens = replace(self.tokens, images=digest)

    def current_tokens(self) -> token_io.ClassTokens | None:
        """The class tokens as they are now."""
        if self.tokens is None:
            return None
        tables = [vectors.detach().float().cpu().clone() for vectors in self.vectors]
        self.tokens = replace(self.tokens, vectors=tables[0], further=tuple(tables[1:]))
        return self.tokens


def _initial_tokens(model: BaseModel, config: FinetuneConfig, dataset: LoadedDataset) -> token_io.ClassTokens:
    """Untrained class tokens for every text encoder of the base model."""
    tokens = token_io.initial_tokens(
        *(dataset.source_names, dataset.class_names, dataset.spec.super_class, config.model.initializer),
        tokenizers=model.tokenizers,
        text_encoders=model.text_encoders,
        vectors_per_class=config.model.num_vectors,
    )
    return replace(tokens, base_model=config.model.pretrained_model_name_or_path, dataset=dataset.name)


def make_optimizer(groups: list[dict], settings: TrainSettings, device: torch.device) -> torch.optim.Optimizer:
    """AdamW in one kernel where the device has it, or bitsandbytes' 8-bit one. Raises UserError: ``--use_8bit_adam`` without
    bitsandbytes."""
    if settings.use_8bit_adam:
        try:
            import bitsandbytes
        except ImportError:
            raise UserError("--use_8bit_adam needs the package bitsandbytes: pip install bitsandbytes") from None
        return bitsandbytes.optim.AdamW8bit(groups, weight_decay=settings.adam_weight_decay)
    fused = device.type in ("cuda", "cpu") or None
    return torch.optim.AdamW(groups, weight_decay=settings.adam_weight_decay, fused=fused)


def make_schedule(optimizer: torch.optim.Optimizer, settings: TrainSettings) -> torch.optim.lr_scheduler.LambdaLR:
    """diffusers' schedule of that name, stepped once per optimiser step. Raises UserError: ``piecewise_constant`` without
    rules, or rules that cannot be read."""
    rules = settings.lr_step_rules
    if (settings.lr_scheduler == "piecewise_constant") != (rules is not None):
        raise UserError(
            f"--lr_scheduler {settings.lr_scheduler} with --lr_step_rules {rules or '(not given)'}: piecewise_constant, and "
            "only it, takes rules like 1:1000,0.1:2000,0.01 (times 1 before step 1000, times 0.1 before 2000, then 0.01)"
        )
    try:
        return get_scheduler(
            settings.lr_scheduler,
            optimizer,
            step_rules=rules,
            num_warmup_steps=settings.lr_warmup_steps,
            num_training_steps=settings.max_train_steps,
            num_cycles=settings.lr_num_cycles,
            power=settings.lr_power,
        )
    except (ValueError, IndexError, TypeError) as error:
        raise UserError(
            f"--lr_scheduler {settings.lr_scheduler}, --lr_step_rules {rules}: {error}; rules look like 1:1000,0.1:2000,0.01"
        ) from None
