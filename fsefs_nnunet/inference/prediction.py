"""What `fseft predict` runs: one backbone pass per volume, transductive adaptation of each fold, nnU-Net's export."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from time import monotonic

import numpy as np
import torch
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.postprocessing.remove_connected_components import remove_all_but_largest_component_from_segmentation
from tqdm import tqdm

from fsefs_nnunet.cases.dataset_json import shows_ct
from fsefs_nnunet.cases.images import constant_warning, is_constant, lacks_air, offset_warning, read_image
from fsefs_nnunet.device import reduced_precision
from fsefs_nnunet.features.layout import pooled, pooling_factor
from fsefs_nnunet.features.windows import extract_features, window_starts
from fsefs_nnunet.inference.trained_model import TrainedModel
from fsefs_nnunet.losses.segmentation import segmentation_loss
from fsefs_nnunet.methods.network import AdaptedNetwork
from fsefs_nnunet.priors.query_volumes import scale_between
from fsefs_nnunet.priors.support_memory import SupportMemory
from fsefs_nnunet.priors.transduction import Transduction
from fsefs_nnunet.priors.volumes import PredictedSizes, QueryVolume, block_voxels, sizes_of

# Voxels of a volume that adaptation looks at, after averaging, and that logits are computed of at a time.
MAX_ADAPTED_VOXELS = 10_000
SLAB_VOXELS = 1_000_000
PART_FOLDER = ".fseft_part"  # nnU-Net takes every file in the output folder for a segmentation, but no folder


@torch.no_grad()
def volume_logits(network: AdaptedNetwork, features: torch.Tensor) -> torch.Tensor:
    """Features (C, X, Y, Z) -> logits (outputs, X, Y, Z), both on the CPU; in slabs that overlap by what it reaches.

    In the precision of the training.
    """
    device, margin = network.feature_mean.device, network.adapter.margin
    with reduced_precision(device):
        if margin is None:  # its output depends on all of the volume
            return network.adapt(features[None].to(device))[0].cpu()
        size = slab_size(features)
        slabs = []
        for start in range(0, features.shape[1], size):
            first, stop = max(0, start - margin), min(features.shape[1], start + size + margin)
            logits = network.adapt(features[None, :, first:stop].to(device))[0]
            slabs.append(logits[:, start - first : start - first + size].cpu())
        return torch.cat(slabs, 1)


def slab_size(features: torch.Tensor) -> int:
    """Voxels along X of features (C, X, Y, Z)."""
    return max(1, SLAB_VOXELS // int(np.prod(features.shape[2:])))


def cast_for_reduction(network: AdaptedNetwork, features: torch.Tensor) -> torch.Tensor:
    """Features (C, X, Y, Z) in the type that the reductions of all folds compute in, if one slab holds them."""
    if isinstance(network.reduction, torch.nn.Identity) or slab_size(features) < features.shape[1]:
        return features
    device = network.feature_mean.device
    with reduced_precision(device, features.shape[1]):  # thin volumes are computed in float32 on a CPU
        reduced = torch.is_autocast_enabled(device.type)
    return features.to(torch.get_autocast_dtype(device.type) if reduced else torch.float32)


def averaged(features: torch.Tensor, voxel_ml: float) -> QueryVolume:
    """Features (C, X, Y, Z), averaged over the smallest blocks that leave at most MAX_ADAPTED_VOXELS."""
    shape = tuple(features.shape[1:])
    factor = pooling_factor(shape, MAX_ADAPTED_VOXELS)
    # some channels at a time: all of them in float32 are twice what is held already
    averages = torch.cat([pooled(channels.float(), factor) for channels in features.split(16)], 1)
    return QueryVolume(averages, block_voxels(shape, factor) * voxel_ml)


@dataclass(frozen=True)
class Volume:
    """features: (C, X, Y, Z) float16 on the CPU, None of an image that holds one value alone and shows nothing;
    properties: nnU-Net's, of how the image was preprocessed.
    """

    features: torch.Tensor | None
    properties: dict


@dataclass(frozen=True)
class Prediction:
    """What adaptation did in one fold, and its wall time. `after` is `before` where there was none, or it diverged."""

    before: PredictedSizes
    after: PredictedSizes
    steps: int = 0
    seconds: float = 0.0
    diverged: bool = False


class QueryPredictor:
    """Segments volumes with the folds of one trained model; the backbone runs once over each volume."""

    def __init__(self, model: TrainedModel, memories: Sequence[SupportMemory] | None, save_probabilities: bool = False):
        """memories: of the folds' support, in the folds' order; None: no adaptation (inductive)."""
        self.model = model
        self.memories = memories
        self.save_probabilities = save_probabilities
        manager = model.label_manager
        self.has_regions = manager.has_regions
        self.voxel_ml = float(np.prod(model.configuration.spacing)) / 1000
        self.reader = model.plans_manager.image_reader_writer_class()
        self.shows_ct = shows_ct(model.dataset_json)
        self.preprocessor = model.configuration.preprocessor_class(verbose=False)
        self.windows = 0  # that went through the backbone
        self.loss = segmentation_loss(model.settings.loss, manager, model.configuration.batch_dice)

    def predict(self, files: list[str], output: Path, keep_largest: bool = False) -> dict:
        """Segment the image in `files`, one per channel, write `output`; returns the report of its sizes."""
        return self.segment(self.read(files), output, keep_largest)

    def read(self, files: list[str]) -> Volume:
        """Preprocess an image and run the backbone over it.

        Raises:
            InputError: if the image cannot be read, or holds NaN or infinite values.
        """
        model = self.model
        image, properties = read_image(self.reader, files)
        constant = is_constant(image)
        if constant:
            tqdm.write(constant_warning(files[0], image))
        elif self.shows_ct and lacks_air(image):
            tqdm.write(offset_warning(files[:1]))
        context = (model.plans_manager, model.configuration, model.dataset_json)
        data, _, properties = self.preprocessor.run_case_npy(image, None, properties, *context)
        if constant:
            return Volume(None, properties)
        image, window = torch.from_numpy(np.asarray(data, np.float32)), tuple(model.configuration.patch_size)
        self.windows += len(window_starts(image.shape[1:], window))
        return Volume(extract_features(model.network.backbone, image, window, model.device).half(), properties)

    def segment(self, volume: Volume, output: Path, keep_largest: bool = False) -> dict:
        """Segment a volume that `read` gave, or that of another model on the same backbone and plans."""
        if volume.features is None:
            return self._segment_nothing(volume, output, keep_largest)
        total, folds = None, []
        features = cast_for_reduction(self.model.network, volume.features)
        for fold in range(len(self.model.weights)):
            logits, prediction = self.predict_fold(fold, volume.features, features)
            total = logits if total is None else total.add_(logits)
            folds.append(prediction)
        # as nnU-Net does: the mean of the logits
        self._export(total.div_(len(folds)), volume.properties, output, keep_largest)
        return self._report(folds)

    def _segment_nothing(self, volume: Volume, output: Path, keep_largest: bool) -> dict:
        shape = volume.properties["shape_after_cropping_and_before_resampling"]
        logits = torch.full((self.model.label_manager.num_segmentation_heads, *shape), -100.0)
        if not self.has_regions:
            logits[0] = 0  # the background's
        sizes = sizes_of(logits, self.voxel_ml, self.has_regions)
        self._export(logits, volume.properties, output, keep_largest)
        return self._report([Prediction(sizes, sizes)] * len(self.model.weights))

    def predict_fold(self, fold: int, features: torch.Tensor, cast: torch.Tensor) -> tuple[torch.Tensor, Prediction]:
        """Logits (outputs, X, Y, Z) of one fold for features (C, X, Y, Z); `cast` are the same in the folds' type."""
        network = self.model.network
        network.load_state_dict(self.model.weights[fold])  # what the volume before left is overwritten
        logits = volume_logits(network, cast)
        before = sizes_of(logits, self.voxel_ml, self.has_regions)
        if self.memories is None:
            return logits, Prediction(before, before)
        start = monotonic()
        volume = averaged(features, self.voxel_ml)
        with torch.no_grad():
            scale = scale_between(volume.predict(network, self.has_regions).sizes.soft.cpu(), before.soft)
        volume = QueryVolume(volume.features, volume.voxels_ml, scale.to(self.model.device))
        prior, settings = self.model.priors[fold], self.model.settings
        transduction = Transduction(prior, self.memories[fold], self.loss, settings, self.has_regions)
        steps = 0 if prior.why_no_effect() else transduction.adapt(network, volume, before)
        if not steps:
            return logits, Prediction(before, before, seconds=monotonic() - start)
        adapted = volume_logits(network, cast)
        if not adapted.isfinite().all():
            return logits, Prediction(before, before, steps, monotonic() - start, diverged=True)
        after = sizes_of(adapted, self.voxel_ml, self.has_regions)
        return adapted, Prediction(before, after, steps, monotonic() - start)

    def _export(self, logits: torch.Tensor, properties: dict, output: Path, keep_largest: bool) -> None:
        model, ending = self.model, self.model.dataset_json["file_ending"]
        stem = output.name[: -len(ending)]
        folder = output.parent / f"{PART_FOLDER}_{stem}"  # its own: other parts of the folder are predicted beside
        shutil.rmtree(folder, ignore_errors=True)  # of a prediction that was killed
        folder.mkdir()
        try:
            export_prediction_from_logits(
                logits,
                properties,
                model.configuration,
                model.plans_manager,
                model.dataset_json,
                str(folder / stem),
                self.save_probabilities,
                torch.get_num_threads(),
            )
            if keep_largest:
                keep_largest_components(folder / output.name, model)
            for file in sorted(folder.iterdir(), key=lambda file: file.name == output.name):
                os.replace(file, output.parent / file.name)  # the segmentation last
        finally:
            shutil.rmtree(folder)

    def _report(self, folds: list[Prediction]) -> dict:
        names, gamma = self.model.class_names, self.model.settings.predict_gamma
        expected = mean_report([prior.report(names, gamma) for prior in self.model.priors])
        remarks = [prior.remarks(fold.before, names) for prior, fold in zip(self.model.priors, folds)]
        classes = {}
        for k, name in enumerate(names):
            classes[name] = {
                "size_before_ml": round(float(np.mean([fold.before.soft[k] for fold in folds])), 4),
                "size_after_ml": round(float(np.mean([fold.after.soft[k] for fold in folds])), 4),
                "prior": expected[name],
            }
            if self.memories is not None and expected[name]:
                reasons = dict.fromkeys(reason for of_fold in remarks for reason in of_fold.get(name, ()))
                classes[name]["not_enlarged_because"] = " and ".join(reasons) or None
        return {
            "transductive": self.memories is not None,
            "steps": [fold.steps for fold in folds],
            "diverged": [fold.diverged for fold in folds],
            "adaptation_seconds": round(sum(fold.seconds for fold in folds), 3),
            "classes": classes,
        }


def mean_report(reports: Sequence[dict[str, dict | None]]) -> dict[str, dict | None]:
    """What priors report of each class, its numbers averaged over those that know it."""
    means = {}
    for name in reports[0]:
        known = [report[name] for report in reports if report[name]]
        means[name] = {key: round(fmean(of[key] for of in known), 4) for key in known[0]} if known else None
    return means


def keep_largest_components(file: Path, model: TrainedModel) -> None:
    """nnU-Net's postprocessing: of each class, the largest component alone; in place."""
    reader = model.plans_manager.image_reader_writer_class()
    segmentation, properties = reader.read_seg(str(file))
    for label_or_region in model.classes:
        segmentation = remove_all_but_largest_component_from_segmentation(segmentation, label_or_region)
    reader.write_seg(segmentation[0], str(file), properties)
