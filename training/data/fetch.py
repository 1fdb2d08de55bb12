"""Downloads published files: streamed, resumed after an interruption, checked, and put in place in one move."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from tqdm import tqdm

from training.data.errors import DataError, reason
from training.data.files import ENVIRONMENT, DataFile
from training.data.sources import Entry, Source

TIMEOUT_S = 30.0


def fetch(dataset: Entry, folder: Path) -> list[Path]:
    """Puts every file of the set's first downloadable source into `<folder>/<its folder>/`; what is there and right is kept.

    Args:
        dataset: a row of the catalogue.
        folder: a root, as ELBOW_DATA lists them.

    Raises:
        DataError: nothing to download, no mirror reachable, the folder cannot be written, or a wrong checksum.
    """
    source = _downloadable(dataset)
    target = folder / dataset.folder
    try:
        target.mkdir(parents=True, exist_ok=True)
        with httpx.Client(follow_redirects=True, timeout=TIMEOUT_S) as client:
            return [fetch_file(file, target / file.name, client) for file in source.files]
    except OSError as exc:
        raise DataError(f"cannot write to {target}: {reason(exc)}; choose another folder with --to") from exc


def fetch_file(file: DataFile, path: Path, client: httpx.Client) -> Path:
    """Downloads one file to `path`, from the first of its mirrors that sends it whole.

    The bytes gather in `<path>.partial`, which the next mirror and a later call continue; only a complete and verified
    file gets the name `path`. A complete one with a wrong checksum is deleted, so that the next attempt starts afresh.
    """
    if path.is_file() and file.is_original(path):
        return path
    partial = path.with_name(path.name + ".partial")
    failures = []
    for url in file.urls:
        try:
            _download(url, partial, file, client)
            return _accept(partial, file).replace(path)
        except (httpx.HTTPError, DataError) as exc:
            failures.append(f"{urlsplit(url).netloc}: {reason(exc)}")
    raise DataError(
        f"{file.name} could not be downloaded ({'; '.join(failures)}). Try again: it goes on where it stopped. "
        f"Without a network, get {file.urls[0]} elsewhere and put it at {path}, or set {ENVIRONMENT} to a folder that has it."
    )


def _downloadable(dataset: Entry) -> Source[Any]:
    for source in dataset.sources:
        if source.fetchable:
            return source
    raise DataError(f"{dataset.name}: no public copy is known; put it in a folder that {ENVIRONMENT} names")


def _download(url: str, partial: Path, file: DataFile, client: httpx.Client) -> None:
    """Appends to `partial` what it lacks, or starts over where the server does not resume."""
    have = partial.stat().st_size if partial.exists() else 0
    if have == file.bytes:
        return
    # identity: a proxy's compression would break both the count and the byte ranges
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with client.stream("GET", url, headers=headers) as response:
        if have and response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # nothing is missing: the checksum decides
        response.raise_for_status()
        if response.status_code != httpx.codes.PARTIAL_CONTENT:
            have = 0
        with (
            partial.open("ab" if have else "wb") as out,
            tqdm(total=file.bytes, initial=have, desc=file.name, unit="B", unit_scale=True, disable=None) as bar,
        ):
            for block in response.iter_raw():
                out.write(block)
                bar.update(len(block))
                if file.bytes is not None and out.tell() > file.bytes:
                    return  # more than was published: the checksum will refuse it, so stop early


def _accept(partial: Path, file: DataFile) -> Path:
    """`partial`, if it is the published file. One that only stopped early is kept to go on from."""
    size = partial.stat().st_size
    if file.bytes is not None and size < file.bytes:
        raise DataError(f"stopped after {size} of {file.bytes} bytes")
    if not file.is_original(partial):
        partial.unlink()
        raise DataError("what it sent does not have the published checksum")
    return partial
