"""results.csv, table.md and figure.png of a benchmark."""

from __future__ import annotations

import csv
from io import StringIO
from pathlib import Path

from fsefs_nnunet.benchmark.evaluation import DICE, METRICS
from fsefs_nnunet.benchmark.result import Result
from fsefs_nnunet.benchmark.summary import class_table, comparisons, fold_mean, grouped, table
from fsefs_nnunet.evaluation.plots import Point, plot_shots_and_parameters
from fsefs_nnunet.evaluation.tables import markdown_table
from fsefs_nnunet.files import write_atomically
from fsefs_nnunet.methods.registry import METHODS

NOTES = (
    "Metrics are means over cases, then classes; in brackets behind the standard deviation over the folds is the worst "
    "fold. Where a class is in the label or in the prediction alone, its surface Dice is 0 and its HD95 the volume's "
    "diagonal; the size error, |S^ - S| / S, counts the cases that show the class. Seconds are wall time of the "
    "training; the feature bank, which all methods share, is filled by the first that needs it. Peak memory is that of "
    "the training process."
)


def write_results(results: list[Result], folder: Path, setting: str) -> None:
    """results.csv and table.md below `folder`."""
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "shots", "fold", "case", "class", *METRICS])
    for result in results:
        for case, classes in result.cases.items():
            for name, metrics in classes.items():
                writer.writerow([result.method, result.shots, result.fold, case, name, *(metrics[m] for m in METRICS)])
    write_atomically(folder / "results.csv", text.getvalue())
    parts = [setting, NOTES, markdown_table(table(results)), "Dice by class:", markdown_table(class_table(results))]
    if pairs := comparisons(results):
        parts += ["Paired over the cases, each averaged over the folds:", markdown_table(pairs)]
    write_atomically(folder / "table.md", "\n\n".join(part.strip() for part in parts) + "\n")


def figure(results: list[Result]) -> bytes:
    """PNG: Dice against shots, Dice against trained parameters."""
    points = []
    for (shots, method), group in grouped(results).items():
        dice = [fold_mean(result, DICE) for result in group]
        first = group[0]
        points.append(Point(METHODS[method].title, shots, len(first.support), first.trained_parameters, dice))
    return plot_shots_and_parameters(points)
