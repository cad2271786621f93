"""A sound miniature dataset that tests spoil in one way each, and what planning makes of it."""

import gzip
import json
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from fsefs_nnunet.cli.main import main

NAME = "Dataset004_Field"
SHAPE = (16, 15, 13)
RAS = np.array([[2.0, 0, 0, -16], [0, 2, 0, -15], [0, 0, 3, -20], [0, 0, 0, 1]])
LPS = RAS @ np.array([[-1.0, 0, 0, 15], [0, -1, 0, 14], [0, 0, 1, 0], [0, 0, 0, 1]])  # of arrays turned by [::-1, ::-1]
LABELS = {"background": 0, "kidney_right": 1, "kidney_left": 2}


def volume(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Image and label map, axes to the right, the front and the head: air, a body, an organ on either side."""
    rng = np.random.default_rng(seed)
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in SHAPE], indexing="ij")
    image = np.where(x**2 + y**2 < 0.9, 40.0, -1000.0)
    right = ((x - 0.42) / 0.28) ** 2 + ((y - 0.25) / 0.3) ** 2 + (z / 0.55) ** 2 < 1
    left = ((x + 0.42) / 0.22) ** 2 + ((y + 0.2) / 0.3) ** 2 + ((z - 0.2) / 0.4) ** 2 < 1
    label = (right + 2 * left).astype(np.uint8)
    image[label > 0] = 180
    return (image + rng.normal(0, 8, SHAPE)).astype(np.float32), label


def write(file: Path, array: np.ndarray, affine: np.ndarray = RAS) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), file)


def write_dataset(nnunet_raw: Path, cases: int = 3, name: str = NAME, **changes) -> Path:
    """A raw dataset; `changes` go into dataset.json, None deletes a key."""
    folder = nnunet_raw / name
    for i in range(cases):
        image, label = volume(i)
        write(image_of(folder, i), image)
        write(label_of(folder, i), label)
    content = {
        "channel_names": {"0": "CT"},
        "labels": LABELS,
        "numTraining": cases,
        "file_ending": ".nii.gz",
        **changes,
    }
    kept = {key: value for key, value in content.items() if value is not None}
    (folder / "dataset.json").write_text(json.dumps(kept), "utf-8")
    return folder


def image_of(folder: Path, case: int) -> Path:
    return folder / "imagesTr" / f"case_{case}_0000.nii.gz"


def label_of(folder: Path, case: int) -> Path:
    return folder / "labelsTr" / f"case_{case}.nii.gz"


def files_of(folder: Path, case: int) -> tuple[Path, Path]:
    return image_of(folder, case), label_of(folder, case)


def array_of(file: Path) -> np.ndarray:
    return np.asarray(nib.load(file, mmap=False).dataobj)


def lose_header(folder: Path, case: int) -> None:
    """As of LiTS: the image is stored LPS, its label map in the same order, with an affine that says nothing."""
    image, label = volume(case)
    write(image_of(folder, case), np.ascontiguousarray(image[::-1, ::-1]), LPS)
    write(label_of(folder, case), np.ascontiguousarray(label[::-1, ::-1]), np.eye(4))


def turn(file: Path, axes: str) -> None:
    """Store a file along other axes; its voxels stay where they are in the patient."""
    image = nib.load(file)
    to = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(axes))
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), image.affine).as_reoriented(to), file)


def shift(file: Path, mm: tuple[float, float, float]) -> None:
    affine = RAS.copy()
    affine[:3, 3] += mm
    write(file, array_of(file), affine)


def disagree(file: Path) -> None:
    """sform as it was, qform turned by half a circle."""
    image = nib.Nifti1Image(array_of(file), RAS)
    image.set_sform(RAS, 1), image.set_qform(np.diag([-1.0, -1, 1, 1]) @ RAS, 1)
    nib.save(image, file)


def forget_sides(file: Path) -> None:
    """Neither sform nor qform, pixdim alone."""
    image = nib.Nifti1Image(array_of(file), None)
    image.header.set_zooms((2, 2, 3))
    image.header["sform_code"] = image.header["qform_code"] = 0
    nib.save(image, file)


def forget_pixdim(file: Path) -> None:
    """sform as it was, while pixdim says 1 mm."""
    image = nib.Nifti1Image(array_of(file), None)
    image.set_sform(RAS, 1)
    image.header["qform_code"] = 0
    nib.save(image, file)


def set_pixdim(file: Path, axis: int, value: float) -> None:
    """A spacing that nibabel would not write, in a file without sform and qform."""
    forget_sides(file)
    content = bytearray(gzip.decompress(file.read_bytes()))
    content[80 + 4 * axis : 84 + 4 * axis] = struct.pack("<f", value)
    file.write_bytes(gzip.compress(content))


def add_offset(file: Path) -> None:
    """HU + 1024, as unsigned integers."""
    write(file, np.clip(array_of(file) + 1024, 0, None).astype(np.uint16))


# ---- planned and preprocessed ----


def plan_and_preprocess(*options) -> int:
    return main(["plan_and_preprocess", "-d", "4", "--shots", "1", "--num_queries", "2", "-np", "1", *options])


def preprocessed(raw) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    folder = str(raw.parent / "nnUNet_preprocessed" / NAME / "FSEFTPlans_3d_fullres")
    dataset = infer_dataset_class(folder)(folder)
    return {case: tuple(part[:][0] for part in dataset.load_case(case)[:2]) for case in dataset.identifiers}


def bright_dice(image: np.ndarray, label: np.ndarray) -> float:
    """Overlap of the label map with the bright organs, of images in [0, 1]."""
    bright, labelled = image > 0.67, label > 0
    return 2 * (bright & labelled).sum() / (bright.sum() + labelled.sum())


def assert_aligned(raw) -> None:
    """Label 1 lies right of label 2 in every case, each on its bright organ."""
    for image, label in preprocessed(raw).values():
        assert bright_dice(image, label) == 1
        assert np.argwhere(label == 1)[:, 0].mean() > np.argwhere(label == 2)[:, 0].mean() + 3
