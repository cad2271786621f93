"""Trained nnU-Net models, made up on the fly, as backbones."""

import errno
import itertools
import json
import os
import shutil
import zipfile
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.imageio.nibabel_reader_writer import NibabelIOWithReorient
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIOWithReorient
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from fsefs_nnunet.backbones.frozen import FrozenBackbone
from fsefs_nnunet.backbones.importing import import_nnunet_model
from fsefs_nnunet.backbones.nnunet import NNUNetBackbone
from fsefs_nnunet.backbones.readers import find_reader, reoriented_axes
from fsefs_nnunet.backbones.store import find_backbone
from fsefs_nnunet.cli.main import main
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.network import AdaptedNetwork
from fsefs_nnunet.planners.fseft_planner import FSEFTPlanner

CONFIGURATION = "3d_fullres"
FOLDER = f"Dataset004_X/nnUNetTrainer__nnUNetPlans__{CONFIGURATION}"
LABELS = {"background": 0, "tumour": 2, "liver": 1}  # the network's rows follow the values, not this order
STATISTICS = {"max": 900.0, "mean": 70.5, "median": 71.0, "min": -90.0, "std": 40.25}
STATISTICS |= {"percentile_00_5": -40.0, "percentile_99_5": 210.0}
CT = {"percentile_00_5": -40.0, "percentile_99_5": 210.0, "mean": 70.5, "std": 40.25}
STRIDES = [[1, 1, 1], [1, 2, 2], [2, 2, 2]]  # anisotropic
PATCH = [6, 16, 24]


