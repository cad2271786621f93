"""The size prior of FSEFT (arXiv 2303.17051, Eq. 2): organ sizes of the support cases constrain the query's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from functools import lru_cache

import numpy as np
import torch

from fsefs_nnunet.errors import InputError
from fsefs_nnunet.priors.prior import Prior, SupportLabels
from fsefs_nnunet.priors.volumes import PredictedSizes, VolumePrediction

MOST_TOLERANCE = 0.9  # a class must not be allowed to vanish
PUBLISHED_TOLERANCE = 0.3
FEW_SIZES = 3  # fewer say too little about how sizes vary
MOST_SPREAD = 0.5  # of the mean; sizes that vary more say nothing about a query's
UNKNOWN = "the support's labels gave none"
NOT_SHOWN = "no support case shows it whole"


@dataclass(frozen=True)
class ExpectedSize:
    """Expected size of a class in ml, the mean of `num_cases` support cases.

    spread: sample standard deviation (n - 1) in ml over all support cases that show the class, 0 for a single one.
    num_outliers: support cases that show the class but do not enter the mean.
    """

    size: float
    spread: float
    num_cases: int
    num_outliers: int = 0

    @property
    def num_sizes(self) -> int:
        return self.num_cases + self.num_outliers

    def tolerance(self, gamma: float) -> float:
        """Relative deviation from `size` that costs nothing: gamma, or two standard deviations if that is more.

        With fewer than three sizes it is at least the published 0.3.
        """
        if self.num_sizes < FEW_SIZES:
            gamma = max(gamma, PUBLISHED_TOLERANCE)
        return min(max(gamma, 2 * self.spread / self.size), MOST_TOLERANCE)

    def describe(self, gamma: float) -> str:
        spread = f"spread {self.spread:.2f} ml" if self.num_sizes > 1 else "spread unknown"
        cases = f"{self.num_cases} of {self.num_sizes} cases" if self.num_sizes > 1 else "one case"
        return f"{self.size:.2f} ml, {spread}, {cases}, tolerated {self.tolerance(gamma):.0%}"


@dataclass(frozen=True)
class SizePrior(Prior):
    """expected: for each foreground class, None if the support's labels say nothing reliable about its size.

    reasons: why a class has none, "" for one that has; empty for a prior that was loaded.
    """

    expected: tuple[ExpectedSize | None, ...]
    reasons: tuple[str, ...] = field(default=(), compare=False)

    @classmethod
    def estimate(cls, support: SupportLabels) -> SizePrior:
        columns = np.array([*support.sizes_ml.values()]).T if support.sizes_ml else [[]] * len(support.classes)
        cut = [[case for case, of_case in support.at_border.items() if of_case[k]] for k in range(len(support.classes))]
        expected = [estimate_size(column) for column in columns]
        reasons = [why_unreliable(column, cases) for column, cases in zip(columns, cut)]
        return cls(tuple(None if why else size for size, why in zip(expected, reasons)), tuple(reasons))

    def penalty(self, prediction: VolumePrediction, gamma: float) -> torch.Tensor:
        """Eq. (2) in shares of S, averaged over the classes that have a prior."""
        known, prior_ml, tolerance = _tensors(self, gamma, prediction.sizes.soft.device)
        seen = prediction.sizes if prediction.before is None else prediction.before
        whole = seen[known].seen_whole(prior_ml)
        return size_penalty(prediction.sizes.soft[known], prior_ml, tolerance, whole).mean()

    def why_no_effect(self) -> str | None:
        if any(self.expected):
            return None
        if not self.reasons:
            return "the support's labels gave no size of any class"
        if set(self.reasons) == {NOT_SHOWN}:
            return "no support case shows a class whole"
        classes = {why: [str(k) for k, of_k in enumerate(self.reasons, 1) if of_k == why] for why in self.reasons}
        each = (f"class {', '.join(numbers)} ({why})" for why, numbers in classes.items())
        return f"no class has an expected size: {'; '.join(each)}"

    def report(self, names: Sequence[str], gamma: float) -> dict[str, dict | None]:
        return {
            name: expected
            and {
                "size": expected.size,
                "spread": expected.spread,
                "num_cases": expected.num_cases,
                "tolerance": expected.tolerance(gamma),
            }
            for name, expected in zip(names, self.expected)
        }

    def describe(self, names: Sequence[str], gamma: float) -> list[str]:
        return [
            f"Size prior of {name}: {expected.describe(gamma) if expected else f'none, {why}'}"
            for name, expected, why in zip(names, self.expected, self.reasons or [UNKNOWN] * len(self.expected))
        ]

    def state(self) -> list[tuple[float, float, int, int] | None]:
        return [expected and astuple(expected) for expected in self.expected]

    @classmethod
    def from_state(cls, state: object) -> SizePrior:
        """Raises InputError for anything else; states of earlier versions have three numbers per class."""
        if not isinstance(state, (list, tuple)) or not all(
            of_class is None or _is_size(of_class) for of_class in state
        ):
            raise InputError(
                f"The checkpoint's size prior is {state!r} instead of expected size, spread, cases and outliers of "
                "each class, or None: train again."
            )
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


def _is_size(numbers: object) -> bool:
    """Whether these are the fields of an ExpectedSize."""
    return (
        isinstance(numbers, (list, tuple))
        and len(numbers) in (3, 4)
        and all(isinstance(number, (int, float)) and number >= 0 for number in numbers)
        and numbers[0] > 0
    )


@lru_cache(maxsize=16)
def _tensors(prior: SizePrior, gamma: float, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the classes that have a prior: their indices, S in ml, and the relative deviation that costs nothing."""
    known = {k: expected for k, expected in enumerate(prior.expected) if expected}
    sizes, tolerances = [e.size for e in known.values()], [e.tolerance(gamma) for e in known.values()]
    return torch.tensor([*known], device=device).long(), *(torch.tensor(v, device=device) for v in (sizes, tolerances))


