"""LoRA and class tokens against diffusers' own loaders, and the files of others."""

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

import tiny
from semantic_aug.augmentations.engine import ModelFiles, load_model
from semantic_aug.diffusion import loop, lora, tokens
from semantic_aug.diffusion.base import load_base
from semantic_aug.diffusion.schedulers import SolverSettings, make_scheduler
from semantic_aug.diffusion.text import class_prompt
from semantic_aug.errors import UserError
from semantic_aug.seeding import task_rng

CLASSES = ("red fox", "blue jay", "toad")


@pytest.fixture(scope="module")
def checkpoint(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    return tiny.write_lora(folder / lora.FILE_NAME, tiny_base), tiny.write_tokens(folder / tokens.FILE_NAME, CLASSES)


def unet_of(base) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(base / "unet").requires_grad_(False)


def run_unet(unet) -> torch.Tensor:
    g = torch.Generator().manual_seed(3)
    x, c = torch.randn(2, 4, 4, 4, generator=g), torch.randn(2, 5, tiny.WIDTH, generator=g)
    with torch.no_grad():
        return unet(x, torch.tensor([500, 20]), c).sample


def test_plain_diffusers_makes_the_same_image_from_our_files(tiny_base, checkpoint):
    lora_file, token_file = checkpoint
    pipe = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)
    pipe.load_lora_weights(lora_file.parent, weight_name=lora_file.name)
    pipe.load_textual_inversion([{name: vector} for name, vector in load_file(token_file).items()])
    pipe.scheduler = make_scheduler(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    wanted = pipe(
        "a photo of a <class_1> bird",
        num_inference_steps=5,
        guidance_scale=5.0,
        generator=[task_rng(1, 1)],
        height=tiny.RESOLUTION,
        width=tiny.RESOLUTION,
        output_type="latent",
    ).images

    model, learned = load_model(ModelFiles(str(tiny_base), tiny_base, lora_file, token_file))
    tokens.install(learned, model.tokenizer, model.text_encoder)
    prompt = class_prompt("blue jay", "blue jay", "bird", learned)
    embeds = model.encode([prompt, ""], tiny.RESOLUTION)
    got = loop.generate(
        loop.plain_denoiser(model.unet),
        make_scheduler(model.scheduler_config),
        model.geometry.latent_shape(tiny.RESOLUTION),
        embeds[:1],
        embeds[1:],
        [task_rng(1, 1)],
        SolverSettings(5, 5.0),
    )
    assert (got - wanted).abs().max() <= 1e-4
    base = load_base(str(tiny_base))
    plain = loop.generate(
        loop.plain_denoiser(base.unet),
        make_scheduler(base.scheduler_config),
        base.geometry.latent_shape(tiny.RESOLUTION),
        embeds[:1],
        embeds[1:],
        [task_rng(1, 1)],
        SolverSettings(5, 5.0),
    )
    assert (got - plain).abs().max() > 0.01  # the LoRA does something


def test_merged_equals_the_adapter_with_alpha(tiny_base, tmp_path):
    unet = unet_of(tiny_base)
    for parameter in lora.add_lora(unet, rank=4, alpha=8):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())) * 0.1
    lora.save_lora(unet, tmp_path / lora.FILE_NAME, alpha=8)
    merged = unet_of(tiny_base)
    count = lora.merge_lora(merged, lora.read_lora(tmp_path), "file")
    assert count == sum(name.endswith(("to_q", "to_k", "to_v")) for name, _ in merged.named_modules()) * 4 // 3
    assert (run_unet(merged) - run_unet(unet)).abs().max() <= 1e-5
    pipe = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)
    pipe.load_lora_weights(tmp_path)
    assert (run_unet(pipe.unet) - run_unet(unet)).abs().max() <= 1e-5  # diffusers applies alpha / rank too


def test_adding_a_lora_leaves_the_output_as_it_was(tiny_base):
    unet = unet_of(tiny_base)
    before = run_unet(unet)
    parameters = lora.add_lora(unet, rank=2)
    assert torch.equal(run_unet(unet), before)
    assert all(p.dtype == torch.float32 for p in parameters)


