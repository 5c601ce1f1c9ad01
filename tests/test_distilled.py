"""Distilled models in a few steps: which a model is, what its solver takes, and what strengths become."""

import re

import diffusers
import pytest
import torch
from helpers import sampling_arguments
from test_loop import PROMPTS, TOLERANCE, Case

import sample_mp
import tiny
from semantic_aug.diffusion.distilled import KINDS, effective_strength, kind_of, solver_defaults
from semantic_aug.diffusion.schedulers import SolverSettings, check_strength
from semantic_aug.errors import UserError
from semantic_aug.sampling import config as sampling
from semantic_aug.sampling.job import Weights
from semantic_aug.sampling.settings import ImageSettings
from semantic_aug.sampling.solver import read_solver
from semantic_aug.sampling.subset import plan_of
from semantic_aug.seeding import task_rng

PLAIN = {"_class_name": "PNDMScheduler", "timestep_spacing": "leading"}
TURBO = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}
AUTHORS = {
    "lcm": ("LCMScheduler", {}, {}),
    "tcd": ("TCDScheduler", {}, {"eta": 0.3}),
    "hyper": ("DDIMScheduler", {"timestep_spacing": "trailing"}, {}),
    "hyper-unified": ("TCDScheduler", {}, {"eta": 1.0}),
    "turbo": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, {}),
}
"""The scheduler, its options and those of the pipeline's call, as the models' cards use them."""


@pytest.mark.parametrize("kind", AUTHORS)
def test_few_steps_equal_the_img2img_pipeline_with_the_authors_scheduler(tiny_base, kind):
    settings = SolverSettings(**solver_defaults(kind, 4, None, None, PLAIN))
    case = Case(tiny_base, settings)
    name, options, call = AUTHORS[kind]
    pipe = case.pipeline(1)
    pipe.scheduler = getattr(diffusers, name).from_config(case.model.scheduler_config, clip_sample=False, **options)
    strengths = [0.5, 0.75, 1.0]
    for row, image in enumerate(case.ours([0, 1, 2], strengths)):
        wanted = pipe(
            prompt=PROMPTS[row], image=case.images[row], strength=strengths[row], num_inference_steps=4,
            guidance_scale=0, generator=[task_rng(0, row)], output_type="latent", **call,
        ).images  # fmt: skip
        assert torch.isfinite(image).all() and (image - wanted[0]).abs().max() <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lcm-lora-sdv1-5/pytorch_lora_weights.safetensors", "lcm"),
        ("TCD-SD15-LoRA/pytorch_lora_weights.safetensors", "tcd"),
        ("Hyper-SD15-8steps-lora.safetensors", "hyper"),
        ("Hyper-SDXL-1step-lora.safetensors", "hyper-unified"),
        ("Hyper-SD15-12steps-CFG-lora.safetensors", "hyper-cfg"),
        ("mine.safetensors", None),
    ],
)
def test_a_distilled_lora_is_recognised_by_its_name(tmp_path, name, kind):
    assert kind_of(tmp_path / name, "sd15", TURBO) == kind


def test_a_distilled_lora_is_recognised_by_its_metadata_and_a_base_by_its_scheduler(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "mine.safetensors", {"ss_output_name": "my_TCD_v2"})
    assert kind_of(tmp_path / "mine.safetensors", "sd15", PLAIN) == "tcd"
    assert kind_of(None, "sd15", PLAIN) is None and kind_of(None, "sd15", TURBO) == "turbo"
    assert kind_of(None, "/models/sd-turbo", PLAIN) == "turbo"
    ancestral = {**TURBO, "_class_name": "EulerAncestralDiscreteScheduler"}
    assert solver_defaults("turbo", 1, None, None, ancestral)["scheduler"] == "euler_a"


