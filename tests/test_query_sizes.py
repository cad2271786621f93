"""Sizes that a network predicts on pooled queries."""

import pytest
import torch
from banks import store

from fsefs_nnunet.bank.layout import query_layout
from fsefs_nnunet.network import AdaptedNetwork
from fsefs_nnunet.query_sizes import QuerySizes


def test_every_query_is_visited_once_a_round(bank):
    queries = [f"q{i}" for i in range(7)]
    sizes = QuerySizes(bank, queries, 1.0)
    rounds = [[sizes.rotating(step, 3) for step in range(7 * r, 7 * r + 7)] for r in range(4)]
    assert all(sorted(visited) == queries for visited in rounds)
    assert len(set(map(tuple, rounds))) > 1
    assert [sizes.rotating(step, 3) for step in range(28)] == sum(rounds, [])
    assert [sizes.rotating(step, 4) for step in range(28)] != sum(rounds, [])


@pytest.mark.parametrize("has_regions", [False, True])
def test_soft_sizes_by_hand(bank, contract, has_regions):
    """Constant logits: every class fills the same share of the volume, whatever the pooling."""
    network = AdaptedNetwork(1, 3, "phantom", contract.sha256, "linear_probe", "last", None, 3)
    with torch.no_grad():
        network.head.weight.zero_()
        network.head.bias.copy_(torch.tensor([0.0, 1.0, 2.0]))
    bias = network.head.bias.detach()
    share = torch.sigmoid(bias) if has_regions else torch.softmax(bias, 0)[1:]
    for pool in (1, 2, 4):
        store(bank, "q", torch.rand(16, 9, 8, 7), query_layout((9, 8, 7), pool))
        sizes = QuerySizes(bank, ["q"], 0.25).predict(network, "q", has_regions).soft
        torch.testing.assert_close(sizes.detach(), share * 9 * 8 * 7 * 0.25, rtol=1e-4, atol=0)
    sizes.sum().backward()
    assert network.head.bias.grad.abs().min() > 0


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


def test_sizes_of_pooled_queries_are_calibrated_on_the_support(bank, contract):
    """Pooling by 4 changes what a cube of 9^3 seems to measure; what it does to the support is undone."""
    network = probe_of_the_first_channel(contract)
    store(bank, "query", ball(4), query_layout((17, 17, 17), 4))
    store(bank, "support", ball(4), query_layout((17, 17, 17), 4))
    voxel_ml = 0.5
    plain = QuerySizes(bank, ["query"], voxel_ml)
    plain.calibrate(network, False)
    raw = plain.predict(network, "query", False).soft[0].item()
    assert abs(raw / (9**3 * voxel_ml) - 1) > 0.1
    true = torch.tensor([9**3 * voxel_ml, 0.0])
    calibrated = QuerySizes(bank, ["query"], voxel_ml, {"support": true})
    calibrated.calibrate(network, False)
    assert calibrated.predict(network, "query", False).soft[0].item() == pytest.approx(9**3 * voxel_ml, rel=1e-4)
    # the second class is in no support case, which says nothing of it
    assert calibrated.scale[1] == 1
    # finding half of what is labelled is no effect of pooling: the query's size is half, too
    calibrated.calibrate(network, False, torch.tensor([0.5, 1.0]))
    assert calibrated.predict(network, "query", False).soft[0].item() == pytest.approx(9**3 * voxel_ml / 2, rel=1e-4)


@pytest.mark.parametrize("centre, at_border", [(8, False), (3, True)])
def test_organs_at_the_border_and_missing_ones_are_not_seen_whole(bank, contract, centre, at_border):
    network = probe_of_the_first_channel(contract)
    store(bank, "query", ball(3, centre), query_layout((17, 17, 17), 1))
    predicted = QuerySizes(bank, ["query"], 1.0).predict(network, "query", False)
    assert predicted.at_border.tolist() == [at_border, False]
    prior = torch.tensor([500.0, 500.0])
    assert predicted.seen_whole(prior).tolist() == [not at_border, False]
