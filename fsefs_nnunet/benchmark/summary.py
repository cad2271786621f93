"""The table of a benchmark, and paired comparisons of its methods."""

from __future__ import annotations

import math
import warnings
from statistics import mean, stdev

import numpy as np

from fsefs_nnunet.benchmark.evaluation import DICE, LOWER_IS_BETTER, METRICS
from fsefs_nnunet.benchmark.result import Result
from fsefs_nnunet.methods.registry import METHODS


def grouped(results: list[Result]) -> dict[tuple[int | str, str], list[Result]]:
    """Results by number of shots and method, folds in order."""
    groups: dict[tuple[int | str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.shots, result.method), []).append(result)
    return groups


def values(result: Result, metric: str) -> np.ndarray:
    """(cases, classes)"""
    return np.array([[metrics[metric] for metrics in case.values()] for case in result.cases.values()], float)


def mean_over(array: np.ndarray, axis: int) -> np.ndarray:
    """Mean of what is not NaN; NaN where nothing is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmean(array, axis)


def fold_mean(result: Result, metric: str) -> float:
    """As nnU-Net's foreground mean: over the cases first, then over the classes."""
    return float(mean_over(mean_over(values(result, metric), 0), 0))


def case_dice(result: Result) -> dict[str, float]:
    """Dice of each case, averaged over the classes that are in the reference or predicted."""
    return dict(zip(result.cases, mean_over(values(result, DICE), 1).tolist()))


def spread(numbers: list[float], worst: float) -> str:
    """E.g. "0.731 ± 0.012 (0.702)": mean, standard deviation, worst; of one number, itself; "-" of NaN."""
    if any(map(math.isnan, numbers)):
        return "-"
    text = f"{mean(numbers):.3f}"
    return text if len(numbers) == 1 else f"{text} ± {stdev(numbers):.3f} ({worst:.3f})"


def table(results: list[Result]) -> list[dict]:
    """One row per number of shots and method: each metric as mean over the folds, standard deviation and worst fold."""
    rows = []
    for (shots, method), group in grouped(results).items():
        metrics = {}
        for metric in METRICS:
            numbers = [fold_mean(result, metric) for result in group]
            metrics[metric] = spread(numbers, (max if metric in LOWER_IS_BETTER else min)(numbers))
        rows.append(
            {
                "shots": shots,
                "method": METHODS[method].title,
                "labels spent": len(group[0].support),
                "folds": len(group),
                **metrics,
                "trained parameters": f"{round(mean(r.trained_parameters for r in group)):,}",
                "seconds": _seconds(group),
                "peak memory GB": mean(r.peak_memory_gb for r in group),
            }
        )
    return rows


def _seconds(group: list[Result]) -> str:
    """E.g. "120", "120 + 1.3 a volume"."""
    of_volume = mean(r.volume_seconds for r in group)
    return f"{mean(r.seconds for r in group):.0f}" + (f" + {of_volume:.1f} a volume" if of_volume else "")


def class_table(results: list[Result]) -> list[dict]:
    """Dice of each class, mean over cases and folds."""
    rows = []
    for (shots, method), group in grouped(results).items():
        classes = list(next(iter(group[0].cases.values())))
        dice = mean_over(np.stack([mean_over(values(result, DICE), 0) for result in group]), 0)
        rows.append({"shots": shots, "method": METHODS[method].title, **dict(zip(classes, dice.tolist()))})
    return rows


def comparisons(results: list[Result]) -> list[dict]:
    """Every method against one, pair by pair: Dice of the same case, averaged over the folds that both have.

    The one is the adapter with the size prior where it is among the results, else the first. p is that of Wilcoxon's
    signed-rank test, two-sided.
    """
    methods = list(dict.fromkeys(r.method for r in results if METHODS[r.method].trainer))
    if not methods:
        return []
    one = "fseft" if "fseft" in methods else methods[0]
    rows = []
    for shots in dict.fromkeys(r.shots for r in results if r.method == one):
        ours = {r.fold: r for r in results if (r.method, r.shots) == (one, shots)}
        for method in dict.fromkeys(r.method for r in results):
            theirs = {r.fold: r for r in results if (r.method, r.shots) == (method, shots)}
            if METHODS[method].trainer is None:  # the same whatever the shots and folds
                theirs = dict.fromkeys(ours, next(r for r in results if r.method == method))
            folds = sorted(ours.keys() & theirs.keys())
            if method != one and folds:
                pairs = _pairs([ours[f] for f in folds], [theirs[f] for f in folds])
                rows.append({"shots": shots, **_compare(METHODS[one].title, METHODS[method].title, *pairs)})
    return rows


def _pairs(ours: list[Result], theirs: list[Result]) -> tuple[np.ndarray, np.ndarray]:
    pairs = np.array([[list(case_dice(r).values()) for r in group] for group in (ours, theirs)]).mean(1)
    return tuple(pairs[:, np.isfinite(pairs).all(0)])


def _compare(one: str, other: str, ours: np.ndarray, theirs: np.ndarray) -> dict:
    from scipy.stats import wilcoxon

    difference = ours - theirs
    p = float(wilcoxon(difference).pvalue) if difference.any() else (1.0 if len(difference) else math.nan)
    return {
        "comparison": f"{one} - {other}",
        "mean difference of Dice": float(difference.mean()) if len(difference) else math.nan,
        "better / worse": f"{(difference > 0).sum()} / {(difference < 0).sum()}",
        "pairs": len(difference),
        "p (Wilcoxon)": p,
    }
