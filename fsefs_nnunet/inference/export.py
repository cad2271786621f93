"""Writing a segmentation in one piece: nnU-Net's export and postprocessing, in a temporary folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.postprocessing.remove_connected_components import remove_all_but_largest_component_from_segmentation

from fsefs_nnunet.inference.trained_model import TrainedModel

PART_FOLDER = ".fseft_part"  # nnU-Net takes every file in the output folder for a segmentation, but ignores folders


def export(
    model: TrainedModel,
    logits: torch.Tensor,
    properties: dict,
    output: Path,
    save_probabilities: bool = False,
    keep_largest: bool = False,
) -> None:
    """Write the segmentation `output`, and with `save_probabilities` what nnU-Net writes next to it.

    Args:
        logits: (outputs, X, Y, Z) of a preprocessed image.
        properties: nnU-Net's, of the preprocessing.
        keep_largest: keep only the largest component of each class.
    """
    stem = output.name[: -len(model.dataset_json["file_ending"])]
    with part_folder(output, "export") as folder:
        export_prediction_from_logits(
            logits,
            properties,
            model.configuration,
            model.plans_manager,
            model.dataset_json,
            str(folder / stem),
            save_probabilities,
            torch.get_num_threads(),
        )
        if keep_largest:
            keep_largest_components(folder / output.name, model)
        for file in sorted(folder.iterdir(), key=lambda file: file.name == output.name):
            os.replace(file, output.parent / file.name)  # the segmentation last


@contextmanager
def part_folder(output: Path, purpose: str) -> Iterator[Path]:
    """A temporary folder next to the segmentation `output`, named after it, since others may be predicted meanwhile."""
    folder = output.parent / f"{PART_FOLDER}_{output.name}_{purpose}"
    shutil.rmtree(folder, ignore_errors=True)  # left by a prediction that was killed
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def keep_largest_components(file: Path, model: TrainedModel) -> None:
    """nnU-Net's postprocessing: keep the largest component of each class, in place."""
    reader = model.plans_manager.image_reader_writer_class()
    segmentation, properties = reader.read_seg(str(file))
    for label_or_region in model.classes:
        segmentation = remove_all_but_largest_component_from_segmentation(segmentation, label_or_region)
    reader.write_seg(segmentation[0], str(file), properties)
