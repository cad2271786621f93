"""What all trainers of an AdaptedNetwork share: construction, loss, optimiser, schedule, stopping rule, validation."""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from torch import nn
from tqdm import tqdm

from fsefs_nnunet.backbones.store import find_backbone
from fsefs_nnunet.backbones.untrained_decoder import refuse_untrained_decoder
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.inference.logits import logits_in_one_look
from fsefs_nnunet.losses.segmentation import segmentation_loss
from fsefs_nnunet.methods.network import build_network, trains_decoder
from fsefs_nnunet.methods.registry import Method
from fsefs_nnunet.methods.run_file import VALIDATION, RunFile
from fsefs_nnunet.methods.schedules import DecoderFirstScheduler, WarmupCosineScheduler, at_plateau
from fsefs_nnunet.methods.settings import Settings, is_k_shot
from fsefs_nnunet.trainers.kshot_trainer import KShotTrainer
from fsefs_nnunet.trainers.time_budget import StoppableTrainer, StopTraining

TUNED = "backbone.tuned."  # prefix of the names of the parameters that are trained in a backbone


class AdaptedTrainer(KShotTrainer, StoppableTrainer):
    """Trains an AdaptedNetwork with AdamW and the published schedule, in a K-shot configuration of FSEFTPlanner's.

    method: a subclass's row of the registry, which says what is trained and how.
    """

    method: Method

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict, device=torch.device("cuda")):
        self.refuse_several_gpus()
        super().__init__(plans, configuration, fold, dataset_json, device)
        keys = self.configuration_manager.configuration
        if not is_k_shot(keys):
            raise InputError(
                f"{configuration!r} of plans {self.plans_manager.plans_name!r} is not a K-shot configuration: make "
                "plans with `fseft plan_and_preprocess -d ID` and train one of 3d_fullres_1shot, _5shot, _10shot or "
                "_allshot."
            )
        self.settings = Settings.read(keys, configuration, self.plans_manager.plans_name)
        if not trains_decoder(self.method):
            refuse_untrained_decoder(find_backbone(self.settings.backbone))
        if any(argument.startswith("-pretrained") for argument in sys.argv):  # nnU-Net does not pass it to its trainers
            raise InputError(
                f"{type(self).__name__} does not support -pretrained_weights: import the model as a backbone, `fseft "
                "backbones import ID PATH`, plan with it, `fseft plan_and_preprocess -d DATASET -b ID`, and train "
                "these plans."
            )
        self.num_epochs = self.settings.epochs or self.method.epochs
        self.num_iterations_per_epoch = self.settings.steps_per_epoch
        self.num_val_iterations_per_epoch = 1
        self.initial_lr = self.method.rate
        self.weight_decay = self.method.weight_decay
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
        return build_network(cls.method, configuration_manager, num_input_channels, num_output_channels)

    def _do_i_compile(self):
        return False  # compiling takes longer than a few hundred steps

    def set_deep_supervision_enabled(self, enabled: bool):
        pass

    def _build_loss(self):
        return segmentation_loss(self.settings.loss, self.label_manager, self.configuration_manager.batch_dice)

    def configure_optimizers(self):
        # the fused optimiser skips a step with overflowing gradients without waiting for the GPU
        fused = self.device.type == "cuda" or None
        groups = self.parameter_groups() if self.method.warmup else self.network.parameters()
        optimizer = torch.optim.AdamW(groups, self.initial_lr, weight_decay=self.weight_decay, fused=fused)
        if self.method.warmup:
            return optimizer, DecoderFirstScheduler(optimizer, self.initial_lr, self.num_epochs, self.method.warmup)
        return optimizer, WarmupCosineScheduler(optimizer, self.initial_lr, self.num_epochs)

    def parameter_groups(self) -> list[dict]:
        """Of the optimiser: `late` are parameters of the backbone that lie before its decoder."""
        decoder = {f"{TUNED}{name}" for name in self.network.backbone.module.tuned_parameters("decoder")}
        groups = {True: [], False: []}
        for name, parameter in self.network.named_parameters():
            groups[name.startswith(TUNED) and name not in decoder].append(parameter)
        return [{"params": groups[late], "late": late} for late in (False, True) if groups[late]]

    def fit_network(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """A fresh network takes the features' statistics (C,) and the universal head's rows."""
        matches = self.network.fit(mean, std, self.dataset_json["labels"], self.label_manager.has_regions)
        self.run.head_rows = matches
        if known := self.network.known_but_fresh(self.dataset_json["labels"], self.label_manager.has_regions):
            self.print_to_log_file(
                f"The backbone's own head knows {', '.join(known)}, but has more than one layer: these labels start "
                "from fresh weights."
            )
        contract, backbone = self.network.backbone.contract, self.run.backbone
        self.print_to_log_file(
            f"Backbone {contract.id}, SHA-256 {contract.sha256}: {backbone['frozen_parameters']} parameters, frozen."
        )
        self.print_to_log_file(
            f"{self.run.trained_parameters} parameters are trained. Head rows from the universal head: "
            f"{matches or 'none'}."
        )

    def prepare_training(self) -> None:
        super().prepare_training()
        self.start_network()

    def start_network(self) -> None:
        """A fresh network takes the statistics of its features and the universal head's rows."""
        raise NotImplementedError

    def describe_run(self) -> RunFile:
        run, backbone = super().describe_run(), self.network.backbone
        frozen = sum(p.numel() for p in backbone.module.parameters() if not p.requires_grad)
        run.backbone = {"id": backbone.contract.id, "sha256": backbone.contract.sha256, "frozen_parameters": frozen}
        return run

    def on_epoch_end(self):
        self.refuse_divergence()
        super().on_epoch_end()
        self.stop_at_plateau()

    def refuse_divergence(self) -> None:
        """Raises InputError if a weight is NaN or infinite; the last checkpoint is kept."""
        if not torch.stack([parameter.isfinite().all() for parameter in self.network.parameters()]).all():
            raise InputError(
                f"The training diverged: in epoch {self.current_epoch} a weight became NaN or infinite. Check images "
                "and labels of the support, or set fseft_lambda to 0 in the plans, and train again."
            )

    def stop_at_plateau(self) -> None:
        """End the training by the published rule, if the plans request it; every checkpoint holds the losses."""
        if self.settings.stop_at_plateau:
            losses = [self.logger.get_value("train_losses", step=epoch) for epoch in range(self.current_epoch)]
            if at_plateau(losses):
                raise StopTraining("the training loss no longer falls")

    # ---- validation ----

    def query_logits(self, case: str, image: np.ndarray) -> torch.Tensor:
        """Logits (outputs, X, Y, Z) of a labelled query, whose preprocessed image is (channels, X, Y, Z)."""
        window = self.configuration_manager.patch_size
        logits, windows = logits_in_one_look(self.network, image, window, self.device)
        self.validation_windows += windows
        return logits

    def validate_queries(self, save_probabilities: bool) -> None:
        """As nnU-Net's, but on windows that start at multiples of the maps' strides, and without worker processes."""
        self.network.eval()
        folder = Path(self.output_folder, VALIDATION)
        folder.mkdir(parents=True, exist_ok=True)
        dataset = self.dataset_class(self.preprocessed_dataset_folder, self.do_split()[1])
        for case in tqdm(dataset.identifiers, desc="final validation"):
            image, _, _, properties = dataset.load_case(case)
            export_prediction_from_logits(
                self.query_logits(case, image[:]),
                properties,
                self.configuration_manager,
                self.plans_manager,
                self.dataset_json,
                str(folder / case),
                save_probabilities,
                torch.get_num_threads(),
            )
        manager = self.label_manager
        metrics = compute_metrics_on_folder(
            str(Path(self.preprocessed_dataset_folder_base, "gt_segmentations")),
            str(folder),
            str(folder / "summary.json"),
            self.plans_manager.image_reader_writer_class(),
            self.dataset_json["file_ending"],
            manager.foreground_regions if manager.has_regions else manager.foreground_labels,
            manager.ignore_label,
            chill=True,
        )
        for label, of_label in metrics["mean"].items():
            self.logger.log_summary(f"final_val/class_{label}_dice", of_label["Dice"])
        dice = metrics["foreground_mean"]["Dice"]
        self.logger.log_summary("final_val/foreground_dice", dice)
        self.print_to_log_file("Validation complete", also_print_to_console=True)
        self.print_to_log_file("Mean Validation Dice: ", dice, also_print_to_console=True)

    def on_train_end(self):
        self.optimizer.state.clear()  # the final checkpoint holds the trained weights alone
        super().on_train_end()
