"""Prediction by a backbone's own head, without any label of the dataset: what `fseft zero_shot` runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fsefs_nnunet.backbones.contract import BackboneContract
from fsefs_nnunet.backbones.frozen import FrozenBackbone
from fsefs_nnunet.backbones.readers import find_reader, image_geometry
from fsefs_nnunet.devices import device_named
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.labels import foreground_names, match_labels
from fsefs_nnunet.planning import dataset_folders
from fsefs_nnunet.queries import images_in

CONFIGURATION = "3d_fullres"
# of a label that the head does not know: far below any logit, and finite in half precision as nnU-Net weighs it
ABSENT = -100.0


class ZeroShotNetwork(nn.Module):
    """Frozen backbone and its own head, rearranged to the outputs that nnU-Net expects for the dataset's labels.

    Labels compete: of sigmoid rows the largest positive logit wins, else it is background; of softmax rows the label
    whose row is the largest of all rows, else it is background. Regions are decided one by one at probability 0.5.
    """

    def __init__(self, backbone: FrozenBackbone, labels: dict, has_regions: bool):
        """Raises InputError if the head knows none of the labels."""
        super().__init__()
        self.backbone, self.has_regions = backbone, has_regions
        contract = backbone.contract
        self.names = foreground_names(labels, has_regions)
        self.matches = match_labels(self.names, contract.head_classes)
        if not self.matches:
            raise InputError(
                f"Backbone {contract.id!r} knows none of the labels {', '.join(self.names)}; its head knows "
                f"{', '.join(contract.head_classes) or 'no class'}: choose another backbone, or adapt this one."
            )
        self.rows = {self.names.index(name): contract.classes.index(known) for name, known in self.matches.items()}

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """image (B, input_channels, X, Y, Z) -> logits (B, labels or regions, X, Y, Z), background first for labels."""
        head = self.backbone.head
        universal = head(self.backbone(image)[:, : head.weight.shape[1]])
        first = 0 if self.has_regions else 1
        logits = universal.new_full((len(universal), first + len(self.names), *universal.shape[2:]), ABSENT)
        if not self.has_regions:
            logits[:, 0] = self._background(universal)
        for row, k in self.rows.items():
            logits[:, first + row] = self._logit(universal, k)
        return logits

    def _background(self, universal: torch.Tensor) -> torch.Tensor | float:
        if not self.backbone.contract.softmax:
            return 0.0
        others = [k for k in range(universal.shape[1]) if k not in self.rows.values()]  # the backbone's background, too
        return universal[:, others].amax(1)

    def _logit(self, universal: torch.Tensor, k: int) -> torch.Tensor:
        if not (self.has_regions and self.backbone.contract.softmax):
            return universal[:, k]
        others = [other for other in range(universal.shape[1]) if other != k]
        return universal[:, k] - universal[:, others].logsumexp(1)  # of the softmax's probability


def zero_shot_plans(contract: BackboneContract, dataset_json: dict, images: dict[str, list[str]]) -> dict:
    """Plans that make stock nnU-Net preprocess and predict as the contract says.

    Where it leaves the spacing open, that is the median of the images'; the window covers their median volume.
    """
    from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import get_normalization_scheme

    reader = find_reader(contract, dataset_json["file_ending"]).__name__
    names = list(dataset_json["channel_names"].values())
    geometries = [image_geometry(files[0], reader) for files in images.values()]
    shapes, spacings = (np.array(values)[:, contract.transpose_forward] for values in zip(*geometries))
    spacing = np.array(contract.spacing or np.median(spacings, 0))
    resampling = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    resample = "resample_data_or_seg_to_shape"
    configuration = {
        "data_identifier": f"zero_shot_{contract.id}",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": contract.window(np.median(np.round(shapes * spacings / spacing), 0)),
        "spacing": spacing.tolist(),
        "normalization_schemes": list(
            contract.normalization_schemes or (get_normalization_scheme(name).__name__ for name in names)
        ),
        "use_mask_for_norm": list(contract.use_mask_for_norm or [False] * len(names)),
        "resampling_fn_data": contract.resampling_fn_data,
        "resampling_fn_data_kwargs": contract.resampling_fn_data_kwargs,
        "resampling_fn_seg": resample,
        "resampling_fn_seg_kwargs": {**resampling, "is_seg": True},
        "resampling_fn_probabilities": resample,
        "resampling_fn_probabilities_kwargs": resampling,
        "architecture": {"network_class_name": "", "arch_kwargs": {}, "_kw_requires_import": []},
    }
    return {
        "dataset_name": dataset_json.get("name", ""),
        "plans_name": f"zero_shot_{contract.id}",
        "image_reader_writer": reader,
        "transpose_forward": list(contract.transpose_forward),
        "transpose_backward": np.argsort(contract.transpose_forward).tolist(),
        "configurations": {CONFIGURATION: configuration},
        "label_manager": "LabelManager",
        # nnU-Net looks up every channel's, the z-scored ones' too
        "foreground_intensity_properties_per_channel": {
            str(c): contract.foreground_intensity_properties_per_channel.get(str(c), {}) for c in range(len(names))
        },
    }


def predict_zero_shot(
    dataset_id: int | str, backbone_id: str, images_folder: Path, output: Path, device: str | None
) -> None:
    """Segment the images of a folder into `output`, in nnU-Net's naming, by nnU-Net's sliding window.

    Only the dataset's dataset.json is read. Labels that the backbone's head does not know stay background.

    Raises:
        InputError: for an unknown dataset or backbone, a head that knows none of the labels, and a dataset whose
            channels the backbone does not take.
    """
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    target = device_named(device)
    name, raw, _ = dataset_folders(dataset_id)
    dataset_json = json.loads((raw / "dataset.json").read_text())
    images = images_in(images_folder, dataset_json)
    backbone = FrozenBackbone(backbone_id, "last")
    backbone.contract.check_channels(list(dataset_json["channel_names"].values()), str(raw / "dataset.json"))
    manager = PlansManager(zero_shot_plans(backbone.contract, dataset_json, images))
    network = ZeroShotNetwork(backbone, dataset_json["labels"], manager.get_label_manager(dataset_json).has_regions)
    print(f"Labels of {name} by the head of {backbone_id}: {network.matches}")
    absent = [label for label in network.names if label not in network.matches]
    if absent:
        print(f"The backbone's head does not know {', '.join(absent)}: it leaves background there.")
    predictor = nnUNetPredictor(
        use_mirroring=False,  # organs have sides
        perform_everything_on_device=target.type == "cuda",
        device=target,
        allow_tqdm=True,
    )
    configuration = manager.get_configuration(CONFIGURATION)
    predictor.manual_initialization(
        network, manager, configuration, [network.state_dict()], dataset_json, "zero_shot", None
    )
    output.mkdir(parents=True, exist_ok=True)
    predictor.predict_from_files_sequential(list(images.values()), [str(output / case) for case in images])
