"""Every benchmark runs in small; those of stages 1 and 3 are tested beside their stages."""

import importlib
import re
from pathlib import Path

import pytest

import tiny

ROOT = Path(__file__).resolve().parents[1]


def run(name, monkeypatch, folder, *argv, status: int = 0, file: str | None = None) -> dict:
    """Runs a benchmark in this process, which returns ``status``; returns the figures it writes."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'scripts'}:{ROOT}")
    common = importlib.import_module("benchmarks.common")
    monkeypatch.setattr(common, "OUTPUT", folder)
    assert importlib.import_module(f"benchmarks.{name}").main([str(word) for word in argv]) == status
    return tiny.read_json(folder / f"{file or name}.json")


def test_reading_data(tmp_path, monkeypatch):
    argv = ["--images", 8, "--source", 32, "--side", 16, "--batch", 4, "--repeat", 1, "--rows", 1100, "--workers", 1]
    figures = run("data", monkeypatch, tmp_path, *argv)
    assert [opened["rows"] for opened in figures["list"]["runs"]] == [1100] * 3 and figures["images"]["ratio"] > 0


def test_plans(tmp_path, monkeypatch):
    figures = run("plans", monkeypatch, tmp_path, "--sizes", 3000, "--place", tmp_path)
    assert figures["sizes"][0]["tasks"] == 3000 and not list(tmp_path.glob("plans-*"))


@pytest.mark.slow
def test_a_gpus_parts_in_small(tiny_base, image_folder, tmp_path, monkeypatch, capfd):
    argv = ["--rehearse", "--base", tiny_base, "--dataset", f"folder:{image_folder}"]
    parts = ["stage-2", "stage-3-resnet50"]
    figures = run("gpu", monkeypatch, tmp_path, *argv, "--parts", *parts, file="gpu-rehearsal")["parts"]
    assert sorted(figures) == parts
    sampling = figures["stage-2"]
    assert sampling["ours"]["batch_size"] == 2 and min(sampling["ratio_to_best"], *sampling["original"].values()) > 0
    assert figures["stage-3-resnet50"]["ours"]["images_per_second"] > 0
    # what does not end in time is stopped, and the figures that exist are kept
    run("gpu", monkeypatch, tmp_path, *argv, "--parts", "stage-1", "--minutes", 0.03, status=1, file="gpu-rehearsal")
    assert tiny.read_json(tmp_path / "gpu-rehearsal.json")["parts"] == figures
    assert re.search("stage-1: ended after . s, with the time of --minutes", capfd.readouterr().out)


@pytest.mark.slow
def test_sampling_says_where_there_are_too_few_batches_to_time(tiny_base, image_folder, tmp_path, monkeypatch, capfd):
    argv = ["--base", tiny_base, "--dataset", f"folder:{image_folder}", "--device", "cpu", "--images", 4]
    argv += ["--processes", 1, "--strength", 0.1]
    figures = run("sampling", monkeypatch, tmp_path, *argv, "--ours_factor", 1)  # one batch
    assert figures["ours"]["images_per_second"] is None and figures["ratio_to_best"] is None
    assert "| ours, batch 16, 1 process(es) | too few batches to time: give more --images" in capfd.readouterr().out
    figures = run("sampling", monkeypatch, tmp_path, *argv, "--ours_factor", 2, "--batch_size", 2)
    assert figures["ours"]["images_per_second"] > 0 and figures["ratio_to_best"] > 0


def test_kernels(tiny_base, tmp_path, monkeypatch):
    argv = ["--base", tiny_base, "--device", "cpu", "--batch_size", 1, "--steps", 2]
    figures = run("kernels", monkeypatch, tmp_path, *argv)
    assert min(figures["milliseconds"]["convolutions"], figures["tflop_per_image"]["attention"]) > 0


def test_inversion(tiny_base, image_folder, tmp_path, monkeypatch):
    argv = [
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
    figures = run("inversion", monkeypatch, tmp_path, *argv)
    assert len(figures["rows"]) == 3 and figures["psnr"]["autoencoder"] > 0 and (tmp_path / "inversion.png").exists()
