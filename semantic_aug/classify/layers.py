"""Training only a part of a classifier: the head, some stages, or everything.

A stage is what timm's own ``group_matcher`` takes for one: ``layer1`` to ``layer4`` of a ResNet, each block of a vision
transformer, each stage of a Swin or ConvNeXt.
"""

from __future__ import annotations

import re

from torch import nn

from semantic_aug.errors import UserError

ALL, HEAD, STEM = "all", "linear", "stem"


def stages_of(model: nn.Module) -> dict[str, list[str]]:
    """Names of the parameters of each part, from the input to the output: ``stem``, ``stages1``, ..., ``linear``."""
    from timm.models._manipulate import group_parameters

    head = {f"{name}." for name in _head_names(model)}
    groups = group_parameters(model, model.group_matcher(coarse=True), reverse=False)
    parts: dict[str, list[str]] = {STEM: []}
    inner = [[name for name in names if not name.startswith(tuple(head))] for _, names in sorted(groups.items())]
    for number, names in enumerate(names for names in inner if names):
        parts[f"stages{number}" if number else STEM] = names
    parts[HEAD] = [name for name, _ in model.named_parameters() if name.startswith(tuple(head))]
    return parts


def _head_names(model: nn.Module) -> list[str]:
    named = model.pretrained_cfg.get("classifier")
    return [named] if isinstance(named, str) else list(named or ())


def freeze(model: nn.Module, trainable: str) -> list[nn.Module]:
    """Leaves only some parts of a model trainable.

    Args:
        model: of timm; its parameters' ``requires_grad`` is set.
        trainable: ``all``, or parts joined by ``+``: ``linear``, ``stages4+linear``, ...; ``stage4`` is understood too.

    Returns:
        The modules all of whose parameters are frozen; they have to stay in evaluation mode, so that the running
        statistics of their normalisation stay as well.

    Raises:
        UserError: a part that the model does not have.
    """
    if trainable == ALL:
        return []
    parts, wanted = stages_of(model), set()
    for word in trainable.split("+"):
        name = re.sub(r"^(?:stages?|layers?)\.?(\d+)$", r"stages\1", word.strip())
        if name not in parts or not parts[name]:
            stages = [part for part in parts if part not in (HEAD, STEM)]
            known = f"{stages[0]} to {stages[-1]} (the last)" if len(stages) > 1 else ", ".join(stages)
            raise UserError(
                f"--trainable_layers {trainable}: '{word}' is no part of this model; expected {ALL}, or some of "
                f"{HEAD}, {STEM}, {known} joined by +"
            )
        wanted.update(parts[name])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)
    return [
        module
        for module in model.modules()
        if any(True for _ in module.parameters()) and not any(p.requires_grad for p in module.parameters())
    ]
