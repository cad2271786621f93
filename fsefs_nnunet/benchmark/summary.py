"""The tables of a benchmark, and paired comparisons of its methods."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from statistics import mean

import pandas as pd
from scipy.stats import wilcoxon

from fsefs_nnunet.benchmark.evaluation import DICE, LOWER_IS_BETTER, METRICS
from fsefs_nnunet.benchmark.result import Result
from fsefs_nnunet.methods.registry import METHODS

ROW = ["shots", "method"]  # of the tables; groups keep the order of the results
FOLD = [*ROW, "fold"]


def metrics_of(results: list[Result]) -> pd.DataFrame:
    """One row per method, shots, fold, case and class, as in results.csv."""
    rows = [
        {"method": result.method, "shots": result.shots, "fold": result.fold, "case": case, "class": name, **metrics}
        for result in results
        for case, classes in result.cases.items()
        for name, metrics in classes.items()
    ]
    return pd.DataFrame(rows)


def class_means(results: list[Result]) -> pd.DataFrame:
    """Each metric by fold and class, mean over the cases where it is not NaN."""
    return metrics_of(results).groupby([*FOLD, "class"], sort=False)[list(METRICS)].mean()


def fold_means(results: list[Result]) -> pd.DataFrame:
    """Each metric by fold, as nnU-Net's foreground mean: over the cases first, then over the classes."""
    return class_means(results).groupby(FOLD, sort=False).mean()


def case_dice(results: list[Result]) -> pd.Series:
    """Dice by fold and case, mean over the classes that are in the reference or predicted."""
    return metrics_of(results).groupby([*FOLD, "case"], sort=False)[DICE].mean()


def spread(numbers: pd.Series, worst: Callable) -> str:
    """E.g. "0.731 ± 0.012 (0.702)": mean, standard deviation, worst; a single number alone; "-" if one is NaN."""
    if numbers.isna().any():
        return "-"
    text = f"{numbers.mean():.3f}"
    return text if len(numbers) == 1 else f"{text} ± {numbers.std():.3f} ({worst(numbers):.3f})"


def table(results: list[Result]) -> list[dict]:
    """One row per number of shots and method: each metric as mean over the folds, standard deviation and worst fold."""
    runs = pd.DataFrame([{**vars(r), "labels": len(r.support)} for r in results]).groupby(ROW, sort=False)
    metrics = fold_means(results).groupby(ROW, sort=False)
    adapting = runs["volume_seconds"].mean().map(lambda seconds: f" + {seconds:.1f} a volume" if seconds else "")
    columns = {
        "labels spent": runs["labels"].first(),
        "folds": runs.size(),
        **{name: metrics[name].agg(spread, worst=max if name in LOWER_IS_BETTER else min) for name in METRICS},
        "trained parameters": runs["trained_parameters"].mean().map(lambda number: f"{round(number):,}"),
        "seconds": runs["seconds"].mean().map("{:.0f}".format) + adapting,
        "peak memory GB": runs["peak_memory_gb"].agg(mean),  # NaN if one is, unlike pandas' mean
    }
    return _rows(pd.DataFrame(columns))


def class_table(results: list[Result]) -> list[dict]:
    """Dice of each class, mean over cases and folds."""
    dice = class_means(results)[DICE].groupby([*ROW, "class"], sort=False).mean()
    return _rows(dice.unstack(sort=False))


def _rows(frame: pd.DataFrame) -> list[dict]:
    titles = {name: method.title for name, method in METHODS.items()}
    return frame.rename(index=titles, level="method").reset_index().to_dict("records")


def comparisons(results: list[Result]) -> list[dict]:
    """Every method against one, pair by pair: Dice of the same case, averaged over the folds that both have.

    The one is the adapter with the size prior if it is among the results, else the first. p is that of Wilcoxon's
    signed-rank test, two-sided.
    """
    trained = [r.method for r in results if METHODS[r.method].trainer]
    if not trained:
        return []
    one = "fseft" if "fseft" in trained else trained[0]
    dice = case_dice(results).reset_index()
    ours, others = dice[dice["method"] == one], dice[dice["method"] != one]
    rows = []
    for (shots, our), (method, their) in product(
        ours.groupby("shots", sort=False), others.groupby("method", sort=False)
    ):
        # what is not trained is the same whatever the shots and folds
        key = ["shots", "fold", "case"] if METHODS[method].trainer else ["case"]
        pairs = our.merge(their, on=key, suffixes=("", " of other"))
        if len(pairs):
            title = f"{METHODS[one].title} - {METHODS[method].title}"
            rows.append({"shots": shots, "comparison": title, **_compare(pairs)})
    return rows


def _compare(pairs: pd.DataFrame) -> dict:
    # a case counts if it has a Dice in every fold
    dice = pairs.groupby("case", sort=False)[[DICE, f"{DICE} of other"]].agg(mean).dropna()
    difference = dice[DICE] - dice[f"{DICE} of other"]
    p = float(wilcoxon(difference).pvalue) if difference.any() else (1.0 if len(difference) else math.nan)
    return {
        "mean difference of Dice": difference.mean(),
        "better / worse": f"{(difference > 0).sum()} / {(difference < 0).sum()}",
        "pairs": len(difference),
        "p (Wilcoxon)": p,
    }
