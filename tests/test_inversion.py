"""Strategies that start from two inverted images: inversion, interpolation, plan, cache, whole subsets."""

import csv
import math
import os
import signal
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from helpers import ROOT, job_of, planned, run_here, same, sampling_arguments, start, subset_contents, wait_for_images
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loop import PROMPTS, Case
from test_plan import LABELS, plan_for

import tiny
from semantic_aug.augmentations.engine import Engine
from semantic_aug.augmentations.model import ModelFiles, Prompts
from semantic_aug.augmentations.strategies import find
from semantic_aug.datasets import Setting, load_dataset
from semantic_aug.datasets.fingerprint import hash_images
from semantic_aug.datasets.images import fit
from semantic_aug.diffusion import inversion, loop
from semantic_aug.diffusion.schedulers import SolverSettings
from semantic_aug.diffusion.text import Conditions
from semantic_aug.errors import UserError
from semantic_aug.sampling.job import Task
from semantic_aug.sampling.plan import repeated_tasks
from semantic_aug.sampling.settings import ImageSettings, build_parser
from semantic_aug.sampling.solver import read_solver
from semantic_aug.sampling.sources import BLOCK, PlannedSources, SourceImages, SourceInversions, block_files
from semantic_aug.sampling.subset import PlannedSubset, describe_cost, plan_of, task_paths, warn_of_repeats
from semantic_aug.sampling.worker import BatchMaker

EMBEDDED = ROOT / "scripts" / "quickstart" / "base"
CLASSES = ("blue jay", "red fox", "toad")


# ------------------------------------------------------------------------------------------------------------ inversion


class Inverted(Case):
    """Parts of a base model, images' mean latents, and their inversions under PROMPTS."""

    def __init__(self, folder, steps: int, rows=(0, 1, 2)):
        super().__init__(folder, SolverSettings(steps, 1.0, "ddim"))
        self.sampler = replace(self.sampler, scheduler=inversion.make_inversion_scheduler(self.model.scheduler_config))
        moments = loop.encode_moments(self.model.vae, loop.to_pixels([self.images[i] for i in rows]))
        self.latents = moments.chunk(2, dim=1)[0] * self.model.vae.config.scaling_factor
        self.prompts = self.embeds[list(rows)]
        self.inverted = inversion.invert(self.sampler, self.latents, self.prompts)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_inversion_equals_diffusers_pipeline_with_its_inverse_scheduler(bases, family):
    case = Inverted(bases[family], 8)
    pipe = tiny.pipeline(case.model, getattr(diffusers, case.model.family.pipelines[0]), "ddim")
    config = {**case.model.scheduler_config, "clip_sample": False, "steps_offset": 1}
    pipe.scheduler = diffusers.DDIMInverseScheduler.from_config(config)
    for row in range(3):
        wanted = pipe(
            prompt=PROMPTS[row], latents=case.latents[row : row + 1], num_inference_steps=8, guidance_scale=1.0,
            height=tiny.RESOLUTION, width=tiny.RESOLUTION, output_type="latent",
        ).images  # fmt: skip
        assert (case.inverted[row] - wanted[0]).abs().max() <= 1e-4
        assert (case.inverted[row] - case.latents[row]).abs().max() > 0.1