def test_what_a_distilled_model_cannot_do_is_refused(tmp_path):
    lora = tmp_path / "Hyper-SD15-2steps-lora.safetensors"
    with pytest.raises(UserError, match="--few_steps 4: a model of kind hyper was distilled for at most 2"):
        solver_defaults("hyper", 4, None, lora, PLAIN)
    with pytest.raises(UserError, match="--few_steps 5: a model of kind turbo was distilled for at most 4"):
        solver_defaults("turbo", 5, None, None, TURBO)
    with pytest.raises(UserError, match="--guidance_scale 2: a model of kind turbo takes at most 1"):
        solver_defaults("turbo", 2, 2.0, None, TURBO)
    with pytest.raises(UserError, match="--few_steps 60: a model of kind lcm was distilled for at most 50"):
        solver_defaults("lcm", 60, None, tmp_path / "my-lcm-500-steps.safetensors", PLAIN)
    assert solver_defaults("hyper-cfg", 8, 6.0, None, PLAIN)["guidance_scale"] == KINDS["hyper-cfg"].guidance


def test_strengths_are_the_share_of_the_steps_that_run():
    assert [effective_strength(4, s) for s in (0.3, 0.5, 0.7, 1.0)] == [0.25, 0.5, 0.5, 1.0]
    for steps in range(1, 51):
        for remaining in range(1, steps + 1):
            assert int(steps * effective_strength(steps, (remaining + 0.5) / steps)) == min(remaining, steps)
    with pytest.raises(
        UserError, match="--aug_strength 0.7 of --few_steps 1 leaves no step: .* 2 steps, or .* least 1$"
    ):
        effective_strength(1, 0.7)


def test_the_strength_and_the_steps_that_a_refusal_names_are_accepted():
    for steps in range(1, 1001):
        with pytest.raises(UserError) as refusal:
            check_strength(steps, 1e-6)
        assert int(steps * float(str(refusal.value).rpartition(" ")[2])) >= 1
    for strength in (k / 100 for k in range(1, 100)):
        with pytest.raises(UserError) as refusal:
            check_strength(1, strength)
        check_strength(int(re.search(r"at least (\d+) steps", str(refusal.value))[1]), strength)


@pytest.mark.parametrize(
    ("strategy", "how", "few", "message"),
    [
        ("diff-mix", "fixed", True, "--aug_strength 0.2 of --few_steps 3 .* 5 steps, or an --aug_strength .* 0.334$"),
        ("diff-mix", "uniform", True, "--strength_strategy uniform: strength 0.3 of .* --strength_strategy fixed with"),
        (
            "da-fusion",
            "fixed",
            False,
            "--sample_strategy da-fusion: strength 0.25 of --num_inference_.* least 4 steps$",
        ),
    ],
)
def test_a_refused_strength_names_what_gave_it(strategy, how, few, message):
    with pytest.raises(UserError, match=message):
        images = ImageSettings(sample_strategy=strategy, aug_strength=0.2, strength_strategy=how)
        sampling.choose_strengths(images, 3, few)


def resolved(workshop, image_folder, tmp_path, **flags):
    changes = {"num_inference_steps": None, "config_dir": workshop / "config", **flags}
    argv = sampling_arguments(workshop, image_folder, tmp_path / "out", **changes)
    return sampling.resolve(sample_mp.build_parser().parse_args([str(word) for word in argv]))


def test_the_flags_make_the_solver_and_what_is_recorded(workshop, image_folder, tiny_base, tmp_path):
    lora = tiny.write_lora(tmp_path / "TCD-LoRA.safetensors", tiny_base)
    config, dataset = resolved(workshop, image_folder, tmp_path, few_steps=4, distilled_lora=lora)
    assert config.solver == SolverSettings(4, 1.0, "tcd", eta=0.3) and config.model.extra_lora == lora
    assert config.strengths == (0.5,) and sampling.subset_folder(config, dataset).name.endswith("Strength0.5")
    assert Weights.of(config.model).extra_lora and set(plan_of(config, dataset).strengths) == {0.5}
    config, _ = resolved(workshop, image_folder, tmp_path, few_steps=4, distilled="turbo", strength_strategy="uniform")
    assert sorted(set(config.strengths)) == [0.25, 0.5, 0.75] and config.solver.timestep_spacing == "trailing"
    config, _ = resolved(workshop, image_folder, tmp_path, few_steps=2, lcm_lora=lora, scheduler="ddim")
    assert config.solver == SolverSettings(2, 1.0, "ddim")  # a flag of the user's wins
    assert resolved(workshop, image_folder, tmp_path, lcm_lora=lora)[0].solver == SolverSettings(8, 1.0, "lcm")


