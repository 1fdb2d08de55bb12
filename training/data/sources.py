"""What every row of a catalogue has: the forms in which a set may lie on a disk, and finding the first that is there.

`T` is what reading a source gives: (train, valid) of still images, or the parts of a set of sequences.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from training.data.errors import DataError
from training.data.files import ENVIRONMENT, DataFile, fingerprint, fingerprint_of, locate, roots

T = TypeVar("T")
Paths = Mapping[str, Path]


@dataclass(frozen=True)
class Source(Generic[T]):
    """One form in which a set may lie in `<root>/<folder>/`: its files, and how to read and split them."""

    files: tuple[DataFile, ...]
    read: Callable[[Paths], T]

    @property
    def fetchable(self) -> bool:
        return all(file.urls for file in self.files)

    def published(self) -> set[str]:
        """What `Found.sha256` is of the published files, with and without the optional ones."""
        if any(file.sha256 is None for file in self.files):
            return set()
        required = [file for file in self.files if not file.optional]
        return {fingerprint_of([(str(file.sha256), file.name) for file in files]) for files in (required, self.files)}


class Entry(Protocol):
    """What listing, finding and fetching know of a catalogue's row. `train` and `valid` count images or sequences."""

    @property
    def name(self) -> str: ...
    @property
    def folder(self) -> str: ...
    @property
    def train(self) -> int: ...
    @property
    def valid(self) -> int: ...
    @property
    def licence(self) -> str: ...
    @property
    def note(self) -> str: ...
    @property
    def sources(self) -> tuple[Source[Any], ...]: ...


@dataclass(frozen=True)
class Found(Generic[T]):
    """A data set on this machine. `paths` are in the order of `source.files`, absent optional files left out."""

    source: Source[T]
    paths: tuple[Path, ...]

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.paths)

    @property
    def sha256(self) -> str:
        return fingerprint(self.paths)

    def altered(self) -> list[Path]:
        """The files that are not the published ones: re-made or damaged. Reads every byte."""
        files = {file.name: file for file in self.source.files}
        return [path for path in self.paths if not files[path.name].is_original(path)]

    def read(self) -> T:
        return self.source.read({path.name: path for path in self.paths})


def find_source(entry: Entry, sources: tuple[Source[T], ...], root: str | os.PathLike[str] | None = None) -> Found[T]:
    """The first complete one of `sources`, root by root.

    Raises:
        DataError: none is on this machine; says what was looked for, where, and how to get it.
    """
    searched = roots(root)
    for folder in searched:
        for source in sources:
            paths = locate(entry.folder, source.files, folder)
            if paths is not None:
                return Found(source, paths)
    wanted = " or ".join("+".join(file.name for file in source.files if not file.optional) for source in sources)
    places = ", ".join(str(folder / entry.folder) for folder in searched)
    fetchable = any(source.fetchable for source in sources)
    remedy = f"`elbow-train data fetch {entry.name}` downloads it" if fetchable else "No checked download is known: put it there"
    raise DataError(f"{entry.name}: no {wanted} in {places}. {remedy}; or set {ENVIRONMENT} to the folder that holds {entry.folder}/.")
