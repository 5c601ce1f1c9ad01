"""Stages 1 and 2 on tiny base models of every family, plain diffusers on what comes out, and what is refused."""

import json
import shutil

import diffusers
import pytest
import torch
from helpers import CLASSES, name_of, run_example, run_here
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tiny
from semantic_aug.augmentations.engine import Engine
from semantic_aug.augmentations.model import ModelFiles, Prompts
from semantic_aug.diffusion import loop, lora, tokens
from semantic_aug.diffusion.base import find_base, load_base, read_geometry, weight_files
from semantic_aug.diffusion.families import FAMILIES
from semantic_aug.diffusion.schedulers import SolverSettings, check_noise_schedule, make_scheduler
from semantic_aug.errors import UserError
from semantic_aug.finetune import checkpoints
from semantic_aug.finetune.config import parse
from semantic_aug.finetune.model import TrainedModel
from semantic_aug.finetune.run import make_accelerator, resolve
from semantic_aug.finetune.run import train as train_request
from semantic_aug.seeding import task_rng

NAMES = Prompts(CLASSES, CLASSES, "animal")
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
    argv = [w for name, v in flags.items() for w in ([f"--{name}"] if v is True else [f"--{name}", str(v)])]
    return resolve(parse(argv))


def train(*arguments, **changes):
    config, dataset = request_of(*arguments, **changes)
    train_request(config, dataset, make_accelerator(config))
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
    assert not any(torch.equal(early[k], wanted[k]) for k in wanted)  # there was something to resume


def test_stage_1_files_cover_every_encoder(trained):
    family, _, folder, _ = trained
    networks = {"unet", "text_encoder"} | ({"text_encoder_2"} if family == "sdxl" else set())
    keys = load_file(folder / FILES[0])
    assert {key.split(".")[0] for key in keys} == networks
    with safe_open(folder / FILES[1], "pt") as content:
        assert json.loads(content.metadata()["diffmix"])["class_names"] == list(CLASSES)
        shapes = {name: tuple(content.get_tensor(name).shape) for name in content.keys()}  # noqa: SIM118
    if family == "sdxl":
        assert shapes == {"clip_l": (3, tiny.XL_WIDTHS[0]), "clip_g": (3, tiny.XL_WIDTHS[1])}
    else:
        assert shapes == {f"<class_{i}>": (40,) for i in range(3)}


def plain_pipeline(family: str, base, folder):
    """Stage 1's files in plain diffusers; of XL by the lines of the page about base models."""
    if family == "sdxl":
        pipe = run_example("base-models", 0, {}, base=base, folder=folder)["pipe"]
    else:
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
        pipe.load_lora_weights(folder)
        pipe.load_textual_inversion([{name: vector} for name, vector in load_file(folder / FILES[1]).items()])
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
        return loop.generate(engine.sampler, engine.latent_shape, engine.prompt_embeds[[1]], [task_rng(1, 1)])

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


def test_the_pooled_prompt_of_xl_is_read_at_the_end_and_not_at_the_class_token(bases):
    model = load_base(str(bases["sdxl"]))
    tokens.install(
        tokens.initial_tokens(CLASSES, CLASSES, "", "class_name", model.tokenizers, model.text_encoders),
        model.tokenizers, model.text_encoders,
    )  # fmt: skip
    pooled = model.encode(["a photo of a <class_0>", "a photo of a <class_0>, in the snow"], 32).added["text_embeds"]
    assert (pooled[0] - pooled[1]).abs().max() > 1e-3


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
        with pytest.raises(UserError, match="is a FluxPipeline, which is not supported: expected Stable Diff"):
            use(altered(bases["sd1"], tmp_path / f"flux{use.__name__}", _class_name="FluxPipeline"))
    refiner = altered(bases["sdxl"], tmp_path / "refiner", text_encoder=[None, None])
    with pytest.raises(UserError, match="has no text_encoder \\(a refiner\\?\\): expected a whole Stable Diffusion XL"):
        read_geometry(refiner)
    (tmp_path / "refiner" / "model_index.json").write_text("[]")
    with pytest.raises(UserError, match="model_index.json cannot be read"):
        read_geometry(refiner)


