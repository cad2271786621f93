"""The support's features for prediction, from the model's checkpoint or from the feature bank."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from fsefs_nnunet.backbones.checkpoints import add_to_checkpoint
from fsefs_nnunet.cases.preprocessed import files_of, hash_of, require_cases
from fsefs_nnunet.cases.splits import SPLITS_FILE, fold_seed, load_splits, support_cases
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.features.bank import FeatureBank, Request
from fsefs_nnunet.features.crops import CropLoader, region_transform
from fsefs_nnunet.features.disk import cap_in_gb
from fsefs_nnunet.features.layout import support_layout
from fsefs_nnunet.inference.trained_model import MEMORY_KEY, TrainedModel
from fsefs_nnunet.priors.support_memory import CROP_SIZE, SupportMemory


def memories_of(model: TrainedModel) -> list[SupportMemory]:
    """The support memory of each fold: from its checkpoint, else drawn from the bank.

    Raises:
        InputError: if there is neither, or it does not belong to the model.
    """
    return [stored_memory(model, i) or memory_from_bank(model, i) for i in range(len(model.folds))]


def stored_memory(model: TrainedModel, index: int) -> SupportMemory | None:
    """What `remember` wrote into the checkpoint of the model's fold number `index`."""
    stored = model.memories[index]
    if stored is None:
        return None
    memory = SupportMemory.from_state(stored, str(model.files[index]))
    if memory.features.shape[1] != model.network.backbone.out_channels:
        raise InputError(
            f"The support features in {model.files[index]} have {memory.features.shape[1]} channels, but the backbone "
            f"gives {model.network.backbone.out_channels}: write them again with `fseft remember`."
        )
    return memory


def memory_from_bank(model: TrainedModel, index: int) -> SupportMemory:
    """Crops of the support cases that the fold was trained on; entries that the bank lacks are computed."""
    base = Path(str(nnUNet_preprocessed)) / model.plans_manager.dataset_name if nnUNet_preprocessed.is_set() else None
    folder = base / model.configuration.data_identifier if base else None
    if folder is None or not folder.exists():
        raise InputError(
            f"{model.files[index]} holds no support features, and the preprocessed dataset is not here: write them "
            "into it with `fseft remember` where it was trained, or predict with --inductive."
        )
    fold = model.folds[index]
    number = fold if fold == "all" else int(fold)
    cases = support_cases(load_splits(base / SPLITS_FILE), model.settings.shots, number)
    require_cases(cases, folder)
    dataset = infer_dataset_class(str(folder))(str(folder), cases)
    segmentations = {case: np.asarray(dataset.load_case(case)[1][:]) for case in cases}
    prior = model.priors[index]
    if not prior.agrees_with(type(prior).estimate(model.support_labels(segmentations))):
        raise InputError(
            f"The support cases of fold {fold} are not those that {model.files[index]} was trained on: train again, or "
            "restore splits_fseft.json and the labels, or predict with --inductive."
        )
    window, crop_size = model.configuration.patch_size, model.settings.crop_size
    ignored = model.label_manager.ignore_label
    bank = FeatureBank.of_configuration(base, model.network.backbone, model.configuration, model.device)

    def request(case: str) -> Request:
        labels = segmentations[case][0]
        layout = support_layout(case, labels, crop_size, window, ignored)

        def image() -> np.ndarray:
            return dataset.load_case(case)[0][:]

        def content() -> str:
            return hash_of(image())

        return Request(case, files_of(folder, case)[0], content, image, layout, statistics=True)

    bank.fill(map(request, cases), cap_in_gb(model.settings.bank_gb))
    seed = (model.settings.seed, fold_seed(fold), 2)
    size = np.minimum(crop_size, CROP_SIZE)
    regions = region_transform(model.label_manager)
    loader = CropLoader(bank, segmentations, size, len(cases), seed, regions, ignored)
    return SupportMemory.draw(loader)


def remember(model: TrainedModel) -> None:
    """Write the support's features into the model's checkpoints, so that it can adapt to queries anywhere."""
    for i, file in enumerate(model.files):
        memory = memory_from_bank(model, i)
        before = file.stat()
        add_to_checkpoint(file, **{MEMORY_KEY: memory.state()})
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # its weights are still those that were validated
        print(f"{file}: {len(memory.features)} crops of support features, {os.path.getsize(file) / 1e6:.1f} MB.")
