"""What the bank keeps of a volume."""

import numpy as np
import pytest
import torch
from banks import WINDOW, store

from fsefs_nnunet.features.layout import (
    BACKGROUND_BLOCKS,
    MAX_POOLED_VOXELS,
    Layout,
    pooled,
    pooling_factor,
    query_layout,
    support_layout,
    whole_layout,
)
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
    assert layout.pool == 1 and len(layout.boxes) == 1 + BACKGROUND_BLOCKS and layout.voxels < np.prod(shape) / 2
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
        assert bank["a"].crop(start, (3, 3, 3))[:, 0, 0, 0].tolist() == list(start)
    for start in [(3, 4, 5), (18, 17, 17), (-1, 0, 0)]:
        with pytest.raises(IndexError, match="is not stored"):
            bank["a"].crop(start, (3, 3, 3))


# ---- pooling and sizes ----


def test_pooled_averages_blocks():
    features = np.random.default_rng(0).normal(size=(2, 5, 4, 7)).astype(np.float16)
    result = pooled(torch.from_numpy(features).float(), 2)
    assert result.shape == (1, 2, 3, 2, 4) and result.dtype == torch.float32
    double = features.astype(np.float64)
    np.testing.assert_allclose(result[0, :, 0, 0, 0], double[:, :2, :2, :2].mean((1, 2, 3)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result[0, :, 2, 1, 3], double[:, 4:, 2:, 6:].mean((1, 2, 3)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 8, 8), (5, 4, 7), (1, 2, 3)])
@pytest.mark.parametrize("factor", [1, 2, 3])
def test_pooling_conserves_volume(shape, factor):
    """Weighted by the voxels that a block stands for, the pooled sum is the sum."""
    features = np.random.default_rng(0).uniform(size=(2, *shape)).astype(np.float32)
    voxels = block_voxels(shape, factor)
    result = pooled(torch.from_numpy(features), factor)[0]
    assert voxels.shape == result.shape[1:] and voxels.sum() == np.prod(shape)
    np.testing.assert_allclose((result * voxels).sum((1, 2, 3)), features.sum((1, 2, 3)), rtol=1e-5)


def test_pooling_factor_bounds_the_volume():
    assert pooling_factor((40, 40, 40)) == 1
    shape = (300, 250, 200)
    factor = pooling_factor(shape)
    sizes = [np.prod([-(-n // f) for n in shape]) for f in (factor, factor - 1)]
    assert sizes[0] <= MAX_POOLED_VOXELS < sizes[1]


@pytest.mark.parametrize("shape", [(16, 16, 20), (9, 8, 7), (1, 2, 3)])
def test_query_is_kept_pooled(bank, shape):
    features = torch.randn(16, *shape)
    store(bank, "q", features, query_layout(shape, 2))
    entry = bank["q"]
    assert entry.layout.pool == 2 and entry.layout.shape == shape
    np.testing.assert_allclose(entry.boxes[0], pooled(features, 2)[0], rtol=1e-3, atol=1e-4)
    assert entry.boxes[0].shape[1:] == block_voxels(shape, 2).shape
    assert entry.layout.voxels == np.prod([-(-n // 2) for n in shape])
    sizes = QueryVolumes(bank, ["q"], 0.5)
    volume = sizes._load("q")
    assert volume.features.shape == (1, *entry.boxes[0].shape) and volume.features.dtype == torch.float16
    assert volume.voxels_ml.sum() == pytest.approx(0.5 * np.prod(shape))