def test_legacy_attention_processor_bin_loads(tiny_base, checkpoint, tmp_path):
    state = load_file(checkpoint[0])
    legacy = {}
    for key, value in state.items():
        key = key.removeprefix("unet.").replace(".to_out.0.lora", ".to_out.lora")
        for projection in ("to_q", "to_k", "to_v", "to_out"):
            for new, old in (("lora.down", "down"), ("lora.up", "up"), ("lora_A", "down"), ("lora_B", "up")):
                key = key.replace(f".{projection}.{new}.", f".processor.{projection}_lora.{old}.")
        legacy[key] = value
    assert all(".processor.to_" in key for key in legacy)
    torch.save(legacy, tmp_path / "pytorch_model.bin")
    ours, theirs = lora.read_lora(checkpoint[0]), lora.read_lora(tmp_path / "pytorch_model.bin")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k].up, theirs[k].up) and torch.equal(ours[k].down, theirs[k].down) for k in ours)


@pytest.mark.parametrize(
    ("key", "module", "part"),
    [
        (
            "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight",
            "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
            "down",
        ),
        ("mid.attn2.to_out.0.lora.up.weight", "mid.attn2.to_out.0", "up"),
        ("mid.attn2.processor.to_out_lora.up.weight", "mid.attn2.to_out.0", "up"),
        ("unet.mid.attn2.processor.to_k_lora.down.weight", "mid.attn2.to_k", "down"),
        ("mid.attn2.to_v_lora.down.weight", "mid.attn2.to_v", "down"),
        ("unet.mid.proj_in.lora.down.weight", "mid.proj_in", "down"),
        ("base_model.model.mid.to_q.lora_B.default.weight", "mid.to_q", "up"),
        (
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight",
            "text_encoder.encoder.layers.0.self_attn.q_proj",
            "down",
        ),
        (
            "text_encoder_2.text_model.encoder.layers.1.self_attn.to_out_lora.up.weight",
            "text_encoder_2.encoder.layers.1.self_attn.out_proj",
            "up",
        ),
    ],
)
def test_names_of_other_layouts(key, module, part):
    assert lora.normal_name(key) == (module, part)


def test_a_key_that_matches_nothing_is_an_error(tiny_base, checkpoint, tmp_path):
    state = load_file(checkpoint[0])
    state = {key.replace("mid_block", "middle_block"): value for key, value in state.items()}
    save_file(state, tmp_path / "odd.safetensors")
    unet = unet_of(tiny_base)
    before = run_unet(unet)
    with pytest.raises(UserError, match="middle_block.*matches no module"):
        lora.merge_lora(unet, lora.read_lora(tmp_path / "odd.safetensors"), "odd")
    assert torch.equal(run_unet(unet), before)  # nothing was merged half-way


