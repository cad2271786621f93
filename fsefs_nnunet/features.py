"""FeatureBank: the frozen backbone runs once over each volume; every fold, shot, seed and adapter reads the result."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.inference.sliding_window_prediction import compute_gaussian, compute_steps_for_sliding_window
from tqdm import tqdm

from fsefs_nnunet.backbones.frozen import FrozenBackbone

TILE_STEP_SIZE = 0.5


@torch.no_grad()
def extract_features(
    backbone: FrozenBackbone, image: torch.Tensor, patch_size: tuple[int, ...], device: torch.device
) -> torch.Tensor:
    """Features of a whole volume: windows as nnU-Net's predictor places and weighs them, one at a time.

    The predictor blends logits, this blends features; for a linear probe that is the same.

    Args:
        image: preprocessed, (channels, X, Y, Z).

    Returns:
        (C, X, Y, Z) float32 on the CPU.
    """
    padded, revert = pad_nd_image(image, patch_size, "constant", {"value": 0}, True, None)
    steps = compute_steps_for_sliding_window(padded.shape[1:], patch_size, TILE_STEP_SIZE)
    gaussian = compute_gaussian(
        tuple(patch_size), sigma_scale=1.0 / 8, value_scaling_factor=10, device=torch.device("cpu")
    )
    gaussian = gaussian.float()
    features = torch.zeros((backbone.out_channels, *padded.shape[1:]))
    weight = torch.zeros(padded.shape[1:])
    for x in steps[0]:
        for y in steps[1]:
            for z in steps[2]:
                window = tuple(slice(a, a + n) for a, n in zip((x, y, z), patch_size))
                result = backbone(padded[(slice(None), *window)][None].to(device))[0].float().cpu()
                features[(slice(None), *window)] += result * gaussian
                weight[window] += gaussian
    features /= weight
    return features[(slice(None), *revert[1:])]


class FeatureBank:
    """fp16 features on disk, `<case>.npy` (C, X, Y, Z) with a `<case>.json`, memory-mapped on reading.

    The folder's name carries the hash of everything that the features depend on but the image; the JSON, written
    last, carries the image's own hash and the file's. An entry that does not verify is computed again.
    """

    def __init__(
        self, root: Path, backbone: FrozenBackbone, stages: str, patch_size: tuple[int, ...], device: torch.device
    ):
        self.backbone = backbone
        self.patch_size = tuple(int(n) for n in patch_size)
        self.device = device
        recipe = {
            "backbone": backbone.contract.sha256,
            "stages": stages,
            "patch_size": self.patch_size,
            "tile_step_size": TILE_STEP_SIZE,
        }
        key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
        self.folder = Path(root) / f"{backbone.contract.id}_{key}"

    def fill(
        self, cases: Iterable[str], load_image: Callable[[str], np.ndarray], log: Callable[[str], None] = print
    ) -> int:
        """Compute the missing entries of `cases`; returns how many. `load_image` gives (channels, X, Y, Z)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        missing = []
        for case in cases:
            image = np.ascontiguousarray(load_image(case), dtype=np.float32)
            if not np.isfinite(image).all():
                raise ValueError(
                    f"The preprocessed image of {case} holds NaN or infinite values: repair the raw image."
                )
            digest = hashlib.sha256(image.tobytes()).hexdigest()
            if not self._valid(case, digest):
                missing.append((case, digest))
        if missing:
            log(f"Feature bank {self.folder}: {len(missing)} volumes to go through the frozen backbone, once.")
        for case, digest in tqdm(missing, desc="feature bank", disable=not missing):
            image = torch.from_numpy(np.ascontiguousarray(load_image(case), dtype=np.float32))
            self._write(case, digest, extract_features(self.backbone, image, self.patch_size, self.device))
        return len(missing)

    def _write(self, case: str, image_sha256: str, features: torch.Tensor) -> None:
        array = features.numpy().astype(np.float16)
        # own names per process: two folds may compute the same entry, the last rename wins and both are whole
        part = self.folder / f"{case}.{os.getpid()}.part"
        with open(part, "wb") as f:
            np.save(f, array)
        content = {
            "image_sha256": image_sha256,
            "features_sha256": hashlib.sha256(array.tobytes()).hexdigest(),
            # per channel, summed over the volume; of what is stored, so that readers agree with it
            "sum": array.sum((1, 2, 3), dtype=np.float64).tolist(),
            "square_sum": np.square(array, dtype=np.float64).sum((1, 2, 3)).tolist(),
            "voxels": int(np.prod(array.shape[1:])),
        }
        os.replace(part, self.folder / f"{case}.npy")
        part.write_text(json.dumps(content))
        os.replace(part, self.folder / f"{case}.json")

    def _valid(self, case: str, image_sha256: str) -> bool:
        try:
            content = self.info(case)
            return (
                content["image_sha256"] == image_sha256
                and hashlib.sha256(self[case].tobytes()).hexdigest() == content["features_sha256"]
            )
        except (OSError, EOFError, ValueError, KeyError, TypeError):
            return False

    def info(self, case: str) -> dict:
        return json.loads((self.folder / f"{case}.json").read_text())

    def __getitem__(self, case: str) -> np.ndarray:
        """Features (C, X, Y, Z) float16, memory-mapped."""
        return np.load(self.folder / f"{case}.npy", mmap_mode="r")

    def statistics(self, cases: Iterable[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of each channel (C,) over all voxels of `cases`."""
        infos = [self.info(case) for case in cases]
        voxels = sum(i["voxels"] for i in infos)
        mean = np.sum([i["sum"] for i in infos], 0) / voxels
        std = np.sqrt(np.maximum(np.sum([i["square_sum"] for i in infos], 0) / voxels - mean**2, 0))
        # a channel that is dead on these images stays at its mean
        std = np.where(std > 1e-3 * max(std.max(), 1e-6), std, 1.0)
        return torch.tensor(mean, dtype=torch.float32), torch.tensor(std, dtype=torch.float32)
