"""Raw images and label maps in nnU-Net's naming: found, read, and refused in a sentence that names the file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fsefs_nnunet.cases.dataset_json import channel_names
from fsefs_nnunet.cases.preprocessed import require_finite
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.labels import values_in


def read_image(reader, files: list[str]) -> tuple[np.ndarray, dict]:
    """Image (channels, X, Y, Z) and properties, as nnU-Net's `reader` gives them.

    Raises:
        InputError: if a channel is missing or too many, or it cannot be read, or it holds NaN or infinite values, some
            of which normalisation would hide.
    """
    require_channels(files)
    try:
        image, properties = reader.read_images(files)
    except Exception as error:  # each of the libraries that read images has errors of its own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{', '.join(files)} cannot be read ({reason}): repair it, or leave the case out.") from error
    require_finite(image, files)
    return image, properties


def check_label(reader, file: str, shape: Sequence[int], values: set[int]) -> None:
    """Refuse a label map that nnU-Net cannot train with; `shape` is its image's, `values` those of dataset.json.

    Raises:
        InputError: if it cannot be read, has another shape, or holds other values.
    """
    if not Path(file).exists():
        raise InputError(f"{file} is missing: every image of imagesTr needs its label map.")
    try:
        labels, _ = reader.read_seg(file)
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{file} cannot be read ({reason}): repair it, or leave the case out.") from error
    if labels.shape[1:] != tuple(shape):
        raise InputError(f"{file} has {labels.shape[1:]} voxels, its image {tuple(shape)}: repair it.")
    unknown = sorted(values_in(labels) - values)
    if unknown:
        raise InputError(f"{file} holds values {unknown[:5]}, which dataset.json does not name: add or repair them.")


def images_in(folder: Path, dataset_json: dict) -> dict[str, list[str]]:
    """Cases of a folder in nnU-Net's naming, `<case>_0000<file ending>` and so on per channel, there or not.

    Raises:
        InputError: if the folder has no such image.
    """
    ending, channels = dataset_json["file_ending"], len(channel_names(dataset_json))
    first = sorted(Path(folder).glob(f"*_0000{ending}"))
    if not first:
        raise InputError(f"{folder} has no images named <case>_0000{ending}: expected nnU-Net's naming.")
    cases = {}
    for file in first:
        case = file.name[: -len(f"_0000{ending}")]
        cases[case] = [str(file.with_name(f"{case}_{channel:04d}{ending}")) for channel in range(channels)]
    return cases


def require_channels(files: list[str]) -> None:
    """Raises InputError if one of a case's files is missing, or a further channel lies beside them."""
    for file in files:
        if not Path(file).exists():
            raise InputError(f"{file} is missing: every case needs {len(files)} channel(s).")
    first = Path(files[0])
    odd = first.with_name(re.sub(r"_0000(?=\.)", f"_{len(files):04d}", first.name))
    if odd != first and odd.exists():
        raise InputError(f"{odd} is a channel too many: the dataset has {len(files)}. Move it away.")
