"""The size prior of FSEFT (arXiv 2303.17051, Eq. 2): organ sizes of the support cases constrain the query's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from functools import lru_cache

import numpy as np
import torch

from fsefs_nnunet.errors import InputError
from fsefs_nnunet.priors.prior import Prior, SupportLabels
from fsefs_nnunet.priors.volumes import PredictedSizes, VolumePrediction

MOST_TOLERANCE = 0.9  # a class must not be allowed to vanish


@dataclass(frozen=True)
class ExpectedSize:
    """Expected size of a class in ml, the mean of `num_cases` support cases.

    spread: standard deviation in ml of all support cases that show the class.
    """

    size: float
    spread: float
    num_cases: int

    def tolerance(self, gamma: float) -> float:
        """Relative deviation from `size` that costs nothing: gamma, or two standard deviations if that is more."""
        return min(max(gamma, 2 * self.spread / self.size), MOST_TOLERANCE)


@dataclass(frozen=True)
class SizePrior(Prior):
    """expected: of each foreground class, None where no support case shows it whole."""

    expected: tuple[ExpectedSize | None, ...]

    @classmethod
    def estimate(cls, support: SupportLabels) -> SizePrior:
        columns = np.array([*support.sizes_ml.values()]).T if support.sizes_ml else [[]] * len(support.classes)
        return cls(tuple(estimate_size(column) for column in columns))

    def penalty(self, prediction: VolumePrediction, gamma: float) -> torch.Tensor:
        """Eq. (2) in shares of S, averaged over the classes that have a prior."""
        known, prior_ml, tolerance = _tensors(self, gamma, prediction.sizes.soft.device)
        seen = prediction.sizes if prediction.before is None else prediction.before
        whole = seen[known].seen_whole(prior_ml)
        return size_penalty(prediction.sizes.soft[known], prior_ml, tolerance, whole).mean()

    def why_no_effect(self) -> str | None:
        return None if any(self.expected) else "no support case shows a class whole"

    def report(self, names: Sequence[str], gamma: float) -> dict[str, dict | None]:
        return {
            name: expected and {**asdict(expected), "tolerance": expected.tolerance(gamma)}
            for name, expected in zip(names, self.expected)
        }

    def describe(self, names: Sequence[str], gamma: float) -> list[str]:
        return [
            f"Size prior of {name}: {expected.size:.2f} ml, spread {expected.spread:.2f} ml, {expected.num_cases} "
            f"cases, tolerated {expected.tolerance(gamma):.0%}"
            if expected
            else f"Size prior of {name}: none"
            for name, expected in zip(names, self.expected)
        ]

    def state(self) -> list[tuple[float, float, int] | None]:
        return [expected and astuple(expected) for expected in self.expected]

    @classmethod
    def from_state(cls, state: object) -> SizePrior:
        return cls(tuple(numbers and ExpectedSize(*numbers) for numbers in state))

    def agrees_with(self, other: Prior) -> bool:
        pairs = list(zip(self.expected, other.expected))
        return len(self.expected) == len(other.expected) and all(
            a is b if a is None or b is None else a.num_cases == b.num_cases and np.isclose(a.size, b.size, 1e-6)
            for a, b in pairs
        )

    def remarks(self, sizes: PredictedSizes, names: Sequence[str]) -> dict[str, list[str]]:
        known, prior_ml, _ = _tensors(self, 0.0, sizes.soft.device)
        absent, at_border = sizes[known].absent(prior_ml), sizes[known].at_border
        reasons = {
            names[k]: ["seems absent"] * is_absent + ["reaches the border of the volume"] * is_cut
            for k, is_absent, is_cut in zip(known.tolist(), absent.tolist(), at_border.tolist())
        }
        return {name: of_class for name, of_class in reasons.items() if of_class}


@lru_cache(maxsize=16)
def _tensors(prior: SizePrior, gamma: float, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the classes that have a prior: their indices, S in ml, and the relative deviation that costs nothing."""
    known = {k: expected for k, expected in enumerate(prior.expected) if expected}
    sizes, tolerances = [e.size for e in known.values()], [e.tolerance(gamma) for e in known.values()]
    return torch.tensor([*known], device=device).long(), *(torch.tensor(v, device=device) for v in (sizes, tolerances))


def estimate_size(sizes_ml: Sequence[float]) -> ExpectedSize | None:
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
    return ExpectedSize(float(sizes.mean()), spread, len(sizes))


def size_penalty(
    predicted: torch.Tensor, prior: torch.Tensor, gamma: float | torch.Tensor, seen_whole: torch.Tensor | None = None
) -> torch.Tensor:
    """Eq. (2) divided by S: how far the predicted size S^ lies outside [(1 - gamma) S, (1 + gamma) S], as a share of S.

    Dividing by S alone, not by max(S, S^), keeps the pull on S^ at 1 / S however far it is off.

    Args:
        predicted: S^, the sums of the soft prediction, any shape.
        prior: S > 0, same shape and unit as `predicted`.
        gamma: tolerated relative deviation in [0, 1), one for all or shape of `predicted`.
        seen_whole: bool, shape of `predicted`; where false, a size below the prior costs nothing. Default: all true.

    Returns:
        Elementwise penalty, shape of `predicted`.
    """
    below = ((1 - gamma) * prior - predicted).relu()
    if seen_whole is not None:
        below = below * seen_whole
    above = (predicted - (1 + gamma) * prior).relu()
    return (below + above) / prior
