"""Prediction of a folder of images: what `fseft predict` runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fsefs_nnunet.cases.headers import Header
from fsefs_nnunet.cases.soundness import is_far_off
from fsefs_nnunet.errors import InputError, several
from fsefs_nnunet.features.memory import free_host_bytes
from fsefs_nnunet.files import value_in, write_atomically
from fsefs_nnunet.inference.images import images_to_segment, not_segmented, refuse_output
from fsefs_nnunet.inference.overlap import overlapped
from fsefs_nnunet.inference.prediction import QueryPredictor, Segmented
from fsefs_nnunet.inference.weights import sha256_of_weights

MADE_OF = "made_of"  # in a volume's report: what it was predicted with, so that only the same is continued
WAITING = 2  # volumes besides the current one: the next is being read, the previous one written
OF_ADAPTATION = ("loss", "predict_lambda", "predict_gamma", "predict_lr", "predict_steps")  # settings it depends on


def scale_warnings(headers: dict[str, list[Header]], plans: dict) -> list[str]:
    """One sentence about images whose field of view is far from that of the training cases, perhaps in cm, not mm."""
    shape, spacing = (np.array(plans[f"original_median_{key}_after_transp"]) for key in ("shape", "spacing"))
    odd = [h[0].file for h in headers.values() if is_far_off(np.sort(h[0].field_of_view), np.sort(shape * spacing))]
    return [f"{several(odd)}: field of view far from that of the training cases. Is the spacing in mm?"] if odd else []


def predict_folder(
    predictor: QueryPredictor,
    images: Path,
    output: Path,
    continue_prediction: bool = False,
    keep_largest: bool = False,
    num_parts: int = 1,
    part_id: int = 0,
) -> list[str]:
    """Segment every image of a folder in nnU-Net's naming; a volume that fails does not stop the others.

    `<case>_sizes.json` is written next to each segmentation, as the last file.

    Returns:
        Why cases failed, one sentence each.

    Raises:
        InputError: for a folder without such images, or an output folder that cannot be written or is in a dataset.
    """
    model = predictor.model
    refuse_output(output, images)
    reader = type(predictor.reader).__name__
    found = images_to_segment(images, model.dataset_json, reader, num_parts, part_id)
    for warning in scale_warnings(found.headers, model.plans_manager.plans):
        tqdm.write(warning)
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name in ("plans.json", "dataset.json"):
            shutil.copy(model.folder / name, output / name)
    except OSError as error:
        raise InputError(f"{output} cannot be written ({error.strerror}): choose another output folder.") from error
    weights = [sha256_of_weights(file) for file in model.files]
    transductive = predictor.memories is not None
    made_of = {
        "weights": weights,
        "transductive": transductive,
        "settings": {name: getattr(model.settings, name) for name in OF_ADAPTATION},
        "largest_component": keep_largest,
    }

    def segmentation_of(case: str) -> Path:
        return output / f"{case}{model.dataset_json['file_ending']}"

    def is_done(case: str) -> bool:
        wanted = [segmentation_of(case)] + [output / f"{case}.npz"] * predictor.save_probabilities
        return all(file.exists() for file in wanted) and value_in(output / f"{case}_sizes.json", MADE_OF) == made_of

    def write(case: str, segmented: Segmented) -> None:
        predictor.write(segmented, segmentation_of(case), keep_largest)
        report = {**segmented.report, MADE_OF: made_of}
        write_atomically(output / f"{case}_sizes.json", json.dumps(report, indent=1))
        if any(report["diverged"]):
            tqdm.write(f"{found.cases[case][0]}: the adaptation diverged; it is segmented by the adapter as trained.")

    def has_room() -> bool:
        free = free_host_bytes()
        return free is None or free > WAITING * predictor.largest_bytes

    failures = list(found.failures.values())
    waiting = [case for case in found.cases if not (continue_prediction and is_done(case))]
    steps = overlapped(
        waiting,
        lambda case: predictor.load(found.cases[case]),
        lambda case, loaded: predictor.predict(loaded, segmentation_of(case)),
        write,
        has_room,
    )
    for case, error in tqdm(steps, desc="predicting", total=len(waiting)):
        if error is not None:
            failures.append(not_segmented(found.cases[case][0], error))
            tqdm.write(failures[-1])
    return failures
