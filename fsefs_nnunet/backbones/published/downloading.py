"""Downloads of published files: resumed where they stopped, verified, and with a one-sentence error without network."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from filelock import FileLock, Timeout
from tqdm import tqdm

from fsefs_nnunet.backbones.checkpoints import refuse_web_page
from fsefs_nnunet.backbones.zoo import PublishedBackbone
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.files import sha256_of

TIMEOUT = 20  # seconds without a response
BLOCK = 1 << 20


def by_hand(entry: PublishedBackbone) -> str:
    """What to do if a program cannot fetch the file."""
    if entry.package:
        return f"{entry.how_to_get}."
    places = " or ".join(place for place in (entry.link, entry.page) if place)
    return f"Get {entry.file} from {places}, save it anywhere, and run: fseft backbones import {entry.id} FILE"


@contextmanager
def only_download(entry: PublishedBackbone, folder: Path) -> Iterator[None]:
    """Within the block, no other process downloads `entry` into `folder`.

    Raises:
        InputError: if another one does, or the folder cannot be written.
    """
    lock = FileLock(folder / f"{entry.id}.download.lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise InputError(
            f"Another process is downloading {entry.id!r} into {folder}: wait until it has finished."
        ) from error
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error}): choose another folder with -o.") from error
    try:
        yield
    finally:
        lock.release()


def download(entry: PublishedBackbone, folder: Path) -> Path:
    """Fetch the file of `entry` into `folder`; an interrupted download resumes from `<file>.part`.

    Raises:
        InputError: without a direct link or network, for an interrupted transfer or a full disk, and for a file of
            a size or SHA-256 other than the known one.
    """
    if not entry.link:
        raise InputError(f"There is no direct link to {entry.id!r}. {by_hand(entry)}")
    folder = Path(folder)
    part, file = folder / f"{entry.file}.part", folder / entry.file
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            _fetch(entry, part)
            os.replace(part, file)
    except HTTPError as error:
        raise InputError(f"{entry.link} was refused ({error.code} {error.reason}). {by_hand(entry)}") from error
    except (URLError, TimeoutError, HTTPException, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise InputError(f"No connection to {entry.link} ({reason}). Try again, or: {by_hand(entry)}") from error
    except OSError as error:
        raise InputError(f"{part} could not be written ({error}): make room and download again.") from error
    _verify(entry, file)
    return file


def _fetch(entry: PublishedBackbone, part: Path) -> None:
    start = part.stat().st_size if part.exists() else 0
    if entry.size and start == entry.size:
        return
    request = Request(entry.link, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        answer = urlopen(request, timeout=TIMEOUT)
    except HTTPError as error:
        if error.code != 416:  # there is nothing after these bytes: the file is complete, or a different one
            raise
        if _total(error.headers.get("Content-Range", "")) != start:
            part.unlink()
            _fetch(entry, part)
        return
    with answer:
        if answer.status != 206:
            start = 0
        total = _total(answer.headers.get("Content-Range", "")) or int(answer.headers.get("Content-Length") or 0)
        received = start + _append(answer, part, start, total)
    if total and received < total:
        raise InputError(
            f"The connection ended after {received} of {total} bytes: run fseft backbones download {entry.id} again "
            "to resume from there."
        )


def _append(answer: HTTPResponse, part: Path, start: int, total: int) -> int:
    count = 0
    with (
        open(part, "ab" if start else "wb") as f,
        tqdm(total=total or None, initial=start, unit="B", unit_scale=True, desc=part.stem) as progress,
    ):
        while block := _receive(answer):
            f.write(block)
            count += len(block)
            progress.update(len(block))
    return count


def _receive(answer: HTTPResponse) -> bytes:
    try:
        return answer.read(BLOCK)
    except OSError as error:  # raised by the network, not by the file
        raise ConnectionError(str(error)) from error


def _total(content_range: str) -> int:
    """Size of the whole file in "bytes 5-9/10", 0 if it is not given."""
    match = re.search(r"/(\d+)$", content_range)
    return int(match[1]) if match else 0


def _verify(entry: PublishedBackbone, file: Path) -> None:
    """A file that fails is deleted, since resuming it would only repeat the failure."""
    try:
        refuse_web_page(file)
        if entry.size and file.stat().st_size != entry.size or entry.sha256 and sha256_of(file) != entry.sha256:
            raise InputError(
                f"{entry.link} returned a file other than the known one ({entry.size} bytes, SHA-256 "
                f"{entry.sha256[:12]}): download it again, or ask its publisher."
            )
    except InputError:
        file.unlink()
        raise
