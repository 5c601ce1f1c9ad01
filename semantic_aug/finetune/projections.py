"""The projections of a U-Net under training, computed with few large matrix products: for processors without a GPU.

Beside a frozen projection W, peft computes B (A x) over every token of the batch: two thin products and two passes over
the output. Where a product costs little more than the call, W + (alpha / r) B A is cheaper, and the projections that read
the same input become one product. Both are the same sums in another order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from semantic_aug.diffusion.lora import ADAPTER


def weight_of(projection: nn.Linear | LoraLinear) -> Tensor:
    """A projection's weight ``(out, in)``, with its LoRA where it has one; gradients flow to the LoRA.

    Args:
        projection: plain, or with the adapter of :func:`semantic_aug.diffusion.lora.add_lora`.
    """
    if not isinstance(projection, LoraLinear):
        return projection.weight
    base = projection.base_layer.weight
    down, up = projection.lora_A[ADAPTER].weight, projection.lora_B[ADAPTER].weight
    return torch.addmm(base, up, down, alpha=projection.scaling[ADAPTER])


class SummedLora(LoraLinear):
    """A projection with a LoRA as one product with the sum of the weights."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, weight_of(self), self.base_layer.bias)


class JoinedAttention(Attention):
    """An attention layer whose projections of one input are one product."""

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: None = None
    ) -> Tensor:
        """Image tokens ``(B, N, C)``, and prompts ``(B, L, D)`` in cross-attention, to ``(B, N, C)``."""
        query, key, value = weight_of(self.to_q), weight_of(self.to_k), weight_of(self.to_v)
        if encoder_hidden_states is None:
            joined = [F.linear(hidden_states, torch.cat([query, key, value]))]
        else:
            joined = [F.linear(hidden_states, query), F.linear(encoder_hidden_states, torch.cat([key, value]))]
        parts = [part for one in joined for part in one.split(len(query), -1)]
        heads = [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts]
        mixed = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return self.to_out[1](self.to_out[0](mixed))


def _plain(attn: Attention) -> bool:
    """Whether an attention layer is Stable Diffusion's: three projections without bias, nothing else before or after."""
    extras = ("spatial_norm", "group_norm", "norm_q", "norm_k", "norm_cross", "added_kv_proj_dim")
    return (
        not any(getattr(attn, name, None) for name in extras)
        and all(getattr(attn, name).bias is None for name in ("to_q", "to_k", "to_v"))
        and attn.to_q.out_features == attn.to_k.out_features == attn.to_v.out_features
        and not attn.residual_connection
        and attn.rescale_output_factor == 1.0
    )


def use_few_products(unet: UNet2DConditionModel) -> None:
    """Changes how a U-Net computes its attention and LoRA, in place; what it holds and computes stays.

    Args:
        unet: in float32: sums of half-precision weights would lose small updates.
    """
    for module in unet.modules():
        if type(module) is LoraLinear:
            module.__class__ = SummedLora
        if isinstance(module, Attention) and _plain(module):
            module.__class__ = JoinedAttention
