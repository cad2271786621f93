"""The size prior of FSEFT (arXiv 2303.17051, Eq. 2): organ sizes of the support cases constrain the query's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fsefs_nnunet.errors import InputError

if TYPE_CHECKING:
    import torch


MOST_TOLERANCE = 0.9  # a class must not be allowed to vanish


@dataclass(frozen=True)
class SizePrior:
    """Expected size of a class in ml, the mean of `num_cases` support cases.

    spread: standard deviation in ml of all support cases that show the class.
    """

    size: float
    spread: float
    num_cases: int

    def tolerance(self, gamma: float) -> float:
        """Relative deviation from `size` that costs nothing: gamma, or two standard deviations if that is more."""
        return min(max(gamma, 2 * self.spread / self.size), MOST_TOLERANCE)


def estimate_size(sizes_ml: Sequence[float]) -> SizePrior | None:
    """Prior from one class's sizes in the support cases; cases without the class (0 ml) do not enter.

    Up to 4 sizes: their mean. From 5 on: the mean of those within one standard deviation of the median, so that one
    mislabelled or cut-off organ does not shift it.

    Returns:
        None if no case has the class.

    Raises:
        InputError: for a size that is negative or not finite.
    """
    sizes = np.asarray(sizes_ml, dtype=float)
    if not np.all(np.isfinite(sizes) & (sizes >= 0)):
        raise InputError(
            f"Sizes must be finite and not negative, they are {sizes.tolist()} ml: check labels and spacing."
        )
    sizes = sizes[sizes > 0]
    if not len(sizes):
        return None
    spread = float(sizes.std())
    if len(sizes) >= 5:
        median = np.median(sizes)
        # The bound belongs to the interval: equal sizes lie on it, and so do those of two equally large groups.
        # Rounding must not push these out, it would leave no size at all.
        sizes = sizes[np.abs(sizes - median) <= spread + 1e-9 * median]
    return SizePrior(float(sizes.mean()), spread, len(sizes))


def size_penalty(
    predicted: torch.Tensor, prior: torch.Tensor, gamma: float | torch.Tensor, seen_whole: torch.Tensor | None = None
) -> torch.Tensor:
    """Eq. (2) divided by S: how far the predicted size S^ lies outside [(1 - gamma) S, (1 + gamma) S], as a share of S.

    Dividing by S alone, not by max(S, S^), keeps the pull on S^ at 1 / S however far it is off.

    Args:
        predicted: S^, the sums of the soft prediction, any shape.
        prior: S, same shape and unit as `predicted`.
        gamma: tolerated relative deviation, one for all or shape of `predicted`.
        seen_whole: bool, shape of `predicted`; where false, a size below the prior costs nothing. Default: all true.

    Returns:
        Elementwise penalty, shape of `predicted`.

    Raises:
        ValueError: if gamma is outside [0, 1) or a prior is not positive.
    """
    of_each = [gamma] if isinstance(gamma, (int, float)) else gamma.flatten().tolist()
    if not all(0 <= value < 1 for value in of_each):
        raise ValueError(f"gamma must lie in [0, 1), it is {gamma}.")
    if not (prior > 0).all():
        raise ValueError(f"Prior sizes must be positive, they are {prior.tolist()}: leave out classes without a prior.")
    below = ((1 - gamma) * prior - predicted).relu()
    if seen_whole is not None:
        below = below * seen_whole
    above = (predicted - (1 + gamma) * prior).relu()
    return (below + above) / prior


def label_volumes_ml(
    label_map: np.ndarray, classes: list[int | tuple[int, ...]], spacing_mm: Sequence[float]
) -> np.ndarray:
    """Volume of each class or region (tuple of labels) in ml: label map (X, Y, Z) of integers -> (len(classes),)."""
    voxels = [np.isin(label_map, labels).sum() for labels in classes]
    return np.array(voxels) * np.prod(spacing_mm) / 1000


def support_sizes_ml(
    segmentations: dict[str, np.ndarray],
    classes: list[int | tuple[int, ...]],
    spacing_mm: Sequence[float],
    ignore_label: int | None,
) -> dict[str, np.ndarray]:
    """Sizes (len(classes),) in ml in the label maps of support cases; a case with ignored voxels shows none whole."""
    return {
        case: label_volumes_ml(segmentation, classes, spacing_mm)
        for case, segmentation in segmentations.items()
        if ignore_label is None or not (segmentation == ignore_label).any()
    }


def estimate_sizes(sizes_ml: dict[str, np.ndarray], num_classes: int) -> list[SizePrior | None]:
    """The prior of each class from what `support_sizes_ml` gave."""
    columns = np.array([*sizes_ml.values()]).T if sizes_ml else [[]] * num_classes
    return [estimate_size(column) for column in columns]
