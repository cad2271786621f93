"""A raw dataset of the support's true labels and of a trained model's labels for unlabelled cases, its pile."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from fsefs_nnunet.adaptation.pile import Pile
from fsefs_nnunet.adaptation.teacher import Teacher
from fsefs_nnunet.cases.dataset_json import read_dataset_json
from fsefs_nnunet.cases.folders import dataset_folders
from fsefs_nnunet.cases.images import read_image
from fsefs_nnunet.datasets.building import RECORDS, UnfinishedDataset, new_dataset
from fsefs_nnunet.datasets.jobs import full_disk_reported
from fsefs_nnunet.datasets.volumes import link_or_copy
from fsefs_nnunet.errors import InputError, several
from fsefs_nnunet.features.entry import stamp_of
from fsefs_nnunet.files import read_json, replacing, value_in, write_json
from fsefs_nnunet.inference.weights import sha256_of_weights
from fsefs_nnunet.labels import label_values

LEAST_PROBABILITY = 0.9
SUMMARY, OPTIONS = "conversion.json", "pseudo_labels"  # file and key that say what a student's dataset was made of


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
        InputError: for an id that another dataset has, and a dataset that was started with other options.
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
                f"{target} was made with another teacher, pile or probability: delete it in all of nnU-Net's folders, "
                "or choose another id."
            )
        print(f"{target} is complete and unchanged: it is reused.")
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
                named = part.with_name(part.name + ending)  # the reader depends on the ending
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
