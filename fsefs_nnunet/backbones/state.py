"""What the architectures of the public backbones share: loading all weights or none, and what they refuse."""

from __future__ import annotations

import torch

from fsefs_nnunet.backbones.contract import BackboneContract
from fsefs_nnunet.errors import InputError


def mismatch(own: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> str:
    """How names and shapes of `weights` differ from those of `own`; "" if they agree."""
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    wrong = [name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape]
    if not (missing or extra or wrong):
        return ""
    return (
        f"{len(missing)} tensors are missing {missing[:2]}, {len(extra)} are unknown {extra[:2]}, {len(wrong)} have "
        f"another shape {wrong[:2]}"
    )


def copy_exactly(own: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> None:
    """Copy `weights` into the tensors of `own`. Raises InputError unless every one matches in name and shape."""
    if how := mismatch(own, weights):
        raise InputError(f"The weights do not fit the architecture: {how}. They belong to another backbone.")
    for name, tensor in own.items():
        tensor.copy_(weights[name])


def require_finite(file: str, weights: dict[str, torch.Tensor]) -> None:
    """Raises InputError if a tensor of those that were read from `file` holds NaN or infinite values."""
    broken = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise InputError(f"{file} holds NaN or infinite weights, e.g. {broken[0]}: take it from its publisher again.")


def require_divisible(contract: BackboneContract, image: torch.Tensor) -> None:
    """Raises InputError unless the sides of `image` (B, C, X, Y, Z) are multiples of the contract's divisor."""
    if any(n % divisor for n, divisor in zip(image.shape[2:], contract.divisor)):
        raise InputError(
            f"Backbone {contract.id!r} got a window of {list(image.shape[2:])}: patch_size in the plans must be "
            f"multiples of {list(contract.divisor)}."
        )
