"""What running a backbone over a volume takes, said before its first window."""

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
    """Of main memory: the image twice, what a slab is blended in with what leaves it, and a window at work."""
    image = 4 * channels * prod(tiling.shape)
    window = 4 * tiling.channels * prod(tiling.window)
    return 2 * image + 2 * 4 * tiling.slab_values + 2 * window


def free_host_bytes() -> int | None:
    """Main memory that is free; None where the system does not say."""
    try:
        with open("/proc/meminfo") as f:
            lines = dict(line.split(":") for line in f)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        try:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):
            return None


def memory_warnings(tiling: Tiling, channels: int, device: torch.device) -> list[str]:
    """The estimate for a volume in a sentence, and another where it does not fit.

    channels: of the image.
    """
    needed, slab = host_bytes(tiling, channels), 4 * tiling.slab_values
    size = " x ".join(map(str, tiling.shape))
    estimate = f"The largest volume, {size} voxels, takes about {gigabytes(needed)} of main memory"
    lines = [f"{estimate}, a slab of its features {gigabytes(slab)}; longer volumes take no larger slabs."]
    free = free_host_bytes()
    if free is not None and needed > free:
        lines.append(f"Warning: only {gigabytes(free)} of main memory are free: {REMEDY}")
    if device.type == "cuda":
        on_device = torch.cuda.mem_get_info(device)[0]
        if slab > on_device / 2:
            lines.append(
                f"The GPU has {gigabytes(on_device)} free, so slabs lie in main memory, which is slower: {REMEDY}"
            )
    return lines
