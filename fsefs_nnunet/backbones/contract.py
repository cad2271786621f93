"""What a foundation model expects of its input and provides to an adapter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np

from fsefs_nnunet.errors import InputError

ANY = "any"
# chosen on the queries of an abdominal MR data set (documentation/benchmarks.md, "Backbones that saw patients")
AS_CT = {"mean": 50.0, "std": 50.0, "low": -200.0, "high": 300.0}
CT_PROPERTIES = ("percentile_00_5", "percentile_99_5", "mean", "std")  # what nnU-Net's CTNormalization reads


@dataclass(frozen=True)
class BackboneContract:
    """The JSON next to a backbone's weights. What it expects of an image is stated in the terms of nnU-Net's plans.

    "Axis" is an axis of the network's input, in this order: what the reader gives (nnU-Net's readers give z, y, x),
    transposed by `transpose_forward`. Channels count by position, as channel_names in a dataset.json.

    id: its name in plans and on the command line.
    architecture: how to build it; "kind" is a key of architectures.ARCHITECTURES. "head" (false: none),
        "linear_head" (false: more than a 1^3 convolution) and "encoder_only" (true: an untrained decoder) are read
        here; the rest is the architecture's own.
    classes: names of the universal head's rows, in order; of what it was trained on, if it has no head.
    softmax: the head's rows compete and row 0 is the background; otherwise each is a sigmoid of its own.
    channel_names: what it was trained on, per channel; "any" for images of any kind.
    image_reader_writer: nnU-Net's reader; only those "WithReorient" turn images to RAS.
    transpose_forward: which of the reader's axes each axis is; [2, 1, 0] makes x, y, z of z, y, x.
    spacing: mm per axis, or None: the dataset's own.
    normalization_schemes, use_mask_for_norm: per channel, or None: what nnU-Net chooses for the dataset's channels.
    foreground_intensity_properties_per_channel: for the channels of CTNormalization, which clips to percentile_00_5
        and percentile_99_5, subtracts mean and divides by std.
    resampling_fn_data, resampling_fn_data_kwargs: how images are resampled.
    patch_size: largest window, voxels per axis.
    field_of_view_mm: how many mm of a patient the windows of its training showed along an axis, (from, to); None: given
        by the spacing, if it has one.
    smallest_window: smallest window that it was trained on, voxels per axis.
    divisor: what a window must be a multiple of, voxels per axis.
    sha256: of the weights file.
    z_scores_as_hu: the linear map that turns z-scores of another modality into Hounsfield units for a CT backbone:
        mean + std z, clipped to [low, high].
    source: file, sha256 and left_out of what was imported, if it was one file: its name, its hash, and the names of
        the tensors that were left out, by reason.
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
    field_of_view_mm: tuple[float, float] | None = None
    sha256: str = ""
    licence: str = ""
    citation: str = ""
    description: str = ""
    training: dict = field(default_factory=dict)
    z_scores_as_hu: dict[str, float] = field(default_factory=lambda: dict(AS_CT))
    source: dict = field(default_factory=dict)

    @property
    def input_channels(self) -> int:
        return len(self.channel_names)

    @property
    def head_classes(self) -> tuple[str, ...]:
        """The classes that have a row in the universal head."""
        return self.classes if self.architecture.get("head", True) else ()

    @property
    def linear_head(self) -> bool:
        """Whether the universal head is a 1^3 convolution, whose rows can start an adapter's head."""
        return bool(self.head_classes) and self.architecture.get("linear_head", True)

    @property
    def encoder_only(self) -> bool:
        """Whether its decoder has never been trained, so that its features mean nothing until it is."""
        return self.architecture.get("encoder_only", False)

    def window(self, median_shape: Sequence[float]) -> list[int]:
        """Patch size: covers a volume of `median_shape` as far as the smallest and largest window allow."""
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
                f"{file} is not a backbone contract ({error}): import the backbone again, or repair the file, whose "
                f"keys are {known}."
            ) from error

    def own_channel(self, channel: int) -> int:
        """Which of its channels a dataset's channel enters."""
        return channel if self.input_channels > 1 else 0

    def check_number(self, names: Sequence[str], file: str) -> None:
        """Raises InputError if it cannot take as many channels as there are `names` in `file`, a dataset.json."""
        if len(names) != self.input_channels and self.input_channels > 1:
            raise InputError(
                f"{file} has {len(names)} channel(s), but backbone {self.id!r} takes {self.input_channels}: "
                "choose another backbone or convert the dataset."
            )

    def unseen_channels(self, names: Sequence[str]) -> list[int]:
        """Indices of a dataset's channels `names` that are of another modality: CT where it has none, or vice versa."""
        if self.normalization_schemes is None:
            return []
        known = [self.channel_names[self.own_channel(channel)] for channel in range(len(names))]
        # Hounsfield units are absolute, other intensities are not
        return [c for c, (name, own) in enumerate(zip(names, known)) if own != ANY and is_ct(name) != is_ct(own)]

    def check_channels(self, names: Sequence[str], file: str, remedy: str = "") -> None:
        """Compare the channel names of a dataset, whose dataset.json is `file`, with what the backbone was trained on.

        remedy: what else to do about channels of another modality.

        Raises:
            InputError: for a number of channels that it cannot take, and for channels of another modality.
        """
        self.check_number(names, file)
        for channel in self.unseen_channels(names):
            known = self.channel_names[self.own_channel(channel)]
            raise InputError(
                f"Channel {channel} of {file} is {names[channel]!r}, but backbone {self.id!r} was trained with "
                f"{known!r} there: choose another backbone, or name the channel {known!r} if that is what it "
                f"holds{remedy}."
            )
        for channel, name in enumerate(names):
            open_to_all = self.normalization_schemes is None
            if open_to_all and is_ct(name) and not self.intensities_of(channel + 1)[str(channel)]:
                raise InputError(f"Backbone {self.id!r} was not trained on CT, but {file} names CT: choose another.")

    def normalization_of(
        self, names: Sequence[str], other_modality: bool = False
    ) -> tuple[list[str], list[bool]] | None:
        """nnU-Net's schemes for channels `names`, and whether they use the nonzero mask; None: nnU-Net's choice.

        other_modality: z-score the channels of a modality that the backbone has never seen.
        """
        if self.normalization_schemes is None:
            return None
        times = len(names) // self.input_channels
        schemes, masks = list(self.normalization_schemes) * times, list(self.use_mask_for_norm) * times
        for channel in self.unseen_channels(names) if other_modality else []:
            schemes[channel], masks[channel] = "ZScoreNormalization", False
        return schemes, masks

    def z_scores_of(self, names: Sequence[str]) -> dict[str, dict[str, float]]:
        """By channel, the linear map that turns z-scores of a modality that it has never seen into Hounsfield units."""
        unseen = (channel for channel in self.unseen_channels(names) if self._takes_ct(channel))
        return {str(channel): dict(self.z_scores_as_hu) for channel in unseen}

    def _takes_ct(self, channel: int) -> bool:
        return self.normalization_schemes[self.own_channel(channel)] == "CTNormalization"

    def intensities_of(self, channels: int) -> dict[str, dict[str, float]]:
        """`foreground_intensity_properties_per_channel` for this many channels; empty if there are none."""
        known = self.foreground_intensity_properties_per_channel
        return {str(channel): dict(known.get(str(self.own_channel(channel)), {})) for channel in range(channels)}

    def describe_normalization(self, channel: int, scheme: str, masked: bool) -> str:
        """E.g. "CTNormalization: clipped to [-175, 250], minus -175, divided by 425"."""
        text = f"{scheme} inside the nonzero mask" if masked else scheme
        if scheme != "CTNormalization":
            return text
        values = self.intensities_of(channel + 1)[str(channel)]
        low, high, mean, std = (values[key] for key in CT_PROPERTIES)
        return f"{text}: clipped to [{low:g}, {high:g}], minus {mean:g}, divided by {std:g}"

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


def is_ct(channel_name: str) -> bool:
    """Whether nnU-Net takes a channel of this name for CT."""
    return channel_name.casefold() == "ct"  # as nnU-Net compares
