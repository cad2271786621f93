"""Results as text."""

from __future__ import annotations

import json
from math import isnan, prod
from numbers import Integral, Real
from pathlib import Path

import pandas as pd

from fsefs_nnunet.labels import summary_key


def markdown_table(rows: list[dict]) -> str:
    """GitHub table of `rows`: one column per key in order of appearance, floats with 3 decimals.

    What a row lacks stays empty, NaN is shown as "-".
    """
    columns = columns_of(rows)
    if not columns:
        return ""
    lines = [columns, ["---"] * len(columns), *([cell_text(row.get(key)) for key in columns] for row in rows)]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def columns_of(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def cell_text(value) -> str:
    if value is None:
        return ""
    if isinstance(value, Real) and not isinstance(value, Integral):
        return "-" if isnan(value) else f"{value:.3f}"
    return str(value)


def duration(seconds: float) -> str:
    """E.g. "45 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def mean_dice(summary_json_file: str | Path) -> dict[str, float]:
    """Dice of nnU-Net's summary.json, averaged over cases: one entry per class, as the file names it, and "mean".

    nnU-Net names a label by its value ("1") and a region by its values ("(1, 2)"); "mean" is its foreground_mean. A
    class that occurs nowhere is NaN.
    """
    summary = json.loads(Path(summary_json_file).read_text("utf-8"))
    dice = {name: float(metrics["Dice"]) for name, metrics in summary["mean"].items()}
    return {**dice, "mean": float(summary["foreground_mean"]["Dice"])}


def metric_by_case(summary_json_file: str | Path, metric: str) -> pd.DataFrame:
    """A metric of nnU-Net's summary.json: one row per case, named as its file, and one column per class."""
    cases = json.loads(Path(summary_json_file).read_text("utf-8"))["metric_per_case"]
    values = {Path(c["prediction_file"]).name: {name: m[metric] for name, m in c["metrics"].items()} for c in cases}
    return pd.DataFrame(values).T


def case_dice(summary_json_file: str | Path) -> dict[str, float]:
    """Dice of each case by the name of its file, averaged over the classes that are in the reference or predicted.

    A case without any is left out.
    """
    return metric_by_case(summary_json_file, "Dice").mean(axis=1).dropna().to_dict()


def best_median_worst(dice: dict[str, float]) -> dict[str, str]:
    """Names of the cases with the highest, middle and lowest Dice, of two middle ones the better; {} without cases."""
    ranked = sorted(dice, key=dice.get, reverse=True)
    if not ranked:
        return {}
    return {"best": ranked[0], "median": ranked[(len(ranked) - 1) // 2], "worst": ranked[-1]}


def counted_sizes(
    summary_json_file: str | Path, labels: dict[str, int | list[int]], reader
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Predicted and reference size in ml of each label by case, from the voxels that nnU-Net counted.

    Args:
        summary_json_file: with the predictions next to it, whose headers say how large a voxel is.
        labels: names and values as in dataset.json.
        reader: nnU-Net's reader of these files.
    """
    file = Path(summary_json_file)
    predicted, reference = (
        pd.DataFrame({name: voxels[summary_key(value)] for name, value in labels.items()})
        for voxels in (metric_by_case(file, "n_pred"), metric_by_case(file, "n_ref"))
    )
    spacing = {case: reader.read_seg(str(file.with_name(case)))[1]["spacing"] for case in predicted.index}
    voxel_ml = pd.Series({case: prod(map(float, mm)) / 1000 for case, mm in spacing.items()})
    return predicted.mul(voxel_ml, axis=0), reference.mul(voxel_ml, axis=0)
