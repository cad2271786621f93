import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nnunetv2.evaluation.evaluate_predictions import label_or_region_to_key
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from published_numbers import published

from fsefs_nnunet.errors import InputError
from fsefs_nnunet.losses.partial_labels import PartialLabelLoss, annotation_masks
from fsefs_nnunet.losses.soft_dice import soft_dice
from fsefs_nnunet.trainers.pretrainer import FSEFTPretrainer, RandomAppearanceTransform, mask_summary

REGIONS = ["kidneys", "liver", "spleen"]


def sources() -> dict:
    return {
        "A": {"classes": ["liver"], "cases": ["a1", "a2", "a3"]},
        "B": {"classes": ["spleen", "kidneys"], "cases": ["b1"]},
        "held_out": {"classes": REGIONS, "cases": ["h1", "h2"]},
    }


@pytest.fixture
def batch():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, 6, requires_grad=True)
    return logits, (torch.rand(2, 3, 4, 5, 6) > 0.7).float(), torch.tensor([[1.0, 0, 1], [0, 1, 0]])


def test_unannotated_class_gets_exactly_zero_gradient(batch):
    logits, target, w = batch
    PartialLabelLoss()(logits, target, w).backward()
    reached = logits.grad.abs().amax((2, 3, 4)) > 0
    assert torch.equal(reached, w.bool())
    assert (logits.grad[1, 1] != 0).all()


def test_what_an_unannotated_class_holds_does_not_matter(batch):
    logits, target, w = batch
    loss = PartialLabelLoss()
    other = torch.where(w[:, :, None, None, None] == 1, target, 1 - target)
    assert loss(logits, other, w) == loss(logits, target, w)
    assert loss(logits, other, torch.ones(2, 3)) != loss(logits, target, torch.ones(2, 3))


def test_soft_dice_hardly_minds_a_class_that_is_missing_from_a_whole_case():
    """Why missing labels taken for background do little harm: they are a thousandth of the labels' force."""
    organ = torch.zeros(1, 1, 40, 56, 40)
    organ[:, :, 14:24, 20:36, 14:24] = 1

    def force(target: torch.Tensor) -> float:
        logits = torch.where(organ > 0, 0.0, -4.6).requires_grad_()  # p = 0.5 in the organ, 0.01 elsewhere
        soft_dice(torch.sigmoid(logits), target).mean().backward()
        return -(logits.grad * organ).sum().item()

    assert force(organ) == pytest.approx(0.184, abs=1e-3)
    assert force(torch.zeros_like(organ)) == pytest.approx(-0.00014, abs=1e-5)


def test_equation_1_by_hand():
    # p = 0.5 everywhere in 8 voxels. Soft Dice is 1 - (n + 1) / (4 + n + 1) for n voxels of the class; cross-entropy is
    # log 2 a voxel, and 2 voxels of a class against 6 of background weigh sqrt(3) each.
    target = torch.zeros(2, 2, 2, 2, 2)
    target[0, 0, 0, 0] = 1
    target[0, 1] = 1
    target[1, 0, 0] = 1
    bce = math.log(2) * torch.tensor([[(6 + 2 * math.sqrt(3)) / 8, 1], [1, 1]])
    per_class = bce + 1 - torch.tensor([[3 / 7, 9 / 13], [5 / 9, 1 / 5]])
    for w, expected in (
        ([[1.0, 1], [1, 1]], per_class.mean()),
        # a case counts the same however many classes it annotates
        ([[1.0, 1], [0, 1]], (per_class[0].mean() + per_class[1, 1]) / 2),
        ([[0.0, 1], [1, 0]], (per_class[0, 1] + per_class[1, 0]) / 2),
    ):
        loss = PartialLabelLoss()(torch.zeros(2, 2, 2, 2, 2), target, torch.tensor(w))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_masked_dice_matches_the_published_code():
    """PartialLabelLoss without its cross-entropy is the published code's masked Dice."""
    golden = published("binary_dice3d.npz", "multiclass_softmax/")
    prediction, target, w, expected = (
        torch.from_numpy(golden[key]).double() for key in ("pred", "target", "annotation_mask", "loss_masked")
    )
    size = target.sum((2, 3, 4), keepdim=True)
    weight = 1 + target * (((target[0, 0].numel() - size) / size.clamp_min(1)).sqrt().clamp_min(1) - 1)
    bce = F.binary_cross_entropy(prediction, target, weight, reduction="none").mean((2, 3, 4))
    loss = PartialLabelLoss()(torch.logit(prediction), target, w) - ((bce * w).sum(1) / w.sum(1)).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_annotation_masks():
    masks = annotation_masks({"sources": sources()}, REGIONS)
    assert {case: mask.tolist() for case, mask in masks.items()} == {
        **dict.fromkeys(["a1", "a2", "a3"], [0, 1, 0]),
        "b1": [1, 0, 1],
        **dict.fromkeys(["h1", "h2"], [1, 1, 1]),
    }


