"""The one place that runs a network over the windows of a volume."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from torch import nn

from fsefs_nnunet.device import reduced_precision
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.features.memory import blending_device
from fsefs_nnunet.features.tiling import Tiling

LARGEST_BATCH = 8  # windows
SHARE_OF_FREE_MEMORY = 0.6  # of a GPU's, for the activations of a batch


@dataclass(frozen=True)
class Slab:
    """Finished planes of a volume's maps.

    first, stop: padded voxels along the first axis.
    maps: (C, (stop - first) / stride, Y / stride, Z / stride) float32 each, valid until the next slab is requested.
    """

    first: int
    stop: int
    maps: list[torch.Tensor]


@torch.no_grad()
def run_windows(network: nn.Module, image: torch.Tensor, tiling: Tiling, device: torch.device) -> Iterator[Slab]:
    """Run a network over a volume in slabs along its first axis; the length of that axis does not affect memory.

    Windows are weighted by nnU-Net's Gaussian and blended in float32, each map at its own resolution, on the device
    unless it is too small for a slab. The network runs in reduced precision, on CUDA as in nnU-Net's predictor; a batch
    that overflows float16 runs again in float32.

    Args:
        network: returns the maps that `tiling.maps` describes.
        image: preprocessed, (channels, X, Y, Z), on the CPU.

    Raises:
        InputError: if a map holds NaN or infinite values, or the GPU runs out of memory.
    """
    batch = _Batches(network, image, tiling, device)
    if tiling.num_windows == 1:  # nothing to blend
        ((_, maps),) = batch.from_plane(0)
        yield _checked(Slab(0, tiling.padded[0], [m[0].float() for m in maps]))
        return
    blending = _Blending(tiling, blending_device(tiling, device))
    for place, first in enumerate(tiling.starts[0]):
        last = place + 1 == len(tiling.starts[0])
        for starts, maps in batch.from_plane(first):
            blending.add(starts, maps)
        yield _checked(blending.finished(tiling.padded[0] if last else tiling.starts[0][place + 1]))


class _Batches:
    """Windows through the network, several at once where a GPU has the memory."""

    def __init__(self, network: nn.Module, image: torch.Tensor, tiling: Tiling, device: torch.device):
        self.network, self.image, self.tiling, self.device = network, image, tiling, device
        self.size = 1  # until the first window has shown how much memory it takes

    def from_plane(self, first: int) -> Iterator[tuple[list[tuple[int, ...]], list[torch.Tensor]]]:
        """First voxels and maps (B, C, x, y, z) of the windows that start at `first`, batch by batch."""
        starts = self.tiling.windows_from(first)
        while starts:
            now, starts = starts[: self.size], starts[self.size :]
            try:
                maps = self._run(now)
            except torch.OutOfMemoryError as error:
                if len(now) == 1:
                    size = " x ".join(map(str, self.tiling.window))
                    raise InputError(
                        f"a window of {size} voxels takes more memory than the GPU has left: stop other programs on "
                        "it, choose a smaller backbone, or add -device cpu."
                    ) from error
                self.size, starts = len(now) // 2, now + starts
                torch.cuda.empty_cache()
                continue
            yield now, maps

    def _run(self, starts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        windows = torch.stack([self.tiling.image_window(self.image, start) for start in starts])
        if self.device.type != "cuda":
            return self._forward(windows.to(self.device))
        learning = self.size == 1
        if learning:
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
        windows = windows.pin_memory().to(self.device, non_blocking=True)
        maps = self._forward(windows)
        if not _finite(maps):
            maps = self.network(windows)
        if learning:
            taken = max(torch.cuda.max_memory_allocated(self.device) - before, 1)
            free = torch.cuda.mem_get_info(self.device)[0]
            self.size = max(1, min(LARGEST_BATCH, int(SHARE_OF_FREE_MEMORY * free / taken)))
        return maps

    def _forward(self, windows: torch.Tensor) -> list[torch.Tensor]:
        with reduced_precision(self.device):
            return self.network(windows)


def _checked(slab: Slab) -> Slab:
    if not _finite(slab.maps):
        raise InputError(
            "the backbone returns NaN or infinite values for this image, which holds none: its weights may be damaged "
            "(`fseft backbones verify` checks them), or the image is far from what it was trained on."
        )
    return slab


def _finite(maps: Sequence[torch.Tensor]) -> bool:
    # a sum is finite unless one of its terms is not, or terms are so large that it overflows
    return bool(torch.stack([m.float().sum() for m in maps]).isfinite().all())


class _Blending:
    """Weighted sums of windows, over as many planes as a window is long."""

    def __init__(self, tiling: Tiling, device: torch.device):
        self.tiling, self.device = tiling, device
        self.first = 0
        self.gaussians = [_gaussian(tiling.window, m.stride, str(device)) for m in tiling.maps]
        shapes = [(m.channels, tiling.window[0] // m.stride[0], *tiling.grid(i)[1:]) for i, m in enumerate(tiling.maps)]
        self.sums = [torch.zeros(shape, device=device) for shape in shapes]
        self.weights = [torch.zeros(shape[1:], device=device) for shape in shapes]

    def add(self, starts: Sequence[Sequence[int]], maps: Sequence[torch.Tensor]) -> None:
        for index, feature_map in enumerate(maps):
            gaussian = self.gaussians[index]
            for window, start in zip(feature_map.to(self.device), starts):
                first = (0, *start[1:])
                stride = self.tiling.maps[index].stride
                at = tuple(slice(f // s, f // s + n) for f, s, n in zip(first, stride, gaussian.shape))
                self.sums[index][(slice(None), *at)].addcmul_(window.float(), gaussian)
                self.weights[index][at] += gaussian

    def finished(self, stop: int) -> Slab:
        """The planes from the end of the last slab to padded voxel `stop`, which no later window touches."""
        length, done = stop - self.first, []
        for index, feature_map in enumerate(self.tiling.maps):
            planes = length // feature_map.stride[0]
            sums, weights = self.sums[index], self.weights[index]
            done.append(sums[:, :planes] / weights[:planes])
            for array in (sums, weights[None]):
                kept = array[:, planes:]
                # an overlapping move needs a copy
                array[:, : kept.shape[1]] = kept if kept.shape[1] <= planes else kept.clone()
                array[:, kept.shape[1] :] = 0
        slab = Slab(self.first, stop, done)
        self.first = stop
        return slab


@lru_cache(maxsize=16)
def _gaussian(window: tuple[int, ...], stride: tuple[int, ...], device: str) -> torch.Tensor:
    """nnU-Net's weights of a window's voxels, averaged to the resolution of a map."""
    weights = compute_gaussian(window, 1 / 8, 10, dtype=torch.float32, device=torch.device("cpu"))
    return torch.nn.functional.avg_pool3d(weights[None, None], stride)[0, 0].to(device)
