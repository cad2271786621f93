"""Results as text."""

from __future__ import annotations

import json
from math import isnan
from numbers import Integral, Real
from pathlib import Path


def markdown_table(rows: list[dict]) -> str:
    """GitHub table of `rows`: one column per key in order of appearance, floats with 3 decimals.

    What a row lacks stays empty, NaN is shown as "-".
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if not columns:
        return ""
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(key)) for key in columns] for row in rows)]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def _cell(value) -> str:
    if value is None:
        return ""
    if isinstance(value, Real) and not isinstance(value, Integral):
        return "-" if isnan(value) else f"{value:.3f}"
    return str(value)


def mean_dice(summary_json_file: str | Path) -> dict[str, float]:
    """Dice of nnU-Net's summary.json, averaged over cases: one entry per class, as the file names it, and "mean".

    nnU-Net names a label by its value ("1") and a region by its values ("(1, 2)"); "mean" is its foreground_mean. A
    class that occurs nowhere is NaN.
    """
    summary = json.loads(Path(summary_json_file).read_text())
    dice = {name: float(metrics["Dice"]) for name, metrics in summary["mean"].items()}
    return {**dice, "mean": float(summary["foreground_mean"]["Dice"])}
