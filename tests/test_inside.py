"""LoRA, norms and biases inside a frozen backbone."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from fsefs_nnunet.backbones.architectures import build_architecture
from fsefs_nnunet.backbones.frozen import FrozenBackbone
from fsefs_nnunet.backbones.store import save_backbone
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.methods.inside.few_parameters import Biases, Norms
from fsefs_nnunet.methods.inside.lora import LoRA
from fsefs_nnunet.methods.inside.tuned_backbone import TunedBackbone
from fsefs_nnunet.methods.network import inside_of
from fsefs_nnunet.methods.registry import METHODS


class Layers(nn.Module):
    """A backbone of one layer of each kind, with what TunedBackbone asks of it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.down = nn.Linear(6, 9), nn.Conv3d(4, 6, 3, groups=2)
        self.up, self.norm, self.plain = nn.ConvTranspose3d(6, 4, 2, 2), nn.LayerNorm(9), nn.InstanceNorm3d(4)
        self.requires_grad_(False)

    def tuned_parameters(self, part: str) -> list[str]:
        names = [name for name, _ in self.named_parameters()]
        return names if part == "all" else [name for name in names if name.startswith("up")]

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        low = self.down(image)
        attended = self.norm(self.attention(low.movedim(1, -1)))
        return self.up(low) + attended.mean()


def image() -> torch.Tensor:
    return torch.randn((1, 4, 5, 6, 7), generator=torch.Generator().manual_seed(1))


def names_of(inside) -> set[str]:
    return {name.replace(".parametrizations.weight.0", "") for name in inside.prepare(Layers())}


def with_updates(rank: int) -> Layers:
    """LoRA with factors that are no longer those of the start."""
    backbone = Layers()
    for factor in LoRA(rank).prepare(backbone).values():
        factor.data.normal_(generator=torch.Generator().manual_seed(factor.numel()))
    return backbone


@pytest.mark.parametrize("rank", [1, 4])
def test_an_update_has_its_rank_and_starts_at_zero(rank):
    plain, updated = Layers(), Layers()
    LoRA(rank).prepare(updated)
    assert torch.equal(plain(image()), updated(image()))
    updated = with_updates(rank)
    for name in ("attention", "down", "up"):
        difference = getattr(updated, name).weight - getattr(plain, name).weight
        assert torch.linalg.matrix_rank(difference.flatten(1)) == rank
    assert not torch.allclose(plain(image()), updated(image()))


def test_merging_is_exact():
    updated, merged = with_updates(3), Layers()
    for name in ("attention", "down", "up"):
        getattr(merged, name).weight.copy_(getattr(updated, name).weight)
    assert torch.equal(merged(image()), updated(image()))


def test_what_each_method_trains():
    factors = {f"{name}.{factor}" for name in ("attention", "down", "up") for factor in "ab"}
    assert names_of(LoRA()) == factors
    assert names_of(LoRA(sites="linear")) == {"attention.a", "attention.b"}
    assert names_of(LoRA(sites="convolutions", decoder=True)) == {"down.a", "down.b", "up.weight", "up.bias"}
    assert names_of(Norms()) == {"norm.weight", "norm.bias"}
    assert names_of(Norms(decoder=True)) == {"norm.weight", "norm.bias", "up.weight", "up.bias"}
    assert names_of(Biases()) == {"attention.bias", "down.bias", "up.bias", "norm.bias"}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 7}, "option rank of LoRA is 7: make it a whole number from 1 to 6, the rank of the largest layer"),
        ({"rank": 0}, "is 0: make it a whole number"),
        ({"rank": "4"}, "is '4': make it a whole number"),
        ({"sites": "norms"}, "option sites of LoRA is 'norms': make it one of all, linear, convolutions"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(InputError, match=message):
        LoRA(**options).prepare(Layers())


def test_layers_smaller_than_the_rank_stay_as_they_are():
    """The transposed convolution holds 6 x 32 numbers, the other layers 9 x 6 and 6 x 54."""
    backbone = Layers()
    backbone.up = nn.ConvTranspose3d(6, 1, 1).requires_grad_(False)
    assert {name.split(".")[0] for name in LoRA(2).prepare(backbone)} == {"attention", "down"}


def test_options_in_the_plans():
    assert inside_of(METHODS["lora"], {"rank": 8, "decoder": True}) == LoRA(8, decoder=True)
    with pytest.raises(InputError, match="hold .'ranks'.: known are rank, sites, decoder"):
        inside_of(METHODS["lora"], {"ranks": 8})


@pytest.mark.parametrize("stages", ["last", "all"])
def test_the_embedded_backbone_takes_them(stages):
    """Every convolution, each once, though nnU-Net's modules hold them under several names."""
    frozen, tuned = FrozenBackbone("phantom", stages), TunedBackbone("phantom", stages, None, LoRA())
    convolutions = [m for m in frozen.module.modules() if isinstance(m, (nn.Conv3d, nn.ConvTranspose3d))]
    heads = len(frozen.module.tuned_parameters("all")) and sum(c.kernel_size == (1, 1, 1) for c in convolutions)
    assert len([*tuned.parameters()]) == 2 * (len(convolutions) - heads)
    window = torch.rand((1, 1, 16, 16, 16), generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(frozen(window), tuned(window)))


@pytest.mark.parametrize("sites, layers", [("linear", 8 * 4 + 4), ("all", None)])
def test_swin_unetr_takes_them(tmp_path, monkeypatch, sites, layers):
    """Query, key and value, projection and the two layers behind them of eight blocks, and four mergings."""
    pytest.importorskip("monai", reason="Swin UNETR needs MONAI: pip install fsefs_nnunet[monai]")
    from test_swin_unetr import narrow_contract

    monkeypatch.setenv("fseft_backbones", str(tmp_path))
    torch.manual_seed(0)
    contract = replace(narrow_contract("fseft"), id="narrow")
    save_backbone(contract, build_architecture(contract, "last").backbone_state(), tmp_path)
    frozen, tuned = FrozenBackbone("narrow", "last"), TunedBackbone("narrow", "last", None, LoRA(sites=sites))
    factors = [*tuned.named_parameters()]
    assert layers is None or len(factors) == 2 * layers
    assert len(factors) == len({id(factor) for _, factor in factors})
    window = torch.rand((1, 1, 64, 32, 32), generator=torch.Generator().manual_seed(0))
    features = tuned(window)[0]
    torch.testing.assert_close(features.detach(), frozen(window)[0], rtol=1e-4, atol=1e-4)
    features.square().mean().backward()
    assert all(factor.grad.abs().sum() > 0 for name, factor in factors if name.endswith(".b"))
