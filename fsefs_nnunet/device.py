"""Where and how precisely we compute, and how much time and memory that took."""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

import torch

from fsefs_nnunet.errors import InputError

# oneDNN's bfloat16 gradient of a 3^3 convolution's weights holds uninitialised memory, e.g. NaN, where the
# map's first axis has 2 voxels (torch 2.14)
THIN = 2


def device_named(name: str | None) -> torch.device:
    """The device "cpu", "cuda" or "mps"; None: the GPU if there is one.

    A CPU gets all its cores, as in nnU-Net's commands.

    Raises:
        InputError: for a GPU that is not there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    name = name or ("cuda" if available["cuda"] else "cpu")
    if not available.get(name, True):
        raise InputError(f"There is no GPU here that PyTorch can use as {name!r}: add -device cpu.")
    if name == "cpu":
        torch.set_num_threads(os.cpu_count() or 1)
    return torch.device(name)


@contextmanager
def denormals_as_zero() -> Iterator[None]:
    """Within the block, CPUs round numbers below 1e-38 to zero.

    The prior's gradients are that small where predictions are confident, and convolutions in float32 take a hundred
    times as long with them. Only there: in this mode scipy's KDTree recurses without end.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def reduced_precision(device: torch.device, depth: int = THIN + 1) -> torch.autocast:
    """Autocast as nnU-Net's on CUDA; bfloat16 on processors with instructions for it, where others only emulate it.

    depth: first axis of the coarsest feature map; float32 on CPUs where a map could be too thin.
    """
    on_cpu = device.type == "cpu" and depth > THIN and native_bfloat16()
    return torch.autocast(device.type, enabled=device.type == "cuda" or on_cpu)


def without_scaling(device: torch.device) -> AbstractContextManager:
    """For steps without a gradient scaler: autocast uses bfloat16 instead of float16, or float32 on GPUs without it."""
    if device.type != "cuda":
        return nullcontext()
    dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    # an autocast within takes its type from this one; cached weights would stay as they were before the first step
    return torch.autocast("cuda", dtype=dtype, cache_enabled=False)


def precision_name(device: torch.device) -> str:
    """What `reduced_precision` computes convolutions in."""
    with reduced_precision(device):
        reduced = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if reduced else torch.float32
    return str(dtype).removeprefix("torch.") + (" autocast" if reduced else "")


def native_bfloat16() -> bool:
    """Whether this processor has instructions for bfloat16."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch do not say
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))


def unless_thin(features: torch.Tensor) -> torch.autocast:
    """The current autocast, but float32 if features (B, C, X, Y, Z) on a CPU are too thin.

    features: anything with a tensor's device and shape.
    """
    kind = features.device.type
    thin = kind == "cpu" and features.shape[2] <= THIN
    return torch.autocast(kind, enabled=torch.is_autocast_enabled(kind) and not thin)


def cpu_seconds() -> float:
    """CPU time of this process and of its workers; of those that still run only where the system has /proc."""
    workers = multiprocessing.active_children()  # first: it reaps those that ended, whose time is then this process's
    spent = sum(os.times()[:4])
    for worker in workers:
        with suppress(OSError):  # it has just ended
            fields = Path(f"/proc/{worker.pid}/stat").read_text("utf-8").rpartition(")")[2].split()
            spent += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return spent


def peak_host_memory_gb() -> float | None:
    """Peak main memory of this process in GB (10^9 bytes); None if the system does not report it (Windows)."""
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage reports on Linux includes the process that started this one
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text("utf-8"))[1]) * 1024 / 1e9
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def forget_peaks(device: torch.device) -> None:
    """Reset the measurement of peak memory; for main memory, on Linux only."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", "utf-8")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_device_memory_gb(device: torch.device) -> float | None:
    """Peak GPU memory that PyTorch held for this process, in GB; None for a CPU."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
