import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from published_numbers import published

from fsefs_nnunet.losses.segmentation import segmentation_loss
from fsefs_nnunet.losses.soft_dice import SoftDiceLoss, soft_dice

BIG = 50.0  # a logit whose sigmoid is 1 in float32


def half_filled() -> torch.Tensor:
    """(1, 1, 2, 2, 2) with three of eight voxels set."""
    return torch.tensor([1.0, 1, 1, 0, 0, 0, 0, 0]).view(1, 1, 2, 2, 2)


@pytest.mark.parametrize("name", ["random", "empty_target", "all_zero", "perfect", "multiclass_softmax"])
def test_soft_dice_matches_the_published_code(name):
    golden = published("binary_dice3d.npz", f"{name}/")
    prediction, target, loss, gradient = (golden[key] for key in ("pred", "target", "loss", "grad"))
    prediction = torch.from_numpy(prediction).requires_grad_()
    ours = soft_dice(prediction, torch.from_numpy(target)).mean()
    ours.backward()
    assert ours.item() == pytest.approx(float(loss), rel=1e-5, abs=1e-7)
    np.testing.assert_allclose(prediction.grad, gradient, rtol=1e-4, atol=1e-8)


def test_soft_dice_by_hand():
    target = torch.cat([half_filled(), torch.zeros(1, 1, 2, 2, 2)], 1)
    value = soft_dice(torch.full((1, 2, 2, 2, 2), 0.5), target)
    # 1 - (2 * 1.5 + 1) / (4 + 3 + 1) and 1 - 1 / (4 + 1)
    assert torch.equal(value, torch.tensor([[0.5, 0.8]]))
    assert torch.equal(soft_dice(target, target), torch.zeros(1, 2))


def test_labels():
    target = half_filled()
    loss = SoftDiceLoss(has_regions=False)
    assert loss(torch.zeros(1, 2, 2, 2, 2), target).item() == pytest.approx(0.5)
    perfect = BIG * torch.cat([1 - target, target], 1)
    assert loss(perfect, target).item() == pytest.approx(0, abs=1e-6)
    assert loss(perfect, target.to(torch.int16)) == loss(perfect, target)


def test_labels_average_over_classes_without_background():
    # all voxels are predicted as class 1: right for three of them, class 2 is nowhere and has none
    logits = torch.zeros(1, 3, 2, 2, 2)
    logits[:, 1] = BIG
    expected = (1 - (2 * 3 + 1) / (8 + 3 + 1) + 0) / 2
    assert SoftDiceLoss(has_regions=False)(logits, half_filled()).item() == pytest.approx(expected)


def test_labels_ignore():
    target = half_filled()
    target.view(-1)[-2:] = 2
    logits = torch.zeros(1, 2, 2, 2, 2, requires_grad=True)
    loss = SoftDiceLoss(has_regions=False, ignore_label=2)(logits, target)
    assert loss.item() == pytest.approx(1 - (2 * 1.5 + 1) / (3 + 3 + 1))
    loss.backward()
    ignored = (target == 2).expand_as(logits)
    assert (logits.grad[ignored] == 0).all()
    assert (logits.grad[~ignored] != 0).all()


def test_regions():
    target = torch.cat([half_filled(), torch.zeros(1, 1, 2, 2, 2)], 1)
    loss = SoftDiceLoss(has_regions=True)
    assert loss(torch.zeros(1, 2, 2, 2, 2), target).item() == pytest.approx((0.5 + 0.8) / 2)
    assert loss(BIG * (2 * target - 1), target).item() == pytest.approx(0, abs=1e-6)


def test_regions_ignore():
    ignored = torch.zeros(1, 1, 2, 2, 2)
    ignored.view(-1)[-2:] = 1
    # what the label says where it is ignored must not matter
    region = half_filled() + ignored
    logits = torch.zeros(1, 1, 2, 2, 2, requires_grad=True)
    loss = SoftDiceLoss(has_regions=True, ignore_label=2)(logits, torch.cat([region, ignored], 1))
    assert loss.item() == pytest.approx(1 - (2 * 1.5 + 1) / (3 + 3 + 1))
    loss.backward()
    assert (logits.grad[ignored == 1] == 0).all()
    assert (logits.grad[ignored == 0] != 0).all()


def test_half_precision_does_not_overflow():
    """The sum over 2 * 64^3 voxels lies beyond float16's 65504."""
    logits = torch.full((1, 1, 64, 64, 64), BIG, dtype=torch.float16)
    loss = SoftDiceLoss(has_regions=True)(logits, torch.ones(1, 1, 64, 64, 64))
    assert loss.item() == pytest.approx(0, abs=1e-6)


# ---- the loss of the plans ----


LABELS = {
    "labels": ({"background": 0, "a": 1, "b": 2}, None),
    "ignore": ({"background": 0, "a": 1, "b": 2, "ignore": 3}, None),
    "regions": ({"background": 0, "ab": [1, 2], "b": 2}, [1, 2]),
    "regions and ignore": ({"background": 0, "ab": [1, 2], "b": 2, "ignore": 3}, [1, 2]),
}


@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("kind", LABELS)
def test_the_plans_loss_is_what_nnunets_trainer_builds(kind, batch_dice):
    manager = LabelManager(*LABELS[kind])
    trainer = nnUNetTrainer.__new__(nnUNetTrainer)  # without a dataset
    trainer.label_manager, trainer.is_ddp, trainer.enable_deep_supervision = manager, False, False
    trainer.configuration_manager = ConfigurationManager({"batch_dice": batch_dice, "architecture": {}})
    trainer.device = torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    values = 4 if manager.has_ignore_label else 3
    target = torch.randint(0, values, (2, 1, 6, 5, 4), generator=generator)
    if manager.has_regions:
        regions = [[1, 2], [2], *([[3]] if manager.has_ignore_label else [])]
        target = torch.cat([torch.isin(target, torch.tensor(labels)) for labels in regions], 1).float()
    logits = torch.randn((2, manager.num_segmentation_heads, 6, 5, 4), generator=generator)
    ours = segmentation_loss("nnunet", manager, batch_dice)(logits, target)
    assert ours.isfinite() and torch.equal(ours, trainer._build_loss()(logits, target))
    assert isinstance(segmentation_loss("soft_dice", manager, batch_dice), SoftDiceLoss)
