"""What is measured of a finished base model, and its model card: reconstruction, samples, near copies, recipe."""

from __future__ import annotations

import csv
import shlex
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

from base_model.autoencoder import psnr, reconstruct
from base_model.captions import Describer
from base_model.recipe import NOT_STATED, PRESETS, Config, Recipe
from base_model.training import Machine
from semantic_aug.diffusion.base import BaseModel, load_base
from semantic_aug.diffusion.loop import Sampler, decode_latents, generate
from semantic_aug.diffusion.schedulers import SolverSettings, make_scheduler
from semantic_aug.files import write_json, write_text
from semantic_aug.pictures import Cell, grid
from semantic_aug.seeding import numpy_rng, torch_rng
from semantic_aug.tensors import load_pickle

RECORD = "recipe.json"
"""In the finished model's folder: how it was trained and what was measured."""
SOLVER = SolverSettings(num_inference_steps=25, guidance_scale=3.0)
COMPARED = 64
"""Generated images that are compared with the training images."""
COMPARED_SIDE = 32
SHOWN = 8
COPY_PERCENTILE = 1
"""An image is a near copy if it is closer to a training image than this share of the images kept out, in per cent."""

TEMPLATE = Path(__file__).with_name("card.md")


@dataclass(frozen=True)
class Material:
    """What the card is made from: uint8 pixels ``(N, S, S, C)`` of images trained on and kept out, and captions."""

    pixels: np.ndarray
    kept_out: np.ndarray
    describer: Describer


def sample(model: BaseModel, captions: list[str], resolution: int, key: str) -> np.ndarray:
    """One image for each caption; uint8 ``(B, S, S, 3)``."""
    shape, null = model.geometry.latent_shape(resolution), model.encode_null(resolution)
    sampler = Sampler(model.unet, make_scheduler(model.scheduler_config), null, SOLVER)
    created = []
    for start in range(0, len(captions), 16):
        some = captions[start : start + 16]
        noise = [torch_rng("base", key, start + i) for i in range(len(some))]
        embeds = model.encode(some, resolution)
        latents = generate(sampler, shape, embeds, noise)
        created.append(decode_latents(model.vae, latents).numpy())
    return np.concatenate(created)


def nearest(images: np.ndarray, references: np.ndarray, block: int = 1024) -> tuple[np.ndarray, np.ndarray]:
    """Distance of each image to its nearest reference, and which that is.

    The distance is the root mean square difference at 32 px, in grey levels; references are taken mirrored, too.

    Args:
        images: uint8 ``(N, S, S, C)``.
        references: uint8 ``(M, S, S, C)``.
        block: references compared at a time.

    Returns:
        Distances ``(N,)`` and positions ``(N,)``.
    """
    ours = _small(images)
    best, which = np.full(len(ours), np.inf), np.zeros(len(ours), np.int64)
    for start in range(0, len(references), block):
        for theirs in (references[start : start + block], references[start : start + block, :, ::-1]):
            other = _small(theirs)
            squares = (ours**2).sum(1)[:, None] + (other**2).sum(1) - 2 * ours @ other.T
            position, value = squares.argmin(1), squares.min(1)
            closer = value < best
            best, which = np.where(closer, value, best), np.where(closer, start + position, which)
    return np.sqrt(np.maximum(best, 0) / ours.shape[1]), which


def _small(images: np.ndarray) -> np.ndarray:
    x = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float()
    x = torch.nn.functional.interpolate(x, (COMPARED_SIDE, COMPARED_SIDE), mode="area")
    return x.expand(-1, 3, -1, -1).flatten(1).double().numpy()


def write_card(folder: Path, material: Material, config: Config, identity: str, machine: Machine) -> None:
    """Measures the model in ``folder`` and writes its record, its pictures and its card there."""
    recipe, model = config.recipe, load_base(str(folder))
    rebuilt = reconstruct(model.vae, material.kept_out)
    rng = numpy_rng("base", "card")
    rows = rng.integers(len(material.describer.words), size=COMPARED)
    captions = [material.describer.caption(int(row), rng) for row in rows]
    created = sample(model, captions, recipe.size, "card")
    distance, which = nearest(created, material.pixels)
    usual, _ = nearest(material.kept_out, material.pixels)
    threshold = np.percentile(usual, COPY_PERCENTILE)
    figures = {
        "reconstruction_psnr_db": round(psnr(rebuilt, material.kept_out), 2),
        "nearest_training_image": {"generated": _median(distance), "kept_out": _median(usual)},
        "near_copies": round(float((distance < threshold).mean()), 4),
    }
    record = {
        "identity": identity,
        "preset": config.preset,
        "recipe": {f.name: getattr(recipe, f.name) for f in fields(Recipe)},
        "machine": machine.name(),
        "training_images": len(material.pixels),
        "kept_out_images": len(material.kept_out),
        "parameters": _millions(model),
        **_log(config.work_dir, recipe),
        **figures,
    }
    write_json(folder / RECORD, record)
    closest = distance.argsort()[:SHOWN]
    draw_samples(folder / "samples.png", model, material, rebuilt, recipe)
    pairs = [created[closest], material.pixels[which[closest]]]
    grid([_cells(images) for images in pairs], ["generated", "nearest in training"]).save(folder / "nearest.png")
    write_text(folder / "README.md", card(record, config, material))


