"""Stages 1 and 2 on tiny base models of every family, plain diffusers on what comes out, and what is refused."""

import json
import shutil

import diffusers
import pytest
import torch
from helpers import CLASSES, name_of, run
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tiny
import train_lora
from semantic_aug.augmentations.engine import Engine
from semantic_aug.augmentations.request import ClassNames, ModelFiles
from semantic_aug.diffusion import loop, lora, tokens
from semantic_aug.diffusion.base import load_base, read_geometry, weight_files
from semantic_aug.diffusion.schedulers import SolverSettings, make_scheduler
from semantic_aug.errors import UserError
from semantic_aug.finetune import checkpoints, trainer
from semantic_aug.finetune.model import TrainedModel
from semantic_aug.seeding import task_rng

NAMES = ClassNames(CLASSES, CLASSES, "animal")
FILES = (lora.FILE_NAME, tokens.FILE_NAME)


def request_of(base, image_folder, output_dir, **changes):
    """A resolved request for four steps with a text-encoder LoRA, and its data set."""
    flags = {
        "dataset": f"folder:{image_folder}",
        "pretrained_model_name_or_path": base,
        "max_train_steps": 4,
        "train_batch_size": 2,
        "checkpointing_steps": 2,
        "validation_steps": 0,
        "learning_rate": 1e-2,
        "ti_learning_rate": 1e-2,
        "report_to": "none",
        "rank": 2,
        "output_dir": output_dir,
        "train_text_encoder_lora": True,
        **changes,
    }
    words = [w for name, v in flags.items() for w in ([f"--{name}"] if v is True else [f"--{name}", str(v)])]
    return train_lora.resolve(train_lora.build_parser().parse_args(words))


def train(*arguments, **changes):
    config, dataset = request_of(*arguments, **changes)
    trainer.run(config, dataset, trainer.make_accelerator(config))
    return config.output_dir


@pytest.fixture(scope="module", params=["sd2", "sdxl"])
def trained(request, bases, image_folder, tmp_path_factory):
    """(family, base model, output folder, its files) of a run that was not interrupted."""
    base = bases[request.param]
    folder = train(base, image_folder, tmp_path_factory.mktemp("trained") / request.param)
    return request.param, base, folder, ModelFiles(str(base), base, folder / FILES[0], folder / FILES[1])


def weights(folder) -> dict[str, torch.Tensor]:
    return {key: value for name in FILES for key, value in load_file(folder / name).items()}


def test_stage_1_resumes_exactly(trained, image_folder, tmp_path):
    _, base, folder, _ = trained
    resumed = train(base, image_folder, tmp_path / "resumed", resume_from_checkpoint=folder / "checkpoint-2")
    wanted, got = weights(folder), weights(resumed)
    assert wanted.keys() == got.keys() and all(torch.equal(wanted[k], got[k]) for k in wanted)
    early = weights(folder / "checkpoint-2")
    assert not any(torch.equal(early[k], wanted[k]) for k in wanted)  # there was something to go on with


def test_stage_1_files_cover_every_encoder(trained):
    family, _, folder, _ = trained
    networks = {"unet", "text_encoder"} | ({"text_encoder_2"} if family == "sdxl" else set())
    keys = load_file(folder / FILES[0])
    assert {key.split(".")[0] for key in keys} == networks
    with safe_open(folder / FILES[1], "pt") as content:
        assert json.loads(content.metadata()["class_names"]) == list(CLASSES)
        shapes = {name: tuple(content.get_tensor(name).shape) for name in content.keys()}  # noqa: SIM118
    if family == "sdxl":
        assert shapes == {"clip_l": (3, tiny.XL_WIDTHS[0]), "clip_g": (3, tiny.XL_WIDTHS[1])}
    else:
        assert shapes == {f"<class_{i}>": (40,) for i in range(3)}


