import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fsefs_nnunet.priors.prior import SupportLabels
from fsefs_nnunet.priors.size import ExpectedSize, SizePrior, estimate_size, size_penalty
from fsefs_nnunet.priors.volumes import PredictedSizes, VolumePrediction

DATA = Path(__file__).parent / "data"
SIZES = json.loads((DATA / "size_prior.json").read_text())
PENALTIES = json.loads((DATA / "proportion_constraint.json").read_text())


@pytest.mark.parametrize("name", SIZES)
def test_estimate_matches_the_published_code(name):
    case = SIZES[name]
    # the published code gives NaN for equal sizes
    expected = 40000.0 if case["is_nan"] else case["target"]
    kept = case["kept_indices"] or range(len(case["sizes"]))
    prior = estimate_size(case["sizes"])
    assert prior.size == pytest.approx(expected, rel=1e-12)
    assert prior.num_cases == len(kept)
    present = [size for size in case["sizes"] if size]
    assert prior.spread == pytest.approx(np.std(present), rel=1e-12, abs=1e-9)  # ours alone, of all that are present


def test_estimate_by_hand():
    assert estimate_size([2.0, 4.0]) == ExpectedSize(3.0, 1.0, 2)
    # median 3, standard deviation sqrt(1168.4) = 38: the outlier goes
    assert estimate_size([1.0, 2.0, 3.0, 4.0, 90.0]) == ExpectedSize(2.5, np.std([1, 2, 3, 4, 90]), 4)


def test_tolerance():
    """Of one case nothing is known of how sizes vary; a class may not vanish, however much they do."""
    assert estimate_size([5.0]).tolerance(0.1) == 0.1
    assert ExpectedSize(10.0, 0.5, 5).tolerance(0.1) == 0.1
    assert ExpectedSize(10.0, 1.5, 5).tolerance(0.1) == pytest.approx(0.3)
    assert ExpectedSize(10.0, 30.0, 5).tolerance(0.1) == 0.9


def test_penalty_with_a_tolerance_of_each_class():
    predicted, prior = torch.tensor([12.0, 12.0]), torch.tensor([10.0, 10.0])
    assert size_penalty(predicted, prior, torch.tensor([0.1, 0.3])).tolist() == pytest.approx([0.1, 0.0])


def test_absent_organs_do_not_enter():
    assert estimate_size([0.0, 5.0, 0.0]) == ExpectedSize(5.0, 0.0, 1)
    # four sizes are left, so the outlier stays
    assert estimate_size([0.0, 1.0, 2.0, 3.0, 90.0]).size == 24.0
    assert estimate_size([0.0, 0.0]) is None
    assert estimate_size([]) is None


