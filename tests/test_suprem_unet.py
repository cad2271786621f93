"""SuPreM's U-Net against a plain computation with the published names."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from published_files import random_tensors, wrapped

from fsefs_nnunet.backbones.architectures.suprem_unet import SuPreMUNetBackbone
from fsefs_nnunet.backbones.published.layouts import recognise
from fsefs_nnunet.backbones.zoo import ZOO

WIDTH = 8  # divides the published 64 features


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return random_tensors("suprem_unet_backbone", WIDTH)


@pytest.fixture(scope="module")
def backbone(weights) -> SuPreMUNetBackbone:
    contract = ZOO["suprem_unet"].contract({})
    contract = replace(contract, architecture={**contract.architecture, "features": 64 // WIDTH})
    module = SuPreMUNetBackbone(contract, "last").eval()
    module.load_backbone_state(recognise("file", wrapped("suprem_unet_backbone", weights)).tensors)
    return module.requires_grad_(False).double()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand((3, 1, 16, 24, 32), generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def plain(weights: dict, image: torch.Tensor) -> torch.Tensor:
    """image (1, 1, X, Y, Z) -> features, normalised by the statistics of this patch as training mode does."""
    weights = {name: tensor.double() for name, tensor in weights.items()}

    def twice(prefix: str, x: torch.Tensor) -> torch.Tensor:
        for i in (0, 1):
            conv, bn = (f"{prefix}.ops.{i}.{kind}" for kind in ("conv1", "bn1"))
            x = F.conv3d(x, weights[f"{conv}.weight"], weights[f"{conv}.bias"], padding=1)
            x = F.batch_norm(x, None, None, weights[f"{bn}.weight"], weights[f"{bn}.bias"], training=True)
            x = F.relu(x)
        return x

    skip64 = twice("down_tr64", image)
    skip128 = twice("down_tr128", F.max_pool3d(skip64, 2))
    skip256 = twice("down_tr256", F.max_pool3d(skip128, 2))
    x = twice("down_tr512", F.max_pool3d(skip256, 2))
    for prefix, skip in (("up_tr256", skip256), ("up_tr128", skip128), ("up_tr64", skip64)):
        x = F.conv_transpose3d(x, weights[f"{prefix}.up_conv.weight"], weights[f"{prefix}.up_conv.bias"], stride=2)
        x = twice(prefix, torch.cat((x, skip), 1))
    return x


def test_features_are_those_of_the_plain_computation(backbone, weights, images):
    (features,) = backbone(images[:1])
    assert features.shape == (1, 64 // WIDTH, 16, 24, 32) and features.std() > 0.01
    torch.testing.assert_close(features, plain(weights, images[:1]), rtol=0, atol=1e-10)


def test_a_patch_alone_and_beside_others(backbone, weights, images):
    """The published network mixes the patches of a batch; ours gives each what it gets alone."""
    (together,) = backbone(images)
    for i in range(len(images)):
        torch.testing.assert_close(together[i : i + 1], backbone(images[i : i + 1])[0], rtol=0, atol=1e-10)
    assert (plain(weights, images) - together).abs().max() > 1e-3


def test_training_mode_changes_nothing(backbone, images):
    (features,) = backbone(images[:1])
    assert torch.equal(backbone.train()(images[:1])[0], features)
    backbone.eval()


def test_parts_for_tuning(backbone):
    last, decoder, every = (set(backbone.tuned_parameters(part)) for part in ("last_block", "decoder", "all"))
    assert last < decoder < every == {name for name, _ in backbone.named_parameters()}
    assert {name.rsplit(".", 1)[0] for name in last} == {
        "upsample.2",
        *(f"decoder.2.{i}.{kind}" for i in (0, 1) for kind in ("conv", "norm")),
    }
    assert every - decoder == {name for name in every if name.startswith("encoder.")}


def test_one_stage_alone():
    with pytest.raises(ValueError, match="'suprem_unet' has stages 'last', but the plans' arch_kwargs name 'skips'"):
        SuPreMUNetBackbone(ZOO["suprem_unet"].contract({}), "skips")


def test_window_that_cannot_be_halved_so_often(backbone):
    with pytest.raises(
        ValueError, match=r"'suprem_unet' got a window of \[96, 12, 96\]: patch_size in the plans must be"
    ):
        backbone(torch.zeros((1, 1, 96, 12, 96)))
