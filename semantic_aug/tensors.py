"""Tensors and arrays in files: safetensors whose bytes follow from their content, saved states, arrays mapped into memory."""

import errno
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from semantic_aug.errors import UserError
from semantic_aug.files import atomic_path

_BLOCK = 1 << 20
METADATA_KEY = "diffmix"
"""Entry of a safetensors file's header that holds our metadata."""


def create_array(path: Path, dtype: type, shape: tuple[int, ...]) -> np.memmap:
    """A new ``.npy`` file of zeros, mapped for writing, its space on the disk reserved.

    A sparse file would be mapped on a full disk too, and writing to it would then end the process with a bus error.

    Raises:
        OSError: the disk, a quota or a limit on file sizes does not hold it; nothing is left behind.
    """
    try:
        array = np.lib.format.open_memmap(path, "w+", dtype, shape)
        with open(path, "rb+") as file:
            _reserve(file.fileno(), array.offset, os.fstat(file.fileno()).st_size)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None
    return array


def open_array(path: Path, dtype: type, shape: tuple[int, ...] | None = None) -> np.memmap | None:
    """A ``.npy`` file mapped for reading, or None where it is absent, cut off, or of another type or shape (None: any)."""
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return array if array.dtype == dtype and shape in (None, array.shape) else None


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a ``.npz`` file by name; none where it is absent or damaged."""
    try:
        with np.load(path) as content:
            return {name: content[name] for name in content.files}
    except Exception:  # a damaged file raises errors of many kinds
        return {}


def _reserve(file: int, start: int, end: int) -> None:
    try:
        os.posix_fallocate(file, 0, end)
    except (AttributeError, OSError) as error:
        # macOS has no such call, some file systems refuse it: zeros take the space just as well
        if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        for offset in range(start, end, _BLOCK):
            os.pwrite(file, bytes(min(_BLOCK, end - offset)), offset)
        os.fsync(file)


def save_tensors(
    path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, Any] | None = None, key: str = METADATA_KEY
) -> None:
    """Writes tensors as safetensors, whole or not at all; the same tensors and metadata give the same bytes.

    The library writes the entries of a header in an order that changes from process to process. Metadata are one entry, so
    that a file's hash (which says whether a subset was made with these very weights) follows from its content.

    Args:
        tensors: name -> tensor on any device.
        metadata: plain values, kept as sorted JSON in the file's header.
        key: entry of the header that holds them.
    """
    from safetensors.torch import save

    entries = {key: json.dumps(metadata, sort_keys=True, ensure_ascii=False)} if metadata else None
    # copies, since the library refuses tensors that share memory, as the shared layers of some networks do
    copies = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    content = save(copies, entries)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def read_metadata(entries: Mapping[str, str] | None, *lists: str) -> dict[str, Any]:
    """The metadata that :func:`save_tensors` wrote into a file's header; earlier versions wrote an entry for each value.

    Args:
        entries: of the header, as ``safe_open(...).metadata()`` gives them.
        lists: names of the values that are lists, which earlier versions wrote as JSON.

    Raises:
        ValueError: the entries are no JSON.
    """
    entries = entries or {}
    if METADATA_KEY in entries:
        return json.loads(entries[METADATA_KEY])
    return {name: json.loads(value) if name in lists else value for name, value in entries.items()}


def save_pickle(path: Path, content: Any) -> None:
    """Writes tensors and plain containers by ``torch.save``, whole or not at all. Raises OSError: the disk does not hold it."""
    import torch

    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch hides the reason why a file cannot be written
            reason = error.__context__
            if isinstance(reason, OSError):
                raise OSError(reason.errno, reason.strerror, str(path)) from None
            raise


def load_pickle(path: Path, expected: str, device: str = "cpu") -> Any:
    """A file written by ``torch.save``, read without running any code in it.

    Args:
        expected: what it should hold and what to do, for the error.
        device: where its tensors go.

    Raises:
        UserError: not there, damaged, or holding more than tensors and plain containers.
    """
    import torch

    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} is not there: {expected}") from None
    except Exception as error:  # a damaged pickle can raise anything
        # torch's message continues with advice to run the file's code
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = (
            f"holds an object of {refused[1]}, not tensors alone" if refused else "damaged or not written by torch.save"
        )
        raise UserError(f"{path} cannot be read ({reason}): {expected}") from error
