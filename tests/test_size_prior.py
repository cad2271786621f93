import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fsefs_nnunet.errors import InputError
from fsefs_nnunet.priors.prior import SupportLabels
from fsefs_nnunet.priors.size import ExpectedSize, SizePrior, estimate_size, size_penalty, why_unreliable
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
    # ours alone: the cases that show the class, and their sample standard deviation
    present = [size for size in case["sizes"] if size]
    assert prior.num_sizes == len(present)
    spread = np.std(present, ddof=1) if len(present) > 1 else 0.0
    assert prior.spread == pytest.approx(spread, rel=1e-12, abs=1e-9)


def test_estimate_by_hand():
    """The spread has n - 1; what is taken for an outlier is decided with n."""
    assert estimate_size([3.0]) == ExpectedSize(3.0, 0.0, 1, 0)
    assert estimate_size([2.0, 4.0]) == ExpectedSize(3.0, 2**0.5, 2, 0)
    # median 3, standard deviation sqrt(6130 / 5) = 35: the outlier goes
    assert estimate_size([1.0, 2.0, 3.0, 4.0, 90.0]) == ExpectedSize(2.5, (6130 / 4) ** 0.5, 4, 1)
    # 4.5 is 1.5 below the median, the standard deviation is 1.38 with n and 1.51 with n - 1
    prior = estimate_size([4.5, 6.0, 6.0, 6.0, 6.0, 9.1])
    assert (prior.size, prior.num_cases, prior.num_outliers) == (6.0, 4, 2)


@pytest.mark.parametrize(
    "expected, tolerance",
    [
        (ExpectedSize(10.0, 0.0, 1), 0.3),  # of one or two sizes: as published, unless they differ by more
        (ExpectedSize(10.0, 0.5, 2), 0.3),
        (ExpectedSize(10.0, 2.0, 2), 0.4),
        (ExpectedSize(10.0, 0.5, 3), 0.1),
        (ExpectedSize(10.0, 0.75, 3), 0.15),
        (ExpectedSize(10.0, 0.75, 2, 3), 0.15),  # of five sizes, two of which enter the mean
        (ExpectedSize(10.0, 30.0, 5), 0.9),  # a class may not vanish, however much sizes vary
    ],
)
def test_tolerance(expected, tolerance):
    assert expected.tolerance(0.1) == pytest.approx(tolerance)


def test_a_larger_gamma_counts_for_few_cases_too():
    assert ExpectedSize(10.0, 0.0, 1).tolerance(0.5) == 0.5
    assert ExpectedSize(10.0, 0.0, 5).tolerance(0.15) == 0.15


def test_sizes_that_vary_too_much():
    """A standard deviation (n - 1) above half the mean, outliers included."""
    for reliable in ([5.0], [1.0, 2.0, 3.0], [0.1, 0.2, 0.3], [0.0, 1.0, 2.0, 3.0]):
        assert why_unreliable(reliable, []) == ""
    reason = (
        "its {} sizes in the support vary too much, by a standard deviation of {} of their mean ({} ml); "
        "up to 50% is accepted"
    )
    assert why_unreliable([1.0, 3.0], []) == reason.format(2, "71%", "2.00")
    assert why_unreliable([0.0, 1.0, 2.0, 3.01], []) == reason.format(3, "50%", "2.00")
    assert why_unreliable([10.0, 10.0, 10.0, 10.0, 50.0], []) == reason.format(5, "99%", "18.00")


def test_reasons_for_no_prior():
    assert why_unreliable([], []) == why_unreliable([0.0, 0.0], []) == "no support case shows it whole"
    cut = "it reaches the border of the volume in a{}, so a part may be cut off"
    assert why_unreliable([1.0, 3.0], ["a"]) == cut.format("")
    assert why_unreliable([], ["a", "b", "c"]) == cut.format(" and 2 more")


def test_penalty_with_a_tolerance_of_each_class():
    predicted, prior = torch.tensor([12.0, 12.0]), torch.tensor([10.0, 10.0])
    assert size_penalty(predicted, prior, torch.tensor([0.1, 0.3])).tolist() == pytest.approx([0.1, 0.0])


def test_absent_organs_do_not_enter():
    assert estimate_size([0.0, 5.0, 0.0]) == ExpectedSize(5.0, 0.0, 1, 0)
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


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("end", [0, -1])
def test_classes_at_the_border(axis, end):
    """One outermost voxel is enough. -1 within the label map is background, not the scan's end."""
    label_map = np.zeros((1, 6, 7, 8), np.int16)
    label_map[0, 1:-1, 1:-1, 1:-1] = 1
    label_map[0, 3, 3, 3], label_map[0, 3, 3, 4] = 2, -1
    inside = label_map.copy()
    inside[0, 0], inside[0, :, -1] = -1, -1
    index = [2, 2, 2]
    index[axis] = end
    label_map[(0, *index)] = 3
    labels = SupportLabels({"a": label_map, "b": inside}, [1, 2, 3, (1, 2), (2, 3)], (1, 1, 1))
    assert labels.at_border["a"].tolist() == [False, False, True, False, True]
    assert labels.at_border["b"].tolist() == [False] * 5


