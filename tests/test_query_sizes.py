"""Sizes that a network predicts on pooled queries."""

import numpy as np
import pytest
import torch
from banks import store
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from fsefs_nnunet.features.layout import query_layout
from fsefs_nnunet.methods.network import AdaptedNetwork
from fsefs_nnunet.priors.query_volumes import QueryVolumes, calibration_cases, share_found


def test_every_query_is_visited_once_a_round(bank):
    queries = [f"q{i}" for i in range(7)]
    sizes = QueryVolumes(bank, queries, 1.0)
    rounds = [[sizes.rotating(step, 3) for step in range(7 * r, 7 * r + 7)] for r in range(4)]
    assert all(sorted(visited) == queries for visited in rounds)
    assert len(set(map(tuple, rounds))) > 1
    assert [sizes.rotating(step, 3) for step in range(28)] == sum(rounds, [])
    assert [sizes.rotating(step, 4) for step in range(28)] != sum(rounds, [])


@pytest.mark.parametrize(
    ("queries", "steps", "looks"),
    [(40, 8, [1] * 8), (8, 8, [1] * 8), (5, 8, [1, 0, 1, 0, 1, 1, 0, 1]), (4, 8, [1, 0] * 4), (1, 8, [1, 0] * 4)]
    + [(3, 1, [1]), (1, 3, [1, 0, 1])],
)
def test_few_queries_are_looked_at_once_an_epoch(bank, queries, steps, looks):
    sizes = QueryVolumes(bank, [f"q{i}" for i in range(queries)], 1.0)
    visits = [[sizes.visit(epoch, step, steps) for step in range(steps)] for epoch in range(3)]
    assert [visit is not None for visit in visits[0]] == looks
    assert sizes.visits(steps) == sum(looks)
    flat = [visit for epoch in visits for visit in epoch if visit is not None]
    assert flat == [*range(3 * sum(looks))]  # none of a round is left out
    if steps / 2 <= queries <= steps:
        assert sorted(sizes.rotating(visit, 3) for visit in flat[:queries]) == sorted(sizes.queries)


def constant_probe(contract, logits: list[float]) -> AdaptedNetwork:
    network = AdaptedNetwork(1, len(logits), "phantom", contract.sha256, "linear_probe", "last", None, len(logits))
    with torch.no_grad():
        network.head.weight.zero_()
        network.head.bias.copy_(torch.tensor(logits))
    return network


@pytest.mark.parametrize("has_regions", [False, True])
def test_soft_sizes_by_hand(bank, contract, device, has_regions):
    """Constant logits: every class fills the same share of the volume, whatever the pooling."""
    network = constant_probe(contract, [0.0, 1.0, 2.0]).to(device)
    bias = network.head.bias.detach()
    share = torch.sigmoid(bias) if has_regions else torch.softmax(bias, 0)[1:]
    for pool in ((1, 1, 1), (2, 2, 2), (4, 4, 4), (3, 1, 5)):
        store(bank, "q", torch.rand(16, 9, 8, 7), query_layout((9, 8, 7), pool))
        sizes = QueryVolumes(bank, ["q"], 0.25).predict(network, "q", has_regions).sizes.soft
        torch.testing.assert_close(sizes.detach(), share * 9 * 8 * 7 * 0.25, rtol=1e-4, atol=0)
    sizes.sum().backward()
    assert network.head.bias.grad.abs().min() > 0


@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("has_regions", [False, True])
def test_share_found_by_hand(contract, device, has_regions, ignore):
    """Constant logits on crops of 64 voxels: 8 of a, 16 of b, 32 of background and 8 that may be ignored; none of c."""
    target = torch.tensor([1] * 8 + [2] * 16 + [0] * 32 + [4 if ignore else 0] * 8).view(1, 1, 4, 4, 4)
    labels = {"background": 0, "a": 1, "b": 2, "c": 3}
    order = None
    if has_regions:
        labels, order = labels | {"a": [1, 2], "b": [2], "c": [3]}, [1, 2, 3]
        channels = [torch.isin(target, torch.tensor(members)) for members in ([1, 2], [2], [3], [4])]
        target = torch.cat(channels[: 3 + ignore], 1).float()
    if ignore:
        labels["ignore"] = 4
    logits = [0.5, 1.0, -1.0] if has_regions else [0.0, 0.5, 1.0, -1.0]
    batch = {"data": torch.rand(1, 16, 4, 4, 4), "target": target}
    network = constant_probe(contract, logits).to(device)
    found = share_found(network, [batch, batch], LabelManager(labels, order)).cpu()
    bias = torch.tensor(logits)
    probability = torch.sigmoid(bias) if has_regions else torch.softmax(bias, 0)[1:]
    labelled = torch.tensor([24.0 if has_regions else 8.0, 16.0])
    torch.testing.assert_close(found[:2], probability[:2] * (56 if ignore else 64) / labelled, rtol=1e-2, atol=0)
    assert found[2] == 1


def probe_of_the_first_channel(contract) -> AdaptedNetwork:
    """Two classes; the first is wherever the first channel is positive, the second nowhere."""
    network = AdaptedNetwork(1, 3, "phantom", contract.sha256, "linear_probe", "last", None, 3)
    with torch.no_grad():
        network.head.weight.zero_()
        network.head.weight[1, 0] = 100.0
        network.head.bias.copy_(torch.tensor([0.0, 0.0, -100.0]))
    return network


