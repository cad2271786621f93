"""What the contract of the public backbones does to a dataset: orientation on a real CT, plans, and refusals."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from published_files import turned

from fsefs_nnunet.backbones.store import save_backbone
from fsefs_nnunet.backbones.zoo import ZOO
from fsefs_nnunet.cases.headers import read_header
from fsefs_nnunet.cases.readers import in_axes_of, spacing_of
from fsefs_nnunet.inference.zero_shot import zero_shot_plans
from fsefs_nnunet.planners.fseft_planner import FSEFTPlanner
from fsefs_nnunet.trainers.by_name import FSEFTTrainer_Decoder, FSEFTTrainer_FTLast
from fsefs_nnunet.trainers.fseft_trainer import FSEFTTrainer

ORGANS = ("liver", "spleen", "kidney_left", "kidney_right")  # labels 1 to 4
DATASET = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, **{name: i for i, name in enumerate(ORGANS, 1)}},
    "file_ending": ".nii.gz",
}
STORED = {"LPS-stored": "LPS", "mirrored": "LAS", "upside down": "RAI", "transposed": "SRP"}


# ---- orientation ----


@pytest.fixture(scope="module")
def ct(real_ct) -> tuple[nib.Nifti1Image, nib.Nifti1Image]:
    """Image and label map of a real CT, of which slices with the organs are kept."""
    folder = real_ct / "s0000"
    image = nib.load(folder / "ct.nii.gz")
    labels = np.zeros(image.shape, np.uint8)
    for number, name in enumerate(ORGANS, 1):
        labels[nib.load(folder / "segmentations" / f"{name}.nii.gz").get_fdata() > 0] = number
    voxels = np.argwhere(labels > 0)
    first, last = voxels.min(0), voxels.max(0) + 1
    box = (slice(None), *(slice(a, b) for a, b in zip(first[1:], last[1:])))
    array = image.get_fdata(dtype=np.float32)[box]
    affine = image.affine @ np.array([[1, 0, 0, 0], [0, 1, 0, first[1]], [0, 0, 1, first[2]], [0, 0, 0, 1]])
    return nib.Nifti1Image(array, affine), nib.Nifti1Image(labels[box], affine)


def preprocessed(folder, image: nib.Nifti1Image, labels: nib.Nifti1Image) -> tuple[np.ndarray, np.ndarray]:
    """By stock nnU-Net with the plans of suprem_unet's contract: image and labels (X, Y, Z)."""
    folder.mkdir()
    files = [str(folder / "a_0000.nii.gz"), str(folder / "a.nii.gz")]
    nib.save(image, files[0]), nib.save(labels, files[1])
    contract = ZOO["suprem_unet"].contract({})
    reader = contract.image_reader_writer
    header = read_header(files[0])
    geometry = in_axes_of(header.shape, header, reader), spacing_of(header, reader)
    plans = zero_shot_plans(contract, DATASET, reader, [geometry])
    manager = PlansManager(plans)
    run = DefaultPreprocessor(verbose=False).run_case
    data, seg, _ = run(files[:1], files[1], manager, manager.get_configuration("3d_fullres"), DATASET)
    return data[0], seg[0]


def sides(labels: np.ndarray) -> dict[str, float]:
    """Where organs lie along x, 0 for the patient's left border, 1 for the right one."""
    return {name: np.argwhere(labels == i)[:, 0].mean() / len(labels) for i, name in enumerate(ORGANS, 1)}


def check_sides(labels: np.ndarray) -> None:
    x = sides(labels)
    assert x["spleen"] < 0.4 < 0.55 < x["liver"] and x["kidney_left"] < 0.5 < x["kidney_right"], x


@pytest.mark.slow
def test_stored_orientation_of_a_real_ct_does_not_matter(ct, tmp_path):
    image, labels = preprocessed(tmp_path / "RAS", *(turned(volume, "RAS") for volume in ct))
    zooms = np.abs(np.array(turned(ct[0], "RAS").header.get_zooms()))
    assert image.shape == tuple(np.round(turned(ct[0], "RAS").shape * zooms / 1.5).astype(int))
    assert image.min() == 0 and image.max() == 1
    check_sides(labels)
    for name, axes in STORED.items():
        other_image, other_labels = preprocessed(tmp_path / name, *(turned(volume, axes) for volume in ct))
        np.testing.assert_allclose(other_image, image, atol=1e-5, err_msg=name)
        np.testing.assert_array_equal(other_labels, labels, err_msg=name)


@pytest.mark.slow
def test_a_swap_of_left_and_right_is_caught(ct, tmp_path):
    """A file whose header contradicts its voxels: the grid differs, and organs lie on the wrong side."""
    swapped = [nib.Nifti1Image(np.asarray(volume.dataobj)[::-1], volume.affine) for volume in ct]
    image, labels = preprocessed(tmp_path / "swapped", *swapped)
    with pytest.raises(AssertionError):
        check_sides(labels)
    right, _ = preprocessed(tmp_path / "right", *ct)
    assert image.shape == right.shape and np.abs(image - right).mean() > 0.05


