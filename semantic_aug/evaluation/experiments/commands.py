"""The methods, budgets and steps of an experiment: the commands of the three stages, as a user would type them. Nothing is run
here."""

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

REAL_ONLY = "real-only"
"""Name of the method without synthetic images."""
PSEUDO_LABEL = "pseudo-label"
"""Name of the method, and the beginning of the names of the folders with pseudo-labels."""
LABEL_STEP = "label unlabelled"
"""The beginning of the names of the steps that make pseudo-labels."""


@dataclass(frozen=True)
class Method:
    """One way of training a classifier, a row of a comparison.

    Attributes:
        name: the word given to ``--methods``.
        strategy: of its synthetic images, or None for real images only.
        sample: flags of stage 2 besides the budget's; the value :data:`REAL_ONLY_RUN` stands for the folder of the real-only
            classifier of the same seed, which is trained before, :data:`UNLABELLED` for the unlabelled images.
        classify: flags of stage 3 besides the budget's.
        labeller: the method whose classifier of the same seed labels unlabelled images, on which this one trains; empty: none.
    """

    name: str
    strategy: str | None = None
    sample: Mapping[str, Any] = field(default_factory=dict)
    classify: Mapping[str, Any] = field(default_factory=dict)
    labeller: str = ""

    @property
    def subset(self) -> str | None:
        """The key of its synthetic images: of the strategy, or its own where their flags are; a method with pseudo-labels has
        those of the same method without."""
        return self.name.removesuffix(f"+{PSEUDO_LABEL}") if self.sample else self.strategy

    @property
    def unlabelled(self) -> bool:
        """Whether it uses unlabelled images."""
        return bool(self.labeller) or UNLABELLED in self.sample.values()

    @property
    def step_names(self) -> dict[int, str]:
        """Stage -> name of the step that the method, or else its labeller, needs."""
        others = METHODS[self.labeller].step_names if self.labeller else {}
        names = {1: self.strategy and finetuning_of(self.strategy), 2: self.subset and f"sample {self.subset}"}
        return {**others, **{stage: name for stage, name in names.items() if name}, 3: f"classify {self.name}"}

    @property
    def labels(self) -> str:
        """Name of the folder with its pseudo-labels."""
        return PSEUDO_LABEL + (f"-by-{self.labeller}" if self.labeller != REAL_ONLY else "")

    @property
    def label_step(self) -> str:
        """Name of the step that makes them."""
        return LABEL_STEP + (f" by {self.labeller}" if self.labeller != REAL_ONLY else "")


def finetuning_of(strategy: str) -> str | None:
    """The strategy of stage 1 that trains the weights which a strategy of stage 2 needs; None for the base model's."""
    return {"tokens+lora": "ti_db", "tokens": "ti"}.get(strategies.find(strategy).weights)


