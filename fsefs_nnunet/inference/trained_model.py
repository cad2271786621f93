"""A model folder of an adapter's training, read without executing anything that it carries."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from fsefs_nnunet.backbones.checkpoints import read_checkpoint
from fsefs_nnunet.cases.dataset_json import read_dataset_json
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.files import read_json
from fsefs_nnunet.labels import foreground_classes, foreground_names
from fsefs_nnunet.methods.network import AdaptedNetwork, build_network
from fsefs_nnunet.methods.registry import method_of_trainer
from fsefs_nnunet.methods.settings import Settings, is_k_shot
from fsefs_nnunet.priors import prior_named
from fsefs_nnunet.priors.prior import SupportLabels

# our keys: of the prior in a checkpoint's init_args, and of what `fseft remember` adds to the checkpoint itself
PRIOR_KEY, MEMORY_KEY = "fseft_prior", "fseft_support"


def require_backbone_of(file: str | Path, checkpoint: dict, configuration: dict) -> None:
    """Raises InputError if `checkpoint`, read from `file`, was trained on other weights than `configuration` names.

    configuration: of the current plans; a baseline's names no backbone.
    """
    if not is_k_shot(configuration):
        return
    init = checkpoint["init_args"]  # holds the plans of its training, even if the plans file has changed since
    then = PlansManager(init["plans"]).get_configuration(init["configuration"]).configuration
    trained_on, present = (s["architecture"]["arch_kwargs"].get("sha256") for s in (then, configuration))
    if trained_on != present:
        raise InputError(
            f"{file} was trained on backbone {then.get('fseft_backbone')!r} of SHA-256 {str(trained_on)[:12]}, but the "
            f"plans name {configuration['fseft_backbone']!r} of {str(present)[:12]}: restore plans and backbone, or "
            "train again without --c."
        )


class TrainedModel:
    """The folds of an adapter with their priors; they share one backbone.

    weights, priors: one per fold; weights are state_dicts.
    """

    def __init__(self, folder: Path, configuration: str, folds: Sequence[str], checkpoint: str, device: torch.device):
        """folder: `TRAINER__PLANS__CONFIGURATION` in nnUNet_results. Raises InputError naming what is missing."""
        self.folder, self.device, self.folds = Path(folder), device, list(folds)
        if not (self.folder / "plans.json").exists():
            raise InputError(f"{self.folder} does not contain a trained model: train it, or check -d, -tr, -p and -c.")
        self.files = [self.folder / f"fold_{fold}" / checkpoint for fold in self.folds]
        missing = [str(file) for file in self.files if not file.exists()]
        if missing:
            trained = sorted(f.parent.name[5:] for f in self.folder.glob(f"fold_*/{checkpoint}"))
            raise InputError(f"{missing[0]} is missing; trained folds: {' '.join(trained) or 'none'}. Choose with -f.")
        self.plans_manager = PlansManager(read_json(self.folder / "plans.json"))
        self.dataset_json = read_dataset_json(self.folder / "dataset.json")
        self.configuration = self.plans_manager.get_configuration(configuration)
        self.label_manager = self.plans_manager.get_label_manager(self.dataset_json)
        checkpoints = [read_checkpoint(file) for file in self.files]
        self.weights = [content["network_weights"] for content in checkpoints]
        for file, weights in zip(self.files, self.weights):
            if not all(torch.isfinite(tensor).all() for tensor in weights.values()):
                raise InputError(f"{file} holds weights that are NaN or infinite: its training diverged, train again.")
        inits = [content["init_args"] for content in checkpoints]
        for file, content in zip(self.files, checkpoints):
            if PRIOR_KEY in content:
                raise InputError(f"{file} was written by an earlier version: train again.")
        without = [file for file, init in zip(self.files, inits) if PRIOR_KEY not in init]
        keys = self.configuration.configuration
        if not is_k_shot(keys) or without:
            raise InputError(
                f"{(without or self.files)[0]} holds no adapter with priors: train one with FSEFTTrainer, or use "
                "nnUNetv2_predict."
            )
        self.settings = Settings.read(keys, configuration, str(self.folder / "plans"))
        for file, content in zip(self.files, checkpoints):
            require_backbone_of(file, content, keys)
        trainer = checkpoints[0]["trainer_name"]
        self.method = method_of_trainer(trainer)
        if self.method is None:
            raise InputError(f"{self.files[0]} was trained by {trainer}, not one of ours: use nnUNetv2_predict.")
        self.priors = [
            prior_named(kept["name"]).from_state(kept["state"]) for kept in (init[PRIOR_KEY] for init in inits)
        ]
        self.memories = [content.get(MEMORY_KEY) for content in checkpoints]
        channels = determine_num_input_channels(self.plans_manager, self.configuration, self.dataset_json)
        heads = self.label_manager.num_segmentation_heads
        self.network = build_network(self.method, self.configuration, channels, heads).to(device).eval()

    def network_of(self, index: int) -> AdaptedNetwork:
        """A network of its own with the weights of fold number `index`, on the backbone that all share."""
        network = deepcopy(self.network, {id(self.network.backbone): self.network.backbone})
        network.load_state_dict(self.weights[index])
        return network.eval()

    @property
    def class_names(self) -> list[str]:
        return foreground_names(self.dataset_json["labels"], self.label_manager.has_regions)

    @property
    def classes(self) -> list[int | tuple[int, ...]]:
        return foreground_classes(self.label_manager)

    def support_labels(self, segmentations: dict[str, np.ndarray]) -> SupportLabels:
        """segmentations: preprocessed label maps (1, X, Y, Z) by case."""
        return SupportLabels(segmentations, self.classes, self.configuration.spacing, self.label_manager.ignore_label)
