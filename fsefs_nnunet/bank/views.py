"""Augmented views of support volumes, of a window each, as nnU-Net's patches are.

Stored features cannot be augmented as images are, so the images are, before. A window costs one pass of the backbone,
where a volume of a patient costs a hundred.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

SEPARATOR = "__view"
MOST_VOXELS = 10_000  # of a class, to draw from, as nnU-Net keeps them


def view_name(case: str, view: int) -> str:
    """The name of a view in the feature bank."""
    return f"{case}{SEPARATOR}{view}"


def class_voxels(segmentation: np.ndarray, labels: Sequence[int]) -> list[np.ndarray]:
    """Voxels (n, 3) of each of `labels` that the label map (1, X, Y, Z) shows, at most MOST_VOXELS of each."""
    voxels = [np.argwhere(segmentation[0] == label) for label in labels]
    return [of_class[:: -(-len(of_class) // MOST_VOXELS)].copy() for of_class in voxels if len(of_class)]


def view_patch(
    voxels: Sequence[np.ndarray],
    shape: Sequence[int],
    window: Sequence[int],
    initial_patch: Sequence[int],
    seed: Sequence[int],
) -> list[list[int]]:
    """Where a view is cut, [first, stop) per axis: beyond the window, so that turning it finds image at its corners.

    The window lies in the volume, around a random voxel of a random class, as nnU-Net's patches of foreground.

    Args:
        voxels: of each class, what `class_voxels` gave.
        shape: of the volume (X, Y, Z); nothing is cut along axes that are no longer than the window.
        window: voxels per axis, at most the volume's.
        initial_patch: nnU-Net's size of a patch before its spatial transform.
    """
    rng = np.random.default_rng(list(seed))
    shape, window = np.array(shape), np.array(window)
    centre = shape // 2
    if voxels:
        of_class = voxels[rng.integers(len(voxels))]
        centre = of_class[rng.integers(len(of_class))]
    first = np.clip(centre - window // 2, 0, shape - window)
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
    """Global random state of `seed` inside, as before outside: the transforms know no generators of their own."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    number = int(np.random.SeedSequence(list(seed)).generate_state(1)[0])
    random.seed(number), np.random.seed(number), torch.manual_seed(number)
    try:
        yield
    finally:
        random.setstate(states[0]), np.random.set_state(states[1]), torch.set_rng_state(states[2])
