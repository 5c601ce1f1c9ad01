"""Attention projections with LoRA, computed with fewer calls than peft's layers.

Measured beside peft's layers in one run (2026-11-29, one core of an AMD EPYC shared with other work, embedded base model at
128 px, batch 8, float32, not compiled; median of 18 alternating rounds of 5 steps in three pairs of processes): with peft's
layers a step takes 1.06 times as long and 1.055 times as much processor time (quartiles 1.04 and 1.06), in 1,545 calls
instead of 1,018. On an H200 an earlier version's step was 133 ms of starting kernels; the gain there is not yet measured.

Beside a frozen projection W, peft computes B (A x) projection by projection, and where W is in half precision it casts x, A
and B each time. A GPU's step takes little longer than the launches of its kernels, half of which are these. Here the
projections of one input are one product, and so are their A and their B. All A and B are one trained tensor, whose copies in
this layout are made together, once per step.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from semantic_aug.diffusion.lora import ADAPTER

ALIGNMENT = 8
"""Joint ranks are padded with zeros to multiples of it: tensor cores read rows of 16 bytes."""

MAX_JOINT_RANK = 128
"""Above this joint rank the zeros between joined B cost more memory and time than the saved calls."""


class JoinedProjections:
    """Projections of one input as three products: of their weights W, of all A, and of all B as the blocks of a diagonal.

    The members' weights become views of one tensor, so that no weight is in memory twice.

    Args:
        members: with or without LoRA; without biases where there are several.

    Attributes:
        down: ``(R, in)``, all A, or None without LoRA; R is the padded joint rank. Set by :class:`FlatLora`.
        up: ``(sum of out, R)``, all B.
    """

    def __init__(self, members: Sequence[nn.Linear | LoraLinear]):
        layers = [member.base_layer if isinstance(member, LoraLinear) else member for member in members]
        self.members, self.bias = members, layers[0].bias
        self.weight = layers[0].weight.detach()
        if len(layers) > 1:
            self.weight = torch.cat([layer.weight.detach() for layer in layers])
            for layer, part in zip(layers, self.weight.split([len(layer.weight) for layer in layers]), strict=True):
                layer.weight.data = part
        self.scale = next((m.scaling[ADAPTER] for m in members if isinstance(m, LoraLinear)), 1.0)
        self.down: Tensor | None = None
        self.up: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """``(..., in)`` to the members' outputs side by side, ``(..., sum of out)``."""
        rows = x.to(self.weight.dtype).reshape(-1, x.shape[-1])
        out = F.linear(rows, self.weight, self.bias)
        if self.down is not None:
            out = out.addmm_(F.linear(rows, self.down), self.up.t(), alpha=self.scale)
        return out.view(*x.shape[:-1], -1)


class FlatLora(nn.Module):
    """The LoRA of all joined projections as one trained tensor, with its copies in the layout of :class:`JoinedProjections`.

    The work of a step on each parameter (copy, gradient, norm, optimiser) is done once. The members' A and B become views of
    the tensor, so that they are saved and loaded as before, and are no longer trained themselves.

    Args:
        groups: at least one, all of them with LoRA, on one device and in one precision.

    Attributes:
        values: float32 ``(N,)``, of each member in turn A and B.
    """

    def __init__(self, groups: Sequence[JoinedProjections]):
        super().__init__()
        self.groups = groups
        weights = [w for group in groups for member in group.members for w in _lora_weights(member)]
        self.values = nn.Parameter(torch.cat([weight.detach().flatten() for weight in weights]))
        parts = self.values.detach().split([weight.numel() for weight in weights])
        for weight, part in zip(weights, parts, strict=True):
            weight.data = part.view(weight.shape)
            weight.requires_grad_(False)
        layouts = [layout for group in groups for layout in _lay_out(group)]
        self.shapes = [layout.shape for layout in layouts]
        self.sizes = [layout.numel() for layout in layouts]
        position, count = torch.cat([layout.flatten() for layout in layouts]), len(self.values)
        filled = position >= 0
        back = torch.empty(count, dtype=torch.int32)
        back[position[filled]] = torch.arange(len(position), dtype=torch.int32)[filled]
        like = groups[0].weight
        self.copies = like.new_empty(len(position))  # always the same memory, since CUDA graphs remember addresses
        self.zero = like.new_zeros(1)
        self.source = self.back = None
        if not torch.equal(back, position):  # equal for large ranks, where no projections are joined
            self.source = position.masked_fill(~filled, count).to(
                like.device
            )  # index ``count`` is a zero after all values
            self.back = back.to(like.device)

    def refresh(self) -> None:
        """Copies the present values into the groups; gradients flow back to them in float32."""
        copies = _Copy.apply(self, self.values)
        for group, down, up in zip(self.groups, copies[::2], copies[1::2], strict=True):
            group.down, group.up = down, up


