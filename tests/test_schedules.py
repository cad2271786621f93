import pytest
import torch
from published_numbers import published

from fsefs_nnunet.methods.schedules import (
    DecoderFirstScheduler,
    WarmupCosineScheduler,
    at_plateau,
    long_training,
    warmup_cosine,
)


def test_values():
    """One epoch at the base rate, then half a cosine period over the other epochs."""
    factors = [warmup_cosine(epoch, 5) for epoch in range(6)]
    half = 2**-0.5 / 2
    assert factors == pytest.approx([1, 1, 0.5 + half, 0.5, 0.5 - half, 0], abs=1e-12)


@pytest.mark.parametrize("num_epochs", [1, 2, 100])
def test_never_rises_and_stays_within_bounds(num_epochs):
    factors = [warmup_cosine(epoch, num_epochs) for epoch in range(num_epochs)]
    assert factors == sorted(factors, reverse=True)
    assert all(0 < factor <= 1 for factor in factors)


def test_scheduler_sets_the_rate_of_the_epoch():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], 123.0)
    scheduler = WarmupCosineScheduler(optimizer, 1e-2, 100)
    assert optimizer.param_groups[0]["lr"] == 1e-2
    for epoch in (70, 3):  # any order, as after --c
        scheduler.step(epoch)
        assert optimizer.param_groups[0]["lr"] == 1e-2 * warmup_cosine(epoch, 100)


def test_long_training():
    """A linear rise over the warm-up, then half a cosine period to the end; nothing before the start."""
    assert [long_training(p, 0.2) for p in (0, 0.1, 0.2, 0.6, 1)] == pytest.approx([0, 0.5, 1, 0.5, 0], abs=1e-12)
    late = [long_training(p, 0.2, 0.2) for p in (0, 0.19, 0.3, 0.4, 0.7, 1)]
    assert late == pytest.approx([0, 0, 0.5, 1, 0.5, 0], abs=1e-12)


def test_the_decoder_comes_first():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "late": late} for late in (False, True)]
    scheduler = DecoderFirstScheduler(torch.optim.AdamW(groups, 1.0), 0.01, 100, 0.1)
    rates = []
    for epoch in (0, 5, 10, 15, 20.5):  # a share of a budget is no whole epoch
        scheduler.step(epoch)
        rates.append([group["lr"] for group in scheduler.optimizer.param_groups])
    first, late = zip(*rates)
    assert first == tuple(0.01 * long_training(p, 0.1) for p in (0.005, 0.055, 0.105, 0.155, 0.21))
    assert late[:2] == (0, 0) and late[2] == pytest.approx(0.0005) and late[3] == pytest.approx(0.0055)
    assert 0.0099 < late[4] < 0.01


@pytest.mark.parametrize(
    "name, rate, num_epochs",
    [
        ("journal_bb3d_lr1e-4_max200", 1e-4, 200),
        ("journal_lp_lr1e-2_max200", 1e-2, 200),
        ("workshop_sa_lr1e-2_max100", 1e-2, 100),
        ("workshop_lp_lr1e-1_max50", 1e-1, 50),
    ],
)
def test_matches_the_published_code(name, rate, num_epochs):
    """The published code runs epochs 1 to max - 1 and counts the warm-up epoch twice, ours runs all of them."""
    golden = published("lr_schedules.json")[name]
    ours = [rate * warmup_cosine(epoch, num_epochs) for epoch in range(num_epochs)]
    assert ours[: len(golden)] == pytest.approx(golden, rel=0, abs=1e-3 * rate)
    assert len(golden) == num_epochs - 1


def test_plateau():
    """The mean of ten epochs is compared with the one twenty epochs earlier: 0.001 is the least progress."""
    falling = [1 - 0.0001 * epoch for epoch in range(100)]
    assert not any(at_plateau(falling[:n]) for n in range(101))
    flat = [1 - 0.00004 * epoch for epoch in range(100)]
    assert [at_plateau(flat[:n]) for n in (0, 29, 30, 100)] == [False, False, True, True]
    assert not at_plateau([1.0] * 29 + [0.98])
    assert at_plateau([0.5] * 10 + [0.9] * 20)
