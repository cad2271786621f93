"""Reduced precision where the device computes it faster."""

from __future__ import annotations

import torch


def reduced_precision(device: torch.device) -> torch.autocast:
    """Autocast as nnU-Net's on CUDA; bfloat16 on processors with instructions for it, where others only emulate it."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch do not tell
    native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return torch.autocast(device.type, enabled=device.type == "cuda" or (device.type == "cpu" and native))
