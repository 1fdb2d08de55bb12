"""`elbow-train data`: which sets there are and where; `fetch NAME`; `check NAME`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from training.data.baselines import marginal_bernoulli
from training.data.catalogue import CATALOGUE, is_images, load
from training.data.catalogue import SCHEMES as IMAGE_SCHEMES
from training.data.errors import DataError
from training.data.fetch import fetch
from training.data.files import ENVIRONMENT, roots
from training.data.readers.folder import own_shape
from training.data.sequence_catalogue import SCHEMES, SEQUENCES, is_sequences, load_sequences
from training.data.sources import Entry, find_source

NAMES = ", ".join([*CATALOGUE, *SEQUENCES])
COLUMNS = "{:<16} {:>24} {:>9} {:<9} {:<39} {}"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `data` and its actions to the command line of `elbow-train`."""
    parser = subparsers.add_parser(
        "data",
        help="list, fetch and check the data sets",
        description=f"Lists the data sets. They are looked for in the folders of {ENVIRONMENT}, then in ./data, as <folder>/<name>/<file>.",
    )
    actions = parser.add_subparsers(dest="action", metavar="{fetch,check}")
    fetching = actions.add_parser("fetch", help="download a public set, with checksum; continues a partial download")
    fetching.add_argument("name", help=NAMES)
    fetching.add_argument("--to", type=Path, metavar="DIR", help=f"root to put it in (default: the first of {ENVIRONMENT}, else ./data)")
    checking = actions.add_parser("check", help="read a set and compare its files with the published checksums")
    checking.add_argument("name", help=f"{NAMES}, {IMAGE_SCHEMES}, {SCHEMES}")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The exit status: 0, or 1 with the reason on stderr."""
    try:
        if args.action == "fetch":
            _fetch(args.name, args.to or roots()[0])
        elif args.action == "check":
            return _check(args.name)
        else:
            _list()
    except DataError as exc:
        print(f"elbow-train data: {exc}", file=sys.stderr)
        return 1
    return 0


def _list() -> None:
    for title, catalogue in (("images: train + valid", CATALOGUE), ("sequences: train + valid", SEQUENCES)):
        rows: dict[str, Entry] = dict(catalogue)
        print(COLUMNS.format("name", title, "MB", "checksum", "licence", "where"))
        for entry in rows.values():
            megabytes, checksum, where = _state(entry)
            print(COLUMNS.format(entry.name, f"{entry.train:,} + {entry.valid:,}", megabytes, checksum, entry.licence, where))


def _state(entry: Entry) -> tuple[str, str, str]:
    """(size in MB, checksum, where) of a set, found or not."""
    try:
        found = find_source(entry, entry.sources)
    except DataError:
        fetchable = any(source.fetchable for source in entry.sources)
        return "-", "-", f"missing: elbow-train data fetch {entry.name}" if fetchable else "missing, and no checked download is known"
    checksum = "differs" if found.altered() else "ok"
    return f"{found.bytes / 1e6:.1f}", checksum, ", ".join(str(path) for path in found.paths)


def _entry(name: str) -> Entry:
    """The row of either catalogue, or a DataError that lists all names."""
    entry: Entry | None = SEQUENCES.get(name) or CATALOGUE.get(name)
    if entry is None:
        raise DataError(f"no published set is called {name!r}: choose {NAMES}; sets of one's own ({IMAGE_SCHEMES}, {SCHEMES}) are files")
    return entry


def _fetch(name: str, folder: Path) -> None:
    for path in fetch(_entry(name), folder):
        print(path)
    if folder.resolve() not in {root.resolve() for root in roots()}:
        print(f"To use it: export {ENVIRONMENT}={folder}")


def _check(name: str) -> int:
    if is_sequences(name):
        _describe_sequences(name)
    elif is_images(name):
        _describe_images(name)
    else:
        raise DataError(f"unknown data set {name!r}: choose {NAMES}, {IMAGE_SCHEMES}, {SCHEMES}")
    return _compare_checksums(name) if name in SEQUENCES or name in CATALOGUE else 0


def _describe_images(name: str) -> None:
    own = own_shape(Path(name.removeprefix("folder:")).expanduser()) if name.startswith("folder:") else None
    images = load(name, shape=own or (28, 28))  # as a run takes it
    print(f"{name}: {len(images.train):,} training and {len(images.valid):,} validation images of {images.shape[0]} x {images.shape[1]}")
    print(f"kind {images.kind}, labels {'no' if images.train_labels is None else 'yes'}, sha256 {images.sha256}")


def _describe_sequences(name: str) -> None:
    sequences = load_sequences(name)
    for split, part in sequences.splits.items():
        shortest, longest = part.lengths.min(), part.lengths.max()
        print(f"{name} {split}: {len(part):,} sequences, {part.frames:,} frames, {shortest:,} to {longest:,} each")
    if sequences.left_out:
        print(sequences.left_out)
    print(f"kind {sequences.kind}, frame: {sequences.description}, sha256 {sequences.sha256}")
    if sequences.kind == "binary":
        baseline = marginal_bernoulli(sequences.train, sequences.valid)
        print(f"independent notes, on validation: {baseline.frame:.4f} nats per frame, {baseline.sequence:.4f} by sequence")
    else:
        print(f"training mean {sequences.mean:.6f}, std {sequences.std:.6f}")


def _compare_checksums(name: str) -> int:
    entry = _entry(name)
    found = find_source(entry, entry.sources)
    if entry.note:
        print(entry.note)
    altered = found.altered()
    for path in found.paths:
        print(f"{path}: {'readable, but not the published file' if path in altered else 'checksum ok'}")
    return 1 if altered else 0