def plain_pipeline(family: str, base, folder):
    """Stage 1's files in plain diffusers, as the README says."""
    kind = diffusers.StableDiffusionXLPipeline if family == "sdxl" else diffusers.StableDiffusionPipeline
    pipe = kind.from_pretrained(base, **({} if family == "sdxl" else {"safety_checker": None}))
    pipe.load_lora_weights(folder)
    learned = load_file(folder / FILES[1])
    if family == "sdxl":
        with safe_open(folder / FILES[1], "pt") as content:
            names = json.loads(content.metadata()["placeholders"])
        pipe.load_textual_inversion(learned["clip_l"], names, text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer)
        pipe.load_textual_inversion(
            learned["clip_g"], names, text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2
        )
    else:
        pipe.load_textual_inversion([{name: vector} for name, vector in learned.items()])
    pipe.scheduler = make_scheduler(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_plain_diffusers_makes_the_same_image_and_so_does_the_engine(trained):
    family, base, folder, files = trained
    wanted = plain_pipeline(family, base, folder)(
        "a photo of a <class_1> animal",
        num_inference_steps=3,
        guidance_scale=5.0,
        generator=[task_rng(1, 1)],
        height=tiny.RESOLUTION,
        width=tiny.RESOLUTION,
        output_type="latent",
    ).images

    def ours(files):
        engine = Engine(files, NAMES, SolverSettings(3, 5.0), tiny.RESOLUTION)
        assert files.tokens is None or engine.prompts[1] == "a photo of a <class_1> animal"
        shape, embeds = engine.latent_shape, engine.prompt_embeds[[1]]
        return loop.generate(
            engine.denoiser, engine.scheduler, shape, embeds, engine.null_embeds, [task_rng(1, 1)], engine.settings
        )

    assert (ours(files) - wanted).abs().max() <= 1e-4
    state = load_file(files.lora)
    assert (
        ours(ModelFiles(files.name, base, None, files.tokens)) - wanted
    ).abs().max() > 1e-3  # the LoRA does something
    of_unet = folder.parent / f"{family}-unet.safetensors"
    save_file({key: value for key, value in state.items() if key.startswith("unet.")}, of_unet)
    assert (
        ours(ModelFiles(files.name, base, of_unet, files.tokens)) - wanted
    ).abs().max() > 1e-4  # the text encoders' too


def test_stage_2_translates_in_one_batch_as_alone(trained):
    engine = Engine(trained[3], NAMES, SolverSettings(4, 5.0), tiny.RESOLUTION)
    moments = engine.encode([tiny.picture(i, 0, (tiny.RESOLUTION,) * 2) for i in range(2)])
    images = engine.translate(moments, [1, 2], [0.5, 1.0], [task_rng(0, 0), task_rng(0, 1)])
    alone = engine.translate(moments[1:], [2], [1.0], [task_rng(0, 1)])
    assert images.shape == (2, tiny.RESOLUTION, tiny.RESOLUTION, 3)
    assert (images[1].int() - alone[0].int()).abs().max() <= 1


def test_only_lora_and_class_vectors_train(bases, image_folder, tmp_path):
    config, dataset = request_of(bases["sdxl"], image_folder, tmp_path / "x")
    model = TrainedModel(load_base(str(bases["sdxl"])), config, dataset)
    sizes = torch.tensor([[40.0, 36, 0, 2, 32, 32]]).expand(2, -1)
    draw = torch.Generator().manual_seed(0)
    noisy, steps = torch.randn(2, 4, 4, 4, generator=draw), torch.tensor([10, 900])
    prompts = model.conditions(torch.tensor([0, 2]), torch.tensor([0, 1]), None, sizes)
    model(noisy, steps, prompts).square().mean().backward()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "class_vectors" in name for name in trainable)
    assert all(p.grad is None for name, p in model.named_parameters() if name not in trainable)
    assert all(p.grad is not None for p in trainable.values())  # data parallel training waits for every one of them
    reached = {name for name, p in trainable.items() if p.grad.abs().sum() > 0}
    assert {name for name in trainable if "lora_B" in name} <= reached
    assert all(v.grad[[0, 2]].abs().sum() > 0 and v.grad[1].abs().sum() == 0 for v in model.vectors)
    # the first encoder's last layer is not read: a LoRA there would never learn
    assert not any("text_encoders.0.encoder.layers.1" in name for name in trainable)