def unet_plans(kind: str = "PlainConvUNet") -> dict:
    convs = "n_conv_per_stage" if kind == "PlainConvUNet" else "n_blocks_per_stage"
    return {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{kind}",
        "arch_kwargs": {
            "n_stages": 3,
            "features_per_stage": [4, 6, 8],
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
            "strides": STRIDES,
            convs: [1, 2, 1],
            "n_conv_per_stage_decoder": [1, 2],
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def model_plans(channels: list[str], **changes) -> dict:
    """A plans.json as nnU-Net writes it; `changes` of the plans or of its configuration."""
    resampling = {"is_seg": False, "order": 2, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": PATCH,
        "median_image_size_in_voxels": [10.0, 20.0, 30.0],
        "spacing": [4.0, 2.0, 1.5],
        "normalization_schemes": ["CTNormalization" if name == "CT" else "ZScoreNormalization" for name in channels],
        "use_mask_for_norm": [name != "CT" for name in channels],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resampling,
        "resampling_fn_seg_kwargs": {**resampling, "is_seg": True, "order": 1},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": {**resampling, "order": 1},
        "architecture": unet_plans(),
        "batch_dice": False,
    }
    plans = {
        "dataset_name": "Dataset004_X",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {CONFIGURATION: configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(i): STATISTICS for i in range(len(channels))},
    }
    plans.update({key: value for key, value in changes.items() if key in plans})
    configuration.update({key: value for key, value in changes.items() if key not in plans})
    return deepcopy(plans)


def network_of(architecture: dict, channels: int, outputs: int) -> torch.nn.Module:
    """The stock network with deep supervision, as it is trained, with weights that are no initial ones."""
    network = get_network_from_plans(*architecture.values(), channels, outputs, deep_supervision=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def write_checkpoint(file: Path, network: torch.nn.Module, plans: dict, prefix: str = "", **changes) -> None:
    content = {
        "network_weights": {prefix + name: tensor for name, tensor in network.state_dict().items()},
        "optimizer_state": {"state": {}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
        "grad_scaler_state": None,
        "logging": {"mean_fg_dice": [np.float64(0.5)], "dice_per_class_or_region": [[np.float32("nan")]]},
        "_best_ema": np.float64(0.7),
        "current_epoch": 3,
        "init_args": {"plans": plans, "configuration": CONFIGURATION, "fold": 0, "device": torch.device("cpu")},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({**content, **changes}, file)


@dataclass(frozen=True)
class Model:
    folder: Path
    plans: dict
    network: torch.nn.Module


def write_model(folder: Path, channels: list[str], labels: dict = LABELS, prefix: str = "", **changes) -> Model:
    """A model folder as nnU-Net's training leaves it; random weights, the same in every run."""
    torch.manual_seed(2)
    plans = model_plans(channels, **changes)
    names = {str(i): name for i, name in enumerate(channels)}
    dataset = {"channel_names": names, "labels": labels, "numTraining": 9, "file_ending": ".nii.gz"}
    if any(isinstance(value, list) for value in labels.values()):
        dataset["regions_class_order"] = [1, 2]
    outputs = len(labels) - ("regions_class_order" in dataset)
    network = network_of(plans["configurations"][CONFIGURATION]["architecture"], len(channels), outputs)
    write_checkpoint(folder / "fold_0" / "checkpoint_final.pth", network, plans, prefix)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset))
    return Model(folder, plans, network.eval())


@pytest.fixture
def backbones(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("fseft_backbones", str(tmp_path / "backbones"))
    return tmp_path / "backbones"


@pytest.fixture
def model(tmp_path, backbones) -> Model:
    return write_model(tmp_path / "results" / FOLDER, ["CT"])


# ---- the network ----

ARCHITECTURES = ["PlainConvUNet", "ResidualEncoderUNet"]


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module."])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_head_of_the_features_is_the_stock_networks_output(tmp_path, backbones, kind, prefix):
    """Two channels, anisotropic strides and kernels; a compiled or distributed training's names."""
    model = write_model(tmp_path / "m", ["CT", "MRI"], prefix=prefix, architecture=unet_plans(kind))
    contract = import_nnunet_model("mine", model.folder, backbones)
    assert contract.architecture["network_class_name"].endswith(kind) and contract.divisor == (2, 4, 4)
    image = torch.randn((1, 2, *PATCH), generator=torch.Generator().manual_seed(1))
    last, every = FrozenBackbone("mine", "last"), FrozenBackbone("mine", "all")
    with torch.no_grad():
        stock = model.network(image)[0]
    assert stock.shape == (1, 3, *PATCH)
    assert torch.equal(last.head(last(image)), stock)
    assert (last.out_channels, every.out_channels) == (4, 4 + 6)
    assert torch.equal(every(image)[:, :4], last(image))


def test_plans_of_older_nnunet(tmp_path, backbones, model):
    """Before 2.4 the plans described the network by other keys; TotalSegmentator's models do."""
    content = json.loads((model.folder / "plans.json").read_text())
    configuration = content["configurations"][CONFIGURATION]
    kwargs = configuration.pop("architecture")["arch_kwargs"]
    configuration.update(
        UNet_class_name="PlainConvUNet",
        UNet_base_num_features=4,
        unet_max_num_features=8,
        n_conv_per_stage_encoder=[1, 2, 1],
        n_conv_per_stage_decoder=[1, 2],
        num_pool_per_axis=[1, 2, 2],
        pool_op_kernel_sizes=kwargs["strides"],
        conv_kernel_sizes=kwargs["kernel_sizes"],
    )
    kwargs["features_per_stage"] = [4, 8, 8]
    network = network_of(unet_plans() | {"arch_kwargs": kwargs}, 1, 3)
    write_checkpoint(model.folder / "fold_0" / "checkpoint_final.pth", network, content)
    (model.folder / "plans.json").write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="old nnU-Net plans format"):
        import_nnunet_model("old", model.folder, backbones)
    image = torch.randn((1, 1, *PATCH), generator=torch.Generator().manual_seed(1))
    backbone = FrozenBackbone("old", "last")
    with torch.no_grad():
        assert torch.equal(backbone.head(backbone(image)), network(image)[0])


# ---- the contract ----


def test_contract_is_the_models_own_plans(tmp_path, backbones):
    model = write_model(tmp_path / "m", ["MRI", "CT"], transpose_forward=[1, 0, 2], transpose_backward=[1, 0, 2])
    contract = import_nnunet_model("mine", model.folder, backbones, licence="CC BY 4.0")
    assert contract == find_backbone("mine")
    assert contract.classes == ("background", "liver", "tumour") and contract.softmax
    assert contract.channel_names == ("MRI", "CT") and contract.input_channels == 2
    assert contract.image_reader_writer == "SimpleITKIO" and contract.transpose_forward == (1, 0, 2)
    assert contract.spacing == (4.0, 2.0, 1.5)
    assert contract.normalization_schemes == ("ZScoreNormalization", "CTNormalization")
    assert contract.use_mask_for_norm == (True, False)
    assert contract.foreground_intensity_properties_per_channel == {"1": CT}
    assert contract.resampling_fn_data_kwargs["order"] == 2
    assert contract.patch_size == contract.smallest_window == tuple(PATCH)
    assert contract.divisor == (2, 4, 4) and contract.licence == "CC BY 4.0"


def test_regions(tmp_path, backbones):
    labels = {"background": 0, "whole": [1, 2], "core": 2}
    model = write_model(tmp_path / "m", ["CT"], labels)
    contract = import_nnunet_model("mine", model.folder, backbones)
    assert contract.classes == ("whole", "core") and not contract.softmax


def test_the_embedded_backbones_contract_is_what_importing_writes(tmp_path, backbones, contract):
    """Keys and preprocessing; benchmarks/pretrain_phantom.py imports its result this way."""
    axes = {"transpose_forward": [2, 1, 0], "transpose_backward": [2, 1, 0]}
    model = write_model(tmp_path / "m", ["CT"], image_reader_writer="NibabelIOWithReorient", **axes)
    made = import_nnunet_model("mine", model.folder, backbones, open_spacing=True)
    written, shipped = (json.loads(c.to_json()) for c in (made, contract))
    assert written.keys() == shipped.keys()
    for key in (
        "channel_names",
        "image_reader_writer",
        "transpose_forward",
        "spacing",
        "normalization_schemes",
        "use_mask_for_norm",
        "resampling_fn_data",
        "resampling_fn_data_kwargs",
        "smallest_window",
    ):
        assert written[key] == shipped[key], key


def test_command_reports_what_it_took(tmp_path, backbones, capsys):
    model = write_model(tmp_path / "m", ["MRI", "CT"])
    assert main(["backbones", "import", "mine", str(model.folder)]) == 0
    out = capsys.readouterr().out
    tensors = len(list(model.network.named_parameters()))
    assert f"trained by nnUNetTrainer: all {tensors} tensors matched" in out
    assert "3 classes, one a voxel: background, liver, tumour" in out
    assert "Channel 0 MRI: ZScoreNormalization inside the nonzero mask\n" in out
    assert "Channel 1 CT: CTNormalization: clipped to [-40, 210], minus 70.5, divided by 40.25\n" in out
    assert "Reader SimpleITKIO, images are seen as stored; axes [0, 1, 2] of z, y, x\n" in out
    assert "Spacing [4.0, 2.0, 1.5] mm; window [6, 16, 24], multiples of [2, 4, 4]" in out
    assert "Licence: unknown, ask the authors of the model\n" in out


# ---- plans of a user's dataset ----


def write_dataset(root: Path, monkeypatch, channels: list[str], ending: str = ".nii.gz", axes: str = "LPS") -> Path:
    """Two asymmetric cases stored in orientation `axes`, with nnU-Net's own fingerprint. Returns the raw folder."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(root / name))
    raw, preprocessed = (root / name / "Dataset005_User" for name in ("nnUNet_raw", "nnUNet_preprocessed"))
    for folder in (raw / "imagesTr", raw / "labelsTr", preprocessed):
        folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for case in ("a", "b"):
        for channel in range(len(channels)):
            array = rng.integers(-300, 400, (12, 18, 10)).astype(np.int16)
            array[:2] = 0  # outside of the nonzero mask
            save(array, axes, raw / "imagesTr" / f"{case}_{channel:04d}{ending}")
        save((array > 200).astype(np.uint8), axes, raw / "labelsTr" / f"{case}{ending}")
    content = {
        "channel_names": {str(i): name for i, name in enumerate(channels)},
        "labels": {"background": 0, "liver": 1},
        "numTraining": 2,
        "file_ending": ending,
    }
    (raw / "dataset.json").write_text(json.dumps(content))
    (preprocessed / "dataset_fingerprint.json").write_text(json.dumps(fingerprint(raw, content)))
    return raw


def save(array: np.ndarray, axes: str, file: Path) -> None:
    """Write an array (X, Y, Z) whose axes lead right, front, up; voxels of 2, 1.5 and 3 mm; stored along `axes`."""
    affine = np.diag([2.0, 1.5, 3.0, 1.0])
    affine[:3, 3] = (7, -8, 9)
    image = nib.Nifti1Image(array, affine)
    wanted = nib.orientations.axcodes2ornt(axes)
    image = image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(affine), wanted))
    if file.name.endswith((".nii", ".nii.gz")):
        nib.save(image, file)
        return
    # the same geometry without a NIfTI reader between: ITK's world is left, back, up
    world = np.diag([-1, -1, 1])
    other = sitk.GetImageFromArray(np.asarray(image.dataobj).transpose(2, 1, 0))
    other.SetSpacing([float(mm) for mm in image.header.get_zooms()])
    other.SetOrigin((world @ image.affine[:3, 3]).tolist())
    other.SetDirection((world @ image.affine[:3, :3] / image.header.get_zooms()).ravel().tolist())
    sitk.WriteImage(other, str(file))


def fingerprint(raw: Path, dataset_json: dict) -> dict:
    """nnU-Net's, without its worker processes."""
    cases = get_filenames_of_train_images_and_targets(str(raw))
    reader = determine_reader_writer_from_dataset_json(dataset_json, cases["a"]["images"][0], verbose=False)
    results = [DatasetFingerprintExtractor.analyze_case(c["images"], c["label"], reader) for c in cases.values()]
    return {
        "shapes_after_crop": [list(map(int, shape)) for shape, *_ in results],
        "spacings": [list(map(float, spacing)) for _, spacing, *_ in results],
        "median_relative_size_after_cropping": float(np.median([r[4] for r in results])),
        "foreground_intensity_properties_per_channel": {str(i): {} for i in range(len(results[0][2]))},
    }


def make_plans(backbone: str) -> dict:
    planner = FSEFTPlanner("Dataset005_User", backbone=backbone, shots=(1,))
    planner.plan_experiment()
    return planner.plans


def preprocessed_case(plans: dict, raw: Path) -> np.ndarray:
    manager = PlansManager(plans)
    configuration = manager.get_configuration(CONFIGURATION)
    dataset_json = json.loads((raw / "dataset.json").read_text())
    images = get_filenames_of_train_images_and_targets(str(raw))["a"]["images"]
    return DefaultPreprocessor(verbose=False).run_case(images, None, manager, configuration, dataset_json)[0]


AXES_OF_MODELS = [
    ("SimpleITKIO", [0, 1, 2]),  # nnU-Net's default
    ("SimpleITKIO", [2, 0, 1]),  # not the inverse of itself
    ("NibabelIO", [1, 0, 2]),
    ("NibabelIOWithReorient", [1, 2, 0]),
    ("NibabelIOWithReorient", [0, 1, 2]),  # TotalSegmentator's
    ("SimpleITKIOWithReorient", [2, 1, 0]),
]


@pytest.mark.parametrize("reader, forward", AXES_OF_MODELS)
def test_a_users_images_are_preprocessed_as_the_models_own(tmp_path, backbones, monkeypatch, reader, forward):
    """By stock nnU-Net from our plans, to the same array as from the model's plans; and what the plans say."""
    backward = np.argsort(forward).tolist()
    axes = {"image_reader_writer": reader, "transpose_forward": forward, "transpose_backward": backward}
    model = write_model(tmp_path / "m", ["CT", "MRI"], **axes)
    import_nnunet_model("mine", model.folder, backbones)
    raw = write_dataset(tmp_path, monkeypatch, ["CT", "FLAIR"], axes="PIL")
    plans = make_plans("mine")
    assert plans["plans_name"] == "FSEFTPlans_mine"
    assert {key: plans[key] for key in axes} == axes
    assert plans["foreground_intensity_properties_per_channel"] == {"0": CT, "1": {}}
    parent, child = plans["configurations"][CONFIGURATION], plans["configurations"]["3d_fullres_1shot"]
    for key in ("spacing", "normalization_schemes", "use_mask_for_norm", "resampling_fn_data_kwargs"):
        assert parent[key] == model.plans["configurations"][CONFIGURATION][key], key
    assert child["patch_size"] == PATCH and child["fseft_crop_size"] == [min(n, 16) for n in PATCH]
    image = preprocessed_case(plans, raw)
    np.testing.assert_array_equal(image, preprocessed_case(model.plans, raw))
    # mm along the reader's axes, without the four that are zero
    size = np.array([30, 27, 20]) if "Reorient" in reader else np.array([20, 30, 27])
    assert image.shape[1:] == tuple(np.round(size[forward] / parent["spacing"]))


def test_plans_are_made_by_the_planners_command(tmp_path, backbones, model, monkeypatch, capsys):
    write_dataset(tmp_path, monkeypatch, ["CT"])
    import_nnunet_model("mine", model.folder, backbones)
    capsys.readouterr()
    assert main(["plan", "-d", "5", "-b", "mine"]) == 0
    out = capsys.readouterr().out
    assert "Images as stored, which must be as the backbone's were (SimpleITKIO), axes [0, 1, 2] of z, y, x." in out
    assert "Channel 0: CT, the backbone's was CT; CTNormalization: clipped to [-40, 210], minus 70.5" in out
    assert "Spacing [4.0, 2.0, 1.5] mm: the backbone's." in out
    assert "Labels that the backbone knows by name: {'liver': 'liver'}" in out


@pytest.mark.parametrize("widths, expected", [([48, 80, 8], ("skips", 48)), ([48, 81, 8], ("last", 48))])
def test_features_of_wide_networks(tmp_path, backbones, monkeypatch, widths, expected):
    """Of every stage while volumes fit into memory; the adapter is no narrower than the head."""
    architecture = unet_plans()
    architecture["arch_kwargs"]["features_per_stage"] = widths
    model = write_model(tmp_path / "m", ["CT"], architecture=architecture)
    import_nnunet_model("mine", model.folder, backbones)
    write_dataset(tmp_path, monkeypatch, ["CT"])
    child = make_plans("mine")["configurations"]["3d_fullres_1shot"]
    kwargs = child["architecture"]["arch_kwargs"]
    assert (kwargs["stages"], kwargs["channels"]) == expected
    network = AdaptedNetwork(1, 2, **kwargs)
    with torch.no_grad():
        assert network(torch.zeros((1, 1, *PATCH))).shape == (1, 2, *PATCH)


@pytest.mark.parametrize("own, users", [("CT", "MRI"), ("MRI", "CT"), ("CT", "noNorm")])
def test_ct_and_other_images_are_not_mixed_up(tmp_path, backbones, monkeypatch, own, users):
    model = write_model(tmp_path / "m", ["T1", own])
    import_nnunet_model("mine", model.folder, backbones)
    write_dataset(tmp_path, monkeypatch, ["T2", users])
    with pytest.raises(ValueError, match=rf"Channel 1 of .*dataset\.json is '{users}', .*'mine' was .* '{own}' there"):
        FSEFTPlanner("Dataset005_User", backbone="mine")


@pytest.mark.parametrize("channels", [["T1"], ["T1", "T2", "FLAIR"]])
def test_number_of_channels(tmp_path, backbones, monkeypatch, channels):
    model = write_model(tmp_path / "m", ["T1", "T2"])
    import_nnunet_model("mine", model.folder, backbones)
    write_dataset(tmp_path, monkeypatch, channels)
    with pytest.raises(ValueError, match=rf"has {len(channels)} channel\(s\), backbone 'mine' takes 2"):
        FSEFTPlanner("Dataset005_User", backbone="mine")


# ---- readers and orientations ----

AXES = ["".join(c) for p in itertools.permutations(("LR", "PA", "IS")) for c in itertools.product(*p)]


@pytest.mark.parametrize("ending", [".nii.gz", ".mha", ".nrrd"])
def test_both_reorienting_readers_see_the_same(tmp_path, ending):
    """All 48 stored orientations: array, spacing, and a segmentation that lies on the image it came from."""
    assert len(set(AXES)) == 48
    array = np.random.default_rng(0).integers(1, 100, (4, 5, 6)).astype(np.int16)
    nifti, other, output = (str(tmp_path / name) for name in ("x.nii.gz", f"y{ending}", f"z{ending}"))
    for axes in AXES:
        save(array, axes, Path(nifti))
        save(array, axes, Path(other))
        expected, properties = NibabelIOWithReorient().read_images([nifti])
        np.testing.assert_array_equal(expected[0], array.transpose(2, 1, 0))
        assert properties["spacing"] == [3.0, 1.5, 2.0]
        seen, properties = SimpleITKIOWithReorient().read_images([other])
        np.testing.assert_array_equal(seen, expected)
        np.testing.assert_allclose(properties["spacing"], [3.0, 1.5, 2.0])
        SimpleITKIOWithReorient().write_seg(seen[0], output, properties)
        before, after = sitk.ReadImage(other), sitk.ReadImage(output)
        np.testing.assert_array_equal(sitk.GetArrayFromImage(after), sitk.GetArrayFromImage(before))
        for geometry in ("GetOrigin", "GetSpacing", "GetDirection"):
            np.testing.assert_allclose(getattr(after, geometry)(), getattr(before, geometry)(), atol=1e-4)


def test_oblique_images_are_seen_the_same(tmp_path):
    """Tilted by 20 degrees, each reader turns to the nearest axes."""
    a = np.deg2rad(20)
    tilt = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    affine = np.eye(4)
    affine[:3, :3] = tilt @ np.array([[0, 0, -2], [-1.5, 0, 0], [0, 3, 0]])  # stored as P, S, L
    array = np.random.default_rng(0).integers(1, 100, (4, 5, 6)).astype(np.int16)
    nib.save(nib.Nifti1Image(array, affine), tmp_path / "x.nii.gz")
    sitk.WriteImage(sitk.ReadImage(str(tmp_path / "x.nii.gz")), str(tmp_path / "x.nrrd"))
    expected, _ = NibabelIOWithReorient().read_images([str(tmp_path / "x.nii.gz")])
    seen, _ = SimpleITKIOWithReorient().read_images([str(tmp_path / "x.nrrd")])
    np.testing.assert_array_equal(seen, expected)


def test_nrrd_of_another_program(tmp_path):
    """A header written by hand, in NRRD's own words for RAS."""
    array = np.arange(24, dtype=np.uint8).reshape(4, 3, 2)  # z, y, x
    header = (
        "NRRD0004\ntype: uint8\ndimension: 3\nspace: right-anterior-superior\nsizes: 2 3 4\n"
        "space directions: (2,0,0) (0,1.5,0) (0,0,3)\nkinds: domain domain domain\nencoding: raw\n"
        "space origin: (7,-8,9)\n\n"
    )
    (tmp_path / "x.nrrd").write_bytes(header.encode() + array.tobytes())
    seen, properties = SimpleITKIOWithReorient().read_images([str(tmp_path / "x.nrrd")])
    np.testing.assert_array_equal(seen[0], array)
    np.testing.assert_allclose(properties["spacing"], [3, 1.5, 2])


READERS = [
    ("NibabelIOWithReorient", ".nii", "NibabelIOWithReorient"),
    ("NibabelIOWithReorient", ".nii.gz", "NibabelIOWithReorient"),
    ("NibabelIOWithReorient", ".mha", "SimpleITKIOWithReorient"),
    ("NibabelIOWithReorient", ".nrrd", "SimpleITKIOWithReorient"),
    ("SimpleITKIOWithReorient", ".nii.gz", "SimpleITKIOWithReorient"),
    ("SimpleITKIOWithReorient", ".nii", "NibabelIOWithReorient"),
    ("SimpleITKIO", ".nii.gz", "SimpleITKIO"),
    ("SimpleITKIO", ".mha", "SimpleITKIO"),
    ("NibabelIO", ".nii", "NibabelIO"),
]


@pytest.mark.parametrize("reader, ending, expected", READERS)
def test_reader_of_a_file_ending(tmp_path, backbones, reader, ending, expected):
    model = write_model(tmp_path / "m", ["CT"], image_reader_writer=reader)
    contract = import_nnunet_model("mine", model.folder, backbones)
    assert find_reader(contract, ending).__name__ == expected


@pytest.mark.parametrize("reader, ending", [("SimpleITKIO", ".nii"), ("NibabelIO", ".mha")])
def test_a_file_ending_that_the_models_reader_cannot_read(tmp_path, backbones, monkeypatch, reader, ending):
    model = write_model(tmp_path / "m", ["CT"], image_reader_writer=reader)
    import_nnunet_model("mine", model.folder, backbones)
    write_dataset(tmp_path, monkeypatch, ["CT"], ending)
    with pytest.raises(ValueError, match=rf"'mine' was trained with {reader}, .* '\{ending}': convert .*\.nii\.gz"):
        FSEFTPlanner("Dataset005_User", backbone="mine")


def test_another_simpleitk_that_means_something_else_by_ras(monkeypatch, contract):
    turn = sitk.DICOMOrient
    monkeypatch.setattr(sitk, "DICOMOrient", lambda image, axes: turn(image, "LPI" if axes == "RAS" else axes))
    with pytest.raises(ValueError, match=r"does not turn '\.mha' images to RAS: convert the dataset to \.nii\.gz"):
        find_reader(contract, ".mha")
    assert find_reader(contract, ".nii.gz") is NibabelIOWithReorient


@pytest.mark.parametrize("ending", [".nii.gz", ".mha"])
def test_the_datasets_own_spacing_follows_the_reoriented_axes(tmp_path, backbones, monkeypatch, ending):
    """nnU-Net's fingerprint is of the images as stored; the default backbone sees x, y, z whatever they are."""
    raw = write_dataset(tmp_path, monkeypatch, ["CT"], ending, axes="PIL")
    assert reoriented_axes(raw / "imagesTr" / f"a_0000{ending}") == [1, 2, 0]
    plans = make_plans("phantom")
    parent = plans["configurations"][CONFIGURATION]
    assert parent["spacing"] == [2.0, 1.5, 3.0]
    assert list(parent["median_image_size_in_voxels"]) == [10, 18, 10]  # x is cropped to what is not zero
    assert preprocessed_case(plans, raw).shape == (1, 10, 18, 10)


def test_a_fingerprint_of_other_cases(tmp_path, monkeypatch):
    raw = write_dataset(tmp_path, monkeypatch, ["CT"])
    for file in (raw / "imagesTr" / "b_0000.nii.gz", raw / "labelsTr" / "b.nii.gz"):
        file.unlink()
    with pytest.raises(ValueError, match="dataset_fingerprint.json is of 2 cases, the dataset has 1: delete it"):
        FSEFTPlanner("Dataset005_User")


# ---- zips ----


def export(folder: Path, file: Path) -> Path:
    """As nnUNetv2_export_model_to_zip does, which calls this on each file of interest."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*.*")):
            archive.write(path, os.path.relpath(path, folder))
    return file


def test_zip_is_the_folder(tmp_path, backbones, model, capsys):
    (model.folder / "fold_1").mkdir()
    shutil.copy(model.folder / "fold_0" / "checkpoint_final.pth", model.folder / "fold_1")
    aside = model.folder / "crossval_results_folds_0_1"
    aside.mkdir()
    shutil.copy(model.folder / "plans.json", aside)
    file = export(tmp_path / "results", tmp_path / "model.zip")
    from_folder = import_nnunet_model("mine", model.folder, backbones)
    from_zip = import_nnunet_model("mine", file, tmp_path / "other")
    assert from_zip == from_folder
    assert f"{file}/{FOLDER}/fold_0/checkpoint_final.pth" in capsys.readouterr().out
    import_nnunet_model("second", file, backbones, fold="1")
    assert f"{file}/{FOLDER}/fold_1/checkpoint_final.pth" in capsys.readouterr().out


def test_zip_of_several_models(tmp_path, backbones, model):
    lowres = model.folder.parent / "nnUNetTrainer__nnUNetPlans__3d_lowres"
    write_model(lowres, ["CT"], spacing=[8.0, 4.0, 3.0])
    file = export(tmp_path / "results", tmp_path / "model.zip")
    with pytest.raises(ValueError, match=r"model\.zip holds 2 models, .*__3d_fullres, .*__3d_lowres: choose"):
        import_nnunet_model("mine", file, backbones)
    assert import_nnunet_model("mine", file, backbones, configuration="3d_lowres").spacing == (8.0, 4.0, 3.0)
    with pytest.raises(ValueError, match=r"model\.zip holds no nnU-Net model of 2d with fold_X/checkpoint_final\.pth"):
        import_nnunet_model("mine", file, backbones, configuration="2d")


@pytest.mark.parametrize("member", ["../evil.txt", "/evil.txt", "a/../../evil.txt", "..\\evil.txt", "C:\\evil.txt"])
def test_zip_with_a_member_that_points_outside(tmp_path, backbones, model, member):
    file = export(tmp_path / "results", tmp_path / "model.zip")
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(member, "")
    with pytest.raises(ValueError) as error:
        import_nnunet_model("mine", file, backbones)
    assert f"model.zip was not unpacked: its member {member!r} points outside. Take the zip" in str(error.value)
    assert not backbones.exists() and not list(tmp_path.rglob("evil.txt"))


class RunsCode:
    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_zip_with_a_checkpoint_that_would_run_code(tmp_path, backbones, model):
    witness, weights = tmp_path / "ran", model.folder / "fold_0" / "checkpoint_final.pth"
    write_checkpoint(weights, model.network, model.plans, logging=RunsCode(f"touch {witness}"))
    file = export(tmp_path / "results", tmp_path / "model.zip")
    with pytest.raises(ValueError, match=rf"^{file}/{FOLDER}/fold_0/checkpoint_final\.pth was not opened"):
        import_nnunet_model("mine", file, backbones)
    assert not witness.exists() and not backbones.exists()
    torch.load(weights, weights_only=False)
    assert witness.exists()  # so it was dangerous


def test_damaged_zips(tmp_path, backbones, model):
    file = export(tmp_path / "results", tmp_path / "model.zip")
    content = bytearray(file.read_bytes())
    flipped = content.copy()
    with zipfile.ZipFile(file) as archive:
        start = archive.getinfo(f"{FOLDER}/fold_0/checkpoint_final.pth").header_offset
    flipped[start + 200] ^= 255
    for damaged in (content[: len(content) // 2], flipped, b"", b"<html>404</html>"):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.zip is damaged or no plain zip .*: export or download it again"):
            import_nnunet_model("mine", file, backbones)
    assert not backbones.exists()


def test_no_room_to_unpack_a_zip(tmp_path, backbones, model, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    file = export(tmp_path / "results", tmp_path / "model.zip")
    monkeypatch.setattr(zipfile.ZipFile, "extract", full)
    with pytest.raises(
        InputError, match=r"model\.zip could not be unpacked in .* \(.*No space left.*\): make room .*TMPDIR"
    ):
        import_nnunet_model("mine", file, backbones)


# ---- what is refused ----


def test_paths_that_are_no_model(tmp_path, backbones, model):
    weights = model.folder / "fold_0" / "checkpoint_final.pth"
    for path, message in (
        (tmp_path / "none", "none is missing: give a nnU-Net model folder or a .zip"),
        (model.folder.parent, "Dataset004_X/plans.json is missing: give the folder that holds plans.json and fold_X"),
        (weights, "checkpoint_final.pth is no model folder and no .zip of one: give the folder"),
    ):
        with pytest.raises(ValueError) as error:
            import_nnunet_model("mine", path, backbones)
        assert message in str(error.value)
    with pytest.raises(ValueError, match=r"has no fold_3/checkpoint_final\.pth: is the training finished"):
        import_nnunet_model("mine", model.folder, backbones, fold="3")
    (model.folder / "plans.json").write_text("{")
    with pytest.raises(ValueError, match=r"plans\.json is damaged .*: copy the model again"):
        import_nnunet_model("mine", model.folder, backbones)
    assert not backbones.exists()


@pytest.mark.parametrize("name", ["", "../mine", "a/b", "a.b"])
def test_name_of_a_backbone(backbones, model, name):
    with pytest.raises(ValueError, match="cannot name a backbone: use letters, digits"):
        import_nnunet_model(name, model.folder, backbones)


def changed_unet(**arch_kwargs) -> dict:
    architecture = unet_plans()
    architecture["arch_kwargs"] |= arch_kwargs
    return architecture


UNSUPPORTED = [
    ({"architecture": unet_plans("ResidualUNet")}, r"\(ResidualUNet, 3D\) cannot be a backbone: 3D models of Plain"),
    ({"patch_size": [16, 24]}, r"\(PlainConvUNet, 2D\) cannot be a backbone"),
    ({"previous_stage": "3d_lowres"}, "is the second stage of a cascade; import the first"),
    ({"image_reader_writer": "MyReader"}, "The plans name MyReader, which stock nnU-Net's preprocessing does not have"),
    ({"normalization_schemes": ["MyNorm"]}, "The plans name MyNorm, which stock nnU-Net"),
    ({"resampling_fn_data": "mine", "preprocessor_name": "Mine"}, "The plans name mine, Mine, which stock nnU-Net"),
    ({"inherits_from": "other"}, "are not those of one nnU-Net v2 model"),
    ({"configurations": []}, "are not those of one nnU-Net v2 model"),
    ({"image_reader_writer": None}, "are not those of one nnU-Net v2 model"),
    ({"architecture": changed_unet(no_such_argument=3)}, "'mine' has arch_kwargs that do not make a PlainConvUNet"),
    ({"architecture": changed_unet(kernel_sizes=[3])}, "'mine' has arch_kwargs that do not make a PlainConvUNet"),
    ({"architecture": changed_unet(strides=2)}, "are not those of one nnU-Net v2 model"),
]


@pytest.mark.parametrize("changes, message", UNSUPPORTED)
def test_unsupported_models(backbones, model, changes, message):
    content = model_plans(["CT"], **changes)
    (model.folder / "plans.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        import_nnunet_model("mine", model.folder, backbones)
    assert not backbones.exists()


def test_checkpoints_of_another_kind(backbones, model):
    file = model.folder / "fold_0" / "checkpoint_final.pth"
    torch.save([1, 2], file)
    with pytest.raises(InputError, match=r"checkpoint_final\.pth are not those of one nnU-Net v2 model"):
        import_nnunet_model("mine", model.folder, backbones)
    weights = model.network.state_dict()
    write_checkpoint(file, model.network, model.plans, network_weights={**weights, 3: "x"})
    import_nnunet_model("mine", model.folder, backbones)
    name = "decoder.seg_layers.1.weight"
    write_checkpoint(file, model.network, model.plans, network_weights={**weights, name: weights[name] * np.nan})
    with pytest.raises(InputError, match=rf"checkpoint_final\.pth holds NaN or infinite weights, e\.g\. {name}: take"):
        import_nnunet_model("other", model.folder, backbones)


def test_weights_of_another_network(backbones, model):
    """A trainer's own layers are neither left out nor filled in."""
    file = model.folder / "fold_0" / "checkpoint_final.pth"
    weights = model.network.state_dict()
    name = "decoder.seg_layers.1.weight"
    for changed, message in (
        (weights | {"extra.weight": torch.ones(1)}, r"0 tensors are missing \[\], 1 are unknown \['extra.weight'\]"),
        ({k: v for k, v in weights.items() if k != name}, rf"1 tensors are missing \['{name}'\]"),
        (weights | {name: torch.ones(1)}, rf"1 have another shape \['{name}'\]"),
        (None, r"checkpoint_final\.pth holds no network_weights: give a checkpoint that nnU-Net's training wrote"),
    ):
        write_checkpoint(file, model.network, model.plans, network_weights=changed)
        with pytest.raises(ValueError, match=message):
            import_nnunet_model("mine", model.folder, backbones)
    write_checkpoint(file, model.network, model.plans, init_args={})
    with pytest.raises(ValueError, match="are not those of one nnU-Net v2 model .'configuration'.: copy"):
        import_nnunet_model("mine", model.folder, backbones)


@pytest.mark.parametrize("name", ["subprocess.Popen", "torch.nn.functional.relu", "torch.nn.none", "os.system"])
def test_plans_that_name_a_function_as_layer(tmp_path, backbones, model, name):
    """nnU-Net would call it with nonlin_kwargs."""
    witness = tmp_path / "ran"
    architecture = unet_plans()
    architecture["arch_kwargs"] |= {"nonlin": name, "nonlin_kwargs": {"args": ["touch", str(witness)]}}
    (model.folder / "plans.json").write_text(json.dumps(model_plans(["CT"], architecture=architecture)))
    with pytest.raises(ValueError, match=f"'mine' names '{name}' as its nonlin, which is no layer: do not trust it"):
        import_nnunet_model("mine", model.folder, backbones)
    assert not witness.exists()


def test_a_contract_of_a_stranger_is_checked_too(tmp_path, backbones, model):
    import_nnunet_model("mine", model.folder, backbones)
    content = json.loads((backbones / "mine.json").read_text())
    content["architecture"]["arch_kwargs"]["norm_op"] = "subprocess.Popen"
    (backbones / "mine.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="names 'subprocess.Popen' as its norm_op"):
        NNUNetBackbone(find_backbone("mine"), "last")


def test_a_contract_of_an_earlier_version(backbones, model):
    import_nnunet_model("mine", model.folder, backbones)
    content = json.loads((backbones / "mine.json").read_text())
    (backbones / "mine.json").write_text(json.dumps(content | {"ct_intensities": None}))
    with pytest.raises(ValueError, match=r"mine\.json is no backbone contract .*'ct_intensities'.*import the backbone"):
        find_backbone("mine")
