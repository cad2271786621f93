"""What every trainer of a K-shot configuration shares: its cases, its checkpoints and its run file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from os.path import join
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from fsefs_nnunet.backbones.checkpoints import read_checkpoint
from fsefs_nnunet.cases.folders import folder_of
from fsefs_nnunet.cases.preprocessed import require_cases
from fsefs_nnunet.cases.splits import SPLITS_FILE, load_splits, query_cases, support_cases
from fsefs_nnunet.device import device_named, peak_device_memory_gb, peak_host_memory_gb
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.files import refused_if_unwritable, replacing
from fsefs_nnunet.inference.trained_model import require_backbone_of
from fsefs_nnunet.methods.run_file import RUN_FILE, VALIDATION, RunFile, StageClock
from fsefs_nnunet.trainers.without_mirroring import WithoutMirroring

LOCK_FILE = "training.lock"
SUPPORT_KEY = "fseft_support_sha256"  # in checkpoints' init_args: which cases were support, without their names


def validates() -> bool:
    """Whether trainings end with the final validation."""
    return os.environ.get("fseft_final_validation") != "0"


class DeviceFailed(InputError):
    """After a CUDA error, nothing runs on the GPU in this process any more."""


@contextmanager
def failures_of_the_device(folder: str) -> Iterator[None]:
    """If a GPU is too small or fails, the work in `folder` ends with a one-sentence error; checkpoints stay intact."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError(
            "The GPU does not have enough memory for this training: stop other programs on it, reduce fseft_gpu_gb, "
            "fseft_crops_per_step or fseft_crop_size in the plans (batch_size or patch_size for trainings on patches), "
            "or add -device cpu. --c continues from the last checkpoint, if there is one."
        ) from error
    except RuntimeError as error:
        if not str(error).startswith("CUDA error"):
            raise
        reason = str(error).splitlines()[0]
        raise DeviceFailed(
            f"The GPU failed ({reason}). Checkpoints in {folder} are intact: --c continues from the last one, if there "
            "is one."
        ) from error