REAL_ONLY_RUN, UNLABELLED = "folder of the real-only classifier", "unlabelled images"
UNLABELLED_SOURCES = {"sources": "unlabelled", "unlabelled": UNLABELLED, "classifier": REAL_ONLY_RUN}
METHODS = {
    method.name: method
    for method in (
        Method(REAL_ONLY),
        Method("mixup", classify={"use_mixup": True}),
        Method("cutmix", classify={"use_cutmix": True}),
        Method(PSEUDO_LABEL, labeller=REAL_ONLY),
        Method(f"{PSEUDO_LABEL}-twice", labeller=PSEUDO_LABEL),
        Method(f"{PSEUDO_LABEL}-by-diff-aug", labeller="diff-aug"),
        *(Method(name, name) for name in strategies.STRATEGIES),
        Method("diff-mix+cutmix", "diff-mix", classify={"use_cutmix": True}),
        Method("diff-mix+mixup", "diff-mix", classify={"use_mixup": True}),
        Method("diff-mix+teacher", "diff-mix", classify={"soft_labels": "teacher"}),
        Method("diff-mix+mixed-labels", "diff-mix", classify={"soft_labels": "mixed"}),
        Method("diff-mix+curriculum", "diff-mix", {"strength_strategy": "uniform"}, {"curriculum": "strength"}),
        Method("diff-mix+confusion", "diff-mix", {"pairing": "confusion", "classifier": REAL_ONLY_RUN}),
        Method("diff-mix+hard", "diff-mix", {"sources": "hard", "classifier": REAL_ONLY_RUN}),
        Method("diff-mix+unlabelled", "diff-mix", UNLABELLED_SOURCES),
        Method(f"diff-mix+unlabelled+{PSEUDO_LABEL}", "diff-mix", UNLABELLED_SOURCES, labeller=REAL_ONLY),
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

    def record(self) -> dict[str, Any]:
        """The recipe as a flat mapping, for the file that keeps it and for telling two apart."""
        parts = ("shared", "finetune", "sample", "classify", "synthetic")
        flat = {f"{part}.{name}": value for part in parts for name, value in getattr(self, part).items()}
        return {"base": self.base, **flat, **{f"stage{n}_args": list(extra) for n, extra in self.extra.items()}}


def stage1_environment(gpu: str | None) -> dict[str, str]:
    """Variables for stage 1, which takes the first GPU it sees; ``gpu`` counts within this process's CUDA_VISIBLE_DEVICES."""
    if gpu is None:
        return {}
    if gpu == "cpu":
        return {"CUDA_VISIBLE_DEVICES": ""}
    visible = [entry for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry]
    return {"CUDA_VISIBLE_DEVICES": dict(enumerate(visible)).get(int(gpu), gpu)}


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
        gpu_ids: where the stages run, as their flags spell it; None: each stage's own choice.
    """

    recipe: Recipe
    subset_seed: int
    folder: Path
    gpu_ids: tuple[str, ...] | None = None

    @property
    def gpu(self) -> str | None:
        """Where stages 1 and 3 run."""
        return self.gpu_ids[0] if self.gpu_ids else None

    @property
    def shared(self) -> dict[str, Any]:
        """The flags of all stages: the data, its draw, and a registry in the folder."""
        config_dir = registry.shown_path(self.folder / "config")
        return {**self.recipe.shared, "subset_seed": self.subset_seed, "config_dir": config_dir}

    def command(self, stage: int, flags: Mapping[str, Any]) -> tuple[str, ...]:
        """A stage's script and its arguments: the shared flags, these, and the extra arguments."""
        return (SCRIPTS[stage], *arguments_of({**self.shared, **flags}), *self.recipe.extra.get(stage, ()))

    def finetune(self, kind: str) -> Step:
        """Stage 1; ``kind`` is ``ti_db`` or ``ti``."""
        flags = {
            **self.recipe.finetune,
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
        return Step(kind, 1, self.command(1, flags), (), f"{kind}/summary.json", stage1_environment(self.gpu))

    def sample(self, strategy: str, key: str | None = None, **changes: Any) -> Step:
        """Stage 2.

        Args:
            strategy: row of the strategy table.
            key: under which the subset is registered (None: the strategy's name).
            changes: flags that differ from the recipe's.
        """
        kind, key = finetuning_of(strategy), key or strategy
        flags = {
            **self.recipe.sample,
            **changes,
            "finetune_model_key": kind,
            "model_path": None if kind else self.recipe.base,
            "sample_strategy": strategy,
            "gpu_ids": self.gpu_ids,
            "output_root": registry.shown_path(self.folder / "aug_samples" / key),
            "register_key": key,
            "seed": self.subset_seed,
        }
        needs, result = (kind,) if kind else (), f"aug_samples/{key}/*/*/meta.csv"
        return Step(f"sample {key}", 2, self.command(2, flags), needs, result, {})

    def classify(self, name: str, seed: int, key: str | None = None, **changes: Any) -> Step:
        """Stage 3; ``key`` is that of its synthetic subset, ``changes`` are flags that differ from the recipe's."""
        flags = {
            **self.recipe.classify,
            "syndata_key": key,
            **(self.recipe.synthetic if key else {}),
            "gpu": self.gpu,
            "output_dir": self.run_folder(name),
            "seed": seed,
            **changes,
        }
        needs, result = (f"sample {key}",) if key else (), f"classify/{name}/results.json"
        return Step(f"classify {name}", 3, self.command(3, flags), needs, result, {})

    def run_folder(self, method: str) -> str:
        """The folder of a method's classifier."""
        return registry.shown_path(self.folder / "classify" / method)

    def real_only(self) -> Step:
        """The classifier trained on real images alone."""
        return self.classify(REAL_ONLY, self.subset_seed)

    def method_steps(self, names: Iterable[str]) -> dict[str, Step]:
        """Every step of some of :data:`METHODS` by name, each after what it needs."""
        steps: dict[str, Step] = {}
        for method in [METHODS[name] for name in names]:
            before, changes, needs = [], dict(method.classify), ()
            if method.strategy:
                before += self.subset_steps(method)
            if method.labeller:
                before += self.pseudo_label_steps(method)
                folder = registry.shown_path(self.folder / method.labels)
                changes, needs = {**changes, "syndata_dir": folder, **self.recipe.synthetic}, (method.label_step,)
            classify = self.classify(method.name, self.subset_seed, method.subset, **changes)
            for step in (*before, replace(classify, needs=(*classify.needs, *needs))):
                steps.setdefault(step.name, step)
        return steps

    def pseudo_label_steps(self, method: Method) -> list[Step]:
        """The steps of a method's labeller, and its labels for the unlabelled images."""
        before, folder = self.method_steps([method.labeller]), registry.shown_path(self.folder / method.labels)
        run = self.run_folder(method.labeller)
        flags = {**self.shared, **self.recipe.pseudo, "classifier": run, "gpu": self.gpu, "output_dir": folder}
        arguments = ("-m", "semantic_aug.evaluation", "pseudo-label", *arguments_of(flags))
        needs, result = (f"classify {method.labeller}",), f"{method.labels}/meta.csv"
        return [*before.values(), Step(method.label_step, 3, arguments, needs, result, {})]

    def subset_steps(self, method: Method) -> list[Step]:
        """The steps that make the synthetic images of a method."""
        meanings = {REAL_ONLY_RUN: self.run_folder(REAL_ONLY), UNLABELLED: self.recipe.pseudo.get("unlabelled")}
        flags = {name: meanings.get(value, value) for name, value in method.sample.items()}
        sample = self.sample(method.strategy, method.subset, **flags)
        return self.after_finetuning(sample, *([self.real_only()] if flags != method.sample else []))

    def after_finetuning(self, sample: Step, *before: Step) -> list[Step]:
        """A step of stage 2 after the fine-tuning that it needs, and after other steps."""
        needed = [*before, *(self.finetune(kind) for kind in sample.needs)]
        return [*needed, replace(sample, needs=tuple(step.name for step in needed))]


def setting_name(examples_per_class: int, task: str, imbalance_factor: float) -> str:
    """What a setting and its folder are called: ``5shot``, ``imb0.1``, both joined, or ``all``."""
    return runs.setting_suffix(examples_per_class, task, imbalance_factor).lstrip("_") or "all"
