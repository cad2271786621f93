"""AdaptedNetwork: frozen backbone -> standardisation -> 1^3 reduction -> adapter -> head."""

from __future__ import annotations

from dataclasses import fields
from pydoc import locate
from typing import TYPE_CHECKING

import torch
from torch import nn

from fsefs_nnunet.backbones.frozen import WITH_IMAGE, FrozenBackbone
from fsefs_nnunet.backbones.maps import FeatureMap
from fsefs_nnunet.device import unless_thin
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.features.map_crops import MapCrops, upsampled
from fsefs_nnunet.labels import foreground_names, match_labels
from fsefs_nnunet.methods.adapters import build_adapter, takes_own_strides
from fsefs_nnunet.methods.inside.protocol import Inside
from fsefs_nnunet.methods.inside.tuned_backbone import TunedBackbone
from fsefs_nnunet.methods.registry import BANK, METHODS, Method

if TYPE_CHECKING:
    from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager


UNCHANGED_UP_TO = 300.0  # see summable


class AdaptedNetwork(nn.Module):
    """What nnU-Net trains and predicts with in the K-shot configurations.

    Its parameters and its state_dict are those of reduction, adapter, head and the tuned part of the backbone, if any;
    the backbone is found by id and verified by SHA-256. The mean and standard deviation of the features over the
    support cases are buffers.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        backbone: str,
        sha256: str,
        adapter: str,
        stages: str,
        channels: int | None,
        seed: int,
        inside: Inside | None = None,
        deep_supervision: bool | None = None,
        z_scores_as_hu: dict | None = None,
    ):
        """nnU-Net passes input_channels, num_classes and deep_supervision (there is none), the method passes inside,
        and the plans the rest.

        Args:
            channels: width of the adapter; features of another width are reduced to it by a 1^3 convolution. None: as
                many as the features have.
            inside: what is trained in the backbone, too.
            z_scores_as_hu: see FrozenBackbone.
        """
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # for layers that a method adds inside
            images = {"channels": input_channels, "z_scores_as_hu": z_scores_as_hu}
            self.backbone = (
                FrozenBackbone(backbone, stages, sha256, **images)
                if inside is None
                else TunedBackbone(backbone, stages, sha256, inside, **images)
            )
        features = self.backbone.out_channels
        channels = channels or features
        self.register_buffer("feature_mean", torch.zeros(features))
        self.register_buffer("feature_std", torch.ones(features))
        self.register_buffer("is_fitted", torch.tensor(False))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.reduction = nn.Identity() if features == channels else nn.Conv3d(features, channels, 1, bias=False)
            self.adapter = build_adapter(adapter, channels, self.backbone.maps)
            self.head = nn.Conv3d(self.adapter.out_channels if self.own_strides else channels, num_classes, 1)
        self._pass_leading_channels()

    @property
    def own_strides(self) -> bool:
        """Whether the adapter takes the maps as they are, not together at full resolution."""
        return getattr(self.adapter, "own_strides", False)

    @property
    def head_channels(self) -> int:
        """Width of the universal head's input, 0 if the backbone has none that could start another."""
        starts = self.backbone.contract.linear_head and not self.own_strides
        return self.backbone.head.weight.shape[1] if starts else 0

    @torch.no_grad()
    def _pass_leading_channels(self) -> None:
        # the universal head's channels pass the reduction unchanged, so that step 0 can be the zero-shot prediction
        if isinstance(self.reduction, nn.Conv3d) and self.head_channels:
            weight, n = self.reduction.weight, self.head_channels
            if weight.shape[0] < n:
                raise InputError(f"channels must be at least {n}, the width of the backbone's last stage.")
            weight[:n] = 0
            weight[range(n), range(n)] = 1

    @torch.no_grad()
    def fit(self, mean: torch.Tensor, std: torch.Tensor, labels: dict, has_regions: bool) -> dict[str, str]:
        """Take the support features' statistics (C,) and start the head's known rows from the universal head.

        A row that the backbone knows by name predicts exactly what the universal head does; for softmax outputs the
        background row is zero. Other rows stay fresh.

        Returns:
            The dataset's class names that were matched, with the backbone's names.
        """
        self.feature_mean.copy_(mean)
        self.feature_std.copy_(std)
        self.is_fitted.fill_(True)
        names = foreground_names(labels, has_regions)
        # rows for CT say nothing about the z-scores of another modality
        starts = self.head_channels and not self.backbone.z_scores_as_hu
        matches = match_labels(names, self.backbone.contract.classes) if starts else {}
        if not matches:
            return {}
        n, universal = self.head_channels, self.backbone.head
        weight, bias = universal.weight.flatten(1), universal.bias
        if self.backbone.contract.softmax:
            weight, bias = weight - weight[:1], bias - bias[:1]
        if not has_regions:
            self.head.weight[0], self.head.bias[0] = 0, 0
        for name, known in matches.items():
            row = names.index(name) + (0 if has_regions else 1)
            k = self.backbone.contract.classes.index(known)
            self.head.weight[row] = 0
            self.head.weight[row, :n, 0, 0, 0] = weight[k] * std[:n].to(weight)
            self.head.bias[row] = bias[k] + (weight[k] * mean[:n].to(weight)).sum()
        return matches

    def known_but_fresh(self, labels: dict, has_regions: bool) -> list[str]:
        """Classes of the dataset that the universal head knows without a row that could start the new head."""
        contract = self.backbone.contract
        if contract.linear_head or not contract.head_classes:
            return []
        return list(match_labels(foreground_names(labels, has_regions), contract.head_classes))

    # In the state_dict's metadata, the SHA-256 adds no entry, and checkpoints without it still load. nnUNetv2_predict
    # builds the network from the model folder's plans, which a later training on another backbone replaces.

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]]["backbone_sha256"] = self.backbone.contract.sha256

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        contract = self.backbone.contract
        trained_on = local_metadata.get("backbone_sha256", contract.sha256)
        if trained_on != contract.sha256:
            raise InputError(
                f"The checkpoint was trained on a backbone of SHA-256 {trained_on[:12]}, but the model's plans.json "
                f"names {contract.id!r} of {contract.sha256[:12]}: restore plans and backbone, or train again."
            )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Image (B, input_channels, X, Y, Z) -> logits (B, num_classes, X, Y, Z)."""
        return summable(self.adapt(MapCrops.whole(self.backbone(x), x.shape[2:])))

    def adapt(self, features: torch.Tensor | MapCrops, kept: torch.Tensor | None = None) -> torch.Tensor:
        """Features (B, C, X, Y, Z), or crops of maps -> logits (B, num_classes, X, Y, Z), float32.

        kept: (B, C), 1 for a channel that is kept, 0 for one that is replaced by its mean; None: all are kept.
        """
        with unless_thin(features):
            return self.finish(self.reduce(features, kept))

    @property
    def reduces(self) -> bool:
        return not isinstance(self.reduction, nn.Identity)

    def reduce(self, features: torch.Tensor | MapCrops, kept: torch.Tensor | None = None) -> MapCrops:
        """Standardise and reduce; both are affine, so blending and upsampling may come after them.

        Returns:
            With a reduction, one map for each resolution; their sum at full resolution is the adapter's input.
            Without one, the standardised maps.
        """
        crops = features if isinstance(features, MapCrops) else MapCrops((features,), (0,), (None,))
        mean, scale = self.feature_mean, 1 / self.feature_std
        if kept is not None:
            scale = scale * kept
        kind, maps = crops.device.type, crops.maps
        if self.reduces or not torch.is_autocast_enabled(kind):
            reduced = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else mean.dtype
            maps = [m.to(reduced) for m in maps]
        widths = [m.shape[1] for m in maps]
        if not self.reduces:
            scales, shifts = (v.split(widths, -1) for v in (scale, -mean * scale))
            shape = (-1, 1, 1, 1)
            made = [
                torch.addcmul(shift.unflatten(-1, shape), m, s.unflatten(-1, shape))
                for m, s, shift in zip(maps, scales, shifts)
            ]
            return MapCrops(tuple(made), crops.resolutions, crops.weights)
        # standardisation is part of the reduction: a separate pass over all features takes a tenth of a step
        weight = self.reduction.weight.flatten(1) * scale.unsqueeze(-2)
        bias = -(weight @ mean)
        weights = weight.split(widths, -1)
        made = []
        for resolution in range(len(crops.weights)):
            of_resolution = [i for i, r in enumerate(crops.resolutions) if r == resolution]
            together = torch.cat([maps[i] for i in of_resolution], 1)
            columns = torch.cat([weights[i] for i in of_resolution], -1)
            made.append(_pointwise(together, columns, bias if resolution == 0 else torch.zeros_like(bias)))
        return MapCrops(tuple(made), tuple(range(len(made))), crops.weights)

    def finish(self, reduced: MapCrops) -> torch.Tensor:
        """The result of `reduce` -> logits (B, num_classes, X, Y, Z), float32."""
        if self.reduces:
            full = None
            for m, w in zip(reduced.maps, reduced.weights):
                full = upsampled(m, w) if full is None else full + upsampled(m, w)
        elif not self.own_strides:
            full = reduced.at_full_resolution()
        with unless_thin(reduced):
            if self.own_strides:
                adapted = self.adapter(reduced.maps)
            else:
                full = full if torch.is_autocast_enabled(full.device.type) else full.to(self.head.weight)
                adapted = self.adapter(full)
        with torch.autocast(adapted.device.type, enabled=False):  # rounded logits would tie
            return _pointwise(adapted.to(self.head.weight), self.head.weight.flatten(1), self.head.bias)


class ReducedBackbone(nn.Module):
    """A network's backbone and reduction: reduced maps can be blended instead of the much wider features."""

    def __init__(self, network: AdaptedNetwork):
        super().__init__()
        self.network = network
        strides = list(dict.fromkeys(m.stride for m in network.backbone.maps))
        self.maps = [FeatureMap(network.reduction.out_channels, stride) for stride in strides]

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """image (B, input_channels, X, Y, Z) -> `maps`."""
        return [*self.network.reduce(MapCrops.whole(self.network.backbone(image), image.shape[2:])).maps]