def test_half_precision_keeps_the_xl_autoencoder_in_float32(bases):
    model = load_base(str(bases["sdxl"])).to("cpu", torch.float16)
    assert model.vae.dtype == torch.float32 and model.unet.dtype == model.text_encoders[1].dtype == torch.float16
    assert load_base(str(bases["sd1"])).to("cpu", torch.float16).vae.dtype == torch.float16


def test_what_xl_is_guided_from_is_part_of_its_identity(bases):
    names = [f"{path.parent.name}/{path.name}" for path in weight_files(bases["sdxl"])]
    assert "sdxl/model_index.json" in names and "text_encoder_2/model.safetensors" in names
    assert "sd1/model_index.json" not in [f"{p.parent.name}/{p.name}" for p in weight_files(bases["sd1"])]


# ------------------------------------------------------------------------------------------------ what is refused


def test_random_crops_are_not_for_a_model_that_is_told_crops(bases, image_folder, tmp_path):
    with pytest.raises(UserError, match="--random_crops.*--crops K"):
        train(bases["sdxl"], image_folder, tmp_path / "x", random_crops=True)


def engine_of(base, lora_path=None, embed_path=None):
    return Engine(ModelFiles(str(base), base, lora_path, embed_path), NAMES, SolverSettings(2), tiny.RESOLUTION)


def xl_tokens(path, widths=tiny.XL_WIDTHS):
    vectors = [torch.zeros(3, width) for width in widths]
    tokens.save_tokens(tokens.ClassTokens(CLASSES, vectors[0], base_model="some/xl", further=(vectors[1],)), path)
    return path


def test_tokens_of_another_family_are_refused(bases, tmp_path):
    with pytest.raises(UserError, match="2 text encoders .*the base model has one text encoder.*some/xl.*embed_path"):
        engine_of(bases["sd1"], embed_path=xl_tokens(tmp_path / "xl.safetensors"))
    one = tiny.write_tokens(tmp_path / "one.safetensors", CLASSES, width=tiny.XL_WIDTHS[0])
    with pytest.raises(UserError, match="vectors for one text encoder, the base model has 2 text encoders"):
        engine_of(bases["sdxl"], embed_path=one)
    with pytest.raises(UserError, match="have 99 values, the base model's text encoder takes 40"):
        engine_of(bases["sdxl"], embed_path=xl_tokens(tmp_path / "wide.safetensors", (tiny.XL_WIDTHS[0], 99)))


def text_lora(path, component: str, width: int):
    stem = f"{component}.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer"
    save_file({f"{stem}.down.weight": torch.ones(2, width), f"{stem}.up.weight": torch.ones(width, 2)}, path)
    return path


def test_a_lora_of_another_text_encoder_is_refused(bases, tmp_path):
    with pytest.raises(
        UserError, match=r"shape \(77, 77\), the text encoder's is \(32, 32\): it was trained on another"
    ):
        engine_of(bases["sd1"], text_lora(tmp_path / "wide.safetensors", "text_encoder", 77))
    with pytest.raises(
        UserError, match="matches no module of the second text encoder, which the base model does not have"
    ):
        engine_of(bases["sd1"], text_lora(tmp_path / "xl.safetensors", "text_encoder_2", 40))
    deep = load_file(text_lora(tmp_path / "deep.safetensors", "text_encoder", 32))
    save_file({k.replace("layers.0", "layers.9"): v for k, v in deep.items()}, tmp_path / "deep.safetensors")
    with pytest.raises(UserError, match="layers.9.self_attn.q_proj' matches no module of the text encoder: it was"):
        engine_of(bases["sd1"], tmp_path / "deep.safetensors")


