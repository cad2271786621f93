"""Which unlabelled cases a teacher labels, and checks that it neither knows them nor is to be tested on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from tqdm import tqdm

from fsefs_nnunet.adaptation.teacher import Teacher
from fsefs_nnunet.cases.dataset_json import read_dataset_json
from fsefs_nnunet.cases.folders import dataset_folders, training_files
from fsefs_nnunet.cases.headers import read_header
from fsefs_nnunet.cases.images import is_constant, is_leftover, list_images, read_image
from fsefs_nnunet.cases.pile import pile_cases
from fsefs_nnunet.cases.preprocessed import hash_of
from fsefs_nnunet.cases.readers import REORIENTING, find_reader
from fsefs_nnunet.cases.soundness import check_all, require_one_scale
from fsefs_nnunet.cases.splits import SPLITS_FILE, load_splits, query_cases, support_cases
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.files import read_json
from fsefs_nnunet.methods.run_file import RunFile
from fsefs_nnunet.nnunet.drawing import QUERY_FILES


@dataclass(frozen=True)
class Pile:
    """The cases of a student's dataset, with their files.

    support: "images" and "label" by case; unlabelled: the images of each case of the pile.
    transductive: whether queries or test cases are among the latter.
    """

    support: dict[str, dict]
    unlabelled: dict[str, list[str]]
    transductive: bool = False


class Known(NamedTuple):
    """A case that a pile may not show; role: "support", or "query or test"."""

    role: str
    case: str
    files: list[str]


def choose_pile(teacher: Teacher, folder: Path | None, transductive: bool) -> Pile:
    """The pile: images of `folder` in nnU-Net's naming, or the labelled cases that are neither support nor queries.

    Raises:
        InputError: for an empty pile, and one that shows a support case, whatever its name; for one that shows a query
            or test case unless `transductive` says that this is meant; for a teacher of other splits, or of a student.
    """
    name, raw, preprocessed = dataset_folders(teacher.dataset)
    dataset_json = read_dataset_json(raw / "dataset.json")
    if pile_cases(preprocessed):
        raise InputError(f"{name} is a student's dataset: choose a teacher that was trained on true labels alone.")
    splits, labelled = load_splits(preprocessed / SPLITS_FILE), training_files(raw, dataset_json)
    support = support_cases(splits, teacher.keys["fseft_shots"], teacher.fold)
    if sorted(RunFile.load(teacher.checkpoint.parent).support) != sorted(support):
        raise InputError(
            f"{teacher.checkpoint.parent} was trained on support cases other than those in {SPLITS_FILE} now: train it "
            "again, or restore the splits with `fseft splits`."
        )
    if folder is None:
        pool = [] if teacher.fold == "all" else splits["folds"][teacher.fold]
        unlabelled = {case: labelled[case]["images"] for case in pool if case not in support}
        if not unlabelled:
            raise InputError(
                f"{name} has no labelled case besides the support and the queries of fold {teacher.fold}: give a "
                "folder of unlabelled images with --pile."
            )
    else:
        found = list_images(folder, dataset_json).require_sound()
        unlabelled = {f"pile_{case}": files for case, files in found.items()}
        if twice := sorted(unlabelled.keys() & set(support)):
            raise InputError(
                f"{twice[0]} names both a support case of {name} and a case of the pile: rename the pile's files."
            )
    known = [Known("support", case, labelled[case]["images"]) for case in support]
    known += known_queries(raw, preprocessed, dataset_json, splits, labelled, teacher.fold)
    check_images(unlabelled, teacher.reader, {case: labelled[case]["images"] for case in support})
    seen = same_images(known, unlabelled, dataset_json["file_ending"])
    for case, other in seen.items():
        if other.role == "support":
            raise InputError(
                f"{unlabelled[case][0]} is the support case {other.case}, whose label is known: remove it from the "
                "pile."
            )
        if not transductive:
            raise InputError(
                f"{unlabelled[case][0]} is the query or test case {other.case}: remove it from the pile, or add "
                "--transductive if the student may see what it is to segment."
            )
    return Pile({case: labelled[case] for case in support}, unlabelled, bool(seen))


def check_images(pile: dict[str, list[str]], reader: BaseReaderWriter, support: dict[str, list[str]]) -> None:
    """Read every image before the first one is labelled, which takes much longer.

    Raises:
        InputError: for images that planning would refuse after all of them are labelled.
    """

    def check(case: str) -> None:
        if is_constant(read_image(reader, pile[case])[0]):
            raise InputError(f"{pile[case][0]} is constant: repair it, or leave the case out.")

    check_all(check, pile, 1, "checking the pile")
    require_one_scale({case: read_header(files[0]) for case, files in {**support, **pile}.items()})


def known_queries(
    raw: Path, preprocessed: Path, dataset_json: dict, splits: dict, labelled: dict[str, dict], fold: int | str
) -> list[Known]:
    """Labelled and unlabelled queries, and imagesTs."""
    found = {case: labelled[case]["images"] for case in query_cases(splits, fold)[0]}
    known = [Known("query or test", case, files) for case, files in found.items()]
    listed = preprocessed / QUERY_FILES
    for case, files in (read_json(listed) if listed.exists() else {}).items():
        if all(Path(file).exists() for file in files):
            known.append(Known("query or test", case, files))
        else:
            print(f"The unlabelled query {case} is no longer at {files[0]}: it is not compared with the pile.")
    if any(not is_leftover(file.name) for file in (raw / "imagesTs").glob("*")):
        tests = list_images(raw / "imagesTs", dataset_json).cases
        known += [Known("query or test", case, files) for case, files in tests.items()]
    return known


def same_images(known: Sequence[Known], others: dict[str, list[str]], ending: str) -> dict[str, Known]:
    """Cases of `others` that show the same voxels as one of `known`, whatever names, orientations and number formats.

    Only images of the same shape are read.
    """
    try:
        reader = find_reader(REORIENTING[0], ending)()
    except InputError:  # no reader reorients files of this ending: copies are compared as they are stored
        from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_file_ending

        reader = determine_reader_writer_from_file_ending(ending, verbose=False)()

    def shape(files: list[str]) -> tuple[int, ...]:
        return tuple(sorted(read_header(files[0]).shape))

    def content(files: list[str]) -> str:
        return hash_of(np.asarray(read_image(reader, files)[0], np.float32))

    of_shape: dict[tuple, list[Known]] = {}
    for one in known:
        of_shape.setdefault(shape(one.files), []).append(one)
    by_content: dict[tuple, dict[str, Known]] = {}
    found = {}
    for case, files in tqdm(others.items(), desc="comparing images"):
        key = shape(files)
        if key in of_shape:
            if key not in by_content:
                by_content[key] = {content(one.files): one for one in reversed(of_shape[key])}
            if one := by_content[key].get(content(files)):
                found[case] = one
    return found
