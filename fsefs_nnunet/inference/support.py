"""The support's features for a model that predicts: out of its checkpoint, or out of the feature bank."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from fsefs_nnunet.backbones.checkpoints import add_to_checkpoint
from fsefs_nnunet.cases.preprocessed import require_cases
from fsefs_nnunet.cases.splits import SPLITS_FILE, fold_seed, load_splits, support_cases
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.features.bank import FeatureBank
from fsefs_nnunet.features.crops import CropLoader, region_transform
from fsefs_nnunet.features.disk import BANK_FOLDER, cap_in_gb
from fsefs_nnunet.features.layout import Layout, support_layout
from fsefs_nnunet.inference.trained_model import MEMORY_KEY, TrainedModel
from fsefs_nnunet.priors.size import SizePrior, estimate_sizes, support_sizes_ml
from fsefs_nnunet.priors.support_memory import CROP_SIZE, SupportMemory


def memories_of(model: TrainedModel) -> list[SupportMemory]:
    """One for each fold: the checkpoint's own, else drawn from the bank.

    Raises:
        InputError: where there is neither, or what there is does not belong to the model.
    """
    return [stored_memory(model, i) or memory_from_bank(model, i) for i in range(len(model.folds))]


def stored_memory(model: TrainedModel, index: int) -> SupportMemory | None:
    """What `remember` wrote into the checkpoint of the model's fold number `index`."""
    stored = model.memories[index]
    if stored is None:
        return None
    memory = SupportMemory(**stored)
    if memory.features.shape[1] != model.network.backbone.out_channels:
        raise InputError(
            f"The support features in {model.files[index]} have {memory.features.shape[1]} channels, the backbone "
            f"gives {model.network.backbone.out_channels}: write them again with `fseft remember`."
        )
    return memory


def memory_from_bank(model: TrainedModel, index: int) -> SupportMemory:
    """Crops of the support cases that the fold was trained on; entries that the bank lacks are computed."""
    from nnunetv2.paths import nnUNet_preprocessed
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

    base = Path(str(nnUNet_preprocessed)) / model.plans_manager.dataset_name if nnUNet_preprocessed.is_set() else None
    folder = base / model.configuration.data_identifier if base else None
    if folder is None or not folder.exists():
        raise InputError(
            f"{model.files[index]} holds no support features, and the preprocessed dataset is not here: write them "
            "into it with `fseft remember` where it was trained, or predict with --inductive."
        )
    fold = model.folds[index]
    number = fold if fold == "all" else int(fold)
    cases = support_cases(load_splits(base / SPLITS_FILE), model.settings["fseft_shots"], number)
    require_cases(cases, folder)
    dataset = infer_dataset_class(str(folder))(str(folder), cases)
    segmentations = {case: np.asarray(dataset.load_case(case)[1][:]) for case in cases}
    _check_priors(model, index, segmentations)
    window, crop_size = model.configuration.patch_size, model.settings["fseft_crop_size"]

    def layout(case: str, shape: tuple[int, ...]) -> Layout:
        return support_layout(case, segmentations[case][0], crop_size, window, model.label_manager.ignore_label)

    stages = model.settings["architecture"]["arch_kwargs"]["stages"]
    bank = FeatureBank(base / BANK_FOLDER, model.network.backbone, stages, window, model.device)
    cap_gb = cap_in_gb(model.settings.get("fseft_bank_gb"))
    bank.fill(cases, lambda case: dataset.load_case(case)[0][:], layout, cap_gb)
    seed = (model.settings["fseft_seed"], fold_seed(fold), 2)
    size = np.minimum(crop_size, CROP_SIZE)
    regions, ignored = region_transform(model.label_manager), model.label_manager.ignore_label
    loader = CropLoader(bank, segmentations, size, len(cases), seed, regions, ignored)
    return SupportMemory.draw(loader)


def _check_priors(model: TrainedModel, index: int, segmentations: dict[str, np.ndarray]) -> None:
    sizes = support_sizes_ml(
        segmentations, model.classes, model.configuration.spacing, model.label_manager.ignore_label
    )
    pairs = zip(estimate_sizes(sizes, len(model.classes)), model.priors[index], strict=True)
    if not all(_same_prior(now, then) for now, then in pairs):
        raise InputError(
            f"The support cases of fold {model.folds[index]} are not those that {model.files[index]} was trained on: "
            "train again, or restore splits_fseft.json and the labels, or predict with --inductive."
        )


def _same_prior(now: SizePrior | None, then: SizePrior | None) -> bool:
    """Up to the order in which the cases were added up."""
    if now is None or then is None:
        return now is then
    return now.num_cases == then.num_cases and np.isclose(now.size, then.size, 1e-6)


def remember(model: TrainedModel) -> None:
    """Write the support's features into the model's checkpoints, so that it can adapt to queries anywhere."""
    for i, file in enumerate(model.files):
        memory = memory_from_bank(model, i)
        add_to_checkpoint(file, **{MEMORY_KEY: memory.state()})
        print(f"{file}: {len(memory.features)} crops of support features, {os.path.getsize(file) / 1e6:.1f} MB.")
