"""Surface metrics."""

import math

import numpy as np
import pytest
from scipy.ndimage import binary_erosion, distance_transform_edt

from fsefs_nnunet.evaluation.surface import surface_metrics

SPACING = (1.0, 2.0, 3.0)


def box(*slices: slice) -> np.ndarray:
    mask = np.zeros((14, 12, 10), bool)
    mask[slices] = True
    return mask


def directed(a: np.ndarray, b: np.ndarray) -> float:
    surfaces = [mask & ~binary_erosion(mask) for mask in (a, b)]
    return np.percentile(distance_transform_edt(~surfaces[1], SPACING)[surfaces[0]], 95)


def test_distance_is_that_of_an_independent_computation():
    rng = np.random.default_rng(0)
    for _ in range(5):
        masks = [box(*(slice(a, a + rng.integers(3, 6)) for a in rng.integers(1, 5, 3))) for _ in range(2)]
        masks[0] ^= rng.random(masks[0].shape) < 0.02
        expected = max(directed(*masks), directed(*masks[::-1]))
        assert surface_metrics(*masks, SPACING)[1] == pytest.approx(expected)


def test_surface_dice_counts_what_lies_within_two_mm():
    cube = box(slice(2, 6), slice(2, 6), slice(2, 6))
    assert surface_metrics(cube, cube, SPACING) == (1.0, 0.0)
    by_2_mm, by_3_mm = (np.roll(cube, 1, axis) for axis in (1, 2))
    assert surface_metrics(by_2_mm, cube, SPACING) == (1.0, 2.0)
    partly, distance = surface_metrics(by_3_mm, cube, SPACING)
    assert 0.3 < partly < 1 and distance == 3.0
    far = np.roll(cube, 6, 0)
    assert surface_metrics(far, cube, (10.0, 10.0, 10.0))[0] < 0.2


def test_surface_dice_weighs_areas():
    """Of boxes of 20 x 20 x 40 mm and 20 x 20 x 45 mm with one base: voxels are 5 mm high, their faces differ."""
    short, tall = np.zeros((2, 30, 30, 14), bool)
    short[5:25, 5:25, 2:10] = tall[5:25, 5:25, 2:11] = True
    areas = 800 + 80 * 40, 800 + 80 * 45
    beyond = 16**2 + 400 + 80 * 3  # both tops, but for a rim, and the sides more than 2 mm above the lower one
    expected = 1 - beyond / sum(areas)
    assert surface_metrics(short, tall, (1.0, 1.0, 5.0))[0] == pytest.approx(expected, abs=0.02)


def test_a_mask_at_the_border_has_a_surface_there():
    """Metrics do not depend on where in the volume the masks lie."""
    inside = [box(slice(a, a + 4), slice(2, 6), slice(2, 6)) for a in (2, 4)]
    outside = [np.roll(mask, (-2, -2, -2), (0, 1, 2)) for mask in inside]
    assert outside[0][0].any()
    assert surface_metrics(*outside, SPACING) == surface_metrics(*inside, SPACING)


def test_empty_masks():
    empty, cube = box(slice(0)), box(slice(2, 6), slice(2, 6), slice(2, 6))
    assert all(map(math.isnan, surface_metrics(empty, empty, SPACING)))
    diagonal = math.sqrt(14**2 + 24**2 + 30**2)
    for masks in ((empty, cube), (cube, empty)):
        assert surface_metrics(*masks, SPACING) == (0.0, pytest.approx(diagonal))
