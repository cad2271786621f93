"""Raw images and label maps in nnU-Net's naming: found, read, and refused in a sentence that names the file."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fsefs_nnunet.cases.dataset_json import channel_names
from fsefs_nnunet.cases.grids import offset_in_mm
from fsefs_nnunet.cases.headers import Header, read_header, refused_if_unreadable
from fsefs_nnunet.cases.preprocessed import require_finite
from fsefs_nnunet.cases.readers import reorients, spacing_of
from fsefs_nnunet.errors import InputError, several
from fsefs_nnunet.labels import values_in

_VOLUMES = re.compile(r"(.+?)(_\d{4})?\.(nii|nii\.gz|mha|mhd|nrrd|nhdr|hdr|gipl)", re.IGNORECASE | re.DOTALL)


# ---- which files a folder holds ----


class Fault(NamedTuple):
    """What is wrong with a file: "FILE `what`" is a sentence."""

    file: Path
    what: str

    def __str__(self) -> str:
        return f"{self.file} {self.what}"


@dataclass
class ImageFolder:
    """Cases of a folder in nnU-Net's naming, `<case>_0000<file ending>` and so on for each channel.

    cases: those that are complete, with one file per channel.
    faults: why the others are not; by case, or by file name for a file that belongs to no case.
    """

    cases: dict[str, list[str]] = field(default_factory=dict)
    faults: dict[str, Fault] = field(default_factory=dict)

    def require_sound(self) -> dict[str, list[str]]:
        """The cases. Raises InputError if the folder contains anything else."""
        if self.faults:
            first, *others = map(str, self.faults.values())
            raise InputError(first + (f" {len(others)} more file(s) have faults." if others else ""))
        return self.cases


def is_leftover(name: str) -> bool:
    """Whether a file was left by macOS (`._scan.nii.gz`, `.DS_Store`) or is otherwise hidden."""
    return name.startswith(".")


def list_images(folder: Path, dataset_json: dict) -> ImageFolder:
    """The content of `folder`; hidden files, and those that are not volumes by their names, are ignored.

    Raises:
        InputError: if there is no such folder, or it holds no image at all.
    """
    folder, ending, channels = Path(folder), dataset_json["file_ending"], len(channel_names(dataset_json))
    if not folder.is_dir():
        found = "is a file, perhaps an image: give its folder" if folder.is_file() else "does not exist"
        raise InputError(f"{folder} {found}. Expected a folder of images named <case>_0000{ending}.")
    names = sorted(path.name for path in folder.iterdir() if not is_leftover(path.name))
    listed, numbers, others = ImageFolder(), {}, []
    for name in names:
        stem = name.removesuffix(ending)
        named = re.fullmatch(r"(.+)_(\d{4})", stem, re.DOTALL)
        if stem != name and named:
            numbers.setdefault(named[1], []).append(int(named[2]))
        elif stem != name:
            right = f"{stem}_0000{ending}"
            what = f"has no channel number: expected nnU-Net's naming, {right} for the first channel."
            listed.faults[name] = Fault(folder / name, what)
        elif volume := _VOLUMES.fullmatch(name):
            others.append((volume[1], name))
    for case, found in sorted(numbers.items()):
        files = [f"{case}_{channel:04d}{ending}" for channel in range(channels)]
        if again := [name for of_case, name in others if of_case == case]:
            listed.faults[case] = Fault(folder / files[0], f"exists twice, also as {several(again)}: keep one.")
        elif fault := _fault(folder, files, {number: f"{case}_{number:04d}{ending}" for number in found}):
            listed.faults[case] = fault
        else:
            listed.cases[case] = [str(folder / file) for file in files]
    for name in (name for case, name in others if case not in numbers):
        what = (
            f"does not end with {ending}, the file_ending of dataset.json: convert it, move it away, or correct the "
            "key."
        )
        listed.faults[name] = Fault(folder / name, what)
    if not listed.cases and not listed.faults:
        raise InputError(
            f"{folder} has no images named <case>_0000{ending}: expected nnU-Net's naming, found "
            f"{several(names) or 'no file'}."
        )
    return listed


def _fault(folder: Path, wanted: list[str], found: dict[int, str]) -> Fault | None:
    """Why a case is not complete, or None; `wanted`: its channels' file names, `found`: existing ones by number."""
    for name in wanted:
        if name not in found.values():
            there = several(n for n in found.values() if n not in wanted)
            there = f" Found {there}, which may be the missing file." if there else ""
            return Fault(folder / name, f"is missing: every case needs {len(wanted)} channel(s).{there}")
        if not (folder / name).exists():
            return broken_link(folder / name)
    if extra := [name for number, name in sorted(found.items()) if number >= len(wanted)]:
        return Fault(folder / extra[0], f"is one channel too many: the dataset has {len(wanted)}. Move it away.")
    return None


