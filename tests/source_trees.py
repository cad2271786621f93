"""Miniature copies of the public datasets, in the layout and the number formats as published."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk

SHAPE = (12, 10, 8)
# right-handed and oblique; left-handed (LPS); axes in another order. No converter may change any of them.
AFFINES = (
    np.array([[-0.8, 0.1, 0.0, 5], [-0.1, -0.8, 0.0, 7], [0, 0, 2.5, -9], [0, 0, 0, 1.0]]),
    np.diag([-1.0, -1.0, 3.0, 1.0]),
    np.array([[0, 0, 1.5, 1], [-0.9, 0, 0, 2], [0, 0.9, 0, 3], [0, 0, 0, 1.0]]),
)


def save(file: Path, data: np.ndarray, affine: np.ndarray) -> np.ndarray:
    file.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, affine), file)
    return data


def write_slice(file: Path, pixels: np.ndarray, affine: np.ndarray, number: int, tags: dict[str, str]) -> None:
    """DICOM slice of `pixels`, (X, Y); affine: (4, 4), of the volume in DICOM's LPS, moved to this slice."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    axes = affine[:3, :3] / spacing
    image = sitk.GetImageFromArray(np.ascontiguousarray(pixels.T)[None])
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetDirection(axes.ravel().tolist())
    said = {
        "0020|000e": "1.2.826.0.1.3680043.2.1125.1",
        "0020|0013": str(number),
        "0020|0032": "\\".join(f"{x:.6f}" for x in affine[:3, 3]),
        "0020|0037": "\\".join(f"{x:.8f}" for x in axes[:, :2].T.ravel()),
        **tags,
    }
    for tag, value in said.items():
        image.SetMetaData(tag, value)
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.SetFileName(str(file))
    writer.Execute(image)


def write_png(file: Path, mask: np.ndarray) -> None:
    """mask: (X, Y) uint8."""
    file.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(np.ascontiguousarray(mask.T)), str(file))


def write_sparse(file: Path, indices: np.ndarray, values: np.ndarray | None = None) -> None:
    """OpenKBP's sparse table, of a mask where there are no `values`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    data = [""] * len(indices) if values is None else [f"{float(v)}" for v in values]
    file.write_text("".join(f"{line}\n" for line in (",data", *(f"{i},{v}" for i, v in zip(indices, data)))))


def write_openkbp(patient: Path, hu: np.ndarray, masks: dict[str, np.ndarray], spacing: tuple[float, ...]) -> None:
    """A patient's folder from arrays whose axes run to the right, the front and the head; masks by file name."""
    for name, volume in {"ct": hu + 1024, **masks}.items():
        flat = np.flip(volume).transpose(1, 0, 2).ravel()  # to the back, the left and the feet
        indices = np.flatnonzero(flat)
        write_sparse(patient / f"{name}.csv", indices, flat[indices] if name == "ct" else None)
    to_right, to_front, to_head = spacing
    (patient / "voxel_dimensions.csv").write_text("".join(f"{mm:.18e}\n" for mm in (to_front, to_right, to_head)))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@dataclass
class Tree:
    """A source folder, what its conversion must give, and one case that cannot be converted."""

    folder: Path
    images: dict[str, np.ndarray] = field(default_factory=dict)
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    affines: dict[str, np.ndarray] = field(default_factory=dict)
    tests: list[str] = field(default_factory=list)
    broken: str = ""

    def case(self, name: str, image_file: str, label_file: str, values: int, dtype=np.uint8, image_dtype=np.int16):
        """A case with the values 0..`values` in random voxels, each of them somewhere."""
        i = len(self.images)
        rng = np.random.default_rng(i)
        affine = AFFINES[i % len(AFFINES)]
        labels = rng.integers(0, values + 1, SHAPE)
        labels.flat[: values + 1] = np.arange(values + 1)
        self.images[name] = save(self.folder / image_file, rng.integers(-1000, 1000, SHAPE).astype(image_dtype), affine)
        self.labels[name] = save(self.folder / label_file, labels.astype(dtype), affine)
        self.affines[name] = affine

    def spoil(self, name: str, image_file: str) -> None:
        truncate(self.folder / image_file)
        del self.images[name], self.labels[name], self.affines[name]
        self.broken = name

    def test(self, name: str, image_file: str) -> None:
        save(self.folder / image_file, np.zeros(SHAPE, np.int16), AFFINES[0])
        self.tests.append(name)


