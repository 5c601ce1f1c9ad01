"""Fixtures shared by all tests: the tiny base model, a folder of images, a registry of their own."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts" / "quickstart")]
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", HF_HUB_DISABLE_TELEMETRY="1", OMP_NUM_THREADS="1")


def pytest_collection_modifyitems(items):
    """Files with the most slow tests come first, so that at the end no process waits for another's long file."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    import torch

    torch.set_num_threads(1)


SLOW_PNG = """
import os, time
replace = os.replace
def slow(source, target, **options):
    time.sleep(0.04 * str(target).endswith(".png"))
    replace(source, target, **options)
os.replace = slow
"""


@pytest.fixture
def slow_images(tmp_path_factory, monkeypatch):
    """Processes that are started take 40 ms for each PNG they write, so that a signal reaches them before their last one."""
    folder = tmp_path_factory.mktemp("slow")
    (folder / "sitecustomize.py").write_text(SLOW_PNG)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])))


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Headless Chromium, one for all tests of a process."""
    from browsing import start_browser

    driver = start_browser(tmp_path_factory.mktemp("downloads"))
    yield driver
    driver.quit()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    """A tiny epsilon-predicting base model."""
    import tiny

    return tiny.write_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def tiny_base_v(tmp_path_factory) -> Path:
    """A tiny v-predicting base model."""
    import tiny

    return tiny.write_base(tmp_path_factory.mktemp("base") / "tiny-v", seed=1, prediction_type="v_prediction")


@pytest.fixture(scope="session")
def bases(tmp_path_factory, tiny_base) -> dict[str, Path]:
    """A tiny base model of each family; "sdxl-empty" is guided from the empty prompt, "sdxl" from zeros."""
    import tiny

    folder = tmp_path_factory.mktemp("families")
    return {
        "sd1": tiny_base,
        "sd2": tiny.write_sd2(folder / "sd2"),
        "sdxl": tiny.write_sdxl(folder / "sdxl"),
        "sdxl-empty": tiny.write_sdxl(folder / "sdxl-empty", seed=3, zeros_for_empty_prompt=False),
    }


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """Three classes of small pictures in train, val and test folders."""
    import tiny

    return tiny.write_image_folder(tmp_path_factory.mktemp("images") / "animals")


@pytest.fixture(scope="session")
def workshop(tmp_path_factory, tiny_base, image_folder):
    """Base model, images, a checkpoint of random tokens and LoRA, and a registry that knows them."""
    import yaml
    from helpers import CLASSES, name_of

    import tiny

    folder = tmp_path_factory.mktemp("workshop")
    tiny.write_lora(folder / "ck" / "pytorch_lora_weights.safetensors", tiny_base)
    tiny.write_tokens(folder / "ck" / "learned_embeds.safetensors", CLASSES)
    tiny.write_tokens(folder / "ck" / "others.safetensors", ("a", "b", "c"))
    entry = {
        "model_path": str(tiny_base),
        "lora_path": str(folder / "ck"),
        "embed_path": str(folder / "ck" / "learned_embeds.safetensors"),
    }
    entries = {
        "ck": entry,
        "db": {**entry, "embed_path": None},
        "bare": {**entry, "embed_path": None, "lora_path": None},
        "foreign": {**entry, "embed_path": str(folder / "ck" / "others.safetensors")},
    }
    sections = {"animals": entries, name_of(image_folder): entries}  # as a name of datasets.yaml, and as folder:PATH
    _write(folder / "config" / "finetuned_ckpts.yaml", yaml.safe_dump(sections))
    return folder


@pytest.fixture(scope="session")
def undisturbed(workshop, image_folder, tmp_path_factory) -> dict[str, str]:
    """The subset made by one process in one go."""
    from helpers import SUBSET, run_here, sampling_arguments, subset_contents

    root = tmp_path_factory.mktemp("undisturbed")
    run_here("sample_mp.py", *sampling_arguments(workshop, image_folder, root))
    files = subset_contents(root / SUBSET)
    assert len(files) == 55
    return {**files, "": str(root / SUBSET)}


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture(scope="session")
def animals(image_folder):
    """The image folder as a data set."""
    from semantic_aug.datasets import load_dataset

    return load_dataset(f"folder:{image_folder}")


@pytest.fixture(scope="session")
def judge_folder(animals, tmp_path_factory) -> Path:
    """A finished classifier of the image folder's classes."""
    import evaluating

    train = animals.train
    images = [train.image(i) for i in range(len(train))]
    return evaluating.write_judge(tmp_path_factory.mktemp("judge"), images, train.labels, animals.source_names, 32)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> Path:
    """A tiny random CLIP."""
    import evaluating

    return evaluating.write_clip(tmp_path_factory.mktemp("clip"))
