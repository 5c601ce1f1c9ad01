"""What a subset needs of a machine: memory for processes and batches, space on the disk."""

import logging
import math
from collections.abc import Sequence

import torch

from semantic_aug.augmentations.model import ModelFiles
from semantic_aug.devices import CPU, available_memory, stand_in
from semantic_aug.diffusion.base import weight_files
from semantic_aug.errors import UserError
from semantic_aug.files import size_text
from semantic_aug.sampling.settings import ImageSettings

log = logging.getLogger(__name__)

BYTES_PER_PIXEL = {"png": 1.8, "webp": 1.3, "jpg": 0.5}
"""Rough sizes of encoded photographs, for estimates."""

CPU_BATCH = 16
MODEL_BYTES, BYTES_PER_IMAGE_512 = 3 * 2**30, 2**30
"""Estimates for Stable Diffusion 1.5 in half precision: weights, and activations of one image at 512 px with guidance. An
estimate that proves too high costs nothing but a message: out of memory halves what is computed at once."""

PROCESS_BYTES = 1 << 29
"""Memory of a CPU process besides the networks, which are float32 there whatever their files hold, and their activations."""


def disk_bytes(count: float, images: ImageSettings) -> float:
    """The estimated size of a number of images, their resolution being resolved."""
    return count * images.resolution**2 * BYTES_PER_PIXEL[images.image_format]


def fitting(devices: Sequence[str], files: ModelFiles) -> Sequence[str]:
    """As many of the CPU processes as memory holds, at least one; each loads the networks. GPUs are left as they are."""
    if devices[0] != "cpu":
        return devices
    need = PROCESS_BYTES + 2 * sum(path.stat().st_size for path in weight_files(files.folder))
    count = max(1, min(len(devices), available_memory() // need))
    if count < len(devices):
        log.info(
            "%d process(es) instead of %d: each takes about %s of memory (--gpu_ids cpu cpu ... gives another number)",
            count, len(devices), size_text(need),
        )  # fmt: skip
    return devices[:count]


def automatic_batch_size(devices: Sequence[str], resolution: int) -> int:
    """A batch that fits: 16 on the CPU; on a GPU a power of two up to 64 from its free memory, shared by its processes."""
    if devices[0] == "cpu":
        return CPU_BATCH
    if stand_in(devices[0]) == CPU:  # the head of a Ray cluster
        raise UserError("--batch_size: this machine has no GPU whose memory says how many images fit; give a number")
    free = min(torch.cuda.mem_get_info(stand_in(device))[0] / devices.count(device) for device in set(devices))
    images = (free - MODEL_BYTES) * 0.8 / (BYTES_PER_IMAGE_512 * (resolution / 512) ** 2)
    return max(1, min(64, 2 ** int(math.log2(max(1.0, images)))))
