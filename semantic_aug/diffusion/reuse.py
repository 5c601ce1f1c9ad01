"""Reusing a U-Net's deep features between neighbouring steps (the idea of DeepCache, Ma et al. 2023, arXiv:2312.00858).

Every ``interval``-th step runs the whole U-Net; the steps between run only its outermost level, conv_in with the first
down block and the last up block with conv_out, and take what lies below from the last whole run. Lossy: the pictures
change a little. With an interval of one it is the U-Net's own forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping

from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from semantic_aug.errors import UserError

EXTRAS = ("class_embedding", "encoder_hid_proj", "time_embed_act")
"""Parts that other U-Nets have and this way of running them leaves out; absent or None in Stable Diffusion 1.x, 2.x and XL."""

NOTHING: Mapping[str, Tensor] = {}
"""The added conditions of a family without any."""


class FeatureReuse(nn.Module):
    """A U-Net that can run its outermost level alone.

    Args:
        unet: of Stable Diffusion 1.x, 2.x or XL, with at least two levels.

    Raises:
        UserError: a U-Net of another build.
    """

    def __init__(self, unet: UNet2DConditionModel):
        super().__init__()
        if any(getattr(unet, name, None) is not None for name in EXTRAS) or len(unet.down_blocks) < 2:
            raise UserError(
                "--speed fast and turbo know only the U-Nets of Stable Diffusion 1.x, 2.x and XL: use --speed exact"
            )
        self.unet = unet
        self.outer_skips = len(unet.up_blocks[-1].resnets)

    def _embed(self, sample: Tensor, timestep: Tensor, context: Tensor, added: Mapping[str, Tensor]) -> Tensor:
        steps = self.unet.time_proj(timestep.expand(sample.shape[0]))
        embedded = self.unet.time_embedding(steps.to(sample.dtype))
        more = self.unet.get_aug_embed(embedded, context, dict(added))  # of the added conditions, None without them
        return embedded if more is None else embedded + more

    def whole(
        self, sample: Tensor, timestep: Tensor, context: Tensor, added: Mapping[str, Tensor] = NOTHING
    ) -> tuple[Tensor, Tensor]:
        """The whole U-Net: its prediction ``(B, C, h, w)`` and the features that enter its last up block."""
        unet, embedded = self.unet, self._embed(sample, timestep, context, added)
        hidden = unet.conv_in(sample)
        skips = [hidden]
        for block in unet.down_blocks:
            hidden, outputs = _run(block, hidden, embedded, context)
            skips += outputs
        if unet.mid_block is not None:
            hidden = _run(unet.mid_block, hidden, embedded, context)
        for block in unet.up_blocks[:-1]:
            own = tuple(skips[-len(block.resnets) :])
            del skips[-len(block.resnets) :]
            # latents of an odd side were halved upwards: doubling must end where the next level's skips are
            hidden = _run(
                block, hidden, embedded, context, res_hidden_states_tuple=own, upsample_size=skips[-1].shape[2:]
            )
        return self._finish(hidden, embedded, context, skips), hidden

    def outer(
        self, sample: Tensor, timestep: Tensor, context: Tensor, deep: Tensor, added: Mapping[str, Tensor] = NOTHING
    ) -> Tensor:
        """The outermost level alone, over the deep features of an earlier step; ``(B, C, h, w)``."""
        embedded = self._embed(sample, timestep, context, added)
        hidden = self.unet.conv_in(sample)
        _, outputs = _run(self.unet.down_blocks[0], hidden, embedded, context)
        return self._finish(deep, embedded, context, [hidden, *outputs][: self.outer_skips])

    def _finish(self, hidden: Tensor, embedded: Tensor, context: Tensor, skips: list[Tensor]) -> Tensor:
        unet = self.unet
        hidden = _run(unet.up_blocks[-1], hidden, embedded, context, res_hidden_states_tuple=tuple(skips))
        if unet.conv_norm_out is not None:
            hidden = unet.conv_act(unet.conv_norm_out(hidden))
        return unet.conv_out(hidden)


def _run(block: nn.Module, hidden: Tensor, embedded: Tensor, context: Tensor, **options):
    if getattr(block, "has_cross_attention", False):
        options["encoder_hidden_states"] = context
    return block(hidden, temb=embedded, **options)
