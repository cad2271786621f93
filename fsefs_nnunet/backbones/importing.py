"""Turns a trained nnU-Net model folder into a backbone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from fsefs_nnunet.backbones.checkpoints import read_checkpoint
from fsefs_nnunet.backbones.contract import BackboneContract
from fsefs_nnunet.backbones.nnunet import NNUNetBackbone
from fsefs_nnunet.backbones.store import save_backbone

SUPPORTED = ("PlainConvUNet", "ResidualEncoderUNet")


def import_nnunet_model(
    backbone_id: str,
    model_folder: Path,
    target: Path,
    fold: str = "",
    checkpoint: str = "checkpoint_final.pth",
    open_spacing: bool = False,
    **contract_fields,
) -> BackboneContract:
    """Store the network of `model_folder` (the folder with plans.json and fold_X) as backbone `backbone_id`.

    Spacing, normalisation, window and channels are taken from its plans, which must say RAS orientation (a reader that
    reorients) and axes x, y, z (transpose [2, 1, 0]).

    Args:
        fold: "0", "all", ...; default: the first one that has a checkpoint.
        open_spacing: the model serves images of any spacing and modality; true for the embedded backbone alone.
        contract_fields: licence, citation, description, training.

    Raises:
        ValueError: for a folder without plans, a 2D or cascade model, an unknown architecture, damaged weights.
    """
    model_folder = Path(model_folder)
    for name in ("plans.json", "dataset.json"):
        if not (model_folder / name).exists():
            raise ValueError(f"{model_folder}/{name} is missing: give the folder that holds plans.json and fold_X.")
    folds = sorted(model_folder.glob(f"fold_{fold or '*'}/{checkpoint}"))
    if not folds:
        raise ValueError(f"{model_folder} has no fold_{fold or 'X'}/{checkpoint}: is the training finished?")
    content = read_checkpoint(folds[0])
    plans = json.loads((model_folder / "plans.json").read_text())
    dataset = json.loads((model_folder / "dataset.json").read_text())
    contract = _contract(
        backbone_id, plans, content["init_args"]["configuration"], dataset, open_spacing, contract_fields
    )
    backbone = NNUNetBackbone(contract, "last")
    own = backbone.backbone_state().keys()
    backbone.load_backbone_state({name: t for name, t in content["network_weights"].items() if name in own})
    return save_backbone(contract, backbone.backbone_state(), target)


def _contract(
    backbone_id: str, plans: dict, configuration: str, dataset: dict, open_spacing: bool, contract_fields: dict
) -> BackboneContract:
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    manager = PlansManager(plans)
    settings = manager.get_configuration(configuration)
    architecture = settings.configuration["architecture"]
    name = architecture["network_class_name"].split(".")[-1]
    if name not in SUPPORTED or len(settings.patch_size) != 3:
        raise ValueError(
            f"Configuration {configuration!r} ({name}, {len(settings.patch_size)}D) cannot be a backbone: 3D models of "
            f"{' or '.join(SUPPORTED)} can."
        )
    if settings.previous_stage_name is not None:
        raise ValueError(f"Configuration {configuration!r} is the second stage of a cascade; import the first.")
    reorients = manager.plans["image_reader_writer"] in ("NibabelIOWithReorient", "SimpleITKIOWithReorient")
    if manager.transpose_forward != [2, 1, 0] or not reorients:
        raise ValueError(
            f"The model sees axes {manager.transpose_forward} of {manager.plans['image_reader_writer']}; backbones "
            "see RAS volumes as x, y, z. Train it with transpose_forward and _backward [2, 1, 0] and "
            "NibabelIOWithReorient in its plans."
        )
    labels = manager.get_label_manager(dataset)
    names = [n for n in dataset["labels"] if n not in ("background", "ignore")]
    ct = None
    if "CTNormalization" in settings.normalization_schemes:
        channel = str(settings.normalization_schemes.index("CTNormalization"))
        properties = plans["foreground_intensity_properties_per_channel"][channel]
        ct = {key: float(properties[key]) for key in ("percentile_00_5", "percentile_99_5", "mean", "std")}
    divisor = np.prod(settings.pool_op_kernel_sizes, axis=0)
    return BackboneContract(
        id=backbone_id,
        architecture={"kind": "nnunet", **architecture},
        classes=tuple(names if labels.has_regions else ["background", *names]),
        softmax=not labels.has_regions,
        input_channels=len(dataset["channel_names"]),
        divisor=int(divisor.max()),
        patch_size=tuple(int(n) for n in settings.patch_size),
        smallest_window=40 if open_spacing else int(min(settings.patch_size)),
        # plans are in the order of the transposed axes, a contract is in x, y, z: ours transpose to x, y, z
        spacing=None if open_spacing else tuple(float(s) for s in settings.spacing),
        ct_intensities=ct,
        modalities="any" if open_spacing or ct is None else "CT",
        **contract_fields,
    )
