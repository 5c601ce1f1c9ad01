"""What a comparison runs: its methods, and the commands of one (setting, seed) as a user would type them.

Everything here is pure: from a recipe and a seed follow the commands; nothing is read or run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from semantic_aug import registry, runs
from semantic_aug.augmentations import strategies

SCRIPTS = {1: "train_lora.py", 2: "sample_mp.py", 3: "train_cls.py"}
"""Stage -> its entry script."""

FINETUNE_OF = {"tokens+lora": "ti_db", "tokens": "ti"}
"""Weights a strategy needs -> the stage 1 that makes them."""


@dataclass(frozen=True)
class Method:
    """One way of training a classifier, a row of a comparison.

    Attributes:
        name: the word given to ``--methods``.
        strategy: of its synthetic images, or None for real images only.
        mixing: flags of stage 3 that mix images.
    """

    name: str
    strategy: str | None = None
    mixing: tuple[str, ...] = ()


METHODS = {
    row.name: row
    for row in (
        Method("real-only"),
        Method("mixup", mixing=("use_mixup",)),
        Method("cutmix", mixing=("use_cutmix",)),
        *(
            Method(name, name)
            for name in (
                "real-guidance",
                "real-mix",
                "real-gen",
                "diff-aug",
                "diff-gen",
                "da-fusion",
                "ti-mix",
                "ti-aug",
            )
        ),
        Method("diff-mix", "diff-mix"),
        Method("diff-mix+cutmix", "diff-mix", ("use_cutmix",)),
        Method("diff-mix+mixup", "diff-mix", ("use_mixup",)),
    )
}
DEFAULT_METHODS = (
    "real-only", "mixup", "cutmix", "real-guidance", "real-mix", "diff-aug", "diff-gen", "da-fusion", "diff-mix",
    "diff-mix+cutmix",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """The budget of one setting: the same for every method and seed.

    Attributes:
        name: of the setting and of its folder, e.g. ``5shot``.
        base: base model as the user named it.
        shared: flags all three stages get.
        finetune: further flags of stage 1.
        sample: of stage 2.
        classify: of stage 3.
        synthetic: of stage 3 where there are synthetic images.
        extra: stage -> words as the user gave them.
    """

    name: str
    base: str
    shared: Mapping[str, Any]
    finetune: Mapping[str, Any]
    sample: Mapping[str, Any]
    classify: Mapping[str, Any]
    synthetic: Mapping[str, Any]
    extra: Mapping[int, tuple[str, ...]]

    def record(self) -> dict[str, Any]:
        """The recipe as a flat mapping, for the file that keeps it and for telling two apart."""
        parts = ("shared", "finetune", "sample", "classify", "synthetic")
        flat = {f"{part}.{name}": value for part in parts for name, value in getattr(self, part).items()}
        return {"base": self.base, **flat, **{f"stage{n}_args": list(words) for n, words in self.extra.items()}}


@dataclass(frozen=True)
class Devices:
    """Where the stages run: entries of ``--gpu_ids``, or None for each stage's own choice."""

    ids: tuple[str, ...] | None = None

    def environment(self, visible: str | None) -> dict[str, str]:
        """Variables for stage 1, which takes the first GPU it sees.

        Args:
            visible: ``CUDA_VISIBLE_DEVICES`` of this process; the ids count within it.
        """
        if self.ids is None:
            return {}
        if self.ids[0] == "cpu":
            return {"CUDA_VISIBLE_DEVICES": ""}
        listed = [entry for entry in (visible or "").split(",") if entry]
        place = int(self.ids[0])
        return {"CUDA_VISIBLE_DEVICES": listed[place] if place < len(listed) else self.ids[0]}


@dataclass(frozen=True)
class Step:
    """One run of an entry script.

    Attributes:
        name: unique within its pair.
        stage: 1, 2 or 3.
        words: the script and its arguments.
        needs: names of the steps whose results it reads.
        made: pattern, below the pair's folder, of a file that is there when the step is done.
        environment: variables it gets besides this process's.
    """

    name: str
    stage: int
    words: tuple[str, ...]
    needs: tuple[str, ...]
    made: str
    environment: Mapping[str, str]


def flag_words(flags: Mapping[str, Any]) -> list[str]:
    """Flags as words: None and False are left out, True is the flag alone, a sequence several values."""
    words: list[str] = []
    for name, value in flags.items():
        if value is None or value is False:
            continue
        values = [] if value is True else value if isinstance(value, (list, tuple)) else [value]
        words += [f"--{name}", *(f"{v:.12g}" if isinstance(v, float) else str(v) for v in values)]
    return words