def flare22(folder: Path) -> Tree:
    tree = Tree(folder)
    for i in (1, 2, 50):
        stem = f"FLARE22_Tr_{i:04d}"
        sub = "FLARE22_LabeledCase50"
        tree.case(stem, f"{sub}/images/{stem}_0000.nii.gz", f"{sub}/labels/{stem}.nii.gz", 13, np.float64)
    tree.spoil("FLARE22_Tr_0050", "FLARE22_LabeledCase50/images/FLARE22_Tr_0050_0000.nii.gz")
    save(folder / "FLARE22_UnlabeledCase1-500" / "FLARE22_UL_0001_0000.nii.gz", np.zeros(SHAPE, np.int16), AFFINES[0])
    return tree


def amos22(folder: Path) -> Tree:
    tree = Tree(folder)
    for split, i in (("Tr", 1), ("Va", 8), ("Tr", 410), ("Tr", 507)):
        name = f"amos_{i:04d}"
        tree.case(name, f"amos22/images{split}/{name}.nii.gz", f"amos22/labels{split}/{name}.nii.gz", 15)
    tree.spoil("amos_0410", "amos22/imagesTr/amos_0410.nii.gz")
    for expected in (tree.images, tree.labels, tree.affines):
        del expected["amos_0507"]  # an MR case
    tree.test("amos_0002", "amos22/imagesTs/amos_0002.nii.gz")
    (folder / "amos22" / "imagesTr" / "._amos_0001.nii.gz").write_bytes(b"macOS")
    return tree


def btcv(folder: Path) -> Tree:
    tree = Tree(folder)
    for i in (1, 2, 40):
        sub = "RawData/Training"
        tree.case(f"img{i:04d}", f"{sub}/img/img{i:04d}.nii.gz", f"{sub}/label/label{i:04d}.nii.gz", 13)
    tree.spoil("img0040", "RawData/Training/img/img0040.nii.gz")
    tree.test("img0061", "RawData/Testing/img/img0061.nii.gz")
    return tree


def lits(folder: Path) -> Tree:
    tree = Tree(folder)
    for i, batch in ((0, 1), (10, 1), (28, 2)):
        sub = f"Training Batch {batch}"
        tree.case(f"volume-{i}", f"{sub}/volume-{i}.nii", f"{sub}/segmentation-{i}.nii", 2)
    tree.spoil("volume-10", "Training Batch 1/volume-10.nii")
    tree.test("test-volume-0", "LITS-Challenge-Test-Data/test-volume-0.nii")
    return tree


def kits(folder: Path) -> Tree:
    tree = Tree(folder)
    for i, label in ((0, "segmentation"), (1, "aggregated_MAJ_seg"), (588, "segmentation")):
        case = f"case_{i:05d}"
        tree.case(case, f"dataset/{case}/imaging.nii.gz", f"dataset/{case}/{label}.nii.gz", 3)
    tree.spoil("case_00588", "dataset/case_00588/imaging.nii.gz")
    return tree


