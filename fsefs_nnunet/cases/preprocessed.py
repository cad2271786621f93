"""Preprocessed cases that a training cannot use, refused in a sentence that names the case."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from fsefs_nnunet.cases.shown_voxels import foreground_of
from fsefs_nnunet.errors import InputError, several


def files_of(folder: str | Path, case: str) -> tuple[list[Path], list[Path]]:
    """The files in nnU-Net's preprocessed `folder` that hold the image of a case, and its label map."""
    endings = (".b2nd", ".npz", ".npy")
    image, labels = (
        [file for ending in endings if (file := Path(folder) / f"{name}{ending}").exists()]
        for name in (case, f"{case}_seg")
    )
    return image, labels or image


def load_case(folder: str | Path, case: str) -> tuple:
    """Image, label map, previous stage and properties of a preprocessed case, as nnU-Net's dataset gives them."""
    return _dataset_class(str(folder))(str(folder), [case]).load_case(case)


@lru_cache(maxsize=16)
def _dataset_class(folder: str) -> type:
    return infer_dataset_class(folder)  # it lists the folder


def hash_of(*arrays: np.ndarray) -> str:
    """SHA-256 of the arrays' content, whatever their order in memory."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def require_cases(cases: Iterable[str], folder: str | Path) -> None:
    """Raises InputError if nnU-Net's preprocessed `folder` lacks one of `cases`, which the K-shot folds name."""
    folder = str(folder)
    there = os.path.isdir(folder) and os.listdir(folder)
    refuse_missing(set(cases) - set(infer_dataset_class(folder).get_identifiers(folder) if there else ()), folder)


def refuse_missing(missing: Iterable[str], folder: str | Path, options: str = "") -> None:
    """Raises InputError if there are cases `missing` in `folder`; `options`: of the command that makes them."""
    if missing := sorted(missing):
        raise InputError(
            f"{folder} lacks {len(missing)} of the cases that splits_fseft.json names, e.g. {missing[0]}: preprocess "
            f"them with `fseft plan_and_preprocess -d ID{options}`."
        )


def require_labels(cases: Iterable[tuple[str, np.ndarray]], ignore_label: int | None) -> None:
    """Raises InputError if no label map of the support shows anything but background and what is ignored.

    Args:
        cases: names and preprocessed label maps (1, X, Y, Z), in which nnU-Net marks what it cropped with -1.
    """
    names, shown = [], False
    for name, segmentation in cases:
        names.append(name)
        shown |= bool(foreground_of(segmentation, ignore_label).any())
    if not shown:
        raise InputError(
            f"The support cases {several(names, 10)} show no labelled structure, so there is nothing to learn from: "
            "label them, use another fold, or draw others with `fseft splits -d ID --seed N`."
        )


def require_finite(image: np.ndarray, files: Sequence[str]) -> None:
    """Raises InputError that names the first channel with NaN or infinite values.

    Args:
        image: (channels, X, Y, Z).
        files: the name of each channel's file.
    """
    for channel, file in zip(image, files):
        if not np.isfinite(channel).all():
            raise InputError(
                f"{file} holds NaN or infinite values: repair the raw image, or leave the case out; then "
                "preprocess it again."
            )