def command(stage: int, *flags: Mapping[str, Any], extra: Iterable[str] = ()) -> tuple[str, ...]:
    """The words of a stage's command; where a flag is given twice, the later one counts."""
    merged: dict[str, Any] = {}
    for some in flags:
        merged |= some
    return (SCRIPTS[stage], *flag_words(merged), *extra)


def finetune_step(recipe: Recipe, seed: int, shared: Mapping[str, Any], kind: str, folder: Path, env: Mapping) -> Step:
    """Stage 1 of a pair; ``kind`` is ``ti_db`` or ``ti``."""
    flags = {
        "pretrained_model_name_or_path": recipe.base,
        "finetune_strategy": kind,
        "validation_steps": 0,
        "checkpoints_total_limit": 1,
        "report_to": "none",
        "output_dir": registry.shown_path(folder / kind),
        "register_key": kind,
        "resume_from_checkpoint": "latest",
        "seed": seed,
    }
    words = command(1, shared, recipe.finetune, flags, extra=recipe.extra.get(1, ()))
    return Step(kind, 1, words, (), f"{kind}/summary.json", env)


def sample_step(
    recipe: Recipe, seed: int, shared: Mapping[str, Any], strategy: str, folder: Path, devices: Devices,
    key: str | None = None, **changes: Any,
) -> Step:  # fmt: skip
    """Stage 2 of a pair.

    Args:
        recipe: of the setting.
        seed: of the plan and the noise.
        shared: flags all stages get.
        strategy: row of the strategy table.
        folder: of the pair.
        devices: where it runs.
        key: under which the subset is registered (None: the strategy's name).
        changes: flags that differ from the recipe's.
    """
    kind = FINETUNE_OF.get(strategies.find(strategy).weights)
    key = key or strategy
    flags = {
        "finetune_model_key": kind,
        "model_path": None if kind else recipe.base,
        "sample_strategy": strategy,
        "gpu_ids": devices.ids,
        "output_root": registry.shown_path(folder / "aug_samples" / key),
        "register_key": key,
        "seed": seed,
    }
    words = command(2, shared, recipe.sample, changes, flags, extra=recipe.extra.get(2, ()))
    return Step(f"sample {key}", 2, words, (kind,) if kind else (), f"aug_samples/{key}/*/*/meta.csv", {})


def classify_step(
    recipe: Recipe, seed: int, shared: Mapping[str, Any], name: str, folder: Path, devices: Devices,
    key: str | None = None, mixing: Iterable[str] = (), **changes: Any,
) -> Step:  # fmt: skip
    """Stage 3 of a pair; ``key`` is that of its synthetic subset. See :func:`sample_step` for the rest."""
    flags = {
        "syndata_key": key,
        **(dict(recipe.synthetic) if key else {}),
        **dict.fromkeys(mixing, True),
        "gpu": devices.ids[0] if devices.ids else None,
        "output_dir": registry.shown_path(folder / "classify" / name),
        "seed": seed,
        **changes,
    }
    words = command(3, shared, recipe.classify, flags, extra=recipe.extra.get(3, ()))
    needs = (f"sample {key}",) if key else ()
    return Step(f"classify {name}", 3, words, needs, f"classify/{name}/results.json", {})


def shared_flags(recipe: Recipe, subset_seed: int, folder: Path) -> dict[str, Any]:
    """The flags all stages of a pair get: the data, its draw, and a registry of the pair's own."""
    return {**recipe.shared, "subset_seed": subset_seed, "config_dir": registry.shown_path(folder / "config")}


def steps_of(
    recipe: Recipe, seed: int, methods: Iterable[str], folder: Path, devices: Devices, visible: str | None = None
) -> dict[str, Step]:
    """Every step of one (setting, seed) by name, each after what it needs.

    Args:
        recipe: of the setting.
        seed: of the few-shot draw and of every stage.
        methods: names of :data:`METHODS`.
        folder: of the pair.
        devices: where the stages run.
        visible: ``CUDA_VISIBLE_DEVICES`` of this process.
    """
    shared, environment = shared_flags(recipe, seed, folder), devices.environment(visible)
    steps: dict[str, Step] = {}
    for name in methods:
        method = METHODS[name]
        if method.strategy:
            sample = sample_step(recipe, seed, shared, method.strategy, folder, devices)
            for kind in sample.needs:
                steps.setdefault(kind, finetune_step(recipe, seed, shared, kind, folder, environment))
            steps.setdefault(sample.name, sample)
        one = classify_step(recipe, seed, shared, name, folder, devices, method.strategy, method.mixing)
        steps[one.name] = one
    return steps


def setting_name(examples_per_class: int, task: str, imbalance_factor: float) -> str:
    """What a setting and its folder are called: ``5shot``, ``imb0.1``, both joined, or ``all``."""
    return runs.setting_suffix(examples_per_class, task, imbalance_factor).lstrip("_") or "all"
