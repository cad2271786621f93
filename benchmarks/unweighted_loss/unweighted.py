"""FSEFTPretrainer without weights of voxels, for pretrain_hippocampus.py; nnU-Net finds it by nnUNet_extTrainer."""

from __future__ import annotations

import torch

from fsefs_nnunet.losses.partial_labels import PartialLabelLoss
from fsefs_nnunet.trainers.pretrainer import FSEFTPretrainer


class UnweightedLoss(PartialLabelLoss):
    def weight_of_class(self, target: torch.Tensor) -> torch.Tensor:
        return torch.ones((), device=target.device)


class FSEFTPretrainer_Unweighted(FSEFTPretrainer):
    def _build_loss(self):
        return UnweightedLoss()
