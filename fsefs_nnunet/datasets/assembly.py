"""`fseft assemble`: one partially labelled dataset from several, for FSEFTPretrainer."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
from tqdm import tqdm

from fsefs_nnunet.cases.dataset_json import read_dataset_json, shows_ct
from fsefs_nnunet.cases.folders import dataset_folders, training_files
from fsefs_nnunet.cases.grids import shift_warnings
from fsefs_nnunet.cases.headers import warnings_of
from fsefs_nnunet.cases.images import lacks_air, offset_warning
from fsefs_nnunet.cases.soundness import check_headers
from fsefs_nnunet.datasets.building import READER, RECORDS, UnfinishedDataset, new_dataset
from fsefs_nnunet.datasets.common_labels import CommonLabels, common_labels
from fsefs_nnunet.datasets.jobs import run_jobs
from fsefs_nnunet.datasets.tables import tables
from fsefs_nnunet.datasets.volumes import integers, link_or_copy, read_volume, renumber, write_label
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.files import read_json, write_atomically
from fsefs_nnunet.labels import TEMPLATE_29, normalised, values_in

GENERIC = {"cancer", "cyst", "lesion", "tumor", "tumour", "vessel"}  # mean nothing without the name of their dataset


@dataclass(frozen=True)
class Member:
    """A raw dataset that takes part."""

    name: str
    labels: dict[str, int]  # canonical name -> value
    channels: tuple[str, ...]
    shows_ct: bool
    files: dict[str, dict]  # case -> "images", "label"


def read_member(dataset_id: int | str) -> Member:
    """Raises InputError if the dataset cannot take part."""
    name, raw, _ = dataset_folders(dataset_id)
    content = read_dataset_json(raw / "dataset.json")
    if any(isinstance(value, list) for value in content["labels"].values()) or "ignore" in content["labels"]:
        raise InputError(f"{name} has regions or an ignore label: only datasets with plain labels can be assembled.")
    if content["file_ending"] not in (".nii.gz", ".nii"):
        raise InputError(f"{name} has {content['file_ending']} files: NIfTI is expected.")
    labels: dict[str, int] = {}
    for label, value in content["labels"].items():
        if normalised(label) in labels:
            raise InputError(f"{name} has two labels for {normalised(label)}: rename one of them in dataset.json.")
        if value:
            labels[normalised(label)] = int(value)
    files = training_files(raw, content)
    return Member(name, labels, tuple(content["channel_names"].values()), shows_ct(content), files)


def assemble(dataset_ids: list[int | str], dataset_id: int, template: str, num_processes: int = 4) -> Path:
    """Write the assembly of raw datasets and return its folder.

    template: "universal", the classes of FSEFT's public model, or "union", all labels of all datasets.
    Images are links. Of images with the same voxels only the first is kept, with its labels.

    Raises:
        InputError: for incompatible datasets, an id that is taken, a full disk, and an interrupt.
    """
    members = [read_member(one) for one in dataset_ids]
    repeated = [name for name, n in Counter(member.name for member in members).items() if n > 1]
    if repeated or len(members) < 2:
        raise InputError(f"-d {' '.join(map(str, dataset_ids))}: give two datasets or more, each once.")
    for member in members[1:]:
        if [c.lower() for c in member.channels] != [c.lower() for c in members[0].channels]:
            raise InputError(
                f"{member.name} has channels {', '.join(member.channels)}, but {members[0].name} has "
                f"{', '.join(members[0].channels)}: only datasets with the same channels can be assembled."
            )
    universal = list(TEMPLATE_29) if template == "universal" else None
    common = common_labels({member.name: list(member.labels) for member in members}, universal)
    target = new_dataset(dataset_id, template.capitalize())
    for line in (*conflicts(members, common), *header_warnings(members)):
        print(line)
    prefix = short_names(members)
    names = {m.name: {case: f"{prefix[m.name]}_{case}" for case in m.files} for m in members}
    # a list: a patient that is repeated stays with the first of its members
    made_of = [[m.name, m.labels, names[m.name]] for m in members]
    building = UnfinishedDataset(target, {"assembly": made_of, "labels": common.labels})
    jobs = [
        (
            name,
            m.files[case],
            m.shows_ct,
            {0: 0, **{m.labels[label]: new for label, new in common.values[m.name].items()}},
        )
        for m in members
        for case, name in names[m.name].items()
    ]
    records = {name: building.folder / RECORDS / f"{name}.json" for name, *_ in jobs}
    todo = [job for job in jobs if not records[job[0]].exists()]
    run_jobs(partial(add_case, building.folder), todo, num_processes, "assembling")
    made = {name: read_json(file) for name, file in records.items()}
    if odd := [name for name, record in made.items() if record.get("lacks_air")]:
        print(f"Warning: {offset_warning(odd)} Planning refuses them.")
    same = repeated_patients({name: record["sha256"] for name, record in made.items()})
    for case in same:
        for i in range(len(members[0].channels)):
            image_file(building.folder, case, i).unlink(missing_ok=True)  # an interrupt may have come just here
        label_file(building.folder, case).unlink(missing_ok=True)
    cases = {name: [case for case in names[name].values() if case not in same] for name in names}
    sources = {name: {"classes": common.annotated[name], "cases": cases[name]} for name in cases if cases[name]}
    building.finish(
        {"the same patient as": same},
        channel_names=dict(enumerate(members[0].channels)),
        labels=dict(common.labels),
        regions_class_order=common.regions_class_order,
        num_training_cases=sum(map(len, cases.values())),
        file_ending=".nii.gz",
        license="of the datasets under sources",
        sources=sources,
    )
    for case, kept in same.items():
        print(f"{case} is the same patient as {kept}, whose labels are kept.")
    print(class_table(list(common.labels)[1:], sources))
    print(f"{target}: {sum(map(len, cases.values()))} cases")
    return target


def short_names(members: list[Member]) -> dict[str, str]:
    """Names of datasets without DatasetXXX_, if they and their cases can still be told apart."""
    names = [member.name for member in members]
    short = [name.split("_", 1)[1] for name in names]
    cases = [f"{prefix}_{case}" for prefix, member in zip(short, members) for case in member.files]
    apart = len(set(short)) == len(short) and len(set(cases)) == len(cases)
    return dict(zip(names, short if apart else names))


def image_file(folder: Path, case: str, channel: int) -> Path:
    return folder / "imagesTr" / f"{case}_{channel:04d}.nii.gz"


def label_file(folder: Path, case: str) -> Path:
    return folder / "labelsTr" / f"{case}.nii.gz"


def repeated_patients(digests: dict[str, str]) -> dict[str, str]:
    """Cases whose voxels have the same hash as those of an earlier case -> that case."""
    first: dict[str, str] = {}
    return {case: first[d] for case, d in digests.items() if first.setdefault(d, case) != case}


def class_table(classes: list[str], sources: dict[str, dict]) -> str:
    """Number of annotated cases by class and source, as lines of text."""
    rows = [["annotated cases", *sources]]
    for name in classes:
        rows.append([name, *(str(len(s["cases"])) if name in s["classes"] else "-" for s in sources.values())])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def conflicts(members: list[Member], common: CommonLabels) -> list[str]:
    """What the user should know about labels that do not simply match."""
    lines = []
    for member in members:
        dropped = [name for name, value in common.values[member.name].items() if not value]
        if dropped:
            lines.append(f"{member.name}: {', '.join(dropped)} not in the template: treated as background, unannotated")
        for whole, lesions in tables()["lesions"].items():
            sided = [part for part in tables()["unions"].get(whole, []) if part in member.labels]
            inside = [lesion for lesion in lesions if lesion in member.labels]
            if sided and inside:
                lines.append(f"{member.name}: {', '.join(sided)} without {', '.join(inside)}, whose side is unknown")
    for name in GENERIC:
        owners = [member.name for member in members if name in member.labels]
        if len(owners) > 1:
            lines.append(f"{name} of {' and '.join(owners)} is treated as one class: rename it if it is not")
    return lines


def header_warnings(members: list[Member]) -> list[str]:
    """What the user should know about the files' headers. Raises InputError if label map and image do not match."""
    headers, offsets = [], {}
    jobs = [(f"{member.name}/{case}", files) for member in members for case, files in member.files.items()]
    for case, files in tqdm(jobs, desc="checking headers"):
        of_case, offsets[case] = check_headers(files["images"], files["label"], READER)
        headers += of_case
    return [f"Warning: {text}" for text in (*warnings_of(headers), *shift_warnings(offsets))]


