"""Which stages' features fit into memory."""

from dataclasses import replace

import pytest

from fsefs_nnunet.backbones.architectures import stage_maps
from fsefs_nnunet.backbones.zoo import ZOO
from fsefs_nnunet.planners.stages import channels_in_effect, choose_stages

HALF_OF_8_GIB = 4 * 2**30


@pytest.mark.parametrize(
    "shape, slab",
    [
        ((36, 50, 35), 4 * 42 * 40 * 50 * 35),  # Hippocampus
        ((128, 125, 108), 4 * 42 * 64 * 125 * 108),  # CHAOS at 2.5 mm
        ((100, 100, 100), 4 * 42 * 64 * 100 * 100),
    ],
)
def test_the_embedded_backbone_gives_all_it_has(contract, shape, slab):
    stages = choose_stages(contract, contract.window(shape), shape, HALF_OF_8_GIB)
    # twice, of decoder and encoder: 16 at full resolution, 32 at an eighth of the voxels, 64 at a 64th
    assert (stages.name, stages.channels, stages.slab_bytes) == ("skips", 2 * (16 + 32 / 8 + 64 / 64), slab)


@pytest.mark.parametrize(
    "y, z, expected",
    [(625, 626, "skips"), (626, 626, "all"), (889, 889, "all"), (890, 890, "last"), (5000, 5000, "last")],
)
def test_larger_volumes_get_fewer(contract, y, z, expected):
    assert choose_stages(contract, (64, 64, 64), (600, y, z), HALF_OF_8_GIB).name == expected


def test_the_window_counts_twice(contract):
    slab, window = 4 * 42 * 64**3, 2 * 4 * 42 * 64**3
    assert choose_stages(contract, (64, 64, 64), (64, 64, 64), slab + window).name == "skips"
    assert choose_stages(contract, (64, 64, 64), (64, 64, 64), slab + window - 1).name == "all"


def test_a_large_unet_gives_its_last_stage(contract):
    """Crops have all channels at full resolution, however little the coarse maps take."""
    features = [32, 64, 128, 256, 320]
    arguments = dict(contract.architecture["arch_kwargs"], features_per_stage=features, n_stages=5)
    for key in ("kernel_sizes", "strides", "n_conv_per_stage"):
        arguments[key] = [*arguments[key], arguments[key][-1]]
    arguments["n_conv_per_stage_decoder"] = [2] * 4
    large = replace(contract, architecture={**contract.architecture, "arch_kwargs": arguments})
    channels = {name: sum(m.channels for m in maps) for name, maps in stage_maps(large).items()}
    assert channels == {"last": 32, "all": 480, "skips": 960}
    stages = choose_stages(large, (64, 64, 64), (64, 64, 64), HALF_OF_8_GIB)
    assert (stages.name, stages.channels) == ("last", 32)


def test_other_architectures_have_one_choice(contract):
    raw = replace(contract, architecture={"kind": "raw_image"}, classes=())
    stages = choose_stages(raw, (64, 64, 64), (100, 100, 100), HALF_OF_8_GIB)
    assert (stages.name, stages.channels, stages.slab_bytes) == ("last", 1, 4 * 64 * 100 * 100)


def test_an_encoder_gets_the_image_beside_its_maps():
    stages = choose_stages(ZOO["astra"].contract({}), (64, 64, 32), (100, 100, 50), HALF_OF_8_GIB, image_channels=2)
    assert (stages.name, stages.channels) == ("last+image", 2 * (512 / (8 * 8 * 4) + 1))


def test_decoder_stages_below_full_resolution_cost_little():
    stages = choose_stages(ZOO["obelisk"].contract({}), (96, 96, 96), (100, 100, 100), HALF_OF_8_GIB)
    assert stages.name == "all" and stages.channels == 5 + 14 / 8 + 28 / 64 + 42 / 512 + 56 / 4096


@pytest.mark.parametrize("entry", [e for e in ZOO.values() if e.kind != "swin_unetr"], ids=lambda e: e.id)
def test_where_nothing_fits_the_smallest_is_taken(entry):
    contract = entry.contract({})
    smallest = choose_stages(contract, (64, 64, 32), (100, 100, 50), 1)
    assert smallest.channels == min(
        channels_in_effect(maps) + all(max(m.stride) > 1 for m in maps)
        for name, maps in stage_maps(contract).items()
        if name == "last" or sum(m.channels for m in maps) <= 256
    )


def test_channels_multiply_the_features(contract):
    stages = choose_stages(contract, (64, 64, 64), (64, 64, 64), HALF_OF_8_GIB, image_channels=2)
    assert (stages.name, stages.channels) == ("all", 2 * (16 + 32 / 8 + 64 / 64))  # 448 of "skips" are too many
