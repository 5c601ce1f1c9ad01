"""The commands of the three stages that an experiment runs: its methods, budgets and steps, as a user would type them.

From a recipe, a seed and a folder follow the commands; nothing is run here.
"""

import os
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from semantic_aug import registry, runs
from semantic_aug.augmentations import strategies

SCRIPTS = {1: "train_lora.py", 2: "sample_mp.py", 3: "train_cls.py"}
"""Stage -> its entry script."""

FINETUNE_OF = {"tokens+lora": "ti_db", "tokens": "ti"}
"""Weights a strategy needs -> the strategy of stage 1 that trains them."""

LABEL_STEP = "label unlabelled"
"""Name of the step that makes pseudo-labels."""


@dataclass(frozen=True)
class Method:
    """One way of training a classifier, a row of a comparison.

    Attributes:
        name: the word given to ``--methods``.
        strategy: of its synthetic images, or None for real images only.
        sample: flags of stage 2 besides the budget's; the value :data:`REAL_ONLY` stands for the folder of the real-only
            classifier of the same seed, which is trained before, :data:`UNLABELLED` for the unlabelled images.
        classify: flags of stage 3 besides the budget's.
        pseudo: whether it trains on unlabelled images, labelled by the real-only classifier of its seed.
    """

    name: str
    strategy: str | None = None
    sample: Mapping[str, Any] = field(default_factory=dict)
    classify: Mapping[str, Any] = field(default_factory=dict)
    pseudo: bool = False

    @property
    def subset(self) -> str | None:
        """The key of its synthetic images: of the strategy, or its own where their flags are."""
        return self.name if self.sample else self.strategy

    @property
    def unlabelled(self) -> bool:
        """Whether it uses unlabelled images."""
        return self.pseudo or UNLABELLED in self.sample.values()

    @property
    def finetuning(self) -> str | None:
        """The strategy of stage 1 whose weights it needs."""
        return FINETUNE_OF.get(strategies.find(self.strategy).weights) if self.strategy else None

    @property
    def step_names(self) -> dict[int, str]:
        """Stage -> name of the step that the method needs."""
        names = {1: self.finetuning, 2: self.subset and f"sample {self.subset}", 3: f"classify {self.name}"}
        return {stage: name for stage, name in names.items() if name}