@pytest.mark.parametrize("low, high", [(0.1, 0.1), (0.1, 0.3), (1000.1, 1000.1000001), (1e-3, 7e5)])
def test_sizes_on_the_bound_stay(low, high):
    prior = estimate_size([low] * 3 + [high] * 3)
    assert prior.num_cases == 6
    assert prior.size == pytest.approx((low + high) / 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_estimate_refuses(bad):
    with pytest.raises(ValueError, match="finite and not negative"):
        estimate_size([1.0, bad])


def test_penalty_matches_equation_2():
    """All rows of the golden file, value and gradient of lambda * penalty."""
    rows, lam = PENALTIES["rows"], PENALTIES["lambda"]
    for gamma in {row["margin"] for row in rows}:
        column = {key: [row[key] for row in rows if row["margin"] == gamma] for key in rows[0]}
        predicted = torch.tensor(column["S_hat"], dtype=torch.float64, requires_grad=True)
        penalty = size_penalty(predicted, torch.tensor(column["S"], dtype=torch.float64), gamma)
        np.testing.assert_allclose(penalty.detach(), column["eq2_over_S"], rtol=1e-5, atol=1e-7)
        (lam * penalty).sum().backward()
        np.testing.assert_allclose(predicted.grad, column["eq2_over_S_dLambda_dShat"], rtol=1e-4)


def test_penalty_by_hand():
    prior = torch.tensor([[10.0, 10.0, 10.0], [2.0, 2.0, 2.0]])
    predicted = torch.tensor([[4.0, 9.0, 16.0], [1.0, 3.0, 200.0]], requires_grad=True)
    penalty = size_penalty(predicted, prior, 0.5)
    torch.testing.assert_close(penalty, torch.tensor([[0.1, 0.0, 0.1], [0.0, 0.0, 98.5]]))
    penalty.sum().backward()
    # zero on the band's bounds; far above the pull is as strong as near
    assert torch.equal(predicted.grad, torch.tensor([[-0.1, 0.0, 0.1], [0.0, 0.0, 0.5]]))


def test_penalty_of_an_empty_prediction_and_no_tolerance():
    predicted = torch.tensor([0.0, 5.0], requires_grad=True)
    penalty = size_penalty(predicted, torch.tensor([4.0, 4.0]), 0.0)
    torch.testing.assert_close(penalty, torch.tensor([1.0, 0.25]))
    penalty.sum().backward()
    assert torch.equal(predicted.grad, torch.tensor([-0.25, 0.25]))


def test_an_organ_that_is_not_seen_whole_may_be_smaller_but_not_larger():
    predicted = torch.tensor([1.0, 1.0, 9.0, 9.0], requires_grad=True)
    whole = torch.tensor([True, False, True, False])
    penalty = size_penalty(predicted, torch.full((4,), 4.0), 0.25, whole)
    torch.testing.assert_close(penalty, torch.tensor([0.5, 0.0, 1.0, 1.0]))
    penalty.sum().backward()
    assert predicted.grad.tolist() == [-0.25, 0.0, 0.25, 0.25]


def test_sizes_in_label_maps():
    label_map = np.zeros((1, 10, 10, 10), np.int16)
    label_map[0, :2, :5, :5] = 1  # 50 voxels
    label_map[0, 5:, :2, :2] = 2  # 20 voxels
    label_map[0, 9, 9, 9] = -1  # nnU-Net's mark for outside
    ignored = label_map.copy()
    ignored[0, 9, 9, 0] = 4
    labels = SupportLabels({"a": label_map, "b": ignored}, [1, 2, (1, 2), 3], (2.0, 5.0, 1.5), ignore_label=4)
    assert list(labels.sizes_ml) == ["a"]  # one with ignored voxels shows no organ whole
    np.testing.assert_allclose(labels.sizes_ml["a"], [0.75, 0.3, 1.05, 0.0])
    everything = SupportLabels({"b": ignored.astype(np.uint8)}, [1], (1, 1, 1))
    np.testing.assert_allclose(everything.sizes_ml["b"], [0.05])


def predicted(soft: list[float], at_border: list[bool], before: PredictedSizes | None = None) -> VolumePrediction:
    sizes = PredictedSizes(torch.tensor(soft, requires_grad=True), torch.tensor(at_border))
    return VolumePrediction(torch.zeros(len(soft), 1, 1, 1), 1.0, sizes, before)


PRIOR = SizePrior((ExpectedSize(10.0, 0.0, 2), None, ExpectedSize(4.0, 1.0, 5)))
NAMES = ["liver", "spleen", "kidney"]


def test_penalty_of_a_prior_is_the_mean_over_the_classes_that_have_one():
    prediction = predicted([13.0, 99.0, 1.0], [False, False, False])
    penalty = PRIOR.penalty(prediction, 0.1)  # 2 ml above 11 of 10; 1 ml below 2 of 4, as two deviations are tolerated
    assert penalty.item() == pytest.approx((0.2 + 0.25) / 2)
    penalty.backward()
    assert prediction.sizes.soft.grad.tolist() == pytest.approx([0.05, 0.0, -0.125])


def test_a_class_that_is_cut_or_absent_is_not_enlarged():
    assert PRIOR.penalty(predicted([10.0, 0.0, 1.0], [False, False, True]), 0.1) == 0
    assert PRIOR.penalty(predicted([0.1, 0.0, 4.0], [False, False, False]), 0.1) == 0
    # what was seen before the adaptation decides, where there is one
    whole = predicted([10.0, 0.0, 4.0], [False] * 3).sizes
    cut = predicted([10.0, 0.0, 4.0], [False, False, True]).sizes
    assert PRIOR.penalty(predicted([10.0, 0.0, 1.0], [False, False, True], whole), 0.1).item() == pytest.approx(0.125)
    assert PRIOR.penalty(predicted([10.0, 0.0, 1.0], [False] * 3, cut), 0.1) == 0
    sizes = predicted([0.1, 0.0, 0.1], [False, True, True]).sizes
    reasons = {"liver": ["seems absent"], "kidney": ["seems absent", "reaches the border of the volume"]}
    assert PRIOR.remarks(sizes, NAMES) == reasons


def test_a_prior_is_kept_and_reported():
    assert SizePrior.from_state(json.loads(json.dumps(PRIOR.state()))) == PRIOR
    assert PRIOR.why_no_effect() is None
    assert SizePrior((None, None)).why_no_effect() == "no support case shows a class whole"
    liver = {"size": 10.0, "spread": 0.0, "num_cases": 2, "tolerance": 0.1}
    report = PRIOR.report(NAMES, 0.1)
    assert report["liver"] == liver and report["spleen"] is None and report["kidney"]["tolerance"] == 0.5
    assert PRIOR.describe(NAMES, 0.1)[1] == "Size prior of spleen: none"
    almost = SizePrior((ExpectedSize(10.0 + 1e-9, 0.0, 2), None, ExpectedSize(4.0, 1.0, 5)))
    assert PRIOR.agrees_with(almost) and not PRIOR.agrees_with(SizePrior(PRIOR.expected[:2]))
    for other in (ExpectedSize(10.1, 0.0, 2), ExpectedSize(10.0, 0.0, 3), None):
        assert not PRIOR.agrees_with(SizePrior((other, *PRIOR.expected[1:])))
