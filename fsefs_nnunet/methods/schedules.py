"""Learning rate schedules, the published one and that of long trainings, and the published stopping rule."""

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


def long_training(progress: float, warmup: float, start: float = 0.0) -> float:
    """Factor of the base rate for parameters trained from `start` on: a linear rise, then half a cosine period.

    Args:
        progress: share of the training that is done, in [0, 1].
        warmup, start: shares of the training.
    """
    if progress < start:
        return 0.0
    if progress < start + warmup:
        return (progress - start) / warmup
    return 0.5 * (1 + cos(pi * (progress - start - warmup) / (1 - start - warmup)))


class DecoderFirstScheduler:
    """Schedule of long trainings: groups of the optimiser that are marked `late` start when the others have warmed up.

    Gradients of an untrained head would damage the encoder.
    """

    def __init__(self, optimizer: Optimizer, initial_lr: float, num_epochs: int, warmup: float):
        self.optimizer, self.initial_lr, self.num_epochs, self.warmup = optimizer, initial_lr, num_epochs, warmup
        self.step(0)

    def step(self, current_epoch: float) -> None:
        progress = min((current_epoch + 0.5) / self.num_epochs, 1.0)  # the middle of the epoch: the first one trains
        for group in self.optimizer.param_groups:
            start = self.warmup if group["late"] else 0.0
            group["lr"] = self.initial_lr * long_training(progress, self.warmup, start)


def at_plateau(losses: Sequence[float], window: int = 10, patience: int = 20, improvement: float = 1e-3) -> bool:
    """Whether the mean of the last `window` epochs' losses fell by less than `improvement` in `patience` epochs."""
    if len(losses) < window + patience:
        return False
    now, before = losses[-window:], losses[-window - patience : -patience]
    return sum(before) / window - sum(now) / window < improvement
