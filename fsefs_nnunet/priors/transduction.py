"""Transductive inference: the trained adapter is adapted to one volume under the prior."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fsefs_nnunet.device import denormals_as_zero, without_scaling
from fsefs_nnunet.methods.network import AdaptedNetwork
from fsefs_nnunet.methods.settings import Settings
from fsefs_nnunet.priors.objective import objective, support_loss
from fsefs_nnunet.priors.prior import Prior
from fsefs_nnunet.priors.support_memory import SupportMemory
from fsefs_nnunet.priors.volumes import PredictedSizes, QueryVolume


@dataclass(frozen=True)
class Transduction:
    """A few steps of Eq. (3), with the volume as the query.

    They stop as soon as the prior is satisfied: a volume that looks as expected is left unchanged.

    loss: L_SEG of logits and targets.
    settings: weight, tolerance, rate and most steps, `fseft_predict_...`.
    """

    prior: Prior
    memory: SupportMemory
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    settings: Settings
    has_regions: bool

    def adapt(self, network: AdaptedNetwork, volume: QueryVolume, before: PredictedSizes) -> int:
        """Train `network` in place.

        before: what it predicts on the whole volume, which `volume` may show averaged over blocks; decides which
            classes may grow.

        Returns:
            The number of steps. They also end if the penalty is no longer finite: check the network's output in that
            case.
        """
        with without_scaling(network.feature_mean.device):
            return self._adapt(network, volume, before)

    def _adapt(self, network: AdaptedNetwork, volume: QueryVolume, before: PredictedSizes) -> int:
        settings, device = self.settings, network.feature_mean.device
        optimizer = torch.optim.AdamW(network.parameters(), settings.predict_lr, weight_decay=0.0)
        before = before.to(device)
        for step in range(settings.predict_steps):
            penalty = self.prior.penalty(volume.predict(network, self.has_regions, before), settings.predict_gamma)
            if not penalty > 0:
                return step
            features, target = (tensor.to(device) for tensor in self.memory.batch(step))
            loss = objective(support_loss(network, features, target, self.loss), penalty, settings.predict_lambda)
            optimizer.zero_grad(set_to_none=True)
            with denormals_as_zero():
                loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 12)
            optimizer.step()
        return settings.predict_steps
