"""The images of a folder that is to be segmented, and why some of them cannot be."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from fsefs_nnunet.cases.grids import shift_warnings
from fsefs_nnunet.cases.headers import Header, warnings_of
from fsefs_nnunet.cases.images import list_images, read_headers
from fsefs_nnunet.errors import InputError


@dataclass
class ImagesToSegment:
    """By case: files (one per channel) and headers of those that can be tried, and why the others failed."""

    cases: dict[str, list[str]] = field(default_factory=dict)
    headers: dict[str, list[Header]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def not_segmented(file: str | Path, error: object) -> str:
    """The sentence about a failure, which names the file once."""
    text = str(error) or type(error).__name__
    if text.startswith(f"{file} "):
        text = f"it {text[len(str(file)) + 1 :]}"
    return f"{file} was not segmented: {text}"


def refuse_output(output: Path, images: Path) -> None:
    """Raises InputError for a folder in which segmentations would replace images, or labels drawn by hand."""
    folder = Path(output).resolve()
    in_dataset = (
        folder.name in ("imagesTr", "labelsTr", "imagesTs", "labelsTs") and (folder.parent / "dataset.json").exists()
    )
    if folder == Path(images).resolve() or in_dataset or (folder / "imagesTr").exists():
        raise InputError(f"{output} holds images or labels of a dataset: choose another output folder.")


def images_to_segment(
    folder: Path, dataset_json: dict, reader_name: str, num_parts: int = 1, part_id: int = 0
) -> ImagesToSegment:
    """Look at the names and headers of every `num_parts`-th case, and print what the user should know about these.

    Raises:
        InputError: for a folder without images.
    """
    listed, made, offsets = list_images(folder, dataset_json), ImagesToSegment(), {}
    for case in sorted({*listed.cases, *listed.faults})[part_id::num_parts]:
        if case in listed.faults:
            if case.removesuffix(dataset_json["file_ending"]) in listed.cases:
                continue  # a label map next to its image
            made.failures[case] = not_segmented(listed.faults[case].file, listed.faults[case])
            continue
        files = listed.cases[case]
        try:
            made.headers[case], offsets[case] = read_headers(files, reader_name)
        except InputError as error:
            made.failures[case] = not_segmented(files[0], error)
        else:
            made.cases[case] = files
    headers = [header for of_case in made.headers.values() for header in of_case]
    for sentence in (*made.failures.values(), *warnings_of(headers), *shift_warnings(offsets)):
        tqdm.write(sentence)
    return made
