"""results.csv and table.md of a benchmark, and the figure of its report."""

from __future__ import annotations

from pathlib import Path

from fsefs_nnunet.benchmark.evaluation import DICE
from fsefs_nnunet.benchmark.result import Result
from fsefs_nnunet.benchmark.summary import ROW, class_table, comparisons, fold_means, metrics_of, table
from fsefs_nnunet.evaluation.plots import Point, plot_shots_and_parameters
from fsefs_nnunet.evaluation.tables import markdown_table
from fsefs_nnunet.files import write_atomically
from fsefs_nnunet.methods.registry import METHODS

NOTES = (
    "Metrics are means over cases, then classes; the standard deviation over the folds is followed by the worst fold "
    "in brackets. If a class is only in the label or only in the prediction, its surface Dice is 0 and its HD95 the "
    "volume's diagonal; the size error, |S^ - S| / S, counts the cases that show the class. Seconds are wall time of "
    "the training; the feature bank, which all methods share, is filled by the first that needs it. Peak memory is "
    "that of the training process."
)


def write_results(results: list[Result], folder: Path, setting: str) -> None:
    """results.csv and table.md below `folder`."""
    write_atomically(folder / "results.csv", metrics_of(results).to_csv(index=False, na_rep="nan", lineterminator="\n"))
    parts = [setting, NOTES, markdown_table(table(results)), "Dice by class:", markdown_table(class_table(results))]
    if pairs := comparisons(results):
        parts += ["Paired over the cases, each averaged over the folds:", markdown_table(pairs)]
    write_atomically(folder / "table.md", "\n\n".join(part.strip() for part in parts) + "\n")


def figure(results: list[Result]) -> bytes:
    """PNG: Dice against shots, Dice against trained parameters."""
    first = {(result.shots, result.method): result for result in reversed(results)}
    points = []
    for (shots, method), dice in fold_means(results)[DICE].groupby(ROW, sort=False):
        run = first[shots, method]
        points.append(Point(METHODS[method].title, shots, len(run.support), run.trained_parameters, dice.tolist()))
    return plot_shots_and_parameters(points)