def command_line(**flags):
    return sample_mp.build_parser().parse_args(
        ["--dataset", "x", *(w for k, v in flags.items() for w in (f"--{k}", v))]
    )


def test_flags_that_conflict_whatever_the_data_set_are_refused_before_it(tmp_path):
    for flags, message in (
        ({"few_steps": "4", "num_inference_steps": "4"}, "--few_steps and --num_inference_steps both say"),
        ({"few_steps": "4", "sample_strategy": "diff-ii"}, "--few_steps 4 with --sample_strategy diff-ii"),
        ({"few_steps": "4", "scheduler": "dpm"}, "unknown --scheduler 'dpm'"),
        ({"few_steps": "4", "distilled_lora": "/nope/x.safetensors"}, "^--distilled_lora /nope/x.safetensors is not"),
        ({"lcm_lora": str(tmp_path)}, f"^--lcm_lora {tmp_path} holds no"),
        ({"sample_strategy": "diff-ii", "context_steps": "0.1"}, "--context_steps 0.1 goes with --contexts"),
    ):
        with pytest.raises(UserError, match=message):
            sampling.resolve(command_line(**flags))
    args = command_line(sample_strategy="diff-ii")
    args.calibrate = args.dry_run = True
    with pytest.raises(UserError, match="--calibrate with --sample_strategy diff-ii"):
        sampling.resolve(args)


@pytest.mark.parametrize(
    ("scheduler", "ignored"),
    [
        ("ddim", {"final_sigmas_type"}), ("tcd", {"timestep_spacing", "final_sigmas_type"}),
        ("lcm", {"eta", "timestep_spacing", "final_sigmas_type"}), ("dpmsolver++", {"eta"}),
        ("dpmsolver++_single", {"eta", "timestep_spacing"}), ("euler_a", {"eta", "final_sigmas_type"}),
    ],
)  # fmt: skip
def test_settings_that_a_scheduler_ignores_are_refused(scheduler, ignored):
    for option, value in (("eta", "0.5"), ("timestep_spacing", "trailing"), ("final_sigmas_type", "sigma_min")):
        args = command_line(scheduler=scheduler, **{option: value})
        if option not in ignored:
            assert getattr(read_solver(args), option) == getattr(args, option)
            continue
        with pytest.raises(
            UserError, match=re.escape(f"--{option} {value} with --scheduler {scheduler}, which ignores")
        ):
            read_solver(args)


def test_a_distilled_models_settings_go_where_another_scheduler_ignores_them():
    defaults = solver_defaults("tcd", 4, None, None, PLAIN)
    assert read_solver(command_line(few_steps="4", scheduler="euler"), defaults) == SolverSettings(4, 1.0, "euler")
    with pytest.raises(UserError, match="--timestep_spacing trailing with --scheduler tcd, which ignores it"):
        read_solver(command_line(few_steps="4", timestep_spacing="trailing"), defaults)


def test_few_steps_are_refused_before_the_work(workshop, image_folder, tiny_base, tmp_path):
    lora = tiny.write_lora(tmp_path / "mine.safetensors", tiny_base)
    for flags, message in (
        ({"few_steps": 4}, "is no Turbo model; give --distilled_lora FILE, or --distilled KIND"),
        ({"few_steps": 4, "distilled_lora": lora}, "mine.safetensors says neither LCM, TCD nor Hyper-SD"),
        ({"few_steps": 1, "distilled": "turbo"}, "--aug_strength 0.7 of --few_steps 1 leaves no step"),
        ({"few_steps": 4, "distilled": "turbo", "num_inference_steps": 6}, "--few_steps and --num_inference_steps"),
        ({"distilled_lora": lora}, "--distilled_lora goes with --few_steps N"),
        ({"few_steps": 4, "distilled_lora": lora, "lcm_lora": lora}, "give one of them"),
    ):
        with pytest.raises(UserError, match=message):
            resolved(workshop, image_folder, tmp_path, **flags)