@pytest.mark.parametrize(("given", "used"), [("linspace", "leading"), ("trailing", "trailing"), ("leading", "leading")])
def test_denoising_visits_the_inversions_timesteps_backwards(given, used):
    config = {**tiny.NOISE_SCHEDULE, "timestep_spacing": given}
    forward = inversion.make_inversion_scheduler(config)
    backward = diffusers.DDIMInverseScheduler.from_config(forward.config)
    for steps in (7, 25):
        forward.set_timesteps(steps)
        backward.set_timesteps(steps)
        assert forward.timesteps.tolist() == backward.timesteps.tolist()[::-1]
    assert forward.config.timestep_spacing == used
    assert forward.final_alpha_cumprod == backward.initial_alpha_cumprod


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_of_gaussian_data_inversion_and_denoising_are_each_others_inverse(prediction):
    """With the exact denoiser of N(0, 0.6), whose flow is known: noise is data divided by its deviation."""
    scheduler = inversion.make_inversion_scheduler({**tiny.NOISE_SCHEDULE, "prediction_type": prediction})
    data = 0.6 * torch.randn(50, 1, 2, 2, generator=torch.Generator().manual_seed(0))

    def predict(x, t, **_):
        alpha = scheduler.alphas_cumprod[t]
        clean = alpha.sqrt() * 0.36 / (alpha * 0.36 + 1 - alpha) * x
        noise = (x - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        return (noise if prediction == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * clean,)

    sampler = loop.Sampler(predict, scheduler, None, SolverSettings(100, 1.0))
    prompts = Conditions(torch.zeros(50, 1, 1))
    inverted = inversion.invert(sampler, data, prompts)
    torch.testing.assert_close(inverted, data / 0.6, atol=0, rtol=0.02)
    torch.testing.assert_close(loop.denoise(sampler, inverted, prompts), data, atol=0, rtol=0.02)


def test_the_first_phase_has_its_own_prompts_and_ends_at_its_step(tiny_base):
    case, seen = Inverted(tiny_base, 6), []

    def recorded(x, t, encoder_hidden_states, **options):
        seen.append(encoder_hidden_states.clone())
        return case.model.unet(x, t, encoder_hidden_states=encoder_hidden_states, **options)

    sampler, others = replace(case.sampler, unet=recorded), case.embeds[[3, 4, 5]]
    both = loop.denoise(sampler, case.inverted, case.prompts, loop.Opening(others, 2))
    assert [torch.equal(h, others.hidden) for h in seen] == [True] * 2 + [False] * 4
    assert all(torch.equal(h, case.prompts.hidden) for h in seen[2:])
    plain = loop.denoise(case.sampler, case.inverted, case.prompts)
    assert torch.equal(loop.denoise(case.sampler, case.inverted, case.prompts, loop.Opening(others, 0)), plain)
    assert (both - plain).abs().max() > 1e-3


# -------------------------------------------------------------------------------------------------------- interpolation


def test_positions_on_the_circle():
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 4, 8, 8, generator=draw), 1.1 * torch.randn(5, 4, 8, 8, generator=draw)
    torch.testing.assert_close(inversion.on_circle(a, b, [0.0] * 5), a)
    torch.testing.assert_close(inversion.on_circle(a, b, [1.0] * 5), b)
    one, other = (x.flatten(1) / x.flatten(1).norm(dim=1, keepdim=True) for x in (a, b))
    theta = torch.acos((one * other).sum(1))
    t = torch.tensor([0.1, 0.25, 0.5, 0.7, 0.9])
    slerp = (((1 - t) * theta).sin()[:, None] * one + (t * theta).sin()[:, None] * other) / theta.sin()[:, None]
    between = inversion.on_circle(a, b, t.tolist()).flatten(1)
    torch.testing.assert_close(between / between.norm(dim=1, keepdim=True), slerp, atol=1e-5, rtol=0)
    torch.testing.assert_close(between.norm(dim=1), torch.lerp(a.flatten(1).norm(dim=1), b.flatten(1).norm(dim=1), t))
    # Diff-II: any point of the whole circle; the partner is where its angle is, and half the circle is opposite
    shares = (theta / (2 * math.pi)).tolist()
    torch.testing.assert_close(inversion.on_circle(a, b, shares, whole=True), b, atol=1e-4, rtol=0)
    opposite = inversion.on_circle(a, b, [0.5] * 5, whole=True).flatten(1)
    torch.testing.assert_close(opposite / opposite.norm(dim=1, keepdim=True), -one, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        inversion.on_circle(a, a, t.tolist(), whole=True), a
    )  # of equal images there is no plane


def test_the_two_images_come_back_at_both_ends(embedded):
    engine, pictures, labels, decoded = embedded
    latents = engine.invert(engine.encode(pictures), labels)
    pair, classes = (latents[[0, 0]], latents[[1, 1]]), ([labels[0]] * 2, [labels[1]] * 2)
    ends = engine.interpolate(pair, classes, [0.0, 1.0], whole=False)
    assert min(psnr(ends, decoded)) > 30
    between = engine.interpolate((latents[:1], latents[1:]), ([labels[0]], [labels[1]]), [0.5], whole=False)
    assert max(psnr(between.expand(2, -1, -1, -1), decoded)) < 25


