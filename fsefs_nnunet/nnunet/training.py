"""Many trainings in one process, which starts, loads the backbone and fills the bank only once."""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from nnunetv2.run.run_training import run_training

from fsefs_nnunet.backbones.frozen import backbones_stay_loaded
from fsefs_nnunet.cases.folders import model_folder
from fsefs_nnunet.cases.splits import SPLITS_FILE, load_splits, query_cases, support_cases
from fsefs_nnunet.device import forget_peaks
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.files import read_json
from fsefs_nnunet.methods.registry import METHODS, STOCK_PLANS, configuration_of, require_trainer, shots_in_words
from fsefs_nnunet.nnunet.experiment import external_trainers
from fsefs_nnunet.trainers.kshot_trainer import DeviceFailed, validates


@dataclass(frozen=True)
class Training:
    """What one `nnUNetv2_train` would do.

    has_queries: whether there are labelled ones, which the final validation predicts.
    """

    dataset: str
    plans: str
    trainer: str
    shots: int | str
    fold: int | str
    has_queries: bool = True

    @property
    def configuration(self) -> str:
        stock = self.plans == STOCK_PLANS
        suffixes = {m.suffix for m in METHODS.values() if m.trainer == self.trainer and bool(m.plans) == stock}
        return configuration_of(self.shots, next(iter(suffixes), ""))

    @property
    def title(self) -> str:
        return f"{self.trainer}, {shots_in_words(self.shots)}, fold {self.fold}"

    @property
    def folder(self) -> Path:
        return model_folder(self.dataset, self.trainer, self.plans, self.configuration) / f"fold_{self.fold}"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint_final.pth"

    @property
    def summary(self) -> Path:
        """File of the final validation."""
        return self.folder / "validation" / "summary.json"

    @property
    def is_done(self) -> bool:
        """Whether it is trained and, if requested, validated."""
        if not self.checkpoint.exists() or not (validates() and self.has_queries):
            return self.checkpoint.exists()
        return self.summary.exists() and self.summary.stat().st_mtime >= self.checkpoint.stat().st_mtime


@dataclass(frozen=True)
class Options:
    """nnUNetv2_train's."""

    npz: bool = False
    continues: bool = False
    validates_alone: bool = False
    validates_best: bool = False
    disable_checkpointing: bool = False


def plan_trainings(
    dataset: str, preprocessed: Path, plans: str, shots: Sequence, folds: Sequence, trainers: Sequence[str]
) -> list[Training]:
    """The grid: shots first, then folds, then trainers, so that neighbours share the bank's entries.

    Args:
        preprocessed: nnU-Net's folder of the dataset.
        shots: default: those of the plans.

    Raises:
        InputError: for a trainer, a configuration or a fold that is not there.
    """
    file = preprocessed / f"{plans}.json"
    if not file.exists():
        raise InputError(
            f"{file} is missing: make it with `fseft plan_and_preprocess -d ID`, or choose other plans with -p."
        )
    for trainer in trainers:
        require_trainer(trainer)
    configurations = read_json(file)["configurations"]
    planned = dict.fromkeys(c["fseft_shots"] for c in configurations.values() if "fseft_shots" in c)
    splits, made = load_splits(preprocessed / SPLITS_FILE), []
    for k in dict.fromkeys(shots or planned):
        for fold in dict.fromkeys(folds):
            support_cases(splits, k, fold)
            has_queries = bool(query_cases(splits, fold)[0])
            made += [Training(dataset, plans, trainer, k, fold, has_queries) for trainer in dict.fromkeys(trainers)]
    for training in made:
        if training.configuration not in configurations:
            raise InputError(
                f"Plans {plans!r} have no configuration {training.configuration!r}: plan again with `fseft plan -d ID "
                f"--shots {training.shots}`."
            )
    return made


def run_trainings(
    trainings: Sequence[Training], device: torch.device, options: Options = Options()
) -> dict[Training, str]:
    """Run them one after another, each as `nnUNetv2_train` would; with `options.continues`, finished ones are skipped.

    Returns:
        Why trainings failed; the others continue, unless the GPU fails.
    """
    os.environ["nnUNet_extTrainer"] = external_trainers()
    failures: dict[Training, str] = {}
    state = torch.get_rng_state()  # nnU-Net initialises networks from the state of a fresh process
    with backbones_stay_loaded():
        for number, training in enumerate(trainings, 1):
            place = f"[{number}/{len(trainings)}] {training.title}"
            if options.continues and training.is_done:
                print(f"{place}: already done.", flush=True)
                continue
            print(place, flush=True)
            torch.set_rng_state(state)
            forget_peaks(device)
            try:
                _run(training, device, options)
            except DeviceFailed as error:
                failures[training] = str(error)
                left = [one for one in trainings[number:] if not (options.continues and one.is_done)]
                return failures | dict.fromkeys(left, "not started, because the GPU had failed")
            except Exception as error:  # libraries may raise anything
                if not isinstance(error, InputError):
                    traceback.print_exc()
                failures[training] = str(error) or type(error).__name__
                print(f"{training.title} failed: {failures[training]}", flush=True)
            gc.collect()
            torch.compiler.reset()  # the compiler gives up on a function that was compiled for too many networks
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return failures


def _run(training: Training, device: torch.device, options: Options) -> None:
    if options.validates_alone and not training.checkpoint.exists():
        raise InputError(f"{training.checkpoint} is missing: train it, without --val.")
    run_training(
        training.dataset,
        training.configuration,
        training.fold,
        training.trainer,
        training.plans,
        export_validation_probabilities=options.npz,
        continue_training=options.continues,
        only_run_validation=options.validates_alone,
        disable_checkpointing=options.disable_checkpointing,
        val_with_best=options.validates_best,
        device=device,
    )
