"""A raw dataset of the support's true labels and of what a trained model says of unlabelled cases, its pile."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tqdm import tqdm

from fsefs_nnunet.cases.dataset_json import read_dataset_json
from fsefs_nnunet.cases.folders import dataset_folders, model_folder, training_files
from fsefs_nnunet.cases.headers import read_header
from fsefs_nnunet.cases.images import list_images, read_image
from fsefs_nnunet.cases.preprocessed import hash_of
from fsefs_nnunet.cases.splits import SPLITS_FILE, load_splits, query_cases, support_cases
from fsefs_nnunet.datasets.building import RECORDS, UnfinishedDataset, new_dataset
from fsefs_nnunet.datasets.jobs import full_disk_reported
from fsefs_nnunet.datasets.volumes import link_or_copy
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.files import read_json, replacing, write_json
from fsefs_nnunet.labels import label_values
from fsefs_nnunet.nnunet.drawing import QUERY_FILES
from fsefs_nnunet.nnunet.experiment import external_trainers
from fsefs_nnunet.trainers.patch_trainer import PSEUDO_LABELLED

SURE = 0.8
OPTIONS = "pseudo_labels"  # key of dataset.json: what the dataset was made of


@dataclass(frozen=True)
class Teacher:
    """A trained fold whose support becomes the true cases of a student's dataset."""

    dataset: str
    trainer: str
    plans: str
    configuration: str
    fold: int

    @property
    def folder(self) -> Path:
        return model_folder(self.dataset, self.trainer, self.plans, self.configuration)

    @cached_property
    def content(self) -> dict:
        """Of the plans. Raises InputError for a model that is not there."""
        for file in (self.folder / "plans.json", self.checkpoint):
            if not file.exists():
                raise InputError(f"{file} is missing: train the teacher, or check -d, -tr, -p, -c and -f.")
        return read_json(self.folder / "plans.json")

    @property
    def checkpoint(self) -> Path:
        return self.folder / f"fold_{self.fold}" / "checkpoint_final.pth"

    @cached_property
    def plans_manager(self) -> PlansManager:
        return PlansManager(self.content)

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


def choose_pile(teacher: Teacher, folder: Path | None, transductive: bool) -> Pile:
    """The pile: images of `folder` in nnU-Net's naming, or the labelled cases that are neither support nor queries.

    Raises:
        InputError: for an empty pile, and one that shows a support case, whatever its name; for one that shows a query
            or test case unless `transductive` says that this is meant.
    """
    name, raw, preprocessed = dataset_folders(teacher.dataset)
    dataset_json = read_dataset_json(raw / "dataset.json")
    splits = load_splits(preprocessed / SPLITS_FILE)
    labelled = training_files(raw, dataset_json)
    support = support_cases(splits, teacher.keys["fseft_shots"], teacher.fold)
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
    queries = {case: labelled[case]["images"] for case in query_cases(splits, teacher.fold)[0]}
    if (preprocessed / QUERY_FILES).exists():
        queries |= read_json(preprocessed / QUERY_FILES)
    if (raw / "imagesTs").is_dir():
        queries |= list_images(raw / "imagesTs", dataset_json).cases
    seen = same_images({case: labelled[case]["images"] for case in support} | queries, unlabelled, teacher.reader)
    shown_support = {of_pile: case for of_pile, case in seen.items() if case in support}
    if shown_support:
        of_pile, case = next(iter(shown_support.items()))
        raise InputError(
            f"{unlabelled[of_pile][0]} is the support case {case}, whose label is known: take it out of the pile."
        )
    if seen and not transductive:
        of_pile, case = next(iter(seen.items()))
        raise InputError(
            f"{unlabelled[of_pile][0]} is the query or test case {case}: take it out of the pile, or add "
            "--transductive if the student may see what it is to segment."
        )
    return Pile({case: labelled[case] for case in support}, unlabelled, bool(seen))


def same_images(known: dict[str, list[str]], others: dict[str, list[str]], reader: BaseReaderWriter) -> dict[str, str]:
    """Cases of `others` that show the same voxels as one of `known`, with that case; names and headers may differ.

    Only images of the same shape are read.
    """

    def shape(files: list[str]) -> tuple[int, ...]:
        return tuple(sorted(read_header(files[0]).shape))

    of_shape: dict[tuple, list[str]] = {}
    for case, files in known.items():
        of_shape.setdefault(shape(files), []).append(case)
    hashes: dict[str, str] = {}

    def content(files: list[str]) -> str:
        return hash_of(np.asarray(read_image(reader, files)[0], np.float32))

    found = {}
    for case, files in tqdm(others.items(), desc="comparing images"):
        alike = of_shape.get(shape(files), [])
        if not alike:
            continue
        own = content(files)
        for other in alike:
            if other not in hashes:
                hashes[other] = content(known[other])
            if hashes[other] == own:
                found[case] = other
    return found


