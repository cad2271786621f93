"""What a foundation model expects of its input and gives to an adapter."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path


@dataclass(frozen=True)
class BackboneContract:
    """The JSON beside a backbone's weights.

    id: its name in plans and on the command line.
    architecture: how to build it; "kind" names the class in fsefs_nnunet.backbones.frozen, the rest is its own.
    classes: names of the universal head's rows, in order.
    softmax: the head's rows compete and row 0 is the background; otherwise each is a sigmoid of its own.
    input_channels: image channels.
    divisor: voxels per axis that a window must be a multiple of.
    patch_size: largest window, voxels per axis.
    smallest_window: smallest window that it was trained on, voxels per axis.
    spacing: mm per axis in x, y, z, or None: the dataset's own.
    ct_intensities: how CT is normalised, the values that nnU-Net's CTNormalization reads: clipped to percentile_00_5
        and percentile_99_5, then shifted by mean and divided by std; None for a model that was not trained on CT.
    modalities: "CT", or "any" for images of other channel names as well.
    sha256: of the weights file.
    """

    id: str
    architecture: dict
    classes: tuple[str, ...]
    softmax: bool
    input_channels: int
    divisor: int
    patch_size: tuple[int, int, int]
    smallest_window: int
    spacing: tuple[float, float, float] | None
    ct_intensities: dict[str, float] | None
    modalities: str
    sha256: str = ""
    licence: str = ""
    citation: str = ""
    description: str = ""
    training: dict = field(default_factory=dict)

    @classmethod
    def load(cls, file: Path) -> BackboneContract:
        """Read a contract. Raises ValueError naming the file if a key is missing or unknown."""
        try:
            content = json.loads(Path(file).read_text())
            return cls(**{key: tuple(v) if isinstance(v, list) else v for key, v in content.items()})
        except (json.JSONDecodeError, TypeError, AttributeError) as error:
            known = ", ".join(f.name for f in fields(cls))
            raise ValueError(f"{file} is no backbone contract ({error}); its keys are: {known}.") from error

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)
