"""FSEFTTrainer: a spatial adapter with a size prior on a frozen backbone, Eq. (3) of FSEFT (arXiv 2303.17051)."""

from __future__ import annotations

import os
import sys
from os.path import join
from pathlib import Path

import numpy as np
import torch
from batchgeneratorsv2.transforms.utils.seg_to_regions import ConvertSegmentationToRegionsTransform
from torch import autocast, nn

from fsefs_nnunet.backbones.checkpoints import read_checkpoint
from fsefs_nnunet.backbones.decoder_tuning import refuse_untrained_decoder
from fsefs_nnunet.backbones.store import find_backbone
from fsefs_nnunet.bank_disk import BANK_FOLDER, cap_in_gb
from fsefs_nnunet.bank_layout import Layout, query_layout, support_layout
from fsefs_nnunet.crops import CropLoader
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.features import FeatureBank
from fsefs_nnunet.labels import foreground_names
from fsefs_nnunet.losses import SoftDiceLoss
from fsefs_nnunet.network import AdaptedNetwork
from fsefs_nnunet.queries import UnlabelledQueries
from fsefs_nnunet.schedules import WarmupCosineScheduler, at_plateau
from fsefs_nnunet.size_prior import SizePrior, estimate_size, label_volumes_ml, size_penalty
from fsefs_nnunet.splits import SPLITS_FILE, load_splits, query_cases, support_cases
from fsefs_nnunet.trainers.time_budget import StoppableTrainer, StopTraining
from fsefs_nnunet.transduction import QuerySizes
from fsefs_nnunet.views import augmented_view, view_name


