"""Cells on the same frozen backbone: trained in one process, predicted together from shared features."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from time import time

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tqdm import tqdm

from fsefs_nnunet.benchmark.cells import Cell, Spent
from fsefs_nnunet.device import device_named
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.files import write_atomically
from fsefs_nnunet.inference.export import part_folder
from fsefs_nnunet.inference.prediction import QueryPredictor
from fsefs_nnunet.inference.support import memories_of
from fsefs_nnunet.inference.trained_model import TrainedModel

MADE_OF_FILE = "made_of.json"  # next to predictions: the SHA-256 of weights and images, and the cases


def share_features(cells: list[Cell]) -> tuple[dict[Cell, str], dict[Cell, Spent]]:
    """Train and predict those of `cells` that are not done.

    Returns:
        Why cells failed; what was spent on each.
    """
    passed: dict[Cell, int] = {}
    waiting = [cell for cell in cells if not cell.checkpoint.exists()]
    failures = _train_together(waiting)
    trained = [cell for cell in waiting if cell not in failures]
    seconds = dict.fromkeys(cells, 0.0)
    for cell in trained:  # methods that differ only in prediction share a training
        sharing = sum(other.checkpoint == cell.checkpoint for other in trained)
        seconds[cell] = cell.run_facts.training_seconds / sharing
    groups: dict[tuple, list[Cell]] = defaultdict(list)
    for cell in cells:
        if cell not in failures and not cell.predicted:
            groups[_features_of(cell)].append(cell)
    for group in groups.values():
        start = time()
        failed, windows = _predict_together(group)
        for cell, reason in failed.items():
            print(f"{cell.title} failed, the others continue: {reason}", flush=True)
        failures |= failed
        for cell in group:
            seconds[cell] += (time() - start) / len(group)
            passed[cell] = windows.get(cell, 0)
    return failures, {cell: Spent(seconds[cell], passed.get(cell, 0)) for cell in cells}


def _train_together(cells: list[Cell]) -> dict[Cell, str]:
    """Train `cells` in one process; returns why some failed."""
    if not cells:
        return {}
    experiment, reason = cells[0].experiment, "it ended without a checkpoint"
    checkpoints = {cell.checkpoint for cell in cells}
    log = experiment.work / "log.txt"
    print(f"{len(checkpoints)} training(s) on stored features in one process; log: {log}", flush=True)
    try:
        with _counted(checkpoints):
            reasons = experiment.train_together(
                (cell.method.trainer for cell in cells),
                (cell.shots for cell in cells),
                (cell.fold for cell in cells),
                fseft_final_validation="0",  # all are predicted together
            )
    except InputError as error:
        reasons, reason = {}, str(error)
    failures = {cell: reasons.get(cell.folder, reason) for cell in cells if not cell.checkpoint.exists()}
    for cell, why in failures.items():
        print(f"{cell.title} failed: {why}", flush=True)
    return failures


@contextmanager
def _counted(checkpoints: set[Path]) -> Iterator[None]:
    """A progress bar of the final checkpoints that another process writes."""
    ended = Event()
    with tqdm(total=len(checkpoints), desc="trainings") as bar:

        def count() -> None:
            bar.update(sum(file.exists() for file in checkpoints) - bar.n)

        def watch() -> None:
            while not ended.wait(1):
                count()

        watcher = Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()
            count()


def _features_of(cell: Cell) -> tuple:
    """What the backbone's features of a volume depend on; the plans' configurations may differ in it."""
    configuration = PlansManager(cell.study.plans).get_configuration(cell.configuration).configuration
    network = configuration["architecture"]["arch_kwargs"]
    return network["sha256"], cell.method.maps or network["stages"], tuple(configuration["patch_size"])


def _predict_together(cells: list[Cell]) -> tuple[dict[Cell, str], dict[Cell, int]]:
    """Segment the target with `cells`, whose features are the same.

    Returns:
        Why cells failed; how many windows each sent through the backbone, for itself and the others.
    """
    study = cells[0].study
    device = device_named(study.experiment.device)
    failures: dict[Cell, str] = {}
    predictors: dict[Cell, QueryPredictor] = {}
    for cell in cells:
        try:
            _keep_what_these_weights_predicted(cell)
            model = TrainedModel(cell.folder.parent, cell.configuration, [str(cell.fold)], cell.checkpoint.name, device)
            if predictors:
                model.network.backbone = next(iter(predictors.values())).model.network.backbone  # held in memory once
            predictors[cell] = QueryPredictor(model, memories_of(model) if cell.method.transductive else None)
        except Exception as error:
            failures[cell] = str(error)
    images = study.target.image_files()
    title = f"predicting {len(images)} volumes with {len(predictors)} adapters"
    readers = dict(predictors)
    for case, files in tqdm(images.items(), desc=title, disable=not predictors):
        waiting = [cell for cell in predictors if not _segmented(cell, case)]
        if not waiting:
            continue
        with part_folder(waiting[0].predictions / case, "features") as folder:
            try:
                looks_again = len(waiting) > 1 or waiting[0].method.transductive
                reader = predictors[waiting[0]]
                volume = reader.volume_of(reader.load(files), folder if looks_again else None)
            except Exception as error:  # readers may raise anything for broken files
                failures |= dict.fromkeys(predictors, f"{files[0]} was not segmented: {error}")
                break
            for cell in waiting:
                try:
                    segmented = predictors[cell].segment(volume)
                    predictors[cell].write(segmented, cell.predictions / f"{case}{_ending(cell)}")
                    if cell.method.transductive:
                        report = json.dumps(segmented.report, indent=1)
                        write_atomically(cell.predictions / f"{case}_sizes.json", report)
                except Exception as error:
                    failures[cell] = f"{files[0]} was not segmented: {error}"
                    del predictors[cell]
    for cell in [cell for cell in predictors if cell not in failures]:
        try:
            cell.count_dice()
        except Exception as error:
            failures[cell] = str(error)
    return failures, {cell: predictor.windows for cell, predictor in readers.items()}


def _ending(cell: Cell) -> str:
    return cell.study.target.dataset_json["file_ending"]


def _segmented(cell: Cell, case: str) -> bool:
    files = [f"{case}{_ending(cell)}"] + [f"{case}_sizes.json"] * cell.method.transductive
    return all((cell.predictions / file).exists() for file in files)


def _keep_what_these_weights_predicted(cell: Cell) -> None:
    """Clear the predictions of other weights or cases; an interrupted run of these continues."""
    mark = cell.predictions / MADE_OF_FILE
    target = cell.study.target
    made_of = json.dumps({"weights": cell.weights, "cases": target.cases, "images": target.images_sha256})
    if not mark.exists() or mark.read_text("utf-8") != made_of:
        shutil.rmtree(cell.predictions, ignore_errors=True)
        cell.predictions.mkdir(parents=True)
        write_atomically(mark, made_of)