@pytest.fixture(scope="module")
def embedded():
    """An engine of the embedded base, two photographs of two classes, their labels, and the autoencoder's own version."""
    data = load_dataset("elpv")
    labels = [0, int(data.train.labels[-1])]
    pictures = [fit(data.train.image(i), 128) for i in (0, len(data.train) - 1)]
    names = Prompts(data.source_names, data.class_names, data.spec.super_class)
    engine = Engine(ModelFiles("embedded", EMBEDDED), names, SolverSettings(10, 1.0, "ddim"), 128)
    means = engine.encode(pictures).chunk(2, dim=1)[0] * engine.vae.config.scaling_factor
    return engine, pictures, labels, loop.decode_latents(engine.vae, means)


def psnr(images, wanted) -> list[float]:
    """Peak signal-to-noise ratio of uint8 images, dB each."""
    error = (images.double() - wanted.double()).square().flatten(1).mean(1)
    return (10 * torch.log10(255**2 / error)).tolist()


# ------------------------------------------------------------------------------------------------------------- the plan


@given(LABELS, st.sampled_from([0.5, 1, 3, 5]), st.integers(0, 3))
@settings(max_examples=80, deadline=None)
def test_every_other_image_of_the_class_takes_its_turn_as_partner(labels, multiplier, seed):
    plan = plan_for(labels, "diff-ii", multiplier=multiplier, seed=seed)
    size = np.bincount(labels)
    assert (labels[plan.partner] == plan.target).all()
    assert ((plan.partner != plan.source) | (size[plan.target] == 1)).all()
    for c in range(5):
        tasks = plan.target == c
        uses = np.bincount(plan.partner[tasks], minlength=len(labels))[labels == c]
        assert uses.max() - uses.min() <= 1
        for image in np.flatnonzero(labels == c):
            partners = np.bincount(plan.partner[plan.source == image], minlength=len(labels))[labels == c]
            partners = partners[np.flatnonzero(labels == c) != image]
            assert len(partners) == 0 or partners.max() - partners.min() <= 1  # all others before one again


@given(LABELS, st.sampled_from([0.5, 1, 5]), st.integers(0, 3), st.sampled_from(["balanced", "independent"]))
@settings(max_examples=80, deadline=None)
def test_partners_of_a_mix_are_images_of_the_target(labels, multiplier, seed, pairing):
    plan = plan_for(labels, "inversion-mix", multiplier=multiplier, seed=seed, pairing=pairing)
    assert (labels[plan.partner] == plan.target).all()
    assert ((plan.partner != plan.source) | (np.bincount(labels)[plan.target] == 1)).all()
    mix = plan_for(labels, "diff-mix", multiplier=multiplier, seed=seed, pairing=pairing)
    assert (plan.source == mix.source).all() and (plan.target == mix.target).all() and plan.digest != mix.digest
    if pairing == "balanced":
        for c in range(5):
            uses = np.bincount(plan.partner[plan.target == c], minlength=len(labels))[labels == c]
            assert uses.max() - uses.min() <= 1


def test_positions_of_diff_ii_go_round_the_circle():
    row = find("diff-ii")
    assert np.allclose(np.diff(row.strengths), 1 / 8) and min(row.strengths) == 1 - max(row.strengths) == 1 / 16


# ------------------------------------------------------------------------------------------------------------ the cache


def test_inversions_are_computed_once_shared_and_named_after_all_that_makes_them(tiny_base, image_folder, tmp_path):
    table = load_dataset(f"folder:{image_folder}").train
    engine = Engine(
        ModelFiles(str(tiny_base), tiny_base),
        Prompts(CLASSES, CLASSES),
        SolverSettings(3, 1.0, "ddim"),
        tiny.RESOLUTION,
    )
    images, rows = SourceImages(table, planned(table)), [17, 0, 5]
    one = SourceInversions(images, engine, "x", tmp_path, memory=1)
    first, broken = one.batch(rows)
    assert not broken and one.encoded == len(table) - BLOCK and first.dtype == torch.float32  # two blocks of three
    two = SourceInversions(images, engine, "x", tmp_path)
    assert torch.equal(two.batch(rows)[0], first) and two.encoded == 0
    picture = fit(table.image(0), tiny.RESOLUTION)
    alone = engine.invert(engine.encode([picture]), [int(table.labels[0])])
    torch.testing.assert_close(first[1], alone[0], atol=1e-4, rtol=0)
    other = engine.invert(engine.encode([picture]), [int(table.labels[17])])
    assert (first[1] - other[0]).abs().max() > 1e-3  # under the prompt of its own class
    relabelled = PlannedSources.of(replace(table, labels=(table.labels + 1) % 3), hash_images(table))
    assert not set(block_files(relabelled, "x")) & set(two.files)


