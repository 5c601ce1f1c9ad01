"""The batched loop against plain diffusers pipelines, on the same noise."""

import diffusers
import pytest
import torch

import tiny
from semantic_aug.diffusion import loop
from semantic_aug.diffusion.base import load_base, read_scheduler_config
from semantic_aug.diffusion.schedulers import SCHEDULERS, SolverSettings, first_step, make_scheduler, scheduler_class
from semantic_aug.errors import UserError
from semantic_aug.seeding import task_rng

TOLERANCE = 1e-4
STRENGTHS = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
PROMPTS = ["a photo of a red fox", "a photo of a toad", "a blue jay", "a dark photo of a bird", "fur", ""]


class Case:
    """Our parts and diffusers' pipelines over the same weights."""

    def __init__(self, folder, settings: SolverSettings):
        self.model, self.settings = load_base(str(folder)), settings
        options = (settings.scheduler, settings.final_sigmas_type, settings.timestep_spacing)
        scheduler = make_scheduler(self.model.scheduler_config, *options)
        self.images = [tiny.picture(i, i, (tiny.RESOLUTION,) * 2) for i in range(len(PROMPTS))]
        self.embeds = self.model.encode(PROMPTS, tiny.RESOLUTION)
        self.sampler = loop.Sampler(self.model.unet, scheduler, self.model.encode_null(tiny.RESOLUTION), settings)

    def pipeline(self, start: int):
        """Diffusers' own, from noise (0) or from an image (1)."""
        kind = getattr(diffusers, self.model.family.pipelines[start])
        return tiny.pipeline(self.model, kind, self.settings.scheduler, self.settings.final_sigmas_type)

    def reference(self, index: int, strength: float | None) -> torch.Tensor:
        """One image the plain way; latents (1, C, h, w)."""
        options = dict(
            prompt=PROMPTS[index],
            num_inference_steps=self.settings.num_inference_steps,
            guidance_scale=self.settings.guidance_scale,
            generator=[task_rng(0, index)],
            output_type="latent",
        )
        if strength is None:
            return self.pipeline(0)(**options, height=tiny.RESOLUTION, width=tiny.RESOLUTION).images
        return self.pipeline(1)(**options, image=self.images[index], strength=strength).images

    def ours(self, indices, strengths) -> torch.Tensor:
        """The same images as one batch of ours."""
        generators = [task_rng(0, i) for i in indices]
        if strengths is None:
            shape = self.model.geometry.latent_shape(tiny.RESOLUTION)
            return loop.generate(self.sampler, shape, self.embeds[indices], generators)
        moments = loop.encode_moments(self.model.vae, loop.to_pixels([self.images[i] for i in indices]))
        factor = self.model.vae.config.scaling_factor
        return loop.translate(self.sampler, moments, factor, self.embeds[indices], strengths, generators)


def assert_equal_to_pipeline(case: Case, indices, strengths):
    got = case.ours(indices, strengths)
    for row, index in enumerate(indices):
        wanted = case.reference(index, None if strengths is None else strengths[row])
        assert torch.isfinite(got[row]).all()
        difference = (got[row] - wanted[0]).abs().max().item()
        assert difference <= TOLERANCE, (index, strengths and strengths[row], difference)


