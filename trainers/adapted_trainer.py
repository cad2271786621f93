"""What every trainer of an AdaptedNetwork shares: its construction, loss, optimiser, schedule and stopping rule."""

from __future__ import annotations

import multiprocessing
import sys

import torch
import torch.distributed as dist
from torch import nn

from fsefs_nnunet.backbones.decoder_tuning import refuse_untrained_decoder
from fsefs_nnunet.backbones.store import find_backbone
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.losses.soft_dice import SoftDiceLoss
from fsefs_nnunet.methods.network import AdaptedNetwork
from fsefs_nnunet.methods.schedules import WarmupCosineScheduler, at_plateau
from fsefs_nnunet.methods.settings import check_plan_keys
from fsefs_nnunet.trainers.kshot_trainer import KShotTrainer
from fsefs_nnunet.trainers.time_budget import StoppableTrainer, StopTraining


class AdaptedTrainer(KShotTrainer, StoppableTrainer):
    """Trains an AdaptedNetwork with AdamW and the published schedule, in a K-shot configuration of FSEFTPlanner's.

    A method is a subclass that says what is trained and how: the attributes below.
    """

    adapter: str | None = None  # None: what the plans say
    stages: str | None = None  # the same
    tuned = "none"  # the part of the backbone that is trained, too
    initial_lr_of_method = 1e-4
    weight_decay_of_method = 0.0
    epochs_of_method = 100
    progress_png_every = 25  # epochs; drawing takes about a second

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict, device=torch.device("cuda")):
        self.refuse_several_gpus()
        super().__init__(plans, configuration, fold, dataset_json, device)
        if "fseft_backbone" not in self.settings:
            raise InputError(
                f"{configuration!r} of plans {self.plans_manager.plans_name!r} is no K-shot configuration: make plans "
                "with `fseft plan_and_preprocess -d ID` and train one of 3d_fullres_1shot, _5shot, _10shot or _allshot."
            )
        if self.tuned not in ("decoder", "all"):
            refuse_untrained_decoder(find_backbone(self.settings["fseft_backbone"]))
        check_plan_keys(self.settings, configuration, self.plans_manager.plans_name)
        if any(argument.startswith("-pretrained") for argument in sys.argv):  # nnU-Net tells its trainers nothing of it
            raise InputError(
                f"{type(self).__name__} takes no -pretrained_weights: import the model as a backbone, `fseft backbones "
                "import ID PATH`, plan with it, `fseft plan_and_preprocess -d DATASET -b ID`, and train these plans."
            )
        self.num_epochs = self.epochs_of_method
        self.num_iterations_per_epoch = self.settings["fseft_steps_per_epoch"]
        self.num_val_iterations_per_epoch = 1
        self.initial_lr = self.initial_lr_of_method
        self.weight_decay = self.weight_decay_of_method
        self.enable_deep_supervision = False
        self.save_every = 1
        self.inference_allowed_mirroring_axes = None

    def refuse_several_gpus(self) -> None:
        if dist.is_available() and dist.is_initialized():
            if multiprocessing.parent_process() is not None:
                # nnU-Net's -num_gpus spawns this process and repeats its traceback: without its frames the sentence is
                # what the user's screen ends with
                sys.tracebacklimit = 0
            raise InputError(f"{type(self).__name__} trains on one device: leave -num_gpus at 1.")

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
        kwargs.update({key: value for key in ("adapter", "stages") if (value := getattr(cls, key)) is not None})
        if kwargs["adapter"] == "linear_probe":
            kwargs["channels"] = None
        return AdaptedNetwork(num_input_channels, num_output_channels, **kwargs, tuned=cls.tuned)

    def _do_i_compile(self):
        return False  # compiling takes longer than a few hundred steps

    def set_deep_supervision_enabled(self, enabled: bool):
        pass

    def _build_loss(self):
        if self.settings["fseft_loss"] == "soft_dice":
            return SoftDiceLoss(self.label_manager.has_regions, self.label_manager.ignore_label)
        return super()._build_loss()

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.network.parameters(), self.initial_lr, weight_decay=self.weight_decay)
        return optimizer, WarmupCosineScheduler(optimizer, self.initial_lr, self.num_epochs)

    def fit_network(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """A fresh network takes the features' statistics (C,) and the universal head's rows."""
        matches = self.network.fit(mean, std, self.dataset_json["labels"], self.label_manager.has_regions)
        contract = self.network.backbone.contract
        trained = sum(p.numel() for p in self.network.parameters())
        frozen = sum(p.numel() for p in self.network.backbone.module.parameters() if not p.requires_grad)
        self.print_to_log_file(f"Backbone {contract.id}, SHA-256 {contract.sha256}: {frozen} parameters, frozen.")
        self.print_to_log_file(
            f"{trained} parameters are trained. Head rows from the universal head: {matches or 'none'}."
        )

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
        self.optimizer.state.clear()  # the final checkpoint holds the trained weights alone
        super().on_train_end()
