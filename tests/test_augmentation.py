"""Augmentation of the long trainings: shapes, not intensities."""

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from fsefs_nnunet.methods.registry import METHODS
from fsefs_nnunet.trainers import by_name
from fsefs_nnunet.trainers.augmentation import transforms_for_few_cases

PATCH = (16, 20, 16)


def made(make):
    return make(PATCH, (-0.5, 0.5), None, None, False, foreground_labels=[1])


def share_of_other_shapes(make, number: int = 60) -> float:
    """Share of patches whose label map, a ball, comes out in another shape."""
    centre = np.stack(np.meshgrid(*map(np.arange, PATCH), indexing="ij")) - np.array(PATCH).reshape(3, 1, 1, 1) / 2
    ball = torch.from_numpy((np.square(centre).sum(0) < 25).astype(np.int16))[None]
    transforms, changed = made(make), 0
    np.random.seed(0)
    torch.manual_seed(0)
    for _ in range(number):
        changed += not torch.equal(
            transforms(image=torch.rand(1, *PATCH), segmentation=ball.clone())["segmentation"].to(ball), ball
        )
    return changed / number


def test_most_patches_have_another_shape():
    assert share_of_other_shapes(nnUNetTrainer.get_training_transforms) < 0.5
    assert share_of_other_shapes(transforms_for_few_cases) > 0.8


def test_only_the_spatial_transform_differs():
    ours, stock = (made(make).transforms for make in (transforms_for_few_cases, nnUNetTrainer.get_training_transforms))
    others = [[str(t) for t in of if not isinstance(t, SpatialTransform)] for of in (ours, stock)]
    assert [type(t) for t in ours] == [type(t) for t in stock] and others[0] == others[1]
    spatial = next(t for t in ours if isinstance(t, SpatialTransform))
    assert spatial.elastic_deform_magnitude == (0, 0.1 * 16) and spatial.padding_value_seg == -1


@pytest.mark.parametrize("name", ["ft", "ft_long", "unet", "fseft"])
def test_trainers_take_what_their_row_says(name):
    """The published recipes keep nnU-Net's."""
    trainer, row = getattr(by_name, METHODS[name].trainer), METHODS[name]
    spatial = next(t for t in made(trainer.get_training_transforms).transforms if isinstance(t, SpatialTransform))
    assert (spatial.p_rotation == 0.7) == row.more_shapes == (name in ("ft_long", "unet"))