def add_case(folder: Path, name: str, files: dict, shows_ct: bool, values: dict[int, int]) -> None:
    """Link the images of a case, write its label map with the new values and, last, its record.

    The record, whose presence marks the case as complete, holds the hash of the image's voxels.
    """
    digest, without_air = hashlib.sha256(), False
    for i, file in enumerate(map(Path, files["images"])):
        image = read_volume(file)
        # copies of one scan differ in orientation and number format rather than in voxels
        voxels = np.ascontiguousarray(nib.as_closest_canonical(image).dataobj, np.float32)
        digest.update(repr(voxels.shape).encode())
        digest.update(voxels)
        without_air |= shows_ct and not i and lacks_air(voxels[None])
        link_or_copy(file, image_file(folder, name, i))
    file, target = Path(files["label"]), label_file(folder, name)
    label = read_volume(file)
    data = integers(label, file)
    unknown = sorted(values_in(data) - set(values))
    if unknown:
        raise InputError(f"{file} has values {unknown[:5]} that dataset.json does not name: add or repair them.")
    if all(old == new for old, new in values.items()):
        link_or_copy(file, target)
    else:
        write_label(renumber(data, values), label, target)
    write_atomically(
        folder / RECORDS / f"{name}.json", json.dumps({"sha256": digest.hexdigest(), "lacks_air": without_air})
    )
