"""`fseft convert`: a public dataset as it is downloaded -> an nnU-Net raw dataset."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

from fsefs_nnunet.datasets.building import UnfinishedDataset, archives_in, new_dataset
from fsefs_nnunet.datasets.case import Job, convert_case
from fsefs_nnunet.datasets.jobs import run_jobs
from fsefs_nnunet.datasets.selection import Selection, select
from fsefs_nnunet.datasets.source import Case, Source
from fsefs_nnunet.datasets.sources import find_source
from fsefs_nnunet.datasets.volumes import IMAGE_HEADER, REFUSED, RESAMPLED, OtherGrid
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.files import read_json


def convert(
    name: str,
    folder: Path,
    dataset_id: int,
    classes: list[str],
    dry_run: bool = False,
    num_processes: int = 4,
    other_grid: OtherGrid = REFUSED,
) -> Path:
    """Write the raw dataset of `folder`, which holds the public dataset `name`; returns its folder.

    classes: names or groups of the source's labels, empty for all.

    Raises:
        InputError: for a folder that does not hold the dataset, unknown classes, an id that is taken, a full disk, an
            interrupt, and if no case could be converted.
    """
    source = find_source(name)
    folder = Path(folder).resolve()
    cases, tests = find_cases(source, folder)
    table = source.table(folder)
    selection = select(table, classes, source.row.get("split", []), source.row.get("groups", {}))
    target = new_dataset(dataset_id, source.dataset_name(folder))
    images = [case.image for case in (*cases, *tests) if case.image is not None]
    ending = ".nii" if all(image.name.endswith(".nii") for image in images) else ".nii.gz"
    print(f"{source.name} in {folder}: {len(cases)} cases with labels, {len(tests)} images without -> {target}")
    print(f"labels: {', '.join(f'{i} {name}' for name, i in selection.labels.items())}")
    if dry_run:
        return target
    channels = source.channels(folder)
    options = {
        "source": source.name,
        "folder": str(folder),
        "labels": selection.labels,
        "other grid": asdict(other_grid),
    }
    building = UnfinishedDataset(target, options)
    if tests:
        (building.folder / "imagesTs").mkdir(exist_ok=True)
    job = Job(source, table, selection, tuple(channels.values()), building.folder, ending, other_grid)
    jobs = [(case, False) for case in cases] + [(case, True) for case in tests]
    todo = [one for one in jobs if not job.record(*one).exists()]
    run_jobs(partial(convert_case, job), todo, num_processes, source.name)
    records = [read_json(job.record(*one)) for one in jobs]
    whole = [r for r in records if "skipped" not in r and not r["test"]]
    if not whole:
        building.discard()
        raise InputError(f"None of the {len(cases)} cases can be converted. The first: {records[0]['skipped']}")
    building.finish(
        summary := summarised(records, selection),
        channel_names=channels,
        labels=selection.labels,
        num_training_cases=len(whole),
        file_ending=ending,
        reference=source.row["reference"],
        license="see reference",
    )
    print("\n".join(summary_lines(summary)))
    if summary["left out"]:
        print(f"To convert what was left out, delete {target} or choose another -d.")
    return target


def find_cases(source: Source, folder: Path) -> tuple[list[Case], list[Case]]:
    """Cases with labels and images without. Raises InputError if the folder does not hold the dataset."""
    if not folder.is_dir():
        raise InputError(f"-i {folder} is not a folder: give the one with {source.layout}.")
    cases = source.cases(folder)
    _refuse_repeated(cases)
    if any(case.image and case.label for case in cases):
        tests = source.test_images(folder)
        _refuse_repeated(tests)
        return cases, tests
    packed = archives_in(folder)
    found = f"unpack {', '.join(packed[:3])} first" if packed else f"found {_listing(folder)}"
    raise InputError(f"{folder} does not hold {source.name} as published: expected {source.layout}; {found}.")


def _refuse_repeated(cases: list[Case]) -> None:
    """Two cases of the same name would write the same files."""
    first: dict[str, Case] = {}
    for case in cases:
        other = first.setdefault(case.name, case)
        if other is not case:
            files = " and ".join(str(c.label or c.image) for c in (other, case))
            raise InputError(f"{files} are both case {case.name}: move one of them away.")


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "nothing"


def summarised(records: list[dict], selection: Selection) -> dict:
    """What was converted and what was not, as it is printed and kept in conversion.json."""
    whole = [r for r in records if "skipped" not in r]
    labelled = [r for r in whole if not r["test"]]
    spacings = np.array([r["spacing"] for r in whole])
    return {
        "cases": len(labelled),
        "images without labels": len(whole) - len(labelled),
        "cases that show the class": {
            name: sum(r["voxels"][i] > 0 for r in labelled) for i, name in enumerate(selection.names)
        },
        "spacing in mm": {
            name: [round(float(x), 3) for x in f(spacings, axis=0)]
            for name, f in (("smallest", np.min), ("median", np.median), ("largest", np.max))
        },
        "images linked": sum(r["linked"] for r in whole),
        "images written": sum(not r["linked"] for r in whole),
        "labels resampled": sorted(r["case"] for r in labelled if r["placed"] == RESAMPLED),
        "labels given their image's header": sorted(r["case"] for r in labelled if r["placed"] == IMAGE_HEADER),
        "voxels in several masks (the later class has them)": {
            r["case"]: r["overlap"] for r in labelled if r["overlap"]
        },
        **{text: sorted(r["case"] for r in whole if text in r["oddities"]) for text in _oddities(whole)},
        "left out": {r["case"]: r["skipped"] for r in records if "skipped" in r},
    }


def _oddities(records: list[dict]) -> list[str]:
    return list(dict.fromkeys(text for record in records for text in record["oddities"]))


def summary_lines(summary: dict) -> list[str]:
    """Lines of the summary, without what is empty."""
    lines = []
    for key, value in summary.items():
        if isinstance(value, dict) and value:
            separator = "\n  " if key == "left out" else ", "
            head = f"{key} ({len(value)}):\n  " if key == "left out" else f"{key}: "
            lines.append(head + separator.join(f"{name} {_plain(v)}" for name, v in value.items()))
        elif value or value == 0:
            lines.append(f"{key}: {_plain(value)}")
    return lines


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