def build_network(
    method: Method, configuration: ConfigurationManager, input_channels: int, output_channels: int
) -> AdaptedNetwork:
    """The network of a method in a K-shot configuration of the plans.

    Raises:
        InputError: for `arch_kwargs` that nothing uses, and as AdaptedNetwork does.
    """
    kwargs = {**configuration.network_arch_init_kwargs}
    known = ("backbone", "sha256", "adapter", "stages", "channels", "seed", "options", "z_scores_as_hu")
    if unknown := sorted(kwargs.keys() - set(known)):
        raise InputError(f"arch_kwargs in the plans hold {unknown}, which nothing uses: known are {', '.join(known)}.")
    options = kwargs.pop("options", {})
    if unknown := sorted(options.keys() - METHODS.keys()):
        raise InputError(f"The options in the plans' arch_kwargs name {unknown}: methods are {', '.join(METHODS)}.")
    image = WITH_IMAGE if kwargs["stages"].endswith(WITH_IMAGE) else ""
    maps = method.maps and method.maps + image
    kwargs |= {key: value for key, value in (("adapter", method.adapter), ("stages", maps)) if value}
    if takes_own_strides(kwargs["adapter"]):
        if method.learns_from == BANK:
            raise InputError(
                f"The adapter {kwargs['adapter']!r} of the plans needs whole windows, but {method.trainer} trains on "
                "crops: choose another one."
            )
        kwargs["stages"] = kwargs["stages"].removesuffix(WITH_IMAGE) + WITH_IMAGE
    if kwargs["adapter"] == "linear_probe" or takes_own_strides(kwargs["adapter"]):
        kwargs["channels"] = None
    return AdaptedNetwork(
        input_channels, output_channels, **kwargs, inside=inside_of(method, options.get(method.name, {}))
    )


