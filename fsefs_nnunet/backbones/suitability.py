"""How close a dataset is to what a backbone was trained on, and which others in the store are closer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

from fsefs_nnunet.backbones.contract import BackboneContract
from fsefs_nnunet.backbones.store import find_backbone, known_backbones
from fsefs_nnunet.cases.field_of_view import middle_of, spacing_of_view
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.labels import match_labels

COARSER = 2.0  # voxels up to this many times as long as those of the training
NEAR_THE_MIDDLE = 0.8  # of the training's fields of view


@dataclass(frozen=True)
class Suitability:
    """
    modality: whether it takes the dataset's channels as they are.
    spacing: whether the dataset shows as much detail as the training did, or it takes any spacing.
    labels: how many of the dataset's labels it knows by name.
    """

    modality: bool
    spacing: bool
    labels: int

    def beats(self, other: Suitability) -> bool:
        """Better in one respect, worse in none."""
        mine, theirs = astuple(self), astuple(other)
        return mine != theirs and all(a >= b for a, b in zip(mine, theirs))


def suitability(
    contract: BackboneContract, channels: Sequence[str], spacing: Sequence[float], labels: Sequence[str]
) -> Suitability:
    """
    Args:
        channels, labels: names in the dataset.json.
        spacing: the dataset's own, mm per axis of nnU-Net's reader.
    """
    own = [spacing[axis] for axis in contract.transpose_forward]
    coarser = max(mine / trained for mine, trained in zip(own, contract.spacing or own))
    known = len(match_labels(list(labels), contract.head_classes))
    return Suitability(not contract.unseen_channels(channels), coarser <= COARSER, known)


def remarks(
    contract: BackboneContract, channels: Sequence[str], spacing: Sequence[float], labels: Sequence[str]
) -> list[str]:
    """Sentences about what the backbone has never seen, and about what in the store suits better; often none."""
    own, said = suitability(contract, channels, spacing, labels), []
    if not own.modality:
        said.append(
            f"Backbone {contract.id} was trained on {', '.join(contract.channel_names)}; it has never seen images like "
            f"this dataset's, {', '.join(channels)}."
        )
    if not own.spacing:
        axes = [spacing[axis] for axis in contract.transpose_forward]
        said.append(
            f"Backbone {contract.id} was trained at {_mm(contract.spacing)} mm, the dataset has {_mm(axes)} mm: "
            "interpolation adds voxels, not detail."
        )
    for name in known_backbones():
        try:
            other = find_backbone(name)
            other.check_channels(channels, "the dataset")
            found = suitability(other, channels, spacing, labels)
        except InputError:  # it is damaged, takes other channels, or has two classes for one label
            continue
        if found.beats(own) and not other.encoder_only:
            gains = [
                *(["takes such images"] if found.modality > own.modality else []),
                *(["takes such a spacing"] if found.spacing > own.spacing else []),
                *([f"knows {found.labels} of the labels by name"] if found.labels > own.labels else []),
            ]
            said.append(f"In the store, {other.id} may suit better: it {' and '.join(gains)}.")
    return said


def field_of_view_remark(
    contract: BackboneContract, window: Sequence[int], spacing: Sequence[float], extent: Sequence[float]
) -> str | None:
    """A sentence if a window shows much less of a patient than in the training, with a spacing to compare.

    Args:
        window, spacing: as planned, voxels and mm per axis.
        extent: of the median volume, mm per axis.
    """
    if contract.field_of_view_mm is None:
        return None
    low, high = contract.field_of_view_mm
    middle, shown = middle_of((low, high)), max(n * mm for n, mm in zip(window, spacing))
    if shown >= NEAR_THE_MIDDLE * middle or max(extent) < middle:
        return None
    coarser = spacing_of_view(window, contract.field_of_view_mm)
    return (
        f"A window shows {shown:.0f} mm; in the training of {contract.id} it showed {low:g} to {high:g} mm. Compare "
        f"with -overwrite_target_spacing {coarser:g} {coarser:g} {coarser:g} on your queries."
    )


def _mm(spacing: Sequence[float]) -> str:
    return " x ".join(f"{mm:.3g}" for mm in spacing)
