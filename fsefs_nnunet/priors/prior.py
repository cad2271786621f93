"""What a prior is: an expectation of the unlabelled volumes, estimated from the support's labels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

    from fsefs_nnunet.priors.volumes import PredictedSizes, VolumePrediction


@dataclass(frozen=True, eq=False)
class SupportLabels:
    """The label maps of the support, all that a prior may look at.

    segmentations: (1, X, Y, Z) of integers by case.
    classes: labels or regions (tuples of labels), in the order of the network's foreground outputs.
    spacing_mm: per axis.
    """

    segmentations: dict[str, np.ndarray]
    classes: Sequence[int | tuple[int, ...]]
    spacing_mm: Sequence[float]
    ignore_label: int | None = None

    @cached_property
    def whole(self) -> dict[str, np.ndarray]:
        """The label maps without ignored voxels; only they show whole organs."""
        return {
            case: segmentation
            for case, segmentation in self.segmentations.items()
            if self.ignore_label is None or not (segmentation == self.ignore_label).any()
        }

    @cached_property
    def sizes_ml(self) -> dict[str, np.ndarray]:
        """Volume of each class in ml (len(classes),) by case, of `whole`."""
        voxels = {
            case: np.array([np.isin(segmentation, labels).sum() for labels in self.classes])
            for case, segmentation in self.whole.items()
        }
        return {case: counts * np.prod(self.spacing_mm) / 1000 for case, counts in voxels.items()}

    @cached_property
    def at_border(self) -> dict[str, np.ndarray]:
        """Whether each class reaches an outermost voxel of the label map (len(classes),) by case, of all cases.

        nnU-Net crops images to their nonzero region, so these voxels lie where the scan ends, apart from empty slices.
        A -1 within the label map marks a background of zeros, e.g. air around the body or a removed skull: an organ
        that touches it is not cut off.
        """
        faces = [(axis, end) for axis in (0, 1, 2) for end in (0, -1)]
        return {
            case: np.array(
                [
                    any(np.isin(segmentation[0].take(end, axis), labels).any() for axis, end in faces)
                    for labels in self.classes
                ]
            )
            for case, segmentation in self.segmentations.items()
        }


class Prior(ABC):
    """One object for all foreground classes. One file each, and a key in PRIORS that rows of the registry name.

    Trainings and `fseft predict` call `penalty` on predictions of unlabelled volumes; checkpoints keep `state`.
    """

    @classmethod
    @abstractmethod
    def estimate(cls, support: SupportLabels) -> Prior:
        """Estimate it from the labels of the support. Classes about which they say nothing reliable have no prior."""

    @abstractmethod
    def penalty(self, prediction: VolumePrediction, gamma: float) -> torch.Tensor:
        """L_TI of Eq. (3): how far a prediction is from what is expected, a scalar averaged over the classes.

        gamma: relative deviation that costs nothing; a prior may tolerate more.
        """

    @abstractmethod
    def why_no_effect(self) -> str | None:
        """Why the support's labels gave no prior for any class; None if they gave one."""

    @abstractmethod
    def report(self, names: Sequence[str], gamma: float) -> dict[str, dict | None]:
        """Numbers that say what is expected of each class, by its name; None for a class without prior."""

    @abstractmethod
    def describe(self, names: Sequence[str], gamma: float) -> list[str]:
        """The same as lines for the log, which say why a class has no prior."""

    @abstractmethod
    def state(self) -> object:
        """Plain numbers, lists and dictionaries that `from_state` restores the prior from."""

    @classmethod
    @abstractmethod
    def from_state(cls, state: object) -> Prior:
        """The inverse of `state`."""

    @abstractmethod
    def agrees_with(self, other: Prior) -> bool:
        """Whether two priors belong to the same labels, up to rounding."""

    def remarks(self, sizes: PredictedSizes, names: Sequence[str]) -> dict[str, list[str]]:
        """Reasons, by class name, why classes must not be enlarged in a volume; sizes: of all classes."""
        return {}
