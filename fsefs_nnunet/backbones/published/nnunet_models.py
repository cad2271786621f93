"""Turns a trained nnU-Net model into a backbone."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from pathlib import Path

import nnunetv2
import numpy as np
import torch
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from fsefs_nnunet.backbones.architectures.nnunet import UNETS, NNUNetBackbone
from fsefs_nnunet.backbones.contract import CT_PROPERTIES, BackboneContract
from fsefs_nnunet.backbones.published.model_files import ModelFiles, read_model
from fsefs_nnunet.backbones.state import mismatch, require_finite
from fsefs_nnunet.backbones.store import check_id, save_backbone
from fsefs_nnunet.cases.dataset_json import channel_names
from fsefs_nnunet.cases.readers import reorients
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.labels import foreground_names


def import_nnunet_model(
    backbone_id: str,
    path: Path,
    target: Path,
    fold: str = "",
    checkpoint: str = "checkpoint_final.pth",
    configuration: str = "",
    open_spacing: bool = False,
    **contract_fields,
) -> BackboneContract:
    """Store the network of the model in `path` as backbone `backbone_id` in folder `target`, and print what it is.

    Reader, axes, spacing, normalisation, resampling, window and channels are taken from the model's own plans.

    Args:
        path: the folder with plans.json and fold_X, or a zip of nnUNetv2_export_model_to_zip.
        fold: "0", "all", ...; default: the first one that has a checkpoint.
        configuration: which model of a zip that holds several.
        open_spacing: the model serves images of any spacing and modality; true for the embedded backbone alone.
        contract_fields: licence, citation, description, training.

    Raises:
        InputError: for a 2D or cascade model, an unknown architecture or preprocessing, damaged or unsafe files, and
            weights that are not finite or belong to a network other than that of the plans.
    """
    check_id(backbone_id)
    files = read_model(path, fold, checkpoint, configuration)
    contract = _contract(backbone_id, files, contract_fields)
    if open_spacing:
        contract = _left_open(contract)
    backbone = NNUNetBackbone(contract, "last")
    weights = _own_tensors(backbone, files)
    if how := mismatch(backbone.backbone_state(), weights):
        raise InputError(
            f"{files.source}, trained by {_trainer(files)}, does not hold the network that its plans.json describes "
            f"({how}): give a model of nnU-Net's own U-Nets; a network that a trainer builds itself cannot be a "
            "backbone."
        )
    require_finite(files.source, weights)
    backbone.load_backbone_state(weights)
    contract = save_backbone(contract, backbone.backbone_state(), target)
    _report(contract, backbone, files)
    return contract


def _contract(backbone_id: str, files: ModelFiles, contract_fields: dict) -> BackboneContract:
    try:
        manager = PlansManager(files.plans)
        name = files.checkpoint["init_args"]["configuration"]
        with warnings.catch_warnings():
            # nnU-Net advises planning again, which is impossible for a trained model
            warnings.filterwarnings("ignore", "Detected old nnU-Net plans format")
            settings = manager.get_configuration(name)
        _refuse_unsupported(name, settings, manager)
        labels = manager.get_label_manager(files.dataset)
        channels = channel_names(files.dataset)
        properties = manager.plans["foreground_intensity_properties_per_channel"]
        classes = foreground_names(files.dataset["labels"], labels.has_regions)
        patch_size = tuple(int(n) for n in settings.patch_size)
        return BackboneContract(
            id=backbone_id,
            architecture={"kind": "nnunet", **settings.configuration["architecture"]},
            classes=tuple(classes if labels.has_regions else ["background", *classes]),
            softmax=not labels.has_regions,
            channel_names=tuple(str(name) for name in channels.values()),
            image_reader_writer=manager.plans["image_reader_writer"],
            transpose_forward=tuple(int(axis) for axis in manager.transpose_forward),
            spacing=tuple(float(s) for s in settings.spacing),
            normalization_schemes=tuple(settings.normalization_schemes),
            use_mask_for_norm=tuple(bool(use) for use in settings.use_mask_for_norm),
            foreground_intensity_properties_per_channel={
                str(channel): {key: float(properties[str(channel)][key]) for key in CT_PROPERTIES}
                for channel, scheme in enumerate(settings.normalization_schemes)
                if scheme == "CTNormalization"
            },
            resampling_fn_data=settings.configuration["resampling_fn_data"],
            resampling_fn_data_kwargs=settings.configuration["resampling_fn_data_kwargs"],
            patch_size=patch_size,
            smallest_window=patch_size,
            divisor=tuple(int(n) for n in np.prod(settings.pool_op_kernel_sizes, axis=0)),
            **contract_fields,
        )
    except InputError:
        raise
    except Exception as error:  # nnU-Net may raise anything for plans and checkpoints of another kind
        raise InputError(
            f"plans.json, dataset.json and {files.source} are not those of one nnU-Net v2 model ({error}): copy the "
            "model's folder as nnU-Net wrote it."
        ) from error


def _left_open(contract: BackboneContract) -> BackboneContract:
    """For a model that was trained on all spacings and contrasts, and on windows from 40 voxels upwards."""
    return replace(
        contract,
        spacing=None,
        normalization_schemes=None,
        use_mask_for_norm=None,
        # a cubic spline overshoots the [0, 1] that it was trained on
        resampling_fn_data_kwargs={**contract.resampling_fn_data_kwargs, "order": 1},
        smallest_window=(40, 40, 40),
    )


def _refuse_unsupported(name: str, settings, manager) -> None:
    network = settings.network_arch_class_name.split(".")[-1]
    if network not in UNETS or len(settings.patch_size) != 3:
        raise InputError(
            f"Configuration {name!r} ({network}, {len(settings.patch_size)}D) cannot be a backbone: 3D models of "
            f"{' or '.join(UNETS)} can."
        )
    if settings.previous_stage_name is not None:
        raise InputError(f"Configuration {name!r} is the second stage of a cascade; import the first.")
    wanted = {
        "imageio": [manager.plans["image_reader_writer"]],
        "preprocessing.normalization": settings.normalization_schemes,
        "preprocessing.resampling": [settings.configuration["resampling_fn_data"]],
    }
    missing = [cls for package, names in wanted.items() for cls in names if not _in_nnunet(package, cls)]
    if settings.preprocessor_name != "DefaultPreprocessor":
        missing.append(settings.preprocessor_name)
    if missing:
        raise InputError(
            f"The plans name {', '.join(missing)}, which stock nnU-Net's preprocessing does not have: models of "
            "nnU-Net's own readers, normalisation, resampling and DefaultPreprocessor can be backbones."
        )


def _in_nnunet(package: str, name: str) -> bool:
    folder = Path(nnunetv2.__path__[0], *package.split("."))
    return recursive_find_python_class(str(folder), name, f"nnunetv2.{package}") is not None


def _own_tensors(backbone: NNUNetBackbone, files: ModelFiles) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors by the network's names, without those that nnU-Net stores under several names."""
    weights = files.checkpoint.get("network_weights")
    if not isinstance(weights, dict):
        raise InputError(f"{files.source} holds no network_weights: give a checkpoint that nnU-Net's training wrote.")
    # torch.compile and DistributedDataParallel wrap the network in a module of their own
    weights = {
        re.sub(r"^(module\.|_orig_mod\.)+", "", str(name)): tensor
        for name, tensor in weights.items()
        if isinstance(tensor, torch.Tensor)
    }
    own, aliases = backbone.backbone_state().keys(), backbone.unet.state_dict().keys()
    return {name: tensor for name, tensor in weights.items() if name in own or name not in aliases}


