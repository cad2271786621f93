"""A trained fold that labels unlabelled cases."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from fsefs_nnunet.cases.dataset_json import read_dataset_json
from fsefs_nnunet.cases.folders import model_folder
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.files import read_json
from fsefs_nnunet.nnunet.experiment import external_trainers


@dataclass(frozen=True)
class Teacher:
    """A trained fold whose support becomes the true cases of a student's dataset."""

    dataset: str
    trainer: str
    plans: str
    configuration: str
    fold: int | str

    @property
    def folder(self) -> Path:
        return model_folder(self.dataset, self.trainer, self.plans, self.configuration)

    @property
    def checkpoint(self) -> Path:
        return self.folder / f"fold_{self.fold}" / "checkpoint_final.pth"

    @property
    def name(self) -> str:
        """The fold's folder, relative to nnUNet_results."""
        return str(self.checkpoint.parent.relative_to(self.folder.parent.parent))

    @cached_property
    def plans_manager(self) -> PlansManager:
        """Raises InputError if the model is missing."""
        plans, *others = (self.folder / "plans.json", self.folder / "dataset.json", self.checkpoint)
        for file in (plans, *others):
            if not file.exists():
                raise InputError(f"{file} is missing: train the teacher, or check -d, -tr, -p, -c and -f.")
        read_dataset_json(self.folder / "dataset.json")
        if self.configuration not in read_json(plans).get("configurations", {}):
            raise InputError(f"{plans} has no {self.configuration}: restore it, or train the teacher again.")
        return PlansManager(read_json(plans))

    @property
    def keys(self) -> dict:
        """The configuration's keys, with those that it inherits."""
        return self.plans_manager.get_configuration(self.configuration).configuration

    @cached_property
    def reader(self) -> BaseReaderWriter:
        return self.plans_manager.image_reader_writer_class()

    def predictor(self, device: torch.device) -> nnUNetPredictor:
        os.environ["nnUNet_extTrainer"] = external_trainers()
        predictor = nnUNetPredictor(use_mirroring=False, device=device, allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(self.folder), (self.fold,), self.checkpoint.name)
        return predictor
