"""FSEFTTrainer: a spatial adapter with a size prior on a frozen backbone, Eq. (3) of FSEFT (arXiv 2303.17051)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path

import numpy as np
import torch

from fsefs_nnunet.cases.preprocessed import refuse_missing
from fsefs_nnunet.cases.queries import UnlabelledQueries
from fsefs_nnunet.cases.splits import SPLITS_FILE, fold_seed, load_splits, query_cases
from fsefs_nnunet.device import reduced_precision
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.features.bank import WINDOWS, FeatureBank
from fsefs_nnunet.features.crops import CropLoader, region_transform
from fsefs_nnunet.features.disk import BANK_FOLDER, cap_in_gb
from fsefs_nnunet.features.layout import Layout, pooled_name, query_layout, support_layout
from fsefs_nnunet.features.views import SupportViews
from fsefs_nnunet.inference.trained_model import PRIOR_KEY
from fsefs_nnunet.labels import foreground_classes, foreground_names
from fsefs_nnunet.priors.query_volumes import QuerySizes, calibration_cases, share_found
from fsefs_nnunet.priors.size import estimate_sizes, size_penalty, support_sizes_ml
from fsefs_nnunet.trainers.adapted_trainer import AdaptedTrainer

CALIBRATION_BATCHES = 8  # of crops of the support


class FSEFTTrainer(AdaptedTrainer):
    """Trains reduction, adapter and head on crops of the feature bank: L_SEG(support) + lambda * L_TI(query).

    Wants a K-shot configuration of plans made by FSEFTPlanner, whose keys say what it does, as do the attributes below.
    """

    use_size_prior = True
    channel_dropout = 0.0  # probability that a step on the support does not see a channel of a crop
    initial_lr_of_method = 2e-3

    @property
    def wants_prior(self) -> bool:
        return bool(self.use_size_prior and self.settings["fseft_lambda"])

    # ---- cases ----

    @property
    def classes(self) -> list[int | tuple[int, ...]]:
        return foreground_classes(self.label_manager)

    @property
    def class_names(self) -> list[str]:
        return foreground_names(self.dataset_json["labels"], self.label_manager.has_regions)

    def get_tr_and_val_datasets(self):
        raise NotImplementedError(f"{type(self).__name__} reads the feature bank, see get_dataloaders.")

    def load_case(self, case: str) -> tuple:
        """Image, label map and more of a preprocessed training case, as nnU-Net's dataset gives them."""
        return self.dataset_class(self.preprocessed_dataset_folder, [case]).load_case(case)

    def load_image(self, case: str) -> np.ndarray:
        """Preprocessed image (channels, X, Y, Z) of a training case, a view of one, or an unlabelled query."""
        case = self.pooled_support.get(case, case)
        if case in self.unlabelled_queries:
            return self.unlabelled.load(case)
        if case in self.views.names:
            image, self.view_segmentations[case] = self.views.make(case)
            return image
        return self.load_case(case)[0][:]

    def load_segmentation(self, case: str) -> np.ndarray:
        """Label map (1, X, Y, Z) of a support case, or of a view that was loaded."""
        if case in self.views.names:
            return self.view_segmentations[case]
        return self.load_case(case)[1][:]

    def get_dataloaders(self):
        regions = region_transform(self.label_manager)
        support, views = (
            {case: self.load_segmentation(case) for case in cases} for cases in (self.support, self.views.names)
        )

        def loader(stream: int, segmentations: dict[str, np.ndarray]) -> CropLoader:
            seed = (self.settings["fseft_seed"], fold_seed(self.fold), stream)
            size, crops = self.settings["fseft_crop_size"], self.settings["fseft_crops_per_step"]
            ignored = self.label_manager.ignore_label
            return CropLoader(self.bank, segmentations, size, crops, seed, regions, ignored)

        return loader(0, {**support, **views}), loader(1, support)

    # ---- before training ----

    def on_train_start(self):
        if not self.was_initialized:
            self.initialize()
        self.support, labelled_queries = self.do_split()
        self.unlabelled = UnlabelledQueries(self.preprocessed_dataset_folder)
        splits = load_splits(Path(self.preprocessed_dataset_folder_base) / SPLITS_FILE)
        # the labelled queries enter as images; their labels are not read
        self.unlabelled_queries = query_cases(splits, self.fold)[1]
        if self.wants_prior:
            missing = set(self.unlabelled_queries) - set(self.unlabelled.cases)
            refuse_missing(missing, self.unlabelled.folder, " --queries FOLDER")
        self.queries = [*labelled_queries, *self.unlabelled_queries]
        self.print_to_log_file(
            f"{len(self.support)} labelled support cases (all the labels that this training uses): {self.support}; "
            f"{len(self.queries)} queries, {len(labelled_queries)} of them with labels for the final validation."
        )
        if self.channel_dropout:
            self.print_to_log_file(f"Each channel of a crop is left out with a probability of {self.channel_dropout}.")
        self.views = self.support_views()
        self.view_segmentations: dict[str, np.ndarray] = {}
        segmentations = {case: self.load_segmentation(case) for case in self.support}
        spacing, ignored = self.configuration_manager.spacing, self.label_manager.ignore_label
        self.support_sizes = support_sizes_ml(segmentations, self.classes, spacing, ignored)
        self.pooled_support = {}
        if self.settings["fseft_pool"] > 1:  # without prior, too: a later training with it needs no second pass
            cases = calibration_cases(self.support_sizes, len(self.classes))
            self.pooled_support = {pooled_name(case): case for case in cases}
        self.fill_bank()
        self.estimate_priors()
        self.start_network()
        super().on_train_start()
        self.log_query_sizes("before this training")
        self.stop_at_plateau()

    def support_views(self) -> SupportViews:
        """The support cases under nnU-Net's augmentation.

        Raises:
            InputError: if crops are larger than the views.
        """
        views, crop, window = (self.settings[key] for key in ("fseft_views", "fseft_crop_size", "patch_size"))
        if views and any(n > w for n, w in zip(crop, window)):
            where = f"{self.configuration_name!r} in {self.plans_manager.plans_name}.json"
            raise InputError(
                f"fseft_crop_size of {where} is {list(crop)}: no axis may be longer than a view, the window of "
                f"{list(window)} voxels; or set fseft_views to 0."
            )
        rotation, dummy_2d, initial_patch, _ = self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        foreground = self.label_manager.foreground_labels

        def transforms_of(window: np.ndarray) -> Callable:
            masks = self.configuration_manager.use_mask_for_norm
            return self.get_training_transforms(
                window, rotation, None, None, dummy_2d, use_mask_for_norm=masks, foreground_labels=foreground
            )

        return SupportViews(
            self.support,
            views,
            load_case=self.load_case,
            transforms_of=transforms_of,
            labels=foreground,
            ignore_label=self.label_manager.ignore_label,
            window=window,
            initial_patch=initial_patch,
            seed=self.settings["fseft_seed"],
        )

    def fill_bank(self) -> None:
        """Run the frozen backbone once over support and queries, unless an earlier training did."""
        self.bank = FeatureBank(
            Path(self.preprocessed_dataset_folder_base) / BANK_FOLDER,
            self.network.backbone,
            self.settings["architecture"]["arch_kwargs"]["stages"],
            self.configuration_manager.patch_size,
            self.device,
        )
        queries = self.queries if self.wants_prior else []
        needed = [*self.support, *self.views.names, *self.pooled_support, *queries]
        cap_gb = cap_in_gb(self.settings.get("fseft_bank_gb"))
        self.bank.fill(needed, self.load_image, self.bank_layout, cap_gb, self.print_to_log_file)

    def bank_layout(self, case: str, shape: tuple[int, ...]) -> Layout:
        """What the bank keeps of a volume of `shape`; of a query it depends on the image alone."""
        if case not in self.support and case not in self.views.names:
            return query_layout(shape, self.settings["fseft_pool"])
        labels, ignored = self.load_segmentation(case)[0], self.label_manager.ignore_label
        window = self.configuration_manager.patch_size
        return support_layout(case, labels, self.settings["fseft_crop_size"], window, ignored)

    def estimate_priors(self) -> None:
        """Size prior S of each class in ml, from the support labels alone."""
        self.priors = estimate_sizes(self.support_sizes, len(self.classes))
        self.query_sizes = None
        if why := self.why_no_prior():
            self.print_to_log_file(f"The size prior has no effect: {why}.")
            return
        gamma = self.settings["fseft_gamma"]
        for name, prior in zip(self.class_names, self.priors):
            text = f"{prior.size:.2f} ml, spread {prior.spread:.2f} ml, {prior.num_cases} cases" if prior else "none"
            tolerated = f", tolerated {prior.tolerance(gamma):.0%}" if prior else ""
            self.print_to_log_file(f"Size prior of {name}: {text}{tolerated}")
        voxel_ml = float(np.prod(self.configuration_manager.spacing)) / 1000
        pooled_support = {
            name: torch.tensor(self.support_sizes[case], dtype=torch.float32)
            for name, case in self.pooled_support.items()
        }
        self.query_sizes = QuerySizes(self.bank, self.queries, voxel_ml, pooled_support)
        known = [i for i, prior in enumerate(self.priors) if prior]
        self.known = torch.tensor(known, device=self.device)
        self.prior_ml = torch.tensor([self.priors[i].size for i in known], device=self.device)
        tolerances = [self.priors[i].tolerance(gamma) for i in known]
        self.tolerance = torch.tensor(tolerances, device=self.device)

    def why_no_prior(self) -> str | None:
        if not self.wants_prior:
            return "it is switched off"
        if not self.queries:
            return "there are no queries"
        return None if any(self.priors) else "no support case shows a class whole"

    def start_network(self) -> None:
        """A fresh network takes the support features' statistics and the universal head's rows."""
        if self.network.is_fitted:
            return
        self.fit_network(*self.bank.statistics(self.support))

    # ---- training ----

    def on_train_epoch_start(self):
        super().on_train_epoch_start()
        self.dataloader_train.start_epoch(self.current_epoch)
        self.dataloader_val.start_epoch(0)  # the same crops each time, so that epochs can be compared
        if self.query_sizes is not None and self.current_epoch >= self.settings["fseft_prior_from_epoch"]:
            self.calibrate()

    @torch.no_grad()
    def calibrate(self) -> None:
        """Measure what pooling takes from sizes, on the support."""
        if not self.pooled_support:
            return
        self.dataloader_val.start_epoch(0)  # the same crops each time
        batches = (next(self.dataloader_val) for _ in range(CALIBRATION_BATCHES))
        found = share_found(self.network, batches, self.label_manager)
        self.dataloader_val.start_epoch(0)
        self.query_sizes.calibrate(self.network, self.label_manager.has_regions, found)

    def query_penalty(self) -> torch.Tensor | None:
        """Eq. (2) on the step's query, averaged over the classes; None while the warm-up lasts or without a prior."""
        if self.query_sizes is None or self.current_epoch < self.settings["fseft_prior_from_epoch"]:
            return None
        step, has_regions = self.training_step, self.label_manager.has_regions
        query = self.query_sizes.rotating(step, self.settings["fseft_seed"])
        predicted = self.query_sizes.predict_beside_support(self.network, query, step, has_regions)[self.known]
        whole = predicted.seen_whole(self.prior_ml)
        return size_penalty(predicted.soft, self.prior_ml, self.tolerance, whole).mean()

    @property
    def training_step(self) -> int:
        """Of the whole training, while it runs."""
        return self.current_epoch * self.num_iterations_per_epoch + self.dataloader_train.step - 1

    def kept_channels(self, features: torch.Tensor) -> torch.Tensor | None:
        """Which channels of features (B, C, X, Y, Z) the step sees, (B, C); a function of the step, for `--c`."""
        if not self.channel_dropout:
            return None
        rng = np.random.default_rng((self.settings["fseft_seed"], fold_seed(self.fold), self.training_step))
        return torch.from_numpy(rng.random(features.shape[:2]) >= self.channel_dropout).to(features.device)

    def train_step(self, batch: dict) -> dict:
        features = batch["data"].to(self.device, non_blocking=True)
        target = batch["target"].to(self.device, non_blocking=True)
        self.optimizer.zero_grad(set_to_none=True)
        with reduced_precision(self.device):
            segmentation_loss = self.loss(self.network.adapt(features, self.kept_channels(features)), target)
        penalty = self.query_penalty()
        loss = segmentation_loss if penalty is None else segmentation_loss + self.settings["fseft_lambda"] * penalty
        if self.grad_scaler is not None:
            self.grad_scaler.scale(loss).backward()
            self.grad_scaler.unscale_(self.optimizer)
        else:
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 12)
        if self.grad_scaler is not None:
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
        else:
            self.optimizer.step()
        # without the penalty, which sets in late: a training must not seem to end, or to get worse, where it does
        return {"loss": segmentation_loss.detach().cpu().numpy()}

    def validation_step(self, batch: dict) -> dict:
        # nnU-Net's step, fed with stored features; the crops are the support's, query labels choose no checkpoint
        network, self.network = self.network, self.network.adapt
        try:
            return super().validation_step(batch)
        finally:
            self.network = network

    def on_train_end(self):
        self.log_query_sizes("after training")
        self.print_to_log_file(WINDOWS.format(self.bank.windows))
        super().on_train_end()

    def log_query_sizes(self, when: str) -> None:
        if self.query_sizes is None:
            return
        self.print_to_log_file(f"Predicted sizes of the queries in ml {when}:")
        self.calibrate()
        names = [self.class_names[i] for i in self.known]
        sizes, missing = self.query_sizes.describe(
            self.network, self.label_manager.has_regions, self.known, names, self.prior_ml
        )
        for line in sizes:
            self.print_to_log_file(line, add_timestamp=False)
        if self.current_epoch:  # what an untrained network misses says nothing of the queries
            for line in missing:
                self.print_to_log_file(line)

    def added_to_checkpoint(self) -> dict:
        """What `fseft predict` wants of a model that travels alone."""
        return super().added_to_checkpoint() | {PRIOR_KEY: [prior and astuple(prior) for prior in self.priors]}
