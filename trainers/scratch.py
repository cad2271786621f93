"""The baseline without a backbone: stock nnU-Net on the same support cases, for a given wall time."""

from __future__ import annotations

from pathlib import Path

import torch

from fsefs_nnunet.errors import InputError
from fsefs_nnunet.splits import SPLITS_FILE, load_splits, query_cases, support_cases
from fsefs_nnunet.trainers.time_budget import TimeBudgetTrainer


class FSEFTTrainer_Scratch(TimeBudgetTrainer):
    """nnUNetTrainer on the support cases of a configuration `3d_fullres_<K>shot_scratch` of FSEFTPlanner's plans.

    Ends its schedule after `fseft_train_minutes` (environment variable). No mirroring, as with the adapters: organs
    have sides. It never looks at queries before the final validation.
    """

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict, device=torch.device("cuda")):
        super().__init__(plans, configuration, fold, dataset_json, device)
        settings = self.configuration_manager.configuration
        if "fseft_shots" not in settings or "fseft_backbone" in settings:
            raise InputError(
                f"{configuration!r} of plans {self.plans_manager.plans_name!r} is no baseline: make plans with `fseft "
                "plan_and_preprocess -d ID` and train one of 3d_fullres_1shot_scratch, _5shot_scratch, ..."
            )
        self.shots = settings["fseft_shots"]
        self.num_iterations_per_epoch = 10
        self.num_val_iterations_per_epoch = 1

    def do_split(self) -> tuple[list[str], list[str]]:
        splits = load_splits(Path(self.preprocessed_dataset_folder_base) / SPLITS_FILE)
        return support_cases(splits, self.shots, self.fold), query_cases(splits, self.fold)[0]

    def get_tr_and_val_datasets(self):
        support = self.do_split()[0]
        # the online validation, and with it checkpoint_best, looks at the support alone
        return tuple(self.dataset_class(self.preprocessed_dataset_folder, list(support)) for _ in range(2))

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self):
        rotation, dummy_2d, initial_patch_size, _ = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        self.inference_allowed_mirroring_axes = None
        return rotation, dummy_2d, initial_patch_size, None

    def perform_actual_validation(self, save_probabilities: bool = False):
        if self.do_split()[1]:
            super().perform_actual_validation(save_probabilities)
