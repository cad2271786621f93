"""A raw dataset under construction: hidden beside the others until it is whole, resumed where it stopped."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import TimeoutError, get_context
from pathlib import Path

from tqdm import tqdm

from fsefs_nnunet.errors import InputError
from fsefs_nnunet.files import read_json, write_atomically

RECORDS = "records"  # one file per finished case
READER = "NibabelIOWithReorient"  # the public datasets mix orientations


def new_dataset(dataset_id: int, name: str) -> Path:
    """Folder of a raw dataset to be. Raises InputError for an id that is taken, in any of nnU-Net's folders."""
    from nnunetv2.paths import nnUNet_raw
    from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets

    if not nnUNet_raw.is_set():
        raise InputError(
            "The environment variable nnUNet_raw is not set: export nnUNet_raw=FOLDER, as nnU-Net needs it."
        )
    if not 0 < dataset_id < 1000:
        raise InputError(f"-d {dataset_id}: nnU-Net's dataset ids go from 1 to 999.")
    taken = sorted(find_candidate_datasets(dataset_id))
    if taken:
        raise InputError(f"Dataset id {dataset_id} is taken by {', '.join(taken)}: choose another.")
    return Path(str(nnUNet_raw)) / f"Dataset{dataset_id:03d}_{name}"


@contextmanager
def space_told() -> Iterator[None]:
    """Raises InputError where the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        text = f"No space left in nnUNet_raw ({error}): free some, then run the same command again."
        raise InputError(text) from error


class UnfinishedDataset:
    """The hidden folder `.DatasetXXX_Name.part`, which becomes `target` when all is written.

    nnU-Net does not see it before. `options` say what it is made of: an interrupted construction goes on with the
    same ones alone.
    """

    def __init__(self, target: Path, options: dict):
        self.target = target
        self.folder = target.parent / f".{target.name}.part"
        file = self.folder / "options.json"
        if file.exists() and read_json(file) != options:
            raise InputError(
                f"{self.folder} is unfinished and was begun with other options, labels or cases: delete it first."
            )
        try:
            for name in ("imagesTr", "labelsTr", RECORDS):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            if not file.exists():
                write_atomically(file, json.dumps(options))
        except OSError as error:
            raise InputError(f"{target.parent} cannot be written to: {error}.") from error

    def finish(self, summary: dict, **dataset_json) -> None:
        """Write dataset.json with nnU-Net's function and the summary, and take the final name."""
        from nnunetv2.dataset_conversion.generate_dataset_json import generate_dataset_json

        with space_told():
            generate_dataset_json(
                str(self.folder),
                dataset_name=self.target.name,
                converted_by="fseft",
                overwrite_image_reader_writer=READER,
                **dataset_json,
            )
            (self.folder / "conversion.json").write_text(json.dumps(summary, indent=1))
        shutil.rmtree(self.folder / RECORDS)
        (self.folder / "options.json").unlink()
        os.replace(self.folder, self.target)

    def discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _quiet_worker() -> None:
    # the parent tells the user
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _returning(job: tuple[Callable, tuple]) -> object:
    function, arguments = job
    try:
        with space_told():
            return function(*arguments)
    except InputError as error:  # a SystemExit would end the worker without a word
        return error


def run_jobs(function: Callable, jobs: Iterable[tuple], num_processes: int, text: str) -> list:
    """Results of `function(*job)`, in parallel, with a progress bar.

    Raises:
        InputError: the first one of a worker, where one was killed, and for an interrupt.
    """
    todo = [(function, job) for job in jobs]
    if not todo:
        return []
    try:
        if num_processes == 1:
            return _collected(map(_returning, todo), len(todo), text)
        with get_context("spawn").Pool(min(num_processes, len(todo)), _quiet_worker) as pool:
            return _collected(_watched(pool, pool.imap(_returning, todo)), len(todo), text)
    except KeyboardInterrupt:
        raise InputError("Interrupted: run the same command again to go on.") from None


def _watched(pool, results) -> Iterator:
    """What `results`, of the pool's imap, give; a pool waits for ever for the result of a worker that was killed."""
    workers = list(pool._pool)  # as nnU-Net watches its own
    while True:
        try:
            yield results.next(timeout=0.5)
        except StopIteration:
            return
        except TimeoutError:
            if not all(worker.is_alive() for worker in workers):
                raise InputError(
                    f"One of {len(workers)} processes was killed, for want of memory as a rule: run the same command "
                    "again with a smaller -np to go on."
                ) from None


def _collected(iterator: Iterable, total: int, text: str) -> list:
    results = []
    for result in tqdm(iterator, total=total, desc=text):
        if isinstance(result, InputError):
            raise result
        results.append(result)
    return results


def archives_in(folder: Path) -> list[str]:
    return sorted(
        f.name for f in folder.iterdir() if re.search(r"\.(zip|tar|tgz|tar\.gz|rar|7z|part|crdownload)$", f.name)
    )
