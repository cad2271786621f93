"""The training cases of a raw dataset, read once before anything is made of them: nnU-Net takes some of what misleads a
training without a word, and what it cannot read ends in a traceback of its workers'.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from fsefs_nnunet.cases.dataset_json import shows_ct
from fsefs_nnunet.cases.folders import require_label_file, warnings_of_cases
from fsefs_nnunet.cases.headers import Header, offset_in_mm, pixdim_remedy, read_header, several, warnings_of
from fsefs_nnunet.cases.images import check_label, is_constant, lacks_air, offset_warning, read_headers, read_image
from fsefs_nnunet.cases.readers import reorients
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.labels import label_values


@dataclass(frozen=True)
class Findings:
    """Of one case that can be trained on."""

    headers: list[Header]  # of its images and its label map
    offset_mm: float  # of the label map from the image
    lacks_air: bool
    is_labelled: bool


def check_training_cases(
    raw: Path,
    dataset_json: dict,
    cases: dict[str, dict],
    reader: type,
    num_threads: int,
    accept_positive_ct: bool = False,
) -> None:
    """Refuse cases that cannot be trained on, and print what a user should know of the others.

    Args:
        cases: as `training_files` gives them.
        reader: nnU-Net's, the one of the plans.
        accept_positive_ct: whether CTs without a value below 0 are taken as they are.

    Raises:
        InputError: naming the case, where a file cannot be read; headers contradict themselves or each other; an image
            holds NaN or one value alone; a label map holds values of which dataset.json says nothing; no label map
            shows any label; a CT cannot be in HU.
    """
    values = label_values(dataset_json["labels"])

    def check(case: str) -> Findings:
        return check_case(cases[case]["images"], cases[case]["label"], values, reader)

    with ThreadPoolExecutor(max(1, num_threads)) as pool:
        found = dict(zip(cases, tqdm(pool.map(check, cases), total=len(cases), desc="checking cases")))
    if not any(one.is_labelled for one in found.values()):
        raise InputError(f"No label map of {raw} shows anything but background: there is nothing to learn from.")
    if shows_ct(dataset_json) and (odd := [cases[case]["images"][0] for case, one in found.items() if one.lacks_air]):
        if not accept_positive_ct:
            raise InputError(
                f"{offset_warning(odd)} Subtract it and save the images in HU; if they are right as they are, "
                "`fseft plan --accept_positive_ct` takes them (with nnU-Net's commands: export "
                "fseft_accept_positive_ct=1)."
            )
        print(f"Warning: {offset_warning(odd)}")
    headers = [header for one in found.values() for header in one.headers]
    warnings = [*warnings_of_cases(raw, dataset_json, cases), *warnings_of(headers)]
    warnings += shift_warnings({case: one.offset_mm for case, one in found.items()})
    for warning in warnings:
        print(f"Warning: {warning}")


def shift_warnings(offsets_mm: dict[str, float]) -> list[str]:
    """At most one sentence; `offsets_mm`: of label map and image by case."""
    shifted = {case: offset for case, offset in offsets_mm.items() if offset}
    if not shifted:
        return []
    return [
        f"The headers of {several(shifted)} place label map and image up to {max(shifted.values()):.3g} mm apart. They "
        "are taken voxel by voxel, as nnU-Net takes them: look at them with nnUNetv2_plot_overlay_pngs."
    ]


def check_headers(images: list[str], label: str, reader_name: str) -> tuple[list[Header], float]:
    """The headers of a case's images and label map, and how far nnU-Net's reader sees these apart, in mm.

    Raises:
        InputError: where one is missing or contradicts itself, or they do not belong to each other.
    """
    require_label_file(label)
    headers = [*read_headers(images, reader_name), read_header(label)]
    for header in headers:
        if not header.pixdim_agrees:
            raise InputError(pixdim_remedy(header))
    return headers, offset_in_mm(headers[-1], headers[0], reorients(reader_name))


def check_case(images: list[str], label: str, values: set[int], reader: type) -> Findings:
    """Raises InputError as check_training_cases."""
    headers, offset = check_headers(images, label, reader.__name__)
    image, _ = read_image(reader(), images)
    if is_constant(image):
        raise InputError(f"{images[0]} holds the value {image[0].min():g} alone: repair it, or leave the case out.")
    is_labelled = check_label(reader(), label, image.shape[1:], values)
    return Findings(headers, offset, lacks_air(image), is_labelled)
