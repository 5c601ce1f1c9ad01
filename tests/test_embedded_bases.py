"""Every base model in scripts/quickstart: it loads everywhere, is small, and its card says what it is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from helpers import ROOT
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

import tiny
from semantic_aug.diffusion.license import NOT_KNOWN, license_of
from semantic_aug.files import sha256_text

FOLDERS = sorted(path.parent for path in (ROOT / "scripts/quickstart").glob("base*/model_index.json"))
LICENSES = {"base": "cc-by-nc-sa-4.0", "base-signs": "apache-2.0"}
PRESET_OF = {"base": "elpv", "base-signs": "signs"}
TEXT_ENCODERS = {"base": "d3d229df27111c45aea285666d26d4dec30d9e40573ae7ae1112879f2326feb3"}
"""Digests of the values with which published scores were measured."""
MOST_BYTES = 30e6


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def base(request, monkeypatch) -> Path:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return request.param


def test_base_is_small_and_its_card_names_licence_data_and_quality(base):
    paths = [path for path in base.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in paths) <= MOST_BYTES
    assert {path.suffix for path in paths} <= {".json", ".md", ".png", ".safetensors"}
    assert license_of(str(base), base) == LICENSES[base.name]
    card = (base / "README.md").read_text(encoding="utf-8")
    recipe = f"scripts/build_base.py --images .* --preset {PRESET_OF[base.name]}"
    for statement in ("No label was ", "photographs", "PSNR ", recipe, r"`StableDiffusionPipeline\.from_pretrained"):
        assert re.search(statement, card), statement
    for line in card.splitlines():
        if line.startswith("!["):
            assert (base / line.partition("(")[2].rstrip(")")).is_file(), line


def test_a_damaged_card_names_no_license(tmp_path):
    (tmp_path / "README.md").write_text("---\ndate: 2024-13-45\nlicense: mit\n---\n")
    assert license_of("org/model", tmp_path) == NOT_KNOWN


def test_base_is_what_its_preset_makes(base):
    from base_model.autoencoder import make_autoencoder
    from base_model.denoiser import make_scheduler, make_unet
    from base_model.recipe import PRESETS

    recipe = PRESETS[PRESET_OF[base.name]]
    for network, part in ((make_autoencoder(recipe), "vae"), (make_unet(recipe), "unet")):
        shipped = tiny.read_json(base / part / "config.json")
        ours = {name: list(v) if isinstance(v, tuple) else v for name, v in network.config.items()}
        ignored = {"scaling_factor", "_name_or_path"}
        assert {n: v for n, v in shipped.items() if n[0] != "_" and n not in ignored} == {
            n: v for n, v in ours.items() if n[0] != "_" and n not in ignored
        }
    scheduler = tiny.read_json(base / "scheduler" / "scheduler_config.json")
    assert scheduler["prediction_type"] == make_scheduler(recipe).config.prediction_type == recipe.prediction
    record = tiny.read_json(base / "recipe.json")
    for stage in ("autoencoder", "denoiser"):
        batch = getattr(recipe, f"{stage}_batch")
        assert record[f"{stage}_batch"] == batch
        assert 0 < record[f"{stage}_steps"] * batch <= getattr(recipe, f"{stage}_images")


def test_pipeline_of_diffusers_makes_an_image(base):
    from base_model.recipe import PRESETS

    pipeline = StableDiffusionPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.text_encoder.dtype == pipeline.unet.dtype == pipeline.vae.dtype
    recipe = PRESETS[PRESET_OF[base.name]]
    image = pipeline(f"a photo of a {recipe.subject}", num_inference_steps=1, guidance_scale=1.0).images[0]
    assert image.size == (recipe.size, recipe.size)


def test_text_encoder_loads_alike_in_the_layouts_of_transformers_4_and_5(base, tmp_path):
    """Transformers 4 has its modules below ``text_model``, transformers 5 not, where both read the former's keys."""
    from base_model.build import write_portable_text_encoder

    shipped = base / "text_encoder"
    weights = load_file(shipped / "model.safetensors")
    bare = {key.removeprefix("text_model."): values for key, values in weights.items()}
    assert all(key.startswith("text_model.") for key in weights) and {v.dtype for v in bare.values()} == {torch.float16}
    digest = sha256_text("".join(f"{key} {bare[key].numpy().tobytes().hex()}" for key in sorted(bare)))
    assert digest == TEXT_ENCODERS.get(base.name, digest)
    save_file(bare, tmp_path / "model.safetensors", metadata={"format": "pt"})  # as transformers 5 saves it
    config = tiny.read_json(shipped / "config.json")
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    ids, embeddings = torch.arange(2 * 48).reshape(2, 48), []
    for folder in (shipped, tmp_path):
        encoder, loaded = CLIPTextModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        assert not loaded["missing_keys"] and not loaded["unexpected_keys"]
        embeddings.append(encoder(ids)[0])
    assert torch.equal(*embeddings)
    write_portable_text_encoder(tmp_path)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / name).read_bytes() == (shipped / name).read_bytes()
    assert CLIPTextModel.from_pretrained(tmp_path).dtype == torch.float32  # the precision of the other networks
