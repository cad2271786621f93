"""Transductive inference: the trained adapter is adapted to one volume under the size prior."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fsefs_nnunet.device import reduced_precision
from fsefs_nnunet.methods.network import AdaptedNetwork
from fsefs_nnunet.priors.query_volumes import PredictedSizes, QueryVolume
from fsefs_nnunet.priors.size import size_penalty
from fsefs_nnunet.priors.support_memory import SupportMemory

WEIGHT = 1.0
LEARNING_RATE = 1e-4  # larger first steps of AdamW overshoot the band
MAX_STEPS = 30


@dataclass(frozen=True)
class Transduction:
    """A few steps of L_SEG(support) + WEIGHT * L_TI(query), Eq. (3) of FSEFT (arXiv 2303.17051).

    They stop as soon as every size lies within its band: a volume whose sizes are as expected stays as it is.

    prior_ml: S of each foreground class in ml (classes,), NaN where there is none.
    tolerance: relative deviation of each class that costs nothing (classes,).
    loss: L_SEG of logits and targets.
    """

    prior_ml: torch.Tensor
    tolerance: torch.Tensor
    memory: SupportMemory
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    has_regions: bool

    def adapt(self, network: AdaptedNetwork, volume: QueryVolume, before: PredictedSizes) -> int:
        """Train `network` in place.

        before: what it predicts on the whole volume, which `volume` may show averaged over blocks; decides which
            classes may grow.

        Returns:
            The number of steps. They end, too, where a size is no longer finite: look at what the network gives then.
        """
        optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=0.0)
        device = network.feature_mean.device
        known = self.prior_ml.isfinite()
        prior, tolerance = self.prior_ml[known].to(device), self.tolerance[known].to(device)
        seen_whole = before.seen_whole(self.prior_ml)[known].to(device)
        for step in range(MAX_STEPS):
            features, target = (tensor.to(device) for tensor in self.memory.batch(step))
            predicted = volume.predict(network, self.has_regions).soft[known]
            penalty = size_penalty(predicted, prior, tolerance, seen_whole).sum()
            if not penalty > 0:
                return step
            with reduced_precision(device):
                logits = network.adapt(features)
            loss = self.loss(logits, target) + WEIGHT * penalty
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 12)
            optimizer.step()
        return MAX_STEPS
