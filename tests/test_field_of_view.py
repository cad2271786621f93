"""Which spacing volumes get, by their field of view."""

import numpy as np
import pytest

from fsefs_nnunet.cases.field_of_view import fitting_spacing

WINDOW = (64, 64, 64)


@pytest.mark.parametrize(
    "shape, own, expected",
    [
        ((256, 256, 35), (1.25, 1.25, 7.7), 2.5),  # 320 x 320 x 270 mm
        ((512, 512, 400), (410 / 512, 410 / 512, 1.0), 4.0),  # an abdominal CT
        ((36, 50, 35), (1.0, 1.0, 1.0), None),  # Hippocampus
        ((128, 128, 128), (4.4, 4.4, 2.5), None),  # two windows, no more
        ((129, 100, 100), (1.0, 1.0, 1.0), 1.5),
        ((256, 256, 30), (0.5, 0.5, 3.0), 1.0),
        ((300, 300, 1200), (1.5, 1.5, 1.5), 5.0),  # a whole body fits at none
        ((200, 200, 200), (6.0, 6.0, 6.0), None),  # 5 mm would make it longer
    ],
)
def test_spacing(shape, own, expected):
    assert fitting_spacing(np.multiply(shape, own), own, WINDOW) == expected


@pytest.mark.parametrize(
    "shape, own, expected",
    [
        ((256, 256, 35), (1.25, 1.25, 7.7), 4.0),  # CHAOS: 64 voxels show 256 mm, the middle is 245 mm
        ((512, 512, 400), (410 / 512, 410 / 512, 1.0), 4.0),
        ((300, 300, 1200), (1.5, 1.5, 1.5), 5.0),  # never finer
        ((240, 240, 240), (1.0, 1.0, 1.0), 2.0),  # shorter than the middle: there is no more to see
        ((36, 50, 35), (1.0, 1.0, 1.0), None),
        ((128, 128, 128), (4.0, 4.0, 2.5), None),  # OpenKBP fits as it is
        ((150, 150, 100), (3.0, 3.0, 5.0), 4.0),
    ],
)
def test_windows_show_what_the_training_showed(shape, own, expected):
    assert fitting_spacing(np.multiply(shape, own), own, WINDOW, (150.0, 400.0)) == expected


def test_each_axis_has_its_window():
    extent, own = (200.0, 200.0, 200.0), (1.0, 1.0, 1.0)
    assert fitting_spacing(extent, own, (100, 100, 100)) is None
    assert fitting_spacing(extent, own, (100, 100, 50)) == 2.0
    assert fitting_spacing(extent, own, (40, 100, 100)) == 2.5


def test_shapes_are_rounded_as_nnunet_rounds_them():
    assert fitting_spacing((320.6, 100, 100), (1.0, 1.0, 1.0), WINDOW) == 2.5  # 128.24 voxels
    assert fitting_spacing((322.0, 100, 100), (1.0, 1.0, 1.0), WINDOW) == 3.0  # 128.8