REAL_ONLY, UNLABELLED = "folder of the real-only classifier", "unlabelled images"
METHODS = {
    method.name: method
    for method in (
        Method("real-only"),
        Method("mixup", classify={"use_mixup": True}),
        Method("cutmix", classify={"use_cutmix": True}),
        Method("pseudo-label", pseudo=True),
        *(Method(name, name) for name in strategies.STRATEGIES),
        Method("diff-mix+cutmix", "diff-mix", classify={"use_cutmix": True}),
        Method("diff-mix+mixup", "diff-mix", classify={"use_mixup": True}),
        Method("diff-mix+teacher", "diff-mix", classify={"soft_labels": "teacher"}),
        Method("diff-mix+mixed-labels", "diff-mix", classify={"soft_labels": "mixed"}),
        Method("diff-mix+curriculum", "diff-mix", {"strength_strategy": "uniform"}, {"curriculum": "strength"}),
        Method("diff-mix+confusion", "diff-mix", {"pairing": "confusion", "classifier": REAL_ONLY}),
        Method("diff-mix+hard", "diff-mix", {"sources": "hard", "classifier": REAL_ONLY}),
        Method(
            "diff-mix+unlabelled",
            "diff-mix",
            {"sources": "unlabelled", "unlabelled": UNLABELLED, "classifier": REAL_ONLY},
        ),
        Method("diff-mix+contexts", "diff-mix", {"contexts": "captions"}),
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
        shared: flags of all three stages.
        finetune: further flags of stage 1.
        sample: of stage 2.
        classify: of stage 3.
        synthetic: of stage 3 where there are synthetic images.
        extra: stage -> extra arguments as the user gave them.
        pseudo: the unlabelled images, and the threshold of pseudo-labels; no part of the budget, since few methods have them.
        defaults: entries of the record that are left to the stages, as messages show them.
    """

    name: str
    base: str
    shared: Mapping[str, Any]
    finetune: Mapping[str, Any]
    sample: Mapping[str, Any]
    classify: Mapping[str, Any]
    synthetic: Mapping[str, Any]
    extra: Mapping[int, tuple[str, ...]]
    pseudo: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, str] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """The recipe as a flat mapping, for the file that keeps it and for telling two apart."""
        parts = ("shared", "finetune", "sample", "classify", "synthetic")
        flat = {f"{part}.{name}": value for part in parts for name, value in getattr(self, part).items()}
        return {"base": self.base, **flat, **{f"stage{n}_args": list(extra) for n, extra in self.extra.items()}}


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
        listed, index = [entry for entry in (visible or "").split(",") if entry], int(self.ids[0])
        return {"CUDA_VISIBLE_DEVICES": listed[index] if index < len(listed) else self.ids[0]}


@dataclass(frozen=True)
class Step:
    """One run of an entry script.

    Attributes:
        name: unique within its pair.
        stage: 1, 2 or 3.
        arguments: the script and its arguments.
        needs: names of the steps whose results it reads.
        result: pattern, below the pair's folder, of a file that exists when the step is done.
        environment: variables besides this process's.
    """

    name: str
    stage: int
    arguments: tuple[str, ...]
    needs: tuple[str, ...]
    result: str
    environment: Mapping[str, str]

    def __str__(self) -> str:
        """The command as a user would type it."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*variables, "python", shlex.join(self.arguments)])


def command(stage: int, flags: Mapping[str, Any], extra: Iterable[str] = ()) -> tuple[str, ...]:
    """A stage's script and its arguments."""
    return (SCRIPTS[stage], *arguments_of(flags), *extra)


def arguments_of(flags: Mapping[str, Any]) -> list[str]:
    """Flags as arguments: None and False are left out, True is the flag alone, a sequence several values."""
    arguments: list[str] = []
    for name, value in flags.items():
        if value is None or value is False:
            continue
        values = [] if value is True else value if isinstance(value, (list, tuple)) else [value]
        arguments += [f"--{name}", *(f"{v:.12g}" if isinstance(v, float) else str(v) for v in values)]
    return arguments


@dataclass(frozen=True)
class StageCommands:
    """The commands of one setting under one draw of its training images.

    Attributes:
        recipe: of the setting.
        subset_seed: of the draw, and of stages 1 and 2.
        folder: of the results.
        devices: where the stages run.
    """

    recipe: Recipe
    subset_seed: int
    folder: Path
    devices: Devices

    @property
    def shared(self) -> dict[str, Any]:
        """The flags of all stages: the data, its draw, and a registry in the folder."""
        config_dir = registry.shown_path(self.folder / "config")
        return {**self.recipe.shared, "subset_seed": self.subset_seed, "config_dir": config_dir}

    def _command(self, stage: int, *flags: Mapping[str, Any]) -> tuple[str, ...]:
        merged: dict[str, Any] = dict(self.shared)
        for part in flags:  # of a flag given twice, the later one counts
            merged |= part
        return command(stage, merged, self.recipe.extra.get(stage, ()))

    def finetune(self, kind: str) -> Step:
        """Stage 1; ``kind`` is ``ti_db`` or ``ti``."""
        flags = {
            "pretrained_model_name_or_path": self.recipe.base,
            "finetune_strategy": kind,
            "validation_steps": 0,
            "checkpoints_total_limit": 1,
            "report_to": "none",
            "output_dir": registry.shown_path(self.folder / kind),
            "register_key": kind,
            "resume_from_checkpoint": "latest",
            "seed": self.subset_seed,
        }
        environment = self.devices.environment(os.environ.get("CUDA_VISIBLE_DEVICES"))
        arguments = self._command(1, self.recipe.finetune, flags)
        return Step(kind, 1, arguments, (), f"{kind}/summary.json", environment)

    def sample(self, strategy: str, key: str | None = None, **changes: Any) -> Step:
        """Stage 2.

        Args:
            strategy: row of the strategy table.
            key: under which the subset is registered (None: the strategy's name).
            changes: flags that differ from the recipe's.
        """
        kind, key = Method(strategy, strategy).finetuning, key or strategy
        flags = {
            "finetune_model_key": kind,
            "model_path": None if kind else self.recipe.base,
            "sample_strategy": strategy,
            "gpu_ids": self.devices.ids,
            "output_root": registry.shown_path(self.folder / "aug_samples" / key),
            "register_key": key,
            "seed": self.subset_seed,
        }
        arguments = self._command(2, self.recipe.sample, changes, flags)
        return Step(f"sample {key}", 2, arguments, (kind,) if kind else (), f"aug_samples/{key}/*/*/meta.csv", {})

    def classify(self, name: str, seed: int, key: str | None = None, **changes: Any) -> Step:
        """Stage 3; ``key`` is that of its synthetic subset, ``changes`` are flags that differ from the recipe's."""
        flags = {
            "syndata_key": key,
            **(self.recipe.synthetic if key else {}),
            "gpu": self.devices.ids[0] if self.devices.ids else None,
            "output_dir": registry.shown_path(self.folder / "classify" / name),
            "seed": seed,
        }
        arguments = self._command(3, self.recipe.classify, flags, changes)
        needs = (f"sample {key}",) if key else ()
        return Step(f"classify {name}", 3, arguments, needs, f"classify/{name}/results.json", {})

    def real_only(self) -> tuple[Step, str]:
        """The classifier trained on real images alone, and its folder."""
        return self.classify("real-only", self.subset_seed), registry.shown_path(self.folder / "classify" / "real-only")

    def pseudo_label_steps(self, name: str) -> dict[str, Step]:
        """The real-only classifier, its labels for the unlabelled images, and the classifier trained on both, by name."""
        (teacher, run), folder = self.real_only(), registry.shown_path(self.folder / "pseudo-label")
        flags = {
            **self.shared,
            **self.recipe.pseudo,
            "classifier": run,
            "gpu": self.devices.ids[0] if self.devices.ids else None,
            "output_dir": folder,
        }
        arguments = ("-m", "semantic_aug.evaluation", "pseudo-label", *arguments_of(flags))
        labels = Step(LABEL_STEP, 3, arguments, (teacher.name,), "pseudo-label/meta.csv", {})
        student = self.classify(name, self.subset_seed, syndata_dir=folder, **self.recipe.synthetic)
        return {step.name: step for step in (teacher, labels, replace(student, needs=(labels.name,)))}

    def synthetic_steps(self, sample: Step) -> dict[str, Step]:
        """A step of stage 2 after the fine-tuning that it needs, by name."""
        return {**{kind: self.finetune(kind) for kind in sample.needs}, sample.name: sample}

    def method_steps(self, names: Iterable[str]) -> dict[str, Step]:
        """Every step of some of :data:`METHODS` by name, each after what it needs."""
        steps: dict[str, Step] = {}
        for name in names:
            method = METHODS[name]
            if method.pseudo:
                steps |= self.pseudo_label_steps(name)
                continue
            if method.strategy:
                for step in self.method_subset(method).values():
                    steps.setdefault(step.name, step)
            classify = self.classify(name, self.subset_seed, method.subset, **method.classify)
            steps.setdefault(classify.name, classify)
        return steps

    def method_subset(self, method: Method) -> dict[str, Step]:
        """The steps that make the synthetic images of a method, by name."""
        real_only, folder = self.real_only()
        meanings = {REAL_ONLY: folder, UNLABELLED: self.recipe.pseudo.get("unlabelled")}
        flags = {name: meanings.get(value, value) for name, value in method.sample.items()}
        steps = self.synthetic_steps(self.sample(method.strategy, method.subset, **flags))
        if flags == method.sample:
            return steps
        *before, sample = steps.values()
        needed = {step.name: step for step in (real_only, *before)}
        return {**needed, sample.name: replace(sample, needs=tuple(needed))}


def setting_name(examples_per_class: int, task: str, imbalance_factor: float) -> str:
    """What a setting and its folder are called: ``5shot``, ``imb0.1``, both joined, or ``all``."""
    return runs.setting_suffix(examples_per_class, task, imbalance_factor).lstrip("_") or "all"
