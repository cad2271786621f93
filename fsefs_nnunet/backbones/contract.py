"""What a foundation model expects of its input and gives to an adapter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np

from fsefs_nnunet.errors import InputError

CT_PROPERTIES = ("percentile_00_5", "percentile_99_5", "mean", "std")  # what nnU-Net's CTNormalization reads


@dataclass(frozen=True)
class BackboneContract:
    """The JSON beside a backbone's weights. What it wants of an image is said in the words of nnU-Net's plans.

    "Axis" is an axis of the network's input, in this order: what the reader gives (nnU-Net's readers give z, y, x),
    transposed by `transpose_forward`. Channels count by position, as channel_names in a dataset.json.

    id: its name in plans and on the command line.
    architecture: how to build it; "kind" is a key of architectures.ARCHITECTURES. "features", the channels of all maps
        together, is read here where it is not a U-Net of nnU-Net's, as are "head" (false: none) and "encoder_only"
        (true: an untrained decoder); the rest is the architecture's own.
    classes: names of the universal head's rows, in order; of what it was trained on, where it has no linear head.
    softmax: the head's rows compete and row 0 is the background; otherwise each is a sigmoid of its own.
    channel_names: what it was trained on, per channel.
    image_reader_writer: nnU-Net's reader; only those "WithReorient" turn images to RAS.
    transpose_forward: which of the reader's axes each axis is; [2, 1, 0] makes x, y, z of z, y, x.
    spacing: mm per axis, or None: the dataset's own.
    normalization_schemes, use_mask_for_norm: per channel, or None: what nnU-Net chooses for the dataset's channels.
    foreground_intensity_properties_per_channel: for the channels of CTNormalization, which clips to percentile_00_5
        and percentile_99_5, subtracts mean and divides by std.
    resampling_fn_data, resampling_fn_data_kwargs: how images are resampled.
    patch_size: largest window, voxels per axis.
    smallest_window: smallest window that it was trained on, voxels per axis.
    divisor: what a window must be a multiple of, voxels per axis.
    sha256: of the weights file.
    source: file, sha256 and left_out of what was imported, where it was one file: its name, its hash, and the names of
        the tensors that are not here by why they are not.
    """

    id: str
    architecture: dict
    classes: tuple[str, ...]
    softmax: bool
    channel_names: tuple[str, ...]
    image_reader_writer: str
    transpose_forward: tuple[int, int, int]
    spacing: tuple[float, float, float] | None
    normalization_schemes: tuple[str, ...] | None
    use_mask_for_norm: tuple[bool, ...] | None
    foreground_intensity_properties_per_channel: dict[str, dict[str, float]]
    resampling_fn_data: str
    resampling_fn_data_kwargs: dict
    patch_size: tuple[int, int, int]
    smallest_window: tuple[int, int, int]
    divisor: tuple[int, int, int]
    sha256: str = ""
    licence: str = ""
    citation: str = ""
    description: str = ""
    training: dict = field(default_factory=dict)
    source: dict = field(default_factory=dict)

    @property
    def input_channels(self) -> int:
        return len(self.channel_names)

    @property
    def head_classes(self) -> tuple[str, ...]:
        """The classes that have a row in a linear head."""
        return self.classes if self.architecture.get("head", True) else ()

    @property
    def encoder_only(self) -> bool:
        """Whether its decoder has never been trained, so that its features mean nothing until it is."""
        return self.architecture.get("encoder_only", False)

    @property
    def stage_features(self) -> dict[str, int]:
        """Features that an adapter gets for each choice of `stages`; "last" comes first in all of them."""
        *skips, _ = self.architecture.get("arch_kwargs", {}).get("features_per_stage", [None])
        if skips:
            return {"last": skips[0], "all": sum(skips), "skips": 2 * sum(skips)}
        return {"last": self.architecture.get("features", self.input_channels)}

    def window(self, median_shape: Sequence[float]) -> list[int]:
        """Patch size: covers a volume of `median_shape` as far as the smallest and largest window allow it."""
        fitting = np.ceil(np.maximum(median_shape, self.smallest_window) / self.divisor) * self.divisor
        return np.minimum(fitting, self.patch_size).astype(int).tolist()

    @classmethod
    def load(cls, file: Path) -> BackboneContract:
        """Read a contract. Raises InputError naming the file if it cannot be read, or a key is missing or unknown."""
        try:
            content = json.loads(Path(file).read_text("utf-8"))
            return cls(**{key: tuple(v) if isinstance(v, list) else v for key, v in content.items()})
        except (OSError, json.JSONDecodeError, UnicodeDecodeError, TypeError, AttributeError) as error:
            known = ", ".join(f.name for f in fields(cls))
            raise InputError(
                f"{file} is no backbone contract ({error}): import the backbone again, or repair the file, whose keys "
                f"are {known}."
            ) from error

    def check_channels(self, names: Sequence[str], file: str) -> None:
        """Compare the channel names of a dataset, whose dataset.json is `file`, with what the backbone was trained on.

        Raises:
            InputError: for another number of channels, and where one of the two is CT and the other is not.
        """
        if len(names) != self.input_channels:
            raise InputError(
                f"{file} has {len(names)} channel(s), backbone {self.id!r} takes {self.input_channels}: "
                "choose another backbone or convert the dataset."
            )
        for channel, (name, known) in enumerate(zip(names, self.channel_names)):
            if self.normalization_schemes is None:
                if _is_ct(name) and str(channel) not in self.foreground_intensity_properties_per_channel:
                    raise InputError(f"Backbone {self.id!r} was not trained on CT, {file} names CT: choose another.")
            elif _is_ct(name) != _is_ct(known):  # Hounsfield units are absolute, other intensities are not
                raise InputError(
                    f"Channel {channel} of {file} is {name!r}, backbone {self.id!r} was trained with {known!r} "
                    f"there: choose another backbone, or name the channel {known!r} if it holds the same."
                )

    def describe_normalization(self, channel: int, scheme: str, masked: bool) -> str:
        """E.g. "CTNormalization: clipped to [-175, 250], minus -175, divided by 425"."""
        text = f"{scheme} inside the nonzero mask" if masked else scheme
        if scheme != "CTNormalization":
            return text
        values = self.foreground_intensity_properties_per_channel[str(channel)]
        low, high, mean, std = (values[key] for key in CT_PROPERTIES)
        return f"{text}: clipped to [{low:g}, {high:g}], minus {mean:g}, divided by {std:g}"

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


def _is_ct(channel_name: str) -> bool:
    return channel_name.casefold() == "ct"  # as nnU-Net compares
