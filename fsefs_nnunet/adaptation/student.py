"""`fseft student`: an ordinary training on a pile of unlabelled cases that an adapted model has labelled."""

from __future__ import annotations

import gc
from pathlib import Path

import torch

from fsefs_nnunet.adaptation.pile import choose_pile
from fsefs_nnunet.adaptation.pseudo_labels import write_student_dataset
from fsefs_nnunet.adaptation.teacher import Teacher
from fsefs_nnunet.cases.folders import dataset_folders, made_folder
from fsefs_nnunet.cases.pile import keep_pile, pile_cases
from fsefs_nnunet.cases.splits import SEED, SPLITS_FILE, load_splits
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.methods.registry import BANK, method_of_trainer, require_trainer
from fsefs_nnunet.nnunet import planning
from fsefs_nnunet.nnunet.drawing import keep_splits
from fsefs_nnunet.nnunet.experiment import lacks_cases


def require_student(trainer: str) -> None:
    """Raises InputError for a trainer that is not ours, or that would treat a model's labels as true ones."""
    require_trainer(trainer)
    if method_of_trainer(trainer).learns_from == BANK:
        raise InputError(
            f"--student {trainer} trains on stored features: choose a trainer that learns from patches, "
            "FSEFTTrainer_FTLong for example."
        )


def make_student(
    teacher: Teacher,
    dataset_id: int,
    pile: Path | None,
    transductive: bool,
    least_probability: float,
    device: torch.device,
    num_processes: int,
) -> str:
    """Label the pile, write the student's dataset, plan and preprocess it; completed steps are skipped.

    The only fold of the dataset lists the true cases first: `3d_fullres_<K>shot` is the student without a pile,
    `3d_fullres_allshot` the one with it.

    Returns:
        The dataset's name.

    Raises:
        InputError: as choose_pile and write_student_dataset do, and for a teacher that is not an adapted model.
    """
    keys = teacher.keys
    if "fseft_backbone" not in keys:
        raise InputError(f"{teacher.folder} was not trained on a backbone: the teacher must be an adapted model.")
    chosen = choose_pile(teacher, pile, transductive)
    if chosen.transductive:
        print("Transductive: the pile shows queries or test cases.")
    name = write_student_dataset(teacher, chosen, dataset_id, least_probability, device).name
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the student trains in another process
    cases = [*chosen.support, *chosen.unlabelled]
    if not _is_prepared(name, teacher.plans, cases):
        plans = teacher.plans_manager
        spacing = plans.get_configuration("3d_fullres").spacing
        planning.plan(
            name,
            keys["fseft_backbone"],
            [len(chosen.support), "all"],
            num_processes,
            plans_name=teacher.plans,
            overwrite_target_spacing=[spacing[axis] for axis in plans.transpose_backward],
            accept_positive_ct=True,  # the teacher's were accepted
            support=list(chosen.support),
            other_modality="z_scores_as_hu" in keys["architecture"]["arch_kwargs"],
        )
        planning.preprocess(name, teacher.plans, num_processes, {})
        keep_pile(made_folder(dataset_folders(name)[2]), list(chosen.unlabelled))
        splits = {"seed": SEED, "num_folds": 1, "queries": [], "unlabelled_queries": [], "folds": [cases]}
        keep_splits(name, splits, {})
    return name


def _is_prepared(name: str, plans: str, cases: list[str]) -> bool:
    preprocessed = dataset_folders(name)[2]
    try:
        prepared = load_splits(preprocessed / SPLITS_FILE)["folds"][0] == cases and pile_cases(preprocessed)
    except InputError:
        return False
    return bool(prepared) and not lacks_cases(preprocessed, plans)