def sure_labels(segmentation: np.ndarray, probabilities: np.ndarray, regions: bool, sure: float, ignore: int):
    """The segmentation (X, Y, Z) with `ignore` where the model is unsure.

    Args:
        probabilities: (outputs, X, Y, Z); softmax: the largest is below `sure`; regions: one lies within `sure` and
            1 - `sure`.
    """
    if regions:
        unsure = (np.maximum(probabilities, 1 - probabilities) < sure).any(0)
    else:
        unsure = probabilities.max(0) < sure
    return np.where(unsure, ignore, segmentation).astype(np.uint8 if ignore < 256 else np.uint16)


def write_student_dataset(
    teacher: Teacher, pile: Pile, dataset_id: int, sure: float, device: torch.device
) -> tuple[Path, bool]:
    """Write DatasetXXX_<Name>Student, and return its folder; an interrupted call goes on where it stopped.

    Images are links. What dataset.json holds under "pseudo_labels" says what it was made of.

    Raises:
        InputError: for an id that another dataset has, and one begun with other options.
    """
    name, raw, _ = dataset_folders(teacher.dataset)
    dataset_json = read_dataset_json(raw / "dataset.json")
    options = {
        "teacher": str(teacher.folder / f"fold_{teacher.fold}"),
        "trained": os.stat(teacher.checkpoint).st_mtime,
        "sure": sure,
        "support": sorted(pile.support),
        "pile": {case: files for case, files in sorted(pile.unlabelled.items())},
        "transductive": pile.transductive,
    }
    target = raw.parent / f"Dataset{dataset_id:03d}_{name.split('_', 1)[1]}Student"
    if (target / "dataset.json").exists() and read_json(target / "dataset.json").get(OPTIONS) == options:
        print(f"{target} is there, made of the same.")
        return target
    target = new_dataset(dataset_id, target.name.split("_", 1)[1])
    building, ending = UnfinishedDataset(target, options), dataset_json["file_ending"]
    labels = dict(dataset_json["labels"])
    ignore = labels.setdefault("ignore", max(label_values(labels)) + 1)
    predictor, reader, made = None, teacher.reader, building.folder / RECORDS
    with full_disk_reported():
        for case, files in pile.support.items():
            link_images(files["images"], building.folder, case, ending)
            link_or_copy(Path(files["label"]), building.folder / "labelsTr" / f"{case}{ending}")
        for case in tqdm(pile.unlabelled, desc="labelling the pile"):
            if (made / f"{case}.json").exists():
                continue
            files = pile.unlabelled[case]
            predictor = predictor or teacher.predictor(device)
            image, properties = read_image(reader, files)
            segmentation, probabilities = predictor.predict_single_npy_array(image, properties, None, None, True)
            has_regions = predictor.label_manager.has_regions
            kept = sure_labels(segmentation, probabilities, has_regions, sure, ignore)
            link_images(files, building.folder, case, ending)
            with replacing(building.folder / "labelsTr" / f"{case}{ending}") as part:
                named = part.with_name(part.name + ending)  # the reader goes by the ending
                reader.write_seg(kept, str(named), properties)
                os.replace(named, part)
            write_json(made / f"{case}.json", {"ignored": float((kept == ignore).mean())})
    ignored = {file.stem: read_json(file)["ignored"] for file in made.glob("*.json")}
    building.finish(
        {"ignored": ignored},
        type(teacher.reader).__name__,
        channel_names=dataset_json["channel_names"],
        labels=labels,
        regions_class_order=dataset_json.get("regions_class_order"),
        num_training_cases=len(pile.support) + len(pile.unlabelled),
        file_ending=ending,
        license=f"that of {name}",
        **{PSEUDO_LABELLED: sorted(pile.unlabelled), OPTIONS: options},
    )
    share, numbers = np.mean(list(ignored.values())), f"{len(pile.support)} true cases and {len(ignored)} of the pile"
    print(f"{target}: {numbers}, {share:.1%} of whose voxels are ignored.")
    return target


def link_images(files: Iterable[str], folder: Path, case: str, ending: str) -> None:
    for channel, file in enumerate(map(Path, files)):
        link_or_copy(file, folder / "imagesTr" / f"{case}_{channel:04d}{ending}")
