"""The K-shot folds of a dataset: which labelled cases become support and queries, and what is kept of earlier draws."""

from __future__ import annotations

import json
from pathlib import Path

from fsefs_nnunet.cases.dataset_json import read_dataset_json
from fsefs_nnunet.cases.folders import dataset_folders, labelled_cases, made_folder
from fsefs_nnunet.cases.images import is_leftover, list_images
from fsefs_nnunet.cases.splits import (
    NUM_FOLDS,
    NUM_QUERIES,
    SEED,
    SPLITS_FILE,
    extended,
    fitting_shots,
    load_splits,
    make_splits,
    save_splits,
)
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.files import read_json, refused_if_unwritable, write_atomically

QUERY_FILES = "unlabelled_queries.json"  # next to the splits: the images of each unlabelled query


def query_images(raw: Path, folder: str | None, labelled_queries: bool) -> dict[str, list[str]]:
    """Unlabelled query images: of `folder`, else of imagesTs if no labelled case is left to be a query."""
    dataset_json = read_dataset_json(raw / "dataset.json")
    if folder is None:
        if labelled_queries or all(is_leftover(file.name) for file in (raw / "imagesTs").glob("*")):
            return {}
        folder = str(raw / "imagesTs")
        print(f"No labelled case is left over: the images of {folder} are the queries.")
    images = list_images(Path(folder), dataset_json).require_sound()
    clash = sorted(set(images) & set(labelled_cases(raw, dataset_json)))
    if clash:
        raise InputError(f"{folder} has cases of imagesTr, e.g. {clash[0]}: give other images, or rename them.")
    return images


def draw_splits(
    dataset_id: int | str,
    shots: list[int | str],
    queries: str | None,
    num_queries: int | None = None,
    num_folds: int | None = None,
    seed: int | None = None,
) -> tuple[dict, dict[str, list[str]]]:
    """The K-shot folds, and the files of the unlabelled queries by case; nothing is written.

    Earlier draws are kept as far as they fit, since results of trainings belong to them. They are replaced for other
    labelled cases, for more shots than their pool has cases, and if `num_queries` or `seed` are given.
    """
    _, raw, preprocessed = dataset_folders(dataset_id)
    labelled = labelled_cases(raw, read_dataset_json(raw / "dataset.json"))
    wanted = fitting_shots(shots, len(labelled))
    numbers = [k for k in wanted if k != "all"]
    earlier = _earlier_splits(preprocessed / SPLITS_FILE, labelled)
    if earlier and num_queries is None and seed is None and max(numbers, default=1) <= len(earlier["folds"][0]):
        images = query_images(raw, queries, bool(earlier["queries"]))
        unlabelled = list(images) or earlier["unlabelled_queries"]
        images = images or _files_of_before(preprocessed, unlabelled)
        num_folds = earlier["num_folds"] if num_folds is None else num_folds
        return extended(earlier, num_folds, unlabelled), images
    if "all" in wanted:
        numbers.append(-(-len(labelled) // 2))  # "all" leaves out the queries, at most half of the cases
    num_queries = NUM_QUERIES if num_queries is None else num_queries
    images = query_images(raw, queries, len(labelled) > max(numbers) and num_queries > 0)
    num_folds, seed = NUM_FOLDS if num_folds is None else num_folds, SEED if seed is None else seed
    return make_splits(labelled, list(images), numbers, num_queries, num_folds, seed), images


def _earlier_splits(file: Path, labelled: list[str]) -> dict | None:
    """What was drawn from these labelled cases, if there is such a file."""
    try:
        splits = load_splits(file)
    except InputError:  # missing or damaged: there is nothing to keep
        return None
    return splits if sorted([*splits["folds"][0], *splits["queries"]]) == sorted(labelled) else None


def _files_of_before(preprocessed: Path, cases: list[str]) -> dict[str, list[str]]:
    """The images of unlabelled queries that an earlier call was given, if all of them still exist."""
    try:
        files = read_json(preprocessed / QUERY_FILES)
    except (FileNotFoundError, InputError):
        return {}
    there = all(case in files and all(Path(file).exists() for file in files[case]) for case in cases)
    return {case: files[case] for case in cases} if there else {}


def keep_splits(dataset_id: int | str, splits: dict, images: dict[str, list[str]]) -> None:
    """Write what draw_splits drew next to nnU-Net's own splits, which are not changed."""
    preprocessed = made_folder(dataset_folders(dataset_id)[2])
    file = preprocessed / SPLITS_FILE
    if file.exists() and not _same_draws(file, splits):
        print(f"{file} is replaced by other draws: results of earlier K-shot trainings no longer belong to it.")
    with refused_if_unwritable(preprocessed):
        save_splits(splits, file)
        if images:  # other plans need them preprocessed, too
            write_atomically(preprocessed / QUERY_FILES, json.dumps(images, indent=1))
    pool, queries, unlabelled = map(len, (splits["folds"][0], splits["queries"], splits["unlabelled_queries"]))
    print(
        f"{file}: {pool + queries} labelled cases; {queries} of them and {unlabelled} unlabelled ones are queries; "
        f"{splits['num_folds']} seeded draws of the support from the other {pool}."
    )


def _same_draws(file: Path, splits: dict) -> bool:
    """Whether folds that are in both, and the labelled queries, are the same."""
    try:
        earlier = load_splits(file)
    except InputError:
        return False
    both = zip(earlier["folds"], splits["folds"])
    return earlier["queries"] == splits["queries"] and all(then == now for then, now in both)


def write_splits(
    dataset_id: int | str,
    shots: list[int | str],
    queries: str | None,
    num_queries: int | None = None,
    num_folds: int | None = None,
    seed: int | None = None,
) -> dict[str, list[str]]:
    """Draw the K-shot folds and keep them; returns the files of the unlabelled queries by case."""
    splits, images = draw_splits(dataset_id, shots, queries, num_queries, num_folds, seed)
    keep_splits(dataset_id, splits, images)
    return images
