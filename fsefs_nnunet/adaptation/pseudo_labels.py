"""A raw dataset of the support's true labels and of what a trained model says of unlabelled cases, its pile."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tqdm import tqdm

from fsefs_nnunet.cases.dataset_json import read_dataset_json
from fsefs_nnunet.cases.folders import dataset_folders, model_folder, training_files
from fsefs_nnunet.cases.headers import read_header
from fsefs_nnunet.cases.images import is_constant, is_leftover, list_images, read_image
from fsefs_nnunet.cases.pile import pile_cases
from fsefs_nnunet.cases.preprocessed import hash_of
from fsefs_nnunet.cases.readers import REORIENTING, find_reader
from fsefs_nnunet.cases.soundness import check_all, require_one_scale
from fsefs_nnunet.cases.splits import SPLITS_FILE, load_splits, query_cases, support_cases
from fsefs_nnunet.datasets.building import RECORDS, UnfinishedDataset, new_dataset
from fsefs_nnunet.datasets.jobs import full_disk_reported
from fsefs_nnunet.datasets.volumes import link_or_copy
from fsefs_nnunet.errors import InputError, several
from fsefs_nnunet.features.entry import stamp_of
from fsefs_nnunet.files import read_json, replacing, value_in, write_json
from fsefs_nnunet.inference.weights import sha256_of_weights
from fsefs_nnunet.labels import label_values
from fsefs_nnunet.methods.run_file import RunFile
from fsefs_nnunet.nnunet.drawing import QUERY_FILES
from fsefs_nnunet.nnunet.experiment import external_trainers

LEAST_PROBABILITY = 0.9
SUMMARY, OPTIONS = "conversion.json", "pseudo_labels"  # what a student's dataset was made of, and the key of it


@dataclass(frozen=True)
class Teacher:
    """A trained fold whose support becomes the true cases of a student's dataset."""

    dataset: str
    trainer: str
    plans: str
    configuration: str
    fold: int | str

    @property
    def folder(self) -> Path:
        return model_folder(self.dataset, self.trainer, self.plans, self.configuration)

    @property
    def checkpoint(self) -> Path:
        return self.folder / f"fold_{self.fold}" / "checkpoint_final.pth"

    @property
    def name(self) -> str:
        """From nnUNet_results on."""
        return str(self.checkpoint.parent.relative_to(self.folder.parent.parent))

    @cached_property
    def plans_manager(self) -> PlansManager:
        """Raises InputError for a model that is not there."""
        plans, *others = (self.folder / "plans.json", self.folder / "dataset.json", self.checkpoint)
        for file in (plans, *others):
            if not file.exists():
                raise InputError(f"{file} is missing: train the teacher, or check -d, -tr, -p, -c and -f.")
        read_dataset_json(self.folder / "dataset.json")
        if self.configuration not in read_json(plans).get("configurations", {}):
            raise InputError(f"{plans} has no {self.configuration}: restore it, or train the teacher again.")
        return PlansManager(read_json(plans))

    @property
    def keys(self) -> dict:
        """Of the configuration, with what it inherits."""
        return self.plans_manager.get_configuration(self.configuration).configuration

    @cached_property
    def reader(self) -> BaseReaderWriter:
        return self.plans_manager.image_reader_writer_class()

    def predictor(self, device: torch.device) -> nnUNetPredictor:
        os.environ["nnUNet_extTrainer"] = external_trainers()
        predictor = nnUNetPredictor(use_mirroring=False, device=device, allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(self.folder), (self.fold,), self.checkpoint.name)
        return predictor


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
            f"{teacher.checkpoint.parent} was trained on other support cases than those of {SPLITS_FILE} now: train it "
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
            raise InputError(f"{name} has a support case {twice[0]}, the name of one of the pile's: rename its files.")
    known = [Known("support", case, labelled[case]["images"]) for case in support]
    known += known_queries(raw, preprocessed, dataset_json, splits, labelled, teacher.fold)
    check_images(unlabelled, teacher.reader, {case: labelled[case]["images"] for case in support})
    seen = same_images(known, unlabelled, dataset_json["file_ending"])
    for case, other in seen.items():
        if other.role == "support":
            raise InputError(
                f"{unlabelled[case][0]} is the support case {other.case}, whose label is known: take it out of the "
                "pile."
            )
        if not transductive:
            raise InputError(
                f"{unlabelled[case][0]} is the query or test case {other.case}: take it out of the pile, or add "
                "--transductive if the student may see what it is to segment."
            )
    return Pile({case: labelled[case] for case in support}, unlabelled, bool(seen))