@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("final_sigmas", ["zero", "sigma_min"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_mixed_strengths_in_one_batch_equal_img2img_pipeline(
    tiny_base, tiny_base_v, prediction, final_sigmas, guidance
):
    folder = tiny_base if prediction == "epsilon" else tiny_base_v
    case = Case(folder, SolverSettings(10, guidance, "dpmsolver++", final_sigmas))
    assert_equal_to_pipeline(case, list(range(6)), list(STRENGTHS))


@pytest.mark.parametrize("strength", STRENGTHS)
def test_each_strength_at_25_steps_equals_img2img_pipeline(tiny_base, strength):
    case = Case(tiny_base, SolverSettings(25, 7.5))
    assert_equal_to_pipeline(case, [3, 0], [strength, strength])


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_other_families_equal_their_img2img_pipelines(bases, family):
    case = Case(bases[family], SolverSettings(10, 5.0))
    assert_equal_to_pipeline(case, [0, 1, 2, 5], [0.3, 0.7, 0.9, 1.0])


@pytest.mark.parametrize(("family", "scheduler"), [("sd2", "ddim"), ("sdxl", "euler"), ("sdxl-empty", "dpmsolver++")])
def test_other_families_equal_their_pipelines_from_noise(bases, family, scheduler):
    case = Case(bases[family], SolverSettings(6, 5.0, scheduler))
    assert_equal_to_pipeline(case, [4, 1], None)


@pytest.mark.parametrize("scheduler", ["ddim", "euler_a", "heun", "ddpm", "unipc", "pndm"])
def test_other_schedulers_equal_img2img_pipeline(tiny_base, scheduler):
    case = Case(tiny_base, SolverSettings(8, 4.0, scheduler))
    assert_equal_to_pipeline(case, [0, 1, 2], [0.9, 0.4, 0.9])


@pytest.mark.parametrize("scheduler", ["dpmsolver++", "ddim", "euler"])
@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_generation_from_noise_equals_pipeline(tiny_base, scheduler, guidance):
    case = Case(tiny_base, SolverSettings(6, guidance, scheduler))
    assert_equal_to_pipeline(case, [4, 1, 0], None)


@pytest.mark.parametrize("schedule", ["plain", "zero signal-to-noise", "Karras"])
def test_a_solver_that_gives_known_latents_back_is_accepted(tiny_base, schedule):
    config = read_scheduler_config(tiny_base, "") | {"_class_name": "DDIMScheduler", "timestep_spacing": "leading"}
    config.pop("skip_prk_steps")  # as the configurations of other solvers than PNDM lack it
    names = list(SCHEDULERS)
    if schedule == "zero signal-to-noise":
        zero = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
        config, names = config | zero, ["dpmsolver++", "unipc", "ddim", "euler", "euler_a", "lcm", "tcd"]
    elif schedule == "Karras":
        config, names = config | {"use_karras_sigmas": True}, ["dpmsolver++", "unipc", "euler", "heun"]
    for name in names:
        for steps in (8,) if name == "pndm" else (1, 8):  # a multistep solver of the fourth order
            loop.check_solver(config, SolverSettings(steps, scheduler=name), masked=True)


def test_a_solver_between_whose_half_steps_sources_cannot_be_put_back_is_refused_with_masks(tiny_base):
    config, settings = read_scheduler_config(tiny_base, ""), SolverSettings(25, scheduler="KDPM2DiscreteScheduler")
    loop.check_solver(config, settings)
    with pytest.raises(UserError, match="--scheduler KDPM2DiscreteScheduler with --object_mask: what a mask keeps"):
        loop.check_solver(config, settings, masked=True)


@pytest.mark.parametrize(
    ("scheduler", "steps", "message"),
    [
        ("EDMEulerScheduler", 25, "does not denoise by the base model's noise schedule"),
        ("CogVideoXDDIMScheduler", 25, "does not denoise by the base model's noise schedule"),
        ("DPMSolverMultistepInverseScheduler", 25, "does not denoise by the base model's noise schedule"),
        ("lcm", 51, "--scheduler lcm with 51 steps: .*smaller than `num_inference_steps`"),
    ],
)
def test_a_solver_that_cannot_denoise_these_latents_is_refused(tiny_base, scheduler, steps, message):
    with pytest.raises(UserError, match=message):
        loop.check_solver(read_scheduler_config(tiny_base, ""), SolverSettings(steps, scheduler=scheduler))


def test_a_solver_with_random_numbers_of_its_own_is_refused(tiny_base, monkeypatch):
    class OwnNoiseScheduler(diffusers.EulerAncestralDiscreteScheduler):
        def step(self, model_output, timestep, sample, return_dict=True):
            return super().step(model_output, timestep, sample, return_dict=return_dict)

    monkeypatch.setattr(diffusers, "OwnNoiseScheduler", OwnNoiseScheduler, raising=False)
    with pytest.raises(UserError, match="OwnNoiseScheduler draws random numbers of its own"):
        loop.check_solver(read_scheduler_config(tiny_base, ""), SolverSettings(8, scheduler="OwnNoiseScheduler"))


def test_a_scheduler_whose_package_is_not_installed_is_refused(monkeypatch):
    class Absent(type):
        def __getattr__(cls, name):
            raise ImportError("AbsentScheduler requires the package absent")

    monkeypatch.setattr(diffusers, "AbsentScheduler", Absent("AbsentScheduler", (), {}), raising=False)
    with pytest.raises(UserError, match="--scheduler AbsentScheduler: AbsentScheduler requires the package absent"):
        scheduler_class("AbsentScheduler")


def test_a_sample_does_not_depend_on_its_batch(tiny_base):
    case = Case(tiny_base, SolverSettings(8, 7.5))
    together = case.ours([0, 1, 2, 3], [0.5, 0.9, 0.5, 0.3])
    alone = case.ours([2], [0.5])
    assert (together[2] - alone[0]).abs().max() <= TOLERANCE
    assert (together[2] - together[0]).abs().max() > 0.01  # and samples do differ


def test_decoding_in_micro_batches_equals_the_pipelines_images(tiny_base):
    case = Case(tiny_base, SolverSettings(4, 3.0))
    latents = case.ours([0, 1, 2], [0.8, 0.8, 0.8])
    images = loop.decode_latents(case.model.vae, latents, micro_batch=2)
    pipe = case.pipeline(1)
    wanted = pipe(
        prompt=PROMPTS[1],
        image=case.images[1],
        strength=0.8,
        num_inference_steps=4,
        guidance_scale=3.0,
        generator=[task_rng(0, 1)],
        output_type="np",
    ).images[0]
    assert images.dtype == torch.uint8 and images.shape == (3, tiny.RESOLUTION, tiny.RESOLUTION, 3)
    assert (images[1].float() - torch.from_numpy(wanted * 255).round()).abs().max() <= 1


@pytest.mark.parametrize(("strength", "steps", "start"), [(0.7, 25, 8), (1.0, 25, 0), (0.1, 25, 23), (0.3, 10, 7)])
def test_first_step_follows_diffusers_rule(strength, steps, start):
    assert first_step(steps, strength) == start


def test_a_strength_without_a_step_is_refused():
    with pytest.raises(UserError, match="--aug_strength 0.03 of --num_inference_steps 25 leaves no step"):
        first_step(25, 0.03)
