"""The files and the prompts of a model, as plain data that is sent to other processes."""

from dataclasses import dataclass
from pathlib import Path

from semantic_aug.prompts import SAMPLING_TEMPLATE


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model.

    Attributes:
        name: base model as the user named it.
        folder: where the base model is on this machine.
        lora: LoRA file to merge, or None.
        tokens: class-token file to install, or None.
        extra_lora: a further LoRA to merge (an LCM-LoRA), or None.
    """

    name: str
    folder: Path
    lora: Path | None = None
    tokens: Path | None = None
    extra_lora: Path | None = None


@dataclass(frozen=True)
class Prompts:
    """The K classes of a data set and their prompts.

    Attributes:
        source_names: class names as the data set spells them.
        prompt_names: class names as prompts spell them.
        super_class: may be empty.
        template: prompt with ``{}`` for the class.
        templates: several prompts instead of ``template``, or empty.
        contexts: texts that may follow a prompt, whatever its class, or empty.
    """

    source_names: tuple[str, ...]
    prompt_names: tuple[str, ...]
    super_class: str = ""
    template: str = SAMPLING_TEMPLATE
    templates: tuple[str, ...] = ()
    contexts: tuple[str, ...] = ()

    @property
    def every_template(self) -> tuple[str, ...]:
        """The templates in use; prompt ``t * K + k`` of an engine is template t of class k."""
        return tuple(self.templates) or (self.template,)

    def number(self, target: int, template: int = 0, context: int | None = None) -> int:
        """The number of a prompt in an engine: of a class, with the index of a template in :attr:`every_template` and of a
        context in :attr:`contexts` (None: the plain prompt)."""
        classes = len(self.source_names)
        following = 0 if context is None else (context + 1) * len(self.every_template) * classes
        return following + template * classes + target


def check_model(files: ModelFiles, prompts: Prompts) -> None:
    """Refuses files that do not fit each other, and prompts that the tokenizer cuts off before their class ends.

    Reads configurations, LoRA, tokens and tokenizers, but not the base model's weights.

    Raises:
        UserError: names the file or the prompt.
    """
    from semantic_aug.diffusion.families import family_of
    from semantic_aug.diffusion.lora import check_lora
    from semantic_aug.diffusion.text import check_prompts, class_prompts_of
    from semantic_aug.diffusion.tokens import load_tokens

    for path in (files.lora, files.extra_lora):
        if path is not None:
            check_lora(path, files.folder)
    tokens = load_tokens(files.tokens) if files.tokens is not None else None
    if tokens is not None:
        tokens = tokens.for_classes(prompts.source_names, prompts.prompt_names, str(files.tokens))
    pairs = list(zip(prompts.source_names, prompts.prompt_names, strict=True))
    spelled = class_prompts_of(pairs, prompts.super_class, tokens, prompts.every_template)
    tokenizers = family_of(files.folder, files.name).tokenizers
    check_prompts(files.folder, tokenizers, spelled, tokens.names if tokens is not None else ())