@pytest.mark.parametrize("dataset_json", [{}, {"sources": {}}])
def test_masks_need_sources(dataset_json):
    with pytest.raises(ValueError, match='no "sources"'):
        annotation_masks(dataset_json, REGIONS)


def test_masks_refuse_unknown_classes():
    with pytest.raises(ValueError, match=r"'A' annotates \['lever'\]"):
        annotation_masks({"sources": {"A": {"classes": ["lever", "spleen"], "cases": ["a"]}}}, REGIONS)


@pytest.mark.parametrize("source", [{"classes": [], "cases": ["a"]}, {"classes": ["spleen"], "cases": []}, {}])
def test_masks_refuse_empty_sources(source):
    with pytest.raises(ValueError, match='source \'A\' needs "classes" and "cases"'):
        annotation_masks({"sources": {"A": source}}, REGIONS)


def test_masks_refuse_a_case_of_two_sources():
    content = sources()
    content["B"]["cases"].append("a2")
    with pytest.raises(ValueError, match="'a2' is listed in two sources"):
        annotation_masks({"sources": content}, REGIONS)


@pytest.fixture
def pretrainer():
    """A trainer with what the plain functions need; the constructor of nnU-Net's needs folders."""
    trainer = FSEFTPretrainer.__new__(FSEFTPretrainer)
    trainer.dataset_json = {"sources": sources()}
    trainer.masks = annotation_masks(trainer.dataset_json, REGIONS)
    trainer.device = torch.device("cpu")
    return trainer


def test_sources_are_drawn_equally_often(pretrainer):
    cases = pretrainer.balanced(["a1", "a2", "a3", "b1", "h1", "h2"])
    assert sorted(cases) == ["a1", "a2", "a3", "b1", "b1", "b1", "h1", "h1", "h2"]
    assert all(type(case) is str for case in cases)


def test_only_the_given_cases_are_drawn(pretrainer):
    assert sorted(pretrainer.balanced(["a1", "a3", "b1"])) == ["a1", "a3", "b1", "b1"]


def test_balanced_refuses_a_case_of_no_source(pretrainer):
    with pytest.raises(InputError, match="1 cases in no source, e.g. z1"):
        pretrainer.balanced(["a1", "z1"])


def test_task_masks_of_a_batch(pretrainer):
    assert pretrainer.w({"keys": np.array(["b1", "a2"])}).tolist() == [[1, 0, 1], [0, 1, 0]]


def test_random_window(pretrainer):
    """Windows are divisible by the network's strides, change in size, grow, and keep image and target together."""
    strides = [[1, 1, 1], [2, 2, 2], [2, 2, 1]]
    configuration = {"architecture": {"arch_kwargs": {"strides": strides}}}
    pretrainer.configuration_manager = ConfigurationManager(configuration)
    data = torch.zeros(2, 1, 64, 48, 44)
    data[..., 20:, :, :] = 1
    batch = {"data": data, "target": data.repeat(1, 3, 1, 1, 1).to(torch.int16), "keys": ["a1", "b1"]}
    np.random.seed(0)
    pretrainer.num_epochs = 10
    pretrainer.current_epoch = 0
    early = [pretrainer.random_window(batch)["data"].shape[2:] for _ in range(20)]
    assert all(20 <= n <= half for shape in early for n, half in zip(shape, (32, 24, 22)))
    pretrainer.current_epoch = 5
    shapes = set()
    for _ in range(20):
        window = pretrainer.random_window(batch)
        shape = window["data"].shape[2:]
        shapes.add(tuple(shape))
        assert window["target"].shape == (2, 3, *shape)
        assert all(n % step == 0 and 40 <= n <= full for n, step, full in zip(shape, (4, 4, 2), (64, 48, 44)))
        assert set(window["target"].unique().tolist()) <= {0, 1}
        assert ((window["data"] > 0.5).float() == window["target"][:, :1]).float().mean() > 0.97
        assert window["keys"] == ["a1", "b1"]
    assert len(shapes) > 10