# --------------------------------------------------------------------------------------------------------- whole subsets


@pytest.mark.parametrize("strategy", ["diff-ii", "inversion-mix"])
def test_a_process_makes_what_lies_between_source_and_partner(tiny_base, tmp_path, strategy):
    folder = tiny.write_image_folder(tmp_path / "animals", train=2, val=0, test=1)
    data = load_dataset(f"folder:{folder}", Setting(val_fraction=0))
    job = job_of(
        data, tmp_path, dataset=f"folder:{folder}", model=ModelFiles(str(tiny_base), tiny_base),
        prompts=Prompts(CLASSES, CLASSES, contexts=("in snow",)), solver=SolverSettings(4, 1.0, "ddim"),
        images=ImageSettings(sample_strategy=strategy, resolution=tiny.RESOLUTION, context_steps=0.5),
    )  # fmt: skip
    (folder / "train" / "toad" / "train001.png").write_bytes(b"broken")
    maker = BatchMaker(replace(job, sources=planned(data.train)), "cpu")
    tasks = [
        Task(n, 0, 0, 0.25, f"{n}.png", {}, context=c, partner=p)
        for n, (c, p) in enumerate([(None, 1), (0, 1), (0, 5)])
    ]
    pixels, failures = maker.pixels(tasks)
    assert list(failures) == [2] and "train001.png cannot be decoded" in failures[2]
    latents = maker.sources.batch([0, 1])[0]
    whole = strategy == "diff-ii"
    wanted = maker.engine.interpolate((latents[:1], latents[1:]), ([0], [0]), [0.25], whole=whole)
    assert (pixels[0].int() - wanted[0].int()).abs().max() <= 1
    opening = ([3], [3]), 2  # the prompt of class 0 in snow
    wanted = maker.engine.interpolate((latents[:1], latents[1:]), ([0], [0]), [0.25], whole=whole, opening=opening)
    assert (pixels[1].int() - wanted[0].int()).abs().max() <= 1 and (pixels[1] != pixels[0]).any()


