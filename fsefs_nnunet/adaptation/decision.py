"""What `fseft adapt` trains: the task, the decision and how it is made."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from time import monotonic

from fsefs_nnunet.adaptation.choice import STUDENT, Situation, measured, nearest, ranking
from fsefs_nnunet.adaptation.leave_one_out import Support, compare
from fsefs_nnunet.backbones.contract import BackboneContract
from fsefs_nnunet.backbones.store import find_backbone
from fsefs_nnunet.cases.dataset_json import read_dataset_json
from fsefs_nnunet.cases.folders import dataset_folders
from fsefs_nnunet.cases.splits import SPLITS_FILE, load_splits
from fsefs_nnunet.device import device_named
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.files import read_json
from fsefs_nnunet.methods.network import trains_decoder
from fsefs_nnunet.methods.registry import BANK, METHODS, Method, configuration_of, shots_in_words
from fsefs_nnunet.nnunet.experiment import OwnExperiment
from fsefs_nnunet.planners.fseft_planner import default_plans_name

TEACHER = "context"  # of students
COMPARED = ("fseft", "context")  # methods that leave-one-out compares
SHARE = 0.2  # of the time that the comparison may take
SHARE_OF_TEACHER = 1 / 3  # of the time that a student's teacher may take
START_SECONDS = 20  # that a training's command takes before its first epoch and for saving


@dataclass(frozen=True)
class Task:
    """What is requested: the arguments of `fseft adapt`."""

    dataset: str
    shots: int
    fold: int
    minutes: float
    backbone: str
    device: str
    num_processes: int
    other_modality: bool = False

    @property
    def plans(self) -> str:
        return default_plans_name(self.backbone)

    @property
    def configuration(self) -> str:
        """The one that is added to the plans."""
        return configuration_of(self.shots, f"_auto{self.minutes:g}")

    @property
    def core_minutes(self) -> float:
        """Minutes of one core, or of the GPU."""
        if self.device != "cpu":
            return self.minutes
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return self.minutes * (cores or 1)


@dataclass(frozen=True)
class Decision:
    """What is trained and why; kept next to the splits, so that the same call, or one for another fold, does the same.

    method: of the registry, or a student.
    why: sentences.
    minutes: left for the training; of a student, those that its teacher may take.
    """

    method: str
    why: list[str]
    minutes: float

    @classmethod
    def load(cls, file: Path) -> Decision:
        """Raises InputError for a file that is damaged or was written by another version."""
        try:
            decision = cls(**json.loads(file.read_text("utf-8")))
        except (ValueError, TypeError):
            decision = None
        if decision is None or decision.method not in {STUDENT, *METHODS}:
            raise InputError(
                f"{file} is damaged or was written by another version: delete it to have `fseft adapt` choose again."
            )
        return decision


def possible_methods(task: Task, contract: BackboneContract, configurations: dict, stock: dict, pile: int) -> set[str]:
    """Names of methods that can be trained here, and the student.

    configurations, stock: of our plans and of nnU-Net's own.
    """

    def is_planned(method: Method) -> bool:
        return configuration_of(task.shots, method.suffix) in (stock if method.plans else configurations)

    def suits_backbone(method: Method) -> bool:
        return bool(method.suffix) or not contract.encoder_only or trains_decoder(method)

    names = {n for n, m in METHODS.items() if m.trainer and is_planned(m) and suits_backbone(m)}
    return names | ({STUDENT} if pile and TEACHER in names else set())


def decide(task: Task, support: list[str], started: float) -> Decision:
    """Choose by the table and, among methods that train on stored features, by leaving one out."""
    name, raw, preprocessed = dataset_folders(task.dataset)
    plans = read_json(preprocessed / f"{task.plans}.json")
    stock_file = preprocessed / "nnUNetPlans.json"
    stock = read_json(stock_file)["configurations"] if stock_file.exists() else {}
    pile = len(load_splits(preprocessed / SPLITS_FILE)["folds"][task.fold]) - task.shots
    voxels = int(prod(plans["configurations"]["3d_fullres"]["median_image_size_in_voxels"]))
    situation = Situation(task.shots, task.core_minutes, task.device, voxels, pile)
    possible = possible_methods(task, find_backbone(task.backbone), plans["configurations"], stock, pile)
    cell = nearest(situation, measured(), possible)
    if cell is None:
        raise InputError(
            f"None of the measured methods suits backbone {task.backbone!r}: train it with FSEFTTrainer_Decoder, or "
            "choose another backbone with -b."
        )
    ranked = ranking(cell, possible)
    why = [
        f"{shots_in_words(task.shots)}, {situation.minutes:g} {task.device.upper()} minutes, {voxels:,} voxels, {pile} "
        f"cases without labels. The most similar situation that was measured: {cell.describe()}.",
        f"Dice there: {', '.join(f'{method} {dice:.3f}' for method, dice in ranked)}.",
    ]
    method = ranked[0][0]
    if method in COMPARED and task.shots > 1:
        dataset_json, device = read_dataset_json(raw / "dataset.json"), device_named(task.device)
        of_fold = Support(plans, configuration_of(task.shots), task.fold, dataset_json, device, support)
        if found := compare(COMPARED, of_fold, SHARE * 60 * task.minutes):
            method = max(found, key=found.get)
            why.append(f"Leave-one-out Dice on the support: {', '.join(f'{m} {d:.3f}' for m, d in found.items())}.")
    if method == STUDENT:
        left = round(SHARE_OF_TEACHER * minutes_left(task, started), 2)
        return Decision(method, [*why, "Chosen: a student of the context adapter."], left)
    row = METHODS[method]
    if row.plans:
        OwnExperiment.of(name, row.plans, task.device).preprocess_missing()
    left = minutes_left(task, started)
    most = " at most" if row.learns_from == BANK else ""
    return Decision(method, [*why, f"Chosen: {row.title}, for {left:.1f} minutes{most}."], left)


def minutes_left(task: Task, started: float) -> float:
    """Minutes left for the training. Raises InputError if there are none."""
    used = (monotonic() - started + START_SECONDS) / 60
    if used >= task.minutes:
        raise InputError(
            f"--minutes {task.minutes:g} leaves no time for the training: the steps before it take {used:.1f} minutes. "
            f"Give at least {ceil(2 * used)}."
        )
    return round(task.minutes - used, 2)
