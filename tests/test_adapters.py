import numpy as np
import pytest
import torch
from torch import nn

from fsefs_nnunet.losses.soft_dice import soft_dice
from fsefs_nnunet.methods.adapters import ADAPTERS, build_adapter
from fsefs_nnunet.methods.adapters.spatial import SpatialAdapter
from fsefs_nnunet.methods.adapters.spatial_in import SpatialINAdapter

WORKSHOP = [f"state/{name}" for name in ("adapter.conv1.conv.weight", "adapter.conv2.conv.weight")]
WORKSHOP += ["state/head.linear.weight", "state/head.linear.bias"]
GOLDEN_NAMES = {"conv1.weight": "adapter.0.weight", "conv2.weight": "adapter.2.weight"}


def trained(kind: str, channels: int) -> nn.Module:
    """An adapter with weights unlike those at the start."""
    torch.manual_seed(0)
    adapter = build_adapter(kind, channels)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.1)
    return adapter


LOCAL = [kind for kind in ADAPTERS if kind != "spatial_in"]


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


@pytest.mark.parametrize("kind", ADAPTERS)
def test_state_round_trip(kind):
    adapter, x = trained(kind, 4), torch.randn(1, 4, 5, 5, 5)
    other = build_adapter(kind, 4)
    other.load_state_dict(adapter.state_dict())
    assert torch.equal(other(x), adapter(x))


def test_number_of_weights():
    count = {kind: sum(p.numel() for p in build_adapter(kind, 48).parameters()) for kind in ADAPTERS}
    assert count == {"linear_probe": 0, "spatial": 124_416, "spatial_in": 124_416, "context": 248_832}


def test_unknown_kind_lists_the_kinds():
    with pytest.raises(ValueError, match=r"'lora'.*\['context', 'linear_probe', 'spatial', 'spatial_in'\]"):
        build_adapter("lora", 48)


def load(adapter: SpatialAdapter, head: nn.Conv3d, **arrays) -> None:
    with torch.no_grad():
        for parameter, array in zip([*adapter.parameters(), *head.parameters()], arrays.values()):
            parameter.copy_(torch.from_numpy(array))


@pytest.mark.parametrize("group", ["C48_k3", "C64_k3"])
def test_spatial_adapter_matches_the_published_code(shared, group):
    with np.load(shared / "golden" / "spatial_adapter_journal.npz") as file:
        golden = {key.removeprefix(f"{group}/"): file[key] for key in file.files if key.startswith(f"{group}/")}
    channels = golden["x"].shape[1]
    adapter, head = SpatialAdapter(channels), nn.Conv3d(channels, 1, 1)
    load(adapter, head, **{key: golden[key] for key in ("w1", "w2", "head_w", "head_b")})
    adapted = adapter(torch.from_numpy(golden["x"]))
    logits = head(adapted)
    loss = soft_dice(torch.sigmoid(logits), torch.from_numpy(golden["y"])).mean()
    loss.backward()
    np.testing.assert_allclose(adapted.detach(), golden["adapter_out"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logits.detach(), golden["logits"], rtol=1e-5, atol=1e-5)
    assert loss.item() == pytest.approx(float(golden["loss"]), rel=1e-5)
    gradients = {GOLDEN_NAMES[name]: p.grad for name, p in adapter.named_parameters()}
    gradients |= {f"linear.{name}": p.grad for name, p in head.named_parameters()}
    for name, gradient in gradients.items():
        expected = golden[f"grad/{name}"]
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max(), err_msg=name)


def test_adapter_with_instance_norm_matches_the_published_code(shared):
    golden = dict(np.load(shared / "golden" / "spatial_adapter_workshop.npz"))
    adapter, head = SpatialINAdapter(48), nn.Conv3d(48, 1, 1)
    load(adapter, head, **{key: golden[key] for key in WORKSHOP})
    adapted = adapter(torch.from_numpy(golden["x"]))
    logits = head(adapted)
    loss = soft_dice(torch.sigmoid(logits), torch.from_numpy(golden["y"])).mean()
    loss.backward()
    np.testing.assert_allclose(adapted.detach(), golden["adapter_out"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logits.detach(), golden["logits"], rtol=1e-5, atol=1e-5)
    assert loss.item() == pytest.approx(float(golden["loss"]), rel=1e-5)
    for key, parameter in zip(WORKSHOP, [*adapter.parameters(), *head.parameters()]):
        expected = golden[key.replace("state/", "grad/")]
        np.testing.assert_allclose(parameter.grad, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max(), err_msg=key)


def test_training_matches_the_published_code(shared):
    """Six AdamW steps on given features: losses and final weights."""
    with np.load(shared / "golden" / "training_trace_journal_bb3d.npz") as file:
        golden = dict(file)
    names = ["0.adapter.0.weight", "0.adapter.2.weight", "1.linear.weight", "1.linear.bias"]
    adapter, head = SpatialAdapter(48), nn.Conv3d(48, 1, 1)
    load(adapter, head, **{name: golden[f"init/{name}"] for name in names})
    model = nn.Sequential(adapter, head)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0)
    losses = []
    for x, y in zip(torch.from_numpy(golden["X"]), torch.from_numpy(golden["Y"])):
        loss = soft_dice(torch.sigmoid(model(x)), y).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    np.testing.assert_allclose(losses, golden["losses"], rtol=1e-4)
    for name, parameter in zip(names, model.parameters()):
        moved = np.abs(golden[f"final/{name}"] - golden[f"init/{name}"]).max()
        np.testing.assert_allclose(parameter.detach(), golden[f"final/{name}"], atol=0.01 * moved, err_msg=name)
