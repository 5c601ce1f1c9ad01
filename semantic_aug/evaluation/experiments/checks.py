"""Checks of an experiment before its first run, and in a dry run: the flags of all its steps, and the stages on its data.

The flags of each step are checked in this process. Data, base model and classifier are checked by dry runs of the stages,
stage 2 with strategies that need no checkpoint.
"""

import argparse
import contextlib
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from semantic_aug.augmentations import strategies
from semantic_aug.classify import config as classify
from semantic_aug.classify.draws import NEED_SYNTHETIC
from semantic_aug.errors import UserError, WouldDownload
from semantic_aug.evaluation.experiments.commands import PSEUDO_LABEL, SCRIPTS, StageCommands, Step
from semantic_aug.evaluation.experiments.runner import LOGS, Pair, last_line, prepare_config, run_command
from semantic_aug.finetune import config as finetune
from semantic_aug.sampling import settings as sampling

WOULD_DOWNLOAD = "a run would download"
"""Beginning of the line in which a stage's dry run says what is not on this machine."""


@contextlib.contextmanager
def checking(commands: StageCommands, folder: Path, config_dir: Path, dry_run: bool = False) -> Iterator[StageCommands]:
    """The same commands in a temporary folder below ``folder``, with the registries. In a dry run and after an error, the
    folders above it that did not exist before are removed, too."""
    parents = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    keep = False
    try:
        with tempfile.TemporaryDirectory(prefix=".check-", dir=folder) as scratch:
            pair = Path(scratch) / commands.recipe.name
            prepare_config(pair, config_dir)
            yield replace(commands, folder=pair)
        keep = not dry_run
    finally:
        with contextlib.suppress(OSError):
            for parent in parents if not keep else ():
                parent.rmdir()  # an error where another process has written into it


def check_commands(steps: Iterable[Step], folder: Path) -> list[str]:
    """Runs commands as dry runs; returns what they would download, a line each. Raises UserError: one is refused; says why."""
    missing = []
    for step in steps:
        log_file = folder / LOGS / f"{step.name.replace(' ', '-')}.log"
        if run_command([*step.arguments, "--dry_run"], log_file, step.environment):
            raise UserError(f"{step.arguments[0]} refuses: {last_line(log_file)}")
        lines = log_file.read_text(encoding="utf-8", errors="replace").splitlines()
        missing += [line for line in lines if line.startswith(WOULD_DOWNLOAD)]
    return list(dict.fromkeys(missing))


@contextlib.contextmanager
def noting_downloads(missing: list[str]) -> Iterator[None]:
    """A context that ends early where a run would download something; ``missing`` gets a line that names it."""
    try:
        yield
    except WouldDownload as what:
        line = f"{WOULD_DOWNLOAD} {what}; what depends on that was not checked"
        missing += [] if line in missing else [line]


def check_flags(steps: Iterable[Step], config_dir: Path) -> None:
    """Refuses steps of the three stages whose flags do not go together. Raises UserError: names the step."""
    checks = {SCRIPTS[1]: _check_finetune, SCRIPTS[2]: _check_sample, SCRIPTS[3]: _check_classify}
    for step in steps:
        script, *arguments = step.arguments
        if script in checks:
            try:
                checks[script]([*arguments, "--config_dir", str(config_dir)])
            except UserError as error:
                raise UserError(f"{script} refuses '{step.name}': {error}") from None


def _check_finetune(arguments: Sequence[str]) -> None:
    from semantic_aug.finetune.run import check_flags as check

    config = finetune.parse(arguments)
    check(replace(config, output=replace(config.output, register_key=None)))  # it goes into the pair's own registry


def _check_sample(arguments: Sequence[str]) -> None:
    from semantic_aug.sampling.config import check_request

    check_request(sampling.build_parser().parse_args(arguments))


