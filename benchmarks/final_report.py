"""Tables of the locked run, and its questions: differences of Dice by case, with bootstrap intervals over the cases."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import pandas as pd
from real_backbones import CONTROL
from scipy.stats import bootstrap

from fsefs_nnunet.evaluation.tables import markdown_table

RECOMMENDED, OTHER = "phantom", "obelisk"  # backbones
BEST, ADAPT = "ft_long", "adapt"  # besides the methods of the registry, ADAPT is what `fseft adapt` makes
RESAMPLES, SEED = 10_000, 12345
ROW = ["data", "K", "backbone", "method", "minutes"]
METRICS = ("Dice", "surface Dice", "size error", "other side")
QUESTIONS = {  # two backbones with a method each, of the same shots
    "Does a backbone that saw CT organs help?": ((OTHER, "fseft"), (OTHER + CONTROL, "fseft")),
    "Does the embedded backbone help?": ((RECOMMENDED, "fseft"), (RECOMMENDED + CONTROL, "fseft")),
    "Backbone of CT organs against the embedded one": ((OTHER, "fseft"), (RECOMMENDED, "fseft")),
    "The best method against its architecture from scratch": ((RECOMMENDED, BEST), (RECOMMENDED, "scratch")),
    "The best method against nnU-Net's own plans": ((RECOMMENDED, BEST), (RECOMMENDED, "nnunet")),
    "`fseft adapt` against the architecture from scratch": ((RECOMMENDED, ADAPT), (RECOMMENDED, "scratch")),
    "`fseft adapt` against nnU-Net's own plans": ((RECOMMENDED, ADAPT), (RECOMMENDED, "nnunet")),
    "Fine-tuning everything, in its time, against a frozen backbone": ((RECOMMENDED, BEST), (RECOMMENDED, "context")),
    "The paper's adapter and prior against training from scratch": ((RECOMMENDED, "fseft"), (RECOMMENDED, "scratch")),
    "The paper's adapter and prior against nnU-Net's own plans": ((RECOMMENDED, "fseft"), (RECOMMENDED, "nnunet")),
    "The context adapter against the paper's": ((RECOMMENDED, "context"), (RECOMMENDED, "fseft")),
    "The prior": ((RECOMMENDED, "fseft"), (RECOMMENDED, "adapter")),
    "Transduction": ((RECOMMENDED, "transductive"), (RECOMMENDED, "fseft")),
}


def frame(results: dict[str, dict]) -> pd.DataFrame:
    """One row per cell, case and class."""
    rows = []
    for name, of in results.items():
        data, shots, draw, backbone, method, *minutes = name.split(", ")
        cell = {
            "data": data,
            "K": shots.removeprefix("K = "),
            "draw": int(draw.removeprefix("draw ")),
            "backbone": backbone,
            "method": method,
            "minutes": minutes[0].removesuffix(" minutes") if minutes else "",
        }
        for case, classes in of["cases"].items():
            rows += [{**cell, "case": case, "class": label, **values} for label, values in classes.items()]
    made = pd.DataFrame(rows)
    return made.astype({metric: float for metric in METRICS})


def table(cases: pd.DataFrame, results: dict[str, dict]) -> list[dict]:
    """One row per method: means over cases, then classes, then draws; Dice of known and novel structures apart."""
    rows = []
    for key, group in cases.groupby(ROW, sort=False):
        of_class = (
            group.groupby(["draw", "class"], sort=False)[list(METRICS)].mean().groupby("class", sort=False).mean()
        )
        of_cell = [of for name, of in results.items() if _is_of(name, key)]
        dice, known = of_class["Dice"], [label for label in of_class.index if label in of_cell[0]["known"]]
        novel = [label for label in of_class.index if label not in known]
        peaks = [of["peak_gb"] for of in of_cell if of.get("peak_gb")]
        rows.append(
            {
                **dict(zip(ROW[1:], key[1:])),
                "draws": group["draw"].nunique(),
                "labels": of_cell[0]["labels"],
                "mean Dice": dice.mean(),
                **dice.to_dict(),
                "known": dice[known].mean() if known else "-",
                "novel": dice[novel].mean() if novel else "-",
                "surface Dice": of_class["surface Dice"].mean(),
                "size error": of_class["size error"].mean(),
                "other side": "-" if of_class["other side"].isna().all() else of_class["other side"].mean(),
                "seconds": round(np.mean([of["seconds"] for of in of_cell])),
                "GB": f"{max(peaks):.1f}" if peaks else "-",
            }
        )
    return rows


def _is_of(name: str, key: tuple) -> bool:
    data, shots, backbone, method, minutes = key
    time = f", {minutes} minutes" if minutes else ""
    return name.startswith(f"{data}, K = {shots}, draw ") and name.endswith(f", {backbone}, {method}{time}")


def difference(first: pd.Series, second: pd.Series) -> dict:
    """Of two series of Dice by case: points by which the first is ahead, with a 95 % interval over the cases.

    "-" instead of the interval where there are fewer than two cases.
    """
    ahead = 100 * (first - second).dropna().to_numpy()
    made = {"cases": len(ahead), "points": f"{ahead.mean():+.1f}", "95 % interval": "-", "worse in": (ahead < 0).sum()}
    if len(ahead) > 1 and ahead.std() > 0:
        options = {"n_resamples": RESAMPLES, "method": "percentile", "rng": np.random.default_rng(SEED)}
        low, high = bootstrap((ahead,), np.mean, **options).confidence_interval
        made["95 % interval"] = f"{low:+.1f} to {high:+.1f}"
    return made


def dice_by_case(cases: pd.DataFrame, row: Sequence[str]) -> pd.Series:
    """Of a backbone and a method, by draw and case: the mean over the classes."""
    some = cases[(cases["backbone"] == row[0]) & (cases["method"] == row[1])]
    return some.groupby(["draw", "case"])["Dice"].mean()


def answers(cases: pd.DataFrame) -> list[dict]:
    """One row per question, dataset and number of shots of which both sides are done."""
    rows = []
    for question, (first, second) in QUESTIONS.items():
        for (data, shots), group in cases.groupby(["data", "K"], sort=False):
            ours, theirs = dice_by_case(group, first), dice_by_case(group, second)
            both = ours.index.intersection(theirs.index)
            if len(both):  # a case counts once, with the mean of its draws
                pair = [side[both].groupby("case").mean() for side in (ours, theirs)]
                rows.append({"question": question, "data": data, "K": shots, **difference(*pair)})
    for (data, group), method in product(cases.groupby("data", sort=False), ("scratch", "nnunet")):
        of_best, pool = group[group["K"] == "5"], group[group["K"] == "all"]
        ours, theirs = dice_by_case(of_best, (RECOMMENDED, BEST)), dice_by_case(pool, (RECOMMENDED, method))
        if len(ours) and len(theirs):
            pair = [side.groupby("case").mean() for side in (ours, theirs)]
            question = f"The best method of five shots against `{method}` on the whole pool, in the same time"
            rows.append({"question": question, "data": data, "K": "5", **difference(*pair)})
    return rows


def report(results: dict[str, dict]) -> str:
    cases = frame(results)
    tables = [
        f"## {data}\n\n{markdown_table(table(group, results))}" for data, group in cases.groupby("data", sort=False)
    ]
    return "\n".join([*tables, f"## Questions\n\n{markdown_table(answers(cases))}"])
