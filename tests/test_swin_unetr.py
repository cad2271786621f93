"""Swin UNETR with published weights: against a plain computation that calls none of MONAI's layers."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("monai", reason="Swin UNETR needs MONAI: pip install fsefs_nnunet[monai]")

from fsefs_nnunet.backbones.architectures.patch_merging import PublishedPatchMerging  # noqa: E402
from fsefs_nnunet.backbones.architectures.swin_unetr import SwinUNETRBackbone  # noqa: E402
from fsefs_nnunet.backbones.zoo import ZOO  # noqa: E402

FEATURES = 12
SHAPE = (64, 32, 96)  # tokens of 32 x 16 x 48 and less: windows of 7 with and without shift, and smaller ones
PUBLISHED = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1)]
CORRECTED = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)]  # MONAI's today


def narrow_contract(backbone_id: str):
    contract = ZOO[backbone_id].contract({})
    return replace(contract, architecture={**contract.architecture, "features": FEATURES})


@pytest.fixture(scope="module")
def backbone() -> SwinUNETRBackbone:
    """Every parameter random, relative positions and biases, too, so that none can be left out unseen."""
    module = SwinUNETRBackbone(narrow_contract("fseft"), "last").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            spread = 0.5 if "table" in name else 0.1
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
    return module


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.rand((1, 1, *SHAPE), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def features(backbone, image) -> torch.Tensor:
    with torch.no_grad():
        return backbone(image)[0]


# ---- patch merging ----


def test_patch_merging_by_position():
    """Values that encode where they come from: channel c of voxel (i, j, k) is 1000 i + 100 j + 10 k + c."""
    merging = PublishedPatchMerging(3)
    merging.norm = merging.reduction = nn.Identity()
    i, j, k, c = torch.meshgrid(*map(torch.arange, (4, 6, 8, 3)), indexing="ij")
    merged = merging((1000 * i + 100 * j + 10 * k + c)[None].float())[0].int().numpy()
    assert merged.shape == (2, 3, 4, 24)
    for x, y, z in np.ndindex(2, 3, 4):
        for grid, (di, dj, dk) in enumerate(PUBLISHED):
            first = 1000 * (2 * x + di) + 100 * (2 * y + dj) + 10 * (2 * z + dk)
            assert merged[x, y, z, 3 * grid : 3 * grid + 3].tolist() == [first, first + 1, first + 2]


# ---- the whole network ----


def residual_block(weights: dict, prefix: str, x: torch.Tensor) -> torch.Tensor:
    def conv(name: str, value: torch.Tensor, padding: int) -> torch.Tensor:
        value = F.conv3d(value, weights[f"{prefix}.{name}.conv.weight"], padding=padding)
        centred = value - value.mean((2, 3, 4), keepdim=True)
        return centred / (centred.square().mean((2, 3, 4), keepdim=True) + 1e-5).sqrt()

    y = conv("conv2", F.leaky_relu(conv("conv1", x, 1), 0.01), 1)
    return F.leaky_relu(y + (conv("conv3", x, 0) if f"{prefix}.conv3.conv.weight" in weights else x), 0.01)


def up_block(weights: dict, prefix: str, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
    x = F.conv_transpose3d(x, weights[f"{prefix}.transp_conv.conv.weight"], stride=2)
    return residual_block(weights, f"{prefix}.conv_block", torch.cat((x, skip), 1))


def attention(weights: dict, prefix: str, tokens: torch.Tensor, heads: int, regions: torch.Tensor) -> torch.Tensor:
    """tokens (n, C) of one window; those of different `regions` (n,) hardly see each other."""
    n, channels = tokens.shape
    qkv = tokens @ weights[f"{prefix}.qkv.weight"].T + weights[f"{prefix}.qkv.bias"]
    q, k, v = qkv.view(n, 3, heads, channels // heads).permute(1, 2, 0, 3)
    # the table holds 13^3 displacements of a window of 7^3; a smaller window takes its first n cells
    cells = torch.tensor(list(itertools.product(range(7), repeat=3))[:n])
    displacement = cells[:, None] - cells[None] + 6
    index = (displacement[..., 0] * 13 + displacement[..., 1]) * 13 + displacement[..., 2]
    bias = weights[f"{prefix}.relative_position_bias_table"][index].permute(2, 0, 1)
    apart = -100.0 * (regions[:, None] != regions[None])
    score = q @ k.transpose(1, 2) * (channels // heads) ** -0.5 + bias + apart
    mixed = (score.softmax(-1) @ v).transpose(0, 1).reshape(n, channels)
    return mixed @ weights[f"{prefix}.proj.weight"].T + weights[f"{prefix}.proj.bias"]


def swin_block(weights: dict, prefix: str, x: torch.Tensor, heads: int, shifted: bool) -> torch.Tensor:
    """x (X, Y, Z, C)."""
    sizes, channels = x.shape[:3], x.shape[3]
    window = [min(7, n) for n in sizes]
    shift = [3 if shifted and n > 7 else 0 for n in sizes]
    y = F.layer_norm(x, (channels,), weights[f"{prefix}.norm1.weight"], weights[f"{prefix}.norm1.bias"])
    padded = [-(-n // w) * w for n, w in zip(sizes, window)]
    y = F.pad(y, (0, 0, *(v for n, p in zip(sizes[::-1], padded[::-1]) for v in (0, p - n))))
    y = y.roll([-s for s in shift], (0, 1, 2))
    # what the roll has brought together from both ends of an axis is apart: three stretches an axis
    stretches = [
        (torch.arange(p) >= p - w).int() + (torch.arange(p) >= p - s).int() if s else torch.zeros(p, dtype=torch.int)
        for p, w, s in zip(padded, window, shift)
    ]
    regions = stretches[0][:, None, None] * 9 + stretches[1][:, None] * 3 + stretches[2]
    result = torch.empty_like(y)
    for corner in itertools.product(*(range(0, p, w) for p, w in zip(padded, window))):
        place = tuple(slice(a, a + w) for a, w in zip(corner, window))
        tokens = y[place].reshape(-1, channels)
        mixed = attention(weights, f"{prefix}.attn", tokens, heads, regions[place].flatten())
        result[place] = mixed.view(*window, channels)
    x = x + result.roll(shift, (0, 1, 2))[tuple(map(slice, sizes))]
    y = F.layer_norm(x, (channels,), weights[f"{prefix}.norm2.weight"], weights[f"{prefix}.norm2.bias"])
    y = F.gelu(y @ weights[f"{prefix}.mlp.linear1.weight"].T + weights[f"{prefix}.mlp.linear1.bias"])
    return x + y @ weights[f"{prefix}.mlp.linear2.weight"].T + weights[f"{prefix}.mlp.linear2.bias"]


def swin_unetr(weights: dict, image: torch.Tensor, order: list) -> torch.Tensor:
    """Features of Swin UNETR with weights by their published names. image (1, 1, X, Y, Z)."""
    prefix = "swinViT.patch_embed.proj"
    x = F.conv3d(image, weights[f"{prefix}.weight"], weights[f"{prefix}.bias"], stride=2)[0].permute(1, 2, 3, 0)
    hidden = [x]
    for layer, heads in enumerate((3, 6, 12, 24), 1):
        prefix = f"swinViT.layers{layer}.0"
        for b in range(2):
            x = swin_block(weights, f"{prefix}.blocks.{b}", x, heads, shifted=b == 1)
        grids = [x[i::2, j::2, k::2] for i, j, k in order]
        prefix = f"{prefix}.downsample"
        x = F.layer_norm(
            torch.cat(grids, -1),
            (8 * x.shape[-1],),
            weights[f"{prefix}.norm.weight"],
            weights[f"{prefix}.norm.bias"],
        )
        x = x @ weights[f"{prefix}.reduction.weight"].T
        hidden.append(x)
    hidden = [F.layer_norm(h, h.shape[-1:]).permute(3, 0, 1, 2)[None] for h in hidden]
    skips = [residual_block(weights, f"encoder{n}.layer", v) for n, v in zip((1, 2, 3, 4), (image, *hidden[:3]))]
    x = residual_block(weights, "encoder10.layer", hidden[4])
    for n, skip in zip((5, 4, 3, 2, 1), (hidden[3], *skips[::-1])):
        x = up_block(weights, f"decoder{n}", x, skip)
    return x


def published_weights(backbone) -> dict[str, torch.Tensor]:
    return {name.removeprefix("network."): tensor for name, tensor in backbone.backbone_state().items()}


@pytest.mark.slow
def test_features_are_those_of_the_plain_computation(backbone, image, features):
    plain = swin_unetr(published_weights(backbone), image, PUBLISHED)
    assert features.shape == (1, FEATURES, *SHAPE) and features.std() > 0.3
    torch.testing.assert_close(features, plain, rtol=0, atol=2e-5)
    # and the order of patch merging is no trifle
    assert (swin_unetr(published_weights(backbone), image, CORRECTED) - features).abs().max() > 0.1


@pytest.mark.slow
def test_fused_attention_is_exact(backbone, image, features):
    """MONAI takes its own where gradients are asked for."""
    assert all(m.use_flash_attention for m in backbone.modules() if hasattr(m, "use_flash_attention"))
    with torch.enable_grad():
        plain = backbone(image)[0].detach()
    assert 0 < (features - plain).abs().max() <= 1e-5 * features.abs().max()


# ---- what others rely on ----


def test_head_is_on_the_features(backbone, image, features):
    assert backbone.head.weight.shape == (29, FEATURES, 1, 1, 1)
    assert SwinUNETRBackbone(narrow_contract("suprem_swinunetr"), "last").head is None


def test_parts_for_tuning(backbone):
    last, decoder, every = (set(backbone.tuned_parameters(part)) for part in ("last_block", "decoder", "all"))
    assert last < decoder < every == {name for name, _ in backbone.named_parameters()} - {"head.weight", "head.bias"}
    assert last == {name for name in every if ".decoder1." in name}
    assert {name.split(".")[1] for name in decoder} == {f"decoder{n}" for n in (1, 2, 3, 4, 5)}
    # decoder1 of 48 features has 209,664 parameters, 96 x 48 x 27 of them in its first convolution
    sizes = {name: parameter.numel() for name, parameter in backbone.named_parameters()}
    assert sum(sizes[name] for name in last) * (48 // FEATURES) ** 2 == 209_664


def test_decoder_of_an_encoder_is_all_but_the_transformer():
    backbone = SwinUNETRBackbone(narrow_contract("selfsup"), "last")
    decoder = set(backbone.tuned_parameters("decoder"))
    assert decoder == {name for name, _ in backbone.named_parameters() if "swinViT" not in name}


def test_one_stage_alone():
    with pytest.raises(ValueError, match="'fseft' has stages 'last', but the plans' arch_kwargs name 'all'"):
        SwinUNETRBackbone(narrow_contract("fseft"), "all")


def test_weights_round_trip(backbone):
    other = SwinUNETRBackbone(narrow_contract("fseft"), "last")
    state = {name: tensor.clone() for name, tensor in backbone.backbone_state().items()}
    other.load_backbone_state(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.backbone_state().items())
    state.pop("network.decoder3.transp_conv.conv.weight")
    with pytest.raises(ValueError, match="1 tensors are missing"):
        other.load_backbone_state(state)


def test_window_that_cannot_be_halved_so_often(backbone):
    with pytest.raises(ValueError, match=r"'fseft' got a window of \[96, 48, 96\]: patch_size in the plans must be"):
        backbone(torch.zeros((1, 1, 96, 48, 96)))
