"""Features of whole volumes from windows."""

import numpy as np
import pytest
import torch
from banks import CPU, WINDOW, requests
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from fsefs_nnunet.features.bank import FeatureBank
from fsefs_nnunet.features.windows import extract_features
from fsefs_nnunet.methods.network import AdaptedNetwork
from fsefs_nnunet.synthetic import phantom


def test_volume_of_one_window_is_one_forward(backbone):
    image = torch.rand(1, *WINDOW)
    features = extract_features(backbone, image, WINDOW, CPU)
    torch.testing.assert_close(features, backbone(image[None])[0][0])


def test_volume_smaller_than_the_window_is_padded(backbone):
    image = torch.rand(1, 10, 16, 7)
    features = extract_features(backbone, image, WINDOW, CPU)
    padded = torch.zeros(1, *WINDOW)
    padded[:, 3:13, :, 4:11] = image
    assert features.shape == (16, 10, 16, 7)
    torch.testing.assert_close(features, backbone(padded[None])[0][0][:, 3:13, :, 4:11])


def stock_predictor(network, tiny, window):
    manager = PlansManager(tiny.plans(patch_size=list(window)))
    predictor = nnUNetPredictor(use_gaussian=True, use_mirroring=False, device=CPU, allow_tqdm=False)
    configuration = manager.get_configuration("3d_fullres_5shot")
    state = [network.state_dict()]
    predictor.manual_initialization(network, manager, configuration, state, tiny.dataset_json(), "FSEFTTrainer", None)
    return predictor


def test_linear_probe_on_the_bank_is_the_predictors_sliding_window(tiny, contract, tmp_path):
    """nnU-Net blends the logits of its windows, the bank blends features."""
    torch.manual_seed(0)
    image = torch.rand(1, 24, 22, 20)
    network = AdaptedNetwork(1, 4, "phantom", contract.sha256, "linear_probe", "all", None, 3)
    bank = FeatureBank(tmp_path, network.backbone, "all", WINDOW, CPU)
    bank.fill(requests(["a"], lambda case: image.numpy()))
    network.fit(*bank.statistics(["a"]), {"background": 0, "x": 1, "y": 2, "z": 3}, False)
    with torch.no_grad():
        ours = network.adapt(torch.from_numpy(bank["a"].boxes[0].astype(np.float32))[None])[0]

    predictor = stock_predictor(network, tiny, WINDOW)
    windows = predictor._internal_get_sliding_window_slicers(image.shape[1:])
    assert len(windows) == 8
    theirs = predictor.predict_sliding_window_return_logits(image).float()
    gaussian = compute_gaussian(WINDOW, 1 / 8, 10, device=CPU).float()
    blended, weight = torch.zeros_like(ours), torch.zeros(image.shape[1:])
    padded = torch.nn.functional.pad(image, (0, 4, 0, 2))
    for window in windows:
        with torch.no_grad():
            logits = network(image[window][None])[0]
        blended[window] += logits * gaussian
        weight[window[1:]] += gaussian
    torch.testing.assert_close(ours, blended / weight, rtol=1e-3, atol=1e-3)
    # the predictor sums in float16: near the volume's corners, where its weights underflow, its logits are coarse
    sound = weight > 0.01
    assert sound.float().mean() > 0.6 and theirs.abs().max() > 1
    torch.testing.assert_close(ours[:, sound], theirs[:, sound], rtol=2e-3, atol=2e-3)
    # windows matter: the volume in one piece gives something else
    with torch.no_grad():
        in_one_piece = network(padded[None])[0, :, :, :22, :20]
    assert (in_one_piece - theirs)[:, sound].abs().max() > 0.03


@pytest.mark.slow
def test_spatial_adapters_dice_by_bank_and_by_predictor(tiny, contract, tmp_path):
    """The adapter is not linear and sees across the windows' borders: logits differ there, Dice hardly does."""
    shape, window = (56, 56, 56), (40, 40, 40)
    organs = ("spleen", "kidney_right", "vertebrae")
    made = phantom.make_phantom((5, 1), phantom.PhantomConfig(shape, 5.0, (-0.1, 0.0, 0.1)))
    low, high = phantom.HU_WINDOW
    image = torch.from_numpy((made.image.clip(low, high) - low) / (high - low)).float()[None]
    network = AdaptedNetwork(1, 4, "phantom", contract.sha256, "spatial", "all", 32, 3)
    bank = FeatureBank(tmp_path, network.backbone, "all", window, CPU)
    bank.fill(requests(["a"], lambda case: image.numpy()))
    network.fit(*bank.statistics(["a"]), {"background": 0, **{name: i + 1 for i, name in enumerate(organs)}}, False)
    torch.manual_seed(0)
    torch.nn.init.normal_(network.adapter.conv2.weight, 0, 0.02)

    def dice(logits):
        labels = logits.argmax(0).numpy()
        pairs = [(labels == i + 1, made.labels == phantom.LABELS[name]) for i, name in enumerate(organs)]
        return np.array([2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in pairs])

    with torch.no_grad():
        ours = dice(network.adapt(torch.from_numpy(bank["a"].boxes[0].astype(np.float32))[None])[0])
        in_one_piece = dice(network(image[None])[0])
    predictor = stock_predictor(network, tiny, window)
    assert len(predictor._internal_get_sliding_window_slicers(shape)) == 8
    theirs = dice(predictor.predict_sliding_window_return_logits(image).float())
    assert theirs.max() > 0.3
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=0.01)
    assert np.abs(in_one_piece - theirs).max() > 0.02
