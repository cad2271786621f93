"""Prediction by a backbone's own head, without any label of the dataset: what `fseft zero_shot` runs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import get_normalization_scheme
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn
from tqdm import tqdm

from fsefs_nnunet.backbones.contract import BackboneContract
from fsefs_nnunet.backbones.frozen import FrozenBackbone
from fsefs_nnunet.backbones.maps import FeatureMap
from fsefs_nnunet.cases.dataset_json import read_dataset_json, shows_ct
from fsefs_nnunet.cases.field_of_view import fitting_spacing
from fsefs_nnunet.cases.folders import dataset_folders
from fsefs_nnunet.cases.images import constant_warning, is_constant, lacks_air, offset_warning, read_image
from fsefs_nnunet.cases.readers import find_reader, in_axes_of, spacing_of
from fsefs_nnunet.device import device_named
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.features.volume import VolumeFeatures
from fsefs_nnunet.files import write_atomically
from fsefs_nnunet.inference.images import images_to_segment, not_segmented, refuse_output
from fsefs_nnunet.labels import foreground_names, match_labels

CONFIGURATION = "3d_fullres"
ABSENT = -100.0  # the logit of a label that the head does not know: far below any other


class ZeroShotNetwork(nn.Module):
    """Frozen backbone and those rows of its own head that decide about the dataset's labels.

    Labels compete: of sigmoid rows the largest positive logit wins, of softmax rows the label whose row is the largest
    of all rows; otherwise the voxel is background. Regions are decided one by one at probability 0.5.

    `forward` gives the head's logits, `outputs` turns them into those that nnU-Net expects for the dataset. The latter
    is not linear for softmax rows, so it comes after blending and resampling.
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
        known = [contract.classes.index(name) for name in self.matches.values()]
        # rows that compete are all needed, including the backbone's background
        self.head_rows = list(range(len(contract.head_classes))) if contract.softmax else known
        self.rows = {self.names.index(name): self.head_rows.index(k) for name, k in zip(self.matches, known)}

    @property
    def out_channels(self) -> int:
        return len(self.head_rows)

    @property
    def maps(self) -> list[FeatureMap]:
        return [FeatureMap(self.out_channels)]

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """image (B, channels, X, Y, Z) -> the head's logits (B, out_channels, X, Y, Z), one map.

        If there are several channels, the head of a backbone of one channel sees only the first.
        """
        features = self.backbone(image[:, : self.backbone.contract.input_channels])[0]
        with torch.autocast(image.device.type, enabled=False):  # rounded logits would tie
            return [self.backbone.head(features.float())[:, self.head_rows]]

    def outputs(self, logits: Iterable[torch.Tensor]) -> torch.Tensor:
        """The head's logits, (X, Y, Z) each -> (labels or regions, X, Y, Z), background first for labels.

        They are taken one by one, so that rows without a label, of which there may be a hundred, are not kept.
        """
        own, rest = {}, None
        combine = torch.logaddexp if self.has_regions else torch.maximum
        for k, row in enumerate(logits):
            if k in self.rows.values():
                own[k] = row
            else:
                rest = row if rest is None else combine(rest, row)
        first, some = 0 if self.has_regions else 1, next(iter(own.values()))
        made = some.new_full((first + len(self.names), *some.shape), ABSENT)
        if not self.has_regions:
            made[0] = 0 if rest is None else rest
        for row, k in self.rows.items():
            made[first + row] = own[k]
            if self.has_regions and rest is not None:  # the logit of the softmax's probability
                made[first + row] -= torch.stack([rest, *(own[j] for j in own if j != k)]).logsumexp(0)
        return made


def zero_shot_plans(
    contract: BackboneContract, dataset_json: dict, reader: str, geometries: list[tuple[list[int], list[float]]]
) -> dict:
    """Plans that make stock nnU-Net preprocess and predict as the contract says.

    If it leaves the spacing open, this is the images' median or is chosen by their field of view, as in the planner;
    the window covers the median volume.

    Args:
        reader: the name of nnU-Net's.
        geometries: shape and spacing of each image, as the reader gives them.
    """
    names = list(dataset_json["channel_names"].values())
    shapes, spacings = (np.array(values)[:, contract.transpose_forward] for values in zip(*geometries))
    own, extent = np.median(spacings, 0), np.median(shapes * spacings, 0)
    fitting = None if contract.spacing else fitting_spacing(extent, own, contract.patch_size, contract.field_of_view_mm)
    spacing = np.array(contract.spacing or (own if fitting is None else [fitting] * 3))
    by_name = [get_normalization_scheme(name).__name__ for name in names], [False] * len(names)
    schemes, masks = contract.normalization_of(names) or by_name
    resampling = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    resample = "resample_data_or_seg_to_shape"
    configuration = {
        "data_identifier": f"zero_shot_{contract.id}",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": contract.window(np.median(np.round(shapes * spacings / spacing), 0)),
        "spacing": spacing.tolist(),
        "normalization_schemes": schemes,
        "use_mask_for_norm": masks,
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
        "foreground_intensity_properties_per_channel": contract.intensities_of(len(names)),
    }