def ball(radius: int, centre: int = 8) -> torch.Tensor:
    """Features (16, 17, 17, 17), 1 in a cube of the first channel, -1 elsewhere."""
    features = -torch.ones(16, 17, 17, 17)
    inside = slice(max(0, centre - radius), centre + radius + 1)
    features[0, inside, inside, inside] = 1.0
    return features


def test_calibration_shows_every_class():
    sizes = {f"c{i}": np.array([1.0, i == 7, 0.0, i in (2, 8)]) for i in range(10)}
    assert calibration_cases(sizes, 4) == ["c0", "c1", "c2", "c3", "c4", "c7"]
    assert calibration_cases(sizes, 4, most=2) == ["c0", "c1", "c7", "c2"]
    assert calibration_cases({"a": np.zeros(4)}, 4) == ["a"] and calibration_cases({}, 4) == []


@pytest.mark.parametrize("pool", [(4, 4, 4), (4, 4, 1), (1, 5, 5), (6, 6, 6)])
def test_sizes_of_pooled_queries_are_calibrated_on_the_support(bank, contract, device, pool):
    """Pooling changes what a cube of 9^3 seems to measure; what it does to the support is undone."""
    network = probe_of_the_first_channel(contract).to(device)
    store(bank, "query", ball(4), query_layout((17, 17, 17), pool))
    store(bank, "support", ball(4), query_layout((17, 17, 17), pool))
    voxel_ml = 0.5
    plain = QueryVolumes(bank, ["query"], voxel_ml)
    plain.calibrate(network, False)
    raw = plain.predict(network, "query", False).sizes.soft[0].item()
    assert abs(raw / (9**3 * voxel_ml) - 1) > 0.05
    true = torch.tensor([9**3 * voxel_ml, 0.0])
    calibrated = QueryVolumes(bank, ["query"], voxel_ml, {"support": true})
    calibrated.calibrate(network, False)
    assert calibrated.predict(network, "query", False).sizes.soft[0].item() == pytest.approx(9**3 * voxel_ml, rel=1e-4)
    # the second class is in no support case, which says nothing of it
    assert calibrated.scale[1] == 1
    # finding half of what is labelled is no effect of pooling: the query's size is half, too
    calibrated.calibrate(network, False, torch.tensor([0.5, 1.0], device=device))
    assert calibrated.predict(network, "query", False).sizes.soft[0].item() == pytest.approx(
        9**3 * voxel_ml / 2, rel=1e-4
    )


def test_the_gradient_of_sizes_knows_their_calibration(bank, contract, device):
    """It is the slope of S^ where the scale is measured anew; volumes like the support's have none to follow."""
    network = probe_of_the_first_channel(contract).to(device)
    with torch.no_grad():
        network.head.weight[1, 0] = 1.0
    for name, radius in (("query", 5), ("like the support", 3), ("support", 3)):
        store(bank, name, ball(radius), query_layout((17, 17, 17), (2, 2, 2)))
    true = torch.tensor([7.0**3, 0.0])
    sizes = QueryVolumes(bank, ["query", "like the support"], 1.0, {"support": true})

    def predicted(query: str, weight: float) -> float:
        with torch.no_grad():
            network.head.weight[1, 0] = weight
        sizes.calibrate(network, False)
        return sizes.predict(network, query, False).sizes.soft[0].item()

    slope = (predicted("query", 1.05) - predicted("query", 0.95)) / 0.1
    for query, expected in (("query", slope), ("like the support", 0.0)):
        size = predicted(query, 1.0)
        beside = sizes.predict_beside_support(network, query, 0, False).sizes.soft
        assert beside[0].item() == pytest.approx(size, rel=1e-5)
        network.zero_grad()
        beside[0].backward()
        assert network.head.weight.grad[1, 0].item() == pytest.approx(expected, rel=0.01, abs=0.01)
    assert abs(slope) > 1
    # nothing is known of a class that no support case shows
    by_itself = sizes.predict(network, "query", False).sizes.soft
    torch.testing.assert_close(sizes.predict_beside_support(network, "query", 0, False).sizes.soft[1], by_itself[1])


def test_a_class_that_is_lost_has_a_finite_gradient(bank, contract, device):
    """Its probabilities on the support are rounded to zero."""
    network = constant_probe(contract, [0.0, -300.0, 1.0]).to(device)
    for name in ("query", "support"):
        store(bank, name, torch.rand(16, 9, 8, 7), query_layout((9, 8, 7), (2, 2, 2)))
    sizes = QueryVolumes(bank, ["query"], 1e-3, {"support": torch.tensor([10.0, 10.0])})
    sizes.calibrate(network, False)
    predicted = sizes.predict_beside_support(network, "query", 0, False).sizes.soft
    torch.testing.assert_close(predicted, sizes.predict(network, "query", False).sizes.soft)
    predicted.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.head.parameters())


@pytest.mark.parametrize("centre, at_border", [(8, False), (3, True)])
def test_organs_at_the_border_and_missing_ones_are_not_seen_whole(bank, contract, device, centre, at_border):
    network = probe_of_the_first_channel(contract).to(device)
    store(bank, "query", ball(3, centre), query_layout((17, 17, 17), (1, 1, 1)))
    predicted = QueryVolumes(bank, ["query"], 1.0).predict(network, "query", False).sizes.to("cpu")
    assert predicted.at_border.tolist() == [at_border, False]
    prior = torch.tensor([500.0, 500.0])
    assert predicted.seen_whole(prior).tolist() == [not at_border, False]
