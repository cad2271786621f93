"""Training on stored features: crops of the feature bank instead of nnU-Net's patches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

from fsefs_nnunet.cases.pile import pile_cases
from fsefs_nnunet.cases.preprocessed import files_of, hash_of, load_case, require_labels
from fsefs_nnunet.cases.splits import fold_seed
from fsefs_nnunet.device import denormals_as_zero
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.features.bank import FeatureBank, Request
from fsefs_nnunet.features.crops import CropLoader, CropsAhead, region_transform
from fsefs_nnunet.features.disk import cap_in_gb, has_space
from fsefs_nnunet.features.layout import Layout, support_layout, whole_layout, whole_name
from fsefs_nnunet.features.map_crops import MapCrops
from fsefs_nnunet.features.views import SupportViews
from fsefs_nnunet.features.volume import VolumeFeatures
from fsefs_nnunet.inference.logits import logits_of
from fsefs_nnunet.methods.run_file import RunFile
from fsefs_nnunet.priors.objective import objective, support_loss
from fsefs_nnunet.trainers.adapted_trainer import AdaptedTrainer
from fsefs_nnunet.trainers.time_budget import TimeBudgetTrainer
from fsefs_nnunet.workers import Ahead


class BankTrainer(AdaptedTrainer, TimeBudgetTrainer):
    """Trains reduction, adapter and head on crops of the support and its augmented views.

    A time limit, see TimeBudgetTrainer, includes filling the bank.

    Needs a K-shot configuration of plans made by FSEFTPlanner; its keys and the method's row decide what is trained.
    """

    uses_all_of_budget = False

    # ---- cases ----

    def get_tr_and_val_datasets(self):
        raise NotImplementedError(f"{type(self).__name__} reads the feature bank, see get_dataloaders.")

    def load_case(self, case: str) -> tuple:
        """Image, label map and more of a preprocessed training case, as nnU-Net's dataset gives them."""
        return load_case(self.preprocessed_dataset_folder, case)

    def load_image(self, case: str) -> np.ndarray:
        """Preprocessed image (channels, X, Y, Z) of a training case."""
        return self.load_case(case)[0][:]

    def shape_of(self, case: str) -> tuple[int, ...]:
        """Of a preprocessed training case, (X, Y, Z)."""
        return tuple(self.load_case(case)[0].shape[1:])

    def content_of(self, case: str, with_labels: bool = False) -> str:
        """Hash of the image of a training case, and of its label map if `with_labels`."""
        image, labels = self.load_case(case)[:2]
        return hash_of(image[:], labels[:]) if with_labels else hash_of(image[:])

    def get_dataloaders(self):
        settings, ignored = self.settings, self.label_manager.ignore_label
        cases = [*self.run.support, *self.views.names]
        stays = self.device.type == "cuda" and self.keep_on_device(cases)
        place = self.device if stays else torch.device("cpu")
        regions = region_transform(self.label_manager, place)

        def loader(stream: int, cases: Iterable[str]) -> CropLoader:
            seed = (settings.seed, fold_seed(self.fold), stream)
            segmentations = {case: self.segmentations[case] for case in cases}
            return CropLoader(
                self.bank,
                segmentations,
                settings.crop_size,
                settings.crops_per_step,
                seed,
                regions,
                ignored,
                place,
            )

        crops = loader(0, cases)
        if (crops.crop_size < settings.crop_size).any():
            self.print_to_log_file(
                f"Crops have {crops.crop_size.tolist()} voxels, not {list(settings.crop_size)}: along each axis, the "
                "shortest support case limits them all."
            )
        if self.device.type == "cuda" and not stays:
            crops = CropsAhead(crops, self.num_iterations_per_epoch)
        return crops, loader(1, self.run.support)

    def keep_on_device(self, cases: list[str]) -> bool:
        """Move the features of `cases` to the GPU, if they and the label maps fit; returns whether they do."""
        gb = self.settings.gpu_gb
        room = math.inf if gb is None else gb * 1e9 - sum(self.segmentations[case].nbytes for case in cases)
        stays = self.bank.move_to_device(cases, room)
        self.print_to_log_file(
            "The stored features lie in the GPU's memory."
            if stays
            else f"The stored features take more than {gb:g} GB (fseft_gpu_gb in the plans): they are read ahead."
        )
        return stays

    # ---- before training ----

    def describe_run(self) -> RunFile:
        run = super().describe_run()
        run.budget_seconds, run.budget_clock = self.budget_seconds(), self.budget_clock()
        return run

    def prepare_training(self) -> None:
        self.start_clock()
        if self.method.channel_dropout:
            self.print_to_log_file(
                f"Each channel of a crop is left out with a probability of {self.method.channel_dropout}."
            )
        if pile_cases(self.preprocessed_dataset_folder_base) & set(self.run.support):
            raise InputError(
                f"{type(self).__name__} would treat a model's labels as true ones: train a student's dataset on "
                "patches, e.g. with FSEFTTrainer_FTLong, or its true cases alone."
            )
        self.segmentations = {case: self.load_case(case)[1][:] for case in self.run.support}
        require_labels(self.segmentations.items(), self.label_manager.ignore_label)
        self.views = self.support_views()
        self.fill_bank()
        super().prepare_training()

    def open_bank(self) -> FeatureBank:
        preprocessed = Path(self.preprocessed_dataset_folder_base)
        return FeatureBank.of_configuration(
            preprocessed, self.network.backbone, self.configuration_manager, self.device
        )

    def fill_bank(self) -> None:
        """Run the frozen backbone over the volumes that the training needs and the bank lacks."""
        self.bank = self.open_bank()
        self.clock.lap(self.run, "start")
        requests = self.requests()
        missing = {request.case for request in self.bank.missing(requests)}
        views = [view for view in self.views.names if view in missing]
        # nnU-Net's number of processes for augmentation
        with Ahead(self.views.make, views, get_allowed_n_proc_DA()) as self.made_views:
            self.bank.fill(requests, cap_in_gb(self.settings.bank_gb), self.print_to_log_file, self.leaves_out)
        self.segmentations |= {view: self.bank[view].labels for view in self.views.names}
        self.clock.lap(self.run, "feature bank")
        self.run.windows += self.bank.windows
        self.bank.windows = 0
        self.run.feature_precisions = self.bank.precisions
        self.print_to_log_file(
            f"The backbone ran over {self.run.windows} windows for this training; stored features were computed in "
            f"{' and '.join(self.run.feature_precisions)}."
        )

    def leaves_out(self, case: str) -> bool:
        """Whether the bank may do without a volume that is missing."""
        return False

    def requests(self) -> list[Request]:
        """The volumes whose features are needed."""
        return [
            *(self.request(case, self.kept_of(case), statistics=True) for case in self.run.support),
            *(self.request_of_view(view) for view in self.views.names),
        ]

    def request(self, case: str, layout: Layout, name: str | None = None, statistics: bool = False) -> Request:
        """A preprocessed training case, which the bank keeps under `name`, by default the case's."""
        image_files, _ = files_of(self.preprocessed_dataset_folder, case)
        content, image = partial(self.content_of, case), partial(self.load_image, case)
        return Request(name or case, image_files, content, image, layout, statistics=statistics)

    def request_of_view(self, view: str) -> Request:
        made: dict[str, np.ndarray] = {}
        cases = list(filter(None, (self.views.names[view][0], self.views.other_case(view))))

        def image() -> np.ndarray:
            made["image"], made["labels"] = self.made_views.take(view)
            return made["image"]

        def content() -> str:
            return " ".join(self.content_of(case, with_labels=True) for case in cases)

        folder = self.preprocessed_dataset_folder
        return Request(
            view,
            [file for case in cases for files in files_of(folder, case) for file in files],
            content,
            image,
            whole_layout(self.views.window_in(self.segmentations[cases[0]].shape[1:])),
            self.views.describe(view),
            lambda: made["labels"],
        )

    def kept_of(self, case: str) -> Layout:
        """What the bank keeps of a support case."""
        labels, ignored = self.segmentations[case][0], self.label_manager.ignore_label
        return support_layout(case, labels, self.settings.crop_size, self.configuration_manager.patch_size, ignored)

    def support_views(self) -> SupportViews:
        """Views of the support cases by nnU-Net's augmentation.

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

        transforms_of = partial(
            self.get_training_transforms,
            rotation_for_DA=rotation,
            deep_supervision_scales=None,
            mirror_axes=None,
            do_dummy_2d_data_aug=dummy_2d,
            use_mask_for_norm=self.configuration_manager.use_mask_for_norm,
            foreground_labels=foreground,
        )
        return SupportViews(
            self.run.support,
            views,
            load_case=partial(load_case, self.preprocessed_dataset_folder),
            transforms_of=transforms_of,
            labels=foreground,
            ignore_label=self.label_manager.ignore_label,
            window=window,
            initial_patch=initial_patch,
            seed=self.settings.seed,
            cutmix=self.settings.cutmix,
        )

    def start_network(self) -> None:
        if not self.network.is_fitted:
            self.fit_network(*self.bank.statistics(self.run.support))

    # ---- training ----

    def on_train_epoch_start(self):
        super().on_train_epoch_start()
        self.bank.forget_pages()
        self.dataloader_train.start_epoch(self.current_epoch)
        self.dataloader_val.start_epoch(0)  # the same crops each time, so that epochs can be compared

    def penalty(self) -> torch.Tensor | None:
        """L_TI of the step; None without a prior."""
        return None

    @property
    def training_step(self) -> int:
        """Number of the current step in the whole training."""
        return self.current_epoch * self.num_iterations_per_epoch + self.dataloader_train.step - 1

    def kept_channels(self, features: MapCrops) -> torch.Tensor | None:
        """Channels (B, C) of the crops that the step keeps; a function of the step, so that `--c` draws the same."""
        if not self.method.channel_dropout:
            return None
        rng = np.random.default_rng((self.settings.seed, fold_seed(self.fold), self.training_step))
        kept = torch.from_numpy(rng.random(features.shape[:2]) >= self.method.channel_dropout)
        return kept.to(features.device, non_blocking=True)

    def train_step(self, batch: dict) -> dict:
        features = batch["data"].to(self.device, non_blocking=True)
        target = batch["target"].to(self.device, non_blocking=True)
        self.optimizer.zero_grad(set_to_none=True)
        segmentation_loss = support_loss(self.network, features, target, self.loss, self.kept_channels(features))
        loss = objective(segmentation_loss, self.penalty(), self.settings.lambda_)
        if self.grad_scaler is not None:
            self.grad_scaler.scale(loss).backward()
            self.grad_scaler.unscale_(self.optimizer)
        else:
            with denormals_as_zero():
                loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 12)
        if self.grad_scaler is not None:
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
        else:
            self.optimizer.step()
        # without the penalty, which starts late: a training must not seem to end, or to get worse, when it does
        return {"loss": segmentation_loss.detach()}

    def on_train_epoch_end(self, train_outputs: list[dict]):
        # fetched together: a GPU would wait after each step
        losses = torch.stack([output["loss"] for output in train_outputs]).cpu().numpy()
        super().on_train_epoch_end([{"loss": loss} for loss in losses])

    def validation_step(self, batch: dict) -> dict:
        # nnU-Net's step, fed with stored features; the crops are the support's, query labels choose no checkpoint
        network, self.network = self.network, self.network.adapt
        try:
            return super().validation_step(batch)
        finally:
            self.network = network

    def on_train_end(self):
        super().on_train_end()
        if isinstance(self.dataloader_train, CropsAhead):
            self.dataloader_train.close()

    # ---- final validation ----

    def whole_queries(self, others: Sequence[Request] = ()) -> list[Request]:
        """The labelled queries, for the final validations of all folds and methods; none if the bank lacks the room.

        others: requests that take room, too.
        """
        requests = [
            self.request(case, whole_layout(self.shape_of(case)), whole_name(case)) for case in self.do_split()[1]
        ]
        cap = cap_in_gb(self.settings.bank_gb)
        return requests if has_space(self.bank.root, self.bank.missing_bytes([*others, *requests]), cap) else []

    def validate_queries(self, save_probabilities: bool) -> None:
        if not hasattr(self, "bank"):  # with `--val` there was no training
            self.bank = self.open_bank()
        requests = self.whole_queries()
        self.bank.fill(requests, cap_in_gb(self.settings.bank_gb), self.print_to_log_file)
        self.stored_queries = {request.case for request in requests}
        self.validation_windows += self.bank.windows
        super().validate_queries(save_probabilities)

    def query_logits(self, case: str, image: np.ndarray) -> torch.Tensor:
        if whole_name(case) not in self.stored_queries:
            return super().query_logits(case, image)
        return logits_of(self.network, VolumeFeatures.stored(self.bank[whole_name(case)], self.device))
