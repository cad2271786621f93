"""Results as text."""

from __future__ import annotations

import json
from math import isnan, prod
from numbers import Integral, Real
from pathlib import Path

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


def case_dice(summary_json_file: str | Path) -> dict[str, float]:
    """Dice of each case by the name of its file, averaged over the classes that are in the reference or predicted.

    A case without any is left out.
    """
    cases = json.loads(Path(summary_json_file).read_text("utf-8"))["metric_per_case"]
    dice = {}
    for case in cases:
        values = [m["Dice"] for m in case["metrics"].values() if not isnan(m["Dice"])]
        if values:
            dice[Path(case["prediction_file"]).name] = sum(values) / len(values)
    return dice


def best_median_worst(dice: dict[str, float]) -> dict[str, str]:
    """Names of the cases with the highest, middle and lowest Dice, of two middle ones the better; {} of no cases."""
    ranked = sorted(dice, key=dice.get, reverse=True)
    if not ranked:
        return {}
    return {"best": ranked[0], "median": ranked[(len(ranked) - 1) // 2], "worst": ranked[-1]}


def counted_sizes(
    summary_json_file: str | Path, labels: dict[str, int | list[int]], reader, count: str
) -> dict[str, dict[str, float]]:
    """Size in ml of each label by case, from the voxels that nnU-Net counted.

    Args:
        summary_json_file: with the predictions beside it, whose headers say how large a voxel is.
        labels: names and values as in dataset.json.
        reader: nnU-Net's reader of these files.
        count: "n_ref", of the reference segmentations, or "n_pred", of the predictions.
    """
    summary_json_file = Path(summary_json_file)
    sizes = {}
    for case in json.loads(summary_json_file.read_text("utf-8"))["metric_per_case"]:
        prediction = Path(case["prediction_file"]).name
        _, properties = reader.read_seg(str(summary_json_file.with_name(prediction)))
        voxel_ml = prod(map(float, properties["spacing"])) / 1000
        voxels = {name: case["metrics"][summary_key(value)][count] for name, value in labels.items()}
        sizes[prediction] = {name: count * voxel_ml for name, count in voxels.items()}
    return sizes
