"""A fine-tuned model as plain data, cheap to import and to send to another process: its files and its prompts."""

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
        prompt_names: cleaned up.
        super_class: may be empty.
        template: prompt with ``{}`` for the class.
        templates: several prompts instead of ``template``; empty: none.
        contexts: what may follow a prompt, whatever its class; empty: nothing does.
    """

    source_names: tuple[str, ...]
    prompt_names: tuple[str, ...]
    super_class: str = ""
    template: str = SAMPLING_TEMPLATE
    templates: tuple[str, ...] = ()
    contexts: tuple[str, ...] = ()

    @property
    def every_template(self) -> tuple[str, ...]:
        """The prompts in use; prompt ``t * K + k`` of an engine is template t of class k."""
        return tuple(self.templates) or (self.template,)

    def number(self, target: int, template: int = 0, context: int | None = None) -> int:
        """The number of a prompt in an engine: of a class under a template (position in :attr:`every_template`) and a
        context (position in :attr:`contexts`; None: the plain prompt)."""
        classes = len(self.source_names)
        following = 0 if context is None else (context + 1) * len(self.every_template) * classes
        return following + template * classes + target


def check_model(files: ModelFiles, prompts: Prompts) -> None:
    """Refuses files that do not fit each other, and prompts whose class the base model would not read.

    Configurations, LoRA, tokens and tokenizers are read, the base model's weights are not.

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
