"""Cells on the same frozen backbone: trained one after another, predicted together, the backbone run once a volume."""

from __future__ import annotations

import json
import os
import shutil

from tqdm import tqdm

from fsefs_nnunet.benchmark.cells import Cell
from fsefs_nnunet.queries import images_in


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
        except (RuntimeError, ValueError, OSError) as error:
            failures[cell] = str(error)
            print(f"This one failed, the others go on: {error}", flush=True)
    todo = [cell for cell in cells if cell not in failures and not cell.predicted]
    if todo:
        _predict_together(todo)
    return failures


def _predict_together(cells: list[Cell]) -> None:
    import torch

    from fsefs_nnunet.prediction import QueryPredictor
    from fsefs_nnunet.support import memories_of
    from fsefs_nnunet.trained_model import TrainedModel

    study = cells[0].study
    device = torch.device(study.experiment.device)
    if device.type == "cpu":
        torch.set_num_threads(os.cpu_count() or 1)  # as nnU-Net's commands do
    predictors: dict[Cell, QueryPredictor] = {}
    for cell in cells:
        shutil.rmtree(cell.predictions, ignore_errors=True)  # of other weights, or of an interrupted run
        cell.predictions.mkdir(parents=True)
        model = TrainedModel(cell.folder.parent, cell.configuration, [str(cell.fold)], cell.checkpoint.name, device)
        if predictors:
            model.network.backbone = next(iter(predictors.values())).model.network.backbone  # held in memory once
        predictors[cell] = QueryPredictor(model, memories_of(model) if cell.method.transductive else None)
    first, *_ = predictors.values()
    ending = study.target.dataset_json["file_ending"]
    images = images_in(study.target.image_folder(study.experiment.work), study.target.dataset_json)
    for case, files in tqdm(images.items(), desc=f"predicting {len(images)} volumes with {len(cells)} adapters"):
        volume = first.read(files)
        for cell, predictor in predictors.items():
            report = predictor.segment(volume, cell.predictions / f"{case}{ending}")
            if cell.method.transductive:
                (cell.predictions / f"{case}_sizes.json").write_text(json.dumps(report, indent=1))
    for cell in cells:
        cell.count_dice()
