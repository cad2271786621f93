"""Training batches from the feature bank: crops of support cases, drawn from (seed, epoch, step) alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from batchgeneratorsv2.transforms.utils.seg_to_regions import ConvertSegmentationToRegionsTransform

from fsefs_nnunet.cases.shown_voxels import ShownVoxels, annotated_in, foreground_of
from fsefs_nnunet.features.bank import FeatureBank
from fsefs_nnunet.features.map_crops import MapCrops

BATCHES_AHEAD = 3


class CropLoader:
    """Iterates over batches like nnU-Net's data loaders: 'data', 'target' and 'keys'.

    'data' are crops of the maps, 'target' (B, 1, X, Y, Z) is the label map, or what `transform` makes of it.
    A resumed training draws the same crops as an uninterrupted one: call `start_epoch` before each epoch.
    Half of the crops are centred on a random foreground voxel, if there is one (foreground : background 1 : 1, as
    published). The others lie anywhere, or, if the bank keeps only parts of the volume, in one of the background
    blocks. With an ignore label they are centred on an annotated voxel.
    """

    def __init__(
        self,
        bank: FeatureBank,
        segmentations: dict[str, np.ndarray],
        crop_size: tuple[int, ...],
        batch_size: int,
        seed: tuple[int, ...],
        transform: Callable | None = None,
        ignore_label: int | None = None,
        device: torch.device = torch.device("cpu"),
    ):
        """
        Args:
            segmentations: label map (1, X, Y, Z) of each support case; voxels of -1 lie outside of the image.
            device: where the targets are cut, that of the bank's entries.
        """
        self.bank = bank
        self.cases = sorted(segmentations)
        self.labels = {case: torch.from_numpy(seg).to(device) for case, seg in segmentations.items()}
        shown, annotated = (partial(f, ignore_label=ignore_label) for f in (foreground_of, annotated_in))
        self.foreground = {case: ShownVoxels(seg[0], shown) for case, seg in segmentations.items()}
        self.annotated = {
            case: [] if ignore_label is None else ShownVoxels(seg[0], annotated) for case, seg in segmentations.items()
        }
        shapes = np.array([seg.shape[1:] for seg in segmentations.values()])
        # crops of a batch share a shape: no axis is longer than the smallest support volume
        self.crop_size = np.minimum(crop_size, shapes.min(0))
        self.batch_size = batch_size
        self.seed = seed
        self.transform = transform
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        self.epoch, self.step = epoch, 0

    def __iter__(self):
        return self

    def __next__(self) -> dict:
        rng = np.random.default_rng((*self.seed, self.epoch, self.step))
        self.step += 1
        # without replacement while the support lasts, so that few shots are seen equally often
        order = np.concatenate(
            [rng.permutation(len(self.cases)) for _ in range(-(-self.batch_size // len(self.cases)))]
        )
        keys = [self.cases[i] for i in order[: self.batch_size]]
        first = (self.step - 1) * self.batch_size
        data, target = zip(*(self._crop(rng, case, (first + b) % 2 == 0) for b, case in enumerate(keys)))
        return {"data": MapCrops.join(data), "target": torch.stack(target), "keys": keys}

    def _crop(self, rng: np.random.Generator, case: str, on_foreground: bool) -> tuple[MapCrops, torch.Tensor]:
        labels, foreground, annotated, entry = (
            kept[case] for kept in (self.labels, self.foreground, self.annotated, self.bank)
        )
        blocks = entry.layout.boxes[1:]  # the first box lies around foreground
        if on_foreground and len(foreground):
            start = self._around(rng, foreground, labels.shape[1:])
        elif len(annotated) and not blocks:
            start = self._around(rng, annotated, labels.shape[1:])
        else:
            blocks = blocks or entry.layout.boxes
            first, end = blocks[rng.integers(len(blocks))]
            start = rng.integers(first, end - self.crop_size + 1)
        box = (slice(None), *(slice(a, a + n) for a, n in zip(start, self.crop_size)))
        target = labels[box].clamp(min=0).to(torch.int16)
        if self.transform is not None:
            target = self.transform(**{"segmentation": target})["segmentation"]
        return entry.crop(start, self.crop_size.tolist()), target

    def _around(self, rng: np.random.Generator, voxels: ShownVoxels, shape: tuple[int, ...]) -> np.ndarray:
        """First voxel of a crop of a volume (X, Y, Z), around one of `voxels`."""
        centre = voxels[rng.integers(len(voxels))]
        return np.clip(centre - self.crop_size // 2, 0, np.array(shape) - self.crop_size)


class CropsAhead:
    """The batches of a CropLoader, made on a thread of their own while the device computes, in pinned memory.

    For features that do not fit into the device's memory: reading and cutting them takes longer than a step.
    """

    def __init__(self, loader: CropLoader, steps: int):
        """steps: batches of an epoch."""
        self.loader, self.steps = loader, steps
        self.thread, self.waiting = ThreadPoolExecutor(1), deque()
        self.start_epoch(0)

    @property
    def crop_size(self) -> np.ndarray:
        return self.loader.crop_size

    def start_epoch(self, epoch: int) -> None:
        for batch in self.waiting:  # of an epoch that ended early
            if not batch.cancel():
                batch.exception()
        self.loader.start_epoch(epoch)
        self.waiting, self.step = deque(), 0
        self._make_more()

    def _make_more(self) -> None:
        while len(self.waiting) < BATCHES_AHEAD and self.step + len(self.waiting) < self.steps:
            self.waiting.append(self.thread.submit(self._make))

    def __iter__(self):
        return self

    def __next__(self) -> dict:
        batch = self.waiting.popleft()
        self.step += 1
        self._make_more()
        return batch.result()

    def _make(self) -> dict:
        batch = next(self.loader)
        if not torch.cuda.is_available():
            return batch
        return {**batch, "data": batch["data"].pin_memory(), "target": batch["target"].pin_memory()}

    def close(self) -> None:
        """End the thread, and let go of what is waiting."""
        self.thread.shutdown(cancel_futures=True)
        self.waiting.clear()


def region_transform(label_manager, device: torch.device = torch.device("cpu")) -> Callable | None:
    """Transform of a label map to one channel per region, and one of ignored voxels; None for plain labels.

    device: where the label maps lie.
    """
    if not label_manager.has_regions:
        return None
    ignored = [label_manager.ignore_label] if label_manager.has_ignore_label else []
    transform = ConvertSegmentationToRegionsTransform([*label_manager.foreground_regions, *ignored])
    transform.regions = [labels.to(device) for labels in transform.regions]
    return transform
