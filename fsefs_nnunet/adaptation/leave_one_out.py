"""What trains on stored features, compared on the support alone: each case is segmented by a training on the others."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from tempfile import TemporaryDirectory

import numpy as np
import torch

from fsefs_nnunet.features.crops import CropLoader, region_transform
from fsefs_nnunet.methods.registry import METHODS
from fsefs_nnunet.trainers import by_name
from fsefs_nnunet.trainers.bank_trainer import BankTrainer

EPOCHS, BATCHES = 25, 16  # of a short training; of crops of the case that is left out


def left_out_dice(
    method: str, plans: dict, configuration: str, fold: int | str, dataset_json: dict, device: torch.device, case: str
) -> tuple[float, float]:
    """Mean Dice over the classes, of crops of `case`, after a short training on the other support cases.

    Nothing but stored features is used: those of the support and its views, which the full training needs as well, and
    no prior, which would look at queries.

    Returns:
        The Dice, and the seconds of the training without those of the bank.
    """

    class LeftOut(getattr(by_name, METHODS[method].trainer)):
        def do_split(self):
            support, _ = super().do_split()
            return [other for other in support if other != case], []

    trainer: BankTrainer = LeftOut(plans, configuration, fold, dataset_json, device)
    shots = len(trainer.do_split()[0]) + 1
    views = trainer.settings.views // shots * (shots - 1)  # the same views of each case as in the full training
    trainer.settings = replace(trainer.settings, lambda_=0.0, views=views)
    trainer.num_epochs, trainer.disable_checkpointing = EPOCHS, True
    trainer.run_training()
    trainer.network.eval()
    trainer.segmentations[case] = trainer.load_case(case)[1][:]
    request = trainer.request(case, trainer.kept_of(case), statistics=True)
    trainer.bank.fill([request], None, trainer.print_to_log_file)
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
    return float(dice), trainer.run.seconds["training"]


@contextmanager
def results_elsewhere() -> Iterator[None]:
    """nnU-Net's folder of results is a temporary one."""
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


def compare(
    methods: Sequence[str],
    support: Sequence[str],
    seconds: float,
    plans: dict,
    configuration: str,
    fold: int | str,
    dataset_json: dict,
    device: torch.device,
) -> dict[str, float]:
    """Mean Dice of the cases that were left out, by method; {} where it would take more than `seconds`."""
    found: dict[str, list[float]] = {method: [] for method in methods}
    number, used = len(methods) * len(support), 0.0
    with results_elsewhere():
        for done, (case, method) in enumerate(product(support, methods), 1):
            dice, took = left_out_dice(method, plans, configuration, fold, dataset_json, device, case)
            found[method].append(dice)
            used += took
            if used / done * number > seconds:
                print(
                    f"Methods are not compared by leaving one out: {number} short trainings of {used / done:.0f} s "
                    f"would take more than {seconds:.0f} s."
                )
                return {}
    return {method: float(np.mean(dice)) for method, dice in found.items()}
