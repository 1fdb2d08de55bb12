"""Whether data are those that a checkpoint was trained on: the same files, or another published form of a catalogued set."""

from __future__ import annotations

from training.data.catalogue import CATALOGUE
from training.data.errors import DataError
from training.data.sequence_catalogue import SEQUENCES
from training.data.sources import Entry


def refuse_other_data(who: str, name: str, trained_on: str | None, found: str) -> None:
    """Compares sha256s; `trained_on` is None in checkpoints that do not say.

    Args:
        who: was trained. name: of the set.

    Raises:
        DataError: the data are others; says what was there, what is there and what to do.
    """
    if trained_on is None or trained_on == found or {trained_on, found} <= _published(name):
        return
    raise DataError(
        f"{who} was trained on another {name} (sha256 {trained_on[:12]}…) than is there now ({found[:12]}…): files were changed, added or "
        "removed. Give the same ones (--data), or train on these into another --output"
    )


def _published(name: str) -> set[str]:
    entry: Entry | None = CATALOGUE.get(name) or SEQUENCES.get(name)
    return set().union(*(source.published() for source in entry.sources)) if entry else set()
