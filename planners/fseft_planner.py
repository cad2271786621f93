"""FSEFTPlanner: nnU-Net's fingerprint and a backbone's contract in, plans with K-shot configurations out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import isfile, join, load_json
from nnunetv2.configuration import default_num_processes
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.preprocessing.resampling.utils import recursive_find_resampling_fn_by_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from fsefs_nnunet.backbones.architectures import stage_maps
from fsefs_nnunet.backbones.architectures.nnunet import plans_architecture
from fsefs_nnunet.backbones.store import DEFAULT_BACKBONE, find_backbone, load_weights
from fsefs_nnunet.backbones.suitability import field_of_view_remark, remarks
from fsefs_nnunet.backbones.untrained_decoder import untrained_decoder
from fsefs_nnunet.cases.dataset_json import channel_names, read_dataset_json
from fsefs_nnunet.cases.field_of_view import MOST_WINDOWS, fitting_spacing
from fsefs_nnunet.cases.fingerprint import in_axes, require_fingerprint, stock_reorients
from fsefs_nnunet.cases.folders import dataset_folders, made_folder, training_files
from fsefs_nnunet.cases.images import is_leftover
from fsefs_nnunet.cases.readers import find_reader, reorients
from fsefs_nnunet.cases.resampled_labels import describe_cost, dice_there_and_back, same_spacing
from fsefs_nnunet.cases.soundness import check_training_cases
from fsefs_nnunet.cases.splits import SPLITS_FILE, fitting_shots, load_splits
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.features.layout import MAX_POOLED_VOXELS, pooled_blocks
from fsefs_nnunet.files import gigabytes, refused_if_unwritable, write_json
from fsefs_nnunet.labels import foreground, match_labels
from fsefs_nnunet.methods.registry import STOCK_PLANS
from fsefs_nnunet.methods.settings import Settings
from fsefs_nnunet.planners.stages import Stages, choose_stages

PLANS_NAME = "FSEFTPlans"

# Width of the adapter after the 1^3 reduction, and what a trained voxel costs in bytes per channel: activations and
# gradients of reduction, two convolutions and head in fp32, with the same again for workspaces.
CHANNELS, MOST_CHANNELS = 32, 64
BYTES_PER_CROP_VOXEL = 2 * 2 * 4 * 5
SMALLEST_CROP, LARGEST_CROP = 16, 32
MOST_VOXELS = 2**31  # of a median volume; libraries count in 32 bits


def default_plans_name(backbone_id: str) -> str:
    """Plans of two backbones must not overwrite each other."""
    return PLANS_NAME if backbone_id == DEFAULT_BACKBONE else f"{PLANS_NAME}_{backbone_id}"


@contextmanager
def default_workers() -> Iterator[None]:
    """nnU-Net's planners use the number of training workers as that of threads, and fail if it is 0."""
    workers = os.environ.pop("nnUNet_n_proc_DA", None)
    try:
        yield
    finally:
        if workers is not None:
            os.environ["nnUNet_n_proc_DA"] = workers


