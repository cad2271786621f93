"""What a converter knows about its dataset: where the files lie and what the labels are."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from fsefs_nnunet.datasets.tables import tables
from fsefs_nnunet.datasets.volumes import AS_IT_IS, OtherGrid, integers, on_grid, read_volume
from fsefs_nnunet.errors import InputError


@dataclass(frozen=True)
class Case:
    """image, label: a file, or a folder of slices or masks; None if the download lacks it."""

    name: str
    image: Path | None
    label: Path | None


class Source:
    """Base of the converters. A subclass says how files pair up, and how to read what is not plain NIfTI."""

    name: str
    layout: str  # what the folder holds, for messages

    @property
    def row(self) -> dict:
        """The source's row of labels.json; a subclass that has none there gives its own as a class attribute.

        "reference"; "labels", name -> value; where the source has them, "split", labels to divide into right and left,
        and "groups", lists of labels by name.
        """
        return tables()["sources"][self.name]

    def dataset_name(self, folder: Path) -> str:
        """What follows DatasetXXX_."""
        return self.name

    def channels(self, folder: Path) -> dict[int, str]:
        return {0: "CT"}

    def table(self, folder: Path) -> dict[str, int]:
        """The source's labels: name -> value."""
        return self.row["labels"]

    def cases(self, folder: Path) -> list[Case]:
        """Cases with labels; an image or a label without its counterpart is listed too."""
        raise NotImplementedError

    def test_images(self, folder: Path) -> list[Case]:
        """Images that are published without labels."""
        return []

    def image_files(self, image: Path, scratch: Path) -> list[Path]:
        """NIfTI files of a case's channels; those that have to be made first are made in the folder `scratch`."""
        return [image]

    def label(self, case: Case, image: nib.Nifti1Image, wanted: dict[str, int], other_grid: OtherGrid) -> Labels:
        """Label map in the source's values on the image's grid. `wanted`: classes to write, with their values."""
        volume = read_volume(case.label)
        placed, how = on_grid(volume, image, case.label, other_grid)
        return Labels(placed, integers(placed, case.label), how)


@dataclass(frozen=True)
class Labels:
    volume: nib.Nifti1Image
    data: np.ndarray  # integers (X, Y, Z)
    placed: str = AS_IT_IS  # as Placed.how
    overlap: int = 0  # voxels that several masks claimed


def numbered(files: Iterable[Path], pattern: str) -> dict[str, Path]:
    """Files by what the only group of `pattern` matches in their names; others, and macOS's '._' twins, are omitted.

    Raises:
        InputError: for two files of one number.
    """
    found: dict[str, Path] = {}
    for file in sorted(files):
        match = re.fullmatch(pattern, file.name)
        if match is None or file.name.startswith("."):
            continue
        if match[1] in found:
            raise InputError(f"{found[match[1]]} and {file} are the same case twice: leave one of them in the folder.")
        found[match[1]] = file
    return found


def paired(images: dict[str, Path], labels: dict[str, Path], name: str = "{}") -> list[Case]:
    """Cases `name` of all numbers that an image or a label has."""
    return [Case(name.format(n), images.get(n), labels.get(n)) for n in sorted({*images, *labels}, key=natural)]


def natural(text: str) -> list:
    """Sorting key: 2 before 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]
