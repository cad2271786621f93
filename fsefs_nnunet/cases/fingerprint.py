"""nnU-Net's fingerprint of a dataset, extracted with the reader of the plans, and again if files were replaced."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import nibabel as nib
import numpy as np
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

from fsefs_nnunet.cases.headers import read_header
from fsefs_nnunet.cases.readers import reoriented_axes, reorients
from fsefs_nnunet.files import value_in, write_json

FINGERPRINT_FILE = "dataset_fingerprint.json"
MADE_OF = "fseft_made_of"  # our key in the fingerprint, which nnU-Net does not read


def require_fingerprint(
    name: str, preprocessed: Path, dataset_json: dict, cases: dict[str, dict], reader: type, num_processes: int
) -> None:
    """Make sure that `preprocessed` contains the fingerprint of these cases.

    nnU-Net extracts it with the reader that it would choose itself, and keeps an existing one even if the files have
    changed since.
    """
    file, made_of = preprocessed / FINGERPRINT_FILE, state_of(cases, stock_reorients(dataset_json))
    if value_in(file, MADE_OF) == made_of:
        return
    extractor = DatasetFingerprintExtractor(name, num_processes)
    extractor.dataset_json = {**dataset_json, "overwrite_image_reader_writer": reader.__name__}
    extractor.dataset = cases
    fingerprint = extractor.run(overwrite_existing=True)
    # in the axes of nnU-Net's own reader, since its stock planner may read the file
    fingerprint = in_axes(fingerprint, cases, reorients(reader.__name__), stock_reorients(dataset_json))
    write_json(file, {**fingerprint, MADE_OF: made_of})


def stock_reorients(dataset_json: dict) -> bool:
    """Whether the reader that nnU-Net's own commands use reorients images to RAS."""
    return reorients(dataset_json.get("overwrite_image_reader_writer", ""))


def in_axes(fingerprint: dict, cases: dict[str, dict], reoriented: bool, wanted: bool) -> dict:
    """`fingerprint` converted between the axes of readers that reorient images and of readers that do not."""
    if reoriented == wanted:
        return fingerprint
    made = {"spacings": [], "shapes_after_crop": []}
    for i, case in enumerate(cases.values()):
        axes = reoriented_axes(read_header(case["images"][0]))
        axes = axes if wanted else np.argsort(axes)
        for key, values in made.items():
            values.append([fingerprint[key][i][axis] for axis in axes])
    return {**fingerprint, **made}


def state_of(cases: dict[str, dict], reoriented: bool) -> str:
    """A hash of what a fingerprint describes: names, sizes, dates and headers of all files, since scans are too large
    to read in full, and whether its axes are those of a reader that reorients images.
    """
    states = {case: [_state(Path(f)) for f in (*files["images"], files["label"])] for case, files in cases.items()}
    return hashlib.sha256(json.dumps([states, reoriented], sort_keys=True).encode()).hexdigest()


def _state(file: Path) -> tuple[str, int, int, str]:
    stat = file.stat()
    with nib.openers.ImageOpener(str(file)) as stream:
        header = hashlib.sha256(stream.read(1024)).hexdigest()
    return file.name, stat.st_size, stat.st_mtime_ns, header
