"""The converter: stage 1's files in the original implementation's layout and back, read alike by everything."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers import CLASSES
from safetensors.torch import load_file, save_file

import tiny
from semantic_aug.diffusion import convert, lora, tokens
from semantic_aug.errors import UserError, run_main


@pytest.fixture
def checkpoint(tiny_base, tmp_path):
    """A LoRA with a scale of two, and class tokens."""
    unet = UNet2DConditionModel.from_pretrained(tiny_base / "unet").requires_grad_(False)
    generator = torch.Generator().manual_seed(5)
    for parameter in lora.add_lora(unet, rank=2, alpha=4):
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    lora.save_lora(unet, tmp_path / "ours" / lora.FILE_NAME, alpha=4)
    return tmp_path / "ours" / lora.FILE_NAME, tiny.write_tokens(tmp_path / "ours" / tokens.FILE_NAME, CLASSES)


def updates(path) -> dict[str, torch.Tensor]:
    return {name: pair.scale * pair.up @ pair.down for name, pair in lora.read_lora(path).items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[key], b[key], atol=1e-7) for key in a)


def test_to_the_originals_layout_and_back(checkpoint, tmp_path, capsys):
    original, back = tmp_path / "original", tmp_path / "back"
    argv = ["--lora_path", str(checkpoint[0]), "--embed_path", str(checkpoint[1]), "--output_dir", str(original)]
    assert convert.main([*argv, "--step", "35000"]) == 0
    names = ["pytorch_lora_weights.safetensors", "checkpoint-35000/pytorch_model.bin"]
    names += ["learned_embeds-steps-last.bin", "learned_embeds-steps-35000.bin"]
    assert capsys.readouterr().out.split() == [str(original / name) for name in names]
    state = torch.load(original / names[1], weights_only=True)
    assert "mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.up.weight" in state
    assert all(".processor.to_" in key for key in state) and state.keys() == load_file(original / names[0]).keys()
    content = torch.load(original / names[2], weights_only=True)
    assert content["name2placeholder"] == {name: f"<class_{i}>" for i, name in enumerate(CLASSES)}
    assert content["placeholder2name"]["<class_1>"] == CLASSES[1]
    assert content["learned_embeds_dict"]["<class_2>"].shape == (tiny.WIDTH,)

    lora_path = original / "checkpoint-35000"  # the registry's lora_path may name a folder
    convert.main(["--lora_path", str(lora_path), "--embed_path", str(original / names[2]), "--output_dir", str(back),
                  "--layout", "diffusers"])  # fmt: skip
    assert all(same(updates(checkpoint[0]), updates(folder)) for folder in (original, lora_path, back))
    first, last = tokens.load_tokens(checkpoint[1]), tokens.load_tokens(back / tokens.FILE_NAME)
    assert torch.equal(first.vectors, last.vectors) and first.names == last.names and last.class_names == CLASSES


def test_both_layouts_load_in_plain_diffusers_alike(checkpoint, tiny_base, tmp_path):
    from diffusers import StableDiffusionPipeline

    draw = torch.Generator().manual_seed(3)
    x, c = torch.randn(1, 4, 4, 4, generator=draw), torch.randn(1, 5, tiny.WIDTH, generator=draw)
    created = []
    for layout in convert.LAYOUTS:
        convert.convert(checkpoint[0], None, tmp_path / layout, layout)
        pipe = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)
        if layout == "original":  # attention processors' names, which the U-Net's own loader still translates
            pipe.unet.load_lora_adapter(load_file(tmp_path / layout / lora.FILE_NAME), prefix=None)
        else:
            pipe.load_lora_weights(tmp_path / layout)
        with torch.no_grad():
            created.append(pipe.unet(x, torch.tensor(500), c).sample)
    unet = UNet2DConditionModel.from_pretrained(tiny_base / "unet")
    with torch.no_grad():
        plain = unet(x, torch.tensor(500), c).sample
        lora.merge_into({"unet": unet}, lora.read_lora(checkpoint[0]), "file")
        wanted = unet(x, torch.tensor(500), c).sample
    assert all((one - wanted).abs().max() <= 1e-5 for one in created) and (plain - wanted).abs().max() > 1e-3


def test_text_encoder_loras_travel_in_the_layout_of_diffusers(tmp_path):
    stem = "text_encoder_2.text_model.encoder.layers.0.self_attn.out_proj.lora_linear_layer"
    state = {f"{stem}.down.weight": torch.ones(2, 8), f"{stem}.up.weight": torch.ones(8, 2)}
    save_file(state, tmp_path / "text.safetensors")
    convert.convert(tmp_path / "text.safetensors", None, tmp_path / "out", "diffusers")
    assert load_file(tmp_path / "out" / lora.FILE_NAME).keys() == state.keys()
    with pytest.raises(UserError, match="layout holds only to_q, .* not 'text_encoder_2.encoder.layers.0"):
        convert.convert(tmp_path / "text.safetensors", None, tmp_path / "no", "original")
    assert not (tmp_path / "no").exists()


def test_a_lora_of_some_projections_does_not_fit_the_originals_processors(tiny_base, tmp_path):
    unet = UNet2DConditionModel.from_pretrained(tiny_base / "unet").requires_grad_(False)
    lora.add_lora(unet, rank=2, targets=("to_q", "to_v"))
    lora.save_lora(unet, tmp_path / "part.safetensors")
    with pytest.raises(
        UserError, match=r"attn1 lacks to_k, to_out.0 .--lora_targets., which the original's layout has"
    ):
        convert.convert(tmp_path / "part.safetensors", None, tmp_path / "no", "original")


def test_tokens_the_originals_layout_cannot_hold(tmp_path):
    several = tokens.ClassTokens(("a", "b"), torch.zeros(4, 8), vectors_per_class=2)
    of_xl = tokens.ClassTokens(("a", "b"), torch.zeros(2, 8), further=(torch.zeros(2, 9),))
    for held, argv in ((several, "2 x 1 vectors"), (of_xl, "1 x 2 vectors")):
        tokens.save_tokens(held, tmp_path / "t.safetensors")
        with pytest.raises(UserError, match=argv):
            convert.convert(None, tmp_path / "t.safetensors", tmp_path / "no", "original")


def test_nothing_is_overwritten(checkpoint, tmp_path):
    convert.convert(*checkpoint, tmp_path / "out", "original")
    with pytest.raises(UserError, match="pytorch_lora_weights.safetensors already exists: choose another --output_dir"):
        convert.convert(*checkpoint, tmp_path / "out", "original")


@pytest.mark.parametrize(
    ("argv", "status", "output"),
    [
        (["--lora_path", "{lora}", "--output_dir", "{out}"], 0, "pytorch_lora_weights.safetensors"),
        (["--lora_path", "/no/none.bin", "--output_dir", "{out}"], 2, "error: lora_path /no/none.bin is not there"),
        (["--output_dir", "{out}"], 2, "error: nothing to convert: give --lora_path, --embed_path or both"),
        (["--lora_path", "{lora}"], 2, "error: the following arguments are required: --output_dir"),
        (
            ["--lora_path", "{lora}", "--output_dir", "{out}", "--layout", "diffusers", "--step", "3"],
            2,
            "error: --step 3",
        ),
    ],
)
def test_the_command(checkpoint, tmp_path, capsys, argv, status, output):
    argv = [word.format(lora=checkpoint[0], out=tmp_path / "out") for word in argv]
    assert run_main(convert.main, argv) == status
    out, err = capsys.readouterr()
    assert output in out + err and (status == 0 or len(err.strip().splitlines()) == 1)