def test_relatives_with_further_inputs_are_refused():
    unet, vae = tiny._unet(tiny.WIDTH).config, tiny._autoencoder().config
    for family, changed_unet, changed_vae, message in (
        (
            0,
            {"in_channels": 9},
            {},
            "base model 'x': its U-Net takes 9 channels .*inpainting.* expected a plain Stable Diff",
        ),
        (1, {}, {}, "added conditions of the kind None .*refiner.*: expected a plain Stable Diffusion XL"),
        (0, {"class_embed_type": "projection"}, {}, "its U-Net has class_embed_type projection .an unCLIP"),
        (0, {"_class_name": "SD3Transformer2DModel"}, {}, "its U-Net is a SD3Transformer2DModel: expected a plain"),
        (0, {}, {"latents_mean": [0.0] * 4}, "its VAE gives latents_mean"),
        (0, {}, {"_class_name": "AutoencoderTiny"}, "its VAE is a AutoencoderTiny"),
    ):
        with pytest.raises(UserError, match=message):
            FAMILIES[family].check({**unet, **changed_unet}, {**vae, **changed_vae}, "x")
    FAMILIES[0].check(unet, vae, "x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "uses flow matching .scheduler FlowMatchEuler.*not supp"),
        ({"use_flow_sigmas": True}, "uses flow matching"),
        ({"prediction_type": "flow_prediction"}, "uses flow matching"),
        ({"_class_name": "EDMEulerScheduler"}, "uses EDM .scheduler EDMEulerScheduler"),
        ({"sigma_data": 0.5}, "uses EDM"),
        ({"_class_name": "UnCLIPScheduler"}, "another noise process"),
        ({"prediction_type": "sample"}, "prediction type 'sample'"),
        ({"beta_start": None, "beta_schedule": None}, "gives no betas"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr with epsilon prediction"),
    ],
)
def test_other_noise_processes_are_refused_by_both_stages(bases, tmp_path, changes, message):
    folder = shutil.copytree(bases["sd1"], tmp_path / "base")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    for use in (lambda folder: find_base(str(folder)), read_geometry, lambda folder: load_base(str(folder), folder)):
        with pytest.raises(UserError, match=message):
            use(folder)


def test_rescaled_betas_are_followed_or_the_solver_is_refused(bases):
    config = {**load_base(str(bases["sd2"])).scheduler_config, "rescale_betas_zero_snr": True}
    check_noise_schedule(config, "v-prediction")
    assert diffusers.DDPMScheduler.from_config(config).alphas_cumprod[-1] == 0  # what stage 1 trains on
    for solver in ("dpmsolver++", "unipc", "ddim", "euler", "euler_a"):
        assert make_scheduler(config, solver).alphas_cumprod[-1] < 1e-6
    for solver in ("pndm", "heun", "lms"):
        with pytest.raises(UserError, match=f"--scheduler {solver}: it cannot follow .*rescale_betas_zero_snr"):
            make_scheduler(config, solver)


# -------------------------------------------------------------------------------------------------- files of weights


def renamed(base, folder, variant: str, keep: bool = False, parts=("unet", "vae", "text_encoder")):
    """A copy of a base model whose weight files have a variant's name, beside or instead of the plain ones."""
    shutil.copytree(base, folder)
    for part in parts:
        for path in list((folder / part).glob("*.safetensors")):
            (shutil.copy if keep else shutil.move)(path, path.with_suffix(f".{variant}.safetensors"))
    return folder


def same_weights(one, other) -> bool:
    pairs = zip(one.networks.values(), other.networks.values(), strict=True)
    return all(torch.equal(a, b) for x, y in pairs for a, b in zip(x.parameters(), y.parameters(), strict=True))


def test_folders_with_only_a_variant_load(bases, tmp_path):
    wanted = load_base(str(bases["sd1"]))
    for variant in ("fp16", "non_ema"):
        folder = renamed(bases["sd1"], tmp_path / variant, variant)
        assert find_base(str(folder)) == folder and same_weights(load_base(str(folder)), wanted)
        assert f"diffusion_pytorch_model.{variant}.safetensors" in [path.name for path in weight_files(folder)]
    both = renamed(bases["sd1"], tmp_path / "both", "fp16", keep=True)
    for path in both.rglob("*.fp16.safetensors"):
        path.write_bytes(b"")  # would fail if it were read
    assert same_weights(load_base(str(both)), wanted)
    assert [path.name for path in weight_files(both)] == [path.name for path in weight_files(bases["sd1"])]


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_load_and_a_missing_one_is_named(bases, tmp_path, variant):
    wanted, folder = load_base(str(bases["sd1"])), shutil.copytree(bases["sd1"], tmp_path / "base")
    for part, network in (("unet", wanted.unet), ("text_encoder", wanted.text_encoder)):
        for path in (folder / part).glob("*.safetensors"):
            path.unlink()
        network.save_pretrained(folder / part, max_shard_size="60KB", variant=variant)
        assert len(list((folder / part).glob("*-of-*"))) > 1
    assert same_weights(load_base(str(folder)), wanted)
    hashed = [path.name for path in weight_files(folder)]
    shards = sorted((folder / "unet").glob("*-of-*"))
    assert {path.name for path in shards} < set(hashed) and any(".index." in name for name in hashed)
    shards[0].unlink()
    with pytest.raises(UserError, match=f"lists {len(shards)} shards and '{shards[0].name}' is missing"):
        find_base(str(folder))


