"""Reduced precision where the device computes it faster, and right."""

from __future__ import annotations

import torch

# oneDNN's bfloat16 gradient of a 3^3 convolution's weights holds memory that nothing wrote, NaN for example, where the
# map's first axis has 2 voxels (torch 2.14)
THIN = 2


def reduced_precision(device: torch.device, depth: int = THIN + 1) -> torch.autocast:
    """Autocast as nnU-Net's on CUDA; bfloat16 on processors with instructions for it, where others only emulate it.

    depth: first axis of the coarsest feature map; float32 on CPUs where a map could be too thin.
    """
    on_cpu = device.type == "cpu" and depth > THIN and _native_bfloat16()
    return torch.autocast(device.type, enabled=device.type == "cuda" or on_cpu)


def _native_bfloat16() -> bool:
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch do not tell
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))


def unless_thin(features: torch.Tensor) -> torch.autocast:
    """The autocast that is on, but float32 for features (B, C, X, Y, Z) that are too thin on a CPU."""
    kind = features.device.type
    thin = kind == "cpu" and features.shape[2] <= THIN
    return torch.autocast(kind, enabled=torch.is_autocast_enabled(kind) and not thin)