def _class_of(method: Method) -> type[Inside]:
    cls = locate(method.inside)
    if cls is None:
        raise InputError(f"Method {method.name!r} names the class {method.inside}, which cannot be imported.")
    return cls


def trains_decoder(method: Method) -> bool:
    """Whether it serves a backbone whose decoder was never trained."""
    return bool(method.inside) and getattr(_class_of(method), "trains_decoder", False)


def inside_of(method: Method, options: dict) -> Inside | None:
    """What `method` trains in the backbone, with the plans' `options`. Raises InputError for unknown ones."""
    cls = _class_of(method) if method.inside else None
    known = [f.name for f in fields(cls)] if cls else []
    if unknown := sorted(options.keys() - set(known)):
        raise InputError(
            f"The options of {method.name!r} in the plans' arch_kwargs hold {unknown}: known are "
            f"{', '.join(known) or 'none'}."
        )
    return cls(**options) if cls else None


def summable(logits: torch.Tensor) -> torch.Tensor:
    """Logits of any shape, made small enough for nnU-Net's sliding window, which sums them in float16.

    It weights them by up to ten, and refuses sums beyond float16's 65,504. An adapter's logits have no bound: where the
    loss is zero anyway they reach thousands. Beyond UNCHANGED_UP_TO they grow with the logarithm, which keeps their
    signs and the order of the classes.
    """
    size = logits.abs()
    compressed = UNCHANGED_UP_TO * (1 + torch.log(size.clamp(min=UNCHANGED_UP_TO) / UNCHANGED_UP_TO))
    return torch.where(size > UNCHANGED_UP_TO, logits.sign() * compressed, logits)


def _pointwise(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """1^3 convolution of x (B, C, X, Y, Z) by weight (K, C) and bias (K,) -> (B, K, X, Y, Z), contiguous.

    Both may have an axis B in front, for a convolution of each. As a product of matrices: oneDNN reorders the input of
    a convolution, which takes longer than the convolution.
    """
    product = torch.baddbmm(bias.unsqueeze(-1), weight.expand(len(x), -1, -1), x.flatten(2))
    return product.unflatten(2, x.shape[2:])
