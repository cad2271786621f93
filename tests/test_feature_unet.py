"""The U-Net's decoder on image and frozen maps."""

import numpy as np
import pytest
import torch
from trainings import make_trainer

from fsefs_nnunet.backbones.maps import FeatureMap
from fsefs_nnunet.methods.adapters.unet import FeatureUNet
from fsefs_nnunet.trainers.by_name import FSEFTTrainer_UNet

# as an nnU-Net with an anisotropic first stride gives them, the image last
MAPS = [FeatureMap(4), FeatureMap(6, (2, 2, 1)), FeatureMap(8, (4, 4, 2)), FeatureMap(6, (2, 2, 1)), FeatureMap(1)]
SHAPE = (8, 12, 6)


def maps_of(seed: int = 0) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(2, m.channels, *(n // s for n, s in zip(SHAPE, m.stride))) for m in MAPS]


def test_maps_at_their_own_strides_become_one_at_full_resolution():
    unet = FeatureUNet(MAPS, width=4)
    assert unet(maps_of()).shape == (2, 4, *SHAPE) and unet.out_channels == 4
    ups = [tuple(up.stride) for up in unet.up]
    assert ups == [(2, 2, 2), (2, 2, 1)]
    inputs = [block[0].in_channels for block in (unet.bottom, *unet.blocks)]
    assert inputs == [8, 12 + 8, 4 + 1 + 4]  # the maps of a level, and the coarser level's


def test_every_map_counts():
    unet, maps = FeatureUNet(MAPS, width=4).eval(), [m.requires_grad_() for m in maps_of()]
    unet(maps).square().sum().backward()
    assert all(m.grad.abs().flatten(2).sum(-1).min() > 0 for m in maps)


def test_whole_channels_are_left_out_but_never_the_image():
    unet, maps = FeatureUNet(MAPS, width=4, dropout=0.5).train(), maps_of()
    seen = []
    for block in (unet.bottom, *unet.blocks):
        block[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    unet(maps)
    finest = seen[-1][:, 4:]  # behind the coarser level's channels
    image, feature = finest[:, -1:], finest[:, :4]
    assert torch.equal(image, maps[-1])
    kept = feature.flatten(2).abs().sum(-1) > 0
    assert 0 < kept.sum() < kept.numel()
    assert torch.equal(feature[kept], 2 * maps[0][kept])  # what is kept makes up for the rest
    seen.clear()
    unet.eval()(maps)
    assert torch.equal(seen[-1][:, 4:], torch.cat((maps[0], maps[-1]), 1))


def test_one_level_alone():
    unet = FeatureUNet([FeatureMap(4), FeatureMap(1)], width=4)
    assert len(unet.up) == 0
    assert unet([torch.randn(1, 4, *SHAPE), torch.randn(1, 1, *SHAPE)]).shape == (1, 4, *SHAPE)


def test_its_checkpoint_holds_each_layer_once():
    unet = FeatureUNet(MAPS, width=4)
    assert set(unet.state_dict()) == {name for name, _ in unet.named_parameters()}


@pytest.mark.usefixtures("float32")
def test_statistics_are_those_of_the_patches(work, monkeypatch):
    """Mean and deviation over all voxels of a map, whatever its stride."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    trainer = make_trainer(work, FSEFTTrainer_UNet, configuration="3d_fullres_1shot")
    trainer.initialize()
    maps = trainer.network.backbone.maps
    patches = [{"data": torch.rand(2, 1, 24, 24, 24)} for _ in range(8)]
    monkeypatch.setattr(trainer, "get_dataloaders", lambda: (iter(patches), None))
    mean, std = trainer.feature_statistics()
    found = zip(*(trainer.network.backbone(patch["data"]) for patch in patches))
    values = [torch.cat(of_map).transpose(0, 1).flatten(1).double() for of_map in found]
    np.testing.assert_allclose(mean, torch.cat([v.mean(1) for v in values]), rtol=0, atol=1e-5)
    np.testing.assert_allclose(std, torch.cat([v.std(1, correction=0) for v in values]), rtol=1e-4, atol=1e-5)
    assert len(mean) == sum(m.channels for m in maps) and maps[-1].channels == 1
