"""dataset.json of a dataset in nnU-Net's layout."""

from __future__ import annotations

import json
from pathlib import Path

from fsefs_nnunet.errors import InputError


def channel_names(dataset_json: dict) -> dict[str, str]:
    """By position. nnU-Net reads the older name of the key, too."""
    return dataset_json["modality"] if "modality" in dataset_json else dataset_json["channel_names"]


def read_dataset_json(file: Path) -> dict:
    """The content of `file`, with `channel_names` whatever the file calls them.

    Raises:
        InputError: if it cannot be read, or does not say channels, labels and file_ending.
    """
    try:
        content = json.loads(Path(file).read_text("utf-8"))
        content = {**content, "channel_names": channel_names(content)}
        dict(content["channel_names"]), content["file_ending"], content["labels"]["background"]
    except KeyError as error:
        raise InputError(f"{file} does not say {error}: add it, as nnU-Net's format wants.") from error
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{file} is no dataset.json of nnU-Net's ({error}): repair or replace it.") from error
    return content
