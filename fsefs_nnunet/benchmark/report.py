"""report.html of a benchmark."""

from __future__ import annotations

import shlex
import sys
from importlib.metadata import version

from fsefs_nnunet.backbones.store import user_folder
from fsefs_nnunet.benchmark.cells import Cell
from fsefs_nnunet.benchmark.outputs import NOTES, figure
from fsefs_nnunet.benchmark.result import Result
from fsefs_nnunet.benchmark.study import Study
from fsefs_nnunet.benchmark.summary import class_table, comparisons, table
from fsefs_nnunet.cases.splits import SPLITS_FILE
from fsefs_nnunet.evaluation import html
from fsefs_nnunet.evaluation.report import ranked_overlays, size_section
from fsefs_nnunet.files import write_atomically


def write_report(study: Study, cells: dict[Cell, Result], failures: dict[Cell, str], command: list[str]) -> None:
    """Write figure.png and report.html to the experiment's folder.

    Args:
        cells: those that are done.
        command: what was typed.
    """
    folder, results = study.experiment.work, list(cells.values())
    png = figure(results)
    write_atomically(folder / "figure.png", png)
    caption = "Dice against shots, bars from the worst to the best fold; Dice against trained parameters."
    parts = [
        html.paragraph(study.setting),
        html.paragraph(NOTES),
        html.table(table(results)),
        html.overlay(png, caption),
        html.heading("Dice by class"),
        html.table(class_table(results)),
    ]
    if pairs := comparisons(results):
        parts += [html.heading("Paired over the cases, each averaged over the folds"), html.table(pairs)]
    if failures:
        parts += [html.heading("What failed"), html.commands(*(f"{c.title}: {why}" for c, why in failures.items()))]
    for cell in shown(list(cells)):
        parts += _pictures(cell)
    parts += _repeat(study, command)
    write_atomically(folder / "report.html", html.page("fseft: benchmark", *parts))


def shown(cells: list[Cell]) -> list[Cell]:
    """One cell per number of shots: the first fold of the adapter with the size prior, else of the first method."""
    trained = [cell for cell in cells if cell.method.trainer]
    name = "fseft" if any(cell.name == "fseft" for cell in trained) else trained[0].name if trained else None
    first: dict[int | str, Cell] = {}
    for cell in trained:
        if cell.name == name:
            first.setdefault(cell.shots, cell)
    return list(first.values())


def _pictures(cell: Cell) -> list[str]:
    target, predictions = cell.study.target, cell.predictions
    parts = [html.heading(f"Best, median and worst case: {cell.title}")]
    if not (predictions / "summary.json").exists():
        parts.append(html.paragraph(f"The predictions are no longer in {predictions}."))
    else:
        try:
            overlays = ranked_overlays(predictions, target.images, target.labels, target.dataset_json)
            none = "No case shows a class, neither labelled nor predicted."
        except Exception as error:  # readers of broken files raise whatever they like
            overlays, none = {}, f"An image cannot be drawn: {error}"
        parts += [html.overlay(png, caption) for caption, png in overlays.items()] or [html.paragraph(none)]
    if (predictions / "summary.json").exists():
        heading = f"Size prior and predicted sizes: {cell.title}"
        parts += [html.heading(heading), *size_section(cell.folder, predictions)]
    return parts


def _repeat(study: Study, command: list[str]) -> list[str]:
    """Versions, plans and splits, and the command."""
    experiment, splits, backbone = study.experiment, study.splits, study.backbone
    software = ", ".join(f"{name} {version(name)}" for name in ("fsefs_nnunet", "nnunetv2", "torch", "monai"))
    facts = (
        f"{software}; Python {sys.version.split()[0]}; device {experiment.device}. Backbone {backbone['backbone']}, "
        f"SHA-256 {backbone['sha256']}. Splits: seed {splits['seed']}, {splits['num_folds']} folds, "
        f"{len(splits['queries'])} labelled queries. The two files below lie in {experiment.preprocessed}."
    )
    variables = {**experiment.folders, "fseft_backbones": user_folder()}
    exports = [f"export {name}={shlex.quote(str(path))}" for name, path in variables.items()]
    files = [experiment.preprocessed / name for name in (SPLITS_FILE, f"{experiment.plans}.json")]
    return [
        html.heading("To repeat it"),
        html.paragraph(facts),
        html.commands(*exports, shlex.join(command)),
        *(html.folded(file.name, file.read_text("utf-8")) for file in files),
    ]