@pytest.mark.slow
@pytest.mark.usefixtures("slow_images")
def test_the_same_files_from_three_processes_and_after_a_kill(workshop, image_folder, tmp_path):
    options = {"sample_strategy": "inversion-mix", "strength_strategy": "uniform"}
    name = "animals/inversion-mix-Multi3-ck-StrengthUniform"
    run_here("sample_mp.py", *sampling_arguments(workshop, image_folder, tmp_path / "a", **options))
    undisturbed = {**subset_contents(tmp_path / "a" / name), "": ""}
    assert len(undisturbed) == 56 and not (tmp_path / "a" / name / ".moments").exists()
    argv = sampling_arguments(workshop, image_folder, tmp_path / "b", gpu_ids=["cpu"] * 2, **options)
    process = start("sample_mp.py", *argv)
    wait_for_images(tmp_path / "b", 4, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert 4 <= len(list((tmp_path / "b").rglob("*.png"))) < 54
    argv = sampling_arguments(workshop, image_folder, tmp_path / "b", gpu_ids=["cpu"] * 3, **options)
    run_here("sample_mp.py", *argv)
    assert same(tmp_path / "b" / name, undisturbed)
    with open(tmp_path / "b" / name / "meta.csv", newline="") as file:
        for row in csv.DictReader(file):
            source, partner = row["Source Image"], row["Partner Image"]
            assert source != partner and partner.split("/")[1] == row["Second Directory"]
            assert source.split("/")[1] == row["First Directory"]


def test_what_cannot_be_inverted_is_refused(animals):
    for flag, value in (
        ("--scheduler", "unipc"), ("--lcm_lora", "x"), ("--few_steps", "4"), ("--eta", "0.5"), ("--eta", "0"),
        ("--final_sigmas_type", "sigma_min"),
    ):  # fmt: skip
        args = build_parser().parse_args(["--dataset", "x", "--sample_strategy", "diff-ii", flag, value])
        with pytest.raises(UserError, match=f"{flag} .*{value} with --sample_strategy diff-ii, which inverts images"):
            read_solver(args)
    with pytest.raises(
        UserError, match="--context_steps 1 with --sample_strategy diff-mix, which has its context in every"
    ):
        ImageSettings(context_steps=1.0)
    with pytest.raises(UserError, match="--object_mask object: the strategy starts from two inverted images"):
        ImageSettings(object_mask="object", sample_strategy="diff-ii")


def test_a_dry_run_counts_the_inversions(animals, tmp_path):
    args = build_parser().parse_args(["--dataset", "x", "--sample_strategy", "inversion-mix", "--guidance_scale", "2"])
    assert read_solver(args) == SolverSettings(25, 2.0, "ddim")
    images = ImageSettings(sample_strategy="inversion-mix", resolution=32, syn_dataset_multiplier=3)
    names = Prompts(CLASSES, CLASSES)
    config = job_of(animals, tmp_path, model=None, prompts=names, solver=read_solver(args), images=images).config
    wanted = "U-Net evaluations: 2,700 to denoise, 450 to invert 18 training images once"
    plan = plan_of(config, animals)
    assert describe_cost(config, plan, 18) == wanted
    few = replace(plan, source=plan.source[:2] * 0, partner=plan.partner[:2] * 0 + 17)  # rows 0 and 17 of 18
    assert describe_cost(config, few, 18).endswith("250 to invert 10 training images once")


@pytest.mark.parametrize(("scheduler", "each"), [("dpmsolver++", 5), ("pndm", 6), ("heun", 9)])
def test_a_dry_run_counts_the_half_steps_of_a_solver(animals, tiny_base, tmp_path, scheduler, each):
    solver, images = SolverSettings(10, 1.0, scheduler), ImageSettings(sample_strategy="real-mix", resolution=32)
    model, names = ModelFiles(str(tiny_base), tiny_base), Prompts(CLASSES, CLASSES)
    config = job_of(animals, tmp_path, model=model, prompts=names, solver=solver, images=images).config
    plan, case, calls = plan_of(config, animals), Case(tiny_base, solver), []
    plan = replace(plan, strengths=(0.5,), strength_code=plan.strength_code * 0)
    assert describe_cost(config, plan, 18) == f"U-Net evaluations: {each * len(plan)} to denoise"

    def unet(noisy, *_, **__):
        calls.append(1)
        return (torch.zeros_like(noisy),)

    case.sampler = replace(case.sampler, unet=unet)
    case.ours([0], [0.5])
    assert len(calls) == each


def test_images_that_repeat_another_are_counted():
    plan = plan_for(np.arange(8), "diff-ii", strengths=find("diff-ii").strengths, multiplier=5)
    assert len(plan) == 40 and repeated_tasks(plan, []) == 32  # each class's image is its own partner
    contexts = np.arange(40) % 2
    distinct = len(set(zip(plan.source.tolist(), contexts.tolist(), strict=True)))
    assert repeated_tasks(plan, [contexts]) == 40 - distinct
    plan = plan_for(np.arange(8) // 2, "diff-ii", strengths=(0.25, 0.75), multiplier=5)
    tasks = set(zip(plan.source.tolist(), plan.partner.tolist(), plan.strength_code.tolist(), strict=True))
    assert 0 < repeated_tasks(plan, []) == 40 - len(tasks)


def test_a_dry_run_warns_of_repeated_images_and_of_classes_with_one(animals, tmp_path, caplog):
    one = replace(animals, train=animals.train.take(np.array([0, 6, 7, 12, 13])))
    images = ImageSettings(sample_strategy="diff-ii", resolution=32, syn_dataset_multiplier=3, context_steps=0.0)
    names, solver = Prompts(CLASSES, CLASSES, contexts=("in snow", "at night")), SolverSettings(25, 1.0, "ddim")
    config = job_of(one, tmp_path, model=None, prompts=names, solver=solver, images=images).config
    plan = plan_of(config, one)
    warn_of_repeats(PlannedSubset(config, one, plan, task_paths(config, one, plan), None, None, {}))
    repeated = repeated_tasks(plan, [])
    assert repeated >= 4 and f"{repeated} of 15 images repeat another one" in caplog.text  # no step has a context
    assert "1 classes have one training image each ('blue jay'), between which and itself diff-ii" in caplog.text
