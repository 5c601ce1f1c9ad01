"""LoRA and class tokens against diffusers' own loaders, and the files of others."""

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tiny
from semantic_aug.augmentations.engine import ModelFiles, load_model
from semantic_aug.diffusion import loop, lora, lora_files, tokens
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
    tokens.install(learned, model.tokenizers, model.text_encoders)
    prompt = class_prompt("blue jay", "blue jay", "bird", learned)
    embeds = model.encode([prompt, ""], tiny.RESOLUTION)
    got = loop.generate(
        loop.Sampler(model.unet, make_scheduler(model.scheduler_config), embeds[1:], SolverSettings(5, 5.0)),
        model.geometry.latent_shape(tiny.RESOLUTION),
        embeds[:1],
        [task_rng(1, 1)],
    )
    assert (got - wanted).abs().max() <= 1e-4
    base = load_base(str(tiny_base))
    plain = loop.generate(
        loop.Sampler(base.unet, make_scheduler(base.scheduler_config), embeds[1:], SolverSettings(5, 5.0)),
        base.geometry.latent_shape(tiny.RESOLUTION),
        embeds[:1],
        [task_rng(1, 1)],
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
    assert lora_files.normal_name(key) == (module, part)


def test_a_key_that_matches_nothing_is_an_error(tiny_base, checkpoint, tmp_path):
    state = load_file(checkpoint[0])
    state = {key.replace("mid_block", "middle_block"): value for key, value in state.items()}
    save_file(state, tmp_path / "odd.safetensors")
    unet = unet_of(tiny_base)
    before = run_unet(unet)
    with pytest.raises(UserError, match="middle_block.*matches no module"):
        lora.merge_into({"unet": unet}, lora.read_lora(tmp_path / "odd.safetensors"), "odd")
    assert torch.equal(run_unet(unet), before)  # nothing was merged half-way


def kohya_lora(networks, flat, seed=0):
    """A random LoRA under kohya's names with alphas that are not the ranks, of linear layers and convolutions."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for stem, network, name in flat:
        weight, rank = network.get_submodule(name).weight, 2
        inner = weight.shape[1:]
        state[f"{stem}.lora_down.weight"] = torch.randn(rank, *inner, generator=generator) * 0.1
        state[f"{stem}.lora_up.weight"] = torch.randn(
            weight.shape[0], rank, *[1] * (len(inner) - 1), generator=generator
        )
        state[f"{stem}.alpha"] = torch.tensor(3.0)
    return {key: value.half() for key, value in state.items()}


def merged_by_diffusers(kind, base, path):
    pipe = kind.from_pretrained(base, **({"safety_checker": None} if kind is StableDiffusionPipeline else {}))
    pipe.load_lora_weights(path.parent, weight_name=path.name)
    pipe.fuse_lora(components=[c for c in ("unet", "text_encoder", "text_encoder_2") if getattr(pipe, c, None)])
    pipe.unload_lora_weights()
    return pipe


def check_against_diffusers(kind, base, path):
    """Our merge of a file and diffusers' own give the same weights in every network, other than the base model's."""
    pipe, model, plain = merged_by_diffusers(kind, base, path), load_base(str(base)), load_base(str(base))
    lora.check_lora(path, base)
    lora.merge_into(model.networks, lora.read_lora(path), str(path))
    changed = 0
    for component, network in model.networks.items():
        wanted = {name.removeprefix("text_model."): p for name, p in getattr(pipe, component).named_parameters()}
        before = dict(plain.networks[component].named_parameters())
        for name, weight in network.named_parameters():
            assert (weight - wanted[name.removeprefix("text_model.")]).abs().max() <= 1e-5, name
            changed += bool((weight - before[name]).abs().max() > 1e-3)
    return changed


def test_kohyas_files_are_merged_as_diffusers_does(bases, tmp_path):
    model = load_base(str(bases["sd1"]))
    names = [n for n, _ in model.unet.named_modules() if n.endswith(("attn1.to_q", "to_out.0", "proj_in", "ff.net.2"))]
    names += ["down_blocks.0.resnets.0.conv1", "mid_block.resnets.0.time_emb_proj"]
    flat = [(f"lora_unet_{n.replace('.', '_')}", model.unet, n) for n in names]
    for projection in ("q_proj", "out_proj"):
        text = next(n for n, _ in model.text_encoder.named_modules() if n.endswith(f"layers.1.self_attn.{projection}"))
        flat.append((f"lora_te_text_model_encoder_layers_1_self_attn_{projection}", model.text_encoder, text))
    save_file(kohya_lora(model.networks, flat), tmp_path / "kohya.safetensors")
    assert check_against_diffusers(StableDiffusionPipeline, bases["sd1"], tmp_path / "kohya.safetensors") == len(flat)


def test_kohyas_names_of_xl_are_those_of_the_original_implementation(bases, tmp_path):
    model = load_base(str(bases["sdxl"]))
    pairs = {
        "input_blocks_3_1_transformer_blocks_0_attn1_to_q": "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
        "input_blocks_2_0_op": "down_blocks.0.downsamplers.0.conv",
        "middle_block_1_proj_in": "mid_block.attentions.0.proj_in",
        "middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
        "output_blocks_1_1_transformer_blocks_1_attn2_to_k": "up_blocks.0.attentions.1.transformer_blocks.1.attn2.to_k",
        "output_blocks_2_0_skip_connection": "up_blocks.1.resnets.0.conv_shortcut",
        "output_blocks_1_2_conv": "up_blocks.0.upsamplers.0.conv",
    }
    assert {k: lora_files.flat_names(model.networks)[f"lora_unet_{k}"] for k in pairs} == pairs
    flat = [(f"lora_unet_{k}", model.unet, n) for k, n in pairs.items() if "upsamplers" not in n]
    for stem, encoder in (("lora_te1", model.text_encoders[0]), ("lora_te2", model.text_encoders[1])):
        text = next(n for n, _ in encoder.named_modules() if n.endswith("layers.0.mlp.fc1"))
        flat.append((f"{stem}_text_model_encoder_layers_0_mlp_fc1", encoder, text))
    save_file(kohya_lora(model.networks, flat), tmp_path / "xl.safetensors")
    assert check_against_diffusers(StableDiffusionXLPipeline, bases["sdxl"], tmp_path / "xl.safetensors") == len(flat)


@pytest.mark.parametrize("rslora", [False, True])
def test_pefts_folders_are_merged_at_the_scale_they_were_trained_at(tiny_base, tmp_path, rslora):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4,
        lora_alpha=16,
        use_rslora=rslora,
        target_modules=["to_q", "to_k", "conv1"],
        rank_pattern={"attn2.to_k": 2},
        alpha_pattern={"attn1.to_q": 3, "mid_block.*to_k": 5},
    )
    adapted = get_peft_model(unet_of(tiny_base), config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1
    adapted.save_pretrained(tmp_path / "adapter")
    wanted, got = adapted.merge_and_unload(), unet_of(tiny_base)
    lora.check_lora(tmp_path / "adapter", tiny_base)
    lora.merge_into({"unet": got}, lora.read_lora(tmp_path / "adapter"), "adapter")
    for (name, a), (_, b) in zip(got.named_parameters(), wanted.named_parameters(), strict=True):
        assert (a - b).abs().max() <= 1e-5, name
    scales = {pair.scale for pair in lora.read_lora(tmp_path / "adapter").values()}
    assert len(scales) >= 4  # the patterns took effect
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="saved by PEFT; its scale is in .*adapter_config.json, which cannot be read"):
        lora.read_lora(tmp_path / "adapter")


def test_scales_in_diffusers_metadata_are_followed(tiny_base, tmp_path):
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)
    options = dict(
        use_rslora=True, target_modules=["to_q", "to_k"], alpha_pattern={"attn1.to_q": 7}, rank_pattern={"to_k": 2}
    )
    pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=6, **options))
    for name, parameter in pipe.unet.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(pipe.unet),
        unet_lora_adapter_metadata=pipe.unet.peft_config["default"].to_dict(),
    )
    assert check_against_diffusers(StableDiffusionPipeline, tiny_base, tmp_path / lora.FILE_NAME) > 0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["lora_unet_mid.hada_w1_a"], "the format LoHa"),
        (["lora_unet_mid.lokr_w1"], "the format LoKr"),
        (["lora_unet_mid.lora_down.weight", "lora_unet_mid.dora_scale"], "the format DoRA"),
        (["unet.mid.to_q.lora_magnitude_vector"], "the format DoRA"),
        (["lora_unet_mid.lora_mid.weight"], "Tucker"),
        (["lora_unet_mid.diff"], "the format full weight differences"),
        (["unet.mid.to_q.lora_B.bias"], "LoRA with a bias"),
        (["transformer.blocks.0.to_q.lora_A.weight"], "a diffusion transformer"),
        (["lora_unet_double_blocks_0_img_attn_proj.lora_down.weight"], "a diffusion transformer"),
    ],
)
def test_other_formats_are_refused_by_name(tmp_path, keys, message):
    save_file({key: torch.ones(2, 2) for key in keys}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=message) as error:
        lora.read_lora(tmp_path / "x.safetensors")
    assert "another base model" not in str(error.value)


@pytest.mark.parametrize("stem", ["mid.to_q", "unet.mid.processor.to_q_lora", "mid.to_q_lora", "unet.mid.to_q.lora"])
def test_an_alpha_scales_its_weights_under_any_of_their_names_or_is_refused(tmp_path, stem):
    state = {f"{stem}.{part}.weight": torch.ones(2, 2) for part in ("down", "up")}
    save_file(state | {f"{stem}.alpha": torch.tensor(1.0)}, tmp_path / "x.safetensors")
    assert {name: pair.scale for name, pair in lora.read_lora(tmp_path / "x.safetensors").items()} == {"mid.to_q": 0.5}
    save_file(state | {"mid.to_k.alpha": torch.tensor(1.0)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="scales 'mid.to_k' by an alpha and holds no weights of it"):
        lora.read_lora(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "LOHA"}, "adapter of the kind LOHA"),
        ({"use_dora": True}, "use_dora = True"),
        ({"modules_to_save": ["conv_out"]}, "modules_to_save"),
        ({"bias": "all"}, "bias = all"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = pissa"),
        ({"r": 8}, "has rank 2, its settings say 8"),
        ({"alpha_pattern": {"(": 1}}, "cannot be read"),
    ],
)
def test_pefts_settings_that_change_more_are_refused(tmp_path, settings, message):
    save_file(
        {f"base_model.model.mid.to_q.lora_{x}.weight": torch.ones(2, 2) for x in "AB"},
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4} | settings))
    with pytest.raises(UserError, match=message):
        lora.read_lora(tmp_path)


def test_values_that_are_not_finite_are_refused_by_file_and_tensor(tiny_base, checkpoint, tmp_path):
    for source, read, name in (
        (checkpoint[0], lora.read_lora, "LoRA"),
        (checkpoint[1], tokens.load_tokens, "class tokens"),
    ):
        state = load_file(source)
        with safe_open(source, "pt") as content:
            metadata = content.metadata()
        key = sorted(state)[1]
        state[key].view(-1)[0] = float("nan")
        save_file(state, tmp_path / source.name, metadata)
        with pytest.raises(UserError, match=f"{name} .*{source.name}.* not finite .'{key}'"):
            read(tmp_path / source.name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_lora_in_low_precision_is_read(checkpoint, tmp_path, dtype):
    whole = load_file(checkpoint[0])
    save_file({name: value.to(dtype) for name, value in whole.items()}, tmp_path / "low.safetensors")
    pairs, wanted = lora.read_lora(tmp_path / "low.safetensors"), lora.read_lora(checkpoint[0])
    assert pairs.keys() == wanted.keys() and all(pair.down.dtype == torch.float32 for pair in pairs.values())
    assert all(torch.equal(pairs[name].up, wanted[name].up.to(dtype).float()) for name in wanted)


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


@pytest.mark.parametrize(
    ("down", "up", "alpha"),
    [((), (4, 2), ()), ((0, 4), (4, 0), ()), ((2,), (4, 2), ()), ((2, 4), (4,), ()), ((2, 4), (4, 2), (3,))],
)
def test_weights_and_alphas_of_impossible_shapes_are_refused(tmp_path, down, up, alpha):
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {"lora_down.weight": torch.zeros(down), "lora_up.weight": torch.zeros(up), "alpha": torch.ones(alpha)}
    save_file({f"{stem}.{name}": value for name, value in tensors.items()}, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=rf"'{stem}.* has the shape .*, which is not that of a LoRA weight"):
        lora.read_lora(tmp_path / "lora.safetensors")


def test_settings_of_another_layout_are_refused(tmp_path):
    tensors = {"unet.mid_block.x.lora_A.weight": torch.zeros(2, 4), "unet.mid_block.x.lora_B.weight": torch.zeros(4, 2)}
    settings = {"unet.r": 2, "unet.lora_alpha": 4, "unet.alpha_pattern": ["x"]}
    save_file(tensors, tmp_path / "lora.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
    with pytest.raises(UserError, match="its settings for mid_block.x cannot be read"):
        lora.read_lora(tmp_path / "lora.safetensors")


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
        lora.merge_into({"unet": unet_of(tiny_base).half()}, lora.read_lora(checkpoint[0]), "x")


# ---------------------------------------------------------------------------------------------------- class tokens


def test_tokens_survive_a_round_trip(tmp_path):
    path = tiny.write_tokens(tmp_path / "t.safetensors", CLASSES)
    loaded = tokens.load_tokens(path)
    assert loaded.class_names == CLASSES and loaded.names == ("<class_0>", "<class_1>", "<class_2>")
    assert loaded.vectors.shape == (3, tiny.WIDTH) and loaded.base_model == "tiny"
    assert loaded.phrase("toad") == "<class_2>"


def test_tokens_of_earlier_versions_are_read(tmp_path):
    """They had an entry for each value in the header."""
    state = load_file(tiny.write_tokens(tmp_path / "t.safetensors", CLASSES))
    metadata = {
        "class_names": json.dumps(CLASSES),
        "placeholders": json.dumps(sorted(state)),
        "vectors_per_class": "1",
        "base_model": "tiny",
        "dataset": "5",
        "images": "",
    }
    save_file(state, tmp_path / "old.safetensors", metadata)
    new, old = (tokens.load_tokens(tmp_path / f"{name}.safetensors") for name in ("t", "old"))
    assert torch.equal(old.vectors, new.vectors) and old.dataset == "5"
    assert (old.class_names, old.names, old.vectors_per_class) == (new.class_names, new.names, 1)


@pytest.mark.parametrize(
    ("tensors", "per_class"),
    [
        ({"clip_l": (3, 4), "clip_g": (3, 5)}, 1),
        ({"<class_0>": (4,), "<class_1>": (4,)}, 2),
        ({"<class_0>": (), "<class_1>": ()}, 1),
    ],
)
def test_tokens_that_do_not_belong_to_their_classes_are_damaged(tmp_path, tensors, per_class):
    metadata = {
        "class_names": ["a", "b"], "placeholders": ["<class_0>", "<class_1>"], "vectors_per_class": per_class
    }  # fmt: skip
    values = {name: torch.zeros(shape) for name, shape in tensors.items()}
    save_file(values, tmp_path / "tokens.safetensors", {"diffmix": json.dumps(metadata)})
    with pytest.raises(UserError, match="class tokens .* are damaged .*placeholders"):
        tokens.load_tokens(tmp_path / "tokens.safetensors")


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
    loaded = loaded.for_classes(CLASSES, CLASSES, "file")  # spelled differently, the same classes
    assert loaded.class_names == CLASSES and loaded.phrase("red fox") == "<class_0>" and loaded.vectors[1].eq(1).all()


def test_a_class_without_token_is_an_error():
    learned = tokens.ClassTokens(CLASSES, torch.zeros(3, 4), dataset="animals")
    with pytest.raises(UserError, match="no token for 1 of 2 classes \\('newt'"):
        learned.for_classes(("toad", "newt"), ("toad", "newt"), "tokens.safetensors")


def test_tokens_of_another_width_are_refused(tiny_base):
    model = load_base(str(tiny_base))
    with pytest.raises(UserError, match="have 7 values, the base model's text encoder takes 32"):
        tokens.install(tokens.ClassTokens(CLASSES, torch.zeros(3, 7)), model.tokenizers, model.text_encoders)


def test_installed_tokens_change_only_prompts_that_name_them(tiny_base):
    plain, taught = load_base(str(tiny_base)), load_base(str(tiny_base))
    learned = tokens.ClassTokens(CLASSES, torch.randn(3, tiny.WIDTH))
    tokens.install(learned, taught.tokenizers, taught.text_encoders)
    argv = ["a photo of a toad", ""]
    assert torch.equal(plain.encode(argv, tiny.RESOLUTION).hidden, taught.encode(argv, tiny.RESOLUTION).hidden)
    ids = taught.tokenizer("a <class_2> bird").input_ids
    assert len(plain.tokenizer) + 2 in ids and ids.count(len(plain.tokenizer) + 2) == 1


def test_gradients_reach_the_class_vectors_and_nothing_else(tiny_base):
    model = load_base(str(tiny_base))
    learned = tokens.ClassTokens(CLASSES, torch.randn(3, tiny.WIDTH))
    (vectors,) = tokens.install(learned, model.tokenizers, model.text_encoders, True)
    from semantic_aug.diffusion.text import tokenize

    model.text_encoder(tokenize(model.tokenizer, ["a <class_1> bird"]))[0].square().sum().backward()
    assert vectors.grad[1].abs().sum() > 0 and vectors.grad[[0, 2]].abs().sum() == 0
    assert [n for n, p in model.text_encoder.named_parameters() if p.requires_grad] == [
        "embeddings.token_embedding.class_vectors"
    ]


def test_initial_vectors_are_the_mean_of_the_words(tiny_base):
    model = load_base(str(tiny_base))
    table = model.text_encoder.get_input_embeddings().weight
    for initializer, text in (("class_name", "toad"), ("super_class", "small animal"), ("wet stone", "wet stone")):
        created = tokens.initial_tokens(
            ("toad",), ("toad",), "small animal", initializer, model.tokenizers, model.text_encoders
        )
        ids = model.tokenizer(text, add_special_tokens=False).input_ids
        assert torch.allclose(created.vectors[0], table[ids].mean(0))
