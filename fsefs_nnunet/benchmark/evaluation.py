"""Metrics of every case and class of a folder of segmentations."""

from __future__ import annotations

import math
import os
import warnings
from functools import partial
from pathlib import Path

import numpy as np
from nnunetv2.configuration import default_num_processes
from nnunetv2.evaluation.evaluate_predictions import compute_metrics, recursive_fix_for_json_export, save_summary_json

from fsefs_nnunet.benchmark.result import CaseMetrics
from fsefs_nnunet.benchmark.target import Target
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.evaluation.surface import TOLERANCE_MM, require_monai, surface_metrics
from fsefs_nnunet.files import read_json
from fsefs_nnunet.labels import foreground, summary_key
from fsefs_nnunet.workers import Ahead

DICE, SURFACE_DICE, DISTANCE, SIZE_ERROR = METRICS = (
    "Dice",
    f"surface Dice {TOLERANCE_MM:g} mm",
    "HD95 mm",
    "size error",
)
LOWER_IS_BETTER = (DISTANCE, SIZE_ERROR)


def write_summary(predictions: Path, target: Target, label_manager, reader) -> None:
    """The summary.json that `nnUNetv2_evaluate_folder` writes into `predictions`.

    Uses nnU-Net's own functions in this process: its command starts processes that import torch, which takes a minute
    for a grid's cell on a busy machine, while the counting takes a second.
    """
    manager, ending = label_manager, target.dataset_json["file_ending"]
    classes = manager.foreground_regions if manager.has_regions else manager.foreground_labels
    cases = [
        compute_metrics(str(target.labels / file.name), str(file), reader, classes, manager.ignore_label)
        for file in sorted(predictions.glob(f"*{ending}"))
    ]
    names = cases[0]["metrics"][classes[0]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a class that no case shows has no mean
        means = {c: {name: np.nanmean([case["metrics"][c][name] for case in cases]) for name in names} for c in classes}
    foreground = {name: np.mean([means[c][name] for c in classes]) for name in names}
    summary = {"metric_per_case": cases, "mean": means, "foreground_mean": foreground}
    for part in (*cases, means, foreground):
        recursive_fix_for_json_export(part)
    save_summary_json(summary, str(predictions / "summary.json"))


def evaluate(predictions: Path, target: Target, reader) -> CaseMetrics:
    """Dice from nnU-Net's summary.json in `predictions`, surface metrics from the segmentations.

    The size error is |predicted - true| / true voxels, NaN if the reference has none of the class.

    reader: nnU-Net's reader of these files.

    Raises:
        InputError: if the summary is of other cases, or a segmentation has another shape than its reference.
    """
    ending = target.dataset_json["file_ending"]
    summary = read_json(predictions / "summary.json")
    counted = {
        Path(case["prediction_file"]).name.removesuffix(ending): case["metrics"] for case in summary["metric_per_case"]
    }
    if odd := sorted(set(counted) ^ set(target.cases)):
        raise InputError(
            f"{predictions} holds cases other than the benchmark's, e.g. {odd[0]!r}: the splits have been redrawn. "
            f"Move {predictions.parent} away."
        )
    require_monai()
    of_case = partial(_metrics_of, predictions, target, reader, counted)
    with Ahead(of_case, target.cases, min(os.cpu_count() or 1, default_num_processes)) as metrics:
        return {case: metrics.take(case) for case in target.cases}


def _metrics_of(
    predictions: Path, target: Target, reader, counted: dict[str, dict], case: str
) -> dict[str, dict[str, float]]:
    """Metrics of each class of a case; counted: nnU-Net's, by case."""
    labels, ending = target.dataset_json["labels"], target.dataset_json["file_ending"]
    files = [folder / f"{case}{ending}" for folder in (predictions, target.labels)]
    (predicted, _), (reference, properties) = (reader.read_seg(str(file)) for file in files)
    if predicted.shape != reference.shape:
        raise InputError(
            f"{files[0]} has shape {predicted.shape[1:]}, {files[1]} {reference.shape[1:]}: these are different cases."
        )
    if "ignore" in labels:
        predicted[reference == labels["ignore"]] = 0
    metrics = {}
    for name, value in foreground(labels).items():
        masks = (np.isin(segmentation[0], value) for segmentation in (predicted, reference))
        surface = surface_metrics(*masks, properties["spacing"])
        counts = counted[case][summary_key(value)]
        true = counts["n_ref"]
        size_error = abs(counts["n_pred"] - true) / true if true else math.nan
        metrics[name] = dict(zip(METRICS, (counts["Dice"], *surface, size_error)))
    return metrics
