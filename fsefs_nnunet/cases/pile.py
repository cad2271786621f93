"""Cases of a student's dataset that a model labelled, in a file next to the splits: checkpoints do not name cases."""

from __future__ import annotations

from pathlib import Path

from fsefs_nnunet.files import read_json, write_json

PILE_FILE = "labelled_by_a_model.json"


def pile_cases(preprocessed: str | Path) -> set[str]:
    """The pile of the dataset with this folder in nnUNet_preprocessed; empty unless it is a student's dataset.

    Raises:
        InputError: if the file is damaged.
    """
    file = Path(preprocessed) / PILE_FILE
    return set(read_json(file)["cases"]) if file.exists() else set()


def keep_pile(preprocessed: Path, cases: list[str]) -> None:
    write_json(preprocessed / PILE_FILE, {"cases": sorted(cases)})
