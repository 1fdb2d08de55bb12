"""`elbow-train data`: which sets there are and where; `fetch NAME`; `check NAME`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from training.data.catalogue import CATALOGUE, Dataset, find, load, lookup
from training.data.errors import DataError
from training.data.fetch import fetch
from training.data.files import ENVIRONMENT, roots

COLUMNS = "{:<16} {:>15} {:>9} {:<9} {:<39} {}"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `data` and its actions to the command line of `elbow-train`."""
    parser = subparsers.add_parser(
        "data",
        help="list, fetch and check the data sets",
        description=f"Lists the data sets. They are looked for in the folders of {ENVIRONMENT}, then in ./data, as <folder>/<name>/<file>.",
    )
    actions = parser.add_subparsers(dest="action", metavar="{fetch,check}")
    fetching = actions.add_parser("fetch", help="download a public set, with checksum; continues a partial download")
    fetching.add_argument("name", help=", ".join(CATALOGUE))
    fetching.add_argument("--to", type=Path, metavar="DIR", help=f"root to put it in (default: the first of {ENVIRONMENT}, else ./data)")
    checking = actions.add_parser("check", help="read a set and compare its files with the published checksums")
    checking.add_argument("name", help=f"{', '.join(CATALOGUE)}, folder:PATH or npz:PATH")
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
    print(COLUMNS.format("name", "train + valid", "MB", "checksum", "licence", "where"))
    for dataset in CATALOGUE.values():
        megabytes, checksum, where = _state(dataset)
        rows = f"{dataset.train:,} + {dataset.valid:,}"
        print(COLUMNS.format(dataset.name, rows, megabytes, checksum, dataset.licence, where))


def _state(dataset: Dataset) -> tuple[str, str, str]:
    """(size in MB, checksum, where) of a set, found or not."""
    try:
        found = find(dataset.name)
    except DataError:
        return "-", "-", f"missing: elbow-train data fetch {dataset.name}"
    checksum = "differs" if found.altered() else "ok"
    return f"{found.bytes / 1e6:.1f}", checksum, ", ".join(str(path) for path in found.paths)


def _fetch(name: str, folder: Path) -> None:
    for path in fetch(lookup(name), folder):
        print(path)
    if folder.resolve() not in {root.resolve() for root in roots()}:
        print(f"To use it: export {ENVIRONMENT}={folder}")


def _check(name: str) -> int:
    images = load(name)
    print(f"{name}: {len(images.train):,} training and {len(images.valid):,} validation images of {images.shape[0]} x {images.shape[1]}")
    print(f"kind {images.kind}, labels {'no' if images.train_labels is None else 'yes'}, sha256 {images.sha256}")
    if name not in CATALOGUE:
        return 0
    found = find(name)
    if found.dataset.note:
        print(found.dataset.note)
    altered = found.altered()
    for path in found.paths:
        print(f"{path}: {'readable, but not the published file' if path in altered else 'checksum ok'}")
    return 1 if altered else 0
