"""Where data files are looked for, and whether they are the published ones."""

from __future__ import annotations

import gzip
import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from models.artifact import sha256_of

ENVIRONMENT = "ELBOW_DATA"


@dataclass(frozen=True)
class DataFile:
    """One published file.

    Attributes:
        name: as it lies in `<root>/<set>/`.
        sha256: of the file; None where no version of it counts as the original.
        content_sha256: of the decompressed content, for .gz files: a re-compressed copy is as good as the original.
        bytes: its size, where known.
        urls: where the same bytes can be downloaded, tried in order; none for files that are made locally.
        optional: the set can be read without it (labels).
    """

    name: str
    sha256: str | None = None
    content_sha256: str | None = None
    bytes: int | None = None
    urls: tuple[str, ...] = ()
    optional: bool = False

    def is_original(self, path: Path) -> bool:
        """Whether `path` holds the published content."""
        if self.sha256 is not None and sha256_of(path) == self.sha256:
            return True
        return self.content_sha256 is not None and _sha256_of_content(path) == self.content_sha256


def roots(root: str | os.PathLike[str] | None = None) -> tuple[Path, ...]:
    """The folders searched for `<set>/<file>`: `root` alone if given, else those of ELBOW_DATA, then ./data."""
    if root is not None:
        return (Path(root),)
    listed = os.environ.get(ENVIRONMENT, "").split(os.pathsep)
    return (*(Path(folder).expanduser() for folder in listed if folder), Path("data"))


def locate(dataset: str, files: Sequence[DataFile], root: Path) -> tuple[Path, ...] | None:
    """The paths of those of `files` that lie in `<root>/<dataset>/`; None if a required one is missing."""
    found = []
    for file in files:
        path = root / dataset / file.name
        if path.is_file():
            found.append(path)
        elif not file.optional:
            return None
    return tuple(found)


def fingerprint(paths: Iterable[Path]) -> str:
    """The sha256 of the one file, or of the listing `sha256sum` would print for several."""
    return fingerprint_of([(sha256_of(path), path.name) for path in paths])


def fingerprint_of(digests: Sequence[tuple[str, str]]) -> str:
    """`fingerprint` of files that are known by their (sha256, name)."""
    if len(digests) == 1:
        return digests[0][0]
    return hashlib.sha256("".join(f"{digest}  {name}\n" for digest, name in digests).encode()).hexdigest()


def fingerprint_tree(folder: Path, paths: Iterable[Path]) -> str:
    """The sha256 over the paths relative to `folder` and the contents of files below it, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _sha256_of_content(path: Path) -> str | None:
    digest = hashlib.sha256()
    try:
        with gzip.open(path, "rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
    except (OSError, EOFError):  # not gzip, or cut short: then it is not the original either
        return None
    return digest.hexdigest()