class KShotTrainer(WithoutMirroring):
    """Trains on the support cases of `splits_fseft.json`; its final validation predicts the labelled queries.

    The facts of the training go to `fseft_run.json` next to its checkpoints.
    """

    progress_png_every = 25  # epochs; drawing takes about a second

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict, device=torch.device("cuda")):
        self.clock, self.run, self.validation_windows = StageClock(), None, 0
        self._require_folders(plans)
        if device.type != "cpu":
            device_named(device.type)  # otherwise PyTorch fails later, with a traceback
        with refused_if_unwritable(folder_of("nnUNet_results")):
            super().__init__(plans, configuration, fold, dataset_json, device)

    def _require_folders(self, plans: dict) -> None:
        """nnU-Net makes a folder of results for whatever the plans and the environment variables name.

        Raises:
            InputError: if a variable is missing, or the plans were made for another dataset.
        """
        name, preprocessed = plans["dataset_name"], folder_of("nnUNet_preprocessed")
        if not (preprocessed / name).is_dir():
            raise InputError(
                f"Plans {plans['plans_name']!r} were made for {name}, which is not in {preprocessed}: was the dataset "
                "renamed? Restore its name in all three of nnU-Net's folders, or plan again."
            )

    @property
    def shots(self) -> int | str:
        return self.configuration_manager.configuration["fseft_shots"]

    def do_split(self) -> tuple[list[str], list[str]]:
        """Support cases, and the labelled queries that the final validation predicts; nothing else reads the latter."""
        splits = load_splits(Path(self.preprocessed_dataset_folder_base) / SPLITS_FILE)
        support = support_cases(splits, self.shots, self.fold)
        queries = query_cases(splits, self.fold)[0]
        require_cases([*support, *queries], self.preprocessed_dataset_folder)
        return support, queries

    def initialize(self):
        support = self.do_split()[0]  # nnU-Net's own reading of an empty folder ends in a traceback
        self.support_sha256 = hashlib.sha256("\n".join(sorted(support)).encode()).hexdigest()
        super().initialize()

    def run_training(self):
        if self.local_rank:  # of several processes that train together, the first holds the lock
            return super().run_training()
        lock = join(self.output_folder, LOCK_FILE)
        try:
            # the kernel releases the lock when its holder dies; the empty file stays
            with refused_if_unwritable(self.output_folder):
                held = FileLock(lock).acquire(timeout=0)
        except Timeout as error:
            # if the file system does not support such locks, the file itself is the lock
            raise InputError(
                f"Another process is training in {self.output_folder}, perhaps left behind by a killed command: wait "
                f"until it ends, or stop it and continue with `--c`. If there is none, delete {lock}."
            ) from error
        with held, failures_of_the_device(self.output_folder):
            super().run_training()

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        if not self.was_initialized:
            self.initialize()
        if isinstance(filename_or_checkpoint, str):
            content = self.refuse_damage(Path(filename_or_checkpoint))
            require_backbone_of(filename_or_checkpoint, content, self.configuration_manager.configuration)
            if SUPPORT_KEY not in content["init_args"]:
                raise InputError(
                    f"{filename_or_checkpoint} was written by an earlier version: train again without --c."
                )
            if content["init_args"][SUPPORT_KEY] != self.support_sha256:
                raise InputError(
                    f"{filename_or_checkpoint} was trained on support cases other than those in {SPLITS_FILE} now: "
                    "train again without `--c`, which overwrites it, or restore the splits with `fseft splits`."
                )
        super().load_checkpoint(filename_or_checkpoint)

    def refuse_damage(self, file: Path) -> dict:
        """Content of a checkpoint. Raises InputError with the remedy for a damaged one."""
        try:
            return read_checkpoint(file)
        except InputError as error:
            if file.name != "checkpoint_latest.pth":
                raise
            # a running training has no other copy of it
            raise InputError(
                f"{file} cannot be read, it may be truncated: delete it, and `--c` continues from "
                "checkpoint_best.pth, or starts from scratch if there is none."
            ) from error

    def save_checkpoint(self, filename: str) -> None:
        if self.disable_checkpointing or self.local_rank:  # nnU-Net writes none then
            return super().save_checkpoint(filename)
        self.my_init_kwargs |= self.added_to_checkpoint()  # each time: loading a checkpoint replaces them by its own
        with replacing(filename) as part:
            super().save_checkpoint(str(part))

    def added_to_checkpoint(self) -> dict:
        """Entries to add to the checkpoint's init_args, which nnU-Net's loaders ignore."""
        return {SUPPORT_KEY: self.support_sha256}

    # ---- the run file ----

    def describe_run(self) -> RunFile:
        """What is known before the training; for a continued one, including what was done before."""
        support, queries = self.do_split()
        run = RunFile(type(self).__name__, self.configuration_name, self.fold, support, queries, queries)
        network = self.network.module if self.is_ddp else self.network
        run.trained_parameters = sum(p.numel() for p in network.parameters() if p.requires_grad)
        if self.current_epoch and Path(self.output_folder, RUN_FILE).exists():
            before = RunFile.load(self.output_folder)
            run.windows, run.seconds, run.peak_memory_gb = before.windows, before.seconds, before.peak_memory_gb
            run.epochs = [epoch for epoch in before.epochs if epoch["epoch"] < self.current_epoch]
            run.head_rows, run.sizes_ml = before.head_rows, before.sizes_ml
            run.missed, run.gave_up = before.missed, before.gave_up
        return run

    def save_run(self, stage: str) -> None:
        """The time since the last call belongs to `stage`."""
        self.clock.lap(self.run, stage)
        if stage != VALIDATION:
            self.run.keep_peak("host", peak_host_memory_gb())
            self.run.keep_peak("device", peak_device_memory_gb(self.device))
        if not self.local_rank:
            self.run.save(self.output_folder)

    def on_train_start(self):
        if not self.was_initialized:
            self.initialize()
        self.run = self.describe_run()
        self.prepare_training()
        super().on_train_start()
        self.save_run("start")

    def prepare_training(self) -> None:
        """What has to be there before nnU-Net's own preparations."""

    def on_epoch_end(self):
        epoch = self.current_epoch
        if (epoch + 1) % self.progress_png_every:
            self.logger.plot_progress_png = lambda output_folder: None
        try:
            super().on_epoch_end()
        finally:  # the last epoch of a time budget ends with an exception
            self.logger.__dict__.pop("plot_progress_png", None)
            self.run.epochs.append(self.describe_epoch(epoch))
            self.save_run("training")

    def describe_epoch(self, epoch: int) -> dict:
        loss, dice, start, end = (
            float(self.logger.get_value(key, step=epoch))
            for key in ("train_losses", "mean_fg_dice", "epoch_start_timestamps", "epoch_end_timestamps")
        )
        return {"epoch": epoch, "loss": loss, "pseudo_dice": dice, "seconds": end - start}

    def on_train_end(self):
        if self.current_epoch % self.progress_png_every and not self.local_rank:
            self.logger.plot_progress_png(self.output_folder)
        super().on_train_end()
        self.save_run("training")
        for place, peak in self.run.peak_memory_gb.items():
            self.print_to_log_file(f"Peak memory of this process, {place}: {peak:.3f} GB.")

    # ---- validation ----

    def perform_actual_validation(self, save_probabilities: bool = False):
        queries = self.do_split()[1]
        if not queries:
            self.print_to_log_file("No labelled queries: the final validation is skipped.")
            return
        if not validates():
            self.print_to_log_file("The final validation is skipped: fseft_final_validation is 0.")
            return
        # nnU-Net averages over every segmentation in the folder, including those of earlier draws
        for file in Path(self.output_folder, "validation").glob(f"*{self.dataset_json['file_ending']}"):
            if file.name.removesuffix(self.dataset_json["file_ending"]) not in queries:
                file.unlink()
        self.clock = StageClock()
        with failures_of_the_device(self.output_folder):
            self.validate_queries(save_probabilities)
        self.print_to_log_file(f"Validation results: {join(self.output_folder, 'validation', 'summary.json')}")
        try:
            self.run = self.run or RunFile.load(self.output_folder)  # with `--val` there was no training
        except InputError as error:
            self.print_to_log_file(f"The time of the validation is not kept: {error}")
        else:
            self.run.seconds.pop(VALIDATION, None)
            self.run.validation_windows = self.validation_windows
            self.save_run(VALIDATION)

    def validate_queries(self, save_probabilities: bool) -> None:
        """Segment the labelled queries into `validation`, and write its summary.json."""
        super().perform_actual_validation(save_probabilities)