def altered(base, folder, **changes):
    """A copy of a base model with another model_index.json."""
    shutil.copytree(base, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **changes}))
    return folder


def test_pipelines_of_other_kinds_are_refused(bases, tmp_path):
    for use in (read_geometry, lambda folder: load_base(str(folder))):
        with pytest.raises(UserError, match="unknown pipeline of base model .* 'FluxPipeline': did you mean"):
            use(altered(bases["sd1"], tmp_path / f"flux{use.__name__}", _class_name="FluxPipeline"))
    refiner = altered(bases["sdxl"], tmp_path / "refiner", text_encoder=[None, None])
    with pytest.raises(UserError, match="has no text_encoder \\(a refiner\\?\\): expected a whole Stable Diffusion XL"):
        read_geometry(refiner)
    (tmp_path / "refiner" / "model_index.json").write_text("[]")
    with pytest.raises(UserError, match="model_index.json cannot be read"):
        read_geometry(refiner)


def test_relatives_with_further_inputs_are_refused():
    from semantic_aug.diffusion.families import FAMILIES

    inpainting, vae = tiny._unet(tiny.WIDTH, in_channels=9), tiny._autoencoder()
    with pytest.raises(UserError, match="base model 'x': its U-Net takes 9 channels .* expected a plain Stable Diff"):
        FAMILIES[0].check(inpainting, vae, "x")
    with pytest.raises(UserError, match="added conditions of the kind None: expected a plain Stable Diffusion XL"):
        FAMILIES[1].check(tiny._unet(tiny.WIDTH), vae, "x")
    with pytest.raises(UserError, match="its VAE gives latents_mean"):
        FAMILIES[0].check(tiny._unet(tiny.WIDTH), tiny._autoencoder(latents_mean=(0.0,) * 4), "x")


def test_a_text_encoder_lora_without_a_lora_is_refused(bases, image_folder, tmp_path):
    with pytest.raises(UserError, match="--train_text_encoder_lora with --finetune_strategy ti"):
        request_of(bases["sd1"], image_folder, tmp_path / "x", finetune_strategy="ti")


def test_a_checkpoint_of_another_shape_is_refused(trained, image_folder, tmp_path):
    _, base, folder, _ = trained
    config, dataset = request_of(base, image_folder, tmp_path / "x", rank=3)
    with pytest.raises(UserError, match="does not fit this run: .* was --rank changed"):
        checkpoints.load_weights(TrainedModel(load_base(str(base)), config, dataset), folder)


@pytest.mark.slow
def test_both_stages_from_the_command_line_with_xl_and_captions(bases, tmp_path):
    images, config = tiny.write_image_folder(tmp_path / "animals", train=2), tmp_path / "config"
    (images / "train" / "metadata.csv").write_text("file_name,caption\ntoad/train000.png,wet\n")
    shared = ["--dataset", f"folder:{images}", "--config_dir", config]
    run("train_lora.py", *shared, "--pretrained_model_name_or_path", bases["sdxl"], "--max_train_steps", 2,
        "--train_batch_size", 2, "--rank", 2, "--report_to", "none", "--validation_steps", 2, "--num_validation_images", 1,
        "--train_text_encoder_lora", "--class_prompts_ratio", 0.2, "--num_vectors", 2,
        "--output_dir", tmp_path / "run", "--register_key", "xl")  # fmt: skip
    assert (tmp_path / "run" / "validation" / "step-000002.png").is_file()
    run("sample_mp.py", *shared, "--finetune_model_key", "xl", "--sample_strategy", "diff-mix", "--aug_strength", 0.5,
        "--syn_dataset_multiplier", 1, "--num_inference_steps", 4, "--batch_size", 4, "--gpu_ids", "cpu",
        "--output_root", tmp_path / "samples")  # fmt: skip
    folder = tmp_path / "samples" / name_of(images) / "diff-mix-Multi1-xl-Strength0.5"
    assert len(list(folder.rglob("*.png"))) == len((folder / "meta.csv").read_text().splitlines()) - 1 == 6
