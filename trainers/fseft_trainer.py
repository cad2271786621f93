"""FSEFTTrainer: a spatial adapter with a size prior on a frozen backbone, Eq. (3) of FSEFT (arXiv 2303.17051)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from fsefs_nnunet.cases.preprocessed import refuse_missing
from fsefs_nnunet.cases.queries import UnlabelledQueries
from fsefs_nnunet.cases.splits import SPLITS_FILE, fold_seed, load_splits, query_cases
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.features.bank import FeatureBank, Request
from fsefs_nnunet.features.crops import CropLoader, region_transform
from fsefs_nnunet.features.disk import cap_in_gb
from fsefs_nnunet.features.layout import Layout, pooled_name, query_layout, support_layout
from fsefs_nnunet.features.views import SupportViews
from fsefs_nnunet.inference.trained_model import PRIOR_KEY
from fsefs_nnunet.labels import foreground_classes, foreground_names
from fsefs_nnunet.methods.registry import METHODS
from fsefs_nnunet.methods.run_file import RunFile
from fsefs_nnunet.priors import prior_named
from fsefs_nnunet.priors.objective import objective
from fsefs_nnunet.priors.prior import SupportLabels
from fsefs_nnunet.priors.query_volumes import QueryVolumes, calibration_cases, share_found
from fsefs_nnunet.trainers.adapted_trainer import AdaptedTrainer

CALIBRATION_BATCHES = 8  # of crops of the support


class FSEFTTrainer(AdaptedTrainer):
    """Trains reduction, adapter and head on crops of the feature bank: L_SEG(support) + lambda * L_TI(query).

    Needs a K-shot configuration of plans made by FSEFTPlanner, whose keys say what it does, as does its method's row.
    """

    method = METHODS["fseft"]

    @property
    def wants_prior(self) -> bool:
        return bool(self.method.trains_with_prior and self.settings.lambda_)

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
        """Preprocessed image (channels, X, Y, Z) of a training case."""
        return self.load_case(case)[0][:]

    def make_view(self, view: str) -> np.ndarray:
        """Image (channels, X, Y, Z) of a view of a support case; keeps its label map."""
        image, self.segmentations[view] = self.views.make(view)
        return image

    def get_dataloaders(self):
        settings, ignored = self.settings, self.label_manager.ignore_label
        regions = region_transform(self.label_manager)

        def loader(stream: int, cases: Iterable[str]) -> CropLoader:
            seed = (settings.seed, fold_seed(self.fold), stream)
            segmentations = {case: self.segmentations[case] for case in cases}
            return CropLoader(
                self.bank, segmentations, settings.crop_size, settings.crops_per_step, seed, regions, ignored
            )

        return loader(0, [*self.run.support, *self.views.names]), loader(1, self.run.support)

    # ---- before training ----

    def describe_run(self) -> RunFile:
        run = super().describe_run()
        splits = load_splits(Path(self.preprocessed_dataset_folder_base) / SPLITS_FILE)
        # the labelled queries enter as images; their labels are not read
        run.queries = [*run.labelled_queries, *query_cases(splits, self.fold)[1]]
        return run

    def prepare_training(self) -> None:
        run = self.run
        self.unlabelled = UnlabelledQueries(self.preprocessed_dataset_folder)
        unlabelled = [case for case in run.queries if case not in run.labelled_queries]
        if self.wants_prior:
            refuse_missing(set(unlabelled) - set(self.unlabelled.cases), self.unlabelled.folder, " --queries FOLDER")
        self.print_to_log_file(
            f"{len(run.support)} labelled support cases (all the labels that this training uses): {run.support}; "
            f"{len(run.queries)} queries, {len(run.labelled_queries)} of them with labels for the final validation."
        )
        if self.method.channel_dropout:
            self.print_to_log_file(
                f"Each channel of a crop is left out with a probability of {self.method.channel_dropout}."
            )
        self.segmentations = {case: self.load_case(case)[1][:] for case in run.support}
        spacing, ignored = self.configuration_manager.spacing, self.label_manager.ignore_label
        self.support_labels = SupportLabels(self.segmentations, self.classes, spacing, ignored)
        self.pooled_support = {}
        if self.settings.pool > 1:  # without prior, too: a later training with it needs no second pass
            cases = calibration_cases(self.support_labels.sizes_ml, len(self.classes))
            self.pooled_support = {pooled_name(case): case for case in cases}
        self.views = self.support_views()
        self.fill_bank(unlabelled)
        self.estimate_prior()
        super().prepare_training()

    def support_views(self) -> SupportViews:
        """The support cases under nnU-Net's augmentation.

        Raises:
            InputError: if crops are larger than the views.
        """
        views, crop, window = self.settings.views, self.settings.crop_size, self.configuration_manager.patch_size
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
            self.run.support,
            views,
            load_case=self.load_case,
            transforms_of=transforms_of,
            labels=foreground,
            ignore_label=self.label_manager.ignore_label,
            window=window,
            initial_patch=initial_patch,
            seed=self.settings.seed,
        )

    def fill_bank(self, unlabelled: list[str]) -> None:
        """Run the frozen backbone once over support and queries, unless an earlier training did."""
        preprocessed = Path(self.preprocessed_dataset_folder_base)
        self.bank = FeatureBank.of_configuration(
            preprocessed, self.network.backbone, self.configuration_manager, self.device
        )
        requests = [
            *(Request(case, partial(self.load_image, case), partial(self.kept_of, case)) for case in self.run.support),
            *(Request(view, partial(self.make_view, view), partial(self.kept_of, view)) for view in self.views.names),
            *(Request(name, partial(self.load_image, case), self.pooled) for name, case in self.pooled_support.items()),
        ]
        if self.wants_prior:
            labelled = self.run.labelled_queries
            requests += [Request(case, partial(self.load_image, case), self.pooled) for case in labelled]
            requests += [Request(case, partial(self.unlabelled.load, case), self.pooled) for case in unlabelled]
        self.clock.lap(self.run, "start")
        self.bank.fill(requests, cap_in_gb(self.settings.bank_gb), self.print_to_log_file)
        self.clock.lap(self.run, "feature bank")
        self.run.windows += self.bank.windows

    def kept_of(self, case: str, shape: tuple[int, ...]) -> Layout:
        """What the bank keeps of a support case or view of `shape`."""
        labels, ignored = self.segmentations[case][0], self.label_manager.ignore_label
        return support_layout(case, labels, self.settings.crop_size, self.configuration_manager.patch_size, ignored)

    def pooled(self, shape: tuple[int, ...]) -> Layout:
        return query_layout(shape, self.settings.pool)

    def estimate_prior(self) -> None:
        """From the support labels alone."""
        self.prior = prior_named(self.method.prior).estimate(self.support_labels)
        self.query_volumes = None
        if why := self.why_no_prior():
            self.print_to_log_file(f"The prior has no effect: {why}.")
            return
        names, gamma = self.class_names, self.settings.gamma
        for line in self.prior.describe(names, gamma):
            self.print_to_log_file(line)
        self.run.prior = self.prior.report(names, gamma)
        voxel_ml = float(np.prod(self.configuration_manager.spacing)) / 1000
        pooled_support = {
            name: torch.tensor(self.support_labels.sizes_ml[case], dtype=torch.float32)
            for name, case in self.pooled_support.items()
        }
        self.query_volumes = QueryVolumes(self.bank, self.run.queries, voxel_ml, pooled_support)

    def why_no_prior(self) -> str | None:
        if not self.wants_prior:
            return "it is switched off"
        if not self.run.queries:
            return "there are no queries"
        return self.prior.why_no_effect()

    def start_network(self) -> None:
        if not self.network.is_fitted:
            self.fit_network(*self.bank.statistics(self.run.support))

    def on_train_start(self):
        super().on_train_start()
        self.log_query_sizes("before")
        self.stop_at_plateau()

    # ---- training ----

    def on_train_epoch_start(self):
        super().on_train_epoch_start()
        self.dataloader_train.start_epoch(self.current_epoch)
        self.dataloader_val.start_epoch(0)  # the same crops each time, so that epochs can be compared
        self.seen: list[tuple[str, torch.Tensor, torch.Tensor]] = []  # query, sizes and penalty of the epoch's steps
        if self.prior_counts:
            self.calibrate()

    @property
    def prior_counts(self) -> bool:
        """Whether the epoch's steps heed the prior: not while the warm-up lasts."""
        return self.query_volumes is not None and self.current_epoch >= self.settings.prior_from_epoch

    @torch.no_grad()
    def calibrate(self) -> None:
        """Measure what pooling takes from sizes, on the support."""
        if not self.pooled_support:
            return
        self.dataloader_val.start_epoch(0)  # the same crops each time
        batches = (next(self.dataloader_val) for _ in range(CALIBRATION_BATCHES))
        found = share_found(self.network, batches, self.label_manager)
        self.dataloader_val.start_epoch(0)
        self.query_volumes.calibrate(self.network, self.label_manager.has_regions, found)

    def query_penalty(self) -> torch.Tensor | None:
        """L_TI of the step's query; None while the prior does not count."""
        if not self.prior_counts:
            return None
        step, has_regions = self.training_step, self.label_manager.has_regions
        query = self.query_volumes.rotating(step, self.settings.seed)
        prediction = self.query_volumes.predict_beside_support(self.network, query, step, has_regions)
        penalty = self.prior.penalty(prediction, self.settings.gamma)
        self.seen.append((query, prediction.sizes.soft.detach(), penalty.detach()))
        return penalty

    @property
    def training_step(self) -> int:
        """Of the whole training, while it runs."""
        return self.current_epoch * self.num_iterations_per_epoch + self.dataloader_train.step - 1

    def kept_channels(self, features: torch.Tensor) -> torch.Tensor | None:
        """Which channels of features (B, C, X, Y, Z) the step sees, (B, C); a function of the step, for `--c`."""
        if not self.method.channel_dropout:
            return None
        rng = np.random.default_rng((self.settings.seed, fold_seed(self.fold), self.training_step))
        return torch.from_numpy(rng.random(features.shape[:2]) >= self.method.channel_dropout).to(features.device)

    def train_step(self, batch: dict) -> dict:
        features = batch["data"].to(self.device, non_blocking=True)
        target = batch["target"].to(self.device, non_blocking=True)
        self.optimizer.zero_grad(set_to_none=True)
        loss, segmentation_loss = objective(
            self.network,
            features,
            target,
            self.loss,
            self.settings.lambda_,
            self.query_penalty,
            self.kept_channels(features),
        )
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

    def describe_epoch(self, epoch: int) -> dict:
        described = super().describe_epoch(epoch)
        if self.seen:
            described["penalty"] = torch.stack([penalty for _, _, penalty in self.seen]).mean().item()
            described["sizes_ml"] = {query: self.by_class(sizes) for query, sizes, _ in self.seen}
        return described

    def by_class(self, sizes: torch.Tensor) -> dict[str, float]:
        return {name: round(size, 4) for name, size in zip(self.class_names, sizes.tolist())}

    def on_train_end(self):
        self.log_query_sizes("after")
        super().on_train_end()

    @torch.no_grad()
    def log_query_sizes(self, when: str) -> None:
        """when: "before" or "after" the training."""
        if self.query_volumes is None or (when == "before" and self.current_epoch):
            return
        self.calibrate()
        self.print_to_log_file(f"Predicted sizes of the queries in ml {when} this training:")
        sizes_ml, remarks = self.run.sizes_ml.setdefault(when, {}), []
        for query in self.run.queries:
            sizes = self.query_volumes.predict(self.network, query, self.label_manager.has_regions).sizes
            sizes_ml[query] = self.by_class(sizes.soft)
            line = ", ".join(f"{name} {size:.2f}" for name, size in sizes_ml[query].items())
            self.print_to_log_file(f"  {query}: {line}", add_timestamp=False)
            for name, reasons in self.prior.remarks(sizes, self.class_names).items():
                remarks.append(f"{name} of {query} {' and '.join(reasons)}: the prior does not enlarge it.")
        for remark in remarks if self.current_epoch else []:  # what an untrained network misses says nothing of a query
            self.print_to_log_file(remark)

    def added_to_checkpoint(self) -> dict:
        """What `fseft predict` needs of a model that travels alone."""
        return super().added_to_checkpoint() | {PRIOR_KEY: self.prior.state()}
