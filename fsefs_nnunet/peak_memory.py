"""The most memory that a training took."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch


def peak_memory_gb(device: torch.device) -> float | None:
    """GB (10^9 bytes) that this process took at most: of the GPU if it computes there, else of main memory.

    None where the system does not tell (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage tells on Linux includes the process that started this one
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text("utf-8"))[1]) * 1024 / 1e9
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
