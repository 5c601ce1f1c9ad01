"""The strategy table: which weights, where denoising starts, and how sources and targets pair.

The strategies are those compared by Wang et al. 2024 (Diff-Mix, arXiv:2403.19600); ``real-guidance`` is He et al. 2023's
(arXiv:2210.07574), ``da-fusion`` Trabucco et al. 2023's (arXiv:2302.07944), ``diff-ii`` Wang & Chen 2025's
(arXiv:2408.16266); ``inversion-mix`` is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

from semantic_aug.errors import UserError, unknown


@dataclass(frozen=True)
class Strategy:
    """One way of making synthetic images.

    Attributes:
        name: value of ``--sample_strategy``.
        weights: ``base`` (the pre-trained model), ``tokens``, or ``tokens+lora``.
        start: ``image`` (img2img), ``noise``, or ``inversion`` (between the DDIM inversions of two images).
        pairing: ``mixed`` (the target is another class than the source's) or ``same``.
        strengths: the strategy's own strengths, or None for ``--aug_strength``. Of a start from inversions they are positions
            between source (0) and partner (1), with ``same`` pairing shares of the circle through both.
    """

    name: str
    weights: str
    start: str
    pairing: str
    strengths: tuple[float, ...] | None = None

    @property
    def takes_strength(self) -> bool:
        """Whether ``--aug_strength`` holds, which it does not from noise or where the strategy has its own strengths."""
        return self.start != "noise" and not self.strengths


STRATEGIES = {
    row.name: row
    for row in (
        Strategy("diff-mix", "tokens+lora", "image", "mixed"),
        Strategy("diff-aug", "tokens+lora", "image", "same"),
        Strategy("diff-gen", "tokens+lora", "noise", "same"),
        Strategy("real-mix", "base", "image", "mixed"),
        Strategy("real-guidance", "base", "image", "same"),
        Strategy("real-gen", "base", "noise", "same"),
        Strategy("ti-mix", "tokens", "image", "mixed"),
        Strategy("ti-aug", "tokens", "image", "same"),
        Strategy("da-fusion", "tokens", "image", "same", (0.25, 0.5, 0.75, 1.0)),
        # the middles of eight equal arcs, away from the source at 0 and 1 and from a partner a quarter of the circle away
        Strategy("diff-ii", "tokens+lora", "inversion", "same", tuple((2 * i + 1) / 16 for i in range(8))),
        Strategy("inversion-mix", "tokens+lora", "inversion", "mixed"),
    )
}
ALIASES = {"real-aug": "real-guidance"}


def names() -> list[str]:
    """All values of ``--sample_strategy``."""
    return [*STRATEGIES, *ALIASES]


def find(name: str) -> Strategy:
    """The row of a strategy's name or alias. Raises UserError: unknown."""
    row = STRATEGIES.get(ALIASES.get(name, name))
    if row is None:
        raise unknown("--sample_strategy", name, names(), "choose one of these")
    return row


def weights_for(row: Strategy, has_lora: bool, has_tokens: bool, checkpoint: str) -> tuple[bool, bool]:
    """Whether a strategy takes the LoRA, and the class tokens, of a checkpoint record.

    A ``db`` checkpoint has no tokens (class names stand in the prompts), a ``ti`` checkpoint no LoRA.

    Args:
        has_lora: the record names a LoRA.
        has_tokens: the record names class tokens.

    Raises:
        UserError: the record lacks what the strategy needs.
    """
    if row.weights == "base":
        return False, False
    if row.weights == "tokens":
        if not has_tokens:
            raise UserError(
                f"strategy {row.name} needs class tokens, {checkpoint} has none (embed_path): use a checkpoint "
                "trained with --finetune_strategy ti or ti_db"
            )
        return False, True
    if not (has_lora or has_tokens):
        raise UserError(
            f"strategy {row.name} needs a fine-tuned checkpoint, {checkpoint} has neither a LoRA (lora_path) nor "
            "class tokens (embed_path): use another --finetune_model_key, or a real-* strategy"
        )
    return has_lora, has_tokens
