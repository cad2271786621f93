"""What the bank keeps of a volume."""

from itertools import product

import numpy as np
import pytest
import torch
from banks import CPU, WINDOW, full_features, store, whole_crop

from fsefs_nnunet.backbones.frozen import FrozenBackbone
from fsefs_nnunet.backbones.maps import FeatureMap
from fsefs_nnunet.cases.shown_voxels import ShownVoxels
from fsefs_nnunet.features.layout import (
    BACKGROUND_BLOCKS,
    MAX_POOLED_VOXELS,
    Layout,
    cube,
    cube_that_leaves,
    pooled_blocks,
    query_layout,
    support_layout,
    whole_layout,
)
from fsefs_nnunet.features.packing import Blocks
from fsefs_nnunet.features.tiling import Tiling
from fsefs_nnunet.features.windows import Slab, run_windows
from fsefs_nnunet.priors.query_volumes import QueryVolumes
from fsefs_nnunet.priors.volumes import block_voxels

# ---- what is kept ----


def spots(shape, *voxels):
    foreground = np.zeros(shape, bool)
    foreground[tuple(np.transpose(voxels))] = True
    return foreground


@pytest.mark.parametrize("voxels", [[(30, 20, 9)], [(0, 0, 0)], [(59, 49, 39)], [(20, 20, 20), (33, 5, 39)]])
def test_region_holds_every_crop_around_foreground(voxels):
    shape, crop = (60, 50, 40), np.array((9, 8, 7))
    layout = support_layout("a", spots(shape, *voxels), crop, WINDOW)
    assert layout.pool is None and len(layout.boxes) == 1 + BACKGROUND_BLOCKS and layout.voxels < np.prod(shape) / 2
    first, end = map(np.array, layout.boxes[0])
    for size in (crop, crop - 1, np.array((3, 8, 1))):
        starts = np.clip(np.array(voxels) - size // 2, 0, shape - size)
        assert (starts >= first).all() and (starts + size <= end).all()
    starts = np.clip(np.array(voxels) - crop // 2, 0, shape - crop)
    assert (first == starts.min(0)).all() and (end == starts.max(0) + crop).all()
    for first, end in layout.boxes[1:]:
        assert min(first) >= 0 and (np.array(end) <= shape).all() and (np.subtract(end, first) == crop).all()


def test_blocks_for_background_differ_between_cases_alone():
    foreground = spots((60, 50, 40), (30, 20, 9))
    first, second = (support_layout(case, foreground, (8, 8, 8), WINDOW) for case in ("a", "b"))
    assert first == support_layout("a", foreground, (8, 8, 8), WINDOW)
    assert first.boxes[0] == second.boxes[0] and not set(first.boxes[1:]) & set(second.boxes[1:])
    moved = support_layout("a", spots((60, 50, 40), (30, 21, 9)), (8, 8, 8), WINDOW)
    assert moved.boxes[1:] == first.boxes[1:] and moved.boxes[0] != first.boxes[0]
    starts = np.array([box[0] for box in first.boxes[1:]])
    assert (np.ptp(starts, 0) > np.array((52, 42, 32)) / 2).all()


def test_ignored_voxels_are_no_foreground_and_blocks_lie_on_the_others():
    """One slice of a large volume is annotated; 2 is the ignore label."""
    labels = np.full((60, 50, 40), 2)
    labels[:, :, 30], labels[30, 20, 30] = 0, 1
    layout = support_layout("a", labels, (9, 8, 7), WINDOW, 2)
    assert layout.boxes[0] == ((26, 16, 27), (35, 24, 34))  # around the one voxel
    assert all(first[2] <= 30 < end[2] for first, end in layout.boxes[1:])


def test_small_or_largely_labelled_volume_is_kept_whole():
    assert support_layout("a", spots(WINDOW, (8, 8, 8)), (2, 2, 2), WINDOW) == whole_layout(WINDOW)
    assert len(support_layout("a", spots((16, 16, 60), (8, 8, 8)), (2, 2, 2), WINDOW).boxes) > 1
    shape = (40, 40, 40)
    assert support_layout("a", spots(shape, (0, 0, 0), (39, 39, 39)), (2, 2, 2), WINDOW) == whole_layout(shape)
    assert support_layout("a", spots(shape, (20, 20, 20)), (24, 24, 24), WINDOW) == whole_layout(shape)


def test_case_without_foreground_keeps_blocks():
    layout = support_layout("a", np.zeros((60, 50, 40), bool), (8, 8, 8), WINDOW)
    assert len(layout.boxes) == BACKGROUND_BLOCKS and layout.voxels == BACKGROUND_BLOCKS * 8**3


def test_crop_that_is_not_kept_is_an_error(bank):
    features = torch.from_numpy(np.indices((20, 20, 20))).float()
    store(bank, "a", features, Layout((20, 20, 20), (((0, 0, 0), (6, 6, 6)), ((4, 5, 6), (20, 20, 20)))))
    for start in [(0, 0, 0), (1, 2, 3), (4, 5, 6), (17, 17, 17)]:
        assert bank["a"].crop(start, (3, 3, 3)).at_full_resolution()[0, :, 0, 0, 0].tolist() == list(start)
    for start in [(3, 4, 5), (18, 17, 17), (-1, 0, 0)]:
        with pytest.raises(IndexError, match="is not stored"):
            bank["a"].crop(start, (3, 3, 3))


# ---- voxels of a label map ----


LABEL_MAPS = {
    "scattered": np.random.default_rng(0).integers(0, 4, (7, 9, 8)),
    "sparse": (np.random.default_rng(1).random((12, 9, 8)) < 0.01).astype(int),
    "empty planes": np.pad(np.ones((2, 3, 4), int), ((3, 4), (0, 1), (2, 0))),
    "nothing": np.zeros((3, 4, 5), int),
    "all": np.ones((3, 4, 5), int),
    "last voxel": spots((3, 4, 5), (2, 3, 4)).astype(int),
}


@pytest.mark.parametrize("labels", LABEL_MAPS.values(), ids=LABEL_MAPS)
def test_voxels_are_those_of_argwhere_in_its_order(labels):
    voxels, expected = ShownVoxels(labels, lambda part: part == 1), np.argwhere(labels == 1)
    assert len(voxels) == len(expected)
    assert all(np.array_equal(voxels[k], expected[k]) for k in range(len(expected)))


@pytest.mark.parametrize("number", [1, 2, 5, 10, 17, 10_000])
@pytest.mark.parametrize("labels", LABEL_MAPS.values(), ids=LABEL_MAPS)
def test_at_most_so_many_voxels_are_a_stride_of_argwhere(labels, number):
    expected = np.argwhere(labels == 1)
    step = max(1, -(-len(expected) // number))
    found = ShownVoxels(labels, lambda part: part == 1).at_most(number)
    assert found.shape == (len(expected[::step]), 3) and len(found) <= number
    assert np.array_equal(found, expected[::step])


# ---- pooling and sizes ----


def averages(features: torch.Tensor, pool) -> torch.Tensor:
    """Averages of features (C, X, Y, Z) over blocks, in float64; incomplete blocks over the voxels that they have."""
    sides = [-(-n // p) for n, p in zip(features.shape[1:], pool)]
    made = torch.zeros((len(features), *sides), dtype=torch.double)
    for block in product(*map(range, sides)):
        inside = (slice(b * p, (b + 1) * p) for b, p in zip(block, pool))
        made[(slice(None), *block)] = features[(slice(None), *inside)].double().mean((1, 2, 3))
    return made.float()


POOLS = [(2, 2, 2), (4, 4, 4), (3, 1, 5), (1, 1, 1), (40, 40, 40)]
VOLUMES = [(24, 32, 16), (37, 21, 18), (10, 30, 7)]


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("shape", VOLUMES)
def test_blocks_are_averages_of_upsampled_features(pool, shape):
    maps = [FeatureMap(3), FeatureMap(2, (4, 4, 4)), FeatureMap(1, (1, 2, 8))]
    tiling = Tiling.of(shape, WINDOW, maps)
    generator = torch.Generator().manual_seed(0)
    blended = [torch.randn((m.channels, *tiling.grid(i)), generator=generator) for i, m in enumerate(maps)]
    expected = averages(whole_crop(blended, tiling).at_full_resolution()[0], pool)
    blocks = Blocks(tiling, query_layout(shape, pool), CPU)
    for first in range(0, tiling.padded[0], 4):
        stop = min(first + 4, tiling.padded[0])
        parts = [m[:, first // of.stride[0] : stop // of.stride[0]] for m, of in zip(blended, maps)]
        blocks.add(Slab(first, stop, parts))
    assert blocks.result().shape[1:] == block_voxels(shape, pool).shape
    torch.testing.assert_close(blocks.result(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pool", [(2, 2, 2), (3, 1, 5)])
def test_blocks_of_a_backbones_features(pool):
    backbone, image = FrozenBackbone("phantom", "skips"), torch.rand(1, 37, 21, 18)
    tiling = Tiling.of(image.shape[1:], WINDOW, backbone.maps)
    blocks = Blocks(tiling, query_layout(image.shape[1:], pool), CPU)
    for slab in run_windows(backbone, image, tiling, CPU):
        blocks.add(slab)
    expected = averages(full_features(backbone, image), pool)
    torch.testing.assert_close(blocks.result(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(8, 8, 8), (5, 4, 7), (1, 2, 3)])
@pytest.mark.parametrize("pool", [(1, 1, 1), (2, 2, 2), (3, 3, 3), (3, 1, 5)])
def test_pooling_conserves_volume(bank, shape, pool):
    """Weighted by the voxels that a block stands for, the pooled sum is the sum."""
    features = torch.from_numpy(np.random.default_rng(0).uniform(size=(2, *shape)).astype(np.float32))
    voxels = block_voxels(shape, pool)
    store(bank, "q", features, query_layout(shape, pool))
    pooled = bank["q"].blocks.float().numpy()
    assert voxels.shape == pooled.shape[1:] and voxels.sum() == np.prod(shape)
    np.testing.assert_allclose((pooled * voxels.numpy()).sum((1, 2, 3)), features.sum((1, 2, 3)), rtol=1e-3)


def left(shape, pool) -> int:
    return int(np.prod([-(-n // p) for n, p in zip(shape, pool)]))


def test_blocks_are_cubes_in_millimetres():
    assert cube(4.0, (1, 1, 1)) == (4, 4, 4) and cube(4.0, (5, 0.8, 0.8)) == (1, 5, 5)
    assert cube(2.1, (0.7, 0.7, 0.7)) == (3, 3, 3)  # whatever the rounding
    assert pooled_blocks((40, 40, 40), (1, 1, 1), large=False) == (2, 2, 2)
    assert pooled_blocks((40, 40, 40), (5, 0.8, 0.8), large=False) == (1, 2, 2)
    assert pooled_blocks((100, 100, 100), (1, 1, 1), large=True) == (4, 4, 4)
    assert pooled_blocks((80, 80, 80), (6, 6, 6), large=True) == (2, 2, 2)


def test_few_blocks_are_left_of_a_large_volume():
    shape, spacing = (300, 250, 200), (1.5, 1.5, 1.5)
    pool = pooled_blocks(shape, spacing, large=True)
    assert left(shape, pool) <= MAX_POOLED_VOXELS < left(shape, [p - 1 for p in pool])
    assert pooled_blocks(shape, spacing, large=True, most=None) == (3, 3, 3)
    shape, spacing = (120, 512, 512), (5, 0.8, 0.8)
    pool = cube_that_leaves(10_000, shape, spacing)
    assert left(shape, pool) <= 10_000 and max(np.multiply(pool, spacing)) < 2 * min(np.multiply(pool, spacing))
    assert cube_that_leaves(10_000, (20, 20, 20), spacing) == (1, 1, 1)


@pytest.mark.parametrize("shape", [(16, 16, 20), (9, 8, 7), (1, 2, 3)])
def test_query_is_kept_pooled(bank, shape):
    features, pool = torch.randn(16, *shape), (2, 2, 1)
    store(bank, "q", features, query_layout(shape, pool))
    entry = bank["q"]
    assert entry.layout.pool == pool and entry.layout.shape == shape
    np.testing.assert_allclose(entry.blocks, averages(features, pool), rtol=1e-3, atol=1e-3)
    assert entry.blocks.shape[1:] == block_voxels(shape, pool).shape
    assert entry.layout.voxels == left(shape, pool)
    volume = QueryVolumes(bank, ["q"], 0.5)._load("q")
    assert volume.features.shape == (1, *entry.blocks.shape) and volume.features.dtype == torch.float16
    assert volume.voxels_ml.sum() == pytest.approx(0.5 * np.prod(shape))
