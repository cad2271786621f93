"""The baseline without pretraining: nnU-Net on the same support cases, for a given time."""

from __future__ import annotations

import torch

from fsefs_nnunet.errors import InputError
from fsefs_nnunet.methods.settings import is_k_shot
from fsefs_nnunet.trainers.patch_trainer import PatchTrainer


class FSEFTTrainer_Scratch(PatchTrainer):
    """nnUNetTrainer on the support cases, for two kinds of configurations.

    `3d_fullres_<K>shot_scratch` is the backbone's architecture with random weights, if the backbone is one of
    nnU-Net's; `3d_fullres_<K>shot_nnunet`, in nnUNetPlans.json, is what nnU-Net plans for the data.
    No mirroring, as with the adapters: organs have sides.
    """

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict, device=torch.device("cuda")):
        super().__init__(plans, configuration, fold, dataset_json, device)
        keys = self.configuration_manager.configuration
        if "fseft_shots" not in keys or is_k_shot(keys):
            raise InputError(
                f"{configuration!r} of plans {self.plans_manager.plans_name!r} is not a baseline: make plans with "
                "`fseft plan_and_preprocess -d ID` and train one of 3d_fullres_1shot_scratch, _5shot_scratch, ..."
            )
        self.num_iterations_per_epoch = 10
        self.num_val_iterations_per_epoch = 1
