import numpy as np
import pytest
import torch
from published_numbers import SPREAD, check_close, check_drawn, drawn, published, weight_shapes
from torch import nn

from fsefs_nnunet.losses.soft_dice import soft_dice
from fsefs_nnunet.methods.adapters import ADAPTERS, build_adapter, takes_own_strides
from fsefs_nnunet.methods.adapters.spatial import SpatialAdapter
from fsefs_nnunet.methods.adapters.spatial_in import SpatialINAdapter


def trained(kind: str, channels: int) -> nn.Module:
    """An adapter with weights unlike those at the start."""
    torch.manual_seed(0)
    adapter = build_adapter(kind, channels)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.1)
    return adapter


AT_FULL_RESOLUTION = [kind for kind in ADAPTERS if not takes_own_strides(kind)]
LOCAL = [kind for kind in AT_FULL_RESOLUTION if kind != "spatial_in"]


@pytest.mark.parametrize("kind", LOCAL)
def test_starts_as_the_identity(kind):
    x = torch.randn(2, 6, 5, 7, 4)
    assert torch.equal(build_adapter(kind, 6)(x), x)


def test_instance_norm_reaches_everything():
    adapter = trained("spatial_in", 4)
    assert adapter.margin is None
    x = torch.randn(1, 4, 11, 11, 11, requires_grad=True)
    adapter(x)[..., 5, 5, 5].sum().backward()
    assert (x.grad != 0).float().mean() > 0.99


@pytest.mark.parametrize("kind", LOCAL)
def test_margin_is_the_reach(kind):
    """An output voxel depends on inputs up to `margin` voxels away and on none beyond."""
    # of many channels, one at least passes the ReLU at every voxel
    adapter = trained(kind, 16)
    m, n = adapter.margin + 2, 2 * adapter.margin + 5
    x = torch.randn(1, 16, n, n, n, requires_grad=True)
    adapter(x)[..., m, m, m].sum().backward()
    reached = x.grad.abs().sum((0, 1)).nonzero() - m
    assert reached.abs().amax() == adapter.margin
    assert len(reached) == (2 * adapter.margin + 1) ** 3


@pytest.mark.parametrize("kind", LOCAL)
def test_crop_with_margin_equals_whole_volume(kind):
    adapter = trained(kind, 3)
    x, m = torch.randn(1, 3, 20, 19, 18), adapter.margin
    inside = (..., slice(8, 12), slice(8, 11), slice(7, 11))
    crop = adapter(x[..., 8 - m : 12 + m, 8 - m : 11 + m, 7 - m : 11 + m])
    torch.testing.assert_close(crop[..., m : m + 4, m : m + 3, m : m + 4], adapter(x)[inside])


@pytest.mark.parametrize("kind", AT_FULL_RESOLUTION)
def test_state_round_trip(kind):
    adapter, x = trained(kind, 4), torch.randn(1, 4, 5, 5, 5)
    other = build_adapter(kind, 4)
    other.load_state_dict(adapter.state_dict())
    assert torch.equal(other(x), adapter(x))


def test_number_of_weights():
    count = {kind: sum(p.numel() for p in build_adapter(kind, 48).parameters()) for kind in AT_FULL_RESOLUTION}
    assert count == {"linear_probe": 0, "spatial": 124_416, "spatial_in": 124_416, "context": 248_832}


def test_unknown_kind_lists_the_kinds():
    with pytest.raises(ValueError, match=r"'lora'.*\['context', 'linear_probe', 'spatial', 'spatial_in', 'unet'\]"):
        build_adapter("lora", 48)


def computed_by_published_code(adapter: nn.Module, group: str) -> None:
    """Forward pass, loss and gradients on the published weights and input."""
    golden = published("published_adapters.npz", f"{group}/")
    channels = adapter.conv1.in_channels
    *weights, x, generator = drawn(golden["seed"], *weight_shapes(channels), golden["shape"].tolist())
    check_drawn(x, golden["x"])
    y = (torch.rand((len(x), 1, *x.shape[2:]), generator=generator) < 0.2).float()
    head = nn.Conv3d(channels, 1, 1)
    load(adapter, head, weights)
    adapted = adapter(x)
    logits = head(adapted)
    loss = soft_dice(torch.sigmoid(logits), y).mean()
    loss.backward()
    np.testing.assert_allclose(adapted.detach()[:, ::8, ::3, ::3, ::3], golden["adapted"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logits.detach(), golden["logits"], rtol=1e-5, atol=1e-5)
    assert loss.item() == pytest.approx(float(golden["loss"]), rel=1e-5)
    for name, parameter in adapter.named_parameters():
        check_close(parameter.grad, golden[f"gradient/{name}"], golden[f"norms/{name}"], name)
    for name, parameter in head.named_parameters():
        expected = golden[f"gradient/head.{name}"]
        np.testing.assert_allclose(
            parameter.grad, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max(), err_msg=name
        )


def load(adapter: nn.Module, head: nn.Conv3d, weights: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for parameter, values in zip([*adapter.parameters(), *head.parameters()], weights):
            parameter.copy_(SPREAD * values)


@pytest.mark.parametrize("channels", [48, 64])
def test_spatial_adapter_matches_the_published_code(channels):
    computed_by_published_code(SpatialAdapter(channels), f"spatial_{channels}")


def test_adapter_with_instance_norm_matches_the_published_code():
    computed_by_published_code(SpatialINAdapter(48), "spatial_in_48")


def test_training_matches_the_published_code():
    """Six AdamW steps on given features: losses and final weights."""
    golden = published("published_training.npz")
    inputs, *weights, _ = drawn(golden["seed"], golden["shape"].tolist(), *weight_shapes(48))
    check_drawn(inputs, golden["x"])
    targets = (inputs[:, :, :3].sum(2, keepdim=True) > 2.5).float()
    weights[1].zero_()
    adapter, head = SpatialAdapter(48), nn.Conv3d(48, 1, 1)
    load(adapter, head, weights)
    model = nn.Sequential(adapter, head)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0)
    losses = []
    for x, y in zip(inputs, targets):
        loss = soft_dice(torch.sigmoid(model(x)), y).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    np.testing.assert_allclose(losses, golden["losses"], rtol=1e-4)
    for i, (name, parameter) in enumerate(adapter.named_parameters()):
        moved = (parameter.detach() - SPREAD * weights[i]).flatten(1)
        expected, norms = golden[f"final/adapter.{name}"], golden[f"moved/adapter.{name}"]
        limit = 0.01 * norms.max() / moved.shape[1] ** 0.5  # a hundredth of a weight's way
        np.testing.assert_allclose(parameter.detach()[::8, ::8], expected, atol=limit, err_msg=name)
        np.testing.assert_allclose(moved.norm(dim=1), norms, rtol=0.01, err_msg=name)
    for name, parameter in head.named_parameters():
        np.testing.assert_allclose(parameter.detach(), golden[f"final/head.{name}"], atol=1e-5, err_msg=name)
