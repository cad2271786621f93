"""FeatureBank: the frozen backbone runs once over each volume; every fold, shot, seed and adapter reads the result."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from filelock import FileLock
from tqdm import tqdm

from fsefs_nnunet.backbones.frozen import FrozenBackbone
from fsefs_nnunet.cases.preprocessed import require_finite
from fsefs_nnunet.features.disk import BANK_FOLDER, require_space, used_bytes
from fsefs_nnunet.features.layout import Layout
from fsefs_nnunet.features.windows import TILE_STEP_SIZE, extract_features, window_starts
from fsefs_nnunet.files import PART, gigabytes, refused_if_unwritable, replacing, write_atomically

if TYPE_CHECKING:
    from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

FORMAT = 2  # raise it when the entries change: older ones are left alone then


@dataclass(frozen=True)
class EntryKey:
    """Everything that an entry depends on: another image, label region or window is another entry."""

    recipe: dict
    case: str
    image_sha256: str
    layout: Layout

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def name(self) -> str:
        return f"{self.case}_{short_hash(self.to_json())}"


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Entry:
    """Stored features of a volume.

    boxes: one (C, x, y, z) float16 array for each box of `layout`, memory-mapped.
    sums, square_sums: (C,) over all voxels of the volume, the stored ones or not.
    """

    layout: Layout
    boxes: list[np.ndarray]
    sums: np.ndarray
    square_sums: np.ndarray

    def crop(self, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
        """Features (C, *size) float16 from voxel `start` of the volume on; IndexError if no box holds this crop."""
        start, stop = np.array(start), np.add(start, size)
        for (first, end), box in zip(self.layout.boxes, self.boxes):
            if (start >= first).all() and (stop <= end).all():
                return box[(slice(None), *map(slice, start - first, stop - first))]
        raise IndexError(f"The crop from {start.tolist()} to {stop.tolist()} is not stored.")


@dataclass(frozen=True)
class Request:
    """A volume whose features are needed.

    image: gives the preprocessed image (channels, X, Y, Z); a bank may ask for it twice.
    layout: what to keep of a volume of (X, Y, Z) voxels; called after `image`.
    """

    case: str
    image: Callable[[], np.ndarray]
    layout: Callable[[tuple[int, ...]], Layout]


class FeatureBank:
    """fp16 features on disk: for each entry a flat `<name>.npy` as its layout packs it, and a `<name>.json`.

    The names carry the hash of everything that the features depend on. The JSON, written last, says it in full and
    holds the hash of the features; an entry that does not verify is computed again, by one process at a time.
    """

    def __init__(
        self, root: Path, backbone: FrozenBackbone, stages: str, patch_size: Sequence[int], device: torch.device
    ):
        """root: the folder of all banks of a dataset. `windows` counts what has gone through the backbone."""
        self.root = Path(root)
        self.backbone = backbone
        self.patch_size = tuple(int(n) for n in patch_size)
        self.device = device
        self.recipe = {
            "format": FORMAT,
            "backbone": backbone.contract.sha256,
            "architecture": backbone.contract.architecture,
            "stages": stages,
            "patch_size": self.patch_size,
            "tile_step_size": TILE_STEP_SIZE,
        }
        self.folder = self.root / f"{backbone.contract.id}_{short_hash(json.dumps(self.recipe, sort_keys=True))}"
        self.windows = 0
        self._entries: dict[str, Entry] = {}

    @classmethod
    def of_configuration(
        cls, preprocessed: Path, backbone: FrozenBackbone, configuration: ConfigurationManager, device: torch.device
    ) -> FeatureBank:
        """The bank of a K-shot configuration in the preprocessed folder of its dataset."""
        return cls(preprocessed / BANK_FOLDER, backbone, backbone.stages, configuration.patch_size, device)

    def __getitem__(self, case: str) -> Entry:
        """The entry of a case that `fill` was called with."""
        return self._entries[case]

    def fill(
        self,
        requests: Iterable[Request],
        cap_gb: float | None = None,
        log: Callable[[str], None] = print,
    ) -> int:
        """Verify the entries of `requests` and compute those that are missing.

        Args:
            cap_gb: what all banks in `root` may take.

        Returns:
            How many entries this process computed.

        Raises:
            InputError: if an image holds NaN or infinite values, the disk or the cap is too small, or the folder is
                read-only.
        """
        with refused_if_unwritable(self.root):
            return self._fill(list(requests), cap_gb, log)

    def _fill(self, requests: list[Request], cap_gb: float | None, log: Callable[[str], None]) -> int:
        self.folder.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):  # a whole bank that cannot be written serves as well
            os.utime(self.folder)  # last used
        keys, images = [], {}
        for request in requests:
            image = _finite_image(request.case, request.image)
            if image.min() == image.max():
                log(f"The image of {request.case} is constant: there is nothing in it to tell voxels apart.")
            sha256 = hashlib.sha256(image).hexdigest()
            images[sha256] = request.image
            keys.append(EntryKey(self.recipe, request.case, sha256, request.layout(image.shape[1:])))
        missing = [key for key in keys if not self._open(key)]
        volumes: dict[str, list[EntryKey]] = {}  # a case may be kept in several ways
        for key in missing:
            volumes.setdefault(key.image_sha256, []).append(key)
        if missing:
            needed = sum(key.layout.voxels for key in missing) * self.backbone.out_channels * 2
            log(
                f"Feature bank {self.folder}: {len(volumes)} volumes and views to go through the frozen backbone, "
                f"once; their features take {gigabytes(needed)}."
            )
            self._tell_odd(missing, log)
            require_space(self.root, needed, cap_gb)
        progress = tqdm(volumes.values(), desc="feature bank", disable=not missing)
        computed = sum(self._compute(keys, images[keys[0].image_sha256]) for keys in progress)
        log(f"Feature bank {self.folder} takes {gigabytes(used_bytes(self.folder))}.")
        return computed

    def _tell_odd(self, missing: list[EntryKey], log: Callable[[str], None]) -> None:
        files = {key.name: [self.folder / f"{key.name}{ending}" for ending in (".npy", ".json")] for key in missing}
        damaged = [name for name, of_entry in files.items() if any(file.exists() for file in of_entry)]
        if damaged:
            log(f"{len(damaged)} entries were not whole, or altered, and are computed again: {', '.join(damaged)}.")
        small = sum(any(n < w for n, w in zip(key.layout.shape, self.patch_size)) for key in missing)
        if small:
            log(f"{small} of them are smaller than the window of {self.patch_size} voxels: padded with zeros.")

    def _compute(self, keys: list[EntryKey], load_image: Callable[[], np.ndarray]) -> int:
        """Entries of one volume; returns how many this process computed."""
        # the kernel releases the lock when its holder dies; the empty file stays
        with FileLock(self.folder / f"{keys[0].image_sha256[:12]}.lock"):
            missing = [key for key in keys if not self._open(key)]
            if not missing:
                return 0  # another training computed them meanwhile
            image = torch.from_numpy(_finite_image(keys[0].case, load_image))
            features = extract_features(self.backbone, image, self.patch_size, self.device)
            self.windows += len(window_starts(image.shape[1:], self.patch_size))
            for key in missing:
                self._write(key, features)
        for key in missing:
            if not self._open(key):
                raise OSError(f"{self.folder / key.name}.npy does not read as it was written: the disk may be failing.")
        return len(missing)

    def _write(self, key: EntryKey, features: torch.Tensor) -> None:
        for left in self.folder.glob(f".{escape(key.name)}.*{PART}"):  # of a killed process; this one has the lock
            left.unlink(missing_ok=True)
        array = key.layout.pack(features)
        sums, square_sums = [], []
        for channel in features:  # one at a time: float64 of a whole volume is four times what is stored
            channel = channel.half().double().flatten()
            sums.append(channel.sum().item())
            square_sums.append(torch.dot(channel, channel).item())
        content = {
            "key": asdict(key),
            "features_sha256": hashlib.sha256(array).hexdigest(),
            "sums": sums,
            "square_sums": square_sums,
        }
        with replacing(self.folder / f"{key.name}.npy") as part, open(part, "wb") as f:
            np.save(f, array)
        write_atomically(self.folder / f"{key.name}.json", json.dumps(content))

    def _open(self, key: EntryKey) -> bool:
        """Read and verify an entry; whether it is sound."""
        try:
            content = json.loads((self.folder / f"{key.name}.json").read_text("utf-8"))
            array = np.load(self.folder / f"{key.name}.npy", mmap_mode="r")
            sound = content["features_sha256"] == hashlib.sha256(array).hexdigest()
            if not sound or json.dumps(content["key"], sort_keys=True) != key.to_json():
                return False
            boxes = key.layout.unpack(array)
            # mapped from here on: what was verified is what is read, even if the bank is cleared meanwhile
            self._entries[key.case] = Entry(
                key.layout, boxes, np.array(content["sums"]), np.array(content["square_sums"])
            )
        except (OSError, EOFError, ValueError, KeyError, TypeError):
            return False
        return True

    def statistics(self, cases: Iterable[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of each channel (C,) over all voxels of `cases`."""
        entries = [self[case] for case in cases]
        voxels = sum(np.prod(entry.layout.shape) for entry in entries)
        mean = np.sum([entry.sums for entry in entries], 0) / voxels
        variance = np.sum([entry.square_sums for entry in entries], 0) / voxels - mean**2
        std = np.sqrt(np.maximum(variance, 0))
        # a channel that is dead on these images stays at its mean
        std = np.where(std > 1e-3 * max(std.max(), 1e-6), std, 1.0)
        return torch.tensor(mean, dtype=torch.float32), torch.tensor(std, dtype=torch.float32)


def _finite_image(case: str, load_image: Callable[[], np.ndarray]) -> np.ndarray:
    image = np.ascontiguousarray(load_image(), dtype=np.float32)
    require_finite(image, [f"The preprocessed image of {case}"] * len(image))
    return image
