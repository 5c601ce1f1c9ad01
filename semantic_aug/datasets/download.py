"""Downloads of registered data sets: official archives by torchvision, the hub's copies by the library ``datasets``."""

import contextlib
import os
import shlex
import socket
import tempfile
import zipfile
from pathlib import Path

from semantic_aug import registry
from semantic_aug.datasets import catalog
from semantic_aug.datasets.readers.hub import answers
from semantic_aug.datasets.spec import DatasetSpec
from semantic_aug.errors import UserError, WouldDownload, no_downloads
from semantic_aug.files import no_trace

ROOT = Path("outputs/datasets")
SILENCE_SECONDS = 60.0
"""Seconds without data after which a download is given up."""


def get(word: str, root: Path | None, config_dir: Path = registry.CONFIG_DIR) -> tuple[str, str]:
    """Downloads a data set, unless it can be read already.

    Args:
        root: folder for official archives (None: :data:`ROOT`).

    Returns:
        One line on what the data set holds, and what to set so that it is read; empty where nothing is to be set.

    Raises:
        UserError: no network, or a data set that has to be fetched by hand: names the page and the variable to set.
    """
    spec = catalog.find_spec(word, config_dir)
    official = spec.torchvision or spec.archive
    if root is not None and official is None:
        raise UserError(
            f"--root: nothing is unpacked for data set '{spec.name}' (copies from the hub lie in the hub library's cache, "
            "HF_HOME): leave the flag out"
        )
    with contextlib.suppress(WouldDownload), no_downloads(True):
        if official is None or any(map(os.environ.get, spec.variables)):
            return catalog.load_dataset(word, config_dir=config_dir).describe(), ""
    if official is None:
        return catalog.load_dataset(word, config_dir=config_dir).describe(), ""
    folder = download_official(spec, registry.resolve_path(root or ROOT))
    splits = spec.read_official(folder)
    counts = ", ".join(f"{split} {len(table)}" for split, table in splits.items())
    line = f"{spec.name}: {len(splits['train'].class_names)} classes, images: {counts}"
    return line, f"export {spec.variables[0]}={shlex.quote(str(folder))}"


def download_official(spec: DatasetSpec, root: Path) -> Path:
    """Downloads and unpacks the official archives below a folder, whole or not at all.

    Returns:
        The folder to read the data set from; one that exists is taken as it is.

    Raises:
        UserError: no answer from the host, a download that ended early, or a disk that is full.
    """
    name, folder = spec.torchvision or spec.archive
    if (root / folder).is_dir():
        return root / folder
    address = name if spec.archive else spec.homepage
    if not answers(address):
        raise UserError(
            f"data set '{spec.name}' cannot be downloaded: {address} does not answer; check the network, or unpack "
            f"the official download elsewhere and set {spec.variables[0]} to its folder"
        )
    import torchvision.datasets  # takes seconds, so after everything that can refuse

    with no_trace(root, ()), contextlib.ExitStack() as stack:
        root.mkdir(parents=True, exist_ok=True)
        options = {"prefix": f".{spec.name}-", "suffix": ".part", "dir": root}
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(**options)))
        stack.callback(socket.setdefaulttimeout, socket.getdefaulttimeout())
        socket.setdefaulttimeout(SILENCE_SECONDS)
        try:
            if spec.archive:
                torchvision.datasets.utils.download_and_extract_archive(name, temporary)
            else:
                getattr(torchvision.datasets, name)(temporary, download=True)
            (temporary / Path(folder).parts[0]).rename(root / Path(folder).parts[0])
        except (OSError, RuntimeError, zipfile.BadZipFile) as error:
            reason = " ".join(str(error).split())[:150]
            raise UserError(f"the download of data set '{spec.name}' failed ({reason}): try again") from None
    return root / folder
