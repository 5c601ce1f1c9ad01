"""What can be known of a model's files before a process loads them: whether LoRA, tokens and prompts fit the base model."""

from __future__ import annotations

from collections.abc import Sequence

from semantic_aug.augmentations.request import ClassNames, ModelFiles


def check_files(files: ModelFiles, classes: ClassNames, templates: Sequence[str]) -> None:
    """Refuses files that do not fit each other, and prompts whose class the base model would not read.

    Configurations, LoRA, tokens and tokenizers are read, the base model's weights are not.

    Args:
        files: which weights.
        classes: of the data set.
        templates: prompts with ``{}`` for the class.

    Raises:
        UserError: names the file or the prompt.
    """
    from semantic_aug.diffusion.lora import check_lora
    from semantic_aug.diffusion.text import check_prompts, class_prompts_of
    from semantic_aug.diffusion.tokens import load_tokens

    for path in (files.lora, files.extra_lora):
        if path is not None:
            check_lora(path, files.folder)
    tokens = load_tokens(files.tokens) if files.tokens is not None else None
    if tokens is not None:
        tokens.check_classes(classes.source_names, str(files.tokens))
    pairs = list(zip(classes.source_names, classes.prompt_names, strict=True))
    prompts = class_prompts_of(pairs, classes.super_class, tokens, templates)
    check_prompts(files.folder, files.name, prompts, tokens.names if tokens is not None else ())
