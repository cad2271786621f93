"""Augmentation for few labelled cases."""

from __future__ import annotations

from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

P_ROTATION, P_SCALING, P_ELASTIC = 0.7, 0.7, 0.4  # nnU-Net's: 0.2, 0.2, 0
P_SCALED_ALIKE = 0.3  # that all axes are scaled by the same factor; nnU-Net's: 1
BENDS_WITHIN = (0.05, 0.15)  # sigma of the displacements' blur, as a share of the patch's sides
LARGEST_BEND = 0.1  # displacement, as a share of the patch's shortest side


def transforms_for_few_cases(*args, **kwargs) -> BasicTransform:
    """nnU-Net's training transforms, but most patches are rotated, scaled or deformed; in nnU-Net, one in three is.

    What a training on few cases lacks most is variety of shapes (documentation/tuning.md). Arguments are those of
    nnUNetTrainer.get_training_transforms.
    """
    transforms = nnUNetTrainer.get_training_transforms(*args, **kwargs)
    for transform in transforms.transforms:
        if isinstance(transform, SpatialTransform):
            transform.p_rotation, transform.p_scaling, transform.p_elastic_deform = P_ROTATION, P_SCALING, P_ELASTIC
            transform.p_synchronize_scaling_across_axes = P_SCALED_ALIKE
            transform.elastic_deform_scale = BENDS_WITHIN
            transform.elastic_deform_magnitude = (0, LARGEST_BEND * min(transform.patch_size))
    return transforms
