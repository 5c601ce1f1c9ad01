"""Running the real entry scripts and comparing folders."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]


def start(script: str, *arguments, env: dict | None = None, **options) -> subprocess.Popen:
    """Starts ``python script arguments`` in a process group of its own."""
    argv = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.Popen(
        argv,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, **(env or {})},
        **options,
    )


def run(script: str, *arguments, env: dict | None = None, status: int = 0) -> str:
    """Runs a script to its end, checks the exit status, and returns standard output and error together."""
    process = start(script, *arguments, env=env)
    out, err = process.communicate(timeout=600)
    assert process.returncode == status, f"status {process.returncode}\n{out}\n{err}"
    return out + err


def run_here(script: str, *arguments, status: int = 0, meanwhile: Callable[[], object] | None = None) -> str:
    """As :func:`run`, with the script's ``main`` in this process, which has imported the libraries already.

    Whatever processes it starts are real ones.

    Args:
        meanwhile: called in a thread while the script runs; what it raises is raised here.
    """
    outcome, out, err = main_here(_main_of(script), arguments, meanwhile)
    assert outcome == status, f"status {outcome}\n{out}\n{err}"
    return out + err


def refused(script: str, *arguments, alone: bool = False) -> str:
    """Runs a script that must refuse: status 2 and exactly one line on standard error, which is returned.

    Args:
        alone: in a process of its own, which also shows that no library adds a line.
    """
    if alone:
        process = start(script, *arguments)
        _, err = process.communicate(timeout=600)
        status = process.returncode
    else:
        status, _, err = main_here(_main_of(script), arguments)
    assert status == 2, err
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    return lines[0]


def _main_of(script: str) -> Callable:
    return importlib.import_module(script.removesuffix(".py")).main


def main_here(main: Callable, arguments, meanwhile: Callable[[], object] | None = None) -> tuple[int, str, str]:
    """Exit status, standard output and standard error, log included, of a command's ``main`` in this process."""
    from semantic_aug.errors import run_main

    out, err, logger = io.StringIO(), io.StringIO(), logging.getLogger("semantic_aug")
    level, handler = logger.level, logging.StreamHandler(err)
    logging.getLogger().addHandler(handler)
    try:
        with ThreadPoolExecutor(1) as thread, mock.patch.dict(os.environ):
            other = thread.submit(meanwhile) if meanwhile else None
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                status = run_main(main, list(map(str, arguments)))
    finally:
        logging.getLogger().removeHandler(handler)
        logger.setLevel(level)
    if other is not None:
        other.result()
    return status, out.getvalue(), err.getvalue()


def contents(folder: Path, *patterns: str) -> dict[str, str]:
    """Relative path -> SHA-256 of the files that match; who last held the folder's lock is left out."""
    result = [p for pattern in patterns for p in folder.rglob(pattern) if p.is_file() and p.name != ".lock"]
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(result)}


def exchange(path: Path, content: bytes) -> None:
    """Puts another content of the same size under a file's name, and its modification time back."""
    status = path.stat()
    assert len(content) == status.st_size
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def subset_contents(folder: Path) -> dict[str, str]:
    """The files of a synthetic subset that must be equal however it was made: images and meta.csv."""
    return contents(folder, "*.png", "meta.csv")


CLASSES = ("blue jay", "red fox", "toad")
SUBSET = "animals/diff-mix-Multi3-ck-Strength0.7"
"""Where :func:`sampling_arguments` puts the subset, below the output root."""


def name_of(folder: Path) -> str:
    """The name of the data set ``folder:FOLDER``, which names its registry section and its output folders."""
    from semantic_aug.datasets import find_spec

    return find_spec(f"folder:{folder}").name


def registry_of(workshop, image_folder) -> Path:
    """A registry folder with the workshop's checkpoints, in which the image folder is the data set ``animals``."""
    folder = workshop / f"config-{name_of(image_folder)}"
    if not folder.exists():
        shutil.copytree(workshop / "config", folder)
        (folder / "datasets.yaml").write_text(yaml.safe_dump({"animals": {"folder": str(image_folder)}}))
    return folder


