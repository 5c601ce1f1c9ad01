"""Fixtures shared by all tests: the tiny base model, a folder of images, a registry of their own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts" / "quickstart")]
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", HF_HUB_DISABLE_TELEMETRY="1", OMP_NUM_THREADS="1")


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    import torch

    torch.set_num_threads(1)


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
def image_folder(tmp_path_factory) -> Path:
    """Three classes of small pictures in train, val and test folders."""
    import tiny

    return tiny.write_image_folder(tmp_path_factory.mktemp("images") / "animals")
