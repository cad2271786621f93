"""Conversion of one case: links, label map, and a record of what was found."""

from __future__ import annotations

import errno
import glob
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from fsefs_nnunet.cases.headers import Header
from fsefs_nnunet.cases.images import read_headers
from fsefs_nnunet.datasets.building import READER, RECORDS
from fsefs_nnunet.datasets.selection import Selection
from fsefs_nnunet.datasets.sides import split_sides
from fsefs_nnunet.datasets.source import Case, Labels, Source
from fsefs_nnunet.datasets.volumes import AS_IT_IS, OtherGrid, link_or_copy, read_volume, renumber, write_label
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.files import write_atomically
from fsefs_nnunet.labels import values_in


@dataclass(frozen=True)
class Job:
    """All that a worker needs; `folder` is the dataset under construction."""

    source: Source
    table: dict[str, int]
    selection: Selection
    channels: tuple[str, ...]
    folder: Path
    ending: str
    other_grid: OtherGrid

    def record(self, case: Case, test: bool) -> Path:
        return self.folder / RECORDS / f"{case.name}{'_test' if test else ''}.json"


def convert_case(job: Job, case: Case, test: bool = False) -> dict:
    """Write one case and, last, its record, whose presence marks the case as complete. Returns the record.

    A case that cannot be converted gets a record too, with the reason under "skipped", and leaves no file behind.
    """
    folder = job.folder / ("imagesTs" if test else "imagesTr")
    label_file = job.folder / "labelsTr" / f"{case.name}{job.ending}"
    try:
        record = _write(job, case, folder, None if test else label_file)
    except InputError as error:
        if shutil.disk_usage(job.folder).free < 2**20:  # some libraries do not say why they cannot write
            raise OSError(errno.ENOSPC, "No space left on device") from error
        record = {"skipped": str(error)}
        for file in (*folder.glob(f"{glob.escape(case.name)}_????{job.ending}"), *([] if test else [label_file])):
            file.unlink(missing_ok=True)
    record = {"case": case.name, "test": test, **record}
    write_atomically(job.record(case, test), json.dumps(record))
    return record


def _write(job: Job, case: Case, folder: Path, label_file: Path | None) -> dict:
    if case.image is None:
        raise InputError(f"No image for {case.label}: unpack the whole archive, or move the label away.")
    if label_file and case.label is None:
        raise InputError(f"No label for {case.image}: unpack the whole archive, or move the image away.")
    with tempfile.TemporaryDirectory(dir=job.folder / RECORDS) as scratch:
        files = job.source.image_files(case.image, Path(scratch))
        if len(files) != len(job.channels):
            raise InputError(f"{case.image} has {len(files)} channels instead of {len(job.channels)}.")
        image, *_ = [read_volume(file) for file in files]
        if len(image.shape) != 3:
            raise InputError(f"{case.image} has {len(image.shape)} axes: a volume is expected.")
        headers, _ = read_headers(list(map(str, files)), READER)
        record = {
            "spacing": [round(float(x), 4) for x in headers[0].spacing],
            "oddities": oddities(job, image, headers),
        }
        if label_file:
            record |= _write_label(job, case, image, label_file)
        linked = [_place(file, folder / f"{case.name}_{i:04d}{job.ending}", scratch) for i, file in enumerate(files)]
    return {**record, "linked": all(linked)}


def oddities(job: Job, image: nib.Nifti1Image, headers: list[Header]) -> list[str]:
    """What a user should know about an image before it is trained on."""
    found = {
        "header without sform and qform: left and right are a guess": not all(h.knows_sides for h in headers),
        "sform and qform disagree, the sform counts": not all(h.forms_agree for h in headers),
        "pixdim disagrees with the sform: planning refuses it": not all(h.pixdim_agrees for h in headers),
        "CT without a value below 0: another modality, or stored with an offset (of 1024)": (
            job.channels[0].casefold() == "ct" and np.min(image.dataobj) >= 0
        ),
    }
    return [text for text, is_so in found.items() if is_so]


def _place(file: Path, target: Path, scratch: str) -> bool:
    if file.parent == Path(scratch) and file.name.endswith(".gz") == target.name.endswith(".gz"):
        os.replace(file, target)
        return False
    return link_or_copy(file, target)


def _write_label(job: Job, case: Case, image: nib.Nifti1Image, file: Path) -> dict:
    wanted = {name: job.table[name] for name in job.selection.names if name in job.table}
    labels = job.source.label(case, image, wanted, job.other_grid)
    unknown = sorted(values_in(labels.data) - {0, *job.table.values()})
    if unknown:
        raise InputError(f"{case.label} has values {unknown[:5]} that the table does not know: {job.table}.")
    data = renumbered(job.selection, labels, image.affine, case)
    counts = np.bincount(data.ravel(), minlength=len(job.selection.names) + 1)[1:].tolist()
    if not any(counts):
        raise InputError(f"{case.label} shows none of the classes.")
    if _reusable(job, labels, case, image):
        link_or_copy(case.label, file)
    else:
        write_label(data, image, file)
    return {"voxels": counts, "overlap": labels.overlap, "placed": labels.placed}


def _reusable(job: Job, labels: Labels, case: Case, image: nib.Nifti1Image) -> bool:
    """Whether the source's label file is what we would write."""
    return (
        case.label.is_file()
        and case.label.name.endswith(job.ending)
        and job.selection.unchanged
        and labels.placed == AS_IT_IS
        and labels.volume.shape == image.shape
        and np.allclose(labels.volume.affine, image.affine, atol=1e-5)
    )


def renumbered(selection: Selection, labels: Labels, affine: np.ndarray, case: Case) -> np.ndarray:
    """Label map in the dataset's numbers, with sides told apart."""
    data = renumber(labels.data, {0: 0, **selection.numbers})
    for pair in selection.pairs:
        mask = np.isin(labels.data, pair.values)
        if not mask.any():
            continue
        side = split_sides(mask, affine)
        if side is None:
            raise InputError(
                f"{case.label}: right and left of {pair.whole} cannot be told apart (one component, or two on one "
                f"side); --classes with {pair.whole} keeps them together."
            )
        data[side == 1], data[side == 2] = pair.right, pair.left
    return data
