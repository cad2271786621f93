"""What a cell of the grid leaves in its JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from fsefs_nnunet.errors import InputError
from fsefs_nnunet.files import write_json

CaseMetrics = dict[str, dict[str, dict[str, float]]]  # case -> class -> metric; NaN: there is nothing to compare


@dataclass(frozen=True)
class Result:
    """
    support: the labelled cases that it was trained on.
    weights: SHA-256 of what predicted.
    images, labels: SHA-256 of what it predicted from and was compared with, as Target has them.
    seconds: wall time of the training; the first training that needs the feature bank also fills it.
    volume_seconds: mean time of adapting to a volume; 0.0 without adaptation.
    budget_seconds: what the training was limited to; 0.0 if it was not.
    peak_memory_gb: of the training process; NaN if the system does not say.
    wall_seconds: what the benchmark spent on it.
    windows: through the frozen backbone, in predictions from shared features that it began; those of its training are
        in the run file.
    """

    method: str
    shots: int | str
    fold: int
    support: list[str]
    weights: str
    images: str
    labels: str
    trained_parameters: int
    seconds: float
    volume_seconds: float
    budget_seconds: float
    peak_memory_gb: float
    wall_seconds: float
    windows: int
    cases: CaseMetrics

    def save(self, file: Path) -> None:
        write_json(file, asdict(self))

    @classmethod
    def load(cls, file: Path) -> Result:
        """Raises InputError if the file is not one of these."""
        try:
            return cls(**_replaced(json.loads(file.read_text("utf-8")), lambda x: float("nan") if x is None else x))
        except (json.JSONDecodeError, TypeError) as error:
            raise InputError(f"{file} is not a result of this version of `fseft benchmark`: run it again.") from error


def _replaced(content, change):
    if isinstance(content, dict):
        return {key: _replaced(value, change) for key, value in content.items()}
    return change(content)
