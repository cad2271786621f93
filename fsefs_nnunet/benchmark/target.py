"""What a benchmark is evaluated on: the labelled queries of the splits, or a test set of the user's."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from fsefs_nnunet.errors import InputError
from fsefs_nnunet.queries import images_in


@dataclass(frozen=True)
class Target:
    """
    name: of the files that belong to it.
    images: folder in nnU-Net's naming that holds the cases.
    labels: folder of their reference segmentations.
    """

    name: str
    cases: tuple[str, ...]
    images: Path
    labels: Path
    dataset_json: dict

    @property
    def is_queries(self) -> bool:
        return self.name == "queries"

    def image_folder(self, work: Path) -> Path:
        """A folder of the cases' images alone; of queries, links to them below `work`, copies where there are none."""
        if not self.is_queries:
            return self.images
        folder = work / "query_images"
        folder.mkdir(exist_ok=True)
        wanted = images_in(self.images, self.dataset_json)
        for case in self.cases:
            for file in map(Path, wanted[case]):
                link = folder / file.name
                if not link.exists():
                    try:
                        os.symlink(file.resolve(), link)
                    except OSError:  # not every file system has links
                        shutil.copy(file, link)
        return folder


def queries(splits: dict, raw: Path, preprocessed: Path) -> Target:
    """Raises InputError where the splits keep no labelled query."""
    if not splits["queries"]:
        raise InputError(
            "The splits keep no labelled case as query: give a test set with -i IMAGES -l LABELS, or draw others with "
            "`fseft splits -d ID --num_queries N`."
        )
    dataset_json = json.loads((raw / "dataset.json").read_text())
    labels = preprocessed / "gt_segmentations"
    return Target("queries", tuple(sorted(splits["queries"])), raw / "imagesTr", labels, dataset_json)


def test_set(images: Path, labels: Path, raw: Path) -> Target:
    """All cases of the folder `images`.

    Raises:
        InputError: for a folder without images, a case without a label, or imagesTr, whose cases are trained on.
    """
    dataset_json = json.loads((raw / "dataset.json").read_text())
    cases = tuple(images_in(images, dataset_json))
    for case in cases:
        label = labels / f"{case}{dataset_json['file_ending']}"
        if not label.exists():
            raise InputError(f"{label} is missing: -l wants a reference segmentation of every case of -i.")
    if images.resolve() == (raw / "imagesTr").resolve():
        raise InputError(f"{images} holds the cases that the adapters were trained on: give a test set with -i.")
    key = sha256(f"{images.resolve()}\n{labels.resolve()}".encode()).hexdigest()[:8]
    return Target(f"{images.resolve().name}_{key}", cases, images.resolve(), labels.resolve(), dataset_json)
