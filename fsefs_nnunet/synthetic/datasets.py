"""Writes phantoms as nnU-Net raw datasets: a plain one for demos, a partially labelled assembly for pretraining."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
from nnunetv2.dataset_conversion.generate_dataset_json import generate_dataset_json

from fsefs_nnunet.datasets.jobs import run_jobs
from fsefs_nnunet.synthetic.phantom import LABELS, PhantomConfig, make_phantom, pretraining_config

# What the embedded backbone learns. The stomach is in every phantom and in no source: it is the organ that the
# backbone has never seen. Unions come first, so that regions_class_order lets their parts paint over them.
TEMPLATE = {
    "liver": [1, 2],
    "kidneys": [4, 5],
    "pancreas": [9, 10],
    **{name: value for name, value in LABELS.items() if name != "stomach"},
}

# Which classes each source of the assembly annotates (the task masks w of Eq. 1); every class is in at least two.
SOURCES = {
    "abdomen": ["liver", "liver_right_lobe", "liver_left_lobe", "spleen", "kidneys", "kidney_right", "kidney_left"],
    "vessels": ["aorta", "inferior_vena_cava", "vertebrae", "liver", "liver_right_lobe", "liver_left_lobe"],
    "pancreas": ["pancreas", "pancreas_head", "pancreas_tail", "gallbladder", "spleen", "aorta"],
    "kidneys": ["kidneys", "kidney_right", "kidney_left", "vertebrae", "inferior_vena_cava", "gallbladder"]
    + ["pancreas", "pancreas_head", "pancreas_tail"],
}
HELD_OUT = "held_out"


def write_case(
    folder: Path, case: str, seed: tuple[int, ...], config: PhantomConfig, numbers: dict[int, int], spacing=None
) -> None:
    """Write image and label map of one phantom.

    numbers: the phantom's labels to keep, with their numbers in the dataset; others become background.
    spacing: what the header says in mm per axis, if it is not the phantom's.
    """
    phantom = make_phantom(seed, config)
    # RAS: the affine of a NIfTI file maps voxels to the right, the front and the head
    affine = np.diag([*(spacing or phantom.spacing), 1.0])
    table = np.zeros(max(LABELS.values()) + 1, np.uint8)
    table[list(numbers)] = list(numbers.values())
    labels = table[phantom.labels]
    nib.save(
        nib.Nifti1Image(np.round(phantom.image).astype(np.int16), affine), folder / "imagesTr" / f"{case}_0000.nii.gz"
    )
    nib.save(nib.Nifti1Image(labels, affine), folder / "labelsTr" / f"{case}.nii.gz")


def write_dataset(folder: Path, jobs: list[tuple], labels: dict, num_processes: int, **dataset_json) -> None:
    """Write the cases `jobs` = (case, seed, config, label numbers, spacing or None) and the dataset.json."""
    folder = Path(folder)
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    run_jobs(partial(write_case, folder), jobs, num_processes, "writing phantoms")
    generate_dataset_json(
        str(folder),
        {0: "CT"},
        {"background": 0, **labels},
        len(jobs),
        ".nii.gz",
        dataset_name=folder.name,
        **dataset_json,
    )


def write_pretraining_assembly(
    folder: Path, num_cases: int, num_held_out: int, seed: int = 0, num_processes: int = 2, size: int = 64
) -> None:
    """The embedded backbone's assembly: the sources take turns; the held-out cases carry every class.

    The header says 1 mm whatever the field of view, so that preprocessing keeps the voxels: the backbone's contract
    leaves the spacing open.
    """
    jobs, cases = [], {name: [] for name in [*SOURCES, HELD_OUT]}
    annotated = {**SOURCES, HELD_OUT: list(TEMPLATE)}
    for i in range(num_cases + num_held_out):
        source = list(SOURCES)[i % len(SOURCES)] if i < num_cases else HELD_OUT
        case = f"{source}_{i:05d}"
        cases[source].append(case)
        numbers = {v: v for name in annotated[source] for v in np.atleast_1d(TEMPLATE[name]).tolist()}
        config = pretraining_config((seed, i), (size,) * 3)
        jobs.append((case, (seed, i), config, numbers, (1.0, 1.0, 1.0)))
    write_dataset(
        folder,
        jobs,
        TEMPLATE,
        num_processes,
        regions_class_order=[value if isinstance(value, int) else value[0] for value in TEMPLATE.values()],
        sources={name: {"classes": annotated[name], "cases": cases[name]} for name in cases},
    )


DEMO_ORGANS = ("spleen", "kidney_right", "kidney_left", "aorta", "stomach")
DEMO_DRIFT = 1.6


def write_demo_dataset(folder: Path, num_cases: int, seed: int = 2024, num_processes: int = 2) -> None:
    """Phantoms of one coarse scanner whose drift lies outside the pretraining's [0, 1]; the stomach is a new organ."""
    config = PhantomConfig(shape=(56, 48, 48), spacing=6.0, centre=(0.0, 0.0, 0.08), drift=DEMO_DRIFT)
    numbers = {LABELS[name]: i for i, name in enumerate(DEMO_ORGANS, 1)}
    jobs = [(f"phantom_{i:03d}", (seed, i), config, numbers, None) for i in range(num_cases)]
    write_dataset(folder, jobs, {name: i for i, name in enumerate(DEMO_ORGANS, 1)}, num_processes)
