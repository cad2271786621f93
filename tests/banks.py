"""Small feature banks, and features of whole volumes."""

from functools import partial
from pathlib import Path

import numpy as np
import torch

from fsefs_nnunet.backbones.maps import FeatureMap
from fsefs_nnunet.cases.preprocessed import hash_of
from fsefs_nnunet.features.bank import FeatureBank, Request
from fsefs_nnunet.features.layout import whole_layout
from fsefs_nnunet.features.map_crops import MapCrops, crop_of
from fsefs_nnunet.features.tiling import Tiling
from fsefs_nnunet.features.windows import run_windows

CPU = torch.device("cpu")
WINDOW = (16, 16, 16)


def make_images(folder: Path, cases="ab") -> dict[str, Path]:
    """Files of images (1, 16, 16, 20), by case."""
    rng = np.random.default_rng(0)
    for case in cases:
        np.save(folder / f"{case}.npy", rng.uniform(0, 1, (1, 16, 16, 20)).astype(np.float32))
    return {case: folder / f"{case}.npy" for case in cases}


def request_of(case: str, file: Path, layout=None, **others) -> Request:
    """A request for the image in `file`, by default the whole volume."""
    image = partial(np.load, file)
    shape = np.load(file, mmap_mode="r").shape[1:]
    return Request(case, [file], lambda: hash_of(image()), image, layout or whole_layout(shape), **others)


def requests(images: dict[str, Path], cases=None, layout=None) -> list[Request]:
    """Requests for `cases`, by default all of `images`, with their statistics."""
    return [request_of(case, images[case], layout, statistics=True) for case in cases or images]


def make_bank(root, backbone) -> FeatureBank:
    return FeatureBank(root, backbone, "last", WINDOW, CPU)


class Given(torch.nn.Module):
    """A backbone whose only map is the image."""

    def __init__(self, channels: int, contract):
        super().__init__()
        self.maps, self.contract, self.channels, self.z_scores_as_hu = [FeatureMap(channels)], contract, channels, {}

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        return [image]


def store(bank: FeatureBank, case: str, features: torch.Tensor, layout=None) -> None:
    """Put given features (C, X, Y, Z) into a bank, as if its backbone had computed them."""
    bank.root.mkdir(parents=True, exist_ok=True)
    np.save(bank.root / f"{case}.npy", features.numpy())
    bank.backbone = Given(len(features), bank.backbone.contract)
    bank.fill([request_of(case, bank.root / f"{case}.npy", layout, statistics=True)], log=lambda line: None)


def whole_maps(backbone: torch.nn.Module, image: torch.Tensor, window=WINDOW) -> tuple[Tiling, list[torch.Tensor]]:
    """The blended maps (C, x, y, z) of an image (channels, X, Y, Z)."""
    tiling = Tiling.of(image.shape[1:], window, backbone.maps)
    slabs = [[m.clone() for m in slab.maps] for slab in run_windows(backbone, image, tiling, CPU)]
    return tiling, [torch.cat(parts, 1) for parts in zip(*slabs)]


def whole_crop(maps: list[torch.Tensor], tiling: Tiling) -> MapCrops:
    """All of a volume in one crop."""
    regions = [[(0, n) for n in tiling.grid(i)] for i in range(len(maps))]
    return crop_of(maps, regions, tiling, (0, 0, 0), tiling.shape)


def full_features(backbone: torch.nn.Module, image: torch.Tensor, window=WINDOW) -> torch.Tensor:
    """Features (C, X, Y, Z) of an image (channels, X, Y, Z), all maps at full resolution."""
    tiling, maps = whole_maps(backbone, image, window)
    return whole_crop(maps, tiling).at_full_resolution()[0]
