"""report.html and figure.png of a benchmark."""

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
from fsefs_nnunet.evaluation.html import render
from fsefs_nnunet.evaluation.report import ranked_overlays, size_section
from fsefs_nnunet.files import write_atomically


def write_report(study: Study, cells: dict[Cell, Result], failures: dict[Cell, str], command: list[str]) -> None:
    """Write figure.png and report.html to the experiment's folder.

    Args:
        cells: those that are done.
        command: what was typed.
    """
    experiment, results = study.experiment, list(cells.values())
    png = figure(results)
    write_atomically(experiment.work / "figure.png", png)
    variables = {**experiment.folders, "fseft_backbones": user_folder()}
    exports = [f"export {name}={shlex.quote(str(path))}" for name, path in variables.items()]
    versions = [f"{name} {version(name)}" for name in ("fsefs_nnunet", "nnunetv2", "torch", "monai")]
    plans = dict.fromkeys([experiment.plans, *(cell.experiment.plans for cell in cells)])
    names = (SPLITS_FILE, *(f"{name}.json" for name in plans))
    page = render(
        "benchmark.html",
        study=study,
        notes=NOTES,
        rows=table(results),
        figure=png,
        classes=class_table(results),
        comparisons=comparisons(results),
        failures=[f"{cell.title}: {why}" for cell, why in failures.items()],
        cells=[_section(cell) for cell in shown(list(cells))],
        software=f"{', '.join(versions)}; Python {sys.version.split()[0]}",
        to_repeat=[*exports, shlex.join(command)],
        files={name: (experiment.preprocessed / name).read_text("utf-8") for name in names},
    )
    write_atomically(experiment.work / "report.html", page)


def shown(cells: list[Cell]) -> list[Cell]:
    """One cell per number of shots: the first fold of the adapter with the size prior, else of the first method."""
    trained = [cell for cell in cells if cell.method.trainer]
    name = "fseft" if any(cell.name == "fseft" for cell in trained) else trained[0].name if trained else None
    first: dict[int | str, Cell] = {}
    for cell in trained:
        if cell.name == name:
            first.setdefault(cell.shots, cell)
    return list(first.values())


def _section(cell: Cell) -> dict:
    """Pictures and sizes of a cell, as benchmark.html takes them."""
    target, predictions = cell.study.target, cell.predictions
    section = {"title": cell.title, "overlays": {}}
    if not (predictions / "summary.json").exists():
        return section | {"no_overlay": f"The predictions are no longer in {predictions}."}
    try:
        images = {case: files[0] for case, files in target.image_files().items()}
        section["overlays"] = ranked_overlays(predictions, images, target.labels, target.dataset_json)
        section["no_overlay"] = "No case shows a class, neither labelled nor predicted."
    except Exception as error:  # readers may raise anything for broken files
        section["no_overlay"] = f"An image cannot be drawn: {error}"
    return section | {"size_section": size_section(cell.folder, predictions)}