class FSEFTTrainer(StoppableTrainer):
    """Trains reduction, adapter and head on crops of the feature bank: L_SEG(support) + lambda * L_TI(query).

    Wants a K-shot configuration of plans made by FSEFTPlanner; everything that it does is a key of these plans.
    """

    adapter: str | None = None  # None: what the plans say
    use_size_prior = True
    tunes_decoder = False  # an adapter sees the frozen decoder's features; a trained encoder alone gives it none
    initial_lr_of_method = 2e-3
    progress_png_every = 25  # epochs; drawing takes about a second

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict, device=torch.device("cuda")):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.settings = self.configuration_manager.configuration
        if "fseft_backbone" not in self.settings:
            raise InputError(
                f"{configuration!r} of plans {self.plans_manager.plans_name!r} is no K-shot configuration: make plans "
                "with `fseft plan_and_preprocess -d ID` and train one of 3d_fullres_1shot, _5shot, _10shot or _allshot."
            )
        if not self.tunes_decoder:
            refuse_untrained_decoder(find_backbone(self.settings["fseft_backbone"]))
        if self.is_ddp:
            raise InputError(f"{type(self).__name__} trains a small adapter on one device: leave -num_gpus at 1.")
        if any(argument.startswith("-pretrained") for argument in sys.argv):  # nnU-Net tells its trainers nothing of it
            raise InputError(
                f"{type(self).__name__} takes no -pretrained_weights: import the model as a backbone, `fseft backbones "
                "import ID PATH`, plan with it, `fseft plan_and_preprocess -d DATASET -b ID`, and train these plans."
            )
        self.num_epochs = 100
        self.num_iterations_per_epoch = self.settings["fseft_steps_per_epoch"]
        self.num_val_iterations_per_epoch = 1
        self.initial_lr = self.initial_lr_of_method
        self.weight_decay = 0.0
        self.enable_deep_supervision = False
        self.save_every = 1
        self.inference_allowed_mirroring_axes = None

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager,
        configuration_manager,
        num_input_channels,
        num_output_channels,
        enable_deep_supervision=False,
    ) -> nn.Module:
        kwargs = dict(configuration_manager.network_arch_init_kwargs)
        if cls.adapter is not None:
            kwargs["adapter"] = cls.adapter
        if kwargs["adapter"] == "linear_probe":
            kwargs["channels"] = None
        return AdaptedNetwork(num_input_channels, num_output_channels, **kwargs)

    def _do_i_compile(self):
        return False  # a few small convolutions on crops: compiling takes longer than training

    def set_deep_supervision_enabled(self, enabled: bool):
        pass

    def _build_loss(self):
        if self.settings["fseft_loss"] == "soft_dice":
            return SoftDiceLoss(self.label_manager.has_regions, self.label_manager.ignore_label)
        return super()._build_loss()

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.network.parameters(), self.initial_lr, weight_decay=self.weight_decay)
        return optimizer, WarmupCosineScheduler(optimizer, self.initial_lr, self.num_epochs)

    # ---- cases ----

    @property
    def classes(self) -> list[int | tuple[int, ...]]:
        """Labels or regions that get a size, in the order of the network's foreground outputs."""
        manager = self.label_manager
        return list(manager.foreground_regions if manager.has_regions else manager.foreground_labels)

    @property
    def class_names(self) -> list[str]:
        return foreground_names(self.dataset_json["labels"], self.label_manager.has_regions)

    def do_split(self) -> tuple[list[str], list[str]]:
        """Support cases, and the labelled queries that the final validation predicts; nothing else reads the latter."""
        splits = load_splits(Path(self.preprocessed_dataset_folder_base) / SPLITS_FILE)
        support = support_cases(splits, self.settings["fseft_shots"], self.fold)
        return support, query_cases(splits, self.fold)[0]

    def get_tr_and_val_datasets(self):
        raise NotImplementedError(f"{type(self).__name__} reads the feature bank, see get_dataloaders.")

    def load_image(self, case: str) -> np.ndarray:
        """Preprocessed image (channels, X, Y, Z) of a training case, a view of one, or an unlabelled query."""
        if case in self.unlabelled.cases:
            return self.unlabelled.load(case)
        if case in self.views:
            return self.load_view(case)
        return self.dataset_class(self.preprocessed_dataset_folder, [case]).load_case(case)[0][:]

    def load_segmentation(self, case: str) -> np.ndarray:
        """Label map (1, X, Y, Z) of a support case, or of a view that was loaded."""
        if case in self.views:
            return self.view_segmentations[case]
        return self.dataset_class(self.preprocessed_dataset_folder, [case]).load_case(case)[1][:]

    def load_view(self, name: str) -> np.ndarray:
        """Image of an augmented view, a function of the plans' seed; its label map stays for load_segmentation."""
        case, view = self.views[name]
        segmentation = self.load_segmentation(case)
        transforms = self.get_training_transforms(
            segmentation.shape[1:],
            self.rotation,
            None,
            None,
            self.dummy_2d,
            use_mask_for_norm=self.configuration_manager.use_mask_for_norm,
            foreground_labels=self.label_manager.foreground_labels,
        )
        seed = (self.settings["fseft_seed"], view, *case.encode())
        image, turned = augmented_view(transforms, self.load_image(case), segmentation, seed)
        self.view_segmentations[name] = turned.astype(segmentation.dtype)
        return image

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self):
        rotation, dummy_2d, initial_patch_size, _ = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        self.inference_allowed_mirroring_axes = None  # organs have sides
        return rotation, dummy_2d, initial_patch_size, None

    def get_dataloaders(self):
        regions = None
        if self.label_manager.has_regions:
            ignore = [self.label_manager.ignore_label] if self.label_manager.has_ignore_label else []
            regions = ConvertSegmentationToRegionsTransform([*self.label_manager.foreground_regions, *ignore])
        support, views = (
            {case: self.load_segmentation(case) for case in cases} for cases in (self.support, self.views)
        )
        fold = 2**16 if self.fold == "all" else self.fold

        def loader(stream: int, segmentations: dict[str, np.ndarray]) -> CropLoader:
            seed = (self.settings["fseft_seed"], fold, stream)
            return CropLoader(
                self.bank, segmentations, self.settings["fseft_crop_size"], self.batch_size, seed, regions
            )

        return loader(0, {**support, **views}), loader(1, support)

    # ---- before training ----

    def on_train_start(self):
        if not self.was_initialized:
            self.initialize()
        self.support, labelled_queries = self.do_split()
        self.unlabelled = UnlabelledQueries(self.preprocessed_dataset_folder)
        splits = load_splits(Path(self.preprocessed_dataset_folder_base) / SPLITS_FILE)
        # the labelled queries enter as images; their labels are not read
        self.queries = [*labelled_queries, *query_cases(splits, self.fold)[1]]
        self.print_to_log_file(
            f"{len(self.support)} labelled support cases (all the labels that this training uses): {self.support}; "
            f"{len(self.queries)} queries, {len(labelled_queries)} of them with labels for the final validation."
        )
        self.rotation, self.dummy_2d, _, _ = self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        self.view_segmentations: dict[str, np.ndarray] = {}
        self.views = {
            view_name(case, v): (case, v) for case in self.support for v in range(self.settings["fseft_views"])
        }
        self.fill_bank()
        self.estimate_priors()
        self.start_network()
        super().on_train_start()
        self.log_query_sizes("before this training")
        self.stop_at_plateau()

    def fill_bank(self) -> None:
        """Run the frozen backbone once over support and queries, unless an earlier training did."""
        self.bank = FeatureBank(
            Path(self.preprocessed_dataset_folder_base) / BANK_FOLDER,
            self.network.backbone,
            self.settings["architecture"]["arch_kwargs"]["stages"],
            self.configuration_manager.patch_size,
            self.device,
        )
        needed = [*self.support, *self.views, *(self.queries if self.use_size_prior else [])]
        cap_gb = cap_in_gb(self.settings.get("fseft_bank_gb"))
        self.bank.fill(needed, self.load_image, self.bank_layout, cap_gb, self.print_to_log_file)

    def bank_layout(self, case: str, shape: tuple[int, ...]) -> Layout:
        """What the bank keeps of a volume of `shape`; of a query it depends on the image alone."""
        if case not in self.support and case not in self.views:
            return query_layout(shape, self.settings["fseft_pool"])
        foreground = self.load_segmentation(case)[0] > 0
        window = self.configuration_manager.patch_size
        return support_layout(case, foreground, self.settings["fseft_crop_size"], window)

    def estimate_priors(self) -> None:
        """Size prior S of each class in ml, from the support labels alone."""
        sizes = [
            label_volumes_ml(seg[0], self.classes, self.configuration_manager.spacing)
            for seg in map(self.load_segmentation, self.support)
            # a case with ignored voxels does not show its organs whole
            if not self.label_manager.has_ignore_label or not (seg == self.label_manager.ignore_label).any()
        ]
        columns = np.array(sizes).T if sizes else [[]] * len(self.classes)
        self.priors: list[SizePrior | None] = [estimate_size(column) for column in columns]
        self.query_sizes = None
        if not self.use_size_prior or not self.queries or self.settings["fseft_lambda"] == 0 or not any(self.priors):
            why = (
                "it is switched off"
                if not self.use_size_prior or not self.settings["fseft_lambda"]
                else ("there are no queries" if not self.queries else "no support case shows a class whole")
            )
            self.print_to_log_file(f"The size prior has no effect: {why}.")
            return
        for name, prior in zip(self.class_names, self.priors):
            text = f"{prior.size:.2f} ml, spread {prior.spread:.2f} ml, {prior.num_cases} cases" if prior else "none"
            self.print_to_log_file(f"Size prior of {name}: {text}")
        voxel_ml = float(np.prod(self.configuration_manager.spacing)) / 1000
        self.query_sizes = QuerySizes(self.bank, self.queries, voxel_ml, self.device)
        known = [i for i, prior in enumerate(self.priors) if prior]
        self.known = torch.tensor(known, device=self.device)
        self.prior_ml = torch.tensor([self.priors[i].size for i in known], device=self.device)

    def start_network(self) -> None:
        """A fresh network takes the support features' statistics and the universal head's rows."""
        if self.network.is_fitted:
            return
        mean, std = self.bank.statistics(self.support)
        matches = self.network.fit(mean, std, self.dataset_json["labels"], self.label_manager.has_regions)
        contract = self.network.backbone.contract
        trained = sum(p.numel() for p in self.network.parameters())
        frozen = sum(p.numel() for p in self.network.backbone.module.parameters())
        self.print_to_log_file(f"Backbone {contract.id}, SHA-256 {contract.sha256}: {frozen} parameters, frozen.")
        self.print_to_log_file(
            f"{trained} parameters are trained. Head rows from the universal head: {matches or 'none'}."
        )

    # ---- training ----

    def on_train_epoch_start(self):
        super().on_train_epoch_start()
        self.dataloader_train.start_epoch(self.current_epoch)
        self.dataloader_val.start_epoch(0)  # the same crops each time, so that epochs can be compared

    def query_penalty(self) -> torch.Tensor | None:
        """Eq. (2) on the step's query, averaged over the classes; None while the warm-up lasts or without a prior."""
        if self.query_sizes is None or self.current_epoch < self.settings["fseft_prior_from_epoch"]:
            return None
        step = self.current_epoch * self.num_iterations_per_epoch + self.dataloader_train.step - 1
        query = self.query_sizes.rotating(step, self.settings["fseft_seed"])
        predicted = self.query_sizes.soft_sizes(self.network, query, self.label_manager.has_regions)
        return size_penalty(predicted[self.known], self.prior_ml, self.settings["fseft_gamma"]).mean()

    def train_step(self, batch: dict) -> dict:
        features = batch["data"].to(self.device, non_blocking=True)
        target = batch["target"].to(self.device, non_blocking=True)
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device.type, enabled=self.device.type == "cuda"):
            loss = self.loss(self.network.adapt(features), target)
            penalty = self.query_penalty()
        if penalty is not None:
            loss = loss + self.settings["fseft_lambda"] * penalty
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
        return {"loss": loss.detach().cpu().numpy()}

    def validation_step(self, batch: dict) -> dict:
        # nnU-Net's step, fed with stored features; the crops are the support's, query labels choose no checkpoint
        network, self.network = self.network, self.network.adapt
        try:
            return super().validation_step(batch)
        finally:
            self.network = network

    def on_epoch_end(self):
        last = self.current_epoch == self.num_epochs - 1
        if not last and (self.current_epoch + 1) % self.progress_png_every:
            self.logger.plot_progress_png = lambda output_folder: None
        try:
            super().on_epoch_end()
        finally:
            self.logger.__dict__.pop("plot_progress_png", None)
        self.stop_at_plateau()

    def stop_at_plateau(self) -> None:
        """End the training by the published rule, if the plans want it; the losses lie in every checkpoint."""
        if self.settings["fseft_stop_at_plateau"]:
            losses = [self.logger.get_value("train_losses", step=epoch) for epoch in range(self.current_epoch)]
            if at_plateau(losses):
                raise StopTraining("the training loss no longer falls")

    def on_train_end(self):
        self.log_query_sizes("after training")
        self.optimizer.state.clear()  # the final checkpoint holds the adapter alone
        super().on_train_end()

    def log_query_sizes(self, when: str) -> None:
        if self.query_sizes is None:
            return
        self.print_to_log_file(f"Predicted sizes of the queries in ml {when}:")
        with torch.no_grad():
            for query in self.queries:
                sizes = self.query_sizes.soft_sizes(self.network, query, self.label_manager.has_regions).tolist()
                parts = (
                    f"{name} {size:.2f} (S {prior.size:.2f})"
                    for name, size, prior in zip(self.class_names, sizes, self.priors)
                    if prior
                )
                self.print_to_log_file(f"  {query}: {', '.join(parts)}", add_timestamp=False)

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        if isinstance(filename_or_checkpoint, str):
            read_checkpoint(filename_or_checkpoint)  # a damaged file is refused with a remedy
        super().load_checkpoint(filename_or_checkpoint)

    def save_checkpoint(self, filename: str) -> None:
        part = f"{filename}.part"
        super().save_checkpoint(part)
        if os.path.exists(part):  # nnU-Net writes none when checkpointing is disabled
            os.replace(part, filename)

    def perform_actual_validation(self, save_probabilities: bool = False):
        if not self.do_split()[1]:
            self.print_to_log_file("No labelled queries: the final validation is skipped.")
            return
        super().perform_actual_validation(save_probabilities)
        self.print_to_log_file(f"Validation results: {join(self.output_folder, 'validation', 'summary.json')}")


class FSEFTTrainer_Adapter(FSEFTTrainer):
    """Spatial adapter and head without the size prior."""

    use_size_prior = False


class FSEFTTrainer_LinearProbe(FSEFTTrainer):
    """The head alone, on all of the backbone's features."""

    adapter = "linear_probe"
    use_size_prior = False
    initial_lr_of_method = 1e-2
