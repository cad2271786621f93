import pytest
import torch
from test_network import build, randomised

from fsefs_nnunet.device import reduced_precision, unless_thin

CPU = torch.device("cpu")


@pytest.mark.parametrize("depth", [2, 3])
def test_gradients_of_thin_features(contract, depth):
    """The same however the memory looks that they are written to; in bfloat16, oneDNN leaves some of it as it was."""
    network = randomised(build(contract), 0)
    shape = (1, network.feature_mean.numel(), depth, 6, 6)
    features = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    gradients = []
    for _ in range(4):
        junk = [torch.full((n,), float("nan")) for n in (10, 1000, 100_000, 1_000_000)]
        del junk
        network.zero_grad()
        with reduced_precision(CPU):
            loss = network.adapt(features).float().square().mean()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    assert gradients[0].isfinite().all() and all(torch.equal(gradients[0], other) for other in gradients)


def test_thin_maps_are_computed_in_float32():
    assert not reduced_precision(CPU, 2)._enabled and not reduced_precision(CPU, 1)._enabled
    convolution = torch.nn.Conv3d(1, 1, 3, padding=1)
    for depth, dtype in ((2, torch.float32), (3, torch.bfloat16)):
        features = torch.zeros(1, 1, depth, 4, 4)
        with torch.autocast("cpu"), unless_thin(features):
            assert convolution(features).dtype == dtype
    with unless_thin(torch.zeros(1, 1, 3, 4, 4)):
        assert convolution(torch.zeros(1, 1, 3, 4, 4)).dtype == torch.float32  # what is off stays off