def sampling_arguments(workshop, image_folder, root, **changes):
    """Flags of a small run: 54 images in 14 batches. The folder is the data set ``animals`` of a registry made for it."""
    flags = {
        "dataset": f"folder:{image_folder}" if "config_dir" in changes else "animals",
        "finetune_model_key": "ck",
        "config_dir": registry_of(workshop, image_folder),
        "output_root": root,
        "syn_dataset_multiplier": 3,
        "batch_size": 4,
        "num_inference_steps": 6,
        "gpu_ids": ["cpu"],
        **changes,
    }
    argv = []
    for name, value in flags.items():
        values = value if isinstance(value, list) else [value]
        argv += [f"--{name}", *values] if value is not None else []
    return argv


def same(folder: Path, undisturbed: dict[str, str]) -> bool:
    """Whether a subset's files are those of the undisturbed run."""
    return {**subset_contents(folder), "": undisturbed[""]} == undisturbed


def wait_for_images(folder: Path, count: int, process: subprocess.Popen | None = None) -> None:
    """Waits until a running job has made some images; long, since a busy machine may start it in a minute or two."""
    for _ in range(6000):
        if len(list(folder.rglob("*.png"))) >= count or (process and process.poll() is not None):
            return
        time.sleep(0.05)
    raise AssertionError("no images came")


def write_subset(folder, rows, columns="First Directory,Second Directory,Number,Strength,Path"):
    """A synthetic subset in the original's format: rows of (source, target, strength)."""
    (folder / "data").mkdir(parents=True)
    lines = [columns]
    for number, (source, target, strength) in enumerate(rows):
        path = f"{source.replace(' ', '_')}/{target.replace(' ', '_')}-{number:06d}-{strength}.png"
        (folder / "data" / path).parent.mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (255, number, 0)).save(folder / "data" / path)
        lines.append(f"{source},{target},{number},{strength},{path}")
    (folder / "meta.csv").write_text("\n".join(lines) + "\n")
    return folder


ROWS = [("blue jay", "toad", 0.7), ("toad", "red fox", 0.7), ("red fox", "blue jay", 0.3), ("red fox", "toad", 1.0)]


def classify_arguments(image_folder, output_dir, **changes):
    """Flags of a small classification run: 12 steps of 6 images."""
    flags = {
        "dataset": f"folder:{image_folder}",
        "model": "resnet18",
        "weights": "none",
        "res_mode": 32,
        "nepoch": 4,
        "batch_size": 6,
        "gpu": "cpu",
        "lr": 0.02,
        "output_dir": output_dir,
        **changes,
    }
    argv = []
    for name, value in flags.items():
        argv += [f"--{name}"] if value is True else [f"--{name}", *(value if isinstance(value, list) else [value])]
    return argv


def workers_of(process: subprocess.Popen | None = None) -> list[int]:
    """Process ids of a running job's sampling processes; None: of this process's job."""
    parent = process.pid if process else os.getpid()
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def job_of(data, folder, **changes):
    """A sampling process's job over a loaded data set, on the CPU; ``changes`` are fields of the request."""
    from semantic_aug.cli import RunSettings
    from semantic_aug.sampling.config import SampleConfig
    from semantic_aug.sampling.job import Job
    from semantic_aug.sampling.masks import columns_of
    from semantic_aug.sampling.settings import OutputSettings, Placement

    compiled = changes.pop("compiled", False)
    given = {
        "dataset": data.name,
        "setting": data.setting,
        "run": RunSettings(config_dir=folder),
        "key": None,
        "placement": Placement(devices=("cpu",), dtype="fp32", batch_size=4),
        "output": OutputSettings(output_root=folder),
    }
    config = SampleConfig(**{**given, **changes})
    sources = planned(data.train, columns_of(config.images.object_mask))
    return Job(config, folder, sources, compiled=compiled)


def planned(table, columns=()):
    """The training images of a plan made now."""
    from semantic_aug.datasets.fingerprint import hash_images
    from semantic_aug.sampling.sources import PlannedSources

    return PlannedSources.of(table, hash_images(table), columns)


def run_example(page: str, number: int, small: dict[str, str], **names) -> dict:
    """Runs a Python example of a page of docs/ with some of its words replaced by small ones; returns its names.

    ``names`` are those that the page's text gives a meaning to.
    """
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    code = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[number]
    for word, other in small.items():
        assert word in code, word
        code = code.replace(word, other)
    exec(code, names)
    return names