def _trainer(files: ModelFiles) -> str:
    return files.checkpoint.get("trainer_name", "an unknown trainer")


def _report(contract: BackboneContract, backbone: NNUNetBackbone, files: ModelFiles) -> None:
    tensors = backbone.backbone_state()
    turned = "images are turned to RAS" if reorients(contract.image_reader_writer) else "images are used as stored"
    print(
        f"{files.source}, trained by {_trainer(files)}: all {len(tensors)} tensors matched, "
        f"{sum(t.numel() for t in tensors.values())} numbers.\n"
        f"{len(contract.classes)} classes, {'one per voxel' if contract.softmax else 'regions that may overlap'}: "
        f"{', '.join(contract.classes)}\n"
        f"Reader {contract.image_reader_writer}, {turned}; axes {list(contract.transpose_forward)} of z, y, x"
    )
    schemes = contract.normalization_schemes or ["by its name in the dataset"] * contract.input_channels
    masks = contract.use_mask_for_norm or [False] * contract.input_channels
    for channel, (name, scheme, masked) in enumerate(zip(contract.channel_names, schemes, masks)):
        print(f"Channel {channel} {name}: {contract.describe_normalization(channel, scheme, masked)}")
    print(
        f"Spacing {list(contract.spacing) if contract.spacing else 'of the dataset'} mm; window "
        f"{list(contract.patch_size)}, multiples of {list(contract.divisor)}\n"
        f"Licence: {contract.licence or 'unknown, ask the authors of the model'}"
    )