def test_damaged_and_foreign_lora_files(tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0")
    torch.save({"conv.weight": torch.zeros(2)}, tmp_path / "other.bin")
    for name, message in (
        ("cut.safetensors", "cannot be read"),
        ("other.bin", "not a LoRA weight"),
        ("none.bin", "is not there"),
    ):
        with pytest.raises(UserError, match=message):
            lora.read_lora(tmp_path / name)


def test_a_pickle_with_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    torch.save({"learned_embeds_dict": Evil()}, tmp_path / "evil.bin")
    with pytest.raises(UserError):
        tokens.load_tokens(tmp_path / "evil.bin")
    with pytest.raises(UserError):
        lora.read_lora(tmp_path / "evil.bin")
    assert not (tmp_path / "ran").exists()


def test_a_merge_into_half_precision_is_refused(tiny_base, checkpoint):
    with pytest.raises(ValueError, match="before the cast"):
        lora.merge_lora(unet_of(tiny_base).half(), lora.read_lora(checkpoint[0]), "x")


# ---------------------------------------------------------------------------------------------------- class tokens


def test_tokens_survive_a_round_trip(tmp_path):
    path = tiny.write_tokens(tmp_path / "t.safetensors", CLASSES)
    loaded = tokens.load_tokens(path)
    assert loaded.class_names == CLASSES and loaded.names == ("<class_0>", "<class_1>", "<class_2>")
    assert loaded.vectors.shape == (3, tiny.WIDTH) and loaded.base_model == "tiny"
    assert loaded.phrase("toad") == "<class_2>"


def test_several_vectors_per_class():
    learned = tokens.ClassTokens(CLASSES, torch.zeros(6, 4), vectors_per_class=2)
    assert learned.phrase("blue jay") == "<class_1> <class_1_1>"


def test_the_original_implementations_bin_is_read(tmp_path):
    names = {"Red_Fox": "<class_0>", "blue/jay": "<class_1>", "toad": "<class_2>"}
    vectors = {p: torch.full((tiny.WIDTH,), float(i)) for i, p in enumerate(names.values())}
    torch.save(
        {
            "learned_embeds_dict": vectors,
            "name2placeholder": names,
            "placeholder2name": {v: k for k, v in names.items()},
        },
        tmp_path / "learned_embeds-steps-last.bin",
    )
    loaded = tokens.load_tokens(tmp_path / "learned_embeds-steps-last.bin")
    loaded.check_classes(CLASSES, "file")  # spelled differently, the same classes
    assert loaded.phrase("red fox") == "<class_0>" and loaded.vectors[1].eq(1).all()


def test_a_class_without_token_is_an_error():
    learned = tokens.ClassTokens(CLASSES, torch.zeros(3, 4), dataset="animals")
    with pytest.raises(UserError, match="no token for 1 of 2 classes \\('newt'"):
        learned.check_classes(("toad", "newt"), "tokens.safetensors")


def test_tokens_of_another_width_are_refused(tiny_base):
    model = load_base(str(tiny_base))
    with pytest.raises(UserError, match="have 7 values, the base model's text encoder takes 32"):
        tokens.install(tokens.ClassTokens(CLASSES, torch.zeros(3, 7)), model.tokenizer, model.text_encoder)


def test_installed_tokens_change_only_prompts_that_name_them(tiny_base):
    plain, taught = load_base(str(tiny_base)), load_base(str(tiny_base))
    learned = tokens.ClassTokens(CLASSES, torch.randn(3, tiny.WIDTH))
    tokens.install(learned, taught.tokenizer, taught.text_encoder)
    words = ["a photo of a toad", ""]
    assert torch.equal(plain.encode(words, tiny.RESOLUTION).hidden, taught.encode(words, tiny.RESOLUTION).hidden)
    ids = taught.tokenizer("a <class_2> bird").input_ids
    assert len(plain.tokenizer) + 2 in ids and ids.count(len(plain.tokenizer) + 2) == 1


def test_gradients_reach_the_class_vectors_and_nothing_else(tiny_base):
    model = load_base(str(tiny_base))
    vectors = tokens.install(
        tokens.ClassTokens(CLASSES, torch.randn(3, tiny.WIDTH)), model.tokenizer, model.text_encoder, True
    )
    from semantic_aug.diffusion.text import encode_ids, tokenize

    encode_ids(model.text_encoder, tokenize(model.tokenizer, ["a <class_1> bird"])).square().sum().backward()
    assert vectors.grad[1].abs().sum() > 0 and vectors.grad[[0, 2]].abs().sum() == 0
    assert [n for n, p in model.text_encoder.named_parameters() if p.requires_grad] == [
        "embeddings.token_embedding.class_vectors"
    ]


def test_initial_vectors_are_the_mean_of_the_words(tiny_base):
    model = load_base(str(tiny_base))
    table = model.text_encoder.get_input_embeddings().weight
    for initializer, text in (("class_name", "toad"), ("super_class", "small animal"), ("wet stone", "wet stone")):
        made = tokens.initial_tokens(
            ("toad",), ("toad",), "small animal", initializer, model.tokenizer, model.text_encoder
        )
        ids = model.tokenizer(text, add_special_tokens=False).input_ids
        assert torch.allclose(made.vectors[0], table[ids].mean(0))