class _Copy(torch.autograd.Function):
    """Values to their copies by one gather, and the copies' gradients back by another."""

    @staticmethod
    def forward(ctx, flat: FlatLora, values: Tensor) -> tuple[Tensor, ...]:
        ctx.flat = flat
        if flat.source is None:
            flat.copies.copy_(values)
        else:
            torch.index_select(torch.cat([values.to(flat.copies.dtype), flat.zero]), 0, flat.source, out=flat.copies)
        return tuple(part.view(shape) for part, shape in zip(flat.copies.split(flat.sizes), flat.shapes, strict=True))

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[None, Tensor]:
        gradient = torch.cat([gradient.reshape(-1) for gradient in gradients])
        if ctx.flat.back is not None:
            gradient = gradient.index_select(0, ctx.flat.back)
        return None, gradient.float()


def _lora_weights(member: nn.Linear | LoraLinear) -> list[nn.Parameter]:
    """A and B of a projection, nothing without LoRA."""
    return [member.lora_A[ADAPTER].weight, member.lora_B[ADAPTER].weight] if isinstance(member, LoraLinear) else []


def _lay_out(group: JoinedProjections) -> tuple[Tensor, Tensor]:
    """The positions of a group's ``down`` and ``up`` in the values of :class:`FlatLora`; -1 for zeros."""
    rank = -(-_joint_rank(group.members) // ALIGNMENT) * ALIGNMENT
    shapes = (rank, group.weight.shape[1]), (len(group.weight), rank)
    down, up = (torch.full(shape, -1, dtype=torch.int32) for shape in shapes)
    row = column = 0
    for member in group.members:
        rows = slice(row, row := row + member.out_features)
        if weights := _lora_weights(member):
            columns = slice(column, column := column + len(weights[0]))
            for part, weight in zip((down[columns], up[rows, columns]), weights, strict=True):
                part.copy_(torch.arange(weight.numel()).view(weight.shape) + weight.storage_offset())
    return down, up


class JoinedAttention:
    """Processor of an attention layer whose projections of one input are joined.

    Args:
        of_image: projections of the image tokens: query, key and value, or in cross-attention the query.
        of_prompts: projections of the prompts in cross-attention: key and value.
    """

    def __init__(self, of_image: list[JoinedProjections], of_prompts: list[JoinedProjections]):
        self.of_image, self.of_prompts = of_image, of_prompts

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
    ) -> Tensor:
        """Image tokens ``(B, N, C)``, and prompts ``(B, L, D)`` in cross-attention, to ``(B, N, C)``."""
        outputs = [group(hidden_states) for group in self.of_image]
        outputs += [group(encoder_hidden_states) for group in self.of_prompts]
        parts = [part for out in outputs for part in out.split(attn.inner_dim, -1)]
        heads = [part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in parts]
        mixed = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](mixed))


def _joint_rank(members: Sequence[nn.Linear | LoraLinear]) -> int:
    return sum(len(weights[0]) for member in members if (weights := _lora_weights(member)))


def _join(members: Sequence[nn.Linear | LoraLinear]) -> list[JoinedProjections]:
    """Projections of one input as one group, or as one group each where the joint rank is large."""
    apart = _joint_rank(members) > MAX_JOINT_RANK
    return [JoinedProjections([member]) for member in members] if apart else [JoinedProjections(members)]


def _plain(attn: Attention) -> bool:
    """Whether an attention layer has only three projections without bias and an output, as Stable Diffusion's have."""
    extras = ("spatial_norm", "group_norm", "norm_q", "norm_k", "norm_cross", "added_kv_proj_dim")
    return (
        not any(getattr(attn, name, None) for name in extras)
        and all(getattr(attn, name).bias is None for name in ("to_q", "to_k", "to_v"))
        and attn.to_q.out_features == attn.to_k.out_features == attn.to_v.out_features
        and not attn.residual_connection
        and attn.rescale_output_factor == 1.0
    )


def join_projections(network: nn.Module) -> list[JoinedProjections]:
    """Joins the projections of a network's attention layers in place; its weights and results stay the same. Returns the groups
    of projections with LoRA, which need a :class:`FlatLora` that is refreshed at each step."""
    groups, members = [], set()
    for module in network.modules():
        if isinstance(module, Attention) and _plain(module):
            query, *rest = projections = module.to_q, module.to_k, module.to_v
            joined = (_join([query]), _join(rest)) if module.is_cross_attention else (_join(projections), [])
            module.set_processor(JoinedAttention(*joined))
            groups += [*joined[0], *joined[1]]
            members |= set(projections)
    for module in network.modules():
        if type(module) is LoraLinear and module not in members:
            module.forward = JoinedProjections([module])
            groups.append(module.forward)
    return [group for group in groups if _joint_rank(group.members)]
