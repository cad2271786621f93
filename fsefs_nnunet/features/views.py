"""Augmented views of support volumes, one window each, made like nnU-Net's patches.

Stored features cannot be augmented as images can, so images are augmented beforehand. A view costs the backbone a
single window, a whole volume about a hundred.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd

from fsefs_nnunet.cases.shown_voxels import ShownVoxels, annotated_in

SEPARATOR = "__view"
MOST_VOXELS = 10_000  # of a class, to draw from, as nnU-Net keeps them
ANYWHERE = 0.25  # share of the views that lie anywhere, so that crops show the background far from labels, too


class SupportViews:
    """Augmented views of support cases.

    names: of all views, with their case and number; a view is the same whatever process makes it and, unless it shows a
    box of another case (CutMix, Yun et al., ICCV 2019), whatever other cases are there.
    """

    def __init__(
        self,
        cases: Sequence[str],
        views: int,
        *,
        load_case: Callable[[str], tuple],
        transforms_of: Callable[[np.ndarray], Callable],
        labels: Sequence[int],
        ignore_label: int | None,
        window: Sequence[int],
        initial_patch: Sequence[int],
        seed: int,
        cutmix: float = 0.0,
    ):
        """
        Args:
            views: number for all cases together, divided evenly, at least one for each; 0: none.
            load_case: gives image and label map of a case, in memory or mapped; further items are ignored.
            transforms_of: batchgeneratorsv2's training transforms for a patch of this size.
            labels: foreground labels of the dataset.
            window: the backbone's.
            initial_patch: nnU-Net's size of a patch before its spatial transform.
            cutmix: probability that a view shows a box of another case's view, if there are at least two cases.
        """
        of_each = max(views // len(cases), min(views, 1))
        self.names = {view_name(case, view): (case, view) for case in cases for view in range(of_each)}
        self.load_case, self.transforms_of = load_case, transforms_of
        self.labels, self.ignore_label = labels, ignore_label
        self.window, self.initial_patch, self.seed, self.cutmix = window, initial_patch, seed, cutmix
        self.cases = list(cases)
        self._voxels: dict[str, tuple[list[np.ndarray], list[np.ndarray]]] = {}

    def window_in(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape (X, Y, Z) of a view of a volume of `shape`."""
        return tuple(np.minimum(self.window, shape).tolist())

    def describe(self, name: str) -> dict:
        """What a view depends on besides the image and the label map of its case."""
        other = self.other_case(name)
        return {
            **({"box_of": other} if other else {}),
            "view": self.names[name][1],
            "seed": self.seed,
            "window": [int(n) for n in self.window],
            "initial_patch": [int(n) for n in self.initial_patch],
            "labels": [int(label) for label in self.labels],
            "ignore_label": self.ignore_label,
            "made_by": {package: version(package) for package in ("nnunetv2", "batchgeneratorsv2")},
        }

    def make(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Image (channels, X, Y, Z) and label map (1, X, Y, Z) of a view, a function of the seed."""
        case, view = self.names[name]
        image, labels = self._augmented(case, view)
        if other := self.other_case(name):
            rng = np.random.default_rng([*self._seed(case, view), 2])
            other_image, other_labels = self._augmented(other, view)
            box = random_box(np.minimum(labels.shape[1:], other_labels.shape[1:]), rng)
            image[box], labels[box] = other_image[box], other_labels[box]
        return image, labels

    def other_case(self, name: str) -> str | None:
        """The case of which a view shows a box, if it does."""
        case, view = self.names[name]
        rng, others = np.random.default_rng([*self._seed(case, view), 1]), [c for c in self.cases if c != case]
        return others[rng.integers(len(others))] if others and rng.random() < self.cutmix else None

    def _seed(self, case: str, view: int) -> tuple[int, ...]:
        return (self.seed, view, *case.encode())

    def _augmented(self, case: str, view: int) -> tuple[np.ndarray, np.ndarray]:
        image, segmentation = self.load_case(case)[:2]
        shape = segmentation.shape[1:]
        window = np.array(self.window_in(shape))
        if case not in self._voxels:
            self._voxels[case] = self._voxels_of(segmentation[:])
        around_labels, anywhere = self._voxels[case]
        seed = self._seed(case, view)
        lies_anywhere = np.random.default_rng([*seed, 0]).random() < ANYWHERE
        patch = view_patch(anywhere if lies_anywhere else around_labels, shape, window, self.initial_patch, seed)
        image, turned = augmented_view(
            self.transforms_of(window), crop_and_pad_nd(image, patch, 0), crop_and_pad_nd(segmentation, patch, -1), seed
        )
        return image, turned.astype(segmentation.dtype)

    def _voxels_of(self, segmentation: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Voxels that views around labels are drawn from, and those for the other views.

        The latter are none, so that these views lie anywhere, or, with an ignore label, the annotated voxels: there is
        nothing to learn from a window of ignored ones.
        """
        around_labels = class_voxels(segmentation, self.labels)
        if self.ignore_label is None:
            return around_labels, []
        annotated = ShownVoxels(segmentation[0], partial(annotated_in, ignore_label=self.ignore_label))
        return around_labels, [annotated.at_most(MOST_VOXELS)] if len(annotated) else []


def random_box(shape: np.ndarray, rng: np.random.Generator) -> tuple[slice, ...]:
    """A box of a random share of a volume (X, Y, Z), with an axis for channels in front."""
    size = np.maximum(np.rint(shape * rng.random() ** (1 / 3)), 1).astype(int)
    start = rng.integers(0, shape - size + 1)
    return (slice(None), *(slice(a, a + n) for a, n in zip(start, size)))


def view_name(case: str, view: int) -> str:
    """The name of a view in the feature bank."""
    return f"{case}{SEPARATOR}{view}"


def class_voxels(segmentation: np.ndarray, labels: Sequence[int]) -> list[np.ndarray]:
    """Voxels (n, 3) of each of `labels` that the label map (1, X, Y, Z) shows, at most MOST_VOXELS of each."""
    voxels = [ShownVoxels(segmentation[0], partial(np.equal, label)).at_most(MOST_VOXELS) for label in labels]
    return [of_class for of_class in voxels if len(of_class)]


def view_patch(
    voxels: Sequence[np.ndarray],
    shape: Sequence[int],
    window: Sequence[int],
    initial_patch: Sequence[int],
    seed: Sequence[int],
) -> list[list[int]]:
    """Where a view is cut, [first, stop) per axis: larger than the window, so that its corners show image if rotated.

    The window lies in the volume, around a random voxel of a random class, as nnU-Net's patches of foreground.

    Args:
        voxels: of each class, what `class_voxels` gave. Without any class the window lies anywhere.
        shape: of the volume (X, Y, Z); nothing is cut along axes that are no longer than the window.
        window: voxels per axis, at most the volume's.
        initial_patch: nnU-Net's size of a patch before its spatial transform.
    """
    rng = np.random.default_rng(list(seed))
    shape, window = np.array(shape), np.array(window)
    if voxels:
        of_class = voxels[rng.integers(len(voxels))]
        first = np.clip(of_class[rng.integers(len(of_class))] - window // 2, 0, shape - window)
    else:
        first = rng.integers(0, shape - window + 1)
    beyond = np.where(shape > window, np.maximum(initial_patch - window, 0), 0)
    start = first - beyond // 2
    return np.stack([start, start + window + beyond], 1).tolist()


def augmented_view(
    transforms: Callable, image: np.ndarray, segmentation: np.ndarray, seed: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Image (channels, X, Y, Z) and label map (1, X, Y, Z), transformed; the same seed gives the same view.

    Args:
        transforms: of batchgeneratorsv2, nnU-Net's training transforms for a patch of (X, Y, Z).
    """
    _leave_timing_out(transforms)
    with _seeded(seed):
        result = transforms(
            image=torch.from_numpy(np.array(image, np.float32)),
            segmentation=torch.from_numpy(np.array(segmentation, np.int16)),
        )
    return result["image"].numpy(), result["segmentation"].numpy()


def _leave_timing_out(transform: object) -> None:
    """nnU-Net's blur measures which of two convolutions is faster here and now; their results differ in rounding."""
    if hasattr(transform, "benchmark"):
        transform.benchmark = False
    for inner in [getattr(transform, "transform", None), *getattr(transform, "transforms", [])]:
        if inner is not None:
            _leave_timing_out(inner)


@contextmanager
def _seeded(seed: Sequence[int]) -> Iterator[None]:
    """Seed the global random states and restore them afterwards: the transforms take no generators."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    number = int(np.random.SeedSequence(list(seed)).generate_state(1)[0])
    random.seed(number), np.random.seed(number), torch.manual_seed(number)
    try:
        yield
    finally:
        random.setstate(states[0]), np.random.set_state(states[1]), torch.set_rng_state(states[2])