def estimate_size(sizes_ml: Sequence[float]) -> ExpectedSize | None:
    """Prior from one class's sizes in the support cases; cases without the class (0 ml) do not enter.

    Up to 4 sizes: their mean. From 5 on: the mean of those within one standard deviation (n, as published) of the
    median, so that one mislabelled organ does not shift it.

    Returns:
        None if no case has the class.

    Raises:
        InputError: for a size that is negative or not finite.
    """
    sizes = _present(sizes_ml)
    if not len(sizes):
        return None
    kept = sizes
    if len(sizes) >= 5:
        median = np.median(sizes)
        # The bound belongs to the interval: equal sizes lie on it, and so do those of two equally large groups.
        # Rounding must not push these out: no size at all would be left.
        kept = sizes[np.abs(sizes - median) <= sizes.std() + 1e-9 * median]
    return ExpectedSize(float(kept.mean()), _sample_deviation(sizes), len(kept), len(sizes) - len(kept))


def why_unreliable(sizes_ml: Sequence[float], cut: Sequence[str]) -> str:
    """Why the sizes of a class in the support cases say nothing reliable about a query's; "" if they do.

    Args:
        cut: support cases in which the class reaches the border of the volume.
    """
    if cut:
        others = f" and {len(cut) - 1} more" if len(cut) > 1 else ""
        return f"it reaches the border of the volume in {cut[0]}{others}, so a part may be cut off"
    sizes = _present(sizes_ml)
    if not len(sizes):
        return NOT_SHOWN
    mean, spread = sizes.mean(), _sample_deviation(sizes)
    if spread > MOST_SPREAD * mean * (1 + 1e-9):  # equal up to rounding is not above
        return (
            f"its {len(sizes)} sizes in the support vary too much, by a standard deviation of {spread / mean:.0%} of "
            f"their mean ({mean:.2f} ml); up to {MOST_SPREAD:.0%} is accepted"
        )
    return ""


def _present(sizes_ml: Sequence[float]) -> np.ndarray:
    """The sizes above 0. Raises InputError for a size that is negative or not finite."""
    sizes = np.asarray(sizes_ml, dtype=float)
    if not np.all(np.isfinite(sizes) & (sizes >= 0)):
        raise InputError(
            f"Sizes must be finite and not negative, but they are {sizes.tolist()} ml: check labels and spacing."
        )
    return sizes[sizes > 0]


def _sample_deviation(sizes: np.ndarray) -> float:
    return float(sizes.std(ddof=1)) if len(sizes) > 1 else 0.0


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
