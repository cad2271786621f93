"""How much noise nnU-Net's resampling leaves when it shrinks images without smoothing.

    python benchmarks/resampling_noise.py

A homogeneous volume of 0.8 x 0.8 x 1 mm with Gaussian noise of 20 HU, white or as correlated as by a soft
reconstruction kernel, is resampled to coarser spacings. Reported is the standard deviation in HU by nnU-Net, linear as
for the embedded backbone and cubic as in stock plans, and with scikit-image's anti-aliasing.
"""

from __future__ import annotations

import argparse

import numpy as np
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape, resample_data_or_seg_to_shape
from scipy.ndimage import gaussian_filter
from skimage.transform import resize

from fsefs_nnunet.evaluation.tables import markdown_table

SHAPE, SPACING, NOISE = (160, 160, 128), (0.8, 0.8, 1.0), 20.0
EDGE = 2  # voxels at the border, which are interpolated from one side only


def noise(blur: float, seed: int) -> np.ndarray:
    """blur: standard deviation of the correlation in voxels, 0 for white noise."""
    made = gaussian_filter(np.random.default_rng(seed).normal(size=SHAPE), blur)
    return (made * NOISE / made.std()).astype(np.float32)


def deviation(image: np.ndarray) -> float:
    return float(image[(slice(EDGE, -EDGE),) * 3].std())


def row(kind: str, image: np.ndarray, mm: float) -> dict[str, str]:
    shape, target = compute_new_shape(SHAPE, SPACING, (mm,) * 3), (mm,) * 3
    by_nnunet = {
        f"nnU-Net, {name}": resample_data_or_seg_to_shape(
            image[None], shape, SPACING, target, order=order, order_z=0, force_separate_z=None
        )[0]
        for name, order in (("linear", 1), ("cubic", 3))
    }
    smoothed = resize(image, shape, 1, mode="edge", anti_aliasing=True)
    figures = {**by_nnunet, "smoothed, linear": smoothed}
    return {"noise": kind, "mm": f"{mm:g}", **{name: f"{deviation(x):.1f}" for name, x in figures.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spacings", type=float, nargs="+", default=[2, 3, 4, 5], metavar="MM")
    args = parser.parse_args()
    images = {"white": noise(0, 0), "correlated": noise(0.8, 0)}
    print(markdown_table([row(kind, image, mm) for kind, image in images.items() for mm in args.spacings]))


if __name__ == "__main__":
    main()
