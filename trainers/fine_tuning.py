"""Baselines that train a part of the backbone together with the head, on nnU-Net's patches."""

from __future__ import annotations

import torch

from fsefs_nnunet.trainers.adapted_trainer import AdaptedTrainer
from fsefs_nnunet.trainers.patch_trainer import PatchTrainer


class FineTuningTrainer(AdaptedTrainer, PatchTrainer):
    """Trains the part `tuned` of the backbone and the head, which reads the backbone's last features as they are.

    The rows of known classes start from the universal head's, so that step 0 is its prediction. What is not trained
    stays as it is, and out of the checkpoint.
    """

    adapter = "linear_probe"
    stages = "last"

    def divisor(self):
        return self.network.backbone.contract.divisor

    def on_train_start(self):
        if not self.was_initialized:
            self.initialize()
        if not self.network.is_fitted:
            features = self.network.backbone.out_channels
            self.fit_network(torch.zeros(features), torch.ones(features))
        super().on_train_start()
        self.stop_at_plateau()


class FSEFTTrainer_FTLast(FineTuningTrainer):
    """The last block of the decoder and the head; recipe of v1."""

    tuned = "last_block"
    initial_lr_of_method = 1e-2
    weight_decay_of_method = 1e-5


class FSEFTTrainer_Decoder(FineTuningTrainer):
    """The decoder and the head; recipe of v4."""

    tuned = "decoder"
    epochs_of_method = 200


class FSEFTTrainer_FT(FineTuningTrainer):
    """Everything; recipe of v1."""

    tuned = "all"
    weight_decay_of_method = 1e-5
    epochs_of_method = 150