def draw_samples(path: Path, model: BaseModel, material: Material, rebuilt: np.ndarray, recipe: Recipe) -> None:
    """Images under captions of the model's own words, images kept out, and their reconstructions."""
    words, rng = material.describer.words, numpy_rng("base", "sheet")
    captions = [f"a photo of a {recipe.subject}"]
    captions += [material.describer.caption(int(row), rng) or captions[0] for row in rng.integers(len(words), size=4)]
    rows = [_cells(sample(model, [text] * SHOWN, recipe.size, f"sheet {i}")) for i, text in enumerate(captions)]
    some = np.linspace(0, len(material.kept_out) - 1, SHOWN).round().astype(int)
    rows += [_cells(material.kept_out[some]), _cells(rebuilt[some])]
    grid(rows, row_titles=[*captions, "kept out", "reconstructed"]).save(path)


def _cells(images: np.ndarray) -> list[Cell]:
    return [Cell(Image.fromarray(image.squeeze()).convert("RGB")) for image in images]


def _median(values: np.ndarray) -> float:
    return round(float(np.median(values)), 2)


def _millions(model: BaseModel) -> float:
    networks = (model.vae, model.unet, model.text_encoder)
    return round(sum(p.numel() for network in networks for p in network.parameters()) / 1e6, 2)


def _log(folder: Path, recipe: Recipe) -> dict:
    """Steps and seconds of both stages' states, and the last validation losses up to there."""
    result: dict = {}
    for stage, batch in (("autoencoder", recipe.autoencoder_batch), ("denoiser", recipe.denoiser_batch)):
        state = load_pickle(folder / f"{stage}.pt", "run the training again")
        images = state["step"] * batch
        result |= {f"{stage}_steps": state["step"], f"{stage}_batch": batch}
        result |= {f"{stage}_images": images, f"{stage}_seconds": round(state["seconds"])}
    with open(folder / "denoiser.csv", newline="", encoding="utf-8") as lines:
        validated = [row for row in csv.DictReader(lines) if row["kept_out_loss"] and int(row["images"]) <= images]
    if validated:
        losses = [float(row["kept_out_loss"]) for row in validated]
        result["kept_out_loss"], result["seen_loss"] = losses[-1], float(validated[-1]["seen_loss"])
        result["lowest_kept_out_loss"] = min(losses)
        result["lowest_kept_out_loss_at"] = int(validated[int(np.argmin(losses))]["images"])
    return result


def command(config: Config, record: dict) -> str:
    """The command that trains this model again, without the paths of this machine."""
    preset, recipe = PRESETS[config.preset], config.recipe
    counts = {f"{stage}_images": record[f"{stage}_images"] for stage in ("autoencoder", "denoiser")}
    changed = {
        f.name: getattr(recipe, f.name) for f in fields(Recipe) if getattr(recipe, f.name) != getattr(preset, f.name)
    }
    flags = {"preset": config.preset, **changed, **counts}
    arguments = [(f"--{name}", *map(str, v if isinstance(v, tuple) else (v,))) for name, v in flags.items()]
    return f"python scripts/build_base.py --images IMAGES --output_dir FOLDER {' '.join(map(shlex.join, arguments))}"


def card(record: dict, config: Config, material: Material) -> str:
    """The model card, every figure as measured."""
    recipe = config.recipe
    side = recipe.size // recipe.factor
    front = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    if config.data_license != NOT_STATED:
        front = {
            "license": config.data_license.lower(),
            **front,
        }  # as the hub spells licences, and license_of reads them
    lowest = record.get("lowest_kept_out_loss_at")
    return TEMPLATE.read_text(encoding="utf-8").format(
        front=yaml.safe_dump(front, sort_keys=False),
        command=command(config, record),
        source=config.data_source,
        license=config.data_license,
        recipe=recipe,
        latents=f"{side}x{side}x{recipe.latent_channels}",
        unet="-".join(map(str, recipe.unet_channels)),
        colour="greyscale" if material.pixels.shape[3] == 1 else "RGB",
        words=", ".join(material.describer.words[0]),
        share=f"{100 * record['near_copies']:.1f} %",
        losses=f"{record.get('kept_out_loss', float('nan')):.4f} on images kept out and "
        f"{record.get('seen_loss', float('nan')):.4f} on as many training images"
        + (
            f"; lowest on images kept out {record['lowest_kept_out_loss']:.4f}, after {lowest:,} images"
            if lowest
            else ""
        ),
        compared=COMPARED,
        percentile=COPY_PERCENTILE,
        record=record,
    )
