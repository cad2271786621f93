"""What `fseft predict` runs: a volume's features, transductive adaptation of each fold, nnU-Net's export."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from time import monotonic

import numpy as np
import torch
from tqdm import tqdm

from fsefs_nnunet.cases.dataset_json import shows_ct
from fsefs_nnunet.cases.images import constant_warning, is_constant, lacks_air, offset_warning, read_image
from fsefs_nnunet.device import without_scaling
from fsefs_nnunet.features.disk import cap_in_gb
from fsefs_nnunet.features.layout import cube_that_leaves, query_layout
from fsefs_nnunet.features.memory import memory_warnings
from fsefs_nnunet.features.packing import Blocks
from fsefs_nnunet.features.volume import VolumeFeatures
from fsefs_nnunet.files import gigabytes
from fsefs_nnunet.inference.export import export, part_folder
from fsefs_nnunet.inference.logits import BlocksOfLogits, Place
from fsefs_nnunet.inference.trained_model import TrainedModel
from fsefs_nnunet.losses.segmentation import segmentation_loss
from fsefs_nnunet.methods.network import ReducedBackbone
from fsefs_nnunet.priors.query_volumes import scale_between
from fsefs_nnunet.priors.support_memory import SupportMemory
from fsefs_nnunet.priors.transduction import Transduction
from fsefs_nnunet.priors.volumes import PredictedSizes, QueryVolume, SizesInBlocks, block_voxels, sizes_of

MAX_ADAPTED_VOXELS = 10_000  # most blocks of a volume for an adaptation


@dataclass(frozen=True)
class Loaded:
    """A preprocessed image.

    image: (channels, X, Y, Z).
    properties: nnU-Net's, of how it was preprocessed.
    constant: whether all voxels have the same value.
    """

    image: np.ndarray
    properties: dict
    constant: bool


@dataclass(frozen=True)
class Segmented:
    """Logits (outputs, X, Y, Z) of a preprocessed image with nnU-Net's properties, and the report of its sizes."""

    logits: torch.Tensor
    properties: dict
    report: dict


@dataclass(frozen=True)
class Volume:
    """A preprocessed image and the backbone's features of it.

    image: (channels, X, Y, Z).
    properties: nnU-Net's, of how it was preprocessed.
    features: None for a constant image, which shows nothing.
    """

    image: np.ndarray
    properties: dict
    features: VolumeFeatures | None


@dataclass(frozen=True)
class Prediction:
    """What adaptation did in one fold, and its wall time; `after` is `before` without adaptation or if it diverged."""

    before: PredictedSizes
    after: PredictedSizes
    steps: int = 0
    seconds: float = 0.0
    diverged: bool = False


