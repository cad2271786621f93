"""Features of whole volumes from windows, and their agreement with nnU-Net's predictor."""

from itertools import product

import numpy as np
import pytest
import torch
from banks import CPU, WINDOW, full_features, whole_maps
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from fsefs_nnunet.backbones.frozen import FrozenBackbone
from fsefs_nnunet.backbones.maps import FeatureMap
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.features import windows
from fsefs_nnunet.features.tiling import Tiling
from fsefs_nnunet.features.windows import run_windows
from fsefs_nnunet.inference.logits import logits_in_one_look
from fsefs_nnunet.methods.network import AdaptedNetwork
from fsefs_nnunet.synthetic import phantom


def test_volume_of_one_window_is_one_forward(backbone, float32):
    image = torch.rand(1, *WINDOW)
    torch.testing.assert_close(full_features(backbone, image), backbone(image[None])[0][0])


def test_volume_smaller_than_the_window_is_padded(backbone, float32):
    image = torch.rand(1, 10, 16, 7)
    features = full_features(backbone, image)
    padded = torch.zeros(1, *WINDOW)
    padded[:, 3:13, :, 4:11] = image
    assert features.shape == (16, 10, 16, 7)
    torch.testing.assert_close(features, backbone(padded[None])[0][0][:, 3:13, :, 4:11])


# ---- slabs ----


