"""Methods on stored features, compared on the support alone: each case is segmented by a training on the others."""

from __future__ import annotations

import gc
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import product
from tempfile import TemporaryDirectory
from time import monotonic

import numpy as np
import torch
from tqdm import tqdm

from fsefs_nnunet.backbones.frozen import backbones_stay_loaded
from fsefs_nnunet.features.crops import CropLoader, region_transform
from fsefs_nnunet.features.disk import cap_in_gb
from fsefs_nnunet.methods.registry import METHODS
from fsefs_nnunet.trainers import by_name
from fsefs_nnunet.trainers.bank_trainer import BankTrainer

EPOCHS, BATCHES = 25, 16  # of a short training; of crops of the case that is left out


@dataclass(frozen=True)
class Support:
    """What nnU-Net's trainers are made of, and the support cases of the fold."""

    plans: dict
    configuration: str
    fold: int | str
    dataset_json: dict
    device: torch.device
    cases: Sequence[str]


def left_out_dice(method: str, support: Support, case: str) -> tuple[float, float]:
    """Mean Dice over the classes, of crops of `case`, after a short training on the other support cases.

    Nothing but stored features is used: those of the support and its views, which the full training needs as well, and
    no prior, which would look at queries.

    Returns:
        The Dice, and the seconds that it took without those of the bank.
    """
    started = monotonic()

    class LeftOut(getattr(by_name, METHODS[method].trainer)):
        def do_split(self):
            return [other for other in support.cases if other != case], []

    plans = {**deepcopy(support.plans), "continue_training": False}
    trainer: BankTrainer = LeftOut(plans, support.configuration, support.fold, support.dataset_json, support.device)
    shots, views = len(support.cases), trainer.settings.views
    views = max(views // shots, min(views, 1)) * (shots - 1)  # those of each case in the full training
    trainer.settings = replace(trainer.settings, lambda_=0.0, views=views, cutmix=0.0)
    trainer.num_epochs, trainer.disable_checkpointing = EPOCHS, True
    trainer.run_training()
    trainer.network.eval()
    trainer.segmentations[case] = trainer.load_case(case)[1][:]
    filled = monotonic()
    request = trainer.request(case, trainer.kept_of(case), statistics=True)
    trainer.bank.fill([request], cap_in_gb(trainer.settings.bank_gb), trainer.print_to_log_file)
    bank_seconds = trainer.run.seconds["feature bank"] + monotonic() - filled
    crops = CropLoader(
        trainer.bank,
        {case: trainer.segmentations[case]},
        trainer.settings.crop_size,
        trainer.settings.crops_per_step,
        (trainer.settings.seed,),
        region_transform(trainer.label_manager),
        trainer.label_manager.ignore_label,
    )
    with torch.no_grad():
        counts = [trainer.validation_step(next(crops)) for _ in range(BATCHES)]
    tp, fp, fn = (np.sum([count[key] for count in counts], 0) for key in ("tp_hard", "fp_hard", "fn_hard"))
    shown = (tp + fp + fn) > 0
    dice = (2 * tp / np.maximum(2 * tp + fp + fn, 1))[shown].mean() if shown.any() else 1.0
    return float(dice), monotonic() - started - bank_seconds


@contextmanager
def results_elsewhere() -> Iterator[None]:
    """Within the block, nnU-Net's folder of results is a temporary one."""
    before = os.environ.get("nnUNet_results")
    with TemporaryDirectory() as folder:
        os.environ["nnUNet_results"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["nnUNet_results"]
            else:
                os.environ["nnUNet_results"] = before


def compare(methods: Sequence[str], support: Support, seconds: float) -> dict[str, float]:
    """Mean Dice of the cases that are left out, by method; {} if it would take more than `seconds`."""
    found: dict[str, list[float]] = {method: [] for method in methods}
    trainings, used = list(product(support.cases, methods)), 0.0
    with results_elsewhere(), backbones_stay_loaded():
        for done, (case, method) in enumerate(tqdm(trainings, desc="leaving one out"), 1):
            with redirect_stdout(io.StringIO()):  # nnU-Net describes each training on a screen or two
                dice, took = left_out_dice(method, support, case)
            found[method].append(dice)
            used += took
            gc.collect()
            if support.device.type == "cuda":
                torch.cuda.empty_cache()  # the training that follows runs in another process
            if used / done * len(trainings) > seconds:
                print(
                    f"The leave-one-out comparison is skipped: {len(trainings)} short trainings of {used / done:.0f} s "
                    f"would take more than {seconds:.0f} s."
                )
                return {}
    return {method: float(np.mean(dice)) for method, dice in found.items()}
