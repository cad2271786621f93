"""Where windows lie, and where voxels lie in the maps."""

from itertools import product

import numpy as np
import pytest
import torch
from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window

from fsefs_nnunet.backbones.maps import FeatureMap
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.features.tiling import Tiling, linear_weights, voxels_for

SHAPES = [(16, 16, 16), (17, 16, 40), (107, 41, 33), (5, 30, 16), (1, 2, 3), (64, 8, 107)]
WINDOWS = [(16, 16, 16), (32, 16, 8)]


def maps_of(*strides) -> list[FeatureMap]:
    return [FeatureMap(2, stride) for stride in strides]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_windows_of_maps_at_full_resolution_are_nnunets(shape, window):
    tiling = Tiling.of(shape, window, maps_of((1, 1, 1)))
    padded = tuple(np.maximum(shape, window).tolist())
    assert tiling.padded == padded
    assert tiling.starts == compute_steps_for_sliding_window(padded, window, 0.5)


@pytest.mark.parametrize("strides", [[(1, 1, 1), (2, 2, 2), (4, 4, 4)], [(1, 2, 8)], [(16, 8, 4), (4, 4, 4)]])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_windows_start_at_multiples_of_the_strides_and_cover_the_volume(shape, window, strides):
    tiling = Tiling.of(shape, window, maps_of(*strides))
    assert tiling.num_windows == np.prod([len(along) for along in tiling.starts])
    for axis, (along, w, n, before) in enumerate(zip(tiling.starts, window, shape, tiling.before)):
        stride, padded = tiling.stride[axis], tiling.padded[axis]
        assert all(stride % of_map[axis] == 0 for of_map in strides) and stride == max(s[axis] for s in strides)
        assert along == sorted(set(along)) and all(start % stride == 0 for start in along)
        covered = np.zeros(padded, bool)
        for start in along:
            covered[start : start + w] = True
        assert covered.all() and along[-1] + w == padded and padded % stride == 0
        assert 0 <= before and before + n <= padded < max(n, w) + stride
        # not many more windows than nnU-Net has
        assert len(along) <= len(compute_steps_for_sliding_window([padded], [w], 0.5)[0])
    first = [tiling.windows_from(x) for x in tiling.starts[0]]
    assert sum(first, []) == list(product(*tiling.starts))


def test_small_volumes_lie_in_the_middle_and_others_at_the_start():
    tiling = Tiling.of((10, 16, 21), (16, 16, 16), maps_of((4, 4, 4)))
    assert tiling.before == (3, 0, 0) and tiling.padded == (16, 16, 24) and tiling.starts == [[0], [0], [0, 8]]
    assert [tiling.grid(0), tiling.channels, tiling.slab_bytes] == [(4, 4, 6), 2, 4 * 2 * 4 * 4 * 6]
    image = torch.arange(10.0 * 16 * 21).view(1, 10, 16, 21) + 1
    padded = torch.nn.functional.pad(image, (0, 3, 0, 0, 3, 3))
    for start in tiling.windows_from(0):
        inside = (slice(None), *(slice(a, a + 16) for a in start))
        assert torch.equal(tiling.image_window(image, start), padded[inside])


@pytest.mark.parametrize("window, stride", [((16, 16, 20), (8, 8, 8)), ((15, 16, 16), (2, 1, 1))])
def test_a_window_that_the_strides_do_not_divide(window, stride):
    sentence = rf"^A window of \[{window[0]}, 16, {window[2]}\] voxels cannot be divided by the strides of the backbone"
    with pytest.raises(InputError, match=sentence + ".*: make patch_size in the plans a multiple of them.$"):
        Tiling.of((40, 40, 40), window, maps_of((1, 1, 1), stride))


@pytest.mark.parametrize("stride", [1, 2, 3, 8])
def test_linear_weights_are_those_of_interpolate(stride):
    length = 6
    coarse = torch.randn(1, 2, length, generator=torch.Generator().manual_seed(0))
    full = torch.nn.functional.interpolate(coarse, scale_factor=stride, mode="linear")[0]
    for start, size in [(0, length * stride), (0, 1), (length * stride - 1, 1), (2 * stride - 1, 3), (stride, stride)]:
        if start + size > length * stride:
            continue
        weights = linear_weights(start, size, stride, length, 0, length)
        torch.testing.assert_close(weights.sum(1), torch.ones(size))
        torch.testing.assert_close(coarse[0] @ weights.T, full[:, start : start + size], rtol=1e-5, atol=1e-6)
        needed = weights.any(0).nonzero()
        assert needed[-1] - needed[0] + 1 <= voxels_for(size, stride)


def test_a_region_holds_what_its_box_needs_and_a_voxel_around():
    tiling = Tiling.of((107, 40, 10), (16, 16, 16), maps_of((1, 1, 1), (4, 4, 4)))
    box = ((20, 0, 0), (31, 9, 10))
    assert tiling.region(0, box) == ((20, 31), (0, 9), (3, 13))
    full, coarse = np.arange(20, 31), [(n + 0.5) / 4 - 0.5 for n in (20, 30)]
    assert len(full) == 11 and coarse == [4.625, 7.125]
    assert tiling.region(1, box) == ((3, 10), (0, 4), (0, 4))