def _check_classify(arguments: Sequence[str]) -> None:
    from semantic_aug.classify.run import check_flags as check

    config = classify.read_config(classify.build_parser("").parse_args(arguments))
    classify.check_paths(config)
    if config.synthetic.syndata_dir:  # of pseudo-labels, which are still to be made
        keys = (*(config.synthetic.syndata_key or ()), PSEUDO_LABEL)
        config = replace(config, synthetic=replace(config.synthetic, syndata_dir=None, syndata_key=keys))
    check(config)


def recipes_in_effect(commands: StageCommands, config_dir: Path) -> dict[str, str]:
    """The flags that recipes.yaml sets in each stage of a setting, by their names in the budget's record, since the file may
    change before a later pair copies it. Raises UserError: a stage refuses its flags."""
    parsers = finetune.build_parser(), sampling.build_parser(), classify.build_parser("")
    steps = commands.finetune("ti_db"), commands.sample("diff-mix"), commands.classify("real-only", 0)
    registries = ["--config_dir", str(config_dir)]
    return {
        f"stage{stage}_recipe": parser.parse_args([*step.arguments[1:], *registries]).recipe
        for stage, parser, step in zip(SCRIPTS, parsers, steps, strict=True)
    }


def unchecked_stages(pairs: Collection[Pair]) -> set[int]:
    """The stages of some pairs that have steps to run and none that was run to its end."""
    missing = {pair.steps[name].stage for pair in pairs for name in pair.missing()}
    return missing - {entry["stage"] for pair in pairs for entry in pair.records.values() if entry["done"]}


def dry_run_stages(
    commands: StageCommands,
    stages: Collection[int],
    steps: Collection[Step],
    samples: Callable[[StageCommands], list[Step]],
    *,
    folder: Path,
    config_dir: Path,
    dry_run: bool,
) -> list[str]:
    """Checks data, base model and classifier of a setting by dry runs of some stages.

    Args:
        steps: of the setting, whose flags the runs have.
        samples: gives the runs of stage 2, which need neither a checkpoint nor a classifier.
        folder: in which they have a folder of their own for a while; see :func:`checking`.

    Returns:
        What a run would download, a line each.

    Raises:
        UserError: a stage refuses.
    """
    if not stages:
        return []
    with checking(commands, folder, config_dir, dry_run) as scratch:
        runs = classify_checks(scratch, steps) if 3 in stages else []
        runs += samples(scratch) if 2 in stages else []
        runs += [scratch.finetune(step.name) for step in steps if step.stage == 1] if 1 in stages else []
        return check_commands(runs, scratch.folder)


def sample_checks(commands: StageCommands, names: Iterable[str]) -> list[Step]:
    """Runs of stage 2 by the strategies without a checkpoint that are most like some others.

    Flags that depend on the strategy are left to :func:`check_flags`: here the strength leaves a step under any number of
    steps, and the share of steps with a context, which only inversions take, is left out.
    """
    commands, steps = _without(commands, 2, {"context_steps"}), {}
    for row in map(strategies.find, names):
        name = {"mixed": "real-mix", "same": "real-guidance"}[row.pairing] if row.start != "noise" else "real-gen"
        changes = {"aug_strength": 1.0} | ({"scheduler": "ddim"} if row.start == "inversion" else {})
        step = commands.sample(name, f"{name}-{row.start}", **changes)
        steps.setdefault(step.name, step)
    return list(steps.values())


def classify_checks(commands: StageCommands, steps: Iterable[Step]) -> list[Step]:
    """The run of stage 3 on real images alone; where all steps have synthetic images, without the flags that need them."""
    subsets = {"--syndata_key", "--syndata_dir"}
    if all(subsets & set(step.arguments) for step in steps if step.arguments[0] == SCRIPTS[3]):
        commands = _without(commands, 3, NEED_SYNTHETIC)
    return [commands.real_only()]


def _without(commands: StageCommands, stage: int, flags: Collection[str]) -> StageCommands:
    """The commands without some flags and their values among a stage's extra arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in flags:
        parser.add_argument(f"--{flag}", nargs="*")
    extra = dict(commands.recipe.extra)
    extra[stage] = tuple(parser.parse_known_args(extra.get(stage, ()))[1])
    return replace(commands, recipe=replace(commands.recipe, extra=extra))
