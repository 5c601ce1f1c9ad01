"""Every benchmark runs in small; those of stages 1 and 3 are tested beside their stages."""

import importlib
from pathlib import Path

import pytest

import tiny

ROOT = Path(__file__).resolve().parents[1]


def run(name, monkeypatch, folder, *words) -> dict:
    """Runs a benchmark in this process; returns the figures it writes."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'scripts'}:{ROOT}")
    common = importlib.import_module("benchmarks.common")
    monkeypatch.setattr(common, "OUTPUT", folder)
    assert importlib.import_module(f"benchmarks.{name}").main([str(word) for word in words]) == 0
    return tiny.read_json(folder / f"{name}.json")


def test_reading_data(tmp_path, monkeypatch):
    words = ["--images", 8, "--source", 32, "--side", 16, "--batch", 4, "--repeat", 1, "--rows", 1100, "--workers", 1]
    figures = run("data", monkeypatch, tmp_path, *words)
    assert [opened["rows"] for opened in figures["list"]["runs"]] == [1100] * 3 and figures["images"]["ratio"] > 0


def test_plans(tmp_path, monkeypatch):
    figures = run("plans", monkeypatch, tmp_path, "--sizes", 3000, "--place", tmp_path)
    assert figures["sizes"][0]["tasks"] == 3000 and not list(tmp_path.glob("plans-*"))


@pytest.mark.slow
def test_sampling(tiny_base, image_folder, tmp_path, monkeypatch):
    words = ["--base", tiny_base, "--dataset", f"folder:{image_folder}", "--device", "cpu", "--images", 2]
    words += ["--ours_factor", 4, "--processes", 1, "--batch_size", 2, "--compile", "off"]
    figures = run("sampling", monkeypatch, tmp_path, *words)
    assert figures["ours"]["batch_size"] == 2 and min(figures["ratio_to_best"], *figures["original"].values()) > 0


def test_inversion(tiny_base, image_folder, tmp_path, monkeypatch):
    words = [
        "--base",
        tiny_base,
        "--dataset",
        f"folder:{image_folder}",
        "--images",
        2,
        "--steps",
        2,
        "--guidance",
        1,
        3,
    ]
    figures = run("inversion", monkeypatch, tmp_path, *words)
    assert len(figures["rows"]) == 3 and figures["psnr"]["autoencoder"] > 0 and (tmp_path / "inversion.png").exists()
