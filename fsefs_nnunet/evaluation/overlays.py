"""Pictures of segmentations."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import matplotlib
import nibabel as nib
import numpy as np
import SimpleITK
from acvl_utils.cropping_and_padding.bounding_boxes import bounding_box_to_slice, get_bbox_from_mask, pad_bbox
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

ABDOMEN_HU = (-160.0, 240.0)  # the usual window for soft tissue in CT
# Title, the axis that is cut (of an (X, Y, Z) volume), and the letters on the left, right, top and bottom.
_PANELS = (("axial", 2, "RLAP"), ("coronal", 1, "RLSI"), ("sagittal", 0, "APSI"))
_MARKS = {"ha": "center", "va": "center", "fontsize": 13, "color": "white", "fontweight": "bold"}
_PLACES = ((0.03, 0.5), (0.97, 0.5), (0.5, 0.96), (0.5, 0.04))
_PANEL_INCHES = 4.4


def save_overlay(
    image_file: str | Path,
    segmentation_file: str | Path,
    output_png: str | Path | BinaryIO,
    reference_file: str | Path | None = None,
    labels: dict[str, int] | None = None,
    title: str = "",
    window: tuple[float, float] | None = None,
) -> None:
    """Draw the contours of a segmentation on three orthogonal slices of its image.

    The slices are those with the most foreground in the reference, so that several segmentations of one case are shown
    on the same slices; without a reference, in the segmentation; without any foreground, the middle ones. Slices lie
    as radiologists expect: anterior or superior up, the patient's right on the viewer's left. Files are NIfTI, or what
    SimpleITK reads, in any orientation.

    Args:
        segmentation_file: drawn with solid lines.
        output_png: its folder must exist; or an open file.
        reference_file: drawn with dashed lines.
        labels: organ names and their values, as in dataset.json; background is skipped. All values found by default.
        window: image values shown as black and as white; default: the percentiles 1 and 99 of the image.

    Raises:
        ValueError: if the files differ in shape.
    """
    image, spacing = _load(image_file)
    masks = {"prediction": _load(segmentation_file)[0]}
    if reference_file is not None:
        masks["reference"] = _load(reference_file)[0]
    for mask in masks.values():
        if mask.shape != image.shape:
            raise ValueError(
                f"{image_file} has shape {image.shape} and a segmentation of it {mask.shape}: they are different cases."
            )
    low, high = window or np.nanpercentile(image, [1, 99])
    image, masks = _without_air(image, masks, low)
    organs = _organs(masks, labels)
    foreground = next((m > 0 for m in reversed(masks.values()) if (m > 0).any()), None)
    figure = _draw(image, (low, max(high, low + 1e-6)), spacing, masks, organs, foreground, title)
    figure.savefig(output_png, format="png", dpi=100, facecolor="black")


def _load(file: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Volume (X, Y, Z) whose axes go from right to left, front to back and head to foot, and its spacing in mm."""
    if not str(file).endswith((".nii", ".nii.gz")):
        volume = SimpleITK.DICOMOrient(SimpleITK.ReadImage(file), "LPI")
        return SimpleITK.GetArrayFromImage(volume).T, np.array(volume.GetSpacing())

    volume = nib.as_closest_canonical(nib.load(file))
    array = np.asanyarray(volume.dataobj)
    if array.ndim == 4:
        array = array[..., 0]
    return array[::-1, ::-1, ::-1], np.array(volume.header.get_zooms()[:3], float)


def _without_air(
    image: np.ndarray, masks: dict[str, np.ndarray], black: float
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The part of a volume that shows something."""
    shown = np.logical_or.reduce([image > black, *(mask > 0 for mask in masks.values())])
    if not shown.any():
        return image, masks
    part = bounding_box_to_slice(pad_bbox(get_bbox_from_mask(shown), 2, image.shape))
    return image[part], {name: mask[part] for name, mask in masks.items()}


def _organs(masks: dict[str, np.ndarray], labels: dict[str, int] | None) -> dict[str, int]:
    if labels is None:
        values = np.unique(np.concatenate([np.unique(mask) for mask in masks.values()]))
        return {f"label {int(value)}": int(value) for value in values if value > 0}
    return {name: value for name, value in labels.items() if np.all(np.asarray(value) > 0)}


def _draw(image, window, spacing, masks, organs, foreground, title):
    # a figure of our own instead of pyplot's: no display, no state shared with the caller

    palette = matplotlib.colormaps["tab10" if len(organs) <= 10 else "tab20"]
    colours = {name: palette(i % palette.N) for i, name in enumerate(organs)}
    extent = np.array(image.shape) * spacing
    widths = [extent[1 if axis == 0 else 0] for _, axis, _ in _PANELS]
    heights = [extent[1 if axis == 2 else 2] for _, axis, _ in _PANELS]
    scale = _PANEL_INCHES / max(heights)
    figure = Figure(figsize=(max(sum(widths) * scale, _PANEL_INCHES) + 3.0, _PANEL_INCHES + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3, width_ratios=widths)
    for panel, (name, axis, marks) in zip(axes, _PANELS):
        index = _largest_slice(foreground, image.shape, axis)
        step = np.delete(spacing, axis)
        grey = {"cmap": "gray", "vmin": window[0], "vmax": window[1], "interpolation": "bilinear"}
        panel.imshow(image.take(index, axis).T, aspect=step[1] / step[0], **grey)
        for style, volume in zip(("solid", "dashed"), masks.values()):
            for organ, value in organs.items():
                _contour(panel, np.isin(volume.take(index, axis), value), colours[organ], style)
        panel.set_title(name, color="white", fontsize=13)
        for place, mark in zip(_PLACES, marks):
            panel.text(*place, mark, transform=panel.transAxes, **_MARKS)
        panel.set_axis_off()
    handles = [Line2D([], [], color=colours[name], label=name) for name in organs]
    if len(masks) == 2:
        handles += [
            Line2D([], [], color="white", linestyle=style, label=name)
            for style, name in zip(("solid", "dashed"), masks)
        ]
    if handles:
        figure.legend(handles=handles, loc="outside right center", frameon=False, labelcolor="white", fontsize=13)
    figure.suptitle(title, color="white", fontsize=14)
    return figure


def _largest_slice(foreground: np.ndarray | None, shape: tuple[int, ...], axis: int) -> int:
    if foreground is None:
        return shape[axis] // 2
    return int(foreground.sum(tuple(i for i in range(3) if i != axis)).argmax())


def _contour(panel, mask: np.ndarray, colour, style: str) -> None:
    """Outline of `mask` (columns, rows); closed where the mask touches the border."""
    if not mask.any():
        return
    padded = np.pad(mask, 1).T.astype(np.float32)
    columns, rows = np.arange(-1, mask.shape[0] + 1), np.arange(-1, mask.shape[1] + 1)
    panel.contour(columns, rows, padded, [0.5], colors=[colour], linestyles=style, linewidths=1.8)
    panel.set_xlim(-0.5, mask.shape[0] - 0.5)
    panel.set_ylim(mask.shape[1] - 0.5, -0.5)
