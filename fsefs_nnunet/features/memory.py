"""Memory that running a backbone over a volume takes, estimated before its first window."""

from __future__ import annotations

import os
from math import prod

import torch

from fsefs_nnunet.features.tiling import Tiling
from fsefs_nnunet.files import gigabytes

REMEDY = (
    "plan with a coarser spacing (`-overwrite_target_spacing`) or with fewer maps (`stages` in the plans' arch_kwargs)."
)


def host_bytes(tiling: Tiling, channels: int) -> int:
    """Main memory that is needed: the image twice, the slab being blended and the one that leaves, and two windows."""
    image = 4 * channels * prod(tiling.shape)
    window = 4 * tiling.channels * prod(tiling.window)
    return 2 * image + 2 * tiling.slab_bytes + 2 * window


def free_host_bytes() -> int | None:
    """Main memory that is free; None if the system does not say."""
    try:
        with open("/proc/meminfo") as f:
            lines = dict(line.split(":") for line in f)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        try:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):
            return None


def blending_device(tiling: Tiling, device: torch.device) -> torch.device:
    """Where windows are blended: on the GPU, or on the CPU if a slab takes more than half of the GPU's free memory."""
    if device.type != "cuda":
        return torch.device("cpu")
    free = torch.cuda.mem_get_info(device)[0]
    return device if tiling.slab_bytes <= free / 2 else torch.device("cpu")


def memory_warnings(tiling: Tiling, channels: int, device: torch.device) -> list[str]:
    """The estimate for a volume as a sentence, and further sentences if it does not fit.

    channels: of the image.
    """
    needed = host_bytes(tiling, channels)
    size = " x ".join(map(str, tiling.shape))
    estimate = f"The largest volume, {size} voxels, takes about {gigabytes(needed)} of main memory"
    lines = [f"{estimate}, a slab of its features {gigabytes(tiling.slab_bytes)}; longer volumes need no larger slabs."]
    free = free_host_bytes()
    if free is not None and needed > free:
        lines.append(f"Warning: only {gigabytes(free)} of main memory is free: {REMEDY}")
    if device.type == "cuda" and blending_device(tiling, device) != device:
        on_device = gigabytes(torch.cuda.mem_get_info(device)[0])
        lines.append(f"The GPU has {on_device} free, so slabs lie in main memory, which is slower: {REMEDY}")
    return lines
