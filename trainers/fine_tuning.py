"""Methods that train in the backbone together with the head, on nnU-Net's patches."""

from __future__ import annotations

import torch

from fsefs_nnunet.trainers.adapted_trainer import AdaptedTrainer
from fsefs_nnunet.trainers.augmentation import transforms_for_few_cases
from fsefs_nnunet.trainers.patch_trainer import PatchTrainer


class FineTuningTrainer(AdaptedTrainer, PatchTrainer):
    """Trains the method's part of the backbone, and the head, which reads the backbone's last features as they are.

    The rows of known classes start from the universal head's, so that step 0 is its prediction. What is not trained
    stays unchanged and is not stored in the checkpoint.
    """

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict, device=torch.device("cuda")):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.save_every = 25  # a backbone's weights and their moments take longer to write than an epoch

    @classmethod
    def get_training_transforms(cls, *args, **kwargs):
        make = transforms_for_few_cases if cls.method.more_shapes else super().get_training_transforms
        return make(*args, **kwargs)

    @property
    def seed(self) -> int:
        return self.settings.seed

    def divisor(self):
        return self.network.backbone.contract.divisor

    def on_train_start(self):
        super().on_train_start()
        self.stop_at_plateau()

    def start_network(self) -> None:
        if not self.network.is_fitted:
            features = self.network.backbone.out_channels
            self.fit_network(torch.zeros(features), torch.ones(features))
