"""Measures the embedded base model and writes its model card.

    python scripts/quickstart/evaluate_base.py             # resumes where it stopped; about 40 minutes on 2 CPU cores

Autoencoder: PSNR on test photographs. Text-to-image: how often a classifier trained on real photographs (the judge)
assigns generated images to the cell type and the defect level they were prompted with, after stage 1 on all training
images and after the quickstart's 10-shot stage 1. Figures go to ``base/figures.json``, pictures to ``base/*.png``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(HERE)]

from semantic_aug.datasets.images import fit  # noqa: E402
from semantic_aug.datasets.sets import elpv  # noqa: E402

BASE = "scripts/quickstart/base"
OUT = "outputs/base_evaluation"
GENERATED = 320
JUDGE_SEEDS = (2020, 2021, 2022)
JUDGE_EPOCHS = 10
STEPS = (2000, 500, 100, 20)
"""Steps of stage 1 on all training images: the first for the model card, the others for comparison."""

TRAINING = (
    "--train_batch_size", "16", "--learning_rate", "5e-4", "--ti_learning_rate", "5e-3", "--lr_scheduler", "cosine",
)  # fmt: skip

RECIPE_FILE = "recipe.json"
"""Written by scripts/build_base.py: steps, batch and seconds of each stage."""

CARD = HERE / "model_card.md"
"""Template of the model card."""


def python(*argv) -> None:
    """Runs one of the entry scripts, which return at once where they have finished before."""
    print("python", *argv, flush=True)
    subprocess.run([sys.executable, *map(str, argv)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def load_test_photographs(size: int) -> np.ndarray:
    """ELPV's test photographs, uint8 ``(N, size, size, 1)``."""
    table = elpv.read()["test"]
    return np.stack([np.asarray(fit(table.image(i), size).convert("L"))[..., None] for i in range(len(table))])


def measure_autoencoder() -> dict:
    """PSNR on ELPV's test photographs at 128 px, in dB."""
    import torch
    from base_model.autoencoder import psnr, reconstruct
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(ROOT / BASE / "vae", torch_dtype=torch.float32).eval()
    images = load_test_photographs(128)
    return {"test_psnr_db": round(psnr(reconstruct(vae, images), images), 2), "test_images": len(images)}


def train_judges() -> list[Path]:
    """Classifiers of all real training photographs, one per seed."""
    folders = []
    for seed in JUDGE_SEEDS:
        folder = Path(OUT) / f"judge-seed{seed}"
        python("train_cls.py", "--dataset", "elpv", "--model", "tf_efficientnet_lite0", "--res_mode", 128,
               "--nepoch", JUDGE_EPOCHS, "--batch_size", 32, "--seed", seed, "--eval_every", 2,
               "--output_dir", folder)  # fmt: skip
        folders.append(ROOT / folder)
    return folders


def finetune(name: str, steps: int) -> Path:
    """Stage 1 on all training images; returns the folder of the registry that knows it under ``name``."""
    config = Path(OUT) / "config"
    python("train_lora.py", "--dataset", "elpv", "--config_dir", config, "--finetune_strategy", "ti_db",
           "--pretrained_model_name_or_path", BASE, "--validation_steps", 0, "--report_to", "none",
           "--checkpointing_steps", 200, "--initializer", "super_class", "--resume_from_checkpoint", "latest",
           "--register_key", name, "--output_dir", Path(OUT) / name, "--max_train_steps", steps, *TRAINING)  # fmt: skip
    return config


def generate(name: str, config: Path, shots: int = -1) -> Path:
    """Images of every class from noise, with the registered checkpoint ``name``; returns the subset's folder."""
    images = 1575 if shots < 0 else 8 * shots
    python("sample_mp.py", "--dataset", "elpv", "--config_dir", config, "--examples_per_class", shots,
           "--finetune_model_key", name, "--sample_strategy", "diff-gen", "--output_root", OUT,
           "--gpu_ids", "cpu", "cpu", "--syn_dataset_multiplier", GENERATED / images)  # fmt: skip
    return next((ROOT / OUT / "elpv").glob(f"diff-gen-Multi*-{name}-Strength1.0"))