def broken_link(file: Path) -> Fault:
    """The fault of a link whose target does not exist."""
    return Fault(file, f"is a broken link to {file.readlink()}: restore that file, or remove the case.")


# ---- reading them ----


def read_headers(files: Sequence[str], reader_name: str) -> tuple[list[Header], float]:
    """Headers of the channels of one image, and how far the others lie from the first, in mm.

    Raises:
        InputError: as read_header, and if the channels do not lie on one grid.
    """
    headers = [read_header(file) for file in files]
    offsets = [offset_in_mm(header, headers[0], reorients(reader_name)) for header in headers[1:]]
    return headers, max(offsets, default=0.0)


def _spacings_differ(headers: Sequence[Header]) -> str | None:
    """What to do about channels whose spacings differ by rounding, which nnU-Net's readers reject without saying so."""
    first = headers[0]
    for other in headers[1:]:
        one, two = (np.sort((*header.pixdim, *header.sizes)) for header in (first, other))
        if not np.allclose(one, two):
            files = [shlex.quote(header.file) for header in (first, other)]
            return (
                f"{other.file} and {first.file} differ in spacing, nnU-Net expects the same for all channels. Rewrite "
                f"both: fseft rewrite_header {files[0]} && fseft rewrite_header {files[1]} --from {files[0]}"
            )
    return None


def read_image(reader, files: list[str]) -> tuple[np.ndarray, dict]:
    """Image (channels, X, Y, Z) and properties, as nnU-Net's `reader` returns them.

    The spacing is that of the affine if the header contradicts itself.

    Raises:
        InputError: if a channel cannot be read, lies on a different grid from the first, or holds NaN or infinite
            values, some of which normalisation would hide.
    """
    name = type(reader).__name__
    headers, _ = read_headers(files, name)
    try:
        with refused_if_unreadable(*files):
            image, properties = reader.read_images(files)
    except InputError as error:
        raise (InputError(text) if (text := _spacings_differ(headers)) else error) from error
    require_finite(image, files)
    if not headers[0].pixdim_agrees:
        properties["spacing"] = spacing_of(headers[0], name)
    return image, properties


def is_constant(image: np.ndarray) -> bool:
    """Whether every channel of an image (channels, X, Y, Z) holds a single value."""
    return all(channel.min() == channel.max() for channel in image)


def constant_warning(file: str, image: np.ndarray) -> str:
    return f"{file} is constant ({image[0].min():g}): nothing is segmented in it."


def lacks_air(image: np.ndarray) -> bool:
    """Whether an image whose first channel is CT cannot be in HU."""
    return bool(image[0].min() >= 0)


def offset_warning(files: Iterable[str]) -> str:
    return f"{several(files)}: no value below 0, unlike CT in HU: another modality, or stored with an offset (of 1024)?"


def require_whole_numbers(values: Iterable[float], file: str | Path) -> None:
    """Raises InputError if the values of a label map are not integers, which nnU-Net would round down."""
    if any(math.isnan(value) for value in values):
        raise InputError(f"{file} holds NaN: repair the label map, or leave the case out.")
    if odd := sorted(value for value in values if not float(value).is_integer()):
        raise InputError(
            f"{file} holds values that are not integers, {several(f'{value:.9g}' for value in odd)}: round them and "
            "save it as integers, with a slope of 1."
        )


def check_label(reader, file: str, shape: Sequence[int], values: set[int]) -> set[int]:
    """The values of a label map; `shape` is its image's, `values` are those of dataset.json.

    Raises:
        InputError: if it cannot be read, has another shape, or holds other values.
    """
    with refused_if_unreadable(file):
        labels, _ = reader.read_seg(file)
    if labels.shape[1:] != tuple(shape):
        raise InputError(f"{file} has {labels.shape[1:]} voxels, but its image {tuple(shape)}: repair it.")
    found = values_in(labels)
    require_whole_numbers(found, file)
    if unknown := sorted(found - values):
        raise InputError(
            f"{file} holds the values {several(f'{value:g}' for value in unknown)}, but dataset.json names "
            f"{', '.join(map(str, sorted(values)))}: renumber the label map, or complete the labels of dataset.json."
        )
    return {int(value) for value in found}
