"""FeatureBank: the frozen backbone's features of each volume, stored for all folds, shots, seeds and adapters."""

from __future__ import annotations

import errno
import json
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from filelock import FileLock
from tqdm import tqdm

from fsefs_nnunet.backbones.frozen import FrozenBackbone
from fsefs_nnunet.cases.preprocessed import require_finite
from fsefs_nnunet.device import precision_name
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.features.arrays import mapped, new_files
from fsefs_nnunet.features.disk import BANK_FOLDER, require_space, used_bytes
from fsefs_nnunet.features.entry import LABELS, Entry, EntryKey, short_hash, stamp_of
from fsefs_nnunet.features.layout import Layout
from fsefs_nnunet.features.memory import memory_warnings
from fsefs_nnunet.features.packing import Blocks, Boxes, Overflow, Packing, Sums, as_half, mean_and_deviation
from fsefs_nnunet.features.tiling import TILE_STEP_SIZE, Tiling
from fsefs_nnunet.features.windows import run_windows
from fsefs_nnunet.files import PART, gigabytes, refused_if_unwritable, replacing, sha256_of, write_atomically

if TYPE_CHECKING:
    from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

FORMAT = 3  # increase it when the content of entries changes: older ones are then ignored


@dataclass(frozen=True)
class Request:
    """A volume whose features are needed.

    files: those that hold the image; as long as their sizes and modification times match, they are not read.
    content: computes a hash of their content, in case sizes or times differ.
    image: loads the preprocessed image (channels, X, Y, Z).
    layout: what to keep of the volume.
    made: for a view, everything that it depends on besides the files.
    labels: for a view, gives its label map (1, X, Y, Z), which the entry stores; called after `image`.
    statistics: whether the sums of the channels are needed.
    """

    case: str
    files: Sequence[Path]
    content: Callable[[], str]
    image: Callable[[], np.ndarray]
    layout: Layout
    made: dict = field(default_factory=dict)
    labels: Callable[[], np.ndarray] | None = None
    statistics: bool = False

    @property
    def volume(self) -> tuple:
        """Key of the volume: requests with the same key share a pass of the backbone."""
        return tuple(file.name for file in self.files), json.dumps(self.made, sort_keys=True)