def agreement(subset: Path, judge_folders: list[Path]) -> dict:
    """The shares of a subset's images that the judges assign to what was prompted, averaged over the judges."""
    from semantic_aug.classify.inference import load_run
    from semantic_aug.datasets import load_dataset
    from semantic_aug.datasets.sets.elpv import CLASS_NAMES, LEVELS
    from semantic_aug.datasets.synthetic import read_subset

    images = read_subset(subset, load_dataset("elpv"), allow_other_sources=True)
    levels, count = len(LEVELS), len(CLASS_NAMES)
    sure = np.isin(images.target % levels, (0, levels - 1))  # functional or defective, not the doubtful levels between
    shares = []
    for folder in judge_folders:
        p = load_run(folder).probabilities(images.image, len(images)).reshape(-1, count // levels, levels)
        kind, defective = p.sum(2).argmax(1), p[:, :, -1].sum(1) > p[:, :, 0].sum(1)
        right_level = defective == (images.target % levels == levels - 1)
        right_class = p.reshape(len(p), count).argmax(1) == images.target
        shares.append([(kind == images.target // levels).mean(), right_level[sure].mean(), right_class.mean()])
    figures = {"images": len(images)}
    for name, mean, spread in zip(("cell_type", "defect", "class"), np.mean(shares, 0), np.std(shares, 0), strict=True):
        figures |= {f"{name}_share": _rounded(mean), f"{name}_spread": _rounded(spread)}
    return figures


def distance_to_real(subset: Path) -> dict:
    """KID of a subset to the training photographs, over features of the ImageNet backbone."""
    from semantic_aug.classify import features
    from semantic_aug.datasets import load_dataset
    from semantic_aug.evaluation.quality import distances
    from semantic_aug.evaluation.quality.inputs import open_subset

    dataset = load_dataset("elpv")
    extractor, created = features.load_extractor(), open_subset("made", [str(subset)], dataset, True).images
    ours = extractor.features(created.image, len(created))
    # as many photographs of each class as there are images of it: the subset is balanced, the photographs are not
    rows, rng = [], np.random.default_rng(0)
    for label, count in enumerate(np.bincount(created.target)):
        photographs = np.flatnonzero(dataset.train.labels == label)
        rows.append(rng.choice(photographs, min(count, len(photographs)), replace=False))
    chosen = np.concatenate(rows)
    real = extractor.features(lambda i: dataset.train.image(int(chosen[i])), len(chosen))
    mean, spread = distances.kernel_distance(ours, real, rng)
    return {"kid": round(mean, 5), "kid_std": round(spread, 5)}


def judge_accuracy(folders: list[Path]) -> dict:
    """Mean and standard deviation over seeds of the judges' own test accuracy."""
    tests = [json.loads((folder / "results.json").read_text())["test"] for folder in folders]
    figures: dict = {"seeds": list(JUDGE_SEEDS)}
    for name in ("top1", "macro"):
        values = [test[name] for test in tests]
        figures[f"test_{name}"] = {"mean": _rounded(np.mean(values)), "std": _rounded(np.std(values, ddof=1))}
    return figures


def _rounded(value: float) -> float:
    return round(float(value), 4)


def draw_samples(path: Path) -> None:
    """Cells under captions of the base model's own words, and its reconstructions of test photographs."""
    from base_model.autoencoder import reconstruct
    from PIL import Image

    from semantic_aug.diffusion.base import load_base
    from semantic_aug.diffusion.loop import Sampler, decode_latents, generate
    from semantic_aug.diffusion.schedulers import SolverSettings, make_scheduler
    from semantic_aug.pictures import Cell, grid
    from semantic_aug.seeding import torch_rng

    model = load_base(BASE)
    prompts = ["a photo of a solar cell", "a photo of a smooth round solar cell", "a photo of a coarse square solar cell",
               "a photo of a dim broken cracked solar cell", "a photo of a white clean even solar cell"]  # fmt: skip
    shape, rows = model.geometry.latent_shape(128), []
    scheduler, solver = make_scheduler(model.scheduler_config), SolverSettings(25, 4.0)
    sampler = Sampler(model.unet, scheduler, model.encode_null(128), solver)
    for prompt in prompts:
        embeds = model.encode([prompt], 128).expand(8)
        noise = [torch_rng(0, "card", i) for i in range(8)]
        latents = generate(sampler, shape, embeds, noise)
        rows.append([Cell(Image.fromarray(image.numpy())) for image in decode_latents(model.vae, latents)])
    photographs = load_test_photographs(128)[np.arange(8) * 80]
    for images in (photographs, reconstruct(model.vae, photographs)):
        rows.append([Cell(Image.fromarray(image[..., 0]).convert("RGB")) for image in images])
    grid(rows, row_titles=[*prompts, "test photographs", "reconstructed"]).save(path)


def model_card(figures: dict) -> str:
    """The model card, every figure as measured."""
    judge, (first, *_) = figures["judge"]["test_top1"], STEPS
    groups = {
        "all_images": f"{first:,} steps of stage 1 on all 1,575 training images",
        "ten_shot": "the quickstart's stage 1, 10 images per class",
    }
    rows = []
    for group, title in groups.items():
        shares = [(figures[group][f"{n}_share"], figures[group][f"{n}_spread"]) for n in ("cell_type", "defect")]
        cells = [f"{100 * share:.1f} % (\u00b1 {100 * spread:.1f})" for share, spread in shares]
        rows.append(f"| {title} | {' | '.join(cells)} | {figures[group]['images']} |")
    return CARD.read_text(encoding="utf-8").format(
        psnr=figures["autoencoder"]["test_psnr_db"],
        test_images=figures["autoencoder"]["test_images"],
        recipe=json.loads((ROOT / BASE / RECIPE_FILE).read_text()),
        judge_seeds=", ".join(map(str, JUDGE_SEEDS)),
        judge=f"{100 * judge['mean']:.1f} \u00b1 {100 * judge['std']:.1f} %",
        rows="\n".join(rows),
    )


def main() -> int:
    """Measures everything and writes figures, picture and card."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--skip_training", action="store_true", help="only the autoencoder and the pictures")
    args = parser.parse_args()
    from run import CHECKPOINT, Quickstart
    from tasks import ELPV

    figures_file = ROOT / BASE / "figures.json"
    figures = json.loads(figures_file.read_text()) if figures_file.exists() else {}
    figures["autoencoder"] = measure_autoencoder()
    draw_samples(ROOT / BASE / "samples.png")
    if not args.skip_training:
        judges = train_judges()
        figures["judge"] = judge_accuracy(judges)
        figures["steps"] = {}
        for steps in STEPS:
            subset = generate(f"steps{steps}", finetune(f"steps{steps}", steps))
            figures["steps"][steps] = agreement(subset, judges) | distance_to_real(subset)
        figures["all_images"] = figures["steps"][STEPS[0]]
        quickstart = Quickstart(ELPV)  # whose stage 1 is run now where it has not been
        python(*quickstart.commands()["finetune"])
        ten_shot = generate(CHECKPOINT, quickstart.out / "config", ELPV.size.shots)
        figures["ten_shot"] = agreement(ten_shot, judges)
    figures_file.write_text(json.dumps(figures, indent=2) + "\n")
    (ROOT / BASE / "README.md").write_text(model_card(figures), encoding="utf-8")
    print(json.dumps(figures, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
