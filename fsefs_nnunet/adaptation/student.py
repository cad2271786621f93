"""`fseft student`: an ordinary training on a pile of unlabelled cases that an adapted model has labelled."""

from __future__ import annotations

from pathlib import Path

import torch

from fsefs_nnunet.adaptation.pseudo_labels import Teacher, choose_pile, write_student_dataset
from fsefs_nnunet.cases.folders import dataset_folders
from fsefs_nnunet.cases.preprocessed import require_cases
from fsefs_nnunet.cases.splits import SEED, SPLITS_FILE, load_splits
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.nnunet import planning
from fsefs_nnunet.nnunet.drawing import keep_splits


def make_student(
    teacher: Teacher,
    dataset_id: int,
    pile: Path | None,
    transductive: bool,
    sure: float,
    device: torch.device,
    num_processes: int,
) -> str:
    """Label the pile, write the student's dataset, plan and preprocess it; what is done is not done again.

    The only fold of the dataset lists the true cases first: `3d_fullres_<K>shot` is the student without a pile,
    `3d_fullres_allshot` the one with it.

    Returns:
        The dataset's name.

    Raises:
        InputError: as choose_pile and write_student_dataset do, and for a teacher that is no adapted model.
    """
    keys = teacher.keys
    if "fseft_backbone" not in keys:
        raise InputError(f"{teacher.folder} has no backbone: the teacher must be an adapted model.")
    chosen = choose_pile(teacher, pile, transductive)
    if chosen.transductive:
        print("Transductive: the pile shows queries or test cases.")
    name = write_student_dataset(teacher, chosen, dataset_id, sure, device).name
    cases = [*chosen.support, *chosen.unlabelled]
    splits = {"seed": SEED, "num_folds": 1, "queries": [], "unlabelled_queries": [], "folds": [cases]}
    if not _is_preprocessed(name, teacher.plans, splits):
        spacing = teacher.content["configurations"]["3d_fullres"]["spacing"]
        planning.plan(
            name,
            keys["fseft_backbone"],
            [len(chosen.support), "all"],
            num_processes,
            plans_name=teacher.plans,
            overwrite_target_spacing=[spacing[axis] for axis in teacher.content["transpose_backward"]],
            accept_positive_ct=True,  # the teacher's were accepted
            support=list(chosen.support),
            other_modality="z_scores_as_hu" in keys["architecture"]["arch_kwargs"],
        )
        planning.preprocess(name, teacher.plans, num_processes, {})
        keep_splits(name, splits, {})
    return name


def _is_preprocessed(name: str, plans: str, splits: dict) -> bool:
    preprocessed = dataset_folders(name)[2]
    try:
        require_cases(splits["folds"][0], preprocessed / f"{plans}_3d_fullres")
        return load_splits(preprocessed / SPLITS_FILE) == splits and (preprocessed / f"{plans}.json").exists()
    except InputError:
        return False
