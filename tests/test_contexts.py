"""Contexts: what is said of a picture besides its class, drawn independently of the class."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import CLASSES, job_of, sampling_arguments
from scipy.stats import chi2_contingency

import sample_mp
import tiny
from semantic_aug.augmentations import strategies
from semantic_aug.augmentations.engine import Engine
from semantic_aug.augmentations.model import ModelFiles, Prompts
from semantic_aug.diffusion.base import load_base
from semantic_aug.diffusion.schedulers import SolverSettings
from semantic_aug.errors import UserError
from semantic_aug.finetune.config import parse
from semantic_aug.finetune.model import TrainedModel
from semantic_aug.finetune.run import resolve
from semantic_aug.prompts import context_of, read_contexts, read_templates, without_classes
from semantic_aug.sampling import config as sampling
from semantic_aug.sampling.identity import arguments_of
from semantic_aug.sampling.plan import PlanSettings, make_plan
from semantic_aug.sampling.settings import ImageSettings
from semantic_aug.sampling.subset import PlannedSubset, plan_subset, task_paths
from semantic_aug.sampling.worker import BatchMaker
from semantic_aug.seeding import task_rng

SNOW = ("in the snow", "on a wooden table", "at night")


@pytest.mark.parametrize(
    ("caption", "wanted"),
    [
        ("a photo of a red fox, in snow.", "in snow"),
        ("A close-up photo of a small Red Fox is sleeping on hay", "sleeping on hay"),
        ("two red foxes at play", "at play"),
        ("an {} on a stone", "on a stone"),
        ("a red fox animal under a tree", "under a tree"),
        ("snow around a red fox, the red fox asleep", "snow around it, it asleep"),
        ("sleeping in the sun", "sleeping in the sun"),
        ("foxglove in bloom", "foxglove in bloom"),  # a longer word is not the name
        ("a picture of a red fox", ""),
    ],
)
def test_the_class_is_cut_out_of_a_caption(caption, wanted):
    assert context_of(caption, ("red fox", "Red_Fox"), "animal") == wanted


def test_contexts_that_name_another_class_are_left_out():
    contexts = ["in snow", "next to a toad", "with two Blue Jays", "in snow", "on a toadstool"]
    assert without_classes(contexts, [(name,) for name in CLASSES]) == ("in snow", "on a toadstool")


def test_a_file_of_contexts(tmp_path):
    file = tmp_path / "contexts.txt"
    file.write_text("# mine\nin the snow\n\nat night\nin the snow\n")
    assert read_contexts(str(file)) == ("in the snow", "at night")
    for first in ("# mine\r\n", ""):  # Windows' editors begin a file with a byte-order mark
        file.write_bytes(f"\ufeff{first}a {{}} at night\r\n".encode())
        assert read_templates(str(file)) == ("a {} at night",)
    for content, message in (("#\n", "holds no context"), ("a {} in snow\n", "expected a context without a class")):
        file.write_text(content)
        with pytest.raises(UserError, match=f"--contexts .*{message}"):
            read_contexts(str(file))
    with pytest.raises(UserError, match="--contexts nowhere: expected a text file with one context a line"):
        read_contexts("nowhere")


def plan_of(contexts, seed=0, strategy="diff-mix"):
    labels, keys = np.arange(90) % 3, [str(i) for i in range(90)]
    options = {"strategy": strategies.find(strategy), "strengths": (0.5, 0.9), "multiplier": 40, "batch_size": 8}
    return make_plan(labels, keys, 3, PlanSettings(**options, seed=seed, contexts=contexts))


@pytest.mark.parametrize("strategy", ["diff-mix", "diff-aug", "diff-gen"])
def test_contexts_are_drawn_evenly_and_independently_of_everything_else(strategy):
    plain, plan, other = plan_of(0, strategy=strategy), plan_of(5, strategy=strategy), plan_of(5, 1, strategy)
    assert plain.context is None and plan.digest not in (plain.digest, other.digest)
    for name in ("source", "source_class", "target", "strength_code"):
        assert np.array_equal(getattr(plain, name), getattr(plan, name))
    assert np.array_equal(plan.context, plan_of(5, strategy=strategy).context)
    assert np.bincount(plan.context).tolist() == [720] * 5
    for classes in (plan.source_class, plan.target, plan.strength_code):
        table = np.zeros((classes.max() + 1, 5))
        np.add.at(table, (classes, plan.context), 1)
        assert chi2_contingency(table).pvalue > 1e-3


def test_prompts_with_contexts_are_encoded_batch_by_batch(tiny_base):
    names = Prompts(CLASSES, CLASSES, templates=("a {}", "the {}"), contexts=SNOW)
    files = ModelFiles("tiny", tiny_base)
    engine = Engine(files, names, SolverSettings(4), tiny.RESOLUTION)
    plain, night = names.number(1, 1), names.number(1, 1, 2)
    prompt = engine.prompt_embeds.prompt
    assert prompt(plain) == "the red fox" and prompt(night) == "the red fox, at night"
    assert len({prompt(number) for number in range(2 * 3 * 4)}) == 24
    both = engine.prompt_embeds[[night, plain, night]].hidden
    wanted = load_base("tiny", tiny_base).encode(["the red fox", "the red fox, at night"], tiny.RESOLUTION).hidden
    assert torch.allclose(both, wanted[[1, 0, 1]], atol=1e-6) and engine.prompt_embeds.whole is None
    many = Engine(
        files, Prompts(CLASSES, CLASSES, contexts=[str(i) for i in range(10**6)]), SolverSettings(4), tiny.RESOLUTION
    )
    assert many.prompt_embeds.prompt(3 * (10**6 + 1) - 1) == "a photo of a toad, 999999"
    assert torch.equal(many.prompt_embeds[[3, 900_000]].hidden, many.prompt_embeds[[900_000, 3]].hidden.flip(0))


def test_a_tasks_image_is_made_under_its_own_context_and_recorded(animals, image_folder, tiny_base, tmp_path):
    prompts = Prompts(animals.source_names, animals.class_names, contexts=SNOW)
    job = job_of(
        animals, tmp_path, dataset=f"folder:{image_folder}", model=ModelFiles("tiny", tiny_base), prompts=prompts,
        solver=SolverSettings(4), images=ImageSettings(resolution=tiny.RESOLUTION, sample_strategy="real-gen"),
    )  # fmt: skip
    job = replace(job, sources=None)  # from noise
    labels, keys = animals.train.labels, animals.train.keys
    options = {"strategy": strategies.find("real-gen"), "strengths": (1.0,), "multiplier": 1, "batch_size": 4}
    plan = make_plan(labels, keys, 3, PlanSettings(**options, seed=0, contexts=3))
    paths = task_paths(job.config, animals, plan)
    tasks = PlannedSubset(job.config, animals, plan, paths, job, None, {}).tasks(0, np.ones(len(plan), bool))
    assert [task.context for task in tasks] == plan.context[:4].tolist()
    rows = list(paths.meta_rows(np.arange(4)))
    assert [row[-1] for row in rows] == [f"a photo of a {{}}, {SNOW[c]}" for c in plan.context[:4]]
    assert paths.further_columns[-1] == "Prompt" and tasks[0].text["prompt"] == rows[0][-1]
    created, _ = BatchMaker(job, "cpu").pixels(tasks)
    for task, image in zip(tasks, created, strict=True):
        template = f"a photo of a {{}}, {SNOW[task.context]}"
        named = Prompts(animals.source_names, animals.class_names, template=template)
        alone = Engine(ModelFiles("tiny", tiny_base), named, SolverSettings(4), tiny.RESOLUTION)
        generator = [task_rng(job.config.run.seed, task.number)]
        assert (alone.generate([task.target], generator)[0].int() - image.int()).abs().max() <= 1


@pytest.fixture
def captioned(tmp_path):
    folder = tiny.write_image_folder(tmp_path / "animals")
    rows = ["file_name,caption", 'red fox/train000.png,"a photo of a red fox in snow\nasleep"',
            "red fox/train001.png,a red fox at night", "toad/train000.png,a toad in the snow",
            "toad/train001.png,a toad beside a red fox"]  # fmt: skip
    (folder / "train" / "metadata.csv").write_text("\n".join(rows) + "\n")
    return folder


def test_contexts_are_part_of_what_a_subset_is_made_from(workshop, captioned, tmp_path):
    file = tmp_path / "contexts.txt"

    def identified(**flags):
        changes = {"config_dir": workshop / "config", "finetune_model_key": None, "sample_strategy": "real-gen"}
        argv = sampling_arguments(workshop, captioned, tmp_path / "out", **changes, **flags)
        base = next(workshop.glob("config/finetuned_ckpts.yaml")).read_text().split("model_path: ")[1].splitlines()[0]
        args = sample_mp.build_parser().parse_args([str(word) for word in (*argv, "--model_path", base)])
        config, dataset = sampling.resolve(args)
        return config, plan_subset(config, dataset).identity

    plain = identified()[1]
    assert "contexts_sha256" not in plain
    config, own = identified(contexts="captions")
    assert config.prompts.contexts == ("in snow", "asleep", "at night", "in the snow")
    assert (
        arguments_of(config)["contexts"] == "captions"
        and own["contexts_sha256"]
        and own["plan_sha256"] != plain["plan_sha256"]
    )
    file.write_text("in the snow\nat night\n")
    config, one = identified(contexts=file)
    assert config.prompts.contexts == ("in the snow", "at night")
    file.write_text("in the snow\nby day\n")
    other = identified(contexts=file)[1]
    differing = {name for name in one if one[name] != other[name]}
    assert differing == {"contexts_sha256"}
    assert arguments_of(config)["contexts"] == str(file)  # recorded, and not compared


def finetuning(captioned, base, output, **flags):
    flags = {"contexts": "captions", "training_templates": "views", "output_dir": output, **flags}
    argv = ["--dataset", f"folder:{captioned}", "--pretrained_model_name_or_path", str(base)]
    return parse([*argv, *(str(word) for name, value in flags.items() for word in (f"--{name}", value))])


@pytest.mark.parametrize("strategy", ["ti_db", "db"])  # encoded with gradients, and without
def test_a_training_image_stands_under_its_own_context(captioned, tiny_base, tmp_path, strategy):
    config, dataset = resolve(finetuning(captioned, tiny_base, tmp_path / "x", finetune_strategy=strategy))
    base, keys = load_base("tiny", tiny_base), dataset.train.keys
    model = TrainedModel(base, config, dataset)
    index = torch.tensor([keys.index(f"train/{name}.png") for name in ("red fox/train000", "blue jay/train000")])
    template = torch.tensor([1, 1])
    captions = model.captions.choose(index, torch.tensor([0.7, 0.7]), template)
    labels = torch.from_numpy(dataset.train.labels)[index]
    conditioning = model.conditioning(model.conditions(labels, template, captions))
    fox, jay = ("<class_1>", "<class_0>") if strategy == "ti_db" else ("red fox", "blue jay")
    prompts = [f"a photo of a {fox} seen from the side, asleep", f"a photo of a {jay} seen from the side"]
    assert model.captions.prompt(int(captions[0])) == prompts[0] and captions[1] == -1  # no caption of its own
    assert torch.allclose(conditioning.hidden, base.encode(prompts, tiny.RESOLUTION).hidden, atol=1e-5)


def test_training_contexts_need_captions_and_stand_for_themselves(image_folder, tiny_base, tmp_path):
    with pytest.raises(
        UserError, match="--contexts captions .*: data set animals-.* has no captions; give it a column"
    ):
        resolve(finetuning(image_folder, tiny_base, tmp_path / "x"))
    with pytest.raises(UserError, match="--contexts captions with --class_prompts_ratio 0.5"):
        finetuning(image_folder, tiny_base, tmp_path / "x", class_prompts_ratio=0.5)
