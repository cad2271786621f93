"""Training that ends at a time limit instead of an epoch, for comparisons at equal cost."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from time import monotonic

import torch
import torch.distributed as dist
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from fsefs_nnunet.device import cpu_seconds
from fsefs_nnunet.errors import InputError

CLOCKS = {"wall": monotonic, "cpu": cpu_seconds}
PREPARED_KEY = "fseft_prepared_seconds"  # in checkpoints' init_args: seconds of the budget used before the first epoch
SECONDS_KEY = "fseft_seconds"  # there, too: seconds of the training so far, by clock


class StopTraining(Exception):
    """Raised between epochs or before the first: nnU-Net's loop over epochs has no other way out."""


class StoppableTrainer(nnUNetTrainer):
    """nnUNetTrainer whose training may end early: `on_train_start` or `on_epoch_end` raises StopTraining."""

    def run_training(self):
        try:
            super().run_training()
        except StopTraining as reason:
            self.print_to_log_file(f"Training ends after epoch {self.current_epoch - 1}: {reason}")
            self.on_train_end()


class OverTheBudget:
    """A schedule over epochs, run over the share of the budget that is used; the epoch is ignored."""

    def __init__(self, scheduler, num_epochs: int, progress: Callable[[], float]):
        self.scheduler, self.num_epochs, self.progress = scheduler, num_epochs, progress

    def step(self, current_epoch: int | None = None) -> None:
        self.scheduler.step(self.progress() * self.num_epochs)


class TimeBudgetTrainer(StoppableTrainer):
    """Ends training, and its schedule of learning rates with it, after `fseft_train_minutes` (environment variable).

    uses_all_of_budget: whether a training goes on until the time is over; otherwise it ends with its epochs if they
    take less.

    Without the variable, `fseft_minutes` of the configuration counts; without either, time is not limited. The time
    counts from the first epoch, including drawing and saving: wall time or, if `fseft_train_clock` is "cpu", CPU time
    of this process and its workers. The checkpoints keep it, so a continued training resumes where it was.
    """

    uses_all_of_budget = True

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict, device=torch.device("cuda")):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.seconds_before, self.started = dict.fromkeys(CLOCKS, 0.0), None
        self.seconds_prepared = 0.0

    def budget_seconds(self) -> float | None:
        minutes = os.environ.get("fseft_train_minutes", self.configuration_manager.configuration.get("fseft_minutes"))
        if minutes is None:
            return None
        try:
            seconds = 60 * float(minutes)
        except (TypeError, ValueError):
            seconds = 0.0
        if not 0 < seconds < math.inf:
            raise InputError(
                "fseft_train_minutes (environment variable) or fseft_minutes (plans) must be a positive number, not "
                f"{minutes!r}."
            )
        return seconds

    def budget_clock(self) -> str:
        """Name of the clock that the budget is read from."""
        clock = os.environ.get("fseft_train_clock", "wall")
        if clock not in CLOCKS:
            raise InputError(f'The environment variable fseft_train_clock must be "wall" or "cpu", not {clock!r}.')
        return clock

    def seconds_trained(self) -> dict[str, float]:
        """Seconds since the clock was started, by clock: before the feature bank is filled, or with the first epoch."""
        now = {name: clock() for name, clock in CLOCKS.items()}
        started = self.started or now
        return {name: self.seconds_before[name] + now[name] - started[name] for name in CLOCKS}

    def used_seconds(self) -> float:
        """Seconds of the budget, the same for all processes of DDP: otherwise one would end before the others."""
        name = self.budget_clock()
        running = CLOCKS[name]() - self.started[name] if self.started else 0.0
        seconds = self.seconds_before[name] + running
        if not self.is_ddp:
            return seconds
        shared = [seconds]
        dist.broadcast_object_list(shared, 0)
        return shared[0]

    def progress(self) -> float:
        """Share of the training that is done, in [0, 1]: of the epochs, or of the budget that preparations left."""
        of_epochs = self.current_epoch / self.num_epochs
        if self.budget_seconds() is None:
            return of_epochs
        left = max(self.budget_seconds() - self.seconds_prepared, 1.0)
        of_budget = min(1.0, (self.used_seconds() - self.seconds_prepared) / left)
        return of_budget if self.uses_all_of_budget else max(of_budget, of_epochs)

    def initialize(self):
        super().initialize()
        if self.budget_seconds() is not None:
            self.budget_clock()  # an invalid one is refused before the training begins
            self.lr_scheduler = OverTheBudget(self.lr_scheduler, self.num_epochs, self.progress)
            if self.uses_all_of_budget:
                self.num_epochs = 1_000_000

    def save_checkpoint(self, filename: str) -> None:
        self.my_init_kwargs |= {SECONDS_KEY: self.seconds_trained(), PREPARED_KEY: self.seconds_prepared}
        super().save_checkpoint(filename)

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        super().load_checkpoint(filename_or_checkpoint)
        self.seconds_before |= self.my_init_kwargs.get(SECONDS_KEY, {})
        self.seconds_prepared = self.my_init_kwargs.get(PREPARED_KEY, 0.0)

    def train_step(self, batch: dict) -> dict:
        if self.budget_seconds() is not None:
            self.lr_scheduler.step()
        return super().train_step(batch)

    def on_train_start(self):
        super().on_train_start()
        self.stop_at_budget()  # a training that was continued after its end
        self.start_clock()
        if not self.current_epoch:
            self.seconds_prepared = self.used_seconds()

    def start_clock(self) -> None:
        """From here on, time counts; a second call changes nothing."""
        self.started = self.started or {name: clock() for name, clock in CLOCKS.items()}

    def on_epoch_end(self):
        super().on_epoch_end()
        self.stop_at_budget()

    def on_train_end(self):
        super().on_train_end()
        self.seconds_before, self.started = self.seconds_trained(), None

    def stop_at_budget(self) -> None:
        used_up = self.budget_seconds() is not None and self.used_seconds() >= self.budget_seconds()
        if used_up and self.current_epoch:  # preparations alone may take the time, but nothing is trained then
            raise StopTraining(f"the budget of {self.budget_seconds():.0f} s is used up")