def check_images(pile: dict[str, list[str]], reader: BaseReaderWriter, support: dict[str, list[str]]) -> None:
    """Read every image before the first one is labelled, which takes much longer.

    Raises:
        InputError: for images that planning would refuse, once all are labelled.
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
    except InputError:  # no reader turns files of this ending: such copies are compared as they are stored
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


def sure_labels(
    segmentation: np.ndarray, probabilities: np.ndarray, regions: bool, least: float, ignore: int
) -> np.ndarray:
    """The segmentation (X, Y, Z) with `ignore` where the model is unsure.

    Args:
        probabilities: (outputs, X, Y, Z). Softmax: the largest is below `least`; regions: one lies between `least` and
            1 - `least`.
    """
    if regions:
        unsure = (np.maximum(probabilities, 1 - probabilities) < least).any(0)
    else:
        unsure = probabilities.max(0) < least
    return np.where(unsure, ignore, segmentation).astype(np.uint8 if ignore < 256 else np.uint16)


def write_student_dataset(teacher: Teacher, pile: Pile, dataset_id: int, least: float, device: torch.device) -> Path:
    """Write DatasetXXX_<Name>Student, and return its folder; an interrupted call resumes where it stopped.

    Images are links. conversion.json says what the dataset was made of.

    Raises:
        InputError: for an id that another dataset has, and a dataset that was begun with other options.
    """
    name, raw, _ = dataset_folders(teacher.dataset)
    dataset_json = read_dataset_json(raw / "dataset.json")
    options = {
        "teacher": teacher.name,
        "weights": sha256_of_weights(teacher.checkpoint),
        "least_probability": least,
        "support": sorted(pile.support),
    }
    whole = {
        **options,
        "pile": {case: [stamp_of(Path(file)) for file in files] for case, files in sorted(pile.unlabelled.items())},
        "transductive": pile.transductive,
    }
    target = raw.parent / f"Dataset{dataset_id:03d}_{name.split('_', 1)[1]}Student"
    if (target / SUMMARY).exists():
        if read_json(target / SUMMARY).get(OPTIONS) != whole:
            raise InputError(
                f"{target} was made of another teacher, pile or probability: delete it in all folders of nnU-Net's, or "
                "choose another id."
            )
        print(f"{target} is complete and unchanged: it is used again.")
        return target
    target = new_dataset(dataset_id, target.name.split("_", 1)[1])
    building, ending = UnfinishedDataset(target, options), dataset_json["file_ending"]
    labels = dict(dataset_json["labels"])
    ignore = labels.setdefault("ignore", max(label_values(labels)) + 1)
    predictor, reader, made = None, teacher.reader, building.folder / RECORDS
    building.leave_out({*pile.support, *pile.unlabelled}, ending)
    with full_disk_reported():
        for case, files in pile.support.items():
            link_images(files["images"], building.folder, case, ending)
            link_or_copy(Path(files["label"]), building.folder / "labelsTr" / f"{case}{ending}")
        for case, files in tqdm(pile.unlabelled.items(), desc="labelling the pile"):
            if value_in(made / f"{case}.json", "files") == whole["pile"][case]:
                continue
            predictor = predictor or teacher.predictor(device)
            image, properties = read_image(reader, files)
            segmentation, probabilities = predictor.predict_single_npy_array(image, properties, None, None, True)
            kept = sure_labels(segmentation, probabilities, predictor.label_manager.has_regions, least, ignore)
            link_images(files, building.folder, case, ending)
            with replacing(building.folder / "labelsTr" / f"{case}{ending}") as part:
                named = part.with_name(part.name + ending)  # the reader goes by the ending
                reader.write_seg(kept, str(named), properties)
                os.replace(named, part)
            record = {"files": whole["pile"][case], "ignored": float((kept == ignore).mean())}
            write_json(made / f"{case}.json", record)
    ignored = {case: read_json(made / f"{case}.json")["ignored"] for case in pile.unlabelled}
    if min(ignored.values()) == 1:
        building.discard()
        raise InputError(
            f"The teacher is unsure of every voxel of the pile: reduce --min_probability, which is {least:g}, or train "
            "a better teacher."
        )
    building.finish(
        {OPTIONS: whole, "ignored": ignored},
        type(reader).__name__,
        channel_names=dataset_json["channel_names"],
        labels=labels,
        regions_class_order=dataset_json.get("regions_class_order"),
        num_training_cases=len(pile.support) + len(pile.unlabelled),
        file_ending=ending,
        license=f"that of {name}",
        transductive=pile.transductive,
    )
    share, most = np.mean(list(ignored.values())), [case for case, share in ignored.items() if share > 0.5]
    numbers = f"{len(pile.support)} true cases and {len(ignored)} of the pile"
    print(f"{target}: {numbers}, {share:.1%} of whose voxels are ignored.")
    if most:
        print(f"More than half of {several(most)} is ignored: the teacher is rarely that sure of such images.")
    return target


def link_images(files: Iterable[str], folder: Path, case: str, ending: str) -> None:
    for channel, file in enumerate(map(Path, files)):
        link_or_copy(file, folder / "imagesTr" / f"{case}_{channel:04d}{ending}")
