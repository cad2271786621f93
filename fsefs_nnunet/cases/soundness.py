"""The training cases of a raw dataset, checked once before anything is made of them: nnU-Net silently accepts faults
that mislead a training, and ends with a traceback of its workers for what it cannot read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from fsefs_nnunet.cases.dataset_json import order_warnings, shows_ct
from fsefs_nnunet.cases.folders import require_label_file, warnings_of_cases
from fsefs_nnunet.cases.grids import offset_in_mm, shift_warnings
from fsefs_nnunet.cases.headers import Header, pixdim_remedy, read_header, times, warnings_of
from fsefs_nnunet.cases.images import check_label, is_constant, lacks_air, offset_warning, read_headers, read_image
from fsefs_nnunet.cases.readers import reorients
from fsefs_nnunet.errors import InputError, several
from fsefs_nnunet.labels import foreground, label_values

Result = TypeVar("Result")
FAR_OFF = 5.0  # times the usual field of view, along all axes: patients and protocols differ by less


@dataclass(frozen=True)
class Voxels:
    """Of a case that can be trained on: whether its CT cannot be in HU, and the values of its label map."""

    lacks_air: bool
    values: set[int]


def check_training_cases(
    raw: Path,
    dataset_json: dict,
    cases: dict[str, dict],
    reader: type,
    num_threads: int,
    accept_positive_ct: bool = False,
) -> None:
    """Refuse cases that cannot be trained on, and print what a user should know about the others.

    Args:
        cases: as `training_files` gives them.
        reader: nnU-Net's, the one of the plans.
        accept_positive_ct: whether CTs without a value below 0 are accepted as they are.

    Raises:
        InputError: naming the case, if a file cannot be read, headers contradict themselves or each other, an image
            holds NaN or a single value, a label map holds values that dataset.json does not name, no label map shows
            any label, or a CT cannot be in HU.
    """
    values = label_values(dataset_json["labels"])

    def headers_of(case: str) -> tuple[list[Header], float]:
        return check_headers(cases[case]["images"], cases[case]["label"], reader.__name__)

    def voxels_of(case: str) -> Voxels:
        return check_voxels(cases[case]["images"], cases[case]["label"], values, reader)

    headers = check_all(headers_of, cases, num_threads, "checking headers")
    require_one_scale({case: of_case[0] for case, (of_case, _) in headers.items()})
    found = check_all(voxels_of, cases, num_threads, "checking cases")
    shown = set.union(*(one.values for one in found.values()))
    if not shown - {0}:
        raise InputError(f"No label map of {raw} shows anything but background: there is nothing to learn from.")
    if shows_ct(dataset_json) and (odd := [cases[case]["images"][0] for case, one in found.items() if one.lacks_air]):
        if not accept_positive_ct:
            raise InputError(
                f"{offset_warning(odd)} Subtract it and save the images in HU; if they are correct as they are, "
                "`fseft plan --accept_positive_ct` accepts them (with nnU-Net's commands: export "
                "fseft_accept_positive_ct=1)."
            )
        print(f"Warning: {offset_warning(odd)}")
    all_headers = [header for of_case, _ in headers.values() for header in of_case]
    warnings = [*order_warnings(dataset_json), *warnings_of_cases(raw, dataset_json, cases), *warnings_of(all_headers)]
    labels = foreground(dataset_json["labels"])
    if absent := [name for name in labels if not shown & label_values({name: labels[name]})]:
        warnings.append(f"No label map of {raw} shows {', '.join(absent)}.")
    warnings += shift_warnings({case: offset for case, (_, offset) in headers.items()})
    for warning in warnings:
        print(f"Warning: {warning}")


def check_all(check: Callable[[str], Result], cases: Collection[str], num_threads: int, text: str) -> dict[str, Result]:
    """The result of `check` for each case.

    Raises:
        InputError: the first one raised for a case, with the names of all other cases that were refused.
    """

    def attempt(case: str) -> Result | InputError:
        try:
            return check(case)
        except InputError as error:
            return error

    with ThreadPoolExecutor(max(1, num_threads)) as pool:
        found = dict(zip(cases, tqdm(pool.map(attempt, cases), total=len(cases), desc=text)))
    refused = {case: error for case, error in found.items() if isinstance(error, InputError)}
    if refused:
        first, *others = refused
        also = f" Other cases have faults, too: {several(others)}." if others else ""
        raise InputError(f"{refused[first]}{also}")
    return found


def require_one_scale(headers: dict[str, Header]) -> None:
    """Raises InputError if one image's field of view differs by an order of magnitude along all axes, as cm for mm do.

    Args:
        headers: by case, of one of its images.
    """
    sizes = {case: np.sort(header.field_of_view) for case, header in headers.items()}
    usual = np.median(list(sizes.values()), 0)
    for case, mm in sizes.items():
        if is_far_off(mm, usual):
            raise InputError(
                f"{headers[case].file} spans {times(mm)} mm according to its header, the dataset's images "
                f"{times(usual)} mm: is its spacing in mm? Repair its header, or leave the case out."
            )


def is_far_off(mm: np.ndarray, usual: np.ndarray) -> bool:
    """Whether a field of view differs by an order of magnitude along all axes; both sorted, (3,)."""
    return bool((mm > FAR_OFF * usual).all() or (mm * FAR_OFF < usual).all())


def check_headers(images: list[str], label: str, reader_name: str) -> tuple[list[Header], float]:
    """The headers of a case's images and label map, and how far these lie from the first image, in mm.

    Raises:
        InputError: if one is missing or contradicts itself, or they do not belong to each other.
    """
    require_label_file(label)
    headers, offset = read_headers(images, reader_name)
    headers.append(read_header(label))
    for header in headers:
        if not header.pixdim_agrees:
            raise InputError(pixdim_remedy(header))
    return headers, max(offset, offset_in_mm(headers[-1], headers[0], reorients(reader_name)))


def check_voxels(images: list[str], label: str, values: set[int], reader: type) -> Voxels:
    """Raises InputError as check_training_cases."""
    image, _ = read_image(reader(), images)
    if is_constant(image):
        raise InputError(f"{images[0]} is constant ({image[0].min():g}): repair it, or leave the case out.")
    shape, without_air = image.shape[1:], lacks_air(image)
    del image  # a label map takes as much memory while it is read
    return Voxels(without_air, check_label(reader(), label, shape, values))
