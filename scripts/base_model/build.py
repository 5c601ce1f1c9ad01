"""The stages of a base model's training in turn: pixels, autoencoder, latents, captions, denoiser, export."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from base_model import images
from base_model.autoencoder import Perceptual, digest, train_autoencoder
from base_model.captions import Describer
from base_model.card import RECORD, Material, write_card
from base_model.denoiser import TextToLatents, encode_views, make_scheduler, train_denoiser
from base_model.recipe import AUTOENCODER_SHARE, Config
from base_model.training import Budget, Machine
from semantic_aug.classify.models import efficientnet_lite0
from semantic_aug.errors import UserError
from semantic_aug.files import sha256_text, write_json, write_text
from semantic_aug.run_lock import lock_folder
from semantic_aug.runs import claim

log = logging.getLogger(__name__)


def build(config: Config) -> None:
    """Runs the stages that are not finished yet.

    Raises:
        UserError: images, folders or settings that cannot be used.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise UserError("captions need clusters of scikit-learn: pip install -r scripts/quickstart/requirements.txt")
    machine = Machine(torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu")), config.compile)
    pool = images.open_pool(config.images, config.exclude, config.recipe.kept_out)
    backbone = load_backbone(machine)
    arguments = {**config.recipe.identity(), "images": pool.identity, "imagenet_features": backbone is not None}
    identity = sha256_text(json.dumps(arguments, sort_keys=True))
    check_output(config.output_dir, identity)
    if config.export_only and not (config.work_dir / "denoiser.pt").exists():
        raise UserError(
            f"--export_only: {config.work_dir} holds no trained denoiser yet; start the training without it"
        )
    # an export only reads states, which are replaced whole: the training may run meanwhile
    with nullcontext() if config.export_only else lock_folder(config.work_dir, "--work_dir"):
        claim(config.work_dir, arguments, "--work_dir")
        run_stages(config, machine, pool, backbone, identity)


def run_stages(
    config: Config, machine: Machine, pool: images.Pool, backbone: torch.nn.Module | None, identity: str
) -> None:
    """Trains what is not trained yet, up to the stage that ``--until`` names."""
    recipe, folder = config.recipe, config.work_dir
    channels = 1 if images.is_greyscale(pool.train) else 3
    pixels = images.pixel_file(pool.train, recipe.size, channels, folder / "train.npy")
    enlarged = images.pixel_file(pool.train, recipe.size, channels, folder / "enlarged.npy", images.ENLARGEMENT)
    kept_out = images.pixel_file(pool.kept_out, recipe.size, channels, folder / "kept_out.npy")

    seconds, begun = _seconds(config), (folder / "denoiser.pt").exists()
    if begun:
        log.info("%s: the autoencoder stays as it was when the denoiser began", folder)
    share = 0.0 if begun else seconds and AUTOENCODER_SHARE * seconds
    budget = Budget(recipe.autoencoder_images, recipe.autoencoder_batch, share)
    perceptual = None if backbone is None else Perceptual(backbone)
    vae = train_autoencoder(pixels, enlarged, kept_out, recipe, budget, folder, perceptual, machine)
    if config.until == "autoencoder":
        return
    name = digest(vae)  # latents of an autoencoder that was trained further are others
    moments = encode_views(vae, pixels, enlarged, recipe, folder / f"latents-{name}.npy", machine)
    looked = encode_views(vae, kept_out, enlarged[:0], recipe, folder / f"kept-out-latents-{name}.npy", machine)
    describer = kept_describer(pixels, config, backbone)
    budget = Budget(recipe.denoiser_images, recipe.denoiser_batch, seconds and (1 - AUTOENCODER_SHARE) * seconds)
    tokenizer, model = train_denoiser(vae, moments, looked, describer, recipe, budget, folder, machine)
    if config.until == "denoiser":
        return
    export(vae, tokenizer, model, Material(pixels, kept_out, describer), config, identity, machine)


def _seconds(config: Config) -> float | None:
    """Seconds of training; with ``--export_only`` none."""
    if config.export_only:
        return 0.0
    return None if config.minutes is None else 60 * config.minutes


def load_backbone(machine: Machine) -> torch.nn.Module | None:
    """EfficientNet-Lite0 for features and the perceptual loss, or None where its package is not installed."""
    try:
        return efficientnet_lite0().to(machine.device, memory_format=torch.channels_last)
    except UserError as error:
        log.warning("%s; without it there is no perceptual loss, and clusters are of the layout alone", error)
        return None


def check_output(folder: Path, identity: str) -> None:
    """Refuses a folder that holds anything else than an earlier model of the same training.

    Raises:
        UserError: it does.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        same = json.loads((folder / RECORD).read_text(encoding="utf-8")).get("identity") == identity
    except (OSError, ValueError):
        same = False
    if not same:
        raise UserError(
            f"--output_dir {folder} holds something else than a model of this training: choose another folder"
        )


def kept_describer(pixels: np.ndarray, config: Config, backbone: torch.nn.Module | None) -> Describer:
    """The words of the training images, found once and kept in the working folder as ``words.json``."""
    path = config.work_dir / "words.json"
    if not path.exists():
        write_json(path, Describer.of(pixels, config.recipe, backbone).words)
    return Describer([tuple(words) for words in json.loads(path.read_text(encoding="utf-8"))], config.recipe.subject)


def export(
    vae: AutoencoderKL, tokenizer: CLIPTokenizer, model: TextToLatents, material: Material, config: Config, identity: str,
    machine: Machine,
) -> None:  # fmt: skip
    """Writes the pipeline in diffusers layout, weights in half precision, with its model card; the folder appears whole."""
    pipeline = StableDiffusionPipeline(
        vae=vae.to("cpu", torch.float16),
        text_encoder=model.text_encoder.to("cpu", torch.float16),
        tokenizer=tokenizer,
        unet=model.unet.to("cpu", torch.float16),
        scheduler=DPMSolverMultistepScheduler.from_config(make_scheduler(config.recipe).config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder = config.output_dir
    new, old = (folder.with_name(f".{folder.name}.{word}") for word in ("new", "old"))
    shutil.rmtree(new, ignore_errors=True)
    pipeline.save_pretrained(new)
    write_portable_text_encoder(new / "text_encoder")
    write_card(new, material, config, identity, machine)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    log.info("%s: a base model of %.1f MB; --pretrained_model_name_or_path %s uses it", folder, size, folder)


def write_portable_text_encoder(folder: Path) -> None:
    """Rewrites a saved text encoder so that transformers 4 and 5 and diffusers load it alike; no value changes.

    Keys are below ``text_model.``, as in the files of Stable Diffusion: transformers 5 saves them without it and reads both,
    transformers 4 reads only these. The configuration says float32, since transformers 5 loads in the configured precision
    where none is given, and diffusers loads the other networks in float32.

    Args:
        folder: of ``model.safetensors`` and ``config.json``.
    """
    file, prefix = folder / "model.safetensors", "text_model."
    weights = {prefix + name.removeprefix(prefix): values for name, values in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_text(folder / "config.json", json.dumps({**config, "dtype": "float32"}, indent=2) + "\n")