def msd(folder: Path) -> Tree:
    tree = Tree(folder / "Task07_Pancreas")
    for i in (1, 4, 5):
        name = f"pancreas_{i:03d}"
        tree.case(name, f"imagesTr/{name}.nii.gz", f"labelsTr/{name}.nii.gz", 2)
    tree.spoil("pancreas_005", "imagesTr/pancreas_005.nii.gz")
    tree.test("pancreas_002", "imagesTs/pancreas_002.nii.gz")
    (tree.folder / "labelsTr" / "._pancreas_001.nii.gz").write_bytes(b"macOS")
    content = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "pancreas", "2": "cancer"}}
    (tree.folder / "dataset.json").write_text(json.dumps(content))
    return tree


def with_pairs(tree: Tree, name: str, values: dict[int, list[tuple]]) -> None:
    """Make the label map of a case anew: boxes (start, stop) in voxels per value."""
    labels = np.zeros_like(tree.labels[name])
    for value, boxes in values.items():
        for start, stop in boxes:
            labels[tuple(slice(a, b) for a, b in zip(start, stop))] = value
    tree.labels[name] = labels


# Two boxes along the array's first axis, which runs to the left in AFFINES 0 and 1, to the back in 2.
FIRST, SECOND = ((1, 2, 1), (4, 5, 4)), ((9, 2, 1), (12, 5, 4))


def ct_org(folder: Path) -> Tree:
    tree = Tree(folder)
    for i in (0, 1, 139):
        sub = "PKG - CT-ORG/CT-ORG/OrganSegmentations"
        files = f"{sub}/volume-{i}.nii.gz", f"{sub}/labels-{i}.nii.gz"
        tree.case(f"volume-{i}", *files, 6, np.float32, np.float32)
        boxes = {
            1: [((5, 0, 0), (7, 3, 3))],
            2: [((5, 5, 0), (7, 7, 3))],
            4: [FIRST, SECOND],
            6: [((0, 9, 7), (2, 10, 8))],
        }
        with_pairs(tree, f"volume-{i}", boxes)
        save(folder / files[1], tree.labels[f"volume-{i}"], tree.affines[f"volume-{i}"])
        tree.labels[f"volume-{i}"] = expected_ct_org(tree.labels[f"volume-{i}"])
    tree.spoil("volume-139", f"{sub}/volume-139.nii.gz")
    return tree


def expected_ct_org(labels: np.ndarray) -> np.ndarray:
    """Liver, bladder, lung right, left, kidney right, left, bone, brain; the first axis runs to the left."""
    first_half = np.arange(SHAPE[0])[:, None, None] < 6
    kidneys = labels == 4
    out = np.where(labels == 6, 8, np.where(labels <= 2, labels, 0))
    return np.where(kidneys & first_half, 5, np.where(kidneys, 6, out))


def abdomenct_1k(folder: Path) -> Tree:
    tree = Tree(folder)
    for i, part in ((1, 1), (401, 2), (801, 3)):
        files = f"AbdomenCT-1K-ImagePart{part}/Case_{i:05d}_0000.nii.gz", f"Mask/Case_{i:05d}.nii.gz"
        name = f"Case_{i:05d}"
        tree.case(name, *files, 4)
        with_pairs(tree, name, {1: [((5, 0, 0), (7, 3, 3))], 2: [FIRST, SECOND], 4: [((5, 5, 0), (7, 7, 3))]})
        save(folder / files[1], tree.labels[name], tree.affines[name])
        labels, first_half = tree.labels[name], np.arange(SHAPE[0])[:, None, None] < 6
        # liver, kidney_right, kidney_left, spleen, pancreas
        sides = np.where(first_half, 2, 3)
        tree.labels[name] = np.where(labels == 2, sides, np.where(labels > 2, labels + 1, labels))
    tree.spoil("Case_00801", "AbdomenCT-1K-ImagePart3/Case_00801_0000.nii.gz")
    return tree


TREES = {
    "FLARE22": flare22,
    "AMOS22": amos22,
    "BTCV": btcv,
    "LiTS": lits,
    "KiTS": kits,
    "MSD": msd,
    "CT-ORG": ct_org,
    "AbdomenCT-1K": abdomenct_1k,
}
