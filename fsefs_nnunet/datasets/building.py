"""A raw dataset under construction: hidden next to the others until it is complete, resumed where it stopped."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

from nnunetv2.dataset_conversion.generate_dataset_json import generate_dataset_json
from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets

from fsefs_nnunet.cases.folders import folder_of
from fsefs_nnunet.datasets.jobs import full_disk_reported
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.files import read_json, write_atomically

RECORDS = "records"  # one file per finished case
READER = "NibabelIOWithReorient"  # the public datasets mix orientations


def new_dataset(dataset_id: int, name: str) -> Path:
    """Folder for a new raw dataset. Raises InputError for an id that is taken, in any of nnU-Net's folders."""
    raw = folder_of("nnUNet_raw")
    if not 0 < dataset_id < 1000:
        raise InputError(f"{dataset_id} is not a dataset id: nnU-Net's ids go from 1 to 999.")
    taken = sorted(find_candidate_datasets(dataset_id))
    if taken:
        raise InputError(f"Dataset id {dataset_id} is taken by {', '.join(taken)}: choose another.")
    return raw / f"Dataset{dataset_id:03d}_{name}"


class UnfinishedDataset:
    """The hidden folder `.DatasetXXX_Name.part`, which becomes `target` when all is written.

    Until then nnU-Net does not see it. `options` say what it is made of: an interrupted construction is only continued
    with the same ones.
    """

    def __init__(self, target: Path, options: dict):
        self.target = target
        self.folder = target.parent / f".{target.name}.part"
        file = self.folder / "options.json"
        if file.exists() and read_json(file) != options:
            raise InputError(
                f"{self.folder} is unfinished and was started with other options, labels or cases: delete it first."
            )
        try:
            for name in ("imagesTr", "labelsTr", RECORDS):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            if not file.exists():
                write_atomically(file, json.dumps(options))
        except OSError as error:
            raise InputError(f"{target.parent} cannot be written to: {error}.") from error

    def leave_out(self, cases: set[str], ending: str) -> None:
        """Remove what an earlier call wrote for cases other than `cases`."""
        for folder, parts in (("imagesTr", 5), ("labelsTr", 0)):  # a channel's number, _0000
            for file in (self.folder / folder).glob(f"*{ending}"):
                stem = file.name.removesuffix(ending)
                if stem[: len(stem) - parts] not in cases:
                    file.unlink()

    def finish(self, summary: dict, reader: str = READER, **dataset_json) -> None:
        """Write dataset.json with nnU-Net's function and the summary, and take the final name."""
        with full_disk_reported():
            generate_dataset_json(
                str(self.folder),
                dataset_name=self.target.name,
                converted_by="fseft",
                overwrite_image_reader_writer=reader,
                **dataset_json,
            )
            (self.folder / "conversion.json").write_text(json.dumps(summary, indent=1))
        shutil.rmtree(self.folder / RECORDS)
        (self.folder / "options.json").unlink()
        os.replace(self.folder, self.target)

    def discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def archives_in(folder: Path) -> list[str]:
    return sorted(
        f.name for f in folder.iterdir() if re.search(r"\.(zip|tar|tgz|tar\.gz|rar|7z|part|crdownload)$", f.name)
    )
