"""Training that ends at a wall-clock limit instead of an epoch, for comparisons at equal time."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from time import time

import torch.distributed as dist
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from fsefs_nnunet.errors import InputError


class StopTraining(Exception):
    """Raised at the end of an epoch: nnU-Net's loop over epochs has no other way out."""


class StoppableTrainer(nnUNetTrainer):
    """nnUNetTrainer whose training may end early: `on_epoch_end` raises StopTraining."""

    def run_training(self):
        try:
            super().run_training()
        except StopTraining as reason:
            self.print_to_log_file(f"Training ends after epoch {self.current_epoch - 1}: {reason}")
            self.on_train_end()


class OverTheBudget:
    """A schedule over epochs, run over the share of the budget that is used; the epoch plays no part."""

    def __init__(self, scheduler, num_epochs: int, progress: Callable[[], float]):
        self.scheduler, self.num_epochs, self.progress = scheduler, num_epochs, progress

    def step(self, current_epoch: int | None = None) -> None:
        self.scheduler.step(self.progress() * self.num_epochs)


class TimeBudgetTrainer(StoppableTrainer):
    """Ends training, and its schedule of learning rates with it, after `fseft_train_minutes` (environment variable).

    Without the variable it is the trainer that it derives from. The time counted is that of the epochs in the log, so
    a resumed training goes on where it was.
    """

    def budget_seconds(self) -> float | None:
        minutes = os.environ.get("fseft_train_minutes")
        if minutes is None:
            return None
        try:
            seconds = 60 * float(minutes)
        except ValueError:
            seconds = 0.0
        if not 0 < seconds < math.inf:
            raise InputError(
                f"The environment variable fseft_train_minutes must be a positive number, it is {minutes!r}."
            )
        return seconds

    def seconds_trained(self) -> float:
        done = range(self.current_epoch)
        start, end = (
            [self.logger.get_value(f"epoch_{edge}_timestamps", step=i) for i in done] for edge in ("start", "end")
        )
        return sum(end) - sum(start)

    def progress(self) -> float:
        """Share of the training that is done, in [0, 1]: of the epochs, or of the budget with the running epoch."""
        if self.budget_seconds() is None:
            return self.current_epoch / self.num_epochs
        starts = self.logger.get_value("epoch_start_timestamps", step=None)
        running = time() - starts[self.current_epoch] if len(starts) > self.current_epoch else 0.0
        return min(1.0, self.of_rank_0(self.seconds_trained() + running) / self.budget_seconds())

    def of_rank_0(self, seconds: float) -> float:
        """One clock for all processes of DDP: with their own, learning rates differ, and one ends before the others."""
        if not self.is_ddp:
            return seconds
        shared = [seconds]
        dist.broadcast_object_list(shared, 0)
        return shared[0]

    def initialize(self):
        super().initialize()
        if self.budget_seconds() is not None:
            self.lr_scheduler = OverTheBudget(self.lr_scheduler, self.num_epochs, self.progress)
            self.num_epochs = 1_000_000

    def train_step(self, batch: dict) -> dict:
        if self.budget_seconds() is not None:
            self.lr_scheduler.step()
        return super().train_step(batch)

    def on_train_start(self):
        super().on_train_start()
        self.stop_at_budget()  # a training that was continued after its end

    def on_epoch_end(self):
        super().on_epoch_end()
        self.stop_at_budget()

    def stop_at_budget(self) -> None:
        if self.budget_seconds() is not None and self.of_rank_0(self.seconds_trained()) >= self.budget_seconds():
            raise StopTraining(f"the budget of {self.budget_seconds():.0f} s is used")
