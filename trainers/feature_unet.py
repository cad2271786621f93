"""FSEFTTrainer_UNet: a small U-Net's decoder on image and frozen features."""

from __future__ import annotations

import torch

from fsefs_nnunet.features.packing import mean_and_deviation
from fsefs_nnunet.methods.registry import METHODS
from fsefs_nnunet.trainers.fine_tuning import FineTuningTrainer
from fsefs_nnunet.trainers.kshot_trainer import KShotTrainer

STATISTICS_BATCHES = 8


class FSEFTTrainer_UNet(FineTuningTrainer):
    """Trains on nnU-Net's patches, as fine-tuning does: the features of a patch are computed in the step."""

    method = METHODS["unet"]

    def start_network(self) -> None:
        if not self.network.is_fitted:
            self.fit_network(*self.feature_statistics())

    @torch.no_grad()
    def feature_statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation (C,) of the features of a few patches of the support."""
        sums = torch.zeros(3, self.network.backbone.out_channels, dtype=torch.float64)
        self.seed_draws(0)
        loaders = self.get_dataloaders()
        for _ in range(STATISTICS_BATCHES):
            maps = self.network.backbone(next(loaders[0])["data"].to(self.device))
            sums += torch.cat([_moments(m) for m in maps], 1).cpu()
        self.close_loaders(*loaders)
        return mean_and_deviation(*sums.numpy())

    def validate_queries(self, save_probabilities: bool) -> None:
        # windows of logits, as nnUNetv2_predict blends them: the network sees whole windows
        KShotTrainer.validate_queries(self, save_probabilities)


def _moments(m: torch.Tensor) -> torch.Tensor:
    """Number, sum and sum of squares of each channel of a map (B, C, x, y, z): (3, C)."""
    m = m.double().transpose(0, 1).flatten(1)
    return torch.stack([torch.full_like(m[:, 0], m.shape[1]), m.sum(1), m.square().sum(1)])