class FeatureBank:
    """Features on disk: for each entry a flat `<name>.npy` as its layout packs it, and a `<name>.json`.

    Values are float16, or float32 if one of them overflows float16. The JSON, written last, states everything that the
    entry was made from; an entry whose files do not match it is computed again.
    """

    def __init__(
        self, root: Path, backbone: FrozenBackbone, stages: str, patch_size: Sequence[int], device: torch.device
    ):
        """
        Args:
            root: the folder of all banks of a dataset.
            stages: the backbone's, as the plans name them.
            patch_size: window of the backbone (X, Y, Z).

        The attribute `windows` counts the windows that went through the backbone.
        """
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
            **({"z_scores_as_hu": backbone.z_scores_as_hu} if backbone.z_scores_as_hu else {}),
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

    def __contains__(self, case: str) -> bool:
        return case in self._entries

    @property
    def precisions(self) -> list[str]:
        """Precisions that the backbone ran in for the entries in use."""
        return sorted({entry.precision for entry in self._entries.values()})

    def packing(self, layout: Layout) -> Packing:
        return Packing(layout, Tiling.of(layout.shape, self.patch_size, self.backbone.maps))

    # ---- filling ----

    def fill(
        self,
        requests: Iterable[Request],
        cap_gb: float | None = None,
        log: Callable[[str], None] = print,
        leave_out: Callable[[str], bool] = lambda case: False,
    ) -> int:
        """Open the entries of `requests` and compute those that are missing, in this order.

        Args:
            cap_gb: GB (10^9 bytes) that all banks in `root` may take; None: no cap.
            leave_out: called with the name of a volume's case before it is computed; True leaves it out.

        Returns:
            How many entries this process computed.

        Raises:
            InputError: if an image holds NaN or infinite values, the disk or the cap is too small, or the folder is
                read-only.
        """
        with refused_if_unwritable(self.root):
            return self._fill(list(requests), cap_gb, log, leave_out)

    def missing_bytes(self, requests: Iterable[Request]) -> int:
        """Bytes that the missing entries of `requests` would take in float16."""
        return sum(2 * self.packing(r.layout).size for r in self.missing(requests))

    def missing(self, requests: Iterable[Request]) -> list[Request]:
        """Those of `requests` that `fill` would compute."""
        return [request for request in requests if not self._open(request)]

    def _fill(self, requests: list[Request], cap_gb: float | None, log: Callable, leave_out: Callable) -> int:
        self.folder.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):  # a complete bank may be read-only
            os.utime(self.folder)  # last used
        missing = self.missing(requests)
        if not missing:
            return 0
        volumes: dict[tuple, list[Request]] = {}  # a volume may be kept in several layouts
        for request in missing:
            volumes.setdefault(request.volume, []).append(request)
        needed = sum(2 * self.packing(request.layout).size for request in missing)
        log(
            f"Feature bank {self.folder}: {len(volumes)} volumes and views to go through the frozen backbone; their "
            f"features take {gigabytes(needed)}."
        )
        self._log_damaged_and_small(missing, log)
        require_space(self.root, needed, cap_gb)
        largest = max((self.packing(r.layout).tiling for r in missing), key=lambda tiling: tiling.slab_bytes)
        for warning in memory_warnings(largest, self.backbone.channels, self.device):
            log(warning)
        computed = 0
        total = sum(self.packing(of_volume[0].layout).tiling.num_windows for of_volume in volumes.values())
        with tqdm(total=total, desc="feature bank, windows") as progress:
            for of_volume in volumes.values():
                if leave_out(of_volume[0].case):
                    progress.update(self.packing(of_volume[0].layout).tiling.num_windows)
                else:
                    computed += self._compute(of_volume, log, progress)
        log(f"Feature bank {self.folder} takes {gigabytes(used_bytes(self.folder))}.")
        return computed

    def _key(self, request: Request) -> EntryKey:
        return EntryKey(self.recipe, request.case, request.layout, request.made)

    def _log_damaged_and_small(self, missing: list[Request], log: Callable[[str], None]) -> None:
        names = [self._key(request).name for request in missing]
        damaged = [n for n in names if any((self.folder / f"{n}{ending}").exists() for ending in (".npy", ".json"))]
        if damaged:
            log(
                f"{len(damaged)} entries were incomplete, or their files were altered, and are computed again: "
                f"{', '.join(damaged)}."
            )
        small = sum(any(n < w for n, w in zip(r.layout.shape, self.patch_size)) for r in missing)
        if small:
            log(f"{small} of them are smaller than the window of {self.patch_size} voxels: padded with zeros.")

    def _compute(self, requests: list[Request], log: Callable[[str], None], progress: tqdm) -> int:
        """Compute the entries of one volume; returns how many this process computed."""
        with self._locked(short_hash(repr(requests[0].volume))) as alone:
            missing = self.missing(requests)
            if not missing:  # another process has computed them in the meantime
                progress.update(self.packing(requests[0].layout).tiling.num_windows)
                return 0
            if alone:
                self._clear_up(missing)
            # taken before the image is read: if it is replaced meanwhile, the entry will not match the new file
            stamps = [{"files": [stamp_of(f) for f in r.files], "content_sha256": r.content()} for r in missing]
            image = np.ascontiguousarray(missing[0].image(), dtype=np.float32)
            case = missing[0].case
            require_finite(image, [f"The preprocessed image of {case}"] * len(image))
            if image.min() == image.max():
                log(f"The image of {case} is constant: there is nothing in it to tell voxels apart.")
            try:
                try:
                    self._write(missing, stamps, image, np.float16, progress)
                except Overflow:
                    log(f"Features of {case} are too large for float16: they are stored in float32.")
                    self._write(missing, stamps, image, np.float32, progress)
            except InputError as error:
                raise InputError(f"{case}: {error}") from error
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise InputError(
                    f"The disk of {self.folder} is full: free some of it, clear old banks with `fseft bank -d ID "
                    "--clear`, and start again; what is stored so far is kept."
                ) from error
        for request in missing:
            if not self._open(request):
                name = self._key(request).name
                raise OSError(f"{self.folder / name}.npy does not read back as written: the disk may be failing.")
        return len(missing)

    @contextmanager
    def _locked(self, name: str) -> Iterator[bool]:
        """Yields whether this process holds the lock of a volume.

        On a file system without locks several processes may compute a volume; the last one replaces equal files.
        """
        # the kernel releases the lock if its holder dies; the empty file stays
        lock = FileLock(self.folder / f"{name}.lock")
        try:
            lock.acquire()
        except (NotImplementedError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            lock = None
        try:
            yield lock is not None
        finally:
            if lock is not None:
                lock.release()

    def _clear_up(self, requests: list[Request]) -> None:
        """Remove unfinished files of these entries that killed processes left."""
        for request in requests:
            for left in self.folder.glob(f".{escape(self._key(request).name)}.*{PART}"):
                left.unlink(missing_ok=True)

    def _write(self, requests: list[Request], stamps: list, image: np.ndarray, dtype: type, progress: tqdm) -> None:
        packings = [self.packing(request.layout) for request in requests]
        tiling, names = packings[0].tiling, [self._key(request).name for request in requests]
        with new_files([self.folder / f"{name}.npy" for name in names], [p.size for p in packings], dtype) as flats:
            sums = Sums(tiling) if any(request.statistics for request in requests) else None
            keep = [
                Boxes(packing, flat) if packing.layout.pool is None else Blocks(tiling, packing.layout, self.device)
                for packing, flat in zip(packings, flats)
            ]
            for slab in run_windows(self.backbone, torch.from_numpy(image), tiling, self.device):
                for consumer in [*keep, *([sums] if sums else [])]:
                    consumer.add(slab)
                progress.update(tiling.num_windows // len(tiling.starts[0]))
            self.windows += tiling.num_windows
            for packing, flat, consumer in zip(packings, flats, keep):
                if packing.layout.pool is not None:
                    values = consumer.result().cpu()
                    flat[:] = (as_half(values) if dtype == np.float16 else values).numpy().ravel()
        for request, name, stamp in zip(requests, names, stamps):
            npy = self.folder / f"{name}.npy"
            content = {
                "key": asdict(self._key(request)),
                **stamp,
                "features": stamp_of(npy),
                "features_sha256": sha256_of(npy),
                "precision": precision_name(self.device),
                "sums": sums.sums.tolist() if sums else None,
                "square_sums": sums.square_sums.tolist() if sums else None,
            }
            if request.labels is not None:
                labels = self.folder / f"{name}{LABELS}"
                with replacing(labels) as part, open(part, "wb") as f:
                    np.save(f, request.labels())
                content["labels_sha256"] = sha256_of(labels)
            write_atomically(self.folder / f"{name}.json", json.dumps(content))

    # ---- reading ----

    def _open(self, request: Request) -> bool:
        """Open an entry; returns whether it exists and matches the present files."""
        key, packing = self._key(request), self.packing(request.layout)
        json_file, npy = (self.folder / f"{key.name}{ending}" for ending in (".json", ".npy"))
        try:
            content = json.loads(json_file.read_text("utf-8"))
            if json.dumps(content["key"], sort_keys=True) != key.to_json():
                return False
            if request.statistics and content["sums"] is None:
                return False
            # a different time does not mean different content: the bank or the dataset may have been copied
            now = {"features": stamp_of(npy), "files": [stamp_of(file) for file in request.files]}
            if content["features"] != now["features"] and sha256_of(npy) != content["features_sha256"]:
                return False
            if content["files"] != now["files"] and request.content() != content["content_sha256"]:
                return False
            if content != content | now:
                with suppress(OSError):  # the bank may be read-only
                    write_atomically(json_file, json.dumps(content | now))
            flat = mapped(npy)
            if flat.shape != (packing.size,):
                return False
            sums = [content[name] and np.array(content[name], float) for name in ("sums", "square_sums")]
            if not all(s is None or (s.shape == (packing.tiling.channels,) and np.isfinite(s).all()) for s in sums):
                return False
            labels = None if request.labels is None else self._labels_of(key, content)
            # mapped from here on, so that it can be read even if the bank is cleared meanwhile
            self._entries[key.case] = Entry(packing, flat, *sums, labels, str(content["precision"]))
        except (OSError, EOFError, ValueError, KeyError, TypeError):
            return False
        return True

    def _labels_of(self, key: EntryKey, content: dict) -> np.ndarray:
        """The label map of a view. Raises ValueError if it is not the one that belongs to the entry."""
        file = self.folder / f"{key.name}{LABELS}"
        labels = np.load(file)
        noted = content.get("labels_sha256")  # not by earlier versions
        if labels.shape[1:] != key.layout.shape or (noted and sha256_of(file) != noted):
            raise ValueError(f"{file} was altered.")
        return labels

    def move_to_device(self, cases: Sequence[str], most_bytes: float) -> bool:
        """Keep the features of `cases` in the memory of the device, if they take no more than `most_bytes`."""
        if sum(self[case].flat.nbytes for case in cases) > most_bytes:
            return False
        self._entries |= {case: self[case].on(self.device) for case in cases}
        return True

    def forget_pages(self) -> None:
        """Release the pages of mapped files; what is needed again is read again.

        The system would reclaim them, too, but until then counts them as the training's memory.
        """
        for flat in (entry.flat for entry in self._entries.values()):
            if isinstance(flat, np.memmap) and hasattr(mmap, "MADV_DONTNEED"):
                flat._mmap.madvise(mmap.MADV_DONTNEED)

    def statistics(self, cases: Iterable[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of each channel (C,) over all voxels of `cases`."""
        entries = [self[case] for case in cases]
        voxels = sum(np.prod(entry.layout.shape) for entry in entries)
        sums, squares = (np.sum([getattr(entry, of) for entry in entries], 0) for of in ("sums", "square_sums"))
        return mean_and_deviation(voxels, sums, squares)