class QueryPredictor:
    """Segments volumes with the folds of one trained model, which share the backbone's features of each volume."""

    def __init__(self, model: TrainedModel, memories: Sequence[SupportMemory] | None, save_probabilities: bool = False):
        """memories: support features of each fold, in order; None: no adaptation (inductive)."""
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
        self.networks = [model.network_of(fold) for fold in range(len(model.weights))]
        self._largest = 0
        self.largest_bytes = 0  # of the image and the logits of a volume

    def predict(self, loaded: Loaded, output: Path) -> Segmented:
        """Segment an image, to be written to `output`."""
        with part_folder(output, "features") as folder:
            # without adaptation one look is enough
            return self.segment(self.volume_of(loaded, folder if self.memories is not None else None))

    def load(self, files: list[str]) -> Loaded:
        """Read and preprocess the image in `files`, one per channel; needs no device.

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
        image, _, properties = self.preprocessor.run_case_npy(image, None, properties, *context)
        return Loaded(image, properties, constant)

    def volume_of(self, loaded: Loaded, keep_in: Path | None = None) -> Volume:
        """The volume of an image; the backbone runs when its features are first looked at.

        keep_in: folder for the features, if they will be looked at more than once.
        """
        model = self.model
        if loaded.constant:
            return Volume(loaded.image, loaded.properties, None)
        window, cap = model.configuration.patch_size, cap_in_gb(model.settings.bank_gb)
        features = VolumeFeatures(model.network.backbone, loaded.image, window, model.device, keep_in, cap)
        self._report_memory(features, keep_in)
        return Volume(loaded.image, loaded.properties, features)

    def _report_memory(self, features: VolumeFeatures, keep_in: Path | None) -> None:
        """Print the estimate for the first volume, and later only warnings for larger ones."""
        lines = memory_warnings(features.tiling, len(features.image), self.model.device)
        if keep_in is not None and features.file is None:
            size = gigabytes(2 * features.packing.size)
            lines.append(
                f"There is no room for {size} of features in {keep_in.parent}: the backbone runs again instead."
            )
        if features.tiling.slab_bytes > self._largest:
            for line in lines[int(self._largest > 0) :]:
                tqdm.write(line)
            self._largest = features.tiling.slab_bytes

    def segment(self, volume: Volume) -> Segmented:
        """Segment a volume, its own or that of another model with the same backbone and plans."""
        if volume.features is None:
            return self._segment_nothing(volume)
        windows = volume.features.windows
        total, folds = self._inductive(volume) if self.memories is None else self._transductive(volume)
        windows = volume.features.windows - windows
        self.windows += windows
        self.largest_bytes = max(self.largest_bytes, volume.image.nbytes + total.nbytes)
        # as nnU-Net does: the mean of the logits
        report = {**self._report(folds), "windows": windows}
        return Segmented(total.div_(len(folds)), volume.properties, report)

    def write(self, segmented: Segmented, output: Path, keep_largest: bool = False) -> None:
        """nnU-Net's export into the file `output`; needs no device."""
        export(self.model, segmented.logits, segmented.properties, output, self.save_probabilities, keep_largest)

    def _inductive(self, volume: Volume) -> tuple[torch.Tensor, list[Prediction]]:
        """The sum of the folds' logits (outputs, X, Y, Z), from one look."""
        features, outputs = volume.features, [network.adapt for network in self.networks]
        alone = len(self.networks) == 1 and features.only_look
        if alone and self.networks[0].reduces:  # there is less to blend
            backbone, outputs = ReducedBackbone(self.networks[0]), [self.networks[0].finish]
            features = VolumeFeatures(backbone, volume.image, features.tiling.window, features.device)
        total, sizes = self._look(features, outputs)
        if features is not volume.features:
            volume.features.windows += features.windows
        return total, [Prediction(of_fold.result(), of_fold.result()) for of_fold in sizes]

    def _look(
        self, features: VolumeFeatures, outputs: list, *others: Blocks
    ) -> tuple[torch.Tensor, list[SizesInBlocks]]:
        """The sum of the logits of all `outputs`, and the sizes that each predicts; `others` get the same slabs."""
        shape = features.tiling.shape
        sizes = [SizesInBlocks(shape, self.voxel_ml, self.has_regions) for _ in outputs]
        total = torch.zeros((self.model.label_manager.num_segmentation_heads, *shape))

        def take(number: int, place: Place, logits: torch.Tensor) -> None:
            sizes[number].add(place, logits)
            total[(slice(None), *place)] += logits.cpu()

        margin = self.networks[0].adapter.margin
        features.look(BlocksOfLogits(outputs, margin, features.tiling, features.device, take), *others)
        return total, sizes

    def _transductive(self, volume: Volume) -> tuple[torch.Tensor, list[Prediction]]:
        """The sum of the folds' logits (outputs, X, Y, Z), each after its adaptation."""
        features, blocks, total, folds = volume.features, None, None, []
        pool = cube_that_leaves(MAX_ADAPTED_VOXELS, features.tiling.shape, self.model.configuration.spacing)
        for fold in range(len(self.networks)):
            others = []
            if blocks is None:
                layout = query_layout(features.tiling.shape, pool)
                others = [Blocks(features.tiling, layout, features.device)]
            logits, (sizes,) = self._look(features, [self.networks[fold].adapt], *others)
            if blocks is None:
                blocks = others[0].result()[None]
            adapted, prediction = self._adapt(fold, features, blocks, pool, sizes.result())
            logits = logits if adapted is None else adapted
            total = logits if total is None else total.add_(logits)
            folds.append(prediction)
        return total, folds

    def _adapt(
        self, fold: int, features: VolumeFeatures, blocks: torch.Tensor, pool: Sequence[int], before: PredictedSizes
    ) -> tuple[torch.Tensor | None, Prediction]:
        """Logits after a fold's adaptation to block averages (1, C, x, y, z); None if it did not adapt."""
        start = monotonic()
        network = self.model.network_of(fold)
        voxels = block_voxels(features.tiling.shape, pool) * self.voxel_ml
        volume = QueryVolume(blocks, voxels)
        with torch.no_grad(), without_scaling(self.model.device):  # in the precision of the steps
            scale = scale_between(volume.predict(network, self.has_regions).sizes.soft.cpu(), before.soft)
        volume = QueryVolume(blocks, voxels, scale.to(self.model.device))
        prior, settings = self.model.priors[fold], self.model.settings
        transduction = Transduction(prior, self.memories[fold], self.loss, settings, self.has_regions)
        steps = 0 if prior.why_no_effect() else transduction.adapt(network, volume, before)
        if not steps:
            return None, Prediction(before, before, seconds=monotonic() - start)
        adapted, (sizes,) = self._look(features, [network.adapt])
        if not sizes.finite:
            return None, Prediction(before, before, steps, monotonic() - start, diverged=True)
        return adapted, Prediction(before, sizes.result(), steps, monotonic() - start)

    def _segment_nothing(self, volume: Volume) -> Segmented:
        shape = volume.properties["shape_after_cropping_and_before_resampling"]
        logits = torch.full((self.model.label_manager.num_segmentation_heads, *shape), -100.0)
        if not self.has_regions:
            logits[0] = 0  # the background's
        sizes = sizes_of(logits, self.voxel_ml, self.has_regions)
        report = {**self._report([Prediction(sizes, sizes)] * len(self.model.weights)), "windows": 0}
        return Segmented(logits, volume.properties, report)

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
    """The priors' reports by class, numbers averaged over the priors that have the class."""
    means = {}
    for name in reports[0]:
        known = [report[name] for report in reports if report[name]]
        means[name] = {key: round(fmean(of[key] for of in known), 4) for key in known[0]} if known else None
    return means
