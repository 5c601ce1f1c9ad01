"""Stage 1's files in the layout of the original implementation, and back.

    python -m semantic_aug.diffusion.convert --lora_path FILE --embed_path FILE --output_dir DIR [--layout original]

The original stores the LoRA under the names of diffusers' former attention processors, without a scale, in
``pytorch_lora_weights.safetensors`` and ``checkpoint-N/pytorch_model.bin``, and the class tokens in
``learned_embeds-steps-N.bin``, the final ones in ``learned_embeds-steps-last.bin``.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from semantic_aug import cli, registry, tensors
from semantic_aug.diffusion import lora as lora_io
from semantic_aug.diffusion import tokens as token_io
from semantic_aug.errors import UserError, run_main
from semantic_aug.prompts import original_name

LAYOUTS = ("original", "diffusers")


def original_lora(lora: dict[str, lora_io.LoraPair], where: str) -> dict[str, Tensor]:
    """A LoRA under the names of attention processors, with its scale in the second factor. Raises UserError: it changes more or
    less than all attention projections of the U-Net, which that layout holds."""
    state, attentions = {}, {}
    for name, pair in lora.items():
        target = next((target for target in lora_io.LORA_TARGETS if name.endswith(f".{target}")), None)
        if target is None or lora_io.network_of(name) != "unet":
            raise UserError(
                f"LoRA {where}: the original's layout holds only {', '.join(lora_io.LORA_TARGETS)} of the U-Net, not '{name}': "
                "use --layout diffusers"
            )
        attention = name.removesuffix(f".{target}")
        attentions.setdefault(attention, set()).add(target)
        stem = f"{attention}.processor.{target.removesuffix('.0')}_lora"
        state[f"{stem}.down.weight"], state[f"{stem}.up.weight"] = pair.down, pair.up * pair.scale
    for attention, targets in attentions.items():
        missing = [target for target in lora_io.LORA_TARGETS if target not in targets]
        if missing:
            raise UserError(
                f"LoRA {where}: {attention} lacks {', '.join(missing)} (--lora_targets), which the original's layout has: "
                "use --layout diffusers"
            )
    return state


def diffusers_lora(lora: dict[str, lora_io.LoraPair]) -> dict[str, Tensor]:
    """A LoRA under diffusers' names, with its scale in the second factor."""
    state = {}
    for name, pair in lora.items():
        if lora_io.network_of(name) == "unet":
            stem = f"unet.{name}.lora"
        else:
            prefix, _, module = name.partition(".")
            stem = f"{prefix}.text_model.{module}.lora_linear_layer"
        state[f"{stem}.down.weight"], state[f"{stem}.up.weight"] = pair.down, pair.up * pair.scale
    return state


def original_tokens(tokens: token_io.ClassTokens, where: str) -> dict[str, dict]:
    """Class tokens as the original pickles them: placeholder -> vector ``(D,)``, and its names of the classes both ways.
    Raises UserError: several vectors per class, vectors for several text encoders, or classes without names."""
    if tokens.further or tokens.vectors_per_class != 1:
        raise UserError(
            f"class tokens {where} hold {tokens.vectors_per_class} x {len(tokens.tables)} vectors per class (--num_vectors "
            "times text encoders), the original's layout one: use --layout diffusers"
        )
    if not tokens.class_names:
        raise UserError(
            f"class tokens {where} do not name their classes, which the original's layout does: use them as they are"
        )
    class_names = [original_name(name, tokens.dataset) for name in tokens.class_names]
    placeholder_of = dict(zip(class_names, tokens.names, strict=True))
    if twice := next((name for name, count in Counter(class_names).items() if count > 1), None):
        raise UserError(
            f"class tokens {where}: two classes would be '{twice}' in the original's spelling: rename one of them"
        )
    return {
        "learned_embeds_dict": {name: v.clone() for name, v in zip(tokens.names, tokens.vectors, strict=True)},
        "name2placeholder": placeholder_of,
        "placeholder2name": {placeholder: name for name, placeholder in placeholder_of.items()},
    }


def convert(
    lora_path: Path | None, embed_path: Path | None, output_dir: Path, layout: str, step: int | None = None
) -> list[Path]:
    """Writes a checkpoint in another layout.

    Args:
        step: also write the original's checkpoint of that step.

    Returns:
        The files written.

    Raises:
        UserError: unreadable input, what the layout cannot hold, or a file that already exists.
    """
    writers: dict[Path, Callable[[Path], None]] = {}
    if lora_path:
        lora = lora_io.read_lora(lora_path)
        if kohya := next((name for name in lora if name.startswith(lora_io.KOHYA_PREFIXES)), None):
            raise UserError(
                f"LoRA {lora_path}: kohya's names ('{kohya}') are read by stage 2 as they are and not converted"
            )
        state = original_lora(lora, str(lora_path)) if layout == "original" else diffusers_lora(lora)
        writers[output_dir / lora_io.FILE_NAME] = lambda path: tensors.save_tensors(path, state)
        if step is not None:
            writers[output_dir / f"checkpoint-{step}" / "pytorch_model.bin"] = lambda path: tensors.save_pickle(
                path, state
            )
    if embed_path:
        tokens = token_io.load_tokens(embed_path)
        if layout == "original":
            content = original_tokens(tokens, str(embed_path))
            for name in ("last", *([] if step is None else [step])):
                writers[output_dir / f"learned_embeds-steps-{name}.bin"] = lambda path: tensors.save_pickle(
                    path, content
                )
        else:
            writers[output_dir / token_io.FILE_NAME] = lambda path: token_io.save_tokens(tokens, path)
    existing = [path for path in writers if path.exists()]
    if existing:
        raise UserError(f"{existing[0]} already exists: choose another --output_dir")
    for path, write in writers.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
    return list(writers)


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = cli.PlainParser(prog="python -m semantic_aug.diffusion.convert", description=__doc__.split("\n")[0])
    parser.add_argument("--lora_path", type=registry.typed_path, metavar="PATH", help="LoRA file or folder")
    parser.add_argument(
        "--embed_path",
        type=registry.typed_path,
        metavar="PATH",
        help="file of class tokens, or a folder with one per class",
    )
    parser.add_argument(
        "--output_dir", type=registry.typed_path, required=True, metavar="DIR", help="where the files go"
    )
    parser.add_argument("--layout", choices=LAYOUTS, default="original", help="of the files (default: original)")
    parser.add_argument(
        "--step", type=int, metavar="N", help="with --layout original: write its checkpoint of this step too"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parses and converts."""
    args = build_parser().parse_args(argv)
    if not (args.lora_path or args.embed_path):
        raise UserError("nothing to convert: give --lora_path, --embed_path or both")
    if args.step is not None and args.layout != "original":
        raise UserError(f"--step {args.step} with --layout {args.layout}: only the original's layout has steps")
    for path in convert(args.lora_path, args.embed_path, args.output_dir, args.layout, args.step):
        sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
