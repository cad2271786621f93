"""Cells on the same frozen backbone: trained one after another, predicted together, the backbone run once a volume."""

from __future__ import annotations

import json
import shutil

from tqdm import tqdm

from fsefs_nnunet.atomic import write_atomically
from fsefs_nnunet.benchmark.cells import FAILURES, Cell
from fsefs_nnunet.devices import device_named
from fsefs_nnunet.prediction import PART_FOLDER, QueryPredictor
from fsefs_nnunet.support import memories_of
from fsefs_nnunet.trained_model import TrainedModel


def share_features(cells: list[Cell]) -> dict[Cell, str]:
    """Train and predict what of `cells` is not done.

    Returns:
        Why cells failed.
    """
    failures: dict[Cell, str] = {}
    for number, cell in enumerate(cells, 1):
        print(f"Training on stored features [{number}/{len(cells)}]: {cell.title}", flush=True)
        try:
            cell.train()
        except FAILURES as error:
            failures[cell] = str(error)
            print(f"This one failed, the others go on: {error}", flush=True)
    todo = [cell for cell in cells if cell not in failures and not cell.predicted]
    return {**failures, **(_predict_together(todo) if todo else {})}


def _predict_together(cells: list[Cell]) -> dict[Cell, str]:
    study = cells[0].study
    device = device_named(study.experiment.device)
    failures: dict[Cell, str] = {}
    predictors: dict[Cell, QueryPredictor] = {}
    for cell in cells:
        shutil.rmtree(cell.predictions, ignore_errors=True)  # of other weights, or of an interrupted run
        cell.predictions.mkdir(parents=True)
        try:
            model = TrainedModel(cell.folder.parent, cell.configuration, [str(cell.fold)], cell.checkpoint.name, device)
            if predictors:
                model.network.backbone = next(iter(predictors.values())).model.network.backbone  # held in memory once
            predictors[cell] = QueryPredictor(model, memories_of(model) if cell.method.transductive else None)
        except FAILURES as error:
            failures[cell] = str(error)
    ending = study.target.dataset_json["file_ending"]
    images = study.target.image_files()
    title = f"predicting {len(images)} volumes with {len(predictors)} adapters"
    for case, files in tqdm(images.items(), desc=title, disable=not predictors):
        volume = None
        for cell, predictor in list(predictors.items()):
            try:
                volume = volume or predictor.read(files)
                report = predictor.segment(volume, cell.predictions / f"{case}{ending}")
                if cell.method.transductive:
                    write_atomically(cell.predictions / f"{case}_sizes.json", json.dumps(report, indent=1))
            except FAILURES as error:
                failures[cell] = str(error)
                del predictors[cell]
    for cell in predictors:
        shutil.rmtree(cell.predictions / PART_FOLDER, ignore_errors=True)
        try:
            cell.count_dice()
        except RuntimeError as error:
            failures[cell] = str(error)
    return failures