def test_estimate_of_classes():
    """One label is measured, one is cut in one case, one varies too much, one is shown by no case."""
    a, b = np.zeros((2, 1, 10, 10, 10), np.int16)
    a[0, 1:5, 1:6, 1:6], b[0, 1:5, 1:6, 1:6] = 1, 1  # 100 voxels
    b[0, 1, 1, 1:6] = 0  # 95
    a[0, 6:8, 2:4, 2:4], b[0, 6:8, 2:4, :2] = 2, 2
    a[0, 6:8, 6:8, 6:8], b[0, 6:8, 6:8, 6] = 3, 3
    b[0, 6:8, 6, 6] = 0  # 8 and 2
    labels = SupportLabels({"a": a, "b": b}, [1, 2, 3, 4], (10, 10, 10))
    prior = SizePrior.estimate(labels)
    assert prior.expected == (ExpectedSize(97.5, 12.5**0.5, 2, 0), None, None, None)
    assert prior.describe(["liver", "cord", "cyst", "spleen"], 0.1) == [
        "Size prior of liver: 97.50 ml, spread 3.54 ml, 2 of 2 cases, tolerated 30%",
        "Size prior of cord: none, it reaches the border of the volume in b, so a part may be cut off",
        "Size prior of cyst: none, its 2 sizes in the support vary too much, by a standard deviation of 85% of their "
        "mean (5.00 ml); up to 50% is accepted",
        "Size prior of spleen: none, no support case shows it whole",
    ]
    assert prior.why_no_effect() is None
    none = SizePrior.estimate(SupportLabels({"b": b}, [2, 4, (1, 2)], (10, 10, 10)))
    assert none.why_no_effect() == (
        "no class has an expected size: class 1, 3 (it reaches the border of the volume in b, so a part may be cut "
        "off); class 2 (no support case shows it whole)"
    )
    assert SizePrior.estimate(SupportLabels({"a": a}, [4], (1, 1, 1))).why_no_effect() == (
        "no support case shows a class whole"
    )
    (one,) = SizePrior.estimate(SupportLabels({"a": a}, [1], (10, 10, 10))).describe(["liver"], 0.1)
    assert one == "Size prior of liver: 100.00 ml, spread unknown, one case, tolerated 30%"


def test_a_class_that_is_cut_in_a_case_with_ignored_voxels_has_no_prior():
    whole = np.zeros((1, 5, 5, 5), np.int16)
    whole[0, 2, 2, 1:4] = 1
    ignored = whole.copy()
    ignored[0, 2, 2, 0], ignored[0, 4] = 1, 2
    prior = SizePrior.estimate(SupportLabels({"a": whole, "b": ignored}, [1], (1, 1, 1), ignore_label=2))
    assert prior.expected == (None,) and "volume in b," in prior.reasons[0]


def predicted(soft: list[float], at_border: list[bool], before: PredictedSizes | None = None) -> VolumePrediction:
    sizes = PredictedSizes(torch.tensor(soft, requires_grad=True), torch.tensor(at_border))
    return VolumePrediction(torch.zeros(len(soft), 1, 1, 1), 1.0, sizes, before)


PRIOR = SizePrior((ExpectedSize(10.0, 0.0, 3), None, ExpectedSize(4.0, 1.0, 5)))
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
    assert PRIOR.state() == [(10.0, 0.0, 3, 0), None, (4.0, 1.0, 5, 0)]
    loaded = SizePrior.from_state(json.loads(json.dumps(PRIOR.state())))
    assert loaded == PRIOR and loaded.why_no_effect() is None
    liver = {"size": 10.0, "spread": 0.0, "num_cases": 3, "tolerance": 0.1}
    report = PRIOR.report(NAMES, 0.1)
    assert report["liver"] == liver and report["spleen"] is None and report["kidney"]["tolerance"] == 0.5
    # a checkpoint does not say why
    assert PRIOR.describe(NAMES, 0.1)[1] == "Size prior of spleen: none, the support's labels gave none"
    assert SizePrior((None, None)).why_no_effect() == "the support's labels gave no size of any class"


def test_priors_of_the_same_labels_agree():
    almost = SizePrior((ExpectedSize(10.0 + 1e-9, 0.0, 3), None, ExpectedSize(4.0, 1.0, 5)), ("", "it is cut", ""))
    assert PRIOR.agrees_with(almost) and not PRIOR.agrees_with(SizePrior(PRIOR.expected[:2]))
    for other in (ExpectedSize(10.1, 0.0, 3), ExpectedSize(10.0, 0.0, 2), None):
        assert not PRIOR.agrees_with(SizePrior((other, *PRIOR.expected[1:])))


def test_priors_of_earlier_versions_are_loaded():
    """Three numbers a class; of fewer than three cases they tolerate 0.3 now, too."""
    prior = SizePrior.from_state([(10.0, 0.5, 2), None, [4.0, 1.0, 5]])
    assert prior == SizePrior((ExpectedSize(10.0, 0.5, 2, 0), None, ExpectedSize(4.0, 1.0, 5, 0)))
    assert prior.expected[0].tolerance(0.1) == 0.3
    assert prior.agrees_with(SizePrior((ExpectedSize(10.0, 0.5**0.5, 2), None, ExpectedSize(4.0, 1.2, 5, 2))))


@pytest.mark.parametrize(
    "state", [None, {"size": 1.0}, [1.0, 2.0], [(1.0, 2.0)], [(0.0, 0.0, 1)], [("1", 0.0, 1)], [(1.0, -1.0, 2, 0)]]
)
def test_other_states_are_refused(state):
    with pytest.raises(
        InputError, match="checkpoint's size prior is .* instead of expected size, spread, cases and outliers"
    ):
        SizePrior.from_state(state)