def test_pickled_weights_are_read_without_running_code(bases, tmp_path):
    wanted, folder = load_base(str(bases["sd1"])), shutil.copytree(bases["sd1"], tmp_path / "base")
    for part, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder", "pytorch_model")):
        (path,) = (folder / part).glob("*.safetensors")
        torch.save(load_file(path), folder / part / f"{stem}.bin")
        path.unlink()
    assert same_weights(load_base(str(folder)), wanted)

    class Evil:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    torch.save({"conv_in.weight": Evil()}, folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="unet cannot be loaded"):
        load_base(str(folder))
    assert not (tmp_path / "ran").exists()


def test_names_of_published_folders_load(bases, tmp_path):
    wanted, folder = load_base(str(bases["sd1"])), shutil.copytree(bases["sd1"], tmp_path / "base")
    (text,) = (folder / "text_encoder").glob("*.safetensors")
    state = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in load_file(text).items()}
    save_file({**state, "text_model.embeddings.position_ids": torch.arange(48)[None]}, text, {"format": "pt"})
    (vae,) = (folder / "vae").glob("*.safetensors")
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(vae)
    for now, before in former.items():
        state = {k.replace(f"attentions.0.{now}.", f"attentions.0.{before}."): v for k, v in state.items()}
    assert any(".query." in key for key in state)
    save_file(state, vae, {"format": "pt"})
    assert same_weights(load_base(str(folder)), wanted)


def test_what_is_missing_or_damaged_is_named(bases, tmp_path):
    def refused(change, message, use=lambda folder: find_base(str(folder))):
        folder = shutil.copytree(bases["sd1"], tmp_path / str(len(list(tmp_path.iterdir()))))
        (path,) = (folder / "unet").glob("*.safetensors")
        change(path)
        with pytest.raises(UserError, match=message) as error:
            use(folder)
        assert "hf download" not in str(error.value)  # of a folder on this machine

    def without(path):
        state = load_file(path)
        del state["conv_in.weight"]
        save_file(state, path, {"format": "pt"})

    def infinite(path):
        state = load_file(path)
        state["conv_out.weight"][0, 0, 0, 0] = float("inf")
        save_file(state, path, {"format": "pt"})

    load = lambda folder: load_base(str(folder))  # noqa: E731
    refused(lambda path: path.unlink(), "no weights in its folder unet .it holds config.json.: expected diffusion_py")
    refused(lambda path: path.write_bytes(path.read_bytes()[:-100]), "diffusion_pytorch_model.safetensors is damaged")
    refused(lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "Git LFS pointer")
    refused(without, "lack 1 tensors .'conv_in.weight' the first.", load)
    refused(infinite, "unet holds values that are not finite .'conv_out.weight'", load)


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
    run_here("train_lora.py", *shared, "--pretrained_model_name_or_path", bases["sdxl"], "--max_train_steps", 2,
        "--train_batch_size", 2, "--rank", 2, "--report_to", "none", "--validation_steps", 2, "--num_validation_images", 1,
        "--train_text_encoder_lora", "--class_prompts_ratio", 0.2, "--num_vectors", 2,
        "--output_dir", tmp_path / "run", "--register_key", "xl")  # fmt: skip
    assert (tmp_path / "run" / "validation" / "step-000002.png").is_file()
    run_here("sample_mp.py", *shared, "--finetune_model_key", "xl", "--sample_strategy", "diff-mix", "--aug_strength", 0.5,
        "--syn_dataset_multiplier", 1, "--num_inference_steps", 4, "--batch_size", 4, "--gpu_ids", "cpu",
        "--output_root", tmp_path / "samples")  # fmt: skip
    folder = tmp_path / "samples" / name_of(images) / "diff-mix-Multi1-xl-Strength0.5"
    assert len(list(folder.rglob("*.png"))) == len((folder / "meta.csv").read_text().splitlines()) - 1 == 6
