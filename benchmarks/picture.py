"""The README's picture: a slice of a scan as it is, with its label and with a prediction.

python benchmarks/picture.py IMAGE LABEL PREDICTION dataset.json documentation/figures/hippocampus.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import nibabel as nib
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from fsefs_nnunet.cases.dataset_json import shows_ct
from fsefs_nnunet.evaluation.overlays import ABDOMEN_HU
from fsefs_nnunet.files import read_json
from fsefs_nnunet.labels import foreground

MARGIN_MM = 15.0


def load(file: Path) -> tuple[np.ndarray, tuple[float, ...]]:
    """Volume (X, Y, Z) from the patient's right to left, front to back and head to foot, and mm per axis."""
    volume = nib.as_closest_canonical(nib.load(file))
    return np.asarray(volume.dataobj)[::-1, ::-1, ::-1], volume.header.get_zooms()[:3]


def part_of_interest(label: np.ndarray, spacing: tuple[float, ...]) -> tuple[slice, slice, int]:
    """Rows and columns around all organs, and the axial slice that shows most of them."""
    shown = [[(label[..., z] == value).any() for value in np.unique(label[label > 0])] for z in range(label.shape[2])]
    size = (label > 0).sum((0, 1))
    z = max(range(label.shape[2]), key=lambda index: (sum(shown[index]), size[index]))
    slices = []
    for axis, mm in ((0, spacing[0]), (1, spacing[1])):
        found, margin = np.flatnonzero((label > 0).any((1 - axis, 2))), round(MARGIN_MM / mm)
        slices.append(slice(max(0, found[0] - margin), found[-1] + 1 + margin))
    return slices[0], slices[1], z


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("image", "label", "prediction", "dataset_json", "output"):
        parser.add_argument(name, type=Path)
    args = parser.parse_args()
    dataset_json = read_json(args.dataset_json)
    organs = foreground(dataset_json["labels"])
    (image, spacing), (label, _), (prediction, _) = map(load, (args.image, args.label, args.prediction))
    rows, columns, z = part_of_interest(label, spacing)
    low, high = ABDOMEN_HU if shows_ct(dataset_json) else np.percentile(image, (1, 99))
    colours = [matplotlib.colormaps["Set1"](i) for i in range(len(organs))]
    figure = Figure(figsize=(11, 4.2), layout="constrained", facecolor="black")
    for axes, (title, mask) in zip(
        figure.subplots(1, 3), {"scan": None, "label": label, "prediction": prediction}.items()
    ):
        options = {"aspect": spacing[1] / spacing[0], "interpolation": "bilinear"}
        axes.imshow(image[rows, columns, z].T, cmap="gray", vmin=low, vmax=high, **options)
        if mask is not None:
            part = np.ma.masked_equal(mask[rows, columns, z], 0).T
            shown = {"cmap": ListedColormap(colours), "vmin": 1, "vmax": len(organs), "alpha": 0.55}
            axes.imshow(part, aspect=options["aspect"], interpolation="nearest", **shown)
        axes.set_title(title, color="white", fontsize=14)
        axes.set_axis_off()
        for x, y, mark in ((0.03, 0.5, "R"), (0.97, 0.5, "L"), (0.5, 0.95, "A"), (0.5, 0.05, "P")):
            axes.text(x, y, mark, color="white", ha="center", va="center", transform=axes.transAxes)
    handles = [Patch(color=colour, label=name.replace("_", " ")) for colour, name in zip(colours, organs)]
    legend = {"frameon": False, "labelcolor": "white", "fontsize": 12, "ncols": len(organs)}
    figure.legend(handles=handles, loc="outside lower center", **legend)
    figure.savefig(args.output, dpi=90)


if __name__ == "__main__":
    main()