class FSEFTPlanner(ExperimentPlanner):
    """Plans `3d_fullres` with a stock architecture and one child of it per number of shots.

    Preprocessing is what the backbone's contract says, in nnU-Net's own terms: reader, transpose, spacing,
    normalisation, resampling. No statistics over the labels are used, since they would include the queries'.
    """

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float = 8,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str | None = None,
        overwrite_target_spacing: list[float] | tuple[float, ...] | None = None,
        suppress_transpose: bool = False,
        backbone: str | None = None,
        shots: Sequence[int | str] = (),
        num_processes: int = default_num_processes,
        accept_positive_ct: bool = False,
        support: Sequence[str] = (),
        other_modality: bool = False,
    ):
        """Checks the dataset, and extracts the fingerprint if there is none of the current files.

        nnU-Net's commands pass none of the last six (`-pl FSEFTPlanner`, see linking.py).

        Args:
            backbone: default: what the environment variable `fseft_backbone` names, else the embedded one.
            shots: default: those of DEFAULT_SHOTS that the labelled cases allow.
            accept_positive_ct: see check_training_cases; also set by the variable `fseft_accept_positive_ct=1`.
            support: cases whose labels may show the cost of the spacing; default: those of the drawn folds.
            other_modality: plan for images of a modality that the backbone has never seen; also set by the environment
                variable `fseft_other_modality=1`.

        Raises:
            InputError: for an unknown or damaged backbone, for more shots than labelled cases, for a dataset that the
                backbone cannot take, and for cases that cannot be trained on. Nothing is overwritten then.
        """
        backbone = backbone or os.environ.get("fseft_backbone") or DEFAULT_BACKBONE
        self.contract = find_backbone(backbone)
        load_weights(self.contract)
        if plans_name == STOCK_PLANS:
            raise InputError(f"{STOCK_PLANS!r} is the name of nnU-Net's own plans: give these another.")
        name, raw, preprocessed = dataset_folders(dataset_name_or_id)
        dataset_json = read_dataset_json(raw / "dataset.json")
        cases = training_files(raw, dataset_json)
        self.shots, self.support = fitting_shots(shots, len(cases)), list(support)
        file = str(raw / "dataset.json")
        self.other_modality = other_modality or os.environ.get("fseft_other_modality") == "1"
        self.channels = list(dataset_json["channel_names"].values())
        self._check_channels(file)
        # a training refuses the same labels
        self.known_labels = match_labels(list(foreground(dataset_json["labels"])), self.contract.head_classes, file)
        self.reader = find_reader(self.contract.image_reader_writer, dataset_json["file_ending"])
        accept_positive_ct = accept_positive_ct or os.environ.get("fseft_accept_positive_ct") == "1"
        check_training_cases(raw, dataset_json, cases, self.reader, num_processes, accept_positive_ct)
        with refused_if_unwritable(made_folder(preprocessed)):
            require_fingerprint(name, preprocessed, dataset_json, cases, self.reader, num_processes)
            super().__init__(
                name,
                gpu_memory_target_in_gb,
                preprocessor_name,
                plans_name or default_plans_name(backbone),
                overwrite_target_spacing,
                suppress_transpose,
            )
        self.dataset, self.dataset_json = cases, {**dataset_json, "numTraining": len(cases)}
        stored, wanted = stock_reorients(dataset_json), reorients(self.reader.__name__)
        self.dataset_fingerprint = in_axes(self.dataset_fingerprint, cases, stored, wanted)
        if min(np.median(self.dataset_fingerprint["shapes_after_crop"], 0)) < 2:
            raise InputError(f"{raw} holds 2D images; the adapters are 3D only.")
        if overwrite_target_spacing is not None:
            self._check_spacing(np.array(overwrite_target_spacing, dtype=float))

    def _check_spacing(self, given: np.ndarray) -> None:
        """Raises InputError for mm per axis of the reader that no median volume could be resampled to."""
        fingerprint = self.dataset_fingerprint
        extent = np.median(fingerprint["spacings"], 0) * np.median(fingerprint["shapes_after_crop"], 0)
        shape = np.rint(extent / given) if np.all(np.isfinite(given) & (given > 0)) else np.zeros(3)
        if min(shape) < 2 or np.prod(shape) > MOST_VOXELS:
            made = " x ".join(f"{n:g}" for n in shape)
            raise InputError(
                f"-overwrite_target_spacing {' '.join(f'{mm:g}' for mm in given)} would make {made} voxels of a median "
                f"volume of {_rounded(extent)} mm: give mm, in the order z y x."
            )

    def _check_channels(self, file: str) -> None:
        self.contract.check_number(self.channels, file)
        unseen = self.contract.unseen_channels(self.channels)
        if self.other_modality and not unseen:
            raise InputError(
                f"Backbone {self.contract.id!r} takes the channels of {file}, {', '.join(self.channels)}, as they are: "
                "omit --other_modality."
            )
        if not unseen or not self.other_modality:
            remedy = ", or plan with --other_modality, which shows it images of a kind that it has never seen"
            self.contract.check_channels(self.channels, file, remedy)

    # ---- nnU-Net's decisions that the contract takes ----

    def determine_reader_writer(self):
        return self.reader

    def determine_transpose(self):
        forward = self.contract.transpose_forward
        return list(forward), np.argsort(forward).tolist()

    def determine_fullres_target_spacing(self) -> np.ndarray:
        """mm, in the axes of the reader: plan_experiment transposes it."""
        return self._spacing_and_reason()[0]

    def _spacing_and_reason(self) -> tuple[np.ndarray, str]:
        own = super().determine_fullres_target_spacing()
        if self.overwrite_target_spacing is not None:
            return own, "as given by -overwrite_target_spacing"
        forward, backward = self.determine_transpose()
        if self.contract.spacing is not None:
            return np.array(self.contract.spacing, dtype=float)[backward], "the backbone's"
        fingerprint = self.dataset_fingerprint
        extent = np.median(fingerprint["spacings"], 0) * np.median(fingerprint["shapes_after_crop"], 0)
        window, view = self.contract.patch_size, self.contract.field_of_view_mm
        spacing = fitting_spacing(extent[forward], own[forward], window, view)
        if spacing is None:
            return own, "the dataset's, since the backbone leaves it open"
        shape = [round(float(n)) for n in (extent / own)[forward]]
        longest = [MOST_WINDOWS * n for n in window]
        shown = (
            f", a window shows {spacing * max(window):g} mm, the training's {view[0]:g} to {view[1]:g} mm"
            if view
            else ""
        )
        return np.full(3, spacing), (
            f"by the field of view, at most {MOST_WINDOWS} windows ({longest} voxels){shown}; the "
            f"dataset's own, {_rounded(own[forward])} mm, makes {shape} of a median volume of "
            f"{_rounded(extent[forward])} mm"
        )

    def determine_normalization_scheme_and_whether_mask_is_used_for_norm(self):
        made = self.contract.normalization_of(self.channels, self.other_modality)
        return made or super().determine_normalization_scheme_and_whether_mask_is_used_for_norm()

    def determine_resampling(self, *args, **kwargs):
        _, _, seg, seg_kwargs = super().determine_resampling(*args, **kwargs)
        data = recursive_find_resampling_fn_by_name(self.contract.resampling_fn_data)
        return data, dict(self.contract.resampling_fn_data_kwargs), seg, seg_kwargs

    # ---- the plans ----

    def stages(self, parent: dict) -> Stages:
        """The stages whose features the adapter gets; they may take half of the memory target."""
        shape = parent["median_image_size_in_voxels"]
        half = self.UNet_vram_target_GB * 2**30 / 2
        return choose_stages(self.contract, self.contract.window(shape), shape, half, len(self.channels))

    def pool(self, shape: Sequence[int], spacing_mm: Sequence[float]) -> tuple[int, ...]:
        """Blocks that queries are averaged over, in voxels, for a median volume of `shape` (X, Y, Z)."""
        long = any(n > MOST_WINDOWS * w for n, w in zip(shape, self.contract.patch_size))
        return pooled_blocks(shape, spacing_mm, long, None if torch.cuda.is_available() else MAX_POOLED_VOXELS)

    @property
    def z_scores_as_hu(self) -> dict[str, dict[str, float]]:
        return self.contract.z_scores_of(self.channels) if self.other_modality else {}

    def adapter_channels(self) -> int:
        """Width of the adapter: as many as the features of the last stage, within bounds that a linear head may exceed.

        A universal head that is a 1^3 convolution starts the adapter's head, which therefore needs all of its inputs.
        """
        last = sum(m.channels for m in stage_maps(self.contract)["last"])
        return max(CHANNELS, last if self.contract.linear_head else min(last, MOST_CHANNELS))

    def child(self, shots: int | str, parent: dict, stages: str) -> dict:
        """The configuration of `shots` labelled cases."""
        window = self.contract.window(parent["median_image_size_in_voxels"])
        crop = [min(LARGEST_CROP, max(SMALLEST_CROP, n // 2), n) for n in window]
        channels = self.adapter_channels()
        # a tenth of the memory target is left for workspace
        fitting = int(0.9 * self.UNet_vram_target_GB * 2**30 / (BYTES_PER_CROP_VOXEL * channels * np.prod(crop)))
        if fitting < 1:
            raise InputError(
                f"gpu_memory_target_in_gb = {self.UNet_vram_target_GB} is too small for one crop of {crop} voxels."
            )
        settings = Settings(
            backbone=self.contract.id,
            shots=shots,
            crop_size=tuple(int(n) for n in crop),
            crops_per_step=min(Settings.crops_per_step, fitting),
            pool=self.pool(parent["median_image_size_in_voxels"], parent["spacing"]),
            gpu_gb=self.UNet_vram_target_GB / 2,
        )
        return {
            "inherits_from": "3d_fullres",
            "patch_size": window,
            "batch_size": self.UNet_min_batch_size,
            "architecture": {
                "network_class_name": "fsefs_nnunet.methods.network.AdaptedNetwork",
                "arch_kwargs": {
                    "backbone": self.contract.id,
                    "sha256": self.contract.sha256,
                    "adapter": "spatial",
                    "stages": stages,
                    "channels": channels,
                    "seed": 12345,
                    **({"z_scores_as_hu": self.z_scores_as_hu} if self.z_scores_as_hu else {}),
                },
                "_kw_requires_import": [],
            },
            **settings.to_plans(),
        }

    def untrained(self, child: dict) -> dict:
        """The backbone's architecture, if nnU-Net can build it, else the stock one."""
        scratch = {key: child[key] for key in ("inherits_from", "fseft_shots")}
        if self.contract.architecture.get("kind") != "nnunet":
            return scratch
        return scratch | {
            "patch_size": child["patch_size"],
            "batch_size": child["batch_size"],
            "architecture": plans_architecture(self.contract),
        }

    def _planned_before(self) -> dict[str, dict]:
        """K-shot configurations of ours in the file that these plans replace."""
        file = join(nnUNet_preprocessed, self.dataset_name, f"{self.plans_identifier}.json")
        configurations = load_json(file)["configurations"] if isfile(file) else {}
        return {n: c for n, c in configurations.items() if n == f"3d_fullres_{c.get('fseft_shots')}shot"}

    def all_shots(self) -> list[int | str]:
        """The requested shots, and those planned before, which would otherwise become stale."""
        return list(dict.fromkeys([*self.shots, *(c["fseft_shots"] for c in self._planned_before().values())]))

    def _report_what_is_reset(self, children: dict[str, dict]) -> None:
        def flat(configuration: dict) -> dict:
            architecture = configuration.get("architecture", {})
            return {**configuration, **architecture.get("arch_kwargs", {}), "architecture": None}

        for name, before in self._planned_before().items():
            planned = flat(children[name])
            changed = [
                f"{key} {value} -> {planned.get(key, 'nothing')}"
                for key, value in flat(before).items()
                if planned.get(key) != value
            ]
            if changed:
                print(f"Planned again in {name}: {', '.join(changed)}. Edit the plans again if you had changed them.")

    def plan_experiment(self):
        """As nnU-Net's, also if `nnUNet_n_proc_DA` is 0.

        Raises:
            InputError: if the preprocessed folder cannot be written.
        """
        with default_workers(), refused_if_unwritable(join(nnUNet_preprocessed, self.dataset_name)):
            return super().plan_experiment()

    def save_plans(self, plans):
        """Turn nnU-Net's plans into ours just before they are written; called by plan_experiment."""
        if "3d_fullres" not in plans["configurations"]:
            raise InputError(f"{self.raw_dataset_folder} holds 2D images; the adapters are 3D only.")
        parent = plans["configurations"]["3d_fullres"]
        stages = self.stages(parent)
        children = {f"3d_fullres_{k}shot": self.child(k, parent, stages.name) for k in self.all_shots()}
        self._report_what_is_reset(children)
        # the baseline on the same support cases; nnU-Net keeps other configurations that lie in the file
        scratch = {f"{name}_scratch": self.untrained(child) for name, child in children.items()}
        plans["configurations"] = {"3d_fullres": parent, **children, **scratch}
        # the fingerprint's intensities were taken over all labels, including the queries': they are removed
        plans["foreground_intensity_properties_per_channel"] = self.contract.intensities_of(len(self.channels))
        super().save_plans(plans)
        self._leave_out_leftovers()
        self._explain(parent, children, stages)
        self._explain_cost(plans)

    def _leave_out_leftovers(self) -> None:
        """Without a list, nnU-Net's preprocessing takes `._case_0000.nii.gz`, which macOS leaves behind, for a case."""
        images, ending = os.path.join(self.raw_dataset_folder, "imagesTr"), self.dataset_json["file_ending"]
        listed = "dataset" in self.dataset_json
        if not listed and any(is_leftover(name) and name.endswith(ending) for name in os.listdir(images)):
            file = join(nnUNet_preprocessed, self.dataset_name, "dataset.json")
            write_json(file, {**load_json(file), "dataset": self.dataset})

    def _explain(self, parent: dict, children: dict, stages: Stages) -> None:
        contract = self.contract
        child = next(iter(children.values()))
        turned = (
            "turned to RAS" if reorients(self.reader.__name__) else "as stored, which must match the backbone's own"
        )
        print(
            f"\nBackbone {contract.id}, SHA-256 {contract.sha256[:12]}.\n"
            f"Images {turned} ({self.reader.__name__}), axes {list(contract.transpose_forward)} of z, y, x."
        )
        for channel, name in enumerate(channel_names(self.dataset_json).values()):
            scheme = parent["normalization_schemes"][channel]
            normalization = contract.describe_normalization(channel, scheme, parent["use_mask_for_norm"][channel])
            known = contract.channel_names[contract.own_channel(channel)]
            print(f"Channel {channel}: {name}, the backbone's was {known}; {normalization}.")
        for channel, line in self.z_scores_as_hu.items():
            text = "A z-score z of channel {0} is {mean:g} + {std:g} z HU to the backbone, within {low:g} and {high:g}."
            print(text.format(channel, **line))
        if contract.input_channels < len(self.channels):
            print("Each channel goes through the backbone on its own; the features are concatenated.")
        print(
            f"Spacing {_rounded(parent['spacing'])} mm: {self._spacing_and_reason()[1]}.\n"
            f"Window {child['patch_size']}: median volume {list(parent['median_image_size_in_voxels'])}, "
            f"multiples of {list(contract.divisor)}, at most {list(contract.patch_size)}.\n"
            f"Features of stages: {stages.name}, {stages.channels:.1f} channels at full resolution in effect, "
            f"{gigabytes(stages.slab_bytes)} for a slab.\n"
            f"Training: {child['fseft_crops_per_step']} crops of {child['fseft_crop_size']} per step, from the bank.\n"
            f"Labels that the backbone knows by name: {self.known_labels or 'none'}.\n"
            f"Configurations: {', '.join(children)}; 3d_fullres has the network that nnU-Net plans for the same data."
        )
        if contract.encoder_only:
            print(untrained_decoder(contract))
        own = np.median(self.dataset_fingerprint["spacings"], 0)
        for remark in remarks(contract, self.channels, own, list(foreground(self.dataset_json["labels"]))):
            print(remark)
        spacing = parent["spacing"]
        extent = np.multiply(spacing, parent["median_image_size_in_voxels"])
        if remark := field_of_view_remark(contract, child["patch_size"], spacing, extent):
            print(remark)

    def _explain_cost(self, plans: dict) -> None:
        """Print what the spacing costs the labels; labels of queries are not read."""
        spacings = np.array(self.dataset_fingerprint["spacings"])[:, plans["transpose_forward"]]
        spacing = plans["configurations"]["3d_fullres"]["spacing"]
        if all(same_spacing(own, spacing) for own in spacings):
            return
        support = self.support or self._support_drawn_before()
        if files := [self.dataset[case]["label"] for case in support if case in self.dataset]:
            if dice := dice_there_and_back(files, PlansManager(plans), self.dataset_json):
                print(describe_cost(dice))
        else:
            print("To see what this spacing costs the labels, run `fseft splits -d ID` and plan again.")

    def _support_drawn_before(self) -> list[str]:
        """Labelled cases that are not queries; none before the folds are drawn, since any case may become a query."""
        try:
            return load_splits(Path(nnUNet_preprocessed, self.dataset_name, SPLITS_FILE))["folds"][0]
        except InputError:
            return []


def _rounded(lengths: Sequence[float]) -> list[float]:
    return [round(float(mm), 3) for mm in lengths]
