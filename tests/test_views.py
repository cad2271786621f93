"""Where augmented views are cut from a support volume."""

import numpy as np
import pytest

from fsefs_nnunet.features.views import SupportViews, class_voxels, view_patch

WINDOW, INITIAL = (8, 8, 8), (11, 10, 8)


def patch_of(segmentation: np.ndarray, window, initial, seed, labels=(1, 2)) -> list[list[int]]:
    return view_patch(class_voxels(segmentation, labels), segmentation.shape[1:], window, initial, seed)


def views_of(segmentation: np.ndarray, cases: list[str], views: int, ignore_label: int | None = None) -> SupportViews:
    """Of cases that share a label map, an image of noise and an identity for nnU-Net's transforms."""
    image = np.random.default_rng(0).random(segmentation.shape).astype(np.float32)
    return SupportViews(
        cases,
        views,
        load_case=lambda case: (image, segmentation),
        transforms_of=lambda window: lambda **patch: patch,
        labels=[1, 2],
        ignore_label=ignore_label,
        window=WINDOW,
        initial_patch=WINDOW,
        seed=0,
    )


def labelled(*boxes: tuple[int, slice, slice, slice]) -> np.ndarray:
    segmentation = np.zeros((1, 20, 30, 40), np.int16)
    for label, *box in boxes:
        segmentation[(0, *box)] = label
    return segmentation


def test_a_volume_that_fits_the_window_is_taken_whole():
    segmentation = labelled((1, slice(3, 5), slice(3, 5), slice(3, 5)))
    for seed in range(5):
        assert patch_of(segmentation, (20, 30, 40), (30, 40, 50), (seed,)) == [[0, 20], [0, 30], [0, 40]]
    (first, *whole) = patch_of(segmentation, (8, 30, 40), (12, 40, 50), (0,))
    assert whole == [[0, 30], [0, 40]] and first[1] - first[0] == 12


def test_windows_lie_around_voxels_of_every_class_alike():
    """A class of 2 voxels gets as many views as one of 2,000; the patch goes beyond the window on both sides."""
    large, small = (1, slice(0, 10), slice(0, 10), slice(0, 20)), (2, slice(19, 20), slice(28, 30), slice(39, 40))
    segmentation = labelled(large, small)
    shows = []
    for seed in range(100):
        patch = np.array(patch_of(segmentation, WINDOW, INITIAL, (seed,)))
        assert (patch[:, 1] - patch[:, 0]).tolist() == list(INITIAL)
        first = patch[:, 0] + (np.array(INITIAL) - WINDOW) // 2
        assert (first >= 0).all() and (first + WINDOW <= segmentation.shape[1:]).all()
        window = segmentation[(0, *(slice(a, a + n) for a, n in zip(first, WINDOW)))]
        shows.append([(window == label).any() for label in (1, 2)])
    assert all(one != two for one, two in shows)
    assert 30 <= sum(two for _, two in shows) <= 70


def test_in_a_volume_without_labels_windows_lie_anywhere():
    starts = np.array([np.array(patch_of(labelled(), WINDOW, WINDOW, (seed,)))[:, 0] for seed in range(200)])
    assert starts.min(0).tolist() == [0, 0, 0] and starts.max(0).tolist() == [12, 22, 32]


@pytest.mark.parametrize(("cases", "views", "of_each"), [(1, 64, 64), (5, 64, 12), (70, 64, 1), (3, 1, 1), (3, 0, 0)])
def test_views_are_shared_out(cases, views, of_each):
    assert len(views_of(labelled(), [str(i) for i in range(cases)], views).names) == cases * of_each


@pytest.mark.parametrize("cases", [1, 10, 64])
def test_three_views_of_four_lie_around_labels(cases):
    """The others anywhere, whatever the number of cases: this organ fills a thousandth of the volume."""
    views = views_of(labelled((1, slice(0, 2), slice(0, 3), slice(0, 4))), [f"case{i}" for i in range(cases)], 64)
    made = [views.make(name) for name in views.names]
    assert len(made) >= 60 and all(image.shape == label_map.shape == (1, *WINDOW) for image, label_map in made)
    assert 0.6 < np.mean([(label_map > 0).any() for _, label_map in made]) < 0.9


