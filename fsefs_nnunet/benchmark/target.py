"""What a benchmark is evaluated on: the labelled queries of the splits, or a test set of the user's."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path

from tqdm import tqdm

from fsefs_nnunet.cases.dataset_json import read_dataset_json
from fsefs_nnunet.cases.folders import training_files
from fsefs_nnunet.cases.grids import shift_warnings
from fsefs_nnunet.cases.images import check_label, list_images
from fsefs_nnunet.cases.readers import in_axes_of
from fsefs_nnunet.cases.soundness import check_headers
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.labels import label_values


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

    def image_files(self) -> dict[str, list[str]]:
        """The cases' images, one file per channel. Raises InputError if one is missing."""
        if self.is_queries:
            training = training_files(self.images.parent, self.dataset_json)
            found = {case: files["images"] for case, files in training.items()}
        else:
            found = list_images(self.images, self.dataset_json).require_sound()
        for case in self.cases:
            if case not in found:
                raise InputError(f"{self.images} has no image of {case!r}, which the splits name: put it back.")
        return {case: found[case] for case in self.cases}

    def check_references(self, reader: type) -> None:
        """Check the reference segmentations of a test set; planning has checked those of the queries.

        Raises:
            InputError: if one does not lie on its image's grid, as nnU-Net's `reader` reads both, or holds values that
                dataset.json does not name.
        """
        if self.is_queries:
            return
        values = label_values(self.dataset_json["labels"])
        offsets = {}
        for case, files in tqdm(self.image_files().items(), desc="checking labels"):
            label = str(self.labels / f"{case}{self.dataset_json['file_ending']}")
            headers, offsets[case] = check_headers(files, label, reader.__name__)
            check_label(reader(), label, in_axes_of(headers[0].shape, headers[0], reader.__name__), values)
        for warning in shift_warnings(offsets):
            print(f"Warning: {warning}")

    @cached_property
    def images_sha256(self) -> str:
        """Hash of the images' sizes and dates: scans are too large to read in full."""
        files = [Path(file) for files in self.image_files().values() for file in files]
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return sha256(repr(stats).encode()).hexdigest()

    @cached_property
    def labels_sha256(self) -> str:
        """Hash of the reference segmentations' content. Raises InputError if one is missing."""
        digest, ending = sha256(), self.dataset_json["file_ending"]
        for case in self.cases:
            file = self.labels / f"{case}{ending}"
            if not file.exists():
                raise InputError(f"{file} is missing: `fseft plan_and_preprocess -d ID` writes it.")
            digest.update(file.read_bytes())
        return digest.hexdigest()

    def image_folder(self, work: Path) -> Path:
        """A folder with only the cases' images; for queries, new links to them below `work`, or copies."""
        if not self.is_queries:
            return self.images
        folder = work / "fseft_query_images"
        shutil.rmtree(folder, ignore_errors=True)  # left by other splits, or by another dataset
        folder.mkdir()
        for case, files in self.image_files().items():
            for channel, file in enumerate(files):
                link = folder / f"{case}_{channel:04d}{self.dataset_json['file_ending']}"
                try:
                    os.symlink(Path(file).resolve(), link)
                except OSError:  # not every file system supports links
                    shutil.copy(file, link)
        return folder


def queries(splits: dict, raw: Path, preprocessed: Path) -> Target:
    """Raises InputError if the splits keep no labelled query."""
    if not splits["queries"]:
        raise InputError(
            "The splits keep no labelled case as a query: give a test set with -i IMAGES -l LABELS, or draw others "
            "with `fseft splits -d ID --num_queries N`."
        )
    dataset_json = read_dataset_json(raw / "dataset.json")
    labels = preprocessed / "gt_segmentations"
    return Target("queries", tuple(sorted(splits["queries"])), raw / "imagesTr", labels, dataset_json)


def test_set(images: Path, labels: Path, raw: Path) -> Target:
    """All cases of the folder `images`.

    Raises:
        InputError: for a folder without images, a case without a label, or imagesTr, whose cases are trained on.
    """
    dataset_json = read_dataset_json(raw / "dataset.json")
    cases = tuple(list_images(images, dataset_json).require_sound())
    for case in cases:
        label = labels / f"{case}{dataset_json['file_ending']}"
        if not label.exists():
            raise InputError(f"{label} is missing: -l must contain a reference segmentation for every case of -i.")
    if images.resolve() == (raw / "imagesTr").resolve():
        raise InputError(f"{images} holds the cases that the adapters were trained on: give a test set with -i.")
    key = sha256(f"{images.resolve()}\n{labels.resolve()}".encode()).hexdigest()[:8]
    return Target(f"{images.resolve().name}_{key}", cases, images.resolve(), labels.resolve(), dataset_json)