def test_random_appearance_z_scores():
    image = torch.rand(1, 8, 9, 10) * 0.3 + 0.2
    segmentation = torch.ones(1, 8, 9, 10)
    out = RandomAppearanceTransform(p_curve=0, p_zscore=1)(image=image.clone(), segmentation=segmentation)
    assert out["image"].shape == image.shape and out["image"].dtype == torch.float32
    assert out["image"].mean().item() == pytest.approx(0, abs=1e-5)
    assert out["image"].std().item() == pytest.approx(1, rel=1e-4)
    assert torch.equal(out["segmentation"], segmentation)
    torch.testing.assert_close(out["image"] * image.std() + image.mean(), image)


def test_random_appearance_of_a_constant_image():
    out = RandomAppearanceTransform(p_curve=0, p_zscore=1)(image=torch.full((1, 4, 4, 4), 0.3))["image"]
    assert out.isfinite().all() and out.abs().max() < 1


def test_random_appearance_curve():
    """Equal voxels stay equal, values stay in [0, 1]."""
    np.random.seed(1)
    image = torch.linspace(0, 1, 11).repeat(60).view(1, 66, 10, 1)
    transform = RandomAppearanceTransform(p_curve=1, p_zscore=0)
    falls = 0
    for _ in range(20):
        out = transform(image=image.clone())["image"]
        assert out.shape == image.shape and out.dtype == torch.float32
        assert 0 <= out.min() and out.max() <= 1
        curve = out.flatten()[:11]
        assert torch.equal(out.flatten().view(60, 11), curve.expand(60, 11))
        assert not torch.allclose(out, image)
        falls += int((curve.diff() < 0).any())
    assert falls


def test_random_appearance_may_do_nothing():
    image = torch.rand(1, 4, 4, 4)
    assert torch.equal(RandomAppearanceTransform(p_curve=0, p_zscore=0)(image=image.clone())["image"], image)


def test_random_appearance_frequencies():
    np.random.seed(0)
    drawn = [RandomAppearanceTransform().get_parameters() for _ in range(2000)]
    curves = [d["curve"] for d in drawn if d["curve"] is not None]
    assert len(curves) / 2000 == pytest.approx(0.4, abs=0.05)
    assert np.mean([d["zscore"] for d in drawn]) == pytest.approx(0.5, abs=0.05)
    assert min(map(len, curves)) >= 4 and len(set(map(len, curves))) > 3


def test_mask_summary():
    labels = {"background": 0, "kidneys": [1, 2], "liver": 3, "spleen": [4], "ignore": 5}
    regions = LabelManager(labels, regions_class_order=[1, 3, 4]).foreground_regions
    kidneys, liver, spleen = keys = [label_or_region_to_key(region) for region in regions]

    def case(file, dice):
        return {"prediction_file": file, "metrics": {key: {"Dice": d, "n_pred": 10} for key, d in zip(keys, dice)}}

    nan = float("nan")
    summary = {
        "metric_per_case": [case("/out/a1.nii.gz", [0, 0.5, 0]), case("/else.where/b1.nii.gz", [0.7, 0.1, nan])]
        + [case("h1.nii.gz", [0.9, 0.9, nan])],
        "mean": {key: {"Dice": 0, "n_pred": 10} for key in keys},
        "foreground_mean": {"Dice": 0, "n_pred": 10},
    }
    dataset_json = {"labels": labels, "file_ending": ".nii.gz"}
    masked = mask_summary(summary, annotation_masks({"sources": sources()}, REGIONS), dataset_json)
    dice = [[c["metrics"][key]["Dice"] for key in keys] for c in masked["metric_per_case"]]
    np.testing.assert_equal(dice, [[nan, 0.5, nan], [0.7, nan, nan], [0.9, 0.9, nan]])
    assert math.isnan(masked["metric_per_case"][0]["metrics"][kidneys]["n_pred"])
    assert masked["mean"][kidneys]["Dice"] == pytest.approx(0.8)
    assert masked["mean"][liver]["Dice"] == pytest.approx(0.7)
    assert math.isnan(masked["mean"][spleen]["Dice"])
    assert masked["foreground_mean"]["Dice"] == pytest.approx(0.75)
