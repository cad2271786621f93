"""Names of anatomical structures: one table of spellings, the public templates, matching of a dataset's labels."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd

from fsefs_nnunet.errors import InputError

# Structure -> its other spellings in public datasets (BTCV, AMOS, FLARE, TotalSegmentator, ...) and backbones, in the
# form that `normalised` gives. A part is not its whole: no alias joins a lobe with its organ. BTCV's "rad" and "lad"
# are left out: elsewhere the latter is a coronary artery.
STRUCTURES = {
    "spleen": ["spl"],
    "kidney_right": ["right_kidney", "rkidney", "kidney_r", "rkid", "r_kidney"],
    "kidney_left": ["left_kidney", "lkidney", "kidney_l", "lkid", "l_kidney"],
    "kidneys": ["kidney"],
    "gallbladder": ["gall_bladder", "gall", "gbd"],
    "esophagus": ["oesophagus", "eso"],
    "liver": [],
    "stomach": ["sto"],
    "aorta": ["aor", "arota"],  # AMOS's dataset.json spells it so
    "inferior_vena_cava": ["postcava", "ivc", "cava", "postcava_ivc"],
    "portal_vein_and_splenic_vein": ["psv", "portal_and_splenic_veins", "portal_vein_splenic_vein"],
    "pancreas": [],
    "adrenal_gland_right": ["right_adrenal_gland", "right_adrenal", "radrenal", "adrenal_right", "rag"],
    "adrenal_gland_left": ["left_adrenal_gland", "left_adrenal", "ladrenal", "adrenal_left", "lag"],
    "duodenum": ["duo"],
    "urinary_bladder": ["bladder"],
    "prostate": [],
    "prostate_uterus": ["prost_ut", "prostate_or_uterus"],
    "celiac_trunk": ["celiac_truck", "celiac_artery", "celiac_aa"],
    "lung_right": ["right_lung", "rlung"],
    "lung_left": ["left_lung", "llung"],
    "bone": ["bones"],
    "brain": [],
    "colon": [],
    "intestine": ["intestines"],
    "rectum": [],
    "femur_head_left": ["left_head_of_femur", "head_of_femur_left", "head_of_femur_l", "left_femoral_head"],
    "femur_head_right": ["right_head_of_femur", "head_of_femur_right", "head_of_femur_r", "right_femoral_head"],
    "hepatic_vessel": ["hv", "hepatic_vessels"],
    "hepatic_vessel_tumor": ["hvt", "hepatic_vessel_tumour"],
    "liver_tumor": ["liver_tumour"],
    "kidney_tumor": ["kidney_tumour"],
    "kidney_cyst": [],
    "lung_tumor": ["lung_tumour"],
    "pancreas_tumor": ["pancreas_tumour"],
    "colon_tumor": ["colon_tumour"],
    "vertebrae": ["spine", "vertebral_column"],
    "hippocampus_right": ["right_hippocampus", "hippocampus_r"],
    "hippocampus_left": ["left_hippocampus", "hippocampus_l"],
}
_CANONICAL = {alias: name for name, aliases in STRUCTURES.items() for alias in aliases}

# Rows of FSEFT's universal head, in its order (UNIVERSAL_TEMPLATE of its public code).
TEMPLATE_29 = (
    "spleen", "kidney_right", "kidney_left", "gallbladder", "esophagus", "liver", "stomach", "aorta",
    "inferior_vena_cava", "portal_vein_and_splenic_vein", "pancreas", "adrenal_gland_right", "adrenal_gland_left",
    "duodenum", "urinary_bladder", "prostate_uterus", "liver_tumor", "kidney_tumor", "kidney_cyst", "celiac_trunk",
    "lung_right", "lung_left", "bone", "brain", "lung_tumor", "pancreas_tumor", "hepatic_vessel",
    "hepatic_vessel_tumor", "colon_tumor",
)  # fmt: skip

# What the CLIP-Driven Universal Model and SuPreM were trained on, in their order (ORGAN_NAME of their public code).
TEMPLATE_32 = (
    "spleen", "kidney_right", "kidney_left", "gallbladder", "esophagus", "liver", "stomach", "aorta",
    "inferior_vena_cava", "portal_vein_and_splenic_vein", "pancreas", "adrenal_gland_right", "adrenal_gland_left",
    "duodenum", "hepatic_vessel", "lung_right", "lung_left", "colon", "intestine", "rectum", "urinary_bladder",
    "prostate", "femur_head_left", "femur_head_right", "celiac_trunk", "kidney_tumor", "liver_tumor",
    "pancreas_tumor", "hepatic_vessel_tumor", "lung_tumor", "colon_tumor", "kidney_cyst",
)  # fmt: skip

# Classes of HighRes3DNet by value, of which two are known by name.
GIF_160 = ("background", *(f"region_{k}" for k in range(1, 23)), "hippocampus_right", "hippocampus_left") + tuple(
    f"region_{k}" for k in range(25, 160)
)

# Labels of BTCV (Multi-Atlas Labeling Beyond the Cranial Vault) by value; FSEFT's and CLIP-Driven's start with them.
BTCV_14 = ("background", *TEMPLATE_29[:13])


def normalised(name: str) -> str:
    """Lower case, words joined by '_', aliases replaced: 'Left Kidney' -> 'kidney_left'."""
    name = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    return _CANONICAL.get(name, name)


def match_labels(names: list[str], classes: tuple[str, ...], file: str = "dataset.json") -> dict[str, str]:
    """Which of the dataset's label `names` the backbone knows, and as which of its `classes`.

    Args:
        file: where the names are listed, for the error.

    Raises:
        InputError: if two of the backbone's classes, or two labels, are the same structure.
    """
    matches: dict[str, str] = {}
    for name in names:
        known = [c for c in classes if normalised(c) == normalised(name)]
        if len(known) > 1:
            raise InputError(f"Label {name!r} matches the backbone's classes {known}: rename it in {file}.")
        if known and known[0] in matches.values():
            raise InputError(f"Two labels match the backbone's class {known[0]!r}: rename one of them in {file}.")
        if known:
            matches[name] = known[0]
    return matches


def as_numbers(labels: dict) -> dict[str, int | list[int]]:
    """`labels` of a dataset.json as nnU-Net understands them: "1" is 1, and so is [1] if there are no regions."""
    has_regions = any(isinstance(value, (list, tuple)) and len(value) > 1 for value in labels.values())
    made = {}
    for name, value in labels.items():
        if isinstance(value, (list, tuple)):
            made[name] = [int(one) for one in value] if has_regions else int(value[0])
        else:
            made[name] = int(value)
    return made


def foreground(labels: dict) -> dict[str, int | list[int]]:
    """`labels` of a dataset.json without background and ignore label, as numbers."""
    return {name: value for name, value in as_numbers(labels).items() if name not in ("background", "ignore")}


def values_in(label_map: np.ndarray) -> set[int]:
    return set(pd.unique(label_map.ravel()).tolist())  # as nnU-Net's check does: many times as fast as np.unique


def label_values(labels: dict) -> set[int]:
    """Every value that label maps of a dataset.json's `labels` may hold: background and ignore label, too."""
    return {int(v) for value in labels.values() for v in (value if isinstance(value, (list, tuple)) else [value])}


def foreground_names(labels: dict, has_regions: bool) -> list[str]:
    """Names of the network's foreground outputs in their order: regions as listed in dataset.json, labels by value."""
    values = foreground(labels)
    return list(values) if has_regions else sorted(values, key=values.get)


def foreground_classes(label_manager) -> list[int | tuple[int, ...]]:
    """Labels or regions of nnU-Net's LabelManager, in the order of the network's foreground outputs."""
    return list(label_manager.foreground_regions if label_manager.has_regions else label_manager.foreground_labels)


def summary_key(value: int | list[int]) -> str:
    """How nnU-Net's summary.json names a label or region of dataset.json: "1", "(1, 2)"."""
    return str(tuple(value)) if isinstance(value, (list, tuple)) else str(value)
