"""The shipped backbone: size, card, and what it segments on phantoms that it has not seen."""

import numpy as np
import pytest
import torch
from banks import full_features

from fsefs_nnunet.backbones.frozen import FrozenBackbone
from fsefs_nnunet.backbones.store import EMBEDDED, find_backbone, sha256_of
from fsefs_nnunet.synthetic.datasets import TEMPLATE
from fsefs_nnunet.synthetic.phantom import PhantomConfig, make_phantom


@pytest.fixture
def contract(monkeypatch, tmp_path):
    monkeypatch.setenv("fseft_backbones", str(tmp_path))
    return find_backbone("phantom")


def test_ships_small_verified_weights_with_a_card(contract):
    file = EMBEDDED / "phantom.safetensors"
    assert file.stat().st_size <= 8_000_000
    assert sha256_of(file) == contract.sha256
    assert contract.classes == tuple(TEMPLATE)
    assert "stomach" not in contract.classes
    assert "pretrain_phantom.py" in contract.training["command"]
    dice = contract.training["held_out_dice"]
    assert dice.keys() == set(TEMPLATE)
    assert contract.training["held_out_mean_dice"] == pytest.approx(np.mean(list(dice.values())), abs=1e-3)
    assert contract.training["held_out_mean_dice"] >= 0.6
    assert contract.training["outside_the_training_ranges"]["mean_dice"] >= 0.6


@pytest.mark.parametrize("normalisation", ["window", "zscore"])
def test_segments_large_organs_of_an_unseen_phantom(contract, normalisation):
    backbone = FrozenBackbone("phantom", "last")
    phantom = make_phantom(31337, PhantomConfig(shape=(64, 64, 64), spacing=5.5))
    image = torch.from_numpy(np.clip(phantom.image, -175, 250) + 175)[None] / 425
    if normalisation == "zscore":
        image = (image - image.mean()) / image.std()
    features = full_features(backbone, image, (64, 64, 64))
    with torch.no_grad():
        prediction = (backbone.head(features[None])[0] > 0).numpy()
    for organ in ("liver", "kidneys", "spleen", "aorta", "vertebrae"):
        target = np.isin(phantom.labels, TEMPLATE[organ])
        predicted = prediction[contract.classes.index(organ)]
        assert 2 * (predicted & target).sum() / (predicted.sum() + target.sum()) > 0.7, organ