def blended(backbone, image: torch.Tensor, tiling: Tiling) -> list[torch.Tensor]:
    """All windows of each map at once, in float64."""
    gaussian = compute_gaussian(tiling.window, 1 / 8, 10, dtype=torch.float32, device=CPU)[None, None]
    sums = [torch.zeros((m.channels, *tiling.grid(i)), dtype=torch.double) for i, m in enumerate(tiling.maps)]
    weights = [torch.zeros(tiling.grid(i), dtype=torch.double) for i in range(len(tiling.maps))]
    for start in product(*tiling.starts):
        with torch.no_grad():
            found = backbone(tiling.image_window(image, start)[None])
        for i, (m, values) in enumerate(zip(tiling.maps, found)):
            weight = torch.nn.functional.avg_pool3d(gaussian, m.stride)[0, 0].double()
            at = tuple(slice(a // s, a // s + n) for a, s, n in zip(start, m.stride, weight.shape))
            sums[i][(slice(None), *at)] += values[0].double() * weight
            weights[i][at] += weight
    return [(s / w).float() for s, w in zip(sums, weights)]


@pytest.fixture(scope="module")
def skips():
    return FrozenBackbone("phantom", "skips")


@pytest.mark.parametrize("shape, window", [((37, 24, 18), WINDOW), ((16, 41, 20), WINDOW), ((53, 9, 16), (32, 16, 8))])
def test_slabs_are_the_blended_windows(skips, float32, shape, window):
    image = torch.rand((1, *shape), generator=torch.Generator().manual_seed(0))
    tiling, maps = whole_maps(skips, image, window)
    assert tiling.num_windows > 1
    for ours, expected in zip(maps, blended(skips, image, tiling)):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [40, 200])
def test_memory_does_not_depend_on_the_length_of_a_volume(skips, monkeypatch, length):
    buffers = []
    made = windows._Blending.__init__
    monkeypatch.setattr(windows._Blending, "__init__", lambda self, *args: buffers.append(self) or made(self, *args))
    tiling = Tiling.of((length, 16, 16), WINDOW, skips.maps)
    stop, places = 0, []
    for slab in run_windows(skips, torch.rand(1, length, 16, 16), tiling, CPU):
        assert slab.first == stop < slab.stop <= slab.first + WINDOW[0]
        stop = slab.stop
        for of_map, values, total in zip(skips.maps, slab.maps, buffers[0].sums):
            assert values.shape == (of_map.channels, (slab.stop - slab.first) // of_map.stride[0], *total.shape[2:])
            assert total.shape[1] == WINDOW[0] // of_map.stride[0]
        places.append([array.data_ptr() for array in [*buffers[0].sums, *buffers[0].weights]])
    assert stop == tiling.padded[0] and len(buffers) == 1 and all(place == places[0] for place in places)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_windows_in_batches(skips, monkeypatch, size):
    image = torch.rand((1, 24, 40, 20), generator=torch.Generator().manual_seed(0))
    _, one_by_one = whole_maps(skips, image)
    made, counted = windows._Batches.__init__, []

    def several(self, *args):
        made(self, *args)
        self.size = size

    monkeypatch.setattr(windows._Batches, "__init__", several)
    run = windows._Batches._run
    monkeypatch.setattr(windows._Batches, "_run", lambda self, now: counted.append(len(now)) or run(self, now))
    tiling, together = whole_maps(skips, image)
    assert sum(counted) == tiling.num_windows == 16 and max(counted) == size
    for one, several in zip(one_by_one, together):
        torch.testing.assert_close(several, one, rtol=1e-5, atol=1e-5)


def test_a_batch_that_is_too_large_is_halved(skips, monkeypatch):
    image = torch.rand((1, 24, 40, 20), generator=torch.Generator().manual_seed(0))
    _, one_by_one = whole_maps(skips, image)
    made, run, counted = windows._Batches.__init__, windows._Batches._run, []

    def several(self, *args):
        made(self, *args)
        self.size = 8

    def limited(self, now):
        counted.append(len(now))
        if len(now) > 2:
            raise torch.cuda.OutOfMemoryError
        return run(self, now)

    monkeypatch.setattr(windows._Batches, "__init__", several)
    monkeypatch.setattr(windows._Batches, "_run", limited)
    _, halved = whole_maps(skips, image)
    assert counted == [8, 4, *[2] * 8]
    for one, other in zip(one_by_one, halved):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(windows._Batches, "_run", lambda self, now: limited(self, [0, 0, 0][: len(now)] + [0, 0]))
    with pytest.raises(InputError, match="a window of 16 x 16 x 16 voxels takes more memory than the GPU has left"):
        whole_maps(skips, image)


class Turning(torch.nn.Module):
    """A map of ones that turns into something else at window number `call`."""

    maps = [FeatureMap(1), FeatureMap(2, (2, 2, 2))]

    def __init__(self, call: int, value: float):
        super().__init__()
        self.left, self.value = call, value

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        self.left -= 1
        coarse = torch.ones(1, 2, *(n // 2 for n in image.shape[2:]))
        if self.left == 0:
            coarse[0, 1, 3, 3, 3] = self.value
        return [image, coarse]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape, call", [(WINDOW, 1), ((40, 20, 16), 1), ((40, 20, 16), 7)])
def test_a_map_that_is_not_finite(shape, call, value):
    image, network = torch.zeros(1, *shape), Turning(call, value)
    with pytest.raises(
        InputError, match="^the backbone returns NaN or infinite values for this image, which holds none"
    ):
        whole_maps(network, image)
    network = Turning(call, 1e30)  # large is no fault
    whole_maps(network, image)


# ---- agreement with nnU-Net's predictor ----


def stock_predictor(network, tiny, window):
    manager = PlansManager(tiny.plans(patch_size=list(window)))
    predictor = nnUNetPredictor(use_gaussian=True, use_mirroring=False, device=CPU, allow_tqdm=False)
    configuration = manager.get_configuration("3d_fullres_5shot")
    state = [network.state_dict()]
    predictor.manual_initialization(network, manager, configuration, state, tiny.dataset_json(), "FSEFTTrainer", None)
    return predictor


def windows_blended(network, image: torch.Tensor, window, slicers) -> tuple[torch.Tensor, torch.Tensor]:
    """As nnU-Net's predictor blends logits, but in float32; and the weights."""
    gaussian = compute_gaussian(window, 1 / 8, 10, dtype=torch.float32, device=CPU)
    blended, weight = torch.zeros(network.head.out_channels, *image.shape[1:]), torch.zeros(image.shape[1:])
    for slicer in slicers:
        with torch.no_grad():
            blended[slicer] += network(image[slicer][None])[0] * gaussian
        weight[slicer[1:]] += gaussian
    return blended / weight, weight


def fitted(network, image: torch.Tensor, window, labels: dict) -> None:
    """Give a network the statistics of an image's features."""
    features = full_features(network.backbone, image, window)
    network.fit(features.flatten(1).mean(1), features.flatten(1).std(1), labels, False)


@pytest.mark.parametrize("shape", [(24, 24, 24), (24, 22, 20)])
def test_linear_probe_on_blended_features_is_the_predictors_sliding_window(tiny, contract, float32, shape):
    """nnU-Net blends the logits of its windows, we blend features: of maps at full resolution it is the same."""
    torch.manual_seed(0)
    image = torch.rand(1, *shape)
    network = AdaptedNetwork(1, 4, "phantom", contract.sha256, "linear_probe", "last", None, 3)
    fitted(network, image, WINDOW, {"background": 0, "x": 1, "y": 2, "z": 3})
    ours, passed = logits_in_one_look(network, image.numpy(), WINDOW, CPU)
    predictor = stock_predictor(network, tiny, WINDOW)
    slicers = predictor._internal_get_sliding_window_slicers(shape)
    assert len(slicers) == passed == 8
    exact, weight = windows_blended(network, image, WINDOW, slicers)
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)
    theirs = predictor.predict_sliding_window_return_logits(image).float()
    # the predictor sums in float16: near the volume's corners, where its weights underflow, its logits are coarse
    sound = weight > 0.01
    assert sound.float().mean() > 0.6 and theirs.abs().max() > 1
    torch.testing.assert_close(ours[:, sound], theirs[:, sound], rtol=2e-3, atol=2e-3)
    # windows matter: the volume in one piece gives something else
    with torch.no_grad():
        in_one_piece = network(torch.nn.functional.pad(image, (0, 24 - shape[2], 0, 24 - shape[1]))[None])[0]
    assert (in_one_piece[:, :, : shape[1], : shape[2]] - theirs)[:, sound].abs().max() > 0.03


ORGANS = ("spleen", "kidney_right", "vertebrae")


def dice(logits: torch.Tensor, truth: np.ndarray) -> np.ndarray:
    labels = logits.argmax(0).numpy()
    pairs = [(labels == i + 1, truth == phantom.LABELS[name]) for i, name in enumerate(ORGANS)]
    return np.array([2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in pairs])


@pytest.fixture(scope="module")
def body():
    """A phantom (1, 56, 56, 56) and its labels."""
    made = phantom.make_phantom((5, 1), phantom.PhantomConfig((56, 56, 56), 5.0, (-0.1, 0.0, 0.1)))
    low, high = phantom.HU_WINDOW
    return torch.from_numpy((made.image.clip(low, high) - low) / (high - low)).float()[None], made.labels


@pytest.mark.slow
@pytest.mark.parametrize("adapter, stages, channels", [("linear_probe", "all", None), ("spatial", "all", 32)])
def test_dice_is_the_predictors(tiny, contract, float32, body, adapter, stages, channels):
    """Of 8 windows that start at multiples of the strides, as ours always do: within 0.002."""
    (image, truth), window = body, (40, 40, 40)
    network = AdaptedNetwork(1, 4, "phantom", contract.sha256, adapter, stages, channels, 3)
    fitted(network, image, window, {"background": 0, **{name: i + 1 for i, name in enumerate(ORGANS)}})
    if adapter == "spatial":  # it is not linear, and sees across the windows' borders
        torch.manual_seed(0)
        torch.nn.init.normal_(network.adapter.conv2.weight, 0, 0.02)
    ours = dice(logits_in_one_look(network, image.numpy(), window, CPU)[0], truth)
    predictor = stock_predictor(network, tiny, window)
    assert len(predictor._internal_get_sliding_window_slicers(image.shape[1:])) == 8
    theirs = dice(predictor.predict_sliding_window_return_logits(image).float(), truth)
    assert theirs.min() > 0.7
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=0.002)
    with torch.no_grad():
        in_one_piece = dice(network(image[None])[0], truth)
    assert np.abs(in_one_piece - theirs).max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("stages", ["all", "skips"])
def test_logits_of_coarse_maps_are_the_predictors_within_two_percent(contract, float32, body, stages):
    """They are blended before they are upsampled, nnU-Net's logits after it: near the windows' borders that differs."""
    (image, _), window = body, (40, 40, 40)
    network = AdaptedNetwork(1, 4, "phantom", contract.sha256, "linear_probe", stages, None, 3)
    fitted(network, image, window, {"background": 0, "x": 1, "y": 2, "z": 3})  # a head that looks at all maps alike
    ours, _ = logits_in_one_look(network, image.numpy(), window, CPU)
    slicers = [(slice(None), *(slice(a, a + 40) for a in start)) for start in product((0, 16), repeat=3)]
    theirs, _ = windows_blended(network, image, window, slicers)
    assert (ours - theirs).norm() < 0.02 * theirs.norm()
    assert (ours.argmax(0) == theirs.argmax(0)).float().mean() > 0.99
