"""What a spacing costs: the Dice of label maps that are resampled to it and back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from fsefs_nnunet.labels import foreground, label_values, values_in

MOST_CASES = 5
MOST_CLASS_VOXELS = 5e8  # voxels times label values, of all cases: about a minute of one core
LEAST_DICE = 0.9


def same_spacing(a: Sequence[float], b: Sequence[float]) -> bool:
    return np.allclose(a, b, rtol=1e-3, atol=0)


def dice_there_and_back(label_files: Sequence[str], plans: PlansManager, dataset_json: dict) -> dict[str, float]:
    """Mean Dice by class of label maps that are resampled to the spacing of `3d_fullres` and back.

    Covers those of the first MOST_CASES files whose spacing differs, fewer if they are large. Unlike in preprocessing,
    images are not cropped. Classes that no label map shows are omitted.
    """
    reader, configuration = plans.image_reader_writer_class(), plans.get_configuration("3d_fullres")
    classes, ignored = foreground(dataset_json["labels"]), dataset_json["labels"].get("ignore")
    found, spent = defaultdict(list), 0
    for file in label_files[:MOST_CASES]:
        stored, properties = reader.read_seg(file)
        spacing = [properties["spacing"][axis] for axis in plans.transpose_forward]
        spent += stored.size * len(label_values(dataset_json["labels"]))
        if same_spacing(spacing, configuration.spacing) or (found and spent > MOST_CLASS_VOXELS):
            continue
        labels = stored[0].transpose(plans.transpose_forward).astype(np.int16)
        back = resampled_and_back(labels, spacing, configuration)
        if ignored is not None:
            back[labels == ignored] = ignored
        for name, value in classes.items():
            before, after = np.isin(labels, value), np.isin(back, value)
            if before.any():
                found[name].append(2 * np.sum(before & after) / (before.sum() + after.sum()))
    return {name: float(np.mean(found[name])) for name in classes if name in found}


def resampled_and_back(labels: np.ndarray, spacing: Sequence[float], configuration: ConfigurationManager) -> np.ndarray:
    """Labels (X, Y, Z) of `spacing`, resampled as label maps by preprocessing, then as network output by the export.

    Takes one label value at a time to save memory, where nnU-Net's export holds all of them.
    """
    shape = compute_new_shape(labels.shape, spacing, configuration.spacing)
    small = configuration.resampling_fn_seg(labels[None], shape, spacing, configuration.spacing)[0]
    back, highest = np.zeros_like(labels), np.zeros(labels.shape, np.float32)
    for value in sorted(values_in(small)):
        mask = (small == value).astype(np.float32)[None]
        share = configuration.resampling_fn_probabilities(mask, labels.shape, configuration.spacing, spacing)[0]
        won = share > highest
        back[won], highest[won] = value, share[won]
    return back


def describe_cost(dice: dict[str, float]) -> str:
    """What planning prints about the result of `dice_there_and_back`."""
    figures = ", ".join(f"{name} {value:.3f}" for name, value in dice.items())
    text = f"Labels resampled to this spacing and back keep a Dice of {figures}."
    if lost := [name for name, value in dice.items() if value < LEAST_DICE]:
        text += (
            f"\nWarning: at this spacing {', '.join(lost)} cannot be segmented with a higher Dice than that; "
            "choose a finer one with -overwrite_target_spacing."
        )
    return text