def predict_zero_shot(
    dataset_id: int | str, backbone_id: str, images_folder: Path, output: Path, device: str | None
) -> list[str]:
    """Segment the images of a folder into `output`, in nnU-Net's naming; one that fails does not stop the others.

    Only the dataset's dataset.json is read. Labels that the backbone's head does not know stay background.

    Returns:
        Why images failed, one sentence each.

    Raises:
        InputError: for an unknown dataset or backbone, a head that knows none of the labels, a dataset whose channels
            the backbone does not take, images of which none can be read, and an output folder that cannot be written.
    """
    target = device_named(device)
    refuse_output(output, images_folder)
    name, raw, _ = dataset_folders(dataset_id)
    dataset_json = read_dataset_json(raw / "dataset.json")
    backbone = FrozenBackbone(backbone_id, "last")
    channels = list(dataset_json["channel_names"].values())
    backbone.contract.check_channels(channels, str(raw / "dataset.json"))
    reader = find_reader(backbone.contract.image_reader_writer, dataset_json["file_ending"]).__name__
    images = images_to_segment(images_folder, dataset_json, reader)
    failures = list(images.failures.values())
    if not images.cases:
        raise InputError(f"None of {len(failures)} image(s) can be segmented. {failures[0]}")
    headers = [headers[0] for headers in images.headers.values()]
    geometries = [(in_axes_of(header.shape, header, reader), spacing_of(header, reader)) for header in headers]
    plans = zero_shot_plans(backbone.contract, dataset_json, reader, geometries)
    manager = PlansManager(plans)
    network = ZeroShotNetwork(backbone, dataset_json["labels"], manager.get_label_manager(dataset_json).has_regions)
    print(f"Labels of {name} by the head of {backbone_id}: {network.matches}")
    if len(channels) > backbone.contract.input_channels:
        print(f"The head only sees the first channel, {channels[0]!r}.")
    absent = [label for label in network.names if label not in network.matches]
    if absent:
        print(f"The backbone's head does not know {', '.join(absent)}: these labels are left as background.")
    _write_descriptions(output, {"plans.json": plans, "dataset.json": dataset_json})
    predictor = ZeroShotPredictor(network.to(target), manager, dataset_json, target)
    for case, files in tqdm(images.cases.items(), desc="predicting"):
        try:
            predictor.predict(files, output / case)
        except Exception as error:  # readers may raise anything for broken files
            failures.append(not_segmented(files[0], error))
            tqdm.write(failures[-1])
    return failures


def _write_descriptions(output: Path, contents: dict[str, dict]) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            write_atomically(output / name, json.dumps(content, indent=4))
    except OSError as error:
        raise InputError(f"{output} cannot be written ({error.strerror}): choose another output folder.") from error


class ZeroShotPredictor:
    """Segments images by the head of a backbone, preprocessed and exported by nnU-Net."""

    def __init__(self, network: ZeroShotNetwork, plans_manager, dataset_json: dict, device: torch.device):
        self.network, self.plans_manager, self.dataset_json, self.device = network, plans_manager, dataset_json, device
        self.configuration = plans_manager.get_configuration(CONFIGURATION)
        self.reader = plans_manager.image_reader_writer_class()
        self.preprocessor = self.configuration.preprocessor_class(verbose=False)

    def predict(self, files: list[str], stem: Path) -> None:
        """Segment the image in `files`, one per channel, into `stem` and the dataset's file ending.

        Raises:
            InputError: if the image cannot be read, or holds NaN or infinite values.
        """
        image, properties = read_image(self.reader, files)
        if is_constant(image):
            tqdm.write(constant_warning(files[0], image))
            output = f"{stem}{self.dataset_json['file_ending']}"
            self.reader.write_seg(np.zeros(image.shape[1:], np.uint8), output, properties)
            return
        if shows_ct(self.dataset_json) and lacks_air(image):
            tqdm.write(offset_warning(files[:1]))
        context = (self.plans_manager, self.configuration, self.dataset_json)
        image, _, properties = self.preprocessor.run_case_npy(image, None, properties, *context)
        with torch.no_grad():
            logits = self._logits(image)
            logits = self.network.outputs(self._resampled(row[None], properties)[0] for row in logits)
        threads = torch.get_num_threads()
        export_prediction_from_logits(
            logits, properties, self.configuration, self.plans_manager, self.dataset_json, str(stem), False, threads
        )

    def _logits(self, image: np.ndarray) -> torch.Tensor:
        """The head's logits (out_channels, X, Y, Z) of a preprocessed image (channels, X, Y, Z)."""
        features = VolumeFeatures(self.network, image, self.configuration.patch_size, self.device)
        logits = torch.empty((self.network.out_channels, *features.tiling.padded))
        for slab in features.slabs():
            logits[:, slab.first : slab.stop] = slab.maps[0].cpu()
        return logits[(slice(None), *features.tiling.inside)]

    def _resampled(self, logits: torch.Tensor, properties: dict) -> torch.Tensor:
        """Resampled as by nnU-Net's export, which then has nothing left to resample."""
        spacing = [properties["spacing"][axis] for axis in self.plans_manager.transpose_forward]
        shape = properties["shape_after_cropping_and_before_resampling"]
        made = self.configuration.resampling_fn_probabilities(logits, shape, self.configuration.spacing, spacing)
        return torch.as_tensor(made)