def test_a_view_is_the_same_whatever_other_cases_are_there():
    segmentation = labelled((1, slice(0, 20), slice(0, 30), slice(0, 40)))
    alone, among = views_of(segmentation, ["b"], 3), views_of(segmentation, ["a", "b", "c"], 9)
    assert len(alone.names) == 3
    for name in alone.names:
        assert all(map(np.array_equal, alone.make(name), among.make(name)))


def test_views_that_lie_anywhere_show_annotated_voxels():
    """Here a slice of twenty, the others are ignored."""
    segmentation = labelled((3, slice(1, 20), slice(0, 30), slice(0, 40)), (1, slice(0, 1), slice(0, 2), slice(0, 2)))
    views = views_of(segmentation, ["a"], 64, ignore_label=3)
    shown = [views.make(name)[1] for name in views.names]
    assert all((label_map != 3).any() for label_map in shown)
    assert any(not (label_map == 1).any() for label_map in shown)


def test_ignored_voxels_are_no_class():
    segmentation = labelled((3, slice(0, 20), slice(0, 30), slice(0, 40)), (1, slice(0, 1), slice(0, 1), slice(0, 1)))
    assert {str(patch_of(segmentation, WINDOW, WINDOW, (seed,))) for seed in range(9)} == {str([[0, 8]] * 3)}


def test_few_voxels_of_a_large_class_are_kept():
    """From all over it."""
    segmentation = labelled((1, slice(0, 20), slice(0, 30), slice(0, 40)))
    (voxels,) = class_voxels(segmentation, [1])
    assert 5_000 < len(voxels) <= 10_000
    assert voxels.min(0).tolist() == [0, 0, 0] and (voxels.max(0) >= [19, 29, 38]).all()


def test_the_seed_decides():
    segmentation = labelled((1, slice(0, 20), slice(0, 30), slice(0, 40)))
    patches = [patch_of(segmentation, WINDOW, INITIAL, (1, view)) for view in (0, 0, 1)]
    assert patches[0] == patches[1] != patches[2]


# ---- boxes of other cases ----


def two_cases(cutmix: float, cases=("a", "b"), views: int = 80) -> SupportViews:
    """Cases whose images and label maps hold their number, 1 for "a", 2 for "b"."""
    values = {case: number for number, case in enumerate("abc", 1)}
    return SupportViews(
        cases,
        views,
        load_case=lambda case: (
            np.full((1, 9, 9, 9), values[case], np.float32),
            np.full((1, 9, 9, 9), values[case], np.int16),
        ),
        transforms_of=lambda window: lambda **patch: patch,
        labels=[1, 2, 3],
        ignore_label=None,
        window=WINDOW,
        initial_patch=WINDOW,
        seed=0,
        cutmix=cutmix,
    )


def test_views_show_boxes_of_other_cases_with_their_labels():
    views = two_cases(0.5)
    shares = []
    for name, (case, _) in views.names.items():
        image, labels = views.make(name)
        assert np.array_equal(image, labels)
        own, other = (1, 2) if case == "a" else (2, 1)
        of_other = np.argwhere(labels[0] == other)
        assert set(np.unique(labels)) <= {own, other}
        assert bool(len(of_other)) == (views.other_case(name) is not None)
        if len(of_other):
            first, last = of_other.min(0), of_other.max(0)
            assert np.prod(last - first + 1) == len(of_other)  # one box
            shares.append(len(of_other) / labels.size)
    assert 0.35 < len(shares) / len(views.names) < 0.65
    assert min(shares) < 0.1 and max(shares) > 0.8 and 0.3 < np.mean(shares) < 0.7


def test_a_single_case_has_no_boxes_of_others():
    views = two_cases(1.0, cases=["a"])
    assert all(views.other_case(name) is None and (views.make(name)[1] == 1).all() for name in views.names)


def test_boxes_are_described():
    """What a view shows is part of what it was made of; without boxes, descriptions are those of before."""
    mixed, plain = two_cases(1.0), two_cases(0.0)
    for name, (case, _) in mixed.names.items():
        assert mixed.describe(name) == {"box_of": "b" if case == "a" else "a", **plain.describe(name)}
    assert two_cases(1.0).make("a__view3")[0].tolist() == mixed.make("a__view3")[0].tolist()
