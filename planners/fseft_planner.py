"""FSEFTPlanner: nnU-Net's fingerprint and a backbone's contract in, plans with K-shot configurations out."""

from __future__ import annotations

import numpy as np
from batchgenerators.utilities.file_and_folder_operations import isfile, join, load_json
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.imageio.nibabel_reader_writer import NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIOWithReorient
from nnunetv2.paths import nnUNet_preprocessed

from fsefs_nnunet.backbones.store import DEFAULT_BACKBONE, find_backbone, load_weights
from fsefs_nnunet.labels import match_labels

PLANS_NAME = "FSEFTPlans"
DEFAULT_SHOTS = (1, 5, 10, "all")

# Width of the adapter after the 1^3 reduction, and what a trained voxel costs in bytes at this width: activations and
# gradients of reduction, two convolutions and head in fp32, with the same again for workspaces.
CHANNELS = 32
BYTES_PER_CROP_VOXEL = 2 * 2 * 4 * 5 * CHANNELS


def default_plans_name(backbone_id: str) -> str:
    """Plans of two backbones must not overwrite each other."""
    return PLANS_NAME if backbone_id == DEFAULT_BACKBONE else f"{PLANS_NAME}_{backbone_id}"


class FSEFTPlanner(ExperimentPlanner):
    """Plans `3d_fullres` with a stock architecture and one child of it per number of shots.

    Preprocessing is what the backbone's contract says, in nnU-Net's own words: reader, transpose, spacing,
    normalisation, resampling. Nothing is taken from statistics over the labels, queries' labels included.
    """

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float = 8,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str | None = None,
        overwrite_target_spacing: list[float] | tuple[float, ...] | None = None,
        suppress_transpose: bool = False,
        backbone: str = DEFAULT_BACKBONE,
        shots: tuple[int | str, ...] = DEFAULT_SHOTS,
    ):
        """Raises ValueError for an unknown or damaged backbone and for a dataset that it cannot take."""
        super().__init__(
            dataset_name_or_id,
            gpu_memory_target_in_gb,
            preprocessor_name,
            plans_name or default_plans_name(backbone),
            overwrite_target_spacing,
            suppress_transpose,
        )
        self.contract = find_backbone(backbone)
        load_weights(self.contract)
        self.shots = shots
        self._check_dataset()

    def _check_dataset(self) -> None:
        json_file = join(self.raw_dataset_folder, "dataset.json")
        channels = self.dataset_json["channel_names"]
        if "CT" in channels.values() and self.contract.ct_intensities is None:
            raise ValueError(
                f"Backbone {self.contract.id!r} was not trained on CT, {json_file} names CT: choose another."
            )
        if len(channels) != self.contract.input_channels:
            raise ValueError(
                f"{json_file} has {len(channels)} channel(s), backbone {self.contract.id!r} takes "
                f"{self.contract.input_channels}: choose another backbone or convert the dataset."
            )
        if self.contract.modalities == "CT" and set(channels.values()) != {"CT"}:
            raise ValueError(
                f"Backbone {self.contract.id!r} knows CT alone, {json_file} names {list(channels.values())}: choose "
                'another backbone, or name the channel "CT" if it holds Hounsfield units.'
            )
        spacings = np.array(self.dataset_fingerprint["spacings"])
        if not (np.isfinite(spacings).all() and (spacings > 0).all()):
            bad = list(self.dataset.keys())[int(np.argmax(~(np.isfinite(spacings) & (spacings > 0)).all(1)))]
            raise ValueError(
                f"Case {bad} in {self.raw_dataset_folder} has a voxel spacing that is not positive: repair its header."
            )
        if min(np.median(self.dataset_fingerprint["shapes_after_crop"], 0)) < 2:
            raise ValueError(f"{self.raw_dataset_folder} holds 2D images; the adapters are 3D only.")

    # ---- nnU-Net's decisions that the contract takes ----

    def determine_reader_writer(self):
        example = self.dataset[next(iter(self.dataset))]["images"][0]
        nibabel_reads = any(example.lower().endswith(ending) for ending in NibabelIOWithReorient.supported_file_endings)
        return NibabelIOWithReorient if nibabel_reads else SimpleITKIOWithReorient

    def determine_transpose(self):
        return [2, 1, 0], [2, 1, 0]  # nnU-Net reads z, y, x; backbones see x, y, z

    def determine_fullres_target_spacing(self) -> np.ndarray:
        if self.contract.spacing is not None and self.overwrite_target_spacing is None:
            return np.array(self.contract.spacing[::-1], dtype=float)  # in nnU-Net's z, y, x
        return super().determine_fullres_target_spacing()

    def determine_resampling(self, *args, **kwargs):
        data, data_kwargs, seg, seg_kwargs = super().determine_resampling(*args, **kwargs)
        # a cubic spline overshoots the window's [0, 1] that the backbone was trained on
        return data, {**data_kwargs, "order": 1}, seg, seg_kwargs

    # ---- the plans ----

    def window(self, median_shape: np.ndarray) -> list[int]:
        """Patch size: covers the median volume where the backbone's largest window allows it."""
        divisor = self.contract.divisor
        smallest = min(self.contract.smallest_window, min(self.contract.patch_size))
        fitting = [int(np.ceil(max(n, smallest) / divisor) * divisor) for n in median_shape]
        return [min(n, largest) for n, largest in zip(fitting, self.contract.patch_size)]

    def child(self, shots: int | str, parent: dict) -> dict:
        """The configuration of `shots` labelled cases."""
        window = self.window(parent["median_image_size_in_voxels"])
        crop = [min(32, n) for n in window]
        # of the memory target, 90 % for everything but one crop's share of workspace
        fitting = int(0.9 * self.UNet_vram_target_GB * 2**30 / (BYTES_PER_CROP_VOXEL * np.prod(crop)))
        if fitting < 1:
            raise ValueError(
                f"gpu_memory_target_in_gb = {self.UNet_vram_target_GB} is too small for one crop of {crop} voxels."
            )
        return {
            "inherits_from": "3d_fullres",
            "patch_size": window,
            "batch_size": min(2, fitting),
            "architecture": {
                "network_class_name": "fsefs_nnunet.network.AdaptedNetwork",
                "arch_kwargs": {
                    "backbone": self.contract.id,
                    "sha256": self.contract.sha256,
                    "adapter": "spatial",
                    "stages": "all",
                    "channels": CHANNELS,
                    "seed": 12345,
                },
                "_kw_requires_import": [],
            },
            "fseft_backbone": self.contract.id,
            "fseft_shots": shots,
            "fseft_crop_size": crop,
            "fseft_steps_per_epoch": 5,
            "fseft_loss": "nnunet",
            "fseft_lambda": 0.1,
            "fseft_gamma": 0.3,
            "fseft_prior_from_epoch": 30,
            "fseft_pool": 2,
            "fseft_stop_at_plateau": False,
            "fseft_seed": 12345,
        }

    def _planned_before(self) -> list[int | str]:
        file = join(nnUNet_preprocessed, self.dataset_name, f"{self.plans_identifier}.json")
        if not isfile(file):
            return []
        configurations = load_json(file)["configurations"].items()
        return [c["fseft_shots"] for name, c in configurations if name == f"3d_fullres_{c.get('fseft_shots')}shot"]

    def save_plans(self, plans):
        """Turn nnU-Net's plans into ours just before they are written; called by plan_experiment."""
        if "3d_fullres" not in plans["configurations"]:
            raise ValueError(f"{self.raw_dataset_folder} holds 2D images; the adapters are 3D only.")
        parent = plans["configurations"]["3d_fullres"]
        # nnU-Net keeps configurations that lie in the file; those of ours are planned anew, or they would be stale
        shots = dict.fromkeys([*self.shots, *self._planned_before()])
        children = {f"3d_fullres_{k}shot": self.child(k, parent) for k in shots}
        plans["configurations"] = {"3d_fullres": parent, **children}
        # the fingerprint's intensities were taken over all labels, the queries' too: they leave the plans
        plans["foreground_intensity_properties_per_channel"] = {
            channel: dict(self.contract.ct_intensities or {})
            for channel in plans["foreground_intensity_properties_per_channel"]
        }
        super().save_plans(plans)
        self._explain(parent, children)

    def _explain(self, parent: dict, children: dict) -> None:
        contract = self.contract
        child = next(iter(children.values()))
        names = [n for n in self.dataset_json["labels"] if n not in ("background", "ignore")]
        spacing = "the backbone's" if contract.spacing is not None else "the dataset's, the backbone leaves it open"
        print(
            f"\nBackbone {contract.id}, SHA-256 {contract.sha256[:12]}; orientation RAS, axes x, y, z.\n"
            f"Spacing {[round(float(s), 3) for s in parent['spacing']]} mm: {spacing}.\n"
            f"Normalisation {parent['normalization_schemes']}: "
            + (
                f"CT as the backbone's, {contract.ct_intensities}"
                if "CTNormalization" in parent["normalization_schemes"]
                else ""
            )
            + ("each image by itself" if "ZScoreNormalization" in parent["normalization_schemes"] else "")
            + f".\nWindow {child['patch_size']}: median volume {list(parent['median_image_size_in_voxels'])}, "
            f"multiples of {contract.divisor}, at most {list(contract.patch_size)}.\n"
            f"Training: {child['batch_size']} crops of {child['fseft_crop_size']} from the feature bank a step.\n"
            f"Labels that the backbone knows by name: {match_labels(names, contract.classes) or 'none'}.\n"
            f"Configurations: {', '.join(children)}; 3d_fullres is stock nnU-Net on the same data."
        )
