"""Folders of nnU-Net models with random weights, and plans and data of their users."""

import json
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk
import torch
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from fsefs_nnunet.planners.fseft_planner import FSEFTPlanner

CONFIGURATION = "3d_fullres"
FOLDER = f"Dataset004_X/nnUNetTrainer__nnUNetPlans__{CONFIGURATION}"
LABELS = {"background": 0, "tumour": 2, "liver": 1}  # the network's rows follow the values, not this order
CT = {"percentile_00_5": -40.0, "percentile_99_5": 210.0, "mean": 70.5, "std": 40.25}
STATISTICS = {"max": 900.0, "median": 71.0, "min": -90.0, **CT}
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


def in_old_format(plans: dict) -> dict:
    """The same plans as nnU-Net wrote them before 2.4, with features that double from stage to stage."""
    plans = deepcopy(plans)
    for configuration in plans["configurations"].values():
        kwargs = configuration.pop("architecture")["arch_kwargs"]
        configuration.update(
            UNet_class_name="PlainConvUNet",
            UNet_base_num_features=kwargs["features_per_stage"][0],
            unet_max_num_features=kwargs["features_per_stage"][-1],
            n_conv_per_stage_encoder=kwargs["n_conv_per_stage"],
            n_conv_per_stage_decoder=kwargs["n_conv_per_stage_decoder"],
            num_pool_per_axis=[1, 2, 2],
            pool_op_kernel_sizes=kwargs["strides"],
            conv_kernel_sizes=kwargs["kernel_sizes"],
        )
    return plans


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


def write_totalsegmentator(
    root: Path, dataset: str, trainer: str, channel: str, names: list[str], mm: float = 1.5, **changes
) -> Model:
    """A model of TotalSegmentator as its zip unpacks: plans of nnU-Net before 2.4 for CT, of a newer one for MR."""
    folder = root / dataset / f"{trainer}__nnUNetPlans__3d_fullres"
    architecture = unet_plans()
    architecture["arch_kwargs"]["features_per_stage"] = [2, 4, 4]
    labels = {"background": 0, **{name: value for value, name in enumerate(names, 1)}}
    own = {"image_reader_writer": "NibabelIOWithReorient", "spacing": [mm] * 3, "architecture": architecture}
    model = write_model(folder, [channel], labels, **own | changes)
    plans = in_old_format(model.plans) if channel == "CT" else model.plans
    file = folder / "fold_0" / "checkpoint_final.pth"
    write_checkpoint(file, model.network, plans, trainer_name=trainer, inference_allowed_mirroring_axes=None)
    (folder / "plans.json").write_text(json.dumps(plans))
    return model


def write_dataset(root: Path, monkeypatch, channels: list[str], ending: str = ".nii.gz", axes: str = "LPS") -> Path:
    """Two asymmetric cases stored in orientation `axes`. Returns the raw folder."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(root / name))
    raw = root / "nnUNet_raw" / "Dataset005_User"
    for folder in (raw / "imagesTr", raw / "labelsTr"):
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