def test_thick_slices_are_resampled_linearly(tmp_path):
    """As the authors' were; nnU-Net's default is the nearest neighbour along such an axis. A ramp stays a ramp."""
    hu = np.linspace(-100, 200, 24)
    image = nib.Nifti1Image(np.tile(hu, (16, 16, 1)).astype(np.int16), np.diag([0.8, 0.8, 5.0, 1.0]))
    made, _ = preprocessed(tmp_path / "thick", image, nib.Nifti1Image(np.ones(image.shape, np.uint8), image.affine))
    column = made[4, 4]
    assert len(column) == 80
    steps = np.diff(column[4:-4])
    np.testing.assert_allclose(steps, (300 / 23 * 1.5 / 5) / 425, rtol=0.1)


@pytest.mark.parametrize("axes", ["RAS", "LPS", "SRP", "PIL"])
def test_geometry_of_an_image_from_its_header(tmp_path, axes):
    """Shape and spacing of the array that nnU-Net's reader gives, without reading the voxels."""
    from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient

    file = tmp_path / "a.nii.gz"
    nib.save(turned(nib.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.diag([1.0, 2.0, 3.0, 1.0])), axes), file)
    for reader in (NibabelIOWithReorient, NibabelIO):
        array, properties = reader().read_images([str(file)])
        header = read_header(file)
        assert tuple(in_axes_of(header.shape, header, reader.__name__)) == array.shape[1:]
        np.testing.assert_allclose(spacing_of(header, reader.__name__), properties["spacing"])


# ---- plans and trainers ----


@pytest.fixture
def planned(workspace, tmp_path, monkeypatch):
    """Plans of the tiny CT dataset for a public backbone, whose weights planning does not look into."""
    monkeypatch.setenv("fseft_backbones", str(tmp_path / "backbones"))

    def plan(backbone_id: str) -> dict:
        save_backbone(ZOO[backbone_id].contract({}), {"none": torch.zeros(1)}, tmp_path / "backbones")
        planner = FSEFTPlanner(workspace.dataset, backbone=backbone_id, shots=(1,))
        planner.plan_experiment()
        return json.loads((workspace.preprocessed / f"FSEFTPlans_{backbone_id}.json").read_text())

    return plan


@pytest.mark.parametrize(
    "backbone_id, channels, known",
    [
        ("fseft", 48, "{'spleen': 'spleen', 'stomach': 'stomach', 'kidney_left': 'kidney_left'}"),
        ("suprem_unet", 64, "none"),
    ],
)
def test_plans(planned, capsys, backbone_id, channels, known):
    """The adapter gets the published features as they are: no reduction before it."""
    plans = planned(backbone_id)
    parent, child = (plans["configurations"][name] for name in ("3d_fullres", "3d_fullres_1shot"))
    assert plans["image_reader_writer"] == "NibabelIOWithReorient" and plans["transpose_forward"] == [2, 1, 0]
    window = {"percentile_00_5": -175.0, "percentile_99_5": 250.0, "mean": -175.0, "std": 425.0}
    assert plans["foreground_intensity_properties_per_channel"] == {"0": window}
    assert parent["spacing"] == [1.5, 1.5, 1.5] and parent["normalization_schemes"] == ["CTNormalization"]
    assert child["patch_size"] == [96, 96, 96] and child["fseft_crop_size"] == [32, 32, 32]
    kwargs = child["architecture"]["arch_kwargs"]
    assert (kwargs["stages"], kwargs["channels"]) == ("last", channels)
    assert f"Labels that the backbone knows by name: {known}." in capsys.readouterr().out


def test_an_encoder_alone_is_no_backbone_for_adapters(planned, workspace, monkeypatch, capsys):
    plans = planned("selfsup")
    assert "Backbone 'selfsup' is an encoder; its decoder is random and must be tuned." in capsys.readouterr().out

    def trainer(cls: type) -> FSEFTTrainer:
        resuming = {"continue_training": False}  # as nnUNetv2_train adds
        return cls({**plans, **resuming}, "3d_fullres_1shot", 0, workspace.dataset_json(), torch.device("cpu"))

    with pytest.raises(
        ValueError, match="^Backbone 'selfsup' is an encoder.* are refused: use a method that tunes .* 1.$"
    ):
        trainer(FSEFTTrainer)
    with pytest.raises(ValueError, match="are refused"):
        trainer(FSEFTTrainer_FTLast)
    trainer(FSEFTTrainer_Decoder)
    monkeypatch.setenv("fseft_force", "1")
    trainer(FSEFTTrainer)
