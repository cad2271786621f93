"""The published learning rate schedule and stopping rule."""

from __future__ import annotations

from collections.abc import Sequence
from math import cos, pi

from torch.optim import Optimizer


def warmup_cosine(epoch: int, num_epochs: int) -> float:
    """Factor of the base rate in `epoch`: a warm-up of one epoch, then half a cosine period.

    The warm-up is at the base rate, as in the published code.
    """
    return 1.0 if epoch < 1 else 0.5 * (1 + cos(pi * (epoch - 1) / max(1, num_epochs - 1)))


class WarmupCosineScheduler:
    """Sets the rate by epoch, as nnU-Net's schedulers do: `step(current_epoch)`."""

    def __init__(self, optimizer: Optimizer, initial_lr: float, num_epochs: int):
        self.optimizer, self.initial_lr, self.num_epochs = optimizer, initial_lr, num_epochs
        self.step(0)

    def step(self, current_epoch: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.initial_lr * warmup_cosine(current_epoch, self.num_epochs)


def at_plateau(losses: Sequence[float], window: int = 10, patience: int = 20, improvement: float = 1e-3) -> bool:
    """Whether the mean of the last `window` epochs' losses fell by less than `improvement` in `patience` epochs."""
    if len(losses) < window + patience:
        return False
    now, before = losses[-window:], losses[-window - patience : -patience]
    return sum(before) / window - sum(now) / window < improvement
