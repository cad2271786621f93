"""Where a CPU computes in bfloat16, and that it gives what float32 gives."""

import pytest
import torch
from test_network import build, randomised
from trainings import make_trainer

from fsefs_nnunet.backbones.frozen import FrozenBackbone
from fsefs_nnunet.device import (
    denormals_as_zero,
    native_bfloat16,
    precision_name,
    reduced_precision,
    unless_thin,
    without_scaling,
)
from fsefs_nnunet.features.tiling import Tiling
from fsefs_nnunet.features.windows import run_windows

CPU = torch.device("cpu")
NATIVE, OTHERS = {"avx512_bf16": True}, {"avx2": True, "avx512_bf16": False}


def pretend(monkeypatch, capabilities: dict) -> None:
    """A processor of these instructions; what is computed is computed as ever, in bfloat16 without any, too."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)


@pytest.mark.parametrize(
    "capabilities, native", [(NATIVE, True), ({"amx_bf16": True}, True), (OTHERS, False), ({}, False)]
)
def test_bfloat16_is_for_processors_with_instructions_for_it(monkeypatch, capabilities, native):
    pretend(monkeypatch, capabilities)
    assert native_bfloat16() == native
    for depth, enabled in ((1, False), (2, False), (3, native)):
        with reduced_precision(CPU, depth):
            assert torch.is_autocast_enabled("cpu") == enabled


def test_a_pytorch_that_does_not_say(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not native_bfloat16()


def adapted(contract, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of features of `depth` voxels along x, and the gradient of all parameters."""
    network = randomised(build(contract), 0)
    shape = (1, network.feature_mean.numel(), depth, 6, 6)
    features = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with reduced_precision(CPU):
        logits = network.adapt(features)
    logits.square().mean().backward()
    return logits.detach(), torch.cat([p.grad.flatten() for p in network.parameters()])


@pytest.mark.parametrize("depth, reduced", [pytest.param(2, False), (3, True)])
def test_numbers_of_both_precisions(monkeypatch, contract, depth, reduced):
    """Features that are too thin for bfloat16 give float32's numbers exactly, others about these."""
    pretend(monkeypatch, OTHERS)
    expected = adapted(contract, depth)
    pretend(monkeypatch, NATIVE)
    for made, exact in zip(adapted(contract, depth), expected):
        assert made.dtype == torch.float32 and torch.equal(made, exact) == (not reduced)
        assert (made - exact).norm() < 0.02 * exact.norm()


def test_features_in_bfloat16(monkeypatch, contract):
    """Windows through the backbone, blended in float32: within two percent of float32's."""
    backbone, image = FrozenBackbone("phantom", "skips"), torch.rand(1, 40, 32, 32)
    tiling = Tiling.of(image.shape[1:], (32, 32, 32), backbone.maps)
    made = []
    for capabilities, name in ((OTHERS, "float32"), (NATIVE, "bfloat16 autocast")):
        pretend(monkeypatch, capabilities)
        assert precision_name(CPU) == name
        slabs = [slab.maps for slab in run_windows(backbone, image, tiling, CPU)]
        made.append([torch.cat(parts, 1) for parts in zip(*slabs)])
    for exact, reduced in zip(*made):
        assert reduced.dtype == torch.float32 and not torch.equal(exact, reduced)
        assert (reduced - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("depth", [pytest.param(2), 3])
def test_gradients_of_thin_features(monkeypatch, contract, depth):
    """The same however the memory looks that they are written to; in bfloat16, oneDNN leaves some of it as it was."""
    pretend(monkeypatch, NATIVE)
    gradients = []
    for _ in range(4):
        junk = [torch.full((n,), float("nan")) for n in (10, 1000, 100_000, 1_000_000)]
        del junk
        gradients.append(adapted(contract, depth)[1])
    assert gradients[0].isfinite().all() and all(torch.equal(gradients[0], other) for other in gradients)


def test_thin_maps_are_computed_in_float32():
    convolution = torch.nn.Conv3d(1, 1, 3, padding=1)
    for depth, dtype in ((2, torch.float32), (3, torch.bfloat16)):
        features = torch.zeros(1, 1, depth, 4, 4)
        with torch.autocast("cpu"), unless_thin(features):
            assert convolution(features).dtype == dtype
    with unless_thin(torch.zeros(1, 1, 3, 4, 4)):
        assert convolution(torch.zeros(1, 1, 3, 4, 4)).dtype == torch.float32  # what is off stays off


def test_steps_without_a_scaler_take_no_float16(device):
    """On a GPU, in bfloat16 and with the weights of the present step; a CPU computes as ever."""
    weight = torch.nn.Parameter(torch.ones((), device=device))
    with without_scaling(device):
        products = []
        for _ in range(2):
            with reduced_precision(device):
                products.append(weight.view(1, 1) @ torch.ones((1, 1), device=device))
            with torch.no_grad():
                weight += 1
    assert [product.item() for product in products] == [1, 2]
    assert products[0].dtype in (torch.bfloat16, torch.float32)


# ---- numbers that are almost zero ----


def smallest() -> float:
    return (torch.tensor([1e-38]) / 100).item()


def test_denormals_are_zero_within_the_block_only():
    with pytest.raises(KeyError), denormals_as_zero():
        assert smallest() == 0
        raise KeyError
    assert smallest() > 0


def test_gradients_of_a_training_on_stored_features_have_no_denormals(workspace):
    trainer, seen = make_trainer(workspace, epochs=1), []
    trainer.initialize()
    trainer.network.head.weight.register_hook(lambda gradient: seen.append(smallest()))
    trainer.run_training()
    assert len(seen) == trainer.num_iterations_per_epoch and not any(seen)
    assert smallest() > 0
