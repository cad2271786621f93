"""FSEFTPretrainer: universal pretraining of any nnU-Net architecture on a partially labelled assembly."""

from __future__ import annotations

import os
from os.path import join
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from batchgenerators.utilities.file_and_folder_operations import load_json, save_json
from batchgeneratorsv2.helpers.scalar_type import sample_scalar
from batchgeneratorsv2.transforms.base.basic_transform import ImageOnlyTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.training.loss.dice import get_tp_fp_fn_tn
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler

from fsefs_nnunet.backbones.warm_start import start_from
from fsefs_nnunet.device import reduced_precision
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.labels import foreground, summary_key
from fsefs_nnunet.losses.partial_labels import PartialLabelLoss, annotation_masks
from fsefs_nnunet.trainers.source_validation import SourceValidation
from fsefs_nnunet.trainers.time_budget import TimeBudgetTrainer
from fsefs_nnunet.trainers.without_mirroring import WithoutMirroring


class RandomAppearanceTransform(ImageOnlyTransform):
    """Random contrast curve over an image's range (inversion included), then z-scoring of half of the images."""

    def __init__(self, p_curve: float = 0.4, p_zscore: float = 0.5, knots=(2, 7)):
        super().__init__()
        self.p_curve = p_curve
        self.p_zscore = p_zscore
        self.knots = knots

    def get_parameters(self, **data_dict) -> dict:
        curve = None
        if np.random.uniform() < self.p_curve:
            curve = np.random.uniform(0, 1, int(sample_scalar(self.knots)) + 2)
        return {"curve": curve, "zscore": np.random.uniform() < self.p_zscore}

    def _apply_to_image(self, img: torch.Tensor, **params) -> torch.Tensor:
        if params["curve"] is not None:
            low, high = img.min().item(), img.max().item()
            knots = np.linspace(low, high, len(params["curve"]))
            values = low + (high - low) * params["curve"]
            img = torch.from_numpy(np.interp(img.numpy(), knots, values).astype(np.float32))
        if params["zscore"]:
            img = (img - img.mean()) / img.std().clamp_min(1e-5)
        return img


class FSEFTPretrainer(WithoutMirroring, SourceValidation, TimeBudgetTrainer):
    """Minimises Eq. (1) of FSEFT over the sources that dataset.json lists under "sources".

    Sigmoid outputs need nnU-Net's region-based labels: give at least one label that is a list of several. Sources are
    drawn equally often. The network sees half of the images as preprocessed and half of them z-scored, in windows of
    changing size, so that it serves images of other kinds. The environment variable `fseft_start_from` names the
    backbone whose weights training starts from.
    """

    smallest_window = 40

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict, device=torch.device("cuda")):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.enable_deep_supervision = False
        self.num_iterations_per_epoch = 250
        self.num_val_iterations_per_epoch = 10
        self.save_every = 1
        if not self.label_manager.has_regions:
            raise InputError(
                "FSEFTPretrainer needs region-based labels: in dataset.json, make at least one label a list of several "
                'values, e.g. "kidneys": [4, 5], and give regions_class_order.'
            )
        self.region_names = list(foreground(dataset_json["labels"]))
        self.masks = annotation_masks(dataset_json, self.region_names)

    def initialize(self):
        super().initialize()
        if start := os.environ.get("fseft_start_from"):
            network = self.network.module if self.is_ddp else self.network
            self.print_to_log_file(start_from(network, start, self.region_names))

    def _do_i_compile(self):
        return False  # windows change their size from step to step: each would be compiled

    def on_train_start(self):
        super().on_train_start()
        torch.backends.cudnn.benchmark = False  # for the same reason: each size would be tried with every algorithm

    def set_deep_supervision_enabled(self, enabled: bool):
        super().set_deep_supervision_enabled(False)

    def _build_loss(self):
        return PartialLabelLoss()

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self):
        rotation, dummy_2d, _, mirror = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        # patches hold whole volumes or most of them, so there is nothing to rotate in from outside
        return rotation, dummy_2d, self.configuration_manager.patch_size, mirror

    def configure_optimizers(self):
        # AdamW gets further than nnU-Net's SGD in the few thousand steps of a small backbone
        self.initial_lr, self.weight_decay = 1e-3, 1e-5
        optimizer = torch.optim.AdamW(self.network.parameters(), self.initial_lr, weight_decay=self.weight_decay)
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)

    @staticmethod
    def get_training_transforms(*args, **kwargs):
        stock = TimeBudgetTrainer.get_training_transforms(*args, **kwargs)
        # before the spatial transform, which pads with zeros as prediction does
        return ComposeTransforms([RandomAppearanceTransform(), *stock.transforms])

    def get_tr_and_val_datasets(self):
        train, val = super().get_tr_and_val_datasets()
        train.identifiers = self.balanced(train.identifiers)
        return train, val

    def balanced(self, cases: list[str]) -> list[str]:
        """`cases` with the cases of small sources repeated, so that every source is drawn equally often."""
        missing = [case for case in cases if case not in self.masks]
        if missing:
            raise InputError(
                f'dataset.json lists {len(missing)} cases in no source, e.g. {missing[0]}: add them to "sources".'
            )
        known = set(cases)
        groups = [[c for c in source["cases"] if c in known] for source in self.dataset_json["sources"].values()]
        largest = max(map(len, groups))
        return [case for group in groups if group for case in np.resize(group, largest).tolist()]

    def w(self, batch: dict) -> torch.Tensor:
        """Task masks (B, K) of the batch's cases."""
        return torch.stack([self.masks[str(case)] for case in batch["keys"]]).to(self.device)

    def divisor(self) -> np.ndarray:
        """What a window must be a multiple of, per axis."""
        return np.prod(self.configuration_manager.pool_op_kernel_sizes, axis=0)

    def random_window(self, batch: dict) -> dict:
        """A random box of the batch (60 to 100 % per axis), resized to a random window that the network divides.

        Windows grow from half the patch to all of it over the first half of the training: where organs lie is learnt
        from many small windows at an eighth of the cost.
        """
        step = self.divisor()
        full = np.array(batch["data"].shape[2:])
        grown = min(1.0, 0.5 + self.progress())
        low, high = (np.ceil(grown * n / step).astype(int) for n in (np.minimum(self.smallest_window, full), full))
        window = [int(np.random.randint(a, b + 1) * s) for a, b, s in zip(low, high, step)]
        box = [int(round(n * np.random.uniform(0.6, 1.0))) if np.random.uniform() < 0.5 else int(n) for n in full]
        start = [np.random.randint(0, n - b + 1) for n, b in zip(full, box)]
        part = (slice(None), slice(None), *(slice(a, a + b) for a, b in zip(start, box)))
        data, target = (batch[name][part].to(self.device, non_blocking=True) for name in ("data", "target"))
        return {
            **batch,
            "data": F.interpolate(data, size=window, mode="trilinear"),
            "target": F.interpolate(target.float(), size=window, mode="nearest-exact"),
        }

    def train_step(self, batch: dict) -> dict:
        w, batch = self.w(batch), self.random_window(batch)
        depth = batch["data"].shape[2] // int(self.divisor()[0])
        loss, self.loss = self.loss, lambda output, target: loss(output, target, w)
        try:
            with reduced_precision(self.device, depth):  # a step 2.7 times as fast where the processor has bfloat16
                return super().train_step(batch)
        finally:
            self.loss = loss

    def validation_step(self, batch: dict) -> dict:
        w = self.w(batch)
        data, target = batch["data"].to(self.device), batch["target"].to(self.device)
        output = self.network(data)
        tp, fp, fn, _ = get_tp_fp_fn_tn((output > 0).float(), target, axes=(2, 3, 4))
        counts = {f"{name}_hard": (x * w).sum(0).cpu().numpy() for name, x in (("tp", tp), ("fp", fp), ("fn", fn))}
        return {"loss": self.loss(output, target, w).cpu().numpy(), **counts}

    def perform_actual_validation(self, save_probabilities: bool = False):
        super().perform_actual_validation(save_probabilities)
        if self.local_rank == 0:
            file = join(self.output_folder, "validation", "summary.json")
            save_json(mask_summary(load_json(file), self.masks, self.dataset_json), file, sort_keys=True)


def mask_summary(summary: dict, masks: dict[str, torch.Tensor], dataset_json: dict) -> dict:
    """nnU-Net's summary.json with the classes that a case does not annotate set to NaN, means taken over the rest."""
    keys = [summary_key(value) for value in foreground(dataset_json["labels"]).values()]
    for case in summary["metric_per_case"]:
        name = Path(case["prediction_file"]).name.removesuffix(dataset_json["file_ending"])
        for key, annotated in zip(keys, masks[name]):
            if not annotated:
                case["metrics"][key] = {metric: float("nan") for metric in case["metrics"][key]}
    for key in keys:
        for metric in summary["mean"][key]:
            values = np.array([case["metrics"][key][metric] for case in summary["metric_per_case"]], float)
            summary["mean"][key][metric] = float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")
    summary["foreground_mean"] = {
        metric: float(np.nanmean([summary["mean"][key][metric] for key in keys]))
        for metric in summary["foreground_mean"]
    }
    return summary
